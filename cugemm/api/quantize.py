"""`quantize` and `dequantize`: between floats and every format."""

from __future__ import annotations

import functools
import math
from typing import Any

from cugemm.api.rehearsal import reshaped, spec_of
from cugemm.arrays import SPEC, dtype_name, framework_of
from cugemm.conversion import QuantizeOp, QuantizeOptions, scale_shape
from cugemm.formats import FORMATS, FP32, Format
from cugemm.launch import run
from cugemm.problem import register
from cugemm.quantized import Quantized, swapped

QUANTIZE: QuantizeOp = register(QuantizeOp("quantize", ("x", "tensor_scale", "pre_scale", "counts")))
DEQUANTIZE: QuantizeOp = register(QuantizeOp("dequantize", ("data", "scale", "tensor_scale", "zero"), "dequantize"))
_CAST = QuantizeOptions("fp8_tensor", cast=True)


def quantize(x: Any, format: str | Format = "fp8_row", *, scale_layout: str = "linear", tensor_scale: Any = None) -> Quantized:
    """q = round(x / scale), scale = max(amax, 1e-12) / max of the element, amax = max |x| over each block.

    x: [rows, k] or [batch, rows, k], bfloat16, float16 or float32, any strides. A block lies in one row, and those at edges are smaller.
    format: float scales, float32 [1] for "tensor", [.., rows, 1] for "row", else [.., ceil(rows / block rows), ceil(k / block columns)]:
        "fp8_tensor", "fp8_row", "fp8_group" (1 x 128), "fp8_block" (128 x 128): float8_e4m3fn, max 448; "fp8_e5m2_..." likewise: 57344
        "int8_tensor", "int8_row", "int8_group" (1 x 128): max 127. "fp4_row": e2m1, max 6
        "int4_row", "int4_g32", "int4_g64", "int4_g128": max 7
        "uint4_g32", "uint4_g64", "uint4_g128": lo = min(0, x), hi = max(0, x), scale = max(hi - lo, 1e-12) / 15, zero = round(-lo / scale)
      byte scales [.., rows, ceil(k/32)], e8m0, 2^e >= amax / max: "mxfp8", "mxfp8_e5m2", "mxfp4"; zeros where e is -127 (numerics.md)
      byte scales [.., rows, ceil(k/16)], e4m3, times a float32 tensor scale: "nvfp4" (one), "nvfp4_row" (one per row)
    4-bit formats pack two values a byte along k, which must be even.
    scale_layout: of byte scales, "linear", or "128x4" or "8x4" tiles, padded with zeros (scale_layout.py).
    tensor_scale: nvfp4 only, a number, float32 [1], or per row [.., rows, 1]; default: amax / (448 * 6) of the whole array or row.
    Returns a Quantized.

    Raises ValueError (format, shape, odd k) and TypeError (dtype), naming the argument.
    Numerics: float32 with IEEE division, one rounding to nearest even, saturating; the same bits on CPU and GPU. In fp8 with float scales a
    NaN stays NaN and is left out of amax; an inf makes its block's scale inf, its finite values 0 and itself NaN. In other formats a block
    with a NaN or inf has a NaN scale and zero data (mxfp8 keeps a NaN as the fp8 formats do): it shows.
    Source: the amax scaling of the OCP OFP8 formats as FlashInfer, TransformerEngine and torchao use it; OCP MX, scales rounded up as
    FlashInfer's `mxfp8_quantize` and `mxfp4_quantize` do; NVIDIA NVFP4 as FlashInfer's `nvfp4_quantize` without its fast math.

    >>> q = cugemm.quantize(w, "fp8_row")
    >>> q = cugemm.quantize(w, "nvfp4", scale_layout="128x4")
    """
    for role, value, example in (("format", format, "fp8_row"), ("scale_layout", scale_layout, "128x4")):
        if type(value).__hash__ is None:
            raise TypeError(f"quantize: {role} is a {type(value).__name__}; pass a name such as {example!r}.")
    options = _options(format, scale_layout, "")
    results = run(QUANTIZE, (x, tensor_scale, None, None), options)
    fmt = FORMATS[options.format]
    tensor = results[2] if fmt.tensor is not None else None
    zero = results[-1] if fmt.zero else None
    return Quantized(results[0], results[1], fmt, scale_layout=scale_layout, tensor_scale=tensor, zero=zero)


def cast_e4m3(x: Any) -> Any:
    """x rounded to float8_e4m3fn, saturating at 448, without a scale."""
    return run(QUANTIZE, (x, None, None, None), _CAST)


def dequantize(q: Quantized, dtype: Any = "bfloat16") -> Any:
    """x = ((q.data - q.zero) * q.scale) * q.tensor_scale, in float32, rounded once to `dtype` ("bfloat16", "float16" or "float32").

    q: a Quantized of any format and scale layout, transposed or not; the result has its shape. Its data, scale and zero must each be
    contiguous, as `quantize` returns them: slices along k, and along the rows of a stack, are not. Dequantise the whole and slice the
    result, or make contiguous copies. Products take all slices as they are.

    Raises TypeError and ValueError, naming the argument.

    >>> x = cugemm.dequantize(q, "float32")
    """
    if type(q) is not Quantized:
        raise TypeError(f"dequantize: q is a {type(q).__name__}; pass a Quantized (cugemm.quantize returns one).")
    if type(dtype).__hash__ is None:
        raise TypeError(f"dequantize: dtype is a {type(dtype).__name__}, which is not a dtype; pass 'bfloat16', 'float16' or 'float32'.")
    if q.k_axis != q.ndim - 1:
        return swapped(dequantize(q.T, dtype))
    return run(DEQUANTIZE, (q.data, _scale(q), q.tensor_scale, q.zero), _options(q.format, q.scale_layout, dtype))


def _scale(q: Quantized) -> Any:
    """q's scale in the shape that `quantize` gives it: products also read [rows] for [rows, 1], and one element of any rank."""
    shape, wanted = tuple(getattr(q.scale, "shape", ())), scale_shape(q.shape, q.format)
    flat = len(shape) == 1 and wanted == (*shape, 1)
    if q.format.scale is not FP32 or shape == wanted or not (flat or (wanted == (1,) and math.prod(shape) == 1)):
        return q.scale
    stands = not hasattr(q.scale, "reshape")
    if stands and framework_of(q.scale, "dequantize: scale") is not SPEC:
        return q.scale  # a plain DLPack producer, refused by its shape
    return reshaped(spec_of(q.scale) if stands else q.scale, wanted)


@functools.lru_cache(maxsize=256)
def _options(format: str | Format, scale_layout: str, dtype: Any) -> QuantizeOptions:
    name = format.name if isinstance(format, Format) else format
    emit = dtype == "" and name in FORMATS and FORMATS[name].tensor is not None
    try:
        return QuantizeOptions(name, False, dtype_name(dtype) if dtype != "" else "", scale_layout, emit_tensor=emit)
    except TypeError as error:
        raise TypeError(f"dequantize: dtype: {error}") from None
