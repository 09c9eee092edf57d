"""What is asked of `quantize`, `dequantize` and `interleave`: the checks, and the call in the words of kernel and reference."""

from __future__ import annotations

import math
from typing import NamedTuple

from cugemm.arrays import View, dense_strides
from cugemm.formats import ALL, FORMATS, FP32, LAYOUTS, Format
from cugemm.problem import FLOATS8, OUT_DTYPES, Argument, ArraySpec
from cugemm.scale_layout import padded
from cugemm.scales import ceil_div, tiled_step

X, TENSOR_SCALE, PRE_SCALE, COUNTS = range(4)
"""Positions of the arguments of `quantize`."""
DATA, SCALE, DATA_TENSOR, ZERO = range(4)
"""Positions of the arguments of `dequantize`."""
GROUPS = (16, 32, 64, 128, 256, 512)
"""Values along k that one float scale may cover."""
_SMALLEST_EPS = 1e-20
_LONGEST = 2**30
_INTERLEAVED = ("uint8", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu")


class QuantizeOptions(NamedTuple):
    """Everything about a conversion that is no array; values survive JSON.

    format: name of a Format. cast: convert without a scale. dtype: what dequantize returns. scale_layout: of byte scales.
    encode_scale: tensor_scale holds the inverse, 448 * 6 / amax. emit_tensor: return the tensor scale as an array also where it was given.
    silu: x is [.., rows, 2 k], and silu(first half) * second half is quantised. align: k of the results is padded to this multiple.
    flat: tiled scales are laid out over the rows of all matrices together.
    group: values along k under one float scale, 0: the format's. eps: least amax. ceil_scale: float scales are rounded up to powers of two.
    scale_axes: "mk", or "km" for float scales [.., k blocks, rows].
    """

    format: str
    cast: bool = False
    dtype: str = ""
    scale_layout: str = "linear"
    encode_scale: bool = False
    emit_tensor: bool = False
    silu: bool = False
    align: int = 1
    flat: bool = False
    group: int = 0
    eps: float = 1e-12
    ceil_scale: bool = False
    scale_axes: str = "mk"


class QuantizeProblem(NamedTuple):
    """The question that selection answers and the key of the plan cache."""

    direction: str  # "quantize", "cast", "dequantize" or "interleave"
    element: str
    x: str  # dtype of the unquantised side
    block: tuple[int, int]
    backend: str = "auto"
    arch: str = ""
    device: int = 0

    def __str__(self) -> str:
        if self.direction == "interleave":
            text = f"interleave {self.x}"
        else:
            text = f"{self.direction} " + " -> ".join((self.element, self.x)[:: 1 if self.direction == "dequantize" else -1])
        return text + (f" on {self.arch}" if self.arch else "")


class Factor(NamedTuple):
    """A small array beside the matrix: strides in elements along (batch, row) or (k,), 0 where it repeats."""

    strides: tuple[int, ...]
    dtype: str


class QuantizeCall(NamedTuple):
    """One checked conversion of [batch, rows, cols]. Strides are in elements; results are contiguous.

    `cols` counts values of x along k (of one half with silu), `width` those of the result, which `align` may pad.
    """

    problem: QuantizeProblem
    outputs: tuple[ArraySpec, ...]
    workspaces: tuple[ArraySpec, ...]
    batch: int
    rows: int
    cols: int
    width: int
    block: tuple[int, int]  # (rows, cols) under one scale, ALL resolved
    x_strides: tuple[int, int, int]
    scale_strides: tuple[int, int, int]  # of linear scales: (batch, row block, k block)
    scale: str = FP32.name  # element of the scale
    layout: str = "linear"
    flat: bool = False
    silu: bool = False
    eps: float = 1e-12
    ceil_scale: bool = False
    zero: bool = False
    tensor: Factor | None = None  # the tensor scale, given as an array
    by_value: bool = False  # or as a number
    encode_scale: bool = False
    per_row: bool = False  # what a computed or emitted one looks like
    pre_scale: Factor | None = None
    counts: Factor | None = None

    @property
    def flops(self) -> float:
        return float(self.batch * self.rows * self.cols)


def scale_shape(shape: tuple[int, ...], fmt: Format, group: int = 0) -> tuple[int, ...]:
    """Shape of the linear scale of an array [.., rows, k]: (1,) per tensor, else [.., row blocks, k blocks]."""
    rows, cols = fmt.block[0], group or fmt.block[1]
    if rows == cols == ALL:
        return (1,)
    return (*shape[:-2], 1 if rows == ALL else ceil_div(shape[-2], rows), 1 if cols == ALL else ceil_div(shape[-1], cols))


def tiled_shape(shape: tuple[int, ...], layout: str, flat: bool) -> tuple[int, ...]:
    """Shape of byte scales in `layout` whose linear shape is [.., rows, blocks]; `flat`: rows of all matrices together."""
    if flat:
        shape = (math.prod(shape[:-1]), shape[-1])
    return (*shape[:-2], *padded(shape[-2], shape[-1], layout))


class QuantizeOp(NamedTuple):
    """A public conversion: what it and its arguments are called, and what it does: "quantize", "dequantize" or "interleave"."""

    name: str
    roles: tuple[str, ...]
    direction: str = "quantize"

    def error(self, text: str) -> ValueError:
        return ValueError(f"{self.name}: {text}")

    def wrong_type(self, text: str) -> TypeError:
        return TypeError(f"{self.name}: {text}")

    def check(self, views: tuple[Argument, ...], options: QuantizeOptions) -> QuantizeCall:
        """The checked call, or ValueError / TypeError with the argument's name, its value and the fix."""
        x = views[0]
        fmt = None if self.direction == "interleave" else self.format(options)
        if not isinstance(x, View):
            raise self.wrong_type(f"{self.roles[0]} is {type(x).__name__}; pass an array.")
        axes = "[rows, blocks]" if fmt is None else "[rows, k]"
        if len(x.shape) not in (2, 3):
            raise self.error(f"{self.roles[0]} has shape {x.shape}; wanted {axes} or [batch, {axes[1:]}.")
        if max(x.shape) >= 2**31:
            raise self.error(f"{self.roles[0]} has shape {x.shape}; its axes must be below 2**31.")
        if options.scale_layout not in LAYOUTS:
            raise self.error(f"scale_layout is {options.scale_layout!r}; wanted one of {', '.join(map(repr, LAYOUTS))}.")
        if fmt is None:
            return self.interleave(x, options)
        self.check_options(fmt, options)
        return self.dequantize(views, fmt, options) if self.direction == "dequantize" else self.quantize(views, fmt, options)

    def format(self, options: QuantizeOptions) -> Format:
        fmt = FORMATS.get(options.format)
        if fmt is None:
            raise self.error(f"format is {options.format!r}; wanted one of {', '.join(FORMATS)}.")
        return fmt

    def check_options(self, fmt: Format, options: QuantizeOptions) -> None:
        floats = fmt.scale is FP32
        grouped = fmt.block[0] == 1 and fmt.block[1] != ALL
        by_group = ", ".join(f.name for f in FORMATS.values() if f.block[0] == 1 and f.block[1] != ALL)
        if floats and (options.scale_layout != "linear" or options.flat):
            asked = "flat is set" if options.scale_layout == "linear" else f"scale_layout is {options.scale_layout!r}"
            raise self.error(f"{asked}, but scales of {fmt.name} are floats, always linear; drop it.")
        if options.cast and fmt.element.name not in FLOATS8:
            raise self.error(f"cast goes to fp8 only, but {fmt.name} stores {fmt.element.name}; quantise it with a scale.")
        if options.group and not (grouped and floats and options.group in GROUPS):
            raise self.error(f"group is {options.group} for {fmt.name}; it is one of {GROUPS}, for formats with a float scale per group.")
        if (not floats or fmt.zero) and (options.scale_axes != "mk" or options.ceil_scale):
            what = "zero points" if fmt.zero else f"{fmt.scale.name} bytes"
            raise self.error(f"scale_axes and ceil_scale go with float scales alone, but {fmt.name} has {what}; drop them.")
        if options.ceil_scale and not grouped:
            raise self.error(f"ceil_scale goes with a format with a float scale per group, such as fp8_group, not with {fmt.name}.")
        if options.scale_axes not in ("mk", "km") or (options.scale_axes == "km" and not grouped):
            raise self.error(f"scale_axes is {options.scale_axes!r} for {fmt.name}; wanted 'mk', or 'km' where a row has several scales.")
        if not _SMALLEST_EPS <= options.eps <= FP32.max:
            raise self.error(f"eps is {options.eps}; wanted a number from {_SMALLEST_EPS} up.")
        if options.align < 1:
            raise self.error(f"align is {options.align}; wanted a positive number of values.")
        if (options.silu or options.align > 1) and (not grouped or options.cast):
            asked = "silu is set" if options.silu else f"align is {options.align}"
            raise self.error(f"{asked}, which goes with a format with a scale per group ({by_group}), not with {fmt.name}.")

    def countable(self, shape: tuple[int, ...], flat: bool) -> None:
        """Kernels count rows and columns, padded to tiles, in 32 bits."""
        longest = max(shape[-1], math.prod(shape[:-1]) if flat else shape[-2])
        if longest > _LONGEST:
            raise self.error(f"{self.roles[0]} has {longest} {'columns' if longest == shape[-1] else 'rows'}; wanted at most {_LONGEST}.")

    # -- quantize --------------------------------------------------------------------------------------------------------------

    def quantize(self, views: tuple[Argument, ...], fmt: Format, options: QuantizeOptions) -> QuantizeCall:
        x, tensor = views[X], views[TENSOR_SCALE]
        assert isinstance(x, View)
        if x.dtype not in OUT_DTYPES:
            raise self.wrong_type(f"{self.roles[X]} is {x.dtype}; wanted {', '.join(OUT_DTYPES)}.")
        if options.silu and x.shape[-1] % 2:
            raise self.error(f"{self.roles[X]} has shape {x.shape}; with silu its last axis holds two halves: make it even.")
        shape = (*x.shape[:-1], x.shape[-1] // 2) if options.silu else x.shape
        element, k = fmt.element, shape[-1]
        width = ceil_div(k, options.align) * options.align
        if width % element.per_byte:
            raise self.error(f"{self.roles[X]} has k = {k}, but {fmt.name} packs two values a byte along k; pad k to {width + 1}.")
        wide = (*shape[:-1], width)
        self.countable(wide, options.flat)
        linear = scale_shape(wide, fmt, options.group)
        outputs: tuple[ArraySpec, ...] = (((*shape[:-1], width // element.per_byte), element.dtype),)
        workspaces: tuple[ArraySpec, ...] = ()
        if not options.cast:
            if fmt.scale is FP32:
                outputs += (((*linear[:-2], linear[-1], linear[-2]) if options.scale_axes == "km" else linear, "float32"),)
            else:
                outputs += ((tiled_shape(linear, options.scale_layout, options.flat), "uint8"),)
            if fmt.block == (ALL, ALL):
                workspaces = (((1,), "int32"),)  # the running amax as float bits
        factor, emitted = None, None
        if not options.cast and (fmt.tensor is not None or tensor is not None):
            factor, emitted = self.tensor_scale(tensor, TENSOR_SCALE, shape, fmt, options.emit_tensor)
            if tensor is None:
                workspaces = (((max(math.prod(emitted), 1),), "int32"),)
            if tensor is None or options.emit_tensor:
                outputs += ((emitted, "float32"),)
        if fmt.zero:
            outputs += ((linear, "uint8"),)
        call = _call("cast" if options.cast else "quantize", x, fmt, x.dtype, outputs, workspaces, width, options)
        return call._replace(
            cols=k, silu=options.silu, tensor=factor, by_value=isinstance(tensor, float), encode_scale=options.encode_scale,
            pre_scale=self.pre_scale(views[PRE_SCALE], k, fmt, options), counts=self.counts(views[COUNTS], x, fmt, options),
        )  # fmt: skip

    def tensor_scale(
        self, view: Argument, position: int, shape: tuple[int, ...], fmt: Format, emit: bool = False
    ) -> tuple[Factor | None, tuple[int, ...]]:
        """How a tensor scale covers [.., rows, k], and the shape in which it is handed back."""
        role = self.roles[position]
        if fmt.tensor is None:
            raise self.error(f"{fmt.name} has no {role}; drop it, or multiply it into scale.")
        by_row = fmt.tensor[0] == 1
        emitted = (*shape[:-1], 1) if by_row else (1,)
        if view is None or isinstance(view, float):
            return None, emitted
        if view.dtype != "float32":
            raise self.wrong_type(f"{role} is {view.dtype}; wanted a float32 array or a number.")
        if view.size == 1 and len(view.shape) <= len(shape):
            return Factor((0, 0), view.dtype), emitted
        strides = (0, *view.strides)
        if by_row:
            if view.shape == (*shape[:-1], 1):
                return Factor(strides[-3:-1], view.dtype), emitted
            if view.shape == shape[:-1]:
                return Factor(strides[-2:], view.dtype), emitted
        elif len(shape) == 3 and view.shape in ((shape[0],), (shape[0], 1, 1)):
            return Factor((view.strides[0], 0), view.dtype), (shape[0],)
        wanted = f"one per row, {emitted}" if by_row else "one element" + (f" or ({shape[0]},)" if len(shape) == 3 else "")
        raise self.error(f"{role} has shape {view.shape}, but {self.roles[0]} is {shape} and {fmt.name} takes {wanted}.")

    def pre_scale(self, view: Argument, k: int, fmt: Format, options: QuantizeOptions) -> Factor | None:
        if view is None:
            return None
        role = self.roles[PRE_SCALE]
        if not isinstance(view, View) or view.dtype not in OUT_DTYPES:
            shown = view.dtype if isinstance(view, View) else type(view).__name__
            raise self.wrong_type(f"{role} is {shown}; wanted an array of {', '.join(OUT_DTYPES)}.")
        if view.shape != (k,):
            raise self.error(f"{role} has shape {view.shape}, but {self.roles[X]} has k = {k}; wanted ({k},).")
        self.only_by_group(role, fmt, options)
        return Factor(view.strides, view.dtype)

    def counts(self, view: Argument, x: View, fmt: Format, options: QuantizeOptions) -> Factor | None:
        if view is None:
            return None
        role = self.roles[COUNTS]
        if not isinstance(view, View) or view.dtype not in ("int32", "int64"):
            shown = view.dtype if isinstance(view, View) else type(view).__name__
            raise self.wrong_type(f"{role} is {shown}; wanted an int32 or int64 array.")
        if len(x.shape) != 3 or view.shape != x.shape[:1]:
            wanted = f"({x.shape[0]},), one per matrix" if len(x.shape) == 3 else f"{self.roles[X]} of shape [batch, rows, k]"
            raise self.error(f"{role} has shape {view.shape}, but {self.roles[X]} is {x.shape}; wanted {wanted}.")
        self.only_by_group(role, fmt, options)
        return Factor((view.strides[0], 0), view.dtype)

    def only_by_group(self, role: str, fmt: Format, options: QuantizeOptions) -> None:
        if fmt.block[0] != 1 or fmt.block[1] == ALL or options.cast:
            raise self.error(f"{role} goes with a format with a scale per group, such as nvfp4 or fp8_group, not with {fmt.name}; drop it.")

    # -- dequantize ------------------------------------------------------------------------------------------------------------

    def dequantize(self, views: tuple[Argument, ...], fmt: Format, options: QuantizeOptions) -> QuantizeCall:
        data, scale, tensor, zero = views
        assert isinstance(data, View)
        element = fmt.element
        stored = (element.dtype, "uint8", *(("float4_e2m1fn_x2",) if element.name == "e2m1x2" else ()))
        if data.dtype not in stored:
            raise self.wrong_type(f"{self.roles[DATA]} is {data.dtype}, but format {fmt.name} stores {element.dtype}.")
        self.contiguous(self.roles[DATA], data)
        if options.dtype not in OUT_DTYPES:
            raise self.error(f"dtype is {options.dtype}; results come as {', '.join(OUT_DTYPES)}.")
        shape = (*data.shape[:-1], data.shape[-1] * element.per_byte)
        self.countable(shape, options.flat)
        linear = scale_shape(shape, fmt, options.group)
        self.check_scale(scale, linear, shape, fmt, options)
        if (zero is not None) != fmt.zero:
            role = self.roles[ZERO]
            raise self.error(f"{fmt.name} needs {role}, its zero points." if fmt.zero else f"{fmt.name} has no zero points; drop {role}.")
        if fmt.zero:
            if not isinstance(zero, View) or zero.dtype != "uint8":
                raise self.wrong_type(f"zero is {zero.dtype if isinstance(zero, View) else type(zero).__name__}; wanted a uint8 array.")
            if zero.shape != linear:
                raise self.error(f"zero has shape {zero.shape}, but {fmt.name} of data {data.shape} has zero points of shape {linear}.")
            self.contiguous("zero", zero)
        factor = None if tensor is None else self.tensor_scale(tensor, DATA_TENSOR, shape, fmt)[0]
        values = data._replace(shape=shape, strides=dense_strides(shape))
        call = _call("dequantize", values, fmt, options.dtype, ((shape, options.dtype),), (), shape[-1], options)
        return call._replace(tensor=factor, by_value=isinstance(tensor, float))

    def check_scale(self, scale: Argument, linear: tuple[int, ...], shape: tuple[int, ...], fmt: Format, options: QuantizeOptions) -> None:
        allowed = ("float32",) if fmt.scale is FP32 else ("uint8", fmt.scale.dtype)
        if not isinstance(scale, View) or scale.dtype not in allowed:
            shown = scale.dtype if isinstance(scale, View) else type(scale).__name__
            raise self.wrong_type(f"{self.roles[SCALE]} is {shown}; wanted a {' or '.join(allowed)} array.")
        if fmt.scale is FP32:
            wanted = (*linear[:-2], linear[-1], linear[-2]) if options.scale_axes == "km" else linear
            fits = scale.shape == wanted
        else:
            wanted = tiled_shape(linear, options.scale_layout, options.flat)
            if options.scale_layout == "linear":
                fits = scale.size == math.prod(wanted) and (len(scale.shape) == 1 or scale.shape in (wanted, linear))
            else:
                count, rows, blocks = (1, *linear)[-3:]
                fits = tiled_step(scale, rows, blocks, count, options.scale_layout, options.flat) not in (None, 0 if count > 1 else None)
        if not fits:
            how = "" if options.scale_layout == "linear" else f" (in {options.scale_layout} tiles)"
            stored = (*shape[:-1], shape[-1] // fmt.element.per_byte)
            role, of = self.roles[SCALE], self.roles[DATA]
            raise self.error(f"{role} has shape {scale.shape}, but {fmt.name} of {of} {stored} has scales of shape {wanted}{how}.")
        self.contiguous(self.roles[SCALE], scale)

    def contiguous(self, role: str, view: View) -> None:
        own = [s for s, n in zip(view.strides, view.shape, strict=True) if n != 1]
        if view.size > 1 and own != [s for s, n in zip(dense_strides(view.shape), view.shape, strict=True) if n != 1]:
            raise self.error(f"{role} {view.shape} has strides {view.strides}; pass it as a contiguous copy.")

    # -- interleave ------------------------------------------------------------------------------------------------------------

    def interleave(self, scale: View, options: QuantizeOptions) -> QuantizeCall:
        if scale.dtype not in _INTERLEAVED:
            raise self.wrong_type(f"{self.roles[0]} is {scale.dtype}; wanted {', '.join(_INTERLEAVED)}.")
        if options.scale_layout == "linear":
            raise self.error("scale_layout is 'linear', which the scales have already; wanted '128x4' or '8x4'.")
        self.countable(scale.shape, options.flat)
        outputs = ((tiled_shape(scale.shape, options.scale_layout, options.flat), scale.dtype),)
        batch, rows, cols = (1, *scale.shape)[-3:]
        problem = QuantizeProblem("interleave", "", scale.dtype, (1, 1))
        return QuantizeCall(
            problem, outputs, (), batch, rows, cols, cols, (1, 1), _strides(scale), (0, 0, 0),
            layout=options.scale_layout, flat=options.flat,
        )  # fmt: skip


def _strides(x: View) -> tuple[int, int, int]:
    batch, row, column = (0, *x.strides)[-3:]
    return batch, row, column


def _call(
    direction: str, x: View, fmt: Format, dtype: str, outputs: tuple[ArraySpec, ...], workspaces: tuple[ArraySpec, ...], width: int,
    options: QuantizeOptions,
) -> QuantizeCall:  # fmt: skip
    batch, rows, cols = (1, *x.shape)[-3:]
    kinds = (fmt.block[0], options.group or fmt.block[1])
    block = (kinds[0] or max(rows, 1), kinds[1] or max(width, 1))
    steps = (0, 0, 0)
    if kinds != (ALL, ALL):
        _, down, across = (1, *scale_shape((*x.shape[:-1], width), fmt, options.group))[-3:]
        steps = (down * across, 1, down) if options.scale_axes == "km" else (down * across, across, 1)
    problem = QuantizeProblem(direction, fmt.element.name, dtype, kinds)
    return QuantizeCall(
        problem, outputs, workspaces, batch, rows, cols, width, block, _strides(x), steps, fmt.scale.name, options.scale_layout,
        options.flat, False, options.eps, options.ceil_scale, fmt.zero, per_row=fmt.tensor is not None and fmt.tensor[0] == 1,
    )  # fmt: skip
