"""From arrays to a launch. A warm call is one dictionary lookup, one allocation and one `cuLaunchKernelEx`; everything else happens once.

Two caches. `_BOUND` is keyed by what a call looks like from outside (function, options, and of every array its shape, strides, dtype,
device and alignment) and leads to launches whose argument block is packed but for pointers. `_CHOICES` is keyed by the `Problem`, which
holds m only as a bucket, and leads to the kernel and config. Functions are loaded once per device.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

from cugemm import arch, compile, driver, host, select
from cugemm.arrays import FAST, HELD, HOST, SPEC, Dlpack, Framework, Jax, Signature, View, framework_of, is_scalar, share_bytes
from cugemm.catalog import Step, Zero
from cugemm.errors import CaptureError, HostWarning
from cugemm.problem import Argument

Op = Any
"""GemmOp or QuantizeOp: name, roles, check(views, options)."""

_CONFIG = struct.Struct("<7I4xQQI4x")
"""CUlaunchConfig: grid, block, dynamic shared memory, stream, attributes, their number (56 bytes, see `driver.LaunchConfig`)."""
_STREAM_AT, _PARAMS_AT, _ARGS_AT = 32, 56, 64
_MAX_ARGS = 1024

_BOUND: dict[tuple[Any, ...], Bound] = {}
_CHOICES: dict[Any, select.Choice] = {}
_FUNCTIONS: dict[tuple[Any, ...], compile.Loaded] = {}
_MAX_BOUND = 8192
_lock = threading.RLock()

launches = 0
"""Kernels launched and host products computed by this process; for tests and `info`."""


class _Thread(threading.local):
    """Each thread packs its launches into memory of its own, because the driver call releases the GIL (R15)."""

    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(_ARGS_AT + _MAX_ARGS)
        self.address = ctypes.addressof(self.memory)
        self.view = memoryview(self.memory).cast("B")
        struct.pack_into("<Q", self.memory, _PARAMS_AT, self.address + _ARGS_AT)  # the one kernel parameter: the argument struct
        self.recorder: list[Recorded] | None = None


_thread = _Thread()
_recording = 0  # threads that record: keeps the warm path to one test of a global


class Recorded(NamedTuple):
    """One call seen while recording, for plan, explain and warmup."""

    op: Op
    call: Any
    choice: select.Choice | None  # None on host memory
    device: int


class _Launch(NamedTuple):
    """One packed kernel launch: only pointers, by-value scalars and the stream are still to be written."""

    function: int
    config: bytes
    args: bytes
    pick: Callable[[list[int]], tuple[int, ...]]
    pack: Callable[..., None]  # pointers
    scalars: tuple[tuple[int, int], ...]  # (offset in the arguments, position of the argument)

    def __call__(self, arrays: tuple[Any, ...], pointers: list[int], stream: int, device: int) -> None:
        global launches
        thread = _thread
        view, memory = thread.view, thread.memory
        view[:_PARAMS_AT] = self.config
        view[_ARGS_AT : _ARGS_AT + len(self.args)] = self.args
        self.pack(memory, _ARGS_AT, *self.pick(pointers))
        for offset, position in self.scalars:
            struct.pack_into("<f", memory, _ARGS_AT + offset, arrays[position])
        struct.pack_into("<Q", memory, _STREAM_AT, stream)
        launches += 1
        driver.launch(thread.address, self.function, thread.address + _PARAMS_AT, device)


class _Clear(NamedTuple):
    """A `Zero` step, ready to enqueue."""

    zero: Zero

    def __call__(self, arrays: tuple[Any, ...], pointers: list[int], stream: int, device: int) -> None:
        zero = self.zero
        with driver.on_device(device):
            driver.memset_2d(pointers[zero.pointer], zero.pitch, zero.width, zero.height, stream)


class Bound:
    """A call bound to everything but its pointers."""

    __slots__ = ("device", "framework", "guarded", "launches", "name", "out", "outputs", "roles", "spans", "workspaces")

    def __init__(
        self, op: Op, call: Any, views: tuple[Argument, ...], framework: Framework, device: int, choice: select.Choice, guarded: bool
    ) -> None:
        self.name, self.roles, self.framework, self.device, self.guarded = op.name, op.roles, framework, device, guarded
        self.out = op.roles.index("out") if "out" in op.roles else None
        self.spans = [view.span() if isinstance(view, View) else 0 for view in views]
        self.outputs = call.outputs
        self.workspaces = call.workspaces
        best = choice.best
        self.launches = tuple(_prepared(step, choice.problem, device, views) for step in best.kernel.steps(call, best.config))

    def __call__(self, arrays: tuple[Any, ...], pointers: list[int]) -> Any:
        framework, device = self.framework, self.device
        given = arrays[self.out] if self.out is not None else None
        like = arrays[0]
        if given is not None:
            self.check_aliasing(arrays, pointers)
            if self.guarded:
                framework.refuse_out(self.name, given, arrays)
            result: Any = given
        else:
            made = [framework.empty(shape, dtype, like, device) for shape, dtype in self.outputs]
            if self.out is not None:
                pointers[self.out] = _pointer(framework, made[0])
            else:
                pointers += [_pointer(framework, x) for x in made]
            result = made[0] if len(made) == 1 else tuple(made)
        scratch = [framework.empty(shape, dtype, like, device) for shape, dtype in self.workspaces]
        pointers += [_pointer(framework, x) for x in scratch]
        pointers.append(0)
        self.enqueue(arrays, pointers, framework.stream(device))
        if given is not None:
            framework.written(given)
        elif self.guarded:
            return framework.guard(self.name, arrays, result)
        return result

    def enqueue(self, arrays: tuple[Any, ...], pointers: list[int], stream: int) -> None:
        for launch in self.launches:
            launch(arrays, pointers, stream, self.device)

    def check_aliasing(self, arrays: tuple[Any, ...], pointers: list[int]) -> None:
        """Byte intervals first; only where they meet, the exact test on views (fused QKV buffers are legal)."""
        position = self.out or 0
        spans = self.spans
        low = pointers[position]
        high = low + spans[position]
        for i, ptr in enumerate(pointers):
            near = ptr and i != position and ptr < high and low < ptr + spans[i]
            if near and share_bytes(self.framework.view(arrays[position], "out"), self.framework.view(arrays[i], self.roles[i])):
                raise _aliased(self.name, self.roles[i])


def _aliased(name: str, role: str) -> ValueError:
    return ValueError(f"{name}: out shares memory with {role}; pass an out of its own.")


def _pointer(framework: Framework, x: Any) -> int:
    return framework.view(x, "result").ptr


@functools.cache
def machine(device: int) -> tuple[arch.Arch, arch.Device]:
    """What a CUDA device is."""
    return arch.of_capability(*driver.capability(device)), arch.device_info(device)


def _prepared(step: Step | Zero, problem: Any, device: int, views: tuple[Argument, ...]) -> _Launch | _Clear:
    if isinstance(step, Zero):
        return _Clear(step)
    function = load(step, problem.arch, device)
    scalars_at = 8 * len(step.pointers)
    args = struct.pack(f"<{len(step.pointers)}Q{len(step.scalars)}f", *[0] * len(step.pointers), *[1.0] * len(step.scalars)) + step.tail
    assert len(args) <= _MAX_ARGS
    config = _CONFIG.pack(step.grid, 1, 1, step.threads, 1, 1, step.smem, 0, 0, 0)
    pick = itemgetter(*step.pointers) if len(step.pointers) > 1 else lambda table: (table[step.pointers[0]],)
    scalars = tuple((scalars_at + 4 * i, position) for i, position in enumerate(step.scalars) if isinstance(views[position], float))
    return _Launch(function.function, config, args, pick, struct.Struct(f"<{len(step.pointers)}Q").pack_into, scalars)


def load(step: Step, arch_name: str, device: int) -> compile.Loaded:
    """The compiled function of a step on a device: compiled at most once per machine, loaded at most once per device."""
    key = (step.source, step.defines, arch_name, device)
    found = _FUNCTIONS.get(key)
    if found is None:
        with _lock:
            found = _FUNCTIONS.get(key)
            if found is None:
                found = compile.load(step.source, arch.get(arch_name), dict(step.defines), step.source, device)
                if step.smem > 48 * 1024:
                    with driver.on_device(device):
                        driver.set_max_dynamic_smem(found.function, step.smem)
                _FUNCTIONS[key] = found
    return found


def choose(call: Any, device: int) -> select.Choice:
    """The kernel and config for a call on a device, from the plan cache."""
    target, info = machine(device)
    problem = call.problem._replace(arch=target.name, device=device)
    found = _CHOICES.get(problem)
    if found is None:
        found = _CHOICES[problem] = select.choose(problem, info)
    return found


# --- calls ------------------------------------------------------------------------------------------------------------------------


def run(op: Op, arrays: tuple[Any, ...], options: Any) -> Any:
    """Run `op` on the caller's arrays (role order, None where absent, floats by value) and return the caller's kind of array."""
    if not _recording:
        key: list[Any] = [op.name, options]
        pointers: list[int] = []
        for x in arrays:
            if x is None:
                key.append(None)
                pointers.append(0)
                continue
            read = FAST.get(type(x))
            if read is None:
                break
            ptr, signature = read(x)
            key.append(signature)
            pointers.append(ptr)
        else:
            bound = _BOUND.get(tuple(key))
            if bound is not None:
                return bound(arrays, pointers)
    return _first(op, arrays, options)


def _scalar_signature(x: Any) -> tuple[int, Signature]:
    return 0, ("scalar",)


FAST[float] = FAST[int] = _scalar_signature


class _Intake(NamedTuple):
    framework: Framework
    views: tuple[Argument, ...]
    device: int
    abstract: bool
    capsules: list[Any]


def _first(op: Op, arrays: tuple[Any, ...], options: Any) -> Any:
    """The long way: intake, checks, selection, compilation; then the call itself."""
    if any(
        x is not None and not is_scalar(x) and isinstance(framework_of(x, f"{op.name}: {op.roles[i]}"), Jax) for i, x in enumerate(arrays)
    ):
        from cugemm.adapters import jax as adapter  # noqa: PLC0415 - imports jax

        return adapter.run(op, arrays, options)
    intake = _intake(op, arrays)
    call = op.check(intake.views, options)
    out = op.roles.index("out") if "out" in op.roles else None
    given = arrays[out] if out is not None else None
    if given is not None:
        _check_out(op, intake, out or 0)
    if _thread.recorder is not None:
        return _record(op, call, intake)
    if intake.abstract:
        made = [intake.framework.empty(shape, dtype, arrays[0], intake.device) for shape, dtype in call.outputs]
        return _unwrap(made) if given is None else given
    if given is not None:
        intake.framework.refuse_out(op.name, given, arrays)
    if intake.device == HOST:
        return _host_call(op, call, arrays, intake, options, given)
    return _device_call(op, call, arrays, intake, options, given)


def _intake(op: Op, arrays: tuple[Any, ...]) -> _Intake:
    """Views of all arguments, which must agree in framework and device (R1-R3, R5)."""
    views: list[Argument] = []
    capsules: list[Any] = []
    first: tuple[str, Framework, int] | None = None
    abstract = False
    for role, x in zip(op.roles, arrays, strict=True):
        if x is None or is_scalar(x):
            if x is not None:
                FAST.setdefault(type(x), _scalar_signature)
            views.append(None if x is None else float(x))
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
    assert first is not None
    return _Intake(first[1], tuple(views), first[2], abstract, capsules)


def _place(device: int) -> str:
    return "the host" if device == HOST else f"cuda:{device}"


def _check_out(op: Op, intake: _Intake, position: int) -> None:
    out = intake.views[position]
    assert isinstance(out, View)
    for role, view in zip(op.roles, intake.views, strict=True):
        if role != "out" and isinstance(view, View) and share_bytes(out, view):
            raise _aliased(op.name, role)


def _host_call(op: Op, call: Any, arrays: tuple[Any, ...], intake: _Intake, options: Any, given: Any) -> Any:
    framework = intake.framework
    if call.flops > 1e9:
        _warn_once()
    made = [given] if given is not None else [framework.empty(shape, dtype, arrays[0], HOST) for shape, dtype in call.outputs]
    views = [intake.views[-1]] if given is not None else [_view_of(framework, x) for x in made]
    _on_host(call, intake.views, options, tuple(views))
    if given is not None:
        framework.written(given)
    return framework.guard(op.name, arrays, _unwrap([framework.release(x, arrays[0]) for x in made]))


def _unwrap(results: list[Any]) -> Any:
    return results[0] if len(results) == 1 else tuple(results)


def _view_of(framework: Framework, x: Any) -> View:
    return framework_of(x, "result").view(x, "result") if isinstance(framework, Dlpack) else framework.view(x, "result")


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


def _device_call(op: Op, call: Any, arrays: tuple[Any, ...], intake: _Intake, options: Any, given: Any) -> Any:
    framework, device = intake.framework, intake.device
    if any(0 in shape for shape, _ in call.outputs):  # nothing to compute: nothing is compiled or launched
        made = [framework.release(framework.empty(shape, dtype, arrays[0], device), arrays[0]) for shape, dtype in call.outputs]
        return _unwrap(made) if given is None else given
    bound = bind(op, call, intake.views, framework, device, framework.differentiable(arrays))
    if isinstance(framework, Dlpack):
        return _foreign_call(bound, arrays, intake)
    key: list[Any] = [op.name, options]
    pointers: list[int] = []
    for x, view in zip(arrays, intake.views, strict=True):
        read = None if x is None else FAST.get(type(x))
        key.append(read(x)[1] if read else x if x is None else type(x))
        pointers.append(view.ptr if isinstance(view, View) else 0)
    if all(x is None or type(x) in FAST for x in arrays):
        if len(_BOUND) >= _MAX_BOUND:
            _BOUND.clear()
        _BOUND[tuple(key)] = bound
    return bound(arrays, pointers)


def _foreign_call(bound: Bound, arrays: tuple[Any, ...], intake: _Intake) -> Any:
    """A DLPack producer's arrays: CuPy owns the result, and the capsules live until the kernel has read them."""
    result = bound(arrays, [view.ptr if isinstance(view, View) else 0 for view in intake.views])
    HELD.keep(intake.capsules, intake.device, intake.framework.stream(intake.device))
    release = intake.framework.release
    return tuple(release(x, arrays[0]) for x in result) if isinstance(result, tuple) else release(result, arrays[0])


