"""FlashInfer's ways back to float32: `e2m1_and_ufp8sf_scale_to_float`, `mxfp4_dequantize`, and the `_host` ones.

FlashInfer computes these on the CPU; here the result lies where the operands do, in the caller's framework.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from cugemm.api.common import choice, matches, shape_of, shown
from cugemm.api.shuffle import layout_of, shaped, tiles
from cugemm.arrays import Spec, framework_of, is_scalar
from cugemm.conversion import QuantizeOp, QuantizeOptions
from cugemm.formats import FP32, MXFP4, MXFP8, NVFP4, Format
from cugemm.launch import run
from cugemm.problem import register
from cugemm.scale_layout import SfLayout


def _op(name: str, data: str, scale: str, tensor_scale: str = "tensor_scale") -> QuantizeOp:
    op: QuantizeOp = register(QuantizeOp(name, (data, scale, tensor_scale, "zero"), "dequantize"))
    return op


_TO_FLOAT = _op("e2m1_and_ufp8sf_scale_to_float", "e2m1_tensor", "ufp8_scale_tensor", "global_scale_tensor")
_FROM_MXFP4 = _op("mxfp4_dequantize", "a_fp4", "a_sf")
_FROM_MXFP4_HOST = _op("mxfp4_dequantize_host", "weight", "scale")
_FROM_MXFP8_HOST = _op("mxfp8_dequantize_host", "input", "scale_tensor")
_FORMATS = {(16, 1): NVFP4, (32, 0): MXFP4}
"""By FlashInfer's (sf_vec_size, ufp8_type)."""


def e2m1_and_ufp8sf_scale_to_float(
    e2m1_tensor: Any,
    ufp8_scale_tensor: Any,
    global_scale_tensor: Any = None,
    sf_vec_size: int = 16,
    ufp8_type: int = 1,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
) -> Any:
    """x[m, k] = e2m1(q) * sf * global_scale_tensor in float32, in this order.

    e2m1_tensor: uint8 [.., m, k/2], two codes a byte, low nibble = even k.
    ufp8_scale_tensor: uint8, any shape with as many scales as `fp4_quantize` returns for these layout flags; linear ones are read as such
    only with is_sf_swizzled_layout=False. sf_vec_size and ufp8_type: 16 and 1 (nvfp4, e4m3) or 32 and 0 (mxfp4, e8m0).
    global_scale_tensor: float32 of one element or a number, multiplied: the inverse of what `fp4_quantize` took. None: 1.
    Returns float32 [.., m, k].

    Raises TypeError and ValueError, naming the argument. Source: FlashInfer `e2m1_and_ufp8sf_scale_to_float`.

    >>> x = cugemm.e2m1_and_ufp8sf_scale_to_float(q, sf, 1 / g)
    """
    name = "e2m1_and_ufp8sf_scale_to_float"
    fmt = next((fmt for said, fmt in _FORMATS.items() if matches((sf_vec_size, ufp8_type), said)), None)
    if fmt is None:
        raise ValueError(
            f"{name}: sf_vec_size is {shown(sf_vec_size)} and ufp8_type {shown(ufp8_type)}; wanted 16 and 1 (nvfp4) or 32 and 0 (mxfp4)."
        )
    layout = tiles(name, is_sf_swizzled_layout, is_sf_8x4_layout)
    if is_sf_8x4_layout and not is_sf_swizzled_layout:
        raise ValueError(f"{name}: is_sf_8x4_layout is True, but is_sf_swizzled_layout is False; wanted one layout.")
    g = global_scale_tensor
    if g is not None and not is_scalar(g) and math.prod(shape_of(name, "global_scale_tensor", g)) != 1:
        raise ValueError(f"{name}: global_scale_tensor has shape {shape_of(name, 'global_scale_tensor', g)}; wanted one element.")
    options = _options(fmt, layout)
    if fmt is NVFP4:
        return run(_TO_FLOAT, (e2m1_tensor, ufp8_scale_tensor, g, None), options)
    factor = _factor(name, g, e2m1_tensor)
    x = run(_TO_FLOAT, (e2m1_tensor, ufp8_scale_tensor, None, None), options)
    return x if factor is None or isinstance(x, Spec) else x * factor  # mxfp4 has no second scale of its own


