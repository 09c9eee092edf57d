"""The oracles accept sums as tensor cores make them and reject planted bugs: an oracle that cannot fail proves nothing."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import format_oracles as formats
import ml_dtypes
import numpy as np
import oracles
import pytest
from oracles import Case

pytestmark = pytest.mark.filterwarnings("error")

OUTS = ("bfloat16", "float16", "float32")
FLOATS = ("bf16", "fp16", "e4m3", "e5m2", "fp32")
CHECKS = ((oracles.exact_case, oracles.check_exact), (oracles.random_case, oracles.check_random))


def store(values: np.ndarray, dtype: str) -> np.ndarray:
    return oracles.nearest(values, dtype).astype(oracles.dtype_of(dtype))


def again(case: Case, **changes: Any) -> np.ndarray:
    """The exact answer of the case with some inputs replaced: what a kernel with that bug computes."""
    inputs = {name: changes.get(name, getattr(case, name)) for name in Case._fields[:11]}
    return oracles.given_case(**inputs).exact


def refused(check: Any, case: Case, out: np.ndarray, dtype: str = "bfloat16") -> str:
    with pytest.raises(AssertionError) as caught:
        check(case, out, dtype)
    return str(caught.value)


@pytest.mark.parametrize("module", [oracles, formats])
def test_imports_nothing_of_the_library(module):
    tree = ast.parse(Path(module.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= {"__future__", "math", "typing", "ml_dtypes", "numpy", "oracles"}


# --- formats ----------------------------------------------------------------------------------------------------------------------


def test_tables_hold_the_values_of_the_specifications():
    known = {
        "e4m3": {0x00: 0, 0x01: 2**-9, 0x07: 7 * 2**-9, 0x08: 2**-6, 0x38: 1, 0x39: 1.125, 0x7E: 448, 0x7F: np.nan, 0xFF: np.nan, 0xC0: -2},
        "e5m2": {0x01: 2**-16, 0x03: 3 * 2**-16, 0x04: 2**-14, 0x3C: 1, 0x7B: 57344, 0x7C: np.inf, 0x7D: np.nan, 0xFC: -np.inf},
        "e2m1": dict(enumerate([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])),
        "bf16": {0x0001: 2**-133, 0x3F80: 1, 0x3F81: 1 + 2**-7, 0x7F7F: 3.3895313892515355e38, 0x7F80: np.inf, 0xFFC0: np.nan},
        "fp16": {0x0001: 2**-24, 0x0400: 2**-14, 0x3C00: 1, 0x7BFF: 65504, 0x7C00: np.inf, 0xFC00: -np.inf, 0x7E00: np.nan},
    }
    for element, values in known.items():
        codes = np.array(list(values))
        np.testing.assert_array_equal(oracles.TABLES[element][codes], list(values.values()), err_msg=element)


@pytest.mark.parametrize("element", oracles.TABLES)
def test_every_code_equals_ml_dtypes_and_survives_encode(element):
    values = oracles.TABLES[element]
    dtype = oracles.dtype_of("float4_e2m1fn" if element == "e2m1" else oracles.ENCODINGS[element].dtype)
    codes = np.arange(values.size, dtype=f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):  # signalling NaNs
        np.testing.assert_array_equal(values, codes.view(dtype).astype(np.float32).astype(np.float64))
    finite = np.isfinite(values)
    np.testing.assert_array_equal(np.signbit(values[finite]), codes[finite] >= values.size // 2)
    np.testing.assert_array_equal(oracles.decode(oracles.encode(values[finite], element), element), values[finite])


def test_packed_codes_pair_up_along_k():
    a = np.array([[0x21, 0x43]], np.uint8)
    np.testing.assert_array_equal(oracles.decode(a, "e2m1x2"), [[0.5, 1, 1.5, 2]])
    np.testing.assert_array_equal(oracles.decode(a.T, "e2m1x2", k_axis=-2), [[0.5], [1], [1.5], [2]])
    np.testing.assert_array_equal(oracles.decode(a | 0xF0, "e2m1"), [[0.5, 1.5]])  # unpacked: the high nibble says nothing
    for shape, axis in (((3, 8), -1), ((2, 8, 5), -2)):
        values = np.random.default_rng(0).choice(oracles.TABLES["e2m1"], shape)
        np.testing.assert_array_equal(oracles.decode(oracles.encode(values, "e2m1x2", axis), "e2m1x2", axis), values)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_nearest_equals_the_casts_of_float32(dtype):
    """Every float32 whose low half is a pattern around a tie, all exponents: casts from float32 round once, so they are a fair judge."""
    high = np.arange(0, 65536, 3, dtype=np.uint32) << 16
    bits = (high[:, None] | np.array([0, 1, 0x1000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).ravel()
    x = bits.view(np.float32)
    x = np.concatenate([x, oracles.TABLES["bf16"].astype(np.float32), oracles.TABLES["fp16"].astype(np.float32)])
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        want = x.astype(oracles.dtype_of(dtype)).astype(np.float64)
    np.testing.assert_array_equal(oracles.nearest(wide, dtype), want)


def test_nearest_float32_equals_ieee():
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2**64, 100_000, dtype=np.uint64).view(np.float64)
    x = np.concatenate([x, rng.standard_normal(50_000) * np.exp2(rng.integers(-155, 130, 50_000)), [0.0, np.inf, -np.inf, np.nan]])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(oracles.nearest(x, "float32"), x.astype(np.float32).astype(np.float64))


def test_dequantised_and_product_by_hand():
    values = np.arange(1.0, 16.0).reshape(3, 5)
    got = oracles.dequantised(values, np.array([[1, 10, 100], [2, 20, 200]], np.float32), (2, 2))
    np.testing.assert_array_equal(got, [[1, 2, 30, 40, 500], [6, 7, 80, 90, 1000], [22, 24, 260, 280, 3000]])
    np.testing.assert_array_equal(oracles.dequantised(values, np.array([[2], [3], [4]]), (1, 0)), values * [[2], [3], [4]])
    np.testing.assert_array_equal(oracles.dequantised(values, np.array([0.5]), (0, 0)), values / 2)
    b = np.stack([np.eye(2), 2 * np.eye(2)])
    a = np.array([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    np.testing.assert_array_equal(oracles.product(a, b, np.array([1, -1, 0, 2])), [[2, 4], [0, 0], [5, 6], [0, 0]])


# --- right answers pass -----------------------------------------------------------------------------------------------------------


def tensor_core(case: Case, width: int, bits: int, order: np.ndarray | None = None) -> np.ndarray:
    """Sum of products as tensor cores make it: steps of `width`, each term and the sum cut toward zero `bits` below the largest."""
    left = oracles.dequantised(oracles.decode(case.a, case.a_element), case.a_scale, case.a_block)
    right = oracles.dequantised(oracles.decode(case.b, case.b_element, -2), case.b_scale, case.b_block)
    k = left.shape[-1]
    order = np.arange(k) if order is None else order

    def cut(x: np.ndarray, like: np.ndarray) -> np.ndarray:
        place = np.ldexp(1.0, np.frexp(like)[1] - bits)
        return np.trunc(x / place) * place

    total = np.zeros((left.shape[0], right.shape[1]))
    for start in range(0, k, width):
        at = order[start : start + width]
        terms = np.concatenate([left[None, :, at].transpose(2, 1, 0) * right[at][:, None, :], total[None]])
        total = cut(terms, np.abs(terms).max(axis=0)).sum(axis=0)
        total = cut(total, total)
    return total * case.alpha + (0 if case.bias is None else case.bias.astype(np.float64))


@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize(("a", "b"), [("bf16", "bf16"), ("e4m3", "e5m2"), ("fp16", "e2m1x2")])
def test_tensor_core_sums_stay_within_the_bound(a, b, width):
    for m, n, k in ((7, 17, 34), (17, 13, 1030), (3, 5, 4096)):
        case = oracles.random_case(1, m, n, k, a, b, bias=True, alpha=0.75)
        for out in OUTS:
            for order in (None, np.random.default_rng(2).permutation(k)):
                oracles.check_random(case, store(tensor_core(case, width, 24, order), out), out)


def test_bound_is_not_slack():
    """At k = 4096 the bound is a fraction of a percent of a typical answer; 8 bits fewer in the sums do not pass."""
    case = oracles.random_case(3, 17, 13, 4096, "bf16", "bf16")
    spread = np.sqrt((case.exact**2).mean())
    assert oracles.error_bound(case, "float32").max() < 0.02 * spread
    refused(oracles.check_random, case, store(tensor_core(case, 16, 14), "float32"), "float32")


@pytest.mark.parametrize("options", [{}, {"a_block": (1, 16), "b_block": (16, 16)}, {"a_block": (1, 0), "b_block": (0, 1), "bias": True}])
def test_exact_cases_are_exact_in_any_order_and_in_14_bits(options):
    for seed, (m, n, k) in enumerate([(1, 1, 1), (7, 17, 34), (129, 65, 300)]):
        for a, b in (("e2m1", "e4m3"), ("e5m2", "e2m1"), ("bf16", "fp16")):
            case = oracles.exact_case(seed, m, n, k, a, b, **options)
            assert (case.peak > 0).all()
            for order in (None, np.random.default_rng(4).permutation(k)):
                for width in (4, 32):
                    np.testing.assert_array_equal(tensor_core(case, width, 14, order), case.exact)
            for out in OUTS:
                oracles.check_exact(case, store(case.exact, out), out)
                oracles.check_random(case, store(case.exact, out), out)


def test_exact_cases_visit_every_k_and_differ_everywhere():
    case = oracles.exact_case(5, 65, 63, 129, "e4m3", "e4m3")
    a = oracles.decode(case.a, "e4m3")
    assert (a != 0).any(axis=0).all()
    assert ((a != 0).sum(axis=1) == oracles.NONZEROS).all()
    assert (oracles.decode(case.b, "e4m3") != 0).all()
    assert len({tuple(row) for row in case.exact}) == 65
    assert len({tuple(column) for column in case.exact.T}) == 63


@pytest.mark.parametrize("make", [oracles.exact_case, oracles.random_case])
def test_shapes_dtypes_and_reproduction(make):
    for options in (
        {}, {"batch": (2, 3)}, {"experts": 4, "bias": True}, {"a_block": (1, 128), "b_block": (128, 128), "alpha": 0.5},
        {"a_block": (0, 0), "b_block": (0, 1), "experts": 2}, {"a_block": (3, 4), "b_block": (5, 6), "batch": (2,)},
    ):  # fmt: skip
        for m, n, k in ((1, 3, 6), (17, 7, 130), (0, 5, 4), (5, 0, 4), (5, 4, 0)):
            case = make(6, m, n, k, "e2m1x2", "bf16", **options)
            batch, experts = options.get("batch", ()), options.get("experts")
            assert case.a.shape == (*batch, m, k // 2)
            assert case.b.shape == ((experts,) if experts else batch) + (k, n)
            assert (case.a.dtype, case.b.dtype) == (np.uint8, ml_dtypes.bfloat16)
            assert case.exact.shape == case.peak.shape == (*batch, m, n)
            assert (case.k, case.expert is None) == (k, experts is None)
            twin = eval(case.repro, {make.__name__: make})  # the line a failure prints
            for mine, its in zip(case, twin, strict=True):
                assert type(mine) is type(its)
                if isinstance(mine, np.ndarray):
                    oracles.check_bits(mine, its)
                else:
                    assert mine == its


# --- planted bugs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "check"), CHECKS)
@pytest.mark.parametrize("out", OUTS)
def test_wrong_outputs_are_refused(make, check, out):
    case = make(7, 129, 257, 130, "e4m3", "e4m3", a_block=(1, 0), b_block=(0, 1))
    good = store(case.exact, out)
    check(case, good, out)

    tile = good.copy()
    tile[:128, 128:256] = 0
    message = refused(check, case, tile, out)
    assert case.repro in message
    assert "[0:128, 128:256]" in message
    corner = good.copy()
    corner[128, 256] = np.nan
    assert "1 of 33153 elements wrong, all in [128:129, 256:257], first at (128, 256): nan" in refused(check, case, corner, out)
    refused(check, case, oracles.poison(good.shape, out), out)
    refused(check, case, np.full_like(good, np.inf), out)
    refused(check, case, np.roll(good, 1, axis=0), out)
    refused(check, case, np.roll(good, 1, axis=1), out)
    swapped = good.copy()
    swapped[[3, 4]] = good[[4, 3]]
    assert "all in [3:5" in refused(check, case, swapped, out)
    refused(check, case, -good, out)
    assert "shape (128, 257), wanted (129, 257)" in refused(check, case, good[:128], out)
    assert "dtype float64, wanted" in refused(check, case, good.astype(np.float64), out)


@pytest.mark.parametrize(("make", "check"), CHECKS)
def test_wrong_reads_are_refused(make, check):
    """Bugs of a kernel's loads, each computed exactly otherwise."""
    case = make(8, 65, 63, 130, "e2m1x2", "e2m1x2", a_block=(1, 0), b_block=(0, 1))
    swap = case.a << 4 | case.a >> 4
    refused(check, case, store(again(case, a=swap), "bfloat16"))
    one = case.a.copy()
    one[:, -1] = swap[:, -1]
    refused(check, case, store(again(case, a=one), "bfloat16"))  # the nibbles of the last byte alone
    refused(check, case, store(again(case, a=np.roll(case.a, 1, axis=0)), "bfloat16"))  # row off by one
    refused(check, case, store(again(case, a=np.roll(case.a, 1, axis=1)), "bfloat16"))  # k off by one
    last = case.a.copy()
    last[:, -1] = 0
    refused(check, case, store(again(case, a=last), "bfloat16"))  # ragged end of k dropped
    refused(check, case, store(again(case, a_scale=np.roll(case.a_scale, 1)), "bfloat16"))
    refused(check, case, store(again(case, b_scale=np.roll(case.b_scale, 1)), "bfloat16"))
    refused(check, case, store(again(case, a_scale=None), "bfloat16"))


