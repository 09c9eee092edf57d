"""What a product should be, derived from the definitions of the formats and from nothing in the library (this file imports no cugemm).

Cases are self-made problems as NumPy arrays in storage dtypes; bring a, b and scales to any framework, bring the result back as NumPy,
check it.

    case = exact_case(seed, m, n, k, "bf16", "e4m3", ...)     every partial sum is exact in any order: one right answer
    case = random_case(seed, m, n, k, "bf16", "e4m3", ...)    dense normal data and an element-wise error bound
    case = given_case(a, b, "bf16", "e4m3", ...)              your own arrays (real weights, NaN, transposed views, ...)
    check_exact(case, out, "bfloat16")      shape, dtype and every value
    check_random(case, out, "bfloat16")     shape, dtype, |error| <= bound everywhere; NaN and inf exactly where they belong
    check_bits(out, expected)               dtype, shape, strides and bytes
    poison(shape, "bfloat16")               an array of NaN: what outputs hold before a call
    embed(array, rows, columns)             the same values as a view into a larger poisoned buffer, so that a read past the edge shows
    decode(array, element)  nearest(x, dtype)  dequantised(...)  product(...)    the definitions

Options of exact_case and random_case, with the library's conventions (real = stored * scale, ALL = 0 covers an axis): a_block = (gm, gk)
and b_block = (gk, gn) ask for scales of shape [.., ceil(m/gm), ceil(k/gk)] and [.., ceil(k/gk), ceil(n/gn)]; alpha; bias=True; batch=(..)
for both sides; experts=E for a grouped product (b [E, k, n], `case.expert` [m], some rows without an expert). Elements: bf16 fp16 fp32 e4m3
e5m2 int8 e2m1 (a code per byte), and two codes a byte along k, low nibble = even k: e2m1x2 int4x2 uint4x2. format_oracles.py makes cases
of whole formats. Failures end in one line that makes the case again.

Sources: IEEE 754-2019 (binary16, binary32), OCP OFP8 (e4m3, e5m2), OCP MX (e2m1); tensor-core sums after Fasi, Higham, Mikaitis, Pranesh,
"Numerical behavior of NVIDIA tensor cores", PeerJ CS 2021.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes  # only as containers: dtype names and sizes
import numpy as np

Array = np.ndarray[Any, Any]
Block = tuple[int, int]


class Encoding(NamedTuple):
    dtype: str
    exponent: int  # bits
    mantissa: int  # bits
    bias: int
    specials: str  # "ieee": top exponent is inf and NaN; "nan": only the top code is NaN (OFP8 e4m3); "": none


ENCODINGS = {
    "bf16": Encoding("bfloat16", 8, 7, 127, "ieee"),
    "fp16": Encoding("float16", 5, 10, 15, "ieee"),
    "e4m3": Encoding("float8_e4m3fn", 4, 3, 7, "nan"),
    "e5m2": Encoding("float8_e5m2", 5, 2, 15, "ieee"),
    "e2m1": Encoding("uint8", 2, 1, 1, ""),
    "fp32": Encoding("float32", 8, 23, 127, "ieee"),
}
OF_DTYPE = {e.dtype: e for name, e in ENCODINGS.items() if name != "e2m1"}


# --- formats ----------------------------------------------------------------------------------------------------------------------


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def table(element: str) -> Array:
    """Value of every code, float64: (-1)^s * 2^(e - bias) * (1 + f / 2^mantissa), subnormal (e = 0) 2^(1 - bias) * f / 2^mantissa."""
    _, exponent, mantissa, bias, specials = ENCODINGS[element]
    code = np.arange(2 ** (1 + exponent + mantissa))
    sign = np.where(code >> (exponent + mantissa), -1.0, 1.0)
    e = (code >> mantissa) % 2**exponent
    f = code % 2**mantissa
    value = np.where(e > 0, np.ldexp(1 + f / 2**mantissa, e - bias), np.ldexp(f / 2**mantissa, 1 - bias))
    if specials == "ieee":
        value = np.where(e == 2**exponent - 1, np.where(f == 0, np.inf, np.nan), value)
    elif specials == "nan":
        value = np.where((e == 2**exponent - 1) & (f == 2**mantissa - 1), np.nan, value)
    return np.asarray(sign * value)


TABLES = {name: table(name) for name in ENCODINGS if name != "fp32"}
INTEGERS = {"int8": (-128, 127), "int4x2": (-8, 7), "uint4x2": (0, 15)}
"""Least and greatest; two's complement."""
PACKED = {"e2m1x2": TABLES["e2m1"], "int4x2": np.array([*range(8), *range(-8, 0)], float), "uint4x2": np.arange(16.0)}
"""Value of every nibble."""


