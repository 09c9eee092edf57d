"""Random products on the GPU, thousands of them: formats, lengths, layouts, frameworks, scale layouts, alpha, bias and result dtypes.

    run(dev, seed=1, numbers=range(2000))       what failed, each with the line that repeats it
    fuzz(dev, 1, 1234)                          one case

Data are random codes; expected values are float64 products, computed on the device from codes decoded there with the tables of `oracles`.
Everything is recorded first and its kernels compiled many at once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import format_oracles as formats
import gpu_formats
import numpy as np
import oracles
from format_oracles import FORMATS, Operand
from gpu_arrays import LAYOUTS
from oracles import Array, Case

from cugemm.api.common import gemm_options, product

LONGEST = 4096


class Drawn(NamedTuple):
    """One case. Formats and layouts of both sides; out: a layout of `out=`, "" for a fresh result; shift: dtype of the bias."""

    number: int
    a: str
    b: str
    m: int
    n: int
    k: int
    batch: tuple[int, ...]
    framework: str
    layouts: tuple[str, str]
    scale_layouts: tuple[str, str]
    strided_scale: bool
    out: str
    dtype: str
    alpha: float
    alpha_on_device: bool
    shift: str


def draw(seed: int, number: int) -> Drawn:
    rng = np.random.default_rng([seed, number])

    def pick(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    a, b = pick(*gpu_formats.A), pick(*gpu_formats.B)
    lengths = []
    for _ in range(3):
        n = int(np.exp(rng.uniform(0, np.log(LONGEST))))
        lengths.append(n + (n % 16 == 0) if rng.random() < 1 / 3 else -(-n // 16) * 16)
    m, n, k = lengths
    k = gpu_formats.even(k, a, b)
    framework = str(rng.choice(["cupy", "torch", "dlpack", "jax"], p=[0.6, 0.28, 0.1, 0.02]))
    layouts = ("row", "row")
    if framework != "jax" and rng.random() < 0.5:
        layouts = pick(*LAYOUTS), pick(*LAYOUTS)
    batch = (pick(1, 2, 3),) if m * n * k < 2**24 and rng.random() < 0.2 else ()
    return Drawn(
        number, a, b, m, n, k, batch, framework, layouts, (pick("linear", "128x4", "8x4"), pick("linear", "128x4", "8x4")),
        framework != "jax" and bool(rng.integers(2)), "" if framework in ("jax", "dlpack") else pick("", *LAYOUTS).replace("gaps", ""),
        pick(*gpu_formats.OUTS), pick(1.0, 1.0, 0.5, -1.7), bool(rng.integers(2)), pick("", "float32", "float16", "bfloat16"),
    )  # fmt: skip


# --- operands ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def pool(element: str) -> Array:
    """Stored normal values, as many positive as negative; of packed elements bytes."""
    rng = np.random.default_rng(0)
    if element == "uint4x2":  # zero points take care of the sign
        return np.arange(256, dtype=np.uint8)
    numbers = formats.SPREAD.get(element, 1.0) * rng.standard_normal(1 << 13)
    numbers = np.stack([numbers, rng.permutation(-numbers)], axis=-1)
    if element in oracles.INTEGERS:
        numbers = np.clip(numbers, -oracles.INTEGERS[element][1], oracles.INTEGERS[element][1])
    return oracles.encode(rng.permutation(numbers) * rng.choice([-1, 1], (1 << 13, 1)), element).reshape(-1)


def random_codes(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Operand:
    """`format_oracles.random_operand`, faster and without its values (see `decoded`)."""
    kind = FORMATS[name]
    scale = tensor = zero = None
    sigma = formats.SPREAD.get(kind.element, 1.0)
    wanted = formats.scale_shape(kind, shape)
    if kind.scale:
        sizes = np.exp2(rng.uniform(-1, 1, wanted)) / sigma
        scale = formats._encode_scale(kind.scale, 16 * sizes if kind.scale == "e4m3" else sizes)
    if kind.tensor:
        tensor = (np.exp2(rng.uniform(-1, 1, formats._tensor_of(kind, shape))) / 16).astype(np.float32)
    if kind.zero:
        zero = rng.integers(0, 16, wanted).astype(np.uint8)
    codes = pool(kind.element)
    stored = (*shape[:-1], shape[-1] // (2 if kind.element in oracles.PACKED else 1))
    data = codes[rng.integers(0, len(codes), stored, dtype=np.uint16)]
    return Operand(name, data, scale, tensor, zero, np.empty(0))


def decoded(xp: Any, x: Operand) -> Any:
    """The values of an operand, float64, on the device: the definition again, in the words of NumPy and CuPy alike."""
    kind, data = x.kind, x.data

    def look_up(table: Array, codes: Any) -> Any:
        return xp.take(xp.asarray(table), codes)

    if kind.element in oracles.PACKED:
        raw = xp.asarray(np.ascontiguousarray(data))
        table = oracles.PACKED[kind.element]
        result = xp.stack([look_up(table, raw & 15), look_up(table, raw >> 4)], axis=-1).reshape(*data.shape[:-1], 2 * data.shape[-1])
    elif kind.element == "int8":
        result = xp.asarray(np.ascontiguousarray(data)).astype("float64")
    else:
        result = look_up(oracles.TABLES[kind.element], xp.asarray(np.ascontiguousarray(data).view(f"u{data.dtype.itemsize}")))

    def spread(values: Array) -> Any:
        full = xp.asarray(values)
        if full.size == 1:
            return full.reshape(1)
        for axis, size in ((-2, kind.block[0]), (-1, kind.block[1])):
            length = result.shape[axis]
            full = xp.take(full, xp.arange(length) // (size or max(length, 1)), axis=axis)
        return full

    if x.zero is not None:
        result = result - spread(x.zero.astype(np.float64))
    if x.scale is not None:
        result = result * spread(formats.scale_values(kind.scale, x.scale))
    return result if x.tensor is None else result * xp.asarray(x.tensor.astype(np.float64))


def expected(xp: Any, a: Operand, b: Operand, bias: Array | None, alpha: float, repro: str) -> Case:
    left, right = decoded(xp, a), decoded(xp, b).swapaxes(-1, -2)
    exact = alpha * (left @ right)
    peak = abs(alpha) * xp.minimum(abs(left) @ abs(right), 7 * xp.sqrt((left * left) @ (right * right)))
    host = [np.asarray(x if xp is np else xp.asnumpy(x)) for x in (exact, peak)]
    shift = None if bias is None else bias.astype(np.float64)
    if shift is not None:
        host[0] = host[0] + shift
    return Case(
        a.data, b.data, a.kind.element, b.kind.element, a.scale, b.scale, (0, 0), (0, 0), alpha, shift, None, left.shape[-1], *host, repro
    )


# --- cases ------------------------------------------------------------------------------------------------------------------------


class Built(NamedTuple):
    """A drawn case with its data: on the host, and as arguments of `product`."""

    drawn: Drawn
    a: Operand
    b: Operand
    bias: Array | None
    operands: tuple[Any, Any]
    options: dict[str, Any]
    framework: Any


def build(dev: Any, seed: int, drawn: Drawn) -> Built:
    rng = np.random.default_rng([seed, drawn.number, 1])
    framework = dev if drawn.framework == "cupy" else _framework(drawn.framework)
    a = random_codes(rng, drawn.a, (*drawn.batch, drawn.m, drawn.k))
    b = random_codes(rng, drawn.b, (*drawn.batch, drawn.n, drawn.k))
    bias = rng.standard_normal(drawn.n).astype(oracles.dtype_of(drawn.shift)) if drawn.shift else None
    operands = tuple(
        gpu_formats.operand(framework, x, layout, scale_layout, drawn.strided_scale)
        for x, layout, scale_layout in zip((a, b), drawn.layouts, drawn.scale_layouts, strict=True)
    )
    options: dict[str, Any] = {}
    if bias is not None:
        options["bias"] = framework.put(bias)
    if drawn.alpha != 1:
        options["alpha"] = framework.put(np.full(1, drawn.alpha, np.float32)) if drawn.alpha_on_device else drawn.alpha
    return Built(drawn, a, b, bias, (operands[0], operands[1]), options, framework)


@functools.cache
def _framework(name: str) -> Any:
    return gpu_formats.FRAMEWORKS[name]()


def call(built: Built) -> Array | None:
    """The result, None in a rehearsal."""
    drawn, framework = built.drawn, built.framework
    options = gemm_options(gpu_formats.ANY, drawn.dtype, b_axes="nk")
    out = None
    if drawn.out:
        out = framework.put(LAYOUTS[drawn.out](oracles.poison((*drawn.batch, drawn.m, drawn.n), drawn.dtype)))
    result = product(gpu_formats.ANY, *built.operands, options, out=out, **built.options)
    if gpu_formats.is_rehearsal():
        return None
    assert out is None or result is out
    return np.asarray(framework.fetch(result))


def check(dev: Any, seed: int, built: Built) -> None:
    drawn = built.drawn
    xp = getattr(dev, "cupy", np)
    case = expected(xp, built.a, built.b, built.bias, drawn.alpha, f"gpu_fuzz.fuzz(dev, {seed}, {drawn.number}): {drawn}")
    out = call(built)
    assert out is not None
    oracles.check_random(case, out, drawn.dtype, narrow=True)


def fuzz(dev: Any, seed: int, number: int) -> None:
    """One case: the repro of `run`."""
    check(dev, seed, build(dev, seed, draw(seed, number)))


def run(dev: Any, seed: int, numbers: Iterable[int]) -> list[str]:
    """Build all cases, compile what they need, run and check them; the failures in words."""
    frameworks = {name: name for name in gpu_formats.FRAMEWORKS if gpu_formats.usable(name)}
    drawn = [draw(seed, number) for number in numbers]
    cases = [build(dev, seed, x._replace(framework=frameworks.get(x.framework, "cupy"))) for x in drawn]
    gpu_formats.warmed(*(functools.partial(call, built) for built in cases))
    failures = []
    for built in cases:
        try:
            check(dev, seed, built)
        except Exception as error:
            failures.append(f"gpu_fuzz.fuzz(dev, {seed}, {built.drawn.number}): {type(error).__name__}: {error}")
    return failures