@pytest.mark.parametrize(("make", "check"), CHECKS)
def test_wrong_block_scales_are_refused(make, check):
    case = make(9, 48, 48, 48, "e4m3", "e4m3", a_block=(16, 16), b_block=(16, 16))
    refused(check, case, store(again(case, a_scale=case.a_scale.T.copy()), "bfloat16"))
    refused(check, case, store(again(case, b_scale=case.b_scale.T.copy()), "bfloat16"))
    one = case.b_scale.copy()
    one[2, 2] = 2 * one[2, 2]
    assert "all in [0:48, 32:48]" in refused(check, case, store(again(case, b_scale=one), "bfloat16"))
    shifted = np.repeat(case.a_scale, 16, axis=1)
    shifted = np.concatenate([shifted[:, :1], shifted[:, :-1]], axis=1)  # the block edge one k late
    refused(check, case, store(again(case, a_scale=shifted, a_block=(16, 1)), "bfloat16"))


@pytest.mark.parametrize(("make", "check"), CHECKS)
def test_wrong_epilogues_are_refused(make, check):
    case = make(10, 33, 31, 64, "bf16", "fp16", alpha=0.5, bias=True)
    check(case, store(case.exact, "bfloat16"), "bfloat16")
    bias = case.bias.astype(np.float64)
    refused(check, case, store(again(case, bias=None), "bfloat16"))
    refused(check, case, store(again(case, alpha=1.0), "bfloat16"))
    refused(check, case, store(again(case, bias=None) + 0.5 * bias, "bfloat16"))  # alpha after the bias
    refused(check, case, store(again(case, bias=np.roll(case.bias, 1)), "bfloat16"))


