"""The real kernel sources, compiled by NVRTC for every architecture: no error, no spilled register, no remark that means a slow kernel.

Which cubins: a strength-2 cover of (arch, pair of elements, tile, major of a, major of b, VECTOR, SCALE_MODE), so every pair of elements
compiles on every arch and every other two choices meet somewhere; every config that the cost model ranks for the shapes the benchmarks use;
what the documented examples take; every mode of the helper kernels. The static assertions in the sources check shared memory and argument
structs on the way.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from cugemm import arch, compile, formats, problem, select
from cugemm.api import dense, grouped  # noqa: F401 - they register the operations
from cugemm.arch import Device
from cugemm.arrays import View, dense_strides
from cugemm.catalog import Step, portable, quantize
from cugemm.compile import Job
from cugemm.conversion import QuantizeOptions
from cugemm.problem import OPS, GemmCall, GemmOptions, Problem

pytestmark = pytest.mark.requires("cupy")

DEVICES = {
    "sm_80": Device("A100", 108, 1_410_000, 1800.0, 40 << 20, 164 << 10),
    "sm_86": Device("RTX A6000", 84, 1_800_000, 715.0, 6 << 20, 100 << 10),
    "sm_89": Device("L40S", 142, 2_520_000, 800.0, 96 << 20, 100 << 10),
    "sm_90a": arch.H100,
    "sm_100a": Device("B200", 148, 1_965_000, 7200.0, 126 << 20, 228 << 10),
    "sm_103a": Device("B300", 148, 1_965_000, 7200.0, 126 << 20, 228 << 10),
    "sm_120a": Device("RTX 5090", 170, 2_407_000, 1670.0, 96 << 20, 100 << 10),
    "sm_121a": Device("GB10", 48, 2_400_000, 254.0, 24 << 20, 100 << 10),
}
ARCHS = tuple(DEVICES)
MOST_PER_ARCH = 300

ELEMENTS = ("bf16", "fp16", "e4m3", "e5m2", "e2m1", "e2m1x2")
PAIRS = tuple(itertools.product(ELEMENTS, ELEMENTS))
TILES = (0, 1, 2)  # large, medium, small; some problems have fewer

NK = (
    (7168, 2048), (2112, 7168), (4096, 4096), (6144, 4096), (4096, 7168), (24576, 1536),
    (11008, 4096), (4096, 14336), (8192, 8192), (7168, 16384), (28672, 4096),
)  # fmt: skip
MS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192)
"""Shapes of LLM layers that the recorded benchmarks use."""


class Choice(NamedTuple):
    """One row of the cover."""

    arch: str
    pair: tuple[str, str]
    tile: int
    a_major: str
    b_major: str
    vector: bool
    block_scaled: bool

    def possible(self) -> bool:
        packed_along_rows = any(e == "e2m1x2" and major == "mn" for e, major in zip(self.pair, (self.a_major, self.b_major), strict=True))
        element_wise_by_rows = not self.vector and "mn" in (self.a_major, self.b_major)
        return not packed_along_rows and not element_wise_by_rows and self.tile < len(candidates(*self[3:], self.arch, self.pair))

    def question(self) -> Problem:
        return Problem(8, 4096, 4096, 1, False, *self.pair, *self[3:], "bfloat16", "fast", "auto", self.arch)

    def meetings(self) -> list[tuple[tuple[int, object], ...]]:
        return list(itertools.combinations(enumerate(self), 2))


@functools.cache
def candidates(
    a_major: str, b_major: str, vector: bool, block_scaled: bool, target: str, pair: tuple[str, str]
) -> tuple[portable.Config, ...]:
    return portable.KERNEL.candidates(Choice(target, pair, 0, a_major, b_major, vector, block_scaled).question())


@functools.cache
def cover() -> tuple[Choice, ...]:
    """Greedy: for each arch and pair, the choice of the rest with the most meetings that nobody had; more rows while some are missing."""
    rest = list(itertools.product(TILES, ("k", "mn"), ("k", "mn"), (True, False), (False, True)))
    missing = {
        meeting for row in itertools.product(ARCHS, PAIRS, rest) if (c := Choice(*row[:2], *row[2])).possible() for meeting in c.meetings()
    }
    rows: list[Choice] = []

    def take(choices: Iterator[Choice]) -> None:
        best = max((c for c in choices if c.possible()), key=lambda c: sum(meeting in missing for meeting in c.meetings()))
        missing.difference_update(best.meetings())
        rows.append(best)

    for target, pair in itertools.product(ARCHS, PAIRS):
        take(Choice(target, pair, *r) for r in rest)
    while missing:
        (i, x), (j, y) = next(iter(sorted(missing, key=repr)))
        take(c for row in itertools.product(ARCHS, PAIRS, rest) if (c := Choice(*row[:2], *row[2]))[i] == x and c[j] == y)
    # Every loader whole: element x major x VECTOR x tile x SCALE_MODE, the same on both sides, dealt out to the archs.
    loaders = (Choice(ARCHS[i % len(ARCHS)], (e, e), *r) for i, (e, r) in enumerate(itertools.product(ELEMENTS, rest)) if r[1] == r[2])
    return tuple(dict.fromkeys((*rows, *(c for c in loaders if c.possible()))))


def spec(shape: tuple[int, ...], dtype: str, strides: tuple[int, ...] | None = None) -> View:
    return View(0, shape, strides or dense_strides(shape), dtype, 0)


def linear_call(m: int, n: int, k: int, a: str, b: str, scales: str = "") -> GemmCall:
    """x [m, k] @ w [n, k].T as `linear` and `gemm_fp8_nt_groupwise` ask for it."""
    a_scale = b_scale = None
    name = "linear"
    options = GemmOptions(b_axes="nk")
    if scales == "row":
        a_scale, b_scale = spec((m, 1), "float32"), spec((n, 1), "float32")
    elif scales == "block":
        name = "gemm_fp8_nt_groupwise"
        a_scale, b_scale = spec((m, -(-k // 128)), "float32"), spec((-(-n // 128), -(-k // 128)), "float32")
        options = GemmOptions(b_axes="nk", a_block=(1, 128), b_block=(128, 128), accumulate="promoted")
    return OPS[name].check((spec((m, k), a), spec((n, k), b), a_scale, b_scale, None, None, None, None, None), options)


LAYERS = (
    ("bfloat16", "bfloat16", ""),
    ("float16", "float16", ""),
    ("float8_e4m3fn", "float8_e4m3fn", "row"),
    ("float8_e4m3fn", "float8_e4m3fn", "block"),
    ("bfloat16", "float8_e4m3fn", "row"),
    ("float16", "float8_e4m3fn", "row"),
)


def example_calls() -> Iterator[GemmCall]:
    """What the documented examples ask for: weights [k, n] as they are, and experts."""
    x, s = spec((8, 4096), "float16"), spec((11008,), "float16")
    none = (None,) * 4
    yield OPS["mm_fp4"].check((x, spec((4096, 11008), "uint8"), None, s, None, *none), GemmOptions(b_element="e2m1"))
    yield OPS["bmm_fp8"].check((x, spec((4096, 11008), "float8_e4m3fn"), None, s, None, *none), GemmOptions())
    yield OPS["tgv_gemm"].check((spec((1024, 4096), "float16"), spec((4096, 11008), "float16"), None, None, None, *none), GemmOptions())
    for dtype, rows in (("float16", 8), ("bfloat16", 4096), ("float8_e4m3fn", 4096)):
        for axes, kind, count in (("kn", "indices", rows), ("nk", "indptr", 9), ("kn", "lens", 8)):
            weights = spec((8, 4096, 11008) if axes == "kn" else (8, 11008, 4096), dtype)
            views = (spec((rows, 4096), dtype), weights, None, None, None, None, spec((count,), "int64"), None, None)
            yield OPS["SegmentGEMMWrapper.forward"].check(views, GemmOptions(b_axes=axes, segments=kind))


def conversion_calls() -> Iterator[object]:
    """Every format and dtype, both directions, and the bare cast."""
    for fmt in formats.FORMATS.values():
        if fmt.element.name not in problem.FLOATS8:
            continue
        for dtype in problem.OUT_DTYPES:
            x = spec((256, 512), dtype)
            call = OPS["quantize"].check((x,), QuantizeOptions(fmt.name))
            yield call
            yield OPS["quantize"].check((x,), QuantizeOptions(fmt.name, cast=True))
            (shape, stored), (scales, scale_dtype) = call.outputs
            yield OPS["dequantize"].check((spec(shape, stored), spec(scales, scale_dtype)), QuantizeOptions(fmt.name, dtype=dtype))


@functools.cache
def layer_calls() -> tuple[GemmCall, ...]:
    return tuple(linear_call(m, n, k, *layer) for (n, k), m, layer in itertools.product(NK, MS, LAYERS))


def jobs_of(target: str) -> list[Job]:
    """All cubins of one arch, without repetitions."""
    found: dict[tuple[str, tuple[tuple[str, int], ...]], Job] = {}

    def add(step: object) -> None:
        if isinstance(step, Step):
            found.setdefault((step.source, tuple(sorted(step.defines))), Job(step.source, arch.get(target), dict(step.defines)))

    template = linear_call(8, 4096, 4096, "bfloat16", "bfloat16")
    for row in cover():
        if row.arch == target:
            question = row.question()
            config = portable.KERNEL.candidates(question)[row.tile]
            for step in portable.KERNEL.steps(template._replace(problem=question), config):
                add(step)
    for call in layer_calls():
        question = call.problem._replace(arch=target)
        for ranked in select.choose(question, DEVICES[target]).ranking:
            for step in ranked.kernel.steps(call._replace(problem=question), ranked.config):
                add(step)
    for call in example_calls():
        question = call.problem._replace(arch=target)
        best = select.choose(question, DEVICES[target]).best
        for step in best.kernel.steps(call._replace(problem=question), best.config):
            add(step)
    for converted in conversion_calls():
        for config in quantize.KERNEL.candidates(converted.problem):  # type: ignore[attr-defined]
            for step in quantize.KERNEL.steps(converted, config):  # type: ignore[arg-type]
                add(step)
    return list(found.values())


def test_the_cover_covers() -> None:
    rows = cover()
    assert len(rows) < 8 * 36 + 120
    assert {(row.arch, row.pair) for row in rows} == set(itertools.product(ARCHS, PAIRS))
    assert {(row.pair, row.tile) for row in rows} == set(itertools.product(PAIRS, TILES))
    assert {(row.tile, row.vector) for row in rows} == set(itertools.product(TILES, (True, False)))
    assert all(row.possible() for row in rows)


def test_element_codes_and_modes_all_appear() -> None:
    jobs = jobs_of("sm_90a")
    assert {job.stem for job in jobs} == {"portable", "segments", "quantize"}
    gemms = [job.defines for job in jobs if job.stem == "portable"]
    codes = {(d["A_ELEMENT"], d["B_ELEMENT"]) for d in gemms}
    assert codes == set(itertools.product(range(6), range(6)))
    assert {job.defines["MODE"] for job in jobs if job.stem == "segments"} == {0, 1, 2}
    assert {job.defines["MODE"] for job in jobs if job.stem == "quantize"} == {0, 1, 2}


def test_the_list_is_finite() -> None:
    assert max(len(jobs_of(target)) for target in ARCHS) <= MOST_PER_ARCH
    assert sum(len(jobs_of(target)) for target in ARCHS) <= 1000, "the test below would take too long"


def complaints(job: Job) -> list[str]:
    """What is wrong with one cubin; unlike `build_all`, a failure does not end the others."""
    shown = f"{job.stem} {' '.join(f'{name}={value}' for name, value in job.defines.items())}"
    try:
        built = compile.build(*job)
    except compile.CompileError as error:
        return [f"{shown}: {next((line for line in str(error).splitlines() if 'error' in line), error)}"]
    assert len(built.image) > 1000
    return [f"{shown}: {line}" for line in compile.remarks(built.log)]


@pytest.mark.parametrize("target", ARCHS)
def test_every_kernel_compiles_clean(target: str) -> None:
    version = compile.nvrtc_version()
    if version is None or version < arch.get(target).nvrtc:
        pytest.skip(f"NVRTC {version} does not know {target}")
    with ThreadPoolExecutor(2) as pool:  # NVRTC runs without the GIL
        wrong = [text for texts in pool.map(complaints, jobs_of(target)) for text in texts]
    assert not wrong, f"{len(wrong)} complaints on {target}:\n" + "\n".join(wrong)
