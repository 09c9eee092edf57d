"""Launches that overlap: a product that may begin early waits for what it reads, whoever writes it, also in a graph."""

from __future__ import annotations

from typing import Any

import gpu_arrays
import ml_dtypes
import numpy as np
import oracles
import pytest

import cugemm
from cugemm import driver, measure

pytestmark = [pytest.mark.gpu, pytest.mark.requires("cupy"), pytest.mark.filterwarnings("default")]

PRODUCER = r"""
extern "C" __global__ void produce(const uint4* from, uint4* to, int count, long long clocks) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");  // from here on the next kernel may run beside this one
#endif
    const long long start = clock64();
    while (clock64() - start < clocks) {}
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) to[i] = from[i];
}
"""
"""Lets the next kernel begin, and writes long after that."""
N, K = 1000, 1024
WEIGHTS = ("bf16", "fp8_row", "nvfp4", "mxfp4", "int4_g128", "fp8_block")
WAYS = (*((name, "auto") for name in WEIGHTS), ("bf16", "hopper"))
"""Weights, and the kernel asked for."""


@pytest.fixture(scope="module")
def dev() -> Any:
    return gpu_arrays.Cupy()


def weight(cupy: Any, w: Any, name: str) -> Any:
    return measure.to_device(w) if name == "bf16" else cugemm.quantize(measure.to_device(w), name)


@pytest.mark.parametrize("m", [1, 8, 16, 33])
@pytest.mark.parametrize(("name", "backend"), WAYS)
def test_a_product_waits_for_its_rows(dev: Any, name: str, backend: str, m: int) -> None:
    """x is poison until a slow predecessor writes it; every mode gives the bits of an ordinary launch."""
    cupy: Any = dev.cupy
    rng = np.random.default_rng(m)
    source = measure.to_device(rng.standard_normal((m, K), np.float32).astype(ml_dtypes.bfloat16))
    w = weight(cupy, rng.standard_normal((N, K), np.float32).astype(ml_dtypes.bfloat16), name)
    wanted = measure.to_host(cugemm.linear(source, w, backend=backend))
    assert np.isfinite(wanted.astype(np.float32)).all()
    produce = cupy.RawKernel(PRODUCER, "produce")
    for static in (False, True):
        for _ in range(3):
            x = measure.to_device(oracles.poison((m, K), "bfloat16"))
            out = measure.to_device(oracles.poison((m, N), "bfloat16"))
            cupy.cuda.Device().synchronize()
            count = x.nbytes // 16
            produce((4,), (256,), (source.view(np.uint16), x.view(np.uint16), np.int32(count), np.int64(400_000)))
            cugemm.linear(x, w, out=out, pdl=True, static_weights=static, backend=backend)
            oracles.check_bits(measure.to_host(out), wanted, f"pdl, static_weights={static}")


@pytest.mark.parametrize(("name", "backend"), WAYS)
def test_a_chain_gives_the_bits_of_single_launches(dev: Any, name: str, backend: str) -> None:
    """Each product reads what the one before wrote and writes where the one before that read; by itself and as a replayed graph."""
    cupy: Any = dev.cupy
    rng = np.random.default_rng(7)
    weights = [
        weight(cupy, (rng.standard_normal((K, K), np.float32) / 32).astype(ml_dtypes.bfloat16), name) for _ in range(4)
    ]  # fmt: skip
    first = measure.to_device(rng.standard_normal((4, K), np.float32).astype(ml_dtypes.bfloat16))
    steps = 24

    def chain(buffers: list[Any], **how: bool) -> Any:
        cupy.copyto(buffers[0].view(np.uint16), first.view(np.uint16))
        for i in range(steps):
            cugemm.linear(buffers[i % 2], weights[i % 4], out=buffers[(i + 1) % 2], backend=backend, **how)
        return buffers[steps % 2]

    def buffers() -> list[Any]:
        return [measure.to_device(oracles.poison((4, K), "bfloat16")) for _ in range(2)]

    wanted = measure.to_host(chain(buffers()))
    for static in (False, True):
        oracles.check_bits(measure.to_host(chain(buffers(), pdl=True, static_weights=static)), wanted, "in a stream")
        stream, held = cupy.cuda.Stream(non_blocking=True), buffers()
        cupy.cuda.Device().synchronize()
        with stream:
            stream.begin_capture()
            result = chain(held, pdl=True, static_weights=static)
            graph = stream.end_capture()
            for _ in range(20):
                graph.launch(stream)
        driver.synchronize(int(stream.ptr))
        oracles.check_bits(measure.to_host(result), wanted, "as a graph")


def test_layers_overlap(dev: Any) -> None:
    """A layer asks for it, and its weight may come from the kernel just ahead."""
    cupy: Any = dev.cupy
    rng = np.random.default_rng(1)
    x = measure.to_device(rng.standard_normal((2, K), np.float32).astype(ml_dtypes.bfloat16))
    for _ in range(10):
        w = measure.to_device(rng.standard_normal((N, K), np.float32).astype(ml_dtypes.bfloat16))
        layer = cugemm.QuantizedLinear(w, format="fp8_row")
        y = layer(x)
        cupy.cuda.Device().synchronize()
        oracles.check_bits(measure.to_host(y), measure.to_host(cugemm.linear(x, layer.weight)))
