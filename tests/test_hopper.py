"""kernels/hopper.cu on the CPU: in the emulator against the oracles, with every way to cut the work; what it takes; its tensor maps."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated
import format_oracles as formats
import grouped_cases as cases
import ml_dtypes
import numpy as np
import oracles
import pytest
from emulated import emulated as emulate
from gpu_arrays import delayed
from oracles import Array
from test_emulated import NUMPY, operand, views

import cugemm
from cugemm import NoKernelError, Quantized, Spec, arch, driver, launch, packed, select
from cugemm.catalog import Step, TensorMap, hopper, portable, skinny, swap_ab
from cugemm.catalog.hopper import Config, _Operand
from cugemm.problem import BUCKETS, OUT

emulating = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@contextmanager
def chosen(config: Config, clusters: int = 3) -> Iterator[None]:
    """This config, with so few clusters that each has several tiles."""
    usual = hopper.Hopper.candidates

    def candidates(self: Any, problem: Any, device: Any) -> tuple[Config, ...]:
        tiles = hopper._tiles(problem, config)
        return (config._replace(clusters=tiles if config.split > 1 else min(tiles, clusters)),)

    hopper.Hopper.candidates = candidates  # type: ignore[method-assign]
    try:
        yield
    finally:
        hopper.Hopper.candidates = usual  # type: ignore[method-assign]


def multiply(config: Config, x: Any, w: Any, out: Array, *, seed: int = 1, eager: bool = False, **options: Any) -> None:
    with chosen(config), emulate(seed=seed, eager=eager) as ran:
        cugemm.linear(x, w, out=out, backend="hopper", **options)
    assert ran == ["hopper"]


#  columns, warpgroups, stages, share, split, clusters, lines, apart
CASES = (
    ("bf16", "bf16", (70, 40, 200), (32, 1, 3), "bfloat16", "fast"),
    ("fp16", "fp16", (130, 168, 264), (64, 2, 4, 2), "float32", "fast"),
    ("bf16", "bf16", (300, 168, 664), (64, 2, 4, 2, 1, 1, 2), "float16", "fast"),
    ("bf16", "bf16", (128, 300, 64), (256, 2, 3), "bfloat16", "fast"),
    ("fp16", "fp16", (257, 200, 320), (128, 2, 3, 2, 1, 1, 2, True), "float16", "fast"),
    ("bf16", "bf16", (65, 130, 2000), (128, 1, 4, 1, 8), "bfloat16", "fast"),
    ("fp16", "fp16", (100, 70, 1400), (64, 2, 4, 1, 4), "float32", "promoted"),
    ("e4m3", "e5m2", (300, 130, 400), (48, 2, 3, 1, 1, 1, 1, True), "float16", "fast"),
    ("e5m2", "e4m3", (64, 16, 2064), (16, 1, 8), "bfloat16", "fast"),
    ("e5m2", "e5m2", (130, 100, 1200), (32, 2, 4, 1, 2), "bfloat16", "promoted"),
    ("fp8_row", "fp8_row", (300, 130, 640), (48, 2, 4, 2, 1, 1, 2), "float16", "promoted"),
    ("fp8_tensor", "fp8_row", (200, 230, 272), (176, 2, 3), "bfloat16", "fast"),
    ("fp8_group", "fp8_block", (130, 330, 400), (48, 2, 3), "bfloat16", "promoted"),
    ("fp8_group", "fp8_block", (130, 570, 1040), (192, 2, 4, 2, 1, 1, 2), "float32", "fast"),
    ("fp8_group", "fp8_block", (257, 260, 1152), (128, 2, 3, 2), "bfloat16", "fast"),
    ("fp8_group", "fp8_block", (300, 570, 1040), (256, 2, 3, 2), "bfloat16", "fast"),
    ("fp8_row", "fp8_tensor", (130, 296, 400), (256, 2, 4), "float32", "promoted"),
    ("fp8_group", "fp8_block", (70, 470, 2000), (160, 1, 4, 1, 2), "bfloat16", "promoted"),
    ("fp8_group", "fp8_tensor", (70, 200, 384), (112, 2, 3), "float16", "fast"),
    ("fp8_row", "fp8_block", (70, 200, 384), (144, 1, 3), "bfloat16", "fast"),
    ("bf16", "bf16", (500, 168, 664), (64, 2, 4, 2, 1, 1, 1, True), "bfloat16", "fast"),
    ("fp8_row", "fp8_row", (700, 296, 400), (128, 2, 3, 2, 1, 1, 2, True), "float16", "fast"),
    ("fp16", "fp16", (200, 130, 1000), (48, 2, 4, 1, 1, 1, 1, True), "float32", "fast"),
)  # fmt: skip


@emulating
@pytest.mark.parametrize("number", range(len(CASES)))
def test_products(number: int) -> None:
    a_name, b_name, (m, n, k), config, dtype, accumulate = CASES[number]
    pair = formats.make(number, m, n, k, a_name, b_name, exact=True, bias=number % 3 > 0)
    for eager in (False, True):
        out = oracles.poison((m, n), dtype)
        multiply(Config(*config), operand(pair.a), operand(pair.b), out, seed=number, eager=eager, bias=pair.bias, accumulate=accumulate)
        formats.check(pair, out, dtype)


@emulating
@pytest.mark.parametrize("majors", [("mn", "k"), ("k", "mn"), ("mn", "mn")], ids="-".join)
@pytest.mark.parametrize("shape", [(64, 1, 3), (128, 2, 4, 2), (128, 2, 3, 2, 1, 1, 1, True), (64, 2, 4, 1, 2)], ids=str)
@pytest.mark.parametrize(("m", "n"), [(136, 200), (131, 203)])
def test_majors(m: int, n: int, shape: tuple[int, ...], majors: tuple[str, str]) -> None:
    """16-bit operands contiguous along m or n go as they are, in lines that begin at multiples of 16 bytes."""
    pair = formats.make(3, m, n, 664, "bf16", "bf16", exact=True)
    x, w = (
        np.pad(v.data, ((0, -len(v.data) % 8), (0, 0))).T.copy().T[: len(v.data)] if major == "mn" else v.data
        for v, major in zip(pair[:2], majors, strict=True)
    )
    out = oracles.poison((m, n), "bfloat16")
    multiply(Config(*shape), x, w, out)
    formats.check(pair, out, "bfloat16")


TRANSPOSED = (
    ("e4m3", "e5m2", (48, 64, 80), "b", (16, 1, 3), ()),
    ("e5m2", "e5m2", (144, 208, 400), "ab", (48, 2, 3), ()),
    ("fp8_row", "fp8_tensor", (304, 272, 272), "a", (128, 2, 4, 2, 1, 1, 2), ()),
    ("e4m3", "e4m3", (48, 16, 336), "ab", (32, 1, 3), (3,)),
    ("fp8_group", "fp8_block", (144, 272, 400), "ab", (48, 2, 3), ()),
)


def laid(pair: formats.Pair, turned: str) -> tuple[Any, Any]:
    """Its operands as matmul takes them; those of the roles in `turned` contiguous along m or n."""
    a, b = (
        x._replace(data=np.ascontiguousarray(x.data.swapaxes(-1, -2)).swapaxes(-1, -2)) if role in turned else x
        for role, x in zip("ab", pair[:2], strict=True)
    )
    x, w = operand(a), operand(b)
    return x, w.T if isinstance(w, Quantized) else w.swapaxes(-1, -2)


@emulating
@pytest.mark.parametrize("number", range(len(TRANSPOSED)))
def test_fp8_contiguous_along_m_or_n(number: int) -> None:
    """Transposed by a launch ahead, which explain shows."""
    *kinds, (m, n, k), turned, config, batch = TRANSPOSED[number]
    pair = formats.make(number, m, n, k, *kinds, exact=True, batch=batch)
    x, w = laid(pair, turned)
    with chosen(Config(*config, turned=turned)), emulate(seed=number, eager=number % 2 == 0) as ran:
        out = cugemm.matmul(x, w, backend="hopper")
    assert ran == ["transpose"] * len(turned) + ["hopper"]
    formats.check(pair, out, "bfloat16")


WIDENED = (
    ("e4m3", "e5m2", (70, 40, 208), "", (32, 1, 3), ()),
    ("fp8_row", "fp8_tensor", (144, 208, 400), "b", (64, 2, 3), ()),
    ("e5m2", "e4m3", (272, 144, 80), "ab", (128, 2, 3, 2), ()),
    ("e4m3", "e4m3", (48, 16, 336), "a", (16, 1, 3), (3,)),
    ("e4m3", "e5m2", (130, 304, 208), "b", (256, 2, 3), ()),
)


@emulating
@pytest.mark.parametrize("number", range(len(WIDENED)))
def test_fp8_with_sums_of_fp32(number: int) -> None:
    """Both operands go to fp16 first, in the layout they have; products of random values are as exact as those of 16 bits."""
    *kinds, (m, n, k), turned, config, batch = WIDENED[number]
    for exact in (True, False):
        pair = formats.make(number, m, n, k, *kinds, exact=exact, batch=batch)
        x, w = laid(pair, turned)
        with chosen(Config(*config, turned="ab", wide=True)), emulate(seed=number, eager=exact) as ran:
            out = cugemm.matmul(x, w, out_dtype="float32", backend="hopper", accumulate="fp32")
        assert ran == ["widen", "widen", "hopper"]
        formats.check(pair, out, "float32")


@emulating
@pytest.mark.parametrize("element", [2, 3])
def test_every_code_widened(element: int) -> None:
    """Lines of any length; NaN stays NaN, infinity infinity."""
    codes = np.arange(256, dtype=np.uint8)
    dtype = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)[element - 2]
    for length in (256, 249, 5):
        source = np.zeros((3, 256), np.uint8)
        source[:, :length] = codes[:length]
        x = _Operand("a", 0, 0, 3, 1, (0, 256, 1), "k", 0, 1)
        call = SimpleNamespace(k=length, problem=SimpleNamespace(a=("e4m3", "e5m2")[element - 2]))
        step, wide, size = hopper._widen(x, call, 1, 16)  # type: ignore[arg-type]
        pitch = -(-length // 8) * 8
        assert wide == x._replace(pointer=1, offset=16, strides=(0, pitch, 1)) and size == 6 * pitch
        target = np.full(16 + size, 0xA5, np.uint8)
        memory = tuple((y.ctypes.data, y.nbytes) for y in (source, target))
        emulated._launch(step, [source.ctypes.data, target.ctypes.data], [], "sm_90a", 1, False, memory=memory)
        got = target[16:].view(np.float16).reshape(3, pitch)[:, :length]
        np.testing.assert_array_equal(got, np.broadcast_to(codes[:length].view(dtype).astype(np.float16), got.shape))
        assert (target[:16] == 0xA5).all()


@emulating
def test_rows_that_tma_cannot_read() -> None:
    """Of a, at odd places, apart, overlapping, transposed: copied first, in zeros up to a multiple of 16 bytes."""
    for number, kinds in enumerate((("fp16", "fp16"), ("e4m3", "e5m2"), ("fp8_row", "fp8_tensor"))):
        pair = formats.make(number, 70, 40, 272, *kinds, exact=True)
        x, w = operand(pair.a), operand(pair.b)
        data = pair.a.data
        room = np.zeros((70, 2, 547), data.dtype)
        room[:, 0, 1:545:2] = data
        for lying in (room[:, 0, 1:545:2], np.asfortranarray(np.concatenate([data, data[:1]]))[:70]):
            given = lying if x is data else Quantized(lying, x.scale, x.format)
            with chosen(Config(32, 1, 3, copied=True)), emulate(seed=number) as ran:
                out = cugemm.linear(given, w, out_dtype="bfloat16", backend="hopper")
            assert ran == ["align", "hopper"]
            formats.check(pair, out, "bfloat16")
    pair = formats.make(9, 70, 40, 272, "bf16", "bf16", exact=True)
    once = pair.a.values[:1]
    over = np.broadcast_to(pair.a.data[:1], (70, 272))
    with chosen(Config(32, 1, 3, copied=True)), emulate() as ran:
        out = cugemm.linear(over, pair.b.data, backend="hopper")
    assert ran == ["align", "hopper"]
    wide = pair.a._replace(data=over, values=np.broadcast_to(once, (70, 272)))
    oracles.check_exact(formats.answer(wide, pair.b), out, "bfloat16")


@emulating
def test_transpose() -> None:
    """Any size and pitch, every byte, zeros up to a multiple of 16."""
    rng = np.random.default_rng(1)
    for lines, length, pitch in ((1, 1, 16), (17, 130, 144), (128, 128, 128), (130, 257, 288), (300, 15, 16), (15, 300, 304)):
        source = rng.integers(1, 256, (2, lines, pitch), np.uint8)
        x = _Operand("b", 0, 0, length, 2, (lines * pitch, 1, pitch), "mn", 0, 1)
        step, turned, size = hopper._transpose(x, SimpleNamespace(k=lines), 1, 32)  # type: ignore[arg-type]
        wide = -(-lines // 16) * 16
        assert size == 2 * length * wide
        assert turned == x._replace(pointer=1, offset=32, strides=(length * wide, wide, 1), major="k")
        target = np.full(32 + 2 * length * wide, 0xA5, np.uint8)
        memory = tuple((y.ctypes.data, y.nbytes) for y in (source, target))
        emulated._launch(step, [source.ctypes.data, target.ctypes.data], [], "sm_90a", 1, False, memory=memory)
        right = np.zeros((2, length, wide), np.uint8)
        right[:, :, :lines] = source[:, :, :length].swapaxes(1, 2)
        assert (target[32:].reshape(right.shape) == right).all() and (target[:32] == 0xA5).all()


@emulating
def test_layouts_of_the_result() -> None:
    """Odd addresses, transposed, gaps: only whole lines of 16 bits go through matrices of the store instruction."""
    pair = formats.make(4, 70, 44, 72, "fp16", "fp16", exact=True)
    for dtype, number in itertools.product(("bfloat16", "float32"), range(3)):
        out = views(oracles.poison((70, 44), dtype))[number]
        multiply(Config(32, 1, 3), pair.a.data, pair.b.data, out, seed=number)
        formats.check(pair, np.ascontiguousarray(out), dtype)


@emulating
@pytest.mark.parametrize("config", [(64, 1, 3), (128, 2, 4, 1, 2, 1, 2), (64, 2, 3, 2, 1, 1, 1, True)], ids=str)
@pytest.mark.parametrize("n", [65, 170, 191])
def test_what_lies_beside_the_result(n: int, config: tuple[int, ...]) -> None:
    """A box ends with the tensor on whole pieces of 16 bytes only: nothing of the rest of the last one may change."""
    pair = formats.make(n, 150, n, 1104, "bf16", "bf16", exact=True)
    pitch = -(-n // 8) * 8 + 8
    memory = oracles.poison((152, pitch), "bfloat16")
    kept = memory.copy()
    multiply(Config(*config), pair.a.data, pair.b.data, memory[1:151, :n], seed=n)
    formats.check(pair, np.ascontiguousarray(memory[1:151, :n]), "bfloat16")
    kept[1:151, :n] = memory[1:151, :n]
    assert (memory.view(np.uint16) == kept.view(np.uint16)).all()


@emulating
@pytest.mark.parametrize("kinds", [("bf16", "bf16"), ("fp8_group", "fp8_block")], ids="-".join)
def test_batches(kinds: tuple[str, str]) -> None:
    """Each product by itself, by one matrix on either side, and by counts of rows."""
    pair = formats.make(5, 70, 40, 272, *kinds, exact=True, batch=(3,))
    x, w = operand(pair.a), operand(pair.b)
    with chosen(Config(16, 1, 3)), emulate() as ran:
        out = cugemm.matmul(x, w.mT if kinds[0] == "bf16" else w.T, backend="hopper")
    assert ran == ["hopper"]
    formats.check(pair, out, "bfloat16")
    if kinds[0] != "bf16":
        return
    one = formats.make(6, 70, 40, 272, *kinds, exact=True)
    for a, b in ((pair.a, one.b), (one.a, pair.b)):
        x, w = (np.broadcast_to(v.data, (3, *v.data.shape[-2:])) for v in (a, b))
        with chosen(Config(16, 1, 3, 2)), emulate() as ran:
            out = cugemm.matmul(x, w.mT, backend="hopper")
        assert ran == ["hopper"]
        wide_a, wide_b = (v._replace(data=d, values=np.broadcast_to(v.values, d.shape)) for v, d in ((a, x), (b, w)))
        oracles.check_exact(formats.answer(wide_a, wide_b), out, "bfloat16")
    counts = np.array([70, 0, 37], np.int32)
    with chosen(Config(32, 1, 3)), emulate() as ran:
        out = cugemm.grouped_matmul(pair.a.data, pair.b.data, counts=counts, backend="hopper")
    assert ran[-1] == "hopper"
    oracles.check_exact(formats.answer(pair.a, pair.b, counts=counts), np.where(np.isnan(out), 0, out).astype(out.dtype), "bfloat16")


@pytest.fixture
def preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it can, in place of other kernels, with one device value out of range as good as another."""
    for kernel in (portable.Portable, skinny.Skinny, swap_ab.SwapAB):
        monkeypatch.setattr(kernel, "cost", lambda self, problem, config, device: 1e9)


