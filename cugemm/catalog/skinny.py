"""`kernels/skinny.cu`: products of up to 16 rows with weights contiguous along k, dense, batched or masked, sm_80 and up."""

from __future__ import annotations

from typing import NamedTuple

from cugemm import arch
from cugemm.arch import Device
from cugemm.catalog import gemm
from cugemm.catalog.step import Step, Zero
from cugemm.formats import BF16, E2M1X2, E4M3, E8M0, ELEMENTS, FP16, INT4X2, INT8
from cugemm.problem import FLOATS8, FLOATS16, GemmCall, Problem
from cugemm.scales import ceil_div

_MOST_ROWS = 64
_LEFT = (*FLOATS16, *FLOATS8)
_RIGHT = (*FLOATS16, *FLOATS8, E2M1X2.name, INT8.name, INT4X2.name)
_SHARED = 200 * 1024
"""Of a CTA: a ring much longer does not read faster."""


_REACHED = {1: 1.0, 2: 1.0, 4: 0.87, 8: 0.84}
"""Part of the SMs that clusters of so many CTAs reach: they do not fit every GPC (measured on an H100)."""


class Config(NamedTuple):
    """Warps of a CTA, those of them that share a tile, its rows in 16s, the ring, the CTAs of a cluster, which cut k, and how many clusters
    each matrix gets; `ctas`: that share an SM."""

    tokens: int
    warps: int
    warps_k: int
    row_blocks: int
    stages: int
    split: int
    ctas: int
    clusters: int = 1
    pdl: str = ""

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, {16 * self.row_blocks} columns, warps {self.warps // self.warps_k}x{self.warps_k}, "
            f"{self.stages} stages, {self.clusters} clusters of {self.split}"
        )


class Skinny:
    name = "skinny"
    multiplies = True

    def refuse(self, problem: object) -> str | None:
        if not isinstance(problem, Problem):
            return "multiplies matrices, does not convert them"
        if problem.backend not in ("auto", self.name):
            return f"backend={problem.backend!r} was asked for"
        if problem.backend == "auto":
            return "not proven yet"
        if problem.m > _MOST_ROWS or problem.grouped:
            return f"multiplies up to {_MOST_ROWS} rows, of a whole matrix"
        if problem.a not in _LEFT or problem.b not in _RIGHT or problem.a_scale or problem.zero:
            return "takes 16-bit or float8 rows, and weights without zero points"
        if not problem.b_vector:
            return "reads weights along k, in 16-byte pieces"
        if _bf16(problem) and FP16.name in (problem.a, problem.b):
            return "does not split fp16 for bf16"
        if problem.scale_block not in (0, 128) or (problem.scale_block and _step(problem) not in (128, 256)):
            return "scales sums of 128 values along k only"
        if not self.candidates(problem, arch.H100):
            return f"does not hold {problem.m} rows of {problem.k} in shared memory"
        return None

    def candidates(self, problem: Problem, device: Device) -> tuple[Config, ...]:
        target = arch.get(problem.arch) if problem.arch else arch.get("sm_90a")
        limit = min(target.max_smem, _SHARED)
        tokens = max(1, 1 << (problem.m - 1).bit_length())
        found = []
        for split in (1, 2, 4, 8) if "cluster" in target.features else (1,):
            steps = ceil_div(ceil_div(problem.k, _step(problem)), split)
            for warps, warps_k in ((16, 16), (16, 8), (16, 4), (8, 8), (8, 4), (16, 2), (16, 1)):
                for row_blocks in (1, 2):
                    for stages in (4, 3, 2):
                        config = Config(tokens, warps, warps_k, row_blocks, stages, split, 1)
                        if warps_k <= max(steps, 1) and _smem(problem, config) <= limit:
                            found.append(config._replace(clusters=_clusters(problem, config, device), pdl=problem.pdl))
                            break
        return tuple(found)

    def cost(self, problem: Problem, config: Config, device: Device) -> float:
        """A placeholder until times are measured: balance of the CTAs, then bytes."""
        values = problem.batch * problem.n * problem.k * ELEMENTS[problem.b].bits / 8
        tiles = ceil_div(problem.n, 16 * config.row_blocks)
        groups = config.clusters * (config.warps // config.warps_k)
        rounds = ceil_div(tiles, groups)
        waste = rounds * groups / tiles
        return (
            2.5 + values / (device.read_gbs * 1e3) * waste + 0.5 * (config.split > 1) + 0.01 * config.split + 0.02 * (16 - config.warps_k)
        )

    def steps(self, call: GemmCall, config: Config) -> tuple[Step | Zero, ...]:
        problem = call.problem
        grid = config.clusters * config.split * call.batch * ceil_div(call.m, config.tokens)
        smem = _smem(problem, config)
        return gemm.steps(
            call,
            self.name,
            _defines(problem, config),
            grid,
            config.threads,
            smem,
            config.pdl,
            config.clusters,
            call.problem.grouped or call.segments != "",
        )


def _bf16(problem: Problem) -> bool:
    return BF16.name in (problem.a, problem.b) or E8M0.name == problem.b_scale


def _chunk(problem: Problem) -> int:
    """Values of a weight in 16 bytes."""
    return 128 // ELEMENTS[problem.b].bits


def _step(problem: Problem) -> int:
    return 8 * _chunk(problem)


def _clusters(problem: Problem, config: Config, device: Device) -> int:
    """For each matrix: no more than have a tile, and than fit the GPU."""
    tiles = ceil_div(ceil_div(problem.n, 16 * config.row_blocks), config.warps // config.warps_k)
    fit = device.sm_count * config.ctas * _REACHED[config.split] // config.split
    return max(1, min(tiles, int(fit) // ceil_div(problem.m, config.tokens)))


def _smem(problem: Problem, config: Config) -> int:
    blocks = ceil_div(config.tokens, 8)
    held = min(config.tokens, 8) * blocks
    steps = ceil_div(ceil_div(problem.k, _step(problem)), config.split)
    words = 4 if problem.b_scale == E4M3.name else _chunk(problem) // 16 if problem.b_scale else 0
    stage = 2048 * config.row_blocks + 16 * config.row_blocks * words * 4
    sums = config.row_blocks * blocks * 512
    mail = 2 * config.split * (config.warps // config.warps_k) * sums if config.split > 1 else 0
    own = 2 * config.warps * sums if config.warps_k > 1 else 0
    return steps * _step(problem) * held * 2 + own + mail + config.warps * config.stages * stage


def _defines(problem: Problem, config: Config) -> tuple[tuple[str, int], ...]:
    return (
        ("A_ELEMENT", ELEMENTS[problem.a].code),
        ("A_SCALE", 0),
        ("B_ELEMENT", ELEMENTS[problem.b].code),
        ("B_SCALE", ELEMENTS[problem.b_scale].code if problem.b_scale else 0),
        ("SCALE_BLOCK", problem.scale_block),
        ("TOKENS", config.tokens),
        ("WARPS", config.warps),
        ("WARPS_K", config.warps_k),
        ("ROW_BLOCKS", config.row_blocks),
        ("STAGES", config.stages),
        ("SPLIT", config.split),
        ("MIN_CTAS", config.ctas),
    )


KERNEL = Skinny()
