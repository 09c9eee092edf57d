"""Checks of the numbers inside arrays: always for host memory, on a GPU only under CUGEMM_DEBUG=1, because reading them synchronises (R13).

On a GPU without it, wrong numbers have defined results instead: an index that names no matrix, or a segment that is none, selects nothing.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from cugemm import driver
from cugemm.arrays import HOST, Array, View, host_array, itemsize, numpy_dtype
from cugemm.formats import E8M0
from cugemm.host_product import linear_scale
from cugemm.intake import Op
from cugemm.problem import A_SCALE, A_TENSOR, ALPHA, B_SCALE, B_TENSOR, EXPERTS, ROWS, SEGMENTS, Argument, GemmCall
from cugemm.scales import Scale

DEBUG = os.environ.get("CUGEMM_DEBUG", "") not in ("", "0")
"""Read once. Every call then synchronises before it is launched and after, and its values are checked."""


def check(op: Op, call: Any, views: tuple[Argument, ...], device: int, stream: int) -> None:
    """ValueError that names the argument and counts the wrong values, never showing them."""
    if not isinstance(call, GemmCall):
        return
    if device != HOST:
        driver.synchronize(stream)
        scales = ((A_SCALE, call.a_scale), (B_SCALE, call.b_scale), (A_TENSOR, call.a_tensor), (B_TENSOR, call.b_tensor), (ALPHA, None))
        for position, scale in scales:
            view = views[position]
            if isinstance(view, View) and view.size:
                _refuse(op, position, _not_finite(view, scale), "not finite")
    said, chosen, rows = views[SEGMENTS], views[EXPERTS], views[ROWS]
    if isinstance(said, View):
        _segments(op, call, _read(said).astype(np.int64))
    if isinstance(chosen, View):
        _indices(op, EXPERTS, _read(chosen), call.experts)
    if isinstance(rows, View):
        values = _read(rows)
        wrong = np.count_nonzero((values < -1) | (values >= call.a_rows))
        _refuse(op, ROWS, int(wrong), f"outside [-1, {call.a_rows}), the rows of {op.roles[0]}; -1 is none")


def _not_finite(view: View, scale: Scale | None) -> int:
    """How many scales are; what pads the tiles of byte scales is not looked at."""
    if scale is None or not scale.element:
        return int(np.count_nonzero(~np.isfinite(_read(view).astype(np.float32))))
    codes = linear_scale(view, scale, _read)
    return int(np.count_nonzero(codes == 0xFF if scale.element == E8M0.name else codes & 0x7F == 0x7F))


def _segments(op: Op, call: GemmCall, rows: Array) -> None:
    if call.segments == "indices":
        _indices(op, SEGMENTS, rows, call.experts)
    elif call.segments == "lens":
        _refuse(op, SEGMENTS, int(np.count_nonzero(rows < 0)), "negative")
        _refuse(op, SEGMENTS, int(np.count_nonzero(np.cumsum(rows) > call.m)), f"past the last of the {call.m} rows")
    elif call.segments == "masked":
        _refuse(op, SEGMENTS, int(np.count_nonzero((rows < 0) | (rows > call.m))), f"outside [0, {call.m}], the rows of each matrix")
    else:
        _refuse(op, SEGMENTS, int(np.count_nonzero((rows < 0) | (rows > call.m))), f"outside [0, {call.m}]")
        _refuse(op, SEGMENTS, int(np.count_nonzero(np.diff(rows) < 0)), "below the one before; an indptr never goes down")


def _indices(op: Op, position: int, values: Array, experts: int) -> None:
    wrong = np.count_nonzero((values < -1) | (values >= experts))
    _refuse(op, position, int(wrong), f"outside [-1, {experts}), the matrices of {op.roles[1]}; -1 is none")


def _refuse(op: Op, position: int, wrong: int, how: str) -> None:
    if wrong:
        raise ValueError(
            f"{op.name}: {op.roles[position]} has {wrong} value{'s' if wrong > 1 else ''} {how}; correct them before the call."
        )


def _read(view: View) -> Array:
    """The values of a view in host memory, or a copy of those on a GPU."""
    if view.device == HOST:
        return host_array(view)
    if view.size == 0:
        return np.empty(view.shape, numpy_dtype(view.dtype))
    span = view.span()
    memory = np.empty(span, np.uint8)
    with driver.on_device(view.device):
        driver.copy_to_host(memory.ctypes.data, view.ptr, span)
    size = itemsize(view.dtype)
    copied: Array = np.ndarray(view.shape, numpy_dtype(view.dtype), memory, strides=tuple(s * size for s in view.strides))
    return copied
