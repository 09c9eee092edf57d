"""The products that `bench`, `demo`, `compile` and `explain` speak about: one line per format, and the shapes of published baselines.

A `Case` turns 16-bit operands x [m, k] and w [n, k] of any framework, or Specs of them, into the call that a user would write.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cugemm import arch, gemm, launch, select
from cugemm.api.dense import linear
from cugemm.api.grouped_matmul import grouped_matmul
from cugemm.api.quantize import quantize
from cugemm.api.rowwise import combine, silu_and_mul
from cugemm.arrays import HOST, Spec
from cugemm.catalog import Step, segments
from cugemm.compile import Job
from cugemm.conversion import scale_shape
from cugemm.formats import ALL, BF16, FORMATS, FP32
from cugemm.problem import BUCKETS, GemmCall
from cugemm.quantized import Quantized


class Case(NamedTuple):
    """One format of a product. `activations` and `weights` name the formats that x and w are quantised to, None where they stay `dtype`."""

    format: str
    op: str
    dtype: str
    activations: str | None
    weights: str | None
    baselines: tuple[str, ...]

    def activation(self, x: Any) -> Any:
        return x if self.activations is None else quantize(x, self.activations)

    def weight(self, w: Any) -> Any:
        return w if self.weights is None else quantize(w, self.weights)

    def product(self, a: Any, b: Any, out: Any = None, *, batch_invariant: bool = False) -> Any:
        """x @ w.T of what `activation` and `weight` returned; by `linear`, which can always do so, if batch_invariant."""
        if self.op == "linear" or batch_invariant:
            return linear(a, b, out=out, batch_invariant=batch_invariant)
        if self.op == "gemm_fp8_nt_groupwise":
            return gemm.gemm_fp8_nt_groupwise(a, b, None, None, "K", out=out)
        return getattr(gemm, self.op)(a, b.T, out=out)

    def link(self, a: Any, b: Any, out: Any = None, *, overlap: bool = False) -> Any:
        """`product` as one of a chain; overlap: its launch may begin, and read weights, before the one in front of it has ended."""
        return linear(a, b, out=out, pdl=overlap, static_weights=overlap)

    def layer(self, x: Any, b: Any, out: Any = None) -> Any:
        """x @ w.T of 16-bit x and what `weight` returned, x quantised on the way: what a model calls."""
        return linear(x, b, activations=self.activations, out=out)


_BF16 = ("torch.bf16",)
CASES = {
    case.format: case
    for case in (
        Case("bf16", "mm_bf16", "bfloat16", None, None, _BF16),
        Case("fp16", "linear", "float16", None, None, ("torch.fp16", "torch.bf16")),
        Case("fp8_tensor", "mm_fp8", "bfloat16", "fp8_tensor", "fp8_tensor", ("torch.fp8_tensor", "torch.bf16")),
        Case("fp8_row", "mm_fp8", "bfloat16", "fp8_row", "fp8_row", ("torch.fp8_row", "torch.bf16")),
        Case("fp8_block", "gemm_fp8_nt_groupwise", "bfloat16", "fp8_group", "fp8_block", ("torch.fp8_block", "torch.bf16")),
        Case("w8a16_fp8", "linear", "bfloat16", None, "fp8_row", _BF16),
        Case("mxfp8", "linear", "bfloat16", "mxfp8", "mxfp8", _BF16),
        Case("nvfp4", "linear", "bfloat16", "nvfp4", "nvfp4", _BF16),
        Case("mxfp4", "linear", "bfloat16", "mxfp4", "mxfp4", _BF16),
        Case("w4a16_nvfp4", "linear", "bfloat16", None, "nvfp4", _BF16),
        Case("w4a16_mxfp4", "linear", "bfloat16", None, "mxfp4", _BF16),
        Case("int4_g128", "linear", "bfloat16", None, "int4_g128", _BF16),
        Case("int8", "linear", "bfloat16", None, "int8_row", _BF16),
    )
}
"""By the name that benchmark rows carry. fp8_block: x 1 x 128, w 128 x 128. w8a16_fp8, int8: 16-bit x, w with a scale per output feature.
w4a16_nvfp4, w4a16_mxfp4, int4_g128: 16-bit x. The others quantise both."""

SHAPES = (
    (7168, 2048), (2112, 7168), (6144, 4096), (4096, 7168), (24576, 1536), (11008, 4096), (4096, 14336), (7168, 16384), (28672, 4096)
)  # fmt: skip
"""(n, k) of linear layers of Llama 2 and 3 and DeepSeek V3, as published baselines use them; plus squares, which are in PRESETS."""
ROWS = (1, 8, 16, 64, 128, 1024, 4096)


class Chain(NamedTuple):
    """Products one after the other: `turns` times one with a weight of each (n, k) of `sizes`.

    name: of the layer that these make, and then every turn has weights of its own; empty for one weight, which rotates over cold copies.
    """

    name: str
    sizes: tuple[tuple[int, int], ...]
    turns: int

    @property
    def whole(self) -> tuple[int, int]:
        """(n, k) of one weight with as many values as all `sizes`, k as the first."""
        k = self.sizes[0][1]
        return sum(math.prod(size) for size in self.sizes) // k, k


DECODE = Chain("Llama-3-8B", ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)), 8)
"""Products of a decode step: q, k and v in one, output, gate and up in one, down; of 8 layers."""


class Preset(NamedTuple):
    shapes: tuple[tuple[int, int, int], ...]  # (m, n, k)
    formats: tuple[str, ...]
    chain: Chain | None = None  # what each shape is the whole of
    batch_invariant: bool = False  # beside the same without


PRESETS = {
    "baselines": Preset(
        ((8192, 8192, 8192), (4096, 4096, 4096), *((m, n, k) for n, k in SHAPES for m in ROWS)),
        ("bf16", "fp16", "fp8_tensor", "fp8_row", "fp8_block", "w8a16_fp8"),
    ),
    "formats": Preset(
        ((4096, 4096, 4096), *((m, n, k) for n, k in ((28672, 4096), (4096, 4096)) for m in (1, 16, 128, 1024))),
        tuple(name for name in CASES if name != "fp16"),
    ),
    "quick": Preset(
        ((4096, 4096, 4096), *((m, n, k) for n, k in ((7168, 2048), (28672, 4096)) for m in (1, 16, 128))), ("bf16", "fp8_row", "fp8_block")
    ),
    "decode": Preset(tuple((m, *DECODE.whole) for m in (1, 8, 32)), ("bf16", "w8a16_fp8", "fp8_tensor", "w4a16_nvfp4"), DECODE),
    "batch_invariant": Preset(
        tuple((m, n, k) for n, k in DECODE.sizes for m in (1, 16, 64, 512)), ("bf16", "fp8_tensor", "w4a16_nvfp4"), batch_invariant=True
    ),
}


class Quantiser(NamedTuple):
    """One way to quantise: arguments of `quantize`."""

    format: str
    scale_layout: str = "linear"
    tensor_scale: float | None = None
    note: str = ""

    def __call__(self, x: Any) -> Quantized:
        return quantize(x, self.format, scale_layout=self.scale_layout, tensor_scale=self.tensor_scale)


QUANTISERS = (
    *map(Quantiser, ("fp8_tensor", "fp8_row", "fp8_group", "fp8_block", "mxfp8", "mxfp4")),
    Quantiser("nvfp4", "linear", 1.0, "tensor scale given"),
    Quantiser("nvfp4", "128x4", 1.0, "tensor scale given, 128x4 tiles"),
    Quantiser("nvfp4", note="tensor scale computed first"),
    *map(Quantiser, ("int8_row", "int4_g128", "uint4_g128")),
)
QUANTISED = ((4096, 8192), (8192, 8192), (1024, 4096), (16, 4096))
"""(rows, k) that `bench quantize` times."""


class Layer(NamedTuple):
    """A mixture of experts: `topk` of `experts` SwiGLU layers of hidden size `hidden` and inner size `inner` for every token."""

    name: str
    experts: int
    topk: int
    hidden: int
    inner: int


LAYERS = (Layer("Qwen3-30B-A3B", 128, 8, 2048, 768), Layer("Mixtral-8x7B", 8, 2, 4096, 14336))
LAYER_ROWS = (1, 16, 128, 1024)
LAYER_FORMATS = ("bf16", "fp8_row", "fp8_block", "w4a16_nvfp4", "w4a16_mxfp4", "int4_g128")
"""What `bench moe` times."""


def mixture(case: Case, x: Any, w13: Any, w2: Any, indices: Any, weights: Any) -> Any:
    """y[t] = sum over j of weights[t, j] * w2[e] @ silu_and_mul(w13[e] @ x[t]), e = indices[t, j]: a layer, quantisers included."""
    inner = silu_and_mul(grouped_matmul(x, w13, indices=indices, activations=case.activations))
    return grouped_matmul(inner, w2, indices=indices, weights=weights, activations=case.activations)


def route(layer: Layer, m: int, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(experts [m, topk] int32, weights [m, topk] float32) at random: the experts of a token differ, its weights add up to 1."""
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((m, layer.experts)), axis=1)[:, : layer.topk].astype(np.int32)
    weights = rng.random((m, layer.topk), np.float32) + np.float32(0.1)
    return order, weights / weights.sum(axis=1, keepdims=True)


