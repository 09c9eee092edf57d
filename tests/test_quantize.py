"""Quantisers on the host: every bf16 value under every scale its block can get, against definitions written here; layouts and options.

The oracle below knows nothing of the library: it takes [blocks, values] and goes by ml_dtypes' casts and plain NumPy.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import oracles
import pytest
from oracles import Array

import cugemm
from cugemm import quantize_reference, scale_layout
from cugemm.api.quantize import DEQUANTIZE, QUANTIZE
from cugemm.api.shuffle import INTERLEAVE
from cugemm.conversion import QuantizeOptions
from cugemm.formats import FORMATS
from cugemm.launch import run

F = np.float32
BF16 = ml_dtypes.bfloat16
EVERY = np.arange(65536, dtype=np.uint16).view(BF16).astype(np.float32)


# --- oracle -----------------------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    codes: Array  # [blocks, values], one code a byte
    scale: Array  # [blocks]: bytes, or float32
    zero: Array | None = None


def e2m1(x: Array) -> Array:
    return np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15


def fp8(x: Array, dtype: Any, largest: float) -> Array:
    codes = np.clip(x, F(-largest), F(largest)).astype(dtype).view(np.uint8)
    return np.where(np.isnan(x), np.uint8(0x7F), codes)


def power_above(x: Array) -> Array:
    """e8m0 code of the least power of two that is at least x."""
    fraction, exponent = np.frexp(x.astype(np.float64))
    code = np.where(fraction == 0.5, exponent - 1, exponent) + 127
    return np.where(x == 0, 0, np.clip(code, 0, 254)).astype(np.int64)


def nvfp4(x: Array, g: Any) -> Answer:
    g = F(g)
    bad = ~np.isfinite(x).all(axis=1)
    vecmax = np.abs(np.where(bad[:, None], F(0), x)).max(axis=1)
    scale = fp8(vecmax * (g * (F(1) / F(6))), ml_dtypes.float8_e4m3fn, 448)
    real = scale.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    factor = np.minimum(F(1) / (real * (F(1) / g)), np.finfo(np.float32).max)
    factor = np.where(vecmax == 0, F(0), factor)
    codes = e2m1(np.where(bad[:, None], F(0), x) * factor[:, None])
    return Answer(np.where(bad[:, None], 0, codes), np.where(bad, 0x7F, scale))


def mx(x: Array, kind: str) -> Answer:
    largest = {"mxfp4": 6, "mxfp8": 448, "mxfp8_e5m2": 57344}[kind]
    nan, bad = np.isnan(x), np.isinf(x).any(axis=1)
    if kind == "mxfp4":
        bad |= nan.any(axis=1)
    known = np.where(nan | bad[:, None], F(0), x)
    code = power_above(np.abs(known).max(axis=1) / F(largest))
    real = known.astype(np.float64) * np.where(code == 0, 0.0, np.exp2(127.0 - code))[:, None]
    if kind == "mxfp4":
        codes = e2m1(real.astype(np.float32))
    else:
        dtype = ml_dtypes.float8_e4m3fn if kind == "mxfp8" else ml_dtypes.float8_e5m2
        codes = np.where(nan, 0x7F, fp8(real.astype(np.float32), dtype, largest))
    return Answer(np.where(bad[:, None], 0, codes), np.where(bad, 255, code))


def symmetric(x: Array, largest: int) -> Answer:
    bad = ~np.isfinite(x).all(axis=1)
    known = np.where(bad[:, None], F(0), x)
    scale = np.maximum(np.abs(known).max(axis=1), F(1e-12)) / F(largest)
    if largest == 6:
        codes = e2m1(known / scale[:, None])
    else:
        codes = np.rint(np.clip(known / scale[:, None], -largest, largest)).astype(np.int8).view(np.uint8) & (255 if largest == 127 else 15)
    return Answer(np.where(bad[:, None], 0, codes), np.where(bad, F(np.nan), scale))


def with_zero(x: Array) -> Answer:
    bad = ~np.isfinite(x).all(axis=1)
    known = np.where(bad[:, None], F(0), x)
    low, high = np.minimum(known.min(axis=1), 0), np.maximum(known.max(axis=1), 0)
    scale = np.maximum(high - low, F(1e-12)) / F(15)
    zero = np.clip(np.rint(-low / scale), 0, 15)
    codes = np.clip(np.rint(known / scale[:, None]) + zero[:, None], 0, 15).astype(np.uint8)
    return Answer(np.where(bad[:, None], 0, codes), np.where(bad, F(np.nan), scale), np.where(bad, 0, zero).astype(np.uint8))


def float8(x: Array, dtype: Any, largest: float) -> Answer:
    amax = np.where(np.isnan(x), F(0), np.abs(x)).max(axis=1)
    scale = np.maximum(amax, F(1e-12)) / F(largest)
    return Answer(fp8(x / scale[:, None], dtype, largest), scale)


def answer(x: Array, name: str, g: Any = 1.0) -> Answer:
    """The answer for blocks [n, values]; zeros may fill up a short one."""
    with np.errstate(all="ignore"):
        if name.startswith("nvfp4"):
            return nvfp4(x, g)
        if name.startswith("mx"):
            return mx(x, name)
        if name.startswith("uint4"):
            return with_zero(x)
        if name.startswith("fp8_e5m2"):
            return float8(x, ml_dtypes.float8_e5m2, 57344)
        if name.startswith("fp8"):
            return float8(x, ml_dtypes.float8_e4m3fn, 448)
        return symmetric(x, {"int8": 127, "int4": 7, "fp4_": 6}[name[:4]])


# --- helpers ----------------------------------------------------------------------------------------------------------------------

GROUPED = [name for name, f in FORMATS.items() if f.block[0] == 1 and f.block[1]]
BYTES = [name for name, f in FORMATS.items() if f.scale.name != "fp32"]


def unpacked(data: Array, name: str) -> Array:
    """Stored payload -> one code a byte."""
    stored = data.view(np.uint8)
    if FORMATS[name].element.per_byte == 1:
        return stored
    return np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:-1], 2 * stored.shape[-1])


def same_bits(got: Array, want: Array, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {got.shape}, wanted {want.shape}"
    got, want = (x.astype(np.float32).view(np.uint32) if x.dtype.kind == "f" else x.astype(np.int64) for x in (got, want))
    wrong = np.argwhere(got != want)
    assert not len(wrong), (
        f"{what}: {len(wrong)} of {got.size} differ, first at {wrong[0]}: {got[tuple(wrong[0])]}, not {want[tuple(wrong[0])]}"
    )


def check_blocks(x: Array, name: str, g: float = 1.0, what: str = "") -> None:
    """Whole blocks [n, block]: twin against oracle."""
    extra = {"tensor_scale": F(g), "encode_scale": True} if name.startswith("nvfp4") else {}
    results = quantize_reference.quantize(x, FORMATS[name], **extra)
    want = answer(narrowed(x, np.float32), name, g)
    same_bits(unpacked(results[0], name), want.codes, f"{name} codes {what}")
    same_bits(results[1][:, 0], want.scale, f"{name} scale {what}")
    if want.zero is not None:
        same_bits(results[-1][:, 0], want.zero, f"{name} zero {what}")


def narrowed(x: Array, dtype: Any = BF16) -> Array:
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def quantize(x: Array, name: str, *, tensor_scale: Any = None, pre_scale: Any = None, counts: Any = None, **options: Any) -> Any:
    return run(QUANTIZE, (x, tensor_scale, pre_scale, counts), QuantizeOptions(name, **options))


def random(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> Array:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp2(rng.integers(-6, 7, shape))).astype(dtype)


# --- every value, every scale -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUPED)
def test_every_value_alone(name: str) -> None:
    """Each of the 65,536 bf16 values as the only one of its block, NaN and inf included."""
    block = FORMATS[name].block[1]
    x = np.zeros((65536, block), np.float32)
    x[np.arange(65536), np.arange(65536) % block] = EVERY
    check_blocks(narrowed(x), name)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8", "mxfp8_e5m2"])
def test_every_value_under_every_scale(name: str) -> None:
    """For each scale code, a block maximum that gives it beside every finite bf16 value up to that maximum."""
    fmt = FORMATS[name]
    block, largest = fmt.block[1], F(fmt.element.max)
    finite = np.sort(np.unique(EVERY[np.isfinite(EVERY)]))
    finite = np.append(finite, F(-0.0))
    values = quantize_reference.scale_values(np.arange(255, dtype=np.uint8), fmt.scale)
    codes = range(127) if name == "nvfp4" else range(255)
    met = set()
    for code in codes:
        with np.errstate(over="ignore"):
            most = values[code] * largest
        if not np.isfinite(most):
            most = finite.max()
        inside = finite[np.abs(finite) <= most]
        rows = -(-len(inside) // (block - 1))
        x = np.zeros((rows, block), np.float32)
        x[:, 0] = most
        x[:, 1:].reshape(-1)[...] = 0
        padded = np.resize(inside, rows * (block - 1)).reshape(rows, block - 1)
        x[:, 1:] = padded
        check_blocks(x, name, what=f"code {code}")
        met.add(int(answer(x[:1], name).scale[0]))
    assert len(met) >= (127 if name == "nvfp4" else 235)  # the rest is beyond the largest float


@pytest.mark.parametrize("name", ["int4_g32", "uint4_g32", "int8_group", "fp8_group", "fp8_e5m2_group"])
def test_every_value_under_many_scales(name: str) -> None:
    """The same with float scales: random maxima over all binades, and ties: halves of the scale."""
    rng = np.random.default_rng(5)
    block = FORMATS[name].block[1]
    finite = EVERY[np.isfinite(EVERY)]
    for exponent in range(-42, 127, 12):
        most = F(np.ldexp(rng.uniform(1, 2), exponent))
        inside = finite[np.abs(finite) <= most]
        rows = -(-len(inside) // (block - 1))
        x = np.full((rows, block), most, np.float32)
        x[:, 1:] = np.resize(inside, rows * (block - 1)).reshape(rows, block - 1)
        check_blocks(x, name, what=f"maximum {most}")
    for scale in (0.25, 1.0, 3.0):
        ties = np.arange(-30, 31, dtype=np.float32) / 2 * F(scale)
        x = np.zeros((4, block), np.float32)
        x[:, 0] = F({"int4": 7, "uint": 15, "int8": 127}.get(name[:4], 448) * scale)
        x[:, 1:31] = ties[:30]
        check_blocks(x, name, what=f"ties of {scale}")


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_random_blocks(name: str, dtype: str) -> None:
    """Wide and narrow blocks, with zeros, subnormals, NaN and inf strewn in; for nvfp4 under tensor scales over all binades."""
    rng = np.random.default_rng(len(name))
    block = FORMATS[name].block[1]
    shape = (4000, block)
    for spread, exponent in ((0, 0), (3, -10), (20, 0), (2, -130), (2, 118)):
        with np.errstate(all="ignore"):
            x = np.ldexp(rng.standard_normal(shape), rng.integers(-spread, spread + 1, shape) + exponent)
            x = np.where(rng.random(shape) < 0.1, 0, x)
            special = rng.choice([np.nan, np.inf, -np.inf, -0.0, 1e-40], shape)
            x = np.where(rng.random(shape) < 0.002, special, x).astype(oracles.dtype_of(dtype))
        for g in (1.0, 2688 / 3.7, 1e-30, 1e30, 0.013):
            check_blocks(x, name, g, f"{dtype} 2^{exponent}, g = {g}")
            if not name.startswith("nvfp4"):
                break


def test_e2m1_between_its_codes() -> None:
    """Ties and their neighbours, in both signs: the arithmetic of twin and kernel against ml_dtypes' cast."""
    ties = np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6], np.float32)
    x = np.concatenate([ties, np.nextafter(ties, F(9)), np.nextafter(ties, F(-1))])
    x = np.concatenate([x, -x, np.random.default_rng(0).uniform(-6, 6, 4096).astype(np.float32)])
    x = np.resize(np.concatenate([x, [F(6), F(-6)]]), (400, 15))
    blocks = np.concatenate([np.full((400, 1), 6, np.float32), x], axis=1)
    check_blocks(blocks, "nvfp4", 1.0)
    assert (answer(blocks, "nvfp4").scale == 0x38).all()


