"""kernels/hopper.cu on the GPU: every way to cut the work, any size, layouts, groups, accumulation, offsets past 2^31."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import format_oracles as formats
import gpu_arrays
import gpu_formats
import ml_dtypes
import numpy as np
import oracles
import pytest
from gpu_arrays import planned
from gpu_formats import ANY, OUTS, warmed
from oracles import Array
from test_gpu_products import codes

import cugemm
from cugemm import launch, measure
from cugemm.api.common import gemm_options, product

pytestmark = [pytest.mark.gpu, pytest.mark.requires("cupy"), pytest.mark.filterwarnings("default")]

PAIRS = (
    ("bf16", "bf16", "fast"), ("fp16", "fp16", "fast"), ("e4m3", "e5m2", "fast"), ("fp8_row", "fp8_row", "promoted"),
    ("fp8_tensor", "fp8_e5m2_row", "fast"), ("fp8_group", "fp8_block", "promoted"), ("fp8_row", "fp8_block", "fast"),
    ("e4m3", "e5m2", "fp32"),
)  # fmt: skip
SHAPES = (
    (1, 16, 64), (70, 300, 2000), (300, 168, 400), (129, 1000, 4112), (1000, 520, 272), (512, 2112, 1168), (9, 1111, 1040), (140, 610, 528),
)  # fmt: skip
WAYS = (("row", "row", "row"), ("column", "row", "odd row"), ("row", "column", "column"), ("column", "column", "row"))
"""Layouts of a, b and out, a and b as [rows, k]; those of fp8 are along k."""


@pytest.fixture(scope="module")
def dev() -> Any:
    if "wgmma" not in launch.machine(0)[0].features:
        pytest.skip("hopper needs sm_90a")
    return gpu_arrays.Cupy()


def call(dev: Any, pair: int, shape: int) -> Callable[[], None]:
    """Exact or random, with a poisoned out whose surroundings must stay, and again: equal bits."""
    a, b, accumulate = PAIRS[pair]
    m, n, k = SHAPES[shape]
    number = pair + shape
    left, right, out = (
        WAYS[number % 4] if pair < 2 and m % 8 == 0 and n % 8 == 0 else ("row", "row", ("row", "odd row", "column")[number % 3])
    )
    case = formats.make(number, m, n, k, a, b, exact=number % 3 > 0, bias=number % 2 == 0, alpha=(1.0, 0.5, -2.0)[number % 3])
    return functools.partial(
        gpu_formats.verify, dev, case, OUTS[number % 3], backend="hopper", out=out, layouts=(left, right), accumulate=accumulate
    )


def pairs(dev: Any, pair: int) -> None:
    """The best config of each shape, and three others."""
    for shape, other in itertools.product(range(len(SHAPES)), (None, 3, 7, 12)):
        with planned(None if other is None else other + shape + pair):
            call(dev, pair, shape)()


@pytest.mark.parametrize("pair", range(len(PAIRS)), ids=["-".join(pair) for pair in PAIRS])
def test_pairs(dev: Any, pair: int) -> None:
    warmed(lambda: pairs(dev, pair))
    pairs(dev, pair)


def groups(dev: Any) -> None:
    for i, kind in enumerate(["indptr", "lens", "masked"] * 6):
        a, b, accumulate = PAIRS[i % len(PAIRS)]
        with planned(3 * i):
            rng = np.random.default_rng(i)
            m, n, k, experts = int(rng.integers(1, 700)), int(rng.integers(1, 300)), 16 * int(rng.integers(1, 80)), 5
            lead = (experts,) if kind == "masked" else ()
            x = formats.exact_operand(rng, a, (*lead, m, k), True)
            w = formats.exact_operand(rng, b, (experts, n, k), False)
            edges = np.sort(rng.integers(0, m + 1, experts + 1))
            expert = np.repeat(np.r_[-1, np.arange(experts), -1], np.diff(np.r_[0, edges, m])) if not lead else None
            counts = rng.choice([-3, 0, m // 2, m, m + 9], experts) if lead else None
            said = {"indptr": edges, "lens": np.diff(np.r_[0, edges[1:]]), "masked": counts}[kind]
            if kind == "lens":
                expert = np.repeat(np.r_[np.arange(experts), -1], np.diff(np.r_[0, edges[1:], m]))
            case = formats.answer(x, w, expert=expert, counts=counts, repro=f"groups {i} exact=True")
            out = gpu_formats.multiply(
                dev, x, w, case, backend="hopper", segments=kind, said=said.astype(("int32", "int64")[i % 2]), accumulate=accumulate
            )
            oracles.check_exact(case, out, "bfloat16")


def test_groups(dev: Any) -> None:
    warmed(lambda: groups(dev))
    groups(dev)


def any_size(dev: Any, numbers: range) -> None:
    """Sums on the grid are exact, so another kernel's bits are the right ones; twice."""
    cp = dev.cupy
    for number in numbers:
        rng = np.random.default_rng([7, number])
        m, n, k = (max(1, int(2 ** rng.uniform(0, 12.3))) for _ in range(3))
        fp8 = number % 2 == 1
        k = -(-k // (16 if fp8 else 8)) * (16 if fp8 else 8)
        grid = cp.asarray(np.array([-3, -1.5, -1, -0.5, 0, 0.5, 1, 2], np.float32))
        x, w = (grid[cp.random.randint(0, 8, (rows, k), dtype=np.int32)] * (cp.random.rand(rows, 1) < 0.9) for rows in (m, n))
        if fp8:
            sides = [cugemm.quantize(v.astype(np.float32), "fp8_tensor").data for v in (x, w)]
        else:
            sides = [measure.to_device(measure.to_host(v).astype(ml_dtypes.bfloat16)) for v in (x, w)]
        with planned(number if number % 3 else None):
            got = [cugemm.linear(*sides, out_dtype="float32", backend="hopper", accumulate="promoted") for _ in range(2)]
            wanted = cugemm.linear(*sides, out_dtype="float32", backend="portable")
        assert bool((got[0].view("uint32") == got[1].view("uint32")).all()), f"{number}: {m} x {n} x {k} twice"
        assert bool((cp.abs(got[0] - wanted) <= 1e-3 * cp.abs(wanted).max() + 1e-6).all()), f"{number}: {m} x {n} x {k}"
        if not fp8:
            assert bool((got[0] == wanted).all()), f"{number}: {m} x {n} x {k}"


@pytest.mark.parametrize("part", range(4))
def test_any_size(dev: Any, part: int) -> None:
    numbers = range(250 * part, 250 * part + 250)
    any_size(dev, numbers)


def test_offsets_past_2_to_the_31(dev: Any) -> None:
    """Weights of more than 2^31 elements, and a result of as many; every element checked on the GPU."""
    cp, fp8, pitch = dev.cupy, ml_dtypes.float8_e4m3fn, 4096
    table = cp.asarray(np.arange(256, dtype=np.uint8).view(fp8).astype(np.float32))
    long = 2**31 // pitch + 131
    big, small = codes(dev, long * pitch).reshape(long, pitch), codes(dev, 70 * pitch).reshape(70, pitch)
    options = gemm_options(ANY, "float32", "hopper", accumulate="promoted", b_axes="nk")
    for tile in (0, 5, 11):
        with planned(tile):
            got = product(ANY, small.view(fp8), big.view(fp8), options)
            for start in range(0, long, 32768):
                expected = table[small] @ table[big[start : start + 32768]].T
                assert bool((cp.abs(got[:, start : start + 32768] - expected) <= 1e-3 * cp.abs(expected).max()).all()), (tile, start)
            del got
    dev.free()


ERRORS = {("bf16", "fast"): (2e-5, 8e-5), ("fp8", "fp32"): None, ("fp8", "promoted"): (2e-4, 1e-3), ("fp8", "fast"): (2e-2, 2.5e-1)}
"""Relative rms error of sums of 16384 products of normal values, and of positive ones; None: twice that of fp32, one by one."""


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("name", "accumulate"), ERRORS)
def test_accuracy(dev: Any, name: str, accumulate: str, positive: bool) -> None:
    rng = np.random.default_rng(5)
    sides = [rng.standard_normal((256, 16384), np.float32) for _ in range(2)]
    sides = [np.abs(v) if positive else v for v in sides]
    dtype = ml_dtypes.bfloat16 if name == "bf16" else ml_dtypes.float8_e4m3fn
    stored = [v.astype(dtype) for v in sides]
    got = dev.fetch(cugemm.linear(*map(dev.put, stored), out_dtype="float32", backend="hopper", accumulate=accumulate))
    a, b = (v.astype(np.float64) for v in stored)
    bounds = ERRORS[name, accumulate]
    most = bounds[positive] if bounds else 2 * relative_rms(one_by_one(a[:32], b[:32]), a[:32] @ b[:32].T)
    assert relative_rms(got, a @ b.T) <= most


def relative_rms(got: Array, right: Array) -> float:
    return float(np.sqrt(np.mean((got - right) ** 2) / np.mean(right**2)))


def one_by_one(a: Array, b: Array) -> Array:
    total = np.zeros((len(a), len(b)), np.float32)
    for k in range(a.shape[1]):
        total += np.multiply.outer(a[:, k], b[:, k]).astype(np.float32)
    return total
