"""The boundary: any framework's array becomes a `View`, and results go back as arrays of the caller's framework.

Frameworks are recognised through `sys.modules` and never imported. Each is one small class with the same six methods; a plain DLPack
producer is the last of them. JAX arrays do not pass here: XLA owns their memory, so they go through `cugemm.adapters.jax`.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cugemm import dlpack, driver

HOST = -1
"""`View.device` of host memory; CUDA devices have their ordinal."""

Array = NDArray[Any]
Match = Callable[[tuple[Any, ...]], "list[int] | None"]
"""Recognises the arrays of a bound call: their addresses if everything but those is as it was, else None."""


class View(NamedTuple):
    """An array without its framework. Strides count elements of `dtype`; `ptr` is 0 where there is no memory (meta, Spec, empty)."""

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int = HOST
    readonly: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def span(self) -> int:
        """Bytes from the first to one past the last element."""
        if self.size == 0:
            return 0
        return (1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))) * itemsize(self.dtype)


class Spec:
    """Stands for an array in `plan`, `explain` and `warmup`: a shape, a dtype name or object, and where it would live."""

    def __init__(self, shape: Sequence[int], dtype: Any, *, strides: Sequence[int] | None = None, device: int = 0) -> None:
        for role, sizes in (("shape", shape), ("strides", () if strides is None else strides)):
            if isinstance(sizes, str) or not isinstance(sizes, Iterable) or not all(isinstance(n, Integral) for n in sizes):
                raise TypeError(f"Spec: {role} is {sizes!r}; pass ints, one for each axis.")
        if isinstance(device, bool) or not isinstance(device, Integral) or device < HOST:
            raise TypeError(f"Spec: device is {device!r}; pass the number of a GPU, or {HOST} for the host.")
        try:
            name = dtype_name("" if dtype is None else dtype)
            itemsize(name)
        except TypeError:
            raise TypeError(
                f"Spec: {dtype!r} is not a dtype; pass a name such as 'bfloat16' or a NumPy, ml_dtypes or torch dtype."
            ) from None
        self.shape: tuple[int, ...] = tuple(int(n) for n in shape)
        self.dtype: str = name
        self.strides: tuple[int, ...] = dense_strides(self.shape) if strides is None else tuple(int(s) for s in strides)
        self.device: int = int(device)
        if any(n < 0 for n in self.shape):
            raise ValueError(f"Spec: shape {self.shape} has a negative size; pass sizes of 0 and more.")
        if len(self.strides) != len(self.shape):
            raise ValueError(f"Spec: strides {self.strides} and shape {self.shape} differ in length; give one stride per axis.")

    @property
    def T(self) -> Spec:  # noqa: N802 - what every framework calls it
        return Spec(self.shape[::-1], self.dtype, strides=self.strides[::-1], device=self.device)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __repr__(self) -> str:
        return f"Spec({self.shape}, {self.dtype!r})"


@functools.lru_cache(maxsize=4096)
def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides as frameworks give them to fresh arrays: an axis of length 0 counts as 1."""
    strides: list[int] = []
    step = 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def _extended(name: str) -> type[np.generic] | None:
    """The scalar type that ml_dtypes adds under this name."""
    found = getattr(ml_dtypes, name, None)
    return found if isinstance(found, type) and issubclass(found, np.generic) else None


_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {"float4_e2m1fn_x2": np.dtype(np.uint8)}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy / ml_dtypes dtype of a dtype name."""
    found = _NUMPY_DTYPES.get(name)
    if found is None:
        scalar = _extended(name)
        found = _NUMPY_DTYPES[name] = np.dtype(name if scalar is None else scalar)
    return found


def itemsize(name: str) -> int:
    return int(numpy_dtype(name).itemsize)


def dtype_name(dtype: Any) -> str:
    """Canonical name of a dtype given as a name, a NumPy / ml_dtypes / jnp dtype or a torch.dtype; TypeError if it is none of them."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        return str(dtype).removeprefix("torch.")
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        if _extended(name) is not None or name in _NUMPY_DTYPES:
            return name
    if isinstance(dtype, type) or not hasattr(dtype, "__array__"):
        try:
            return str(np.dtype(dtype).name)
        except (TypeError, ValueError):
            pass
    shown = f"{type(dtype).__name__} array" if hasattr(dtype, "shape") and not isinstance(dtype, type) else repr(dtype)
    raise TypeError(f"{shown} is not a dtype; pass a name such as 'bfloat16' or a NumPy, ml_dtypes or torch dtype.")