# --- shapes -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_any_shape_is_its_blocks(name: str) -> None:
    """Ragged rows and columns, batches, strides: every block as the oracle has it, with zeros for what the edge cuts off."""
    fmt = FORMATS[name]
    for shape in ((1, 2), (3, 34), (130, 260), (2, 5, 66), (3, 129, 130)):
        x = random(shape, seed=sum(shape), dtype=BF16)
        matrices = x.reshape(-1, *shape[-2:])
        down, across = (size or length for size, length in zip(fmt.block, shape[-2:], strict=True))
        for source in (x, oracles.embed(x), oracles.embed(x, transposed=True)):
            q = cugemm.quantize(source, name)
            codes = unpacked(np.asarray(q.data), name).reshape(matrices.shape)
            if fmt.block == (0, 0):
                want = answer(x.reshape(1, -1).astype(np.float32), name)
                same_bits(codes.reshape(1, -1), want.codes, f"{name} {shape}")
                same_bits(np.asarray(q.scale), want.scale, f"{name} {shape}")
                continue
            scale = np.asarray(q.scale).reshape(len(matrices), -(-shape[-2] // down), -1)
            tensor = (
                None
                if q.tensor_scale is None
                else np.broadcast_to(np.asarray(q.tensor_scale).reshape(-1, 1), (x[..., 0].size, 1)).reshape(-1)
            )
            for b, (i, r), (j, c) in itertools.product(
                range(len(matrices)), enumerate(range(0, shape[-2], down)), enumerate(range(0, shape[-1], across))
            ):
                if i % 7 not in (0, 3) and down == 1:
                    continue
                part = matrices[b, r : r + down, c : c + across]
                g = 1.0 if tensor is None else F(1) / tensor[b * shape[-2] + r]
                if tensor is not None:  # computed: the inverse of what went in, which may differ in its last place
                    finite = np.abs(x.astype(np.float32)) if name == "nvfp4" else np.abs(matrices[b, r].astype(np.float32))
                    g = F(2688) / finite.max()
                    assert tensor[b * shape[-2] + r] == F(1) / g
                want = answer(part.reshape(1, -1).astype(np.float32), name, g)
                same_bits(codes[b, r : r + down, c : c + across].reshape(1, -1), want.codes, f"{name} {shape} block {b, i, j}")
                same_bits(scale[b, i, j : j + 1], want.scale, f"{name} {shape} scale {b, i, j}")
                if want.zero is not None:
                    same_bits(np.asarray(q.zero).reshape(scale.shape)[b, i, j : j + 1], want.zero, f"{name} {shape} zero {b, i, j}")


@pytest.mark.parametrize("name", FORMATS)
def test_back_within_half_a_step(name: str) -> None:
    x = random((37, 96), seed=1)
    step = {"e4m3": 2.0**-4, "e5m2": 2.0**-3, "e2m1x2": 1 / 3, "int8": 1 / 127, "int4x2": 1 / 7, "uint4x2": 1 / 7}[
        FORMATS[name].element.name
    ]
    for dtype in ("float32", "bfloat16", "float16"):
        q = cugemm.quantize(x, name)
        back = cugemm.dequantize(q, dtype)
        assert back.dtype == oracles.dtype_of(dtype)
        blocks = np.abs(x).max() if FORMATS[name].block == (0, 0) else np.abs(x).max(axis=1, keepdims=True)
        assert (np.abs(back.astype(np.float64) - x) <= blocks * step).all()
        assert np.array_equal(cugemm.dequantize(q.T, dtype), back.T)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 32), (3, 0), (2, 0, 32), (0, 3, 32), (2, 3, 0)], ids=str)
