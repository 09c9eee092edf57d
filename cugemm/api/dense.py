"""Dense and batched products of any pair of formats: `linear`, `matmul`, and FlashInfer's `mm_bf16` and `bmm_bf16`."""

from __future__ import annotations

import functools
import math
from typing import Any

from cugemm.api.common import dtype_of, gemm_options, is_float16, product, same_k, shape_of
from cugemm.api.quantize import quantize
from cugemm.api.rehearsal import alike, check_out, rehearse, reshaped, spec_of
from cugemm.arrays import SPEC, framework_of
from cugemm.formats import FORMATS, INT4X2, INT8, UINT4X2
from cugemm.problem import FLOATS4, FLOATS8, FLOATS16, GemmOptions
from cugemm.problem import product as register
from cugemm.quantized import Quantized

_LEFT = (*FLOATS16, *FLOATS8, *FLOATS4, INT8.name, INT4X2.name)
_RIGHT = (*_LEFT, UINT4X2.name)

_LINEAR = register(
    "linear",
    _LEFT,
    _RIGHT,
    called={
        "a": "x", "b": "w", "a_scale": "x.scale", "b_scale": "w.scale", "a_tensor_scale": "x.tensor_scale",
        "b_tensor_scale": "w.tensor_scale", "zero": "w.zero",
    },
)  # fmt: skip
_MATMUL = register(
    "matmul",
    _LEFT,
    _RIGHT,
    ranks=(2, 3),
    called={
        "a_scale": "a.scale", "b_scale": "b.scale", "a_tensor_scale": "a.tensor_scale", "b_tensor_scale": "b.tensor_scale", "zero": "b.zero"
    },
)  # fmt: skip
_MM_BF16 = register("mm_bf16", ("bf16",), ("bf16",))
_BMM_BF16 = register("bmm_bf16", ("bf16",), ("bf16",), ranks=(2, 3), called={"a": "A", "b": "B"})

_BF16_BACKENDS = ("cudnn", "cutlass", "tgv", "cublaslt", "tinygemm", "cutile", "cute-dsl")


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
    pdl: bool = False,
    static_weights: bool = False,
    batch_invariant: bool = False,
) -> Any:
    """y[.., n] = sum over k of x[.., k] * w[n, k] + bias[n]: the linear layer, `x @ w.T + bias`.

    x: [.., k], bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8, or a Quantized of any format without zero points; leading axes are
    rows. w: [n, k] in the same dtypes, or a Quantized of any format. bias: [n] float or None.
    activations: quantise x to this format first ("fp8_row", "mxfp8", "nvfp4", "int8_row", ...: all that `quantize` makes without zero
    points), None to use it as it is.
    out: [.., n] to write into. out_dtype: "bfloat16", "float16" or "float32"; default x's dtype if it is a 16-bit float, else bfloat16.
    accumulate: "fast", "promoted" or "fp32", the least accuracy that fp8 sums may have; backend: "auto" or a kernel's name.
    pdl: begin before the kernel ahead of it in the stream has ended (programmatic dependent launch, sm_90 and up), wait for it, and let the
    next one begin early, where the kernel can (skinny, swap_ab, hopper); what it gives back is the same. static_weights: you promise that
    no kernel in flight writes w; with pdl it is then loaded ahead of that wait, otherwise only prefetched to L2. batch_invariant: the bits
    of a row depend on this row and w alone, not on how many others there are or where it sits (formats of `activations` whose scales span
    rows still tie rows together).

    Raises TypeError and ValueError that name the argument; NoKernelError with every kernel's reason if none can do it.
    Numerics: products are exact, sums are fp32, result = sum * scales + bias in fp32, rounded once to nearest even.

    >>> y = cugemm.linear(x, cugemm.quantize(w, "nvfp4"), activations="fp8_row")
    """
    how = (pdl, static_weights, batch_invariant)
    options = gemm_options(_LINEAR, out_dtype, backend, (), accumulate, how, b_axes="nk")
    shape = shape_of("linear", "x", x)
    if len(shape) != 2 and type(x) is not Quantized:
        keywords = {
            "activations": activations, "out_dtype": out_dtype, "accumulate": accumulate, "backend": backend,
            "pdl": pdl, "static_weights": static_weights, "batch_invariant": batch_invariant,
        }  # fmt: skip
        return _linear_of_rows(shape, x, w, bias, out, keywords)
    if activations is not None:
        check_activations("linear", activations)
        if type(x) is Quantized:
            raise TypeError("linear: x is a Quantized already; drop activations.")
        same_k(_LINEAR, x, w, -1)
        if options.out_dtype is None and out is None and is_float16(x):
            options = options._replace(out_dtype=dtype_of(x))
        body = functools.partial(_quantised_linear, options, activations)
        rehearse("linear", (options, activations), body, x, w, bias, out)
        return body(x, w, bias, out)
    return product(_LINEAR, x, w, options, bias=bias, out=out)


def _quantised_linear(options: GemmOptions, activations: str, x: Any, w: Any, bias: Any, out: Any) -> Any:
    x = quantize(x, activations)
    w, bias, out = alike(x, w, bias, out)
    return product(_LINEAR, x, w, options, bias=bias, out=out)


