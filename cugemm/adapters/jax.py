"""JAX: eager arrays and `jax.jit` enter every operation through one XLA-FFI handler, written with ctypes.

    run -> op.check on shapes -> primitive "cugemm" -> XLA custom call -> _handle -> launch.run_views

XLA allocates the results and owns the lifetime of operands; the kernel runs on XLA's stream. (Reading a JAX array's pointer and launching
on a stream of our own is a use after free: XLA reuses the memory once the Python object dies.) All that the handler knows travels in the
custom call as one JSON attribute, so compiled programs survive XLA's persistent cache and `jax.export`.

The C structs are those of xla/ffi/api/c_api.h, API 0.1 to 0.3 (it only appends to them; https://github.com/openxla/xla).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.ffi
import numpy as np
from jax.interpreters import ad, batching, mlir

from cugemm import driver
from cugemm.arrays import HOST, View, dense_strides, is_scalar, numpy_dtype

TARGET = "cugemm"

Array = tuple[tuple[int, ...], str]


class Spec(NamedTuple):
    """What a compiled call is: the JSON attribute of the custom call. Everything of a handler's buffers but the pointers is here."""

    op: str
    options_type: str  # module:name
    options: Any
    arguments: tuple[Array | None, ...]  # (shape, dtype name) as JAX counts them
    outputs: tuple[Array, ...]
    workspaces: tuple[Array, ...]  # more results of the custom call, dropped


# Entrance: what api functions call


def run(op: Any, arrays: tuple[Any, ...], options: Any) -> Any:
    """`op` on JAX arrays or tracers: one jax.Array, or a tuple of them where the operation has several outputs.

    `arrays` follow `op.roles`: jax.Array, Tracer, Python or NumPy scalar (passed as a float32 array of rank 0), or None.
    TypeError: an array of another framework, one spread over several devices, two devices, `out=`, float4 with an odd last axis,
    differentiation, vmap. Everything else that `op.check` raises comes as it is, while tracing.
    """
    device, sharding, traced = None, None, False
    operands: list[Any] = []
    scalars: list[int] = []
    for i, x in enumerate(arrays):
        if x is None:
            continue
        if isinstance(x, jax.core.Tracer):
            traced = True
        elif isinstance(x, jax.Array):
            if x.sharding is not sharding:  # arrays of one device mostly share the object, and looking it up costs as much as the rest
                sharding = x.sharding
                device = _device_of(op, arrays, i, device)
        elif is_scalar(x):
            scalars.append(len(operands))
        elif op.roles[i] == "out":
            raise TypeError(f"{op.name}: JAX arrays are immutable: drop out=")
        else:
            raise TypeError(
                f"{op.name}: {op.roles[i]} is a {type(x).__module__}.{type(x).__name__}, other arguments are JAX arrays; pass a jax.Array."
            )
        operands.append(x)
    pattern = tuple([x is not None for x in arrays])
    if scalars:
        like = next(x for x in operands if isinstance(x, jax.Array))  # a number where an array is wanted is for op.check to refuse
        for i in scalars:
            operands[i] = _scalar(operands[i], traced, like)
    if traced:
        return _bind(op, pattern, options, _ordinal(device or _default_device()), *operands)
    key = (op.name, pattern, options, device)
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = _compiled[key] = jax.jit(functools.partial(_bind, op, pattern, options, _ordinal(device)))
    return compiled(*operands)


def _scalar(value: Any, traced: bool, like: Any) -> Any:
    """A host scalar as an operand. On the device once and for all where it can be: XLA takes 10 us to bring a new one there."""
    number = np.float32(value)
    if traced:
        return number
    key = (number.tobytes(), like.sharding if like.committed else None)
    found = _scalars.get(key)
    if found is None:
        found = jax.device_put(number, key[1])
        if isinstance(found, jax.core.Tracer):  # all operands are constants of a program being traced
            return number
        if len(_scalars) >= 256:
            _scalars.clear()
        _scalars[key] = found
    return found


_scalars: dict[tuple[bytes, Any], Any] = {}

_compiled: dict[tuple[str, tuple[bool, ...], Any, Any], Any] = {}
"""The jitted functions of eager calls; their own caches tell shapes apart. Tracing one raises what `op.check` raises."""


