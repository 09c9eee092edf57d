"""Times of configs of kernels/hopper.cu beside torch's products: docs/benchmarks/hopper_configs.json, which its cost model is fitted to.

python tests/gpu_configs.py --json hopper_configs.json --each 6
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import gpu_arrays
import gpu_formats
import ml_dtypes

from cugemm import arch, cases, compile, launch, measure, records, select
from cugemm.catalog import Step, hopper
from cugemm.catalog.hopper import Config
from cugemm.problem import GemmCall

FORMATS = ("bf16", "fp8_tensor", "fp8_block")
SHAPES = ((7168, 2048), (2112, 7168), (6144, 4096), (4096, 7168), (24576, 1536), (4096, 14336), (28672, 4096), (4096, 4096))
SMALL = ((3072, 1536), (1280, 2880), (2880, 1024))
FEW, MANY = (1, 8, 16, 32, 48, 64), (96, 128, 192, 256, 320, 512, 1024, 2048, 4096)
PRODUCTS = (
    *((m, n, k) for (n, k), m in itertools.product(SHAPES + SMALL, FEW)), *((m, n, k) for (n, k), m in itertools.product(SHAPES, MANY)),
    *((m, 11008, 4096) for m in (128, 1024, 4096)), (1024, 7168, 16384), (8192, 8192, 8192),
)  # fmt: skip
RIVALS = 128
"""Most rows for which other kernels are timed, too."""
NOTE = (
    "configs of kernels/hopper.cu: those that the model called cheapest and the best of each kind, graph replay, weights from memory, us; "
    "configs: fields of its Config without clusters; rows: format, m, n, k, torch us, us of the best of other kernels (m <= 128), "
    "[[config, us], ...]"
)


def asked(name: str, m: int, n: int, k: int) -> GemmCall:
    call = cases.record(cases.case(name), m, n, k, 0)[-1].call
    return call._replace(problem=call.problem._replace(arch="sm_90a", backend="hopper"))


def tried(call: GemmCall, each: int) -> list[Config]:
    """The cheapest, and of each way to cut the work the cheapest, unless that is far off."""

    def price(config: Config) -> float:
        return hopper.KERNEL.cost(call.problem, config, arch.H100)

    ranked = sorted(hopper.fitting(call.problem, arch.H100), key=price)
    kinds: dict[Any, Config] = {}
    for config in ranked:
        if price(config) < 1.4 * price(ranked[0]):
            kinds.setdefault((config.warpgroups, config.apart, config.share, config.split), config)
    return list(dict.fromkeys([*ranked[:each], *kinds.values()]))


def rival(call: GemmCall) -> select.Ranked | None:
    """What other kernels offer."""
    if call.m > RIVALS:
        return None
    ranking = select.choose(call.problem._replace(backend="auto"), arch.H100).ranking
    return next(r for r in ranking if r.kernel is not hopper.KERNEL)


def times(name: str, m: int, n: int, k: int, choices: list[select.Ranked]) -> tuple[float | None, list[float]]:
    """us of torch's product, if it has one, and of each choice."""
    import cupy

    case = cases.case(name)

    def values(rows: int) -> Any:
        wide = cupy.random.standard_normal((rows, k), dtype=cupy.float32).view(cupy.uint32)
        return (wide >> 16).astype(cupy.uint16).view(ml_dtypes.bfloat16)

    copies = min(measure.copies_for(cases.stored(case.weights, n, k), launch.machine(0)[1].l2_bytes), 16)
    x, weights = case.activation(values(m)), [case.weight(values(n)) for _ in range(copies)]
    graphs: dict[str, measure.Graph] = {}
    for i, ranked in enumerate(choices):
        with gpu_arrays.planned(ranked=ranked):
            graphs[str(i)] = measure.graph(measure.CupyGraph, lambda turn: case.product(x, weights[turn % copies]), copies)
    peer = case.baselines[0]
    with contextlib.suppress(RuntimeError):  # cuBLASLt has no block scales for one row
        graphs[peer] = measure.graph(measure.TorchGraph, measure.torch_baseline(peer, m, n, k, copies), copies)
    us = measure.interleaved(graphs, rounds=3)
    return us.get(peer), [us[str(i)] for i in range(len(choices))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--each", type=int, default=6, help="configs of each product, beside the best of each kind")
    args = parser.parse_args()

    work = [(name, *shape) for shape in PRODUCTS for name in FORMATS]
    calls = {product: asked(*product) for product in work}
    configs = {product: tried(call, args.each) for product, call in calls.items()}
    rivals = {product: rival(call) for product, call in calls.items()}
    choices = {
        product: [
            *([rivals[product]] * (rivals[product] is not None)),
            *(select.Ranked(hopper.KERNEL, config, 0.0) for config in configs[product]),
        ]
        for product in work
    }
    jobs = {
        (step.source, step.defines): compile.Job(step.source, arch.get("sm_90a"), dict(step.defines))
        for product, call in calls.items()
        for ranked in choices[product]
        for step in ranked.kernel.steps(call, ranked.config)
        if isinstance(step, Step)
    }
    gpu_formats.compiled(jobs)

    known: dict[tuple[Any, ...], int] = {}
    rows = []
    for product in work:
        torch_us, us = times(*product, choices[product])
        rival_us = round(us.pop(0), 2) if rivals[product] else None
        found = [
            [known.setdefault((*c[:5], c.lines, c.apart), len(known)), round(one, 2)] for c, one in zip(configs[product], us, strict=True)
        ]
        rows.append([*product, torch_us and round(torch_us, 2), rival_us, found])
        best = min(range(len(us)), key=us.__getitem__)
        print(f"{product} torch {torch_us} others {rival_us} hopper {us[best]:.1f} {configs[product][best]}", flush=True)
        document = {name: value for name, value in records.new_document().items() if name != "rows"}
        args.json.write_text(json.dumps({**document, "note": NOTE, "configs": list(known), "rows": rows}))


if __name__ == "__main__":
    main()
