"""Kernel launches packed but for pointers: what a plan keeps, and the few bytes that a warm call still writes."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from cugemm import driver
from cugemm.catalog import Step, TensorMap, Zero

_CONFIG = struct.Struct("<7I4xQQI4x")
"""CUlaunchConfig: grid, block, dynamic shared memory, stream, attributes, their number (56 bytes, see `driver.LaunchConfig`)."""
_STREAM_AT, _PARAMS_AT, _ARGS_AT, _MAX_ARGS = 32, 56, 64, 1024
_pack_stream = struct.Struct("<Q").pack_into
_pack_float = struct.Struct("<f").pack_into


_PDL = driver.LaunchAttribute(id=driver.PROGRAMMATIC_STREAM_SERIALIZATION)
_PDL.value[0] = 1


class _Thread(threading.local):
    """Each thread packs its launches into memory of its own, because the driver call releases the GIL (R15)."""

    def __init__(self) -> None:
        memory = ctypes.create_string_buffer(_ARGS_AT + _MAX_ARGS)
        address = ctypes.addressof(memory)
        _pack_stream(memory, _PARAMS_AT, address + _ARGS_AT)  # the one kernel parameter: the argument struct
        self.parts = memoryview(memory).cast("B"), memory, address, address + _PARAMS_AT


_thread = _Thread()


class Maps(dict[int, bytes]):
    """What TMA knows of one operand of a launch, by the pointer that came with it; as many as a model has layers of one shape."""

    _MOST, _NONE = 512, bytes(128)

    def __init__(self, map: TensorMap, pointer: int, offset: int, device: int) -> None:
        self.map, self.pointer, self.offset, self.device = map, pointer, offset, device

    def __missing__(self, pointer: int) -> bytes:
        if len(self) >= self._MOST:
            self.clear()
        address = pointer + self.map.offset
        if address % 16:  # a result that TMA cannot store
            return self._NONE
        with driver.on_device(self.device):  # a thread may have no context yet
            found = self[pointer] = driver.tensor_map(address, *self.map[1:-1])
        return found


class Launch(NamedTuple):
    """One kernel launch: only pointers, by-value scalars and the stream are still to be written."""

    function: int
    config: bytes
    args: bytes
    pick: Callable[[Sequence[int]], Sequence[int]]  # of a pointer table, those of the kernel
    pack: Callable[..., None]
    scalars: tuple[tuple[int, int], ...]  # (offset in the arguments, position of the argument)
    device: int
    maps: tuple[Maps, ...] = ()

    def __call__(self, arrays: Sequence[Any], pointers: Sequence[int], stream: int) -> None:
        view, memory, config, params = _thread.parts
        view[:_PARAMS_AT] = self.config
        view[_ARGS_AT : _ARGS_AT + len(self.args)] = self.args
        self.pack(memory, _ARGS_AT, *self.pick(pointers))
        for offset, position in self.scalars:
            _pack_float(memory, _ARGS_AT + offset, arrays[position])  # OverflowError outside float32
        for maps in self.maps:
            view[maps.offset : maps.offset + 128] = maps[pointers[maps.pointer]]
        _pack_stream(memory, _STREAM_AT, stream)
        failed = driver.launch_ex(config, self.function, params, None)
        if failed:
            driver.relaunch(config, self.function, params, self.device, failed)


class Clear(NamedTuple):
    """A `Zero` step: memory to clear, `pointer` its place in the pointer table."""

    pointer: int
    zero: Zero
    device: int

    def __call__(self, arrays: Sequence[Any], pointers: Sequence[int], stream: int) -> None:
        zero = self.zero
        with driver.on_device(self.device):
            driver.memset_2d(pointers[self.pointer] + zero.offset, zero.pitch, zero.width, zero.height, stream)


def pack(
    step: Step | Zero, place: Callable[[int], int], function: Callable[[Step], int], by_value: Sequence[bool], device: int
) -> Launch | Clear:
    """Pack one step. `place` turns a pointer position of the catalogue into one of the pointer tables that the launch will get;
    `by_value` says which arguments are Python floats."""
    if isinstance(step, Zero):
        return Clear(place(step.pointer), step, device)
    scalars_at = 8 * len(step.pointers)
    head = struct.Struct(f"<{len(step.pointers)}Q{len(step.scalars)}f")
    args = head.pack(*[0] * len(step.pointers), *[1.0] * len(step.scalars)) + step.tail
    maps = tuple(Maps(m, place(m.pointer), _ARGS_AT + len(args) + 128 * i, device) for i, m in enumerate(step.maps))
    args += bytes(128 * len(maps))
    assert len(args) <= _MAX_ARGS and len(step.pointers) > 1
    pdl = step.pdl and driver.version() >= (12, 3)  # NOTE: older ones refuse such launches in a capture; in order they are right as well
    config = _CONFIG.pack(step.grid, 1, 1, step.threads, 1, 1, step.smem, 0, ctypes.addressof(_PDL) if pdl else 0, int(pdl))
    scalars = tuple((scalars_at + 4 * i, position) for i, position in enumerate(step.scalars) if by_value[position])
    picked = itemgetter(*map(place, step.pointers))
    return Launch(function(step), config, args, picked, struct.Struct(f"<{len(step.pointers)}Q").pack_into, scalars, device, maps)