def test_empty(name: str, shape: tuple[int, ...]) -> None:
    q = cugemm.quantize(np.zeros(shape, np.float32), name)
    assert q.shape == shape
    assert cugemm.dequantize(q, "float32").shape == shape
    assert np.isfinite(np.asarray(q.scale, np.float32)).all()
    if name in BYTES:
        for flat in (False, True):
            assert not quantize(np.zeros(shape, np.float32), name, scale_layout="128x4", flat=flat)[1].any()
            assert not run(INTERLEAVE, (q.scale,), QuantizeOptions("", scale_layout="8x4", flat=flat)).any()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_ruin(name: str) -> None:
    """Zeros come back as zeros, with their sign; what holds a NaN or inf comes back as no finite number."""
    signed = FORMATS[name].element.name not in ("uint4x2", "int4x2", "int8")
    x = np.zeros((4, 64), np.float32)
    x[1] = -0.0
    back = cugemm.dequantize(cugemm.quantize(x, name), "float32")
    assert (back == 0).all()
    assert (np.signbit(back[1]).all() and not np.signbit(back[0]).any()) == signed
    for wrong in (np.nan, np.inf, -np.inf):
        x = random((3, 64), seed=3)
        x[1, 5] = wrong
        back = cugemm.dequantize(cugemm.quantize(x, name), "float32")
        assert not np.isfinite(back[1, 5])
        if FORMATS[name].block[0] == 1:
            assert np.isfinite(back[[0, 2]]).all(), "another row is ruined"


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("layout", ["128x4", "8x4"])
def test_tiled_scales(name: str, layout: str) -> None:
    """Tiles hold the linear scales and zeros, of each matrix, or flat; dequantize reads them back."""
    for shape in ((1, 32), (130, 96), (3, 9, 160)):
        x = random(shape, seed=2)
        linear = cugemm.quantize(x, name)
        q = cugemm.quantize(x, name, scale_layout=layout)
        rows, blocks = linear.scale.shape[-2:]
        assert q.scale.shape == (*shape[:-2], *scale_layout.padded(rows, blocks, layout))
        assert np.array_equal(q.scale, scale_layout.interleave(linear.scale, layout))
        assert (q.scale == 0).sum() >= q.scale.size - linear.scale.size
        assert np.array_equal(cugemm.dequantize(q, "float32"), cugemm.dequantize(linear, "float32"))
        assert np.array_equal(run(INTERLEAVE, (linear.scale,), QuantizeOptions("", scale_layout=layout)), q.scale)
        data, flat = quantize(x, name, scale_layout=layout, flat=True, tensor_scale=linear.tensor_scale)[:2]
        assert np.array_equal(flat, scale_layout.interleave(linear.scale.reshape(-1, blocks), layout))
        options = QuantizeOptions(name, dtype="float32", scale_layout=layout, flat=True)
        for scale in (flat, flat.reshape(-1)):
            back = run(DEQUANTIZE, (data, scale, linear.tensor_scale, None), options)
            assert np.array_equal(back, cugemm.dequantize(linear, "float32"))


