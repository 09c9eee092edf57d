"""FlashInfer's masked product of block-scaled experts, whose operands have their groups along the last axis."""

from __future__ import annotations

from typing import Any

from cugemm.api.common import check_alpha, choice, gemm_options, matches, product, shape_of, shown
from cugemm.api.shuffle import shaped, swapped_axes
from cugemm.arrays import Spec, is_scalar
from cugemm.formats import E2M1X2, E4M3, E5M2, E8M0, Element
from cugemm.problem import FLOATS8
from cugemm.problem import product as register
from cugemm.quantized import Quantized
from cugemm.scales import ceil_div

_CALLED = {
    "a": "lhs[0]", "b": "rhs[0]", "a_scale": "lhs[1]", "b_scale": "rhs[1]", "segments": "masked_m", "b_tensor_scale": "alpha",
    "out_dtype": "c_dtype",
}  # fmt: skip
_MASKED = register("grouped_gemm_nt_masked", (*FLOATS8, E2M1X2.name), (*FLOATS8, E2M1X2.name), ranks=(3,), called=_CALLED)
_ELEMENTS = {"float4_e2m1fn": E2M1X2, "float8_e4m3fn": E4M3, "float8_e5m2": E5M2}
_SCALES = {"float8_e4m3fn": E4M3, "float8_e8m0fnu": E8M0}
_KINDS = (
    ("float4_e2m1fn", "float8_e4m3fn", 16),
    ("float4_e2m1fn", "float8_e8m0fnu", 32),
    ("float8_e4m3fn", "float8_e8m0fnu", 32),
    ("float8_e5m2", "float8_e8m0fnu", 32),
)
"""ab_dtype, sf_dtype and sf_vec_size that go together."""
_FUSED = (
    "topk_weights", "idx_src_info", "rank_src_info", "out_ptrs", "num_ranks", "dst_signals", "barrier_flag_local",
    "barrier_flag_multicast", "is_combine_fusion", "is_swap_ab",
)  # fmt: skip


def grouped_gemm_nt_masked(
    lhs: tuple[Any, Any],
    rhs: tuple[Any, Any],
    out: Any,
    masked_m: Any,
    *,
    ab_dtype: str,
    sf_dtype: str,
    c_dtype: str,
    sf_vec_size: int,
    alpha: Any = None,
    alpha_dtype: Any = None,
    mma_tiler_mn: Any = (128, 128),
    cluster_shape_mn: Any = (1, 1),
    sm_count: int | None = None,
    **fused: Any,
) -> Any:
    """out[i, :, g] = alpha[g] * (a[i, :, g] * a_sf) @ (b[:, :, g] * b_sf).T for the rows i < masked_m[g], zeros for the others.

    lhs: (a [m, k, G], a_sf), rhs: (b [n, k, G], b_sf); of packed e2m1 uint8 [m, k/2, G], low nibble = even k. Any strides: usually they are
    views of [G, m, k], as `scaled_fp4_grouped_quantize` and `mxfp8_grouped_quantize` return them.
    a_sf, b_sf: codes (uint8 or the float8 dtype) in 128x4 tiles, [32, 4, ceil(m/128), 4, ceil(k/vec/4), G] as these two return them, or
    [G, rows, blocks] padded to whole tiles. A view of contiguous [G, ..] tiles is read in place, another order of memory is copied first.
    out: [m, n, G] of c_dtype, is written and returned; one of m and n contiguous. None: a new one. masked_m: [G], int32 or int64.
    ab_dtype, sf_dtype, sf_vec_size: "float4_e2m1fn" with "float8_e4m3fn", 16 (nvfp4) or "float8_e8m0fnu", 32 (mxfp4); "float8_e4m3fn" or
    "float8_e5m2" with "float8_e8m0fnu", 32 (mxfp8). c_dtype: "bfloat16", "float16" or "float32".
    alpha: float [G], [1, 1, G], one element, or None. alpha_dtype, mma_tiler_mn, cluster_shape_mn, sm_count: accepted, not needed.
    FlashInfer's arguments for swapped operands, signals and combining across ranks (topk_weights, is_swap_ab, dst_signals and others) are
    refused, unless they are None, 0 or False.

    Raises TypeError and ValueError that name the argument. Numerics: scaled values are exact in 16 bits, sums are fp32, each row's bits do
    not depend on the other groups. Source: FlashInfer `grouped_gemm_nt_masked`.

    >>> a = cugemm.scaled_fp4_grouped_quantize(x, counts, x_scale)
    >>> nvfp4 = dict(ab_dtype="float4_e2m1fn", sf_dtype="float8_e4m3fn", sf_vec_size=16)
    >>> y = cugemm.grouped_gemm_nt_masked(a, b, None, counts, c_dtype="bfloat16", alpha=1 / (x_scale * w_scale), **nvfp4)
    """
    op = _MASKED
    for name, value in fused.items():
        if name not in _FUSED:
            raise TypeError(f"{op.name}() got an unexpected keyword argument {name!r}")
        if not (value is None or matches(value, False) or matches(value, 0)):
            raise op.error(f"{name} is {shown(value)}; this is not supported: drop it, and weigh and combine rows with cugemm.combine.")
    element = _ELEMENTS[choice(op.name, "ab_dtype", ab_dtype, tuple(_ELEMENTS))]
    scale = _SCALES[choice(op.name, "sf_dtype", sf_dtype, tuple(_SCALES))]
    sf_vec_size = choice(op.name, "sf_vec_size", sf_vec_size, (16, 32))
    if (ab_dtype, sf_dtype, sf_vec_size) not in _KINDS:
        wanted = ", ".join(f"{ab} with {sf}, {vec}" for ab, sf, vec in _KINDS)
        raise op.error(f"ab_dtype is {ab_dtype} with sf_dtype {sf_dtype} and sf_vec_size {sf_vec_size}; wanted {wanted}.")
    (a, a_sf), (b, b_sf) = (_operand(role, given, element, sf_vec_size) for role, given in (("lhs", lhs), ("rhs", rhs)))
    if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2]:
        sizes = [f"{role}[0] {tuple(x.shape[i] for i in (1, 2, 0))}" for role, x in (("lhs", a), ("rhs", b))]
        raise op.error(f"{sizes[0]} and {sizes[1]} differ in k or in groups; wanted [m, k, groups] and [n, k, groups].")
    if out is not None and shape_of(op.name, "out", out) != (a.shape[1], b.shape[1], a.shape[0]):
        raise op.error(f"out has shape {shape_of(op.name, 'out', out)}; wanted [m, n, groups], {(a.shape[1], b.shape[1], a.shape[0])}.")
    check_alpha(op, alpha, ((a.shape[0],), (1, 1, a.shape[0])))
    if alpha is not None and not is_scalar(alpha) and len(shape_of(op.name, "alpha", alpha)) == 3:
        alpha = shaped(_turnable("alpha", alpha), (-1,))
    if c_dtype is None:
        raise op.wrong_type("c_dtype is None; pass 'bfloat16', 'float16' or 'float32'.")
    options = gemm_options(
        op, c_dtype, segments="masked", b_axes="nk", a_element=element.name, b_element=element.name,
        a_scale_element=scale.name, b_scale_element=scale.name, a_scale_layout="128x4", b_scale_layout="128x4",
    )  # fmt: skip
    into = None if out is None else _groups_first("out", out)
    y = product(op, a, b, options, a_scale=a_sf, b_scale=b_sf, b_tensor=alpha, segments=masked_m, out=into)
    return swapped_axes(y, (1, 2), (0, 2)) if out is None else out


