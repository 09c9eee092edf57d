"""`python -m cugemm bench`: the rows of a benchmark document, measured. Method: docs/benchmarks/README.md; schema: `records`."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from cugemm import cases, launch, measure
from cugemm.api import fp8
from cugemm.arrays import numpy_dtype
from cugemm.cases import Case, Chain, Layer
from cugemm.errors import NoKernelError
from cugemm.records import Row

_ARENA = 1 << 30
_POOL = 1 << 22
_HOST_SHAPE = (16, 4096, 4096)
_ROUTES = 4
"""Ways of tokens to experts that calls of a mixture rotate over."""


# Time on the GPU


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
        for m, n, k in shapes:
            if time.monotonic() > until:
                return
            yield self._shape(chosen, m, n, k)
            _free()

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
        return _row(
            _product(case, m, n, k), us=_rounded(times.get(case.format)), floor_us=_rounded(self._floor(case, m, n, k)),
            stream_us=_rounded(times.get(f"stream {size}")),
            baselines={name: _rounded(times[name]) for name in case.baselines if name in times},
            note=_note("", (case.format, f"stream {size}", *case.baselines), notes),
        )  # fmt: skip

    def _floor(self, case: Case, m: int, n: int, k: int) -> float:
        peak = measure.peak_tflops(self._target, self._info, cases.operand_bits(case))
        return max(cases.traffic(case, m, n, k) / self.read_gbs / 1e3, cases.flops(m, n, k) / peak / 1e6)

    def chain_rows(self, chains: Iterable[tuple[Chain, int]], formats: Sequence[str], until: float) -> Iterator[list[Row]]:
        """Rows of each (chain, m), as `rows`, in microseconds of one turn: for each format one, and one with launches that overlap."""
        chosen = [cases.case(name) for name in formats]
        for chain, m in chains:
            if time.monotonic() > until:
                return
            yield self._chained(chain, m, chosen)
            _free()

    def _chained(self, chain: Chain, m: int, chosen: Sequence[Case]) -> list[Row]:
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
        product = _named(
            "decode" if chain.name else "chain", case.format, (m, *chain.whole), 1,
            functools.partial(cases.record_chain, chain, case, m, overlap, 0),
        )  # fmt: skip
        return _row(
            product, us=_rounded(times.get(name)), floor_us=_rounded(sum(self._floor(case, m, n, k) for n, k in chain.sizes)),
            stream_us=_rounded(times.get(stream)), baselines={peer: _rounded(times[peer]) for peer in peers if peer in times},
            note=_note(what + ", pdl, static weights" * overlap, (name, stream, *peers), notes),
        )  # fmt: skip

    def quantiser_rows(self, shapes: Iterable[tuple[int, int]], until: float) -> Iterator[list[Row]]:
        """Rows of each (rows, k), as `rows`: every quantiser beside a copy that moves as many bytes from device to device."""
        for m, k in shapes:
            if time.monotonic() > until:
                return
            yield self._quantised(m, k)
            _free()

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
            us, stream, copy = (_rounded(times.get(name)) for name in names)
            product = _named("quantize", quantiser.format, (m, 0, k), 1, functools.partial(cases.record_quantiser, quantiser, m, k, 0))
            rows.append(
                _row(
                    product, us=us, floor_us=_rounded(size / self.read_gbs / 1e3), stream_us=stream,
                    baselines={} if copy is None else {"copy": copy},
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
        for layer, m in layers:
            if time.monotonic() > until:
                return
            yield self._mixture(layer, m, chosen)
            _free()

    def _mixture(self, layer: Layer, m: int, chosen: Sequence[Case]) -> list[Row]:
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
            product = _named(
                "moe", case.format, (m, layer.inner, layer.hidden), layer.experts, functools.partial(cases.record_layer, layer, case, m, 0)
            )  # fmt: skip
            names = case.format, f"stream {size}"
            what = f"{layer.name}, {layer.topk} of {layer.experts} experts, {touched} in use"
            rows.append(
                _row(
                    product, us=_rounded(times.get(case.format)), floor_us=_rounded(floor), stream_us=_rounded(times.get(names[1])),
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

    def _ours(self, case: Case, m: int, n: int, k: int) -> measure.Graph:
        copies = self._copies(n * k * (1 if case.weights else 2))
        a = case.activation(self._values((m, k), case.dtype, 0))
        weights = [case.weight(self._values((n, k), case.dtype, i + 1)) for i in range(copies)]
        out = case.product(a, weights[0])
        return measure.graph(measure.CupyGraph, lambda i: case.product(a, weights[i % copies], out), copies)

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


def _in_turns(made: Mapping[str, Callable[[], measure.Graph]]) -> tuple[Mapping[str, float], dict[str, str]]:
    """(microseconds, notes) by name: whatever one of them does, the others are measured, and its note says what it was."""
    graphs: dict[str, measure.Graph] = {}
    notes: dict[str, str] = {}
    for name, make in made.items():
        try:
            graphs[name] = make()
        except Exception as error:
            notes[name] = f"{name}: {_first_line(error)}"
    try:
        return measure.interleaved(graphs), notes
    except Exception as error:  # an error of the GPU shows only here, and belongs to no one graph
        return {}, dict.fromkeys(made, _first_line(error))


def _note(own: str, names: Iterable[str], notes: Mapping[str, str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, (own, *(notes.get(name) for name in names)))))


def _product(case: Case, m: int, n: int, k: int) -> Row:
    return _named(case.op, case.format, (m, n, k), 1, functools.partial(cases.record, case, m, n, k, 0))


def _named(op: str, name: str, shape: tuple[int, int, int], groups: int, record: Callable[[], list[launch.Recorded]]) -> Row:
    """The part of a row that says what was measured; the kernel is that of the last recorded call."""
    try:
        kernel = ": ".join(cases.chosen(record()[-1]))
    except NoKernelError:
        kernel = "none"
    m, n, k = shape
    return {"op": op, "format": name, "m": m, "n": n, "k": k, "groups": groups, "kernel": kernel}


def _row(product: Row, note: str = "", **measured: Any) -> Row:
    return {**product, **measured, **({"note": note} if note else {})}


def _rounded(us: float | None) -> float | None:
    return None if us is None else round(float(us), 2)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"


def _free() -> None:
    """Give back what the operands of a shape took; after an error of the GPU there may be nothing left to do it with."""
    import cupy  # noqa: PLC0415

    with suppress(Exception):
        cupy.get_default_memory_pool().free_all_blocks()
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.cuda.empty_cache()


# Time on the host


def host_rows() -> list[Row]:
    """Host time of a warm `mm_fp8` per framework, with and without out=, beside torch._scaled_mm, in one run."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes most of the GPU's memory from the others
    import cupy  # noqa: PLC0415

    calls: dict[str, Callable[[], object]] = {}
    notes: dict[str, str] = {}
    for name, make in (("CuPy", _cupy_calls), ("PyTorch", _torch_calls), ("JAX, eager", _jax_calls)):
        try:
            made = make()
            for call in made.values():
                call()
            calls |= made
        except Exception as error:  # a framework that is absent or broken is a note
            notes[name] = f"{name}: {_first_line(error)}"
    times = measure.host_us(calls, cupy.cuda.Device().synchronize)
    product = _product(cases.CASES["fp8_tensor"], *_HOST_SHAPE)
    peers = {name: round(us, 2) for name, us in times.items() if name.startswith("torch.")}
    rows = [
        _row(product, host_us=round(us, 2), host_baselines=peers, note=f"{name}, warm") for name, us in times.items() if name not in peers
    ]
    return rows + [_row(product, host_us=None, host_baselines=peers, note=note) for note in notes.values()]