# --- options ----------------------------------------------------------------------------------------------------------------------


def test_silu_and_pre_scale_come_before() -> None:
    """silu(first half) * second half and x * pre_scale, in float32, rounded to x's dtype; then everything is as without."""
    gate, up, factor = random((5, 64), 1, BF16), random((5, 64), 2, BF16), random((64,), 3)
    with np.errstate(over="ignore"):
        exact = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up.astype(np.float64)
    data, scale = quantize(np.concatenate([gate, up], axis=1), "mxfp8", silu=True)
    want = quantize(exact.astype(np.float32).astype(BF16), "mxfp8")
    assert np.array_equal(scale, want[1])
    assert (np.abs(data.view(np.uint8).astype(int) - want[0].view(np.uint8)) <= 1).all()
    assert (data.view(np.uint8) != want[0].view(np.uint8)).mean() < 0.02
    data, scale = quantize(gate, "mxfp4", pre_scale=factor)
    scaled = (gate.astype(np.float32) * factor).astype(BF16)
    assert all(np.array_equal(a, b) for a, b in zip((data, scale), quantize(scaled, "mxfp4"), strict=True))
    for wild in (np.inf, -np.inf, np.nan, 300.0, -300.0):
        x = np.full((1, 64), wild, np.float32)
        result = quantize(x, "fp8_group", silu=True)
        expected = {np.inf: np.inf, 300.0: 90000 / 448}.get(wild)
        assert expected is None or result[1][0, 0] == F(expected)


