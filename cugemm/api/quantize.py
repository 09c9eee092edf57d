"""`quantize` and `dequantize`: between floats and the fp8 formats."""

from __future__ import annotations

import functools
from typing import Any

from cugemm.arrays import dtype_name
from cugemm.conversion import QuantizeOp, QuantizeOptions
from cugemm.formats import FORMATS, Format
from cugemm.launch import run
from cugemm.problem import register
from cugemm.quantized import Quantized, swapped

_QUANTIZE: QuantizeOp = register(QuantizeOp("quantize", ("x",)))
_DEQUANTIZE: QuantizeOp = register(QuantizeOp("dequantize", ("data", "scale")))
_CAST = QuantizeOptions("fp8_tensor", cast=True)


def quantize(x: Any, format: str | Format = "fp8_row") -> Quantized:
    """q = round(x / scale), scale = max(amax, 1e-12) / max of the element, amax = max |x| over each block.

    x: [rows, k] or [batch, rows, k], bfloat16, float16 or float32, any strides.
    format: "fp8_tensor" (one scale), "fp8_row" (one per row), "fp8_group" (1 x 128), "fp8_block" (128 x 128), float8_e4m3fn, max 448; or
    the same with "fp8_e5m2_" in front, float8_e5m2, max 57344. Blocks at the edges are smaller.
    Returns a Quantized: data of x's shape, scale float32 [1], [.., rows, 1], [.., rows, ceil(k/128)] or [.., ceil(rows/128), ceil(k/128)].

    Raises ValueError (format, shape) and TypeError (dtype), naming the argument.
    Numerics: float32 with IEEE division, one rounding to nearest even, saturating; the same bits on CPU and GPU. NaN stays NaN and is
    left out of amax; an inf makes its block's scale inf, its finite values 0 and itself NaN, so that it shows.
    Source: the amax scaling of the OCP OFP8 formats as FlashInfer, TransformerEngine and torchao use it (scale = amax / max).

    >>> q = cugemm.quantize(w, "fp8_row")
    """
    data, scale = run(_QUANTIZE, (x,), _options(format, False, ""))
    return Quantized(data, scale, FORMATS[format] if isinstance(format, str) else format)


def cast_e4m3(x: Any) -> Any:
    """x rounded to float8_e4m3fn, saturating at 448, without a scale."""
    return run(_QUANTIZE, (x,), _CAST)


def dequantize(q: Quantized, dtype: Any = "bfloat16") -> Any:
    """x = q.data * q.scale, in float32, rounded once to `dtype` ("bfloat16", "float16" or "float32").

    q: a Quantized of an fp8 format, transposed or not; the result has its shape. Raises TypeError and ValueError, naming the argument.

    >>> x = cugemm.dequantize(q, "float32")
    """
    if type(q) is not Quantized:
        raise TypeError(f"dequantize: q is a {type(q).__name__}; pass a Quantized (cugemm.quantize returns one).")
    if q.k_axis != q.ndim - 1:
        return swapped(dequantize(q.T, dtype))
    return run(_DEQUANTIZE, (q.data, q.scale), _options(q.format, False, dtype))


@functools.lru_cache(maxsize=256)
def _options(format: str | Format, cast: bool, dtype: Any) -> QuantizeOptions:
    name = format.name if isinstance(format, Format) else format
    try:
        return QuantizeOptions(name, cast, dtype_name(dtype) if dtype != "" else "")
    except TypeError as error:
        raise TypeError(f"dequantize: dtype: {error}") from None
