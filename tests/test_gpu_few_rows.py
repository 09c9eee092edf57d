"""The kernels for few rows on the GPU: pairs, matrices, groups, parts of k, overlapping launches, busy neighbours, large offsets."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable
from typing import Any

import format_oracles as formats
import gpu_arrays
import gpu_formats
import ml_dtypes
import numpy as np
import oracles
import pytest
from gpu_arrays import planned
from gpu_formats import ANY, OUTS, warmed
from test_gpu_products import codes

import cugemm
from cugemm import launch
from cugemm.api.common import gemm_options, product
from cugemm.catalog import skinny, swap_ab

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

LEFT = {"bf16": 1, "fp16": 1, "e4m3": 2, "fp8_e5m2_row": 4, "fp8_group": 2}
"""One of so many weights goes with each."""
RIGHT = (
    "bf16", "fp16", "e4m3", "e5m2", "fp8_row", "fp8_block", "nvfp4", "nvfp4_row", "mxfp8", "mxfp8_e5m2", "mxfp4", "fp4_row", "int8_row",
    "int8_group", "int4_row", "int4_g128",
)  # fmt: skip
PAIRS = [
    (a, b)
    for i, (a, step) in enumerate(LEFT.items())
    for b in RIGHT[i % step :: step]
    if not (a == "fp16" and (b == "bf16" or b.startswith("mx"))) and not (b == "fp16" and a == "bf16")
    if not (a == "fp8_group" and b in ("bf16", "fp16"))
]
"""fp16 does not meet bf16 or powers of two, nor 16-bit weights scales along k."""
KERNELS = ("skinny", "swap_ab")
SHAPES = [(1, 1000, 2048), (3, 17, 130), (7, 129, 4099), (16, 4100, 528), (24, 40, 1030), (64, 200, 512), (5, 7, 16)]
LAYOUTS = ("linear", "128x4", "8x4")


@pytest.fixture(scope="module")
def dev() -> Any:
    return gpu_arrays.Cupy()


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "swap_ab" and "wgmma" not in launch.machine(0)[0].features:
        pytest.skip("swap_ab needs sm_90a")
    return name


def candidates(run: Callable[[], Any], target: str = "native") -> list[Any]:
    """The configs that the kernel has for this call."""
    with planned(target=target), launch.recording() as calls:
        run()
        choice = calls[0].choice
        assert choice is not None
        return list(choice.best.kernel.candidates(choice.problem, launch.machine(0)[1]))


def call(dev: Any, kernel: str, a: str, b: str, i: int) -> Callable[[], None]:
    """One shape of three, exact on the grid or random, with a poisoned out whose surroundings must stay, and again: equal bits."""
    seed = zlib.crc32(f"{a}{b}".encode())
    m, n, k = SHAPES[(seed + 2 * i) % len(SHAPES)]
    if kernel == "swap_ab" and i == 2:
        m += 100  # several pieces
    pair = formats.make(seed + i, m, n, gpu_formats.even(k, a, b), a, b, exact=i != 1, bias=bool(seed & 64), alpha=(1.0, 0.5, -2.0)[i])
    return functools.partial(
        gpu_formats.verify, dev, pair, OUTS[(seed + i) % 3], backend=kernel, out=("row", "column", "odd row")[i],
        layouts=(("row", "odd row", "gaps")[(seed + i) % 3], "row"), scale_layouts=("linear", LAYOUTS[(seed + i) % 3]),
        strided_scale=i == 2,
    )  # fmt: skip


def pairs(dev: Any, kernel: str, a: str) -> None:
    """What selection takes, and two other configs, each on a shape of its own."""
    for number, b in enumerate(right for left, right in PAIRS if left == a):
        runs = [call(dev, kernel, a, b, i) for i in range(3)]
        with planned():
            runs[0]()
        for i in (1, 2):
            with planned(5 * number + 3 * i):
                runs[i]()


@pytest.mark.parametrize("a", LEFT)
def test_pairs(dev: Any, kernel: str, a: str) -> None:
    warmed(lambda: pairs(dev, kernel, a))
    pairs(dev, kernel, a)


def parts(dev: Any, target: str) -> None:
    """skinny where CTAs that cut k are no cluster: each number of parts, matrices and groups too."""
    seen: set[int] = set()
    for number, (a, b) in enumerate(PAIRS[::6]):
        run = call(dev, "skinny", a, b, number % 3)
        first: dict[int, int] = {}
        for tile, config in enumerate(candidates(run, target)):
            first.setdefault(config.parts, tile)
        for tile in first.values():
            with planned(tile, target):
                run()
        seen |= first.keys()
    assert len(seen) > 1
    groups(dev, "skinny", target)


@pytest.mark.parametrize("target", ["compute_80", "compute_89"])
def test_parts_of_k(dev: Any, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_all(monkeypatch)
    warmed(lambda: parts(dev, target))
    parts(dev, target)


def take_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of any length."""
    monkeypatch.setattr(skinny, "_MOST_OF_SEGMENT", 1000)
    monkeypatch.setattr(swap_ab, "_MOST_ROWS", 1000)


def groups(dev: Any, kernel: str, target: str = "native") -> None:
    """Segments, indices, rows gathered, masks, with indices out of range; pairs and configs in turn."""
    for i, kind in enumerate([*gpu_formats.GROUPS] * 3):
        a, b = PAIRS[(7 * i) % len(PAIRS)]
        with planned(3 * i if i % 3 else None, target):
            gpu_formats.grouped(dev, i, kind, a, b, exact=True, index_dtype=("int32", "int64")[i % 2], backend=kernel)


