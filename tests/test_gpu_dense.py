"""FlashInfer's dense entries on the GPU: every entry in several layouts into a poisoned out, against float64 of its decoded operands."""

from __future__ import annotations

from typing import Any

import gpu_arrays
import numpy as np
import oracles
import pytest
from dense_cases import Entry, entries, normal, side, tiles
from gpu_arrays import LAYOUTS
from oracles import Array

import cugemm
from cugemm import Quantized
from cugemm.formats import FORMATS
from cugemm.problem import FLOATS8

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

BF16, FP16, F32 = "bfloat16", "float16", "float32"
WAYS = [("row", "column", "row"), ("row", "row", "odd row"), ("odd row", "odd column", "column"), ("column", "gaps", "odd column")]
"""Layouts of a, b and out."""
SHAPES = [(1, 3, 34), (17, 65, 130), (129, 131, 258), (64, 256, 512)]


@pytest.fixture(scope="module")
def dev() -> Any:
    return gpu_arrays.Cupy()


def check(dev: Any, entry: Entry, way: tuple[str, str, str], dtype: str) -> None:
    """Into a poisoned out whose surroundings must stay, and, where the entry returns its result, a fresh one with equal bits."""
    layouts = {"a": LAYOUTS[way[0]], "b": LAYOUTS[way[1]]}
    arrays = {name: dev.put(layouts.get(name, np.ascontiguousarray)(x)) for name, x in entry.arrays.items()}
    placed = dev.place(LAYOUTS[way[2]](oracles.poison(entry.case.exact.shape, dtype)))
    result = entry.call(arrays, placed.array, None)
    assert result is None or result is placed.array
    into = np.ascontiguousarray(dev.get(placed))
    assert gpu_arrays.untouched(dev.bytes(placed), placed), "wrote around out"
    oracles.check_random(entry.case, into, dtype, narrow=True)
    if result is not None and dtype == BF16:
        oracles.check_bits(dev.fetch(entry.call(arrays, None, dtype)), into, "out= and a fresh result differ")


@pytest.mark.parametrize("name", entries(2, 2, 32))
def test_entries(dev: Any, name: str) -> None:
    for i, shape in enumerate(SHAPES):
        entry = entries(*shape)[name]
        for j, way in enumerate(WAYS):
            dtype = (BF16, FP16, F32)[(i + j) % 3]
            try:
                check(dev, entry, way, dtype)
            except AssertionError as error:
                raise AssertionError(f"{name} of {shape} as {way} into {dtype}: {error}") from error


@pytest.mark.parametrize("name", entries(2, 2, 32))
def test_empty(dev: Any, name: str) -> None:
    """No row and no column: nothing runs, nothing is written."""
    for shape in ((0, 5, 32), (5, 0, 32)):
        entry = entries(*shape)[name]
        check(dev, entry, WAYS[0], BF16)


@pytest.mark.parametrize("name", ["mm_M1_16_K7168_N128", "mm_M1_16_K7168_N256", "mm_M1_16_K6144_N256"])
def test_routers(dev: Any, name: str) -> None:
    fn = getattr(cugemm, name)
    k, n = (int(part[1:]) for part in name.split("_")[-2:])
    dtype = BF16 if n == 128 else F32
    for m in (1, 7, 16):
        x, w = normal(17, m, k), normal(18, n, k)
        placed = dev.place(LAYOUTS["row"](oracles.poison((m, n), dtype)))
        assert fn(dev.put(x), dev.put(w).T, placed.array) is None
        assert gpu_arrays.untouched(dev.bytes(placed), placed)
        oracles.check_random(oracles.given_case(x, w.T, "bf16", "bf16", random_signs=True), np.ascontiguousarray(dev.get(placed)), dtype)


# --- quantised on the way: the bits are those of the host (test_gpu_conversion), sums differ in their last places ---------------------


def near(got: Array, expected: Array, what: str, bound: float = 1e-5) -> None:
    assert got.dtype == expected.dtype == np.float32, what
    assert (np.abs(got - expected) <= bound * np.abs(expected).max()).all(), what


@pytest.mark.parametrize("activations", [None, *(name for name, fmt in FORMATS.items() if not fmt.zero)], ids=str)
def test_linear_of_every_pair(dev: Any, activations: str | None) -> None:
    for i, weight in enumerate(FORMATS):
        x, w = normal(19, 33, 320, dtype=(BF16, FP16)[i % 2]), normal(20, 70, 320)
        q = cugemm.quantize(w, weight)
        on_device = Quantized(
            *map(dev.put, (q.data, q.scale)), weight, tensor_scale=dev.put(q.tensor_scale), zero=dev.put(q.zero)
        )  # fmt: skip
        got = cugemm.linear(dev.put(x), on_device, activations=activations, out_dtype=F32)
        narrow = all(name is not None and FORMATS[name].element.name in FLOATS8 for name in (activations, weight))  # sums of 14 bits
        expected = cugemm.linear(x, q, activations=activations, out_dtype=F32)
        near(dev.fetch(got), expected, f"{activations} x {weight}", 1e-3 if narrow else 1e-5)


def test_svdquant_linear(dev: Any) -> None:
    m, n, k, r = 130, 70, 320, 32
    x, w, smooth = normal(21, m, k), side(22, "nvfp4", n, k), np.abs(normal(23, k)) + oracles.dtype_of(BF16).type(0.5)
    arrays = (x, w.data, tiles(w).ravel(), np.full((1,), 2.0**-8, np.float32), smooth, normal(24, k, r), normal(25, n, r))
    rest = (np.full((1,), 300.0, np.float32), normal(26, n))
    expected = cugemm.svdquant_linear(*arrays, *rest).astype(np.float32)
    got = dev.fetch(cugemm.svdquant_linear(*map(dev.put, (*arrays, *rest)))).astype(np.float32)
    step = np.spacing(np.abs(expected).max().astype(oracles.dtype_of(BF16))).astype(np.float32)
    assert (np.abs(got - expected) <= 2 * step).all()  # d and the result are rounded to bfloat16 after sums in another order
