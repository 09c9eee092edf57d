"""`kernels/hopper.cu`: many rows, by warpgroup products of tiles that TMA brings; sm_90a."""

from __future__ import annotations

import struct
from typing import NamedTuple

from cugemm import arch
from cugemm.arch import Device
from cugemm.catalog import few_rows, gemm
from cugemm.catalog.step import REACHED, Step, TensorMap, Zero
from cugemm.formats import ELEMENTS, FP16
from cugemm.problem import FLOATS8, FLOATS16, OUT, A, B, GemmCall, Problem
from cugemm.scales import ceil_div

_LINE = 128
"""Bytes of a step along k, of each row."""
_PANEL = 64
"""Values of m, or n, in a line where operands are contiguous along those."""


class Config(NamedTuple):
    """Columns of a tile, warpgroups that multiply, steps in the ring; CTAs of a cluster, which share columns of B, or cut k; how many
    clusters there are; places for results of each warp, of 16 lines; whether warpgroups, of 64 rows each together, have tiles of 128 rows
    apart; which operands are turned first, to be contiguous along k, or made `wide`: fp16, whose sums are fp32; and whether a is
    `copied` first, to lines that TMA can read."""

    columns: int
    warpgroups: int
    stages: int
    share: int = 1
    split: int = 1
    clusters: int = 1
    lines: int = 1
    apart: bool = False
    turned: str = ""
    wide: bool = False
    copied: bool = False

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups

    @property
    def cluster(self) -> int:
        return self.share * self.split

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    def __str__(self) -> str:
        shared = "that share columns of b" if self.share > 1 else "that cut k"
        return (
            f"tile {self.rows}x{self.columns}, warpgroups {self.warpgroups}{' apart' * self.apart}, {self.stages} stages, "
            f"{self.clusters} "
            + (f"clusters of {self.cluster} {shared}" if self.cluster > 1 else "CTAs")
            + "".join(f", {role} {'in fp16' if self.wide else 'transposed'} first" for role in self.turned)
            + ", a copied first" * self.copied
        )


_SHAPES = {False: ((1, False, 256), (2, False, 256), (2, True, 160)), True: ((1, False, 192), (2, False, 256))}
"""`warpgroups`, `apart`, and columns for which registers hold the sums; by whether those of a step are added up outside."""
_MOST_BESIDE = 192
"""Columns beside whose sums registers hold others: those of a step, or of other CTAs of a cluster. 256 are added up outside in two lots."""
_MOST_STAGES = 16
_SPLITS = (2, 4)

# Fitted to times of 429 products on an H100 (docs/benchmarks/hopper_configs.json): the choice is within 5 % of the best on 92 %.
_STEP_CLOCKS, _SUM_CLOCKS, _SPLIT_ENDS = 255.0, 0.233, 0.29
"""Of a step, beside its products; at the end of a tile, for each sum of a warpgroup; part of those that each further CTA adds."""
_BYTES_PER_CLOCK = 55.0
"""That an SM gets from L2."""
_AGAIN, _AT_ONCE = 0.42, 4
"""How much longer memory takes for weights that so many clusters ask for at a time: as this power of their number."""
_NORM = 3.08
"""How what goes on at the same time adds up: as a norm of this order."""
_LAUNCH_US, _MEET_US = 3.06, 1.26
"""Of a product; of CTAs that cut k."""
_TURN_US, _TURN = 2.0, 0.7
"""To transpose an operand, or widen it: the launch, and part of the read bandwidth."""
_TAIL, _COPY_TAIL = struct.Struct("<5q4I"), struct.Struct("<6q4I")
_TURN_TILE, _TURN_THREADS = 128, 256


