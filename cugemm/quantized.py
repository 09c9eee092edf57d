"""`Quantized`: a quantised array kept together with its scales and the name of its format."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from cugemm.arrays import framework_of
from cugemm.formats import ALL, FORMATS, LAYOUTS, Format
from cugemm.scale_layout import TILE_ROWS, padded
from cugemm.scales import BYTE_SCALES, block_counts, ceil_div


@dataclass(frozen=True, repr=False)
class Quantized:
    """real value = (data - zero) * scale * tensor_scale, all in one framework and on one device.

    data: the payload, in the dtype of the format's element or as uint8 bytes (4-bit: two codes a byte along k, low nibble = even k).
    scale: one value per `format.block` of (rows, k); shape as `quantize` returns it, e.g. [rows, 1] for "fp8_row", [1] for "fp8_tensor",
    [rows, ceil(k/16)] for "nvfp4". Scales of mx and nvfp4 formats are bytes (uint8): e8m0 or e4m3 codes.
    format: a `Format` or its name. shape: logical, so k counts values and not bytes; default: data's shape with packed values counted.
    k_axis: the axis that products sum over: 1 for [rows, k] (the default), 0 after `.T`.
    scale_layout: of byte scales, "linear", or "128x4" or "8x4" tiles (scale_layout.py), whose arrays keep their shape under `.T`.
    tensor_scale: the second scale of nvfp4, float32, one element, or per row [rows, 1]; a stack of matrices may have one each, [batch].
    zero: zero points of uint4 formats, uint8, in the shape of the linear scale. layout: "canonical", the only one so far.

    ValueError where shape, data, scales and format do not fit together. Frozen: make a new one rather than changing it. Source: the
    format's (formats.py).

    >>> q = cugemm.quantize(w, "fp8_row")            # w [n, k]
    >>> y = cugemm.linear(x, q)                      # the same as cugemm.matmul(x, q.T)
    """

    data: Any
    scale: Any
    format: Format
    shape: tuple[int, ...] = ()
    k_axis: int = -1
    scale_layout: str = field(default="linear", kw_only=True)
    tensor_scale: Any = field(default=None, kw_only=True)
    zero: Any = field(default=None, kw_only=True)
    layout: str = field(default="canonical", kw_only=True)

    def __post_init__(self) -> None:
        fmt = self.format
        if not isinstance(fmt, Format):
            if not isinstance(fmt, str) or fmt not in FORMATS:
                raise ValueError(f"Quantized: format is {fmt!r}; wanted one of {', '.join(FORMATS)}.")
            fmt = FORMATS[fmt]
            object.__setattr__(self, "format", fmt)
        for role, x in (("data", self.data), ("scale", self.scale), ("zero", self.zero)):
            if x is not None or role != "zero":
                framework_of(x, f"Quantized: {role}")
        self._check_options(fmt)
        stored = _shape(self.data)
        if len(stored) not in (2, 3):
            raise ValueError(f"Quantized: data has shape {stored}; wanted [rows, k] or [batch, rows, k].")
        if not -len(stored) <= self.k_axis < len(stored):
            raise ValueError(f"Quantized: k_axis is {self.k_axis}, but data has shape {stored}; wanted one of its last two axes.")
        axis = self.k_axis % len(stored)
        if axis == 0 and len(stored) == 3:
            raise ValueError("Quantized: k_axis is 0, the batch axis; wanted one of the last two axes.")
        object.__setattr__(self, "k_axis", axis)
        # JAX's float4 is as packed as the others, but its shape counts values.
        per_item = 1 if str(getattr(self.data, "dtype", "")) == "float4_e2m1fn" else fmt.element.per_byte
        logical = tuple(n * per_item if i == axis else n for i, n in enumerate(stored))
        if self.shape and tuple(self.shape) != logical:
            raise ValueError(f"Quantized: shape is {tuple(self.shape)}, but data {stored} of format {fmt.name} holds {logical} values.")
        object.__setattr__(self, "shape", logical)
        self._check_scale(fmt)

    def _check_options(self, fmt: Format) -> None:
        if self.scale_layout not in LAYOUTS:
            raise ValueError(f"Quantized: scale_layout is {self.scale_layout!r}; wanted one of {', '.join(map(repr, LAYOUTS))}.")
        if self.scale_layout != "linear" and fmt.scale.name not in BYTE_SCALES:
            raise ValueError(f"Quantized: scale_layout is {self.scale_layout!r}, but scales of {fmt.name} are floats, always linear.")
        if self.layout != "canonical":
            raise ValueError(f"Quantized: layout is {self.layout!r}; wanted 'canonical'.")
        if self.tensor_scale is not None and fmt.tensor is None:
            raise ValueError(f"Quantized: format {fmt.name} has no tensor_scale; multiply it into scale.")
        if (self.zero is not None) != fmt.zero:
            what = "needs zero, its zero points" if fmt.zero else "has no zero points; drop zero"
            raise ValueError(f"Quantized: format {fmt.name} {what}.")

    def _check_scale(self, fmt: Format) -> None:
        """That there are as many scales as the format has blocks; how they lie is for the operation to read."""
        last = self.ndim - 1
        rows = self.shape[last - 1 if self.k_axis == last else last]
        blocks = block_counts(rows, self.shape[self.k_axis], fmt.block)
        matrices = self.shape[0] if self.ndim == 3 else 1
        high, wide = padded(*blocks, self.scale_layout)
        size = math.prod(_shape(self.scale))
        flat = padded(rows * matrices, blocks[1], self.scale_layout)[0] * wide
        if size not in (high * wide * matrices, high * wide, flat) and not (fmt.block == (ALL, ALL) and size == 1):
            shape = f"{blocks[0]} x {blocks[1]}" + (f", padded to {high} x {wide}" if (high, wide) != blocks else "")
            raise ValueError(
                f"Quantized: scale has shape {_shape(self.scale)}, but {fmt.name} of {self.shape} has {shape} scales"
                f"{' for each matrix' if matrices != 1 else ''}."
            )
        if self.zero is not None and _shape(self.zero) != _shape(self.scale):
            raise ValueError(f"Quantized: zero has shape {_shape(self.zero)}, but scale has {_shape(self.scale)}; they must agree.")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def T(self) -> Quantized:  # noqa: N802 - what every framework calls it
        """The last two axes swapped; free, nothing is copied (JAX copies). Scales go along."""
        last = self.ndim - 1
        swap = self.scale_layout == "linear"

        def scales(x: Any) -> Any:
            return x if x is None or not swap or len(x.shape) < 2 else swapped(x)

        return replace(
            self, data=swapped(self.data), scale=scales(self.scale), zero=scales(self.zero), shape=(),
            k_axis=last if self.k_axis == last - 1 else last - 1,
        )  # fmt: skip

    def __getitem__(self, index: Any) -> Quantized:
        """A part by slices of step 1 along rows and k, and an integer or slice along the stack: views, nothing is copied (tensor parallel).

        Cuts along k fall between scale blocks and whole bytes, cuts along rows between scale blocks; tiled scales are cut along rows only,
        between tiles. ValueError where they do not; `cugemm.quantize` of the part gives any other.
        """
        given = index if isinstance(index, tuple) else (index,)
        given = (*given, *[slice(None)] * (self.ndim - len(given)))
        if len(given) > self.ndim or not all(isinstance(i, slice) or (self.ndim == 3 and at == 0) for at, i in enumerate(given)):
            raise ValueError(
                f"Quantized: index {index!r} of shape {self.shape}; wanted slices (an integer only along a stack of matrices)."
            )
        batch: tuple[Any, ...] = given[: self.ndim - 2]
        own = given[self.ndim - 2 :]
        k_last = self.k_axis == self.ndim - 1
        rows, k = own if k_last else own[::-1]
        row_edges, k_edges = self._edges("rows", rows), self._edges("k", k)
        per_byte = self.format.element.per_byte

        def part(x: Any, first: slice, second: slice) -> Any:
            at = (*batch, first, second) if k_last else (*batch, second, first)
            return x[at]

        data = part(self.data, slice(*row_edges), slice(*(edge // per_byte for edge in k_edges)))
        scale, zero, tensor = self.scale, self.zero, self.tensor_scale
        if self.scale_layout != "linear":
            if k_edges != (0, self.shape[self.k_axis]) or len(_shape(scale)) != self.ndim:
                raise ValueError(f"Quantized: scales in {self.scale_layout} tiles of shape {_shape(scale)} can be cut along rows only.")
            tile = TILE_ROWS[self.scale_layout]
            tiles = (*batch, slice(row_edges[0], ceil_div(row_edges[1], tile) * tile))
            scale = scale[tiles]
        elif len(_shape(scale)) == self.ndim:
            down, across = self.format.block
            cut = slice(None) if down == ALL else slice(row_edges[0] // down, ceil_div(row_edges[1], down))
            along = slice(None) if across == ALL else slice(k_edges[0] // across, ceil_div(k_edges[1], across))
            scale, zero = part(scale, cut, along), zero if zero is None else part(zero, cut, along)
        if self.format.tensor == (1, ALL) and tensor is not None:
            chosen = (*batch, slice(*row_edges))
            tensor = tensor[chosen]
        elif batch and len(_shape(tensor)) == 1 and _shape(tensor) == self.shape[:1]:
            tensor = tensor[batch[0]] if isinstance(batch[0], slice) else tensor[batch[0] : batch[0] + 1 or None]
        gone = int(bool(batch) and not isinstance(batch[0], slice))
        return replace(self, data=data, scale=scale, zero=zero, tensor_scale=tensor, shape=(), k_axis=self.k_axis - gone)

    def _edges(self, axis: str, cut: slice) -> tuple[int, int]:
        """Start and end of a slice, both between blocks."""
        along_k = axis == "k"
        at = self.k_axis if along_k else 2 * self.ndim - 3 - self.k_axis
        length = self.shape[at]
        start, stop, step = cut.indices(length)
        stop = max(start, stop)
        block = self.format.block[along_k]
        unit = max(1 if block == ALL else block, self.format.element.per_byte if along_k else 1)
        if not along_k and self.scale_layout != "linear":
            unit = TILE_ROWS[self.scale_layout]
        if step != 1 or start % unit or (stop % unit and stop != length):
            raise ValueError(
                f"Quantized: {axis} {start}:{stop}:{step} of {length} does not fall between blocks of {unit}; cut at multiples of it."
            )
        return start, stop

    def __repr__(self) -> str:
        more = [f", {name}={_described(x)}" for name, x in (("tensor_scale", self.tensor_scale), ("zero", self.zero)) if x is not None]
        tiles = "" if self.scale_layout == "linear" else f" in {self.scale_layout} tiles"
        transposed = "" if self.k_axis == self.ndim - 1 else ", transposed"
        return (
            f"Quantized({self.format.name}, shape={self.shape}{transposed}, data={_described(self.data)}, "
            f"scale={_described(self.scale)}{tiles}{''.join(more)})"
        )


def swapped(x: Any) -> Any:
    """The last two axes of an array, or of a Spec (which has only `.T`), swapped."""
    return x.T if len(x.shape) == 2 else x.swapaxes(-1, -2)


def _shape(x: Any) -> tuple[int, ...]:
    if x is None or isinstance(x, (int, float)):
        return ()
    return tuple(x.shape) if hasattr(x, "shape") else framework_of(x, "Quantized").view(x, "Quantized").shape


def _described(x: Any) -> str:
    if not hasattr(x, "dtype"):
        return type(x).__name__
    return f"{type(x).__module__.split('.', 1)[0]} {str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
