"""`kernels/portable.cu`: every pair of formats, every layout and alignment, dense, batched and grouped, sm_80 and up."""

from __future__ import annotations

import struct
from typing import NamedTuple

from cugemm import arch
from cugemm.arch import Device
from cugemm.catalog import segments
from cugemm.catalog.step import NULL, Step, Zero
from cugemm.formats import BF16, BY_DTYPE, ELEMENTS, FP16
from cugemm.problem import A_SCALE, ALPHA, B_SCALE, BIAS, OUT, A, B, GemmCall, Problem, Scale, ceil_div

_TAIL = struct.Struct("<5i16q8i")
"""`Args` of the kernel behind its pointers and by-value floats."""


class Config(NamedTuple):
    """Tile of a CTA, how its warps cut it, and the depth of the pipeline."""

    block_m: int
    block_n: int
    block_k: int
    warps_m: int
    warps_n: int
    warps_k: int
    stages: int

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n * self.warps_k

    def __str__(self) -> str:
        return (
            f"tile {self.block_m}x{self.block_n}x{self.block_k}, warps {self.warps_m}x{self.warps_n}x{self.warps_k}, {self.stages} stages"
        )


class _Tile(NamedTuple):
    """A tile shape, and what a CTA of it takes for each step along k, in ns on an H100 at 1.98 GHz: `alone` on its SM, and as one of many.

    Keys: "plain" both operands go to shared memory as they are, "mixed" one is decoded, "decoded" both are, "block" scales vary along k.
    """

    shape: tuple[int, int, int, int, int, int]
    ctas_per_sm: int  # that its registers allow
    alone: dict[str, float]
    among: dict[str, float]


# Fitted to 1620 recorded times (docs/benchmarks/portable_tiles.json); the choice they lead to is within 5 % of the best on 98 % of them.
# 64x64 a warp reuses fragments most, but leaves no registers for decoding or for a second set of sums.
_LARGE = _Tile((128, 128, 64, 2, 2, 1), 2, {"plain": 13.1}, {"plain": 11.1})
_LARGE_DECODING = _Tile(
    (128, 128, 64, 2, 4, 1),
    1,
    {"plain": 17.0, "mixed": 19.8, "decoded": 18.5, "block": 28.0},
    {"plain": 17.0, "mixed": 19.8, "decoded": 18.5, "block": 28.0},
)
_MEDIUM = _Tile(
    (64, 64, 64, 2, 2, 1),
    3,
    {"plain": 6.5, "mixed": 11.4, "decoded": 12.2, "block": 18.5},
    {"plain": 3.8, "mixed": 5.3, "decoded": 5.7, "block": 8.0},
)
_SMALL = _Tile(
    (16, 32, 256, 1, 1, 4),
    3,
    {"plain": 2.2, "mixed": 4.0, "decoded": 3.7, "block": 5.3},
    {"plain": 1.3, "mixed": 1.8, "decoded": 1.4, "block": 2.0},
)
# Element-wise loads hold a k-step in registers one value each: more warps or a shorter step, and no large tile beside block scales.
_ANY = {"plain": 1.0, "mixed": 1.1, "decoded": 1.2, "block": 1.5}
_LARGE_ANY = _Tile((128, 128, 64, 2, 4, 1), 1, {c: 38.0 * f for c, f in _ANY.items()}, {c: 38.0 * f for c, f in _ANY.items()})
_MEDIUM_ANY = _Tile((64, 64, 64, 2, 4, 1), 1, {c: 14.0 * f for c, f in _ANY.items()}, {c: 14.0 * f for c, f in _ANY.items()})
_SMALL_ANY = _Tile((16, 32, 128, 1, 1, 4), 2, {c: 8.0 * f for c, f in _ANY.items()}, {c: 4.0 * f for c, f in _ANY.items()})
_CALIBRATED_KHZ = 1_980_000
_LAUNCH_US = 2.5


