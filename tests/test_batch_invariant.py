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
from cugemm.catalog import skinny
from cugemm.problem import BUCKETS

N, K = 72, 1056
FORMATS = ("bf16", "fp8_row", "fp8_block", "nvfp4", "mxfp4", "mxfp8", "int8_row", "int4_g128", "uint4_g128", "int4_g32")
"""Of the weight; zero points and blocks of 32 k go to another kernel."""
PLACES = ((0, 1), (3, 4), (3, 9), (2, 20), (0, 70), (3, 5))
"""(first, end) of the rows that are multiplied; row 3 is the one that is looked at, or the first."""


def check(put: Callable[[Any], Any], get: Callable[[Any], Any], name: str, dtype: Any) -> None:
    rng = np.random.default_rng(len(name))
    x = rng.standard_normal((70, K), np.float32).astype(dtype)
    values = rng.standard_normal((N, K), np.float32).astype(dtype)
    w = put(values) if name == "bf16" else cugemm.quantize(put(values), name)
    bits: dict[int, Any] = {}
    for first, end in PLACES:
        for odd in (False, True):  # rows that no 16-byte load can begin at
            room = np.zeros((70, K + (1 if odd else 0)), dtype)
            room[:, :K] = x
            y = get(cugemm.linear(put(room)[first:end, :K], w, out_dtype="float32", batch_invariant=True))
            for row in range(first, end):
                oracles.check_bits(y[row - first], bits.setdefault(row, y[row - first]), f"{name}: row {row} of {first}:{end}, odd={odd}")


@pytest.mark.parametrize("name", FORMATS)
def test_in_the_emulator(name: str) -> None:
    with emulate() as ran:
        check(lambda x: x, lambda y: y, name, ml_dtypes.bfloat16)
    kernels = {kernel for kernel in ran if kernel in ("skinny", "portable")}
    assert kernels == {"portable" if name in ("uint4_g128", "int4_g32") else "skinny"}


@pytest.mark.parametrize("name", ["bf16", "nvfp4"])
def test_without_clusters_in_the_emulator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a launch costs nothing, k is not cut into parts, whose memory would grow with m."""
    monkeypatch.setattr(skinny, "_LAUNCH_US", 0.0)
    with emulate("sm_80") as ran:
        check(lambda x: x, lambda y: y, name, ml_dtypes.bfloat16)
    assert "skinny" in ran and not {"reduce", "portable"} & set(ran)


@pytest.mark.gpu
@pytest.mark.requires("cupy")
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu(name: str, dtype: Any) -> None:
    if name == "bf16" and dtype is np.float16:
        name = "fp8_row"
    check(measure.to_device, measure.to_host, name, dtype)


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
                cuts = (
                    (c.warps, c.warps_k, c.row_blocks, c.split, c.clusters, c.parts)
                    if ranked.kernel is skinny.KERNEL
                    else (c.warps_k, c.split)
                )
                orders.add((ranked.kernel.name, *cuts))
    assert len(orders) == 1, orders
