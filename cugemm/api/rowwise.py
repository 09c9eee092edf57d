"""`combine` and `silu_and_mul`: what a mixture of experts does with rows around its grouped products."""

from __future__ import annotations

from typing import Any

from cugemm.arrays import dtype_name
from cugemm.launch import run
from cugemm.problem import register
from cugemm.rowwise import GATES, CombineOp, RowsOptions, SiluAndMulOp

_COMBINE: CombineOp = register(CombineOp())
_SILU_AND_MUL: SiluAndMulOp = register(SiluAndMulOp())


def combine(y: Any, weights: Any, *, indices: Any = None, out: Any = None, out_dtype: Any = None) -> Any:
    """out[t, n] = sum over j of weights[t, j] * y[t, j, n]: the outputs of a token's experts, weighted.

    y: [tokens, topk, n], bfloat16, float16 or float32, any strides. weights: [tokens, topk] in the same dtypes.
    indices: [tokens, topk], int32 or int64, or None; y is then [rows, n] and its row indices[t, j] is taken. An index outside [0, rows)
    adds nothing, whatever its weight: -1 drops a term. A row that exists counts even with weight 0, so its NaN shows.
    out: [tokens, n] to write into. out_dtype: "bfloat16", "float16" or "float32", default y's dtype.

    Raises TypeError and ValueError that name the argument.
    Numerics: products and sums in float32, each rounded, in the order of j, then one rounding to the output: bits are the same in every
    run, on CPU and GPU. |error| <= (topk + 1) * 2**-24 * sum(|weight * y|), to first order, before that last rounding.
    Source: the finalising step of a mixture of experts (FlashInfer's fused MoE kernels, DeepEP's combine).

    >>> out = cugemm.combine(y, router_weights, indices=places)
    """
    return run(_COMBINE, (y, weights, indices, out), RowsOptions(_dtype("combine", out_dtype)))


def silu_and_mul(x: Any, *, gate: str = "first", counts: Any = None, out: Any = None, out_dtype: Any = None) -> Any:
    """out[.., n] = silu(x[.., :n]) * x[.., n:], silu(v) = v / (1 + exp(-v)): the gate of a SwiGLU layer.

    x: [.., 2n], bfloat16, float16 or float32; any strides with which its leading axes form a matrix or a batch of them.
    gate: "first" or "second", the half that goes through silu.
    counts: [groups], int32 or int64, with x [groups, rows, 2n]: rows from counts[g] on are zeros in the result and are not read. None: all.
    out: [.., n] to write into. out_dtype: "bfloat16", "float16" or "float32", default x's dtype.

    Raises TypeError and ValueError that name the argument.
    Numerics: float32, rounded once to the output; the same bits on CPU and GPU. silu is within 3.3 ulp of float32 above -86 and within
    4e-43 of its value below. NaN propagates; silu(inf) = inf, silu(-inf) = NaN, as the quotient says.
    Source: FlashInfer `silu_and_mul`; Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.

    >>> h = cugemm.silu_and_mul(cugemm.linear(x, w13))
    """
    if not isinstance(gate, str) or gate not in GATES:
        raise ValueError(f"silu_and_mul: gate is {gate!r}; wanted one of {', '.join(map(repr, GATES))}.")
    return run(_SILU_AND_MUL, (x, counts, out), RowsOptions(_dtype("silu_and_mul", out_dtype), gate))


def _dtype(name: str, out_dtype: Any) -> str | None:
    try:
        return None if out_dtype is None else dtype_name(out_dtype)
    except TypeError as error:
        raise TypeError(f"{name}: out_dtype: {error}") from None
