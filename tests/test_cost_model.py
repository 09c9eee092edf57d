"""The cost model against recorded times: the tile it picks is nearly always nearly the best."""

from __future__ import annotations

import json
from collections import defaultdict

from conftest import ROOT

from cugemm import arch, select
from cugemm.problem import Problem, bucket

RECORD = json.loads((ROOT / "docs" / "benchmarks" / "portable_tiles.json").read_text())
FORMATS = {
    "bf16": ("bf16", "bf16", 0),
    "fp8_row": ("e4m3", "e4m3", 0),
    "fp8_block": ("e4m3", "e4m3", 128),
    "w8a16_fp8": ("bf16", "e4m3", 0),
    "w4a16_fp4": ("bf16", "e2m1x2", 0),
}


def question(name: str, m: int, n: int, k: int) -> Problem:
    """The product of a recorded row, dense, both operands k-major."""
    a, b, block = FORMATS[name]
    return Problem(bucket(m), n, k, 1, False, a, b, "", "", False, block, "k", "k", True, "bfloat16", "fast", "auto", "sm_90a")


def test_choice_is_near_the_best_recorded() -> None:
    times: dict[tuple[str, int, int, int], dict[tuple[int, ...], float]] = defaultdict(dict)
    for name, m, n, k, config, us in RECORD["rows"]:
        times[name, m, n, k][tuple(RECORD["configs"][config])] = us
    losses = []
    for (name, m, n, k), measured in times.items():
        choice = select.choose(question(name, m, n, k), arch.H100)
        assert {tuple(r.config) for r in choice.ranking} == set(measured)
        losses.append(measured[tuple(choice.best.config)] / min(measured.values()))
    assert len(losses) > 500
    assert sum(loss < 1.05 for loss in losses) > 0.95 * len(losses)
    assert max(losses) < 1.3


def test_prediction_is_within_a_third_of_the_record() -> None:
    wrong = []
    for name, m, n, k, config, us in RECORD["rows"]:
        if m != bucket(m):
            continue  # planned as the bucket, so predicted for more rows than were timed
        ranking = select.choose(question(name, m, n, k), arch.H100).ranking
        predicted = next(r.us for r in ranking if tuple(r.config) == tuple(RECORD["configs"][config]))
        wrong.append(max(predicted / us, us / predicted))
    assert sum(factor < 1.33 for factor in wrong) > 0.95 * len(wrong)
