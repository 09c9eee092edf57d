"""`combine` and `silu_and_mul` on host memory: numbers within derived bounds, from every framework, in every layout; and every error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
from test_api import FRAMEWORKS, Framework, from_torch, to_torch

import cugemm
from cugemm import Spec, arch, launch, problem
from cugemm.api.rowwise import combine, silu_and_mul
from cugemm.arrays import View, dense_strides
from cugemm.catalog import rows
from cugemm.rows_reference import exp32, silu32
from cugemm.rowwise import RowsOptions

jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")

BF16, FP16, F32 = DTYPES = ("bfloat16", "float16", "float32")
Array = np.ndarray[Any, Any]
each = pytest.mark.parametrize("framework", FRAMEWORKS, ids=repr)


def between(got: Array, exact: Array, bound: Array, dtype: str) -> None:
    """`got` is a number within `bound` of `exact`, rounded to dtype; NaN and inf where they belong."""
    assert got.dtype == oracles.dtype_of(dtype) and got.shape == exact.shape
    out = got.astype(np.float64)
    finite = np.isfinite(exact)
    assert (np.isnan(out) == np.isnan(exact)).all()
    assert (out[np.isinf(exact)] == exact[np.isinf(exact)]).all()
    low, high = (oracles.nearest(np.where(finite, exact + sign * bound, 0), dtype) for sign in (-1, 1))
    wrong = finite & ~((low <= out) & (out <= high))
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} wrong, first at {np.argwhere(wrong)[0]}"


def check_combine(got: Array, y: Array, weights: Array, indices: Array | None, dtype: str) -> None:
    with np.errstate(all="ignore"):
        if indices is None:
            rows_of = y.astype(np.float64)
            here = np.ones(weights.shape, bool)
        else:
            here = (indices >= 0) & (indices < len(y))
            rows_of = y.astype(np.float64)[np.where(here, indices, 0)] if len(y) else np.zeros((*indices.shape, y.shape[1]))
        terms = np.where(here[..., None], weights.astype(np.float64)[..., None] * rows_of, 0)
        terms_sum, size = terms.sum(axis=1), np.abs(terms).sum(axis=1)
        # Each of topk products and sums errs by half an ulp; 1.001 covers the higher orders, 2**-149 products below the normal numbers.
        bound = 1.001 * (weights.shape[1] + 1) * 2.0**-24 * size + weights.shape[1] * 2.0**-149
        between(got, terms_sum, bound, dtype)


def check_silu(got: Array, gate: Array, up: Array, dtype: str) -> None:
    with np.errstate(all="ignore"):
        g, u = gate.astype(np.float64), up.astype(np.float64)
        exact = g / (1 + np.exp(-g)) * u
        between(got, exact, np.abs(exact) * (3.4 * 2.0**-23 + 2.0**-24) + 4e-43 * np.abs(u) + 2.0**-149, dtype)


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    return np.asarray((rng.standard_normal(shape) * np.exp2(rng.integers(-6, 4, shape))).astype(oracles.dtype_of(dtype)))


# --- exp and silu -----------------------------------------------------------------------------------------------------------------


def test_exp_is_within_an_ulp() -> None:
    rng = np.random.default_rng(0)
    ends = np.array([-104, -103.9, -87.4, -87.3, -0.0, 0, 1e-45, -1e-45, 0.34657, 0.34658, 88.72283, 88.72284], np.float32)
    x = np.concatenate([np.linspace(-106, 88.7228, 1_000_003), rng.uniform(-1, 1, 200_000), ends]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    normal = np.maximum(exact, 2.0**-126)
    ulp = np.exp2(np.floor(np.log2(normal)) - 23)
    representable = exact < 2.0**128 * (1 - 2.0**-25)
    assert (np.abs(exp32(x) - exact)[representable] <= ulp[representable]).all()
    assert np.isinf(exp32(x)[~representable]).all()


def test_exp_of_special_values() -> None:
    x = np.array([np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0, 1e30, -1e30, 89, -105, 3.4028235e38], np.float32)
    expected = np.array([np.inf, 0, np.nan, np.nan, 1, 1, np.inf, 0, np.inf, 0, np.inf], np.float32)
    np.testing.assert_array_equal(exp32(x), expected)
    assert exp32(x[:0]).shape == (0,)


def test_silu_is_within_its_bounds() -> None:
    x = np.linspace(-120, 120, 1_000_001).astype(np.float32)
    exact = x / (1 + np.exp(-x.astype(np.float64)))
    above = x > -86
    ulp = np.exp2(np.floor(np.log2(np.abs(exact[above]) + 2.0**-126)) - 23)
    assert (np.abs(silu32(x)[above] - exact[above]) <= 3.3 * ulp).all()
    assert (np.abs(silu32(x)[~above] - exact[~above]) <= 4e-43).all()
    special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e38, -1e38], np.float32)
    got = silu32(special)
    np.testing.assert_array_equal(got, np.array([np.inf, np.nan, np.nan, 0, 0, 1e38, 0], np.float32))
    assert np.signbit(got[4]) and not np.signbit(got[3])


# --- combine ----------------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine(framework: Framework, dtype: str, rng: np.random.Generator) -> None:
    for tokens, topk, n in ((1, 1, 1), (5, 8, 33), (17, 2, 64), (3, 13, 7)):
        y = values(rng, (tokens, topk, n), dtype)
        for weight_dtype in DTYPES:
            weights = values(rng, (tokens, topk), weight_dtype)
            check_combine(framework.call(combine, y, weights), y, weights, None, dtype)
            check_combine(framework.call(combine, y, weights, out_dtype=F32), y, weights, None, F32)


@each
@pytest.mark.parametrize("rows_", [0, 1, 40])
def test_combine_by_index(framework: Framework, rows_: int, rng: np.random.Generator) -> None:
    """Places anywhere, several times or never; what lies outside adds nothing, though its weight is NaN."""
    for index_dtype, dtype in (("int32", BF16), ("int32" if "j" in framework.name else "int64", FP16)):  # JAX has no int64 unless asked
        y = values(rng, (rows_, 21), dtype)
        indices = rng.integers(-3, rows_ + 3, (9, 5)).astype(index_dtype)
        indices[0, 0], indices[0, 1] = np.iinfo(index_dtype).min, np.iinfo(index_dtype).max
        weights = values(rng, indices.shape, F32)
        check_combine(framework.call(combine, y, weights, indices=indices, out_dtype=BF16), y, weights, indices, BF16)
        weights[(indices < 0) | (indices >= rows_)] = np.nan
        got = framework.call(combine, y, weights, indices=indices)
        check_combine(got, y, weights, indices, dtype)
        assert not np.isnan(got.astype(np.float32)).any()


def test_combine_sums_in_order() -> None:
    """1e8 + 1 - 1e8 is 0 in float32, and 1 in the other order; a product is rounded before it is added."""
    y = np.ones((2, 3, 1), np.float32)
    weights = np.array([[1e8, 1, -1e8], [1e8, -1e8, 1]], np.float32)
    assert combine(y, weights)[:, 0].tolist() == [0.0, 1.0]
    third = np.float32(1 / 3)
    square = np.array([[[third], [third * third]]], np.float32)
    assert combine(square, np.array([[third, -1]], np.float32)).tolist() == [[0.0]]


def test_combine_nan_inf_and_weight_zero() -> None:
    y = np.array([[[np.nan, 1], [2, np.inf]], [[1, 3], [np.inf, 1]]], np.float32)
    weights = np.array([[0, 1], [1, -1]], np.float32)
    np.testing.assert_array_equal(combine(y, weights), np.array([[np.nan, np.inf], [-np.inf, 2]], np.float32))
    np.testing.assert_array_equal(combine(y, 0 * weights)[0], [np.nan, np.nan])
    flat, dropped = y.reshape(4, 2), np.array([[-1, 1], [2, -1]], np.int32)
    np.testing.assert_array_equal(combine(flat, weights, indices=dropped), np.array([[2, np.inf], [1, 3]], np.float32))


def test_combine_overflow_is_inf() -> None:
    y = np.full((1, 2, 1), 60000, np.float16)
    assert combine(y, np.ones((1, 2), np.float32)).tolist() == [[np.inf]]
    assert combine(y, np.ones((1, 2), np.float32), out_dtype=F32).tolist() == [[120000.0]]


@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (3, 2, 0), (0, 0, 0)], ids=str)
@each
def test_combine_empty(framework: Framework, sizes: tuple[int, int, int]) -> None:
    tokens, topk, n = sizes
    got = framework.call(combine, np.zeros(sizes, np.float32), np.zeros((tokens, topk), np.float32))
    assert got.shape == (tokens, n) and not got.any()


@pytest.mark.parametrize("framework", [f for f in FRAMEWORKS if "j" not in f.name], ids=repr)
def test_combine_strides(framework: Framework, rng: np.random.Generator) -> None:
    y = values(rng, (6, 4, 18), BF16)
    weights = values(rng, (6, 4), F32)
    spread = oracles.poison((6, 4, 36), BF16)[..., ::2]
    spread[...] = y
    columns = np.ascontiguousarray(weights.T).T
    for other in (oracles.embed(y), np.ascontiguousarray(y.swapaxes(0, 1)).swapaxes(0, 1), spread, oracles.embed(y, transposed=True)):
        check_combine(framework.call(combine, other, columns), y, weights, None, BF16)
    one = np.broadcast_to(y[:, :1], y.shape)
    check_combine(combine(one, weights), one, weights, None, BF16)
    indices = np.ascontiguousarray(rng.integers(0, 6, (6, 4)).T).T
    check_combine(framework.call(combine, oracles.embed(y[:, 0]), columns, indices=indices), y[:, 0], weights, indices, BF16)


# --- silu_and_mul -----------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(framework: Framework, dtype: str, rng: np.random.Generator) -> None:
    for shape in ((2,), (1, 2), (7, 66), (3, 5, 34), (2, 3, 2, 16)):
        x = values(rng, shape, dtype)
        n = shape[-1] // 2
        for out_dtype in (None, F32, BF16):
            check_silu(framework.call(silu_and_mul, x, out_dtype=out_dtype), x[..., :n], x[..., n:], out_dtype or dtype)
        check_silu(framework.call(silu_and_mul, x, gate="second"), x[..., n:], x[..., :n], dtype)


@each
def test_silu_and_mul_counts(framework: Framework, rng: np.random.Generator) -> None:
    """Rows from the count on are zeros whatever x holds; a count outside [0, rows] is cut to it."""
    x = values(rng, (6, 5, 16), FP16)
    counts = np.array([0, 5, 3, -7, 2**31 - 1, 1], np.int32)
    behind = np.arange(5) >= counts[:, None]
    x[behind] = np.nan
    got = framework.call(silu_and_mul, x, counts=counts)
    check_silu(got, np.where(behind[..., None], 0, x[..., :8]), np.where(behind[..., None], 0, x[..., 8:]), FP16)
    assert not got[behind].astype(bool).any()


def test_silu_and_mul_special_values() -> None:
    gate = np.array([np.nan, np.inf, -np.inf, -100, 3, 0, 1], np.float32)
    up = np.array([1, 2, 1, np.inf, np.nan, np.inf, -np.inf], np.float32)
    got = silu_and_mul(np.concatenate([gate, up]))
    np.testing.assert_array_equal(got, np.array([np.nan, np.inf, np.nan, -np.inf, np.nan, np.nan, -np.inf], np.float32))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 4), (0, 3, 4), (2, 3, 0)], ids=str)
@each
def test_silu_and_mul_empty(framework: Framework, shape: tuple[int, ...]) -> None:
    assert framework.call(silu_and_mul, np.zeros(shape, np.float32)).shape == (*shape[:-1], shape[-1] // 2)
    if len(shape) == 3:
        framework.call(silu_and_mul, np.zeros(shape, np.float32), counts=np.ones(shape[0], np.int32))


@pytest.mark.parametrize("framework", [f for f in FRAMEWORKS if "j" not in f.name], ids=repr)
def test_silu_and_mul_strides(framework: Framework, rng: np.random.Generator) -> None:
    x = values(rng, (4, 6, 32), BF16)
    for other in (oracles.embed(x), oracles.embed(x, transposed=True), np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)):
        check_silu(framework.call(silu_and_mul, other), x[..., :16], x[..., 16:], BF16)
    batches = np.broadcast_to(x[:1], x.shape)
    check_silu(silu_and_mul(batches), batches[..., :16], batches[..., 16:], BF16)


# --- out, other ways to call ------------------------------------------------------------------------------------------------------


def test_out_is_written_and_returned(rng: np.random.Generator) -> None:
    y, weights = values(rng, (5, 3, 24), BF16), values(rng, (5, 3), F32)
    for dtype in DTYPES:
        plain = oracles.poison((5, 24), dtype)
        within = oracles.poison((7, 30), dtype)
        turned = oracles.poison((24, 5), dtype).T
        for out in (plain, within[1:6, 3:27], turned):
            assert combine(y, weights, out=out) is out
            check_combine(np.ascontiguousarray(out), y, weights, None, dtype)
        assert np.isnan(within.astype(np.float32)).sum() == 7 * 30 - 5 * 24
    x = values(rng, (2, 3, 10), F32)
    out = oracles.poison((2, 3, 8), F32)[..., 1:6]
    assert silu_and_mul(x, out=out) is out
    check_silu(out, x[..., :5], x[..., 5:], F32)
    tensor = torch.full((5, 24), float("nan"), dtype=torch.bfloat16)
    version = tensor._version
    assert combine(to_torch(y), to_torch(weights), out=tensor) is tensor and tensor._version > version
    check_combine(from_torch(tensor), y, weights, None, BF16)


def test_stand_ins_and_explain() -> None:
    y, weights, indices = Spec((40, 512), BF16), Spec((16, 4), F32), Spec((16, 4), "int32")
    text = cugemm.explain(combine, y, weights, indices=indices)
    assert "combine bfloat16 -> bfloat16" in text and "-> rows" in text and "portable   refused" in text
    assert "silu_and_mul float16 -> float32" in cugemm.explain(silu_and_mul, Spec((4, 64), FP16), out_dtype=F32)
    meta = silu_and_mul(torch.empty((3, 4, 6), dtype=torch.float16, device="meta"))
    assert (tuple(meta.shape), meta.dtype, meta.device.type) == ((3, 4, 3), torch.float16, "meta")


def test_steps_cover_every_value() -> None:
    """Grid x threads x 8 values reach the end of every row; offsets need no more than what the kernel has."""
    spec = lambda shape, dtype, strides=None: View(0, shape, strides or dense_strides(shape), dtype, 0)  # noqa: E731
    op = problem.OPS["combine"]
    call = op.check((spec((3, 2, 2049), FP16), spec((3, 2), F32), None, None), RowsOptions())
    (step,) = rows.KERNEL.steps(call, *rows.KERNEL.candidates(call.problem, arch.H100))
    assert (step.grid, step.threads, step.pointers, dict(step.defines)) == (4, 256, (0, 1, 2, 3), {"MODE": 0, "X_ELEMENT": 1})
    wide = spec((2**20, 2**17, 8), BF16)
    call = problem.OPS["silu_and_mul"].check((wide, None, None), RowsOptions(gate="second"))
    (step,) = rows.KERNEL.steps(call, *rows.KERNEL.candidates(call.problem, arch.H100))
    assert (call.batch, call.rows, call.columns, step.grid) == (1, 2**37, 4, 2**29)
    assert step.pointers == (0, -1, 1, 2) and len(step.tail) + 32 == 160


# --- errors -----------------------------------------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: str = F32) -> Array:
    return np.zeros(shape, oracles.dtype_of(dtype))


def read_only(x: Array) -> Array:
    x.flags.writeable = False
    return x


def repeated(*shape: int) -> Array:
    return np.lib.stride_tricks.as_strided(zeros(*shape), shape, (0, 4), writeable=True)


def aliased(fn: Callable[..., Any]) -> tuple[Any, ...]:
    x = zeros(4, 2, 8)
    return (fn, x, zeros(4, 2), {"out": x[:, 0]}) if fn is combine else (fn, x, {"out": x[..., 2:6]})


Y, W, V, T = (4, 2, 8), (4, 2), ValueError, TypeError
I32 = {"dtype": "int32"}
ERRORS: dict[str, tuple[type[Exception], str, Callable[[], tuple[Any, ...]]]] = {
    "y-scalar": (T, "y is the scalar float; pass an array", lambda: (combine, 1.0, zeros(*W))),
    "y-dtype": (T, "y is int32; wanted bfloat16, float16, float32", lambda: (combine, zeros(*Y, **I32), zeros(*W))),
    "y-rank": (
        V,
        r"y has shape (4, 8); wanted [tokens, topk, n], or pass indices and y as [rows, n]",
        lambda: (combine, zeros(4, 8), zeros(*W)),
    ),
    "y-rank-indices": (
        V,
        "y has shape (4, 2, 8); with indices it is [rows, n]",
        lambda: (combine, zeros(*Y), zeros(*W), {"indices": zeros(*W, **I32)}),
    ),
    "y-long": (
        V,
        "y has shape (2147483648, 1, 1); its axes must be below 2**31",
        lambda: (combine, Spec((2**31, 1, 1), F32), Spec((2**31, 1), F32)),
    ),
    "weights-missing": (T, "weights is missing; pass an array", lambda: (combine, zeros(*Y), None)),
    "weights-dtype": (T, "weights is float64; wanted bfloat16, float16, float32", lambda: (combine, zeros(*Y), zeros(*W, dtype="float64"))),
    "weights-rank": (V, "weights has shape (4,); wanted [tokens, topk]", lambda: (combine, zeros(*Y), zeros(4))),
    "weights-shape": (
        V,
        "weights has shape (4, 3), but y (4, 2, 8) has 4 tokens of 2 rows; they must agree",
        lambda: (combine, zeros(*Y), zeros(4, 3)),
    ),
    "indices-dtype": (
        T,
        "indices is float32; wanted int32, int64",
        lambda: (combine, zeros(9, 8), zeros(*W), {"indices": zeros(*W)}),
    ),
    "indices-shape": (
        V,
        "indices has shape (8,), but weights has shape (4, 2); they must agree",
        lambda: (combine, zeros(9, 8), zeros(*W), {"indices": zeros(8, **I32)}),
    ),
    "x-missing": (T, "x is missing; pass an array", lambda: (silu_and_mul, None)),
    "x-dtype": (T, "x is float8_e4m3fn; wanted bfloat16", lambda: (silu_and_mul, zeros(4, 8, dtype="float8_e4m3fn"))),
    "x-odd": (V, "x has shape (4, 7); its last axis holds two halves, so its length must be even", lambda: (silu_and_mul, zeros(4, 7))),
    "x-rank-0": (V, "x has shape (); its last axis", lambda: (silu_and_mul, zeros())),
    "x-strides": (
        V,
        "x (2, 3, 2, 4) has strides (8, 16, 4, 1), which are not those of a matrix, or a batch of them; pass x as a contiguous array",
        lambda: (silu_and_mul, np.lib.stride_tricks.as_strided(zeros(64), (2, 3, 2, 4), (32, 64, 16, 4))),
    ),
    "gate": (V, "gate is 'up'; wanted one of 'first', 'second'", lambda: (silu_and_mul, zeros(4, 8), {"gate": "up"})),
    "gate-list": (V, "gate is ['first']; wanted one of", lambda: (silu_and_mul, zeros(4, 8), {"gate": ["first"]})),
    "counts-dtype": (
        T,
        "counts is uint8; wanted int32, int64",
        lambda: (silu_and_mul, zeros(4, 2, 8), {"counts": zeros(4, dtype="uint8")}),
    ),
    "counts-rank": (
        V,
        "x has shape (4, 8); with counts it is [groups, rows, 2n]",
        lambda: (silu_and_mul, zeros(4, 8), {"counts": zeros(4, **I32)}),
    ),
    "counts-shape": (
        V,
        "counts has shape (3,), but x (4, 2, 8) has 4 groups; wanted (4,)",
        lambda: (silu_and_mul, zeros(4, 2, 8), {"counts": zeros(3, **I32)}),
    ),
    "out-shape": (
        V,
        "out has shape (4, 9), but the result has shape (4, 8); pass out of that shape or drop it",
        lambda: (combine, zeros(*Y), zeros(*W), {"out": zeros(4, 9)}),
    ),
    "out-scalar": (T, "out is a float; pass an array of shape (4, 4)", lambda: (silu_and_mul, zeros(4, 8), {"out": 1.0})),
    "out-dtype": (
        V,
        "out is int32; results come as bfloat16, float16, float32",
        lambda: (silu_and_mul, zeros(4, 8), {"out": zeros(4, 4, **I32)}),
    ),
    "out-two-dtypes": (
        V,
        "out is float32, but out_dtype is float16; drop one of them",
        lambda: (silu_and_mul, zeros(4, 8), {"out": zeros(4, 4), "out_dtype": FP16}),
    ),
    "out-read-only": (V, "out is read-only; pass a writable array", lambda: (silu_and_mul, zeros(4, 8), {"out": read_only(zeros(4, 4))})),
    "out-repeated": (
        V,
        "several elements share memory; pass an array of its own",
        lambda: (silu_and_mul, zeros(4, 8), {"out": repeated(4, 4)}),
    ),
    "out-gaps": (
        V,
        "out has strides (8, 2); one of its axes must be contiguous (stride 1)",
        lambda: (silu_and_mul, zeros(4, 8), {"out": zeros(4, 8)[:, ::2]}),
    ),
    "out-strides": (
        V,
        "out (2, 3, 2, 4) has strides (8, 16, 4, 1), which are not those of a matrix, or a batch of them; pass out as a contiguous array",
        lambda: (silu_and_mul, zeros(2, 3, 2, 8), {"out": np.lib.stride_tricks.as_strided(zeros(64), (2, 3, 2, 4), (32, 64, 16, 4))}),
    ),
    "out-aliases-y": (V, "combine: out shares memory with y", lambda: aliased(combine)),
    "out-aliases-x": (V, "silu_and_mul: out shares memory with x", lambda: aliased(silu_and_mul)),
    "out-jax": (
        T,
        "silu_and_mul: JAX arrays are immutable: drop out=",
        lambda: (silu_and_mul, jax.numpy.zeros((4, 8)), {"out": jax.numpy.zeros((4, 4))}),
    ),
    "out_dtype": (V, "out_dtype is int8; results come as", lambda: (silu_and_mul, zeros(4, 8), {"out_dtype": "int8"})),
    "out_dtype-list": (T, "combine: out_dtype: ", lambda: (combine, zeros(*Y), zeros(*W), {"out_dtype": ["half"]})),
    "frameworks": (T, "weights is a PyTorch array, but y is a NumPy array", lambda: (combine, zeros(*Y), torch.zeros(W))),
}
"""Error, part of its message, and the call."""


@pytest.mark.parametrize("name", ERRORS)
def test_refused_in_words(name: str) -> None:
    error, words, make = ERRORS[name]
    function, *arguments = make()
    keywords = arguments.pop() if isinstance(arguments[-1], dict) else {}
    before = launch.launches
    with pytest.raises(Exception) as raised:
        function(*arguments, **keywords)
    text = str(raised.value)
    assert raised.type is error, f"{raised.type.__name__}: {text}"
    assert text.startswith(f"{function.__name__}: ") and words in text, text
    assert len(text) < 400 and "\n" not in text
    assert launch.launches == before