class Hopper:
    name = "hopper"
    multiplies = True

    def refuse(self, problem: object) -> str | None:
        refused = gemm.refuse(problem, self.name)
        if refused or not isinstance(problem, Problem):
            return refused
        if "wgmma" not in arch.get(problem.arch or "sm_90a").features:
            return "needs sm_90a"
        alike = problem.a == problem.b if problem.a in FLOATS16 else problem.a in FLOATS8
        if not alike or problem.b not in (*FLOATS16, *FLOATS8) or (problem.b in FLOATS8) != (problem.a in FLOATS8):
            return "multiplies two operands of one 16-bit type, or two of float8"
        if problem.a_scale or problem.b_scale or problem.zero:
            return "multiplies values as they are stored"
        fp8 = problem.a in FLOATS8
        if _wide(problem) and problem.scale_block:
            return "adds up fp8 products in tensor cores, which keep 14 bits, where floats scale them along k"
        if _turned(problem) and not problem.scratch:
            return "multiplies fp8 contiguous along k, with sums of 14 bits, and has no memory to prepare others"
        if not problem.in_order or problem.k == 0 or not (problem.vector or problem.b_vector):
            return "reads rows in order, in 16-byte pieces, that do not overlap"
        if _copied(problem) and (_wide(problem) or problem.grouped or not problem.scratch):
            return "reads rows in 16-byte pieces, that do not overlap, and copies others only of single products, where there is memory"
        if problem.batch_invariant and (_wide(problem) or not problem.b_vector):
            return "with batch_invariant multiplies as tensor cores add up, weights in 16-byte pieces along k"
        if problem.scale_block not in (0, 128) or (problem.scale_block and (problem.column_scales or not fp8)):
            return "scales sums of 128 fp8 values along k only, of 128 columns"
        return None

    def candidates(self, problem: Problem, device: Device) -> tuple[Config, ...]:
        """The cheapest few of all that fit."""
        turned, wide, copied = _turned(problem), _wide(problem), _copied(problem)
        found = (c._replace(turned=turned, wide=wide, copied=copied) for c in fitting(_settled(problem), device))
        return tuple(sorted(found, key=lambda c: self.cost(problem, c, device))[:16])

    def cost(self, problem: Problem, config: Config, device: Device) -> float:
        """What the busiest SM multiplies, with the ends of tiles; what it is fed; what memory gives; whatever takes longest, and a little
        for the others; the launch. At best products of 64 x n x 32 bytes take n / 2 clocks."""
        problem = _settled(problem)
        bytes_each = ELEMENTS[problem.a].bits // 8
        tiles = _tiles(problem, config)
        rounds = ceil_div(tiles, config.clusters)
        steps = ceil_div(ceil_div(problem.k * bytes_each, _LINE), config.split)
        height, columns = config.rows, config.columns
        together = config.warpgroups == 2 and not config.apart
        products = height * columns / 32 + _STEP_CLOCKS
        ends = _SUM_CLOCKS * height * columns / (2 if together else 1) * (1 + _SPLIT_ENDS * (config.split - 1))
        busy = rounds * steps * products + ends * (1 if config.apart else rounds)  # apart: while the other warpgroup multiplies
        fed = rounds * steps * (_brought(problem.m, config) + columns / config.share) * _LINE / _BYTES_PER_CLOCK
        clock = device.clock_khz * 1e-3
        lines = problem.m * (1 if problem.grouped else problem.batch)
        asking = min(ceil_div(few_rows.rows(problem), height * config.share), _AT_ONCE)
        weights = few_rows.matrices(problem) * problem.n * asking**_AGAIN
        values = (lines + weights) * problem.k * bytes_each + lines * problem.n * 2
        memory = values / (device.read_gbs * 1e3)
        longest: float = sum(us**_NORM for us in (busy / clock, fed / clock, memory)) ** (1 / _NORM)
        rows = {"a": lines, "b": problem.batch * problem.n}  # of all segments, if they have an expert each
        moved = 3 if config.wide else 2 * bytes_each
        prepared = config.turned + "a" * config.copied
        before = sum(_TURN_US + moved * rows[role] * problem.k / (_TURN * device.read_gbs * 1e3) for role in prepared)
        return _LAUNCH_US + (_MEET_US if config.split > 1 else 0) + longest + before

    def steps(self, call: GemmCall, config: Config) -> tuple[Step | Zero, ...]:
        operands, turns, used = list(_operands(call, config)), [], 0
        for i, x in enumerate(operands):
            copied = config.copied and x.role == "a"
            if copied or x.role in config.turned:
                prepare = _copy if copied else _widen if config.wide else _transpose
                step, operands[i], taken = prepare(x, call, OUT + 1 + len(call.workspaces), used)
                turns.append(step)
                used += taken
        if turns:
            turns[0] = turns[0]._replace(scratch=ceil_div(used, 4))
        problem = _settled(call.problem)
        size, most = ELEMENTS[problem.a].bits // 8, _tiles(problem._replace(m=call.m, batch=call.batch), config, most=True)
        if not call.batch or not call.experts:
            most = 0  # nobody asks for a row, and TMA knows no array without matrices
        clusters = most if config.split > 1 else min(most, config.clusters)
        maps = (*(_map(x, call.k, size) for x in operands), _out_map(call))
        pdl = "" if turns else problem.pdl  # what is turned comes from the launch ahead
        *before, multiply = gemm.steps(
            call, self.name, _defines(problem, config), clusters * config.cluster, config.threads, smem(problem, config), pdl, clusters
        )  # fmt: skip
        assert isinstance(multiply, Step)
        return (*before, *turns, multiply._replace(maps=maps))


