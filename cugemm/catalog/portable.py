"""`kernels/portable.cu`: every pair of formats, every layout and alignment, dense, batched and grouped, sm_80 and up."""

from __future__ import annotations

import struct
from typing import NamedTuple

from cugemm import arch
from cugemm.arch import Device
from cugemm.catalog import segments
from cugemm.catalog.step import Step, Zero
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
    """One tile shape with its measured manner: how much of the tensor cores it keeps busy, and how much memory traffic it sustains."""

    shape: tuple[int, int, int, int, int, int]
    flops: float  # share of the dense 16-bit peak when the machine is full
    read: float  # bytes a CTA keeps in flight on average, as a share of a full machine's read bandwidth per SM


# 64x64 a warp reuses fragments most, but leaves no registers for decoding or for a second set of sums.
_LARGE = _Tile((128, 128, 64, 2, 2, 1), 0.45, 0.30)
_LARGE_DECODING = _Tile((128, 128, 64, 2, 4, 1), 0.36, 0.30)
_MEDIUM = _Tile((64, 64, 64, 2, 2, 1), 0.24, 0.20)
_SMALL = _Tile((16, 32, 256, 1, 1, 4), 0.03, 0.16)
# Element-wise loads hold a k-step in registers one value each: more warps or a shorter step, and no large tile beside block scales.
_LARGE_ANY = _Tile((128, 128, 64, 2, 4, 1), 0.12, 0.10)
_MEDIUM_ANY = _Tile((64, 64, 64, 2, 4, 1), 0.08, 0.08)
_SMALL_ANY = _Tile((16, 32, 128, 1, 1, 4), 0.02, 0.06)


class Portable:
    name = "portable"

    def refuse(self, problem: object) -> str | None:
        if not isinstance(problem, Problem):
            return "multiplies matrices, does not convert them"
        if problem.backend not in ("auto", self.name):
            return f"backend={problem.backend!r} was asked for"
        return None

    def candidates(self, problem: Problem) -> tuple[Config, ...]:
        limit = arch.get(problem.arch).max_smem if problem.arch else arch.get("sm_89").max_smem
        return tuple(_config(problem, tile, limit) for tile in _tiles(problem))

    def cost(self, problem: Problem, config: Config, device: Device) -> float:
        """Waves of CTAs, each as long as its arithmetic or its share of the memory traffic."""
        tile = next(t for t in _tiles(problem) if t.shape == config[:6])
        row_tiles = (
            ceil_div(problem.m, config.block_m) if not problem.grouped else problem.m // config.block_m + min(problem.batch, problem.m)
        )
        ctas = row_tiles * ceil_div(problem.n, config.block_n) * (1 if problem.grouped else problem.batch)
        resident = max(1, min(_resident(problem, config, device), ceil_div(ctas, device.sm_count)))
        waves = ceil_div(ctas, device.sm_count * resident)
        peak = device.sm_count * device.clock_khz * 1e-3 * 4096  # flop/us, dense 16-bit
        flops = 2.0 * config.block_m * config.block_n * problem.k * resident * device.sm_count
        bits_a, bits_b = ELEMENTS[problem.a].bits, ELEMENTS[problem.b].bits
        cta_bytes = problem.k * (config.block_m * bits_a + config.block_n * bits_b) / 8
        sm_rate = device.read_gbs * 1e3 / device.sm_count * min(1.0, tile.read * resident)  # bytes/us
        planes = 2 if {problem.a, problem.b} == {BF16.name, FP16.name} else 1
        wave = max(flops / (peak * tile.flops) * planes, cta_bytes * resident / sm_rate)
        return 3.0 + waves * wave

    def steps(self, call: GemmCall, config: Config) -> tuple[Step | Zero, ...]:
        problem = call.problem
        before, indptr, row_map, expert_map = segments.steps(call)
        if problem.grouped:
            row_tiles = call.m // config.block_m + min(call.batch, call.m)
            grid = row_tiles * ceil_div(call.n, config.block_n)
        else:
            grid = ceil_div(call.m, config.block_m) * ceil_div(call.n, config.block_n) * call.batch
        pointers = (A, B, OUT, A_SCALE, B_SCALE, ALPHA, BIAS, indptr, row_map, expert_map)
        scalars = (A_SCALE, B_SCALE, ALPHA)
        gemm = Step(self.name, _defines(problem, config), grid, config.threads, _smem(problem, config), pointers, scalars, _tail(call))
        return (*before, gemm)


def _tiles(problem: Problem) -> tuple[_Tile, ...]:
    if not problem.vector:
        return (_MEDIUM_ANY, _SMALL_ANY) if problem.block_scaled else (_LARGE_ANY, _MEDIUM_ANY, _SMALL_ANY)
    plain = not problem.block_scaled and problem.a == problem.b and problem.a in (BF16.name, FP16.name)
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
    mixed = {problem.a, problem.b} == {BF16.name, FP16.name}
    rows = config.block_m * (1 + (mixed and problem.a == FP16.name)) + config.block_n * (1 + (mixed and problem.b == FP16.name))
    return ceil_div(rows * config.block_k * 2 * config.stages, 1024) * 1024


def _resident(problem: Problem, config: Config, device: Device) -> int:
    """CTAs on one SM, as shared memory and the kernel's launch bounds allow."""
    by_registers = 1 if config.threads > 128 else 3 if config.block_m < 128 else 2
    return max(1, min(by_registers + (config.block_m == 16) * 2, device.smem_per_sm // (_smem(problem, config) + 1024)))


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
        a_row, a_k, a_batch, b_column, b_k, b_batch, out_row, out_column, out_batch, *a_scale, *b_scale, call.bias_stride,
        a_scale_rows, b_scale_columns, a_scale_type, b_scale_type, code(call.alpha_dtype), code(call.bias_dtype),
        code(call.problem.out), int(call.problem.grouped),
    )  # fmt: skip


KERNEL = Portable()
