"""`kernels/swap_ab.cu`: few rows of a matrix, or of each segment on average, with weights contiguous along k, by warpgroups; sm_90a."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from cugemm import arch
from cugemm.arch import Device
from cugemm.catalog import few_rows, gemm
from cugemm.catalog.step import REACHED, Step, Zero
from cugemm.formats import INT4X2
from cugemm.problem import GemmCall, Problem
from cugemm.scales import ceil_div

_LEAST_ROWS, _MOST_ROWS = 9, 256
_MOST_ROWS_OF_BLOCKS = 128
"""Where floats scale sums of 128 along k: few rows are held at once, and weights decoded again for each of so many."""
_COLUMNS = 64
"""Weight rows of a warpgroup."""


class Config(NamedTuple):
    """Rows of A at once, warpgroups that multiply and those of them that share a tile, steps in the rings of weights and of rows, CTAs of a
    cluster, which cut k, and how many clusters each row tile gets."""

    tokens: int
    warpgroups: int
    warps_k: int
    stages: int
    x_stages: int
    split: int
    clusters: int = 1
    pdl: str = ""

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def columns(self) -> int:
        return _COLUMNS * (self.warpgroups // self.warps_k)

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, {self.columns} columns, warpgroups {self.warpgroups // self.warps_k}x{self.warps_k}, "
            f"{self.stages} and {self.x_stages} stages, {self.clusters} clusters of {self.split}"
        )


_SHAPES = ((2, 1, 1), (2, 2, 1), (4, 1, 1), (4, 4, 1), (2, 1, 2), (2, 2, 2), (4, 1, 2), (4, 2, 2), (3, 1, 4), (4, 1, 4))
"""`warpgroups`, `warps_k`, `split`."""
_RINGS = ((4, 8), (4, 4), (3, 8), (3, 4), (4, 2), (3, 2), (2, 2))
"""`stages`, `x_stages`: the first that fits."""

# What follows is fitted to recorded times of 120 problems of 16 to 128 rows (docs/benchmarks/swap_ab_configs.json); the choice among all
# kernels that it leads to is within 5 % of the best on 103 of them. What a step costs an SM, in ns on an H100 at 1.98 GHz: to decode 64
# columns, for their products with 8 rows and 64 k, and to bring such rows.
_DECODE_NS = {16: 38.9, 8: 85.3, 4: 185.3}
"""By bits of a weight: bf16, e4m3 to fp16, nvfp4 to bf16."""
_BF16_NS = 37.5
"""More where 8 bits become bf16, without a conversion in hardware."""
_BLOCK_NS = 50.8
"""More where floats scale sums of 128."""
_MULTIPLY_NS, _BRING_NS = 1.23, 25.2
_LATENCY = 2.26
"""How much longer a warpgroup takes for a step than its share of the SM's work, and waits for its products, which it does not share."""
_TILE_NS, _SUM_NS = 4048.0, 2.08
"""For each tile, and for each part of its sums (64 columns, 8 rows) that another warpgroup has."""
_LAUNCH_US, _CLUSTER_US = 2.8, 2.14
_CALIBRATED_KHZ = 1_980_000


