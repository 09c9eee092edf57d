"""FlashInfer's grouped products, with its positional orders: rows packed by segments, by row indices, or masked; fp8, mx and fp4 operands.

Where FlashInfer leaves rows undefined (outside every segment, from masked_m[g] on), they are zeros here. Any number of rows, columns and k
runs: the multiples of 4, 8, 16 and 128 that FlashInfer asks for are its kernels' limits. Scales may have any strides and any float value.
"""

from __future__ import annotations

import functools
from numbers import Integral
from typing import Any

from cugemm.api.common import GRANULARITIES, check_alpha, choice, flag, gemm_options, product, shape_of, shown
from cugemm.api.rehearsal import alike, rehearse
from cugemm.api.rowwise import silu_and_mul
from cugemm.formats import BF16, E2M1X2, E4M3, E8M0, LAYOUTS
from cugemm.problem import FLOATS8, GemmOp, GemmOptions
from cugemm.problem import product as register
from cugemm.quantized import Quantized

_PACKED = (E2M1X2.name,)
_INDPTR = {"segments": "m_indptr"}
_DESCALES = {**_INDPTR, "a_scale": "a_descale", "b_scale": "b_descale"}
_GROUP_FP8 = register("group_gemm_fp8_nt_groupwise", FLOATS8, FLOATS8, called=_INDPTR, every_group=True)
_GROUP_MXFP4 = register("group_gemm_mxfp8_mxfp4_nt_groupwise", FLOATS8, _PACKED, called=_INDPTR, every_group=True)
_GROUP_NVFP4 = register("group_gemm_nvfp4_nt_groupwise", _PACKED, _PACKED, called={**_INDPTR, "b_tensor_scale": "alpha"}, every_group=True)
_GROUP_DEEPGEMM = register("group_deepgemm_fp8_nt_groupwise", FLOATS8, FLOATS8, called={"segments": "m_indices"})
_BATCH_DEEPGEMM = register("batch_deepgemm_fp8_nt_groupwise", FLOATS8, FLOATS8, ranks=(3,), called={"segments": "masked_m"})
_MM_BF16 = register("grouped_mm_bf16", (BF16.name,), (BF16.name,), called=_INDPTR, every_group=True)
_MM_FP8 = register("grouped_mm_fp8", FLOATS8, FLOATS8, called=_INDPTR, every_group=True)
_MM_MXFP8 = register("grouped_mm_mxfp8", FLOATS8, FLOATS8, called=_DESCALES, every_group=True)
_MM_FP4 = register("grouped_mm_fp4", _PACKED, _PACKED, called=_DESCALES, every_group=True)
_MOE_FP8 = register("moe_gemm_fp8_nt_groupwise", FLOATS8, FLOATS8, called=_INDPTR, every_group=True)


def group_gemm_fp8_nt_groupwise(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    m_indptr: Any,
    scale_granularity_mnk: tuple[int, int, int] = (1, 128, 128),
    scale_major_mode: str = "MN",
    mma_sm: int = 1,
    out: Any = None,
    out_dtype: Any = None,
    backend: str = "auto",
    *,
    skip_check: bool = False,
) -> Any:
    """out[i] = a[i] @ b[g].T for the rows m_indptr[g] <= i < m_indptr[g + 1], with an fp32 scale for each block of a and b.

    a [m, k], b [G, n, k]: float8_e4m3fn or float8_e5m2, any mix, or Quantized (then their scale is None).
    m_indptr: [G + 1], int32 or int64.
    scale_granularity_mnk (gm, gn, gk): gm and gn 1 or 128, gk 128. Blocks of 128 rows are counted from row 0 of a, across groups.
    scale_major_mode "MN": a_scale [ceil(k/gk), ceil(m/gm)], b_scale [G, ceil(k/gk), ceil(n/gn)]; "K": a_scale [ceil(m/gm), ceil(k/gk)],
    b_scale [G, ceil(n/gn), ceil(k/gk)]. mma_sm: 1 or 2, a hint for Blackwell. out: [m, n]. out_dtype: default bfloat16.
    backend: "trtllm" and "cutile" mean "auto".

    skip_check: changes nothing.
    Rows in no group are zeros. Errors: as `grouped_matmul`. Numerics: exact products, fp32 sums over 128 values, times both scales, added
    in fp32. Source: FlashInfer `group_gemm_fp8_nt_groupwise`.

    >>> out = cugemm.group_gemm_fp8_nt_groupwise(a, b, a_scale, b_scale, m_indptr, scale_major_mode="K")
    """
    op = _GROUP_FP8
    choice(op.name, "mma_sm", mma_sm, (1, 2))
    wanted = "'MN' for scales [.., k/128, rows] or 'K' for [.., rows, k/128]"
    scale_major_mode = choice(op.name, "scale_major_mode", scale_major_mode, ("K", "MN"), wanted)
    _check_scales(op, (a, b), (a_scale, b_scale))
    a_axes, b_axes = ("mk", "nk") if scale_major_mode == "K" else ("km", "kn")
    options = gemm_options(
        op, out_dtype, backend, ("trtllm", "cutile"), "promoted",
        segments="indptr", b_axes="nk", a_scale_axes=a_axes, b_scale_axes=b_axes, **_blocks(op, scale_granularity_mnk),
    )  # fmt: skip
    return product(op, a, b, options, a_scale=a_scale, b_scale=b_scale, segments=m_indptr, out=out)


