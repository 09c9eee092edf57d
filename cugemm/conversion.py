"""What is asked of `quantize` and `dequantize`: the checks, and the call in the words of kernel and reference."""

from __future__ import annotations

from typing import NamedTuple

from cugemm.arrays import View, dense_strides
from cugemm.formats import ALL, ELEMENTS, FORMATS, Element, Format
from cugemm.problem import FLOATS8, OUT_DTYPES, Argument, ArraySpec, ceil_div


class QuantizeOptions(NamedTuple):
    """`format` names a Format; `cast` converts without a scale; `dtype` is what dequantize returns."""

    format: str
    cast: bool = False
    dtype: str = ""


class QuantizeProblem(NamedTuple):
    """The question that selection answers and the key of the plan cache."""

    direction: str  # "quantize", "cast" or "dequantize"
    element: str
    x: str  # dtype of the unquantised side
    block: tuple[int, int]
    backend: str = "auto"
    arch: str = ""
    device: int = 0

    def __str__(self) -> str:
        arrow = (self.element, self.x) if self.direction == "dequantize" else (self.x, self.element)
        return f"{self.direction} {arrow[0]} -> {arrow[1]}" + (f" on {self.arch}" if self.arch else "")


class QuantizeCall(NamedTuple):
    """One checked conversion of [batch, rows, cols]. `x_strides` are those of the input array, the result is contiguous."""

    problem: QuantizeProblem
    outputs: tuple[ArraySpec, ...]
    workspaces: tuple[ArraySpec, ...]
    batch: int
    rows: int
    cols: int
    block: tuple[int, int]  # (rows, cols) under one scale, ALL resolved
    x_strides: tuple[int, int, int]
    scale_strides: tuple[int, int, int]

    @property
    def flops(self) -> float:
        return float(self.batch * self.rows * self.cols)


def scale_shape(shape: tuple[int, ...], fmt: Format) -> tuple[int, ...]:
    """Shape of the scale of an array [.., rows, k]: (1,) per tensor, else [.., row blocks, k blocks]."""
    rows, cols = fmt.block
    if rows == cols == ALL:
        return (1,)
    return (*shape[:-2], 1 if rows == ALL else ceil_div(shape[-2], rows), 1 if cols == ALL else ceil_div(shape[-1], cols))


class QuantizeOp(NamedTuple):
    """`quantize` has the array x, `dequantize` the arrays data and scale."""

    name: str
    roles: tuple[str, ...]

    def format(self, options: QuantizeOptions) -> Format:
        fmt = FORMATS.get(options.format)
        if fmt is None or fmt.element.name not in FLOATS8:
            known = ", ".join(name for name, f in FORMATS.items() if f.element.name in FLOATS8)
            raise ValueError(f"{self.name}: format is {options.format!r}; wanted one of {known}.")
        return fmt

    def check(self, views: tuple[Argument, ...], options: QuantizeOptions) -> QuantizeCall:
        fmt = self.format(options)
        x = views[0]
        if not isinstance(x, View):
            raise TypeError(f"{self.name}: {self.roles[0]} is {type(x).__name__}; pass an array.")
        if len(x.shape) not in (2, 3):
            raise ValueError(f"{self.name}: {self.roles[0]} has shape {x.shape}; wanted [rows, k] or [batch, rows, k].")
        if max(x.shape) >= 2**31:
            raise ValueError(f"{self.name}: {self.roles[0]} has shape {x.shape}; its axes must be below 2**31.")
        shape = scale_shape(x.shape, fmt)
        if self.name == "dequantize":
            return self.dequantize(x, views[1], shape, fmt, options.dtype)
        if x.dtype not in OUT_DTYPES:
            raise TypeError(f"{self.name}: x is {x.dtype}; wanted {', '.join(OUT_DTYPES)}.")
        outputs: tuple[ArraySpec, ...] = ((x.shape, fmt.element.dtype),)
        workspaces: tuple[ArraySpec, ...] = ()
        if not options.cast:
            outputs += ((shape, "float32"),)
            if fmt.block == (ALL, ALL):
                workspaces = (((1,), "int32"),)  # the running amax as float bits
        return _call("cast" if options.cast else "quantize", x, fmt, x.dtype, outputs, workspaces)

    def dequantize(self, data: View, scale: Argument, shape: tuple[int, ...], fmt: Format, dtype: str) -> QuantizeCall:
        element: Element = ELEMENTS[fmt.element.name]
        if data.dtype not in (element.dtype, "uint8"):
            raise TypeError(f"dequantize: data is {data.dtype}, but format {fmt.name} stores {element.dtype}.")
        if data.strides != dense_strides(data.shape) and data.size > 1:
            raise ValueError(f"dequantize: data {data.shape} has strides {data.strides}; pass it as a contiguous copy.")
        if dtype not in OUT_DTYPES:
            raise ValueError(f"dequantize: dtype is {dtype}; results come as {', '.join(OUT_DTYPES)}.")
        if not isinstance(scale, View) or scale.dtype != "float32":
            raise TypeError(
                f"dequantize: scale is {scale.dtype if isinstance(scale, View) else type(scale).__name__}; wanted a float32 array."
            )
        if scale.shape != shape:
            raise ValueError(f"dequantize: scale has shape {scale.shape}, but {fmt.name} of data {data.shape} has scales of shape {shape}.")
        if scale.strides != dense_strides(shape) and scale.size > 1:
            raise ValueError(f"dequantize: scale has strides {scale.strides}; pass it as a contiguous copy.")
        return _call("dequantize", data, fmt, dtype, ((data.shape, dtype),), ())


def _call(
    direction: str, x: View, fmt: Format, dtype: str, outputs: tuple[ArraySpec, ...], workspaces: tuple[ArraySpec, ...]
) -> QuantizeCall:
    batch, rows, cols = (1, *x.shape)[-3:]
    x_batch, x_row, x_column = (0, *x.strides)[-3:]
    block = (fmt.block[0] or max(rows, 1), fmt.block[1] or max(cols, 1))
    _, blocks_down, blocks_across = (1, *scale_shape(x.shape, fmt))[-3:] if fmt.block != (ALL, ALL) else (1, 1, 1)
    steps = (0, 0, 0) if fmt.block == (ALL, ALL) else (blocks_down * blocks_across, blocks_across, 1)
    problem = QuantizeProblem(direction, fmt.element.name, dtype, fmt.block)
    return QuantizeCall(problem, outputs, workspaces, batch, rows, cols, block, (x_batch, x_row, x_column), steps)