def _bind(op: Any, pattern: tuple[bool, ...], options: Any, device: int, *operands: Any) -> Any:
    """Check the call on shapes and put it into the program being traced."""
    arguments: list[Array | None] = []
    views: list[View | None] = []
    remaining = iter(operands)
    for role, present in zip(op.roles, pattern, strict=True):
        if not present:
            arguments.append(None)
            views.append(None)
            continue
        if role == "out":
            raise TypeError(f"{op.name}: JAX arrays are immutable: drop out=")
        x = next(remaining)
        shape, dtype = x.shape, x.dtype.name
        if dtype == "float4_e2m1fn" and (not shape or shape[-1] % 2):
            raise TypeError(f"{op.name}: {role} is {dtype} of shape {shape}, whose rows share bytes; pad its last axis to an even length.")
        if dtype == "float4_e2m1fn" and role == op.roles[1] and getattr(options, "b_axes", "nk") == "kn":
            raise TypeError(f"{op.name}: {role} is {dtype} of shape {shape}, which JAX packs along n; pass it as [n, k] to cugemm.linear.")
        arguments.append((shape, dtype))
        views.append(_view(0, shape, dtype, device))
    call = op.check(tuple(views), options)
    options_type = f"{type(options).__module__}:{type(options).__qualname__}"
    spec = Spec(op.name, options_type, tuple(options), tuple(arguments), call.outputs, call.workspaces)
    attribute = json.dumps(spec, allow_nan=False)
    _known[attribute.encode()] = _understand(op, spec, options)
    results = _primitive.bind(*operands, call=attribute, results=(*call.outputs, *call.workspaces))
    kept = tuple(results[: len(call.outputs)])
    return kept[0] if len(kept) == 1 else kept


def _view(ptr: int, shape: tuple[int, ...], dtype: str, device: int) -> View:
    """A row-major view. XLA's float4 counts values and packs two a byte, low nibble first: named like torch's, in bytes."""
    if dtype == "float4_e2m1fn":
        shape, dtype = (*shape[:-1], shape[-1] // 2), "float4_e2m1fn_x2"
    return View(ptr, shape, dense_strides(shape), dtype, device)


def _device_of(op: Any, arrays: tuple[Any, ...], at: int, former: Any) -> Any:
    """The device of argument `at`, which must be `former` if there is one."""
    where = _single_device(arrays[at].sharding)
    if where is None:
        raise TypeError(
            f"{op.name}: {op.roles[at]} is spread over {len(arrays[at].sharding.device_set)} devices; "
            "use shard_map, so that each device multiplies its own block."
        )
    if former is not None and where is not former:
        first = next(i for i, x in enumerate(arrays) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer))
        raise TypeError(f"{op.name}: {op.roles[first]} is on {former}, but {op.roles[at]} is on {where}; move one with jax.device_put.")
    return where


@functools.lru_cache(maxsize=1024)
def _single_device(sharding: Any) -> Any:
    devices = sharding.device_set
    return next(iter(devices)) if len(devices) == 1 else None


def _ordinal(device: Any) -> int:
    """View.device of a JAX device."""
    return HOST if device.platform == "cpu" else int(device.local_hardware_id or 0)


def _default_device() -> Any:
    """Where a program that is being traced will probably run; a tracer does not know."""
    chosen = jax.config.jax_default_device
    if chosen is None or isinstance(chosen, str):
        chosen = jax.local_devices(backend=chosen)[0]
    return chosen


# The primitive

_primitive = jax.extend.core.Primitive("cugemm")
_primitive.multiple_results = True


def _abstract(*avals: Any, call: str, results: tuple[tuple[tuple[int, ...], str], ...]) -> list[Any]:
    return [jax.core.ShapedArray(shape, numpy_dtype(dtype)) for shape, dtype in results]


def _evaluate(*operands: Any, call: str, results: Any) -> Any:
    """The primitive on concrete arrays: what a transformation, such as jax.grad beside jax.lax.stop_gradient, leaves outside of jit."""
    with jax.disable_jit(False):  # under disable_jit() the jitted primitive would come back here
        return _evaluator(call, results)(*operands)


@functools.lru_cache(maxsize=1024)
def _evaluator(call: str, results: Any) -> Any:
    return jax.jit(functools.partial(_primitive.bind, call=call, results=results))


def _lower(context: Any, *operands: Any, call: str, results: Any) -> Any:
    if getattr(context.module_context.axis_context, "num_devices", 1) not in (None, 1):
        raise TypeError(f"{_name(call)}: the program runs on several devices; use shard_map, so that each device multiplies its own block.")
    return jax.ffi.ffi_lowering(TARGET)(context, *operands, call=call)


def _lower_elsewhere(context: Any, *operands: Any, call: str, results: Any) -> Any:
    platforms = ", ".join(context.module_context.platforms)
    raise TypeError(
        f"{_name(call)}: cugemm runs on CPUs and NVIDIA GPUs, not on {platforms}; place the arrays on one of jax.devices('cuda')."
    )


def _no_derivative(primals: Any, tangents: Any, *, call: str, results: Any) -> Any:
    raise TypeError(
        f"{_name(call)} has no derivative: cugemm computes inference only; put jax.lax.stop_gradient around its operands, "
        "or give the function that calls it a derivative with jax.custom_vjp."
    )


