"""SVDQuant: an nvfp4 product plus a low-rank 16-bit correction, under FlashInfer's names."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from cugemm.api.block_quantize import nvfp4_quantize_smooth
from cugemm.api.common import gemm_options, product, shape_of
from cugemm.api.rehearsal import alike, rehearse
from cugemm.formats import BF16, E2M1X2, E4M3, FP32
from cugemm.problem import FLOATS16, B, GemmOp, GemmOptions
from cugemm.problem import product as register


class _Ops(NamedTuple):
    """The products of one entry."""

    low_rank: GemmOp
    residual: GemmOp


def _ops(name: str, b: str, b_sf: str, l1: str) -> _Ops:
    called = {"b": b, "a_scale": "a_sf", "b_scale": b_sf, "bias": f"d @ {l1}.T"}
    return _Ops(
        register(f"{name}(d, {l1})", FLOATS16, FLOATS16, called={"a": "d", "b": l1}),
        register(name, (E2M1X2.name,), (E2M1X2.name,), called=called, bias_2d=True),
    )


_MM = _ops("mm_nvfp4_svdquant", "b", "b_sf", "l1")
_LINEAR = _ops("svdquant_linear", "weight_fp4", "weight_sf", "l1_scaled")
_DOWN = register("svdquant_linear(x, l2t_smoothed)", (BF16.name,), (BF16.name,), called={"a": "x", "b": "l2t_smoothed"})


def mm_nvfp4_svdquant(
    a: Any,
    b: Any,
    a_sf: Any,
    b_sf: Any,
    alpha: Any,
    d: Any,
    l1: Any,
    bias: Any = None,
    out: Any = None,
    backend: str = "auto",
    enable_pdl: bool | None = None,
    *,
    skip_check: bool = False,
) -> Any:
    """out[m, n] = alpha * (sum over k of a[m, k] * b[n, k] + sum over r of d[m, r] * l1[n, r]) + bias[n].

    a [m, k/2], b [n, k/2]: uint8, two e2m1 codes a byte, low nibble = even k; a_sf, b_sf: their e4m3 scales in 128x4 tiles, 1-D or [padded
    rows, padded k/16]. alpha: float or one element. d [m, r], l1 [n, r]: bfloat16 or float16, any r; l1 already divided by alpha, as
    FlashInfer asks. bias: [n] or None.
    out: [m, n], default a fresh bfloat16 array. backend: "cutlass" means "auto". enable_pdl: accepted, not
    needed. skip_check: changes nothing.

    Raises TypeError and ValueError that name the argument, before anything is launched.
    Numerics: two products; the low-rank one comes first and passes through float32 [m, n]. Values are exact, sums fp32.
    Source: FlashInfer `mm_nvfp4_svdquant`; Li et al., "SVDQuant", arXiv:2411.05007.

    >>> out = cugemm.mm_nvfp4_svdquant(xq, wq, x_sf, w_sf, alpha, x @ l2t, l1 / alpha)
    """
    options = _options(_MM, backend)
    arrays = (a, b, a_sf, b_sf, alpha, d, l1, bias, out)
    multiply = functools.partial(_multiply, _MM, options)
    rehearse("mm_nvfp4_svdquant", options, multiply, *arrays)
    return multiply(*arrays)


def svdquant_linear(
    x: Any,
    weight_fp4: Any,
    weight_sf: Any,
    alpha: Any,
    pre_quant_scale: Any,
    l2t_smoothed: Any,
    l1_scaled: Any,
    global_scale: Any,
    bias: Any = None,
    enable_pdl: bool | None = None,
) -> Any:
    """y[m, n] = alpha * (q(x)[m, k] . weight_fp4[n, k] + (x . l2t_smoothed)[m, r] . l1_scaled[n, r]) + bias[n], summed over k and r.

    q(x) = `nvfp4_quantize_smooth(x, pre_quant_scale, global_scale)`. x: [m, k] bfloat16. weight_fp4 [n, k/2], weight_sf, alpha, bias: as
    in `mm_nvfp4_svdquant`. pre_quant_scale: [k]. l2t_smoothed: [k, r] bfloat16, pre_quant_scale[:, None] * L2.T. l1_scaled: [n, r],
    L1 / alpha. global_scale: 448 * 6 / amax of x * pre_quant_scale. enable_pdl: accepted, not needed. Returns bfloat16.

    Raises TypeError and ValueError that name the argument, before anything is launched.
    Numerics: as its parts; x . l2t_smoothed is rounded to bfloat16. Source: FlashInfer `svdquant_linear`.

    >>> y = cugemm.svdquant_linear(x, w_fp4, w_sf, alpha, smooth, l2t, l1 / alpha, global_scale, bias)
    """
    arrays = (x, weight_fp4, weight_sf, alpha, pre_quant_scale, l2t_smoothed, l1_scaled, global_scale, bias)
    rehearse("svdquant_linear", None, _linear, *arrays)
    return _linear(*arrays)


def _linear(
    x: Any,
    weight_fp4: Any,
    weight_sf: Any,
    alpha: Any,
    pre_quant_scale: Any,
    l2t_smoothed: Any,
    l1_scaled: Any,
    global_scale: Any,
    bias: Any,
) -> Any:
    d = product(_DOWN, x, l2t_smoothed, gemm_options(_DOWN, BF16.dtype))
    a, a_sf = nvfp4_quantize_smooth(x, pre_quant_scale, global_scale)
    b, b_sf, alpha, l1, bias = alike(d, weight_fp4, weight_sf, alpha, l1_scaled, bias)
    return _multiply(_LINEAR, _options(_LINEAR, "auto"), a, b, a_sf, b_sf, alpha, d, l1, bias, None)


def _options(ops: _Ops, backend: str) -> tuple[GemmOptions, GemmOptions]:
    """Options of the low-rank product and of the residual one."""
    fixed: dict[str, Any] = {}
    for side in ("a", "b"):
        fixed |= {f"{side}_element": E2M1X2.name, f"{side}_scale_element": E4M3.name, f"{side}_scale_layout": "128x4"}
    backends = ("cutlass",)
    return (
        gemm_options(ops.low_rank, FP32.dtype, backend, backends, b_axes="nk"),
        gemm_options(ops.residual, None, backend, backends, b_axes="nk", **fixed),
    )


def _multiply(
    ops: _Ops, options: tuple[GemmOptions, GemmOptions],
    a: Any, b: Any, a_sf: Any, b_sf: Any, alpha: Any, d: Any, l1: Any, bias: Any, out: Any,
) -> Any:  # fmt: skip
    low_rank, residual = ops
    name = residual.name
    for (left, x), (right, y) in ((("d", d), ("a", a)), ((low_rank.roles[B], l1), (residual.roles[B], b))):
        shapes = shape_of(name, left, x), shape_of(name, right, y)
        if shapes[0][:1] != shapes[1][:1]:
            raise residual.error(f"{left} has shape {shapes[0]}, but {right} has shape {shapes[1]}; they must have as many rows.")
    correction = product(low_rank, d, l1, options[0], alpha=alpha, bias=bias)
    a, b, a_sf, b_sf, alpha, out = alike(correction, a, b, a_sf, b_sf, alpha, out)
    return product(residual, a, b, options[1], a_scale=a_sf, b_scale=b_sf, alpha=alpha, bias=correction, out=out)