@pytest.mark.parametrize("name", GROUPED)
def test_counts(name: str) -> None:
    """Rows from the count on are zeros, data and scales, whatever they hold; counts are clamped."""
    x = random((4, 6, 64), 7)
    x[1, 4] = np.nan
    counts = np.array([6, 3, -2, 99], np.int64)
    g = {"tensor_scale": F(0.01) * np.ones((4, 6, 1) if name == "nvfp4_row" else 1, np.float32)} if name.startswith("nvfp4") else {}
    results, plain = quantize(x, name, counts=counts, **g), quantize(x, name, **g)
    for masked, whole in zip(results, plain, strict=True):
        for b, count in enumerate((6, 3, 0, 6)):
            assert np.array_equal(masked[b, :count], whole[b, :count])
            assert not np.asarray(masked[b, count:]).view(np.uint8).any()
    if name == "nvfp4":
        assert np.isfinite(quantize(x, name, counts=counts)[2]).all()
        assert quantize(x, name, counts=counts)[2] == F(1) / (F(2688) / max(np.abs(x[b, :n]).max() for b, n in ((0, 6), (1, 3), (3, 6))))


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "uint4_g32"])
def test_align_pads_with_zeros(name: str) -> None:
    x = random((5, 70), 9)
    padded = np.zeros((5, 128), np.float32)
    padded[:, :70] = x
    for got, want in zip(quantize(x, name, align=128), quantize(padded, name), strict=True):
        assert np.array_equal(got, want)


