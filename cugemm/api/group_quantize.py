"""FlashInfer's quantisers by groups: of experts with counts (`scaled_fp4_grouped_quantize`, ..) and of k (`per_token_group_quant_8bit`)."""

from __future__ import annotations

import functools
import math
from typing import Any

from cugemm.api.block_quantize import check_backend
from cugemm.api.common import choice, flag, shape_of, shown
from cugemm.api.shuffle import shaped, swapped_axes, viewed
from cugemm.arrays import Jax, Spec, dtype_name, framework_of, is_scalar
from cugemm.conversion import GROUPS, QuantizeOp, QuantizeOptions
from cugemm.formats import FP8_E5M2_GROUP, FP8_GROUP, FP32, INT8_GROUP, MXFP8, NVFP4
from cugemm.launch import run
from cugemm.problem import register
from cugemm.quantized import swapped

_GROUPED4: QuantizeOp = register(QuantizeOp("scaled_fp4_grouped_quantize", ("a", "a_global_sf", "pre_scale", "mask")))
_GROUPED8: QuantizeOp = register(QuantizeOp("mxfp8_grouped_quantize", ("a", "tensor_scale", "pre_scale", "mask")))
_PER_TOKEN_GROUP: QuantizeOp = register(QuantizeOp("per_token_group_quant_8bit", ("x", "tensor_scale", "pre_scale", "counts")))

_FP4_OPTIONS = QuantizeOptions(NVFP4.name, scale_layout="128x4", encode_scale=True)
_FP8_OPTIONS = QuantizeOptions(MXFP8.name, scale_layout="128x4", align=128)
_EIGHT_BITS = {fmt.element.dtype: fmt for fmt in (FP8_GROUP, FP8_E5M2_GROUP, INT8_GROUP)}


def scaled_fp4_grouped_quantize(a: Any, mask: Any, a_global_sf: Any) -> tuple[Any, Any]:
    """(q, sf) with a[g, m, k] ~ e2m1(q) * e4m3(sf) / a_global_sf[g] for the first mask[g] rows of each group g.

    a: [groups, m, k], bfloat16, float16 or float32. mask: int32 or int64 [groups], rows in use, clamped to [0, m]; the others get zeros.
    a_global_sf: 448 * 6 / amax, float32 [groups], [1], or a number.
    Returns views of row-major results in the axes of FlashInfer's masked product: q uint8 [m, k/2, groups]; sf float8_e4m3fn
    [32, 4, padded m / 128, 4, padded ceil(k/16) / 4, groups], the 128x4 tiles of each group.

    Raises TypeError and ValueError, naming the argument. Numerics: as `cugemm.quantize`, format "nvfp4".
    Source: FlashInfer `scaled_fp4_grouped_quantize`.

    >>> q, sf = cugemm.scaled_fp4_grouped_quantize(tokens_of_experts, counts, 448 * 6 / amax)
    """
    q, sf = _grouped(_GROUPED4, a, mask, a_global_sf, _FP4_OPTIONS)
    return q, viewed(sf, "float8_e4m3fn")


def mxfp8_grouped_quantize(a: Any, mask: Any) -> tuple[Any, Any]:
    """(q, sf) with a[g, m, k] ~ e4m3(q) * 2^(sf - 127) for the first mask[g] rows of each group g.

    a, mask: as `scaled_fp4_grouped_quantize`; k is padded with zeros to a multiple of 128.
    Returns views of row-major results in the axes of FlashInfer's masked product: q float8_e4m3fn [m, padded k, groups]; sf uint8
    [32, 4, padded m / 128, 4, padded k / 128, groups], the 128x4 tiles of each group.

    Raises TypeError and ValueError, naming the argument. Numerics: as `cugemm.quantize`, format "mxfp8".
    Source: FlashInfer `mxfp8_grouped_quantize`.

    >>> q, sf = cugemm.mxfp8_grouped_quantize(tokens_of_experts, counts)
    """
    return _grouped(_GROUPED8, a, mask, None, _FP8_OPTIONS)


