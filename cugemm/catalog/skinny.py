"""`kernels/skinny.cu`: up to 64 rows of a matrix, or 16 of a segment on average, with weights contiguous along k; sm_80 and up."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from cugemm import arch
from cugemm.arch import Device
from cugemm.catalog import few_rows, gemm
from cugemm.catalog.step import NULL, REACHED, Step, Zero
from cugemm.formats import BF16, E2M1X2, E4M3, E5M2, E8M0, ELEMENTS, FP16, INT4X2, INT8
from cugemm.problem import FLOATS8, OUT, GemmCall, Problem
from cugemm.scales import ceil_div

_MOST_ROWS, _MOST_OF_SEGMENT = 64, 16
_FEW = 16


class Config(NamedTuple):
    """Rows of A held, warps of a CTA, those of them that share a run of steps, weight rows of a tile in 16s, the ring, the CTAs of a
    cluster, which cut k, and how many clusters each matrix gets; `ctas`: that share an SM; `parts`: CTAs that cut k where there are no
    clusters."""

    tokens: int
    warps: int
    warps_k: int
    row_blocks: int
    stages: int
    split: int
    ctas: int
    clusters: int = 1
    pdl: str = ""
    parts: int = 1

    @property
    def cuts(self) -> int:
        return self.split * self.parts

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, {16 * self.row_blocks} columns, warps {self.warps // self.warps_k}x{self.warps_k}, "
            f"{self.stages} stages, "
            + (f"{self.clusters} x {self.parts} parts of k" if self.parts > 1 else f"{self.clusters} clusters of {self.split}")
        )


# What follows is fitted to recorded times of 1, 8 and 16 rows (docs/benchmarks/skinny_configs.json). Launches that overlap take the same,
# so that they give the same bits.
_SHARED = ((8, 1, 1, 4, 1, 1), (8, 1, 1, 4, 2, 1), (8, 1, 1, 4, 4, 1), (8, 1, 1, 4, 8, 1), (8, 8, 2, 3, 1, 1))
_SHAPES = {
    16: ((8, 8, 1, 4, 1, 1), (8, 8, 1, 4, 1, 2), (16, 16, 1, 4, 1, 1), (8, 8, 1, 4, 8, 1), *_SHARED),
    8: ((8, 8, 1, 4, 1, 1), (8, 8, 1, 4, 1, 2), (16, 16, 1, 4, 1, 1), (8, 8, 1, 4, 8, 1), *_SHARED),
    4: ((8, 8, 1, 6, 1, 1), (8, 4, 2, 3, 1, 1), (16, 1, 1, 4, 1, 1), (16, 1, 1, 3, 4, 1), *_SHARED),
}
"""`Config` from `warps` to `ctas`, by bits of a weight. Few rows need no cluster; more, and longer ones, leave room for rings only where
CTAs share k."""
_WIDE = ((16, 1, 1, 4, 1, 1), (8, 1, 1, 4, 1, 1), (8, 1, 1, 4, 4, 1), (8, 1, 1, 4, 8, 1))
"""Those for more than 16 rows, held all together or 16 at a time."""

_MOST_STAGES = 16
"""Of a ring that is deeper than those, where launches overlap."""

# What a step of a warp costs its SM, in ns on an H100 at 1.98 GHz: always, to decode 16 columns, for their products with 8 rows and 64 k.
_STEP_NS = 3.0
_DECODE_NS = {
    (BF16.name, ""): 0.0,
    (FP16.name, ""): 0.0,
    (E4M3.name, ""): 5.2,
    (E5M2.name, ""): 5.2,
    (INT8.name, ""): 5.2,
    (E4M3.name, E8M0.name): 11.0,
    (E5M2.name, E8M0.name): 11.0,
    (E2M1X2.name, ""): 16.1,
    (E2M1X2.name, E4M3.name): 16.1,
    (E2M1X2.name, E8M0.name): 29.3,
    (INT4X2.name, ""): 15.6,
}
"""By element and scales of the weights. Measured: 16 bits, e4m3 to bf16, nvfp4, mxfp4, int4 (with blocks); the others are like them."""
_CONVERT_NS = 3.0
"""In place of 5.2 where the hardware converts 8-bit floats to fp16."""
_BLOCK_NS, _BLOCK_SUMS_NS = 6.8, 2.7
"""More where floats scale sums of 128: always, and by the square of 8s of rows."""
_MULTIPLY_NS = 3.1
_APART = 0.13
"""How much longer memory takes for lines that are read one by one, in place of `warps_k` neighbours at a time."""
_LATENCY = 8.6
"""How much longer a warp takes for a step, which it does not share with others."""
_TILE_NS = 14.5
"""For all that a warp does between tiles, as a step."""
_END_NS, _SUM_NS = 800.0, 2.0
"""Behind the last step; for each part of a tile (16 columns, 8 rows) that a warp adds up, and each warp that had some of it."""
_STAGE_BYTES = 50.0
"""Bytes of A that reach the shared memory of an SM in a ns."""
_LAUNCH_US, _CLUSTER_US = 2.0, 1.5
_WARP_NS = 110.0
"""For all that a warp of an SM does before its first step."""
_CALIBRATED_KHZ = 1_980_000


class Skinny:
    name = "skinny"
    multiplies = True

    def refuse(self, problem: object) -> str | None:
        refused = gemm.refuse(problem, self.name)
        if refused or not isinstance(problem, Problem):
            return refused
        refused = few_rows.refuse(problem, _MOST_OF_SEGMENT if problem.grouped else _MOST_ROWS)
        if refused:
            return refused
        if not self.candidates(problem, arch.H100):
            return f"does not hold {few_rows.rows(problem)} rows of {problem.k} in shared memory"
        return None

    def candidates(self, problem: Problem, device: Device) -> tuple[Config, ...]:
        target = arch.get(problem.arch or "sm_90a")
        if "pdl" not in target.features:
            problem = problem._replace(pdl="")  # NOTE: without griddepcontrol, a launch that may begin early would not wait
        if problem.batch_invariant:
            return self.invariant(problem, target, device)
        whole = 1 << (few_rows.rows(problem) - 1).bit_length()
        few = whole <= _FEW
        clusters = "cluster" in target.features
        shapes = [s for s in (_SHAPES[ELEMENTS[problem.b].bits] if few else _WIDE) if s[4] == 1 or clusters or problem.scratch]
        held = {whole} if few else {_FEW, 32, whole}
        if problem.grouped:  # some segments are longer than others
            held = {min(whole, _FEW), 2 * min(whole, _FEW)}
        wanted = [_config(tokens, s, clusters)._replace(pdl=problem.pdl) for tokens, s in itertools.product(sorted(held), shapes)]
        for most, stages in itertools.product((False, True), (6, 3, 2)):  # shorter rings, and waves of clusters, where nothing else fits
            configs = [c._replace(stages=min(c.stages, stages)) for c in wanted]
            placed = (c._replace(clusters=_clusters(problem, c, device, target if most else None)) for c in configs)
            fitting = tuple(c for c in placed if _fits(problem, c, target))
            if fitting:
                return tuple(_deep(problem, c, target) for c in fitting)
        return ()

    def invariant(self, problem: Problem, target: arch.Arch, device: Device) -> tuple[Config, ...]:
        """Those that add up in the order that is best for 16 rows, whatever m is; no parts of k, whose memory would grow with m. The order
        depends on how many tiles a cluster has: further rows of A get clusters of their own, which wait if they must."""
        usual = problem._replace(m=_FEW, batch=1, grouped=False, batch_invariant=False, pdl="", scratch=False)
        best = min(self.candidates(usual, device), key=lambda c: self.cost(usual, c, device), default=None)
        if best is None:
            return ()
        whole = 1 << (few_rows.rows(problem) - 1).bit_length()
        wanted = (best._replace(tokens=tokens, pdl=problem.pdl) for tokens in sorted({min(whole, _FEW), min(whole, _MOST_ROWS)}))
        return tuple(_deep(problem, c, target) for c in wanted if _fits(problem, c, target))

    def cost(self, problem: Problem, config: Config, device: Device) -> float:
        """What the busiest SM does, what its warps wait for, and what memory brings, which overlap in part; and what comes before them."""
        tiles, run = ceil_div(_tiles(problem, config), config.clusters), _run(problem, config)
        clusters = config.clusters * few_rows.pieces(problem, config.tokens)
        resident = _resident(config, device)
        waves = ceil_div(clusters, resident)
        ctas = min(config.ctas, ceil_div(clusters * config.cuts, device.sm_count))

        blocks = ceil_div(config.tokens, 8)
        products = few_rows.chunk(problem) // 8 * blocks
        step = _STEP_NS + config.row_blocks * (_decode(problem, blocks) + _MULTIPLY_NS * products)
        groups = config.warps // config.warps_k
        part = ceil_div(tiles, groups) + (groups > 1)  # tiles that a warp has a part of
        busy = run * step + part * _TILE_NS * config.row_blocks * blocks
        sums = ceil_div(tiles * config.row_blocks * blocks, config.warps) * config.warps_k * _SUM_NS
        work, latency = busy * config.warps * ctas, busy * _LATENCY + _END_NS + sums
        rows = _rows_bytes(problem, config)
        clock = _CALIBRATED_KHZ / device.clock_khz
        before = waves * (rows / _STAGE_BYTES + ctas * config.warps * _WARP_NS) * 1e-3 * clock

        memory = few_rows.memory_bytes(problem, config.tokens) * (1 + _APART / config.warps_k)
        launch = _LAUNCH_US + _CLUSTER_US * (config.split > 1)
        if config.parts > 1:  # another launch, which reads what this one writes
            rows = problem.m * (1 if problem.grouped else problem.batch)
            launch += _LAUNCH_US + 8 * config.parts * rows * problem.n / (device.read_gbs * 1e3)
        spent = waves * clock * 1e-3
        return launch + before + math.hypot(work * spent, latency * spent, memory / (device.read_gbs * 1e3))

    def steps(self, call: GemmCall, config: Config) -> tuple[Step | Zero, ...]:
        problem = call.problem
        tiles = few_rows.row_tiles(call, config.tokens)
        grid, smem = config.clusters * config.cuts * tiles, _smem(problem, config)
        if config.pdl:
            smem = max(smem, _alone(config, arch.get(problem.arch or "sm_90a")))
        how = (_defines(problem, config), grid, config.threads, smem, config.pdl, config.clusters)
        some = call.segments != ""  # without segments, no row is left out
        if config.parts == 1:
            return gemm.steps(call, self.name, *how, clear=some)
        plain = call._replace(
            problem=problem._replace(out="float32"), out_strides=(call.m * call.n, call.n, 1), bias_dtype=None, bias_strides=(0, 0)
        )  # fmt: skip
        multiply = gemm.steps(plain, self.name, *how)[-1]
        defines = (("TOKENS", config.tokens), ("PARTS", config.parts))
        *before, add_up = gemm.steps(call, "reduce", defines, tiles * ceil_div(call.n, 64), 128, 0, clear=some)
        assert isinstance(multiply, Step) and isinstance(add_up, Step)
        sums, size = OUT + 1 + len(call.workspaces), config.parts * call.m * call.n * (1 if problem.grouped else call.batch)
        a, b, _, a_scale, b_scale, *_ = multiply.pointers
        pointers = (a, b, sums, a_scale, b_scale, *[NULL] * 5, *multiply.pointers[10:])  # factors and bias wait for the other kernel
        multiply = multiply._replace(pointers=pointers, scalars=(NULL, NULL, NULL), scratch=size)
        return (*before, multiply, add_up._replace(pointers=(sums, *add_up.pointers[1:])))


def _config(tokens: int, shape: tuple[int, int, int, int, int, int], clusters: bool) -> Config:
    """One of the shapes; without clusters k is cut into parts."""
    config = Config(tokens, *shape)
    return config if clusters else config._replace(split=1, parts=config.split)


def _tiles(problem: Problem, config: Config) -> int:
    return ceil_div(problem.n, 16 * config.row_blocks)


def _clusters(problem: Problem, config: Config, device: Device, target: arch.Arch | None = None) -> int:
    """The fewest that give none more tiles than as many as the GPU holds would; with a target, so many that the sums of those tiles fit."""
    tiles = _tiles(problem, config)
    each = ceil_div(tiles, few_rows.clusters(problem, config.tokens, tiles, _resident(config, device)))
    while target and each > 1 and not _fits(problem, config, target, each):
        each = each * 3 // 4
    return ceil_div(tiles, each)


def _resident(config: Config, device: Device) -> int:
    """Clusters that the GPU holds at once."""
    return max(1, int(device.sm_count * config.ctas * REACHED[config.split] // config.cuts))


def _steps(problem: Problem, config: Config) -> int:
    """Of a CTA, along k."""
    return ceil_div(ceil_div(problem.k, few_rows.step(problem)), config.cuts)


def _run(problem: Problem, config: Config) -> int:
    """Steps of a warp, in all tiles of its CTA."""
    return ceil_div(ceil_div(_tiles(problem, config), config.clusters) * _steps(problem, config), config.warps)


def _rows_bytes(problem: Problem, config: Config) -> int:
    """Of A in shared memory."""
    return _steps(problem, config) * few_rows.step(problem) * min(config.tokens, 8) * ceil_div(config.tokens, 8) * 2


def _decode(problem: Problem, blocks: int) -> float:
    """ns of an SM for 128 bytes of each of 16 weight rows."""
    hardware = not gemm.computes_bf16(problem) and "fp8_cvt" in arch.get(problem.arch or "sm_90a").features
    ns = _CONVERT_NS if hardware and problem.b in FLOATS8 else _DECODE_NS[problem.b, problem.b_scale]
    return ns + (_BLOCK_NS + _BLOCK_SUMS_NS * blocks**2 if problem.scale_block else 0.0)


def _smem(problem: Problem, config: Config, tiles: int = 0) -> int:
    """A, sums of warps, sums of CTAs, rings; `tiles`: of a cluster, if not its own."""
    sums = config.row_blocks * ceil_div(config.tokens, 8) * 128 * max(1, min(config.tokens, 8) // 2)
    each, groups = tiles or ceil_div(_tiles(problem, config), config.clusters), config.warps // config.warps_k
    slots = ceil_div(each, groups) + 1
    if groups == 1:  # `kSlots` of the kernel
        slots = each if config.split > 1 else min(each, max(2, (64 << 10) // (config.warps * sums)))
    meet = config.warps * slots * sums
    mail = ceil_div(each, config.split) * config.split * sums if config.split > 1 else 0
    rings = config.warps * config.stages * config.row_blocks * few_rows.stage_bytes(problem)
    return _rows_bytes(problem, config) + meet + mail + rings


def _fits(problem: Problem, config: Config, target: arch.Arch, tiles: int = 0) -> bool:
    """In registers (what the compiler says of sm_80 to sm_121), and in shared memory."""
    sums = config.row_blocks * ceil_div(config.tokens, 8) * (2 if problem.scale_block else 1)
    if sums > (8 if config.warps <= 8 else 2 if config.row_blocks == 2 or problem.scale_block else 4):
        return False
    return _smem(problem, config, tiles) <= min(target.max_smem, _room(config.ctas, target))


def _room(ctas: int, target: arch.Arch) -> int:
    """Bytes of shared memory for each of so many CTAs on an SM; the driver takes 1024 more."""
    return target.smem_per_sm // ctas - 1024


def _deep(problem: Problem, config: Config, target: arch.Arch) -> Config:
    """With a ring for half of what a warp reads, if shared memory holds that, of weights that may be loaded before the launch ahead has
    ended. A comes behind those, and so would all products; 4-bit weights take long to decode, and wait for A no longer than they must."""
    if config.pdl != "static" or ELEMENTS[problem.b].bits < 8:
        return config
    most = min(_run(problem, config) // 2 + 1, _MOST_STAGES)
    deeper = (config._replace(stages=stages) for stages in range(most, config.stages, -1))
    return next((c for c in deeper if _fits(problem, c, target)), config)


def _alone(config: Config, target: arch.Arch) -> int:
    """Shared memory that leaves no room on an SM for CTAs of the next launch, which then begin, and load weights, as these end. Beside
    them they would load while memory is busy anyway, and none as one kernel takes over from the other."""
    return _room(config.ctas + 1, target) + 1


def _defines(problem: Problem, config: Config) -> tuple[tuple[str, int], ...]:
    return (
        *few_rows.defines(problem),
        ("TOKENS", config.tokens),
        ("WARPS", config.warps),
        ("WARPS_K", config.warps_k),
        ("ROW_BLOCKS", config.row_blocks),
        ("STAGES", config.stages),
        ("SPLIT", config.split),
        ("PARTS", config.parts),
        ("MIN_CTAS", config.ctas),
    )


KERNEL = Skinny()
