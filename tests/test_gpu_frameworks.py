"""Arrays of each framework on the GPU: the same numbers, results where the operands are, on the stream the caller is on, memory in time."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import gpu_arrays
import ml_dtypes
import numpy as np
import oracles
import pytest

import cugemm
from cugemm import launch

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

Array = np.ndarray[Any, Any]
CUDA = "cuda"
SPIN = 'extern "C" __global__ void spin(long long n) { long long start = clock64(); while (clock64() - start < n); }'
LONG = 200_000_000
"""Clock cycles: about 0.1 s, far longer than everything behind it takes to enqueue."""


@pytest.fixture(scope="module")
def dev() -> Any:
    return gpu_arrays.Cupy()


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def jax() -> Any:
    jax = pytest.importorskip("jax")
    if CUDA == "cuda" and jax.default_backend() != "gpu":
        pytest.skip("needs jax with CUDA")
    return jax


@pytest.fixture(scope="module")
def spin() -> Callable[[int], None]:
    cupy = pytest.importorskip("cupy")
    kernel = cupy.RawKernel(SPIN, "spin")

    def start(cycles: int) -> None:
        """On CuPy's current stream."""
        kernel((1,), (1,), (np.int64(cycles),))

    return start


# --- arrays in and out ------------------------------------------------------------------------------------------------------------


def to_torch(torch: Any, x: Array, device: str = "") -> Any:
    dtype = getattr(torch, x.dtype.name)
    plain = np.ascontiguousarray(x)
    if x.dtype.name not in ("float32", "int32", "int64", "uint8"):
        plain = plain.view(f"i{x.dtype.itemsize}" if x.dtype.itemsize > 1 else np.uint8)
    return torch.from_numpy(plain.copy()).to(device or CUDA).view(dtype)


def from_torch(torch: Any, x: Any) -> Array:
    name = str(x.dtype).removeprefix("torch.")
    plain = x.detach().contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]).cpu().numpy()
    return np.asarray(plain.view(oracles.dtype_of(name)))


class Hidden:
    """Offers its memory through DLPack and says nothing else."""

    def __init__(self, x: Any) -> None:
        self._x = x
        self.asked: list[Any] = []

    def __dlpack__(self, **options: Any) -> Any:
        self.asked.append(options.get("stream"))
        return self._x.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._x.__dlpack_device__()

    @property
    def shape(self) -> Any:
        return tuple(self._x.shape)

    @property
    def dtype(self) -> str:
        return str(self._x.dtype).removeprefix("torch.")


CASES: dict[str, Callable[[], oracles.Case]] = {
    "bf16": lambda: oracles.exact_case(1, 33, 65, 130, "bf16", "bf16", bias=True),
    "fp16": lambda: oracles.exact_case(2, 33, 65, 130, "fp16", "fp16", bias=True),
    "fp8": lambda: oracles.exact_case(3, 33, 65, 130, "e4m3", "e4m3", a_block=(1, 0), b_block=(0, 1), bias=True),
    "fp8 blocks": lambda: oracles.exact_case(4, 33, 65, 130, "e4m3", "e4m3", a_block=(1, 128), b_block=(128, 128)),
    "fp4": lambda: oracles.exact_case(5, 33, 65, 130, "bf16", "e2m1x2", b_block=(0, 1)),
}


def multiply(name: str, a: Any, b_nk: Any, a_scale: Any, b_scale_nk: Any, bias: Any) -> Any:
    """The case as an API call; b and its scale as [n, k], which every framework has row-major."""
    if name in ("bf16", "fp16"):
        return cugemm.linear(a, b_nk, bias)
    if name == "fp8":
        return cugemm.mm_fp8(a, b_nk.T, a_scale=a_scale, b_scale=b_scale_nk.reshape(-1), bias=bias)
    if name == "fp8 blocks":
        return cugemm.gemm_fp8_nt_groupwise(a, b_nk, a_scale, b_scale_nk, "K")
    return cugemm.mm_fp4(a, b_nk.T, b_scale_nk.reshape(-1))


def inputs(case: oracles.Case) -> list[Array | None]:
    b_scale = None if case.b_scale is None else np.ascontiguousarray(case.b_scale.T)
    return [case.a, np.ascontiguousarray(case.b.T), case.a_scale, b_scale, case.bias]