def _grouped(op: QuantizeOp, a: Any, mask: Any, global_scale: Any, options: QuantizeOptions) -> tuple[Any, Any]:
    shape = shape_of(op.name, "a", a)
    if len(shape) != 3:
        raise ValueError(f"{op.name}: a has shape {shape}; wanted [groups, m, k].")
    for role, x in (("mask", mask), *((("a_global_sf", global_scale),) if op is _GROUPED4 else ())):
        if x is None:
            raise TypeError(f"{op.name}: {role} is missing; pass an array of shape ({shape[0]},).")
    q, sf = run(op, (a, global_scale, None, mask), options)
    groups, high, wide = sf.shape
    tiles = shaped(sf, (groups, high // 128, wide // 4, 32, 4, 4))  # axes group, tile row, tile column, row, slab, block
    return swapped_axes(q, (0, 2), (0, 1)), swapped_axes(tiles, (0, 3), (1, 4), (2, 4), (3, 5))


def per_token_group_quant_8bit(
    x: Any,
    group_size: int,
    eps: float = 1e-10,
    dst_dtype: Any = None,
    column_major_scales: bool = False,
    scale_tma_aligned: bool = False,
    scale_ue8m0: bool = False,
    backend: str = "cutile",
) -> tuple[Any, Any]:
    """q = round(x / s), s = max(amax, eps) / max of dst_dtype, amax = max |x| over each group_size values along k.

    x: [.., k], bfloat16, float16 or float32, any strides, k a multiple of group_size, which is 16, 32, 64, 128, 256 or 512.
    dst_dtype: "float8_e4m3fn" (the default, max 448), "float8_e5m2" (57344) or "int8" (127), as a name or a dtype.
    column_major_scales: s lies with its token axis contiguous (2-D x; JAX arrays have no strides and come as they are);
    scale_tma_aligned: then with columns a multiple of 4 apart. scale_ue8m0: s is rounded up to a power of two, still as float32.
    backend: "auto" or "cutile".
    Returns q of x's shape and s float32 [.., k / group_size].

    Raises TypeError and ValueError, naming the argument. Numerics: float32 with IEEE division, to nearest even; NaN and inf as in
    `cugemm.quantize`, formats "fp8_group" and "int8_group". Source: FlashInfer `per_token_group_quant_8bit`; DeepSeek-V3's 1 x 128 groups.

    >>> q, s = cugemm.per_token_group_quant_8bit(x, 128)
    """
    name = "per_token_group_quant_8bit"
    check_backend(name, backend, ("cutile",))
    shape = shape_of(name, "x", x)
    fmt = _EIGHT_BITS.get(_dtype(name, dst_dtype))
    if fmt is None:
        raise ValueError(f"{name}: dst_dtype is {shown(dst_dtype)}; wanted one of {', '.join(_EIGHT_BITS)}.")
    group_size = choice(name, "group_size", group_size, GROUPS, f"one of {', '.join(map(str, GROUPS))}")
    column_major_scales = flag(name, "column_major_scales", column_major_scales)
    scale_tma_aligned = flag(name, "scale_tma_aligned", scale_tma_aligned)
    ceil_scale = flag(name, "scale_ue8m0", scale_ue8m0)
    if not is_scalar(eps):
        raise TypeError(f"{name}: eps is {shown(eps)}; wanted a number.")
    if not abs(eps) <= FP32.max:  # also an int that no float can be
        raise ValueError(f"{name}: eps is {shown(eps)}; wanted a number that float32 holds.")
    if not shape or shape[-1] % group_size:
        raise ValueError(f"{name}: x has shape {shape}; its last axis must be a multiple of group_size {group_size}: pad it.")
    if scale_tma_aligned and not column_major_scales:
        raise ValueError(f"{name}: scale_tma_aligned goes with column_major_scales=True; set it or drop scale_tma_aligned.")
    if column_major_scales and len(shape) != 2:
        raise ValueError(f"{name}: x has shape {shape}; column_major_scales takes [tokens, k].")
    axes = "km" if column_major_scales else "mk"
    rows = x if len(shape) in (2, 3) else shaped(x, (math.prod(shape[:-1]), shape[-1]))
    q, s = run(_PER_TOKEN_GROUP, (rows, None, None, None), _group_options(fmt.name, group_size, float(eps), ceil_scale, axes))
    if column_major_scales:
        return q, swapped(_aligned(s) if scale_tma_aligned else s)
    return (q, s) if rows is x else (shaped(q, shape), shaped(s, (*shape[:-1], shape[-1] // group_size)))


@functools.lru_cache(maxsize=256)
def _group_options(format: str, group: int, eps: float, ceil_scale: bool, axes: str) -> QuantizeOptions:
    return QuantizeOptions(format, group=group, eps=eps, ceil_scale=ceil_scale, scale_axes=axes)


def _dtype(name: str, dtype: Any) -> str:
    try:
        return FP8_GROUP.element.dtype if dtype is None else dtype_name(dtype)
    except TypeError as error:
        raise TypeError(f"{name}: dst_dtype: {error}") from None


def _aligned(s: Any) -> Any:
    """[blocks, tokens] with rows a multiple of 4 elements apart."""
    blocks, tokens = s.shape
    framework = framework_of(s, "result")
    if tokens % 4 == 0 or isinstance(framework, Jax):
        return s
    pitch = -(-tokens // 4) * 4
    if isinstance(s, Spec):
        return Spec(s.shape, s.dtype, strides=(pitch, 1), device=s.device)
    buffer = framework.empty((blocks, pitch), "float32", s, framework.view(s, "result").device)[:, :tokens]
    buffer[...] = s
    return buffer
