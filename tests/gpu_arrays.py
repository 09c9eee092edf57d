"""For the gpu tests: NumPy arrays onto the device with their strides and alignment and back, layouts, and a say in which config runs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import oracles

from cugemm import arch, launch, select
from cugemm.catalog import gemm

Array = np.ndarray[Any, Any]


def memory_of(x: Array) -> tuple[Array, int]:
    """(all bytes of the buffer that `x` is a view of, where `x` begins in them)."""
    root = x
    while isinstance(root.base, np.ndarray):
        root = root.base
    low, high = np.lib.array_utils.byte_bounds(root)
    raw = np.frombuffer((ctypes.c_ubyte * (high - low)).from_address(low), np.uint8).copy() if high > low else np.zeros(16, np.uint8)
    return raw, (x.ctypes.data - low if x.size else 0)


class Placed(NamedTuple):
    """An array on the device, the bytes it lies in, and the NumPy array it looks like."""

    array: Any
    memory: Any
    offset: int
    like: Array


class Cupy:
    """Takes NumPy arrays to the GPU as CuPy arrays of the same shape, strides, dtype and alignment, poisoned surroundings included."""

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy

    def place(self, x: Array) -> Placed:
        raw, offset = memory_of(x)
        memory = self.cupy.asarray(raw)
        plain = self.cupy.ndarray(x.shape, f"u{x.dtype.itemsize}", memory.data + offset, strides=x.strides)
        return Placed(plain if plain.dtype == x.dtype else plain.view(x.dtype), memory, offset, x)

    def bytes(self, placed: Placed) -> Array:
        return np.asarray(self.cupy.asnumpy(placed.memory))

    def fetch(self, x: Any) -> Array:
        """A result, row-major or not, as a NumPy array."""
        plain = self.cupy.ascontiguousarray(x.view(f"u{x.dtype.itemsize}"))
        return np.asarray(self.cupy.asnumpy(plain)).view(x.dtype)

    def free(self) -> None:
        """Give pooled memory back to the device."""
        self.cupy.get_default_memory_pool().free_all_blocks()

    def unpooled(self) -> None:
        """From now on every array is a cudaMalloc of its own, as a sanitizer wants it."""
        self.cupy.cuda.set_allocator(None)

    def put(self, x: Any) -> Any:
        """Arrays are taken to the device, everything else passes."""
        return self.place(x).array if isinstance(x, np.ndarray) else x

    def get(self, placed: Placed) -> Array:
        """The placed array as it is now, in a buffer as large as the first."""
        like = placed.like
        return np.ndarray(like.shape, like.dtype, self.bytes(placed), placed.offset, like.strides)


# --- layouts ----------------------------------------------------------------------------------------------------------------------


def aligned(x: Array, *, transposed: bool = False, margin: int = 16) -> Array:
    """The same values in a poisoned buffer, rows (or columns) beginning at multiples of 16 bytes, `margin` bytes on all sides."""
    if transposed:
        return aligned(x.swapaxes(-1, -2), margin=margin).swapaxes(-1, -2)
    *batch, rows, columns = x.shape
    size = x.dtype.itemsize
    side = margin // size
    pitch = -(-columns * size // 16) * 16 // size + 2 * side
    buffer = oracles.poison((*batch, rows + 2, pitch), x.dtype.name)
    view = buffer[..., 1 : 1 + rows, side : side + columns]
    view[...] = x
    return view


def gaps(x: Array) -> Array:
    """The same values with every second element along both axes between them poisoned: no axis is contiguous."""
    *batch, rows, columns = x.shape
    view = oracles.poison((*batch, 2 * rows + 1, 2 * columns + 1), x.dtype.name)[..., 1::2, 1::2][..., :rows, :columns]
    view[...] = x
    return view


LAYOUTS = {
    "row": aligned,
    "column": functools.partial(aligned, transposed=True),
    "odd row": oracles.embed,
    "odd column": functools.partial(oracles.embed, transposed=True),
    "gaps": gaps,
}
"""How an operand lies in memory; the last three cannot be read in 16-byte pieces."""


def untouched(memory: Array, placed: Placed) -> bool:
    """Whether everything around a poisoned array is poison still."""
    around = memory.copy()
    like = placed.like
    inside = np.ndarray(like.shape, f"u{like.dtype.itemsize}", around, placed.offset, like.strides)
    inside[...] = np.iinfo(inside.dtype).max
    return bool((around == 0xFF).all())


# --- which config -----------------------------------------------------------------------------------------------------------------


def forget() -> None:
    """Forget plans, keep loaded functions (launch.clear drops these too, and loading them again takes most of the time)."""
    loaded = dict(launch._FUNCTIONS)
    launch.clear()
    launch._FUNCTIONS.update(loaded)


@contextmanager
def planned(tile: int | None = None, target: str = "native", ranked: select.Ranked | None = None) -> Iterator[None]:
    """Inside, products take the config number `tile` of their kernel instead of the cheapest, or just `ranked`, compiled for `target`."""
    choose, machine = select.choose, launch.machine

    def chosen(problem: Any, device: Any) -> Any:
        multiplies = hasattr(problem, "scale_block")
        if ranked is not None and multiplies:
            return select.Choice(problem, (ranked,), ())
        found = choose(problem, device)
        if tile is None or not multiplies:
            return found
        configs = found.best.kernel.candidates(problem, device)
        best = next(r for r in found.ranking if r.config == configs[tile % len(configs)])
        return found._replace(ranking=(best, *(r for r in found.ranking if r is not best)))

    forget()
    select.choose = chosen
    if target != "native":
        launch.machine = functools.cache(lambda device: (arch.get(target), machine(device)[1]))
    try:
        yield
    finally:
        select.choose, launch.machine = choose, machine
        forget()


@contextmanager
def delayed(seed: int) -> Iterator[None]:
    """Inside, products are builds whose warps sleep now and then, another pattern for each seed (kernels/common/delay.cuh)."""
    step = gemm.Step
    forget()
    gemm.Step = lambda source, defines, *rest: step(source, (*defines, ("DELAY", seed)), *rest)
    try:
        yield
    finally:
        gemm.Step = step
        forget()