def test_tensor_scale_in_all_its_forms() -> None:
    """A number, one element of any shape, one per matrix, one per row; itself or its inverse; returned in one shape."""
    x = random((3, 4, 32), 4)
    one = F(0.125)
    plain = quantize(x, "nvfp4", tensor_scale=np.array([one]))
    for form in (0.125, np.float32(0.125), np.array(one), np.array([[one]])):
        for emit in (False, True):
            results = quantize(x, "nvfp4", tensor_scale=form, emit_tensor=emit)
            assert len(results) == 2 + emit
            assert all(np.array_equal(a, b) for a, b in zip(results, plain, strict=False))
            if emit:
                assert results[2].shape == (1,)
                assert results[2] == one
    inverse = quantize(x, "nvfp4", tensor_scale=8.0, encode_scale=True, emit_tensor=True)
    assert all(np.array_equal(a, b) for a, b in zip(inverse, (*plain, np.array([one])), strict=True))
    each = np.array([0.5, 0.01, 3.0], np.float32)
    for form in (each, each.reshape(3, 1, 1)):
        data, scale, given = quantize(x, "nvfp4", tensor_scale=form, emit_tensor=True)
        assert np.array_equal(given, each)
        for b in range(3):
            part = quantize(x[b], "nvfp4", tensor_scale=float(each[b]))
            assert np.array_equal(data[b], part[0])
            assert np.array_equal(scale[b], part[1])
    rows = np.exp2(np.arange(12, dtype=np.float32).reshape(3, 4) - 8)
    for form in (rows, rows[..., None]):
        data, scale, given = quantize(x, "nvfp4_row", tensor_scale=form, emit_tensor=True)
        assert np.array_equal(given, rows[..., None])
        for b, r in np.ndindex(3, 4):
            part = quantize(x[b, r : r + 1], "nvfp4", tensor_scale=float(rows[b, r]))
            assert np.array_equal(data[b, r], part[0][0])
            assert np.array_equal(scale[b, r], part[1][0])


def test_computed_tensor_scale_at_the_ends() -> None:
    """448 * 6 / amax of what is finite; 1 for zeros; for the smallest floats the largest inverse there is."""
    x = np.array([[3.0, np.inf] + [0.0] * 30, [-5.0, np.nan] + [0.0] * 30, [0.0] * 32, [1e-44, *[0.0] * 31]], np.float32)
    top = np.finfo(np.float32).max
    per_row = cugemm.quantize(x, "nvfp4_row").tensor_scale
    assert np.array_equal(per_row[:, 0], F(1) / np.array([F(2688) / F(3), F(2688) / F(5), 1, top], np.float32))
    assert np.array_equal(cugemm.quantize(x, "nvfp4").tensor_scale, [F(1) / (F(2688) / F(5))])
    assert np.array_equal(cugemm.quantize(x[2:3], "nvfp4").tensor_scale, [1])


