"""DeepGEMM's names: (data, scale) operands, and a result that is written into d."""

from __future__ import annotations

from typing import Any

from cugemm.api.common import GRANULARITIES, choice, flag, gemm_options, matches, product, shape_of, shown
from cugemm.api.grouped_flashinfer import check_expected
from cugemm.arrays import Jax, framework_of
from cugemm.problem import FLOATS8, GemmOp, GemmOptions
from cugemm.problem import product as register
from cugemm.quantized import Quantized

_CALLED = {"a": "a[0]", "b": "b[0]", "a_scale": "a[1]", "b_scale": "b[1]"}
_DENSE = register("fp8_gemm_nt", FLOATS8, FLOATS8, called={**_CALLED, "bias": "c"}, bias_2d=True)
_CONTIGUOUS = register("m_grouped_fp8_gemm_nt_contiguous", FLOATS8, FLOATS8, called={**_CALLED, "segments": "grouped_layout"})
_MASKED = register("m_grouped_fp8_gemm_nt_masked", FLOATS8, FLOATS8, ranks=(3,), called={**_CALLED, "segments": "masked_m"})
_PAIRS = tuple(((gm, gk), (gn, gk)) for gm, gn, gk in GRANULARITIES)
_RECIPE = "1 or 128 rows and 128 values along k under one scale, such as (1, 128, 128)"
_INSTEAD = {
    _DENSE.name: "gemm_fp8_nt_groupwise",
    _CONTIGUOUS.name: "group_deepgemm_fp8_nt_groupwise",
    _MASKED.name: "batch_deepgemm_fp8_nt_groupwise",
}


