"""Kernels as the GPU would run them, on the CPU (tests/emulated.py): products against the oracles, conversions bit for bit."""

from __future__ import annotations

import shutil
from typing import Any

import emulated
import format_oracles as formats
import grouped_cases as cases
import numpy as np
import oracles
import pytest
from emulated import emulated as emulate
from format_oracles import Operand
from gpu_arrays import delayed
from grouped_cases import ENTRIES, MATMULS, Framework
from oracles import Array

import cugemm
from cugemm import Quantized, launch
from cugemm.catalog import Step, skinny
from cugemm.formats import FORMATS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

NUMPY = Framework("numpy", lambda x: x, lambda x: x)
PAIRS = (
    ("bf16", "bf16"), ("fp16", "fp16"), ("fp16", "bf16"), ("bf16", "fp16"), ("bf16", "fp8_row"), ("e4m3", "e5m2"),
    ("fp8_group", "fp8_block"),
    ("bf16", "fp8_block"), ("nvfp4", "nvfp4"), ("fp16", "nvfp4_row"), ("mxfp8", "mxfp4"), ("fp16", "mxfp8_e5m2"),
    ("bf16", "uint4_g32"), ("int8_group", "int4_g64"), ("int4_g128", "int8_row"),
)  # fmt: skip
SHAPES = ((17, 40, 200), (70, 67, 132))


@pytest.fixture
def portable_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny.Skinny, "refuse", lambda self, problem: "not here")


def operand(x: Operand, layout: str = "linear") -> Any:
    if x.scale is None:
        return x.data
    tiled = layout != "linear" and x.scale.dtype == np.uint8 and x.zero is None
    scale = formats.tiled(x.scale, layout) if tiled else x.scale
    return Quantized(x.data, scale, x.format, scale_layout=layout if tiled else "linear", tensor_scale=x.tensor, zero=x.zero)


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=["-".join(pair) for pair in PAIRS])
def test_products(number: int) -> None:
    """Every decode and kind of scale; tiles, loaders, layouts of scales, targets and schedules go round."""
    rng = np.random.default_rng(number)
    for i, shape in enumerate(SHAPES):
        m, n, k = shape
        a, b = formats.exact_operand(rng, PAIRS[number][0], (m, k), True), formats.exact_operand(rng, PAIRS[number][1], (n, k), False)
        bias = rng.integers(-8, 9, n).astype(np.float32)
        out = oracles.poison((m, n), "float32")
        x, w = operand(a, "128x4"), operand(b, ("8x4", "128x4")[i])
        tile = number + i
        target = "sm_80" if tile % 2 else "sm_90a"
        with emulate(target, tile, seed=number) as ran:
            cugemm.linear(x, w, bias, out=out, backend="portable")
        assert ran == ["portable"]
        oracles.check_exact(formats.answer(a, b, bias=bias), out, "float32")
        again = oracles.poison((m, n), "float32")
        with emulate(target, tile, seed=number + 99, eager=True):
            cugemm.linear(x, w, bias, out=again, backend="portable")
        oracles.check_bits(again, out, "another schedule")


def views(x: Array) -> list[Array]:
    """x in other places of memory: at an odd address, transposed, in wider rows."""
    shifted = np.zeros(x.size + 1, x.dtype)[1:].reshape(x.shape)
    wide = np.zeros((x.shape[0], x.shape[1] + 8), x.dtype)[:, : x.shape[1]]
    turned = np.zeros(x.shape[::-1], x.dtype).T
    for y in (shifted, wide, turned):
        y[...] = x
    return [shifted, wide, turned]


@pytest.mark.parametrize("pair", [("bf16", "bf16"), ("e4m3", "bf16")], ids="-".join)
def test_layouts(pair: tuple[str, str]) -> None:
    rng = np.random.default_rng(1)
    a, b = formats.exact_operand(rng, pair[0], (21, 72), True), formats.exact_operand(rng, pair[1], (40, 72), False)
    case = formats.answer(a, b)
    for i, x in enumerate(views(a.data)):
        for w in views(b.data):
            out = views(oracles.poison((21, 40), "bfloat16"))[i]
            with emulate(tile=1 + i % 2):
                cugemm.matmul(x, w.T, out=out)
            oracles.check_exact(case, np.ascontiguousarray(out), "bfloat16")


@pytest.mark.usefixtures("portable_alone")
@pytest.mark.parametrize("pair", [("bf16", "bf16"), ("fp8_group", "fp8_block"), ("nvfp4", "nvfp4"), ("bf16", "uint4_g32")], ids="-".join)
@pytest.mark.parametrize("kind", MATMULS)
def test_grouped(kind: str, pair: tuple[str, str]) -> None:
    with emulate(tile=2) as ran:
        MATMULS[kind](NUMPY, 3, *pair, "int64")
    assert "portable" in ran


@pytest.mark.usefixtures("portable_alone")
@pytest.mark.parametrize("name", ENTRIES)
def test_entries(name: str) -> None:
    with emulate(tile=2, seed=5) as ran:
        ENTRIES[name](NUMPY, 2, "int32")
    assert "portable" in ran


@pytest.mark.usefixtures("portable_alone")
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_wrong_device_values_select_nothing(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.values, "check", lambda *given: None)  # which would refuse them in host memory
    for seed in range(3):
        with emulate(tile=2, seed=seed):
            cases.wild(NUMPY, seed, index)