def _operand(role: str, given: Any, element: Element, vector: int) -> tuple[Any, Any]:
    """(x [groups, rows, k], its scales as [groups, rows, blocks] in whole tiles) of a pair in FlashInfer's axes."""
    op = _MASKED
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        kind = f"{len(given)} values" if isinstance(given, (tuple, list)) else type(given).__name__
        raise op.wrong_type(f"{role} is {kind}; pass (data, scales).")
    x, scale = given
    for i, part in enumerate(given):
        if part is None or type(part) is Quantized:
            kind = "missing" if part is None else "a Quantized, which has its groups first"
            raise op.wrong_type(
                f"{role}[{i}] is {kind}; pass arrays, (data, scales), or use cugemm.grouped_matmul(x, experts, counts=...)."
            )
    shape, scales = shape_of(op.name, f"{role}[0]", x), shape_of(op.name, f"{role}[1]", scale)
    if len(shape) != 3:
        raise op.error(f"{role}[0] has shape {shape}; wanted [rows, k, groups], as a view of [groups, rows, k].")
    rows, k, groups = shape[0], shape[1] * element.per_byte, shape[2]
    if len(scales) == 6:
        wanted = (32, 4, ceil_div(rows, 128), 4, ceil_div(k, 4 * vector), groups)
        if scales != wanted:
            raise op.error(f"{role}[1] has shape {scales}, but {role}[0] is {shape}; wanted {wanted}, one scale for each {vector} values.")
        # To axes group, tile row, tile column, row, slab, block; then flat, which copies other orders of memory.
        tiles = swapped_axes(_turnable(f"{role}[1]", scale), (3, 5), (2, 4), (1, 4), (0, 3))
        scale = shaped(shaped(tiles, (-1,)), (groups, 128 * wanted[2], 4 * wanted[4]))
    return _groups_first(f"{role}[0]", x), scale


def _groups_first(role: str, x: Any) -> Any:
    """A view of [rows, columns, groups] as [groups, rows, columns]."""
    return swapped_axes(_turnable(role, x), (0, 2), (1, 2))


def _turnable(role: str, x: Any) -> Any:
    if not isinstance(x, Spec) and not (hasattr(x, "swapaxes") and hasattr(x, "reshape")):
        raise _MASKED.wrong_type(f"{role} is a {type(x).__name__}, whose axes cannot be swapped; pass a torch, CuPy, JAX or NumPy array.")
    return x
