"""Read a DLPack capsule without consuming it.

The C structs are those of dlpack.h 1.3 (https://github.com/dmlc/dlpack), which also reads what DLPack 0.x producers such as JAX before 0.12
export.
A capsule that nobody consumed frees its memory when it dies: whoever uses the pointer keeps the capsule.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13

DEVICES = {
    1: "CPU", 2: "CUDA", 3: "CUDA pinned host", 4: "OpenCL", 7: "Vulkan", 8: "Metal", 9: "VPI", 10: "ROCm", 11: "ROCm pinned host",
    12: "extension", 13: "CUDA managed", 14: "oneAPI", 15: "WebGPU", 16: "Hexagon", 17: "MAIA", 18: "Trainium", 19: "MACA",
}  # fmt: skip
"""DLDeviceType -> what to call it."""

DTYPES = {
    **{(0, bits, 1): f"int{bits}" for bits in (4, 8, 16, 32, 64)},
    **{(1, bits, 1): f"uint{bits}" for bits in (4, 8, 16, 32, 64)},
    **{(2, bits, 1): f"float{bits}" for bits in (16, 32, 64)},
    **{(5, bits, 1): f"complex{bits}" for bits in (64, 128)},
    (4, 16, 1): "bfloat16",
    (6, 8, 1): "bool",
    (7, 8, 1): "float8_e3m4",
    (8, 8, 1): "float8_e4m3",
    (9, 8, 1): "float8_e4m3b11fnuz",
    (10, 8, 1): "float8_e4m3fn",
    (11, 8, 1): "float8_e4m3fnuz",
    (12, 8, 1): "float8_e5m2",
    (13, 8, 1): "float8_e5m2fnuz",
    (14, 8, 1): "float8_e8m0fnu",
    (15, 6, 1): "float6_e2m3fn",
    (16, 6, 1): "float6_e3m2fn",
    (17, 4, 1): "float4_e2m1fn",  # JAX: the shape counts values
    (17, 4, 2): "float4_e2m1fn_x2",  # torch: the shape counts pairs, one byte each
}
"""(DLDataTypeCode, bits, lanes) -> NumPy / ml_dtypes name; torch's name for the one dtype that those do not have.

NOTE: (2, 8, 1) is not here on purpose. CuPy <= 14.2 exports float8_e5m2 under it, and so could any 8-bit float: refuse, do not guess.
"""

READ_ONLY, PADDED = 1, 4  # DLPACK_FLAG_BITMASK_READ_ONLY, .._IS_SUBBYTE_TYPE_PADDED


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):  # DLManagedTensorVersioned; the unversioned struct begins with its DLTensor
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


# NOTE: functions of our own. The attributes of ctypes.pythonapi are shared, and others (jax.ffi.pycapsule) change their argtypes.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))


class Tensor(NamedTuple):
    """What a capsule describes. `strides` are in elements; `ptr` includes the byte offset and may be 0; `device` is the ordinal."""

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device_type: int  # CPU, CUDA, CUDA_HOST or CUDA_MANAGED
    device: int
    readonly: bool


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a dense array of `shape`, last axis fastest."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def read(obj: Any, stream: int | None = None) -> tuple[object, Tensor]:
    """Export `obj` and describe it: (capsule, Tensor). Keep the capsule for as long as the pointer is used.

    `stream` goes to `obj.__dlpack__` as its protocol says: the raw CUDA stream the memory will be used on (1 = legacy default,
    2 = per-thread default, -1 = do not synchronise), None for host memory. Producers that know no `max_version` are asked again without it.
    TypeError: unknown dtype, a device that is neither host nor CUDA, or no unconsumed DLPack capsule. Errors of the producer pass through.
    """
    try:
        capsule = obj.__dlpack__(stream=stream, max_version=(1, 1))
    except TypeError:  # a producer of DLPack 0.x; if the TypeError had another cause, it comes again
        capsule = obj.__dlpack__(stream=stream)
    return capsule, parse(capsule)


def parse(capsule: object) -> Tensor:
    """Describe an unconsumed DLPack capsule of either version."""
    readonly = padded = False
    if _is_valid(capsule, b"dltensor_versioned"):
        managed = _Versioned.from_address(_get_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:  # only these three fields are common to all major versions
            raise TypeError(f"DLPack capsule of version {managed.major}.{managed.minor}; wanted 0.x or 1.x")
        t, readonly, padded = managed.tensor, bool(managed.flags & READ_ONLY), bool(managed.flags & PADDED)
    elif _is_valid(capsule, b"dltensor"):
        t = _DLTensor.from_address(_get_pointer(capsule, b"dltensor"))
    else:
        raise TypeError(f"__dlpack__ returned {type(capsule).__name__} {capsule!r:.80}; wanted an unconsumed DLPack capsule")
    if t.device_type not in (CPU, CUDA, CUDA_HOST, CUDA_MANAGED):
        name = DEVICES.get(t.device_type, "unknown")
        raise TypeError(f"array on a {name} device (DLPack device type {t.device_type}); wanted host memory or CUDA")
    dtype = DTYPES.get((t.code, t.bits, t.lanes))
    if dtype is None or (padded and t.bits < 8):
        padding = ", padded" if padded else ""
        raise TypeError(
            f"unknown DLPack dtype (code {t.code}, bits {t.bits}, lanes {t.lanes}{padding}); pass a .view of its bytes as uint8"
        )
    shape = tuple(t.shape[: t.ndim]) if t.ndim else ()
    strides = tuple(t.strides[: t.ndim]) if t.ndim and t.strides else row_major(shape)
    return Tensor((t.data or 0) + t.byte_offset if t.data else 0, shape, strides, dtype, t.device_type, t.device_id, readonly)
