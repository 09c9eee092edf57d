"""Dense and batched products: `linear`, `matmul`, and FlashInfer's `mm_*`, `bmm_*` and groupwise entries."""

from __future__ import annotations

from typing import Any

from cugemm.api.common import dtype_of, gemm_options, is_float16, product, same_k, shape_of
from cugemm.api.quantize import cast_e4m3, quantize
from cugemm.arrays import framework_of
from cugemm.formats import FORMATS
from cugemm.problem import FLOATS4, FLOATS8, FLOATS16, GemmOp
from cugemm.problem import product as register
from cugemm.quantized import Quantized

_LINEAR = register(
    "linear",
    (*FLOATS16, *FLOATS8),
    (*FLOATS16, *FLOATS8, *FLOATS4),
    ranks=(2,),
    called={"a": "x", "b": "w", "a_scale": "x.scale", "b_scale": "w.scale"},
)
_MATMUL = register(
    "matmul",
    (*FLOATS16, *FLOATS8, *FLOATS4),
    (*FLOATS16, *FLOATS8, *FLOATS4),
    ranks=(2, 3),
    called={"a_scale": "a.scale", "b_scale": "b.scale"},
)
_MM_BF16 = register("mm_bf16", ("bf16",), ("bf16",))

_BMM_BF16 = register("bmm_bf16", ("bf16",), ("bf16",), ranks=(2, 3), called={"a": "A", "b": "B"})
_MM_FP8 = register("mm_fp8", FLOATS8, FLOATS8)

_BMM_FP8 = register(
    "bmm_fp8", (*FLOATS16, *FLOATS8), FLOATS8, ranks=(2, 3), called={"a": "A", "b": "B", "a_scale": "A_scale", "b_scale": "B_scale"}
)
_GROUPWISE = register("gemm_fp8_nt_groupwise", FLOATS8, FLOATS8)

_BLOCKSCALED = register("gemm_fp8_nt_blockscaled", FLOATS8, FLOATS8)

_BLOCKSCALE_SM90 = register(
    "fp8_blockscale_gemm_sm90",
    ("e4m3",),
    ("e4m3",),
    called={"a": "input", "b": "weight", "a_scale": "input_scale", "b_scale": "weight_scale"},
)
_MM_FP4 = register("mm_fp4", FLOATS16, FLOATS4, called={"a_scale": "a_descale", "b_scale": "b_descale"})

_BF16_BACKENDS = ("cudnn", "cutlass", "tgv", "cublaslt", "tinygemm", "cutile", "cute-dsl")
_FP8_BACKENDS = ("cudnn", "cublas", "cutlass", "cute-dsl")
_GRANULARITIES = tuple((gm, gn, 128) for gm in (1, 128) for gn in (1, 128))
_FP4_BACKENDS = ("cudnn", "trtllm", "cutlass", "cute-dsl", "b12x")


def linear(
    x: Any,
    w: Any,
    bias: Any = None,
    *,
    activations: str | None = None,
    out: Any = None,
    out_dtype: Any = None,
    accumulate: str = "fast",
    backend: str = "auto",
) -> Any:
    """y[.., n] = sum over k of x[.., k] * w[n, k] + bias[n]: the linear layer, `x @ w.T + bias`.

    x: [.., k], bfloat16, float16, float8_e4m3fn or float8_e5m2, or a Quantized; leading axes are rows.
    w: [n, k] in the same dtypes, or a Quantized (fp8 with any scale, fp4 with one scale per row). bias: [n] float or None.
    activations: quantise x to this format first ("fp8_row", "fp8_tensor", "fp8_group", ...), None to use it as it is.
    out: [.., n] to write into. out_dtype: "bfloat16", "float16" or "float32"; default x's dtype if it is a 16-bit float, else bfloat16.
    accumulate: "fast", "promoted" or "fp32", the least accuracy that fp8 sums may have; backend: "auto" or a kernel's name.

    Raises TypeError and ValueError that name the argument; NoKernelError with every kernel's reason if none can do it.
    Numerics: products are exact, sums are fp32 (portable kernel), result = sum * scales + bias in fp32, rounded once to nearest even.

    >>> y = cugemm.linear(x, cugemm.quantize(w, "fp8_row"), activations="fp8_row")
    """
    options = gemm_options(_LINEAR, out_dtype, backend, (), accumulate, b_axes="nk")
    shape = shape_of("linear", "x", x)
    if len(shape) != 2 and type(x) is not Quantized:
        keywords = {"activations": activations, "out_dtype": out_dtype, "accumulate": accumulate, "backend": backend}
        return _linear_of_rows(shape, x, w, bias, out, keywords)
    if activations is not None:
        _check_activations(x, activations)
        same_k(_LINEAR, x, w, -1)
        if options.out_dtype is None and out is None and is_float16(x):
            options = options._replace(out_dtype=dtype_of(x))
        x = quantize(x, activations)
    return product(_LINEAR, x, w, options, bias=bias, out=out)


