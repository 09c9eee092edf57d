"""FlashInfer's rearrangements of scales and weights: `block_scale_interleave`, `shuffle_matrix_a`, `shuffle_matrix_sf_a`, and views."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

from cugemm.api.common import choice, flag, shape_of, shown
from cugemm.arrays import Cupy, Spec, Torch, framework_of, itemsize, numpy_dtype
from cugemm.conversion import QuantizeOp, QuantizeOptions
from cugemm.launch import run
from cugemm.problem import register
from cugemm.quantized import Quantized
from cugemm.scale_layout import TILE_ROWS, SfLayout, name_of

INTERLEAVE: QuantizeOp = register(QuantizeOp("block_scale_interleave", ("unswizzled_sf",), "interleave"))
_SHUFFLE: QuantizeOp = register(QuantizeOp("shuffle_matrix_sf_a", ("input_tensor",), "interleave"))
_TILES = QuantizeOptions("", scale_layout="128x4")


def block_scale_interleave(unswizzled_sf: Any) -> Any:
    """out[place of (r, c) in 128x4 tiles] = unswizzled_sf[r, c], zeros where tiles are padded.

    unswizzled_sf: [rows, blocks] or [batch, rows, blocks], uint8 or bfloat16 (float8_e4m3fn and float8_e8m0fnu as well), any strides.
    Returns batch * ceil(rows / 128) * 128 * ceil(blocks / 4) * 4 scales in one axis, each matrix padded by itself; the same dtype.

    Raises ValueError (shape) and TypeError (dtype), naming the argument.
    Source: FlashInfer `block_scale_interleave`; the layout is that of tcgen05.mma and cuBLASLt (scale_layout.py).

    >>> sf = cugemm.block_scale_interleave(linear_sf)
    """
    return shaped(run(INTERLEAVE, (unswizzled_sf,), _TILES), (-1,))


nvfp4_block_scale_interleave = block_scale_interleave


def shuffle_matrix_a(input_tensor: Any, epilogue_tile_m: int) -> Any:
    """out[s * b + r] = input[s * b + r // 8 + r % 8 * (b / 8)] for r in 0 .. b-1: the rows of every slab of b, shuffled.

    input_tensor: [rows, k], any dtype. epilogue_tile_m: b is 32 if it is a multiple of 128, else 16; rows must be a multiple of b.
    Returns a copy in the caller's framework.

    Raises TypeError and ValueError, naming the argument. The kernels of this library read weights as they are: the shuffle is here for
    code that prepares weights for FlashInfer's TensorRT-LLM kernels, whose register layout it follows.
    Source: FlashInfer `shuffle_matrix_a`.

    >>> w_shuffled = cugemm.shuffle_matrix_a(w, 128)
    """
    return _shuffled("shuffle_matrix_a", input_tensor, epilogue_tile_m)


def shuffle_matrix_sf_a(input_tensor: Any, epilogue_tile_m: int, num_elts_per_sf: int = 16) -> Any:
    """block_scale_interleave(shuffle_matrix_a(input_tensor, epilogue_tile_m)): the scales that go with shuffled rows.

    input_tensor: [rows, blocks] linear scales, uint8 or bfloat16; rows a multiple of 128. num_elts_per_sf: 16 or 32, values under a scale.
    Returns 128x4 tiles in one axis. Raises TypeError and ValueError, naming the argument. Source: FlashInfer `shuffle_matrix_sf_a`.

    >>> sf_shuffled = cugemm.shuffle_matrix_sf_a(linear_sf, 128)
    """
    name = "shuffle_matrix_sf_a"
    choice(name, "num_elts_per_sf", num_elts_per_sf, (16, 32), "16 (nvfp4) or 32 (mxfp4, mxfp8)")
    shape = shape_of(name, "input_tensor", input_tensor)
    if len(shape) == 2 and shape[0] % TILE_ROWS["128x4"]:
        raise ValueError(f"{name}: input_tensor has shape {shape}; its rows must be a multiple of 128: pad them.")
    return shaped(run(_SHUFFLE, (_shuffled(name, input_tensor, epilogue_tile_m),), _TILES), (-1,))


def _shuffled(name: str, x: Any, epilogue_tile_m: int) -> Any:
    shape = shape_of(name, "input_tensor", x)
    if len(shape) != 2:
        raise ValueError(f"{name}: input_tensor has shape {shape}; wanted [rows, k].")
    if not isinstance(epilogue_tile_m, Integral) or isinstance(epilogue_tile_m, bool) or epilogue_tile_m < 1:
        raise ValueError(f"{name}: epilogue_tile_m is {shown(epilogue_tile_m)}; wanted the rows of the kernel's tile, such as 128.")
    slab = 32 if epilogue_tile_m % 128 == 0 else 16
    if shape[0] % slab:
        raise ValueError(f"{name}: input_tensor has shape {shape}; its rows must be a multiple of {slab}: pad them.")
    framework = framework_of(x, name)
    if not isinstance(framework, Cupy):
        return shuffled_rows(x, slab)
    dtype = framework.view(x, name).dtype  # NOTE: CuPy copies no 8-bit floats, but integers of their size
    return viewed(shuffled_rows(viewed(x, f"int{8 * itemsize(dtype)}"), slab), dtype)


def shuffled_rows(x: Any, slab: int = 32) -> Any:
    """Rows of each slab in the order 0, b/8, 2b/8, .., 1, b/8 + 1, ..: its 8 x b/8 rows transposed."""
    shape = tuple(x.shape)
    return shaped(swapped_axes(shaped(x, (shape[0] // slab, 8, slab // 8, *shape[1:])), (1, 2)), shape)


# --- views that every framework has -----------------------------------------------------------------------------------------------


def layout_of(name: str, role: str, layout: Any) -> str:
    """The library's name of an SfLayout or its number."""
    known = tuple(map(int, SfLayout))
    return name_of(choice(name, role, layout, known, f"one of {', '.join(f'SfLayout.{each.name}' for each in SfLayout)}"))


def tiles(name: str, is_sf_swizzled_layout: Any, is_sf_8x4_layout: Any) -> str:
    """The layout that FlashInfer's pair of flags means."""
    eight_rows = flag(name, "is_sf_8x4_layout", is_sf_8x4_layout)
    return "linear" if not flag(name, "is_sf_swizzled_layout", is_sf_swizzled_layout) else "8x4" if eight_rows else "128x4"


def shaped(x: Any, shape: tuple[int, ...]) -> Any:
    """x.reshape(shape); a Spec, which stands for an array while a call is planned, has no such method."""
    if not isinstance(x, Spec):
        if not hasattr(x, "reshape") or type(x) is Quantized:
            raise TypeError(f"a {type(x).__name__} has no reshape; pass a torch, CuPy, JAX or NumPy array.")
        return x.reshape(shape)
    size = math.prod(n for n in shape if n >= 0)
    return Spec(tuple(n if n >= 0 else math.prod(x.shape) // max(size, 1) for n in shape), x.dtype, device=x.device)


def swapped_axes(x: Any, *pairs: tuple[int, int]) -> Any:
    """A view of x with pairs of axes swapped, one pair after the other."""
    for a, b in pairs:
        if isinstance(x, Spec):
            order = list(range(len(x.shape)))
            order[a], order[b] = order[b], order[a]
            x = Spec([x.shape[i] for i in order], x.dtype, strides=[x.strides[i] for i in order], device=x.device)
        else:
            x = x.swapaxes(a, b)
    return x


def viewed(x: Any, dtype: str) -> Any:
    """The bytes of x as another dtype of the same size, in x's framework."""
    if isinstance(x, Spec):
        return Spec(x.shape, dtype, strides=x.strides, device=x.device)
    framework = framework_of(x, "result")
    return x.view(framework.dtype(dtype) if isinstance(framework, Torch) else numpy_dtype(dtype))
