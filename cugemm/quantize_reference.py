"""Quantisation in NumPy: what arrays in host memory run on, and the bit-exact twin of the kernels (quantize.cu, block_quantize.cu).

Everything is IEEE float32, one operation at a time in the order written, so that a GPU that neither fuses nor approximates gets the same
bits. amax = max |x| over the values of a block, vecmax the same.

    float scales   scale = max(amax, eps) / element max, q = round(x / scale)
    zero points    lo = min(0, x), hi = max(0, x), scale = max(hi - lo, eps) / 15, zero = round(-lo / scale), q = round(x / scale) + zero
    e8m0 scales    scale = 2^e >= amax / element max, q = round(x * 2^-e), 0 under code 0
    e4m3 scales    scale = e4m3(vecmax * (g * (1/6))), q = round(x * min(1 / (scale * (1/g)), FLT_MAX)), tensor scale = 1/g

round is to nearest even, saturating at the element's max. Zeros keep their sign; a block of zeros has a byte scale of 0.
What is not finite never becomes finite unseen. fp8 with float scales: a NaN stays NaN and is left out of amax; an inf makes its block's
scale inf, finite values 0 and itself NaN. mxfp8: the same NaN, an inf makes the scale NaN and the block's data 0. All others: a NaN or inf
makes its block's scale NaN and the block's data 0.

Arguments are trusted here: `conversion` has checked them.
Source: OCP MX with the scale rounded up as FlashInfer does, NVIDIA NVFP4 as TransformerEngine's reference computes it.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cugemm import scale_layout
from cugemm.formats import ALL, E4M3, E5M2, E8M0, FP32, Element, Format
from cugemm.rows_reference import silu32

Array: TypeAlias = NDArray[Any]
Float32: TypeAlias = NDArray[np.float32]

_F = np.float32
_FLT_MAX = _F(FP32.max)
_NAN_SCALE = {E4M3.name: 0x7F, E8M0.name: 0xFF}


def quantize(
    x: Array,
    format: Format,
    *,
    tensor_scale: Array | float | None = None,
    encode_scale: bool = False,
    emit_tensor: bool = False,
    pre_scale: Array | None = None,
    counts: Array | None = None,
    silu: bool = False,
    align: int = 1,
    layout: str = "linear",
    flat: bool = False,
    group: int = 0,
    eps: float = 1e-12,
    ceil_scale: bool = False,
    scale_axes: str = "mk",
) -> tuple[Array, ...]:
    """(data, scale[, tensor scale][, zero]) of x [rows, k] or [batch, rows, k] in float16, bfloat16 or float32, any strides.

    data: [.., rows, k] in the element's dtype, C-contiguous; packed elements [.., rows, k/2] uint8.
    scale: [1] (whole array), else [.., row blocks, k blocks], float32 or the bytes of `format.scale` in `layout`. The options are those of
    `conversion.QuantizeOptions`. tensor scale: if it was computed, or if `emit_tensor`.
    """
    element = format.element
    block = (format.block[0], group or format.block[1])
    with np.errstate(all="ignore"):
        v = _values(x, silu, pre_scale)
        live = np.ones((*v.shape[:-1], 1), bool)
        if counts is not None:
            live = (np.arange(v.shape[-2]) < counts.astype(np.int64)[:, None])[..., None]
            v = np.where(live, v, _F(0))
        padding = -v.shape[-1] % align
        if padding:
            v = np.concatenate([v, np.zeros((*v.shape[:-1], padding), np.float32)], axis=-1)
        size = np.abs(v)
        keeps_nan = element in (E4M3, E5M2)
        if keeps_nan:
            size = np.where(np.isnan(size), _F(0), size)
        amax = _block_max(size, block)  # NaN where a block has one
        bad = ~np.isfinite(amax)
        zero, tensor = None, None
        if format.zero:
            hi, lo = _block_max(np.maximum(v, _F(0)), block), -_block_max(np.maximum(-v, _F(0)), block)
            scale = np.maximum(hi - lo, _F(eps)) / _F(element.max)
            zero = np.clip(np.rint(-lo / scale), _F(0), _F(15))
            zero = np.where(bad, _F(0), zero)
            stored = np.clip(np.rint(v / _spread(scale, v.shape, block)) + _spread(zero, v.shape, block), _F(0), _F(15))
        elif format.scale is E8M0:
            code = _e8m0_ceil(amax / _F(element.max))
            factor = np.where(code == 0, _F(0), np.ldexp(_F(1), 127 - code.astype(np.int32)).astype(np.float32))
            stored = v * _spread(factor, v.shape, block)
        elif format.scale is E4M3:
            encode, tensor = _tensor_scale(tensor_scale, encode_scale, v, format)
            code = _fp8(amax * (encode * (_F(1) / _F(6))), E4M3)
            inverse = np.fmin(_F(1) / (code.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * tensor), _FLT_MAX)
            stored = v * _spread(np.where((amax == 0) | (code == 0x7F), _F(0), inverse), v.shape, block)
        else:
            scale = np.maximum(amax, _F(eps)) / _F(element.max)
            if ceil_scale:
                scale = ((scale.view(np.uint32) + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)).view(np.float32)
            stored = v / _spread(scale, v.shape, block)
        codes = _encode(stored, element)
        if format.scale is FP32 and not keeps_nan:
            scale = np.where(bad, _F(np.nan), scale)
        if format.scale is not FP32:
            scale = np.where(bad, np.uint8(_NAN_SCALE[format.scale.name]), code)
            scale = np.where(live, scale, np.uint8(0))
        elif counts is not None:
            scale = np.where(live, scale, _F(0))
        if bad.any() and (format.scale is not FP32 or not keeps_nan):
            codes = np.where(_spread(bad, v.shape, block), np.uint8(0), codes)
    if format.scale is not FP32:
        scale = laid_out(scale, layout, flat)
    elif scale_axes == "km":
        scale = np.ascontiguousarray(scale.swapaxes(-1, -2))
    results: tuple[Array, ...] = (_packed(codes, element), scale)
    if tensor is not None and (emit_tensor or tensor_scale is None):
        results += (_emitted(tensor, x.shape, format),)
    if zero is not None:
        results += (zero.astype(np.uint8),)
    return results


def cast(x: Array, format: Format) -> Array:
    """round(x) in the element's dtype: clamped to +-element.max (inf too), to nearest even; NaN becomes code 0x7F whatever its sign."""
    with np.errstate(all="ignore"):
        return _packed(_fp8(x.astype(np.float32, order="C"), format.element), format.element)


