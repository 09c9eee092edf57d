"""Calls on host memory: the views of a `Call` become NumPy arrays and go through `reference`."""

from __future__ import annotations

from typing import Any

import numpy as np

from cugemm import host_product, quantize_reference, rows_reference
from cugemm.arrays import Array, View, host_array
from cugemm.conversion import COUNTS, PRE_SCALE, ZERO, QuantizeCall, QuantizeOptions
from cugemm.formats import FORMATS
from cugemm.problem import Argument, GemmCall
from cugemm.rowwise import RowsCall, RowsOptions


def run(call: GemmCall | QuantizeCall | RowsCall, views: tuple[Argument, ...], options: Any, outputs: tuple[View, ...]) -> None:
    """Compute `call` on host views and write the results into host `outputs`."""
    if isinstance(call, RowsCall):
        results: tuple[Array, ...] = (_rows(call, views, options),)
    else:
        results = (host_product.product(call, views),) if isinstance(call, GemmCall) else _convert(call, views, options)
    for result, output in zip(results, outputs, strict=True):
        host_array(output)[...] = result.reshape(output.shape)


def _convert(call: QuantizeCall, views: tuple[Argument, ...], options: QuantizeOptions) -> tuple[Array, ...]:
    x = _array(views[0])
    assert x is not None
    if call.problem.direction == "interleave":
        return (quantize_reference.laid_out(x, options.scale_layout, options.flat),)
    fmt = FORMATS[options.format]
    if options.cast:
        return (quantize_reference.cast(x, fmt),)
    arrays = [_array(view) if isinstance(view, View) else view for view in views[1:]]
    if call.problem.direction == "dequantize":
        scale, tensor, _ = arrays
        return (
            quantize_reference.dequantize(
                x, np.asarray(scale), fmt, options.dtype, tensor_scale=tensor, zero=_array(views[ZERO]), layout=options.scale_layout,
                flat=options.flat, group=options.group, scale_axes=options.scale_axes,
            ),
        )  # fmt: skip
    return quantize_reference.quantize(
        x, fmt, tensor_scale=arrays[0], encode_scale=options.encode_scale, emit_tensor=options.emit_tensor,
        pre_scale=_array(views[PRE_SCALE]), counts=_array(views[COUNTS]), silu=options.silu, align=options.align,
        layout=options.scale_layout, flat=options.flat, group=options.group, eps=options.eps, ceil_scale=options.ceil_scale,
        scale_axes=options.scale_axes,
    )  # fmt: skip


def _rows(call: RowsCall, views: tuple[Argument, ...], options: RowsOptions) -> Array:
    first, second, third = (_array(view) for view in views[:3])
    assert first is not None
    if call.problem.op == "silu_and_mul":
        return rows_reference.silu_and_mul(first, second, options.gate, call.problem.out)
    assert second is not None
    return rows_reference.combine(first, second, third, call.problem.out)


def _array(view: Argument) -> Array | None:
    return host_array(view) if isinstance(view, View) else None
