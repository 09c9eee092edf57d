"""Calls on host memory: the views of a `Call` become NumPy arrays and go through `reference`."""

from __future__ import annotations

from typing import Any

from cugemm import reference
from cugemm.arrays import Array, View, host_array, numpy_dtype
from cugemm.conversion import QuantizeCall, QuantizeOptions
from cugemm.formats import ELEMENTS, FORMATS
from cugemm.problem import A_SCALE, ALPHA, B_SCALE, BIAS, EXPERTS, SEGMENTS, A, Argument, B, GemmCall, Scale


def run(call: GemmCall | QuantizeCall, views: tuple[Argument, ...], options: Any, outputs: tuple[View, ...]) -> None:
    """Compute `call` on host views and write the results into host `outputs`."""
    results = _gemm(call, views) if isinstance(call, GemmCall) else _quantize(call, views, options)
    for result, output in zip(results, outputs, strict=True):
        host_array(output)[...] = result.reshape(output.shape)


def _gemm(call: GemmCall, views: tuple[Argument, ...]) -> tuple[Array, ...]:
    problem = call.problem
    a_element, b_element = ELEMENTS[problem.a], ELEMENTS[problem.b]
    batch_b = call.experts if problem.grouped else call.batch
    a = _matrix(views[A], (1 if problem.grouped else call.batch, call.m, call.k // a_element.per_byte), call.a_strides)
    batch, column, k = call.b_strides
    b = _matrix(views[B], (batch_b, call.k // b_element.per_byte, call.n), (batch, k, column))
    groups = None
    if problem.grouped:
        groups = reference.Groups(_experts(call, views))
        a = a[0]
    return (
        reference.gemm(
            a, b, a_element=problem.a, b_element=problem.b,
            a_scale=_scale(views[A_SCALE], call.a_scale, (0, 1, 2)), a_block=call.a_scale.block if call.a_scale else (0, 0),
            b_scale=_scale(views[B_SCALE], call.b_scale, (0, 2, 1)), b_block=call.b_scale.block[::-1] if call.b_scale else (0, 0),
            alpha=_one(views[ALPHA]), bias=_array(views[BIAS]), out_dtype=problem.out, groups=groups,
        ),
    )  # fmt: skip


def _experts(call: GemmCall, views: tuple[Argument, ...]) -> Array:
    rows = _array(views[SEGMENTS])
    assert rows is not None
    if call.segments == "indices":
        return rows
    return reference.experts_from_segments(
        call.m, **{call.segments: rows}, weight_indices=_array(views[EXPERTS]), experts=call.experts
    )  # fmt: skip


def _quantize(call: QuantizeCall, views: tuple[Argument, ...], options: QuantizeOptions) -> tuple[Array, ...]:
    fmt = FORMATS[options.format]
    x = _array(views[0])
    assert x is not None
    if call.problem.direction == "dequantize":
        scale = _array(views[1])
        assert scale is not None
        return (reference.dequantize(x.view(numpy_dtype(fmt.element.dtype)), scale, fmt, options.dtype),)
    if options.cast:
        return (reference.cast(x, fmt),)
    return reference.quantize(x, fmt)


def _matrix(view: Argument, shape: tuple[int, int, int], strides: tuple[int, int, int]) -> Array:
    assert isinstance(view, View)
    return host_array(view._replace(shape=shape, strides=strides))


def _array(view: Argument) -> Array | None:
    return host_array(view) if isinstance(view, View) else None


def _one(view: Argument) -> float:
    if isinstance(view, View):
        return float(host_array(view).reshape(()))
    return 1.0 if view is None else float(view)


def _scale(view: Argument, scale: Scale | None, axes: tuple[int, int, int]) -> Array | float | None:
    if not isinstance(view, View):
        return view
    assert scale is not None
    blocks: Array = host_array(view._replace(shape=scale.shape, strides=scale.strides)).transpose(axes)
    return blocks
