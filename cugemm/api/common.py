"""What the entries share: their options as values, operands that may be Quantized, backend names."""

from __future__ import annotations

import functools
from numbers import Integral
from typing import Any

import numpy as np

from cugemm.arrays import dtype_name, framework_of, is_scalar
from cugemm.catalog import KERNELS
from cugemm.formats import ALL, BF16, FP16, FP32, Format
from cugemm.launch import run
from cugemm.problem import OPS, GemmOp, GemmOptions
from cugemm.quantized import Quantized

GRANULARITIES = tuple((gm, gn, 128) for gm in (1, 128) for gn in (1, 128))
"""(gm, gn, gk): values along m, n and k under one float scale."""
_HOW = ("pdl", "static_weights", "batch_invariant")
_PLAIN = (str, bool, float, Integral, np.bool_, tuple, list, type(None))
"""What an option may be at all."""


def gemm_options(
    op: GemmOp,
    out_dtype: Any = None,
    backend: str = "auto",
    backends: tuple[str, ...] = (),
    accumulate: str = "fast",
    how: tuple[Any, Any, Any] = (False, False, False),
    **fixed: Any,
) -> GemmOptions:
    """The checked options of one call, cached by value. `backends`: names FlashInfer's entry takes, which all mean our choice.

    how: pdl, static_weights, batch_invariant.
    """
    try:
        return _options(op.name, out_dtype, backend, backends, accumulate, how, tuple(fixed.items()) if fixed else ())
    except TypeError as error:
        if hasattr(out_dtype, "__dlpack__") and not isinstance(out_dtype, type):
            text = f"{op.name}: {op.out_dtype_role} is an array; it wants a dtype. Pass scales by keyword: a_scale=..., b_scale=..."
            raise TypeError(text) from None
        if not str(error).startswith("unhashable"):
            raise
        given = {op.out_dtype_role: out_dtype, "backend": backend, "accumulate": accumulate, **dict(zip(_HOW, how, strict=True)), **fixed}
        role, value = next(((r, x) for r, x in given.items() if type(x).__hash__ is None), ("an option", None))
        dtype = role == op.out_dtype_role
        wanted = "is not a dtype; pass a name such as 'bfloat16' or a dtype object" if dtype else "pass a string"
        shown = "not hashable" if value is None else f"a {type(value).__name__}"
        raise TypeError(f"{op.name}: {role} is {shown}, {'which ' if dtype else ''}{wanted}.") from None


@functools.lru_cache(maxsize=4096, typed=True)
def _options(
    name: str,
    out_dtype: Any,
    backend: str,
    backends: tuple[str, ...],
    accumulate: str,
    how: tuple[Any, Any, Any],
    fixed: tuple[tuple[str, Any], ...],
) -> GemmOptions:
    for role, value in (("backend", backend), ("accumulate", accumulate)):
        if not isinstance(value, _PLAIN):
            raise TypeError(f"{name}: {role} is {shown(value)}; pass a string.")
    own = ("auto", *(kernel.name for kernel in KERNELS if kernel.multiplies))
    if backend not in own and backend not in backends:
        raise ValueError(f"{name}: backend is {backend!r}; wanted one of {', '.join(map(repr, dict.fromkeys((*own, *backends))))}.")
    try:
        dtype = None if out_dtype is None else dtype_name(out_dtype)
    except TypeError as error:
        raise TypeError(f"{name}: {OPS[name].out_dtype_role}: {error}") from None
    flags: dict[str, Any] = {role: flag(name, role, value) for role, value in zip(_HOW, how, strict=True)}
    return GemmOptions(out_dtype=dtype, backend=backend if backend in own else "auto", accumulate=accumulate, **flags, **dict(fixed))


def product(
    op: GemmOp,
    a: Any,
    b: Any,
    options: GemmOptions,
    a_scale: Any = None,
    b_scale: Any = None,
    a_tensor: Any = None,
    b_tensor: Any = None,
    alpha: Any = None,
    bias: Any = None,
    segments: Any = None,
    experts: Any = None,
    rows: Any = None,
    out: Any = None,
) -> Any:
    """Run a product; a Quantized operand brings its scales and format along."""
    zero = None
    if type(a) is Quantized:
        if a_scale is not None:
            raise TypeError(f"{op.name}: {op.roles[0]} is a Quantized, which has its own scale; drop {op.roles[2]}.")
        _check_axis(op, 0, a, a.ndim - 1)
        if a.zero is not None:
            raise TypeError(f"{op.name}: {op.roles[0]} is {a!r}; zero points go with {op.roles[1]} only: dequantise it, or use int4.")
        a_tensor = a.tensor_scale if a_tensor is None else a_tensor
        a, a_scale, options = a.data, a.scale, _with_a(options, a.format, a.scale_layout)
    if type(b) is Quantized:
        if b_scale is not None:
            raise TypeError(f"{op.name}: {op.roles[1]} is a Quantized, which has its own scale; drop {op.roles[3]}.")
        _check_axis(op, 1, b, b.ndim - (2 if options.b_axes == "kn" else 1))
        b_tensor, zero = b.tensor_scale if b_tensor is None else b_tensor, b.zero
        b, b_scale, options = b.data, b.scale, _with_b(options, b.format, b.scale_layout)
    return run(op, (a, b, a_scale, b_scale, a_tensor, b_tensor, zero, alpha, bias, segments, experts, rows, out), options)