def _factor(name: str, g: Any, beside: Any) -> Any:
    """g as what leaves the dtype and shape of a float32 array that it multiplies."""
    if g is None or isinstance(g, Spec):
        return None
    if is_scalar(g):
        if not abs(g) <= FP32.max:  # an int may be too long for a float
            raise ValueError(f"{name}: global_scale_tensor is {shown(g)}; wanted a number that float32 holds.")
        return float(g)
    own, other = framework_of(g, f"{name}: global_scale_tensor"), framework_of(beside, f"{name}: e2m1_tensor")
    view, data = own.view(g, "global_scale_tensor"), other.view(beside, "e2m1_tensor")
    if view.dtype != FP32.dtype:
        raise TypeError(f"{name}: global_scale_tensor is {view.dtype}; wanted float32.")
    if type(own) is not type(other) or view.device != data.device:
        raise TypeError(
            f"{name}: global_scale_tensor is a {own.name} array on device {view.device}, but e2m1_tensor is {other.name} on {data.device}; "
            "they must agree."
        )
    return shaped(g, ())


def mxfp4_dequantize(a_fp4: Any, a_sf: Any, sfLayout: SfLayout | int = SfLayout.layout_128x4) -> Any:
    """x[m, k] = e2m1(a_fp4) * 2^(a_sf - 127), float32.

    a_fp4: uint8 [.., m, k/2]. a_sf: uint8, any shape with as many scales as `mxfp4_quantize` returns. sfLayout: of a_sf.
    Raises TypeError and ValueError, naming the argument. Source: FlashInfer `mxfp4_dequantize`.

    >>> x = cugemm.mxfp4_dequantize(*cugemm.mxfp4_quantize(w))
    """
    return run(_FROM_MXFP4, (a_fp4, a_sf, None, None), _options(MXFP4, layout_of("mxfp4_dequantize", "sfLayout", sfLayout)))


def mxfp4_dequantize_host(weight: Any, scale: Any, group_size: int = 32) -> Any:
    """x[m, k] = e2m1(weight) * 2^(scale - 127), float32, of linear scales.

    weight: uint8 [m, k/2]. scale: uint8 [m, k/32], row-major and not tiled. group_size: 32, the block of mxfp4.
    Raises TypeError and ValueError, naming the argument. Source: FlashInfer `mxfp4_dequantize_host`.

    >>> x = cugemm.mxfp4_dequantize_host(blocks, scales)
    """
    choice("mxfp4_dequantize_host", "group_size", group_size, (32,), "32, as mxfp4 has one scale for each 32 values")
    return run(_FROM_MXFP4_HOST, (weight, scale, None, None), _options(MXFP4, "linear"))


def mxfp8_dequantize_host(
    input: Any, scale_tensor: Any, is_sf_swizzled_layout: bool = True, sf_swizzle_layout: SfLayout | int | None = None
) -> Any:
    """x[m, k] = e4m3(input) * 2^(scale_tensor - 127), float32.

    input: [.., m, k], float8_e4m3fn or its bytes as uint8. scale_tensor: uint8, any shape with as many scales as `mxfp8_quantize` returns.
    is_sf_swizzled_layout: 128x4 tiles, else linear; sf_swizzle_layout, if given, decides instead.
    Raises TypeError and ValueError, naming the argument. Source: FlashInfer `mxfp8_dequantize_host`.

    >>> x = cugemm.mxfp8_dequantize_host(*cugemm.mxfp8_quantize(w))
    """
    layout = tiles("mxfp8_dequantize_host", is_sf_swizzled_layout, False)
    if sf_swizzle_layout is not None:
        layout = layout_of("mxfp8_dequantize_host", "sf_swizzle_layout", sf_swizzle_layout)
    return run(_FROM_MXFP8_HOST, (input, scale_tensor, None, None), _options(MXFP8, layout))


@functools.lru_cache(maxsize=64)
def _options(fmt: Format, layout: str) -> QuantizeOptions:
    return QuantizeOptions(fmt.name, dtype="float32", scale_layout=layout, flat=True)