class SwapAB:
    name = "swap_ab"
    multiplies = True

    def refuse(self, problem: object) -> str | None:
        refused = gemm.refuse(problem, self.name)
        if refused or not isinstance(problem, Problem):
            return refused
        if "wgmma" not in arch.get(problem.arch or "sm_90a").features:
            return "needs sm_90a"
        if problem.batch_invariant:
            return "adds up in another order for another m"
        if few_rows.rows(problem) < _LEAST_ROWS and problem.backend == "auto":
            return f"leaves fewer than {_LEAST_ROWS} rows to skinny, which was as fast or faster wherever both were timed"
        blocks = problem.scale_block and problem.backend == "auto"
        return few_rows.refuse(problem, _MOST_ROWS_OF_BLOCKS if blocks else _MOST_ROWS)

    def candidates(self, problem: Problem, device: Device) -> tuple[Config, ...]:
        rows = max(8, 1 << (few_rows.rows(problem) - 1).bit_length())
        wanted = []
        for g, w, split in _SHAPES:
            tokens = min(rows, _most_tokens(problem, g, w))
            fewer = max(8, tokens // 2) if problem.grouped else min(tokens, 64)  # some segments are shorter than others
            for t in sorted({tokens, fewer}):
                fitting = (c for c in (Config(t, g, w, *rings, split, pdl=problem.pdl) for rings in _RINGS) if _fits(problem, c))
                wanted += [c for c in itertools.islice(fitting, 1) if tokens]
        return tuple(c._replace(clusters=_clusters(problem, c, device)) for c in wanted)

    def cost(self, problem: Problem, config: Config, device: Device) -> float:
        """What the busiest SM does, what its warpgroups wait for, and what memory brings, which overlap in part; and the launch."""
        pieces, share = few_rows.pieces(problem, config.tokens), ceil_div(ceil_div(problem.n, 16), config.clusters)
        turns = ceil_div(share, config.columns // 16)
        warps = ceil_div(share, turns) * config.warps_k  # that have a tile
        waves = ceil_div(config.clusters * pieces, _resident(config, device))
        rounds = ceil_div(ceil_div(ceil_div(problem.k, few_rows.step(problem)), config.split), config.warps_k)

        decode, values = _decode(problem), few_rows.chunk(problem) // 8 * (config.tokens // 8)
        multiply = config.warpgroups * _MULTIPLY_NS + config.warps_k * _BRING_NS
        work = turns * rounds * (warps / 4 * decode + multiply * values)
        sums = _SUM_NS * config.warps_k * config.split * (config.tokens // 8)
        latency = turns * (rounds * _LATENCY * (decode + 4 * _MULTIPLY_NS * values) + _TILE_NS + sums)
        spent = waves * 1e-3 * _CALIBRATED_KHZ / device.clock_khz
        memory = few_rows.memory_bytes(problem, config.tokens) / (device.read_gbs * 1e3)
        launch = _LAUNCH_US + _CLUSTER_US * (config.split > 1)
        return launch + math.hypot(work * spent, latency * spent, memory)

    def steps(self, call: GemmCall, config: Config) -> tuple[Step | Zero, ...]:
        problem = call.problem
        grid = config.clusters * config.split * few_rows.row_tiles(call, config.tokens)
        some = call.segments != ""  # without segments, no row is left out
        return gemm.steps(
            call, self.name, _defines(problem, config), grid, config.threads, smem(problem, config), config.pdl, config.clusters, clear=some
        )  # fmt: skip


def smem(problem: Problem, config: Config) -> int:
    """`Shared` of the kernel: barriers, steps of A, sums, rings."""
    steps = config.x_stages * few_rows.chunk(problem) * 16 * (config.tokens + 1)
    groups = config.warpgroups // config.warps_k
    parts = 4 * groups * (config.tokens // 8) // (2 if groups * config.tokens > 128 else 1)
    mail = ceil_div(parts, config.split) * config.split * config.warps_k * 512
    rings = 4 * config.warpgroups * config.stages * few_rows.stage_bytes(problem)
    return ceil_div(16 * config.x_stages + 16, 128) * 128 + steps + mail + rings


def _fits(problem: Problem, config: Config) -> bool:
    return config.x_stages % config.warps_k == 0 and smem(problem, config) <= arch.get("sm_90a").max_smem


def _most_tokens(problem: Problem, warpgroups: int, warps_k: int) -> int:
    """That leave registers for so many warpgroups (what the compiler says), and are worth it; 0: none do."""
    if problem.scale_block:
        cheap = problem.b == INT4X2.name or (few_rows.chunk(problem) == 16 and not problem.b_scale and not gemm.computes_bf16(problem))
        if warpgroups > 3 and warps_k == 1 and problem.b == INT4X2.name:
            return 0
        return (32 if cheap else 16) if warpgroups == 2 else 16 if cheap else 0
    if warpgroups > 3 and warps_k > 2 and few_rows.chunk(problem) == 16:
        return 32
    return 128 if warpgroups == 2 and warps_k == 1 else 64


def _clusters(problem: Problem, config: Config, device: Device) -> int:
    """Of each row tile, which have as many tiles of 16 columns each; of segments, as many as could have tiles of all warpgroups."""
    resident = _resident(config, device)
    if problem.grouped:
        return few_rows.clusters(problem, config.tokens, ceil_div(problem.n, config.columns), resident)
    tiles = ceil_div(problem.n, 16)
    return ceil_div(tiles, ceil_div(tiles, few_rows.clusters(problem, config.tokens, tiles, resident)))


def _resident(config: Config, device: Device) -> int:
    """Clusters that the GPU holds at once."""
    return max(1, int(device.sm_count * REACHED[config.split] // config.split))


def _decode(problem: Problem) -> float:
    """ns of an SM for 128 bytes of each of 64 weight rows."""
    bits = 128 // few_rows.chunk(problem)
    ns = _DECODE_NS[bits] + (_BF16_NS if bits == 8 and gemm.computes_bf16(problem) else 0.0)
    return ns + (_BLOCK_NS if problem.scale_block else 0.0)


def _defines(problem: Problem, config: Config) -> tuple[tuple[str, int], ...]:
    return (
        *few_rows.defines(problem),
        ("TOKENS", config.tokens),
        ("WARPGROUPS", config.warpgroups),
        ("WARPS_K", config.warps_k),
        ("STAGES", config.stages),
        ("X_STAGES", config.x_stages),
        ("SPLIT", config.split),
    )


KERNEL = SwapAB()
