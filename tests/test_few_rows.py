"""The kernels for few rows, on the CPU: formats, rows, sizes off every multiple, every way to cut the work, batches, masks, NaN, bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import format_oracles as formats
import gpu_formats
import numpy as np
import oracles
import pytest
from emulated import emulated as emulate
from format_oracles import FORMATS, Operand
from gpu_formats import ANY, Host
from oracles import Array
from test_emulated import operand
from test_kernels import linear_call

import cugemm
from cugemm import NoKernelError, arch, launch, select
from cugemm.api.common import gemm_options, product
from cugemm.arch import H100
from cugemm.arrays import Numpy
from cugemm.catalog import Step, skinny, swap_ab
from cugemm.catalog.skinny import Config

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

PAIRS = (
    ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "e4m3"), ("fp16", "e4m3"), ("e4m3", "e4m3"), ("e5m2", "e4m3"), ("bf16", "e5m2"),
    ("fp8_row", "fp8_row"), ("fp8_group", "fp8_block"), ("bf16", "fp8_block"), ("bf16", "nvfp4"), ("fp16", "nvfp4_row"), ("e4m3", "nvfp4"),
    ("bf16", "mxfp4"), ("fp8_row", "mxfp8"), ("bf16", "int8_row"), ("bf16", "int4_row"), ("fp16", "int4_g128"), ("bf16", "int8_group"),
    ("fp8_group", "nvfp4"), ("fp8_group", "mxfp8"),
)  # fmt: skip


class Kernel(NamedTuple):
    """One of the two, and configs that differ in everything."""

    name: str
    type: type
    configs: tuple[Any, ...]


PDL = ("", "prefetch", "static")
SKINNY = Kernel(
    "skinny",
    skinny.Skinny,
    tuple(
        Config(tokens, warps, warps_k, row_blocks, stages, split, 1, clusters, PDL[i % 3])
        for i, (tokens, warps, warps_k, row_blocks, stages, split, clusters) in enumerate(
            (
                (1, 4, 1, 1, 2, 1, 2), (2, 4, 4, 1, 3, 1, 1), (4, 8, 2, 2, 3, 1, 2), (8, 4, 2, 1, 4, 1, 1), (16, 4, 2, 2, 2, 1, 3),
                (8, 4, 2, 1, 3, 2, 2), (16, 4, 4, 1, 3, 4, 1), (4, 4, 1, 2, 2, 8, 2), (8, 8, 8, 1, 3, 2, 5), (8, 4, 1, 1, 4, 4, 1),
                (32, 4, 4, 2, 2, 1, 1),
            )
        )
    ),
)  # fmt: skip
SWAP_AB = Kernel(
    "swap_ab",
    swap_ab.SwapAB,
    tuple(
        swap_ab.Config(*shape, 1 + i % 3, PDL[i // 2 % 3])
        for i, shape in enumerate(
            (
                (8, 1, 1, 3, 2, 1), (16, 2, 1, 4, 4, 1), (32, 2, 2, 3, 4, 1), (16, 4, 2, 3, 8, 2), (64, 1, 1, 3, 3, 1), (8, 4, 4, 2, 8, 2),
                (64, 2, 1, 4, 2, 2), (16, 4, 4, 3, 8, 1), (32, 3, 1, 2, 4, 4), (16, 2, 2, 2, 4, 8), (8, 2, 1, 2, 8, 4),
                (128, 2, 1, 2, 2, 1), (128, 1, 1, 2, 2, 2),
                (64, 4, 1, 2, 2, 1), (32, 4, 1, 3, 4, 1), (64, 4, 2, 2, 2, 2), (32, 4, 4, 2, 4, 1), (32, 4, 2, 2, 2, 4),
            )
        )
    ),
)  # fmt: skip
LAYOUTS = ("linear", "128x4", "8x4")
A_LAYOUTS = ("row", "odd row", "column", "gaps", "odd column")
NUMPY = Numpy()
Use = Callable[[Any], None]


@pytest.fixture(params=[SKINNY, SWAP_AB], ids=lambda kernel: kernel.name)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    found: Kernel = request.param
    return found


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """use(config): the kernel that it belongs to has no other."""

    def alone(config: Any) -> None:
        kind = swap_ab.SwapAB if isinstance(config, swap_ab.Config) else skinny.Skinny
        monkeypatch.setattr(kind, "candidates", lambda self, problem, device: (config,))

    return alone


def multiply(kernel: Kernel, a: Operand, b: Operand, case: oracles.Case, seed: int = 1, eager: bool = False, **how: Any) -> Array:
    with emulate(seed=seed, eager=eager) as ran:
        out = gpu_formats.multiply(Host(), a, b, case, backend=kernel.name, **how)
    assert ran == ["segments", kernel.name] * 2 or set(ran) == {kernel.name}, ran
    return out


def stored(name: str, data: Array, scale: Array | None = None, tensor: Array | None = None) -> Operand:
    """The operand of given codes."""
    with np.errstate(all="ignore"):
        return Operand(name, data, scale, tensor, None, formats.values(name, data, scale, tensor))


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=["-".join(pair) for pair in PAIRS])
def test_products(number: int, kernel: Kernel, use: Use) -> None:
    rng = np.random.default_rng(number)
    for i in range(2):
        config = kernel.configs[(3 * number + i) % len(kernel.configs)]
        m = int(rng.integers(config.tokens // 2 + 1, 2 * config.tokens + 1))  # one or two pieces
        n, k = int(rng.integers(1, 150)), 32 * int(rng.integers(1, 40))
        a, b = formats.exact_operand(rng, PAIRS[number][0], (m, k), True), formats.exact_operand(rng, PAIRS[number][1], (n, k), False)
        bias = rng.integers(-8, 9, n).astype(np.float32)
        x, w = operand(a), operand(b, LAYOUTS[(number + i) % 3])
        use(config)
        results: list[Any] = []
        for eager in (False, True):
            out = oracles.poison((m, n), "float32")
            with emulate(seed=number + 7 * eager, eager=eager) as ran:
                cugemm.linear(x, w, bias, out=out, backend=kernel.name)
            assert ran == [kernel.name]
            oracles.check_exact(formats.answer(a, b, bias=bias), out, "float32")
            results.append(out)
        oracles.check_bits(*results)


@pytest.mark.parametrize("kind", ["dense", "batch", "one a", "one b", "masked"])
def test_matrices(kind: str, kernel: Kernel, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged k, bias, alpha, every out, rows of a that lie anyhow, layouts of scales, counts out of range."""
    monkeypatch.setattr(launch.values, "check", lambda *given: None)  # which would refuse those in host memory
    left, right = {"dense": ((), ()), "one a": ((1,), (3,)), "one b": ((3,), (1,))}.get(kind, ((3,), (3,)))
    number = len(kind)
    rng = np.random.default_rng(number)
    for i in range(5):
        name_a, name_b = PAIRS[(4 * i + 5 * number) % len(PAIRS)]
        config = kernel.configs[(3 * i + number) % len(kernel.configs)]
        use(config)
        m, n = int(rng.integers(1, 2 * config.tokens + 1)), int(rng.integers(1, 80))
        k = gpu_formats.even(int(rng.integers(1, 700)), name_a, name_b)
        a = formats.exact_operand(rng, name_a, (*left, m, k), True)
        b = formats.exact_operand(rng, name_b, (*right, n, k), False)
        bias = rng.integers(-8, 9, (3, n) if kind == "masked" and i % 3 == 1 else n).astype(np.float32) if i % 3 else None
        counts = rng.choice([-3, 0, m // 2, m, m + 9], 3) if kind == "masked" else None
        case = formats.answer(a, b, alpha=(1.0, 0.5, -2.0)[i % 3], bias=bias, counts=counts, repro=f"{kind} {i}: {m}, {n}, {k}, {config}")
        how: dict[str, Any] = {} if counts is None else {"segments": "masked", "said": counts.astype(("int32", "int64")[i % 2])}
        dtype = gpu_formats.OUTS[i % 3]
        out = multiply(
            kernel, a, b, case, seed=i, eager=i % 2 == 1, dtype=dtype, bias=bias, out=("row", "column", "odd row", "odd column")[i % 4],
            layouts=(A_LAYOUTS[(i + number) % 5], "row"), scale_layouts=("linear", LAYOUTS[i % 3]), strided_scale=i % 2 == 0,
            alpha_on_device=i % 2 == 0, **how,
        )  # fmt: skip
        oracles.check_exact(case, out, dtype)


def test_public_masked_and_batched(kernel: Kernel, use: Use) -> None:
    use(kernel.configs[5])
    rng = np.random.default_rng(0)
    a, b = formats.exact_operand(rng, "bf16", (3, 11, 208), True), formats.exact_operand(rng, "fp8_block", (3, 40, 208), False)
    counts = np.array([4, 0, 11], np.int32)
    with emulate() as ran:
        masked = cugemm.grouped_matmul(operand(a), operand(b), counts=counts, backend=kernel.name)
        whole = cugemm.matmul(operand(a), operand(b).T, backend=kernel.name)
    assert ran == [kernel.name] * 2
    oracles.check_exact(formats.answer(a, b, counts=counts), masked, "bfloat16")
    oracles.check_exact(formats.answer(a, b), whole, "bfloat16")


# --- where CTAs that cut k are no cluster ------------------------------------------------------------------------------------------------

PARTS = tuple(
    Config(tokens, 4, warps_k, row_blocks, 2, 1, 1, clusters, "", parts)
    for tokens, warps_k, row_blocks, clusters, parts in (
        (1, 1, 1, 2, 2),
        (4, 2, 2, 1, 4),
        (8, 4, 1, 3, 8),
        (16, 2, 1, 2, 2),
        (32, 1, 1, 1, 4),
    )
)


@pytest.mark.parametrize("number", range(0, len(PAIRS), 2), ids=["-".join(pair) for pair in PAIRS[::2]])
def test_parts_of_k(number: int, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sums meet in memory; everything that is done to a sum is done behind that."""
    monkeypatch.setattr(launch.values, "check", lambda *given: None)
    i = number // 2
    kind = ("dense", "batch", "one b", "masked")[i % 4]
    left, right = {"dense": ((), ()), "one b": ((3,), (1,))}.get(kind, ((3,), (3,)))
    rng = np.random.default_rng(number)
    config = PARTS[i % len(PARTS)]
    use(config)
    m, n = int(rng.integers(1, 2 * config.tokens + 1)), int(rng.integers(1, 150))
    k = gpu_formats.even(int(rng.integers(1, 1500)), *PAIRS[number])
    a = formats.exact_operand(rng, PAIRS[number][0], (*left, m, k), True)
    b = formats.exact_operand(rng, PAIRS[number][1], (*right, n, k), False)
    bias = rng.integers(-8, 9, (3, n) if kind == "masked" and i % 2 else n).astype(np.float32) if i % 3 else None
    counts = rng.choice([-3, 0, m // 2, m, m + 9], 3) if kind == "masked" else None
    case = formats.answer(a, b, alpha=(1.0, 0.5, -2.0)[i % 3], bias=bias, counts=counts, repro=f"{kind} {i}: {m}, {n}, {k}, {config}")
    how: dict[str, Any] = {} if counts is None else {"segments": "masked", "said": counts.astype(("int32", "int64")[i % 2])}
    dtype = gpu_formats.OUTS[i % 3]
    with emulate(("sm_80", "compute_89")[i % 2], seed=i) as ran:
        out = gpu_formats.multiply(
            Host(), a, b, case, backend="skinny", dtype=dtype, bias=bias, out=("row", "column", "odd row", "odd column")[i % 4],
            scale_layouts=("linear", LAYOUTS[i % 3]), alpha_on_device=i % 2 == 0, **how,
        )  # fmt: skip
    assert [kernel for kernel in ran if kernel != "segments"] == ["skinny", "reduce"] * 2
    oracles.check_exact(case, out, dtype)


def test_parts_give_the_bits_of_clusters(use: Use) -> None:
    """The cuts decide bits, nothing else."""
    rng = np.random.default_rng(8)
    a, b = formats.random_operand(rng, "bf16", (40, 1184)), formats.random_operand(rng, "nvfp4", (50, 1184))
    w = operand(b)
    for split in (2, 8):
        results = []
        for target, config in (("sm_90a", Config(8, 4, 2, 1, 3, split, 1, 2)), ("sm_86", Config(4, 4, 2, 1, 2, 1, 1, 2, "", split))):
            use(config)
            out = oracles.poison((40, 50), "float32")
            with emulate(target, seed=split) as ran:
                cugemm.linear(a.data, w, out=out, backend="skinny")
            assert ran == (["skinny"] if target == "sm_90a" else ["skinny", "reduce"])
            results.append(out)
        oracles.check_bits(*results)
        oracles.check_random(formats.answer(a, b, random_signs=True), results[0], "float32")


def test_memory_for_parts_of_k(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher makes it behind the call's own workspaces; under XLA nobody asks for any."""
    monkeypatch.setattr(launch, "load", lambda *given: SimpleNamespace(function=0))
    use(PARTS[2])
    x, w, out = (oracles.poison(shape, "bfloat16") for shape in ((3, 5, 64), (3, 24, 64), (3, 5, 24)))
    said = np.array([5, 0, 3], np.int64)
    given: tuple[Any, ...] = (x, w, *[None] * 7, said, None, None, out)
    views = launch.take_views(NUMPY, ANY.roles, given)
    call = ANY.check(views, gemm_options(ANY, None, "skinny", b_axes="nk", segments="masked"))
    bound = launch.Bound(ANY, call, views, NUMPY, 0, select.choose(call.problem._replace(arch="sm_80"), H100))
    assert bound.workspaces == (*call.workspaces, ((8 * 3 * 5 * 24,), "float32")) and len(call.workspaces) == 1
    seen: list[Any] = []
    bound.launches = tuple((lambda _, pointers, __, pick=step.pick: seen.append(pick(pointers))) for step in bound.launches[1:])
    addresses = [view.ptr for view in views if view is not None]
    bound(given, addresses)
    narrow, multiply, add_up = seen
    counts, sums = narrow[1], multiply[2]
    assert multiply[:2] == (x.ctypes.data, w.ctypes.data) and multiply[3:10] == (0,) * 7 and multiply[10] == add_up[10] == counts
    assert add_up[0] == sums and add_up[2] == out.ctypes.data
    assert len({0, counts, sums, *addresses}) == 6 + 1
    assert launch._without_scratch(call).problem == call.problem._replace(scratch=False)


# --- how scales and weights lie ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "mxfp4"])
def test_scales_that_are_not_words(name: str, kernel: Kernel, use: Use) -> None:
    """Every second byte, [blocks, n], at an odd address: linear and in tiles."""
    use(kernel.configs[3])
    rng = np.random.default_rng(0)
    a, b = formats.exact_operand(rng, "bf16", (5, 1056), True), formats.exact_operand(rng, name, (40, 1056), False)
    assert b.scale is not None
    for layout in LAYOUTS:
        scale = formats.tiled(b.scale, layout)
        places = [np.zeros(scale.size + 1, np.uint8)[1:].reshape(scale.shape)]
        if layout == "linear":
            places += [np.zeros((scale.shape[0], 2 * scale.shape[1]), np.uint8)[:, ::2], np.zeros(scale.shape[::-1], np.uint8).T]
        for place in places:
            place[...] = scale
            out = oracles.poison((5, 40), "float32")
            with emulate() as ran:
                w = cugemm.Quantized(b.data, place, name, tensor_scale=b.tensor, scale_layout=layout)
                cugemm.linear(a.data, w, out=out, backend=kernel.name)
            assert ran == [kernel.name]
            oracles.check_exact(formats.answer(a, b), out, "float32")


@pytest.mark.parametrize("kernel", [SKINNY, SWAP_AB, None], ids=["skinny", "swap_ab", "portable"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("matrices", [1, 3])
def test_flat_scales(matrices: int, layout: str, kernel: Kernel | None, use: Use) -> None:
    """Rows of all matrices after each other; one matrix serves every product, and what lies behind its scales is not read."""
    backend = kernel.name if kernel else "portable"
    if kernel:
        use(kernel.configs[4])
    rng = np.random.default_rng(matrices)
    n = 64 if kernel and layout != "linear" else 35  # 32 rows lie in one tile
    a, b = formats.exact_operand(rng, "bf16", (3, 9, 224), True), formats.exact_operand(rng, "nvfp4", (matrices, n, 224), False)
    assert b.scale is not None
    tiled = formats.tiled(b.scale.reshape(-1, b.scale.shape[-1]), layout)
    scale = oracles.poison((3 * tiled.shape[0], tiled.shape[1]), "uint8")[: tiled.shape[0]]
    scale[...] = tiled
    for rows in ("flat", "") if matrices == 1 else ("flat",):
        options = gemm_options(
            ANY, "float32", backend, b_element="e2m1x2", b_scale_element="e4m3", b_scale_layout=layout, b_scale_rows=rows, b_axes="nk"
        )
        with emulate() as ran:
            out = product(ANY, a.data, b.data, options, b_scale=scale, b_tensor=b.tensor)
        assert ran == [backend]
        oracles.check_exact(formats.answer(a, b), out, "float32")


def test_panels(kernel: Kernel, use: Use) -> None:
    rng = np.random.default_rng(0)
    a, b = formats.exact_operand(rng, "e4m3", (5, 640), True), formats.exact_operand(rng, "e4m3", (40, 640), False)
    panels = np.ascontiguousarray(cugemm.prepare_low_latency_gemm_weights(b.data))
    for config in (kernel.configs[1], kernel.configs[5]):
        use(config)
        with emulate() as ran:
            out = cugemm.mm_fp8(a.data, panels, backend=kernel.name)
        assert ran == [kernel.name]
        oracles.check_exact(formats.answer(a, b), out, "bfloat16")


# --- NaN, inf, nothing ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS[:7], ids="-".join)
def test_special_values(pair: tuple[str, str], kernel: Kernel, use: Use) -> None:
    """One NaN or infinity in a row of a or b spoils its row or column of the result, all of it, and no other."""
    rng = np.random.default_rng(3)
    for config in (kernel.configs[4], kernel.configs[5]):
        use(config)
        sides = []
        for name, rows in zip(pair, (12, 40), strict=True):
            x = formats.exact_operand(rng, name, (rows, 272), False)
            codes = x.data.view(f"u{x.data.itemsize}")
            special = np.flatnonzero(~np.isfinite(oracles.TABLES[name]))
            for i, code in enumerate(special[np.linspace(0, len(special) - 1, 6).astype(int)]):
                codes[2 * i % rows, [0, 37, 144, 250, 271, 96][i]] = code
            sides.append(stored(name, x.data))
        a, b = sides
        case = formats.answer(a, b)
        assert np.isnan(case.exact).any() and np.isfinite(case.exact).any()
        out = multiply(kernel, a, b, case, dtype="float32")
        wrong = np.isnan(case.exact) != np.isnan(out)
        assert not wrong.any(), f"NaN in the wrong place: {np.argwhere(wrong)[:5].tolist()}"
        oracles.check_exact(case, out, "float32")


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8", "int4_g128", "int8_group", "fp8_block", "fp8_row"])
def test_special_scales(name: str, kernel: Kernel, use: Use) -> None:
    """NaN codes and infinities in the first, a middle and the last, partial block."""
    kind = FORMATS[name]
    rng = np.random.default_rng(4)
    for config, k in ((kernel.configs[3], 384 + 32), (kernel.configs[5], 640)):
        use(config)
        b = formats.exact_operand(rng, name, (20 if kind.block[0] < 2 else 400, k), False)
        assert b.scale is not None
        scale = b.scale.copy()
        bad = {"e4m3": (0x7F, 0xFF), "e8m0": (0xFF, 0xFF)}.get(kind.scale, (np.nan, np.inf))
        last = scale.shape[1] - 1
        scale[0, 0], scale[1, last], scale[2, last // 2] = bad[0], bad[1], bad[1]
        data = np.full_like(b.data, 0x11) if kind.element in oracles.PACKED else np.ones_like(b.data)  # of one sign: inf stays inf
        b, a = stored(name, data, scale, b.tensor), stored("bf16", np.ones((6, k), oracles.dtype_of("bfloat16")))
        with np.errstate(all="ignore"):
            case = formats.answer(a, b)
        assert not np.isfinite(case.exact).all(axis=0).all() and np.isfinite(case.exact).any()
        oracles.check_exact(case, multiply(kernel, a, b, case, dtype="float32"), "float32")


def test_no_k(kernel: Kernel, use: Use) -> None:
    """Zeros, and the bias, whatever the scales."""
    for config in kernel.configs[::3]:
        use(config)
        w = cugemm.Quantized(np.zeros((30, 0), oracles.dtype_of("float8_e4m3fn")), np.full((30, 1), np.inf, np.float32), "fp8_row")
        bias, out = np.arange(30, dtype=np.float32), oracles.poison((9, 30), "float32")
        with emulate() as ran:
            cugemm.linear(np.zeros((9, 0), oracles.dtype_of("bfloat16")), w, bias, out=out, backend=kernel.name)
        assert ran == [kernel.name]
        oracles.check_bits(out, np.tile(bias, (9, 1)))


# --- bits -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "warps_k", "split"),
    [(("bf16", "bf16"), 2, 1), (("fp8_group", "fp8_block"), 4, 2), (("fp16", "nvfp4"), 4, 2)],
    ids=["bf16", "fp8 blocks", "nvfp4"],
)
def test_bits_of_a_row(pair: tuple[str, str], warps_k: int, split: int, kernel: Kernel, use: Use) -> None:
    """They depend on nothing but the row and how k is cut: not on m, the row's place, other rows, the other cuts, or the schedule."""
    rng = np.random.default_rng(5)
    k, n = 672, 24
    a, b = formats.random_operand(rng, pair[0], (33, k)), formats.random_operand(rng, pair[1], (n, k))
    w = operand(b)

    def rows(first: int, count: int, tokens: int, groups: int = 1, x_stages: int = 4, seed: int = 1) -> Array:
        if kernel is SKINNY:
            use(Config(min(tokens, 32), 4, warps_k, 1, 1 + groups, split, 1, 1))
        else:
            use(swap_ab.Config(max(tokens, 8), min(4, warps_k * groups), warps_k, 3, x_stages, split, 1 + tokens % 3))
        part = a._replace(data=a.data[first : first + count], scale=None if a.scale is None else a.scale[first : first + count])
        out = oracles.poison((count, n), "float32")
        with emulate(seed=seed, eager=seed % 2 == 0):
            cugemm.linear(operand(part), w, out=out, backend=kernel.name)
        return out

    whole = rows(0, 33, 32)
    oracles.check_random(formats.answer(a, b, random_signs=True), whole, "float32")
    cases = (
        (0, 1, 1, 1, 4), (32, 1, 1, 2, 8), (7, 2, 2, 1, 4), (3, 5, 8, 2, 8), (1, 17, 16, 1, 4), (0, 33, 8, 1, 8),
        (0, 33, 128 // warps_k, 1, 4),
    )  # fmt: skip
    for seed, (first, count, *how) in enumerate(cases):
        oracles.check_bits(rows(first, count, *how, seed=seed + 2), whole[first : first + count], f"{count} rows from {first}")


# --- what is refused, and what depends on the target ------------------------------------------------------------------------------------


def test_targets() -> None:
    question = linear_call(8, 4096, 1024, "bfloat16", "bfloat16").problem._replace(backend="skinny", pdl="static")
    with pytest.raises(NoKernelError, match="skinny: needs sm_80 or newer"):
        select.choose(question._replace(arch="sm_75"), H100)
    for target, early, splits in (("sm_80", {""}, {1}), ("compute_89", {""}, {1}), ("sm_90a", {"static"}, {1, 2, 4, 8})):
        parts = {1} if target == "sm_90a" else {1, 2, 4, 8}
        configs = skinny.KERNEL.candidates(question._replace(arch=target), H100)
        assert {config.pdl for config in configs} == early, "a kernel that cannot wait must not begin early"
        assert {config.split for config in configs} == splits
        assert {config.parts for config in configs} == parts
        none = skinny.KERNEL.candidates(question._replace(arch=target, scratch=False), H100)
        assert none and {config.parts for config in none} == {1}, "where nobody can give it memory"


@pytest.mark.parametrize(
    ("weights", "m", "n", "k"), [("bfloat16", 1, 7168, 2048), ("float8_e4m3fn", 1, 6144, 4096), ("nvfp4", 8, 4096, 14336)]
)
def test_launches_that_overlap_begin_as_others_end(weights: str, m: int, n: int, k: int) -> None:
    call = linear_call(m, n, k, "bfloat16", weights)
    target = arch.get("sm_90a")
    chosen = {}
    for pdl in ("", "prefetch", "static"):
        problem = call.problem._replace(arch="sm_90a", backend="skinny", pdl=pdl)
        config = select.choose(problem, H100).best.config
        (step,) = skinny.KERNEL.steps(call._replace(problem=problem), config)
        assert isinstance(step, Step)
        chosen[pdl] = config
        assert step.smem <= target.max_smem
        if pdl:
            assert (config.ctas + 1) * (step.smem + 1024) > target.smem_per_sm, "no room for the next kernel's"
    assert chosen["prefetch"] == chosen[""]._replace(pdl="prefetch")
    assert chosen["static"]._replace(stages=0) == chosen[""]._replace(stages=0, pdl="static"), "the same bits"
    assert (chosen["static"].stages > chosen[""].stages) == (weights != "nvfp4")


def test_swap_ab_needs_products_of_warpgroups() -> None:
    question = linear_call(64, 4096, 1024, "bfloat16", "bfloat16").problem._replace(backend="swap_ab")
    for target in ("sm_80", "compute_89", "sm_100a", "sm_120a"):
        with pytest.raises(NoKernelError, match="swap_ab: needs sm_90a"):
            select.choose(question._replace(arch=target), H100)
    asked = question._replace(arch="sm_90a")
    for wrong in ({"zero": True}, {"a_scale": "e8m0"}, {"b_vector": False}, {"scale_block": 64}, {"m": 1000}, {"batch_invariant": True}):
        assert swap_ab.KERNEL.refuse(asked._replace(**wrong)), wrong


def test_a_launch_that_does_not_wait_shows(use: Use) -> None:
    """The emulator hides what the kernel ahead writes; before sm_90 there is no wait."""
    a, b = (formats.exact_operand(np.random.default_rng(6), "bf16", shape, True) for shape in ((4, 64), (16, 64)))
    use(SKINNY.configs[3]._replace(pdl="prefetch"))
    for target, right in (("sm_90a", True), ("sm_80", False)):
        x, w, out = a.data.copy(), b.data.copy(), oracles.poison((4, 16), "float32")
        with emulate(target):
            cugemm.linear(x, w, out=out, backend="skinny")
        assert np.isfinite(out).all() == right
