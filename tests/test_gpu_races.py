"""Races: bits do not depend on when warps and CTAs run, held up by sleeps that are built in or by a busy neighbour.

Both tests can fail. Sleeps (kernels/common/delay.cuh) stand before barriers and remote stores and in the main loops:
`test_a_missing_barrier_shows` takes a barrier away, and bits differ. The count of wrong calls is shown one wrong bit and must see it.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_arrays
import gpu_formats
import ml_dtypes
import numpy as np
import oracles
import pytest
from conftest import ROOT
from gpu_arrays import delayed, planned

import cugemm
from cugemm import NoKernelError, compile, launch, measure
from cugemm.catalog import KERNELS

pytestmark = [pytest.mark.gpu, pytest.mark.requires("cupy"), pytest.mark.filterwarnings("default")]

K = 2176
"""17 x 128: the last step of packed weights is half of one."""
SIZES = {"skinny": ((1, 16), 8000), "swap_ab": ((1, 16, 64), 36000), "hopper": ((130, 300), 1000), "portable": ((1, 130), 1000)}
"""Rows, and columns: several tiles for each cluster, or few enough that portable cuts k."""
NAMES = [kernel.name for kernel in KERNELS if kernel.name in SIZES]
WEIGHTS = ("bf16", "fp8_row", "nvfp4", "mxfp4", "int4_g128")
SEEDS = (1, 2, 3)
BROKEN = {
    "skinny": "__syncthreads();  // all have left their sums",
    "swap_ab": "if (p == 0) mbarrier_wait(shared.full(slot), shared.parity(number + step));",
    "hopper": "    cluster_arrive();\n    cluster_wait();\n    delay();\n",
    "portable": "__syncthreads();  // tile t is complete, and everybody is done with the stage of tile t - 1",
}
"""A barrier of the kernel: sums of warps meet behind it; rows of A are there behind it; sums of CTAs; a tile."""


@pytest.fixture(scope="module")
def dev() -> Any:
    return gpu_arrays.Cupy()


def operands(m: int, n: int, b: str) -> tuple[Any, Any]:
    rng = np.random.default_rng(m)
    x, w = (measure.to_device(rng.standard_normal((rows, K), np.float32).astype(ml_dtypes.bfloat16)) for rows in (m, n))
    return x, w if b == "bf16" else cugemm.quantize(w, b)


def multiply(x: Any, w: Any, kernel: str) -> Any:
    """Into NaN."""
    out = measure.to_device(oracles.poison((x.shape[0], w.shape[0]), "float32"))
    return cugemm.linear(x, w, out=out, out_dtype="float32", backend=kernel)


def configs(run: Callable[[], Any]) -> list[int]:
    """Numbers of configs: the first for each count of CTAs that cut k, or share, with and without warps that cut; none if it refuses."""
    try:
        with launch.recording() as calls:
            run()
    except NoKernelError:
        return []
    choice = calls[-1].choice
    assert choice is not None
    found: dict[Any, int] = {}
    for number, config in enumerate(choice.best.kernel.candidates(choice.problem, launch.machine(0)[1])):
        ways = (("split", 1), ("share", 1), ("apart", False))
        found.setdefault((getattr(config, "warps_k", 1) > 1, *(getattr(config, name, usual) for name, usual in ways)), number)
    return list(found.values())


def at(tile: int, run: Callable[[], Any]) -> Any:
    with planned(tile):
        return run()


@pytest.mark.parametrize("b", WEIGHTS)
@pytest.mark.parametrize("kernel", NAMES)
def test_delays_change_no_bit(kernel: str, b: str) -> None:
    """Plain and delayed builds of every way to cut k, a few calls each."""
    rows, n = SIZES[kernel]
    runs = {}
    for m in rows:
        run = functools.partial(multiply, *operands(m, n, b), kernel)
        runs |= {(m, tile): functools.partial(at, tile, run) for tile in configs(run)}
    if not runs:
        pytest.skip(f"{kernel} does not take {b} weights here")
    jobs = gpu_formats.jobs(*runs.values())
    for seed in SEEDS:
        with delayed(seed):
            jobs |= gpu_formats.jobs(*runs.values())
    assert gpu_formats.compiled(jobs) % (1 + len(SEEDS)) == 0, "no build is missing"
    for (m, tile), run in runs.items():
        wanted = measure.to_host(run())
        assert np.isfinite(wanted).all()
        for seed in SEEDS:
            with delayed(seed):
                for _ in range(3):
                    oracles.check_bits(measure.to_host(run()), wanted, f"{kernel}, {b}, {m} rows, config {tile}, DELAY={seed}")


@pytest.mark.parametrize("kernel", BROKEN)
def test_a_missing_barrier_shows(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above sees it: without one of its barriers a delayed build gives other bits."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    source = tmp_path / "kernels" / f"{kernel}.cu"
    text = source.read_text()
    assert text.count(BROKEN[kernel]) == 1
    source.write_text(text.replace(BROKEN[kernel], ""))
    rows, n = SIZES[kernel]
    run = functools.partial(multiply, *operands(rows[-1], n, "bf16"), kernel)
    tiles = configs(run)
    if not tiles:
        pytest.skip(f"{kernel} does not run here")
    wanted = {tile: measure.to_host(at(tile, run)) for tile in tiles}
    monkeypatch.setattr(compile, "kernel_dir", lambda: tmp_path / "kernels")

    def differs(tile: int) -> bool:
        with delayed(99):  # a seed of its own: functions are kept by their macros
            return any((measure.to_host(at(tile, run)).view(np.uint32) != wanted[tile].view(np.uint32)).any() for _ in range(10))

    assert any(map(differs, tiles))


@pytest.mark.parametrize("b", ["bf16", "nvfp4"])
@pytest.mark.parametrize("kernel", NAMES)
def test_ten_thousand_calls_beside_a_busy_stream(dev: Any, kernel: str, b: str) -> None:
    """A hundred replays of a graph of a hundred calls, each into NaN; the side stream always has matmuls and copies to do."""
    cp, calls, m, n = dev.cupy, 100, 8, 1024
    x, w = operands(m, n, b)
    tiles = configs(functools.partial(multiply, x, w, kernel))
    if not tiles:
        pytest.skip(f"{kernel} does not take {b} weights here")
    stream, side = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
    noise, product, copy = (cp.ones((4096, 4096), "float32") for _ in range(3))
    outs, differ, queued = cp.empty((calls, m, n), "float32"), cp.zeros((), "int64"), []

    def keep_busy() -> None:
        queued[:] = [event for event in queued if not event.done]
        while len(queued) < 128:
            with side:
                cp.matmul(noise, noise, out=product)
                cp.copyto(copy, product)
                queued.append(side.record())

    def replay(graph: Any, wanted: Any) -> bool:
        """Whether the neighbour was busy all the time; adds to `differ`."""
        keep_busy()
        with stream:
            outs.fill(np.nan)
            graph.launch(stream)
            cp.add(differ, (outs.view("uint32") != wanted.view("uint32")).any(axis=(1, 2)).sum(), out=differ)
        stream.synchronize()
        return not side.done

    for tile in sorted({tiles[0], tiles[-1]}):
        with planned(tile):
            wanted = multiply(x, w, kernel)
            differ.fill(0)
            cp.cuda.Device().synchronize()
            with stream:
                stream.begin_capture()
                for out in outs:
                    cugemm.linear(x, w, out=out, out_dtype="float32", backend=kernel)
                graph = stream.end_capture()
        busy = sum(replay(graph, wanted) for _ in range(100))
        assert int(differ) == 0, f"config {tile}: {int(differ)} of {100 * calls} calls gave other bits"
        assert bool(cp.isfinite(wanted).all()) and busy >= 90, f"the side stream was busy during {busy} of 100 replays"
        wanted.view("uint32")[-1, -1] ^= 1
        cp.cuda.Device().synchronize()
        replay(graph, wanted)
        assert int(differ) == calls, "a wrong bit is not counted"
    side.synchronize()