def case(name: str) -> Case:
    """The case called `name`; ValueError with the names that exist."""
    if name not in CASES:
        raise ValueError(f"format is {name!r}; wanted one of {', '.join(CASES)}.")
    return CASES[name]


def flops(m: int, n: int, k: int) -> float:
    return 2.0 * m * n * k


def traffic(case: Case, m: int, n: int, k: int) -> int:
    """Bytes that must move: both operands once, their scales, and the 16-bit result."""
    return stored(case.activations, m, k) + stored(case.weights, n, k) + 2 * m * n


def chain_traffic(case: Case, chain: Chain, m: int) -> int:
    """Bytes that one turn must move."""
    return sum(traffic(case, m, n, k) for n, k in chain.sizes)


def stored(name: str | None, rows: int, k: int) -> int:
    """Bytes of [rows, k] values in a format, scales and zero points included; 16-bit if `name` is None."""
    if name is None:
        return 2 * rows * k
    fmt = FORMATS[name]
    blocks = math.prod(scale_shape((rows, k), fmt))
    tensor = 0 if fmt.tensor is None else 1 if fmt.tensor[0] == ALL else rows
    return rows * k * fmt.element.bits // 8 + blocks * (fmt.scale.bits // 8 + fmt.zero) + 4 * tensor


def quantiser_traffic(name: str, rows: int, k: int) -> int:
    """Bytes that quantising [rows, k] 16-bit values must move."""
    return stored(None, rows, k) + stored(name, rows, k)


