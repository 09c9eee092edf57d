"""batch_invariant=True: a row has the same bits alone, among others, and wherever it lies; in the emulator and (marked gpu) on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import oracles
import pytest
from emulated import emulated as emulate

import cugemm
from cugemm import arch, launch, measure, select
from cugemm.catalog import hopper, skinny
from cugemm.problem import BUCKETS

N, K = 72, 1056
FORMATS = (
    ("bf16", None), ("fp8_row", None), ("fp8_block", None), ("nvfp4", None), ("mxfp4", None), ("mxfp8", None), ("int8_row", None),
    ("int4_g128", None), ("uint4_g128", None), ("int4_g32", None), ("fp8_row", "fp8_row"), ("fp8_block", "fp8_group"),
)  # fmt: skip
"""Of the weight, and of activations that are quantised; zero points and blocks of 32 k go to another kernel."""
PLACES = ((0, 1), (3, 4), (3, 9), (2, 20), (0, 70), (3, 5))
"""(first, end) of the rows that are multiplied; row 3 is the one that is looked at, or the first."""


def check(put: Callable[[Any], Any], get: Callable[[Any], Any], name: str, activations: str | None, dtype: Any) -> None:
    rng = np.random.default_rng(len(name))
    x = rng.standard_normal((70, K), np.float32).astype(dtype)
    values = rng.standard_normal((N, K), np.float32).astype(dtype)
    w = put(values) if name == "bf16" else cugemm.quantize(put(values), name)
    bits: dict[int, Any] = {}
    for first, end in PLACES:
        for odd in (False, True):  # rows that no 16-byte load can begin at
            room = np.zeros((70, K + (1 if odd else 0)), dtype)
            room[:, :K] = x
            rows = put(room)[first:end, :K]
            y = get(cugemm.linear(rows, w, out_dtype="float32", batch_invariant=True, activations=activations))
            for row in range(first, end):
                oracles.check_bits(y[row - first], bits.setdefault(row, y[row - first]), f"{name}: row {row} of {first}:{end}, odd={odd}")


@pytest.mark.parametrize(("name", "activations"), FORMATS)
def test_in_the_emulator(name: str, activations: str | None) -> None:
    with emulate() as ran:
        check(lambda x: x, lambda y: y, name, activations, ml_dtypes.bfloat16)
    kernels = {kernel for kernel in ran if kernel in ("hopper", "skinny", "portable")}
    alike = name == "bf16" or activations
    assert kernels == {"hopper" if alike else "portable" if name in ("uint4_g128", "int4_g32") else "skinny"}
    assert ("align" in ran) == (name == "bf16"), "rows at odd places are copied"


@pytest.mark.parametrize("name", ["bf16", "nvfp4"])
def test_without_clusters_in_the_emulator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a launch costs nothing, k is not cut into parts, whose memory would grow with m."""
    monkeypatch.setattr(skinny, "_LAUNCH_US", 0.0)
    with emulate("sm_80") as ran:
        check(lambda x: x, lambda y: y, name, None, ml_dtypes.bfloat16)
    assert "skinny" in ran and not {"reduce", "portable"} & set(ran)


@pytest.mark.gpu
@pytest.mark.requires("cupy")
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(("name", "activations"), FORMATS)
def test_on_a_gpu(name: str, activations: str | None, dtype: Any) -> None:
    if name == "bf16" and dtype is np.float16:
        name = "fp8_row"
    check(measure.to_device, measure.to_host, name, activations, dtype)


@pytest.mark.gpu
@pytest.mark.requires("cupy")
@pytest.mark.parametrize("kind", ["bf16", "fp8_row", "fp8_block"])
def test_many_rows_on_a_gpu(kind: str) -> None:
    """Tiles, clusters and warpgroups follow m, bits do not."""
    rng = np.random.default_rng(0)
    for n, k in ((2112, 1040), (512, 4096), (5000, 528)):
        x, values = (measure.to_device(rng.standard_normal((rows, k), np.float32).astype(ml_dtypes.bfloat16)) for rows in (2500, n))
        w = values if kind == "bf16" else cugemm.quantize(values, kind)
        activations = {"bf16": None, "fp8_row": "fp8_row", "fp8_block": "fp8_group"}[kind]
        bits: Any = None
        for first, end in ((0, 2500), (0, 1), (0, 64), (65, 195), (100, 612), (1300, 2400), (2499, 2500)):
            y = measure.to_host(cugemm.linear(x[first:end], w, out_dtype="float32", batch_invariant=True, activations=activations))
            bits = y if bits is None else bits
            oracles.check_bits(y, bits[first:end], f"{kind}: rows {first}:{end} of {n} x {k}")


@pytest.mark.parametrize("name", ["bf16", "fp8_row", "nvfp4", "mxfp4", "int4_g128", "uint4_g128"])
@pytest.mark.parametrize(("n", "k"), [(28672, 4096), (4096, 14336), (6144, 4096), (1000, 65536)])
@pytest.mark.parametrize("target", ["sm_90a", "sm_80"])
def test_one_order_of_sums_for_every_m(target: str, name: str, n: int, k: int) -> None:
    """What decides it: the kernel, the warps and the CTAs that cut k. Overlap changes nothing."""
    orders = set()
    w = cugemm.Spec((n, k), "bfloat16") if name == "bf16" else None
    with launch.recording() as calls:
        if w is None:
            w = cugemm.quantize(cugemm.Spec((n, k), "bfloat16"), name)
        for pdl in (False, True):
            cugemm.linear(cugemm.Spec((8, k), "bfloat16"), w, batch_invariant=True, pdl=pdl, static_weights=pdl)
    for recorded in calls[-2:]:
        for m in BUCKETS:
            problem = recorded.call.problem._replace(m=m, arch=target)
            for ranked in select.choose(problem, arch.H100).ranking:
                c = ranked.config
                if ranked.kernel is skinny.KERNEL:
                    cuts: tuple[Any, ...] = (c.warps, c.warps_k, c.row_blocks, c.split, c.clusters, c.parts)
                else:
                    cuts = (c.split, c.wide) if ranked.kernel is hopper.KERNEL else (c.warps_k, c.split)
                orders.add((ranked.kernel.name, *cuts))
    assert len(orders) == 1, orders