def out_dtype(case: oracles.Case) -> str:
    return "float16" if case.a_element == "fp16" else "bfloat16"


@pytest.mark.parametrize("name", CASES)
def test_torch(torch: Any, name: str) -> None:
    case = CASES[name]()
    arrays = [None if x is None else to_torch(torch, x) for x in inputs(case)]
    for _ in range(2):  # the second is the warm path
        y = multiply(name, *arrays)
        assert type(y) is torch.Tensor and y.device == arrays[0].device and y.is_contiguous()
        oracles.check_exact(case, from_torch(torch, y), out_dtype(case))


@pytest.mark.parametrize("name", CASES)
def test_cupy(dev: Any, name: str) -> None:
    case = CASES[name]()
    arrays = [dev.put(x) for x in inputs(case)]
    for _ in range(2):
        y = multiply(name, *arrays)
        assert type(y) is type(arrays[0])
        oracles.check_exact(case, dev.fetch(y), out_dtype(case))


@pytest.mark.parametrize("name", CASES)
def test_jax(jax: Any, name: str) -> None:
    case = CASES[name]()
    arrays = [None if x is None else jax.numpy.asarray(x) for x in inputs(case)]
    call = jax.jit(lambda *operands: multiply(name, *operands))
    for function in (multiply, multiply, lambda _, *x: call(*x), lambda _, *x: call(*x)):
        y = function(name, *arrays)
        assert isinstance(y, jax.Array) and y.devices() == arrays[0].devices()
        oracles.check_exact(case, np.asarray(y), out_dtype(case))


def test_jax_groups_and_quantisation(jax: Any) -> None:
    """Workspaces, two results and memory that must be cleared, eager and inside jit among other operations."""
    case = oracles.exact_case(6, 40, 33, 70, "bf16", "bf16", experts=4)
    x, w, expert = (jax.numpy.asarray(v) for v in (case.a, case.b, case.expert.astype(np.int32)))
    wrapper = cugemm.SegmentGEMMWrapper(None)
    for function in (wrapper.forward, jax.jit(wrapper.forward)):
        oracles.check_exact(case, np.asarray(function(x, w, expert)), "bfloat16")
    values = np.random.default_rng(0).standard_normal((40, 300)).astype(np.float32)
    for name in ("fp8_tensor", "fp8_row", "fp8_block"):
        data, scale = cugemm.quantize_reference.quantize(values, cugemm.formats.FORMATS[name])

        def parts(v: Any, name: str = name) -> Any:
            q = cugemm.quantize(v * 1, name)
            return q.data, q.scale

        for function in (parts, jax.jit(parts)):
            for _ in range(2):
                got_data, got_scale = function(jax.numpy.asarray(values))
                oracles.check_bits(np.asarray(got_data), data, name)
                oracles.check_bits(np.asarray(got_scale), scale, name)


def test_jax_lifetime(jax: Any) -> None:
    """Launch on x, delete x, let something else have its memory: right 30 times of 30."""
    jnp = jax.numpy
    m, k, n = 1024, 2048, 1024
    w = jnp.asarray(np.full((n, k), 0.5, ml_dtypes.bfloat16))
    right = 0
    for i in range(30):
        x = jnp.full((m, k), float(i % 7 + 1), jnp.bfloat16)
        for _ in range(4):  # a queue, so that the product is still to come
            busy = w @ x.T
        y = cugemm.linear(x, w, out_dtype="float32")
        x.delete() if i % 2 else None
        del x
        gc.collect()
        thief = [jnp.full((m, k), -99.0, jnp.bfloat16) for _ in range(3)]
        right += bool((np.asarray(y) == 0.5 * k * (i % 7 + 1)).all())
        del busy, thief
    assert right == 30


