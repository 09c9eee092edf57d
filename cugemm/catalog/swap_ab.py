"""`kernels/swap_ab.cu`: products of up to 128 rows at once with weights contiguous along k, by warpgroups with roles swapped, sm_90a."""

from __future__ import annotations

from typing import NamedTuple

from cugemm import arch
from cugemm.arch import Device
from cugemm.catalog import gemm, skinny
from cugemm.catalog.step import REACHED, Step, Zero
from cugemm.formats import E4M3, ELEMENTS
from cugemm.problem import GemmCall, Problem
from cugemm.scales import ceil_div

_MOST_ROWS = 256


class Config(NamedTuple):
    """Rows of A, warpgroups that multiply and those of them that share a tile, its columns in 64s, the rings (`rows`: steps of A, 0 all),
    CTAs of a cluster, which cut k, and how many clusters each row tile gets; `ctas`: that share an SM."""

    tokens: int
    warpgroups: int
    warps_k: int
    row_blocks: int
    stages: int
    rows: int
    split: int
    ctas: int
    clusters: int = 1
    pdl: str = ""

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def columns(self) -> int:
        return 64 * self.row_blocks * (self.warpgroups // self.warps_k)

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, {self.columns} columns, warpgroups {self.warpgroups // self.warps_k}x{self.warps_k}, "
            f"{self.stages} stages, {self.rows or 'all'} steps of rows, {self.clusters} clusters of {self.split}"
        )


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
        refused = skinny.refuse_operands(problem)
        if refused:
            return refused
        if problem.m > _MOST_ROWS * (problem.batch if problem.grouped else 1):
            return f"multiplies up to {_MOST_ROWS} rows"
        return None

    def candidates(self, problem: Problem, device: Device) -> tuple[Config, ...]:
        return ()

    def cost(self, problem: Problem, config: Config, device: Device) -> float:
        return 1.0

    def steps(self, call: GemmCall, config: Config) -> tuple[Step | Zero, ...]:
        tiles = row_tiles(call.problem._replace(batch=call.batch), call.m, config.tokens)
        return gemm.steps(
            call, self.name, defines(call.problem, config), config.clusters * config.split * tiles, config.threads,
            smem(call.problem, config), config.pdl, config.clusters, clear=call.segments != "",
        )  # fmt: skip


def row_tiles(problem: Problem, m: int, tokens: int) -> int:
    """As many as any segmentation can need."""
    return m // tokens + min(problem.batch, m) if problem.grouped else ceil_div(m, tokens) * problem.batch


def smem(problem: Problem, config: Config) -> int:
    """`Shared` of the kernel: barriers, steps of A, sums, rings."""
    chunk = skinny._chunk(problem)
    words = 4 if problem.b_scale == E4M3.name else chunk // 16 if problem.b_scale else 0
    rows = config.rows or ceil_div(ceil_div(problem.k, 8 * chunk), config.split)
    parts = config.columns // 16 * ceil_div(config.tokens, 8)
    mail = ceil_div(parts, config.split) * config.split * config.warps_k * 512
    rings = 4 * config.warpgroups * config.stages * 16 * config.row_blocks * (128 + 4 * words)
    return ceil_div(16 * rows + 16, 128) * 128 + rows * chunk * 16 * (config.tokens + 1) + mail + rings


def clusters(problem: Problem, config: Config, device: Device) -> int:
    """For each row tile: no more than have a tile of columns, and than fit the GPU."""
    resident = max(1, int(device.sm_count * config.ctas * REACHED[config.split] // config.split))
    return max(1, min(ceil_div(problem.n, config.columns), resident // row_tiles(problem, problem.m, config.tokens)))


def defines(problem: Problem, config: Config) -> tuple[tuple[str, int], ...]:
    return (
        ("A_ELEMENT", ELEMENTS[problem.a].code),
        ("A_SCALE", 0),
        ("B_ELEMENT", ELEMENTS[problem.b].code),
        ("B_SCALE", ELEMENTS[problem.b_scale].code if problem.b_scale else 0),
        ("SCALE_BLOCK", problem.scale_block),
        ("TOKENS", config.tokens),
        ("WARPGROUPS", config.warpgroups),
        ("WARPS_K", config.warps_k),
        ("ROW_BLOCKS", config.row_blocks),
        ("STAGES", config.stages),
        ("X_STAGES", config.rows),
        ("SPLIT", config.split),
        ("MIN_CTAS", config.ctas),
    )


KERNEL = SwapAB()
