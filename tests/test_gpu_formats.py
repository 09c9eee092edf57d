"""Every format with every format on the GPU against the oracles: layouts, scale layouts, scale codes, groups, frameworks; and a fuzz."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import format_oracles as formats
import gpu_arrays
import gpu_formats
import gpu_fuzz
import numpy as np
import oracles
import pytest
from format_oracles import BYTES, FORMATS
from gpu_arrays import planned
from gpu_formats import OUTS, even, is_rehearsal, verify, warmed

import cugemm

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

Array = np.ndarray[Any, Any]
VECTOR = [("row", "row"), ("row", "row"), ("column", "row"), ("row", "column")]
ANY = [("odd row", "odd row"), ("row", "gaps"), ("odd column", "odd row"), ("gaps", "column")]
SHAPES = [(3, 17, 64), (7, 65, 130), (1, 5, 300), (33, 3, 258), (17, 130, 34), (2, 1, 16), (65, 129, 257), (129, 63, 512), (16, 32, 384)]
SCALED = [name for name in FORMATS if name not in formats.PLAIN]
GROUPED = ["bf16", "e4m3", "fp8_row", "fp8_group", "fp8_block", "mxfp8", "mxfp4", "nvfp4", "nvfp4_row", "int4_g32", "int8_row", "fp4_row"]
TARGETS = ["native", "compute_80", "compute_89"]


@pytest.fixture(scope="module")
def dev() -> Any:
    return gpu_arrays.Cupy()


def seed_of(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def one(dev: Any, a: str, b: str, layouts: tuple[str, str], exact: bool, tile: int) -> None:
    """A cell of the table: everything else follows from the names."""
    seed = seed_of(a, b, layouts, exact)
    m, n, k = SHAPES[seed % len(SHAPES)]
    pair = formats.make(seed, m, n, even(k, a, b), a, b, exact=exact, bias=bool(seed & 64), alpha=(1.0, 0.5, -2.0)[seed % 3])
    with planned(tile):
        verify(
            dev, pair, OUTS[seed // 4 % 3], layouts=layouts, out=("row", "odd row", "odd column")[seed // 16 % 3],
            strided_scale=bool(seed & 32), alpha_on_device=bool(seed & 128),
        )  # fmt: skip


def table(dev: Any, a: str) -> None:
    for i, b in enumerate(gpu_formats.B):
        for j, layouts in enumerate((VECTOR[i % 4], ANY[i % 4])):
            for exact in (True, False):
                one(dev, a, b, layouts, exact, i + j)


@pytest.fixture(scope="module")
def every_cell(dev: Any) -> int:
    """Compile what the whole table needs, many at once."""
    return warmed(*(functools.partial(table, dev, a) for a in gpu_formats.A))


@pytest.mark.usefixtures("every_cell")
@pytest.mark.parametrize("a", gpu_formats.A)
def test_table(dev: Any, a: str) -> None:
    """a x b for every b: in 16-byte pieces and value by value, exact on the grid, within the bound on random data, on tiles in turn."""
    table(dev, a)


def long_sums(dev: Any, name: str) -> None:
    """Long enough for the main loop to go round its stages, wide enough for several tiles; both sides."""
    for i, (m, n, k) in enumerate([(257, 200, 1040), (64, 300, 4096), (5, 1031, 2080)]):
        for a, b in ((name, "bf16"), ("fp16", name), (name, name), ("e4m3", name)):
            if a in gpu_formats.A:
                pair = formats.make(i, m, n, k, a, b, exact=i == 0)
                verify(dev, pair, "float32")


@pytest.fixture(scope="module")
def every_long_sum(dev: Any) -> int:
    return warmed(*(functools.partial(long_sums, dev, name) for name in SCALED))


@pytest.mark.usefixtures("every_long_sum")
@pytest.mark.parametrize("name", SCALED)
def test_long_sums(dev: Any, name: str) -> None:
    long_sums(dev, name)


def shapes(dev: Any, name: str) -> None:
    odd = (1, 3, 7, 17, 63, 65, 127, 129, 255, 257)
    lengths = [(m, odd[(i + 3) % 10], odd[(i + 7) % 10]) for i, m in enumerate(odd)]
    lengths += [(1, 1, 1), (5, 7, 515), (1031, 5, 34), (5, 1033, 34), (0, 5, 8), (5, 0, 8), (5, 7, 0), (0, 0, 0), (1, 0, 0)]
    for i, (m, n, k) in enumerate(lengths):
        for a, b in ((name, "bf16"), ("e4m3", name)):
            if a in gpu_formats.A:
                pair = formats.make(i, m, n, even(k, a, b), a, b, exact=i % 2 == 0, bias=i % 3 == 0)
                verify(dev, pair, "float32", strided_scale=i % 2 == 1)


@pytest.mark.parametrize("name", SCALED)
def test_shapes(dev: Any, name: str) -> None:
    """Odd lengths on every axis, one axis long, and what is empty."""
    warmed(lambda: shapes(dev, name))
    shapes(dev, name)


def batches(dev: Any, name: str) -> None:
    for i, (left, right) in enumerate([((3,), (3,)), ((1,), (3,)), ((3,), (1,)), ((3,), ()), ((), (3,))]):
        rng = np.random.default_rng(i)
        m, n, k = SHAPES[(i + len(name)) % len(SHAPES)]
        for a, b in ((name, "fp8_group") if name in gpu_formats.A else ("bf16", name), ("mxfp8", name)):
            x = formats.exact_operand(rng, a, (*left, m, even(k, a, b)), True)
            y = formats.exact_operand(rng, b, (*right, n, even(k, a, b)), False)
            case = formats.answer(x, y, repro=f"batches {a} {b} {left} {right} exact=True")
            out = gpu_formats.multiply(dev, x, y, case, strided_scale=i % 2 == 1, out=("row", "odd column")[i % 2])
            oracles.check_exact(case, out, "bfloat16")


@pytest.mark.parametrize("name", SCALED)
def test_batches(dev: Any, name: str) -> None:
    """As many matrices on both sides, or one for all."""
    warmed(lambda: batches(dev, name))
    batches(dev, name)


# --- byte scales ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["128x4", "8x4"])
@pytest.mark.parametrize("name", BYTES)
def test_scale_layouts(dev: Any, name: str, layout: str) -> None:
    """Tiles on either side, ragged and whole, dense and batched."""

    def runs() -> None:
        lengths = [
            (1, 5, 16),
            (3, 129, 64),
            (130, 7, 300),
            (257, 9, 130),
            (8, 8, 128),
            (128, 128, 512),
            (0, 3, 64),
            (3, 4, 0),
            (260, 270, 1100),
        ]
        for i, (m, n, k) in enumerate(lengths):
            for j, (a, b) in enumerate(((name, name), (name, "bf16"), ("fp8_row", name), (name, "mxfp8"))):
                pair = formats.make(i, m, n, k, a, b, exact=(i + j) % 2 == 0)
                verify(dev, pair, OUTS[i % 3], scale_layouts=(layout, layout if j % 2 else "linear"))
                verify(dev, pair, OUTS[i % 3], scale_layouts=("8x4", layout), layouts=ANY[i % 4])
        for batch in (1, 3):
            pair = formats.make(batch, 130, 140, 200, name, name, exact=True, batch=(batch,))
            verify(dev, pair, scale_layouts=(layout, layout))
            verify(dev, pair, scale_layouts=("linear", layout))

    warmed(runs)
    runs()


@pytest.mark.parametrize("name", BYTES)
def test_flat_rows(dev: Any, name: str) -> None:
    """Scales of a stack laid out over the flattened rows."""
    kind = FORMATS[name]
    pair = formats.make(6, 9, 35, 208, name, name, exact=True, batch=(3,))
    for layout in ("linear", "128x4", "8x4"):
        scales = [formats.tiled(x.scale.reshape(-1, x.scale.shape[-1]), layout) for x in (pair.a, pair.b)]
        options = gpu_formats.gemm_options(
            gpu_formats.ANY, None, a_element=kind.element, b_element=kind.element, a_scale_element=kind.scale, b_scale_element=kind.scale,
            a_scale_layout=layout, b_scale_layout=layout, a_scale_rows="flat", b_scale_rows="flat", b_axes="nk",
        )  # fmt: skip
        tensors = {role: dev.put(x.tensor) for role, x in (("a_tensor", pair.a), ("b_tensor", pair.b)) if x.tensor is not None}
        out = gpu_formats.product(gpu_formats.ANY, dev.put(pair.a.data), dev.put(pair.b.data), options, *map(dev.put, scales), **tensors)
        oracles.check_exact(pair.case, dev.fetch(out), "bfloat16")


def within(case: oracles.Case, out: Array, per_value: Array) -> None:
    """`oracles.error_bound`, with what extreme codes add: sums near 2**128 may overflow on the way, tiny values lie on bfloat16's grid.

    A value under e8m0 codes 0..2 with e4m3 data (0..9 with e5m2) is rounded to a multiple of 2**-133, an error of at most 2**-134 each
    (`per_value`: sum over k of |what it is multiplied by|); float32 sums below 2**-126 may be flushed at each of k / 16 steps.
    """
    got = out.astype(np.float64)
    with np.errstate(all="ignore"):
        bound = oracles.error_bound(case, "float32") + 2.0**-134 * per_value + case.k / 16 * 2.0**-126
        near = np.abs(got - case.exact) <= bound
        over = (case.peak >= 2.0**127) & ~np.isfinite(got)
    good = np.where(np.isnan(case.exact), np.isnan(got), near | over)
    assert good.all(), f"rows {np.flatnonzero(~good.all(axis=-1)).tolist()[:20]} of {case.repro}"


@pytest.mark.parametrize("where", ["middle", "everywhere"])
@pytest.mark.parametrize("other", ["bf16", "fp16"])
@pytest.mark.parametrize("name", BYTES)
def test_every_scale_code(dev: Any, name: str, other: str, where: str) -> None:
    """All 256 codes at k = 16384, as a and as b, in one block among others and in all of them; NaN codes make NaN of their row alone."""
    x, y, case = gpu_formats.every_scale_code(name, 16384, where=where, other=other)
    flipped = case._replace(exact=case.exact.T, peak=case.peak.T)
    per_value = np.abs(y.values).sum(axis=-1)

    def runs() -> None:
        for layouts, scale_layout in ((("row", "row"), "linear"), (("odd row", "gaps"), "128x4"), (("row", "row"), "8x4")):
            out = gpu_formats.multiply(dev, x, y, case, dtype="float32", layouts=layouts, scale_layouts=(scale_layout, "linear"))
            within(case, out, per_value)
            assert np.isnan(out[255]).all()
            turned = gpu_formats.multiply(dev, y, x, flipped, dtype="float32", layouts=layouts, scale_layouts=("linear", scale_layout))
            within(case, turned.T, per_value)

    warmed(runs)
    runs()


# --- groups -----------------------------------------------------------------------------------------------------------------------


def grouped(dev: Any, kind: str) -> None:
    for i, b in enumerate([*GROUPED, "uint4_g64"]):
        for j in range(6):
            a = GROUPED[(3 * i + 5 * j) % len(GROUPED)]
            layout = ("linear", "128x4", "8x4")[j % 3]
            with planned(j):
                gpu_formats.grouped(
                    dev, 100 * i + j, kind, a, b, exact=j % 2 == 0, index_dtype=("int32", "int64")[j // 3],
                    scale_layouts=(layout, layout), out=("row", "odd row", "odd column")[j % 3], layouts=(VECTOR + ANY)[(i + j) % 8],
                )  # fmt: skip


@pytest.mark.parametrize("kind", gpu_formats.GROUPS)
def test_groups(dev: Any, kind: str) -> None:
    """Every way to say which rows go where x formats on either side, with indices out of range."""
    warmed(lambda: grouped(dev, kind))
    grouped(dev, kind)


@pytest.mark.parametrize("pad", [4, 128])
@pytest.mark.parametrize("kind", ["indptr", "lens"])
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "fp8_group"])
def test_padded_segments(dev: Any, name: str, kind: str, pad: int) -> None:
    for edges in ([0, 5, 5, 70, 75], [0, 1, 2, 3, 75], [0, 75, 75, 75, 75], [0, 130, 300, 301, 513]):
        gpu_formats.padded_segments(dev, name, kind, pad, edges)


# --- frameworks -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8_row", "mxfp8", "mxfp4", "nvfp4", "nvfp4_row", "int4_g64", "uint4_g32", "int8_row"])
@pytest.mark.parametrize("framework", ["torch", "jax", "dlpack"])
def test_frameworks(framework: str, name: str) -> None:
    """linear and matmul of one pair; the result is the caller's kind of array."""
    pytest.importorskip("jax" if framework == "jax" else "torch")
    if not gpu_formats.usable(framework):
        pytest.skip(f"needs {framework} with CUDA")
    dev = gpu_formats.FRAMEWORKS[framework]()
    pair = formats.make(11, 9, 33, 130, "bf16", name, exact=True)
    x, w = (gpu_formats.operand(dev, side, scale_layout="128x4") for side in (pair.a, pair.b))
    oracles.check_exact(pair.case, dev.fetch(cugemm.linear(x, w, out_dtype="float32")), "float32")
    if framework != "dlpack":  # which has no .T
        oracles.check_exact(pair.case, dev.fetch(cugemm.matmul(x, w.T, out_dtype="float32")), "float32")


# --- PTX for older architectures --------------------------------------------------------------------------------------------------


def ported(dev: Any, target: str) -> None:
    for i, b in enumerate(SCALED):
        for j, a in enumerate(("bf16", "fp16", "mxfp8", "nvfp4", "int8_row")):
            seed = seed_of(a, b, target)
            m, n, k = SHAPES[seed % len(SHAPES)]
            pair = formats.make(seed, m, n, even(k, a, b), a, b, exact=True)
            with planned(i + j, target):
                verify(dev, pair, layouts=(VECTOR + ANY)[(i + j) % 8])


@pytest.mark.parametrize("target", TARGETS)
def test_targets(dev: Any, target: str) -> None:
    """Each decoder has its own way on each architecture."""
    warmed(lambda: ported(dev, target))
    ported(dev, target)


# --- fuzz -------------------------------------------------------------------------------------------------------------------------


def test_fuzz(dev: Any) -> None:
    """2,000 random products; a failure prints the line that repeats it."""
    failures = gpu_fuzz.run(dev, seed=1, numbers=range(getattr(dev, "fuzz", 2000)))
    assert not failures, f"{len(failures)} wrong: " + "\n".join(failures[:8])
    assert not is_rehearsal()
