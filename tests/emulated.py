"""Kernels without a GPU: inside `emulated()` calls on NumPy arrays run the launches that a GPU would get, compiled as C++ by g++.

tests/emulator has what CUDA and PTX are to a kernel there. Schedules of threads are random, and shared memory and float results are
poisoned, so that a missing barrier, wait or element shows; a launch that may begin early finds poison where the kernel ahead writes until
it has waited. Nothing shows about speed, registers, or how the hardware rounds sums: here an MMA rounds once.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from conftest import ROOT

from cugemm import arch, host, launch, select
from cugemm.arrays import View, host_array, numpy_dtype
from cugemm.catalog import Step, Zero
from cugemm.problem import B_SCALE, OUT_DTYPES, B

EMULATOR = ROOT / "tests" / "emulator"


@functools.cache
def _sources() -> Path:
    """The kernels with the emulator's ptx.cuh among them, and shared memory that is an array."""
    sources = Path(tempfile.mkdtemp(prefix="cugemm-emulator-"))
    atexit.register(shutil.rmtree, sources, ignore_errors=True)
    shutil.copytree(ROOT / "kernels", sources, dirs_exist_ok=True)
    for header in ("ptx.cuh", "hopper.cuh"):
        shutil.copy(EMULATOR / header, sources / "common" / header)
    for kernel in sources.glob("*.cu"):
        text = kernel.read_text()
        kernel.write_text(re.sub(r"extern __shared__ .*shared_bytes\[\];", "u8* const shared_bytes = emulator::memory();", text))
    return sources


@functools.cache
def _library(source: str, defines: tuple[tuple[str, int], ...], capability: int, args: str) -> ctypes.CDLL:
    sources = _sources()
    macros = [f"-D{name}={value}" for name, value in (*defines, ("__CUDA_ARCH__", capability))]
    library = sources / f"{source}-{hashlib.md5(' '.join(macros).encode()).hexdigest()}.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-ffp-contract=off", "-U_FORTIFY_SOURCE", f"-I{sources}", f"-I{EMULATOR}"]
    command = [
        "g++",
        *flags,
        *macros,
        f'-DSOURCE="{source}.cu"',
        f"-DENTRY={source}",
        f"-DARGS={args}",
        str(EMULATOR / "main.cpp"),
        "-o",
        str(library),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:4000]}"
    return ctypes.CDLL(str(library))


def _tensor_map(pointer: int, itemsize: int, size: tuple[int, ...], pitches: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """What `driver.tensor_map` says to the driver, with the limits that it has, as the emulator's `TensorMap`."""
    if pointer % 16:
        return bytes(128)
    assert all(0 < n <= 2**32 for n in size) and all(0 < n <= 256 for n in box)
    assert all(pitch % 16 == 0 and 0 <= pitch < 2**40 for pitch in pitches) and box[0] * itemsize in (16, 32, 64, 128)
    return struct.pack("<8sQ3Q2Q3II56x", b"ensormap", pointer, *size, *pitches, *box, itemsize)


def _launch(
    step: Step, pointers: list[int], values: list[float], target: str, seed: int, eager: bool,
    late: tuple[tuple[int, int], ...] = (), memory: tuple[tuple[int, int], ...] = (),
) -> None:  # fmt: skip
    """late: (pointer, bytes) of memory that the kernel ahead writes; memory: of all that the kernel may read."""

    def pointer(position: int) -> int:
        return 0 if position < 0 else pointers[position]

    head = struct.pack(
        f"<{len(step.pointers)}Q{len(step.scalars)}f", *map(pointer, step.pointers), *(values[p] if p >= 0 else 1.0 for p in step.scalars)
    )
    packed = head + step.tail + b"".join(_tensor_map(pointer(m.pointer) + m.offset, *m[1:-1]) for m in step.maps)
    found = arch.get(target)
    capability = 10 * (10 * found.capability[0] + found.capability[1])
    library = _library(step.source, step.defines, capability, "TensorArgs" if step.maps else "Args")
    library.failure.restype = ctypes.c_char_p
    kept = [(at, ctypes.string_at(at, size), size) for at, size in late]
    for at, written, size in kept:
        ctypes.memset(at, 0xFF, size)
        library.write_late(ctypes.c_void_p(at), written, ctypes.c_ulonglong(size))
    for at, size in memory:
        library.allow(ctypes.c_ulonglong(at), ctypes.c_ulonglong(size))
    code = library.launch(packed, len(packed), step.grid, step.threads, step.smem, seed, int(eager))
    said = library.failure().decode()
    assert code == 0, {1: "threads wait for each other for ever", 2: "the host packs another argument struct"}.get(code, said)


def _clear(zero: Zero, pointers: list[int]) -> None:
    for row in range(zero.height):
        ctypes.memset(pointers[zero.pointer] + zero.offset + row * zero.pitch, 0, zero.width)


@contextmanager
def emulated(target: str = "sm_90a", tile: int | None = None, seed: int = 1, eager: bool = False) -> Iterator[list[str]]:
    """Yields the list of kernels that ran. tile: number of the config, instead of the cheapest. eager: copies, products at once."""
    ran: list[str] = []
    roles: tuple[str, ...] = ()
    host_call, run = launch._host_call, host.run

    def call_of(op: Any, *rest: Any) -> Any:
        nonlocal roles
        roles = op.roles
        return host_call(op, *rest)

    def run_steps(call: Any, views: tuple[Any, ...], options: Any, outputs: tuple[View, ...]) -> None:
        if all(0 in view.shape for view in outputs):
            return
        choice = select.choose(call.problem._replace(arch=target), arch.H100)
        kernel, config = choice.best.kernel, choice.best.config
        if tile is not None and hasattr(call.problem, "scale_block"):
            configs = kernel.candidates(choice.problem, arch.H100)
            config = configs[tile % len(configs)]
        for view in outputs:
            if view.dtype in OUT_DTYPES:
                host_array(view)[...] = np.nan
        scratch = [np.full(shape, 0x55, numpy_dtype(dtype)) for shape, dtype in call.workspaces]
        table = [view.ptr if isinstance(view, View) else 0 for view in views]
        made = [view.ptr for view in outputs]
        if "out" in roles:
            table[roles.index("out")] = made.pop(0)
        steps = kernel.steps(call, config)
        for step in steps:
            if isinstance(step, Step) and step.scratch:
                scratch.append(np.full(step.scratch, np.nan, np.float32))
        table += [*made, *(x.ctypes.data for x in scratch)]
        values = [view if isinstance(view, float) else 1.0 for view in views]
        early = {B, B_SCALE} if getattr(config, "pdl", getattr(choice.problem, "pdl", "")) == "static" else set()
        arrays = [view for position, view in enumerate(views) if isinstance(view, View) and position not in early]
        late = tuple((view.ptr, view.span()) for view in (*arrays, *outputs))
        late += tuple((x.ctypes.data, x.nbytes) for x in scratch)
        memory = tuple((view.ptr, view.span()) for view in (*views, *outputs) if isinstance(view, View))
        memory += tuple((x.ctypes.data, x.nbytes) for x in scratch)
        for step in steps:
            if isinstance(step, Zero):
                _clear(step, table)
            elif step.grid:
                _launch(step, table, values, target, seed, eager, late if step.pdl else (), memory)
                ran.append(step.source)

    launch._host_call, host.run = call_of, run_steps  # type: ignore[assignment]
    try:
        yield ran
    finally:
        launch._host_call, host.run = host_call, run
