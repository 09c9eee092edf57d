"""What a catalogue entry hands to the launcher: kernels to run, memory to clear, and the interface both agree on."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from cugemm.arch import Device

NULL = -1
"""Pointer position that means a null pointer (pointer tables end with a 0)."""


REACHED = {1: 1.0, 2: 1.0, 4: 0.87, 8: 0.84}
"""Part of the SMs that clusters of so many CTAs reach: they do not fit every GPC (measured on an H100)."""


class Zero(NamedTuple):
    """Fill `height` rows of `width` bytes, `pitch` bytes apart, with zeros, from `offset` bytes behind the pointer.

    `pointer`: position in the call's pointer table.
    """

    pointer: int
    pitch: int
    width: int
    height: int
    offset: int = 0


class TensorMap(NamedTuple):
    """What TMA knows of an array (128 bytes that the driver encodes), for boxes of at most three axes with 128-byte swizzle.

    pointer: position in the pointer table; offset: bytes behind it. size, pitches: of the axes, the contiguous one first; pitches in
    bytes, of the others.
    """

    pointer: int
    itemsize: int
    size: tuple[int, int, int]
    pitches: tuple[int, int]
    box: tuple[int, int, int]
    offset: int = 0


class Step(NamedTuple):
    """One kernel launch.

    The argument struct is the pointers at `pointers`, the floats at `scalars` (1.0 where the call has none), then `tail`, then `maps`. pdl:
    it may begin before the kernel ahead of it in the stream has ended, and waits by itself. scratch: floats that the call's steps leave for
    each other, the workspace behind those that the call itself names.
    """

    source: str
    defines: tuple[tuple[str, int], ...]
    grid: int
    threads: int
    smem: int
    pointers: tuple[int, ...]
    scalars: tuple[int, ...]
    tail: bytes
    pdl: bool = False
    scratch: int = 0
    maps: tuple[TensorMap, ...] = ()


class Kernel(Protocol):
    """One catalogue entry: a kernel source and everything the host knows about it."""

    name: str
    """What `explain` prints and, of a kernel that multiplies, `backend=` accepts."""
    multiplies: bool

    def refuse(self, problem: Any) -> str | None:
        """Why this kernel cannot do `problem`, as a sentence; None if it can."""

    def candidates(self, problem: Any, device: Device) -> tuple[Any, ...]:
        """The finite list of configs for it."""

    def cost(self, problem: Any, config: Any, device: Device) -> float:
        """Predicted microseconds; pure."""

    def steps(self, call: Any, config: Any) -> tuple[Step | Zero, ...]:
        """What to launch for one call. Pointer positions: arguments in role order, outputs beyond `out=`, workspaces."""