def test_groups(dev: Any, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_all(monkeypatch)
    warmed(lambda: groups(dev, kernel))
    groups(dev, kernel)


def matrices(dev: Any, kernel: str) -> None:
    """Batches on either side, and masked with counts out of range; configs in turn."""
    for i, (left, right, masked) in enumerate(
        [((3,), (3,), False), ((1,), (3,), False), ((3,), (1,), False), ((), (3,), False), ((5,), (5,), True), ((200,), (200,), True)] * 6
    ):
        a, b = PAIRS[(7 * i) % len(PAIRS)]
        rng = np.random.default_rng(i)
        m, n, k = int(rng.integers(1, 40)), int(rng.integers(1, 300)), gpu_formats.even(int(rng.integers(1, 1500)), a, b)
        x, w = formats.exact_operand(rng, a, (*left, m, k), True), formats.exact_operand(rng, b, (*right, n, k), False)
        counts = rng.choice([-3, 0, m // 2, m, m + 9], left) if masked else None
        case = formats.answer(x, w, counts=counts, repro=f"matrices {i} {a} {b} {m} {n} {k}")
        how: dict[str, Any] = {"segments": "masked", "said": counts.astype(("int32", "int64")[i % 2])} if counts is not None else {}
        with planned(5 * i):
            out = gpu_formats.multiply(
                dev, x, w, case, backend=kernel, scale_layouts=("linear", LAYOUTS[i % 3]), out=("row", "odd column")[i % 2], **how
            )
            oracles.check_exact(case, out, "bfloat16")


def test_matrices(dev: Any, kernel: str) -> None:
    warmed(lambda: matrices(dev, kernel))
    matrices(dev, kernel)


# --- beside and behind other kernels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [("bf16", "bf16"), ("bf16", "nvfp4"), ("fp8_group", "fp8_block")])
def test_beside_a_busy_stream(dev: Any, kernel: str, a: str, b: str) -> None:
    """A thousand calls give the same bits while another stream takes SMs and memory."""
    cp = dev.cupy
    pair = formats.make(1, 8, 4096, 4096, a, b, exact=False)
    x, w = (gpu_formats.operand(dev, side) for side in (pair.a, pair.b))
    options = gemm_options(ANY, "float32", kernel, b_axes="nk")
    noise, side = cp.ones((4096, 4096), "float32"), cp.cuda.Stream(non_blocking=True)
    for tile in range(0, 40, 8):
        with planned(tile):
            first = product(ANY, x, w, options)
            formats.check(pair, dev.fetch(first), "float32")
            cp.cuda.get_current_stream().synchronize()
            differ = cp.zeros((), "int64")
            for i in range(200):
                if i % 10 == 0:
                    with side:
                        cp.matmul(noise, noise)
                differ += (product(ANY, x, w, options).view("uint32") != first.view("uint32")).any()
            assert int(differ) == 0, f"config {tile}: {int(differ)} of 200 calls gave other bits"
    side.synchronize()


@pytest.mark.parametrize("b", ["bf16", "fp8_block", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("static", [False, True])
def test_overlapping_launches(dev: Any, kernel: str, static: bool, b: str) -> None:
    """A chain of products, each of which reads what the one before wrote and overwrites what the one before it read."""
    m, k = 8, 2048
    pair = formats.make(2, m, k, k, "bf16", b, exact=False)
    start, w = (gpu_formats.operand(dev, side) for side in (pair.a, pair.b))

    def chain(tile: int, pdl: bool = False) -> Any:
        options = gemm_options(ANY, None, kernel, how=(pdl, pdl and static, False), b_axes="nk")
        buffers = [start.copy(), dev.put(oracles.poison((m, k), "bfloat16"))]
        with planned(tile):
            for i in range(100):
                product(ANY, buffers[i % 2], w, options, alpha=1 / 46, out=buffers[1 - i % 2])
        return dev.fetch(buffers[0])

    for tile in range(0, 40, 4):
        alone = chain(tile)
        assert np.isfinite(alone.astype(np.float32)).all()
        for _ in range(5):
            oracles.check_bits(chain(tile, pdl=True), alone, f"config {tile}")


# --- large offsets ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_offsets_past_2_to_the_31(dev: Any, kernel: str, batch: int) -> None:
    """Weights of more than 2^31 elements, in one matrix and before the last of several; every element checked on the GPU."""
    cp, fp8, pitch = dev.cupy, ml_dtypes.float8_e4m3fn, 4096
    table = cp.asarray(np.arange(256, dtype=np.uint8).view(fp8).astype(np.float32))
    long = (getattr(dev, "huge", 2**31) // max(batch - 1, 1)) // pitch + 131
    big, small = codes(dev, batch * long * pitch).reshape(batch, long, pitch), codes(dev, batch * 5 * pitch).reshape(batch, 5, pitch)
    for tile in (0, 7, 20):
        with planned(tile):
            if batch == 1:
                got = cugemm.mm_fp8(small[0].view(fp8), big[0].view(fp8).T, out_dtype="float32", backend=kernel)[None]
            else:
                got = cugemm.matmul(small.view(fp8), big.view(fp8).swapaxes(1, 2), out_dtype="float32", backend=kernel)
        for number, start in itertools.product(range(batch), range(0, long, 32768)):
            expected = table[small[number]] @ table[big[number, start : start + 32768]].T
            assert bool((got[number, :, start : start + 32768] == expected).all()), f"config {tile}, matrix {number}, columns {start}..."
        del got
    del big, small
    dev.free()