def group_gemm_mxfp8_mxfp4_nt_groupwise(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    m_indptr: Any,
    mma_sm: int = 1,
    tile_m: int = 128,
    tile_n: int = 128,
    tile_k: int = 128,
    swap_ab: bool = True,
    out: Any = None,
    out_dtype: Any = None,
    *,
    scale_layout: str = "128x4",
    skip_check: bool = False,
) -> Any:
    """out[i] = sum over k of a[i, k] * 2^(a_scale - 127) * e2m1(b[g, n, k]) * 2^(b_scale - 127) for the rows of group g.

    a [m, k]: float8_e4m3fn or float8_e5m2. b [G, n, k/2]: uint8, two e2m1 codes a byte, low nibble = even k. m_indptr: [G + 1].
    a_scale, b_scale: uint8 e8m0 codes, one for each 32 values along k, in 128x4 tiles (`scale_layout="linear"`: row-major). The scales of
    group g begin at row (m_indptr[g] + 127 * g) // 128 * 128 of a_scale, which has (m + 127 * G) // 128 * 128 rows; b_scale is padded to a
    multiple of 128 rows for each group. A Quantized brings its own scales, which then follow the rows of a without gaps.
    mma_sm 1 or 2, tile_m 128, tile_n 32, 64, 128, 192 or 256, tile_k 128 or 256, swap_ab: hints, checked and not needed.
    out: [m, n]. out_dtype: default bfloat16.

    skip_check: changes nothing.
    Rows in no group are zeros. Errors: as `grouped_matmul`. Numerics: scaled values are exact in bfloat16, sums are fp32; code 255 is NaN.
    Source: FlashInfer `group_gemm_mxfp8_mxfp4_nt_groupwise`; OCP MX.

    >>> out = cugemm.group_gemm_mxfp8_mxfp4_nt_groupwise(a, b, a_scale, b_scale, m_indptr)
    """
    op = _GROUP_MXFP4
    choice(op.name, "mma_sm", mma_sm, (1, 2))
    _tile_hints(op, tile_m, tile_n, tile_k, swap_ab)
    options = gemm_options(op, out_dtype, segments="indptr", b_axes="nk", **_byte_scales(op, a, E8M0.name, scale_layout, "pad128"))
    return product(op, a, b, _packed(options, a, b, False), a_scale=a_scale, b_scale=b_scale, segments=m_indptr, out=out)


group_gemm_mxfp4_nt_groupwise = group_gemm_mxfp8_mxfp4_nt_groupwise


