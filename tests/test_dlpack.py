"""cugemm.dlpack: real producers, and hand-made capsules of both versions for what those never export."""

import ctypes
import gc
import importlib
from typing import Any

import numpy as np
import pytest

from cugemm import dlpack
from cugemm.dlpack import CPU, CUDA, CUDA_HOST, CUDA_MANAGED, Tensor

_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(("PyCapsule_New", ctypes.pythonapi))
_set_name = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", ctypes.pythonapi))

NAMES = {False: b"dltensor", True: b"dltensor_versioned"}  # module level: a capsule keeps only the pointer to its name


class Producer:
    """A hand-made DLPack exporter. `old` ones know no `max_version`, as DLPack 0.x."""

    def __init__(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None,
        *,
        versioned: bool = True,
        dtype: tuple[int, int, int] = (2, 32, 1),
        data: int = 0x7000_0000_0000,
        offset: int = 0,
        device: tuple[int, int] = (1, 0),
        flags: int = 0,
        major: int = 1,
    ) -> None:
        rank = len(shape)
        self.sizes = (ctypes.c_int64 * rank)(*shape)
        self.steps = (ctypes.c_int64 * rank)(*strides) if strides is not None else None
        self.managed = dlpack._Versioned(major, 0, None, None, flags)
        t = self.managed.tensor
        t.data, t.byte_offset, t.ndim = data, offset, rank
        t.device_type, t.device_id = device
        t.code, t.bits, t.lanes = dtype
        t.shape = ctypes.cast(self.sizes, ctypes.POINTER(ctypes.c_int64)) if rank else None
        t.strides = ctypes.cast(self.steps, ctypes.POINTER(ctypes.c_int64)) if self.steps is not None else None
        self.versioned, self.asked = versioned, []

    def capsule(self) -> object:
        at = ctypes.addressof(self.managed) + (0 if self.versioned else dlpack._Versioned.tensor.offset)
        return _new(at, NAMES[self.versioned], None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.managed.tensor.device_type, self.managed.tensor.device_id

    def __dlpack__(self, *, stream: Any = None, **new: Any) -> object:
        if new and not self.versioned:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.asked.append((stream, new))
        return self.capsule()


class Hidden:
    """An array that shows the DLPack protocol and nothing else of its framework."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **how: Any) -> object:
        return self._array.__dlpack__(**how)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def read(obj: Any, stream: int | None = None) -> Tensor:
    return dlpack.read(obj, stream)[1]


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4), (5,), (), (0, 7), (3, 0)])
def test_null_strides_are_row_major(versioned: bool, shape: tuple[int, ...]) -> None:
    expected = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    assert read(Producer(shape, None, versioned=versioned)) == (0x7000_0000_0000, shape, expected, "float32", CPU, 0, False)


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("strides", [(1, 2), (0, 1), (0, 0), (-3, -1), (1 << 40, 1)])
def test_strides_as_they_are(versioned: bool, strides: tuple[int, int]) -> None:
    t = read(Producer((2, 3), strides, versioned=versioned, dtype=(4, 16, 1)))
    assert (t.shape, t.strides, t.dtype) == ((2, 3), strides, "bfloat16")


@pytest.mark.parametrize("versioned", [False, True])
def test_byte_offset(versioned: bool) -> None:
    assert read(Producer((4,), None, versioned=versioned, data=1 << 47, offset=(1 << 33) + 2)).ptr == (1 << 47) + (1 << 33) + 2


def test_null_pointer_stays_null_whatever_the_offset() -> None:
    assert read(Producer((4,), None, data=0, offset=64)).ptr == 0


def test_readonly_flag() -> None:
    assert read(Producer((4,), None, flags=1)).readonly
    assert not read(Producer((4,), None, flags=2)).readonly  # IS_COPIED
    assert not read(Producer((4,), None, flags=1, versioned=False)).readonly  # 0.x has no flags


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("kind", [CPU, CUDA, CUDA_HOST, CUDA_MANAGED])
def test_devices(versioned: bool, kind: int) -> None:
    t = read(Producer((2,), None, versioned=versioned, device=(kind, 3)))
    assert (t.device_type, t.device) == (kind, 3)


@pytest.mark.parametrize(("kind", "name"), [(10, "ROCm"), (8, "Metal"), (14, "oneAPI"), (99, "unknown")])
def test_other_devices_are_refused_by_name(kind: int, name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} device \(DLPack device type {kind}\); wanted host memory or CUDA"):
        read(Producer((2,), None, device=(kind, 0)))


@pytest.mark.parametrize(("code", "name"), sorted(dlpack.DTYPES.items()))
def test_dtypes(code: tuple[int, int, int], name: str) -> None:
    assert read(Producer((2,), None, dtype=code)).dtype == name


@pytest.mark.parametrize("code", [(2, 8, 1), (10, 8, 4), (18, 8, 1), (17, 8, 1), (255, 16, 1), (3, 64, 1)])
def test_unknown_dtypes_are_refused_by_number(code: tuple[int, int, int]) -> None:
    with pytest.raises(TypeError, match=r"code {}, bits {}, lanes {}\).*view of its bytes as uint8".format(*code)):
        read(Producer((2,), None, dtype=code))


def test_padded_subbyte_is_refused() -> None:
    with pytest.raises(TypeError, match="code 17, bits 4, lanes 1, padded"):
        read(Producer((2,), None, dtype=(17, 4, 1), flags=4))


def test_stream_and_version_are_passed_on() -> None:
    new, old = Producer((2,), None), Producer((2,), None, versioned=False)
    read(new, 77)
    read(old, 77)
    assert new.asked == [(77, {"max_version": (1, 1)})]
    assert old.asked == [(77, {})]


def test_future_major_version_is_refused() -> None:
    with pytest.raises(TypeError, match=r"version 2\.0; wanted 0\.x or 1\.x"):
        read(Producer((2,), None, major=2))


def test_no_capsule() -> None:
    class Wrong:
        def __dlpack__(self, **how: Any) -> object:
            return 5

    with pytest.raises(TypeError, match="__dlpack__ returned int 5; wanted an unconsumed DLPack capsule"):
        read(Wrong())
    consumed = Producer((2,), None).capsule()
    _set_name(consumed, b"used_dltensor_versioned")
    with pytest.raises(TypeError, match="wanted an unconsumed DLPack capsule"):
        dlpack.parse(consumed)


def test_others_may_change_the_shared_functions_of_ctypes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PyCapsule_IsValid", "PyCapsule_GetPointer"):
        monkeypatch.setattr(getattr(ctypes.pythonapi, name), "argtypes", [ctypes.c_int])
    assert read(np.ones(3)).shape == (3,)


def test_errors_of_the_producer_pass_through() -> None:
    class Broken:
        def __dlpack__(self, **how: Any) -> object:
            raise TypeError("my own trouble") if how else AssertionError

    with pytest.raises(TypeError, match="my own trouble"):
        read(Broken())


def test_the_capsule_keeps_and_frees_the_memory() -> None:
    class Watched(np.ndarray):
        deaths = 0

        def __del__(self) -> None:
            Watched.deaths += 1

    x = np.arange(6.0).view(Watched)
    capsule, t = dlpack.read(x)
    del x
    gc.collect()
    assert Watched.deaths == 0
    assert (ctypes.c_double * 6).from_address(t.ptr)[5] == 5.0
    del capsule
    gc.collect()
    assert Watched.deaths == 1


@pytest.mark.parametrize("wrap", [lambda x: x, Hidden])
def test_numpy(wrap: Any) -> None:
    x = np.arange(24, dtype=np.float16).reshape(4, 6)
    for view in (x, x.T, x[1:, ::2], x[:, ::-1], np.broadcast_to(x[0], (3, 6)).copy(), x[:0]):
        at, strides = view.ctypes.data, tuple(s // 2 for s in view.strides)
        assert read(wrap(view)) == (at, view.shape, strides, "float16", CPU, 0, False)
    assert read(wrap(np.broadcast_to(x[0], (3, 6)))) == (x.ctypes.data, (3, 6), (0, 1), "float16", CPU, 0, True)


TORCH = ["bool", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
TORCH += ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2"]


@pytest.mark.parametrize("wrap", [lambda x: x, Hidden])
@pytest.mark.parametrize("name", TORCH)
def test_torch(name: str, wrap: Any) -> None:
    torch = pytest.importorskip("torch")
    if not hasattr(torch, name):
        pytest.skip(f"this torch has no {name}")
    dtype = getattr(torch, name)
    x = torch.zeros(6 * 8 * dtype.itemsize, dtype=torch.uint8).view(dtype).reshape(6, 8)
    for view in (x, x[2:4, 1:]):
        t = read(wrap(view))
        assert t == (view.data_ptr(), tuple(view.shape), view.stride(), name, CPU, 0, False)
    if name != "float4_e2m1fn_x2":
        assert read(wrap(x.T)).strides == (1, 8)
        assert read(wrap(x[0].expand(5, 8))).strides == (0, 1)


JAX = ["uint8", "int32", "float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn"]


@pytest.mark.parametrize("wrap", [lambda x: x, Hidden])
@pytest.mark.parametrize("name", JAX)
def test_jax(name: str, wrap: Any) -> None:
    jnp = pytest.importorskip("jax.numpy")
    if not hasattr(jnp, name):
        pytest.skip(f"this jax has no {name}")
    jax = importlib.import_module("jax")
    with jax.default_device(jax.devices("cpu")[0]):
        x = jnp.ones((6, 8)).astype(name)
    t = read(wrap(x))
    assert t[1:6] == ((6, 8), (8, 1), name, CPU, 0)  # readonly depends on the version of jax
    assert t.ptr == x.unsafe_buffer_pointer()
