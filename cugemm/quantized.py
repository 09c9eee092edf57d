"""`Quantized`: a quantised array kept together with its scale and the name of its format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cugemm.arrays import framework_of
from cugemm.formats import FORMATS, Format


@dataclass(frozen=True, repr=False)
class Quantized:
    """real value = data * scale, both in one framework and on one device.

    data: the payload, in the dtype of the format's element or as uint8 bytes (fp4: two codes a byte along k, low nibble = even k).
    scale: one value per `format.block` of (rows, k); shape as `quantize` returns it, e.g. [rows, 1] for "fp8_row", [1] for "fp8_tensor".
    format: a `Format` or its name. shape: logical, so k counts values and not bytes; default: data's shape with packed values counted.
    k_axis: the axis that products sum over: 1 for [rows, k] (the default), 0 after `.T`.

    ValueError where shape, data and format do not fit together. Frozen: make a new one rather than changing it. Source: the format's
    (formats.py).

    >>> q = cugemm.quantize(w, "fp8_row")            # w [n, k]
    >>> y = cugemm.linear(x, q)                      # the same as cugemm.matmul(x, q.T)
    """

    data: Any
    scale: Any
    format: Format
    shape: tuple[int, ...] = ()
    k_axis: int = -1

    def __post_init__(self) -> None:
        fmt = self.format
        if not isinstance(fmt, Format):
            if not isinstance(fmt, str) or fmt not in FORMATS:
                raise ValueError(f"Quantized: format is {fmt!r}; wanted one of {', '.join(FORMATS)}.")
            fmt = FORMATS[fmt]
            object.__setattr__(self, "format", fmt)
        for role, x in (("data", self.data), ("scale", self.scale)):
            framework_of(x, f"Quantized: {role}")
        stored = tuple(self.data.shape) if hasattr(self.data, "shape") else framework_of(self.data, "data").view(self.data, "data").shape
        if len(stored) not in (2, 3):
            raise ValueError(f"Quantized: data has shape {stored}; wanted [rows, k] or [batch, rows, k].")
        if not -len(stored) <= self.k_axis < len(stored):
            raise ValueError(f"Quantized: k_axis is {self.k_axis}, but data has shape {stored}; wanted one of its last two axes.")
        axis = self.k_axis % len(stored)
        if axis == 0 and len(stored) == 3:
            raise ValueError("Quantized: k_axis is 0, the batch axis; wanted one of the last two axes.")
        object.__setattr__(self, "k_axis", axis)
        # JAX's float4 is as packed as the others, but its shape counts values.
        per_item = 1 if str(getattr(self.data, "dtype", "")) == "float4_e2m1fn" else fmt.element.per_byte
        logical = tuple(n * per_item if i == axis else n for i, n in enumerate(stored))
        if self.shape and tuple(self.shape) != logical:
            raise ValueError(f"Quantized: shape is {tuple(self.shape)}, but data {stored} of format {fmt.name} holds {logical} values.")
        object.__setattr__(self, "shape", logical)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def T(self) -> Quantized:  # noqa: N802 - what every framework calls it
        """The last two axes swapped; free, nothing is copied (JAX copies). Scales go along."""
        last = self.ndim - 1
        scale = self.scale if len(self.scale.shape) == 1 else swapped(self.scale)
        return Quantized(swapped(self.data), scale, self.format, (), last if self.k_axis == last - 1 else last - 1)

    def __repr__(self) -> str:
        return f"Quantized({self.format.name}, shape={self.shape}, data={_described(self.data)}, scale={_described(self.scale)})"


def swapped(x: Any) -> Any:
    """The last two axes of an array, or of a Spec (which has only `.T`), swapped."""
    return x.T if len(x.shape) == 2 else x.swapaxes(-1, -2)


def _described(x: Any) -> str:
    return f"{type(x).__module__.split('.', 1)[0]} {str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