def group_gemm_nvfp4_nt_groupwise(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    m_indptr: Any,
    alpha: Any = None,
    tile_m: int = 128,
    tile_n: int = 128,
    tile_k: int = 128,
    swap_ab: bool = True,
    out: Any = None,
    out_dtype: Any = None,
    *,
    scale_layout: str = "128x4",
    skip_check: bool = False,
) -> Any:
    """out[i] = alpha[g] * sum over k of e2m1(a[i, k]) * a_scale * e2m1(b[g, n, k]) * b_scale for the rows of group g.

    a [m, k/2], b [G, n, k/2]: uint8, two e2m1 codes a byte, low nibble = even k. m_indptr: [G + 1]. alpha: [G] float, one element, or None.
    a_scale, b_scale: e4m3 codes (uint8 or float8_e4m3fn), one for each 16 values along k, placed as in
    `group_gemm_mxfp8_mxfp4_nt_groupwise`.
    tile_m 128, tile_n 32, 64, 128, 192 or 256, tile_k 128 or 256, swap_ab: hints. out: [m, n]. out_dtype: default bfloat16.

    skip_check: changes nothing.
    Rows in no group are zeros. Errors: as `grouped_matmul`. Numerics: scaled values are exact in 16 bits, sums are fp32.
    Source: FlashInfer `group_gemm_nvfp4_nt_groupwise`; NVIDIA NVFP4.

    >>> out = cugemm.group_gemm_nvfp4_nt_groupwise(a, b, a_scale, b_scale, m_indptr, alpha)
    """
    op = _GROUP_NVFP4
    _tile_hints(op, tile_m, tile_n, tile_k, swap_ab)
    if alpha is not None and type(b) is Quantized and b.tensor_scale is not None:
        raise op.wrong_type("b is a Quantized, which has its own tensor_scale; drop alpha.")
    check_alpha(op, alpha, (shape_of(op.name, "b", b)[:1],))
    options = gemm_options(op, out_dtype, segments="indptr", b_axes="nk", **_byte_scales(op, a, E4M3.name, scale_layout, "pad128"))
    return product(
        op, a, b, _packed(options, a, b), a_scale=a_scale, b_scale=b_scale, b_tensor=alpha, segments=m_indptr, out=out
    )  # fmt: skip


def group_deepgemm_fp8_nt_groupwise(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    m_indices: Any,
    scale_granularity_mnk: tuple[int, int, int] = (1, 128, 128),
    out: Any = None,
    out_dtype: Any = None,
    *,
    skip_check: bool = False,
) -> Any:
    """out[i] = a[i] @ b[m_indices[i]].T, with an fp32 scale for each block of a and b.

    a [m, k], b [G, n, k]: float8_e4m3fn or float8_e5m2. a_scale [ceil(m/gm), ceil(k/128)], b_scale [G, ceil(n/gn), ceil(k/128)].
    m_indices: [m], int32 or int64: the group of each row, in any order; -1 for none, which gives a row of zeros.
    scale_granularity_mnk, out, out_dtype, errors and numerics: as `group_gemm_fp8_nt_groupwise`; scales need not be powers of two.
    Source: FlashInfer `group_deepgemm_fp8_nt_groupwise`, DeepGEMM.

    >>> out = cugemm.group_deepgemm_fp8_nt_groupwise(a, b, a_scale, b_scale, m_indices)
    """
    op = _GROUP_DEEPGEMM
    _check_scales(op, (a, b), (a_scale, b_scale))
    options = gemm_options(op, out_dtype, accumulate="promoted", segments="indices", b_axes="nk", **_blocks(op, scale_granularity_mnk))
    return product(op, a, b, options, a_scale=a_scale, b_scale=b_scale, segments=m_indices, out=out)