def promotes(problem: Problem) -> bool:
    """Whether sums leave the tensor cores after each step. Problems are settled."""
    return problem.scale_block > 0 or problem.accumulate == "promoted"


def _wide(problem: Problem) -> bool:
    """Whether sums of fp8 are to be as good as fp32's."""
    return problem.a in FLOATS8 and problem.accumulate == "fp32"


def _copied(problem: Problem) -> bool:
    """Whether TMA cannot read a as it lies."""
    return not (problem.vector and problem.a_vector)


def _turned(problem: Problem) -> str:
    """Operands that tensor cores cannot read as they lie, or not for such sums."""
    majors = (("a", "k" if _copied(problem) else problem.a_major), ("b", problem.b_major))
    return "".join(role for role, major in majors if problem.a in FLOATS8 and (major == "mn" or _wide(problem)))


def _settled(problem: Problem) -> Problem:
    """With operands as the kernel reads them, and sums as it makes them."""
    if _wide(problem):
        return problem._replace(a=FP16.name, b=FP16.name, accumulate="promoted")
    if _copied(problem):
        problem = problem._replace(a_major="k", vector=True, a_vector=True)
    if problem.a in FLOATS8:
        return problem._replace(a_major="k", b_major="k")
    return problem._replace(accumulate="fast")