def _no_batching(operands: Any, axes: Any, *, call: str, results: Any) -> Any:
    raise TypeError(
        f"{_name(call)} cannot be vmapped; pass the batch as an axis of a batched function (bmm_fp8, matmul), or loop with jax.lax.map."
    )


def _name(call: str) -> str:
    return str(json.loads(call)[0])


_primitive.def_abstract_eval(_abstract)
_primitive.def_impl(_evaluate)
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(_primitive, _lower, platform=_platform)
mlir.register_lowering(_primitive, _lower_elsewhere)
ad.primitive_jvps[_primitive] = _no_derivative
batching.primitive_batchers[_primitive] = _no_batching


# The handler

_Word = ctypes.c_uint64
_Frame = _Word * 21
"""XLA_FFI_CallFrame up to its attributes, as 64-bit words, indices below. Sliced at once: three times faster than a Structure."""
_EXTENSION, _API, _CONTEXT, _STAGE = 1, 2, 3, 4
_ARGS, _ARG_POINTERS, _RETS, _RET_POINTERS, _ATTRIBUTE_POINTERS = 7, 9, 12, 14, 20
_DATA = 24  # offset of XLA_FFI_Buffer.data, bytes
_EXTENSION_METADATA, _STAGE_EXECUTE, _CODE_INTERNAL = 1, 3, 13
_ERROR_CREATE, _STREAM_GET, _DEVICE_ORDINAL_GET = 0, 4, 17  # places in XLA_FFI_Api.functions


def _struct(name: str, **fields: Any) -> Any:
    """A struct of c_api.h: each begins with its size and a list of extensions."""
    head = [("struct_size", ctypes.c_size_t), ("extension", ctypes.c_void_p)]
    return type(name, (ctypes.Structure,), {"_fields_": [*head, *fields.items()]})


_ErrorArgs = _struct("XLA_FFI_Error_Create_Args", message=ctypes.c_char_p, code=ctypes.c_int)
_StreamArgs = _struct("XLA_FFI_Stream_Get_Args", context=ctypes.c_void_p, stream=ctypes.c_void_p)
_OrdinalArgs = _struct("XLA_FFI_DeviceOrdinal_Get_Args", context=ctypes.c_void_p, ordinal=ctypes.c_int32)
_Version = _struct("XLA_FFI_Api_Version", major=ctypes.c_int, minor=ctypes.c_int)
_Api = _struct("XLA_FFI_Api", version=_Version, internal=ctypes.c_void_p, functions=ctypes.c_void_p * 18)


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("api_version", _Version), ("traits", ctypes.c_uint32))


class _Extension(ctypes.Structure):  # XLA_FFI_Metadata_Extension; all extensions begin with its first three fields
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(_Metadata)),
    )


class _Functions:
    """The callbacks of one XLA_FFI_Api."""

    def __init__(self, api: int) -> None:
        struct = _Api.from_address(api)
        count = (struct.struct_size - _Api.functions.offset) // 8  # newer XLA appends functions, older lacks the last ones
        prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
        self._create = prototype(struct.functions[_ERROR_CREATE])
        self._stream = prototype(struct.functions[_STREAM_GET])
        self._ordinal = prototype(struct.functions[_DEVICE_ORDINAL_GET]) if count > _DEVICE_ORDINAL_GET else None

    def error(self, text: str) -> int:
        """A new XLA_FFI_Error, which becomes XLA's."""
        args = _ErrorArgs(ctypes.sizeof(_ErrorArgs), None, text.encode(errors="replace").replace(b"\0", b"?"), _CODE_INTERNAL)
        return int(self._create(ctypes.addressof(args)))

    def stream(self, context: int) -> int:
        args = _StreamArgs(ctypes.sizeof(_StreamArgs), None, context)
        if self._stream(ctypes.addressof(args)):
            raise RuntimeError("XLA has no CUDA stream for this call")
        return args.stream or 0

    def ordinal(self, context: int) -> int:
        """The CUDA device; before jaxlib had a function for it, XLA at least makes its context current."""
        if self._ordinal is not None:
            args = _OrdinalArgs(ctypes.sizeof(_OrdinalArgs), None, context)
            if not self._ordinal(ctypes.addressof(args)):
                return int(args.ordinal)
        return driver.current_device() or 0


_functions = functools.cache(_Functions)


def _handle(address: int, on_gpu: bool) -> int | None:
    """XLA_FFI_Handler: None or an XLA_FFI_Error*. XLA calls it from threads of its own; an exception must not leave it."""
    frame = _Frame.from_address(address)[:]
    if frame[_EXTENSION] and _Extension.from_address(frame[_EXTENSION]).type == _EXTENSION_METADATA:
        _describe(frame)
        return None
    try:
        _execute(frame, on_gpu)
    except BaseException as error:  # KeyboardInterrupt too: there is no Python frame above
        return _functions(frame[_API]).error(f"{type(error).__name__}: {error}")
    return None