def batch_deepgemm_fp8_nt_groupwise(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    masked_m: Any,
    expected_m: int,
    scale_granularity_mnk: tuple[int, int, int] = (1, 128, 128),
    out: Any = None,
    out_dtype: Any = None,
    *,
    skip_check: bool = False,
) -> Any:
    """out[g, i] = a[g, i] @ b[g].T for the rows i < masked_m[g], zeros for the others, with an fp32 scale for each block of a and b.

    a [G, m, k], b [G, n, k]: float8_e4m3fn or float8_e5m2. a_scale [G, ceil(m/gm), ceil(k/128)], b_scale [G, ceil(n/gn), ceil(k/128)].
    masked_m: [G], int32 or int64. expected_m: a hint. out: [G, m, n]; else as `group_deepgemm_fp8_nt_groupwise`.
    Source: FlashInfer `batch_deepgemm_fp8_nt_groupwise`, DeepGEMM.

    >>> out = cugemm.batch_deepgemm_fp8_nt_groupwise(a, b, a_scale, b_scale, masked_m, 64)
    """
    op = _BATCH_DEEPGEMM
    check_expected(op, expected_m)
    _check_scales(op, (a, b), (a_scale, b_scale))
    options = gemm_options(op, out_dtype, accumulate="promoted", segments="masked", b_axes="nk", **_blocks(op, scale_granularity_mnk))
    return product(op, a, b, options, a_scale=a_scale, b_scale=b_scale, segments=masked_m, out=out)


def grouped_mm_bf16(
    a: Any,
    b: Any,
    m_indptr: Any,
    out: Any = None,
    out_dtype: Any = None,
    *,
    backend: str = "auto",
    tactic: int = -1,
    skip_check: bool = False,
) -> Any:
    """out[i] = a[i] @ b[g].T for the rows m_indptr[g] <= i < m_indptr[g + 1]; a [m, k] and b [G, n, k] bfloat16.

    m_indptr: [G + 1], int32 or int64. out: [m, n]. out_dtype: "bfloat16" (default), "float16" or "float32". backend: "cudnn" means "auto".
    tactic: accepted, plans of cuDNN. skip_check: changes nothing. Rows in no group are zeros.
    Errors and numerics: as `grouped_matmul`. Source: FlashInfer `grouped_mm_bf16`.

    >>> out = cugemm.grouped_mm_bf16(a, b, m_indptr)
    """
    _check_tactic(_MM_BF16, tactic)
    options = gemm_options(_MM_BF16, out_dtype, backend, ("cudnn",), segments="indptr", b_axes="nk")
    return product(_MM_BF16, a, b, options, segments=m_indptr, out=out)


def grouped_mm_fp8(
    a: Any,
    b: Any,
    m_indptr: Any,
    alpha: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    *,
    backend: str = "auto",
    tactic: int = -1,
    accumulate: str = "fast",
    skip_check: bool = False,
) -> Any:
    """out[i] = alpha * a[i] @ b[g].T for the rows m_indptr[g] <= i < m_indptr[g + 1]; a [m, k] and b [G, n, k] float8, any mix.

    alpha: float or one element; None is 1. Other arguments: as `grouped_mm_bf16`; accumulate: as `linear`. Source: FlashInfer
    `grouped_mm_fp8`.

    >>> out = cugemm.grouped_mm_fp8(a, b, m_indptr, alpha)
    """
    _check_tactic(_MM_FP8, tactic)
    options = gemm_options(_MM_FP8, out_dtype, backend, ("cudnn",), accumulate, segments="indptr", b_axes="nk")
    return product(_MM_FP8, a, b, options, alpha=alpha, segments=m_indptr, out=out)


def grouped_mm_mxfp8(
    a: Any,
    b: Any,
    a_descale: Any,
    b_descale: Any,
    m_indptr: Any,
    out: Any = None,
    out_dtype: Any = None,
    *,
    backend: str = "auto",
    tactic: int = -1,
    scale_layout: str = "128x4",
    skip_check: bool = False,
) -> Any:
    """out[i] = (a[i] * 2^(a_descale - 127)) @ (b[g] * 2^(b_descale - 127)).T for the rows of group g; a [m, k] and b [G, n, k] float8.

    a_descale, b_descale: uint8 e8m0 codes, one for each 32 values along k, in 128x4 tiles over all m rows of a, whatever the groups, and
    over the rows of each b[g]; `scale_layout="linear"`: [m, ceil(k/32)] and [G, n, ceil(k/32)]. Other arguments: as `grouped_mm_bf16`.
    Numerics: scaled values are exact in bfloat16, sums are fp32. Source: FlashInfer `grouped_mm_mxfp8`; OCP MX.

    >>> out = cugemm.grouped_mm_mxfp8(a, b, a_descale, b_descale, m_indptr)
    """
    op = _MM_MXFP8
    _check_tactic(op, tactic)
    options = gemm_options(
        op, out_dtype, backend, ("cudnn",), segments="indptr", b_axes="nk", **_byte_scales(op, a, E8M0.name, scale_layout, "")
    )
    return product(op, a, b, options, a_scale=a_descale, b_scale=b_descale, segments=m_indptr, out=out)


