"""Products on the GPU against the oracles: formats, layouts, tiles, shapes, scales, groups, targets; and a fuzz over all of them."""

from __future__ import annotations

import functools
import itertools
import zlib
from typing import Any, NamedTuple

import gpu_arrays
import ml_dtypes
import numpy as np
import oracles
import pytest
from gpu_arrays import LAYOUTS, planned

import cugemm
from cugemm.api.common import product
from cugemm.problem import OPS, GemmOptions

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

Array = np.ndarray[Any, Any]
DENSE = ("bf16", "fp16", "e4m3", "e5m2", "e2m1x2")
PAIRS = [*itertools.product(DENSE, DENSE), ("bf16", "e2m1"), ("fp16", "e2m1")]
"""What the API multiplies; an e2m1 a byte is mm_fp4's b."""
OUTS = ("bfloat16", "float16", "float32")
VECTOR = [("row", "column"), ("row", "row"), ("column", "column"), ("column", "row")]
ANY = [("odd row", "odd column"), ("odd column", "row"), ("gaps", "odd row"), ("row", "gaps"), ("odd column", "odd row")]
SCALES: dict[str, dict[str, Any]] = {
    "none": {},
    "tensor": {"a_block": (0, 0), "b_block": (0, 0)},
    "row": {"a_block": (1, 0), "b_block": (0, 1)},
    "mixed": {"a_block": (0, 0), "b_block": (0, 1)},
    "group": {"a_block": (1, 128), "b_block": (128, 128)},
    "fine": {"a_block": (1, 128), "b_block": (128, 1)},
    "block": {"a_block": (128, 128), "b_block": (128, 128)},
    "weight": {"b_block": (128, 128)},
}
LATE, BY_K = ("none", "tensor", "row", "mixed"), ("group", "fine", "block", "weight")
SHAPES = [(2, 3, 7), (3, 17, 63), (7, 65, 129), (17, 127, 65), (63, 2, 127), (65, 129, 257), (129, 63, 509), (127, 131, 17), (2, 211, 385)]


class Variant(NamedTuple):
    """What decides which code is compiled: everything else in a case is a run-time argument."""

    a: str
    b: str
    layouts: tuple[str, str]
    by_k: bool
    tile: int


