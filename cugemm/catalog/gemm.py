"""What product kernels share: whom they refuse, the type they compute in, their arguments (`kernels/common/args.cuh`), their step."""

from __future__ import annotations

import struct

from cugemm import arch
from cugemm.catalog import segments
from cugemm.catalog.step import NULL, Step, Zero
from cugemm.formats import ALL, BF16, BY_DTYPE, E8M0, ELEMENTS
from cugemm.problem import A_SCALE, A_TENSOR, ALPHA, B_SCALE, B_TENSOR, BIAS, OUT, ZERO, A, B, GemmCall, Problem
from cugemm.scale_layout import TILE_ROWS, padded
from cugemm.scales import Scale

_TAIL = struct.Struct("<7i10q" + "3q6i" * 5 + "2q6i")
"""`Args` behind its pointers and by-value floats."""
_PLACES = {"": 0, "flat": 1, "pad4": 4, "pad128": 128}
_GROUPED = {"": 0, "masked": 2}
_EARLY = {"": 0, "prefetch": 1, "static": 2}


def refuse(problem: object, name: str) -> str | None:
    """Why no kernel that multiplies, or not the one called `name`, takes this."""
    if not isinstance(problem, Problem):
        return "multiplies matrices, does not convert them"
    if problem.backend not in ("auto", name):
        return f"backend={problem.backend!r} was asked for"
    return None if problem.arch in ("", *arch.ARCHS) else "needs sm_80 or newer"


def computes_bf16(problem: Problem) -> bool:
    """Whether values are multiplied as bf16, which power-of-two scales need too; else as fp16."""
    return BF16.name in (problem.a, problem.b) or E8M0.name in (problem.a_scale, problem.b_scale)


def steps(
    call: GemmCall, source: str, defines: tuple[tuple[str, int], ...], grid: int, threads: int, smem: int, pdl: str = "", clusters: int = 0,
    clear: bool = True,
) -> tuple[Step | Zero, ...]:  # fmt: skip
    """The launches of a product: what its segments need first, then the kernel. clear: it leaves rows out that nobody selects."""
    groups = segments.steps(call, clear)
    pdl = "" if groups.steps else pdl  # other launches come first
    # A scale that varies along k goes to the main loop, with the tensor scale behind it; any other is the last factor itself.
    a_scale, a_outer = (A_SCALE, A_TENSOR) if _inner(call.a_scale) else (NULL, A_SCALE)
    b_scale, b_outer = (B_SCALE, B_TENSOR) if _inner(call.b_scale) else (NULL, B_SCALE)
    scalars = (a_outer, b_outer, ALPHA)
    if call.k == 0:  # NOTE: a sum over nothing is 0 whatever the scales are, and 0 * inf would not be.
        a_scale = b_scale = a_outer = b_outer = NULL
        scalars = (NULL, NULL, ALPHA)
    pointers = (
        A, B, OUT, a_scale, b_scale, a_outer, b_outer, ZERO, ALPHA, BIAS, groups.indptr, groups.row_map, groups.expert_map, groups.rows
    )  # fmt: skip
    return (*groups.steps, Step(source, defines, grid, threads, smem, pointers, scalars, _tail(call, pdl, clusters), bool(pdl)))


def _inner(scale: Scale | None) -> bool:
    return scale is not None and (bool(scale.element) or scale.by_k)


def _tail(call: GemmCall, pdl: str, clusters: int) -> bytes:
    a_batch, a_row, a_k = call.a_strides
    b_batch, b_column, b_k = call.b_strides
    out_batch, out_row, out_column = call.out_strides
    panel = call.b_panel - 128 * b_k if call.b_panel else 0

    def code(dtype: str | None) -> int:
        return BY_DTYPE[dtype].code if dtype else 0

    a_inner, b_inner = _inner(call.a_scale), _inner(call.b_scale)
    return _TAIL.pack(
        call.m, call.n, call.k, call.batch, call.experts, call.a_rows, call.a_repeat,
        a_row, a_k, a_batch, b_column, b_k, b_batch, panel, out_row, out_column, out_batch,
        *_scale(call.a_scale if a_inner else None, call.m), *_scale(call.b_scale if b_inner else None, call.n),
        *_scale(call.a_tensor if a_inner else call.a_scale), *_scale(call.b_tensor if b_inner else call.b_scale), *_scale(call.zero),
        *call.bias_strides, code(call.alpha_dtype), code(call.bias_dtype), code(call.problem.out), _GROUPED.get(call.segments, 1),
        _EARLY[pdl], clusters,
    )  # fmt: skip


def _scale(scale: Scale | None, rows_each: int = 0) -> tuple[int, ...]:
    """`ScaleArgs` of the kernel. rows_each: of one matrix, which all products share where a flat scale has no more."""
    if scale is None:
        return 0, 0, 0, 0, 1, 0, 1, 0, 0
    matrix, row, block = scale.strides
    if scale.layout != "linear":
        tile = TILE_ROWS[scale.layout]
        row, block = tile * padded(*scale.shape[1:], scale.layout)[1], 4 * tile
    rows, k = scale.block
    kind = ELEMENTS[scale.element].code if scale.element else BY_DTYPE[scale.dtype].code if scale.dtype != "uint8" else 0
    shift = 30 if k == ALL else k.bit_length() - 1
    place = 0 if scale.rows == "flat" and scale.shape[1] == rows_each else _PLACES[scale.rows]
    return row, block, matrix, shift, max(rows, 1), kind, TILE_ROWS[scale.layout], place, 0
