"""`python -m cugemm bench --host | --cold`: what a call costs the host, warm in every framework, and first in a process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cugemm import cases, measure, records
from cugemm.api import fp8
from cugemm.arrays import numpy_dtype
from cugemm.records import Row

_SHAPE = (16, 4096, 4096)


# Warm calls


def host_rows() -> list[Row]:
    """Host time of a warm `mm_fp8` per framework, with and without out=, beside torch._scaled_mm, in one run."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes most of the GPU's memory from the others
    import cupy  # noqa: PLC0415

    calls: dict[str, Callable[[], object]] = {}
    notes: dict[str, str] = {}
    for name, make in (("CuPy", _cupy_calls), ("PyTorch", _torch_calls), ("JAX, eager", _jax_calls)):
        try:
            made = make()
            for call in made.values():
                call()
            calls |= made
        except Exception as error:  # a framework that is absent or broken is a note
            notes[name] = f"{name}: {records.reason(error)}"
    times = measure.host_us(calls, cupy.cuda.Device().synchronize)
    product = records.product(cases.CASES["fp8_tensor"], *_SHAPE)
    peers = {name: us for name, us in times.items() if name.startswith("torch.")}
    rows = [records.row(product, host_us=us, host_baselines=peers, note=f"{name}, warm") for name, us in times.items() if name not in peers]
    return rows + [records.row(product, host_us=None, host_baselines=peers, note=note) for note in notes.values()]


def _operands() -> tuple[Any, Any, Any, Any]:
    """(a [m, k], w [n, k], scale of a [1], of w [1]) in host memory."""
    m, n, k = _SHAPE
    x = np.random.default_rng(0).standard_normal((m + n, k), np.float32).astype(numpy_dtype("float8_e4m3fn"))
    return x[:m], x[m:], np.full(1, 0.5, np.float32), np.full(1, 0.5, np.float32)


def _cupy_calls() -> dict[str, Callable[[], object]]:
    a, w, sa, sb = map(measure.to_device, _operands())
    b = w.T
    out = fp8.mm_fp8(a, b, a_scale=sa, b_scale=sb)
    return {
        "CuPy": lambda: fp8.mm_fp8(a, b, a_scale=sa, b_scale=sb),
        "CuPy, out=": lambda: fp8.mm_fp8(a, b, a_scale=sa, b_scale=sb, out=out),
    }


def _torch_calls() -> dict[str, Callable[[], object]]:
    torch = _needed("torch")
    a, w = (torch.from_numpy(x.view(np.uint8)).cuda().view(torch.float8_e4m3fn) for x in _operands()[:2])
    b, sa, sb = w.t(), torch.full((1,), 0.5, device="cuda"), torch.full((1,), 0.5, device="cuda")
    out = fp8.mm_fp8(a, b, a_scale=sa, b_scale=sb)
    scaled_mm, options = torch._scaled_mm, {"scale_a": sa, "scale_b": sb, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return {
        "PyTorch": lambda: fp8.mm_fp8(a, b, a_scale=sa, b_scale=sb),
        "PyTorch, out=": lambda: fp8.mm_fp8(a, b, a_scale=sa, b_scale=sb, out=out),
        "torch.fp8_tensor": lambda: scaled_mm(a, b, **options),
        "torch.fp8_tensor, out=": lambda: scaled_mm(a, b, **options, out=out),
    }


def _jax_calls() -> dict[str, Callable[[], object]]:
    jax = _needed("jax")
    a, w, sa, sb = map(jax.device_put, _operands())
    b = w.T.block_until_ready()
    return {"JAX, eager": lambda: fp8.mm_fp8(a, b, a_scale=sa, b_scale=sb)}


def _needed(name: str) -> Any:
    found = measure.optional(name)
    if found is None:
        raise ImportError(f"{name} is not installed")
    return found


# First calls


def first_calls() -> list[Row]:
    """Host time of the first `mm_fp8` of a process: on an empty cache of kernels, and on one that has it."""
    rows = []
    product = records.product(cases.CASES["fp8_tensor"], *_SHAPE)
    with tempfile.TemporaryDirectory() as cache:
        for note in ("first call, nothing in the cache", "first call, kernel in the cache"):
            environment = {**os.environ, "CUGEMM_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(sys.path)}
            command = (sys.executable, "-c", "from cugemm import bench_host; print(bench_host.time_first_call())")
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            us = round(float(done.stdout), 1) if done.returncode == 0 else None
            why = "" if us is not None else f": {(done.stderr.strip().splitlines() or ['failed'])[-1][:200]}"
            rows.append(records.row(product, host_us=us, host_baselines={}, note=note + why))
    return rows


def time_first_call() -> float:
    """Microseconds from the first call of `mm_fp8` to its result; run in a fresh process."""
    import cupy  # noqa: PLC0415

    a, w, sa, sb = map(measure.to_device, _operands())
    cupy.cuda.Device().synchronize()
    started = time.perf_counter()
    fp8.mm_fp8(a, w.T, a_scale=sa, b_scale=sb)
    cupy.cuda.Device().synchronize()
    return (time.perf_counter() - started) * 1e6
