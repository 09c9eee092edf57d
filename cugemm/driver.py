"""The CUDA driver through ctypes: the few calls that CuPy does not make, and those too hot for it.

The library is loaded at the first call that needs it, so importing this module works anywhere. Every failure is a CudaError with the
driver's own name for it. All handles (functions, streams, events, contexts) and addresses are plain ints. Source: CUDA Driver API.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .errors import CudaError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

# Letters: i int, I unsigned int, B unsigned char, z size_t, p pointer, device pointer (64 bit) or handle, s C string.
_PROTOTYPES = {
    "cuCtxGetCurrent": "p",
    "cuCtxGetDevice": "p",
    "cuCtxSetCurrent": "p",
    "cuDeviceGetAttribute": "pii",
    "cuDeviceGetCount": "p",
    "cuDeviceGetName": "pii",
    "cuDevicePrimaryCtxRetain": "pi",
    "cuDeviceTotalMem_v2": "pi",
    "cuDriverGetVersion": "p",
    "cuEventCreate": "pI",
    "cuEventDestroy_v2": "p",
    "cuEventQuery": "p",
    "cuEventRecord": "pp",
    "cuFuncSetAttribute": "pii",
    "cuGetErrorName": "ip",
    "cuGetErrorString": "ip",
    "cuInit": "I",
    "cuLaunchKernelEx": "pppp",
    "cuMemcpyDtoH_v2": "ppz",
    "cuMemsetD2D8Async": "pzBzzp",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor": "ppiz",
    "cuStreamIsCapturing": "pp",
    "cuStreamSynchronize": "p",
    "cuTensorMapEncodeTiled": "piIppppp" + "iiii",
}
_LETTERS = {
    "i": ctypes.c_int,
    "I": ctypes.c_uint,
    "B": ctypes.c_ubyte,
    "z": ctypes.c_size_t,
    "p": ctypes.c_void_p,
}

# CUresult
_NOT_INITIALIZED, _DEINITIALIZED, _INVALID_CONTEXT, _INVALID_HANDLE = 3, 4, 201, 400
_NOT_READY, _CONTEXT_IS_DESTROYED, _CAPTURE_IMPLICIT = 600, 709, 906
_WRONG_CONTEXT = (_NOT_INITIALIZED, _DEINITIALIZED, _INVALID_CONTEXT, _INVALID_HANDLE, _CONTEXT_IS_DESTROYED)

ATTRIBUTES = {
    "clock_rate": 13,  # kHz
    "multiprocessor_count": 16,
    "integrated": 18,
    "memory_clock_rate": 36,  # kHz
    "global_memory_bus_width": 37,  # bits
    "l2_cache_size": 38,
    "max_threads_per_multiprocessor": 39,
    "compute_capability_major": 75,
    "compute_capability_minor": 76,
    "max_shared_memory_per_multiprocessor": 81,
    "max_registers_per_multiprocessor": 82,
    "max_shared_memory_per_block_optin": 97,
    "max_blocks_per_multiprocessor": 106,
    "reserved_shared_memory_per_block": 111,
    "cluster_launch": 120,
}
"""CUdevice_attribute by name; sizes in bytes unless the comment says otherwise."""


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute, 72 bytes: `id` at 0, 64 bytes of `value` at 8."""

    _fields_ = [("id", ctypes.c_uint32), ("_pad", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16)]


CLUSTER_DIMENSION = 4
"""LaunchAttribute.id: value[0:3] is the cluster's size in blocks."""
PROGRAMMATIC_STREAM_SERIALIZATION = 6
"""LaunchAttribute.id: value[0] = 1 lets the kernel begin before the one ahead of it in the stream has ended."""


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig, 56 bytes: grid at 0, block at 12, smem at 24, stream at 32, attrs (address) at 40, num_attrs at 48."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("smem", ctypes.c_uint32),
        ("_pad", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("attrs", ctypes.c_uint64),
        ("num_attrs", ctypes.c_uint32),
    ]


_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_forked = False  # this process is a child of one that had initialised CUDA
_FORK = (
    "CUDA was initialised before this process was forked, and a forked child cannot use it; "
    'start workers with multiprocessing.set_start_method("spawn"), or fork before the first use of the GPU'
)


def _load() -> ctypes.CDLL:
    """The driver's library, opened and initialised."""
    global _library, launch_ex
    with _lock:
        if _forked:
            raise CudaError(_FORK)
        if _library is not None:
            return _library
        try:
            # NOTE: not PyDLL. The GIL must be released: a launch waits when the stream's queue is full.
            library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise CudaError(
                f"no NVIDIA driver: {error}; install one (in a container: start it with --gpus all), or pass arrays in host memory"
            ) from error
        try:
            for name, letters in _PROTOTYPES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = ctypes.c_int, [_LETTERS[letter] for letter in letters]
        except AttributeError as error:
            raise CudaError(f"{LIBRARY} is too old: {error}; cugemm needs the driver of CUDA 12 (525) or newer") from error
        result = library.cuInit(0)
        if result:
            raise CudaError(_text(library, "cuInit", result) + (f": {_FORK}" if result == _NOT_INITIALIZED else ""))
        _library, launch_ex = library, library.cuLaunchKernelEx
        return library


