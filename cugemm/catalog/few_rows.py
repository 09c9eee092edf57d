"""What the kernels for few rows share (`kernels/common/rows.cuh`, `weights.cuh`): whom they refuse, how rows are cut, what is read."""

from __future__ import annotations

from cugemm.catalog import gemm
from cugemm.formats import E2M1X2, E4M3, E8M0, ELEMENTS, FP16, INT4X2, INT8
from cugemm.problem import BUCKETS, FLOATS8, FLOATS16, GemmCall, Problem
from cugemm.scales import ceil_div

_LEFT = (*FLOATS16, *FLOATS8)
_RIGHT = (*FLOATS16, *FLOATS8, E2M1X2.name, INT8.name, INT4X2.name)
_AGAIN = 0.5
"""Reading weights again, for further rows of A: mostly from L2."""
_MOST_WAVES = 4
"""Of clusters, where segments are many."""


def refuse(problem: Problem, most: int) -> str | None:
    """Why rows of A, or weights, do not go through these kernels, of which one takes `most` rows."""
    if (rows(problem) > most or (problem.grouped and problem.m == BUCKETS[-1])) and not problem.batch_invariant:
        return f"multiplies up to {most} rows{' of a segment, on average' if problem.grouped else ''}"
    if problem.a not in _LEFT or problem.b not in _RIGHT or problem.a_scale or problem.zero:
        return "takes 16-bit or float8 rows, and weights without zero points"
    if not problem.b_vector:
        return "reads weights along k, in 16-byte pieces"
    if gemm.computes_bf16(problem) and FP16.name in (problem.a, problem.b):
        return "does not split fp16 for bf16"
    if problem.scale_block not in (0, 128) or (problem.scale_block and step(problem) not in (128, 256)):
        return "scales sums of 128 values along k only"
    return None


def chunk(problem: Problem) -> int:
    """Values of a weight in 16 bytes."""
    return 128 // ELEMENTS[problem.b].bits


def step(problem: Problem) -> int:
    """Values of a weight row that a warp multiplies at a time: 128 bytes."""
    return 8 * chunk(problem)


def stage_bytes(problem: Problem) -> int:
    """Of 16 weight rows for a step: values, block scales."""
    words = 4 if problem.b_scale == E4M3.name else chunk(problem) // 16 if problem.b_scale else 0
    return 16 * (128 + 4 * words)


def matrices(problem: Problem) -> int:
    """That are read: no more segments than rows have any."""
    return max(1, min(problem.batch, problem.m)) if problem.grouped else problem.batch


def rows(problem: Problem) -> int:
    """Of A that a matrix is multiplied with; of segments the average."""
    return ceil_div(problem.m, matrices(problem)) if problem.grouped else problem.m


def pieces(problem: Problem, tokens: int) -> int:
    """Row tiles of all matrices. Segments differ: half a tile more of each, where more than one is a matter of luck."""
    if not problem.grouped:
        return problem.batch * ceil_div(problem.m, tokens)
    return max(matrices(problem), ceil_div(problem.m, tokens) + matrices(problem) // 2)


def row_tiles(call: GemmCall, tokens: int) -> int:
    """What the grid has: as many as any segmentation can need."""
    return call.m // tokens + min(call.batch, call.m) if call.problem.grouped else call.batch * ceil_div(call.m, tokens)


def clusters(problem: Problem, tokens: int, tiles: int, resident: int) -> int:
    """For each piece: no more than have one of the `tiles` along n, and than fit the GPU; of segments what fills its waves best, A being
    loaded in each."""
    if not problem.grouped:
        return max(1, min(tiles, resident // ceil_div(problem.m, tokens)))
    many = pieces(problem, tokens)
    few = range(1, max(1, min(tiles, _MOST_WAVES * resident // many)) + 1)
    return min(few, key=lambda each: ceil_div(each * many, resident) * (1 + ceil_div(tiles, each)))


def memory_bytes(problem: Problem, tokens: int) -> float:
    """What all CTAs read and write; weights that are read again count in part."""
    again = pieces(problem, tokens) - matrices(problem)
    block_bits = {E4M3.name: 8 / 16, E8M0.name: 8 / 32}.get(problem.b_scale, 0.0)
    weights = problem.n * problem.k * (ELEMENTS[problem.b].bits + block_bits) / 8
    each = problem.k * ELEMENTS[problem.a].bits / 8 + problem.n * 2
    return (matrices(problem) + _AGAIN * again) * weights + problem.m * (1 if problem.grouped else problem.batch) * each


def defines(problem: Problem) -> tuple[tuple[str, int], ...]:
    """The macros that both headers read, but for those of a config."""
    return (
        ("A_ELEMENT", ELEMENTS[problem.a].code),
        ("A_SCALE", 0),
        ("B_ELEMENT", ELEMENTS[problem.b].code),
        ("B_SCALE", ELEMENTS[problem.b_scale].code if problem.b_scale else 0),
        ("SCALE_BLOCK", problem.scale_block),
    )