SEGMENT_SHAPES = (
    (32, 1, 3),
    (64, 2, 3, 1, 1, 1, 1, True),
    (64, 2, 3, 2, 1, 1, 2),
    (16, 2, 3, 2),
    (128, 2, 3, 1, 1, 1, 1, True),
    (32, 1, 4, 1, 2),
)


@emulating
@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize("pair", [("bf16", "bf16"), ("e4m3", "e5m2"), ("fp8_group", "fp8_block")], ids="-".join)
@pytest.mark.parametrize("kind", ["indptr", "counts", "masked"])
def test_segments(kind: str, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = cases.sizes
    monkeypatch.setattr(
        cases, "sizes", lambda rng, **even: sizes(rng)._replace(m=int(rng.integers(1, 300)), k=16 * int(rng.integers(1, 30)))
    )
    for seed in range(6):
        if SEGMENT_SHAPES[seed][7:] and pair[0] == "fp8_group":
            continue  # which promotes
        with chosen(Config(*SEGMENT_SHAPES[seed])), emulate(seed=seed, eager=seed % 2 == 1) as ran:
            cases.MATMULS[kind](NUMPY, seed, *pair, ("int32", "int64")[seed % 2])
        assert set(ran) <= {"hopper", "segments"} and "hopper" in ran


@emulating
def test_no_segments() -> None:
    """Nothing to multiply, and no matrix for a tensor map of the result: zeros."""
    x, w = np.ones((300, 64), oracles.dtype_of("bfloat16")), np.ones((2, 40, 64), oracles.dtype_of("bfloat16"))
    with chosen(Config(32, 1, 3)), emulate() as ran:
        out = cugemm.grouped_matmul(x, w, indptr=np.zeros(1, np.int32), backend="hopper")
    assert "hopper" not in ran and out.shape == (300, 40) and not out.any()


@emulating
@pytest.mark.usefixtures("preferred")
def test_wrong_device_values_select_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.values, "check", lambda *given: None)  # which would refuse them in host memory
    sizes, operands = cases.sizes, cases.operands
    monkeypatch.setattr(cases, "sizes", lambda rng, **even: sizes(rng)._replace(k=16 * int(rng.integers(1, 30))))
    monkeypatch.setattr(cases, "operands", lambda rng, size, a, b, *rest, **lead: operands(rng, size, a, a, *rest, **lead))
    for seed in range(3):
        with chosen(Config(*SEGMENT_SHAPES[seed])), emulate(seed=seed) as ran:
            cases.wild(NUMPY, seed, "int32")
        assert {"hopper"} < set(ran) - {"segments"}  # rows in order, and by index