def _load_and_launch(config: int, function: int, params: int, extra: None) -> int:
    """What `launch_ex` is until the library is loaded."""
    _load()
    return launch_ex(config, function, params, extra)


launch_ex: Callable[[int, int, int, None], int] = _load_and_launch
"""cuLaunchKernelEx itself, for a caller that counts microseconds and takes a result other than 0 to `relaunch`."""


def _after_fork() -> None:
    global _lock, _library, launch_ex, _forked
    _lock = threading.Lock()  # another thread of the parent may have held it
    _forked = _forked or _library is not None
    _library, launch_ex = None, _load_and_launch


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _text(library: ctypes.CDLL, call: str, result: int) -> str:
    name, explanation = ctypes.c_char_p(), ctypes.c_char_p()
    library.cuGetErrorName(result, ctypes.byref(name))
    library.cuGetErrorString(result, ctypes.byref(explanation))
    return f"{call}: {(name.value or b'CUDA error').decode()} ({result}, {(explanation.value or b'no explanation').decode()})"


def _call(name: str, *args: Any) -> None:
    library = _library or _load()
    result = getattr(library, name)(*args)
    if result:
        raise CudaError(_text(library, name, result))


def _int(name: str, *args: Any) -> int:
    """Call a function whose first parameter is the int it answers."""
    answer = ctypes.c_int()
    _call(name, ctypes.byref(answer), *args)
    return answer.value


def _handle(name: str, *args: Any) -> int:
    """Call a function whose first parameter is the handle or size it answers; 0 for NULL."""
    answer = ctypes.c_void_p()
    _call(name, ctypes.byref(answer), *args)
    return answer.value or 0


# Devices and contexts


def require() -> None:
    """CudaError in words where this process cannot use CUDA: no driver, or forked after CUDA was initialised."""
    if _library is None:
        _load()


def available() -> bool:
    """Is there a driver and at least one device it can use?"""
    try:
        return device_count() > 0
    except CudaError:
        return False


def version() -> tuple[int, int]:
    """The newest CUDA this driver runs, as (12, 9)."""
    number = _int("cuDriverGetVersion")
    return number // 1000, number % 1000 // 10


def device_count() -> int:
    return _int("cuDeviceGetCount")


def device_name(device: int) -> str:
    name = ctypes.create_string_buffer(256)
    _call("cuDeviceGetName", name, len(name), device)
    return name.value.decode()


def total_memory(device: int) -> int:
    """Bytes of the device's memory."""
    return _handle("cuDeviceTotalMem_v2", device)


@functools.cache
def attribute(device: int, name: str) -> int:
    """A property of a device; `name` is a key of ATTRIBUTES."""
    return _int("cuDeviceGetAttribute", ATTRIBUTES[name], device)


def capability(device: int) -> tuple[int, int]:
    """Compute capability, (9, 0) for sm_90."""
    return attribute(device, "compute_capability_major"), attribute(device, "compute_capability_minor")


def current_device() -> int | None:
    """Ordinal of the device whose context is current in this thread; None without one."""
    library = _library or _load()
    answer = ctypes.c_int()
    result = library.cuCtxGetDevice(ctypes.byref(answer))
    if result in (_INVALID_CONTEXT, _CONTEXT_IS_DESTROYED):
        return None
    if result:
        raise CudaError(_text(library, "cuCtxGetDevice", result))
    return answer.value


_primary: dict[int, int] = {}  # device -> its primary context, retained for the life of the process (as the CUDA runtime does)


def bind(device: int) -> None:
    """Make the device's primary context current in this thread, for good."""
    context = _primary.get(device)
    if context is None:
        context = _primary[device] = _handle("cuDevicePrimaryCtxRetain", device)
    _call("cuCtxSetCurrent", context)


@contextlib.contextmanager
def on_device(device: int) -> Iterator[None]:
    """Inside: a context of `device` is current in this thread, its primary one unless another already was. Afterwards: what was before."""
    if current_device() == device:
        yield
        return
    former = _handle("cuCtxGetCurrent")
    bind(device)
    try:
        yield
    finally:
        _call("cuCtxSetCurrent", former)


# Kernels