def _operands() -> tuple[Any, Any, Any, Any]:
    """(a [m, k], w [n, k], scale of a [1], of w [1]) in host memory."""
    m, n, k = _HOST_SHAPE
    x = np.random.default_rng(0).standard_normal((m + n, k), np.float32).astype(numpy_dtype("float8_e4m3fn"))
    return x[:m], x[m:], np.full(1, 0.5, np.float32), np.full(1, 0.5, np.float32)


def _cupy_calls() -> dict[str, Callable[[], object]]:
    a, w, sa, sb = map(measure.to_device, _operands())
    b = w.T
    out = fp8.mm_fp8(a, b, a_scale=sa, b_scale=sb)
    return {
        "CuPy": lambda: fp8.mm_fp8(a, b, a_scale=sa, b_scale=sb),
        "CuPy, out=": lambda: fp8.mm_fp8(a, b, a_scale=sa, b_scale=sb, out=out),
    }


def _torch_calls() -> dict[str, Callable[[], object]]:
    torch = _needed("torch")
    a, w = (torch.from_numpy(x.view(np.uint8)).cuda().view(torch.float8_e4m3fn) for x in _operands()[:2])
    b, sa, sb = w.t(), torch.full((1,), 0.5, device="cuda"), torch.full((1,), 0.5, device="cuda")
    out = fp8.mm_fp8(a, b, a_scale=sa, b_scale=sb)
    scaled_mm, options = torch._scaled_mm, {"scale_a": sa, "scale_b": sb, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return {
        "PyTorch": lambda: fp8.mm_fp8(a, b, a_scale=sa, b_scale=sb),
        "PyTorch, out=": lambda: fp8.mm_fp8(a, b, a_scale=sa, b_scale=sb, out=out),
        "torch.fp8_tensor": lambda: scaled_mm(a, b, **options),
        "torch.fp8_tensor, out=": lambda: scaled_mm(a, b, **options, out=out),
    }


def _jax_calls() -> dict[str, Callable[[], object]]:
    jax = _needed("jax")
    a, w, sa, sb = map(jax.device_put, _operands())
    b = w.T.block_until_ready()
    return {"JAX, eager": lambda: fp8.mm_fp8(a, b, a_scale=sa, b_scale=sb)}


def _needed(name: str) -> Any:
    found = measure.optional(name)
    if found is None:
        raise ImportError(f"{name} is not installed")
    return found


# First calls


def first_calls() -> list[Row]:
    """Host time of the first `mm_fp8` of a process: on an empty cache of kernels, and on one that has it."""
    rows = []
    product = _product(cases.CASES["fp8_tensor"], *_HOST_SHAPE)
    with tempfile.TemporaryDirectory() as cache:
        for note in ("first call, nothing in the cache", "first call, kernel in the cache"):
            environment = {**os.environ, "CUGEMM_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(sys.path)}
            command = (sys.executable, "-c", "from cugemm import bench; print(bench.time_first_call())")
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            us = round(float(done.stdout), 1) if done.returncode == 0 else None
            why = "" if us is not None else f": {(done.stderr.strip().splitlines() or ['failed'])[-1][:200]}"
            rows.append(_row(product, host_us=us, host_baselines={}, note=note + why))
    return rows


def time_first_call() -> float:
    """Microseconds from the first call of `mm_fp8` to its result; run in a fresh process."""
    import cupy  # noqa: PLC0415

    a, w, sa, sb = map(measure.to_device, _operands())
    cupy.cuda.Device().synchronize()
    started = time.perf_counter()
    fp8.mm_fp8(a, w.T, a_scale=sa, b_scale=sb)
    cupy.cuda.Device().synchronize()
    return (time.perf_counter() - started) * 1e6