class Portable:
    name = "portable"
    multiplies = True

    def refuse(self, problem: object) -> str | None:
        if not isinstance(problem, Problem):
            return "multiplies matrices, does not convert them"
        if problem.backend not in ("auto", self.name):
            return f"backend={problem.backend!r} was asked for"
        return None if problem.arch in ("", *arch.ARCHS) else "needs sm_80 or newer"

    def candidates(self, problem: Problem) -> tuple[Config, ...]:
        limit = arch.get(problem.arch).max_smem if problem.arch else arch.get("sm_89").max_smem
        return tuple(_config(problem, tile, limit) for tile in _tiles(problem))

    def cost(self, problem: Problem, config: Config, device: Device) -> float:
        """The CTAs of the busiest SM one after the other, but never faster than the operands come from memory."""
        tile = next(t for t in _tiles(problem) if t.shape == config[:6])
        work = _work(problem)
        resident = max(1, min(tile.ctas_per_sm, device.smem_per_sm // (_smem(problem, config) + 1024)))
        full, last = divmod(ceil_div(_grid(problem, problem.m, config), device.sm_count), resident)

        def together(ctas: int) -> float:
            return max(tile.alone[work], ctas * tile.among[work]) if ctas else 0.0

        busy = (full * together(resident) + together(last)) * problem.k * _planes(problem) * 1e-3 * _CALIBRATED_KHZ / device.clock_khz
        rows, weights = (problem.m, problem.batch) if problem.grouped else (problem.m * problem.batch, problem.batch)
        values = rows * problem.k * ELEMENTS[problem.a].bits + weights * problem.n * problem.k * ELEMENTS[problem.b].bits
        memory = (values / 8 + rows * problem.n * 2) / (device.read_gbs * 1e3)
        return _LAUNCH_US + max(busy, memory)

    def steps(self, call: GemmCall, config: Config) -> tuple[Step | Zero, ...]:
        problem = call.problem
        before, indptr, row_map, expert_map = segments.steps(call)
        grid = _grid(problem._replace(batch=call.batch), call.m, config)
        # NOTE: a sum over nothing is 0 whatever the scales are, and 0 * inf would not be.
        a_scale, b_scale = (A_SCALE, B_SCALE) if call.k else (NULL, NULL)
        pointers = (A, B, OUT, a_scale, b_scale, ALPHA, BIAS, indptr, row_map, expert_map)
        scalars = (A_SCALE, B_SCALE, ALPHA)
        gemm = Step(self.name, _defines(problem, config), grid, config.threads, _smem(problem, config), pointers, scalars, _tail(call))
        return (*before, gemm)


def _planes(problem: Problem) -> int:
    """MMAs per product: fp16 beside bf16 is split in two."""
    return 2 if {problem.a, problem.b} == {BF16.name, FP16.name} else 1


def _work(problem: Problem) -> str:
    """Key into the times of a tile."""
    if problem.block_scaled:
        return "block"
    passed = [e in (BF16.name, FP16.name) for e in (problem.a, problem.b)]
    return "plain" if all(passed) else "mixed" if any(passed) else "decoded"


def _tiles(problem: Problem) -> tuple[_Tile, ...]:
    if not problem.vector:
        return (_MEDIUM_ANY, _SMALL_ANY) if problem.block_scaled else (_LARGE_ANY, _MEDIUM_ANY, _SMALL_ANY)
    if problem.block_scaled and {problem.a, problem.b} <= {BF16.name, FP16.name}:
        return (_MEDIUM_ANY, _SMALL)  # cp.async's addresses or a second plane, beside a second set of sums: fewer of them in each thread
    plain = _work(problem) == "plain" and problem.a == problem.b
    return (_LARGE if plain else _LARGE_DECODING, _MEDIUM, _SMALL)


def _config(problem: Problem, tile: _Tile, limit: int) -> Config:
    """Three stages hide the latency of cp.async; what passes through registers needs two."""
    asynchronous = problem.vector and {problem.a, problem.b} & {BF16.name, FP16.name}
    for stages in (3, 2) if asynchronous else (2,):
        config = Config(*tile.shape, stages)
        if _smem(problem, config) <= limit:
            return config
    raise AssertionError(f"{tile} does not fit {limit} bytes")


def _smem(problem: Problem, config: Config) -> int:
    """sizeof(Smem) of the kernel: 16-bit tiles; fp16 beside bf16 takes two planes."""
    mixed = _planes(problem) == 2
    rows = config.block_m * (1 + (mixed and problem.a == FP16.name)) + config.block_n * (1 + (mixed and problem.b == FP16.name))
    return ceil_div(rows * config.block_k * 2 * config.stages, 1024) * 1024


def _grid(problem: Problem, m: int, config: Config) -> int:
    """CTAs: one per tile; grouped, as many row tiles as any segmentation can need."""
    row_tiles = m // config.block_m + min(problem.batch, m) if problem.grouped else ceil_div(m, config.block_m) * problem.batch
    return row_tiles * ceil_div(problem.n, config.block_n)


def _defines(problem: Problem, config: Config) -> tuple[tuple[str, int], ...]:
    return (
        ("A_ELEMENT", ELEMENTS[problem.a].code),
        ("B_ELEMENT", ELEMENTS[problem.b].code),
        ("A_MAJOR", int(problem.a_major == "mn")),
        ("B_MAJOR", int(problem.b_major == "mn")),
        ("VECTOR", int(problem.vector)),
        ("SCALE_MODE", int(problem.block_scaled)),
        ("BLOCK_M", config.block_m),
        ("BLOCK_N", config.block_n),
        ("BLOCK_K", config.block_k),
        ("WARPS_M", config.warps_m),
        ("WARPS_N", config.warps_n),
        ("WARPS_K", config.warps_k),
        ("STAGES", config.stages),
        ("SMEM_BYTES", _smem(problem, config)),
    )


def _tail(call: GemmCall) -> bytes:
    a_batch, a_row, a_k = call.a_strides
    b_batch, b_column, b_k = call.b_strides
    out_batch, out_row, out_column = call.out_strides

    def scale(s: Scale | None) -> tuple[tuple[int, int, int], int, int]:
        if s is None:
            return (0, 0, 0), 1, 0
        batch, row, k = s.strides
        return (row, k, batch), max(s.block[0], 1), BY_DTYPE[s.dtype].code

    a_scale, a_scale_rows, a_scale_type = scale(call.a_scale)
    b_scale, b_scale_columns, b_scale_type = scale(call.b_scale)

    def code(dtype: str | None) -> int:
        return BY_DTYPE[dtype].code if dtype else 0

    return _TAIL.pack(
        call.m, call.n, call.k, call.batch, call.experts,
        a_row, a_k, a_batch, b_column, b_k, b_batch, out_row, out_column, out_batch, *a_scale, *b_scale, 0,  # one bias for all
        a_scale_rows, b_scale_columns, a_scale_type, b_scale_type, code(call.alpha_dtype), code(call.bias_dtype),
        code(call.problem.out), int(call.problem.grouped),
    )  # fmt: skip


KERNEL = Portable()