@emulating
@pytest.mark.parametrize("config", [(48, 2, 4, 2, 1, 1, 2), (64, 1, 3, 2), (32, 2, 4, 1, 1, 1, 2, True)], ids=str)
def test_any_size(config: tuple[int, ...]) -> None:
    """One build, tails of every axis."""
    rng = np.random.default_rng(config[0])
    for seed in range(12):
        m, n, k = (int(x) for x in (rng.integers(1, 300), rng.integers(1, 200), 8 * rng.integers(1, 40)))
        pair = formats.make(seed, m, n, k, "bf16", "bf16", exact=True)
        out = oracles.poison((m, n), "bfloat16")
        multiply(Config(*config), pair.a.data, pair.b.data, out, seed=seed, eager=seed % 2 == 0)
        formats.check(pair, out, "bfloat16")


@emulating
def test_factors_and_random_values() -> None:
    pair = formats.make(8, 100, 90, 1056, "fp8_row", "fp8_row", exact=False, alpha=0.37, bias=True)
    out = oracles.poison((100, 90), "float32")
    x, w = operand(pair.a), operand(pair.b)
    with chosen(Config(48, 2, 4)), emulate() as ran:
        cugemm.mm_fp8(x.data, w.data.T, a_scale=x.scale, b_scale=w.scale.T, alpha=0.37, out=out, backend="hopper", accumulate="promoted")
    assert ran == ["hopper"]
    oracles.check_random(formats.answer(pair.a, pair.b, alpha=0.37, random_signs=True), out, "float32")


