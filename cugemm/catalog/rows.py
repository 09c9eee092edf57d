"""`kernels/rows.cu`: the weighted sum of rows behind a grouped product, and the gated activation between two of them."""

from __future__ import annotations

import struct
from typing import NamedTuple

from cugemm import arch
from cugemm.arch import Device
from cugemm.arrays import itemsize
from cugemm.catalog.step import NULL, Step, Zero
from cugemm.formats import BY_DTYPE
from cugemm.rowwise import RowsCall, RowsProblem

_TAIL = struct.Struct("<13q6i")
_MODES = {"combine": 0, "silu_and_mul": 1}
_VALUES = 8
"""Neighbours along a row that a thread makes: kValues of the kernel."""


class Config(NamedTuple):
    threads: int

    def __str__(self) -> str:
        return f"{self.threads} threads of {_VALUES} values"


class Rows:
    name = "rows"
    multiplies = False

    def refuse(self, problem: object) -> str | None:
        if not isinstance(problem, RowsProblem):
            return "works on rows, does not multiply or convert matrices"
        return None if problem.arch in ("", *arch.ARCHS) else "needs sm_80 or newer"

    def candidates(self, problem: RowsProblem, device: Device) -> tuple[Config, ...]:
        return (Config(256),)

    def cost(self, problem: RowsProblem, config: Config, device: Device) -> float:
        return 0.0  # one candidate

    def steps(self, call: RowsCall, config: Config) -> tuple[Step | Zero, ...]:
        problem = call.problem
        combines = problem.op == "combine"
        x, weights, select, out = (0, 1, 2, 3) if combines else (0, NULL, 1, 2)
        tail = _TAIL.pack(
            *call.x_strides, *call.weight_strides, *call.select_strides, *call.out_strides, call.batch, call.rows, call.source_rows,
            call.columns, call.topk, BY_DTYPE[call.weight_dtype].code, itemsize(call.select_dtype), BY_DTYPE[problem.out].code,
            int(call.gate == "second"),
        )  # fmt: skip
        items = call.batch * call.rows * -(-call.columns // _VALUES)
        defines = (("MODE", _MODES[problem.op]), ("X_ELEMENT", BY_DTYPE[problem.x].code))
        return (Step("rows", defines, -(-items // config.threads), config.threads, 0, (x, weights, select, out), (), tail),)


KERNEL = Rows()