def _linear_of_rows(shape: tuple[int, ...], x: Any, w: Any, bias: Any, out: Any, keywords: dict[str, Any]) -> Any:
    """`linear` of an x with other than two axes: all but the last are rows."""
    if not shape or not hasattr(x, "reshape"):
        raise ValueError(f"linear: x has shape {shape}; wanted a 2-D array.")
    rows = x.reshape((-1, shape[-1]))
    if out is None:
        y = linear(rows, w, bias, **keywords)
        return y.reshape((*shape[:-1], y.shape[-1]))
    flat = out.reshape((-1, out.shape[-1]))
    framework = framework_of(out, "linear: out")
    # NOTE: a reshape that copies would lose the result, so the addresses are compared.
    if tuple(out.shape[:-1]) != shape[:-1] or framework.view(out, "out").ptr != framework.view(flat, "out").ptr:
        raise ValueError(f"linear: out has shape {tuple(out.shape)}; wanted {(*shape[:-1], w.shape[0])} with collapsible leading axes.")
    linear(rows, w, bias, out=flat, **keywords)
    return out


def _check_activations(x: Any, activations: str) -> None:
    known = [name for name, fmt in FORMATS.items() if fmt.element.name in FLOATS8]
    if activations not in known:
        raise ValueError(f"linear: activations is {activations!r}; wanted one of {', '.join(known)}.")
    if type(x) is Quantized:
        raise TypeError("linear: x is a Quantized already; drop activations.")


def matmul(a: Any, b: Any, *, out: Any = None, out_dtype: Any = None, accumulate: str = "fast", backend: str = "auto") -> Any:
    """c[.., m, n] = sum over k of a[.., m, k] * b[.., k, n].

    a, b: 2-D or 3-D (batch first, 1 broadcasts), row- or column-major or any strides; bfloat16, float16, float8_e4m3fn, float8_e5m2 in
    every pairing, or Quantized whose `k_axis` is the summed axis (a weight quantised as [n, k] enters as `w.T`).
    out, out_dtype, accumulate, backend, errors and numerics: as `linear`.

    >>> c = cugemm.matmul(a, cugemm.quantize(w, "fp8_row").T)
    """
    return product(_MATMUL, a, b, gemm_options(_MATMUL, out_dtype, backend, (), accumulate), out=out)


def mm_bf16(
    a: Any, b: Any, bias: Any = None, pdl: bool = False, out: Any = None, out_dtype: Any = None, backend: str = "auto"
) -> Any:  # fmt: skip
    """out[m, n] = sum over k of a[m, k] * b[k, n] + bias[n].

    a [m, k] and b [k, n] bfloat16, any layout (FlashInfer wants b column-major; both orders run without a copy). bias: [n] or None.
    pdl: accepted; the kernels of this version do not overlap launches. out_dtype: default bfloat16. backend: FlashInfer's names mean
    "auto".
    Errors and numerics: as `linear`. Source: FlashInfer `mm_bf16`.

    >>> out = cugemm.mm_bf16(a, w.T)
    """
    return product(_MM_BF16, a, b, gemm_options(_MM_BF16, out_dtype, backend, _BF16_BACKENDS), bias=bias, out=out)