def grouped_mm_fp4(
    a: Any,
    b: Any,
    a_descale: Any,
    b_descale: Any,
    m_indptr: Any,
    alpha: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    block_size: int = 16,
    *,
    backend: str = "auto",
    tactic: int = -1,
    scale_layout: str = "128x4",
    skip_check: bool = False,
) -> Any:
    """out[i] = alpha * (e2m1(a[i]) * a_descale) @ (e2m1(b[g]) * b_descale).T for the rows of group g.

    a [m, k/2], b [G, n, k/2]: uint8, two e2m1 codes a byte, low nibble = even k. alpha: float or one element; None is 1.
    block_size 16: descales are e4m3 codes, one for each 16 values along k (nvfp4); 32: e8m0 codes, one for each 32 (mxfp4); uint8, or the
    float8 dtype; placed as in `grouped_mm_mxfp8`. Other arguments: as `grouped_mm_bf16`.
    Numerics: scaled values are exact in 16 bits, sums are fp32. Source: FlashInfer `grouped_mm_fp4`.

    >>> out = cugemm.grouped_mm_fp4(a, b, a_descale, b_descale, m_indptr, alpha)
    """
    op = _MM_FP4
    _check_tactic(op, tactic)
    block_size = choice(op.name, "block_size", block_size, (16, 32), "16 for nvfp4 or 32 for mxfp4")
    element = E4M3.name if block_size == 16 else E8M0.name
    options = gemm_options(
        op, out_dtype, backend, ("cudnn",), segments="indptr", b_axes="nk", **_byte_scales(op, a, element, scale_layout, "")
    )
    return product(
        op, a, b, _packed(options, a, b), a_scale=a_descale, b_scale=b_descale, alpha=alpha, segments=m_indptr, out=out
    )  # fmt: skip


def moe_gemm_fp8_nt_groupwise(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    m_indptr: Any,
    scale_granularity_mnk: tuple[int, int, int] = (1, 128, 128),
    scale_major_mode: str = "MN",
    backend: str = "auto",
    out: Any = None,
    out_dtype: Any = None,
    is_gated: bool = False,
) -> Any:
    """y[i] = a[i] @ b[g].T for the rows of group g; out = y, or with is_gated silu(second half of y[i]) * first half.

    a [m, k], b [G, n, k]: float8_e4m3fn or float8_e5m2. m_indptr: [G + 1], int32 or int64.
    a_scale: fp32 [ceil(k/128), (m + 3 * G) // 4 * 4]; the scales of group g begin at column (m_indptr[g] + 3 * g) // 4 * 4.
    b_scale: fp32 [G, ceil(k/128), ceil(n/128)]. A Quantized brings its own scales, which follow the rows of a without gaps.
    is_gated: b holds the up projection in its first n/2 rows and the gate in the others; out is [m, n/2], and y stays float32.
    scale_granularity_mnk: (1, 128, 128), scale_major_mode: "MN", as in FlashInfer. backend: "cute" means "auto".
    out_dtype: default bfloat16.

    Rows in no group are zeros. Errors: as `grouped_matmul`. Numerics: as `group_gemm_fp8_nt_groupwise` and `silu_and_mul`.
    Source: FlashInfer `moe_gemm_fp8_nt_groupwise`.

    >>> out = cugemm.moe_gemm_fp8_nt_groupwise(a, b, a_scale, b_scale, m_indptr, is_gated=True)
    """
    op = _MOE_FP8
    choice(op.name, "scale_granularity_mnk", scale_granularity_mnk, ((1, 128, 128),))
    choice(op.name, "scale_major_mode", scale_major_mode, ("MN",))
    _check_scales(op, (a, b), (a_scale, b_scale))
    options = gemm_options(
        op, out_dtype, backend, ("cute",), "promoted", segments="indptr", b_axes="nk", a_scale_axes="km", b_scale_axes="kn",
        a_block=(1, 128), b_block=(128, 128), a_scale_rows="" if type(a) is Quantized else "pad4",
    )  # fmt: skip
    if not flag(op.name, "is_gated", is_gated):
        return product(op, a, b, options, a_scale=a_scale, b_scale=b_scale, segments=m_indptr, out=out)
    shape = shape_of(op.name, "b", b)
    if len(shape) == 3 and shape[1] % 2:
        raise op.error(f"b has shape {shape}, but with is_gated its rows are two halves; {shape[1]} is odd.")
    arrays = (a, b, a_scale, b_scale, m_indptr, out)
    body = functools.partial(_gated, op, options)
    rehearse(op.name, options, body, *arrays)
    return body(*arrays)