# --- DLPack only ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("producer", ["torch", "cupy"])
def test_dlpack_only(request: pytest.FixtureRequest, dev: Any, producer: str) -> None:
    case = CASES["fp16"]()
    if producer == "torch":
        torch = request.getfixturevalue("torch")
        arrays = [None if x is None else Hidden(to_torch(torch, x)) for x in inputs(case)]
    else:
        arrays = [None if x is None else Hidden(dev.put(x)) for x in inputs(case)]
    for _ in range(2):
        y = multiply("fp16", *arrays)
        oracles.check_exact(case, dev.fetch(y), "float16")
    assert type(y) is type(dev.put(case.a)), "the result of an unknown framework is CuPy's"
    if CUDA == "cuda":
        assert None not in arrays[0].asked and 0 not in arrays[0].asked


def test_dlpack_lifetime(torch: Any, spin: Callable[[int], None]) -> None:
    """The capsule keeps the memory until the kernel has read it, though its producer's names are gone."""
    import cupy

    w = Hidden(torch.full((256, 512), 0.5, dtype=torch.float16, device=CUDA))
    torch.cuda.synchronize()
    for i in range(10):
        x = torch.full((256, 512), float(i + 1), dtype=torch.float16, device=CUDA)
        torch.cuda.synchronize()
        with cupy.cuda.Stream(non_blocking=True) as stream:
            spin(LONG // 20)
            y = cugemm.linear(Hidden(x), w, out_dtype="float32")
            del x
            thieves = [torch.full((256, 512), -99.0, dtype=torch.float16, device=CUDA) for _ in range(4)]
            torch.cuda.synchronize()
            stream.synchronize()
            assert bool((y == 256.0 * (i + 1)).all()), i
        del thieves


# --- streams ----------------------------------------------------------------------------------------------------------------------


def test_torch_stream(torch: Any) -> None:
    """On a side stream the product comes after what was enqueued there, before what follows, and the host does not wait for it."""
    k = 512
    w = torch.full((64, k), 0.5, dtype=torch.bfloat16, device=CUDA)
    x = torch.zeros((32, k), dtype=torch.bfloat16, device=CUDA)
    out = torch.zeros((32, 64), dtype=torch.bfloat16, device=CUDA)
    cugemm.linear(x, w)  # warm
    cugemm.linear(x, w, out=out)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for i in range(3):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG)
            x.fill_(float(i + 1))
            y = cugemm.linear(x, w)
            cugemm.linear(x, w, out=out)
            busy = not stream.query()
            x.fill_(-1.0)
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert busy, "the call waited for the stream"
        stream.synchronize()
        assert bool((y == 256.0 * (i + 1)).all()) and bool((out == 256.0 * (i + 1)).all())


def test_cupy_stream(dev: Any, spin: Callable[[int], None]) -> None:
    cupy = dev.cupy
    k = 512
    w, x = (dev.put(np.full(shape, value, np.float16)) for shape, value in (((64, k), 0.5), ((32, k), 0.0)))
    cugemm.linear(x, w)
    x.fill(1)  # CuPy compiles this
    cupy.cuda.Device().synchronize()
    for i in range(3):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            cugemm.linear(x, w)  # CuPy's pool has a part for each stream, and filling it waits for the GPU
            stream.synchronize()
            spin(LONG)
            x.fill(i + 1)
            y = cugemm.linear(x, w)
            assert not stream.done, "the call waited for the stream"
            x.fill(-1)
            stream.synchronize()
            assert bool((y == 256.0 * (i + 1)).all())


def test_first_call_on_a_side_stream(torch: Any) -> None:
    """Loading a kernel does not bring the launch onto another stream. 64-bit indices make four launches and a clearing of it."""
    case = oracles.exact_case(8, 60, 33, 70, "fp16", "fp16", experts=4)
    x, w, expert = (to_torch(torch, v) for v in (case.a, case.b, case.expert.astype(np.int64)))
    held = x.clone()
    launch.clear()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        x.zero_()
        torch.cuda._sleep(LONG)
        x.copy_(held)
        y = cugemm.SegmentGEMMWrapper(None).run(x, w, expert)
        torch.cuda.current_stream().synchronize()
        oracles.check_exact(case, from_torch(torch, y), "float16")


# --- torch's modes ----------------------------------------------------------------------------------------------------------------