def bmm_bf16(A: Any, B: Any, out: Any = None, out_dtype: Any = None, backend: str = "auto") -> Any:
    """out[i, m, n] = sum over k of A[i, m, k] * B[i, k, n], bfloat16.

    A [batch, m, k], B [batch, k, n] (either batch may be 1; 2-D operands are one product with a 2-D result), any layout.
    Other arguments, errors and numerics: as `mm_bf16`. Source: FlashInfer `bmm_bf16`.

    >>> out = cugemm.bmm_bf16(A, B)
    """
    return product(_BMM_BF16, A, B, gemm_options(_BMM_BF16, out_dtype, backend, _BF16_BACKENDS), out=out)


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
) -> Any:
    """out[m, n] = alpha * sum over k of (a[m, k] * a_scale) * (b[k, n] * b_scale) + bias[n].

    a [m, k], b [k, n]: float8_e4m3fn or float8_e5m2, any mix and layout, or Quantized. alpha: float or one element; None is 1.
    a_scale: one element, per row [m] or [m, 1], or per block [m, ceil(k/128)] or [ceil(m/128), ceil(k/128)].
    b_scale: one element, per column [n] or [1, n], or per block [ceil(k/128), n] or [ceil(k/128), ceil(n/128)]. Scales multiply.
    accumulate: "fast", "promoted" or "fp32", the least accuracy asked for; the portable kernel always gives "fp32".
    out_dtype: default bfloat16. backend: "trtllm_low_latency" means "auto". Errors and numerics: as `linear`.
    Source: FlashInfer `mm_fp8`, with scales added; its prepared 3-D weights are not read, pass [k, n].

    >>> out = cugemm.mm_fp8(a, w.T, a_scale=sa, b_scale=sb)
    """
    options = gemm_options(_MM_FP8, out_dtype, backend, ("trtllm_low_latency",), accumulate)
    return product(_MM_FP8, a, b, options, a_scale, b_scale, alpha, bias, out)


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
) -> Any:
    """out[i, m, n] = sum over k of (A[i, m, k] * A_scale) * (B[i, k, n] * B_scale).

    A [batch, m, k], B [batch, k, n]: float8_e4m3fn or float8_e5m2, any mix and layout; a batch of 1 broadcasts, 2-D operands give a 2-D
    result.
    Scales: one element, or axes of their operand ([batch, m, 1], [n], [batch, 1, n], blocks of 128; see `mm_fp8`).
    Short form `bmm_fp8(x, w, s)` with a 16-bit x: the one scale is w's, per tensor or per column [n], and x stays 16-bit. A 16-bit w is
    cast to float8_e4m3fn first (saturating at 448, no scale).
    dtype: "bfloat16", "float16" or "float32"; default A's dtype if it is 16-bit, else bfloat16. backend: FlashInfer's names mean "auto".
    TypeError "B_scale is missing" for fp8 A with one scale. Errors and numerics: as `linear`. Source: FlashInfer `bmm_fp8`.

    >>> out = cugemm.bmm_fp8(A, B, A_scale, B_scale, dtype="bfloat16")
    """
    if B_scale is None and type(B) is not Quantized:
        if not is_float16(A):
            raise TypeError("bmm_fp8: B_scale is missing; with fp8 A pass both scales, bmm_fp8(A, B, A_scale, B_scale, dtype).")
        A_scale, B_scale = None, A_scale
    if is_float16(B):
        same_k(_BMM_FP8, A, B, -2)
        B = cast_e4m3(B)
    return product(
        _BMM_FP8, A, B, gemm_options(_BMM_FP8, dtype, backend, _FP8_BACKENDS, accumulate), a_scale=A_scale, b_scale=B_scale, out=out
    )


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
) -> Any:
    """out[m, n] = sum over k-blocks of a_scale * b_scale * (sum over k in the block of a[m, k] * b[n, k]).

    a [m, k], b [n, k]: float8_e4m3fn or float8_e5m2. scale_granularity_mnk (gm, gn, gk): gm and gn 1 or 128, gk 128.
    scale_major_mode "K": a_scale [ceil(m/gm), ceil(k/gk)], b_scale [ceil(n/gn), ceil(k/gk)]; "MN": both with their axes swapped.
    backend "trtllm" reads a_scale as [ceil(k/gk), m] and b_scale as [ceil(n/gn), ceil(k/gk)] whatever the mode, as FlashInfer's does.
    mma_sm: accepted, a tile hint of Blackwell. out_dtype: default bfloat16. No multiple of anything is asked of m, n or k.
    Numerics: fp32 scales applied to fp32 partial sums. Errors: as `linear`. Source: FlashInfer `gemm_fp8_nt_groupwise`.

    >>> out = cugemm.gemm_fp8_nt_groupwise(a, b, a_scale, b_scale, "K")
    """
    return _groupwise(_GROUPWISE, a, b, a_scale, b_scale, scale_major_mode, scale_granularity_mnk, out, out_dtype, backend)


