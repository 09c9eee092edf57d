"""Low-latency products of few rows: "TGV", FlashInfer's tinygemm and the router products of DeepSeek V3 and Mistral Large 3."""

from __future__ import annotations

from typing import Any

from cugemm.api.common import flag, gemm_options, product
from cugemm.arrays import framework_of
from cugemm.formats import BF16, FP32
from cugemm.problem import FLOATS16, OPS, OUT, A, Argument, B, GemmCall, GemmOp, GemmOptions
from cugemm.problem import product as register


class RouterOp(GemmOp):
    """A product of one shape: [1..16, hidden_dim] x [hidden_dim, num_experts]."""

    def check(self, views: tuple[Argument, ...], options: GemmOptions) -> GemmCall:
        """As for every product, and before that everything that FlashInfer refuses, in one ValueError."""
        hidden, experts, dtype = _ROUTERS[self.name]
        a, b, out = (self.array(views, position) for position in (A, B, OUT))
        wrong = []
        for view, role, ndim_2 in ((a, "mat_a", "(num_tokens, hidden_dim)"), (b, "mat_b", "(hidden_dim, num_experts)")):
            if len(view.shape) != 2:
                raise self.error(f"{role} has shape {view.shape}; wanted {ndim_2}.")
            if view.dtype != BF16.dtype:
                wrong.append(f"{role} is {view.dtype}; wanted {BF16.dtype}")
        if out.dtype != dtype:
            wrong.append(f"out is {out.dtype}; wanted {dtype}")
        if not 1 <= a.shape[0] <= _MOST_TOKENS:
            wrong.append(f"num_tokens is {a.shape[0]}; wanted 1 to {_MOST_TOKENS}")
        if a.shape[1] != hidden or b.shape[0] != hidden:
            wrong.append(f"hidden_dim is {a.shape[1]} in mat_a and {b.shape[0]} in mat_b; wanted {hidden}")
        if b.shape[1] != experts:
            wrong.append(f"num_experts is {b.shape[1]}; wanted {experts}")
        if b.strides[0] != 1:
            wrong.append(f"mat_b has strides {b.strides}; wanted column-major, the transposed view of a weight (num_experts, hidden_dim)")
        if wrong:
            raise self.error(f"{'; '.join(wrong)}. For other operands there is cugemm.mm_bf16.")
        return super().check(views, options)


_TGV = register("tgv_gemm", FLOATS16, FLOATS16)
_TGV_SM100 = register("tgv_gemm_sm100", FLOATS16, FLOATS16)
_TINY = register("tinygemm_bf16", (BF16.name,), (BF16.name,), called={"a": "input", "b": "weight"})

_MOST_TOKENS = 16
_ROUTERS = {
    "mm_M1_16_K7168_N128": (7168, 128, BF16.dtype),
    "mm_M1_16_K7168_N256": (7168, 256, FP32.dtype),
    "mm_M1_16_K6144_N256": (6144, 256, FP32.dtype),
}
"""(hidden_dim, num_experts, dtype of out)."""


def _router(name: str) -> RouterOp:
    op = OPS[name] = RouterOp(*register(name, (BF16.name,), (BF16.name,), called={"a": "mat_a", "b": "mat_b"}))
    return op


_K7168_N128, _K7168_N256, _K6144_N256 = map(_router, _ROUTERS)


def tgv_gemm(
    a: Any,
    b: Any,
    bias: Any = None,
    pdl: bool = False,
    out: Any = None,
    *,
    out_dtype: Any = None,
    backend: str = "auto",
    rows: Any = None,
    static_weights: bool = False,
    batch_invariant: bool = False,
) -> Any:
    """out[m, n] = sum over k of a[m, k] * b[k, n] + bias[n], for small m.

    a [m, k], b [k, n]: bfloat16 or float16, any layout (column-major b, the transposed view of a weight [n, k], streams best). bias: [n]
    or None.
    rows: int32 or int64 [M], row i of the result is then that of a[rows[i]] (a gather); an index outside [0, m) gives zeros.
    pdl, static_weights, batch_invariant: as `cugemm.linear`. out_dtype: default a's dtype. Runs on every supported architecture.
    Errors and numerics: as `cugemm.linear`. Source: FlashInfer `tgv_gemm_sm100`.

    >>> out = cugemm.tgv_gemm(a, w.T, bias)
    """
    return product(
        _TGV, a, b, gemm_options(_TGV, out_dtype, backend, how=(pdl, static_weights, batch_invariant)), bias=bias, rows=rows, out=out
    )


