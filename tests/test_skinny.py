"""The kernel for few rows, on the CPU: formats, rows, sizes off every multiple, every way to cut the work."""

from __future__ import annotations

from typing import Any

import format_oracles as formats
import numpy as np
import oracles
import pytest
from emulated import emulated as emulate
from test_emulated import operand

import cugemm
from cugemm.catalog import skinny
from cugemm.catalog.skinny import Config

PAIRS = (
    ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "e4m3"), ("fp16", "e4m3"), ("e4m3", "e4m3"), ("e5m2", "e4m3"), ("bf16", "e5m2"),
    ("fp8_row", "fp8_row"), ("fp8_group", "fp8_block"), ("bf16", "fp8_block"), ("bf16", "nvfp4"), ("fp16", "nvfp4_row"), ("e4m3", "nvfp4"),
    ("bf16", "mxfp4"), ("fp8_row", "mxfp8"), ("bf16", "int8_row"), ("bf16", "int4_row"), ("fp16", "int4_g128"), ("bf16", "int8_group"),
)  # fmt: skip
CONFIGS = tuple(
    Config(tokens, warps, warps_k, row_blocks, stages, split, 1, 2, ("", "prefetch", "static")[i % 3])
    for i, (tokens, warps, warps_k, row_blocks, stages, split) in enumerate(
        (
            (1, 4, 1, 1, 2, 1), (2, 4, 4, 1, 3, 1), (4, 8, 2, 2, 3, 1), (8, 4, 2, 1, 4, 1), (16, 4, 2, 2, 2, 1),
            (8, 4, 2, 1, 3, 2), (16, 4, 4, 1, 3, 4), (4, 4, 1, 2, 2, 8), (8, 8, 8, 1, 3, 2), (8, 4, 1, 1, 4, 4),
        )
    )
)  # fmt: skip


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=["-".join(pair) for pair in PAIRS])
def test_products(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(number)
    for i in range(3):
        config = CONFIGS[(3 * number + i) % len(CONFIGS)]
        m = int(rng.integers(config.tokens // 2 + 1, 2 * config.tokens + 1))  # one or two pieces
        n, k = int(rng.integers(1, 200)), 32 * int(rng.integers(1, 50))
        a, b = formats.exact_operand(rng, PAIRS[number][0], (m, k), True), formats.exact_operand(rng, PAIRS[number][1], (n, k), False)
        bias = rng.integers(-8, 9, n).astype(np.float32)
        x, w = operand(a), operand(b, ("linear", "128x4", "8x4")[i])
        monkeypatch.setattr(skinny.Skinny, "candidates", lambda self, problem, device, config=config: (config,))
        results: list[Any] = []
        for eager in (False, True):
            out = oracles.poison((m, n), "float32")
            with emulate(seed=number + 7 * eager, eager=eager) as ran:
                cugemm.linear(x, w, bias, out=out, backend="skinny")
            assert ran == ["skinny"]
            oracles.check_exact(formats.answer(a, b, bias=bias), out, "float32")
            results.append(out)
        oracles.check_bits(*results)