def fp8_gemm_nt(
    a: Any,
    b: Any,
    d: Any,
    c: Any = None,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d[m, n] = sum over k-blocks of a_scale * b_scale * (sum over the block of a[m, k] * b[n, k]) + c[m, n].

    a: (a [m, k], a_scale [m, ceil(k/128)]), b: (b [n, k], b_scale [ceil(n/128), ceil(k/128)]): float8_e4m3fn or float8_e5m2 and float32,
    any strides and any values (scales are neither packed nor cut to powers of two); or a Quantized each.
    d: [m, n], bfloat16, float16 or float32, is written (messages call it `out`); JAX arrays cannot be: TypeError. c: [m, n] float, an
    array other than d, or None.
    recipe: (gm, gn, 128), the values under one scale along m, n and k, default (1, 128, 128); or recipe_a (gm, 128) and recipe_b (gn, 128).
    compiled_dims, disable_ue8m0_cast: accepted; nothing is compiled for a shape, and nothing is cast.

    Raises TypeError and ValueError that name the argument. Numerics: as `gemm_fp8_nt_groupwise`; c is added in fp32.
    Source: DeepGEMM `fp8_gemm_nt`.

    >>> cugemm.fp8_gemm_nt((a, a_scale), (b, b_scale), d)
    """
    (a, a_scale), (b, b_scale), options = _read(_DENSE, a, b, d, recipe, recipe_a, recipe_b, "")
    if c is not None:
        shape, wanted = shape_of(_DENSE.name, "c", c), shape_of(_DENSE.name, "d", d)
        if shape != wanted:
            raise _DENSE.error(f"c has shape {shape}, but d has shape {wanted}; they must agree.")
    product(_DENSE, a, b, options, a_scale=a_scale, b_scale=b_scale, bias=c, out=d)


def m_grouped_fp8_gemm_nt_contiguous(
    a: Any,
    b: Any,
    d: Any,
    grouped_layout: Any,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
    *,
    skip_check: bool = False,
) -> None:
    """d[i] = a[i] @ b[grouped_layout[i]].T, with an fp32 scale for each block of a and b.

    a: (a [m, k], a_scale [m, ceil(k/128)]), b: (b [G, n, k], b_scale [G, ceil(n/128), ceil(k/128)]), or Quantized.
    grouped_layout (m_indices): [m], int32 or int64, the group of each row, in any order and with no alignment; -1: the row of d is zeros.
    use_psum_layout: refused; `grouped_matmul(indptr=...)` takes the ends of groups. skip_check: changes nothing.
    Other arguments, errors and numerics: as `fp8_gemm_nt`. Source: DeepGEMM `m_grouped_fp8_gemm_nt_contiguous`.

    >>> cugemm.m_grouped_fp8_gemm_nt_contiguous((a, a_scale), (b, b_scale), d, m_indices)
    """
    if flag(_CONTIGUOUS.name, "use_psum_layout", use_psum_layout) or expected_m_for_psum_layout is not None:
        raise _CONTIGUOUS.error(
            "use_psum_layout is not supported; pass the group of each row in grouped_layout, or use cugemm.grouped_matmul(indptr=...)."
        )
    (a, a_scale), (b, b_scale), options = _read(_CONTIGUOUS, a, b, d, recipe, recipe_a, recipe_b, "indices")
    product(_CONTIGUOUS, a, b, options, a_scale=a_scale, b_scale=b_scale, segments=grouped_layout, out=d)


def m_grouped_fp8_gemm_nt_masked(
    a: Any,
    b: Any,
    d: Any,
    masked_m: Any,
    expected_m: int,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    *,
    skip_check: bool = False,
) -> None:
    """d[g, i] = a[g, i] @ b[g].T for the rows i < masked_m[g], zeros for the others.

    a: (a [G, m, k], a_scale [G, m, ceil(k/128)]), b: (b [G, n, k], b_scale [G, ceil(n/128), ceil(k/128)]), or Quantized. d: [G, m, n].
    masked_m: [G], int32 or int64. expected_m: a hint. skip_check: changes nothing. Other arguments, errors and numerics: as `fp8_gemm_nt`.
    Source: DeepGEMM `m_grouped_fp8_gemm_nt_masked`.

    >>> cugemm.m_grouped_fp8_gemm_nt_masked((a, a_scale), (b, b_scale), d, masked_m, 64)
    """
    check_expected(_MASKED, expected_m)
    (a, a_scale), (b, b_scale), options = _read(_MASKED, a, b, d, recipe, recipe_a, recipe_b, "masked")
    product(_MASKED, a, b, options, a_scale=a_scale, b_scale=b_scale, segments=masked_m, out=d)


def _read(
    op: GemmOp, a: Any, b: Any, d: Any, recipe: Any, recipe_a: Any, recipe_b: Any, segments: str
) -> tuple[tuple[Any, Any], tuple[Any, Any], GemmOptions]:  # fmt: skip
    """Both operands as (data, scale), and the options of the call; refuses a d that cannot be written."""
    if d is None:
        raise op.wrong_type("d is missing; pass the array to write, or call cugemm." + _INSTEAD[op.name] + ", which returns one.")
    if isinstance(framework_of(d, f"{op.name}: d"), Jax):
        raise op.wrong_type(
            f"d is a JAX array, which is immutable; call cugemm.{_INSTEAD[op.name]}, which returns the result."
        )  # fmt: skip
    blocks = _recipe(op, recipe, recipe_a, recipe_b)
    options = gemm_options(op, accumulate="promoted", b_axes="nk", segments=segments, a_block=blocks[0], b_block=blocks[1])
    return _pair(op, "a", a), _pair(op, "b", b), options


def _pair(op: GemmOp, role: str, operand: Any) -> tuple[Any, Any]:
    if type(operand) is Quantized:
        return operand, None
    if not isinstance(operand, (tuple, list)) or len(operand) != 2 or operand[1] is None:
        shown = f"{len(operand)} values" if isinstance(operand, (tuple, list)) and len(operand) != 2 else type(operand).__name__
        raise op.wrong_type(f"{role} is {shown}; pass ({role}, scale of {role}), or a cugemm.Quantized.")
    return operand[0], operand[1]


def _recipe(op: GemmOp, recipe: Any, recipe_a: Any, recipe_b: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """((gm, gk) of a, (gn, gk) of b)."""
    if recipe is not None and (recipe_a is not None or recipe_b is not None):
        raise op.error("recipe says what recipe_a and recipe_b say; drop one or the other.")
    if recipe is None and (recipe_a is None) != (recipe_b is None):
        raise op.error("pass recipe_a and recipe_b together, or neither.")
    if recipe_a is None:
        gm, gn, gk = (1, 128, 128) if recipe is None else choice(op.name, "recipe", recipe, GRANULARITIES, _RECIPE)
        return (gm, gk), (gn, gk)
    for pair in _PAIRS:
        if matches((recipe_a, recipe_b), pair):
            return pair
    raise op.error(f"recipe_a is {shown(recipe_a)} and recipe_b {shown(recipe_b)}; wanted {_RECIPE}.")
