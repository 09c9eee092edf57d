"""Low-latency products of few rows ("TGV")."""

from __future__ import annotations

from typing import Any

from cugemm.api.common import gemm_options, product
from cugemm.problem import FLOATS16
from cugemm.problem import product as register

_TGV = register("tgv_gemm", FLOATS16, FLOATS16)
_TGV_SM100 = register("tgv_gemm_sm100", FLOATS16, FLOATS16)


def tgv_gemm(a: Any, b: Any, bias: Any = None, pdl: bool = False, out: Any = None, *, out_dtype: Any = None, backend: str = "auto") -> Any:
    """out[m, n] = sum over k of a[m, k] * b[k, n] + bias[n], for small m.

    a [m, k], b [k, n]: bfloat16 or float16, any layout (column-major b, the transposed view of a weight [n, k], streams best). bias: [n]
    or None.
    pdl: accepted; the kernels of this version do not overlap launches. out_dtype: default a's dtype. Runs on every supported architecture.
    Errors and numerics: as `cugemm.linear`. Source: FlashInfer `tgv_gemm_sm100`.

    >>> out = cugemm.tgv_gemm(a, w.T, bias)
    """
    return product(_TGV, a, b, gemm_options(_TGV, out_dtype, backend), bias=bias, out=out)


def tgv_gemm_sm100(a: Any, b: Any, bias: Any = None, pdl: bool = False, out: Any = None) -> Any:
    """`tgv_gemm` under FlashInfer's name; not only for sm_100.

    >>> out = cugemm.tgv_gemm_sm100(a, b)
    """
    return product(_TGV_SM100, a, b, gemm_options(_TGV_SM100), bias=bias, out=out)