@emulating
def test_delays_change_no_bit() -> None:
    pair = formats.make(9, 130, 100, 520, "bf16", "bf16", exact=False)
    wanted = oracles.poison((130, 100), "float32")
    multiply(Config(32, 2, 3, 2, 1, 1, 2), pair.a.data, pair.b.data, wanted)
    for seed in range(2):
        out = oracles.poison((130, 100), "float32")
        with delayed(3):
            multiply(Config(32, 2, 3, 2, 1, 1, 2), pair.a.data, pair.b.data, out, seed=seed, eager=seed == 1)
        oracles.check_bits(out, wanted, f"seed {seed}")


BOXES = Config(64, 2, 3, lines=2)


@emulating
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("number", [0, 1, 2, 5, 6])
def test_weights_ahead_of_the_wait(number: int, static: bool) -> None:
    """Static ones may come before the kernel ahead has ended; all else is poison until then."""
    a_name, b_name, (m, n, k), config, dtype, _ = CASES[number]
    pair = formats.make(number, m, n, k, a_name, b_name, exact=True)
    for eager in (False, True):
        out = oracles.poison((m, n), dtype)
        multiply(Config(*config), operand(pair.a), operand(pair.b), out, seed=number, eager=eager, pdl=True, static_weights=static)
        formats.check(pair, out, dtype)


