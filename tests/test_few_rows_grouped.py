"""The kernels for few rows, on the CPU: products of groups, every entry, segments empty, long or wrong, rows gathered, repeated."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import format_oracles as formats
import grouped_cases as cases
import numpy as np
import oracles
import pytest
from emulated import emulated as emulate
from grouped_cases import ENTRIES, MATMULS, Framework
from test_few_rows import PDL, SKINNY, SWAP_AB, Kernel

import cugemm
from cugemm import NoKernelError, arch, catalog, launch, select
from cugemm.catalog import skinny, swap_ab
from cugemm.catalog.skinny import Config
from cugemm.problem import Problem

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

NUMPY = Framework("numpy", lambda x: x, lambda x: x)
PAIRS = (
    ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp8_row"), ("fp8_row", "fp8_row"), ("fp8_group", "fp8_block"), ("bf16", "nvfp4"),
    ("fp16", "nvfp4_row"), ("bf16", "mxfp4"), ("fp8_row", "mxfp8"), ("bf16", "int4_g128"), ("bf16", "int8_row"),
)  # fmt: skip
KERNELS = (
    SKINNY._replace(
        configs=(
            Config(1, 4, 1, 1, 2, 1, 1, 2), Config(2, 4, 2, 2, 3, 2, 1, 1), Config(4, 4, 4, 1, 3, 1, 1, 3), Config(8, 4, 2, 1, 3, 4, 1, 2),
            Config(16, 4, 2, 2, 2, 1, 1, 1), Config(32, 4, 1, 1, 2, 2, 1, 2),
        )
    ),
    SWAP_AB._replace(
        configs=tuple(
            swap_ab.Config(*shape, 1 + i % 2, PDL[i % 3])
            for i, shape in enumerate(
                (
                    (8, 1, 1, 3, 2, 1), (16, 2, 1, 4, 4, 2), (32, 2, 2, 3, 4, 1), (8, 4, 2, 3, 8, 2), (16, 4, 4, 2, 8, 1),
                    (64, 1, 1, 3, 3, 1),
                )
            )
        )
    ),
)  # fmt: skip
PARTS = (Config(2, 4, 2, 1, 3, 1, 1, 1, "", 4), Config(16, 4, 1, 2, 2, 1, 1, 2, "", 2))
FEW_ROW_ENTRIES = [name for name in ENTRIES if ("fp8" in name and "mx" not in name) or "deepgemm" in name or name == "mm bf16"]
"""Those whose rows of a have no scales in bytes."""


Use = Callable[[Any], None]


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.name)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    found: Kernel = request.param
    return found


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """use(config): there is no other kernel and no other config; weights can be read in 16-byte pieces."""
    sizes = cases.sizes

    def alone(config: Any) -> None:
        here = swap_ab if isinstance(config, swap_ab.Config) else skinny
        for other in (kernel for kernel in catalog.KERNELS if kernel.multiplies and kernel is not here.KERNEL):
            monkeypatch.setattr(type(other), "refuse", lambda self, problem: "not here")
        monkeypatch.setattr(here, "_MOST_ROWS", 1000)
        monkeypatch.setattr(skinny, "_MOST_OF_SEGMENT", 1000)
        monkeypatch.setattr(swap_ab, "_LEAST_ROWS", 1)
        monkeypatch.setattr(type(here.KERNEL), "candidates", lambda self, problem, device: (config,))
        monkeypatch.setattr(cases, "sizes", lambda *given, **how: (size := sizes(*given, **how))._replace(k=-(-size.k // 32) * 32))

    return alone


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("part", range(2))
def test_grouped_matmul(part: int, pair: tuple[str, str], kernel: Kernel, use: Use) -> None:
    """Every pair meets two configs, and every kind of segments three or four pairs."""
    number = PAIRS.index(pair)
    use(kernel.configs[(number + 3 * part) % 6])
    target = ("sm_90a", "sm_120a")[number % 2] if kernel.name == "skinny" else "sm_90a"
    seed = (2 * number + part) % len(MATMULS)
    with emulate(target, seed=seed, eager=seed % 2 == 0) as ran:
        list(MATMULS.values())[seed](NUMPY, seed + 10 * number, *pair, ("int32", "int64")[seed % 2])
    assert set(ran) <= {"segments", kernel.name}


@pytest.mark.parametrize("kind", MATMULS)
def test_parts_of_k(kind: str, use: Use) -> None:
    seed = list(MATMULS).index(kind)
    use(PARTS[seed % 2])
    with emulate("sm_80", seed=seed) as ran:
        MATMULS[kind](NUMPY, seed, *PAIRS[5 * seed % len(PAIRS)], ("int32", "int64")[seed % 2])
    assert set(ran) <= {"segments", "skinny", "reduce"}


@pytest.mark.parametrize("name", ["group fp8 MN 128", "moe fp8", "deepgemm"])
def test_parts_of_k_of_entries(name: str, use: Use) -> None:
    """Scales placed by segment, a bias of each row."""
    use(PARTS[len(name) % 2])
    with emulate("sm_80") as ran:
        ENTRIES[name](NUMPY, 3, "int32")
    assert "reduce" in ran and "portable" not in ran


@pytest.mark.parametrize("name", FEW_ROW_ENTRIES)
def test_entries(name: str, kernel: Kernel, use: Use) -> None:
    for seed in range(2):
        use(kernel.configs[(seed + len(name)) % len(kernel.configs)])
        with emulate(seed=seed) as ran:
            ENTRIES[name](NUMPY, seed, ("int32", "int64")[seed % 2])
        assert "portable" not in ran


@pytest.mark.parametrize("index", ["int32", "int64"])
def test_wrong_device_values_select_nothing(index: str, kernel: Kernel, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.values, "check", lambda *given: None)  # which would refuse them in host memory
    for seed in range(3):
        use(kernel.configs[2 * seed + (index == "int64")])
        with emulate(seed=seed):
            cases.wild(NUMPY, seed, index)


def test_expert_maps(kernel: Kernel, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments in any order, some of them of the same expert, some of none; the result lies anywhere."""
    monkeypatch.setattr(launch.values, "check", lambda *given: None)
    for seed, config in enumerate(kernel.configs):
        use(config)
        rng = np.random.default_rng(seed)
        m, n, k, number, experts = int(rng.integers(1, 90)), int(rng.integers(1, 80)), 32 * int(rng.integers(1, 12)), 9, 4
        name = ("bf16", "e4m3", "fp16")[seed % 3]
        a, b = formats.exact_operand(rng, name, (m, k), True), formats.exact_operand(rng, name, (experts, n, k), False)
        chosen = rng.choice([*range(experts), -1, experts, 2**31 - 1, -(2**31)], number)
        groups = cases.segments(rng, m, number, "int32")
        expert = np.where(groups.expert >= 0, chosen[groups.expert], -1)
        index = ("int32", "int64")[seed % 2]
        dtype = "float16" if name == "fp16" else "bfloat16"
        for out in (oracles.poison((m, n), dtype), oracles.poison((n, m), dtype).T, oracles.poison((m, n + 5), dtype)[:, 3 : n + 3]):
            with emulate(seed=seed, eager=seed % 2 == 0) as ran:
                cugemm.SegmentGEMMWrapper(None).run(
                    a.data, b.data, number, True, out=out, seg_indptr=groups.indptr.astype(index), weight_indices=chosen.astype(index)
                )
            assert ran[-1] == kernel.name
            oracles.check_exact(formats.answer(a, b, expert=np.where((expert >= 0) & (expert < experts), expert, -1)), out, dtype)