def decode(stored: Array, element: str, k_axis: int = -1) -> Array:
    """Stored array -> float64 values; packed elements double `k_axis`."""
    if element in ("fp32", "int8"):
        return np.asarray(stored, np.float64)
    if element in PACKED:
        pairs = np.stack([PACKED[element][stored & 15], PACKED[element][stored >> 4]], axis=-1)  # [.., low = even k | high = odd k]
        pairs = np.moveaxis(pairs, k_axis - 1 if k_axis < 0 else k_axis, -2)
        return np.moveaxis(pairs.reshape(*pairs.shape[:-2], 2 * pairs.shape[-2]), -1, k_axis)
    codes = stored.view(f"u{stored.dtype.itemsize}")
    return np.asarray(TABLES[element][codes & 15 if element == "e2m1" else codes])


def encode(values: Array, element: str, k_axis: int = -1) -> Array:
    """Float64 values -> stored array, to nearest, saturating. A maker of test data, not a definition of rounding."""
    if element == "fp32":
        return np.asarray(values, np.float32)
    if element == "int8":
        return np.clip(np.rint(values), *INTEGERS[element]).astype(np.int8)
    if element in PACKED:
        whole = np.clip(np.rint(values), *INTEGERS[element]).astype(np.int64) if element in INTEGERS else None
        codes = np.moveaxis(encode(values, "e2m1") if whole is None else (whole & 15).astype(np.uint8), k_axis, -1)
        return np.ascontiguousarray(np.moveaxis(codes[..., 0::2] | codes[..., 1::2] << 4, -1, k_axis))
    known = TABLES[element]
    order = np.argsort(known, kind="stable")
    order = order[np.isfinite(known[order])]
    middles = (known[order][1:] + known[order][:-1]) / 2
    codes = order[np.searchsorted(middles, values)]
    name = ENCODINGS[element].dtype
    return codes.astype(f"u{dtype_of(name).itemsize}").view(dtype_of(name))


def nearest(x: Array, dtype: str) -> Array:
    """The value of `dtype` nearest to float64 x, ties to even, as float64; half a step past the largest: inf (e4m3: NaN)."""
    _, _, mantissa, bias, specials = OF_DTYPE[dtype]
    step = _step(x, dtype)
    with np.errstate(all="ignore"):
        result = np.copysign(np.rint(x / step) * step, x)
    largest = (2 - 2.0**-mantissa) * 2.0**bias if specials == "ieee" else 448.0
    return np.where(np.abs(result) > largest, np.copysign(np.inf if specials == "ieee" else np.nan, x), result)


def _step(x: Array, dtype: str) -> Array:
    """Distance between neighbours of `dtype` in the binade of x."""
    _, _, mantissa, bias, _ = OF_DTYPE[dtype]
    _, e = np.frexp(np.where(np.isfinite(x), x, 0))  # |x| = [0.5, 1) * 2^e
    return np.asarray(np.ldexp(1.0, np.maximum(np.where(x == 0, -2000, e - 1), 1 - bias) - mantissa))


# --- definitions ------------------------------------------------------------------------------------------------------------------


def dequantised(values: Array, scale: Array | float | None, block: Block) -> Array:
    """values [.., rows, columns] * scale [.., ceil(rows/block[0]), ceil(columns/block[1])], float64."""
    if scale is None:
        return values
    s = np.asarray(scale).astype(np.float64)
    if s.size == 1:
        return values * s.item()
    for axis, size in ((-2, block[0]), (-1, block[1])):
        length = values.shape[axis]
        s = np.repeat(s, size or max(length, 1), axis=axis).take(np.arange(length), axis=axis)
    return values * s


def product(a: Array, b: Array, expert: Array | None = None) -> Array:
    """a @ b in float64; with `expert`, row i is a[i] @ b[expert[i]] and zero for an expert outside [0, len(b))."""
    if expert is None:
        return a @ b
    out = np.zeros((a.shape[0], b.shape[-1]))
    for i, e in enumerate(expert):
        if 0 <= e < len(b):
            out[i] = a[i] @ b[e]
    return out