def test_truncated_output_is_refused():
    case = oracles.random_case(11, 33, 31, 64, "bf16", "bf16")
    bits = case.exact.astype(np.float32).view(np.uint32) >> 16 << 16
    refused(oracles.check_random, case, bits.view(np.float32).astype(ml_dtypes.bfloat16))
    tie = oracles.given_case(np.array([[1, 2.0**-8]], np.float32), np.ones((2, 1), np.float32), "fp32", "fp32")
    oracles.check_exact(tie, np.array([[1]], ml_dtypes.bfloat16), "bfloat16")
    refused(oracles.check_exact, tie, np.array([[1 + 2**-7]], ml_dtypes.bfloat16))


@pytest.mark.parametrize(("make", "check"), CHECKS)
def test_wrong_groups_are_refused(make, check):
    case = make(12, 65, 17, 40, "bf16", "e4m3", experts=4, bias=True)
    nobody = (case.expert < 0) | (case.expert >= 4)
    assert nobody.any()
    assert not case.exact[nobody].any()
    check(case, store(case.exact, "bfloat16"), "bfloat16")
    refused(check, case, store(again(case, expert=np.roll(case.expert, 1)), "bfloat16"))
    refused(check, case, store(again(case, expert=np.where(nobody, 0, case.expert)), "bfloat16"))  # clamped, not skipped
    refused(check, case, store(np.where(nobody[:, None], case.bias, case.exact), "bfloat16"))  # bias on rows of nobody
    unwritten = store(case.exact, "bfloat16")
    unwritten[nobody] = np.nan
    refused(check, case, unwritten)


