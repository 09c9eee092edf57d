"""The arguments of one call as views that agree: same framework, same device, readable memory (R1-R3, R5, R8)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from cugemm.arrays import HOST, Cupy, Dlpack, Framework, Jax, Numpy, View, framework_of, is_scalar, itemsize, share_bytes
from cugemm.formats import FP32
from cugemm.problem import Argument

Op = Any
"""GemmOp or QuantizeOp: name, roles, check(views, options)."""


class Intake(NamedTuple):
    """Views in role order (None where absent, floats for scalars), where they live, and the capsules that keep foreign memory."""

    framework: Framework
    views: tuple[Argument, ...]
    device: int
    abstract: bool
    capsules: list[Any]


def is_jax(op: Op, arrays: tuple[Any, ...]) -> bool:
    """Whether any argument is a JAX array or tracer; TypeError for what is no array at all."""
    return any(
        isinstance(framework_of(x, f"{op.name}: {role}"), Jax)
        for role, x in zip(op.roles, arrays, strict=True)
        if x is not None and not is_scalar(x)
    )


def take(op: Op, arrays: tuple[Any, ...]) -> Intake:
    """Read all arguments; TypeError or ValueError where one cannot be read or does not fit the first."""
    views: list[Argument] = []
    capsules: list[Any] = []
    first: tuple[str, Framework, int] | None = None
    abstract: bool | None = None
    for role, x in zip(op.roles, arrays, strict=True):
        if x is None or is_scalar(x):
            views.append(None if x is None else check_scalar(op, role, x))
            continue
        framework = framework_of(x, f"{op.name}: {role}")
        if isinstance(framework, Dlpack):
            capsule, view = framework.open(x, f"{op.name}: {role}")
            capsules.append(capsule)
        else:
            view = framework.view(x, f"{op.name}: {role}")
        try:
            itemsize(view.dtype)
        except TypeError:
            raise TypeError(f"{op.name}: {role} is an array of {view.dtype}; pass one of numbers.") from None
        if any(s < 0 for s in view.strides):
            raise ValueError(f"{op.name}: {role} has negative strides {view.strides}; pass a copy (for example np.ascontiguousarray).")
        if first is None:
            first, abstract = (role, framework, view.device), framework.abstract(x)
        elif not _together(framework, first[1], view.device):
            raise TypeError(
                f"{op.name}: {role} is a {framework.name} array, but {first[0]} is a {first[1].name} array; convert one of them."
            )
        elif framework.abstract(x) != abstract:
            places = [_place(view.device, not abstract), _place(first[2], bool(abstract))]
            raise TypeError(f"{op.name}: {role} is on {places[0]}, but {first[0]} is on {places[1]}; move one of them.")
        elif view.device != first[2]:
            raise TypeError(f"{op.name}: {role} is on {_place(view.device)}, but {first[0]} is on {_place(first[2])}; move one of them.")
        if isinstance(framework, Dlpack):
            first = (first[0], framework, first[2])  # its arrays take the way that keeps capsules
        views.append(view)
    if first is None:
        raise TypeError(f"{op.name}: {op.roles[0]} is missing; pass an array.")
    if not abstract:  # stand-ins have no address
        check_aliasing(op.name, op.roles, tuple(views))
    return Intake(first[1], tuple(views), first[2], bool(abstract), capsules)


def _together(a: Framework, b: Framework, device: int) -> bool:
    """Same framework, or a plain DLPack producer beside the arrays that its results come as: NumPy's on the host, CuPy's on a GPU."""
    home = Numpy if device == HOST else Cupy
    return a.name == b.name or (isinstance(a, Dlpack) and isinstance(b, home)) or (isinstance(b, Dlpack) and isinstance(a, home))


def check_scalar(op: Op, role: str, x: Any) -> float:
    """A scale or alpha that comes by value: what float32 holds."""
    try:
        value = float(x)
    except OverflowError:
        value = FP32.max * 2.0  # an int that no float holds
    if math.isfinite(value) and abs(value) > FP32.max:
        raise ValueError(f"{op.name}: {role} is a number outside float32; scales and alpha are float32.")
    return value


def _place(device: int, abstract: bool = False) -> str:
    return "meta or fake memory" if abstract else "the host" if device == HOST else f"cuda:{device}"


def check_aliasing(name: str, roles: tuple[str, ...], views: tuple[Argument, ...]) -> None:
    """ValueError where `out` shares a byte with an operand."""
    out = views[roles.index("out")] if "out" in roles else None
    if not isinstance(out, View):
        return
    for role, view in zip(roles, views, strict=True):
        if role != "out" and isinstance(view, View) and share_bytes(out, view):
            raise ValueError(f"{name}: out shares memory with {role}; pass an out of its own.")