def tgv_gemm_sm100(a: Any, b: Any, bias: Any = None, pdl: bool = False, out: Any = None) -> Any:
    """`tgv_gemm` under FlashInfer's name; not only for sm_100.

    >>> out = cugemm.tgv_gemm_sm100(a, b)
    """
    return product(_TGV_SM100, a, b, gemm_options(_TGV_SM100, how=(pdl, False, False)), bias=bias, out=out)


def tinygemm_bf16(input: Any, weight: Any, out: Any, bias: Any = None, use_pdl: bool = False, *, skip_check: bool = False) -> None:
    """out[m, n] = sum over k of input[m, k] * weight[n, k] + bias[n], in place.

    input [m, k], weight [n, k]: bfloat16, any strides. out: [m, n] bfloat16 (float16 and float32 work too), is written. bias: [n] or None.
    use_pdl: `pdl` of `cugemm.linear`. skip_check: changes nothing. No multiple of anything is asked of m, n or k.
    Errors and numerics: as `cugemm.linear`; TypeError for JAX arrays, which cannot be written. Source: FlashInfer `tinygemm_bf16`.

    >>> cugemm.tinygemm_bf16(x, w, out, bias)
    """
    _in_place(_TINY, input, out, "cugemm.linear(input, weight, bias)")
    options = gemm_options(_TINY, how=(flag("tinygemm_bf16", "use_pdl", use_pdl), False, False), b_axes="nk")
    product(_TINY, input, weight, options, bias=bias, out=out)


def mm_M1_16_K7168_N128(  # noqa: N802 - FlashInfer's name
    mat_a: Any, mat_b: Any, out: Any, launch_with_pdl: bool = True, *, skip_check: bool = False
) -> None:
    """out[m, n] = sum over k of mat_a[m, k] * mat_b[k, n], in place, for 1 to 16 rows, k = 7168 and n = 128.

    mat_a: [num_tokens, hidden_dim] bfloat16. mat_b: [hidden_dim, num_experts] bfloat16, column-major (the transposed view of a router's
    weight). out: [num_tokens, num_experts] bfloat16, is written. launch_with_pdl: `pdl` of `cugemm.linear`. skip_check: changes
    nothing. `mm_bf16` multiplies any shape.

    Raises ValueError for other shapes, dtypes and layouts, all of them named; TypeError for what is no array, and for JAX arrays, which
    cannot be written. Numerics: as `cugemm.linear`. Source: FlashInfer `mm_M1_16_K7168_N128`.

    >>> cugemm.mm_M1_16_K7168_N128(x, w.T, out)
    """
    _route(_K7168_N128, mat_a, mat_b, out, launch_with_pdl)


def mm_M1_16_K7168_N256(  # noqa: N802 - FlashInfer's name
    mat_a: Any, mat_b: Any, out: Any, launch_with_pdl: bool = True, *, skip_check: bool = False
) -> None:
    """`mm_M1_16_K7168_N128` for n = 256, with a float32 out.

    >>> cugemm.mm_M1_16_K7168_N256(x, w.T, out)
    """
    _route(_K7168_N256, mat_a, mat_b, out, launch_with_pdl)


def mm_M1_16_K6144_N256(  # noqa: N802 - FlashInfer's name
    mat_a: Any, mat_b: Any, out: Any, launch_with_pdl: bool = True, *, skip_check: bool = False
) -> None:
    """`mm_M1_16_K7168_N128` for k = 6144 and n = 256, with a float32 out.

    >>> cugemm.mm_M1_16_K6144_N256(x, w.T, out)
    """
    _route(_K6144_N256, mat_a, mat_b, out, launch_with_pdl)


def _route(op: GemmOp, mat_a: Any, mat_b: Any, out: Any, pdl: Any) -> None:
    _in_place(op, mat_a, out, "cugemm.mm_bf16(mat_a, mat_b)")
    product(op, mat_a, mat_b, gemm_options(op, how=(flag(op.name, "launch_with_pdl", pdl), False, False)), out=out)


def _in_place(op: GemmOp, a: Any, out: Any, instead: str) -> None:
    """Refuse a call without an array to write into."""
    if out is None:
        raise op.wrong_type("out is missing; pass the array to write into.")
    if "JAX" in (framework_of(x, f"{op.name}: {role}").name for x, role in ((a, op.roles[A]), (out, "out"))):
        raise op.wrong_type(f"out is written in place, and JAX arrays are immutable; call {instead}, which returns its result.")