class Case(NamedTuple):
    """One problem and its answer. Everything above `exact` is input."""

    a: Array
    b: Array
    a_element: str
    b_element: str
    a_scale: Array | float | None
    b_scale: Array | float | None
    a_block: Block
    b_block: Block
    alpha: float
    bias: Array | None
    expert: Array | None
    k: int
    exact: Array  # float64 [.., m, n]
    peak: Array  # bound on |any partial sum| of it, scales and alpha included, bias not
    repro: str


def given_case(
    a: Array, b: Array, a_element: str, b_element: str, *, a_scale: Array | float | None = None, b_scale: Array | float | None = None,
    a_block: Block = (0, 0), b_block: Block = (0, 0), alpha: float = 1.0, bias: Array | None = None, expert: Array | None = None,
    random_signs: bool = False, repro: str = "given_case(...)",
) -> Case:  # fmt: skip
    """The case of these arrays. `random_signs`: elements have independent random signs, which allows a smaller `peak`.

    Without it, a partial sum is at most sum |a| |b|. With it, given the magnitudes, every partial sum in an order fixed beforehand stays
    within 7 * sqrt(sum a^2 b^2) except with probability 4 exp(-7^2 / 2) = 1e-10 (Hoeffding, and Levy for the maximum over prefixes).
    """
    with np.errstate(all="ignore"):
        left = dequantised(decode(a, a_element), a_scale, a_block)
        right = dequantised(decode(b, b_element, k_axis=-2), b_scale, b_block)
        exact = alpha * product(left, right, expert)
        peak = abs(alpha) * product(np.abs(left), np.abs(right), expert)
        if random_signs:
            peak = np.minimum(peak, abs(alpha) * 7 * np.sqrt(product(left**2, right**2, expert)))
        if bias is not None:
            shift = bias.astype(np.float64)
            served = np.ones(exact.shape[-2], bool) if expert is None else (expert >= 0) & (expert < len(b))
            exact = exact + np.where(served[:, None], shift, 0)
    return Case(a, b, a_element, b_element, a_scale, b_scale, a_block, b_block, alpha, bias, expert, left.shape[-1], exact, peak, repro)


# --- cases ------------------------------------------------------------------------------------------------------------------------

GRID = np.array([0.5, 1.0, 1.5, 2.0, 3.0])
"""Magnitudes that every element can hold."""
NONZEROS = 14
"""Per row of a. With GRID and the scales below, sum |a b s| <= 14 * 9 * 4 stays under 2^13 times the grid of the products, 1/16: even sums
of 14 bits are exact."""


def exact_case(
    seed: int, m: int, n: int, k: int, a_element: str, b_element: str, *, a_block: Block | None = None, b_block: Block | None = None,
    alpha: float = 1.0, bias: bool = False, batch: tuple[int, ...] = (), experts: int = 0,
) -> Case:  # fmt: skip
    """Sparse a, dense b, everything from a small grid of halves, power-of-two scales: any order of summation gives the one right answer.

    Row i of a is nonzero where a random permutation of k puts i * NONZEROS + 0..NONZEROS-1, so rows together visit every k. Scales along k
    are 1/2, 1 or 2; constant ones are in 1/8..8. alpha must be a power of two.
    """
    rng, shapes, repro = _start("exact_case", locals())
    left = np.zeros(shapes.a)
    right = rng.choice(GRID, shapes.b) * rng.choice([-1.0, 1.0], shapes.b)
    for index in np.ndindex(shapes.a[:-2]):
        order = rng.permutation(k)
        for i in range(m if k else 0):
            where = order[(i * NONZEROS + np.arange(min(NONZEROS, k))) % k]
            left[index][i, where] = rng.choice(GRID, len(where)) * rng.choice([-1.0, 1.0], len(where))

    def scale(shape: tuple[int, ...] | None, k_axis: int) -> Array | None:
        if shape is None:
            return None
        return np.exp2(rng.integers(-1, 2, shape) if shape[k_axis] > 1 else rng.integers(-3, 4, shape)).astype(np.float32)

    a_scale, b_scale = scale(shapes.a_scale, -1), scale(shapes.b_scale, -2)
    return given_case(
        encode(left, a_element), encode(right, b_element, k_axis=-2), a_element, b_element, a_scale=a_scale, b_scale=b_scale,
        a_block=a_block or (0, 0), b_block=b_block or (0, 0), alpha=alpha, bias=rng.integers(-8, 9, n).astype(np.float32) if bias else None,
        expert=shapes.expert(rng, m), repro=repro,
    )  # fmt: skip