def _describe(frame: list[int]) -> None:
    """Answer XLA's question, at registration, for which API this handler was built: its own, as all structs used are the same since 0.1.

    NOTE: the trait COMMAND_BUFFER_COMPATIBLE is not set. XLA would record the call into a CUDA graph the first time it runs it, and a first
    call compiles and loads a module, which a capture forbids.
    """
    major, minor = 0, 1
    if frame[_API]:
        version = _Api.from_address(frame[_API]).version
        major, minor = version.major, version.minor
    metadata = _Extension.from_address(frame[_EXTENSION]).metadata.contents
    metadata.api_version = _Version(ctypes.sizeof(_Version), None, major, minor)
    metadata.traits = 0


def _execute(frame: list[int], on_gpu: bool) -> None:
    from cugemm import launch  # noqa: PLC0415 - launch imports this module

    if frame[_STAGE] & 0xFFFF_FFFF != _STAGE_EXECUTE:
        raise RuntimeError("called in another stage than execute")
    span = _Word.from_address(frame[_ATTRIBUTE_POINTERS]).value
    attribute = ctypes.string_at(*(_Word * 2).from_address(span)[:])
    known = _known.get(attribute) or _read(attribute)
    device, stream = HOST, 0
    if on_gpu:
        functions = _functions(frame[_API])
        device, stream = functions.ordinal(frame[_CONTEXT]), functions.stream(frame[_CONTEXT])
    pointers = [
        *(_Word * frame[_ARGS]).from_address(frame[_ARG_POINTERS])[:],
        *(_Word * frame[_RETS]).from_address(frame[_RET_POINTERS])[:],
    ]
    views = tuple([None if form is None else form.view(pointers, device) for form in known.arguments])
    outputs = tuple([form.view(pointers, device) for form in known.outputs])
    workspaces = tuple([form.view(pointers, device) for form in known.workspaces])
    with nullcontext() if on_gpu else _ieee():
        launch.run_views(known.op, views, known.options, outputs, workspaces, stream)


@contextmanager
def _ieee() -> Iterator[None]:
    """Subnormals count inside: XLA's CPU threads flush them to zero, and the reference must give the same bits everywhere."""
    if not _libm:
        yield
        return
    before = ctypes.create_string_buffer(256)  # fenv_t of any platform
    _libm[0].fegetenv(before)
    _libm[0].fesetenv(ctypes.c_void_p(-1))  # FE_DFL_ENV
    try:
        yield
    finally:
        _libm[0].fesetenv(before)


_libm = [ctypes.CDLL("libm.so.6")] if sys.platform == "linux" else []


class _Form(NamedTuple):
    """A View but for pointer and device, and which buffer of the call it is."""

    buffer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    def view(self, buffers: list[int], device: int) -> View:
        return View(_Word.from_address(buffers[self.buffer] + _DATA).value, self.shape, self.strides, self.dtype, device)


class _Known(NamedTuple):
    """A call's attribute, understood."""

    op: Any
    options: Any
    arguments: tuple[_Form | None, ...]
    outputs: tuple[_Form, ...]
    workspaces: tuple[_Form, ...]


_known: dict[bytes, _Known] = {}
"""The attribute of every call traced or met in this process."""


def _understand(op: Any, spec: Spec, options: Any) -> _Known:
    buffers = itertools.count()

    def form(array: Array) -> _Form:
        return _Form(next(buffers), *_view(0, tuple(array[0]), array[1], HOST)[1:4])

    arguments = tuple([None if array is None else form(array) for array in spec.arguments])
    return _Known(op, options, arguments, tuple(map(form, spec.outputs)), tuple(map(form, spec.workspaces)))


def _read(attribute: bytes) -> _Known:
    """Understand an attribute that was not traced in this process: the program comes from `jax.export`."""
    from cugemm import problem  # noqa: PLC0415 - only programs from elsewhere need it

    spec = Spec(*json.loads(attribute))
    module, _, name = spec.options_type.partition(":")
    if not module.startswith("cugemm."):  # the attribute may come from a file: import nothing else on its word
        raise TypeError(f"{spec.op}: options of unknown type {spec.options_type}")
    options = getattr(importlib.import_module(module), name)(*map(_tuples, spec.options))
    found = _known[attribute] = _understand(problem.OPS[spec.op], spec, options)
    return found


def _tuples(value: Any) -> Any:
    """JSON has lists where options have tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


_prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_handlers = {  # XLA keeps the addresses for ever
    "cpu": _prototype(functools.partial(_handle, on_gpu=False)),
    "CUDA": _prototype(functools.partial(_handle, on_gpu=True)),
}
for _platform, _handler in _handlers.items():
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(ctypes.cast(_handler, ctypes.c_void_p).value), platform=_platform)