def fitting(problem: Problem, device: Device) -> list[Config]:
    """All that shared memory and registers hold."""
    multiple = _PANEL if problem.b_major == "mn" else 16
    found = []
    for warpgroups, apart, most in _SHAPES[promotes(problem)]:
        for columns in range(multiple, most + 1, multiple):
            if promotes(problem) and _MOST_BESIDE < columns < most:
                continue
            if problem.scale_block and columns > 128 and 128 % (columns - 128):
                continue  # columns under three scales
            for share, split in ((1, 1), (2, 1), *((1, split) for split in _SPLITS if not problem.batch_invariant)):
                config = Config(columns, warpgroups, _MOST_STAGES, share, split, apart=apart)
                if split > 1 and (apart or columns % (16 * split) or columns > _MOST_BESIDE):
                    continue
                if not _worth(problem, config, device):
                    continue
                rings = (config._replace(stages=stages, lines=lines) for stages in range(_MOST_STAGES, 2, -1) for lines in (2, 1))
                held = next((c for c in rings if smem(problem, c) <= arch.get("sm_90a").max_smem), None)
                if held is None:
                    continue
                resident = int(device.sm_count * REACHED[config.cluster] // config.cluster)
                tiles = _tiles(problem, config)
                # As few as need no more rounds: those read each other's operands from L2.
                clusters = tiles if split > 1 else ceil_div(tiles, ceil_div(tiles, resident))
                found.append(held._replace(clusters=clusters))
    return found


def _worth(problem: Problem, config: Config, device: Device) -> bool:
    """Whether there are tiles for all CTAs of a cluster, and, where they cut k, few of them, and some steps for each."""
    if config.split == 1:
        return problem.m > (config.share - 1) * config.rows
    steps = ceil_div(problem.k * ELEMENTS[problem.a].bits // 8, _LINE)
    each = ceil_div(steps, config.split)
    return (
        _tiles(problem, config) * config.split <= device.sm_count * REACHED[config.split]
        and each >= 4
        and each * (config.split - 1) < steps
    )


def _tiles(problem: Problem, config: Config, most: bool = False) -> int:
    """That clusters take, one after the other; of segments as many as can be expected, or, `most`, as any lengths need."""
    rows = config.rows * config.share
    if not problem.grouped:
        pieces = problem.batch * ceil_div(problem.m, rows)
    elif most:
        pieces = problem.m // rows + min(problem.batch, problem.m)
    else:
        pieces = few_rows.pieces(problem, rows)
    return pieces * ceil_div(problem.n, config.columns)


def smem(problem: Problem, config: Config) -> int:
    """`Ring` of the kernel: tiles, lines of results, what scales columns, rows and sums, barriers."""
    columns = ceil_div(config.columns, _PANEL) * _PANEL if problem.b_major == "mn" else config.columns
    ring = config.stages * (config.rows + columns) * _LINE
    lines = 4 * config.warpgroups * config.lines * 2048
    scales = config.stages * (config.rows + 4) * 4 if problem.scale_block else 0
    tiles = 2 if config.apart else 1
    return ring + lines + tiles * (config.columns * 8 + config.rows * 4) + scales + (config.stages + tiles) * 16


def _brought(m: int, config: Config) -> int:
    """Rows of A that a step brings: none that are not there, which TMA would fill with zeros, slowly."""
    return min(config.rows, ceil_div(m, 8) * 8)


class _Operand(NamedTuple):
    """Where one lies: strides count values, (matrix, row, k); offset: bytes behind the pointer. part: rows of a tile that a CTA brings."""

    role: str
    pointer: int
    offset: int
    rows: int
    matrices: int
    strides: tuple[int, int, int]
    major: str
    part: int
    sharers: int


def _operands(call: GemmCall, config: Config) -> tuple[_Operand, _Operand]:
    problem = call.problem
    matrices = (call.batch if call.a_strides[0] else 1), (call.experts if call.segments else call.batch) if call.b_strides[0] else 1
    return (
        _Operand("a", A, 0, call.a_rows, matrices[0], call.a_strides, problem.a_major, _brought(call.m, config), 1),
        _Operand("b", B, 0, call.n, matrices[1], call.b_strides, problem.b_major, config.columns, config.share),
    )


def _transpose(x: _Operand, call: GemmCall, scratch: int, offset: int) -> tuple[Step, _Operand, int]:
    """The launch that makes an operand of bytes contiguous along k, so many behind the pointer `scratch`; what it is then; its bytes."""
    matrix, _, line = x.strides
    k, pitch = call.k, ceil_div(call.k, 16) * 16
    down, across = ceil_div(k, _TURN_TILE), ceil_div(x.rows, _TURN_TILE)
    tail = _TAIL.pack(line, matrix, pitch, x.rows * pitch, offset, k, x.rows, down, across)
    smem = _TURN_TILE * _TURN_TILE + _TURN_TILE
    step = Step("transpose", (), x.matrices * down * across, _TURN_THREADS, smem, (x.pointer, scratch), (), tail)
    strides = (x.rows * pitch if matrix else 0, pitch, 1)
    return step, x._replace(pointer=scratch, offset=offset, strides=strides, major="k"), x.matrices * x.rows * pitch


def _widen(x: _Operand, call: GemmCall, scratch: int, offset: int) -> tuple[Step, _Operand, int]:
    """The same of one that is fp16 then, contiguous along what it was."""
    matrix, row, step = x.strides
    lines, length, line = (x.rows, call.k, row) if x.major == "k" else (call.k, x.rows, step)
    pitch, pieces = ceil_div(length, 8) * 8, ceil_div(length, 16)
    everything = x.matrices * lines * pieces
    tail = _TAIL.pack(line, matrix, 2 * pitch, 2 * lines * pitch, offset, lines, length, pieces, everything)
    element = ELEMENTS[call.problem.a if x.role == "a" else call.problem.b].code
    launch = Step("widen", (("ELEMENT", element),), ceil_div(everything, _TURN_THREADS), _TURN_THREADS, 0, (x.pointer, scratch), (), tail)
    strides = (lines * pitch if matrix else 0, *((pitch, 1) if x.major == "k" else (1, pitch)))
    return launch, x._replace(pointer=scratch, offset=offset, strides=strides), 2 * x.matrices * lines * pitch


def _copy(x: _Operand, call: GemmCall, scratch: int, offset: int) -> tuple[Step, _Operand, int]:
    """The same of one that is contiguous along k then."""
    size = ELEMENTS[call.problem.a].bits // 8
    pitch = ceil_div(call.k * size, 16) * 16
    pieces = pitch // 16
    everything = x.matrices * x.rows * pieces
    matrix, row, step = x.strides
    tail = _COPY_TAIL.pack(
        step * size, row * size, matrix * size, pitch, x.rows * pitch, offset, x.rows, call.k, pieces, everything
    )  # fmt: skip
    launch = Step("align", (("BYTES", size),), ceil_div(everything, _TURN_THREADS), _TURN_THREADS, 0, (x.pointer, scratch), (), tail)
    strides = (x.rows * pitch // size if matrix else 0, pitch // size, 1)
    return launch, x._replace(pointer=scratch, offset=offset, strides=strides, major="k"), everything * 16


def _map(x: _Operand, k: int, size: int) -> TensorMap:
    matrix, row, step = x.strides
    if x.major == "k":
        axes, along, box = (k, x.rows), row, (_LINE // size, x.part // x.sharers, 1)
    else:
        axes, along, box = (x.rows, k), step, (_PANEL, _PANEL // x.sharers, 1)
    pitch = along * size or ceil_div(axes[0] * size, 16) * 16  # of an axis of length 1
    return TensorMap(x.pointer, size, (*axes, x.matrices), (pitch, matrix * size or pitch * axes[1]), box, x.offset)


def _out_map(call: GemmCall) -> TensorMap:
    """Boxes of 16 rows of 128 bytes of a result that the kernel stores so; of any other one that TMA could know, which it does not use."""
    batch, row, _ = call.out_strides
    pitch, matrix = (row * 2, batch * 2) if row > 0 and row % 8 == 0 and batch >= 0 and batch % 8 == 0 else (ceil_div(call.n, 8) * 16, 0)
    return TensorMap(OUT, 2, (call.n, call.m, call.batch), (pitch, matrix or pitch * call.m), (64, 16, 1))


def _defines(problem: Problem, config: Config) -> tuple[tuple[str, int], ...]:
    return (
        ("A_ELEMENT", ELEMENTS[problem.a].code),
        ("A_SCALE", 0),
        ("B_ELEMENT", ELEMENTS[problem.b].code),
        ("B_SCALE", 0),
        ("A_MAJOR", int(problem.a_major == "mn")),
        ("B_MAJOR", int(problem.b_major == "mn")),
        ("SCALE_BLOCK", problem.scale_block),
        ("PROMOTE", int(promotes(problem))),
        ("GROUPED", int(problem.grouped)),
        ("BLOCK_N", config.columns),
        ("WARPGROUPS", config.warpgroups),
        ("STAGES", config.stages),
        ("SHARE", config.share),
        ("SPLIT", config.split),
        ("LINES", config.lines),
        ("APART", int(config.apart)),
    )


KERNEL = Hopper()
