"""Selection: pure, total, explained; configs few, within the machine, priced sensibly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest

from cugemm import arch, select
from cugemm.arch import Device
from cugemm.catalog import KERNELS, portable, skinny, swap_ab
from cugemm.conversion import QuantizeProblem
from cugemm.errors import NoKernelError
from cugemm.formats import ALL, FORMATS
from cugemm.problem import BUCKETS, Problem, bucket
from cugemm.rowwise import RowsProblem

ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a", "compute_80", "compute_120")
KINDS = (
    "bf16", "fp16", "e4m3", "e5m2", "e2m1", "e2m1x2", "int8", "int4x2", "e4m3 e8m0", "e5m2 e8m0", "e2m1x2 e8m0", "e2m1x2 e4m3",
    "uint4x2 zero",
)  # fmt: skip
"""Of an operand: its element, and the element of its scales if they are bytes. Zero points go with b."""
LEFT = KINDS[:-1]
SCALED = (0, 32, 64, 128)
"""Values along k under one float scale."""
SMALL = Device("a MIG slice", 14, 1_410_000, 230.0, 5 << 20, 164 << 10)
LAPTOP = Device("RTX 3050", 16, 1_500_000, 160.0, 2 << 20, 100 << 10)
NK = ((1, 1), (7, 13), (128, 128), (4096, 4096), (11008, 4096), (28672, 4096), (7168, 16384), (1, 100_000), (100_000, 1), (4096, 0))


ROUNDING = 1 + 1e-9


def grows(prices: list[float], rounding: float = ROUNDING) -> bool:
    return all(low <= high * rounding for low, high in itertools.pairwise(prices))


def question(
    m: int = 8, n: int = 4096, k: int = 4096, a: str = "bf16", b: str = "bf16", target: str = "sm_90a", *, batch: int = 1,
    grouped: bool = False,
    majors: tuple[str, str] = ("k", "k"), vector: bool = True, scale_block: int = 0, out: str = "bfloat16", accumulate: str = "fast",
    backend: str = "auto",
) -> Problem:  # fmt: skip
    (a, _, a_scale), (b, _, b_scale) = a.partition(" "), b.partition(" ")
    zero = b_scale == "zero"
    scales = a_scale, "" if zero else b_scale, zero, scale_block
    return Problem(
        bucket(m),
        n,
        k,
        batch,
        grouped,
        a,
        b,
        *scales,
        *majors,
        vector,
        out,
        accumulate,
        backend,
        target,
        b_vector=vector and majors[1] == "k",
    )


def grid(target: str) -> list[Problem]:
    """A broad sample: every pair of kinds, layout and scale mode; every bucket of m; shapes from 1 to 100,000; batches and groups."""
    layouts = [(("k", "k"), True), (("k", "mn"), True), (("mn", "k"), True), (("mn", "mn"), True), (("k", "k"), False)]
    found = [
        question(8, a=a, b=b, target=target, majors=majors, vector=vector, scale_block=block)
        for a, b, (majors, vector), block in itertools.product(LEFT, KINDS, layouts, (0, 32, 128))
    ]
    found += [
        question(m, n, k, a, b, target, batch=batch, grouped=grouped)
        for m, (n, k), (a, b), (batch, grouped) in itertools.product(
            BUCKETS[::3], NK, (("bf16", "bf16"), ("e4m3", "e4m3"), ("fp16", "e2m1x2")), ((1, False), (32, False), (8, True), (0, True))
        )
    ]
    found += [
        question(out=out, accumulate=mode, target=target)
        for out in ("bfloat16", "float16", "float32")
        for mode in ("fast", "promoted", "fp32")
    ]
    return found


@pytest.mark.parametrize("target", ARCHS)
def test_total_and_pure(target: str) -> None:
    for problem in grid(target):
        before = tuple(problem)
        for device in (arch.H100, SMALL, LAPTOP):
            choice, again = select.choose(problem, device), select.choose(problem, device)
            assert choice == again
            assert choice.problem is problem
            assert choice.best == choice.ranking[0]
            times = [ranked.us for ranked in choice.ranking]
            assert times == sorted(times)
            assert all(math.isfinite(us) and us > 0 for us in times), (problem, times)
            assert {name for name, _ in choice.refusals} | {r.kernel.name for r in choice.ranking} == {kernel.name for kernel in KERNELS}
        assert tuple(problem) == before


@pytest.mark.parametrize("target", ARCHS)
def test_few_configs_for_a_weight(target: str) -> None:
    """For one (format, n, k): at most 16 tiles of portable over every m, layout of a, batch, group and result; of skinny for each m
    13 shapes, or 6 with three numbers of rows held at once, of swap_ab 10 shapes; of groups the 13 with two."""
    rows = (1, 16, 64, 256, 4374, 100_000)
    for (a, b), block, (n, k) in itertools.product(itertools.product(LEFT, KINDS), SCALED, NK[::4]):
        found: dict[tuple[str, int, bool], set[tuple[object, ...]]] = {}
        for m, vector, grouped in itertools.product(rows, (True, False), (False, True)):
            problem = question(m, n, k, a, b, target, vector=vector, grouped=grouped, scale_block=block)
            for kernel in KERNELS:
                if kernel.refuse(problem) is None:
                    held = found.setdefault(
                        (kernel.name, *((m, grouped) if kernel in (skinny.KERNEL, swap_ab.KERNEL) else (0, False))), set()
                    )
                    held.update(kernel.candidates(problem, arch.H100))
        for (name, m, grouped), configs in found.items():
            assert 1 <= len(configs) <= {"skinny": (18, 26), "swap_ab": (17, 20)}.get(name, (16, 16))[grouped], (
                a,
                b,
                m,
                n,
                k,
                sorted(map(str, configs)),
            )


def shared_memory(problem: Problem, config: portable.Config) -> int:
    """sizeof(Smem) of portable.cu: STAGES x (planes of A [BLOCK_M x BLOCK_K] + planes of B [BLOCK_N x BLOCK_K]) of u16, alignas(1024)."""
    bf16 = "bf16" in (problem.a, problem.b) or "e8m0" in (problem.a_scale, problem.b_scale)
    planes_a, planes_b = (2 if bf16 and element == "fp16" else 1 for element in (problem.a, problem.b))
    stage = 2 * config.block_k * (planes_a * config.block_m + planes_b * config.block_n)
    return -(-stage * config.stages // 1024) * 1024


@pytest.mark.parametrize("target", ARCHS)
def test_shared_memory_is_what_the_kernel_says_and_fits(target: str) -> None:
    limit = arch.get(target).max_smem
    for problem in grid(target):
        for config in portable.KERNEL.candidates(problem, arch.H100):
            assert portable._smem(problem, config) == shared_memory(problem, config) <= limit
            assert config.warps_k * config.block_m * config.block_n * 4 <= shared_memory(problem, config), "the sums reuse the stages"
            assert shared_memory(problem, config) + 1024 <= arch.get(target).smem_per_sm


@pytest.mark.parametrize("target", ARCHS)
def test_configs_satisfy_the_kernel(target: str) -> None:
    """The static assertions of portable.cu, which CI only reaches for what it compiles."""
    for problem in grid(target):
        for c in portable.KERNEL.candidates(problem, arch.H100):
            warp = (c.block_m // c.warps_m, c.block_n // c.warps_n, c.block_k // c.warps_k)
            assert all(size % 16 == 0 for size in warp)
            assert c.block_k % 64 == 0
            assert c.stages >= 2
            assert c.threads <= 1024
            assert not problem.scale_block or problem.scale_block % warp[2] == 0 or warp[2] % problem.scale_block == 0
            assert problem.vector or warp[0] * warp[1] // 32 <= 64


@pytest.mark.parametrize("target", ARCHS)
def test_skinny_configs_satisfy_the_kernel_and_fit(target: str) -> None:
    machine = arch.get(target)
    for problem in grid(target):
        if skinny.KERNEL.refuse(problem) is not None:
            continue
        for device in (arch.H100, SMALL, LAPTOP):
            configs = skinny.KERNEL.candidates(problem, device)
            assert 1 <= len(configs) <= (26 if problem.grouped else 18)
            for c in configs:
                assert c.warps % c.warps_k == 0
                assert c.stages >= 2
                assert c.tokens & (c.tokens - 1) == 0
                assert c.clusters >= 1
                assert (c.parts if "cluster" in machine.features else c.split) == 1
                assert (skinny._smem(problem, c) + 1024) * c.ctas <= machine.smem_per_sm
                assert skinny._smem(problem, c) <= machine.max_smem


def test_buckets() -> None:
    assert list(BUCKETS) == sorted(set(BUCKETS))
    for m in range(BUCKETS[-1] + 2):
        held = bucket(m)
        assert held in BUCKETS
        assert held >= m or held == BUCKETS[-1]
        assert all(size < m for size in BUCKETS if size < held)
    assert [bucket(m) for m in (0, 1, 2, 3, 5, 9, 17, 25, 33, 257, 8192, 8193, 10**9)] == [
        1, 1, 2, 4, 8, 16, 24, 32, 48, 384, 8192, 8192, 8192,
    ]  # fmt: skip
    wide = [(low, high) for low, high in itertools.pairwise(BUCKETS) if low >= 256]
    assert all(high / low <= 1.5 for low, high in wide)


@pytest.mark.parametrize("device", [arch.H100, SMALL, LAPTOP], ids=lambda d: d.name)
@pytest.mark.parametrize("pair", [("bf16", "bf16"), ("e4m3", "e4m3"), ("bf16", "e4m3"), ("fp16", "e2m1x2")])
def test_more_work_is_never_predicted_faster(device: Device, pair: tuple[str, str]) -> None:
    def best(**sizes: int) -> float:
        return select.choose(question(a=pair[0], b=pair[1], **sizes), device).best.us

    for m in (1, 16, 128, 4096):
        for sizes in ({"n": n} for n in (128, 1024, 4096, 11008, 28672, 100_000)):
            assert best(m=m, **sizes) <= best(m=m, n=2 * sizes["n"]) * ROUNDING
        assert grows([best(m=m, k=k) for k in (64, 512, 4096, 16384)])
        assert best(m=m, batch=1) <= best(m=m, batch=8) * ROUNDING
    by_m = [best(m=m) for m in BUCKETS]
    assert grows(by_m, 1.02), by_m  # other m have other candidates


def test_every_candidate_is_priced_monotonically() -> None:
    """Not only the best: more columns never make one config cheaper."""
    for vector, block, n in itertools.product((True, False), (0, 128), (128, 4096, 11008)):
        problem = question(64, n, a="e4m3", b="e4m3", vector=vector, scale_block=block)
        for config in portable.KERNEL.candidates(problem, arch.H100):
            prices = [portable.KERNEL.cost(problem._replace(n=width), config, arch.H100) for width in (n, n + 1, 2 * n, 4 * n)]
            assert grows(prices), prices


def test_a_small_gpu_is_slower_and_priced_by_its_own_figures() -> None:
    for m, (n, k) in itertools.product((1, 64, 4096), ((4096, 4096), (28672, 4096))):
        problem = question(m, n, k)
        assert select.choose(problem, SMALL).best.us > 2 * select.choose(problem, arch.H100).best.us
    many, few = question(4096, 8192, 8192), question(1, 28672, 4096)
    assert select.choose(many, arch.H100).best.config.block_m == 128
    for device in (arch.H100, SMALL):
        assert select.choose(few, device).best.us > 28672 * 4096 * 2 / device.read_gbs * 1e-3, "faster than the weights can be read"
        peak = device.sm_count * device.clock_khz * 1e-3 * 4096
        assert select.choose(many, device).best.us > 2 * 4096 * 8192 * 8192 / peak, "faster than the tensor cores"


def test_refusals_are_listed() -> None:
    choice = select.choose(question(), arch.H100)
    assert [name for name, _ in choice.refusals] == ["hopper", "swap_ab", *(kernel.name for kernel in KERNELS if not kernel.multiplies)]
    assert "leaves fewer than 9 rows to skinny" in str(choice)
    assert "converts matrices" in str(choice)
    assert "quantize" in str(choice)
    assert "-> skinny" in str(choice)

    with pytest.raises(NoKernelError) as raised:
        select.choose(question(backend="quantize"), arch.H100)
    text = str(raised.value)
    assert "bf16 x bf16 -> bfloat16 on sm_90a" in text
    for kernel in KERNELS:
        assert f"{kernel.name}: " in text
    assert "backend='quantize' was asked for" in text
    assert isinstance(raised.value, ValueError)


def conversions() -> Iterator[tuple[str, QuantizeProblem | RowsProblem]]:
    """(kernel, problem) for every format, direction and dtype."""
    dtypes = ("bfloat16", "float16", "float32")
    for fmt, x in itertools.product(FORMATS.values(), dtypes):
        element = fmt.element.name
        grouped = fmt.block[0] == 1 and fmt.block[1] != ALL
        yield "block_quantize" if grouped else "quantize", QuantizeProblem("quantize", element, x, fmt.block, "auto", "sm_90a")
        yield "quantize", QuantizeProblem("dequantize", element, x, fmt.block, "auto", "sm_90a")
    for element, x in itertools.product(("e4m3", "e5m2"), dtypes):
        yield "quantize", QuantizeProblem("cast", element, x, (ALL, ALL), "auto", "sm_90a")
    for x in ("uint8", "bfloat16"):
        yield "quantize", QuantizeProblem("interleave", "", x, (1, 1), "auto", "sm_90a")
    for op, x, out in itertools.product(("combine", "silu_and_mul"), dtypes, dtypes):
        yield "rows", RowsProblem(op, x, out, "auto", "sm_90a")


def test_every_conversion_has_one_kernel() -> None:
    for wanted, problem in conversions():
        choice = select.choose(problem, arch.H100)
        assert [r.kernel.name for r in choice.ranking] == [wanted], problem
        assert {name for name, _ in choice.refusals} == {kernel.name for kernel in KERNELS} - {wanted}
        assert str(problem) in str(choice)
        old = problem._replace(arch="sm_75")
        with pytest.raises(NoKernelError, match=rf"on sm_75: .*{wanted}: needs sm_80 or newer"):
            select.choose(old, SMALL)
    with pytest.raises(NoKernelError, match="backend='portable' was asked for"):
        select.choose(QuantizeProblem("quantize", "e4m3", "float16", (1, 0), "portable"), arch.H100)


def test_a_gpu_older_than_all_kernels_is_refused() -> None:
    """sm_75 gets a record without features; no kernel may take it."""
    old = arch.of_capability(7, 5)
    with pytest.raises(NoKernelError, match=r"on sm_75: .*needs sm_80 or newer"):
        select.choose(question(target=old.name), SMALL)