FAULTS = {
    "brings a ahead of the wait": ("    __syncwarp();\n    wait_for_predecessor();\n", "    __syncwarp();\n", BOXES),
    "reads ahead of TMA": ("mbarrier_wait(ring.full(ring.slot), ring.phase);", "", BOXES),
    "overwrites what is read": ("if (around) mbarrier_wait", "if (false) mbarrier_wait", BOXES),
    "gives back too early": ("if (step > 0) release(ring, before, at);", "release(ring, ring.slot, at);", BOXES),
    "stores sums under way": ("wgmma_wait<0>();", "", BOXES),
    "stores lines that others write": ("__syncwarp();\n            store(block);", "store(block);", Config(32, 2, 3)),
    "stores boxes that others write": ("fence_async_proxy();\n            __syncwarp();", "fence_async_proxy();", BOXES),
    "stores boxes that TMA does not see": ("fence_async_proxy();\n            __syncwarp();", "__syncwarp();", BOXES),
    "overwrites boxes": ("if (at.lane == 0) wait_for_boxes<LINES - 1>();", "", BOXES),
    "ends before boxes do": ("wait_for_boxes<0>();  // lines must", "wait_for_boxes<1>();  // lines must", BOXES),
    "overwrites factors": ("mbarrier_wait(ring.factors_empty(tile), phase);", "", BOXES),
    "skips too few steps": ("ring.skip(steps.count);", "ring.skip(steps.count - 1);", BOXES._replace(apart=True)),
}
"""What is left out of the kernel, what is there instead, and a config that shows it."""