def host_array(view: View) -> Array:
    """A NumPy array over a host view's memory. The caller keeps the memory alive."""
    dtype = numpy_dtype(view.dtype)
    if view.size == 0:
        return np.empty(view.shape, dtype)
    memory: Any = (ctypes.c_char * view.span()).from_address(view.ptr)
    over: Array = np.ndarray(view.shape, dtype, memory, strides=tuple(s * dtype.itemsize for s in view.strides))
    return over


def share_bytes(a: View, b: View) -> bool:
    """Whether two views share a byte: exact for slices of one buffer with one pitch (fused QKV), byte intervals otherwise."""
    if a.device != b.device or a.size == 0 or b.size == 0 or a.ptr >= b.ptr + b.span() or b.ptr >= a.ptr + a.span():
        return False
    rows_a, rows_b = _rows(a), _rows(b)
    if rows_a is None or rows_b is None or rows_a[0] != rows_b[0]:
        return True
    pitch, width = rows_a
    offset = (b.ptr - a.ptr) % pitch
    return offset < width or offset + rows_b[1] > pitch


def _rows(view: View) -> tuple[int, int] | None:
    """(pitch, width) in bytes of a view made of equal rows at multiples of one pitch; None where it is not."""
    size = itemsize(view.dtype)
    axes = sorted((s, n) for n, s in zip(view.shape, view.strides, strict=True) if n > 1)
    if len(axes) < 2 or axes[0][0] != 1:
        return None
    pitch, width = axes[1][0] * size, axes[0][1] * size
    return (pitch, width) if width <= pitch and all(s * size % pitch == 0 for s, _ in axes[1:]) else None


# --- frameworks -------------------------------------------------------------------------------------------------------------------


class Framework:
    """What the library asks of an array framework. `name` is what messages call it."""

    name = ""

    def view(self, x: Any, role: str) -> View:
        """Pointer, shape, strides, dtype, device; TypeError naming `role` where the value cannot be read from memory."""
        raise NotImplementedError

    def placeholder(self, shape: tuple[int, ...], dtype: str, like: Any, device: int) -> Any:
        """What `empty` returns, but abstract like `like`."""
        return self.empty(shape, dtype, like, device)

    def matcher(self, arrays: tuple[Any, ...], pick: Callable[[tuple[Any, ...]], Sequence[Any]]) -> Match:
        """A Match for calls like this one; `pick` takes the arrays out of a call's arguments."""
        wanted = [self.look(x) for x in pick(arrays)]

        def same(*present: Any) -> bool:
            return [self.look(x) for x in present] == wanted

        return self.match(same, arrays, pick)

    def match(self, same: Callable[..., bool], arrays: tuple[Any, ...], pick: Callable[[tuple[Any, ...]], Sequence[Any]]) -> Match:
        """`same` recognises everything but the addresses; of these only the operands' alignment matters to a plan."""
        address = self.pointer
        pointers = [address(x) for x in pick(arrays)]
        second = min(1, len(pointers) - 1)
        unaligned = bool((pointers[0] | pointers[second]) & 15)

        def match(arguments: tuple[Any, ...]) -> list[int] | None:
            present = pick(arguments)
            if not same(*present):
                return None
            found = [address(x) for x in present]
            return found if bool((found[0] | found[second]) & 15) == unaligned else None

        return match

    def look(self, x: Any) -> tuple[Any, ...]:
        """Everything a bound call depends on but the address."""
        raise NotImplementedError

    def pointer(self, x: Any) -> int:
        """Address of an array this framework has just allocated."""
        return self.view(x, "result").ptr

    def abstract(self, x: Any) -> bool:
        """True where `x` has a shape and no memory (meta and fake tensors, Spec)."""
        return False

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: int) -> Any:
        """A fresh row-major array, allocated on the device (and stream) of `like`."""
        raise NotImplementedError

    def stream(self, device: int) -> int:
        """Handle of the framework's current stream on `device`."""
        raise NotImplementedError

    def release(self, result: Any, like: Any) -> Any:
        """The allocated result as the caller receives it."""
        return result

    def differentiable(self, arrays: tuple[Any, ...]) -> bool:
        """True where an operand asks for gradients, which `guard` then has to refuse."""
        return False

    def guard(self, name: str, arrays: tuple[Any, ...], result: Any) -> Any:
        """`result` such that asking for its gradient is an error that names the function (R9)."""
        return result

    def refuse_out(self, name: str, out: Any, arrays: tuple[Any, ...]) -> None:
        """Raise where writing `out` would escape the framework's autograd (R8)."""

    def written(self, out: Any) -> None:
        """Called after `out=` has been written (or its write enqueued)."""


