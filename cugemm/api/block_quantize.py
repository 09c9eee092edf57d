"""FlashInfer's quantisers of nvfp4, mxfp4 and mxfp8: `fp4_quantize`, `nvfp4_quantize`, `mxfp4_quantize`, `mxfp8_quantize` and friends.

All are `cugemm.quantize` with FlashInfer's arguments, shapes and scale layouts. FlashInfer's global_scale g is the inverse of a tensor
scale: real = data * scale / g. Each computes in exact mode (IEEE division), as FlashInfer does with FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH.
"""

from __future__ import annotations

import functools
import math
from numbers import Integral
from typing import Any

import numpy as np

from cugemm.api.common import choice, flag, matches, shape_of, shown
from cugemm.api.shuffle import block_scale_interleave, layout_of, shaped, shuffled_rows, tiles
from cugemm.arrays import Spec, is_scalar
from cugemm.conversion import QuantizeOp, QuantizeOptions
from cugemm.formats import MXFP4, MXFP8, NVFP4, NVFP4_ROW, Format
from cugemm.launch import run
from cugemm.problem import register
from cugemm.quantized import Quantized, swapped
from cugemm.scale_layout import SfLayout


def _op(name: str, x: str, tensor_scale: str = "tensor_scale", pre_scale: str = "pre_scale", counts: str = "counts") -> QuantizeOp:
    op: QuantizeOp = register(QuantizeOp(name, (x, tensor_scale, pre_scale, counts)))
    return op


_FP4 = _op("fp4_quantize", "input", "global_scale")
_NVFP4 = _op("nvfp4_quantize", "a", "a_global_sf")
_MXFP4 = _op("mxfp4_quantize", "a")
_MXFP8 = _op("mxfp8_quantize", "input")
_BATCHED = _op("nvfp4_batched_quantize", "a", "a_global_sf")
_SILU = _op("silu_and_mul_nvfp4_quantize", "input", "global_scale")
_SMOOTH = _op("nvfp4_quantize_smooth", "x", "global_scale", "pre_quant_scale")
_GLOBAL_SCALE = _op("make_nvfp4_global_scale", "input_tensor", "global_scale")

_PER_TOKEN = float(np.float32(1) / np.float32(448 * 6))
"""FlashInfer's a_global_sf of per-token quantisation: a row's scale is amax * this."""


def fp4_quantize(
    input: Any,
    global_scale: Any = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    is_global_scale_inversed: bool = False,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
) -> tuple[Any, Any]:
    """(q, sf) with input[.., m, k] ~ e2m1(q) * sf / global_scale: nvfp4 (sf_vec_size 16, e4m3 sf) or mxfp4 (32, e8m0 sf).

    input: [.., m, k], bfloat16, float16 or float32, k even; leading axes are rows. A column-major input [k, m] is quantised along k, as
    `swapped` results of its transpose, as FlashInfer does; JAX arrays have no strides and are quantised along their last axis.
    global_scale: nvfp4: 448 * 6 / amax, a number, float32 [1], or one per row [m]; mxfp4: None or 1. With is_global_scale_inversed its
    inverse is meant, amax / (448 * 6).
    is_sf_swizzled_layout, is_sf_8x4_layout: sf in 128x4 or 8x4 tiles, or linear. enable_pdl: accepted, not needed. backend: "auto", "cuda"
    and "cute-dsl" are one kernel here.
    Returns q uint8 [.., m, k/2], two codes a byte, low nibble = even k; sf uint8 [padded rows, padded ceil(k / sf_vec_size)], rows of all
    leading axes together, zeros where padded.

    Raises TypeError and ValueError, naming the argument.
    Numerics: as `cugemm.quantize`, formats "nvfp4" and "mxfp4". Source: FlashInfer `fp4_quantize`.

    >>> q, sf = cugemm.fp4_quantize(x, cugemm.make_nvfp4_global_scale(x, False))
    """
    name = "fp4_quantize"
    check_backend(name, backend, ("cuda", "cute-dsl"))
    mx = matches((sf_vec_size, sf_use_ue8m0), (32, True))
    if not mx and not matches((sf_vec_size, sf_use_ue8m0), (16, False)):
        raise ValueError(
            f"{name}: sf_vec_size is {shown(sf_vec_size)} and sf_use_ue8m0 {shown(sf_use_ue8m0)}; "
            "wanted 16 and False (nvfp4) or 32 and True (mxfp4)."
        )
    layout = tiles(name, is_sf_swizzled_layout, is_sf_8x4_layout)
    inversed = flag(name, "is_global_scale_inversed", is_global_scale_inversed)
    if mx:
        _no_global_scale(name, global_scale)
        return _fp4(_FP4, input, MXFP4, layout)
    return _fp4(_FP4, input, NVFP4, layout, global_scale, not inversed)


