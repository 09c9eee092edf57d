"""The arguments of one call as views that agree: same framework, same device, readable memory (R1-R3, R5, R8)."""

from __future__ import annotations

from typing import Any, NamedTuple

from cugemm.arrays import HOST, Dlpack, Framework, Jax, View, framework_of, is_scalar, share_bytes
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
    abstract = False
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
        if any(s < 0 for s in view.strides):
            raise ValueError(f"{op.name}: {role} has negative strides {view.strides}; pass a copy (for example np.ascontiguousarray).")
        if first is None:
            first = (role, framework, view.device)
        elif framework.name != first[1].name:
            raise TypeError(
                f"{op.name}: {role} is a {framework.name} array, but {first[0]} is a {first[1].name} array; convert one of them."
            )
        elif view.device != first[2]:
            raise TypeError(f"{op.name}: {role} is on {_place(view.device)}, but {first[0]} is on {_place(first[2])}; move one of them.")
        abstract |= framework.abstract(x)
        views.append(view)
    if first is None:
        raise TypeError(f"{op.name}: {op.roles[0]} is missing; pass an array.")
    check_aliasing(op.name, op.roles, tuple(views))
    return Intake(first[1], tuple(views), first[2], abstract, capsules)


def check_scalar(op: Op, role: str, x: Any) -> float:
    """A scale or alpha that comes by value: a finite float32."""
    value = float(x)
    if not abs(value) <= FP32.max:
        raise ValueError(f"{op.name}: {role} is a number that is no finite float32; scales and alpha are.")
    return value


def _place(device: int) -> str:
    return "the host" if device == HOST else f"cuda:{device}"


def check_aliasing(name: str, roles: tuple[str, ...], views: tuple[Argument, ...]) -> None:
    """ValueError where `out` shares a byte with an operand."""
    out = views[roles.index("out")] if "out" in roles else None
    if not isinstance(out, View):
        return
    for role, view in zip(roles, views, strict=True):
        if role != "out" and isinstance(view, View) and share_bytes(out, view):
            raise ValueError(f"{name}: out shares memory with {role}; pass an out of its own.")
