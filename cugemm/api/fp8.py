"""fp8 products under FlashInfer's names: one scale, scales per row and column, per group of k, per block."""

from __future__ import annotations

import functools
from typing import Any

from cugemm.api.common import GRANULARITIES, choice, dtype_of, gemm_options, is_float16, product, same_k, shape_of
from cugemm.api.quantize import cast_e4m3, quantize
from cugemm.api.rehearsal import alike, rehearse
from cugemm.arrays import Spec
from cugemm.formats import E4M3, E5M2
from cugemm.problem import FLOATS8, FLOATS16, GemmOp, GemmOptions
from cugemm.problem import product as register
from cugemm.quantized import Quantized

_MM_FP8 = register("mm_fp8", FLOATS8, FLOATS8)
_BMM_FP8 = register(
    "bmm_fp8",
    (*FLOATS16, *FLOATS8),
    FLOATS8,
    ranks=(2, 3),
    called={"a": "A", "b": "B", "a_scale": "A_scale", "b_scale": "B_scale", "out_dtype": "dtype"},
)
_GROUPWISE = register("gemm_fp8_nt_groupwise", FLOATS8, FLOATS8)
_BLOCKSCALED = register("gemm_fp8_nt_blockscaled", FLOATS8, FLOATS8)
_BLOCKSCALE_SM90 = register(
    "fp8_blockscale_gemm_sm90",
    ("e4m3",),
    ("e4m3",),
    called={"a": "input", "b": "weight", "a_scale": "input_scale", "b_scale": "weight_scale"},
)

_FP8_BACKENDS = ("cudnn", "cublas", "cutlass", "cute-dsl")
_MODES = "'K' for scales [rows, k/128] or 'MN' for [k/128, rows], because square scales fit both"


def mm_fp8(
    a: Any,
    b: Any,
    alpha: Any = None,
    out_dtype: Any = None,
    out: Any = None,
    backend: str = "auto",
    *,
    a_scale: Any = None,
    b_scale: Any = None,
    bias: Any = None,
    accumulate: str = "fast",
    pdl: bool = False,
    static_weights: bool = False,
    batch_invariant: bool = False,
) -> Any:
    """out[m, n] = alpha * sum over k of (a[m, k] * a_scale) * (b[k, n] * b_scale) + bias[n].

    a [m, k], b [k, n]: float8_e4m3fn or float8_e5m2, any mix and layout, or Quantized; or b [k/128, n, 128], what
    `prepare_low_latency_gemm_weights` makes of w [n, k]. alpha: float or one element; None is 1.
    a_scale: one element, per row [m] or [m, 1], or per block [m, ceil(k/128)] or [ceil(m/128), ceil(k/128)].
    b_scale: one element, per column [n] or [1, n], or per block [ceil(k/128), n] or [ceil(k/128), ceil(n/128)]. Scales multiply.
    accumulate: "fast", "promoted" or "fp32", the least accuracy asked for; all kernels but hopper give "fp32".
    out_dtype: default bfloat16. backend: "trtllm_low_latency" means "auto": the shape of b says which layout it has.
    pdl, static_weights, batch_invariant: as `linear`.
    Errors and numerics: as `linear`. Source: FlashInfer `mm_fp8`, with scales and plain weights added.

    >>> out = cugemm.mm_fp8(a, w.T, a_scale=sa, b_scale=sb)
    """
    rank = getattr(b, "ndim", None)  # costs less than the shape
    panels = type(b) is not Quantized and (len(shape_of("mm_fp8", "b", b)) if rank is None else rank) == 3
    layout: dict[str, Any] = {"b_axes": "pnk", "b_scale_axes": "kn"} if panels else {}
    how = (pdl, static_weights, batch_invariant)
    options = gemm_options(_MM_FP8, out_dtype, backend, ("trtllm_low_latency",), accumulate, how, **layout)
    return product(_MM_FP8, a, b, options, a_scale=a_scale, b_scale=b_scale, alpha=alpha, bias=bias, out=out)


