"""Calls of several launches: every error of theirs comes before the first launch, and `explain` sees all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from cugemm.arrays import HOST, Cupy, Jax, Spec, Torch, dtype_name, framework_of, is_scalar
from cugemm.intake import check_aliasing, check_scalar, take
from cugemm.launch import recording
from cugemm.quantized import Quantized

_SEEN: dict[tuple[Hashable, ...], tuple[str, ...]] = {}
"""The roles of each kind of call that passed."""
_MOST = 8192
_PARTS = ("data", "scale", "tensor_scale", "zero")


class _Arguments(NamedTuple):
    """All arguments of a call, as `take` wants an operation's."""

    name: str
    roles: tuple[str, ...]


def rehearse(name: str, options: Hashable, body: Callable[..., Any], *arrays: Any, roles: Sequence[str] = ()) -> None:
    """Run the checks of `body(*arrays)` and none of its launches; once for each kind of arguments, because checks see no values.

    First that all arrays are in one framework and on one device, whichever step reads them, and, in every call, that "out" is its own
    memory. roles: what messages call the arrays, by default as the parameters of body.
    """
    try:
        key = (name, options, *[_look(x) for x in arrays])
        seen = _SEEN.get(key)
    except (TypeError, ValueError):
        key, seen = (), None  # what cannot be read is refused below, by name
    if seen is not None:
        for role, x in zip(seen, arrays, strict=True):  # a number's kind was seen, its value was not
            if x is not None and is_scalar(x):
                check_scalar(_Arguments(name, seen), role, x)
        check_out(name, dict(zip(seen, arrays, strict=True)))
        return
    called = tuple(roles or inspect.signature(body).parameters)
    loose = _loose(dict(zip(called, arrays, strict=True)))
    present = {role: framework_of(x, f"{name}: {role}") for role, x in loose.items() if x is not None and not is_scalar(x)}
    owner = next((role for role, framework in present.items() if isinstance(framework, Jax)), None)
    if owner is None:
        take(_Arguments(name, tuple(loose)), tuple(loose.values()))
    elif "out" in present:
        raise TypeError(f"{name}: JAX arrays are immutable: drop out=")
    for role, framework in present.items():
        if owner is not None and not isinstance(framework, Jax):
            raise TypeError(f"{name}: {role} is a {framework.name} array, but {owner} is a JAX array; convert one of them.")
    try:
        with recording():
            body(*(spec_of(x) if owner is not None else x for x in arrays))
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError) or str(error).startswith(name):
            raise
        raise type(error)(f"{name}: {error}") from None  # an inner step's, under its own name
    if len(_SEEN) >= _MOST:
        _SEEN.clear()
    if key:
        _SEEN[key] = called


def check_out(name: str, arrays: dict[str, Any]) -> None:
    """ValueError where "out" shares a byte with another of these arrays, whichever launch reads it: addresses decide, not kinds."""
    out = arrays.get("out")
    if out is None:
        return
    framework_of(out, f"{name}: out")  # not a Quantized
    found = {}
    for role, x in _loose(arrays).items():
        if x is not None and not is_scalar(x):
            framework = framework_of(x, f"{name}: {role}")
            if not framework.abstract(x):  # stand-ins have no address
                found[role] = framework.view(x, f"{name}: {role}")
    check_aliasing(name, tuple(found), tuple(found.values()))


def alike(result: Any, *arrays: Any) -> tuple[Any, ...]:
    """`arrays` as they may stand beside `result` in the next call: while calls are recorded, results are Specs, and then all must be."""
    recorded = isinstance(result.data if type(result) is Quantized else result, Spec)
    return tuple(spec_of(x) for x in arrays) if recorded else arrays


def reshaped(x: Any, shape: tuple[int, ...]) -> Any:
    """A row-major Spec, or an array, in another shape."""
    return Spec(shape, x.dtype, device=x.device) if isinstance(x, Spec) else x.reshape(shape)


def spec_of(x: Any, role: str = "argument") -> Any:
    """The Spec of an array or of a Quantized's arrays; None and numbers stay. role: what messages call it."""
    if x is None or is_scalar(x) or isinstance(x, Spec):
        return x
    if type(x) is Quantized:
        parts = {part: spec_of(getattr(x, part), role) for part in _PARTS}
        return replace(x, shape=(), **parts)
    framework = framework_of(x, role)
    if isinstance(framework, Jax):  # maybe a tracer, which has a shape and no device
        shape, dtype = tuple(x.shape), dtype_name(x.dtype)
        if dtype == "float4_e2m1fn" and shape:
            shape, dtype = (*shape[:-1], shape[-1] // 2), "float4_e2m1fn_x2"
        return Spec(shape, dtype, device=HOST)
    view = framework.view(x, role)
    return Spec(view.shape, view.dtype, strides=view.strides, device=view.device)


def _loose(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays with those of every Quantized in its place."""
    found: dict[str, Any] = {}
    for role, x in arrays.items():
        found |= {f"{role}.{part}": getattr(x, part) for part in _PARTS} if type(x) is Quantized else {role: x}
    return found


def _look(x: Any) -> Hashable:
    """All that the checks of a call see of an argument."""
    if x is None or is_scalar(x):
        return (type(x),)
    if type(x) is Quantized:
        return (x.format, x.k_axis, x.scale_layout, *[_look(getattr(x, part)) for part in _PARTS])
    framework = framework_of(x, "argument")
    if isinstance(framework, Torch | Cupy):
        return (type(x), framework.look(x))
    if isinstance(framework, Jax):
        return (type(x), tuple(x.shape), str(x.dtype))
    return (type(x), framework.view(x, "argument")._replace(ptr=0))
