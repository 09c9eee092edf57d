"""The cost models against recorded times: what they pick is nearly always nearly the best."""

from __future__ import annotations

import functools
import json
import statistics
from collections import defaultdict
from typing import NamedTuple

import pytest
from conftest import ROOT

from cugemm import arch, select
from cugemm.catalog import hopper, portable, skinny, swap_ab
from cugemm.problem import Problem, bucket

RECORD = json.loads((ROOT / "docs" / "benchmarks" / "portable_tiles.json").read_text())
FORMATS = {
    "bf16": ("bf16", "bf16", 0),
    "fp8_row": ("e4m3", "e4m3", 0),
    "fp8_block": ("e4m3", "e4m3", 128),
    "w8a16_fp8": ("bf16", "e4m3", 0),
    "w4a16_fp4": ("bf16", "e2m1x2", 0),
}

SKINNY = json.loads((ROOT / "docs" / "benchmarks" / "skinny_configs.json").read_text())
SWAP_AB = json.loads((ROOT / "docs" / "benchmarks" / "swap_ab_configs.json").read_text())
HOPPER = json.loads((ROOT / "docs" / "benchmarks" / "hopper_configs.json").read_text())
SKINNY_FORMATS = {
    "bf16": ("bf16", "bf16", "", 0),
    "fp8_tensor": ("e4m3", "e4m3", "", 0),
    "w8a16_fp8": ("bf16", "e4m3", "", 0),
    "w4a16_nvfp4": ("bf16", "e2m1x2", "e4m3", 0),
    "w4a16_mxfp4": ("bf16", "e2m1x2", "e8m0", 0),
    "int4_g128": ("bf16", "int4x2", "", 128),
    "fp8_block": ("e4m3", "e4m3", "", 128),
}


def question(name: str, m: int, n: int, k: int) -> Problem:
    """The product of a recorded row, dense, both operands k-major."""
    a, b, block = FORMATS[name]
    return Problem(bucket(m), n, k, 1, False, a, b, "", "", False, block, "k", "k", True, "bfloat16", "fast", "portable", "sm_90a")


def skinny_question(name: str, m: int, n: int, k: int) -> Problem:
    a, b, b_scale, block = SKINNY_FORMATS[name]
    rest = (False, block, "k", "k", True, "bfloat16", "fast", "auto", "sm_90a")
    return Problem(m, n, k, 1, False, a, b, "", b_scale, *rest, b_vector=True)


def test_choice_is_near_the_best_recorded() -> None:
    times: dict[tuple[str, int, int, int], dict[tuple[int, ...], float]] = defaultdict(dict)
    for name, m, n, k, config, us in RECORD["rows"]:
        times[name, m, n, k][tuple(RECORD["configs"][config])] = us
    losses = []
    for (name, m, n, k), measured in times.items():
        choice = select.choose(question(name, m, n, k), arch.H100)
        whole = [r.config[:-1] for r in choice.ranking if r.config.split == 1]  # the record is older than clusters
        assert set(whole) == set(measured)
        losses.append(measured[whole[0]] / min(measured.values()))
    assert len(losses) > 500
    assert sum(loss < 1.05 for loss in losses) > 0.95 * len(losses)
    assert max(losses) < 1.3


def test_prediction_is_within_a_third_of_the_record() -> None:
    wrong = []
    for name, m, n, k, config, us in RECORD["rows"]:
        if m != bucket(m):
            continue  # planned as the bucket, so predicted for more rows than were timed
        ranking = select.choose(question(name, m, n, k), arch.H100).ranking
        predicted = next(r.us for r in ranking if r.config == (*RECORD["configs"][config], 1))
        wrong.append(max(predicted / us, us / predicted))
    assert sum(factor < 1.33 for factor in wrong) > 0.95 * len(wrong)


def skinny_picks(pdl: bool) -> list[tuple[float, float, float]]:
    """Of each recorded problem: predicted us of the pick among configs that were measured, its own us, the best us."""
    times: dict[tuple[str, int, int, int], dict[tuple[int, ...], float]] = defaultdict(dict)
    for name, m, n, k, config, plain, static in SKINNY["rows"]:
        times[name, m, n, k][tuple(SKINNY["configs"][config])] = static if pdl else plain
    picks = []
    for (name, m, n, k), measured in times.items():
        problem = skinny_question(name, m, n, k)
        configs = [c for c in skinny.KERNEL.candidates(problem, arch.H100) if c[:7] in measured]
        predicted, chosen = min((skinny.KERNEL.cost(problem, c, arch.H100), c[:7]) for c in configs)
        picks.append((predicted, measured[chosen], min(measured.values())))
    return picks