def test_torch_modes(torch: Any) -> None:
    case = CASES["bf16"]()
    a, w, _, _, bias = (None if x is None else to_torch(torch, x) for x in inputs(case))
    with torch.inference_mode():
        y = cugemm.linear(a.clone(), w, bias)
        out = torch.empty_like(y)
        assert cugemm.linear(a, w, bias, out=out) is out
        oracles.check_exact(case, from_torch(torch, y), "bfloat16")
        oracles.check_exact(case, from_torch(torch, out), "bfloat16")
    out = torch.full((33, 65), float("nan"), dtype=torch.bfloat16, device=CUDA)
    for _ in range(2):
        before = out._version
        assert cugemm.linear(a, w, bias, out=out) is out
        assert out._version > before
    oracles.check_exact(case, from_torch(torch, out), "bfloat16")

    weight = torch.nn.Parameter(w)
    with torch.no_grad():
        for _ in range(2):
            y = cugemm.linear(a, weight, bias)
            assert not y.requires_grad
        oracles.check_exact(case, from_torch(torch, y), "bfloat16")
    for _ in range(2):
        y = cugemm.linear(a, weight, bias)
        oracles.check_exact(case, from_torch(torch, y), "bfloat16")
        with pytest.raises(RuntimeError, match=r"linear has no backward"):
            y.float().sum().backward()
        with pytest.raises(ValueError, match="out="):
            cugemm.linear(a, weight, bias, out=torch.empty_like(out))


def test_torch_fp4_dtype_and_bytes(torch: Any) -> None:
    """float4_e2m1fn_x2 counts pairs and is the same bytes as uint8."""
    case = CASES["fp4"]()
    a, w, _, scale, _ = (None if x is None else to_torch(torch, x) for x in inputs(case))
    payloads = [w, w.view(torch.float4_e2m1fn_x2)] if hasattr(torch, "float4_e2m1fn_x2") else [w]
    for payload in payloads:
        y = cugemm.linear(a, cugemm.Quantized(payload, scale, "fp4_row"))
        oracles.check_exact(case, from_torch(torch, y), "bfloat16")


# --- where memory is --------------------------------------------------------------------------------------------------------------


def test_managed_memory_is_device_memory(dev: Any) -> None:
    cupy = dev.cupy
    case = CASES["fp8"]()
    with cupy.cuda.using_allocator(cupy.cuda.MemoryPool(cupy.cuda.malloc_managed).malloc):
        arrays = [dev.put(x) for x in inputs(case)]
        y = multiply("fp8", *arrays)
        oracles.check_exact(case, dev.fetch(y), "bfloat16")
        half = CASES["fp16"]()
        hidden = [None if x is None else Hidden(dev.put(x)) for x in inputs(half)]
        oracles.check_exact(half, dev.fetch(multiply("fp16", *hidden)), "float16")
        cupy.cuda.Device().synchronize()
    del arrays, y, hidden


def test_pinned_memory_is_host_memory(torch: Any) -> None:
    case = CASES["bf16"]()
    arrays = [None if x is None else to_torch(torch, x, "cpu").pin_memory() for x in inputs(case)]
    y = multiply("bf16", *arrays)
    assert y.device.type == "cpu"
    oracles.check_exact(case, from_torch(torch, y), "bfloat16")
    with pytest.raises(TypeError, match=r"cuda:0.*the host|the host.*cuda:0"):
        cugemm.linear(arrays[0], arrays[1].cuda())


def test_nothing_is_moved(torch: Any, dev: Any) -> None:
    a, w, *_ = inputs(CASES["bf16"]())
    before = launch.launches
    with pytest.raises(TypeError, match="CuPy"):
        cugemm.linear(to_torch(torch, a), dev.put(w))
    with pytest.raises(TypeError):
        cugemm.linear(to_torch(torch, a), to_torch(torch, w, "cpu"))
    with pytest.raises(TypeError):
        cugemm.linear(dev.put(a), w)
    assert launch.launches == before


def test_torch_current_device_survives(torch: Any) -> None:
    a, w, *_ = (None if x is None else to_torch(torch, x) for x in inputs(CASES["bf16"]()))
    before = torch.cuda.current_device()
    for index in range(torch.cuda.device_count()):
        on = [x.to(f"cuda:{index}") for x in (a, w)]
        y = cugemm.linear(*on)
        assert y.device.index == index and torch.cuda.current_device() == before
        assert torch.equal(y.to(a.device), cugemm.linear(a, w))
