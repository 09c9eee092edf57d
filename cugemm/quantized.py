"""`Quantized`: a quantised array kept together with its scales and the name of its format."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

from cugemm.arrays import dense_strides, framework_of, is_scalar
from cugemm.formats import ALL, FORMATS, LAYOUTS, Format
from cugemm.scale_layout import TILE_ROWS, padded
from cugemm.scales import BYTE_SCALES, block_counts, ceil_div

_ALIGNED = 16
"""Bytes that products read at once."""


@dataclass(frozen=True, repr=False, eq=False)
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
        if not isinstance(self.k_axis, Integral) or isinstance(self.k_axis, bool):
            raise TypeError(f"Quantized: k_axis is a {type(self.k_axis).__name__}; wanted an int, one of data's last two axes.")
        if not -len(stored) <= self.k_axis < len(stored):
            raise ValueError(f"Quantized: k_axis is {self.k_axis}, but data has shape {stored}; wanted one of its last two axes.")
        axis = int(self.k_axis) % len(stored)
        if axis == 0 and len(stored) == 3:
            raise ValueError("Quantized: k_axis is 0, the batch axis; wanted one of the last two axes.")
        object.__setattr__(self, "k_axis", axis)
        logical = tuple(n * self._per_item if i == axis else n for i, n in enumerate(stored))
        if not isinstance(self.shape, (tuple, list)):
            raise TypeError(f"Quantized: shape is a {type(self.shape).__name__}; wanted a tuple, such as {logical}, or nothing.")
        if self.shape and tuple(self.shape) != logical:
            raise ValueError(f"Quantized: shape is {tuple(self.shape)}, but data {stored} of format {fmt.name} holds {logical} values.")
        object.__setattr__(self, "shape", logical)
        self._check_scale(fmt)

    def _check_options(self, fmt: Format) -> None:
        for role, name in (("scale_layout", self.scale_layout), ("layout", self.layout)):
            if not isinstance(name, str):
                raise TypeError(f"Quantized: {role} is a {type(name).__name__}; wanted a string.")
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
        given = _shape(self.scale)
        size = math.prod(given)
        flat = padded(rows * matrices, blocks[1], self.scale_layout)[0] * wide
        if self.ndim == 3 and self.scale_layout == "linear":  # as products read it: of each matrix, or shared
            each = blocks if self.k_axis == last else blocks[::-1]
            known = given in ((matrices, *each), (1, *each), each) or (
                fmt.block == (1, ALL) and given == (rows,) and not rows == matrices > 1
            )
            known = known or (size == 1 and blocks == (1, 1) and fmt.scale.name not in BYTE_SCALES)
        else:
            shared = size == high * wide and (matrices == 1 or (len(given) == 3 and given[0] == 1))
            known = shared or size in (high * wide * matrices, flat)
        if not known and not (fmt.block == (ALL, ALL) and size == 1):
            shape = f"{blocks[0]} x {blocks[1]}" + (f", padded to {high} x {wide}" if (high, wide) != blocks else "")
            raise ValueError(
                f"Quantized: scale has shape {_shape(self.scale)}, but {fmt.name} of {self.shape} has {shape} scales"
                f"{' for each matrix' if matrices != 1 else ''}."
            )
        if self.zero is not None and _shape(self.zero) != _shape(self.scale):
            raise ValueError(f"Quantized: zero has shape {_shape(self.zero)}, but scale has {_shape(self.scale)}; they must agree.")

    @property
    def _per_item(self) -> int:
        """Values in one item of data: JAX's float4 is as packed as the others, but its shape counts values."""
        return 1 if str(getattr(self.data, "dtype", "")) == "float4_e2m1fn" else self.format.element.per_byte

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

    def prepare(self) -> Quantized:
        """The same values where products read them fastest: contiguous along k, in rows at multiples of 16 bytes, or of k where that is no
        such multiple; itself if they lie so.

        For weights that are transposed views or odd slices: a copy without gaps, made once. Tensor cores of Hopper read fp8 along k alone,
        so a product transposes a weight that lies otherwise in every call (`cugemm.explain` says so). Scales stay where they are. NumPy,
        CuPy and PyTorch; arrays of other frameworks have one layout, and stay.

        >>> w = cugemm.Quantized(w_kn.T, scale, "fp8_tensor").prepare()  # w_kn [k, n]
        """
        framework = framework_of(self.data, "Quantized.prepare: data")
        if framework.name not in ("NumPy", "CuPy", "PyTorch") or framework.abstract(self.data):
            return self
        k_last = self.k_axis == self.ndim - 1
        rows = self.data if k_last else swapped(self.data)  # of bytes, in every format
        view = framework.view(rows, "Quantized.prepare: data")
        *lines, step = view.strides
        odd = any(line % _ALIGNED for line in lines)
        if step == 1 and (view.strides == dense_strides(view.shape) if odd else view.ptr % _ALIGNED == 0):
            return self
        room = framework.empty(view.shape, "uint8", rows, view.device)
        room[...] = rows.view(room.dtype)  # NOTE: CuPy copies no float8
        data = room.view(rows.dtype)
        return replace(self, data=data if k_last else swapped(data))

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Quantized]:
        """The matrices of a stack."""
        if self.ndim != 3:
            raise TypeError(f"Quantized: one matrix {self.shape} has no parts to go through; take slices, q[first:last].")
        return (self[i] for i in range(self.shape[0]))

    def __getitem__(self, index: Any) -> Quantized:
        """A part by slices of step 1 along rows and k, and an integer or slice along the stack: views, nothing is copied (tensor parallel).

        Cuts along k fall between scale blocks and whole bytes, cuts along rows between scale blocks; tiled scales are cut along rows only,
        between tiles. ValueError where they do not; `cugemm.quantize` of the part gives any other. IndexError past the end of a stack.
        """
        stack, own = self._cuts(index)
        k_last = self.k_axis == self.ndim - 1
        rows, k = own if k_last else own[::-1]
        row_edges, k_edges = self._edges("rows", rows), self._edges("k", k)
        row_cut = slice(*row_edges)

        def part(x: Any, first: slice, second: slice) -> Any:
            """x [rows, k] of each matrix or of all, in the order of data's axes."""
            at = (*self._batch(stack, x), *((first, second) if k_last else (second, first)))
            return x[at]

        data = part(self.data, row_cut, slice(*(edge // self._per_item for edge in k_edges)))
        scale, zero, tensor = self.scale, self.zero, self.tensor_scale
        axes = len(_shape(scale))
        if self.scale_layout != "linear":
            if k_edges != (0, self.shape[self.k_axis]) or axes not in (2, self.ndim):
                raise ValueError(f"Quantized: scales in {self.scale_layout} tiles of shape {_shape(scale)} can be cut along rows only.")
            tile = TILE_ROWS[self.scale_layout]
            tiles = (*self._batch(stack, scale), slice(row_edges[0], ceil_div(row_edges[1], tile) * tile))
            scale = scale[tiles]
        elif axes > 1:
            down, across = self.format.block
            cut = slice(None) if down == ALL else slice(row_edges[0] // down, ceil_div(row_edges[1], down))
            along = slice(None) if across == ALL else slice(k_edges[0] // across, ceil_div(k_edges[1], across))
            scale, zero = part(scale, cut, along), zero if zero is None else part(zero, cut, along)
        elif _shape(scale) == (self._length("rows"),) and self.format.block == (1, ALL):
            scale, zero = scale[row_cut], zero if zero is None else zero[row_cut]
        tensor = self._tensor_part(tensor, stack, row_cut)
        gone = int(isinstance(stack, int))
        return replace(self, data=data, scale=scale, zero=zero, tensor_scale=tensor, shape=(), k_axis=self.k_axis - gone)

    def _cuts(self, index: Any) -> tuple[slice | int | None, tuple[slice, slice]]:
        """What an index says: the cut along the stack (None: there is none), and those along the last two axes."""
        given = index if isinstance(index, tuple) else (index,)
        dots = [at for at, i in enumerate(given) if i is Ellipsis]
        if not dots:
            dots, given = [len(given)], (*given, Ellipsis)
        missing = self.ndim - len(given) + 1
        cuts = (*given[: dots[0]], *[slice(None)] * missing, *given[dots[0] + 1 :])
        stack: Any = cuts[0] if self.ndim == 3 and cuts else None
        own = cuts[self.ndim - 2 :]
        integer = isinstance(stack, Integral) and not isinstance(stack, bool)
        if missing < 0 or not all(isinstance(i, slice) for i in (own if integer or self.ndim == 2 else cuts)):
            raise ValueError(
                f"Quantized: index {_index_text(index)} of shape {self.shape}; wanted slices (an integer only along a stack of matrices)."
            )
        count = self.shape[0]
        if isinstance(stack, slice):
            start, stop, step = _indices("the stack", stack, count)
            if step < 1:
                raise ValueError(f"Quantized: the stack {start}:{stop}:{step} of {count} is cut with a step of {step}; wanted 1 or more.")
            stack = slice(start, max(start, stop), step)
        elif integer:
            if not -count <= int(stack) < count:
                raise IndexError(f"Quantized: index {int(stack)} is outside the stack of {count} matrices, shape {self.shape}.")
            stack = int(stack) % count
        return stack, own

    def _batch(self, stack: slice | int | None, x: Any) -> tuple[slice | int, ...]:
        """The cut along the first axis of x, which may hold one matrix for the whole stack, with or without an axis for it."""
        if stack is None or len(_shape(x)) < 3:
            return ()
        if _shape(x)[0] == self.shape[0]:
            return (stack,)
        return (0 if isinstance(stack, int) else slice(None),)

    def _tensor_part(self, x: Any, stack: slice | int | None, rows: slice) -> Any:
        """The second scales of a part: one element stays, those of matrices are cut along the stack and those of rows along rows."""
        shape, length = _shape(x), self._length("rows")
        if x is None or math.prod(shape) == 1:
            return x
        count = self.shape[0]
        if stack is not None and shape in ((count,), (count, 1, 1)):
            return x[stack : stack + 1] if isinstance(stack, int) else x[stack]
        if shape == (length, 1) or shape in (((length,),) if stack is None else ((count, length, 1), (1, length, 1))):
            chosen = (*self._batch(stack, x), rows)
            return x[chosen]
        raise ValueError(f"Quantized: tensor_scale has shape {shape}, which does not go with {self.shape} and cannot be cut.")

    def _length(self, axis: str) -> int:
        return self.shape[self.k_axis if axis == "k" else 2 * self.ndim - 3 - self.k_axis]

    def _edges(self, axis: str, cut: slice) -> tuple[int, int]:
        """Start and end of a slice, both between blocks."""
        along_k = axis == "k"
        length = self._length(axis)
        start, stop, step = _indices(axis, cut, length)
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
    if x is None or is_scalar(x):
        return ()
    return tuple(x.shape) if hasattr(x, "shape") else framework_of(x, "Quantized").view(x, "Quantized").shape


def _indices(axis: str, cut: slice, length: int) -> tuple[int, int, int]:
    try:
        return cut.indices(length)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Quantized: {axis} of {length} is cut by {_index_text(cut)}: {error}.") from None


def _index_text(index: Any) -> str:
    """An index as a message shows it: arrays and lists by their type alone."""
    if isinstance(index, tuple):
        return f"({', '.join(map(_index_text, index))}{',' * (len(index) == 1)})"
    if isinstance(index, slice):
        return f"slice({', '.join(_index_text(i) for i in (index.start, index.stop, index.step))})"
    return repr(index) if index is None or index is Ellipsis or isinstance(index, (Integral, str, float)) else type(index).__name__


def _described(x: Any) -> str:
    if not hasattr(x, "dtype"):
        return type(x).__name__
    return f"{type(x).__module__.split('.', 1)[0]} {str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
