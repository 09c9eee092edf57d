"""The real kernel sources, compiled by NVRTC for every architecture: no error, no spilled register, no remark that means a slow kernel.

Which cubins: every pair of decodes on every arch, each with a tile, majors, VECTOR and SCALE_BLOCK dealt out so that all of them meet;
every loader with all of those; every tile that the cost model picks for the shapes the benchmarks use, and every way to cut k; of skinny,
swap_ab and hopper every pair, and every two values of configs' axes; what the documented examples take; every mode of the helper kernels.
The static assertions in the sources check shared memory and argument structs on the way.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
from conftest import ROOT

from cugemm import arch, compile, formats, problem, select
from cugemm.arch import Device
from cugemm.arrays import View, dense_strides
from cugemm.catalog import Step, hopper, portable, skinny, swap_ab
from cugemm.compile import Job
from cugemm.conversion import QuantizeOptions
from cugemm.problem import ACCUMULATE, OPS, GemmCall, GemmOptions, Problem
from cugemm.rowwise import RowsOptions
from cugemm.scales import block_counts

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
MOST_PER_ARCH = 440

DECODES = {
    **{name: (name, "", False) for name in ("bf16", "fp16", "e4m3", "e5m2", "e2m1", "e2m1x2", "int8", "int4x2")},
    "mxfp8": ("e4m3", "e8m0", False),
    "mxfp8_e5m2": ("e5m2", "e8m0", False),
    "mxfp4": ("e2m1x2", "e8m0", False),
    "nvfp4": ("e2m1x2", "e4m3", False),
    "uint4 with zero points": ("uint4x2", "", True),
}
"""What happens to a value on its way to shared memory: (element, element of byte scales, zero points). Only b has zero points."""
PAIRS = tuple((a, b) for a, b in itertools.product(DECODES, DECODES) if not DECODES[a][2])
TILES = (0, 1, 2)  # large, medium, small; some problems have fewer
SCALE_BLOCKS = (0, 32, 64, 128)

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
    scale_block: int

    def possible(self) -> bool:
        decodes = [DECODES[name] for name in self.pair]
        along_rows = [major == "mn" for major in (self.a_major, self.b_major)]
        if any(
            rows and (element.endswith("x2") or scale or zero) for (element, scale, zero), rows in zip(decodes, along_rows, strict=True)
        ):
            return False  # packed along k, or a block for every row
        return (self.vector or not any(along_rows)) and self.tile < len(self.candidates())

    def question(self) -> Problem:
        (a, a_scale, _), (b, b_scale, zero) = (DECODES[name] for name in self.pair)
        return Problem(
            8, 4096, 4096, 1, False, a, b, a_scale, b_scale, zero, self.scale_block, self.a_major, self.b_major, self.vector,
            "bfloat16", "fast", "auto", self.arch, b_vector=self.vector and self.b_major == "k",
        )  # fmt: skip

    def candidates(self) -> tuple[portable.Config, ...]:
        return tuple(c for c in portable.KERNEL.candidates(self.question(), arch.H100) if c.split == 1)


OTHERS = tuple(itertools.product(TILES, ("k", "mn"), ("k", "mn"), (True, False), SCALE_BLOCKS))


@functools.cache
def cover() -> tuple[Choice, ...]:
    rows = []
    for (number, target), (i, pair) in itertools.product(enumerate(ARCHS), enumerate(PAIRS)):
        # 37 is prime to the number of choices, so that a pair meets eight different ones and neighbours differ in everything.
        turns = (OTHERS[(37 * (i + 23 * number) + turn) % len(OTHERS)] for turn in range(len(OTHERS)))
        rows.append(next(choice for other in turns if (choice := Choice(target, pair, *other)).possible()))
    own = [name for name, decode in DECODES.items() if not decode[2]]
    loaders = (
        Choice(ARCHS[i % len(ARCHS)], (name, name), tile, major, major, vector, 0)
        for i, (name, tile, major, vector) in enumerate(itertools.product(own, TILES, ("k", "mn"), (True, False)))
    )
    return tuple(dict.fromkeys((*rows, *(choice for choice in loaders if choice.possible()))))


def spec(shape: tuple[int, ...], dtype: str, strides: tuple[int, ...] | None = None) -> View:
    return View(0, shape, strides or dense_strides(shape), dtype, 0)


def arguments(**given: View) -> tuple[View | None, ...]:
    """The arguments of a product in role order."""
    return tuple(given.get(role) for role in problem.ROLES)


def linear_call(m: int, n: int, k: int, a: str, b: str) -> GemmCall:
    """x [m, k] @ w [n, k].T of two formats (or dtypes), as `linear` asks for it."""
    options = GemmOptions(b_axes="nk")
    given: dict[str, View] = {}
    for role, name, rows in (("a", a, m), ("b", b, n)):
        fmt = formats.FORMATS.get(name)
        if fmt is None:
            given[role] = spec((rows, k), name)
            continue
        given[role] = spec((rows, k // fmt.element.per_byte), fmt.element.dtype)
        floats = fmt.scale is formats.FP32
        given[f"{role}_scale"] = spec(block_counts(rows, k, fmt.block), "float32" if floats else "uint8")
        named = {"element": fmt.element.name, "block": fmt.block, "scale_element": "" if floats else fmt.scale.name}
        options = options._replace(**{f"{role}_{what}": value for what, value in named.items()})
    return OPS["linear"].check(arguments(**given), options)


LAYERS = (
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("fp8_row", "fp8_row"),
    ("fp8_group", "fp8_block"),
    ("bfloat16", "fp8_row"),
    ("float16", "fp8_row"),
    ("mxfp8", "mxfp8"),
    ("nvfp4", "nvfp4"),
    ("mxfp4", "mxfp4"),
    ("bfloat16", "nvfp4"),
    ("bfloat16", "mxfp4"),
    ("bfloat16", "int4_g128"),
    ("bfloat16", "int8_row"),
)


def example_calls() -> Iterator[GemmCall]:
    """What the documented examples ask for: weights [k, n] as they are, and experts."""
    x, s = spec((8, 4096), "float16"), spec((11008,), "float16")
    yield OPS["mm_fp4"].check(arguments(a=x, b=spec((4096, 11008), "uint8"), b_scale=s), GemmOptions(b_element="e2m1"))
    yield OPS["bmm_fp8"].check(arguments(a=x, b=spec((4096, 11008), "float8_e4m3fn"), b_scale=s), GemmOptions())
    yield OPS["tgv_gemm"].check(arguments(a=spec((1024, 4096), "float16"), b=spec((4096, 11008), "float16")), GemmOptions())
    for dtype, rows in (("float16", 8), ("bfloat16", 4096), ("float8_e4m3fn", 4096)):
        for axes, kind, count in (("kn", "indices", rows), ("nk", "indptr", 9), ("kn", "lens", 8)):
            weights = spec((8, 4096, 11008) if axes == "kn" else (8, 11008, 4096), dtype)
            views = arguments(a=spec((rows, 4096), dtype), b=weights, segments=spec((count,), "int64"))
            yield OPS["SegmentGEMMWrapper.forward"].check(views, GemmOptions(b_axes=axes, segments=kind))


def conversion_calls(target: str) -> Iterator[Any]:
    """Every format, both directions, the bare cast, prepared input, and rows. Dtypes are dealt out to formats and archs."""
    for i, fmt in enumerate(formats.FORMATS.values()):
        for j, dtype in enumerate(problem.OUT_DTYPES):
            if (i + j + ARCHS.index(target)) % len(problem.OUT_DTYPES):
                continue
            x = spec((256, 512), dtype)
            call = OPS["quantize"].check((x, None, None, None), QuantizeOptions(fmt.name))
            yield call
            shapes = dict(zip(("data", "scale"), call.outputs, strict=False))
            given = [spec(*shapes["data"]), spec(*shapes["scale"]), None, spec(*call.outputs[-1]) if fmt.zero else None]
            yield OPS["dequantize"].check(tuple(given), QuantizeOptions(fmt.name, dtype=dtype))
            if fmt.block[1] != formats.ALL and fmt.block[0] == 1:
                yield OPS["quantize"].check((x, None, spec((512,), dtype), None), QuantizeOptions(fmt.name))
            if fmt.element.name in problem.FLOATS8:
                yield OPS["quantize"].check((x, None, None, None), QuantizeOptions(fmt.name, cast=True))
    for dtype in problem.OUT_DTYPES:
        yield OPS["combine"].check((spec((16, 4, 512), dtype), spec((16, 4), "float32"), None, None), RowsOptions())
        yield OPS["silu_and_mul"].check((spec((4, 8, 512), dtype), None, None), RowsOptions())
    for dtype in ("uint8", "bfloat16"):
        yield OPS["block_scale_interleave"].check((spec((256, 32), dtype),), QuantizeOptions("nvfp4", scale_layout="128x4"))


# --- few rows ---------------------------------------------------------------------------------------------------------------------

FEW_ROWS = {
    "skinny": (skinny.KERNEL, ("tokens", "row_blocks", "stages", "split", "parts"), ("warps", "warps_k")),
    "swap_ab": (swap_ab.KERNEL, ("tokens", "stages", "x_stages", "split"), ("warpgroups", "warps_k")),
}
"""Kernel, axes of its configs, and two that go together."""
MOST_FEW_ROWS = 70
FEW_ROWS_MKS = tuple(itertools.product((1, 2, 4, 8, 16, 32, 64, 128), (256, 2048, 7168, 14336)))


def few_rows_choices(name: str, target: str) -> Iterator[list[tuple[Problem, Any]]]:
    """For each pair that the kernel multiplies, its configs over rows and k; again with float scales along k, where it has those."""
    kernel = FEW_ROWS[name][0]
    for block, (a, b) in itertools.product((0, 128), PAIRS):
        question = Choice(target, (a, b), 0, "k", "k", True, block).question()._replace(backend=name)
        asked = [question._replace(m=m, k=k) for m, k in FEW_ROWS_MKS]
        found = [(q, config) for q in asked if kernel.refuse(q) is None for config in kernel.candidates(q, DEVICES[target])]
        if found:
            yield found


def few_rows_axes(name: str, choice: tuple[Problem, Any]) -> frozenset[tuple[tuple[str, Any], ...]]:
    """Every two values of what macros say, decodes aside."""
    (question, config), (_, axes, together) = choice, FEW_ROWS[name]
    values = {"block": question.scale_block, "together": tuple(getattr(config, axis) for axis in together)}
    values |= {axis: getattr(config, axis) for axis in axes}
    return frozenset(itertools.combinations(sorted(values.items()), 2))


@functools.cache
def few_rows_cover(name: str, target: str) -> tuple[tuple[Problem, Any], ...]:
    """Each pair with the config that shows most combinations not seen before, round and round until there is nothing new."""
    scored = [[(choice, few_rows_axes(name, choice)) for choice in pool] for pool in few_rows_choices(name, target)]
    seen: set[Any] = set()
    rows: list[tuple[Problem, Any]] = []
    pairs: set[tuple[str, str, str]] = set()
    for turn, pool in enumerate(scored * 4):
        best, axes = max(pool, key=lambda choice: len(choice[1] - seen))
        pair = (best[0].a, best[0].b, best[0].b_scale)
        if (turn < len(scored) and pair not in pairs) or (len(rows) < MOST_FEW_ROWS and axes - seen):
            rows.append(best)
            seen |= axes
            pairs.add(pair)
    return tuple(rows)


# --- many rows on Hopper --------------------------------------------------------------------------------------------------------------

HOPPER_PAIRS = (
    *((e, e, a_major, b_major) for e, a_major, b_major in itertools.product(("bf16", "fp16"), ("k", "mn"), ("k", "mn"))),
    *((a, b, "k", "k") for a, b in itertools.product(("e4m3", "e5m2"), repeat=2)),
    *(("e4m3", "e5m2", *majors) for majors in (("k", "mn"), ("mn", "k"), ("mn", "mn"))),  # read so in fp16 only
)
MOST_HOPPER = 80


@functools.cache
def hopper_pool() -> tuple[tuple[tuple[Problem, hopper.Config], frozenset[Any]], ...]:
    """Every build that any shape could ask for, and every two values of what its macros say."""
    found: dict[Any, tuple[Problem, hopper.Config]] = {}
    shapes = tuple(itertools.product((64, 200, 4096), (96, 2112, 8192), (512, 16384)))
    for (a, b, a_major, b_major), block, accumulate in itertools.product(HOPPER_PAIRS, (0, 128), ACCUMULATE):
        question = Choice("sm_90a", (a, b), 0, a_major, b_major, True, block).question()
        question = question._replace(backend="hopper", accumulate=accumulate, in_order=True, scratch=True)
        if hopper.KERNEL.refuse(question) is None:
            for m, n, k in shapes:
                asked = question._replace(m=m, n=n, k=k, grouped=n == 96, batch=3 if n == 96 else 1)
                read = hopper._settled(asked)
                for config in hopper.fitting(read, arch.H100):
                    whole = config._replace(turned=hopper._turned(asked), wide=hopper._wide(asked))
                    found.setdefault(hopper._defines(read, config), (asked, whole))
    return tuple(
        (choice, frozenset(itertools.combinations(((name, value) for name, value in defines if name not in ("A_SCALE", "B_SCALE")), 2)))
        for defines, choice in found.items()
    )


@functools.cache
def hopper_cover() -> tuple[tuple[Problem, hopper.Config], ...]:
    """The build that shows most combinations not seen before, until all are."""
    pool, seen, rows = hopper_pool(), set[Any](), []
    while True:
        choice, axes = max(pool, key=lambda row: len(row[1] - seen))
        if axes <= seen:
            return tuple(rows)
        rows.append(choice)
        seen |= axes


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
    for i, row in enumerate(cover()):
        if row.arch == target:
            question = row.question()
            config = row.candidates()[row.tile]
            splits = [c for c in portable.KERNEL.candidates(question, arch.H100) if c[:-1] == config[:-1]]
            for step in portable.KERNEL.steps(template._replace(problem=question), splits[i % len(splits)]):
                add(step)
    for name, (kernel, *_) in FEW_ROWS.items():
        for question, few in few_rows_cover(name, target):
            for step in kernel.steps(template._replace(problem=question), few):
                add(step)
    for question, many in hopper_cover() if target == "sm_90a" else ():
        turned = "b" if question.b in ("e4m3", "e5m2") else ""
        for step in hopper.KERNEL.steps(
            template._replace(problem=question), many._replace(turned=many.turned or turned, copied=not many.wide)
        ):
            add(step)
    for call in layer_calls():
        question = call.problem._replace(arch=target)
        best = select.choose(question, DEVICES[target]).best
        if best.kernel is portable.KERNEL:
            for step in best.kernel.steps(call._replace(problem=question), best.config._replace(split=1)):
                add(step)
    for call in example_calls():
        question = call.problem._replace(arch=target)
        best = select.choose(question, DEVICES[target]).best
        for step in best.kernel.steps(call._replace(problem=question), best.config):
            add(step)
    for converted in conversion_calls(target):
        question = converted.problem._replace(arch=target)
        best = select.choose(question, DEVICES[target]).best
        for step in best.kernel.steps(converted, best.config):
            add(step)
    return list(found.values())


def test_the_cover_covers() -> None:
    rows = cover()
    assert {(row.arch, row.pair) for row in rows} == set(itertools.product(ARCHS, PAIRS))
    assert {(row.pair, row.tile) for row in rows} >= {(pair, tile) for pair, tile in itertools.product(PAIRS, (1, 2))}
    assert {(row.tile, row.vector, row.scale_block) for row in rows if row.tile or row.vector} == {
        (tile, vector, block)
        for tile, vector, block in itertools.product(TILES, (True, False), SCALE_BLOCKS)
        if (vector or not block or tile < 2) and (tile or vector)
    }
    assert all(row.possible() for row in rows)


@pytest.mark.parametrize(("name", "target"), [*(("skinny", target) for target in ARCHS), ("swap_ab", "sm_90a")])
def test_the_cover_of_few_rows(name: str, target: str) -> None:
    """Every pair, every two values of the axes; clusters and shared memory that the arch has."""
    pools, rows, kernel = list(few_rows_choices(name, target)), few_rows_cover(name, target), FEW_ROWS[name][0]
    assert len(rows) <= MOST_FEW_ROWS
    decodes = [{(q.a, q.b, q.b_scale) for q, _ in found} for found in ([pool[0] for pool in pools], rows)]
    assert decodes[0] == decodes[1] and len(decodes[0]) >= 36
    possible, seen = ({axes for choice in found for axes in few_rows_axes(name, choice)} for found in (itertools.chain(*pools), rows))
    assert seen == possible
    found, call = arch.get(target), linear_call(8, 4096, 4096, "bfloat16", "bfloat16")
    assert {config.split * getattr(config, "parts", 1) for _, config in rows} == {1, 2, 4, 8} - ({8} if name == "swap_ab" else set())
    if name == "skinny":
        assert {config.split if "cluster" not in found.features else config.parts for _, config in rows} == {1}
    steps = [kernel.steps(call._replace(problem=q), config)[0] for q, config in rows]
    assert all(isinstance(step, Step) and 0 < step.smem <= found.max_smem for step in steps)


def test_the_cover_of_hopper() -> None:
    """Both ways to add up, every operand type and major, every way to cut the work, warpgroups together and apart."""
    defines = [dict(hopper._defines(hopper._settled(question), config)) for question, config in hopper_cover()]
    assert len(defines) <= MOST_HOPPER
    assert {d["BLOCK_N"] for d in defines} == set(range(16, 257, 16))
    assert {(d["WARPGROUPS"], d["APART"]) for d in defines} == {(1, 0), (2, 0), (2, 1)}
    assert {(d["SHARE"], d["SPLIT"]) for d in defines} == {(1, 1), (2, 1), (1, 2), (1, 4)}
    assert {(d["A_ELEMENT"], d["B_ELEMENT"]) for d in defines} == {(0, 0), (1, 1), (2, 2), (2, 3), (3, 2), (3, 3)}
    assert {(d["PROMOTE"], d["SCALE_BLOCK"]) for d in defines} == {(0, 0), (1, 0), (1, 128)}


def test_swap_ab_is_for_one_arch() -> None:
    assert [target for target in ARCHS if few_rows_cover("swap_ab", target)] == ["sm_90a"]


def test_every_decode_and_mode_appears() -> None:
    jobs = jobs_of("sm_90a")
    kernels = {path.stem for path in (ROOT / "kernels").glob("*.cu")}
    assert {job.stem for job in jobs} == kernels - {"stream", "reduce"}, "stream is the benchmark's own"
    assert {job.stem for job in jobs_of("sm_80")} == kernels - {"stream", "swap_ab", "hopper", "transpose", "widen", "align"}
    gemms = [job.defines for job in jobs if job.stem == "portable"]
    assert len({(d["A_ELEMENT"], d["A_SCALE"], d["B_ELEMENT"], d["B_SCALE"]) for d in gemms}) == len(PAIRS)
    assert {d["SCALE_BLOCK"] for d in gemms} == set(SCALE_BLOCKS)
    modes = {stem: {job.defines["MODE"] for job in jobs if job.stem == stem} for stem in ("segments", "quantize", "block_quantize", "rows")}
    assert modes == {"segments": {0, 1, 2}, "quantize": {0, 1}, "block_quantize": {0, 1}, "rows": {0, 1}}


def test_the_list_is_finite() -> None:
    assert max(len(jobs_of(target)) for target in ARCHS) <= MOST_PER_ARCH
    assert sum(len(jobs_of(target)) for target in ARCHS) <= 2800, "the test below would take too long"


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