def layer_traffic(case: Case, layer: Layer, m: int, experts: int) -> int:
    """Bytes that a layer must move for m tokens that go to so many experts: their weights, x, and the result."""
    each = stored(case.weights, 2 * layer.inner, layer.hidden) + stored(case.weights, layer.hidden, layer.inner)
    return experts * each + 4 * m * layer.hidden


def layer_flops(layer: Layer, m: int) -> float:
    return m * layer.topk * (flops(1, 2 * layer.inner, layer.hidden) + flops(1, layer.hidden, layer.inner))


def operand_bits(case: Case) -> int:
    """Bits of the widest operand: what the fastest tensor cores that could take both have at least, so that they set the floor."""
    return max(16 if name is None else FORMATS[name].element.bits for name in (case.activations, case.weights))


# What would run, without running it


def record(case: Case, m: int, n: int, k: int, device: int = HOST, batch_invariant: bool = False) -> list[launch.Recorded]:
    """The calls of a case, quantisation included. On the host nothing is chosen: `choose` then plans for any arch, so no GPU is needed."""
    x, w = Spec((m, k), case.dtype, device=device), Spec((n, k), case.dtype, device=device)
    with launch.recording() as calls:
        case.product(case.activation(x), case.weight(w), batch_invariant=batch_invariant)
    return calls


def record_rows(dtype: str) -> list[launch.Recorded]:
    """The calls between and behind grouped products of 16-bit values: gates, and sums over experts, whose rows are float32 if weighted."""
    with launch.recording() as calls:
        silu_and_mul(Spec((1, 2), dtype, device=HOST))
        for y in (dtype, FP32.dtype):
            combine(Spec((1, 1, 1), y, device=HOST), Spec((1, 1), FP32.dtype, device=HOST), out_dtype=dtype)
    return calls


def record_quantiser(quantiser: Quantiser, m: int, k: int, device: int = HOST) -> list[launch.Recorded]:
    with launch.recording() as calls:
        quantiser(Spec((m, k), BF16.dtype, device=device))
    return calls