def nvfp4_quantize(
    a: Any,
    a_global_sf: Any,
    sfLayout: SfLayout | int = SfLayout.layout_128x4,
    do_shuffle: bool = False,
    sf_vec_size: int = 16,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
    per_token_activation: bool = False,
    expanded_idx_to_permuted_idx: Any = None,
) -> tuple[Any, ...]:
    """(q, sf) with a[.., m, k] ~ e2m1(q) * e4m3(sf) / a_global_sf; per token (q, sf, s) with a ~ e2m1(q) * e4m3(sf) * s[m].

    a: as input of `fp4_quantize`. a_global_sf: 448 * 6 / amax, a number, float32 [1], or one per row [m]. sf_vec_size: 16.
    sfLayout: of sf. do_shuffle: the rows of q and sf (and s) are those of `shuffle_matrix_a(.., 128)`; 2-D a with m a multiple of 128.
    per_token_activation: each row gets its own scale s = amax / (448 * 6), float32 [m]; a_global_sf is then 1 / (448 * 6) (a number is
    checked, an array is not read). expanded_idx_to_permuted_idx: accepted; all rows are quantised, those that it lists among them.
    enable_pdl, backend: as `fp4_quantize`. Returns q uint8 [.., m, k/2] and sf uint8 [padded rows, padded ceil(k/16)].

    Raises TypeError and ValueError, naming the argument. Numerics: as `cugemm.quantize`, formats "nvfp4" and "nvfp4_row".
    Source: FlashInfer `nvfp4_quantize`.

    >>> q, sf = cugemm.nvfp4_quantize(x, 448 * 6 / amax)
    """
    name = "nvfp4_quantize"
    check_backend(name, backend, ("cuda", "cute-dsl"))
    _check_vec_size(name, sf_vec_size)
    layout = layout_of(name, "sfLayout", sfLayout)
    do_shuffle = flag(name, "do_shuffle", do_shuffle)
    per_token_activation = flag(name, "per_token_activation", per_token_activation)
    if expanded_idx_to_permuted_idx is not None and not per_token_activation:
        raise ValueError(f"{name}: expanded_idx_to_permuted_idx goes with per_token_activation=True; drop it.")
    shape_of(name, "a", a)  # or a TypeError that names it
    columns = do_shuffle and not per_token_activation and _column_major(a)
    if do_shuffle:
        shape = shape_of(name, "a", a)
        if layout != "128x4" or len(shape) != 2 or shape[columns] % 128:
            what = "column-major a [k, m]" if columns else "a [m, k]"
            raise ValueError(
                f"{name}: do_shuffle takes {what} with m a multiple of 128 and sfLayout 128x4; a has shape {shape}, sfLayout is {layout}."
            )
        layout = "linear"
    if columns:  # rows that are shuffled are those of the transpose, which is what gets quantised
        a = swapped(a)
    if per_token_activation:
        if is_scalar(a_global_sf) and not (abs(a_global_sf) < 1 and np.float32(a_global_sf) == np.float32(_PER_TOKEN)):
            raise ValueError(f"{name}: a_global_sf is {shown(a_global_sf)}; with per_token_activation wanted 1 / (448 * 6).")
        results: tuple[Any, ...] = _per_token(a, layout)
    else:
        results = _fp4(_NVFP4, a, NVFP4, layout, a_global_sf, True)
    if not do_shuffle:
        return results
    q, sf, *s = (shuffled_rows(x) for x in results)
    sf = shaped(block_scale_interleave(sf), (sf.shape[0], -1))
    return (swapped(q), swapped(sf), *s) if columns else (q, sf, *s)


