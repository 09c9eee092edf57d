"""`kernels/portable.cu`: every pair of formats, every layout and alignment, dense, batched and grouped, sm_80 and up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cugemm import arch
from cugemm.arch import Device
from cugemm.catalog import gemm
from cugemm.catalog.step import REACHED, Step, Zero
from cugemm.formats import BF16, ELEMENTS, FP16
from cugemm.problem import GemmCall, Problem
from cugemm.scales import ceil_div

_ZERO = 100
"""`kZero` of the kernel: B_SCALE where b has zero points."""


class Config(NamedTuple):
    """Tile of a CTA, how its warps cut it, the depth of the pipeline, and the CTAs of a cluster, which cut k."""

    block_m: int
    block_n: int
    block_k: int
    warps_m: int
    warps_n: int
    warps_k: int
    stages: int
    split: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n * self.warps_k

    def __str__(self) -> str:
        return (
            f"tile {self.block_m}x{self.block_n}x{self.block_k}, warps {self.warps_m}x{self.warps_n}x{self.warps_k}, {self.stages} stages"
            + (f", clusters of {self.split}" if self.split > 1 else "")
        )


class _Tile(NamedTuple):
    """A tile shape, and what a CTA of it takes for each step along k, in ns on an H100 at 1.98 GHz: `alone` on its SM, and as one of many.

    Keys: "plain" both operands go to shared memory as they are, "mixed" one is decoded, "decoded" both are, "block" scales vary along k.
    """

    shape: tuple[int, int, int, int, int, int]
    ctas_per_sm: int  # that its registers allow
    alone: dict[str, float]
    among: dict[str, float]


# Fitted to 1620 recorded times (docs/benchmarks/portable_tiles.json); the choice they lead to is within 5 % of the best on 97 % of them.
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
_LAUNCH_US = 4.1
_SUMS_US = 0.35
"""For 64 x 64 sums of each CTA of a cluster."""
_BYTE_SCALES = 1.6
"""How much longer than that of other values the decode of values with byte scales takes."""
_READ, _READ_SPLIT = 0.85, 0.55
"""Part of the bandwidth of a pure-read kernel that a product reaches, and one whose clusters cut k."""


class Portable:
    name = "portable"
    multiplies = True

    def refuse(self, problem: object) -> str | None:
        return gemm.refuse(problem, self.name)

    def candidates(self, problem: Problem, device: Device) -> tuple[Config, ...]:
        limit = arch.get(problem.arch).max_smem if problem.arch else arch.get("sm_89").max_smem
        problem = _settled(problem)
        tiles = _tiles(problem)
        if problem.batch_invariant:  # these add up along k in one order
            tiles = tuple(tile for tile in tiles if tile.shape[5] == 1)
        configs = tuple(_config(problem, tile, limit) for tile in tiles)
        return (*configs, *(split for config in configs for split in _splits(problem, config, device)))

    def cost(self, problem: Problem, config: Config, device: Device) -> float:
        """The CTAs of the busiest SM one after the other, but never faster than the operands come from memory."""
        problem = _settled(problem)
        tile = next(t for t in _tiles(problem) if t.shape == config[:6])
        work = _work(problem)
        resident = max(1, min(tile.ctas_per_sm, device.smem_per_sm // (_smem(problem, config) + 1024)))
        ctas = _grid(problem, problem.m, config)
        full, last = divmod(ceil_div(ctas, int(device.sm_count * REACHED[config.split])), resident)

        def together(ctas: int) -> float:
            return max(tile.alone[work], ctas * tile.among[work]) if ctas else 0.0

        k = ceil_div(ceil_div(problem.k, config.block_k), config.split) * config.block_k if config.split > 1 else problem.k
        work_ns = _BYTE_SCALES if problem.a_scale or problem.b_scale else 1.0
        busy = work_ns * (full * together(resident) + together(last)) * k * _planes(problem) * 1e-3 * _CALIBRATED_KHZ / device.clock_khz
        rows, weights = (problem.m, min(problem.batch, problem.m)) if problem.grouped else (problem.m * problem.batch, problem.batch)
        values = rows * problem.k * ELEMENTS[problem.a].bits + weights * problem.n * problem.k * ELEMENTS[problem.b].bits
        memory = (values / 8 + rows * problem.n * 2) / ((_READ_SPLIT if config.split > 1 else _READ) * device.read_gbs * 1e3)
        if config.split > 1:  # sums cross from CTA to CTA
            busy += 1.0 + _SUMS_US * config.split * config.block_m * config.block_n / 4096
        return _LAUNCH_US + max(busy, memory)

    def steps(self, call: GemmCall, config: Config) -> tuple[Step | Zero, ...]:
        problem = _settled(call.problem)
        grid = _grid(problem._replace(batch=call.batch), call.m, config)
        return gemm.steps(call, self.name, _defines(problem, config), grid, config.threads, _smem(problem, config))


def _settled(problem: Problem) -> Problem:
    """Value by value where that sums other parts of a block: batch invariance must not hang on how rows are aligned."""
    if problem.batch_invariant and problem.scale_block:
        return problem._replace(vector=False, a_major="k", b_major="k")
    return problem


def _planes(problem: Problem) -> int:
    """MMAs per product: fp16 among bf16 tiles is split in two."""
    return 2 if gemm.computes_bf16(problem) and FP16.name in (problem.a, problem.b) else 1


def _work(problem: Problem) -> str:
    """Key into the times of a tile."""
    if problem.scale_block:
        return "block"
    passed = [e in (BF16.name, FP16.name) for e in (problem.a, problem.b)]
    return "plain" if all(passed) else "mixed" if any(passed) else "decoded"


def _tiles(problem: Problem) -> tuple[_Tile, ...]:
    if not problem.vector:
        return (_MEDIUM_ANY, _SMALL_ANY) if problem.scale_block else (_LARGE_ANY, _MEDIUM_ANY, _SMALL_ANY)
    plain_operands = {problem.a, problem.b} & {BF16.name, FP16.name}
    if problem.scale_block and plain_operands >= {problem.a, problem.b}:
        return (_MEDIUM_ANY, _SMALL)  # cp.async's addresses or a second plane, beside a second set of sums: fewer of them in each thread
    if 0 < problem.scale_block < 64 and (not plain_operands or "mn" in (problem.a_major, problem.b_major)):
        return (_MEDIUM, _SMALL)  # two blocks in a k-step: fragments and operands on their way live beside both sets of sums
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
    bf16 = gemm.computes_bf16(problem)
    rows = config.block_m * (1 + (bf16 and problem.a == FP16.name)) + config.block_n * (1 + (bf16 and problem.b == FP16.name))
    return ceil_div(rows * config.block_k * 2 * config.stages, 1024) * 1024


def _splits(problem: Problem, config: Config, device: Device) -> Iterator[Config]:
    """The ways to cut k, where there is less than a wave of tiles of 64 rows or more, and a few k-steps for each CTA."""
    if config.warps_k > 1 or problem.batch_invariant or "cluster" not in arch.get(problem.arch or "sm_90a").features:
        return
    for split in (2, 4, 8):
        few = _grid(problem, problem.m, config) * split <= 3 * device.sm_count
        rows = config.threads // (config.block_n // 4)  # that the CTA stores at once
        if few and problem.k >= 4 * split * config.block_k and config.block_m >= split * rows:
            yield config._replace(split=split)


def _grid(problem: Problem, m: int, config: Config) -> int:
    """CTAs: one per tile; grouped, as many row tiles as any segmentation can need."""
    row_tiles = m // config.block_m + min(problem.batch, m) if problem.grouped else ceil_div(m, config.block_m) * problem.batch
    return row_tiles * ceil_div(problem.n, config.block_n) * config.split


def _defines(problem: Problem, config: Config) -> tuple[tuple[str, int], ...]:
    return (
        ("A_ELEMENT", ELEMENTS[problem.a].code),
        ("A_SCALE", ELEMENTS[problem.a_scale].code if problem.a_scale else 0),
        ("B_ELEMENT", ELEMENTS[problem.b].code),
        ("B_SCALE", ELEMENTS[problem.b_scale].code if problem.b_scale else _ZERO if problem.zero else 0),
        ("A_MAJOR", int(problem.a_major == "mn")),
        ("B_MAJOR", int(problem.b_major == "mn")),
        ("VECTOR", int(problem.vector)),
        ("SCALE_BLOCK", problem.scale_block),
        ("BLOCK_M", config.block_m),
        ("BLOCK_N", config.block_n),
        ("BLOCK_K", config.block_k),
        ("WARPS_M", config.warps_m),
        ("WARPS_N", config.warps_n),
        ("WARPS_K", config.warps_k),
        ("STAGES", config.stages),
        ("SPLIT", config.split),
        ("SMEM_BYTES", _smem(problem, config)),
    )


KERNEL = Portable()
