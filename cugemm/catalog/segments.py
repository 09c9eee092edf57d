"""`kernels/segments.cu`: what callers say about groups becomes the indptr and row map that grouped kernels read."""

from __future__ import annotations

import struct

from cugemm.arrays import itemsize
from cugemm.catalog.step import NULL, Step, Zero
from cugemm.problem import EXPERTS, OUT, SEGMENTS, GemmCall, ceil_div

_TAIL = struct.Struct("<q4i")
_SORT, _SUM, _NARROW = MODES = 0, 1, 2
"""MODE of the kernel."""


def steps(call: GemmCall) -> tuple[list[Step | Zero], int, int, int]:
    """(what to run before the product, positions of indptr, row map and expert map). Rows that nobody selects keep these zeros."""
    if not call.segments:
        return [], NULL, NULL, NULL
    todo: list[Step | Zero] = [_zero_out(call)]
    indptr, row_map, expert_map, scratch = SEGMENTS, NULL, NULL, OUT + 1
    assert call.segment_dtype is not None
    if call.segments == "indices":
        indptr, row_map, scratch = scratch, scratch + 1, scratch + 2
        todo.append(_step(_SORT, ceil_div(call.batch + 1, 8), (SEGMENTS, indptr, row_map), call.m, call.batch, call.segment_dtype))
    elif call.segments == "lens":
        indptr, scratch = scratch, scratch + 1
        todo.append(_step(_SUM, 1, (SEGMENTS, indptr, NULL), call.batch, call.batch, call.segment_dtype))
    elif call.segment_dtype != "int32":
        indptr, scratch = scratch, scratch + 1
        todo.append(_narrow((SEGMENTS, indptr, NULL), call.batch + 1, call.segment_dtype))
    if call.expert_dtype is not None:
        expert_map = EXPERTS
        if call.expert_dtype != "int32":
            expert_map = scratch
            todo.append(_narrow((EXPERTS, expert_map, NULL), call.batch, call.expert_dtype))
    return todo, indptr, row_map, expert_map


def _narrow(pointers: tuple[int, int, int], count: int, dtype: str) -> Step:
    return _step(_NARROW, max(ceil_div(count, 256), 1), pointers, count, count, dtype)


def _step(mode: int, grid: int, pointers: tuple[int, int, int], count: int, groups: int, dtype: str) -> Step:
    return Step("segments", (("MODE", mode),), grid, 256, 0, pointers, (), _TAIL.pack(1, count, groups, itemsize(dtype), 1))


def _zero_out(call: GemmCall) -> Zero:
    """All of `out`, along whichever of its axes is contiguous."""
    size = itemsize(call.problem.out)
    _, row, column = call.out_strides
    width, height, pitch = (call.n, call.m, row) if column == 1 or call.n == 1 else (call.m, call.n, column)
    return Zero(OUT, max(pitch, width) * size, width * size, height)