def bind(op: Op, call: Any, views: tuple[Argument, ...], framework: Framework, device: int, guarded: bool = False) -> Bound:
    choice = choose(call, device)
    best = choice.best
    missing = [
        step
        for step in best.kernel.steps(call, best.config)
        if isinstance(step, Step) and (step.source, step.defines, choice.problem.arch, device) not in _FUNCTIONS
    ]
    if missing and driver.is_capturing(framework.stream(device)):
        shapes = ", ".join(f"{role} {view.shape}" for role, view in zip(op.roles, views, strict=True) if isinstance(view, View))
        raise CaptureError(
            f"{op.name}: this call needs a kernel that is not loaded yet, and a stream is being captured. Before the capture, run "
            f"cugemm.warmup(cugemm.{op.name}, ...) with these arguments ({shapes}), or call it once."
        )
    return Bound(op, call, views, framework, device, choice, guarded)


def run_views(
    op: Op, views: tuple[Argument, ...], options: Any, outputs: tuple[View, ...], workspaces: tuple[View, ...], stream: int
) -> None:
    """Run `op` on memory that somebody else manages (XLA): every array is a View, results and scratch included."""
    call = op.check(views, options)
    device = next(view.device for view in views if isinstance(view, View))
    if device == HOST:
        _on_host(call, views, options, outputs)
        return
    if 0 in [n for view in outputs for n in view.shape]:
        return
    bound = bind(op, call, views, _XlaStream(stream), device)
    pointers = [view.ptr if isinstance(view, View) else 0 for view in views]
    if bound.out is not None:
        pointers[bound.out] = outputs[0].ptr
    else:
        pointers += [view.ptr for view in outputs]
    pointers += [view.ptr for view in workspaces]
    pointers.append(0)
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
        _BOUND.clear()
        _CHOICES.clear()
        _FUNCTIONS.clear()
        machine.cache_clear()


# --- recording --------------------------------------------------------------------------------------------------------------------


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Inside, calls on this thread are checked and planned but not run; each adds a Recorded and returns Specs."""
    global _recording
    calls: list[Recorded] = []
    outer, _thread.recorder = _thread.recorder, calls
    with _lock:
        _recording += 1
    try:
        yield calls
    finally:
        _thread.recorder = outer
        with _lock:
            _recording -= 1


def _record(op: Op, call: Any, intake: _Intake) -> Any:
    assert _thread.recorder is not None
    choice = None if intake.device == HOST else choose(call, intake.device)
    _thread.recorder.append(Recorded(op, call, choice, intake.device))
    return _unwrap([SPEC.empty(shape, dtype, None, intake.device) for shape, dtype in call.outputs])