def prepare_low_latency_gemm_weights(w: Any, permutation_indices_cache: Any = None) -> Any:
    """prepared[p, n, j] = w[n, 128 * p + j]: a weight as `mm_fp8` reads it in panels of 128 k.

    w: [n, k], float8_e4m3fn or float8_e5m2, k a multiple of 128. Returns [k/128, n, 128], a view of w where its framework makes views (JAX
    copies); a contiguous copy of it serves as well. This layout is frozen, and is not that of FlashInfer's function of this name, which
    also shuffles rows for its kernels: prepare weights with the library that multiplies them.
    permutation_indices_cache: accepted; there is nothing to cache.

    Raises TypeError and ValueError that name w. Source: FlashInfer `prepare_low_latency_gemm_weights`.

    >>> out = cugemm.mm_fp8(a, cugemm.prepare_low_latency_gemm_weights(w), alpha)
    """
    name = "prepare_low_latency_gemm_weights"
    shape = shape_of(name, "w", w)
    if type(w) is Quantized or dtype_of(w) not in (E4M3.dtype, E5M2.dtype):
        raise TypeError(f"{name}: w is {_shown(w)}; wanted an array of float8_e4m3fn or float8_e5m2 (of a Quantized, its data).")
    if len(shape) != 2 or shape[1] % 128:
        raise ValueError(f"{name}: w has shape {shape}; wanted [n, k] with k a multiple of 128; pad k with zeros, in a too.")
    n, k = shape
    if isinstance(w, Spec):
        return Spec((k // 128, n, 128), w.dtype, strides=(128 * w.strides[1], *w.strides), device=w.device)
    if not hasattr(w, "reshape"):
        raise TypeError(f"{name}: w is a {type(w).__name__}, which cannot be reshaped; pass a torch, CuPy, JAX or NumPy array.")
    return w.reshape((n, k // 128, 128)).swapaxes(0, 1)


def bmm_fp8(
    A: Any,
    B: Any,
    A_scale: Any = None,
    B_scale: Any = None,
    dtype: Any = None,
    out: Any = None,
    backend: str = "auto",
    *,
    accumulate: str = "fast",
    skip_check: bool = False,
) -> Any:
    """out[i, m, n] = sum over k of (A[i, m, k] * A_scale) * (B[i, k, n] * B_scale).

    A [batch, m, k], B [batch, k, n]: float8_e4m3fn or float8_e5m2, any mix and layout; a batch of 1 broadcasts, 2-D operands give a 2-D
    result.
    Scales: one element, or axes of their operand ([batch, m, 1], [n], [batch, 1, n], blocks of 128; see `mm_fp8`).
    Short form `bmm_fp8(x, w, s)` with a 16-bit x: the one scale is w's, per tensor or per column [n], and x stays 16-bit. A 16-bit w is
    cast to float8_e4m3fn first (saturating at 448, no scale).
    dtype: "bfloat16", "float16" or "float32"; default A's dtype if it is 16-bit, else bfloat16. backend: FlashInfer's names mean "auto".
    skip_check: changes nothing.
    TypeError "B_scale is missing" for fp8 A with one scale. Errors and numerics: as `linear`. Source: FlashInfer `bmm_fp8`.

    >>> out = cugemm.bmm_fp8(A, B, A_scale, B_scale, dtype="bfloat16")
    """
    if B_scale is None and type(B) is not Quantized:
        if not is_float16(A):
            raise TypeError("bmm_fp8: B_scale is missing; with fp8 A pass both scales, bmm_fp8(A, B, A_scale, B_scale, dtype).")
        A_scale, B_scale = None, A_scale
    options = gemm_options(_BMM_FP8, dtype, backend, _FP8_BACKENDS, accumulate)
    if is_float16(B):
        same_k(_BMM_FP8, A, B, -2)
        arrays, body = (A, B, A_scale, B_scale, out), functools.partial(_cast_first, options)
        rehearse("bmm_fp8", options, body, *arrays)
        return body(*arrays)
    return product(_BMM_FP8, A, B, options, a_scale=A_scale, b_scale=B_scale, out=out)


def _cast_first(options: GemmOptions, A: Any, B: Any, A_scale: Any, B_scale: Any, out: Any) -> Any:
    B = cast_e4m3(B)
    A, A_scale, B_scale, out = alike(B, A, A_scale, B_scale, out)
    return product(_BMM_FP8, A, B, options, a_scale=A_scale, b_scale=B_scale, out=out)


def gemm_fp8_nt_groupwise(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    scale_major_mode: str | None = None,
    mma_sm: int = 1,
    scale_granularity_mnk: tuple[int, int, int] = (1, 128, 128),
    out: Any = None,
    out_dtype: Any = None,
    backend: str = "auto",
    *,
    skip_check: bool = False,
) -> Any:
    """out[m, n] = sum over k-blocks of a_scale * b_scale * (sum over k in the block of a[m, k] * b[n, k]).

    a [m, k], b [n, k]: float8_e4m3fn or float8_e5m2. scale_granularity_mnk (gm, gn, gk): gm and gn 1 or 128, gk 128.
    scale_major_mode "K": a_scale [ceil(m/gm), ceil(k/gk)], b_scale [ceil(n/gn), ceil(k/gk)]; "MN": both with their axes swapped.
    backend "trtllm" reads a_scale as [ceil(k/gk), m] and b_scale as [ceil(n/gn), ceil(k/gk)] whatever the mode, as FlashInfer's does.
    mma_sm: accepted, a tile hint of Blackwell. skip_check: changes nothing. out_dtype: default bfloat16. No multiple of anything is asked
    of m, n or k.
    Numerics: fp32 scales applied to fp32 partial sums. Errors: as `linear`. Source: FlashInfer `gemm_fp8_nt_groupwise`.

    >>> out = cugemm.gemm_fp8_nt_groupwise(a, b, a_scale, b_scale, "K")
    """
    return _groupwise(_GROUPWISE, a, b, a_scale, b_scale, scale_major_mode, scale_granularity_mnk, out, out_dtype, backend)


def gemm_fp8_nt_blockscaled(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    scale_major_mode: str | None = "MN",
    mma_sm: int = 1,
    out: Any = None,
    out_dtype: Any = None,
    *,
    skip_check: bool = False,
) -> Any:
    """`gemm_fp8_nt_groupwise` with granularity (128, 128, 128): one scale per 128 x 128 block of both operands.

    >>> out = cugemm.gemm_fp8_nt_blockscaled(a, b, a_scale, b_scale, "K")
    """
    return _groupwise(_BLOCKSCALED, a, b, a_scale, b_scale, scale_major_mode, (128, 128, 128), out, out_dtype, "auto")


def _groupwise(
    op: GemmOp,
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    mode: str | None,
    granularity: tuple[int, ...],
    out: Any,
    out_dtype: Any,
    backend: str,
) -> Any:
    gm, gn, gk = choice(op.name, "scale_granularity_mnk", granularity, GRANULARITIES, "(1 or 128, 1 or 128, 128)")
    trtllm = isinstance(backend, str) and backend == "trtllm"
    mode = choice(op.name, "scale_major_mode", mode, (None, "K", "MN"), _MODES)
    if trtllm and mode not in (None, "MN"):
        raise ValueError(
            f"{op.name}: scale_major_mode is {mode!r}, but backend 'trtllm' has a layout of its own; pass None, or another backend."
        )
    if trtllm:
        a_axes, b_axes = "km", "nk"
    elif mode in ("K", "MN"):
        a_axes, b_axes = ("mk", "nk") if mode == "K" else ("km", "kn")
    else:
        raise ValueError(f"{op.name}: scale_major_mode is None; wanted {_MODES}.")
    for role, x, scale in ((0, a, a_scale), (1, b, b_scale)):
        if scale is None and type(x) is not Quantized:
            raise op.wrong_type(f"{op.roles[role + 2]} is missing; pass one float32 scale per block of {op.roles[role]}.")
    options = gemm_options(
        op, out_dtype, backend, ("cutlass", "trtllm", "cutile"), "promoted",
        b_axes="nk", a_scale_axes=a_axes, b_scale_axes=b_axes, a_block=(gm, gk), b_block=(gn, gk),
    )  # fmt: skip
    return product(op, a, b, options, a_scale=a_scale, b_scale=b_scale, out=out)


def fp8_blockscale_gemm_sm90(
    input: Any, weight: Any, input_scale: Any = None, weight_scale: Any = None, out: Any = None, out_dtype: Any = None
) -> Any:
    """out[m, n] = sum over k-blocks of input_scale * weight_scale * (sum over the block of input[m, k] * weight[n, k]).

    input [m, k], weight [n, k]: bfloat16 or float8_e4m3fn. A bfloat16 operand is quantised first (input per 1 x 128, weight per 128 x
    128, scale amax/448) and takes no scale; a float8 one needs its scale. float8 input with a bfloat16 weight is refused, as FlashInfer
    does.
    input_scale: [m, ceil(k/128)] float32. weight_scale: [n, ceil(k/128)] or [ceil(n/128), ceil(k/128)] float32; both are applied as they
    are.
    out_dtype: default bfloat16. Runs on every supported architecture, for any m, n, k. Errors and numerics: as `gemm_fp8_nt_groupwise`.
    Source: FlashInfer `fp8_blockscale_gemm_sm90`.

    >>> out = cugemm.fp8_blockscale_gemm_sm90(x, w)
    """
    name = _BLOCKSCALE_SM90.name
    same_k(_BLOCKSCALE_SM90, input, weight, -1)
    if is_float16(weight) and not is_float16(input):
        raise ValueError(
            f"{name}: input is {_shown(input)} and weight is {_shown(weight)}; "
            "quantise the weight too (cugemm.quantize(weight, 'fp8_block'))."
        )
    for role, x, scale in (("input", input, input_scale), ("weight", weight, weight_scale)):
        if is_float16(x):
            if scale is not None:
                raise ValueError(f"{name}: {role} is {_shown(x)} and is quantised here, so {role}_scale must be None.")
        elif scale is None and type(x) is not Quantized:
            raise ValueError(f"{name}: {role} is {_shown(x)}, so {role}_scale is needed: float32, one scale per 128 values along k.")
    options = gemm_options(_BLOCKSCALE_SM90, out_dtype, accumulate="promoted", b_axes="nk")
    arrays = (input, weight, input_scale, weight_scale, out)
    body = functools.partial(_blockscale, options)
    if is_float16(input):
        rehearse(name, options, body, *arrays)
    return body(*arrays)


def _blockscale(options: GemmOptions, input: Any, weight: Any, input_scale: Any, weight_scale: Any, out: Any) -> Any:
    if is_float16(input):
        input = quantize(input, "fp8_group")
    if is_float16(weight):
        weight = quantize(weight, "fp8_block")
    input, weight, input_scale, weight_scale, out = alike(input, input, weight, input_scale, weight_scale, out)
    return product(_BLOCKSCALE_SM90, input, weight, options, a_scale=input_scale, b_scale=weight_scale, out=out)


def _shown(x: Any) -> str:
    """What an operand is called in a message."""
    return dtype_of(x) or type(x).__name__