@pytest.mark.parametrize(("pdl", "near", "worst"), [(False, 0.85, 1.19), (True, 0.65, 1.2)])
def test_skinny_choice_is_near_the_best_recorded(pdl: bool, near: float, worst: float) -> None:
    losses = [us / best for _, us, best in skinny_picks(pdl)]
    assert len(losses) == 54
    assert sum(loss < 1.05 for loss in losses) >= near * len(losses)
    assert max(losses) < worst


def test_skinny_prediction_is_near_the_record() -> None:
    wrong = [max(predicted / us, us / predicted) for predicted, us, _ in skinny_picks(False)]
    assert statistics.median(wrong) < 1.07
    assert max(wrong) < 1.3


def test_few_rows_of_a_large_weight_have_their_kernels() -> None:
    for name in SKINNY_FORMATS:
        for m in (1, 2, 4, 8, 16):
            for n, k in ((28672, 4096), (4096, 14336)):
                best = select.choose(skinny_question(name, m, n, k), arch.H100).best.kernel
                assert best is skinny.KERNEL or (best is swap_ab.KERNEL and m > 8)
    assert select.choose(skinny_question("bf16", 512, 28672, 4096), arch.H100).best.kernel is portable.KERNEL


def test_choice_among_kernels_is_near_the_best_recorded() -> None:
    losses, wrong = [], []
    for name, m, n, k, times in SWAP_AB["rows"]:
        problem = skinny_question(name, m, n, k)
        measured = {SWAP_AB["configs"][config]: us for config, us in times}
        known = [
            (ranked.us, measured[label])
            for ranked in select.choose(problem, arch.H100).ranking
            for label in [f"{ranked.kernel.name}:{'/'.join(map(str, ranked.config[: {'swap_ab': 6}.get(ranked.kernel.name, 8)]))}"]
            if label in measured
        ]
        wrong += [max(predicted / us, us / predicted) for predicted, us in known]
        losses.append(known[0][1] / min(measured.values()))
    assert len(losses) == 120
    assert sum(loss < 1.05 for loss in losses) >= 0.83 * len(losses)
    assert statistics.geometric_mean(losses) < 1.025
    assert max(losses) < 1.25
    assert statistics.median(wrong) < 1.15


class Pick(NamedTuple):
    """Of a recorded problem: us of the pick among configs that were measured, its own and predicted, of the best one, and of others."""

    name: str
    m: int
    predicted: float
    us: float
    best: float
    torch: float | None
    rival: float | None  # of the best of other kernels


@functools.cache
def hopper_picks() -> list[Pick]:
    picks = []
    for name, m, n, k, torch_us, rival_us, times in HOPPER["rows"]:
        problem = skinny_question(name, m, n, k)._replace(backend="hopper", in_order=True)
        measured = {tuple(HOPPER["configs"][config]): us for config, us in times}
        known = [
            (hopper.KERNEL.cost(problem, c, arch.H100), measured[key])
            for c in hopper.fitting(problem, arch.H100)
            for key in [(*c[:5], c.lines, c.apart)]
            if key in measured
        ]
        assert len(known) == len(measured)
        picks.append(Pick(name, m, *min(known), min(measured.values()), torch_us, rival_us))
    return picks


def test_hopper_choice_is_near_the_best_recorded() -> None:
    picks = hopper_picks()
    losses = [pick.us / pick.best for pick in picks]
    assert len(losses) == 429
    assert sum(loss < 1.05 for loss in losses) >= 0.92 * len(losses)
    assert max(losses) < 1.28
    wrong = [max(pick.predicted / pick.us, pick.us / pick.predicted) for pick in picks]
    assert statistics.median(wrong) < 1.08
    assert max(wrong) < 1.5


def test_hopper_is_chosen_where_it_is_faster() -> None:
    losses = []
    for pick, (name, m, n, k, *_) in zip(hopper_picks(), HOPPER["rows"], strict=True):
        if pick.rival is None:
            continue
        ranking = select.choose(skinny_question(name, m, n, k)._replace(in_order=True), arch.H100).ranking
        rival = next(ranked.us for ranked in ranking if ranked.kernel is not hopper.KERNEL)
        losses.append((pick.us if pick.predicted <= rival else pick.rival) / min(pick.best, pick.rival))
    assert len(losses) == 249
    assert sum(loss < 1.05 for loss in losses) >= 0.94 * len(losses)
    assert max(losses) < 1.14


def test_hopper_beside_torch() -> None:
    """The gains over torch that docs/kernels/hopper.md shows are those of the picks, too."""
    gain = defaultdict(list)
    for pick in hopper_picks():
        if pick.torch is not None:
            gain[pick.name, "many" if pick.m >= 4096 else pick.m].append(pick.torch / pick.us)
    for (name, m), least in {("bf16", "many"): 1.02, ("fp8_tensor", "many"): 1.05, ("fp8_tensor", 1024): 1.01}.items():
        assert statistics.geometric_mean(gain[name, m]) >= least, (name, m)
