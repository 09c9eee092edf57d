"""Whole formats for the oracles: what blocks of stored values, scales, second scales and zero points mean, and cases made of them.

Like `oracles`, derived from the definitions and from nothing in the library (this file imports no cugemm).

    pair = make(seed, m, n, k, "fp8_row", "nvfp4", exact=True)     an `Operand` for each side and the `oracles.Case` that checks the result
    values(format, data, scale, tensor, zero)       the definition: (data - zero) * scale * tensor, float64
    tiled(scale, "128x4")                           linear byte scales as tensor cores want them
    answer(a, b, ...)                               the case of two operands: experts, gathered rows, counts, bias of every shape

Operands have k last: a [.., m, k], b [.., n, k]. A plain element ("bf16", "e4m3", ...) counts as a format without scales.
Sources: OCP MX 1.0 (mxfp8, mxfp4, e8m0), NVIDIA's NVFP4 (16 x e2m1 under an e4m3 scale under a float32), the layout of scale factors in
PTX ISA, tcgen05.mma ("scale factor layout", 128 x 4 tiles of 512 bytes).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import oracles
from oracles import Array, Case


class Format(NamedTuple):
    """block: (rows, k) under one scale, 0 = all of the axis. tensor: "", "one" or "row"."""

    element: str
    block: tuple[int, int] = (0, 0)
    scale: str = ""  # "fp32", "e4m3" or "e8m0"; "" none
    tensor: str = ""
    zero: bool = False


FORMATS = {
    **{name: Format(name) for name in ("bf16", "fp16", "e4m3", "e5m2")},
    "fp8_tensor": Format("e4m3", (0, 0), "fp32"),
    "fp8_row": Format("e4m3", (1, 0), "fp32"),
    "fp8_group": Format("e4m3", (1, 128), "fp32"),
    "fp8_block": Format("e4m3", (128, 128), "fp32"),
    "fp8_e5m2_row": Format("e5m2", (1, 0), "fp32"),
    "mxfp8": Format("e4m3", (1, 32), "e8m0"),
    "mxfp8_e5m2": Format("e5m2", (1, 32), "e8m0"),
    "mxfp4": Format("e2m1x2", (1, 32), "e8m0"),
    "nvfp4": Format("e2m1x2", (1, 16), "e4m3", "one"),
    "nvfp4_row": Format("e2m1x2", (1, 16), "e4m3", "row"),
    "fp4_row": Format("e2m1x2", (1, 0), "fp32"),
    "int8_tensor": Format("int8", (0, 0), "fp32"),
    "int8_row": Format("int8", (1, 0), "fp32"),
    "int8_group": Format("int8", (1, 128), "fp32"),
    "int4_row": Format("int4x2", (1, 0), "fp32"),
    **{f"int4_g{size}": Format("int4x2", (1, size), "fp32") for size in (32, 64, 128)},
    **{f"uint4_g{size}": Format("uint4x2", (1, size), "fp32", zero=True) for size in (32, 64, 128)},
}
PLAIN = ("bf16", "fp16", "e4m3", "e5m2")
BYTES = tuple(name for name, f in FORMATS.items() if f.scale in ("e4m3", "e8m0"))
E8M0 = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan)


class Operand(NamedTuple):
    """data [.., rows, k] as stored; scale linear, float32 or codes; `values` are what the rest means, float64 [.., rows, k]."""

    format: str
    data: Array
    scale: Array | None
    tensor: Array | None
    zero: Array | None
    values: Array

    @property
    def kind(self) -> Format:
        return FORMATS[self.format]


# --- definitions ------------------------------------------------------------------------------------------------------------------


def values(name: str, data: Array, scale: Array | None = None, tensor: Array | None = None, zero: Array | None = None) -> Array:
    """(data - zero) * scale * tensor, float64 and exact."""
    kind = FORMATS[name]
    result = oracles.decode(data, kind.element)
    if zero is not None:
        result = result - spread(zero.astype(np.float64), kind.block, result.shape)
    if scale is not None:
        result = result * spread(scale_values(kind.scale, scale), kind.block, result.shape)
    return result if tensor is None else result * np.asarray(tensor, np.float64).reshape(_tensor_shape(tensor, result.ndim))


def scale_values(element: str, scale: Array) -> Array:
    if element == "fp32":
        return np.asarray(scale, np.float64)
    codes = np.asarray(scale).view(np.uint8)
    return np.asarray((E8M0 if element == "e8m0" else oracles.TABLES["e4m3"])[codes])


def spread(scale: Array, block: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """[.., row blocks, k blocks] -> one for each of shape's last two axes."""
    if scale.size == 1:
        return scale.reshape(1)
    for axis, size in ((-2, block[0]), (-1, block[1])):
        scale = scale.repeat(size or max(shape[axis], 1), axis=axis).take(np.arange(shape[axis]), axis=axis)
    return scale