@pytest.mark.parametrize("name", FORMATS)
def test_quantisers(name: str) -> None:
    """Payload, scales, zero points and padding as the NumPy rules have them; and back."""
    rng = np.random.default_rng(2)
    number = list(FORMATS).index(name)
    dtype = ("bfloat16", "float16", "float32")[number % 3]
    x = (rng.standard_normal((2, 37, 154)) * np.exp2(rng.integers(-20, 12, (2, 37, 1)))).astype(oracles.dtype_of(dtype))
    x[0, 3, 17], x[1, 5, 40], x[1, 7] = np.nan, -np.inf, 0
    layout = "linear" if FORMATS[name].scale.dtype == "float32" else ("linear", "128x4", "8x4")[number % 3]
    with np.errstate(all="ignore"):
        expected = cugemm.quantize(x, name, scale_layout=layout)
        with emulate("sm_80" if number % 2 else "sm_90a", seed=number) as ran:
            q = cugemm.quantize(x, name, scale_layout=layout)
            back = cugemm.dequantize(q, dtype)
        assert len(ran) >= 2
        for part in ("data", "scale", "tensor_scale", "zero"):
            if getattr(expected, part) is not None:
                oracles.check_bits(getattr(q, part), getattr(expected, part), f"{part} of {dtype}")
        wanted = cugemm.dequantize(expected, dtype)
        nan = np.isnan(wanted.astype(np.float32))  # of any bits
        oracles.check_bits(np.where(nan, wanted, back), wanted, dtype)
        assert np.isnan(back.astype(np.float32)[nan]).all()


def test_rows_and_tiles() -> None:
    rng = np.random.default_rng(4)
    y, weights = rng.standard_normal((9, 3, 50)).astype(oracles.dtype_of("bfloat16")), rng.random((9, 3)).astype(np.float32)
    scale = rng.integers(0, 256, (2, 130, 9)).astype(np.uint8)
    for call in (
        lambda: cugemm.combine(y, weights),
        lambda: cugemm.silu_and_mul(y, gate="second", counts=np.array([3, 0, 1, 2, 3, 3, 1, 0, 2], np.int32)),
        lambda: cugemm.block_scale_interleave(scale),
    ):
        expected = call()
        with emulate() as ran:
            oracles.check_bits(call(), expected)
        assert len(ran) == 1


@pytest.mark.parametrize("tile", [0, -1])
@pytest.mark.parametrize("kernel", ["skinny", "portable"])
def test_delays_change_no_bit(kernel: str, tile: int) -> None:
    """Fibers that give way inside `delay()`, alone and with CTAs that cut k; the GPU's test is in test_gpu_races."""
    rng = np.random.default_rng(tile + 1)
    x, w = (rng.standard_normal((rows, 1056), np.float32).astype(oracles.dtype_of("bfloat16")) for rows in (8, 72))
    with emulate(tile=tile):
        wanted = cugemm.linear(x, w, out_dtype="float32", backend=kernel)
    built = emulated._library.cache_info().misses
    for seed in range(2):
        out = oracles.poison((8, 72), "float32")
        with delayed(5), emulate(tile=tile, seed=seed, eager=seed == 1) as ran:
            cugemm.linear(x, w, out=out, out_dtype="float32", backend=kernel)
        assert ran == [kernel]
        oracles.check_bits(out, wanted, f"seed {seed}")
    assert emulated._library.cache_info().misses == built + 1, "a build of its own"


# --- the emulator finds what it is there for --------------------------------------------------------------------------------------------

FAULTY = """
#include "common/ptx.cuh"
struct Args { u64 from, to; i32 fault, unused; };
extern "C" __global__ void faulty(const __grid_constant__ Args args) {
    extern __shared__ u8 shared_bytes[];
    const u32 at = shared_address(shared_bytes) + 16 * threadIdx.x;
    copy_async_16_if(args.fault != 3 || threadIdx.x, at, reinterpret_cast<const Chunk*>(args.from) + threadIdx.x, 16);
    copy_async_commit();
    if (args.fault != 1) copy_async_wait<0>();
    if (args.fault == 4 && threadIdx.x == 0) return;
    if (args.fault != 2) __syncthreads();
    if (args.fault == 5) store_shared_16(at + 960, 0, 0, 0, 0);
    reinterpret_cast<Chunk*>(args.to)[threadIdx.x] = reinterpret_cast<const Chunk*>(shared_bytes)[threadIdx.x ^ 32];
}
"""


@pytest.mark.parametrize("fault", range(6), ids=["none", "no wait", "no barrier", "a hole", "not all come", "beyond shared memory"])
def test_faults_show(fault: int) -> None:
    sources = emulated._sources()
    (sources / "faulty.cu").write_text(
        FAULTY.replace("extern __shared__ u8 shared_bytes[];", "u8* const shared_bytes = emulator::memory();")
    )
    given, got = np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)
    step = Step("faulty", (), 1, 64, 1024, (0, 1), (), np.array([fault, 0], np.int32).tobytes())
    run = lambda: emulated._launch(step, [given.ctypes.data, got.ctypes.data], [], "sm_90a", 7, False)  # noqa: E731
    if fault >= 4:
        what = "wait for each other for ever" if fault == 4 else "access outside shared memory"
        with pytest.raises(AssertionError, match=what):
            run()
        return
    run()
    right = given.reshape(2, -1)[::-1].ravel()
    assert (got == right).all() == (fault == 0)
