"""The NumPy reference against golden vectors bit for bit, against the oracles over formats and shapes, and at its edges."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import format_oracles as formats
import ml_dtypes
import numpy as np
import oracles
import pytest

from cugemm import quantize_reference, reference
from cugemm.formats import ELEMENTS, FORMATS
from cugemm.reference import Groups, experts_from_segments, segments_of

pytestmark = pytest.mark.filterwarnings("error")

GOLDEN = Path(__file__).parent / "golden"
OUTS = ("bfloat16", "float16", "float32")
ODD = (1, 3, 7, 17, 63, 65, 127, 129)
SHAPES = [(m, ODD[(i + 3) % 8], ODD[(i + 5) % 8]) for i, m in enumerate(ODD)] + [(1, 1, 1), (2, 211, 509), (97, 1, 130), (1, 131, 257)]
PAIRS = [(a, b) for a in ("bf16", "fp16", "e4m3", "e5m2", "fp32") for b in ("bf16", "fp16", "e4m3", "e5m2", "e2m1", "e2m1x2")]
PAIRS += [("e2m1", "e4m3"), ("e2m1x2", "bf16"), ("e2m1x2", "e2m1x2")]
BLOCKS: dict[str, dict[str, Any]] = {
    "none": {},
    "tensor": {"a_block": (0, 0), "b_block": (0, 0)},
    "row": {"a_block": (1, 0), "b_block": (0, 1)},
    "group": {"a_block": (1, 128), "b_block": (128, 128)},
    "block": {"a_block": (128, 128), "b_block": (128, 128)},
    "mixed": {"a_block": (3, 16), "b_block": (24, 1)},
    "one side": {"b_block": (32, 1)},
}


def run(case: oracles.Case, out_dtype: str) -> np.ndarray:
    names = ("a_element", "b_element", "a_scale", "b_scale", "a_block", "b_block", "alpha", "bias")
    groups = None if case.expert is None else Groups(case.expert)
    return reference.gemm(case.a, case.b, out_dtype=out_dtype, groups=groups, **{name: getattr(case, name) for name in names})


def even(shape: tuple[int, int, int], *elements: str) -> tuple[int, int, int]:
    m, n, k = shape
    return (m, n, k + k % 2) if "e2m1x2" in elements else shape


def check(shape: tuple[int, int, int], a: str, b: str, out: str, **options: Any) -> None:
    exact = oracles.exact_case(1, *even(shape, a, b), a, b, **options)
    oracles.check_exact(exact, run(exact, out), out)
    dense = oracles.random_case(2, *even(shape, a, b), a, b, **options)
    oracles.check_random(dense, run(dense, out), out)
    oracles.check_exact(dense, run(dense, out), out)  # float64 inside: equal to the rounded float64 answer, dense or not


# --- golden -----------------------------------------------------------------------------------------------------------------------


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def test_decoders_equal_torch_and_ml_dtypes():
    for name, want in load("decodes").items():
        maker, element = name.rsplit("_", 1)
        stored = np.arange(len(want), dtype=np.uint8).view(oracles.dtype_of(ELEMENTS[element].dtype))
        got = reference.gemm(stored[:, None], np.ones((1, 1), np.float32), a_element=element, b_element="fp32", out_dtype="float32")[:, 0]
        assert len(want) == (16 if element == "e2m1" else 256)
        np.testing.assert_array_equal(got, want, err_msg=maker)
        np.testing.assert_array_equal(oracles.TABLES[element], want.astype(np.float64), err_msg=maker)


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@pytest.mark.parametrize("source", ["bf16", "fp16"])
def test_cast_equals_torch_on_every_16_bit_value(source, element):
    golden = load("casts")
    x = np.arange(65536, dtype=np.uint16).view(oracles.dtype_of(oracles.ENCODINGS[source].dtype))
    fmt = next(f for f in FORMATS.values() if f.element.name == element)
    data = quantize_reference.cast(x, fmt).view(np.uint8)
    nan = np.isnan(x.astype(np.float32))
    np.testing.assert_array_equal(data[~nan], golden[f"{source}_{element}_clamped"][~nan])
    assert (data[nan] == 0x7F).all()
    assert nan.sum() > 100
    # Unclamped, torch saturates e4m3 too, and overflows to inf in e5m2.
    raw = golden[f"{source}_{element}"]
    over = ~nan & (raw != data)
    assert over.any() == (element == "e5m2")
    assert np.isinf(oracles.TABLES[element][raw[over]]).all()
    assert (np.abs(oracles.TABLES[element][data[over]]) == fmt.element.max).all()


def test_quantize_equals_torch_bit_for_bit():
    golden = load("quantised")
    kinds = {"tensor": (0, 0), "row": (1, 0), "group": (1, 128), "block": (128, 128)}
    checked = 0
    for name in (n for n in golden if n.endswith("/data")):
        case, element, kind, _ = name.split("/")
        fmt = next(f for f in FORMATS.values() if f.element.name == element and f.block == kinds[kind])
        x = golden[case].view(oracles.dtype_of(oracles.ENCODINGS[case[:4]].dtype))
        for source in (x, oracles.embed(x), oracles.embed(x, transposed=True)):
            data, scale = quantize_reference.quantize(source, fmt)
            oracles.check_bits(data, golden[name].view(oracles.dtype_of(fmt.element.dtype)), name)
            oracles.check_bits(scale, golden[name.replace("/data", "/scale")].view(np.float32), name)
        checked += 1
    assert checked == 36


def test_products_equal_torch_float64_rounded_once():
    golden = load("products")
    for name in {n.split("/")[0] for n in golden if "/" in n}:
        a_element, b_element, *scaled = name.split("_")
        a, b = (golden[f"{name}/{side}"].view(oracles.dtype_of(ELEMENTS[e].dtype)) for side, e in (("a", a_element), ("b", b_element)))
        scales: dict[str, Any] = (
            {"a_scale": golden["a_scale"], "b_scale": golden["b_scale"], "a_block": (1, 32), "b_block": (32, 3)} if scaled else {}
        )
        for out in OUTS:
            y = reference.gemm(a, b, a_element=a_element, b_element=b_element, out_dtype=out, **scales)
            want = golden[f"{name}/y"].astype(np.float32) if out == "float32" else golden[f"{name}/{out}"].view(oracles.dtype_of(out))
            oracles.check_bits(y, want, f"{name} {out}")


# --- products against the oracles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_every_pair(a, b):
    for i, shape in enumerate([(7, 17, 63), (65, 3, 129), (1, 127, 34)]):
        check(shape, a, b, OUTS[i])


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape):
    check(shape, "bf16", "bf16", "bfloat16", bias=True, alpha=0.5)
    check(shape, "e4m3", "e5m2", "float32", **BLOCKS["mixed"])
    check(shape, "fp16", "e2m1x2", "float16", **BLOCKS["row"])


@pytest.mark.parametrize("blocks", BLOCKS)
def test_scales(blocks):
    for shape in ((7, 130, 300), (129, 17, 128), (131, 257, 96), (1, 1, 129)):
        for out in OUTS:
            check(shape, "e4m3", "e4m3", out, **BLOCKS[blocks], bias=True, alpha=2.0)
    check((5, 7, 50), "e2m1x2", "e2m1x2", "bfloat16", **BLOCKS[blocks])
    check((5, 7, 50), "e4m3", "e4m3", "bfloat16", **BLOCKS[blocks], batch=(2, 3))
    check((40, 7, 50), "e4m3", "e4m3", "bfloat16", **BLOCKS[blocks], experts=5, bias=True)


def test_more_than_one_tile(monkeypatch):
    monkeypatch.setattr(reference, "TILE", 16)
    for blocks in BLOCKS.values():
        check((37, 41, 53), "e4m3", "e4m3", "bfloat16", **blocks, bias=True)
        check((17, 41, 53), "e2m1x2", "bf16", "float32", **blocks)
    monkeypatch.setattr(reference, "TILE", 15)  # cuts packed pairs in two
    check((17, 41, 53), "e2m1x2", "e2m1x2", "float32")


def test_strides():
    case = oracles.exact_case(3, 17, 19, 24, "e4m3", "e2m1x2", a_block=(1, 8), b_block=(8, 1))
    want = run(case, "float32")
    for t in (False, True):
        moved = case._replace(
            a=oracles.embed(case.a, transposed=t), b=oracles.embed(case.b, transposed=not t),
            a_scale=oracles.embed(case.a_scale, transposed=t), b_scale=oracles.embed(case.b_scale, transposed=t),
        )  # fmt: skip
        oracles.check_bits(run(moved, "float32"), want)
    reverse = case._replace(a=case.a[::-1], a_scale=case.a_scale[::-1])
    np.testing.assert_array_equal(run(reverse, "float32"), want[::-1])
    row = np.broadcast_to(case.a[:1], case.a.shape)
    np.testing.assert_array_equal(
        run(case._replace(a=row, a_scale=None), "float32"), run(case._replace(a=row.copy(), a_scale=None), "float32")
    )


def test_batch_broadcasts():
    case = oracles.random_case(4, 5, 6, 40, "bf16", "bf16", batch=(3,))
    b_only = case._replace(a=case.a[1])
    y = run(b_only, "float32")
    for i in range(3):
        oracles.check_bits(y[i], run(case._replace(a=case.a[1], b=case.b[i]), "float32"))
    oracles.check_bits(run(case._replace(a=case.a[1:2]), "float32"), y)
    oracles.check_bits(run(case._replace(a=np.broadcast_to(case.a[1], case.a.shape)), "float32"), y)
    a_only = run(case._replace(b=case.b[2]), "float32")
    oracles.check_bits(a_only[0], run(case._replace(a=case.a[0], b=case.b[2]), "float32"))
    assert run(case._replace(a=case.a[:0], b=case.b[:1]), "float32").shape == (0, 5, 6)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 7), (5, 0, 7), (5, 7, 0), (0, 0, 0), (0, 3, 0), (1, 1, 0)])
def test_empty(m, n, k):
    for options in ({}, {"batch": (2,)}, {"experts": 3}, BLOCKS["group"], BLOCKS["row"]):
        case = oracles.exact_case(5, m, n, k, "e4m3", "e4m3", bias=True, **options)
        oracles.check_exact(case, run(case, "bfloat16"), "bfloat16")
    plain = np.zeros((m, k), np.float32), np.zeros((k, n), np.float32)
    y = reference.gemm(*plain, a_element="fp32", b_element="fp32", out_dtype="float32", a_scale=1.0 if k else math.inf)
    assert y.shape == (m, n)
    assert not y.any()


def test_groups():
    for experts, m in ((1, 9), (3, 64), (40, 17)):
        check((m, 33, 70), "bf16", "e4m3", "bfloat16", experts=experts, a_block=(1, 0), b_block=(0, 1), bias=True)
    case = oracles.random_case(6, 30, 8, 16, "bf16", "bf16", experts=2, bias=True)
    a = case.a.copy()
    nobody = (case.expert < 0) | (case.expert >= 2)
    assert nobody.any()
    a[nobody] = np.nan
    y = run(case._replace(a=a), "float32")
    assert not y[nobody].any()
    assert not np.signbit(y[nobody]).any()
    oracles.check_bits(y, run(case, "float32"))

    scaled = oracles.random_case(7, 30, 8, 16, "e4m3", "e4m3", experts=2, a_block=(1, 4), b_block=(4, 1))
    oracles.check_bits(run(scaled._replace(a_scale=scaled.a_scale[None]), "float32"), run(scaled, "float32"))
    shared = scaled._replace(b_scale=scaled.b_scale[:1])
    oracles.check_bits(run(shared, "float32"), run(shared._replace(b_scale=np.repeat(shared.b_scale, 2, axis=0)), "float32"))
    assert not reference.gemm(a, case.b[:0], a_element="bf16", b_element="bf16", groups=Groups(case.expert)).any()


# --- whole formats ----------------------------------------------------------------------------------------------------------------


def of_formats(pair: formats.Pair, out_dtype: str = "float32", **options: Any) -> np.ndarray:
    """The call for two operands of `format_oracles`, b as [.., k, n]."""
    a, b = pair.a, pair.b

    def turned(x: Any) -> Any:
        return x if x is None or x.ndim < 2 else x.swapaxes(-1, -2)

    return reference.gemm(
        a.data, turned(b.data), a_element=a.kind.element, b_element=b.kind.element, a_scale=a.scale, b_scale=turned(b.scale),
        a_block=a.kind.block, b_block=b.kind.block[::-1], a_scale_element=a.kind.scale.replace("fp32", ""),
        b_scale_element=b.kind.scale.replace("fp32", ""), a_tensor=a.tensor, b_tensor=turned(b.tensor), b_zero=turned(b.zero),
        alpha=pair.case.alpha, bias=options.pop("bias", pair.bias), out_dtype=out_dtype, **options,
    )  # fmt: skip


@pytest.mark.parametrize("tile", [2048, 16, 15])
def test_formats(tile, monkeypatch):
    """Byte scales, second scales, zero points and packed integers, with tiles that cut blocks and pairs."""
    monkeypatch.setattr(reference, "TILE", tile)
    for i, b in enumerate(formats.FORMATS):
        for a in ("bf16", "nvfp4_row", "mxfp8", "int4_g32"):
            for batch in ((), (2,)):
                pair = formats.make(i, 17, 19, 70, a, b, exact=True, batch=batch, bias=True, alpha=-2.0)
                oracles.check_exact(pair.case, of_formats(pair), "float32")
                pair = formats.make(i, 3, 5, 200, a, b, exact=False, batch=batch)
                oracles.check_random(pair.case, of_formats(pair), "float32")


def test_counts_and_biases():
    pair = formats.make(3, 9, 7, 64, "mxfp4", "e4m3", exact=True, batch=(4,))
    bias = np.arange(28, dtype=np.float32).reshape(4, 7)
    for counts in ([0, 3, 9, 1], [-5, 99, 2**40, 0]):
        for given in (None, bias[1], bias):
            case = formats.answer(pair.a, pair.b, counts=np.array(counts), bias=given)
            oracles.check_exact(case, of_formats(pair, counts=np.array(counts), bias=given), "float32")
    pair = formats.make(4, 9, 7, 64, "bf16", "e4m3", exact=True, experts=4)
    expert = np.array([0, 3, -1, 2, 2, 4, 1, 0, 9])
    case = formats.answer(pair.a, pair.b, expert=expert, bias=bias)
    oracles.check_exact(case, of_formats(pair, groups=Groups(expert), bias=bias), "float32")
    pair = formats.make(5, 4, 7, 64, "bf16", "e4m3", exact=True)
    oracles.check_exact(formats.answer(pair.a, pair.b, bias=bias), of_formats(pair, bias=bias), "float32")


def test_nan_scale_codes_reach_zeros_and_large_values_are_inf():
    zeros, one = np.zeros((1, 32), ml_dtypes.float8_e4m3fn), np.ones((32, 1), ml_dtypes.float8_e4m3fn)
    how = {"a_element": "e4m3", "b_element": "e4m3", "out_dtype": "float32", "a_block": (1, 32), "a_scale_element": "e8m0"}
    assert np.isnan(reference.gemm(zeros, one, a_scale=np.array([[255]], np.uint8), **how)).all()
    assert reference.gemm(zeros, one, a_scale=np.array([[254]], np.uint8), **how) == 0
    large = zeros.copy()
    large[0, 3] = -2
    assert reference.gemm(large, one, a_scale=np.array([[254]], np.uint8), **how) == -np.inf  # -2**128, which no float32 is
    assert reference.gemm(large, one, a_scale=np.array([[253]], np.uint8), **how) == -(2.0**127)
    assert reference.gemm(large, one, a_scale=np.array([[0]], np.uint8), **how) == -(2.0**-126)
    packed = np.zeros((1, 8), np.uint8)
    how = {"a_element": "e2m1x2", "b_element": "e4m3", "out_dtype": "float32", "a_block": (1, 16), "a_scale_element": "e4m3"}
    for code, wanted in ((0x7F, np.nan), (0xFF, np.nan), (0x7E, 0.0)):
        np.testing.assert_array_equal(reference.gemm(packed, one[:16], a_scale=np.array([[code]], np.uint8), **how), [[wanted]])


# --- special values and rounding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 8, 17, 64, 130])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_propagate_through_zeros(size, bad):
    for m, n, k in ((1, size, size), (size, 1, size), (size, size, size), (size, size, 1), (1, 1, size)):
        a, b = np.zeros((m, k), np.float32), np.zeros((k, n), np.float32)
        a[m - 1, k // 2] = bad  # times 0 is NaN in its row, and nowhere else
        y = reference.gemm(a, b, a_element="fp32", b_element="fp32", out_dtype="float32")
        assert np.isnan(y[m - 1]).all()
        assert not y[: m - 1].any()
        y = reference.gemm(b.T, a.T, a_element="fp32", b_element="fp32")
        assert np.isnan(y[:, m - 1].astype(np.float32)).all()
        assert not y[:, : m - 1].astype(np.float32).any()
        y = reference.gemm(a, np.ones_like(b), a_element="fp32", b_element="fp32", out_dtype="float16")
        assert (np.isnan(y[m - 1]) if np.isnan(bad) else y[m - 1] == np.inf).all()


def test_infinite_block_scale_multiplies_its_partial_sum():
    a = np.array([[1, 0, -3, 0], [0, 0, 2, 2]], np.float32)
    scale = np.array([[np.inf, 1], [1, np.inf]], np.float32)
    y = reference.gemm(
        a, np.ones((4, 3), np.float32), a_element="fp32", b_element="fp32", a_scale=scale, a_block=(1, 2), out_dtype="float32",
        b_scale=np.array([[1], [2]], np.float32), b_block=(2, 0),
    )  # fmt: skip
    np.testing.assert_array_equal(y, np.full((2, 3), np.inf))
    y = reference.gemm(
        np.ones((3, 4), np.float32), a.T, a_element="fp32", b_element="fp32", b_scale=scale.T, b_block=(2, 1), out_dtype="float32"
    )
    np.testing.assert_array_equal(y, np.full((3, 2), np.inf))


def test_nan_bias_alpha_and_scale():
    one = np.ones((1, 1), np.float32)
    for options in (
        {"alpha": math.nan},
        {"a_scale": math.nan},
        {"b_scale": np.array([[np.nan]], np.float32)},
        {"bias": np.array([np.nan])},
    ):
        assert np.isnan(reference.gemm(one, one, a_element="fp32", b_element="fp32", out_dtype="float32", **options)).all()


@pytest.mark.parametrize("dtype", OUTS)
def test_rounding_is_single_and_to_nearest_even(dtype):
    """Through the public door, with values an ulp of float64 beside every kind of tie, at overflow and among subnormals."""
    rng = np.random.default_rng(9)
    mantissa = oracles.OF_DTYPE[dtype].mantissa
    base = np.ldexp(1 + rng.integers(0, 2**mantissa, 400) / 2**mantissa, rng.integers(-160, 129, 400))
    base = np.concatenate([base, np.ldexp(1.0, np.arange(-175, 129)), [2.0**16 - 16, 2.0**16 - 32, 3.39e38, 3.4028235677973366e38]])
    tie = base + oracles._step(base, dtype) / 2
    x = np.concatenate(
        [[0.0, np.inf, np.nan], base, tie, np.nextafter(tie, 0), np.nextafter(tie, np.inf), tie * (1 + 2.0**-30), tie * (1 - 2.0**-30)]
    )
    x = np.concatenate([x, -x])
    got = reference.gemm(
        np.zeros((1, 0), np.float32), np.zeros((0, x.size), np.float32), a_element="fp32", b_element="fp32", bias=x, out_dtype=dtype
    )
    want = oracles.nearest(x, dtype)
    np.testing.assert_array_equal(got[0].astype(np.float64), want)
    known = ~np.isnan(x)
    np.testing.assert_array_equal(np.signbit(got[0][known]), np.signbit(0.0 + x[known]))  # the empty sum is +0, and 0 + -0 is +0


def test_bfloat16_is_not_rounded_twice():
    just_above_tie = np.array([1 + 2.0**-8 + 2.0**-40])
    assert float(just_above_tie.astype(ml_dtypes.bfloat16)[0]) == 1.0  # what the cast of ml_dtypes does, and why `_round` is there
    a = np.array([[1, 2.0**-8, 2.0**-40]], np.float32)
    assert float(reference.gemm(a, np.ones((3, 1), np.float32), a_element="fp32", b_element="fp32")[0, 0]) == 1 + 2.0**-7


# --- segments ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "options", "want"),
    [
        (5, {"indptr": [0, 2, 2, 5], "experts": 3}, [0, 0, 2, 2, 2]),
        (5, {"indptr": [1, 2, 4], "experts": 3}, [-1, 0, 1, 1, -1]),
        (5, {"indptr": [0, 2, 5], "weight_indices": [2, 0], "experts": 3}, [2, 2, 0, 0, 0]),
        (5, {"indptr": [0, 1, 2, 3], "weight_indices": [3, -1, 1], "experts": 3}, [-1, -1, 1, -1, -1]),
        (5, {"indptr": [0, 2, 5], "experts": 1}, [0, 0, -1, -1, -1]),
        (4, {"indptr": [0, 2, 5, 9], "experts": 3}, [0, 0, -1, -1]),
        (4, {"indptr": [-1, 2, 4], "experts": 3}, [-1, -1, 1, 1]),
        (4, {"indptr": [3, 1, 4], "experts": 3}, [-1, -1, -1, -1]),
        (6, {"indptr": [0, 4, 2, 6], "experts": 3}, [0, 0, 0, 0, -1, -1]),
        (5, {"lens": [2, 0, 3], "experts": 3}, [0, 0, 2, 2, 2]),
        (5, {"lens": [2, -7, 1], "experts": 3}, [0, 0, 2, -1, -1]),
        (5, {"lens": [2, 4, 1], "experts": 3}, [0, 0, -1, -1, -1]),
        (5, {"lens": [2, 2**62, 2**62, 2**62, 1], "experts": 5}, [0, 0, -1, -1, -1]),
        (5, {"lens": [2, 2**63 - 1, 2**63 - 1, 3], "experts": 4}, [0, 0, -1, -1, -1]),
        (5, {"lens": [2, 3], "weight_indices": [1, 1], "experts": 2}, [1, 1, 1, 1, 1]),
        (0, {"lens": [0, 0], "experts": 2}, []),
        (3, {"lens": [], "experts": 2}, [-1, -1, -1]),
        (3, {"indptr": [0], "experts": 2}, [-1, -1, -1]),
    ],
)
def test_experts_from_segments(m, options, want):
    for dtype in (np.int32, np.int64):
        if max([*options.get("lens", []), 0]) >= 2**31 and dtype is np.int32:
            continue
        arrays = {name: np.array(v, dtype) if isinstance(v, list) else v for name, v in options.items()}
        got = experts_from_segments(m, **arrays)
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, want)


def test_segments_of():
    for options in ({"indptr": [1, 3, 3, 5]}, {"lens": [1, 2, 0, 2]}):
        starts, segment = segments_of(6, **{name: np.array(x, np.int32) for name, x in options.items()})
        first = [1, 3, 3] if "indptr" in options else [0, 1, 3, 3]
        assert starts.tolist() == first
        assert segment.tolist() == ([-1, 0, 0, 2, 2, -1] if "indptr" in options else [0, 1, 1, 3, 3, -1])


# --- quantisation -----------------------------------------------------------------------------------------------------------------

FP8_FORMATS = [f for f in FORMATS.values() if f.name.startswith("fp8_")]


@pytest.mark.parametrize("fmt", FP8_FORMATS, ids=lambda f: f.name)
def test_quantize_shapes_and_round_trip(fmt):
    gm, gk = fmt.block
    rng = np.random.default_rng(10)
    for shape in ((1, 1), (3, 7), (129, 127), (2, 17, 300), (0, 5), (5, 0), (0, 3, 4)):
        x = rng.standard_normal(shape).astype(np.float32)
        data, scale = quantize_reference.quantize(x, fmt)
        assert data.shape == shape
        assert data.dtype.name == fmt.element.dtype
        assert scale.dtype == np.float32
        m, k = shape[-2:]
        want = (*shape[:-2], 1 if gm == 0 else -(-m // gm), 1 if gk == 0 else -(-k // gk))
        assert scale.shape == ((1,) if fmt.block == (0, 0) else want)
        for dtype in OUTS:
            back = quantize_reference.dequantize(data, scale, fmt, dtype)
            assert back.shape == shape
            assert back.dtype.name == dtype
            full = oracles.dequantised(oracles.decode(data, fmt.element.name), scale, fmt.block)
            # data * scale has up to 28 bits, so float32 rounds it, and dtype rounds that.
            np.testing.assert_array_equal(back.astype(np.float64), oracles.nearest(oracles.nearest(full, "float32"), dtype))
        if x.size:
            amax = np.abs(x).max()
            half_step = amax * (2.0**-4 if fmt.element.name == "e4m3" else 2.0**-3)
            assert (np.abs(quantize_reference.dequantize(data, scale, fmt) - x) <= half_step).all()


@pytest.mark.parametrize("fmt", FP8_FORMATS, ids=lambda f: f.name)
def test_quantize_special_values(fmt):
    largest = np.float32(fmt.element.max)
    nan = np.full((2, 3), np.nan, np.float32)
    data, scale = quantize_reference.quantize(nan, fmt)
    assert (data.view(np.uint8) == 0x7F).all()
    assert (scale == np.float32(1e-12) / largest).all()
    data, scale = quantize_reference.quantize(-nan, fmt)
    assert (data.view(np.uint8) == 0x7F).all()
    x = np.array([[1, -np.inf, np.nan, -2, 0]], np.float32)
    data, scale = quantize_reference.quantize(x, fmt)
    assert (scale == np.inf).all()
    np.testing.assert_array_equal(data.view(np.uint8), [[0, 0x7F, 0x7F, 0x80, 0]])
    assert np.isnan(quantize_reference.dequantize(data, scale, fmt)).all()  # 0 * inf: the damage shows
    data, scale = quantize_reference.quantize(np.zeros((1, 4), np.float32), fmt)
    assert not data.view(np.uint8).any()
    assert (quantize_reference.dequantize(data, scale, fmt) == 0).all()
    data, _ = quantize_reference.quantize(np.full((1, 4), -3.4028235e38, np.float32), fmt)
    assert (data.astype(np.float32) == -largest).all()
    np.testing.assert_array_equal(
        quantize_reference.cast(np.array([np.inf, -np.inf, 1e9, -0.0], np.float32), fmt).astype(np.float32), [largest, -largest, largest, 0]
    )


def test_quantized_product():
    """The way a layer goes: quantise both sides, multiply, compare with the dequantised product."""
    rng = np.random.default_rng(11)
    x, w = rng.standard_normal((37, 300)).astype(ml_dtypes.bfloat16), rng.standard_normal((130, 300)).astype(ml_dtypes.bfloat16)
    qx, sx = quantize_reference.quantize(x, FORMATS["fp8_group"])
    qw, sw = quantize_reference.quantize(w, FORMATS["fp8_block"])
    y = reference.gemm(
        qx, qw.T, a_element="e4m3", b_element="e4m3", a_scale=sx, a_block=(1, 128), b_scale=sw.T, b_block=(128, 128), out_dtype="float32"
    )
    case = oracles.given_case(qx, qw.T, "e4m3", "e4m3", a_scale=sx, b_scale=sw.T, a_block=(1, 128), b_block=(128, 128))
    oracles.check_exact(case, y, "float32")
    true = x.astype(np.float64) @ w.astype(np.float64).T
    assert np.sqrt(((y - true) ** 2).mean() / (true**2).mean()) < 0.04


# --- cost -------------------------------------------------------------------------------------------------------------------------


def test_4096_cubed_fits_time_and_memory():
    """fp8 x fp8 with block scales: under 20 s on 2 free cores (40 here, cores may be shared) and 2 GB."""
    program = """
        import re, time
        import ml_dtypes, numpy as np
        from cugemm import reference
        codes = np.random.default_rng(0).integers(0, 120, (2, 4096, 4096), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
        sa, sb = np.full((4096, 32), 0.5, np.float32), np.full((32, 32), 0.25, np.float32)
        options = dict(a_element="e4m3", b_element="e4m3", a_scale=sa, a_block=(1, 128), b_scale=sb, b_block=(128, 128))
        start = time.perf_counter()
        y = reference.gemm(codes[0], codes[1].T, **options)
        seconds = time.perf_counter() - start
        want = codes[0, 7].astype(np.float64) @ codes[1, 9].astype(np.float64) / 8
        assert abs(float(y[7, 9]) - want) <= abs(want) * 2**-8, (y[7, 9], want)
        # ru_maxrss would count what the process that forked us had in memory.
        print(seconds, int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 2**20)
    """
    root = str(Path(reference.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, gigabytes = (float(x) for x in done.stdout.split())
    assert seconds < 40
    assert gigabytes < 2