def mxfp4_quantize(
    a: Any, backend: str = "cuda", enable_pdl: bool | None = None, sfLayout: SfLayout | int = SfLayout.layout_128x4
) -> tuple[Any, Any]:
    """(q, sf) with a[.., m, k] ~ e2m1(q) * 2^(sf - 127), one sf for each 32 values along k.

    a, enable_pdl, backend: as `fp4_quantize`. sfLayout: of sf. Returns q uint8 [.., m, k/2], sf uint8 [padded rows, padded ceil(k/32)].

    Raises TypeError and ValueError, naming the argument. Numerics: as `cugemm.quantize`, format "mxfp4": sf is rounded up, so that nothing
    saturates. Source: FlashInfer `mxfp4_quantize`; OCP MX (whose own rule for sf is floor(log2 amax) - 2).

    >>> q, sf = cugemm.mxfp4_quantize(w)
    """
    check_backend("mxfp4_quantize", backend, ("cuda", "cute-dsl"))
    return _fp4(_MXFP4, a, MXFP4, layout_of("mxfp4_quantize", "sfLayout", sfLayout))


def mxfp8_quantize(
    input: Any,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
    sf_swizzle_layout: SfLayout | int | None = None,
) -> tuple[Any, Any]:
    """(q, sf) with input[.., m, k] ~ e4m3(q) * 2^(sf - 127), one sf for each 32 values along k.

    input: [.., m, k], bfloat16, float16 or float32, any strides; leading axes are rows.
    is_sf_swizzled_layout: 128x4 tiles, else linear; sf_swizzle_layout, if given, decides instead.
    alignment: q gets zeros along k up to a multiple of this, itself a multiple of 32. enable_pdl, backend: as `fp4_quantize`.
    Returns q float8_e4m3fn [.., m, padded k] and sf uint8 in one axis, as `mm_mxfp8` and `bmm_mxfp8` take it: of all rows together.

    Raises TypeError and ValueError, naming the argument. Numerics: as `cugemm.quantize`, format "mxfp8".
    Source: FlashInfer `mxfp8_quantize`.

    >>> q, sf = cugemm.mxfp8_quantize(x)
    """
    name = "mxfp8_quantize"
    check_backend(name, backend, ("cuda", "cute-dsl"))
    if not isinstance(alignment, Integral) or isinstance(alignment, bool) or not 1 <= alignment <= 2**30 or alignment % 32:
        raise ValueError(f"{name}: alignment is {shown(alignment)}; wanted a multiple of 32.")
    layout = tiles(name, is_sf_swizzled_layout, False)
    if sf_swizzle_layout is not None:
        layout = layout_of(name, "sf_swizzle_layout", sf_swizzle_layout)
    rows, lead = _rows(_MXFP8, input)
    q, sf = run(_MXFP8, (rows, None, None, None), _options(MXFP8, layout, align=int(alignment)))
    return (q if lead is None else shaped(q, (*lead, q.shape[-1]))), shaped(sf, (-1,))


def nvfp4_batched_quantize(a: Any, a_global_sf: Any, sf_vec_size: int = 16) -> tuple[Any, Any]:
    """(q, sf) with a[b, m, k] ~ e2m1(q) * e4m3(sf) / a_global_sf; the scales of each matrix are tiled by themselves.

    a: [batch, m, k], bfloat16, float16 or float32. a_global_sf: 448 * 6 / amax, a number, float32 [1] or [batch]. sf_vec_size: 16.
    Returns q uint8 [batch, m, k/2], sf uint8 [batch, padded m * padded ceil(k/16)] in 128x4 tiles.

    Raises TypeError and ValueError, naming the argument. Numerics: as `cugemm.quantize`, format "nvfp4".
    Source: FlashInfer `nvfp4_batched_quantize`.

    >>> q, sf = cugemm.nvfp4_batched_quantize(experts, 448 * 6 / amax)
    """
    name = "nvfp4_batched_quantize"
    _check_vec_size(name, sf_vec_size)
    shape = shape_of(name, "a", a)
    if len(shape) != 3:
        raise ValueError(f"{name}: a has shape {shape}; wanted [batch, m, k].")
    _given(name, "a_global_sf", a_global_sf)
    q, sf = run(_BATCHED, (a, a_global_sf, None, None), _options(NVFP4, "128x4", flat=False, encode_scale=True))
    return q, shaped(sf, (shape[0], math.prod(sf.shape[1:])))