@functools.lru_cache(maxsize=4096)
def _with_a(options: GemmOptions, fmt: Format, layout: str) -> GemmOptions:
    scale = "" if fmt.scale is FP32 else fmt.scale.name
    return options._replace(
        a_element=fmt.element.name, a_block=fmt.block, a_scale_axes="mk", a_scale_element=scale, a_scale_layout=layout
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _with_b(options: GemmOptions, fmt: Format, layout: str) -> GemmOptions:
    scale = "" if fmt.scale is FP32 else fmt.scale.name
    return options._replace(
        b_element=fmt.element.name, b_block=fmt.block, b_scale_axes="", b_scale_element=scale, b_scale_layout=layout
    )  # fmt: skip


def _check_axis(op: GemmOp, position: int, q: Quantized, wanted: int) -> None:
    one_scale = q.format.block == (ALL, ALL) and q.format.element.per_byte == 1  # means the same either way round
    if q.k_axis != wanted and not one_scale:
        role = op.roles[position]
        raise ValueError(
            f"{op.name}: {role} is {q!r} with k along axis {q.k_axis}, but axis {wanted} of {role} is summed over; pass {role}.T."
        )


def choice(name: str, role: str, value: Any, allowed: tuple[Any, ...], wanted: str = "") -> Any:
    """The one of `allowed` (strings, ints, bools, None, tuples of them) that value is, so that caches see the library's own constants.

    ValueError for another value, also one of another type that compares equal (1.0 is not 1); TypeError for what is no plain value, such as
    an array. wanted: what messages ask for.
    """
    for own in allowed:
        if matches(value, own):
            return own
    text = f"{name}: {role} is {shown(value)}; wanted {wanted or ' or '.join(map(repr, allowed))}."
    raise (ValueError if isinstance(value, _PLAIN) else TypeError)(text)


def flag(name: str, role: str, value: Any) -> bool:
    """A bool, also as NumPy's or as 0 and 1."""
    if type(value) is bool:
        return value
    return bool(choice(name, role, value, (True, False)))


def shown(value: Any) -> str:
    """An option as a message shows it: no values of arrays."""
    if isinstance(value, (tuple, list)) and len(value) <= 4:
        return f"({', '.join(map(shown, value))})"
    plain = value is None or isinstance(value, (str, bool, float, np.bool_)) or (isinstance(value, Integral) and abs(int(value)) < 2**64)
    return repr(value) if plain else f"a {type(value).__name__}"


def matches(value: Any, own: Any) -> bool:
    """Whether value is the constant, in type as well; a list stands for a tuple."""
    kinds: Any = _kinds(own)
    if not isinstance(value, kinds) or (isinstance(value, bool) and type(own) is int):
        return False
    if isinstance(own, tuple):
        return len(value) == len(own) and all(matches(*pair) for pair in zip(value, own, strict=True))
    return bool(value == own)


def _kinds(own: Any) -> tuple[type, ...]:
    """What may stand for a constant."""
    if isinstance(own, bool):
        return (bool, np.bool_, Integral)
    return (Integral,) if isinstance(own, int) else (tuple, list) if isinstance(own, tuple) else (type(own),)


def dtype_of(x: Any) -> str:
    """dtype name of an operand before its call is checked; empty for what is no array."""
    dtype = getattr(x, "dtype", None)
    if dtype is None and hasattr(x, "__dlpack__"):
        dtype = framework_of(x, "operand").view(x, "operand").dtype
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def is_float16(x: Any) -> bool:
    """A 16-bit array of any framework (bfloat16 or float16)."""
    return dtype_of(x) in (BF16.dtype, FP16.dtype)


def shape_of(name: str, role: str, x: Any) -> tuple[int, ...]:
    """The shape of an operand before its call is checked, logical for a Quantized; TypeError for what is no array."""
    if type(x) is Quantized:
        return x.shape
    framework = framework_of(x, f"{name}: {role}")
    return tuple(x.shape) if hasattr(x, "shape") else framework.view(x, f"{name}: {role}").shape


def check_alpha(op: GemmOp, alpha: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Refuse an array alpha of other shapes: products would read some of them as scales of columns."""
    if alpha is not None and not is_scalar(alpha):
        shape = shape_of(op.name, "alpha", alpha)
        if type(alpha) is Quantized or shape not in ((), (1,), *shapes):
            found = "a Quantized" if type(alpha) is Quantized else f"of shape {shape}"
            raise op.error(f"alpha is {found}; wanted one element, or {' or '.join(map(str, shapes))}.")


def same_k(op: GemmOp, a: Any, b: Any, b_axis: int) -> None:
    """Refuse operands that differ in k before one of them is converted, which would launch."""
    shape_a, shape_b = shape_of(op.name, op.roles[0], a), shape_of(op.name, op.roles[1], b)
    if len(shape_a) >= 1 and len(shape_b) >= 2 and shape_a[-1] != shape_b[b_axis]:
        raise op.error(
            f"{op.roles[0]} {shape_a} has k = {shape_a[-1]}, but {op.roles[1]} {shape_b} has k = {shape_b[b_axis]}; they must agree."
        )