def _checked_strides(strides: Sequence[int], size: int, role: str) -> tuple[int, ...]:
    steps, ragged = zip(*(divmod(s, size) for s in strides), strict=True) if strides else ((), ())
    if any(ragged):
        raise ValueError(f"{role}: strides of {tuple(strides)} bytes are not whole elements of {size} bytes; pass a contiguous copy.")
    return tuple(steps)


class Numpy(Framework):
    name = "NumPy"

    def view(self, x: Any, role: str) -> View:
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(f"{role} is a NumPy masked array, whose mask would be lost; pass x.filled(value).")
        if not x.dtype.isnative:
            raise TypeError(f"{role} has byte order {x.dtype.str!r}; pass x.astype(x.dtype.newbyteorder('=')).")
        strides = _checked_strides(x.strides, x.itemsize, role)
        return View(x.ctypes.data, x.shape, strides, str(x.dtype.name), HOST, not x.flags.writeable)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: int) -> Any:
        return np.empty(shape, numpy_dtype(dtype))

    def stream(self, device: int) -> int:
        return 0


class Cupy(Framework):
    name = "CuPy"

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._current = cupy.cuda.get_current_stream

    def view(self, x: Any, role: str) -> View:
        strides = _checked_strides(x.strides, x.dtype.itemsize, role)
        return View(int(x.data.ptr), x.shape, strides, str(x.dtype.name), int(x.device.id))

    def pointer(self, x: Any) -> int:
        return x.data.ptr  # type: ignore[no-any-return]

    def look(self, x: Any) -> tuple[Any, ...]:
        return x.shape, x.strides, x.dtype, x.data.device_id

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: int) -> Any:
        with self._cupy.cuda.Device(device):
            if itemsize(dtype) == 1 and dtype not in ("uint8", "int8"):
                # CuPy refuses to allocate the ml_dtypes 8-bit floats but lets bytes be viewed as them.
                return self._cupy.empty(shape, "uint8").view(numpy_dtype(dtype))
            return self._cupy.empty(shape, numpy_dtype(dtype))

    def stream(self, device: int) -> int:
        return int(self._current(device).ptr)


