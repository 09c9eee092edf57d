"""`kernels/quantize.cu`, `dequantize.cu`, `interleave.cu`: a float scale for an array, row or block of rows; the bare cast; and back."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

from cugemm import arch
from cugemm.arch import Device
from cugemm.arrays import itemsize
from cugemm.catalog.step import NULL, Step, Zero
from cugemm.conversion import DATA, DATA_TENSOR, SCALE, ZERO, QuantizeCall, QuantizeProblem, X
from cugemm.formats import ALL, BY_DTYPE, ELEMENTS
from cugemm.scale_layout import TILE_ROWS, padded
from cugemm.scales import ceil_div

_QUANTIZE_TAIL = struct.Struct("<6q6if4x")
_DEQUANTIZE_TAIL = struct.Struct("<3i5q8i")
_INTERLEAVE_TAIL = struct.Struct("<4q10i")
_AMAX, _QUANTIZE = 0, 1  # MODE of quantize.cu
_THREADS = 256
_VALUES, _KEPT, _MOST = 8, 4, 512
"""quantize.cu: columns a thread handles at once, how many times over it keeps them in registers, threads at most."""
_BLOCK = 8192
"""Values of an array that one CTA takes where the format does not say."""


class Config(NamedTuple):
    threads: int

    def __str__(self) -> str:
        return f"{self.threads} threads a block"


class Tiles(NamedTuple):
    """How CTAs of 256 threads cover rows of pieces (kernels/common/pieces.cuh)."""

    log_pieces: int
    down: int
    across: int
    grid: int


def tiles(batch: int, rows: int, pieces: int, *, least: int = 1, most: int = _THREADS) -> Tiles:
    """Tiles of `least` to `most` pieces along the row, powers of two."""
    log = (max(least, min(most, pieces)) - 1).bit_length()
    down, across = max(1, ceil_div(rows, _THREADS >> log)), max(1, ceil_div(pieces, 1 << log))
    return Tiles(log, down, across, max(batch, 1) * down * across)


def one_matrix(call: QuantizeCall) -> tuple[int, int]:
    """(matrices, rows of each) as the scales have them; one without rows where there is none, as a tensor scale is still written."""
    return (1, call.batch * call.rows) if call.flat or not call.batch else (call.batch, call.rows)


class Quantize:
    name = "quantize"
    multiplies = False

    def refuse(self, problem: object) -> str | None:
        if not isinstance(problem, QuantizeProblem):
            return "converts matrices, does not multiply them"
        if problem.backend not in ("auto", self.name):
            return f"backend={problem.backend!r} was asked for"
        if problem.direction == "quantize" and is_grouped(problem):
            return "quantises with a scale per array, row or block of rows"
        return None if problem.arch in ("", *arch.ARCHS) else "needs sm_80 or newer"

    def candidates(self, problem: QuantizeProblem, device: Device) -> tuple[Config, ...]:
        return (Config(_THREADS),)

    def cost(self, problem: QuantizeProblem, config: Config, device: Device) -> float:
        return 0.0  # one candidate

    def steps(self, call: QuantizeCall, config: Config) -> tuple[Step | Zero, ...]:
        direction = call.problem.direction
        if direction == "interleave":
            return (_interleave(call),)
        if direction == "dequantize":
            return (_dequantize(call),)
        data, scale, amax = 4, 5, 6
        if direction == "cast":
            return (_quantize(call, _QUANTIZE, (X, data, NULL, NULL)),)
        if call.problem.block != (ALL, ALL):
            return (_quantize(call, _QUANTIZE, (X, data, scale, NULL)),)
        return (Zero(amax, 4, 4, 1), _quantize(call, _AMAX, (X, NULL, NULL, amax)), _quantize(call, _QUANTIZE, (X, data, scale, amax)))


def is_grouped(problem: QuantizeProblem) -> bool:
    """Whether a scale covers a part of one row."""
    return problem.block[0] == 1 and problem.block[1] != ALL


def _quantize(call: QuantizeCall, mode: int, pointers: tuple[int, int, int, int]) -> Step:
    problem = call.problem
    rows, cols = call.block
    shared = problem.block == (ALL, ALL) or problem.direction == "cast"  # no block has a scale of its own: they only divide the work
    if shared:
        cols = max(1, min(call.cols, _BLOCK))
        rows = max(1, _BLOCK // cols)
    down, across = max(1, ceil_div(call.rows, rows)), max(1, ceil_div(call.cols, cols))
    blocks = call.batch * down * across if call.rows and call.cols else 0
    if problem.direction == "quantize" and mode == _QUANTIZE:  # every scale is written, also that of an empty array
        blocks = max(blocks, 1) if shared else math.prod(call.outputs[1][0])
    row_count = call.rows if call.batch else 0
    defines = (("MODE", mode), ("ELEMENT", ELEMENTS[problem.element].code), ("X_ELEMENT", BY_DTYPE[problem.x].code))
    batch, row, column = call.x_strides
    scale_batch, scale_row, scale_column = call.scale_strides
    tail = _QUANTIZE_TAIL.pack(
        row, column, batch, scale_row, scale_column, scale_batch, row_count, call.cols, down, across, rows, cols, call.eps
    )  # fmt: skip
    pieces = min(rows, call.rows) * ceil_div(min(cols, call.cols), _VALUES)
    kept = 2 * _KEPT // itemsize(problem.x)
    threads = max(32, min(_MOST, 32 * ceil_div(pieces, 32 * kept)))
    return Step("quantize", defines, blocks, threads, 0, pointers, (), tail)


def _dequantize(call: QuantizeCall) -> Step:
    matrices, rows = one_matrix(call)
    grid = tiles(matrices, rows, ceil_div(call.width, 8 * 4))
    block_rows, block_columns = call.block
    log_columns = 31 if block_columns >= call.width else block_columns.bit_length() - 1
    scale_rows, scale_blocks = padded(rows, ceil_div(call.width, call.block[1]), call.layout)
    matrix, row, block = call.scale_strides
    if call.layout != "linear":
        matrix = scale_rows * scale_blocks
    elements = (call.problem.element, call.scale, BY_DTYPE[call.problem.x].name)
    defines = tuple(zip(("ELEMENT", "SCALE", "X_ELEMENT"), (ELEMENTS[name].code for name in elements), strict=True))
    tail = _DEQUANTIZE_TAIL.pack(
        rows, call.width, call.rows, matrix, row, block, *(call.tensor.strides if call.tensor else (0, 0)),
        grid.log_pieces, grid.down, grid.across, block_rows, log_columns, scale_blocks, TILE_ROWS[call.layout], 0,
    )  # fmt: skip
    return Step("dequantize", defines, grid.grid, _THREADS, 0, (DATA, SCALE, DATA_TENSOR, ZERO, 4), (DATA_TENSOR,), tail)


def _interleave(call: QuantizeCall) -> Step:
    matrices, rows = one_matrix(call)
    scale_rows, scale_blocks = padded(rows, call.cols, call.layout)
    grid = tiles(matrices, scale_rows, scale_blocks // 4, most=8)
    tail = _INTERLEAVE_TAIL.pack(
        *call.x_strides, scale_rows * scale_blocks, rows, call.cols, call.rows, scale_rows, scale_blocks, TILE_ROWS[call.layout],
        grid.down, grid.across, grid.log_pieces, 0,
    )  # fmt: skip
    return Step("interleave", (("VALUE_BYTES", itemsize(call.problem.x)),), grid.grid, _THREADS, 0, (0, 1), (), tail)


KERNEL = Quantize()