def silu_and_mul_nvfp4_quantize(
    input: Any,
    global_scale: Any,
    sf_vec_size: int = 16,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    enable_pdl: bool | None = None,
) -> tuple[Any, Any]:
    """(q, sf) of h = silu(input[.., :k]) * input[.., k:], h ~ e2m1(q) * e4m3(sf) / global_scale, silu(v) = v / (1 + exp(-v)).

    input: [.., m, 2k], bfloat16, float16 or float32; leading axes are rows. global_scale: 448 * 6 / max |h|, a number or float32 [1].
    Other arguments: as `fp4_quantize`, nvfp4. Returns q uint8 [rows, k/2], sf uint8 [padded rows, padded ceil(k/16)].

    Raises TypeError and ValueError, naming the argument.
    Numerics: h in float32, rounded once to input's dtype, then as `cugemm.quantize`, format "nvfp4".
    Source: FlashInfer `silu_and_mul_nvfp4_quantize`.

    >>> q, sf = cugemm.silu_and_mul_nvfp4_quantize(gate_and_up, 448 * 6 / amax)
    """
    name = "silu_and_mul_nvfp4_quantize"
    _check_vec_size(name, sf_vec_size)
    _given(name, "global_scale", global_scale)
    options = _options(NVFP4, tiles(name, is_sf_swizzled_layout, is_sf_8x4_layout), encode_scale=True, silu=True)
    q, sf = run(_SILU, (_rows(_SILU, input)[0], global_scale, None, None), options)
    return shaped(q, (math.prod(q.shape[:-1]), q.shape[-1])), sf


def nvfp4_quantize_smooth(
    x: Any, pre_quant_scale: Any, global_scale: Any, enable_pdl: bool | None = None, backend: str = "cutlass", *, skip_check: bool = False
) -> tuple[Any, Any]:
    """(q, sf) of h = x * pre_quant_scale, h[m, k] ~ e2m1(q) * e4m3(sf) / global_scale: SVDQuant's smoothing and quantisation in one pass.

    x: [m, k], bfloat16, float16 or float32. pre_quant_scale: [k] in one of these dtypes. global_scale: 448 * 6 / max |h|, a number or
    float32 [1]. enable_pdl: accepted, not needed. backend: "auto" or "cutlass". skip_check: changes nothing.
    Returns q uint8 [m, k/2], sf uint8 in one axis, 128x4 tiles.

    Raises TypeError and ValueError, naming the argument.
    Numerics: h in float32, rounded to x's dtype; bit for bit `nvfp4_quantize` of that product. Source: FlashInfer `nvfp4_quantize_smooth`;
    Li et al., "SVDQuant", arXiv:2411.05007.

    >>> q, sf = cugemm.nvfp4_quantize_smooth(x, smooth, 448 * 6 / amax)
    """
    name = "nvfp4_quantize_smooth"
    check_backend(name, backend, ("cutlass",))
    shape = shape_of(name, "x", x)
    if len(shape) != 2:
        raise ValueError(f"{name}: x has shape {shape}; wanted [m, k].")
    _given(name, "pre_quant_scale", pre_quant_scale)
    _given(name, "global_scale", global_scale)
    q, sf = run(_SMOOTH, (x, global_scale, pre_quant_scale, None), _options(NVFP4, "128x4", encode_scale=True))
    return q, shaped(sf, (-1,))


def make_nvfp4_global_scale(
    input_tensor: Any, per_token_activation: bool, global_scale: float | None = None, nvfp4_4over6_config: None = None
) -> Any:
    """g = 448 * 6 / max |input_tensor|: what `nvfp4_quantize` takes as a_global_sf; per token 1 / (448 * 6).

    input_tensor: [.., k], bfloat16, float16 or float32; NaN and inf are left out of the maximum, and a tensor of zeros has g = 1.
    global_scale: a number to return instead. nvfp4_4over6_config: None; the choice between 4 and 6 for each block is not offered.
    Returns float32 [1] beside input_tensor; nothing is read back to the host.

    Raises TypeError and ValueError, naming the argument. Numerics: g is the float32 inverse of the float32 inverse of the quotient, 1 ulp
    off at most. Source: FlashInfer `make_nvfp4_global_scale`.

    >>> g = cugemm.make_nvfp4_global_scale(x, False)
    """
    name = "make_nvfp4_global_scale"
    if nvfp4_4over6_config is not None:
        raise ValueError(f"{name}: nvfp4_4over6_config is a {type(nvfp4_4over6_config).__name__}; only None, scales for 6, is supported.")
    value = _PER_TOKEN if flag(name, "per_token_activation", per_token_activation) else global_scale
    if value is not None and not is_scalar(value):
        raise TypeError(f"{name}: global_scale is a {type(value).__name__}; pass a number (an array is one already).")
    rows, _ = _rows(_GLOBAL_SCALE, input_tensor)
    results = run(_GLOBAL_SCALE, (rows, value, None, None), _options(NVFP4, "linear", align=2, emit_tensor=True))
    return results[2] if value is not None else _inverse(results[2])