def _gated(op: GemmOp, options: GemmOptions, a: Any, b: Any, a_scale: Any, b_scale: Any, m_indptr: Any, out: Any) -> Any:
    y = product(op, a, b, options._replace(out_dtype="float32"), a_scale=a_scale, b_scale=b_scale, segments=m_indptr)
    (out,) = alike(y, out)
    return silu_and_mul(y, gate="second", out=out, out_dtype=options.out_dtype or (BF16.dtype if out is None else None))


# --- arguments that several share ---------------------------------------------------------------------------------------------------


def check_expected(op: GemmOp, expected_m: Any) -> None:
    """expected_m is a hint for a tile; what is no count is a mistake in the order of arguments."""
    if not isinstance(expected_m, Integral) or isinstance(expected_m, bool) or int(expected_m) < 0:
        shown = expected_m if isinstance(expected_m, Integral) else type(expected_m).__name__
        raise op.wrong_type(f"expected_m is {shown}; wanted the rows that a group has on average, an int.")


def _tile_hints(op: GemmOp, tile_m: Any, tile_n: Any, tile_k: Any, swap_ab: Any) -> None:
    choice(op.name, "tile_m", tile_m, (128,))
    choice(op.name, "tile_n", tile_n, (32, 64, 128, 192, 256))
    choice(op.name, "tile_k", tile_k, (128, 256))
    flag(op.name, "swap_ab", swap_ab)


def _check_tactic(op: GemmOp, tactic: Any) -> None:
    if not isinstance(tactic, Integral) or int(tactic) < -1:
        raise op.error(f"tactic is {shown(tactic)}; wanted -1 or the number of a plan (it is not used).")


def _check_scales(op: GemmOp, operands: tuple[Any, Any], scales: tuple[Any, Any]) -> None:
    for role, x, scale in zip(op.roles[2:4], operands, scales, strict=True):
        if scale is None and type(x) is not Quantized:
            raise op.wrong_type(f"{role} is missing; pass one float32 scale per block of {op.roles[op.roles.index(role) - 2]}.")


def _blocks(op: GemmOp, granularity: Any) -> dict[str, Any]:
    """The blocks of both scales from (gm, gn, gk)."""
    gm, gn, gk = choice(op.name, "scale_granularity_mnk", granularity, GRANULARITIES, "(1 or 128, 1 or 128, 128)")
    return {"a_block": (gm, gk), "b_block": (gn, gk)}


def _byte_scales(op: GemmOp, a: Any, element: str, layout: str, rows: str) -> dict[str, Any]:
    """Options of byte scales; those of a Quantized a have no gaps between segments."""
    layout = choice(op.name, "scale_layout", layout, LAYOUTS, f"one of {', '.join(map(repr, LAYOUTS))}")
    return {
        "a_scale_element": element, "b_scale_element": element, "a_scale_layout": layout, "b_scale_layout": layout,
        "a_scale_rows": "" if type(a) is Quantized else rows,
    }  # fmt: skip


def _packed(options: GemmOptions, a: Any, b: Any, a_too: bool = True) -> GemmOptions:
    """uint8 payloads of loose operands are packed e2m1."""
    if a_too and type(a) is not Quantized:
        options = options._replace(a_element=E2M1X2.name)
    return options if type(b) is Quantized else options._replace(b_element=E2M1X2.name)