def dequantize(
    data: Array,
    scale: Array,
    format: Format,
    dtype: str = "float32",
    *,
    tensor_scale: Array | float | None = None,
    zero: Array | None = None,
    layout: str = "linear",
    flat: bool = False,
    group: int = 0,
    scale_axes: str = "mk",
) -> Array:
    """((stored - zero) * scale) * tensor_scale in float32, rounded once to dtype; shapes as `quantize` returns them."""
    element = format.element
    block = (format.block[0], group or format.block[1])
    stored = _stored(data, element)
    shape = stored.shape
    with np.errstate(all="ignore"):
        if format.scale is FP32:
            factor = (scale.swapaxes(-1, -2) if scale_axes == "km" else scale).astype(np.float32)
        else:
            factor = scale_values(_linear(scale, shape, block[1], layout, flat), format.scale)
        if zero is not None:
            stored = stored - _spread(zero.astype(np.float32), shape, block)
        product = stored * _spread(factor, shape, block)
        if tensor_scale is not None:
            product = product * _per_row(tensor_scale, shape, format)
        rounded: Array = product.astype(getattr(ml_dtypes, dtype, dtype))
    return rounded


def scale_values(codes: Array, element: Element) -> Float32:
    """Byte scales as float32: e4m3, or e8m0 with code 0 as 2^-127 and 255 as NaN."""
    if element is E4M3:
        return np.asarray(codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    exponent = codes.view(np.uint8).astype(np.int32) - 127
    values: Float32 = np.where(exponent == 128, _F(np.nan), np.ldexp(_F(1), exponent)).astype(np.float32)
    return values


def _values(x: Array, silu: bool, pre_scale: Array | None) -> Float32:
    """What is quantised, as float32: x, or silu(first half) * second half, times pre_scale; each step rounded to x's dtype."""
    v = x.astype(np.float32, order="C")
    if silu:
        k = v.shape[-1] // 2
        gate, up = v[..., :k], v[..., k:]
        v = (silu32(gate) * up).astype(x.dtype).astype(np.float32)
    if pre_scale is not None:
        v = (v * pre_scale.astype(np.float32)).astype(x.dtype).astype(np.float32)
    return v


def _tensor_scale(given: Array | float | None, encode_scale: bool, v: Float32, format: Format) -> tuple[Float32, Float32]:
    """(g, 1/g) to broadcast against the blocks. Computed: g = 448 * 6 / amax of the finite values, at most FLT_MAX, 1 where amax is 0."""
    if given is None:
        size = np.where(np.isfinite(v), np.abs(v), _F(0))
        amax = size.max(initial=0).reshape(1) if format.tensor == (ALL, ALL) else size.max(axis=-1, keepdims=True, initial=0)
        g = np.where(amax == 0, _F(1), np.fmin(_F(2688) / amax, _FLT_MAX)).astype(np.float32)
        return g, _F(1) / g
    scale = _per_row(given, v.shape, format)
    return (scale, _F(1) / scale) if encode_scale else (_F(1) / scale, scale)


def _emitted(tensor: Float32, shape: tuple[int, ...], format: Format) -> Float32:
    """[1], [batch] where each matrix has its own, or [.., rows, 1]."""
    if format.tensor == (ALL, ALL):
        return tensor.reshape(-1)
    return np.ascontiguousarray(np.broadcast_to(tensor, (*shape[:-1], 1)))


def _per_row(scale: Array | float, shape: tuple[int, ...], format: Format) -> Float32:
    """A tensor scale to broadcast against [.., rows, k]: one value, one per row, or one per matrix of a batch."""
    values = np.asarray(scale, np.float32)
    if values.size == 1:
        return values.reshape((1,) * len(shape))
    return values.reshape((shape[0], 1, 1) if format.tensor == (ALL, ALL) else (*shape[:-1], 1))


def _block_max(values: Float32, block: tuple[int, int]) -> Float32:
    """The largest of each block; NaN where it holds one."""
    if block == (ALL, ALL):
        return np.asarray(values.max(initial=0)).reshape(1)
    for axis, size in ((-1, block[1]), (-2, block[0])):
        length = values.shape[axis]
        if size == ALL:
            values = np.asarray(values.max(axis=axis, keepdims=True, initial=0))
        elif length and size > 1:
            values = np.maximum.reduceat(values, np.arange(0, length, size), axis=axis)
    return values


def _spread(scale: Array, shape: tuple[int, ...], block: tuple[int, int]) -> Array:
    """Scales laid out to broadcast against an array of this shape."""
    if block == (ALL, ALL):
        return scale.reshape((1,) * len(shape))
    for axis, size in ((-2, block[0]), (-1, block[1])):
        if size > 1:
            scale = np.repeat(scale, size, axis=axis)
    spread: Array = scale[..., : shape[-2], : shape[-1]]
    return spread


def _e8m0_ceil(x: Float32) -> NDArray[np.uint8]:
    """The code of the smallest power of two that is at least x, among 2^-127 .. 2^127."""
    bits = x.view(np.uint32)
    code = np.minimum((bits.astype(np.uint64) + 0x7FFFFF) >> 23, 254)
    return np.where(bits <= 0x400000, 0, code).astype(np.uint8)


def _fp8(v: Float32, element: Element) -> NDArray[np.uint8]:
    codes: NDArray[np.uint8] = np.clip(v, _F(-element.max), _F(element.max)).astype(getattr(ml_dtypes, element.dtype)).view(np.uint8)
    codes[np.isnan(v)] = 0x7F
    return codes


def _encode(v: Float32, element: Element) -> NDArray[np.uint8]:
    """Codes, one a byte; v of integer elements is rounded here."""
    if element in (E4M3, E5M2):
        return _fp8(v, element)
    if element.name == "e2m1x2":
        # Adding 2^22, 2^23 or 2^24 rounds to the spacing of e2m1 in its binade, 1/2, 1 or 2, and counts it in the low bits.
        size = np.minimum(np.abs(v), _F(6))
        binade = np.maximum(size.view(np.uint32) & np.uint32(0x7F800000), np.uint32(0x3F800000))
        magic = binade + np.uint32(22 << 23)
        steps = (size + magic.view(np.float32)).view(np.uint32) - magic
        return np.asarray(steps + (binade >> 22) - np.uint32(254) | v.view(np.uint32) >> 28 & 8, np.uint8)
    low = 0 if element.name == "uint4x2" else -element.max
    codes: NDArray[np.uint8] = np.rint(np.clip(v, _F(low), _F(element.max))).astype(np.int8).view(np.uint8)
    codes &= np.uint8(2**element.bits - 1)
    return codes


def _packed(codes: NDArray[np.uint8], element: Element) -> Array:
    """Codes, one a byte -> the stored array."""
    if element.per_byte == 2:
        return codes[..., 0::2] | codes[..., 1::2] << 4
    stored: Array = codes.view(getattr(ml_dtypes, element.dtype, element.dtype))
    return stored


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _stored(data: Array, element: Element) -> Float32:
    """Stored values as float32, packed ones unpacked along k."""
    if element.per_byte == 1:
        return np.asarray(data.view(getattr(ml_dtypes, element.dtype, element.dtype)).astype(np.float32))
    pairs = data.view(np.uint8)
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*data.shape[:-1], 2 * data.shape[-1])
    if element.name == "e2m1x2":
        return _E2M1[codes]
    return ((codes ^ 8).astype(np.float32) - 8 if element.name == "int4x2" else codes.astype(np.float32)).astype(np.float32)


def laid_out(scale: Array, layout: str, flat: bool) -> Array:
    """Linear scales [.., rows, blocks] in `layout`, each matrix by itself or, `flat`, their rows together."""
    if flat:
        scale = scale.reshape(math.prod(scale.shape[:-1]), scale.shape[-1])
    if layout == "linear":
        return np.ascontiguousarray(scale)
    if scale.size == 0:
        return np.zeros((*scale.shape[:-2], *scale_layout.padded(scale.shape[-2], scale.shape[-1], layout)), scale.dtype)
    return scale_layout.interleave(scale, layout)


def _linear(scale: Array, shape: tuple[int, ...], group: int, layout: str, flat: bool) -> Array:
    """Byte scales in any layout -> linear [.., rows, blocks] of an array of this shape."""
    *batch, rows, k = shape
    blocks = -(-k // group)
    codes = scale.view(np.uint8)
    if layout != "linear":
        if flat:
            batch, rows = [], math.prod(shape[:-1])
        size = math.prod(scale_layout.padded(rows, blocks, layout))
        codes = scale_layout.deinterleave(codes.reshape(*batch, size), rows, blocks, layout)
    return codes.reshape(*shape[:-1], blocks)
