"""What every test has: the gpu mark, --require, a cache of its own, seeded random numbers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cugemm import arch, driver, launch

ROOT = Path(__file__).resolve().parent.parent

_seeds: dict[str, int] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cugemm")
    group.addoption(
        "--require", default="", metavar="MODULES", help="comma-separated modules whose absence is a failure, not a skip; `gpu` too"
    )
    group.addoption(
        "--target", default="", metavar="ARCH", help="run GPU code built for this arch (compute_80: PTX of sm_80 on a newer GPU)"
    )
    group.addoption("--seed", type=int, default=None, help="seed of the `rng` fixture, as a failed test printed it")


def _required(config: pytest.Config) -> set[str]:
    return {name.strip() for name in config.getoption("--require").split(",")} - {""}


def _installed(module: str) -> bool:
    if module == "g++":
        return shutil.which(module) is not None
    return importlib.util.find_spec(module) is not None


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is shared with torch, CuPy and other processes
    missing = sorted(name for name in _required(config) - {"gpu"} if not _installed(name))
    if missing:
        raise pytest.UsageError(f"--require: {', '.join(missing)} is not installed")
    if "gpu" in _required(config) and not driver.available():
        raise pytest.UsageError("--require: there is no GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_missing = _why_no_gpu() if any(item.get_closest_marker("gpu") for item in items) else None
    for item in items:
        if gpu_missing and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=gpu_missing))
        modules = {name for mark in item.iter_markers("requires") for name in mark.args}
        absent = sorted(name for name in modules if not _installed(name))
        if absent:
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(absent)}"))


def _why_no_gpu() -> str | None:
    if not driver.available():
        return "needs an NVIDIA GPU and its driver"
    return None if _installed("cupy") else "needs CuPy"


def _skipped_for(reason: str, required: set[str]) -> str | None:
    """The required module that a skip's reason names ("could not import 'torch'", "needs torch")."""
    return next((name for name in sorted(required) if name.lower() in reason.lower()), None)


def _fail_if_required(report: pytest.TestReport | pytest.CollectReport, required: set[str]) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        name = _skipped_for(report.longrepr[2], required)
        if name is not None:
            report.outcome = "failed"
            report.longrepr = f"{report.longrepr[2]}, but --require {name} forbids the skip"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    _fail_if_required(report, _required(item.config))
    if report.failed and item.nodeid in _seeds:
        report.sections.append(("random numbers", f"repeat with --seed {_seeds[item.nodeid]}"))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    _fail_if_required(report, _required(collector.config))
    return report


@pytest.fixture(scope="session", autouse=True)
def _cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled kernels go to a directory of this run, unless CUGEMM_CACHE_DIR names one (a pack, say)."""
    with pytest.MonkeyPatch.context() as patch:
        if "CUGEMM_CACHE_DIR" not in os.environ:
            patch.setenv("CUGEMM_CACHE_DIR", str(tmp_path_factory.mktemp("cugemm-cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _target(request: pytest.FixtureRequest) -> Iterator[None]:
    """Under --target, every device passes for one of that arch."""
    name, machine = request.config.getoption("--target"), launch.machine
    with pytest.MonkeyPatch.context() as patch:
        if name:
            patch.setattr(launch, "machine", lambda device: (arch.get(name), machine(device)[1]))
        yield


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers of this test, the same in every run; a failure prints the seed."""
    seed = request.config.getoption("--seed")
    seed = zlib.crc32(request.node.nodeid.encode()) if seed is None else seed
    _seeds[request.node.nodeid] = seed
    return np.random.default_rng(seed)


TINY = """
#include "common/scale.cuh"
extern "C" __global__ void tiny(float* x) { x[threadIdx.x] = scale(N); }
"""
TINY_HEADER = """#pragma once
__device__ float scale(int n) { return n * 2.0f; }
"""


@pytest.fixture
def tiny_kernels(tmp_path: Path) -> Path:
    """A kernel directory with tiny.cu, which includes one header and wants -DN."""
    return write_tiny_kernels(tmp_path / "kernels")


def write_tiny_kernels(directory: Path) -> Path:
    (directory / "common").mkdir(parents=True)
    (directory / "tiny.cu").write_text(TINY)
    (directory / "common" / "scale.cuh").write_text(TINY_HEADER)
    return directory


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Calling it points CUGEMM_CACHE_DIR to a new empty directory and forgets what this process kept elsewhere."""
    from cugemm import compile as compiler

    count = 0

    def fresh() -> Path:
        nonlocal count
        count += 1
        directory = tmp_path / f"cache-{count}"
        monkeypatch.setenv("CUGEMM_CACHE_DIR", str(directory))
        monkeypatch.setattr(compiler, "_private", None)
        monkeypatch.setattr(compiler, "_warned", False)
        compiler._memory.clear()
        compiler.stats.clear()
        return directory

    return fresh