def record_chain(chain: Chain, case: Case, m: int, overlap: bool, device: int = HOST) -> list[launch.Recorded]:
    """The products of one turn."""
    with launch.recording() as calls:
        for n, k in chain.sizes:
            a, b = case.activation(Spec((m, k), case.dtype, device=device)), case.weight(Spec((n, k), case.dtype, device=device))
            case.link(a, b, overlap=overlap)
    return [recorded for recorded in calls if isinstance(recorded.call, GemmCall)]


def record_layer(layer: Layer, case: Case, m: int, device: int = HOST) -> list[launch.Recorded]:
    """The products of a mixture."""
    x, indices, weights = (
        Spec(shape, dtype, device=device)
        for shape, dtype in (((m, layer.hidden), case.dtype), ((m, layer.topk), "int32"), ((m, layer.topk), "float32"))
    )
    with launch.recording() as calls:
        w13 = case.weight(Spec((layer.experts, 2 * layer.inner, layer.hidden), case.dtype, device=device))
        w2 = case.weight(Spec((layer.experts, layer.hidden, layer.inner), case.dtype, device=device))
        mixture(case, x, w13, w2, indices, weights)
    return [recorded for recorded in calls if isinstance(recorded.call, GemmCall)]


def kernel(case: Case, m: int, n: int, k: int, device: int) -> tuple[str, str]:
    """(name, config) of the kernel that the product of a case runs on."""
    return chosen(record(case, m, n, k, device)[-1])


def chosen(recorded: launch.Recorded) -> tuple[str, str]:
    """(name, config) of the kernel that a recorded call takes."""
    choice = recorded.choice
    return ("reference", "NumPy") if choice is None else (choice.best.kernel.name, str(choice.best.config))


def choose(recorded: launch.Recorded, target: arch.Arch) -> select.Choice:
    """What selection answers on an H100 whose arch is `target`: without a GPU there is nothing else to ask."""
    device = arch.H100._replace(smem_per_sm=target.smem_per_sm)
    return select.choose(recorded.call.problem._replace(arch=target.name), device)


class Listed(NamedTuple):
    """A config that some m can get for one format of one weight; n and k are 0 where any weight gets it."""

    what: str
    n: int
    k: int
    kernel: str
    config: str


def configs(formats: Iterable[str], weights: Iterable[tuple[int, int]], target: arch.Arch) -> Iterator[Listed]:
    """Every config that `formats` run with: those of products for any m, and all others once."""
    named = [case(name) for name in formats]
    others: dict[Listed, None] = {}
    for n, k in weights:
        seen: dict[Listed, None] = {}
        for one in named:
            for recorded in (*record(one, 1, n, k), *record_rows(one.dtype)):
                if isinstance(recorded.call, GemmCall):
                    seen |= dict.fromkeys(_of_buckets(one.format, recorded, target))
                else:
                    best = choose(recorded, target).best
                    others[Listed(str(recorded.call.problem), 0, 0, best.kernel.name, str(best.config))] = None
        yield from seen
    yield from others


def _of_buckets(name: str, recorded: launch.Recorded, target: arch.Arch) -> Iterator[Listed]:
    problem = recorded.call.problem
    pair = str(problem).partition(" -> ")[0]
    for m in BUCKETS:
        choice = choose(recorded._replace(call=recorded.call._replace(problem=problem._replace(m=m))), target)
        yield Listed(f"{name} ({pair})", problem.n, problem.k, choice.best.kernel.name, str(choice.best.config))


def jobs(formats: Iterable[str], weights: Sequence[tuple[int, int]], target: arch.Arch) -> list[Job]:
    """The cubins that `formats` need on `target`, each once, those of quantisation, of grouping and of mixtures included."""
    found: dict[tuple[str, tuple[tuple[str, int], ...]], Job] = {
        ("segments", (("MODE", mode),)): Job("segments", target, {"MODE": mode}) for mode in segments.MODES
    }
    for one in map(case, formats):
        calls = record_rows(one.dtype)
        for n, k in weights:
            for m in BUCKETS:
                calls += record(one, m, n, k)
        for recorded in calls:
            best = choose(recorded, target).best
            for step in best.kernel.steps(recorded.call, best.config):
                if isinstance(step, Step):
                    found.setdefault((step.source, step.defines), Job(step.source, target, dict(step.defines)))
    return list(found.values())