def test_groups_powers_of_two_and_columns() -> None:
    """per_token_group_quant_8bit's options: other groups, a least amax, scales rounded up to powers of two, scales as columns."""
    x = random((5, 300), 6)
    x[2] = 0
    for group in (16, 32, 64, 256, 512):
        data, scale = quantize(x, "fp8_group", group=group, eps=1e-10)
        padded = np.zeros((5, -(-300 // group) * group), np.float32)
        padded[:, :300] = x
        want = answer(padded.reshape(-1, group), "fp8_group")
        amax = np.maximum(np.abs(padded).reshape(-1, group).max(axis=1), F(1e-10))
        assert np.array_equal(scale.reshape(-1), amax / F(448))
        live = amax > 1e-10
        got = np.zeros_like(padded)
        got[:, :300] = data.view(np.uint8)
        assert np.array_equal(got.reshape(-1, group)[live], want.codes[live])
        up = quantize(x, "fp8_group", group=group, ceil_scale=True)[1]
        fraction, exponent = np.frexp(np.maximum(amax, F(1e-12)) / F(448))
        assert np.array_equal(up.reshape(-1)[live], np.ldexp(1.0, np.where(fraction == 0.5, exponent - 1, exponent))[live])
        columns = quantize(x, "fp8_group", group=group, eps=1e-10, scale_axes="km")
        assert np.array_equal(columns[1], scale.T)
        back = run(
            DEQUANTIZE, (columns[0], columns[1], None, None), QuantizeOptions("fp8_group", dtype="float32", group=group, scale_axes="km")
        )
        assert (np.abs(back - x) <= np.abs(x).max() / 16).all()


def test_interleave_of_strided_and_wide_scales() -> None:
    for dtype in (np.uint8, BF16, ml_dtypes.float8_e4m3fn):
        scale = random((9, 37), 1).astype(dtype) if dtype is not np.uint8 else np.arange(333, dtype=np.uint8).reshape(9, 37)
        for layout in ("128x4", "8x4"):
            got = run(INTERLEAVE, (scale.T,), QuantizeOptions("", scale_layout=layout))
            assert got.dtype == dtype
            assert np.array_equal(got.view(np.uint8), scale_layout.interleave(np.ascontiguousarray(scale.T), layout).view(np.uint8))


# --- errors -----------------------------------------------------------------------------------------------------------------------

X = np.zeros((4, 64), np.float32)
STACK = np.zeros((3, 4, 64), np.float32)
ONE = np.ones(1, np.float32)


def back(name: str, data: Any, scale: Any, tensor: Any = None, zero: Any = None, **options: Any) -> Any:
    return run(DEQUANTIZE, (data, scale, tensor, zero), QuantizeOptions(name, **{"dtype": "float32", **options}))


BYTES4 = np.zeros((4, 32), np.uint8)
SCALES4 = np.zeros((4, 4), np.uint8)

REFUSED = {
    "odd k": (
        lambda: quantize(X[:, :63], "nvfp4"),
        ValueError,
        "quantize: x has k = 63, but nvfp4 packs two values a byte along k; pad k to 64",
    ),
    "odd half": (lambda: quantize(X[:, :63], "mxfp8", silu=True), ValueError, "with silu its last axis holds two halves"),
    "odd align": (lambda: quantize(X, "nvfp4", align=65), ValueError, "pad k to 66"),
    "layout": (lambda: quantize(X, "nvfp4", scale_layout="swizzled"), ValueError, "scale_layout is 'swizzled'; wanted one of 'linear'"),
    "layout of floats": (lambda: quantize(X, "fp8_row", scale_layout="128x4"), ValueError, "scales of fp8_row are floats, always linear"),
    "flat floats": (lambda: quantize(X, "int4_g32", flat=True), ValueError, "flat is set, but scales of int4_g32 are floats"),
    "cast": (lambda: quantize(X, "mxfp4", cast=True), ValueError, "cast goes to fp8 only, but mxfp4 stores e2m1x2"),
    "group": (lambda: quantize(X, "fp8_group", group=48), ValueError, "group is 48 for fp8_group; it is one of (16, 32"),
    "group of bytes": (lambda: quantize(X, "mxfp8", group=64), ValueError, "group is 64 for mxfp8"),
    "group of rows": (lambda: quantize(X, "fp8_row", group=64), ValueError, "group is 64 for fp8_row"),
    "columns of bytes": (lambda: quantize(X, "mxfp8", scale_axes="km"), ValueError, "mxfp8 has e8m0 bytes; drop them"),
    "ceil of zero points": (lambda: quantize(X, "uint4_g32", ceil_scale=True), ValueError, "uint4_g32 has zero points; drop them"),
    "ceil of rows": (
        lambda: quantize(X, "fp8_row", ceil_scale=True),
        ValueError,
        "ceil_scale goes with a format with a float scale per group",
    ),
    "axes": (lambda: quantize(X, "fp8_group", scale_axes="nk"), ValueError, "scale_axes is 'nk' for fp8_group; wanted 'mk', or 'km'"),
    "eps": (lambda: quantize(X, "fp8_group", eps=0.0), ValueError, "eps is 0.0; wanted a number from 1e-20 up"),
    "align": (lambda: quantize(X, "mxfp8", align=0), ValueError, "align is 0; wanted a positive number"),
    "align of rows": (
        lambda: quantize(X, "fp8_row", align=128),
        ValueError,
        "align is 128, which goes with a format with a scale per group",
    ),
    "silu of rows": (
        lambda: quantize(X, "int8_row", silu=True),
        ValueError,
        "silu is set, which goes with a format with a scale per group",
    ),
    "tensor scale": (lambda: quantize(X, "mxfp8", tensor_scale=ONE), ValueError, "mxfp8 has no tensor_scale; drop it"),
    "tensor dtype": (
        lambda: quantize(X, "nvfp4", tensor_scale=ONE.astype(BF16)),
        TypeError,
        "tensor_scale is bfloat16; wanted a float32 array",
    ),
    "tensor rows": (
        lambda: quantize(X, "nvfp4", tensor_scale=np.ones((4, 1), np.float32)),
        ValueError,
        "tensor_scale has shape (4, 1), but x is (4, 64) and nvfp4 takes one element",
    ),
    "tensor per row": (
        lambda: quantize(X, "nvfp4_row", tensor_scale=np.ones(5, np.float32)),
        ValueError,
        "tensor_scale has shape (5,), but x is (4, 64) and nvfp4_row takes one per row, (4, 1)",
    ),
    "tensor per matrix": (lambda: quantize(STACK, "nvfp4", tensor_scale=np.ones(4, np.float32)), ValueError, "one element or (3,)"),
    "pre_scale": (
        lambda: quantize(X, "nvfp4", pre_scale=np.ones(63, np.float32)),
        ValueError,
        "pre_scale has shape (63,), but x has k = 64",
    ),
    "pre_scale dtype": (lambda: quantize(X, "nvfp4", pre_scale=np.ones(64, np.int32)), TypeError, "pre_scale is int32; wanted an array of"),
    "pre_scale number": (lambda: quantize(X, "nvfp4", pre_scale=2.0), TypeError, "pre_scale is float; wanted an array of"),
    "pre_scale of rows": (
        lambda: quantize(X, "fp8_row", pre_scale=np.ones(64, np.float32)),
        ValueError,
        "pre_scale goes with a format with a",
    ),
    "counts": (
        lambda: quantize(STACK, "nvfp4", counts=np.ones(4, np.int32)),
        ValueError,
        "counts has shape (4,), but x is (3, 4, 64); wanted (3,)",
    ),
    "counts of one": (lambda: quantize(X, "nvfp4", counts=np.ones(4, np.int32)), ValueError, "wanted x of shape [batch, rows, k]"),
    "counts dtype": (
        lambda: quantize(STACK, "nvfp4", counts=np.ones(3, np.float32)),
        TypeError,
        "counts is float32; wanted an int32 or int64",
    ),
    "counts of rows": (
        lambda: quantize(STACK, "fp8_row", counts=np.ones(3, np.int32)),
        ValueError,
        "counts goes with a format with a scale per",
    ),
    "data": (lambda: back("nvfp4", X, SCALES4), TypeError, "dequantize: data is float32, but format nvfp4 stores uint8"),
    "data strides": (
        lambda: back("nvfp4", np.zeros((32, 4), np.uint8).T, SCALES4),
        ValueError,
        "data (4, 32) has strides (1, 4); pass it as a",
    ),
    "scale dtype": (
        lambda: back("nvfp4", BYTES4, SCALES4.astype(np.float32)),
        TypeError,
        "scale is float32; wanted a uint8 or float8_e4m3fn array",
    ),
    "scale": (
        lambda: back("nvfp4", BYTES4, SCALES4[:, :3]),
        ValueError,
        "scale has shape (4, 3), but nvfp4 of data (4, 32) has scales of shape (4, 4)",
    ),
    "scale tiles": (lambda: back("nvfp4", BYTES4, SCALES4, scale_layout="128x4"), ValueError, "scales of shape (128, 4) (in 128x4 tiles)"),
    "scale strides": (lambda: back("nvfp4", BYTES4, SCALES4.T), ValueError, "scale (4, 4) has strides (1, 4)"),
    "no zero": (lambda: back("uint4_g32", BYTES4, np.ones((4, 2), np.float32)), ValueError, "uint4_g32 needs zero, its zero points"),
    "zero": (
        lambda: back("int4_g32", BYTES4, np.ones((4, 2), np.float32), zero=np.zeros((4, 2), np.uint8)),
        ValueError,
        "int4_g32 has no zero points; drop zero",
    ),
    "zero dtype": (
        lambda: back("uint4_g32", BYTES4, np.ones((4, 2), np.float32), zero=np.zeros((4, 2), np.int8)),
        TypeError,
        "zero is int8; wanted a uint8 array",
    ),
    "zero shape": (
        lambda: back("uint4_g32", BYTES4, np.ones((4, 2), np.float32), zero=np.zeros((4, 1), np.uint8)),
        ValueError,
        "zero has shape (4, 1), but uint4_g32 of data (4, 32) has zero points of shape (4, 2)",
    ),
    "dequantised tensor scale": (lambda: back("mxfp4", BYTES4, SCALES4[:, :2].copy(), ONE), ValueError, "mxfp4 has no tensor_scale"),
    "interleave dtype": (
        lambda: run(INTERLEAVE, (X,), QuantizeOptions("", scale_layout="128x4")),
        TypeError,
        "block_scale_interleave: unswizzled_sf is float32",
    ),
    "interleave linear": (
        lambda: run(INTERLEAVE, (SCALES4,), QuantizeOptions("")),
        ValueError,
        "scale_layout is 'linear', which the scales have",
    ),
    "interleave rank": (
        lambda: run(INTERLEAVE, (ONE,), QuantizeOptions("", scale_layout="8x4")),
        ValueError,
        "wanted [rows, blocks] or [batch, rows,",
    ),
    "too long": (
        lambda: cugemm.explain(cugemm.quantize, cugemm.Spec((2**31 - 8, 16), "bfloat16"), "nvfp4"),
        ValueError,
        "x has 2147483640 rows; wanted at most",
    ),
    "too long yet": (
        lambda: cugemm.explain(cugemm.quantize, cugemm.Spec((16, 2**31), "bfloat16"), "nvfp4"),
        ValueError,
        "its axes must be below 2**31",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_words(case: str) -> None:
    call, kind, text = REFUSED[case]
    with pytest.raises(kind) as raised:
        call()
    assert text in str(raised.value)