def random_case(
    seed: int, m: int, n: int, k: int, a_element: str, b_element: str, *, a_block: Block | None = None, b_block: Block | None = None,
    alpha: float = 1.0, bias: bool = False, batch: tuple[int, ...] = (), experts: int = 0,
) -> Case:  # fmt: skip
    """Dense normal data (standard deviation 1), scales spread over two binades around 1."""
    rng, shapes, repro = _start("random_case", locals())

    def scale(shape: tuple[int, ...] | None) -> Array | None:
        return None if shape is None else np.exp2(rng.uniform(-1, 1, shape)).astype(np.float32)

    return given_case(
        encode(rng.standard_normal(shapes.a), a_element), encode(rng.standard_normal(shapes.b), b_element, k_axis=-2), a_element, b_element,
        a_scale=scale(shapes.a_scale), b_scale=scale(shapes.b_scale), a_block=a_block or (0, 0), b_block=b_block or (0, 0), alpha=alpha,
        bias=rng.standard_normal(n).astype(np.float32) if bias else None, expert=shapes.expert(rng, m), random_signs=True, repro=repro,
    )  # fmt: skip


class _Shapes(NamedTuple):
    a: tuple[int, ...]
    b: tuple[int, ...]
    a_scale: tuple[int, ...] | None
    b_scale: tuple[int, ...] | None
    experts: int

    def expert(self, rng: np.random.Generator, m: int) -> Array | None:
        """Shuffled, with about one row in eight out of range on either side; few rows leave some experts empty."""
        if not self.experts:
            return None
        chosen = rng.integers(0, self.experts, m)
        return np.where(rng.random(m) < 0.125, rng.choice([-1, -7, self.experts, self.experts + 5], m), chosen)


