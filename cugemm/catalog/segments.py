"""`kernels/segments.cu`: what callers say about groups becomes the indptr, row map and counts that grouped kernels read."""

from __future__ import annotations

import struct
from typing import NamedTuple

from cugemm.arrays import itemsize
from cugemm.catalog.step import NULL, Step, Zero
from cugemm.problem import EXPERTS, OUT, ROWS, SEGMENTS, GemmCall
from cugemm.scales import ceil_div

_TAIL = struct.Struct("<q4i")
_SORT, _SUM, _NARROW = MODES = 0, 1, 2
"""MODE of the kernel."""


class Grouping(NamedTuple):
    """`steps` to run before the product, and the pointer positions of the int32 arrays it then reads; NULL where there is none.

    indptr: of "masked" the counts. row_map: rows of the result by position, of "indices". expert_map: the matrix of each segment.
    rows: the row of a that each row of the result comes from.
    """

    steps: tuple[Step | Zero, ...] = ()
    indptr: int = NULL
    row_map: int = NULL
    expert_map: int = NULL
    rows: int = NULL


def steps(call: GemmCall, clear: bool = True) -> Grouping:
    """How `call` says which rows go where. clear: rows of the result that nobody selects keep the zeros of the first steps."""
    if not call.segments and call.rows_dtype is None:
        return Grouping()
    todo: list[Step | Zero] = [*_clear(call)] if clear else []
    scratch = OUT + 1  # the next of `problem._segment_workspaces`

    def own(position: int, count: int, dtype: str | None) -> int:
        """Position of an int32 array with these integers: the caller's own or a narrowed copy."""
        nonlocal scratch
        if dtype is None:
            return NULL
        if dtype == "int32":
            return position
        todo.append(_step(_NARROW, max(ceil_div(count, 256), 1), (position, scratch, NULL), count, count, dtype))
        scratch += 1
        return scratch - 1

    indptr, row_map = SEGMENTS, NULL
    if call.segment_dtype is None:
        rows = own(ROWS, call.m, call.rows_dtype)
        return Grouping(tuple(todo), rows=rows)
    if call.segments == "indices":
        indptr, row_map, scratch = scratch, scratch + 1, scratch + 2
        todo.append(_step(_SORT, ceil_div(call.batch + 1, 8), (SEGMENTS, indptr, row_map), call.m, call.batch, call.segment_dtype))
    elif call.segments == "lens":
        indptr, scratch = scratch, scratch + 1
        todo.append(_step(_SUM, 1, (SEGMENTS, indptr, NULL), call.batch, call.batch, call.segment_dtype))
    else:
        indptr = own(SEGMENTS, call.batch + (call.segments == "indptr"), call.segment_dtype)
    expert_map = own(EXPERTS, call.batch, call.expert_dtype)
    rows = own(ROWS, call.m, call.rows_dtype)
    return Grouping(tuple(todo), indptr, row_map, expert_map, rows)


def _step(mode: int, grid: int, pointers: tuple[int, int, int], count: int, groups: int, dtype: str) -> Step:
    return Step("segments", (("MODE", mode),), grid, 256, 0, pointers, (), _TAIL.pack(1, count, groups, itemsize(dtype), 1))


def _clear(call: GemmCall) -> list[Zero]:
    """All of `out`: one rectangle wherever its axes allow it, else one for each step along the shortest axis that remains."""
    size = itemsize(call.problem.out)
    batch = call.batch if call.segments == "masked" else 1
    width = 1
    axes: list[tuple[int, int]] = []
    for step, length in sorted(zip(call.out_strides, (batch, call.m, call.n), strict=True)):
        if length == 1:
            continue
        if step == width:
            width *= length
        elif axes and step == axes[-1][0] * axes[-1][1]:
            axes[-1] = (axes[-1][0], axes[-1][1] * length)
        else:
            axes.append((step, length))
    axes.sort(key=lambda axis: axis[1])
    (pitch, height), (step, count) = [*axes, (width, 1), (0, 1)][:2] if len(axes) < 2 else (axes[1], axes[0])
    return [Zero(OUT, pitch * size, width * size, height, *([i * step * size] if i else [])) for i in range(count)]