def test_special_values_must_be_where_they_belong():
    a = np.ones((4, 8), np.float32)
    a[1, 3], a[2, 4] = np.nan, np.inf
    case = oracles.given_case(a, np.ones((8, 3), np.float32), "fp32", "fp32", repro="here")
    good = store(case.exact, "bfloat16")
    for check in (oracles.check_exact, oracles.check_random):
        check(case, good, "bfloat16")
        for row, value in ((1, np.inf), (1, 8), (2, np.nan), (2, -np.inf), (2, 3.38e38), (0, np.nan), (0, np.inf)):
            bad = good.copy()
            bad[row, 1] = value
            assert refused(check, case, bad).endswith("here")
    over = oracles.given_case(a[:1] * 60000, np.ones((8, 3), np.float32), "fp32", "fp32")
    oracles.check_exact(over, np.full((1, 3), np.inf, np.float16), "float16")
    refused(oracles.check_exact, over, np.full((1, 3), 65504, np.float16), "float16")


# --- bits and poison --------------------------------------------------------------------------------------------------------------


def test_check_bits():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    x[1, 1] = np.nan
    oracles.check_bits(x.copy(), x)
    minus = x.copy()
    minus[0, 0] = -0.0
    other_nan = x.copy()
    other_nan.view(np.uint32)[1, 1] ^= 1
    for bad, word in (
        (x.astype(np.float64), "dtype"),
        (x.reshape(4, 3), "shape"),
        (np.asfortranarray(x), "strides"),
        (minus, "1 of 12 elements differ, first at (0, 0)"),
        (other_nan, "first at (1, 1)"),
    ):
        with pytest.raises(AssertionError) as caught:
            oracles.check_bits(bad, x, "repro line")
        assert word in str(caught.value)
        assert str(caught.value).endswith("repro line")
    oracles.check_bits(np.empty((0, 3), np.uint8), np.empty((0, 3), np.uint8))
    oracles.check_bits(np.ones((1, 4), np.uint8), np.ones((4, 1), np.uint8).T)  # the stride of an axis of length 1 means nothing


