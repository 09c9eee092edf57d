"""`kernels/quantize.cu`: fp8 quantisation, the bare cast, and back."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

from cugemm import arch
from cugemm.arch import Device
from cugemm.catalog.step import NULL, Step, Zero
from cugemm.conversion import QuantizeCall, QuantizeProblem
from cugemm.formats import ALL, BY_DTYPE, ELEMENTS, FP32
from cugemm.problem import ceil_div

_TAIL = struct.Struct("<6q6i")
_AMAX, _QUANTIZE, _DEQUANTIZE = 0, 1, 2  # MODE of the kernel
_THREADS = 256
_PIECE = 16384
"""Values of an array that one CTA takes where the format does not say."""


class Config(NamedTuple):
    threads_per_block: int

    def __str__(self) -> str:
        return f"{self.threads_per_block} threads per scale"


class Quantize:
    name = "quantize"
    multiplies = False

    def refuse(self, problem: object) -> str | None:
        if not isinstance(problem, QuantizeProblem):
            return "converts matrices, does not multiply them"
        if problem.backend not in ("auto", self.name):
            return f"backend={problem.backend!r} was asked for"
        return None if problem.arch in ("", *arch.ARCHS) else "needs sm_80 or newer"

    def candidates(self, problem: QuantizeProblem) -> tuple[Config, ...]:
        return (Config(32 if problem.block == (1, 128) else _THREADS),)

    def cost(self, problem: QuantizeProblem, config: Config, device: Device) -> float:
        return 0.0  # one candidate

    def steps(self, call: QuantizeCall, config: Config) -> tuple[Step | Zero, ...]:
        direction = call.problem.direction
        if direction == "dequantize":
            return (_step(call, config, _DEQUANTIZE, (2, 0, 1, NULL)),)
        if direction == "cast":
            return (_step(call, config, _QUANTIZE, (0, 1, NULL, NULL)),)
        if call.problem.block != (ALL, ALL):
            return (_step(call, config, _QUANTIZE, (0, 1, 2, NULL)),)
        return (Zero(3, 4, 4, 1), _step(call, config, _AMAX, (0, NULL, NULL, 3)), _step(call, config, _QUANTIZE, (0, 1, 2, 3)))


def _step(call: QuantizeCall, config: Config, mode: int, pointers: tuple[int, int, int, int]) -> Step:
    """pointers: positions of x, data, scale, amax."""
    problem = call.problem
    rows, cols = call.block
    if problem.block == (ALL, ALL) or problem.direction == "cast":  # no block carries a scale of its own: they only divide the work
        rows = max(1, _PIECE // cols)
    blocks = call.batch * ceil_div(call.rows, rows) * ceil_div(call.cols, cols)
    if problem.direction == "quantize" and mode == _QUANTIZE:  # every scale is written, also that of an empty array
        blocks = math.prod(call.outputs[1][0]) if problem.block != (ALL, ALL) else max(blocks, 1)
    batch_count, row_count = (call.batch, call.rows) if call.batch else (1, 0)
    defines = (
        ("MODE", mode),
        ("ELEMENT", ELEMENTS[problem.element].code),
        ("X_ELEMENT", BY_DTYPE[problem.x].code),
        ("THREADS_PER_BLOCK", config.threads_per_block),
    )
    batch, row, column = call.x_strides
    scale_batch, scale_row, scale_column = call.scale_strides
    tail = _TAIL.pack(row, column, batch, scale_row, scale_column, scale_batch, row_count, call.cols, batch_count, rows, cols, FP32.code)
    return Step("quantize", defines, ceil_div(blocks * config.threads_per_block, _THREADS), _THREADS, 0, pointers, (), tail)


KERNEL = Quantize()