@emulating
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_show(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each of the waits is needed, in one of a few schedules at least."""
    old, new, config = FAULTS[fault]
    sources = tmp_path / "kernels"
    shutil.copytree(emulated._sources(), sources, ignore=shutil.ignore_patterns("*.so"))
    text = (sources / "hopper.cu").read_text()
    assert old in text
    (sources / "hopper.cu").write_text(text.replace(old, new, 1))
    monkeypatch.setattr(emulated, "_sources", lambda: sources)
    monkeypatch.setattr(emulated, "_library", functools.cache(emulated._library.__wrapped__))
    pair = formats.make(9, 330, 136, 1168, "fp8_row", "fp8_row", exact=True)
    x, w = operand(pair.a), operand(pair.b)

    def right(seed: int, eager: bool) -> bool:
        out = oracles.poison((330, 136), "bfloat16")
        try:
            multiply(config, x, w, out, seed=seed, eager=eager)
            formats.check(pair, out, "bfloat16")
        except AssertionError:
            return False
        return True

    assert not all(right(seed, eager) for seed, eager in itertools.product(range(3), (False, True)))


# --- what is taken ----------------------------------------------------------------------------------------------------------------------

BF16, FP16, E4M3 = (Spec((256, 512), dtype) for dtype in ("bfloat16", "float16", "float8_e4m3fn"))


@pytest.mark.parametrize(
    ("args", "options", "reason"),
    [
        ((BF16, FP16), {}, "multiplies two operands of one 16-bit type, or two of float8"),
        ((BF16, E4M3), {}, "multiplies two operands of one 16-bit type, or two of float8"),
        ((E4M3, E4M3), {"batch_invariant": True, "accumulate": "fp32"}, "with batch_invariant multiplies as tensor cores add up"),
        ((Spec((256, 511), "bfloat16"), Spec((256, 511), "bfloat16")), {}, "reads rows in order, in 16-byte pieces"),
        ((Spec((256, 0), "bfloat16"), Spec((256, 0), "bfloat16")), {}, "reads rows in order, in 16-byte pieces"),
    ],
)
def test_refusals(args: tuple[Any, ...], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(NoKernelError, match=re.escape(f"hopper: {reason}")):
        cugemm.explain(cugemm.linear, *args, backend="hopper", **options)


def test_refusals_of_formats() -> None:
    def quantized(name: str) -> Quantized:
        return cugemm.quantize(np.zeros((256, 512), np.float32), name)

    for a, b, reason in (
        ("mxfp8", "mxfp8", "multiplies values as they are stored"),
        ("int8_row", "int8_row", "multiplies two operands of one 16-bit type, or two of float8"),
        ("fp8_group", "fp8_group", "scales sums of 128 fp8 values along k only, of 128 columns"),
    ):
        x, w = quantized(a), quantized(b)
        with launch.recording() as calls:
            cugemm.linear(x, w)
        problem = calls[0].call.problem._replace(backend="hopper", arch="sm_90a")
        assert hopper.KERNEL.refuse(problem) == reason
    x = np.zeros((256, 512), oracles.dtype_of("bfloat16"))
    rows = np.lib.stride_tricks.as_strided(x, x.shape, (16, 2))
    of_b = "reads rows in order, in 16-byte pieces, that do not overlap"
    of_a = "reads rows in 16-byte pieces, that do not overlap, and copies others only of single products, where there is memory"
    for a, b, reason in (
        (np.broadcast_to(x[:1], x.shape), x, of_a),
        (x, np.broadcast_to(x[:1], x.shape), of_b),
        (rows, x, of_a),
        (x, np.broadcast_to(x[0], (512, 512)).T, of_b),
    ):
        with launch.recording() as calls:
            cugemm.linear(a, b)
        problem = calls[0].call.problem._replace(backend="hopper", arch="sm_90a")
        assert hopper.KERNEL.refuse(problem) == (of_b if reason is of_b else None)
        assert hopper.KERNEL.refuse(problem._replace(scratch=False)) == reason
    with launch.recording() as calls:
        cugemm.matmul(E4M3, Spec((512, 256), "float8_e4m3fn"))
    problem = calls[0].call.problem._replace(backend="hopper", arch="sm_90a")
    assert hopper.KERNEL.refuse(problem) is None
    reason = "multiplies fp8 contiguous along k, with sums of 14 bits, and has no memory to prepare others"
    assert hopper.KERNEL.refuse(problem._replace(scratch=False)) == reason
    assert hopper.KERNEL.refuse(problem._replace(b_major="k", accumulate="fp32", scratch=False)) == reason
    reason = "adds up fp8 products in tensor cores, which keep 14 bits, where floats scale them along k"
    assert hopper.KERNEL.refuse(problem._replace(b_major="k", accumulate="fp32", scale_block=128)) == reason
    with pytest.raises(NoKernelError, match="hopper: needs sm_90a"):
        select.choose(problem_of(256, 512, 512)._replace(arch="sm_100a"), arch.H100)
    with pytest.raises(NoKernelError, match="hopper: reads rows in order, in 16-byte pieces"):
        cugemm.explain(cugemm.grouped_matmul, BF16, Spec((3, 512, 512), "bfloat16"), indices=Spec((256,), "int32"), backend="hopper")


def test_many_rows_take_it() -> None:
    assert "-> hopper" in cugemm.explain(cugemm.linear, BF16, BF16)
    assert "-> skinny" in cugemm.explain(cugemm.linear, Spec((1, 4096), "bfloat16"), Spec((4096, 4096), "bfloat16"))
    text = cugemm.explain(cugemm.matmul, E4M3, Spec((512, 256), "float8_e4m3fn"), backend="hopper")
    assert re.search("-> hopper .*, b transposed first$", text, re.MULTILINE)


# --- candidates, cost, maps -------------------------------------------------------------------------------------------------------------


def problem_of(m: int, n: int, k: int, dtype: str = "bfloat16", accumulate: str = "fast") -> Any:
    with launch.recording() as calls:
        cugemm.linear(Spec((m, k), dtype), Spec((n, k), dtype), out_dtype="bfloat16", accumulate=accumulate)
    return calls[0].call.problem._replace(backend="hopper", arch="sm_90a")


@pytest.mark.parametrize("kind", [("bfloat16", "fast"), ("float8_e4m3fn", "fast"), ("float8_e4m3fn", "promoted")], ids="-".join)
def test_candidates(kind: tuple[str, str]) -> None:
    """Few, and each fits; none has more registers of sums than a thread has."""
    for m, (n, k) in itertools.product(BUCKETS, ((4096, 4096), (2112, 7168), (7168, 16384), (16, 64), (100, 5000))):
        problem = problem_of(m, n, k, *kind)
        configs = hopper.KERNEL.candidates(problem, arch.H100)
        assert 0 < len(configs) <= 16
        for c in configs:
            lot = 0 if kind[1] == "fast" else c.columns // 2 // (2 if c.columns > 192 else 1)
            sums = (1 + c.apart) * c.columns // 2 + lot
            assert hopper.smem(problem, c) <= arch.get("sm_90a").max_smem and c.stages >= 3 and sums <= 192
            assert c.clusters * c.cluster <= arch.H100.sm_count and c.cluster in (1, 2, 4, 8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_more_work_is_never_predicted_faster(dtype: str) -> None:
    def best(m: int, n: int, k: int) -> float:
        return select.choose(problem_of(m, n, k, dtype), arch.H100).best.us

    for m in (64, 256, 4096):
        for n in (128, 1024, 4096, 28672):
            assert best(m, n, 4096) <= best(m, 2 * n, 4096) * 1.001
        assert best(m, 4096, 1024) <= best(m, 4096, 4096) * 1.001 <= best(m, 4096, 16384) * 1.002
    times = [best(m, 4096, 4096) for m in BUCKETS]
    assert all(low <= high * 1.01 for low, high in itertools.pairwise(times)), times


def test_tiles_of_large_products() -> None:
    """128 x 256 by CTAs in pairs, which is what the arithmetic of shared memory and L2 asks for; sums apart leave room for half."""
    best = select.choose(problem_of(8192, 8192, 8192), arch.H100).best.config
    assert (best.rows, best.columns, best.cluster) == (128, 256, 2)
    best = select.choose(problem_of(8192, 8192, 8192, "float8_e4m3fn", "promoted"), arch.H100).best.config
    assert best.rows * best.columns <= 256 * 128
    assert select.choose(problem_of(128, 4096, 14336), arch.H100).best.config.split > 1


def maps_of(config: Config, x: Any, w: Any) -> tuple[TensorMap, ...]:
    with launch.recording() as calls:
        cugemm.matmul(x, w, backend="hopper")
    (step,) = hopper.KERNEL.steps(calls[0].call, config)
    assert isinstance(step, Step) and step.threads == config.threads and step.grid == config.clusters * config.cluster
    return step.maps


def test_tensor_maps() -> None:
    """The contiguous axis first, bytes between lines and matrices, boxes of what one CTA brings."""
    config = Config(96, 2, 4, 2)
    assert maps_of(config, Spec((200, 328), "bfloat16"), Spec((328, 72), "bfloat16")) == (
        TensorMap(0, 2, (328, 200, 1), (656, 131200), (64, 128, 1)),
        TensorMap(1, 2, (72, 328, 1), (144, 47232), (64, 32, 1)),
        TensorMap(OUT, 2, (72, 200, 1), (144, 28800), (64, 16, 1)),
    )
    x = np.zeros((5, 40, 400), np.uint8).view(oracles.dtype_of("float8_e4m3fn"))[1:4, :, :336]
    w = np.zeros((64, 336), oracles.dtype_of("float8_e4m3fn"))
    assert maps_of(config, x, np.broadcast_to(w, (3, 64, 336)).mT) == (
        TensorMap(0, 1, (336, 40, 3), (400, 16000), (128, 40, 1)),
        TensorMap(1, 1, (336, 64, 1), (336, 21504), (128, 48, 1)),
        TensorMap(OUT, 2, (64, 40, 3), (128, 5120), (64, 16, 1)),
    )
    one = maps_of(Config(32, 1, 3), np.zeros((1, 24), oracles.dtype_of("bfloat16")), np.zeros((24, 1), oracles.dtype_of("bfloat16")))
    assert one[0] == TensorMap(0, 2, (24, 1, 1), (48, 48), (64, 8, 1)), "no rows that are not there but of 8"


def test_maps_are_made_once_for_a_pointer(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []

    def tensor_map(*given: Any) -> bytes:
        made.append(given)
        return bytes([len(made)]) * 128

    monkeypatch.setattr(driver, "tensor_map", tensor_map)
    monkeypatch.setattr(packed.Maps, "_MOST", 3)
    monkeypatch.setattr(driver, "on_device", contextlib.nullcontext)
    maps = packed.Maps(TensorMap(0, 2, (64, 8, 1), (128, 1024), (64, 64, 1)), 2, 576, 0)
    assert [maps[p][0] for p in (16, 32, 16, 48, 32)] == [1, 2, 1, 3, 2]
    assert made[0] == (16, 2, (64, 8, 1), (128, 1024), (64, 64, 1))
    assert maps[64][0] == 4 and len(maps) == 1, "a full table begins again"
    assert maps[72] == bytes(128) and len(made) == 4, "TMA stores nothing there"
