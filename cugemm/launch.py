"""From arrays to a launch. A warm call is one dictionary lookup, one allocation and one `cuLaunchKernelEx`; everything else happens once.

Two caches. `_WARM` is keyed by what a call looks like from outside (function, options, types and leading shapes) and holds `Bound` calls,
which recognise their arguments in every detail and whose launches are packed but for pointers. `_CHOICES` is keyed by the `Problem`, which
holds m only as a bucket, and leads to the kernel and config. Functions are loaded once per device.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

from cugemm import arch, compile, driver, host, select, values
from cugemm.arrays import HELD, HOST, SPEC, Dlpack, Framework, Match, View, framework_of, is_scalar
from cugemm.catalog import Step
from cugemm.errors import CaptureError, HostWarning
from cugemm.intake import Intake, Op, check_aliasing, check_scalar, is_jax, take
from cugemm.packed import pack
from cugemm.problem import Argument, GemmCall

_WARM: dict[tuple[Any, ...], tuple[Bound, ...]] = {}
_VIEWS: dict[tuple[Any, ...], Bound] = {}
_CHOICES: dict[Any, select.Choice] = {}
_FUNCTIONS: dict[tuple[Any, ...], compile.Loaded] = {}
_MAX_KEYS, _MAX_BOUND = 8192, 8
_lock = threading.RLock()

launches = 0
"""Kernels launched, buffers cleared and host products computed by this process; for tests and `info`."""


class Recorded(NamedTuple):
    """One call seen while recording, for plan, explain and warmup."""

    op: Op
    call: Any
    choice: select.Choice | None  # None on host memory
    device: int


class _Recorder(threading.local):
    calls: list[Recorded] | None = None


_recorder = _Recorder()
_recording = int(values.DEBUG)  # threads that record, or debugging: keeps the warm path to one test of a global


@functools.cache
def machine(device: int) -> tuple[arch.Arch, arch.Device]:
    """What a CUDA device is; an H100 where there is no driver to ask, so that calls can be planned anywhere."""
    if not driver.available():
        return arch.get("sm_90a"), arch.H100
    return arch.of_capability(*driver.capability(device)), arch.device_info(device)


def load(step: Step, arch_name: str, device: int) -> compile.Loaded:
    """The compiled function of a step on a device: compiled at most once per machine, loaded at most once per device."""
    key = (step.source, step.defines, arch_name, device)
    found = _FUNCTIONS.get(key)
    if found is None:
        with _lock:
            found = _FUNCTIONS.get(key)
            if found is None:
                found = compile.load(step.source, arch.get(arch_name), dict(step.defines), step.source, device)
                if step.smem:  # how much a launch takes may depend on its sizes
                    with driver.on_device(device):
                        driver.set_max_dynamic_smem(found.function, arch.get(arch_name).max_smem)
                _FUNCTIONS[key] = found
    return found


def _without_scratch(call: Any) -> Any:
    """XLA allocates what a program needs before it is known which kernel runs."""
    return call._replace(problem=call.problem._replace(scratch=False)) if isinstance(call, GemmCall) else call


def choose(call: Any, device: int) -> select.Choice:
    """The kernel and config for a call on a device, from the plan cache."""
    target, info = machine(device)
    problem = call.problem._replace(arch=target.name, device=device)
    found = _CHOICES.get(problem)
    if found is None:
        found = _CHOICES[problem] = select.choose(problem, info)
    return found


# --- bound calls ------------------------------------------------------------------------------------------------------------------


class Bound:
    """A call bound to everything but its pointers and scalars.

    Pointer tables here are compact: the arrays that are present in role order, the results that are not among them, scratch, a zero.
    """

    __slots__ = (
        "device", "framework", "guarded", "launches", "match", "name", "operands", "out", "outputs", "roles", "spans", "workspaces",
    )  # fmt: skip

    match: Match

    def __init__(self, op: Op, call: Any, views: tuple[Argument, ...], framework: Framework, device: int, choice: select.Choice) -> None:
        self.name, self.roles, self.framework, self.device = op.name, op.roles, framework, device
        problem, best = choice.problem, choice.best
        steps = best.kernel.steps(call, best.config)
        scratch = max((step.scratch for step in steps if isinstance(step, Step)), default=0)
        self.outputs, self.workspaces = call.outputs, (*call.workspaces, *([((scratch,), "float32")] if scratch else []))
        self.guarded, self.match = False, _matches_nothing
        present = [i for i, view in enumerate(views) if isinstance(view, View)]
        self.spans = [view.span() for view in views if isinstance(view, View)]
        out = op.roles.index("out") if "out" in op.roles else None
        self.out = present.index(out) if out in present else None
        self.operands = [(i, span) for i, span in enumerate(self.spans) if i != self.out]
        compact = {position: i for i, position in enumerate(present)}
        fresh = len(present)
        if out is not None and out not in present:
            compact[out] = fresh
            fresh += 1
        compact |= {
            position: fresh + i for i, position in enumerate(range(len(views), len(views) + len(call.outputs) + len(self.workspaces)))
        }
        by_value = [isinstance(view, float) for view in views]
        self.launches = tuple(
            pack(step, lambda position: compact.get(position, -1), lambda s: load(s, problem.arch, device).function, by_value, device)
            for step in steps
            if not isinstance(step, Step) or step.grid > 0
        )

    def __call__(self, arrays: tuple[Any, ...], pointers: list[int]) -> Any:
        framework, device, out = self.framework, self.device, self.out
        if out is not None:
            result: Any = arrays[-1]
            low = pointers[out]
            high = low + self.spans[out]
            for i, span in self.operands:
                if pointers[i] < high and low < pointers[i] + span:  # else they share no byte
                    check_aliasing(self.name, self.roles, take_views(framework, self.roles, arrays))
            if self.guarded:
                framework.refuse_out(self.name, result, arrays)
        else:
            made = [framework.empty(shape, dtype, arrays[0], device) for shape, dtype in self.outputs]
            pointers += [framework.pointer(x) for x in made]
            result = made[0] if len(made) == 1 else tuple(made)
        # NOTE: scratch is held until everything is enqueued; then the pool may have it back, because its next user runs after us.
        scratch = [framework.empty(shape, dtype, arrays[0], device) for shape, dtype in self.workspaces]
        pointers += [framework.pointer(x) for x in scratch]
        self.enqueue(arrays, pointers, framework.stream(device))
        if out is not None:
            framework.written(result)
        elif self.guarded:
            return framework.guard(self.name, arrays, result)
        return result

    def enqueue(self, arrays: Sequence[Any], pointers: list[int], stream: int) -> None:
        global launches
        pointers.append(0)
        for launch in self.launches:
            launches += 1
            launch(arrays, pointers, stream)


def _matches_nothing(arrays: tuple[Any, ...]) -> list[int] | None:
    return None


def take_views(framework: Framework, roles: tuple[str, ...], arrays: tuple[Any, ...]) -> tuple[Argument, ...]:
    return tuple(None if x is None or is_scalar(x) else framework.view(x, role) for role, x in zip(roles, arrays, strict=True))


def bind(op: Op, call: Any, views: tuple[Argument, ...], framework: Framework, device: int) -> Bound:
    """Choose, load and pack; CaptureError where that would have to compile or load during a stream capture (R16)."""
    choice = choose(call, device)
    best = choice.best
    missing = [
        step
        for step in best.kernel.steps(call, best.config)
        if isinstance(step, Step) and step.grid > 0 and (step.source, step.defines, choice.problem.arch, device) not in _FUNCTIONS
    ]
    if missing and driver.is_capturing(framework.stream(device)):
        shapes = ", ".join(f"{role} {view.shape}" for role, view in zip(op.roles, views, strict=True) if isinstance(view, View))
        raise CaptureError(
            f"{op.name}: this call needs a kernel that is not loaded yet, and a stream is being captured. Before the capture, run "
            f"cugemm.warmup(cugemm.{op.name}, ...) with these arguments ({shapes}), or call it once."
        )
    return Bound(op, call, views, framework, device, choice)


# --- calls ------------------------------------------------------------------------------------------------------------------------


def run(op: Op, arrays: tuple[Any, ...], options: Any) -> Any:
    """Run `op` on the caller's arrays (role order, None where absent, floats by value) and return the caller's kind of array."""
    if not _recording:
        for bound in _WARM.get(_key(op, arrays, options), ()):
            pointers = bound.match(arrays)
            if pointers is not None:
                try:
                    return bound(arrays, pointers)
                except OverflowError:
                    break  # a scalar outside float32, which the long way refuses in words
    return _first(op, arrays, options)


def _key(op: Op, arrays: tuple[Any, ...], options: Any) -> tuple[Any, ...]:
    return (op.name, options, getattr(arrays[0], "shape", None), getattr(arrays[1 % len(arrays)], "shape", None), *map(type, arrays))


def _first(op: Op, arrays: tuple[Any, ...], options: Any) -> Any:
    """The long way: intake, checks, selection, compilation; then the call itself."""
    if is_jax(op, arrays) and _recorder.calls is None:
        from cugemm.adapters import jax as adapter  # noqa: PLC0415 - imports jax

        for role, x in zip(op.roles, arrays, strict=True):
            if is_scalar(x):
                check_scalar(op, role, x)
        return adapter.run(op, arrays, options)
    intake = take(op, arrays)
    call = op.check(intake.views, options)
    given = arrays[-1] if "out" in op.roles else None
    framework, device = intake.framework, intake.device
    if _recorder.calls is not None:
        call = _without_scratch(call) if framework.name == "JAX" else call
        choice = None if device == HOST else choose(call, device)
        _recorder.calls.append(Recorded(op, call, choice, device))
        return _unwrap([SPEC.empty(shape, dtype, None, device) for shape, dtype in call.outputs])
    if intake.abstract:
        made = [framework.placeholder(shape, dtype, arrays[0], device) for shape, dtype in call.outputs]
        return _unwrap(made) if given is None else given
    if given is not None:
        framework.refuse_out(op.name, given, arrays)
    if device == HOST or values.DEBUG:
        values.check(op, call, intake.views, device, 0 if device == HOST else framework.stream(device))
    if device == HOST:
        return _host_call(op, call, arrays, intake, options, given)
    if all(0 in shape for shape, _ in call.outputs):  # nothing to compute: nothing is compiled or launched
        made = [framework.release(framework.empty(shape, dtype, arrays[0], device), arrays[0]) for shape, dtype in call.outputs]
        return framework.guard(op.name, arrays, _unwrap(made)) if given is None else given
    driver.require()
    bound = bind(op, call, intake.views, framework, device)
    pointers = [view.ptr for view in intake.views if isinstance(view, View)]
    bound.guarded = framework.differentiable(arrays)
    if isinstance(framework, Dlpack):
        made = bound(arrays, pointers)
        HELD.keep(intake.capsules, device, framework.stream(device))
        fresh = made if isinstance(made, tuple) else (made,)
        result: Any = given if given is not None else _unwrap([framework.release(x, arrays[0]) for x in fresh])
    else:
        present = [i for i, view in enumerate(intake.views) if isinstance(view, View)]
        bound.match = framework.matcher(arrays, itemgetter(*present) if len(present) > 1 else _one(present[0]))
        _remember(_key(op, arrays, options), bound)
        result = bound(arrays, pointers)
    if values.DEBUG:
        driver.synchronize(framework.stream(device))
    return result


def _one(position: int) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    return lambda arrays: (arrays[position],)


def _remember(key: tuple[Any, ...], bound: Bound) -> None:
    if len(_WARM) >= _MAX_KEYS:
        _WARM.clear()
    _WARM[key] = (bound, *_WARM.get(key, ())[: _MAX_BOUND - 1])


def _host_call(op: Op, call: Any, arrays: tuple[Any, ...], intake: Intake, options: Any, given: Any) -> Any:
    framework = intake.framework
    if call.flops > 1e9:
        _warn_once()
    made = [given] if given is not None else [framework.empty(shape, dtype, arrays[0], HOST) for shape, dtype in call.outputs]
    views = [intake.views[-1]] if given is not None else [framework_of(x, "result").view(x, "result") for x in made]
    _on_host(call, intake.views, options, tuple(views))
    if given is not None:
        framework.written(given)
        return given
    return framework.guard(op.name, arrays, _unwrap([framework.release(x, arrays[0]) for x in made]))


def _unwrap(results: list[Any]) -> Any:
    return results[0] if len(results) == 1 else tuple(results)


def _on_host(call: Any, views: tuple[Argument, ...], options: Any, outputs: tuple[Any, ...]) -> None:
    global launches
    launches += 1
    host.run(call, views, options, outputs)


@functools.cache
def _warn_once() -> None:
    if driver.available():
        warnings.warn(
            "cugemm: these arrays are in host memory, so the NumPy reference computes the product while a GPU stands by; "
            "move them first (x.cuda(), cupy.asarray(x), jax.device_put(x)).",
            HostWarning,
            stacklevel=2,
        )


def run_views(
    op: Op, views: tuple[Argument, ...], options: Any, outputs: tuple[View, ...], workspaces: tuple[View, ...], stream: int
) -> None:
    """Run `op` on memory that somebody else manages (XLA): every array is a View, results and scratch included."""
    device = next(view.device for view in views if isinstance(view, View))
    looks = tuple(view._replace(ptr=view.ptr & 15) if isinstance(view, View) else view is None for view in views)
    key = (op.name, options, looks)
    bound = None if values.DEBUG else _VIEWS.get(key)
    if bound is None:
        call = op.check(views, options)
        if values.DEBUG:
            values.check(op, call, views, device, stream)
        if device == HOST:
            _on_host(call, views, options, outputs)
            return
        if all(0 in view.shape for view in outputs):
            return
        call = _without_scratch(call)
        if len(_VIEWS) >= _MAX_KEYS:
            _VIEWS.clear()
        bound = _VIEWS[key] = bind(op, call, views, _XlaStream(stream), device)
    pointers = [view.ptr for view in (*views, *outputs, *workspaces) if isinstance(view, View)]
    bound.enqueue(views, pointers, stream)


class _XlaStream(Framework):
    name = "XLA"

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def stream(self, device: int) -> int:
        return self._stream


def clear() -> None:
    """Forget every plan and function of this process; the cubins on disk stay."""
    with _lock:
        for cache in (_WARM, _VIEWS, _CHOICES, _FUNCTIONS):
            cache.clear()
        if hasattr(machine, "cache_clear"):
            machine.cache_clear()


def _after_fork() -> None:
    """A forked child cannot use CUDA: let its first call find that out, in words, before it allocates."""
    _WARM.clear()
    _VIEWS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Inside, calls on this thread are checked and planned but not run; each adds a Recorded and returns Specs."""
    global _recording
    calls: list[Recorded] = []
    outer, _recorder.calls = _recorder.calls, calls
    with _lock:
        _recording += 1
    try:
        yield calls
    finally:
        _recorder.calls = outer
        with _lock:
            _recording -= 1
