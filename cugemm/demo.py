"""The main job, end to end: take the linear layers of a model, quantise them, run them, and compare every format with float64.

On a GPU the layers of a group run one after the other in a CUDA graph (a group that fits L2 stays there); without one, the NumPy
reference computes the same numbers, of large weights for their first rows only, and its times say nothing about a GPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cugemm import cases, checkpoints, driver, launch, measure
from cugemm.arrays import HOST, numpy_dtype
from cugemm.cases import Case
from cugemm.compile import INSTALL

Array = np.ndarray[Any, Any]

FORMATS = tuple(name for name in cases.CASES if name != "fp16")
SYNTHETIC = {
    "llama-1b": (
        ("attention qkv", 3072, 2048, 16),
        ("attention out", 2048, 2048, 16),
        ("mlp gate, up", 16384, 2048, 16),
        ("mlp down", 2048, 8192, 16),
    ),
    "llama-8b": (
        ("attention qkv", 6144, 4096, 32),
        ("attention out", 4096, 4096, 32),
        ("mlp gate, up", 28672, 4096, 32),
        ("mlp down", 4096, 14336, 32),
    ),
}
"""Shapes of Llama 3.2 1B and 3.1 8B as (name, n, k, layers); the weights are random."""

_MOST_VALUES_HOST, _MOST_VALUES_GPU = 4 << 20, 256 << 20  # of one group: what a CPU quantises in seconds, what a GPU surely holds
_MOST_OF_ONE = 1 << 20  # values of one weight on a CPU
_BLOCK = 4096  # rows of a weight that are float64 at a time


class Group(NamedTuple):
    """Layers of one shape, and how to get the weight of each."""

    label: str
    n: int
    k: int
    weights: tuple[Callable[[], Array], ...]


class Source(NamedTuple):
    """Where the layers come from, in words, and the layers."""

    title: str
    groups: tuple[Group, ...]


class Line(NamedTuple):
    """One row of the table: a group of layers in one format. Times are per layer, `nbytes` of all `layers`; errors as in `errors`.

    measured: layers that ran; rows: how many of the n rows of each. us: the product of operands that are quantised, None on the host;
    layer_us: with the quantiser of x.
    """

    group: str
    layers: int
    measured: int
    rows: int
    n: int
    k: int
    format: str
    nbytes: int
    error: float
    worst: float
    us: float | None
    layer_us: float
    rate: str
    kernel: str
    config: str


def from_checkpoint(path: str | Path) -> Source:
    """The linear layers of a safetensors file or directory. Errors: as `checkpoints.read`."""
    found = checkpoints.read(path)
    made = (Group(g.label, g.n, g.k, tuple(layer.load for layer in g.layers)) for g in checkpoints.groups(found.layers))
    return Source(f"{len(found.layers)} linear layers of {path} ({found.others} other tensors left as they are)", tuple(made))


def synthetic(name: str) -> Source:
    """Random weights in the shapes of a known model; ValueError with the names that exist."""
    if name not in SYNTHETIC:
        raise ValueError(f"synthetic model is {name!r}; wanted one of {', '.join(SYNTHETIC)}.")
    made = (Group(label, n, k, tuple(_random_weight(n, k, seed) for seed in range(count))) for label, n, k, count in SYNTHETIC[name])
    return Source(f"random weights in the shapes of {name}", tuple(made))


def _random_weight(n: int, k: int, seed: int) -> Callable[[], Array]:
    def load() -> Array:
        values = np.random.default_rng([seed, n, k]).standard_normal((n, k), np.float32)
        scaled: Array = (values * np.float32(0.02)).astype(numpy_dtype("bfloat16"))
        return scaled

    return load


def default_source(on_gpu: bool) -> Source:
    """The installed example model, else a synthetic one that suits the machine."""
    path = checkpoints.example()
    return from_checkpoint(path) if path is not None else synthetic("llama-8b" if on_gpu else "llama-1b")


def run(source: Source, formats: tuple[str, ...] = FORMATS, m: int = 16, on_gpu: bool = False) -> Iterator[Line]:
    """Quantise and run every group in every format with m rows of random activations; a line for each.

    Weights keep the values of the checkpoint; activations are standard normal, rounded to 16 bits, and quantised as the format says.
    """
    chosen = [cases.case(name) for name in formats]
    with _progress(len(source.groups) * len(chosen)) as advance:
        for group in source.groups:
            weights = [load()[: rows(group, on_gpu)] for load in group.weights[: measured(group, on_gpu)]]
            right: dict[str, tuple[Array, list[Array]]] = {}
            for case in chosen:
                if case.dtype not in right:
                    x = np.random.default_rng([m, group.k]).standard_normal((m, group.k), np.float32).astype(numpy_dtype(case.dtype))
                    right[case.dtype] = x, [exact(x, w) for w in weights]
                yield _line(group, weights, case, *right[case.dtype], on_gpu)
                advance()


def rows(group: Group, on_gpu: bool) -> int:
    """How many rows of a weight, output features, are run: on a CPU what it takes easily, at least one."""
    return group.n if on_gpu else max(1, min(group.n, _MOST_OF_ONE // group.k))


def measured(group: Group, on_gpu: bool) -> int:
    """How many layers of a group are run: all that the machine takes easily, at least one."""
    most = _MOST_VALUES_GPU if on_gpu else _MOST_VALUES_HOST
    return max(1, min(len(group.weights), most // (rows(group, on_gpu) * group.k)))


def _line(group: Group, weights: list[Array], case: Case, x: Array, right: list[Array], on_gpu: bool) -> Line:
    place: Callable[[Array], Any] = measure.to_device if on_gpu else np.ascontiguousarray
    wide = place(x)
    prepared = [case.weight(place(w if case.weights else w.astype(x.dtype))) for w in weights]
    results, best = [], float("inf")
    for b in prepared:
        started = time.perf_counter()
        results.append(measure.to_host(case.layer(wide, b)))
        best = min(best, time.perf_counter() - started)  # a CPU that others use has no median worth having
    error, worst = errors(results, right)

    us, layer_us = _gpu_us(case, wide, prepared) if on_gpu else (None, best * 1e6)
    m, n, k, layers = len(x), group.n, group.k, len(group.weights)
    nbytes = cases.stored(case.weights, n, k) * layers
    rate = rate_text(case, m, len(weights[0]), k, layer_us if us is None else us, on_gpu)
    kernel, config = cases.kernel(case, m, n, k, 0 if on_gpu else HOST)
    return Line(
        group.label, layers, len(weights), len(weights[0]), n, k, case.format, nbytes, error, worst, us, layer_us, rate, kernel, config
    )  # fmt: skip


def exact(x: Array, w: Array) -> Array:
    """x @ w.T in float64, from the unquantised values."""
    wide = x.astype(np.float64)
    return np.concatenate([wide @ w[i : i + _BLOCK].astype(np.float64).T for i in range(0, len(w), _BLOCK)], axis=1)


def errors(results: list[Array], wanted: list[Array]) -> tuple[float, float]:
    """(norm of all errors / norm of the exact results, largest error / root mean square of the exact results). NaN shows as NaN."""
    squares, total, largest = 0.0, 0.0, 0.0
    for got, right in zip(results, wanted, strict=True):
        off = got.astype(np.float64) - right
        squares += float(np.sum(off * off))
        total += float(np.sum(right * right))
        largest = float(np.fmax(largest, np.max(np.abs(off)))) if np.isfinite(off).all() else float("nan")
    size = sum(right.size for right in wanted)
    return float(np.sqrt(squares / total)), largest / float(np.sqrt(total / size))


def _gpu_us(case: Case, x: Any, weights: list[Any]) -> tuple[float, float]:
    """Microseconds of the product alone, and of the layer with the quantiser of x, in turns."""
    a = case.activation(x)
    out = case.product(a, weights[0])  # written again and again, never read
    calls: dict[str, measure.Call] = {"product": lambda i: case.product(a, weights[i % len(weights)], out)}
    if case.activations is not None:
        calls["layer"] = lambda i: case.layer(x, weights[i % len(weights)], out)
    times = measure.interleaved({name: measure.graph(measure.CupyGraph, call, len(weights)) for name, call in calls.items()})
    return times["product"], times.get("layer", times["product"])


def rate_text(case: Case, m: int, n: int, k: int, us: float, on_gpu: bool) -> str:
    """The rate of what bounds the product on the machine: bytes moved or arithmetic done per second."""
    moved, done = cases.traffic(case, m, n, k), cases.flops(m, n, k)
    if not on_gpu:
        return f"{done / us / 1e3:.1f} GFLOP/s"
    target, device = launch.machine(0)
    memory_bound = moved / device.read_gbs / 1e9 > done / measure.peak_tflops(target, device, cases.operand_bits(case)) / 1e12
    return f"{moved / us / 1e3:.0f} GB/s" if memory_bound else f"{done / us / 1e6:.0f} TFLOP/s"


HEADER = ("layers", "count", "n x k", "format", "MB", "rel. error", "max error", "us", "us with x", "rate", "kernel")

LEGEND = (
    "us: one product of one layer, activations quantised before, and its rate; us with x: linear(x, w, activations=...), which quantises "
    "x too (on the host the rate is of this). "
    "Errors are of that call, against float64 products of the unquantised values: norm of the errors / norm of the results, and largest "
    "error / root mean square of the results."
)


def cells(line: Line) -> tuple[str, ...]:
    """A line as text, in the columns of HEADER."""
    count = f"{line.layers}" if line.measured == line.layers else f"{line.measured} of {line.layers}"
    count += "" if line.rows == line.n else f", {line.rows} rows"
    return (
        line.group, count, f"{line.n} x {line.k}", line.format, f"{line.nbytes / 1e6:.1f}", f"{line.error:.1e}", f"{line.worst:.1e}",
        "-" if line.us is None else f"{line.us:.1f}", f"{line.layer_us:.1f}", line.rate,
        line.kernel if line.kernel == "reference" else f"{line.kernel}: {line.config}",
    )  # fmt: skip


def summary(lines: list[Line]) -> list[str]:
    """One sentence per format: the size of all layers beside bf16, and the error over all groups."""
    told = []
    for name in dict.fromkeys(line.format for line in lines):
        mine = [line for line in lines if line.format == name]
        size, bf16 = sum(line.nbytes for line in mine), sum(2 * line.layers * line.n * line.k for line in mine)
        low, high = min(line.error for line in mine), max(line.error for line in mine)
        told.append(f"{name}: {size / 1e6:.1f} MB, {size / bf16:.2f} of bf16, relative error {low:.1e} to {high:.1e}")
    return told


def where() -> tuple[bool, str]:
    """Whether products run on a GPU here, and a line that says so."""
    if not driver.available():
        return False, "No GPU here: the NumPy reference computes these numbers; its times say nothing about a GPU."
    if measure.optional("cupy") is None:
        return False, f"A GPU but no CuPy here: {INSTALL}. The NumPy reference computes these numbers."
    target, device = launch.machine(0)
    return True, f"On {device.name} ({target.name})."


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], object]]:
    """A bar on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm  # noqa: PLC0415 - optional
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, desc="layers x formats", disable=None, leave=False) as bar:
        yield bar.update