class Torch(Framework):
    name = "PyTorch"

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self.pointer = torch.Tensor.data_ptr  # type: ignore[method-assign]
        self._increment_version = getattr(torch._C, "_increment_version", None) or torch.autograd.graph.increment_version
        self._dtypes: dict[str, Any] = {}
        self._raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        self._current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
        # The allocator without the dispatcher in front of it, as torch.compile's own code calls it: 2.6 us beside 5.8 for new_empty.
        guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
        self._empty_cuda = getattr(guards, "_empty_strided_cuda", None)
        # One C++ call that compares type, dtype, device, shape, strides, neg bit and (in grad mode) requires_grad of several tensors.
        self._guards = getattr(guards, "TensorGuards", None)

    def dtype(self, name: str) -> Any:
        found = self._dtypes.get(name)
        if found is None:
            found = self._dtypes[name] = getattr(self._torch, name)
        return found

    def abstract(self, x: Any) -> bool:
        return x.device.type == "meta" or type(x).__name__ in ("FakeTensor", "FunctionalTensor")

    def view(self, x: Any, role: str) -> View:
        torch = self._torch
        if x.layout is not torch.strided or x.is_quantized or x.is_nested:
            kind = "nested" if x.is_nested else "quantized" if x.is_quantized else str(x.layout).removeprefix("torch.")
            raise TypeError(f"{role} is a {kind} torch tensor; pass a dense strided one (x.to_dense(), x.dequantize() or padded).")
        if x.is_neg() or x.is_conj():
            fix = "x.resolve_neg()" if x.is_neg() else "x.resolve_conj()"
            raise TypeError(f"{role} is a lazily negated or conjugated view, whose memory holds other values; pass {fix}.")
        where = x.device
        abstract = self.abstract(x)
        if where.type not in ("cpu", "cuda", "meta"):
            raise TypeError(f"{role} lives on a torch device of type {where.type!r}; move it to 'cuda' or 'cpu'.")
        device = HOST if where.type != "cuda" else where.index or 0
        ptr = 0 if abstract else x.data_ptr()
        if ptr == 0 and x.numel() > 0 and not abstract:
            raise TypeError(f"{role} is a {type(x).__name__}, which has no memory of its own; pass .to_local() or a plain tensor.")
        name = str(x.dtype).removeprefix("torch.")
        return View(ptr, tuple(x.shape), tuple(x.stride()), name, device)

    def matcher(self, arrays: tuple[Any, ...], pick: Callable[[tuple[Any, ...]], Sequence[Any]]) -> Match:
        present = pick(arrays)
        if self._guards is None or len(set(map(id, present))) < len(present):  # guards refuse a tensor that comes twice
            return super().matcher(arrays, pick)
        sizes, strides = [list(x.shape) for x in present], [list(x.stride()) for x in present]
        guards = self._guards(*present, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        return self.match(guards.check, arrays, pick)

    def look(self, x: Any) -> tuple[Any, ...]:
        grad = x.requires_grad and self._torch.is_grad_enabled()
        return x.shape, x.stride(), x.dtype, x.get_device(), grad, x.is_neg()

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: int) -> Any:
        torch_dtype = self._dtypes.get(dtype) or self.dtype(dtype)
        if self._empty_cuda is not None and device != HOST and self._current_device() == device:
            return self._empty_cuda(shape, dense_strides(shape), torch_dtype)
        return like.new_empty(shape, dtype=torch_dtype)

    def placeholder(self, shape: tuple[int, ...], dtype: str, like: Any, device: int) -> Any:
        return like.new_empty(shape, dtype=self.dtype(dtype))

    def stream(self, device: int) -> int:
        if self._raw_stream is None:
            raise TypeError("this build of torch has no CUDA; install a CUDA build or pass CPU tensors.")
        return int(self._raw_stream(device))

    def differentiable(self, arrays: tuple[Any, ...]) -> bool:
        return any(getattr(x, "requires_grad", False) for x in arrays)

    def guard(self, name: str, arrays: tuple[Any, ...], result: Any) -> Any:
        if not self._torch.is_grad_enabled():
            return result
        from cugemm.adapters import torch as adapter  # noqa: PLC0415 - imports torch

        return adapter.without_backward(name, arrays, result)

    def refuse_out(self, name: str, out: Any, arrays: tuple[Any, ...]) -> None:
        if self._torch.is_grad_enabled() and self.differentiable((*arrays, out)):
            raise ValueError(f"{name}: out= cannot be differentiated through; drop out=, or call under torch.no_grad().")

    def written(self, out: Any) -> None:
        try:  # noqa: SIM105 - contextlib.suppress costs a microsecond here
            self._increment_version((out,))
        except RuntimeError:
            pass  # an inference tensor has no version


class Dlpack(Framework):
    """Any other producer of DLPack capsules. Results go back through its own `from_dlpack` where its namespace has one."""

    name = "DLPack"

    def __init__(self, kind: str) -> None:
        self.name = kind

    def open(self, x: Any, role: str) -> tuple[Any, View]:
        """The capsule, which keeps the memory, and its view. On a GPU the producer makes its work visible to CuPy's current stream."""
        kind, device = x.__dlpack_device__()
        on_gpu = kind in (dlpack.CUDA, dlpack.CUDA_MANAGED)
        # DLPack calls the legacy default stream 1; 0 is not allowed.
        try:
            capsule, t = dlpack.read(x, (self.stream(device) or 1) if on_gpu else None)
        except TypeError as error:
            raise TypeError(f"{role} is a {type(x).__name__} that cannot be read: {error}.") from error
        if t.ptr == 0 and math.prod(t.shape) > 0:
            raise TypeError(f"{role} is a {type(x).__name__} whose DLPack pointer is null; pass an array that owns memory.")
        return capsule, View(t.ptr, t.shape, t.strides, t.dtype, device if on_gpu else HOST, t.readonly)

    def view(self, x: Any, role: str) -> View:
        return self.open(x, role)[1]

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: int) -> Any:
        return (_NUMPY if device == HOST else cupy_framework()).empty(shape, dtype, None, device)

    def pointer(self, x: Any) -> int:
        return cupy_framework().pointer(x)

    def stream(self, device: int) -> int:
        return cupy_framework().stream(device)

    def release(self, result: Any, like: Any) -> Any:
        namespace = getattr(like, "__array_namespace__", None)
        if namespace is not None and hasattr(namespace(), "from_dlpack"):
            try:
                return namespace().from_dlpack(result)
            except (TypeError, BufferError, ValueError):
                pass  # the producer's namespace has no such dtype: the CuPy or NumPy array is the DLPack object
        return result