def _linear_of_rows(shape: tuple[int, ...], x: Any, w: Any, bias: Any, out: Any, keywords: dict[str, Any]) -> Any:
    """`linear` of an x with other than two axes: all but the last are rows."""
    if not shape:
        raise _LINEAR.error("x has shape (); wanted [.., k].")
    n = shape_of("linear", "w", w)[:1]
    check_out("linear", {"x": x, "w": w, "bias": bias, "out": out})  # a reshape of x may copy
    rows = _as_matrix("x", x, (math.prod(shape[:-1]), shape[-1]))
    if out is None:
        y = linear(rows, w, bias, **keywords)
        return reshaped(y, (*shape[:-1], y.shape[-1]))
    found, wanted = shape_of("linear", "out", out), (*shape[:-1], *n)
    if found != wanted:
        raise _LINEAR.error(f"out has shape {found}; wanted {wanted} with collapsible leading axes.")
    flat = _as_matrix("out", out, (math.prod(found[:-1]), found[-1]))
    framework = framework_of(out, "linear: out")
    # NOTE: a reshape that copies would lose the result, so the addresses are compared.
    if not framework.abstract(out) and framework.view(out, "out").ptr != framework.view(flat, "out").ptr:
        strides = framework.view(out, "out").strides
        raise _LINEAR.error(f"out has shape {found} and strides {strides}; wanted {wanted} with collapsible leading axes.")
    linear(rows, w, bias, out=flat, **keywords)
    return out


def _as_matrix(role: str, x: Any, shape: tuple[int, int]) -> Any:
    """x reshaped; a stand-in becomes a Spec."""
    if framework_of(x, f"linear: {role}") is SPEC:
        x = spec_of(x)
    elif not hasattr(x, "reshape"):
        raise _LINEAR.wrong_type(f"{role} is a {type(x).__name__}, which has no reshape; pass it as {list(shape)}.")
    return reshaped(x, shape)


def check_activations(name: str, activations: Any) -> None:
    """ValueError for what is no format of activations; those with zero points are formats of weights."""
    known = [fmt for fmt in FORMATS if not FORMATS[fmt].zero]
    if not isinstance(activations, str) or activations not in known:
        why = ", whose zero points only weights can have" if isinstance(activations, str) and activations in FORMATS else ""
        raise ValueError(f"{name}: activations is {activations!r}{why}; wanted one of {', '.join(known)}.")


def matmul(
    a: Any,
    b: Any,
    *,
    out: Any = None,
    out_dtype: Any = None,
    accumulate: str = "fast",
    backend: str = "auto",
    pdl: bool = False,
    static_weights: bool = False,
    batch_invariant: bool = False,
) -> Any:
    """c[.., m, n] = sum over k of a[.., m, k] * b[.., k, n].

    a, b: 2-D or 3-D (batch first, 1 broadcasts), row- or column-major or any strides; bfloat16, float16, float8_e4m3fn, float8_e5m2 and
    int8 in every pairing, or Quantized whose `k_axis` is the summed axis (a weight quantised as [n, k] enters as `w.T`); zero points go
    with b only.
    Other arguments, errors and numerics: as `linear`; b is the weight.

    >>> c = cugemm.matmul(a, cugemm.quantize(w, "fp8_row").T)
    """
    return product(
        _MATMUL, a, b, gemm_options(_MATMUL, out_dtype, backend, (), accumulate, (pdl, static_weights, batch_invariant)), out=out
    )


def mm_bf16(
    a: Any,
    b: Any,
    bias: Any = None,
    pdl: bool = False,
    out: Any = None,
    out_dtype: Any = None,
    backend: str = "auto",
    *,
    static_weights: bool = False,
    batch_invariant: bool = False,
    skip_check: bool = False,
) -> Any:
    """out[m, n] = sum over k of a[m, k] * b[k, n] + bias[n].

    a [m, k] and b [k, n] bfloat16, any layout (FlashInfer wants b column-major; both orders run without a copy). bias: [n] or None.
    pdl, static_weights, batch_invariant: as `linear`. out_dtype: default bfloat16. backend: FlashInfer's names mean "auto". skip_check:
    changes nothing.
    Errors and numerics: as `linear`. Source: FlashInfer `mm_bf16`.

    >>> out = cugemm.mm_bf16(a, w.T)
    """
    how = (pdl, static_weights, batch_invariant)
    return product(_MM_BF16, a, b, gemm_options(_MM_BF16, out_dtype, backend, _BF16_BACKENDS, how=how), bias=bias, out=out)


def bmm_bf16(A: Any, B: Any, out: Any = None, out_dtype: Any = None, backend: str = "auto", *, skip_check: bool = False) -> Any:
    """out[i, m, n] = sum over k of A[i, m, k] * B[i, k, n], bfloat16.

    A [batch, m, k], B [batch, k, n] (either batch may be 1; 2-D operands are one product with a 2-D result), any layout.
    Other arguments, errors and numerics: as `mm_bf16`. Source: FlashInfer `bmm_bf16`.

    >>> out = cugemm.bmm_bf16(A, B)
    """
    return product(_BMM_BF16, A, B, gemm_options(_BMM_BF16, out_dtype, backend, _BF16_BACKENDS), out=out)