# --- how FlashInfer's arguments become ours ---------------------------------------------------------------------------------------


def _fp4(op: QuantizeOp, x: Any, fmt: Format, layout: str, global_scale: Any = None, encode_scale: bool = False) -> tuple[Any, Any]:
    """Packed data and scales of the rows of x, along k wherever it is contiguous."""
    shape_of(op.name, op.roles[0], x)  # or a TypeError that names it
    if type(x) is Quantized:
        raise op.wrong_type(f"{op.roles[0]} is {x!r} already; pass an array of floats.")
    if _column_major(x):
        q, sf = _fp4(op, swapped(x), fmt, layout, global_scale, encode_scale)
        return swapped(q), swapped(sf)
    rows, lead = _rows(op, x)
    if fmt is NVFP4:
        _given(op.name, op.roles[1], global_scale)
        if not is_scalar(global_scale) and math.prod(shape_of(op.name, op.roles[1], global_scale)) != 1:
            fmt = NVFP4_ROW
            if len(rows.shape) == 3:
                lead, rows = tuple(rows.shape[:-1]), shaped(rows, (-1, rows.shape[-1]))
    q, sf = run(op, (rows, global_scale, None, None), _options(fmt, layout, encode_scale=encode_scale))
    return (q if lead is None else shaped(q, (*lead, q.shape[-1]))), sf


def _per_token(a: Any, layout: str) -> tuple[Any, Any, Any]:
    rows, lead = _rows(_NVFP4, a)
    q, sf, s = run(_NVFP4, (rows, None, None, None), _options(NVFP4_ROW, layout))
    return (q if lead is None else shaped(q, (*lead, q.shape[-1]))), sf, shaped(s, (-1,))


def _rows(op: QuantizeOp, x: Any) -> tuple[Any, tuple[int, ...] | None]:
    """x as [rows, k] or [batch, rows, k], and its leading axes if they had to be joined."""
    shape = shape_of(op.name, op.roles[0], x)
    if len(shape) <= 3:
        return x, None
    return shaped(x, (math.prod(shape[:-1]), shape[-1])), shape[:-1]


def _column_major(x: Any) -> bool:
    """Whether x [.., k, m] has k contiguous: the transpose of a row-major array, which FlashInfer quantises along k.

    Frameworks give strides as stride() in elements or strides in bytes; JAX arrays and plain DLPack producers give none.
    """
    unit, strides = (1, x.stride()) if hasattr(x, "stride") else (getattr(x, "itemsize", 1), getattr(x, "strides", None))
    return strides is not None and len(strides) in (2, 3) and strides[-2] == unit < strides[-1] and x.shape[-2] > 1


@functools.lru_cache(maxsize=256)
def _options(format: Format, layout: str, *, flat: bool = True, **others: Any) -> QuantizeOptions:
    return QuantizeOptions(format.name, scale_layout=layout, flat=flat, **others)


def check_backend(name: str, backend: str, known: tuple[str, ...]) -> None:
    """FlashInfer's names all mean the one kernel there is."""
    choice(name, "backend", backend, ("auto", *known), f"one of {', '.join(map(repr, ('auto', *known)))}")


def _check_vec_size(name: str, sf_vec_size: int) -> None:
    choice(name, "sf_vec_size", sf_vec_size, (16,), "16, as nvfp4 has one scale for each 16 values")


def _given(name: str, role: str, x: Any) -> None:
    if x is None:
        what = "pass 448 * 6 / amax, as make_nvfp4_global_scale gives it" if role != "pre_quant_scale" else "pass an array of k factors"
        raise TypeError(f"{name}: {role} is missing; {what}.")


def _no_global_scale(name: str, global_scale: Any) -> None:
    """mxfp4 has no second scale; FlashInfer's callers pass an array of 1, whose value is on the device."""
    if is_scalar(global_scale) and global_scale != 1:
        raise ValueError(
            f"{name}: global_scale is {shown(global_scale)}, but mxfp4 (sf_use_ue8m0) has no second scale; multiply it into input."
        )


def _inverse(x: Any) -> Any:
    return x if isinstance(x, Spec) else 1.0 / x