def gemm_fp8_nt_blockscaled(
    a: Any, b: Any, a_scale: Any, b_scale: Any, scale_major_mode: str = "MN", mma_sm: int = 1, out: Any = None, out_dtype: Any = None
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
    if not isinstance(granularity, (tuple, list)) or tuple(granularity) not in _GRANULARITIES:
        raise ValueError(f"{op.name}: scale_granularity_mnk is {granularity}; wanted (1 or 128, 1 or 128, 128).")
    if backend == "trtllm" and mode not in (None, "MN"):
        raise ValueError(
            f"{op.name}: scale_major_mode is {mode!r}, but backend 'trtllm' has a layout of its own; pass None, or another backend."
        )
    if backend == "trtllm":
        a_axes, b_axes = "km", "nk"
    elif mode in ("K", "MN"):
        a_axes, b_axes = ("mk", "nk") if mode == "K" else ("km", "kn")
    else:
        raise ValueError(
            f"{op.name}: scale_major_mode is {mode!r}; wanted 'K' for scales [rows, k/128] or 'MN' for [k/128, rows], "
            "because square scales fit both."
        )
    for role, x, scale in ((0, a, a_scale), (1, b, b_scale)):
        if scale is None and type(x) is not Quantized:
            raise op.wrong_type(f"{op.roles[role + 2]} is missing; pass one float32 scale per block of {op.roles[role]}.")
    gm, gn, gk = granularity
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
            f"{name}: input is {_dtype(input)} and weight is {_dtype(weight)}; "
            "quantise the weight too (cugemm.quantize(weight, 'fp8_block'))."
        )
    operands = []
    for role, x, scale, fmt in (("input", input, input_scale, "fp8_group"), ("weight", weight, weight_scale, "fp8_block")):
        if is_float16(x):
            if scale is not None:
                raise ValueError(f"{name}: {role} is {_dtype(x)} and is quantised here, so {role}_scale must be None.")
        elif scale is None and type(x) is not Quantized:
            raise ValueError(f"{name}: {role} is {_dtype(x)}, so {role}_scale is needed: float32, one scale per 128 values along k.")
        operands.append(quantize(x, fmt) if is_float16(x) else x)
    options = gemm_options(_BLOCKSCALE_SM90, out_dtype, accumulate="promoted", b_axes="nk")
    return product(_BLOCKSCALE_SM90, operands[0], operands[1], options, a_scale=input_scale, b_scale=weight_scale, out=out)


def _dtype(x: Any) -> str:
    return type(x).__name__ if type(x) is Quantized or not hasattr(x, "dtype") else str(x.dtype).removeprefix("torch.")


def mm_fp4(
    a: Any,
    b: Any,
    a_descale: Any = None,
    b_descale: Any = None,
    alpha: Any = None,
    out_dtype: Any = None,
    out: Any = None,
    block_size: int = 16,
    use_8x4_sf_layout: bool = False,
    backend: str = "auto",
    use_nvfp4: bool = True,
    enable_pdl: bool = True,
) -> Any:
    """out[m, n] = alpha * b_scale[n] * sum over k of a[m, k] * e2m1(b[k, n]): 16-bit activations times fp4 weights.

    a [m, k] bfloat16 or float16. b uint8: [k, n], one code in the low nibble of each byte (the high nibble is ignored), or [k/2, n], two
    codes a byte, low nibble = even k (usually the transposed view of [n, k/2]).
    Scale: `mm_fp4(a, b, s)` or b_descale=s, one element or per column [n] or [1, n], any float dtype; it multiplies.
    alpha: float or one element. out_dtype: default a's dtype. The FlashInfer arguments behind it describe 4-bit activations, which this
    version does not multiply (TypeError).
    Errors and numerics: as `linear`; e2m1 values are exact in 16 bits. Source: FlashInfer `mm_fp4`, OCP MX e2m1.

    >>> out = cugemm.mm_fp4(x, w_codes, scale)
    """
    if use_8x4_sf_layout:
        raise ValueError("mm_fp4: use_8x4_sf_layout is True, but 16-bit activations have no block scales; drop it.")
    if type(b) is Quantized:
        if a_descale is not None or b_descale is not None:
            raise TypeError("mm_fp4: b is a Quantized, which has its own scale; drop a_descale and b_descale.")
        return product(_MM_FP4, a, b, gemm_options(_MM_FP4, out_dtype, backend, _FP4_BACKENDS), alpha=alpha, out=out)
    if not is_float16(a):
        raise TypeError(
            f"mm_fp4: a is {getattr(a, 'dtype', type(a).__name__)}; this version multiplies bfloat16 or float16 activations "
            "by fp4 weights: pass a unquantised, and the scale of b as the third argument."
        )
    if a_descale is not None and b_descale is not None:
        raise TypeError(f"mm_fp4: a is {a.dtype}, which takes no a_descale; pass mm_fp4(a, b, scale_of_b).")
    b_scale = b_descale if a_descale is None else a_descale
    shape_a, shape_b = shape_of("mm_fp4", "a", a), shape_of("mm_fp4", "b", b)
    packed = len(shape_b) >= 2 and len(shape_a) >= 1 and 2 * shape_b[-2] == shape_a[-1]
    options = gemm_options(_MM_FP4, out_dtype, backend, _FP4_BACKENDS, b_element="e2m1x2" if packed else "e2m1")
    return product(_MM_FP4, a, b, options, b_scale=b_scale, alpha=alpha, out=out)
