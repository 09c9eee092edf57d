"""Products on host memory: the views of a `GemmCall` become NumPy arrays with linear scales and go through `reference`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from cugemm import reference
from cugemm.arrays import Array, View, host_array, numpy_dtype
from cugemm.formats import ALL, ELEMENTS
from cugemm.problem import (
    A_SCALE,
    A_TENSOR,
    ALPHA,
    B_SCALE,
    B_TENSOR,
    BIAS,
    EXPERTS,
    ROWS,
    SEGMENTS,
    ZERO,
    A,
    Argument,
    B,
    GemmCall,
)  # fmt: skip
from cugemm.scale_layout import deinterleave, padded
from cugemm.scales import Scale


def product(call: GemmCall, views: tuple[Argument, ...]) -> Array:
    """The result [.., m, n] of a checked product."""
    problem = call.problem
    grouped = problem.grouped
    if grouped and not call.a_rows:
        return np.zeros((call.m, call.n), numpy_dtype(problem.out))
    batch = 1 if grouped else call.batch
    a = _matrix(views[A], (batch, call.a_rows, call.k // ELEMENTS[problem.a].per_byte), call.a_strides)
    a_scale, a_tensor = _scale(views[A_SCALE], call.a_scale, call.a_rows), _scale(views[A_TENSOR], call.a_tensor, call.a_rows)
    a_block = call.a_scale.block if call.a_scale else (ALL, ALL)
    groups = None
    if grouped:
        expert, segment_row = _experts(call, views)
        expert, source = _sources(call, views, expert)
        groups, a, a_tensor = reference.Groups(expert), a[0, source], _take(a_tensor, source, 1)
        scale_row = segment_row if call.a_scale and call.a_scale.rows.startswith("pad") else source
        a_scale, a_block = _take(a_scale, scale_row, max(a_block[0], 1)), (min(a_block[0], 1), a_block[1])
    elif call.rows_dtype:
        exists, source = _sources(call, views, np.zeros(call.m, np.int64))
        a = a[:, source] if call.a_rows else np.zeros((1, call.m, a.shape[2]), a.dtype)
    b_scale, b_tensor, zero = (
        _transposed(_scale(views[position], scale, call.n))
        for position, scale in ((B_SCALE, call.b_scale), (B_TENSOR, call.b_tensor), (ZERO, call.zero))
    )
    result = reference.gemm(
        a, _b(call, views[B]), a_element=problem.a, b_element=problem.b,
        a_scale=a_scale, a_block=a_block, a_scale_element=problem.a_scale, a_tensor=a_tensor,
        b_scale=b_scale, b_block=call.b_scale.block[::-1] if call.b_scale else (ALL, ALL), b_scale_element=problem.b_scale,
        b_tensor=b_tensor, b_zero=zero, alpha=_one(views[ALPHA]), bias=_array(views[BIAS]), out_dtype=problem.out,
        groups=groups, counts=_array(views[SEGMENTS]) if call.segments == "masked" else None,
    )  # fmt: skip
    if call.rows_dtype and not grouped:
        result[..., exists < 0, :] = 0
    return result


def _b(call: GemmCall, view: Argument) -> Array:
    """b as [batch, k, n], panels joined."""
    batch, column, k = call.b_strides
    stored = call.k // ELEMENTS[call.problem.b].per_byte
    if call.b_panel:
        return _matrix(view, (stored // 128, 128, call.n), (call.b_panel, k, column)).reshape(1, stored, call.n)
    return _matrix(view, (call.experts if call.problem.grouped else call.batch, stored, call.n), (batch, k, column))


def _experts(call: GemmCall, views: tuple[Argument, ...]) -> tuple[Array, Array]:
    """Of each row of the result: its expert, and its row among scales whose segments are padded."""
    said = _array(views[SEGMENTS])
    assert said is not None
    if call.segments == "indices":
        return said.reshape(-1), np.zeros(call.m, np.int64)
    segments = {call.segments: said}
    expert = reference.experts_from_segments(call.m, **segments, weight_indices=_array(views[EXPERTS]), experts=call.experts)
    if call.a_scale is None or not call.a_scale.rows.startswith("pad"):
        return expert, expert
    starts, segment = reference.segments_of(call.m, **segments)
    pad, row = int(call.a_scale.rows[3:]), np.arange(call.m)
    start = np.append(starts, 0)[segment]
    return expert, np.where(segment < 0, 0, (start + segment * (pad - 1)) // pad * pad + row - start)


def _sources(call: GemmCall, views: tuple[Argument, ...], expert: Array) -> tuple[Array, Array]:
    """(expert, row of a) of each row of the result; no expert where a has no such row."""
    rows = _array(views[ROWS])
    source = np.arange(call.m) // call.a_repeat if rows is None else rows
    exists = (source >= 0) & (source < call.a_rows)
    return np.where(exists, expert, -1), np.where(exists, source, 0)


def _matrix(view: Argument, shape: tuple[int, int, int], strides: tuple[int, int, int]) -> Array:
    assert isinstance(view, View)
    return host_array(view._replace(shape=shape, strides=strides))


def _array(view: Argument) -> Array | None:
    return host_array(view) if isinstance(view, View) else None


def _one(view: Argument) -> float:
    if isinstance(view, View):
        return float(host_array(view).reshape(()))
    return 1.0 if view is None else float(view)


def _scale(view: Argument, scale: Scale | None, rows: int) -> Array | float | None:
    """Scales as [matrices, row blocks, k blocks] (byte scales as uint8), numbers as they are."""
    if not isinstance(view, View):
        return view
    assert scale is not None
    linear = linear_scale(view, scale)
    return linear.reshape(scale.shape[1] // rows if rows else 1, rows, scale.shape[2]) if scale.rows == "flat" else linear


def linear_scale(view: View, scale: Scale, read: Callable[[View], Array] = host_array) -> Array:
    """`scale.shape` values without the padding of tiles, codes as uint8; `read` brings a view's memory here."""
    count, high, wide = scale.shape
    if scale.layout == "linear":
        linear = read(view._replace(shape=scale.shape, strides=scale.strides))
    else:
        each = math.prod(padded(high, wide, scale.layout))
        linear = deinterleave(read(view._replace(shape=(count, each), strides=(scale.strides[0], 1))), high, wide, scale.layout)
    return linear.view(np.uint8) if scale.element else linear


def _take(scale: Array | float | None, rows: Array, block: int) -> Array | float | None:
    """The scale of each of these rows of a grouped product."""
    if not isinstance(scale, np.ndarray) or scale.shape[-2] == 1:
        return scale
    return scale[:, rows // block]


def _transposed(scale: Array | float | None) -> Array | float | None:
    return scale.swapaxes(-1, -2) if isinstance(scale, np.ndarray) else scale
