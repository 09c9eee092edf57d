"""The products that `bench`, `demo`, `compile` and `explain` speak about: one line per format, and the shapes of published baselines.

A `Case` turns 16-bit operands x [m, k] and w [n, k] of any framework, or Specs of them, into the call that a user would write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from cugemm import arch, launch, select
from cugemm.api import dense
from cugemm.api.quantize import quantize
from cugemm.arrays import HOST, Spec
from cugemm.catalog import Step, segments
from cugemm.compile import Job
from cugemm.conversion import scale_shape
from cugemm.formats import FORMATS
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

    def product(self, a: Any, b: Any, out: Any = None) -> Any:
        """x @ w.T of what `activation` and `weight` returned."""
        if self.op == "gemm_fp8_nt_groupwise":
            return dense.gemm_fp8_nt_groupwise(a, b, None, None, "K", out=out)
        if self.op == "linear":
            return dense.linear(a, b, out=out)
        return getattr(dense, self.op)(a, b.T, out=out)


CASES = {
    case.format: case
    for case in (
        Case("bf16", "mm_bf16", "bfloat16", None, None, ("torch.bf16",)),
        Case("fp16", "linear", "float16", None, None, ("torch.fp16", "torch.bf16")),
        Case("fp8_tensor", "mm_fp8", "bfloat16", "fp8_tensor", "fp8_tensor", ("torch.fp8_tensor", "torch.bf16")),
        Case("fp8_row", "mm_fp8", "bfloat16", "fp8_row", "fp8_row", ("torch.fp8_row", "torch.bf16")),
        Case("fp8_block", "gemm_fp8_nt_groupwise", "bfloat16", "fp8_group", "fp8_block", ("torch.fp8_block", "torch.bf16")),
        Case("w8a16_fp8", "linear", "bfloat16", None, "fp8_row", ("torch.bf16",)),
    )
}
"""By the name that benchmark rows carry. fp8_block: x 1 x 128, w 128 x 128. w8a16_fp8: 16-bit x, w e4m3 with a scale per output feature."""

SHAPES = (
    (7168, 2048), (2112, 7168), (6144, 4096), (4096, 7168), (24576, 1536), (11008, 4096), (4096, 14336), (7168, 16384), (28672, 4096)
)  # fmt: skip
"""(n, k) of linear layers of Llama 2 and 3 and DeepSeek V3, as published baselines use them; plus squares, which are in PRESETS."""
ROWS = (1, 8, 16, 64, 128, 1024, 4096)


class Preset(NamedTuple):
    shapes: tuple[tuple[int, int, int], ...]  # (m, n, k)
    formats: tuple[str, ...]


PRESETS = {
    "baselines": Preset(((8192, 8192, 8192), (4096, 4096, 4096), *((m, n, k) for n, k in SHAPES for m in ROWS)), tuple(CASES)),
    "quick": Preset(
        ((4096, 4096, 4096), *((m, n, k) for n, k in ((7168, 2048), (28672, 4096)) for m in (1, 16, 128))), ("bf16", "fp8_row", "fp8_block")
    ),
}


def case(name: str) -> Case:
    """The case called `name`; ValueError with the names that exist."""
    if name not in CASES:
        raise ValueError(f"format is {name!r}; wanted one of {', '.join(CASES)}.")
    return CASES[name]


def flops(m: int, n: int, k: int) -> float:
    return 2.0 * m * n * k


def traffic(case: Case, m: int, n: int, k: int) -> int:
    """Bytes that must move: both operands once, their scales, and the 16-bit result."""
    return _stored(case.activations, m, k) + _stored(case.weights, n, k) + 2 * m * n


def _stored(name: str | None, rows: int, k: int) -> int:
    if name is None:
        return 2 * rows * k
    return rows * k + 4 * math.prod(scale_shape((rows, k), FORMATS[name]))


def stored_bytes(weight: Any) -> int:
    """Bytes of a weight as `Case.weight` returned it, scale included."""
    return sum(int(x.nbytes) for x in ((weight.data, weight.scale) if isinstance(weight, Quantized) else (weight,)))


def is_fp8(case: Case) -> bool:
    """Whether both operands are fp8, so that fp8 tensor cores set the floor."""
    return case.activations is not None and case.weights is not None


# What would run, without running it


def record(case: Case, m: int, n: int, k: int, device: int = HOST) -> list[launch.Recorded]:
    """The calls of a case, quantisation included. On the host nothing is chosen: `choose` then plans for any arch, so no GPU is needed."""
    x, w = Spec((m, k), case.dtype, device=device), Spec((n, k), case.dtype, device=device)
    with launch.recording() as calls:
        case.product(case.activation(x), case.weight(w))
    return calls


def kernel(case: Case, m: int, n: int, k: int, device: int) -> tuple[str, str]:
    """(name, config) of the kernel that the product of a case runs on."""
    choice = record(case, m, n, k, device)[-1].choice
    return ("reference", "NumPy") if choice is None else (choice.best.kernel.name, str(choice.best.config))


def choose(recorded: launch.Recorded, target: arch.Arch) -> select.Choice:
    """What selection answers on an H100 whose arch is `target`: without a GPU there is nothing else to ask."""
    device = arch.H100._replace(smem_per_sm=target.smem_per_sm)
    return select.choose(recorded.call.problem._replace(arch=target.name), device)


class Listed(NamedTuple):
    """A config that some m can get for one pair of formats and one weight."""

    pair: str
    n: int
    k: int
    kernel: str
    config: str


def configs(formats: Iterable[str], weights: Iterable[tuple[int, int]], target: arch.Arch) -> Iterator[Listed]:
    """Every config that the products of `formats` may run with, for any m: what a cost model or a tuned table chooses from."""
    chosen = [case(name) for name in formats]
    for n, k in weights:
        seen: dict[Listed, None] = {}
        for one in chosen:
            for call in record(one, 1, n, k):
                if isinstance(call.call, GemmCall):
                    seen |= dict.fromkeys(_of_buckets(one.format, call, target))
        yield from seen


def _of_buckets(name: str, recorded: launch.Recorded, target: arch.Arch) -> Iterator[Listed]:
    problem = recorded.call.problem
    for m in BUCKETS:
        choice = choose(recorded._replace(call=recorded.call._replace(problem=problem._replace(m=m))), target)
        for ranked in choice.ranking:
            yield Listed(f"{name} ({problem.a} x {problem.b})", problem.n, problem.k, ranked.kernel.name, str(ranked.config))


def jobs(formats: Iterable[str], weights: Sequence[tuple[int, int]], target: arch.Arch) -> list[Job]:
    """The cubins that `formats` can need on `target`, each once, those of quantisation and of grouping included."""
    found: dict[tuple[str, tuple[tuple[str, int], ...]], Job] = {
        ("segments", (("MODE", mode),)): Job("segments", target, {"MODE": mode}) for mode in segments.MODES
    }
    for one in map(case, formats):
        for n, k in weights:
            for m in BUCKETS:
                for recorded in record(one, m, n, k):
                    choice = choose(recorded, target)
                    for ranked in choice.ranking:
                        for step in ranked.kernel.steps(recorded.call, ranked.config):
                            if isinstance(step, Step):
                                found.setdefault((step.source, step.defines), Job(step.source, target, dict(step.defines)))
    return list(found.values())


# Operands and calls given as text


def operand(text: str, device: int = HOST) -> Spec | Quantized:
    """A Spec from "dtype:rows x columns", a Quantized of Specs from "format:rows x k"; ":T" behind it is the transposed view.

    ValueError with an example. For instance "bfloat16:16x4096", "float8_e4m3fn:11008x4096:T", "fp8_row:11008x4096".
    """
    name, _, rest = text.partition(":")
    shape_text, _, turned = rest.partition(":")
    try:
        shape = tuple(int(n) for n in shape_text.split("x"))
        found = _quantized(name, shape, device) if name in FORMATS else Spec(shape, name, device=device)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"operand {text!r}: {error}; write dtype:shape or format:shape, like bfloat16:16x4096 or fp8_row:11008x4096."
        ) from None
    if turned not in ("", "T"):
        raise ValueError(f"operand {text!r} ends in {turned!r}; only T, the transposed view, can stand there.")
    return found.T if turned else found


def _quantized(name: str, shape: tuple[int, ...], device: int) -> Quantized:
    fmt = FORMATS[name]
    stored = (*shape[:-1], shape[-1] // fmt.element.per_byte)
    scale = Spec(scale_shape(shape, fmt), "float32", device=device)
    return Quantized(Spec(stored, fmt.element.dtype, device=device), scale, fmt)


def explain(fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], target: arch.Arch) -> str:
    """`cugemm.explain` for another arch: the operands are Specs on the host, the machine is `choose`'s."""
    with launch.recording() as calls:
        fn(*args, **kwargs)
    lines = []
    for recorded in calls:
        call = recorded.call
        lines.append(f"cugemm.{recorded.op.name}")
        if isinstance(call, GemmCall):
            lines.append(f"  m = {call.m}, n = {call.n}, k = {call.k}, batch = {call.batch}")
        lines.append(str(choose(recorded, target)))
    return "\n".join(lines)
