"""`python -m cugemm bench`: the rows of a benchmark document, measured on the GPU. Method: docs/benchmarks/README.md; schema: `records`."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from cugemm import cases, launch, measure, records
from cugemm.arrays import numpy_dtype
from cugemm.cases import Case, Chain, Layer
from cugemm.records import Row

_ARENA = 1 << 30
_POOL = 1 << 22
_ROUTES = 4
"""Ways of tokens to experts that calls of a mixture rotate over."""


class Bench:
    """Measures on GPU 0. Making one measures the read bandwidth."""

    def __init__(self) -> None:
        self._target, self._info = launch.machine(0)
        self._stream = measure.Stream(_ARENA)
        self.read_gbs = self._stream.read_gbs()
        self._pools: dict[tuple[str, float], Any] = {}

    def rows(self, shapes: Iterable[tuple[int, int, int]], formats: Sequence[str], until: float) -> Iterator[list[Row]]:
        """Rows of each (m, n, k), until `time.monotonic()` passes `until`; shapes after that are left out."""
        chosen = [cases.case(name) for name in formats]
        return _each(functools.partial(self._shape, chosen), shapes, until)

    def _shape(self, chosen: Sequence[Case], m: int, n: int, k: int) -> list[Row]:
        """All formats and baselines of one shape, in turns."""
        made: dict[str, Callable[[], measure.Graph]] = {}
        for case in chosen:
            size = cases.traffic(case, m, n, k)
            made[case.format] = functools.partial(self._ours, case, m, n, k)
            made[f"stream {size}"] = functools.partial(self._read, size)
        if measure.optional("torch") is not None:
            for name in dict.fromkeys(name for case in chosen for name in case.baselines):
                made[name] = functools.partial(self._torch, name, m, n, k)
        times, notes = _in_turns(made)
        return [self.row(case, m, n, k, times, notes) for case in chosen]

    def row(self, case: Case, m: int, n: int, k: int, times: Mapping[str, float], notes: Mapping[str, str]) -> Row:
        size = cases.traffic(case, m, n, k)
        return records.row(
            records.product(case, m, n, k), us=times.get(case.format), floor_us=self._floor(case, m, n, k),
            stream_us=times.get(f"stream {size}"),
            baselines={name: times.get(name) for name in case.baselines},
            note=_note("", (case.format, f"stream {size}", *case.baselines), notes),
        )  # fmt: skip

    def _floor(self, case: Case, m: int, n: int, k: int) -> float:
        peak = measure.peak_tflops(self._target, self._info, cases.operand_bits(case))
        return max(cases.traffic(case, m, n, k) / self.read_gbs / 1e3, cases.flops(m, n, k) / peak / 1e6)

    def invariant_rows(self, shapes: Iterable[tuple[int, int, int]], formats: Sequence[str], until: float) -> Iterator[list[Row]]:
        """Rows of each (m, n, k), as `rows`, with batch_invariant=True; their baseline "cugemm" is the same product without."""
        chosen = [cases.case(name) for name in formats]
        return _each(functools.partial(self._invariant, chosen), shapes, until)

    def _invariant(self, chosen: Sequence[Case], m: int, n: int, k: int) -> list[Row]:
        made: dict[str, Callable[[], measure.Graph]] = {}
        for case in chosen:
            size = cases.traffic(case, m, n, k)
            made[f"{case.format}, batch_invariant"] = functools.partial(self._ours, case, m, n, k, True)
            made[case.format] = functools.partial(self._ours, case, m, n, k)
            made[f"stream {size}"] = functools.partial(self._read, size)
        times, notes = _in_turns(made)
        rows = []
        for case in chosen:
            names = f"{case.format}, batch_invariant", case.format, f"stream {cases.traffic(case, m, n, k)}"
            us, plain, stream = map(times.get, names)
            product = records.named(
                "batch_invariant", case.format, (m, n, k), 1, functools.partial(cases.record, case, m, n, k, 0, batch_invariant=True)
            )
            rows.append(
                records.row(
                    product, us=us, floor_us=self._floor(case, m, n, k), stream_us=stream, baselines={"cugemm": plain},
                    note=_note("", names, notes),
                )
            )  # fmt: skip
        return rows

    def chain_rows(self, chains: Iterable[tuple[Chain, int]], formats: Sequence[str], until: float) -> Iterator[list[Row]]:
        """Rows of each (chain, m), as `rows`, in microseconds of one turn: for each format one, and one with launches that overlap."""
        chosen = [cases.case(name) for name in formats]
        return _each(functools.partial(self._chained, chosen), chains, until)

    def _chained(self, chosen: Sequence[Case], chain: Chain, m: int) -> list[Row]:
        made: dict[str, Callable[[], measure.Graph]] = {}
        for case in chosen:
            size = cases.chain_traffic(case, chain, m)
            made[case.format] = functools.partial(self._chain, chain, case, m, False)
            made[f"stream {size}"] = functools.partial(self._read, size, chain.turns)
            made[f"{case.format}, pdl"] = functools.partial(self._chain, chain, case, m, True)
        peers = dict.fromkeys(name for case in chosen for name in case.baselines)
        if measure.optional("torch") is not None:
            made |= {name: functools.partial(self._torch_chain, name, chain, m) for name in peers}
        times, notes = _in_turns(made)
        return [self.chain_row(chain, case, m, overlap, peers, times, notes) for case in chosen for overlap in (False, True)]

    def chain_row(
        self, chain: Chain, case: Case, m: int, overlap: bool, peers: Iterable[str], times: Mapping[str, float], notes: Mapping[str, str]
    ) -> Row:
        size = cases.chain_traffic(case, chain, m)
        name, stream = f"{case.format}, pdl" if overlap else case.format, f"stream {size}"
        peers = peers if chain.name else case.baselines
        what = f"{chain.name}, {size / 1e6:.1f} MB a layer, chain of {chain.turns} layers" if chain.name else f"chain of {chain.turns}"
        product = records.named(
            "decode" if chain.name else "chain", case.format, (m, *chain.whole), 1,
            functools.partial(cases.record_chain, chain, case, m, overlap, 0),
        )  # fmt: skip
        return records.row(
            product, us=times.get(name), floor_us=sum(self._floor(case, m, n, k) for n, k in chain.sizes),
            stream_us=times.get(stream), baselines={peer: times.get(peer) for peer in peers},
            note=_note(what + ", pdl, static weights" * overlap, (name, stream, *peers), notes),
        )  # fmt: skip

    def quantiser_rows(self, shapes: Iterable[tuple[int, int]], until: float) -> Iterator[list[Row]]:
        """Rows of each (rows, k), as `rows`: every quantiser beside a copy that moves as many bytes from device to device."""
        return _each(self._quantised, shapes, until)

    def _quantised(self, m: int, k: int) -> list[Row]:
        made: dict[str, Callable[[], measure.Graph]] = {}
        for quantiser in cases.QUANTISERS:
            size = cases.quantiser_traffic(quantiser.format, m, k)
            made[str(quantiser)] = functools.partial(self._quantiser, quantiser, m, k)
            made[f"stream {size}"] = functools.partial(self._read, size)
            made[f"copy {size}"] = functools.partial(self._copy, size)
        times, notes = _in_turns(made)
        rows = []
        for quantiser in cases.QUANTISERS:
            size = cases.quantiser_traffic(quantiser.format, m, k)
            names = str(quantiser), f"stream {size}", f"copy {size}"
            us, stream, copy = map(times.get, names)
            product = records.named(
                "quantize", quantiser.format, (m, 0, k), 1, functools.partial(cases.record_quantiser, quantiser, m, k, 0)
            )
            rows.append(
                records.row(
                    product, us=us, floor_us=size / self.read_gbs / 1e3, stream_us=stream,
                    baselines={"copy": copy},
                    note=_note(quantiser.note, names, notes),
                )
            )  # fmt: skip
        return rows

    def _quantiser(self, quantiser: cases.Quantiser, m: int, k: int) -> measure.Graph:
        copies = self._copies(2 * m * k)
        arrays = [self._values((m, k), "bfloat16", i) for i in range(copies)]
        results: list[Any] = [None] * copies

        def call(i: int) -> None:
            results[i % copies] = quantiser(arrays[i % copies])  # kept, so that the next result goes to other, cold memory

        return measure.graph(measure.CupyGraph, call, copies)

    def layer_rows(self, layers: Iterable[tuple[Layer, int]], formats: Sequence[str], until: float) -> Iterator[list[Row]]:
        """Rows of each (mixture of experts, tokens), as `rows`; x and the inner values are quantised inside the time."""
        chosen = [cases.case(name) for name in formats]
        return _each(functools.partial(self._mixture, chosen), layers, until)

    def _mixture(self, chosen: Sequence[Case], layer: Layer, m: int) -> list[Row]:
        routes = [cases.route(layer, m, seed) for seed in range(_ROUTES)]
        touched = round(sum(len(np.unique(indices)) for indices, _ in routes) / _ROUTES)
        made: dict[str, Callable[[], measure.Graph]] = {}
        for case in chosen:
            size = cases.layer_traffic(case, layer, m, touched)
            made[case.format] = functools.partial(self._layer, layer, case, m, routes)
            made[f"stream {size}"] = functools.partial(self._read, size)
        times, notes = _in_turns(made)
        rows = []
        for case in chosen:
            size = cases.layer_traffic(case, layer, m, touched)
            peak = measure.peak_tflops(self._target, self._info, cases.operand_bits(case))
            floor = max(size / self.read_gbs / 1e3, cases.layer_flops(layer, m) / peak / 1e6)
            product = records.named(
                "moe", case.format, (m, layer.inner, layer.hidden), layer.experts, functools.partial(cases.record_layer, layer, case, m, 0)
            )  # fmt: skip
            names = case.format, f"stream {size}"
            what = f"{layer.name}, {layer.topk} of {layer.experts} experts, {touched} in use"
            rows.append(
                records.row(
                    product, us=times.get(case.format), floor_us=floor, stream_us=times.get(names[1]),
                    baselines={}, note=_note(what, names, notes),
                )
            )  # fmt: skip
        return rows

    def _layer(self, layer: Layer, case: Case, m: int, routes: Sequence[tuple[Any, Any]]) -> measure.Graph:
        x = self._values((m, layer.hidden), case.dtype, 0)
        w13 = case.weight(self._values((layer.experts, 2 * layer.inner, layer.hidden), case.dtype, 1))
        w2 = case.weight(self._values((layer.experts, layer.hidden, layer.inner), case.dtype, 2))
        placed = [(measure.to_device(indices), measure.to_device(weights)) for indices, weights in routes]
        return measure.graph(
            measure.CupyGraph, lambda i: cases.mixture(case, x, w13, w2, *placed[i % len(placed)]), len(placed)
        )  # fmt: skip

    def _copies(self, weight_bytes: int) -> int:
        return measure.copies_for(weight_bytes, self._info.l2_bytes)

    def _ours(self, case: Case, m: int, n: int, k: int, batch_invariant: bool = False) -> measure.Graph:
        copies = self._copies(n * k * (1 if case.weights else 2))
        a = case.activation(self._values((m, k), case.dtype, 0))
        weights = [case.weight(self._values((n, k), case.dtype, i + 1)) for i in range(copies)]
        product = functools.partial(case.product, batch_invariant=batch_invariant)
        out = product(a, weights[0])
        return measure.graph(measure.CupyGraph, lambda i: product(a, weights[i % copies], out), copies)

    def _chain(self, chain: Chain, case: Case, m: int, overlap: bool) -> measure.Graph:
        copies = self._chain_copies(chain, 1 if case.weights else 2)
        each, size = len(chain.sizes), m * max(map(max, chain.sizes))
        places = measure.chained([self._values((size,), case.dtype, seed) for seed in range(3)], m, chain.sizes * chain.turns)
        if case.activations is not None:  # what it writes is not what it reads
            fixed = {k: case.activation(self._values((m, k), case.dtype, 0)) for _, k in chain.sizes}
            places = [(fixed[x.shape[1]], out) for x, out in places]
        weights = [
            case.weight(self._values((n, k), case.dtype, 3 + i * each + at, k**-0.5))
            for i in range(copies) for at, (n, k) in enumerate(chain.sizes)
        ]  # fmt: skip

        def turn(i: int) -> None:
            for at in range(i * each, (i + 1) * each):
                x, out = places[at]
                case.link(x, weights[at % len(weights)], out, overlap=overlap)

        return measure.CupyGraph(turn, chain.turns)

    def _chain_copies(self, chain: Chain, itemsize: int) -> int:
        n, k = chain.whole
        return chain.turns if chain.name else min(chain.turns, self._copies(n * k * itemsize))

    def _torch_chain(self, name: str, chain: Chain, m: int) -> measure.Graph:
        copies = self._chain_copies(chain, 1 if "fp8" in name else 2)
        return measure.TorchGraph(measure.torch_chain(name, m, chain.sizes, chain.turns, copies), chain.turns)

    def _read(self, size: int, calls: int = 0) -> measure.Graph:
        """calls: of the graph, some 2 ms of them if 0."""
        read = self._stream.call(size)
        return measure.CupyGraph(read, calls) if calls else measure.graph(measure.CupyGraph, read, self._stream.copies(size))

    def _copy(self, size: int) -> measure.Graph:
        size = -(-size // 4096) * 4096  # an odd number of bytes would be copied from odd places, a quarter slower
        return measure.graph(measure.CupyGraph, self._stream.copy(size), self._stream.copies(size))

    def _torch(self, name: str, m: int, n: int, k: int) -> measure.Graph:
        copies = self._copies(n * k * (1 if "fp8" in name else 2))
        return measure.graph(measure.TorchGraph, measure.torch_baseline(name, m, n, k, copies), copies)

    def _values(self, shape: tuple[int, ...], dtype: str, seed: int, scale: float = 1.0) -> Any:
        """Normal random values times `scale`: one pool of them, begun at another place for each seed and repeated."""
        import cupy  # noqa: PLC0415

        if (dtype, scale) not in self._pools:
            values = np.random.default_rng(0).standard_normal(_POOL, np.float32) * np.float32(scale)
            self._pools[dtype, scale] = measure.to_device(values.astype(numpy_dtype(dtype))).view(np.uint16)
        pool, size = self._pools[dtype, scale], math.prod(shape)
        made = cupy.empty(size, np.uint16)
        for at, start, length in pieces(size, seed * 77_777 % _POOL, _POOL):
            made[at : at + length] = pool[start : start + length]
        return made.view(numpy_dtype(dtype)).reshape(shape)


def pieces(size: int, start: int, period: int) -> Iterator[tuple[int, int, int]]:
    """(position, position in the pool, length) of the copies that fill `size` values from a pool of `period`, begun at `start`."""
    at = 0
    while at < size:
        length = min(period - start, size - at)
        yield at, start, length
        at, start = at + length, 0


def _each(measured: Callable[..., list[Row]], items: Iterable[tuple[Any, ...]], until: float) -> Iterator[list[Row]]:
    """`measured` of each item, until `time.monotonic()` passes `until`; items after that are left out."""
    for item in items:
        if time.monotonic() > until:
            return
        yield measured(*item)
        _free()


def _in_turns(made: Mapping[str, Callable[[], measure.Graph]]) -> tuple[Mapping[str, float], dict[str, str]]:
    """(microseconds, notes) by name: whatever one of them does, the others are measured, and its note says what it was."""
    graphs: dict[str, measure.Graph] = {}
    notes: dict[str, str] = {}
    for name, make in made.items():
        try:
            graphs[name] = make()
        except Exception as error:
            notes[name] = f"{name}: {records.reason(error)}"
    try:
        return measure.interleaved(graphs), notes
    except Exception as error:  # an error of the GPU shows only here, and belongs to no one graph
        return {}, dict.fromkeys(made, records.reason(error))


def _note(own: str, names: Iterable[str], notes: Mapping[str, str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, (own, *(notes.get(name) for name in names)))))


def _free() -> None:
    """Give back what the operands of a shape took; after an error of the GPU there may be nothing left to do it with."""
    import cupy  # noqa: PLC0415

    with suppress(Exception):
        cupy.get_default_memory_pool().free_all_blocks()
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.cuda.empty_cache()