def _tensor_shape(tensor: Array, ndim: int) -> tuple[int, ...]:
    """One for everything, [batch] one for each matrix, [.., rows, 1] one for each row."""
    return tensor.shape if tensor.ndim == ndim else (tensor.size, *[1] * (ndim - 1)) if tensor.size > 1 else (1,)


def tiled(scale: Array, layout: str) -> Array:
    """Linear scales [.., rows, blocks] -> [.., padded rows, padded blocks] in tiles of 128 (or 8) rows x 4 blocks, zeros where padded.

    A tile of 128 x 4 is 32 lines of 16 bytes: line i holds rows i, i + 32, i + 64, i + 96, four blocks each. A tile of 8 x 4 is row-major.
    """
    if layout == "linear":
        return scale
    high = {"128x4": 128, "8x4": 8}[layout]
    *batch, rows, blocks = scale.shape
    edges = [(0, 0)] * len(batch) + [(0, -rows % high), (0, -blocks % 4)]
    full = np.pad(scale, edges)
    down, across = full.shape[-2] // high, full.shape[-1] // 4
    quarters = 4 if layout == "128x4" else 1
    parts = full.reshape(math.prod(batch), down, quarters, high // quarters, across, 4)
    return np.ascontiguousarray(parts.transpose(0, 1, 4, 3, 2, 5)).reshape(full.shape)


# --- operands ---------------------------------------------------------------------------------------------------------------------

SPREAD = {"int8": 40.0, "int4x2": 3.0, "uint4x2": 4.0, "e2m1x2": 2.0}
"""Standard deviation of random stored values, 1 for the rest; scales bring it back to 1."""


def scale_shape(kind: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    if kind.block == (0, 0):
        return (1,)
    return (*shape[:-2], *(1 if size == 0 else -(-length // size) for length, size in zip(shape[-2:], kind.block, strict=True)))


def exact_operand(rng: np.random.Generator, name: str, shape: tuple[int, ...], sparse: bool) -> Operand:
    """From the grid of `oracles.exact_case`: values of halves (integers: wholes) up to 3, scales along k 1/2, 1 or 2, others 1/8..8."""
    kind = FORMATS[name]
    grid = np.array([1.0, 2.0, 3.0]) if kind.element in oracles.INTEGERS else oracles.GRID
    k = shape[-1]
    numbers = rng.choice(grid, shape) * rng.choice([-1.0, 1.0], shape)
    if sparse:
        kept = np.zeros(shape, bool)
        for index in np.ndindex(shape[:-2]):
            order = rng.permutation(k)
            for i in range(shape[-2] if k else 0):
                kept[index][i, order[(i * oracles.NONZEROS + np.arange(min(oracles.NONZEROS, k))) % k]] = True
        numbers = np.where(kept, numbers, 0)
    wanted = scale_shape(kind, shape)
    scale = tensor = zero = None
    if kind.scale:
        powers = rng.integers(-1, 2, wanted) if kind.block[1] else rng.integers(-3, 4, wanted)
        scale = _encode_scale(kind.scale, np.exp2(powers))
    if kind.tensor:
        tensor = np.exp2(rng.integers(-3, 4, _tensor_of(kind, shape))).astype(np.float32)
    if kind.zero:
        zero = rng.integers(0, 16, wanted).astype(np.uint8)
        numbers = numbers + spread(zero.astype(float), kind.block, shape)
    return _operand(name, numbers, scale, tensor, zero)


def random_operand(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Operand:
    """Normal values of standard deviation about 1, scales spread over two binades."""
    kind = FORMATS[name]
    sigma = SPREAD.get(kind.element, 1.0)
    numbers = sigma * rng.standard_normal(shape)
    wanted = scale_shape(kind, shape)
    scale = tensor = zero = None
    if kind.scale:
        sizes = np.exp2(rng.uniform(-1, 1, wanted)) / sigma
        scale = _encode_scale(kind.scale, 16 * sizes if kind.scale == "e4m3" else sizes)
    if kind.tensor:
        tensor = (np.exp2(rng.uniform(-1, 1, _tensor_of(kind, shape))) / 16).astype(np.float32)
    if kind.zero:
        zero = rng.integers(0, 16, wanted).astype(np.uint8)
        numbers = numbers + spread(zero.astype(float), kind.block, shape)
    return _operand(name, numbers, scale, tensor, zero)


def _operand(name: str, numbers: Array, scale: Array | None, tensor: Array | None, zero: Array | None) -> Operand:
    data = oracles.encode(numbers, FORMATS[name].element)
    return Operand(name, data, scale, tensor, zero, values(name, data, scale, tensor, zero))


def _tensor_of(kind: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], 1) if kind.tensor == "row" else (1,)


def _encode_scale(element: str, sizes: Array) -> Array:
    if element == "fp32":
        return sizes.astype(np.float32)
    if element == "e8m0":
        return (127 + np.rint(np.log2(sizes))).astype(np.uint8)
    return oracles.encode(sizes, "e4m3").view(np.uint8)


# --- cases ------------------------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two operands with k last, a bias [n] or None, and the answer."""

    a: Operand
    b: Operand
    bias: Array | None
    case: Case


def answer(
    a: Operand, b: Operand, *, alpha: float = 1.0, bias: Array | None = None, expert: Array | None = None, source: Array | None = None,
    counts: Array | None = None, random_signs: bool = False, repro: str = "answer(...)",
) -> Case:  # fmt: skip
    """The case of alpha * a @ b.T + bias for values a [.., m, k], b [.., n, k].

    expert [r]: row i of the result takes b[expert[i]]; source [r]: it takes a[source[i]]; either out of range leaves it zero, without bias.
    counts [batch]: of result i, rows from counts[i] on are zero. bias: [n]; with expert or counts also [experts, n]; else also [m, n].
    random_signs: see `oracles.given_case`.
    """
    with np.errstate(all="ignore"):
        left, right = a.values, b.values.swapaxes(-1, -2)
        chosen = expert
        if source is not None:
            assert expert is not None
            exists = (source >= 0) & (source < len(left))
            left = left[np.where(exists, source, 0)] if len(left) else np.zeros((len(source), left.shape[-1]))
            chosen = np.where(exists, expert, -1)
        exact = alpha * oracles.product(left, right, chosen)
        peak = abs(alpha) * oracles.product(np.abs(left), np.abs(right), chosen)
        if random_signs:
            peak = np.minimum(peak, abs(alpha) * 7 * np.sqrt(oracles.product(left**2, right**2, chosen)))
        served = np.ones(exact.shape[:-1], bool)
        if chosen is not None:
            served = (chosen >= 0) & (chosen < len(right))
        if counts is not None:
            served = np.arange(exact.shape[-2]) < np.clip(counts, 0, exact.shape[-2])[:, None]
            exact, peak = np.where(served[..., None], exact, 0), np.where(served[..., None], peak, 0)
        shift = None
        if bias is not None:
            shift = bias.astype(np.float64)
            if shift.ndim == 2 and chosen is not None:
                shift = shift[np.where(served, chosen, 0)]
            elif shift.ndim == 2 and counts is not None:
                shift = shift[:, None]
            shift = np.where(served[..., None], shift, 0)
            exact = exact + shift
    return Case(
        a.data, b.data, a.kind.element, b.kind.element, a.scale, b.scale, (0, 0), (0, 0), alpha, shift, chosen, left.shape[-1], exact, peak,
        repro,
    )  # fmt: skip


def make(
    seed: int, m: int, n: int, k: int, a: str, b: str, *, exact: bool, batch: tuple[int, ...] = (), experts: int = 0, alpha: float = 1.0,
    bias: bool = False,
) -> Pair:  # fmt: skip
    """A random pair of formats; with `experts`, b is [experts, n, k] and the case is that of the first expert for every row."""
    rng = np.random.default_rng([seed, m, n, k, int(exact)])
    lead = (experts,) if experts else batch
    if exact:
        sides = exact_operand(rng, a, (*batch, m, k), True), exact_operand(rng, b, (*lead, n, k), False)
        shift = rng.integers(-8, 9, n).astype(np.float32)
    else:
        sides = random_operand(rng, a, (*batch, m, k)), random_operand(rng, b, (*lead, n, k))
        shift = rng.standard_normal(n).astype(np.float32)
    options = {"batch": batch, "experts": experts, "alpha": alpha, "bias": bias}
    shown = "".join(f", {name}={value!r}" for name, value in options.items() if value not in ((), 0, 1.0, False))
    repro = f"make({seed}, {m}, {n}, {k}, {a!r}, {b!r}, exact={exact}{shown})"
    expert = np.zeros(m, np.int64) if experts else None
    given = shift if bias else None
    return Pair(*sides, given, answer(*sides, alpha=alpha, bias=given, expert=expert, random_signs=not exact, repro=repro))


def check(pair: Pair, out: Array, dtype: str, case: Case | None = None, narrow: bool = False) -> None:
    """`oracles.check_exact` for pairs of the grid, else `check_random`."""
    case = case or pair.case
    if "exact=True" in case.repro:
        oracles.check_exact(case, out, dtype)
    else:
        oracles.check_random(case, out, dtype, narrow)
