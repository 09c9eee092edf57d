"""`kernels/block_quantize.cu`: quantisation with a scale for every 16 to 512 values of a row."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

from cugemm import arch
from cugemm.arch import Device
from cugemm.arrays import itemsize
from cugemm.catalog.quantize import is_grouped, one_matrix, tiles
from cugemm.catalog.step import NULL, Step, Zero
from cugemm.conversion import COUNTS, PRE_SCALE, TENSOR_SCALE, Factor, QuantizeCall, QuantizeProblem, X
from cugemm.formats import BY_DTYPE, E4M3, ELEMENTS
from cugemm.scale_layout import TILE_ROWS, padded
from cugemm.scales import ceil_div

_TAIL = struct.Struct("<5i12q11ifi4x")
_AMAX, _QUANTIZE = 0, 1  # MODE of the kernel
_THREADS, _VALUES, _PIECES = 256, 16, 2


class Config(NamedTuple):
    values: int

    def __str__(self) -> str:
        return f"{self.values} values a thread"


class BlockQuantize:
    name = "block_quantize"
    multiplies = False

    def refuse(self, problem: object) -> str | None:
        if not isinstance(problem, QuantizeProblem):
            return "quantises matrices, does not multiply them"
        if problem.backend not in ("auto", self.name):
            return f"backend={problem.backend!r} was asked for"
        if problem.direction != "quantize" or not is_grouped(problem):
            return "quantises with a scale for a part of a row"
        return None if problem.arch in ("", *arch.ARCHS) else "needs sm_80 or newer"

    def candidates(self, problem: QuantizeProblem, device: Device) -> tuple[Config, ...]:
        return (Config(_VALUES * _PIECES),)

    def cost(self, problem: QuantizeProblem, config: Config, device: Device) -> float:
        return 0.0  # one candidate

    def steps(self, call: QuantizeCall, config: Config) -> tuple[Step | Zero, ...]:
        data, scale = 4, 5
        has_tensor = call.scale == E4M3.name
        computed = has_tensor and call.tensor is None and not call.by_value
        tensor_out = 6 if has_tensor and len(call.outputs) > 2 else NULL
        zero = 6 if call.zero else NULL
        if not computed:
            return (_step(call, _QUANTIZE, data, scale, tensor_out, zero, NULL),)
        amax = 4 + len(call.outputs)
        size = 4 * math.prod(call.workspaces[0][0])
        return (
            Zero(amax, size, size, 1),
            _step(call, _AMAX, NULL, NULL, NULL, NULL, amax),
            _step(call, _QUANTIZE, data, scale, tensor_out, zero, amax),
        )


def _step(call: QuantizeCall, mode: int, data: int, scale: int, tensor_out: int, zero: int, amax: int) -> Step:
    problem = call.problem
    matrices, rows = one_matrix(call)
    threads = call.block[1] // _VALUES
    scale_rows, scale_blocks = padded(rows, ceil_div(call.width, call.block[1]), call.layout)
    tiled = call.layout != "linear"
    grid = tiles(matrices, scale_rows, ceil_div(scale_blocks * threads, _PIECES), least=threads, most=32 if tiled else _THREADS)
    scale_matrix, scale_row, scale_block = call.scale_strides
    if tiled:
        scale_matrix = scale_rows * scale_blocks
    none = Factor((0, 0), "float32")
    tensor, pre_scale, counts = call.tensor or none, call.pre_scale or none, call.counts or none
    out = (call.rows, 1) if call.per_row else (0, 0)
    if call.tensor is not None and not call.per_row and call.tensor.strides[0]:
        out = (1, 0)
    x_matrix, x_row, x_column = call.x_strides
    tail = _TAIL.pack(
        rows, call.cols, call.width, max(call.batch, 1), call.rows if call.batch else 0,
        x_matrix, x_row, x_column, scale_matrix, scale_row, scale_block, *tensor.strides, pre_scale.strides[0], counts.strides[0], *out,
        grid.log_pieces, grid.down, grid.across, scale_rows, scale_blocks,
        TILE_ROWS[call.layout], call.encode_scale, call.ceil_scale, BY_DTYPE[pre_scale.dtype].code, itemsize(counts.dtype), call.per_row,
        call.eps, call.silu,
    )  # fmt: skip
    elements = {"ELEMENT": problem.element, "SCALE": call.scale, "X_ELEMENT": BY_DTYPE[problem.x].name}
    prepare = int(call.silu or call.pre_scale is not None)
    log_threads = threads.bit_length() - 1 if mode == _QUANTIZE else 0
    defines = (
        ("MODE", mode),
        ("PREPARE", prepare),
        ("LOG_THREADS", log_threads),
        *((name, ELEMENTS[element].code) for name, element in elements.items()),
    )
    pointers = (X, TENSOR_SCALE, PRE_SCALE, COUNTS, data, scale, tensor_out, zero, amax)
    return Step("block_quantize", defines, grid.grid, _THREADS, 0, pointers, (TENSOR_SCALE,), tail)


KERNEL = BlockQuantize()