class SpecFramework(Framework):
    name = "Spec"

    def abstract(self, x: Any) -> bool:
        return True

    def view(self, x: Any, role: str) -> View:
        if isinstance(x, Spec):
            return View(0, x.shape, x.strides, x.dtype, x.device)
        return View(0, tuple(x.shape), dense_strides(tuple(x.shape)), dtype_name(x.dtype), 0)  # jax.ShapeDtypeStruct

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: int) -> Any:
        return Spec(shape, dtype, device=device)


class Jax(Framework):
    """Calls with JAX arrays leave for `cugemm.adapters.jax` before anything is read; only planning looks at their shapes here."""

    name = "JAX"

    def abstract(self, x: Any) -> bool:
        return True

    def view(self, x: Any, role: str) -> View:
        on_host = hasattr(x, "devices") and all(device.platform == "cpu" for device in x.devices())
        return View(0, tuple(x.shape), dense_strides(tuple(x.shape)), dtype_name(x.dtype), HOST if on_host else 0)


_NUMPY = Numpy()
SPEC = SpecFramework()
_JAX = Jax()
_CUPY: Cupy | None = None
_TORCH: Torch | None = None
_BY_TYPE: dict[type, Framework] = {np.ndarray: _NUMPY, Spec: SPEC}


def cupy_framework() -> Cupy:
    global _CUPY
    if _CUPY is None:
        try:
            import cupy  # noqa: PLC0415 - CUDA arrays of an unknown framework need CuPy to hold the result
        except ImportError as error:
            raise ImportError('CUDA arrays need CuPy: pip install "cugemm[cuda12]" or "cugemm[cuda13]".') from error
        _CUPY = Cupy(cupy)
    return _CUPY


def framework_of(x: Any, role: str) -> Framework:
    """The framework of an operand; TypeError for anything that is not an array (R1)."""
    found = _BY_TYPE.get(type(x))
    if found is None:
        found = _BY_TYPE[type(x)] = _detect(x, role)
    return found


def _detect(x: Any, role: str) -> Framework:
    global _TORCH
    modules = sys.modules
    torch, cupy, jax = modules.get("torch"), modules.get("cupy"), modules.get("jax")
    if torch is not None and isinstance(x, torch.Tensor):
        if _TORCH is None:
            _TORCH = Torch(torch)
        return _TORCH
    if cupy is not None and isinstance(x, cupy.ndarray):
        return cupy_framework()
    if jax is not None and isinstance(x, (jax.Array, jax.core.Tracer)):
        return _JAX
    if jax is not None and isinstance(x, jax.ShapeDtypeStruct):
        return SPEC
    if isinstance(x, np.ndarray):
        return _NUMPY
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return Dlpack(type(x).__name__)
    hint = "np.asarray(x) or its torch, CuPy or JAX counterpart" if isinstance(x, (list, tuple)) else "an array"
    raise TypeError(
        f"{role} is a {type(x).__module__}.{type(x).__name__}; pass {hint} "
        "(torch.Tensor, cupy.ndarray, jax.Array, numpy.ndarray or an object with __dlpack__)."
    )


def is_scalar(x: Any) -> bool:
    """A Python or NumPy number that can be a scale; no bool, complex or string."""
    if isinstance(x, (int, float, np.integer, np.floating)):
        return not isinstance(x, bool)
    return isinstance(x, np.generic) and hasattr(ml_dtypes, type(x).__name__)


class Held:
    """DLPack capsules whose memory a running kernel may read: kept until an event recorded after the launch has passed (R14)."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, int, list[Any]]] = []
        self._lock = threading.Lock()

    def keep(self, capsules: list[Any], device: int, stream: int) -> None:
        with self._lock, driver.on_device(device):
            event = driver.event_create()
            driver.event_record(event, stream)
            self._pending.append((device, event, capsules))
            waiting = []
            for entry in self._pending:
                if entry[0] == device and driver.event_done(entry[1]):
                    driver.event_destroy(entry[1])
                else:
                    waiting.append(entry)
            self._pending = waiting


HELD = Held()