def launch(config: int, function: int, params: int, device: int) -> None:
    """cuLaunchKernelEx. `config`: address of a LaunchConfig; `params`: address of an array of pointers to the kernel's arguments.

    `device` is the function's: a thread without a context gets its primary one and keeps it, a thread that is on another device visits it.
    """
    result = launch_ex(config, function, params, None)
    if result:
        relaunch(config, function, params, device, result)


def relaunch(config: int, function: int, params: int, device: int, result: int) -> None:
    """What `launch` does about a `result` that is not 0: bind or visit the device and try once more, else CudaError."""
    library = _library or _load()
    if result in _WRONG_CONTEXT:
        if result == _CONTEXT_IS_DESTROYED:
            _primary.pop(device, None)
        current = current_device()
        if current is None:
            bind(device)
            result = launch_ex(config, function, params, None)
        elif current != device:
            with on_device(device):
                result = launch_ex(config, function, params, None)
    if result:
        c = LaunchConfig.from_address(config)
        what = f"grid {tuple(c.grid)}, block {tuple(c.block)}, {c.smem} bytes of dynamic shared memory, device {device}"
        raise CudaError(f"{_text(library, 'cuLaunchKernelEx', result)}; {what}")


def set_max_dynamic_smem(function: int, size: int) -> None:
    """Allow launches of `function` with up to `size` bytes of dynamic shared memory; needed above 48 KB."""
    _call("cuFuncSetAttribute", function, 8, size)  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def occupancy(function: int, threads: int, smem: int) -> int:
    """Blocks of `threads` threads and `smem` bytes of dynamic shared memory that run at once on one multiprocessor."""
    return _int("cuOccupancyMaxActiveBlocksPerMultiprocessor", function, threads, smem)


_UINT8, _UINT16 = 0, 1  # CUtensorMapDataType
_SWIZZLE_128B, _L2_256B = 3, 3


def tensor_map(pointer: int, itemsize: int, size: Sequence[int], pitches: Sequence[int], box: Sequence[int]) -> bytes:
    """The 128 bytes by which TMA knows an array of values of 1 or 2 bytes: cuTensorMapEncodeTiled, 128-byte swizzle, zeros from outside.

    size, box: values along each axis, the contiguous one first. pitches: bytes from one to the next along the others.
    """
    rank = len(size)
    memory = ctypes.create_string_buffer(192)
    start = -ctypes.addressof(memory) % 64  # where the driver wants it
    _call(
        "cuTensorMapEncodeTiled",
        ctypes.addressof(memory) + start, _UINT8 if itemsize == 1 else _UINT16, rank, pointer, (ctypes.c_uint64 * rank)(*size),
        (ctypes.c_uint64 * (rank - 1))(*pitches), (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank), 0, _SWIZZLE_128B,
        _L2_256B, 0,
    )  # fmt: skip
    return memory.raw[start : start + 128]


# Streams, events, memory. Streams: 0 or 1 legacy default, 2 per-thread default, else a CUstream.


def is_capturing(stream: int) -> bool:
    """Is the stream being captured into a graph? For the legacy default stream: does a capture forbid its use?"""
    library = _library or _load()
    status = ctypes.c_int()
    result = library.cuStreamIsCapturing(stream, ctypes.byref(status))
    if result == _CAPTURE_IMPLICIT:
        return True
    if result == _INVALID_CONTEXT and current_device() is None:
        return False  # a default stream of a thread that has no context yet
    if result:
        raise CudaError(_text(library, "cuStreamIsCapturing", result))
    return status.value != 0


def synchronize(stream: int) -> None:
    """Wait for everything enqueued on a stream."""
    _call("cuStreamSynchronize", stream)


def copy_to_host(target: int, source: int, size: int) -> None:
    """Copy `size` bytes of device memory to host memory, and wait."""
    _call("cuMemcpyDtoH_v2", target, source, size)


def event_create() -> int:
    """A new event of the current context, without timing."""
    return _handle("cuEventCreate", 2)  # CU_EVENT_DISABLE_TIMING


def event_record(event: int, stream: int) -> None:
    """Mark the present end of the stream, which must be of the event's context."""
    _call("cuEventRecord", event, stream)


def event_done(event: int) -> bool:
    """Has everything ahead of the mark ended? True before the first `event_record`."""
    library = _library or _load()
    result = library.cuEventQuery(event)
    if result not in (0, _NOT_READY):
        raise CudaError(_text(library, "cuEventQuery", result))
    return bool(result == 0)


def event_destroy(event: int) -> None:
    _call("cuEventDestroy_v2", event)


def memset_2d(ptr: int, pitch: int, width: int, height: int, stream: int) -> None:
    """Fill `height` rows of `width` bytes, `pitch` bytes apart, with zeros, in stream order."""
    _call("cuMemsetD2D8Async", ptr, pitch, 0, width, height, stream)