def _start(name: str, call: dict[str, Any]) -> tuple[np.random.Generator, _Shapes, str]:
    """Generator, shapes and repro line from the arguments of a case."""
    m, n, k, batch, experts = (call[x] for x in ("m", "n", "k", "batch", "experts"))
    assert not (batch and experts), "a grouped product has no batch"
    for element in (call["a_element"], call["b_element"]):
        assert element not in PACKED or k % 2 == 0, f"{element} packs pairs, k = {k}"

    def scale(block: Block | None, lead: tuple[int, ...], lengths: tuple[int, int]) -> tuple[int, ...] | None:
        if block is None:
            return None
        return lead + tuple(1 if size == 0 else -(-length // size) for length, size in zip(lengths, block, strict=True))

    lead = (experts,) if experts else batch
    shapes = _Shapes((*batch, m, k), (*lead, k, n), scale(call["a_block"], batch, (m, k)), scale(call["b_block"], lead, (k, n)), experts)
    options = "".join(f", {x}={call[x]!r}" for x in ("a_block", "b_block", "alpha", "bias", "batch", "experts") if call[x])
    line = f"{name}({call['seed']}, {m}, {n}, {k}, {call['a_element']!r}, {call['b_element']!r}{options})"
    return np.random.default_rng([call["seed"], m, n, k]), shapes, line


# --- checks -----------------------------------------------------------------------------------------------------------------------

PER_PRODUCT = 1.5
"""Truncations of 2^-23 * peak per product. A tensor-core step adds w products to a float32 accumulator: each of the w + 1 terms is cut at
the last place of the largest (toward zero, at least 24 bits kept) and so is the sum: (w + 2) / w per product, w >= 4 since Volta."""

NARROW = 2.0**-13
"""The last place that fp8 tensor cores keep, of the largest term (measured: 1 + 2^-13 counts, 1 + 2^-14 does not, in any position)."""


def error_bound(case: Case, dtype: str, narrow: bool = False) -> Array:
    """Element-wise bound on |out - exact| of products summed in float32 by tensor cores, in any blocking, and rounded once to `dtype`.

    sum:      (1.5 k + 8) * 2^-23 * peak        truncation, PER_PRODUCT; 8 for a ragged last step; split sums add less than they save
    scales:   (k / 8) * 2^-24 * peak            block scales: up to 4 float32 roundings per block of at least 32 values
    epilogue: 8 * 2^-24 * (peak + |bias|)       row, column, alpha (rounded to float32 themselves), bias
    narrow:   (4.2 sqrt(k) + k / 32) * NARROW * peak    if both are fp8, and sums may stay in the tensor cores of Hopper and Ada, of terms
              with random signs: 7 deviations of k truncations, and those of the sum itself, all one way
    output:   half a step of `dtype` at |exact| + the above
    """
    bias = 0.0 if case.bias is None else np.abs(case.bias.astype(np.float64))
    inner = ((PER_PRODUCT * case.k + 8) * 2 + case.k / 8 + 8) * 2.0**-24 * case.peak + 8 * 2.0**-24 * bias
    if narrow and {case.a_element, case.b_element} <= {"e4m3", "e5m2"}:
        inner += (4.2 * np.sqrt(case.k) + case.k / 32) * NARROW * case.peak
    return inner + _step(np.abs(case.exact) + inner, dtype) / 2


def check_exact(case: Case, out: Array, dtype: str) -> None:
    """Every element is the exact answer rounded once to `dtype`. NaN fails."""
    _same_kind(case, out, dtype)
    expected = nearest(case.exact, dtype)
    _report(case, out, expected, np.zeros_like(expected))


def check_random(case: Case, out: Array, dtype: str, narrow: bool = False) -> None:
    """Finite answers within `error_bound`; NaN and inf where the exact answer is just that. For overflow to inf there is `check_exact`."""
    _same_kind(case, out, dtype)
    with np.errstate(all="ignore"):
        bound = np.where(np.isfinite(case.exact), error_bound(case, dtype, narrow), 0)
    _report(case, out, case.exact, bound)


def check_bits(out: Array, expected: Array, repro: str = "") -> None:
    """Same dtype, shape, strides (of axes longer than 1) and bytes."""
    assert out.dtype == expected.dtype, f"dtype {out.dtype}, wanted {expected.dtype}; {repro}"
    assert out.shape == expected.shape, f"shape {out.shape}, wanted {expected.shape}; {repro}"
    strides = [[s for s, length in zip(x.strides, x.shape, strict=True) if length > 1] for x in (out, expected)]
    assert not out.size or strides[0] == strides[1], f"strides {out.strides}, wanted {expected.strides}; {repro}"
    got, wanted = (np.ascontiguousarray(x).reshape(-1).view(np.uint8).reshape(-1, x.dtype.itemsize) for x in (out, expected))
    same = (got == wanted).all(axis=1)
    if not same.all():
        at = tuple(int(i) for i in np.unravel_index(np.flatnonzero(~same)[0], out.shape))
        raise AssertionError(
            f"{int((~same).sum())} of {same.size} elements differ, first at {at}: {out[at]!r}, wanted {expected[at]!r}; {repro}"
        )


def _same_kind(case: Case, out: Array, dtype: str) -> None:
    assert out.dtype == dtype_of(dtype), f"dtype {out.dtype}, wanted {dtype}; {case.repro}"
    assert out.shape == case.exact.shape, f"shape {out.shape}, wanted {case.exact.shape}; {case.repro}"


def _report(case: Case, out: Array, expected: Array, bound: Array) -> None:
    got = decode(out, next(name for name, e in ENCODINGS.items() if e.dtype == out.dtype.name))
    with np.errstate(all="ignore"):
        err = np.abs(got - expected)
        agree = np.isnan(expected) & np.isnan(got) | np.isinf(expected) & (got == expected)
    good = np.where(np.isfinite(expected), err <= bound, agree)
    if not good.all():
        bad = np.argwhere(~good)
        first, low, high = tuple(int(i) for i in bad[0]), bad.min(axis=0), bad.max(axis=0)
        box = "[" + ", ".join(f"{lo}:{hi + 1}" for lo, hi in zip(low, high, strict=True)) + "]"
        raise AssertionError(
            f"{len(bad)} of {good.size} elements wrong, all in {box}, first at {first}: {got[first]}, wanted {expected[first]} "
            f"+- {bound[first]:.3g}; {case.repro}"
        )


# --- poison -----------------------------------------------------------------------------------------------------------------------


def poison(shape: tuple[int, ...], dtype: str) -> Array:
    """Array of all-ones bits: NaN in every float dtype used here; in uint8, two e2m1 codes of -6, the largest there is."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype_of(dtype).itemsize
    return np.full(count, 0xFF, np.uint8).view(dtype_of(dtype)).reshape(shape)


def embed(array: Array, rows: int = 1, columns: int = 3, *, transposed: bool = False) -> Array:
    """The same values as a view into a poisoned buffer with `rows` and `columns` around them; `transposed`: the buffer is column-major."""
    *batch, m, n = array.shape
    if transposed:
        return np.swapaxes(embed(np.swapaxes(array, -1, -2), columns, rows), -1, -2)
    buffer = poison((*batch, m + 2 * rows, n + 2 * columns), array.dtype.name)
    view = buffer[..., rows : rows + m, columns : columns + n]
    view[...] = array
    return view