def variants() -> list[Variant]:
    """Every pair on every tile, going round layouts and kinds of scales; together <= 100 configs."""
    found = []
    for i, (a, b) in enumerate(PAIRS):
        fp4 = a == "e2m1x2", b == "e2m1x2"
        fits = [(x, y) for x, y in VECTOR if not (fp4[0] and x == "column") and not (fp4[1] and y == "row")]
        for tile in range(3):
            choices = ANY if (i + tile) % 3 == 2 else fits
            found.append(Variant(a, b, choices[(i // 3 + tile) % len(choices)], (i + tile // 2) % 2 == 1, tile))
    return found


VARIANTS = variants()


@pytest.fixture(scope="module")
def dev() -> Any:
    return gpu_arrays.Cupy()


def run(
    dev: Any, case: oracles.Case, layouts: tuple[str, str] = ("row", "column"), *, dtype: str = "bfloat16", out: str = "row",
    scale_dtype: str = "float32", alpha_on_device: bool = False, twice: bool = True, **options: Any,
) -> Array:  # fmt: skip
    """Multiply twice: into a poisoned `out` whose surroundings must stay, and into a fresh result. Equal bits; the value of both."""
    elements = {
        f"{side}_element": element for side, element in (("a", case.a_element), ("b", case.b_element)) if element.startswith("e2m1")
    }
    blocks = {
        "a_block": None if case.a_scale is None else case.a_block,
        "b_block": None if case.b_scale is None else case.b_block[::-1],
    }
    options = GemmOptions(**elements, **blocks, out_dtype=dtype, **options)
    scales = [s if s is None else np.asarray(s).astype(oracles.dtype_of(scale_dtype)) for s in (case.a_scale, case.b_scale)]
    alpha: Any = None if case.alpha == 1 else case.alpha
    if alpha_on_device:
        alpha = np.full((1,), case.alpha, np.float32)
    operands = [LAYOUTS[layout](x) for layout, x in zip(layouts, (case.a, case.b), strict=True)]
    a, b, a_scale, b_scale, alpha, bias = [dev.put(x) for x in (*operands, *scales, alpha, case.bias)]
    before = [x.copy() for x in operands]
    placed = dev.place(LAYOUTS[out](oracles.poison(case.exact.shape, dtype)))
    given = {"a_scale": a_scale, "b_scale": b_scale, "alpha": alpha, "bias": bias}
    assert product(OPS["matmul"], a, b, options, **given, out=placed.array) is placed.array
    into = np.ascontiguousarray(dev.get(placed))
    assert gpu_arrays.untouched(dev.bytes(placed), placed), f"wrote around out; {case.repro}"
    if twice:
        fresh = product(OPS["matmul"], a, b, options, **given)
        oracles.check_bits(dev.fetch(fresh), into, f"out={out!r} and a fresh result differ; {case.repro}")
    for x, y in zip(operands, before, strict=True):
        oracles.check_bits(np.ascontiguousarray(x), np.ascontiguousarray(y), "operands changed on the host")
    return into


check_random = functools.partial(oracles.check_random, narrow=True)
"""fp8 sums may stay in the tensor cores."""


def even(k: int, *elements: str) -> int:
    return k + k % 2 if "e2m1x2" in elements else k


# --- formats, layouts, tiles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_pairs(dev: Any, a: str, b: str) -> None:
    for number, variant in enumerate(v for v in VARIANTS if (v.a, v.b) == (a, b)):
        with planned(variant.tile):
            for i in range(3):
                seed = zlib.crc32(f"{a}{b}{number}{i}".encode())
                shapes = [s for s in SHAPES if s[2] > 128 or not variant.by_k]  # one block in all is a constant scale
                m, n, k = shapes[(seed + i) % len(shapes)]
                k = even(k, a, b)
                scales = (BY_K if variant.by_k else LATE)[seed % 4]
                dtype = OUTS[(seed // 16) % 3]
                out = ("row", "odd row", "odd column")[i]
                make, check = (oracles.exact_case, oracles.check_exact) if i != 1 else (oracles.random_case, check_random)
                case = make(seed, m, n, k, a, b, bias=bool(seed & 64), alpha=(1.0, 0.5, -2.0)[seed % 3], **SCALES[scales])
                check(case, run(dev, case, variant.layouts, dtype=dtype, out=out), dtype)


@pytest.mark.parametrize("variant", [VARIANTS[i] for i in (0, 1, 2, 38, 41, 52)], ids=str)
def test_shapes(dev: Any, variant: Variant) -> None:
    """Every odd length on every axis, one axis long, and what is empty."""
    odd = (1, 3, 7, 17, 63, 65, 127, 129, 255, 257)
    shapes = [(m, odd[(i + 3) % 10], odd[(i + 7) % 10]) for i, m in enumerate(odd)]
    shapes += [(1, 1, 1), (1031, 5, 34), (5, 1033, 34), (5, 7, 4099), (0, 5, 8), (5, 0, 8), (5, 7, 0), (0, 0, 0), (1, 0, 0)]
    blocks = SCALES["group" if variant.by_k else "row"]
    with planned(variant.tile):
        for i, (m, n, k) in enumerate(shapes):
            case = oracles.exact_case(i, m, n, even(k, variant.a, variant.b), variant.a, variant.b, bias=i % 2 == 1, **blocks)
            oracles.check_exact(case, run(dev, case, variant.layouts, out="odd row"), "bfloat16")


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("a", ["e4m3", "bf16"])
def test_scales(dev: Any, scales: str, a: str) -> None:
    """All kinds, ragged and aligned, in every dtype, with alpha by value and by pointer, and bias."""
    for i, (m, n, k) in enumerate([(130, 257, 300), (128, 128, 256), (5, 300, 129), (257, 3, 127)]):
        case = oracles.exact_case(i, m, n, k, a, "e4m3", alpha=(1.0, 4.0, 0.25, -1.0)[i], bias=i % 2 == 0, **SCALES[scales])
        for dtype, scale_dtype, on_device in zip(OUTS, ("float32", "float16", "bfloat16"), (True, False, True), strict=True):
            out = run(dev, case, dtype=dtype, scale_dtype=scale_dtype, alpha_on_device=on_device)
            oracles.check_exact(case, out, dtype)
        case = oracles.random_case(i, m, n, k, a, "e4m3", alpha=1.7, bias=True, **SCALES[scales])
        check_random(case, run(dev, case, dtype="float32"), "float32")


def test_scales_by_value_and_transposed(dev: Any) -> None:
    case = oracles.exact_case(3, 33, 47, 300, "e4m3", "e4m3", a_block=(1, 128), b_block=(128, 128))
    a, b = dev.put(case.a), dev.put(LAYOUTS["column"](case.b))
    sa, sb = dev.put(np.asfortranarray(case.a_scale)), dev.put(oracles.embed(case.b_scale, transposed=True))
    oracles.check_exact(case, dev.fetch(cugemm.mm_fp8(a, b, a_scale=sa, b_scale=sb)), "bfloat16")
    case = oracles.given_case(case.a, case.b, "e4m3", "e4m3", a_scale=0.5, b_scale=4.0, alpha=2.0)
    for alpha, scale in ((2.0, 0.5), (np.float32(2), np.float16(0.5)), (2, 0.5)):
        oracles.check_exact(case, dev.fetch(cugemm.mm_fp8(a, b, alpha, a_scale=scale, b_scale=4.0)), "bfloat16")


@pytest.mark.parametrize("batch", [("both", 3, 3), ("a", 1, 3), ("b", 3, 1), ("one", 1, 1), ("none", 0, 0)], ids=lambda x: x[0])
@pytest.mark.parametrize("scales", ["row", "group"])
def test_batches(dev: Any, batch: tuple[str, int, int], scales: str) -> None:
    _, left, right = batch
    for i, (m, n, k) in enumerate([(17, 65, 200), (1, 129, 130), (130, 7, 64)]):
        case = oracles.exact_case(i, m, n, k, "e4m3", "e4m3", batch=(max(left, right),) if left else (), **SCALES[scales])
        if left:
            case = oracles.given_case(
                case.a[:left], case.b[:right], "e4m3", "e4m3", a_scale=case.a_scale[:left], b_scale=case.b_scale[:right],
                a_block=case.a_block, b_block=case.b_block, repro=f"{case.repro} {batch}",
            )  # fmt: skip
        for layouts, out in ((("row", "column"), "odd row"), (("odd column", "gaps"), "odd column")):
            oracles.check_exact(case, run(dev, case, layouts, dtype="float32", out=out), "float32")


def test_zero_strides(dev: Any) -> None:
    """One row for all rows, one batch shown three times."""
    row = np.broadcast_to(np.arange(1, 9, dtype=np.float32).astype(ml_dtypes.bfloat16), (5, 8))
    b = oracles.exact_case(0, 1, 33, 8, "bf16", "bf16").b
    case = oracles.given_case(np.ascontiguousarray(row), b, "bf16", "bf16")
    oracles.check_exact(case, dev.fetch(cugemm.matmul(dev.put(row), dev.put(b))), "bfloat16")
    stacked = np.broadcast_to(np.ascontiguousarray(row), (3, 5, 8))
    case = oracles.given_case(np.ascontiguousarray(stacked), np.broadcast_to(b, (3, *b.shape)), "bf16", "bf16")
    oracles.check_exact(case, dev.fetch(cugemm.bmm_bf16(dev.put(stacked), dev.put(b[None]))), "bfloat16")


# --- every code -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", ["e4m3", "e5m2", "e2m1", "e2m1x2"])
@pytest.mark.parametrize("other", ["bf16", "fp16"])
def test_every_code(dev: Any, element: str, other: str) -> None:
    """Row i holds code i at k = i % 64, the other operand is the identity: values come back exactly, NaN and inf fill their rows."""
    codes = np.arange(256)
    stored = np.zeros((256, 64), np.uint8)
    stored[codes, codes % 64] = codes
    if element == "e2m1x2":  # k = 128: code i is its low nibble at 2 (i % 64) and its high nibble behind it
        identity = np.eye(128)
    else:
        stored = stored.view(oracles.dtype_of(oracles.ENCODINGS[element].dtype))
        identity = np.eye(64)
    ones = oracles.encode(identity, other)
    for layouts, first in ((("row", "column"), other == "bf16"), (("odd row", "odd column"), other == "fp16")):
        flipped = first or element == "e2m1"  # a code a byte is a layout of b
        a, b = (ones, stored.T) if flipped else (stored, ones)
        case = oracles.given_case(a, b, *((other, element) if flipped else (element, other)), repro=f"{layouts} {flipped}")
        oracles.check_exact(case, run(dev, case, layouts, dtype="float32"), "float32")


@pytest.mark.parametrize(("element", "other"), [("bf16", "bf16"), ("fp16", "fp16"), ("fp16", "bf16"), ("bf16", "e4m3")])
def test_every_16_bit_value(dev: Any, element: str, other: str) -> None:
    """65536 rows of one value, NaN, inf and subnormals among them; fp16 beside bf16 goes through two planes."""
    a = np.arange(65536, dtype=np.uint16).view(oracles.dtype_of(oracles.ENCODINGS[element].dtype))[:, None]
    case = oracles.given_case(a, oracles.encode(np.array([[1.0, -2.0, 0.0]]), other), element, other)
    for layouts in (("row", "column"), ("odd row", "odd column")):
        out = run(dev, case, layouts, dtype="float32")
        small = np.abs(case.exact) < 2.0**-126  # the sums of tensor cores may flush float32 subnormals
        nearly = np.where(small, np.abs(np.where(small, out, 0) - np.where(small, case.exact, 0)) <= 2.0**-126, True)
        assert nearly.all()
        oracles.check_exact(case._replace(exact=np.where(small, out, case.exact)), out, "float32")


def test_nan_and_inf_reach_the_result(dev: Any) -> None:
    """... of operands, scales, alpha and bias, and nothing but the rows and columns they belong to."""
    for by_k in (False, True):
        case = oracles.exact_case(1, 40, 50, 300, "e4m3", "e5m2", bias=True, **SCALES["group" if by_k else "row"])
        a, b, sa, sb, bias = case.a.copy(), case.b.copy(), case.a_scale.copy(), case.b_scale.copy(), case.bias.copy()
        a.view(np.uint8)[3, 299] = 0x7F
        b.view(np.uint8)[140, 7] = 0x7C
        sa[5, -1] = np.nan
        bias[11], bias[12] = np.nan, -np.inf
        if not by_k:
            sb[0, 9] = np.inf
        changed = oracles.given_case(
            a, b, "e4m3", "e5m2", a_scale=sa, b_scale=sb, a_block=case.a_block, b_block=case.b_block, bias=bias, repro=f"by_k={by_k}"
        )
        out = run(dev, changed, dtype="float32")
        finite = np.isfinite(changed.exact)
        assert finite.any() and (~finite).any()
        got = out.astype(np.float64)
        # An inf scale meets the finished sum in the kernel, each value in the oracle: 0 * inf may differ there.
        rows = np.ones(finite.shape, bool)
        if not by_k:
            rows[:, 9] = False
            assert not np.isfinite(got[:, 9]).any()
        np.testing.assert_array_equal(np.isfinite(got)[rows], finite[rows])
        np.testing.assert_array_equal(got[finite & rows], changed.exact[finite & rows])
    case = oracles.exact_case(2, 5, 6, 7, "bf16", "bf16")
    for alpha in (float("nan"), float("inf")):
        out = run(dev, case._replace(alpha=alpha), dtype="float32")
        assert not np.isfinite(out[case.exact != 0]).any()


# --- groups -----------------------------------------------------------------------------------------------------------------------

M, E = 75, 5
SEGMENTS: dict[str, dict[str, Any]] = {
    "plain": {"indptr": [0, 6, 20, 20, 74, 75]},
    "rows left over": {"indptr": [2, 6, 20, 20, 50, 60]},
    "before 0, past m, backwards": {"indptr": [-3, 4, 9, 9, 99, 75]},
    "nonsense": {"indptr": [-(2**31), 2**31 - 1, -1, M + 1, M + 1, -5]},
    "going back": {"indptr": [0, 25, 20, 60, 70, 75]},
    "over and over": {"indptr": [0, 75, 0, 75, 0, 75]},
    "lens": {"lens": [3, 0, 40, 1, 31]},
    "bad lens": {"lens": [3, -4, 30, 99, 1]},
    "huge lens": {"lens": [20, 2**31 - 1, 2**31 - 1, 5, 5]},
    "weights": {"indptr": [0, 10, 30, 31, 60, 70, 75], "weight_indices": [4, -1, 0, E, 4, 2**31 - 1]},
    "weighed lens": {"lens": [1, 2, 3, 40], "weight_indices": [1, 1, 3, 0]},
}


def experts_of(m: int, indptr: list[int] | None = None, lens: list[int] | None = None, weight_indices: list[int] | None = None) -> Array:
    """The definition: bounds inside [0, m] that do not go back behind any start before."""
    if lens is not None:
        indptr = [0]
        for n in lens:
            indptr.append(indptr[-1] + max(n, 0))
    assert indptr is not None
    expert = np.full(m, -1)
    for s, (start, end) in enumerate(itertools.pairwise(indptr)):
        if 0 <= start <= end <= m and start >= max(indptr[: s + 1]):
            expert[start:end] = s if weight_indices is None else weight_indices[s]
    return expert


def group(
    dev: Any, case: oracles.Case, *, column_major: bool, x_layout: str = "row", w_layout: str = "row", index_dtype: str = "int32",
    dtype: str = "bfloat16", out: str = "odd row", **named: Any,
) -> Array:  # fmt: skip
    wrapper = cugemm.SegmentGEMMWrapper(None)
    weights = case.b.swapaxes(-1, -2) if column_major else case.b
    x, w = dev.put(LAYOUTS[x_layout](case.a)), dev.put(LAYOUTS[w_layout](weights))
    arrays = {name: dev.put(np.asarray(value, index_dtype)) for name, value in named.items()}
    third = arrays.pop("expert_indices", None)
    placed = dev.place(LAYOUTS[out](oracles.poison(case.exact.shape, dtype)))
    assert wrapper.run(x, w, third, column_major, placed.array, **arrays) is placed.array
    into = np.ascontiguousarray(dev.get(placed))
    assert gpu_arrays.untouched(dev.bytes(placed), placed), f"wrote around out; {case.repro}"
    fresh = wrapper.forward(x, w, third, column_major, out_dtype=dtype, **arrays)
    oracles.check_bits(dev.fetch(fresh), into, case.repro)
    return into


@pytest.mark.parametrize("tile", range(3))
@pytest.mark.parametrize("kind", SEGMENTS)
def test_segments(dev: Any, tile: int, kind: str) -> None:
    named = SEGMENTS[kind]
    expert = experts_of(M, **named)
    base = oracles.exact_case(7, M, 33, 70, "bf16", "bf16", experts=E)
    case = oracles.given_case(base.a, base.b, "bf16", "bf16", expert=expert, repro=f"{base.repro} {named}")
    names = {"indptr": "seg_indptr", "lens": "seg_lens", "weight_indices": "weight_indices"}
    with planned(tile):
        for index_dtype, out in (("int32", "odd row"), ("int64", "odd column")):
            got = group(dev, case, column_major=True, index_dtype=index_dtype, out=out, **{names[k]: v for k, v in named.items()})
            oracles.check_exact(case, got, "bfloat16")
        if kind == "nonsense":
            wide = [-(2**40), 2**40, -1, 2**33 + 1, 2**32, 5]
            assert not group(dev, case, column_major=True, index_dtype="int64", seg_indptr=wide).any()


@pytest.mark.parametrize(("tile", "a", "b", "column_major", "layouts"), [
    (0, "bf16", "bf16", True, ("row", "row")), (1, "fp16", "e4m3", True, ("row", "row")), (2, "e4m3", "e4m3", True, ("row", "row")),
    (1, "bf16", "bf16", False, ("row", "row")), (2, "e4m3", "e5m2", False, ("odd row", "gaps")),
    (1, "bf16", "bf16", True, ("column", "row")),
])  # fmt: skip
def test_expert_indices(dev: Any, tile: int, a: str, b: str, column_major: bool, layouts: tuple[str, str]) -> None:
    """In any order, indices outside [0, experts) on either side, experts without rows, one expert for all rows."""
    x_layout, w_layout = layouts
    with planned(tile):
        for i, (m, n, k, experts) in enumerate([(1, 7, 33, 3), (40, 65, 129, 4), (200, 17, 64, 60), (300, 130, 40, 2), (7, 5, 8, 130)]):
            case = oracles.exact_case(i, m, n, k, a, b, experts=experts)
            for index_dtype in ("int32", "int64"):
                got = group(
                    dev, case, column_major=column_major, x_layout=x_layout, w_layout=w_layout, index_dtype=index_dtype,
                    dtype="float32", expert_indices=case.expert,
                )  # fmt: skip
                oracles.check_exact(case, got, "float32")
        one = oracles.given_case(case.a, case.b, a, b, expert=np.full(len(case.a), 2))
        got = group(dev, one, column_major=column_major, x_layout=x_layout, w_layout=w_layout, expert_indices=one.expert)
        oracles.check_exact(one, got, "bfloat16")
        wild = np.array([2**40, -(2**40), 2**32 + 1, 2**63 - 1, -(2**63), 2**32, 130])
        none = oracles.given_case(case.a, case.b, a, b, expert=np.full(len(case.a), -1))
        got = group(dev, none, column_major=column_major, x_layout=x_layout, w_layout=w_layout, index_dtype="int64", expert_indices=wild)
        assert not got.any()


def test_no_experts_no_segments_no_rows(dev: Any) -> None:
    """All rows are zero where nobody can select them; no rows are no error."""
    x, w = oracles.encode(np.ones((5, 8)), "bf16"), oracles.encode(np.ones((3, 8, 6)), "bf16")
    wrapper = cugemm.SegmentGEMMWrapper(None)
    empty = np.zeros(0, np.int32)
    indices = wrapper.run(dev.put(x), dev.put(w[:0]), dev.put(np.zeros(5, np.int32)))
    no_lens = wrapper.run(dev.put(x), dev.put(w), seg_lens=dev.put(empty))
    no_indptr = wrapper.run(dev.put(x), dev.put(w), seg_indptr=dev.put(np.zeros(1, np.int32)))
    for y in (indices, no_lens, no_indptr):
        got = dev.fetch(y)
        assert got.shape == (5, 6) and not got.any()
    assert wrapper.run(dev.put(x[:0]), dev.put(w), dev.put(empty)).shape == (0, 6)
    no_k = wrapper.run(dev.put(x[:, :0]), dev.put(w[:, :0]), dev.put(np.array([0, 2, 9, -1, 1], np.int32)))
    assert not dev.fetch(no_k).any()


def test_64_bit_indptr_out_of_range(dev: Any) -> None:
    """An end past 2^31 spoils what comes behind it just as one past m does."""
    for indptr in ([0, 2**40, 5, 40], [0, M + 1, 5, 40], [0, 4, -(2**40), 9, 40], [0, 4, -1, 9, 40]):
        base = oracles.exact_case(9, M, 33, 70, "bf16", "bf16", experts=E)
        case = oracles.given_case(base.a, base.b, "bf16", "bf16", expert=experts_of(M, indptr), repro=f"{base.repro} {indptr}")
        oracles.check_exact(case, group(dev, case, column_major=True, index_dtype="int64", seg_indptr=indptr), "bfloat16")


# --- large offsets ----------------------------------------------------------------------------------------------------------------


def codes(dev: Any, count: int) -> Any:
    """e4m3 bytes of small multiples of 1/2 (0, +-0.5, +-1, +-1.5, +-2), the same in every run: sums of 2^20 products are exact."""
    few = dev.cupy.asarray(np.array([0.0, 0.5, 1.0, 1.5, 2.0, -0.5, -1.0, -1.5, -2.0]).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    picks = dev.cupy.empty(count, "uint8")
    for start in range(0, count, 2**28):
        stop = min(count, start + 2**28)
        i = dev.cupy.arange(start, stop, dtype="uint32")
        picks[start:stop] = few[((i * 2654435761 ^ (i >> 9) * 40503) >> 16) % 9]
    return picks


@pytest.mark.parametrize("which", ["a", "a misaligned", "b", "k", "out"])
def test_offsets_past_2_to_the_31(dev: Any, which: str) -> None:
    """Operands and results of more than 2^31 elements, every element of the result checked on the GPU; sums of 128 are exact in 14 bits."""
    cp = dev.cupy
    fp8 = ml_dtypes.float8_e4m3fn
    table = cp.asarray(np.arange(256, dtype=np.uint8).view(fp8).astype(np.float32))
    pitch = 4096
    long = getattr(dev, "huge", 2**31) // pitch + 131
    if which == "out":
        m, n, k = getattr(dev, "huge", 2**31) // 46400 + 77, 46400, 32
        a, b = codes(dev, m * k).reshape(m, k), codes(dev, n * k).reshape(n, k)
        out = cp.full((m, n), 0xFFFF, "uint16").view(ml_dtypes.bfloat16)
        cugemm.mm_fp8(a.view(fp8), b.view(fp8).T, out=out, accumulate="promoted")
        got = out.view("uint16")
        for start in range(0, m, 4096):
            expected = (table[a[start : start + 4096]] @ table[b].T).view("uint32")  # exact in 16 significant bits? round to nearest even
            rounded = (expected + 0x7FFF + (expected >> 16 & 1)) >> 16
            assert bool((got[start : start + 4096] == rounded.astype("uint16")).all()), f"rows {start}..."
        del out, got
    else:
        shift = 1 if which == "a misaligned" else 0
        memory = codes(dev, long * pitch + 16)[shift:][: long * pitch]
        big, small = memory.reshape(long, pitch), codes(dev, 5 * max(pitch, long))
        if which == "k":  # big.T is [4096, long]: steps of 4096 along k
            small = small[: long * 3].reshape(long, 3)
            got = cugemm.mm_fp8(big.view(fp8).T, small.view(fp8), out_dtype="float32", accumulate="promoted")
            expected = cp.zeros((pitch, 3), "float64")
            for start in range(0, long, 32768):
                expected += (table[big[start : start + 32768]].T @ table[small[start : start + 32768]]).astype("float64")
            assert bool((got == expected).all())
        else:
            small = small[: 5 * pitch].reshape(5, pitch)
            if which == "b":
                got = cugemm.mm_fp8(small.view(fp8), big.view(fp8).T, out_dtype="float32", accumulate="promoted").T
            else:
                got = cugemm.mm_fp8(big.view(fp8), small.view(fp8).T, out_dtype="float32", accumulate="promoted")
            for start in range(0, long, 32768):
                expected = table[big[start : start + 32768]] @ table[small].T
                assert bool((got[start : start + 32768] == expected).all()), f"rows {start}..."
        del big, memory, small, got
    dev.free()


# --- the public entries -----------------------------------------------------------------------------------------------------------


def _entries() -> dict[str, Any]:
    """name -> function of a dict of arrays; the same call runs on NumPy and on the device."""
    g = cugemm
    return {
        "linear": lambda x: g.linear(x["a16"], x["w16"], x["bias"]),
        "linear 3-D": lambda x: g.linear(x["a16"].reshape(3, 11, -1), x["w16"]),
        "linear quantised weight": lambda x: g.linear(x["a16"], g.Quantized(x["w8"], x["sw_row"], "fp8_row")),
        "linear fp4": lambda x: g.linear(x["a16"], g.Quantized(x["w4"], x["sw_row"], "fp4_row"), x["bias"]),
        "matmul": lambda x: g.matmul(x["a8"], x["w8"].T, out_dtype="float16"),
        "matmul Quantized": lambda x: g.matmul(
            g.Quantized(x["a8"], x["sa_group"], "fp8_group"), g.Quantized(x["w8"], x["sw_block"], "fp8_block").T
        ),
        "matmul fp4": lambda x: g.matmul(g.Quantized(x["a4"], x["sa_row"], "fp4_row"), g.Quantized(x["w4"], x["sw_row"], "fp4_row").T),
        "mm_bf16": lambda x: g.mm_bf16(x["a16"], x["w16"].T, x["bias"], False, None, "float32"),
        "bmm_bf16": lambda x: g.bmm_bf16(x["A16"], x["B16"]),
        "mm_fp8": lambda x: g.mm_fp8(x["a8"], x["w8"].T, x["one"], "float32", a_scale=x["sa_row"], b_scale=x["sw_row"].T, bias=x["bias"]),
        "bmm_fp8": lambda x: g.bmm_fp8(x["A8"], x["B8"], x["one"], x["one"], "bfloat16"),
        "bmm_fp8 short": lambda x: g.bmm_fp8(x["A16"], x["B8"], x["one"]),
        "bmm_fp8 16-bit weight": lambda x: g.bmm_fp8(x["A16"], x["B16"], x["one"]),
        "groupwise K": lambda x: g.gemm_fp8_nt_groupwise(x["a8"], x["w8"], x["sa_group"], x["sw_block"], "K"),
        "groupwise MN": lambda x: g.gemm_fp8_nt_groupwise(x["a8"], x["w8"], x["sa_group"].T, x["sw_block"].T, "MN"),
        "groupwise trtllm": lambda x: g.gemm_fp8_nt_groupwise(x["a8"], x["w8"], x["sa_group"].T, x["sw_block"], backend="trtllm"),
        "blockscaled": lambda x: g.gemm_fp8_nt_blockscaled(x["a8"], x["w8"], x["sa_block"], x["sw_block"], "K"),
        "sm90": lambda x: g.fp8_blockscale_gemm_sm90(x["a8"], x["w8"], x["sa_group"], x["sw_block"]),
        "tgv": lambda x: g.tgv_gemm_sm100(x["a16"], x["w16"].T, x["bias"]),
        "mm_fp4 packed": lambda x: g.mm_fp4(x["a16"], x["w4"].T, x["sw_row"].reshape(-1)),
        "mm_fp4 codes": lambda x: g.mm_fp4(x["a16"], x["codes"], x["one"], alpha=0.5),
        "segments": lambda x: g.SegmentGEMMWrapper(num_experts=2, hidden_size=300, intermediate_size=40).forward(
            x["a16"], x["B16"], x["expert"]
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def entry_arrays(dev: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    m, n, k = 33, 40, 300
    rng = np.random.default_rng(5)
    make = oracles.exact_case
    bf16, fp8, fp4 = (make(1, m, n, k, e, e) for e in ("bf16", "e4m3", "e2m1x2"))
    batch16, batch8 = make(2, 7, n, k, "bf16", "bf16", batch=(2,)), make(2, 7, n, k, "e4m3", "e4m3", batch=(2,))

    def powers(*shape: int) -> Array:
        return np.exp2(rng.integers(-1, 2, shape)).astype(np.float32)

    arrays = {
        "a16": bf16.a, "w16": bf16.b.T.copy(), "a8": fp8.a, "w8": fp8.b.T.copy(), "a4": fp4.a, "w4": fp4.b.T.copy(),
        "codes": make(3, m, n, k, "bf16", "e2m1").b | np.uint8(0xA0), "A16": batch16.a, "B16": batch16.b, "A8": batch8.a, "B8": batch8.b,
        "bias": rng.integers(-8, 9, n).astype(ml_dtypes.bfloat16), "one": np.full(1, 0.5, np.float32), "sw_row": powers(n, 1),
        "sa_row": powers(m, 1), "sa_group": powers(m, 3), "sa_block": powers(1, 3), "sw_block": powers(1, 3),
        "expert": rng.integers(0, 2, m).astype(np.int32),
    }  # fmt: skip
    return arrays, {name: dev.put(x) for name, x in arrays.items()}


@pytest.mark.parametrize("name", _entries())
def test_entries_equal_the_reference(dev: Any, entry_arrays: Any, name: str) -> None:
    """Everything in these products is exact, so the GPU and NumPy agree to the bit."""
    on_host, on_device = entry_arrays
    entry = _entries()[name]
    expected, got = entry(on_host), entry(on_device)
    assert np.isfinite(expected.astype(np.float32)).all() and expected.astype(np.float32).any()
    oracles.check_bits(dev.fetch(got), expected, name)


def test_quantising_entries_are_near_the_reference(dev: Any) -> None:
    """Random data quantised on the way: the quantised bits are equal (test_gpu_conversion), sums differ in the last place."""
    case = oracles.random_case(4, 33, 130, 300, "bf16", "bf16")
    w = np.ascontiguousarray(case.b.T)
    calls = {
        "linear": lambda x, w: cugemm.linear(x, cugemm.quantize(w, "fp8_row"), activations="fp8_row", out_dtype="float32"),
        "linear e5m2": lambda x, w: cugemm.linear(
            x, cugemm.quantize(w, "fp8_e5m2_block"), activations="fp8_e5m2_group", out_dtype="float32"
        ),
        "sm90": lambda x, w: cugemm.fp8_blockscale_gemm_sm90(x, w, out_dtype="float32"),
    }
    for name, call in calls.items():
        expected, got = call(case.a, w), dev.fetch(call(dev.put(case.a), dev.put(w)))
        scale = np.abs(case.exact).max()
        assert (np.abs(got - expected) <= 1e-5 * scale).all(), name
        assert (np.abs(got - case.exact) <= 0.2 * scale).all(), name


# --- PTX for older architectures --------------------------------------------------------------------------------------------------

PORTED = [
    Variant("bf16", "bf16", ("row", "column"), False, 0), Variant("fp16", "bf16", ("row", "row"), False, 1),
    Variant("e4m3", "e4m3", ("row", "column"), False, 2), Variant("e4m3", "e5m2", ("row", "column"), True, 1),
    Variant("fp16", "e4m3", ("odd row", "gaps"), True, 1), Variant("bf16", "e2m1x2", ("row", "column"), False, 1),
    Variant("fp16", "e5m2", ("column", "row"), False, 2),
]  # fmt: skip


@pytest.mark.parametrize("target", ["native", "compute_80", "compute_89"])
@pytest.mark.parametrize("variant", PORTED, ids=lambda v: "-".join(map(str, v)))
def test_targets(dev: Any, target: str, variant: Variant) -> None:
    with planned(variant.tile, target):
        for i, (m, n, k) in enumerate([(17, 65, 130), (129, 131, 258), (1, 3, 8), (300, 257, 520)]):
            blocks = SCALES["group" if variant.by_k else "row"]
            for make, check in ((oracles.exact_case, oracles.check_exact), (oracles.random_case, check_random)):
                case = make(i, m, n, k, variant.a, variant.b, bias=True, **blocks)
                check(case, run(dev, case, variant.layouts, dtype=OUTS[i % 3], out="odd row", twice=False), OUTS[i % 3])
        if variant.a == "bf16" and variant.b == "bf16":
            case = oracles.exact_case(5, 90, 65, 64, "bf16", "bf16", experts=7)
            oracles.check_exact(case, group(dev, case, column_major=True, expert_indices=case.expert), "bfloat16")


@pytest.mark.parametrize("target", ["native", "compute_80", "compute_89"])
def test_fp8_codes_on_targets(dev: Any, target: str) -> None:
    """Each decoder of `numbers.cuh` has its own way on each architecture; the configs are those of test_targets."""
    every = np.arange(256, dtype=np.uint8)
    with planned(1, target):
        stored = np.zeros((256, 128), np.uint8)
        stored[every, every % 128] = every
        for layouts, a, b, tile in ((("odd row", "gaps"), "fp16", "e4m3", 1), (("column", "row"), "fp16", "e5m2", 2)):
            with planned(tile, target):
                weight = stored.view(oracles.dtype_of(oracles.ENCODINGS[b].dtype)).T
                blocks = {"a_scale": np.ones((128, 1), np.float32), "a_block": (1, 128)} if b == "e4m3" else {}
                case = oracles.given_case(oracles.encode(np.eye(128), a), weight, a, b, **blocks)
                oracles.check_exact(case, run(dev, case, layouts, dtype="float32"), "float32")


# --- fuzz -------------------------------------------------------------------------------------------------------------------------

FUZZ, CHUNK = 300, 25


def fuzz(dev: Any, seed: int) -> None:
    """One random case in a random variant; `fuzz(dev, seed)` is its repro."""
    rng = np.random.default_rng(seed)

    def pick(choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    variant = pick(VARIANTS)
    lengths = [2, 3, 5, 7, 8, 13, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 160, 191, 200, 255, 256, 257]
    # An axis of one element has no stride, so that a column-major a with m = 1 takes another config: test_shapes has those.
    m = pick([1, 1, *lengths] if variant.layouts[0] == "row" else lengths)
    n = pick([1, *lengths] if variant.layouts[1] == "column" else lengths)
    k = even(int(pick([129, 160, 200, 255, 256, 257, 384, 509, 600] if variant.by_k else [*lengths, 0, 384, 509])), variant.a, variant.b)
    scales = SCALES[pick(BY_K if variant.by_k else LATE)]
    batch = pick([(), (), (), (1,), (2,), (3,)])
    exact = bool(rng.integers(2))
    make, check = (oracles.exact_case, oracles.check_exact) if exact else (oracles.random_case, check_random)
    case = make(seed, m, n, k, variant.a, variant.b, bias=bool(rng.integers(2)), alpha=pick([1.0, 1.0, 0.5, -4.0]), batch=batch, **scales)
    dtype, out = pick(OUTS), pick(["row", "column", "odd row", "odd column"])
    scale_dtype = pick(["float32", "float16", "bfloat16"]) if exact else "float32"
    try:
        with planned(variant.tile):
            got = run(dev, case, variant.layouts, dtype=dtype, out=out, scale_dtype=scale_dtype, alpha_on_device=bool(rng.integers(2)))
            check(case, got, dtype)
    except Exception as error:
        raise AssertionError(f"fuzz(dev, {seed}): {variant}, {dtype}, out={out!r}, scales {scale_dtype}: {error}") from error


@pytest.mark.parametrize("start", range(0, FUZZ, CHUNK))
def test_fuzz(dev: Any, start: int) -> None:
    failures = []
    for seed in range(start, start + CHUNK):
        try:
            fuzz(dev, seed)
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, f"{len(failures)} of {CHUNK}: " + "\n".join(failures[:5])
