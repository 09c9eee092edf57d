"""A linear layer that holds its weight quantised."""

from __future__ import annotations

from typing import Any

from cugemm.api.dense import check_activations, linear
from cugemm.api.quantize import quantize
from cugemm.quantized import Quantized


class QuantizedLinear:
    """y[.., n] = sum over k of x[.., k] * weight[n, k] + bias[n], with the weight stored as a `Quantized`.

    weight: [out_features, in_features] bfloat16, float16 or float32, which is quantised to `format` here and not kept, or a Quantized of
    any format, of which the layer keeps what `prepare` makes: itself, or a copy if its rows do not lie as products read them. bias:
    [out_features] or None. activations: format that x is quantised to in every call, any without zero points, None to multiply it as it
    is. Weight and x live in one framework and on one device. Calls overlap their neighbours in the stream (`pdl` and `static_weights` of
    `cugemm.linear`): wait for the stream after writing to `layer.weight` in place.

    Errors and numerics: as `cugemm.quantize` and `cugemm.linear`. One layer serves any number of threads.

    >>> layer = cugemm.QuantizedLinear(weight, bias, format="nvfp4", activations="fp8_row")
    >>> y = layer(x)
    """

    def __init__(self, weight: Any, bias: Any = None, *, format: str = "fp8_row", activations: str | None = None) -> None:
        if activations is not None:
            check_activations("QuantizedLinear", activations)
        self.weight = (weight if type(weight) is Quantized else quantize(weight, format)).prepare()
        if self.weight.ndim != 2 or self.weight.k_axis != 1:
            raise ValueError(f"QuantizedLinear: weight is {self.weight!r}; wanted [out_features, in_features] with k along axis 1.")
        self.bias = bias
        self.activations = activations
        self._settled = self.weight is weight  # NOTE: the first call waits for the kernel that quantised, all later ones come behind it

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def __call__(self, x: Any, *, out: Any = None, out_dtype: Any = None, batch_invariant: bool = False) -> Any:
        """x [.., in_features] -> [.., out_features]; `out`, `out_dtype` and `batch_invariant` as in `cugemm.linear`."""
        settled, self._settled = self._settled, True
        return linear(
            x, self.weight, self.bias, activations=self.activations, out=out, out_dtype=out_dtype,
            pdl=True, static_weights=settled, batch_invariant=batch_invariant,
        )  # fmt: skip

    forward = __call__

    def __repr__(self) -> str:
        bias = "" if self.bias is not None else ", no bias"
        activations = f", activations={self.activations}" if self.activations else ""
        return f"QuantizedLinear({self.in_features} -> {self.out_features}, {self.weight.format.name}{activations}{bias})"