# --- what is chosen ---------------------------------------------------------------------------------------------------------------------


def question(m: int, segments: int, n: int = 4096, k: int = 2048, a: str = "bf16", b: str = "bf16", target: str = "sm_90a") -> Problem:
    return Problem(
        m, n, k, segments, True, a, b, "", "e8m0" if b == "e2m1x2" else "", False, 0, "k", "k", True, "bfloat16", "fast", "auto", target,
        b_vector=True,
    )  # fmt: skip


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_120a"])
def test_candidates_follow_the_rows_of_a_segment(target: str) -> None:
    for m, segments, tokens in (
        (1, 8, {1, 2}),
        (16, 8, {2, 4}),
        (64, 256, {1, 2}),
        (512, 32, {16, 32}),
        (4096, 128, {16, 32}),
        (8, 0, {8, 16}),
    ):
        asked = question(m, segments, target=target)
        configs = skinny.KERNEL.candidates(asked, arch.H100)
        assert configs and {c.tokens for c in configs} <= tokens, (m, segments, configs)
        assert min(tokens) in {c.tokens for c in configs}
        for c in configs:
            assert 1 <= c.clusters <= -(-asked.n // (16 * c.row_blocks))
            assert skinny.KERNEL.cost(asked, c, arch.H100) > 0


def test_decoding_experts_go_to_skinny() -> None:
    for m, segments in ((1, 8), (8, 8), (16, 8), (64, 64), (64, 256), (256, 256)):
        for b in ("bf16", "e2m1x2"):
            choice = select.choose(question(m, segments, b=b), arch.H100)
            assert choice.best.kernel is skinny.KERNEL, str(choice)
    for m, segments in ((1024, 8), (8192, 8), (8192, 512)):
        assert skinny.KERNEL.refuse(question(m, segments)) == "multiplies up to 16 rows of a segment, on average"


def test_further_segments_than_rows_cost_nothing() -> None:
    for m in (1, 8, 64):
        prices = {select.choose(question(m, segments), arch.H100).best.us for segments in (m, 2 * m, 1000)}
        assert len(prices) == 1


def test_refused_as_it_is_of_one_matrix() -> None:
    asked = question(16, 8)
    for wrong in ({"zero": True}, {"a_scale": "e8m0"}, {"b_vector": False}, {"scale_block": 64}, {"k": 10**6, "m": 128}):
        assert skinny.KERNEL.refuse(asked._replace(**wrong)), wrong
    with pytest.raises(NoKernelError, match="of a segment, on average"):
        select.choose(question(1024, 8)._replace(backend="skinny"), arch.H100)