@pytest.mark.parametrize("element", FLOATS)
def test_poison_is_nan_and_embed_keeps_values(element):
    dtype = oracles.ENCODINGS[element].dtype
    assert np.isnan(oracles.decode(oracles.poison((3, 5), dtype), element)).all()
    x = oracles.encode(np.random.default_rng(13).standard_normal((2, 3, 5)), element)
    for transposed in (False, True):
        view = oracles.embed(x, 2, 3, transposed=transposed)
        assert view.tobytes() == x.tobytes()
        assert view.strides[-1 - transposed] == x.itemsize
        assert not view.flags.c_contiguous
        codes = view.view(f"u{x.itemsize}")
        past = np.lib.stride_tricks.as_strided(codes, (2, 4, 6), view.strides)
        assert np.isnan(oracles.decode(past[:, :, 5].copy().view(x.dtype), element)).all()
        assert np.isnan(oracles.decode(past[:, 3].copy().view(x.dtype), element)).all()


# --- whole formats ----------------------------------------------------------------------------------------------------------------


def test_integers_and_e8m0_are_what_they_say():
    pairs = np.arange(256, dtype=np.uint8)[:, None]
    np.testing.assert_array_equal(oracles.decode(pairs, "uint4x2"), np.concatenate([pairs % 16, pairs // 16], axis=1))
    int4 = pairs.reshape(-1).view(np.int8)
    np.testing.assert_array_equal(oracles.decode(pairs, "int4x2")[:, 1], int4 >> 4)
    np.testing.assert_array_equal(oracles.decode(pairs, "int4x2")[:, 0], (int4 << 4).astype(np.int8) >> 4)
    np.testing.assert_array_equal(oracles.decode(int4, "int8"), int4.astype(float))
    for element in ("int8", "int4x2", "uint4x2"):
        low, high = oracles.INTEGERS[element]
        values = np.arange(low, high + 1)[None].astype(float)
        np.testing.assert_array_equal(oracles.decode(oracles.encode(values, element), element), values)
        np.testing.assert_array_equal(oracles.decode(oracles.encode(np.array([[-999.0, 999.0]]), element), element), [[low, high]])
    np.testing.assert_array_equal(formats.E8M0, np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64))


def test_tiles_by_hand():
    """Row r, block c of a 128 x 4 tile is byte r % 32 * 16 + r // 32 * 4 + c, tiles row-major; 8 x 4 tiles are row-major inside too."""
    scale = np.arange(130 * 6, dtype=np.uint16).reshape(130, 6) + 1
    tiles = formats.tiled(scale, "128x4")
    assert tiles.shape == (256, 8)
    for row, block in ((0, 0), (1, 0), (0, 3), (31, 2), (32, 0), (33, 1), (127, 3), (0, 4), (127, 5), (128, 0), (129, 5)):
        at = (row // 128 * 2 + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
        assert tiles.reshape(-1)[at] == scale[row, block]
    assert (np.sort(tiles, axis=None)[-scale.size :] == scale.reshape(-1)).all()
    assert np.count_nonzero(tiles) == scale.size
    small = formats.tiled(scale, "8x4")
    assert small.shape == (136, 8)
    for row, block in ((0, 0), (1, 0), (7, 3), (0, 4), (8, 0), (129, 5)):
        assert small.reshape(-1)[(row // 8 * 2 + block // 4) * 32 + row % 8 * 4 + block % 4] == scale[row, block]
    np.testing.assert_array_equal(formats.tiled(np.stack([scale, 2 * scale]), "128x4")[1], formats.tiled(2 * scale, "128x4"))


def test_values_of_formats_by_hand():
    ones = np.full((2, 16), 0x22, np.uint8)  # e2m1 1.0 twice a byte
    scale = np.array([[0x38, 0x40], [0xC0, 0x7F]], np.uint8)  # 1, 2, -2, NaN
    tensor = np.array([[0.5], [4.0]], np.float32)
    got = formats.values("nvfp4_row", ones, scale, tensor)
    np.testing.assert_array_equal(got[:, [0, 15, 16, 31]], [[0.5, 0.5, 1, 1], [-8, -8, np.nan, np.nan]])
    stack = formats.values("nvfp4", np.stack([ones, ones]), np.stack([scale, scale]), np.array([1.0, 3.0], np.float32))
    np.testing.assert_array_equal(stack[1, 0, [0, 31]], [3, 6])
    zero = formats.values("uint4_g32", np.full((1, 17), 0x9F, np.uint8), np.array([[2.0, 4.0]]), None, np.array([[10, 15]], np.uint8))
    np.testing.assert_array_equal(zero[0, [0, 1, 31, 32, 33]], [10, -2, -2, 0, -24])
    block = formats.values("mxfp8", np.ones((1, 33), ml_dtypes.float8_e4m3fn), np.array([[0, 254]], np.uint8))
    np.testing.assert_array_equal(block[0, [0, 31, 32]], [2.0**-127, 2.0**-127, 2.0**127])


@pytest.mark.parametrize("name", formats.FORMATS)
def test_exact_pairs_are_exact_in_14_bits(name):
    """Every partial sum, scales and all, is a whole number of its grid below 2**14."""
    for b in ("bf16", name):
        pair = formats.make(3, 20, 6, 256, name if not formats.FORMATS[name].zero else "nvfp4", b, exact=True)
        a, w = (x.values / (1 if x.tensor is None else x.tensor.astype(float)) for x in (pair.a, pair.b))
        late = [x.scale if x.kind.scale == "fp32" and x.kind.block[1] == 0 else None for x in (pair.a, pair.b)]
        a, w = (x if s is None else x / s.astype(float) for x, s in zip((a, w), late, strict=True))
        products = a[:, None] * w[None]
        units = products * 16
        assert (units == np.rint(units)).all()
        assert np.abs(np.cumsum(units, axis=-1)).max() < 2**14
        assert np.abs(units).sum(axis=-1).max() < 2**14


def test_wrong_readings_of_formats_are_refused():
    """The bugs that kernels of these formats have: each changes the answer of an exact case and of a random one."""
    for exact in (True, False):
        pair = formats.make(5, 33, 40, 256, "nvfp4", "uint4_g64", exact=exact)
        a, b = pair.a, pair.b
        wrong = {
            "nibbles swapped": (a._replace(data=a.data >> 4 | a.data << 4), b),
            "scale of the next block": (a._replace(scale=np.roll(a.scale, 1, axis=-1)), b),
            "scale of the next row": (a._replace(scale=np.roll(a.scale, 1, axis=-2)), b),
            "second scale left out": (a._replace(tensor=np.ones_like(a.tensor) * 2 * a.tensor), b),
            "zero points left out": (a, b._replace(zero=np.zeros_like(b.zero))),
            "zero points of the next row": (a, b._replace(zero=np.roll(b.zero, 1, axis=-2))),
            "tiles read as linear": (
                a._replace(scale=formats.tiled(a.scale, "128x4").reshape(-1)[: a.scale.size].reshape(a.scale.shape)),
                b,
            ),
        }
        check = oracles.check_exact if exact else oracles.check_random
        for name, sides in wrong.items():
            bad = formats.answer(*(x._replace(values=formats.values(*x[:5])) for x in sides), repro=name)
            with pytest.raises(AssertionError):
                check(pair.case, store(bad.exact, "bfloat16"), "bfloat16")
        check(pair.case, store(pair.case.exact, "bfloat16"), "bfloat16")
