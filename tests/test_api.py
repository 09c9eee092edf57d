"""Every public function computes the right numbers on host memory, from every framework, in every layout; and keeps the contract of a call.

Expected values come from tests/oracles.py (exact cases: one right answer; random ones: element-wise bounds).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import oracles
import pytest
from oracles import Case, check_exact, check_random, embed, exact_case, random_case

import cugemm
from cugemm import Quantized, SegmentGEMMWrapper, Spec, launch, problem, reference
from cugemm.arrays import View, share_bytes

jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
jnp = jax.numpy
FakeTensorMode = pytest.importorskip("torch._subclasses.fake_tensor").FakeTensorMode

BF16, FP16, F32, E4M3, E5M2 = "bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"
BLOCKS = {"tensor": (0, 0), "row": (1, 0), "group": (1, 128), "block": (128, 128)}


class Hidden:
    """An array that shows DLPack and nothing else of its framework."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **how: Any) -> object:
        return self._array.__dlpack__(**how)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def to_torch(x: Any) -> Any:
    """A tensor over the array's memory, strides and all."""
    name = x.dtype.name
    if name == "bfloat16" or name.startswith("float8"):
        return torch.from_numpy(x.view(np.uint8 if x.dtype.itemsize == 1 else np.int16)).view(getattr(torch, name))
    return torch.from_numpy(x)


def from_torch(x: Any) -> Any:
    x = x.detach()
    if x.dtype is torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


class Framework:
    """How arrays get in and results get out."""

    def __init__(self, name: str, into: Callable[[Any], Any], back: Callable[[Any], Any], kind: type, *, jit: bool = False) -> None:
        self.name, self.into, self.back, self.kind, self.jit = name, into, back, kind, jit

    def call(self, fn: Callable[..., Any], *arrays: Any, **how: Any) -> Any:
        """fn(*arrays, **how) as NumPy; array keywords are brought along."""
        given = {key: self.into(value) if isinstance(value, np.ndarray) else value for key, value in how.items()}
        positional = [self.into(x) if isinstance(x, np.ndarray) else x for x in arrays]
        if self.jit:  # arrays are traced, everything else is part of the program
            traced = {i: x for i, x in enumerate(positional) if isinstance(x, jax.Array)}
            named = {key: x for key, x in given.items() if isinstance(x, jax.Array)}
            result = jax.jit(lambda t, kw: fn(*[t.get(i, x) for i, x in enumerate(positional)], **{**given, **kw}))(traced, named)
        else:
            result = fn(*positional, **given)
        assert isinstance(result, self.kind), type(result)
        return self.back(result)

    def __repr__(self) -> str:
        return self.name


FRAMEWORKS = [
    Framework("numpy", lambda x: x, lambda x: x, np.ndarray),
    Framework("torch", to_torch, from_torch, torch.Tensor),
    Framework("jax", jnp.asarray, np.asarray, jax.Array),
    Framework("jit", jnp.asarray, np.asarray, jax.Array, jit=True),
    Framework("dlpack", lambda x: Hidden(to_torch(x)), lambda x: x, np.ndarray),
]
NUMPY, TORCH = FRAMEWORKS[:2]
each = pytest.mark.parametrize("framework", FRAMEWORKS, ids=repr)


def column_major(x: Any) -> Any:
    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)


# --- dense products ---------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize(
    "elements", [("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp16"), ("e4m3", "e5m2"), ("fp16", "e4m3"), ("e5m2", "bf16")], ids="x".join
)
def test_matmul(framework: Framework, elements: tuple[str, str]) -> None:
    case = exact_case(1, 17, 13, 70, *elements)
    dtype = oracles.ENCODINGS[elements[0]].dtype if "p16" in elements[0] or elements[0] == "bf16" else BF16
    for a, b in ((case.a, case.b), (case.a, column_major(case.b)), (column_major(case.a), case.b)):
        check_exact(case, framework.call(cugemm.matmul, a, b), dtype)
    check_exact(case, framework.call(cugemm.matmul, case.a, case.b, out_dtype=F32), F32)


@pytest.mark.parametrize("framework", [f for f in FRAMEWORKS if "j" not in f.name], ids=repr)
def test_strided_operands(framework: Framework) -> None:
    case = random_case(2, 9, 11, 40, "fp16", "bf16")
    wide = np.zeros((9, 80), case.a.dtype)
    wide[:, ::2] = case.a
    for a in (embed(case.a), embed(case.a, transposed=True), wide[:, ::2]):
        for b in (embed(case.b), embed(case.b, 2, 1, transposed=True)):
            check_random(case, framework.call(cugemm.matmul, a, b), FP16)


@each
@pytest.mark.parametrize("batches", [(3, 3), (1, 3), (3, 1), (None, 3), (3, None), (0, 0)], ids=str)
def test_batches(framework: Framework, batches: tuple[int | None, int | None]) -> None:
    """1 broadcasts, and so does an operand without a batch axis."""
    count = max(batches[0] or 0, batches[1] or 0)
    case = random_case(3, 5, 7, 33, "bf16", "bf16", batch=(count,))
    a, b = case.a, case.b
    if count:
        a = a[0] if batches[0] is None else a[: batches[0]]
        b = b[0] if batches[1] is None else b[: batches[1]]
        left = np.broadcast_to(a if a.ndim == 3 else a[None], case.a.shape)
        right = np.broadcast_to(b if b.ndim == 3 else b[None], case.b.shape)
        case = oracles.given_case(left, right, "bf16", "bf16")
    for fn in (cugemm.matmul, cugemm.bmm_bf16):
        check_random(case, framework.call(fn, a, b), BF16)


def test_broadcast_strides_are_welcome() -> None:
    case = random_case(4, 5, 7, 33, "bf16", "bf16")
    tall = np.broadcast_to(case.a[:1], (5, 33))
    assert tall.strides[0] == 0
    tall = oracles.given_case(tall, case.b, "bf16", "bf16")
    check_random(tall, cugemm.matmul(tall.a, case.b), BF16)
    check_random(tall, TORCH.back(cugemm.matmul(to_torch(case.a)[:1].expand(5, 33), to_torch(case.b))), BF16)


@each
@pytest.mark.parametrize("sizes", [(0, 7, 5), (7, 0, 5), (7, 5, 0), (0, 0, 0), (1, 1, 1)], ids=str)
def test_empty(framework: Framework, sizes: tuple[int, int, int]) -> None:
    m, n, k = sizes
    case = random_case(5, m, n, k, "bf16", "bf16", bias=True)
    bias = case.bias
    check_random(case, framework.call(cugemm.linear, case.a, np.ascontiguousarray(case.b.T), bias), BF16)
    plain = oracles.given_case(case.a, case.b, "bf16", "bf16")
    check_random(plain, framework.call(cugemm.matmul, case.a, case.b), BF16)
    if k == 0:
        assert not framework.call(cugemm.matmul, case.a, case.b).astype(float).any()


@each
def test_linear(framework: Framework) -> None:
    case = random_case(6, 12, 19, 50, "fp16", "fp16", bias=True)
    w = np.ascontiguousarray(case.b.T)
    for dtype in (F32, FP16, BF16):
        assert case.bias is not None
        biased = oracles.given_case(case.a, case.b, "fp16", "fp16", bias=case.bias.astype(oracles.dtype_of(dtype)))
        check_random(biased, framework.call(cugemm.linear, case.a, w, biased.bias), FP16)
    check_random(case, framework.call(cugemm.linear, case.a, w, bias=case.bias, out_dtype=F32), F32)


@pytest.mark.parametrize("framework", FRAMEWORKS[:4], ids=repr)
@pytest.mark.parametrize("lead", [(), (1,), (12,), (3, 4), (2, 3, 2), (0, 4), (4, 0)], ids=str)
def test_linear_takes_leading_axes(framework: Framework, lead: tuple[int, ...]) -> None:
    rows = int(np.prod(lead))
    case = random_case(7, rows, 19, 50, "bf16", "bf16")
    y = framework.call(cugemm.linear, case.a.reshape(*lead, 50), np.ascontiguousarray(case.b.T))
    assert y.shape == (*lead, 19)
    check_random(case, y.reshape(rows, 19), BF16)


def test_linear_of_three_axes_is_planned() -> None:
    x, w, bias = (np.ones(shape, ml_dtypes.bfloat16) for shape in ((2, 3, 64), (5, 64), (5,)))
    stand_ins: list[tuple[Any, Any]] = [
        (x, w), (to_torch(x), to_torch(w)), (jnp.asarray(x), jnp.asarray(w)), (Spec((2, 3, 64), BF16), Spec((5, 64), BF16)),
        (jax.ShapeDtypeStruct((2, 3, 64), jnp.bfloat16), jax.ShapeDtypeStruct((5, 64), jnp.bfloat16)),
        (torch.empty(2, 3, 64, dtype=torch.bfloat16, device="meta"), torch.empty(5, 64, dtype=torch.bfloat16, device="meta")),
    ]  # fmt: skip
    for left, right in stand_ins:
        for activations in (None, "fp8_row"):
            text = cugemm.explain(cugemm.linear, left, right, activations=activations)
            assert "m = 6, n = 5, k = 64" in text, text
    assert cugemm.linear(*stand_ins[3]).shape == (2, 3, 5)
    weight = Quantized(Spec((5, 64), E4M3), Spec((5, 1), F32), "fp8_row")
    layer = cugemm.QuantizedLinear(weight, activations="fp8_row")
    assert "m = 6, n = 5, k = 64" in cugemm.explain(layer, Spec((2, 3, 64), BF16))
    made = cugemm.plan(cugemm.linear, x, w, bias)
    np.testing.assert_array_equal(np.asarray(made(x, w, bias), np.float32), np.full((2, 3, 5), 65, np.float32))


def test_linear_of_three_axes_refuses_in_words() -> None:
    x, w = np.ones((2, 3, 64), ml_dtypes.bfloat16), np.ones((5, 64), ml_dtypes.bfloat16)
    empty = cugemm.linear(np.ones((2, 3, 0), ml_dtypes.bfloat16), w[:, :0], np.ones(5, np.float32))
    np.testing.assert_array_equal(np.asarray(empty, np.float32), np.ones((2, 3, 5), np.float32))
    none = cugemm.linear(x, w[:0], out=np.empty((2, 3, 0), ml_dtypes.bfloat16))
    assert none.shape == (2, 3, 0)
    refused: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (TypeError, r"linear: out is a builtins.list", w, {"out": [1.0]}),
        (TypeError, r"linear: out is a cugemm.quantized.Quantized", w, {"out": cugemm.quantize(w, "fp8_row")}),
        (TypeError, r"linear: w is a builtins.list", [1.0], {"out": np.empty((2, 3, 5), np.float32)}),
        (TypeError, r"linear: w is a builtins.list", [1.0], {}),
        (ValueError, r"linear: out has shape \(6, 5\); wanted \(2, 3, 5\)", w, {"out": np.empty((6, 5), np.float32)}),
        (TypeError, r"linear: out is a Hidden, which has no reshape", w, {"out": Hidden(np.empty((2, 3, 5), np.float32))}),
    ]
    for kind, text, right, how in refused:
        with pytest.raises(kind, match=text):
            cugemm.linear(x, right, **how)
    with pytest.raises(ValueError, match=r"linear: x has shape \(\); wanted \[.., k\]"):
        cugemm.linear(np.ones((), np.float16), w)


def test_a_number_beside_a_jax_array_is_refused_in_words() -> None:
    for call in (cugemm.mm_bf16, cugemm.matmul):
        for one in (1, np.float32(1)):
            with pytest.raises((TypeError, ValueError), match=f"{call.__name__}: a "):
                call(one, jnp.ones((4, 4), jnp.bfloat16))


def test_linear_leading_axes_with_out_and_activations() -> None:
    case = random_case(8, 12, 19, 50, "bf16", "bf16", bias=True)
    x, w = to_torch(case.a.reshape(3, 4, 50)), to_torch(np.ascontiguousarray(case.b.T))
    out = torch.full((3, 4, 19), float("nan"), dtype=torch.bfloat16)
    assert cugemm.linear(x, w, to_torch(case.bias), out=out) is out
    check_random(case, from_torch(out).reshape(12, 19), BF16)
    fused = torch.full((3, 4, 40), float("nan"), dtype=torch.bfloat16)
    assert cugemm.linear(x, w, to_torch(case.bias), out=fused[..., :19])._base is fused
    check_random(case, from_torch(fused[..., :19]).reshape(12, 19), BF16)
    assert fused[..., 19:].isnan().all()
    y = cugemm.linear(x, w, activations="fp8_row")
    assert (tuple(y.shape), y.dtype) == ((3, 4, 19), torch.bfloat16)
    q = cugemm.quantize(x.reshape(12, 50), "fp8_row")
    twin = oracles.given_case(
        q.data.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), case.b, "e4m3", "bf16", a_scale=q.scale.numpy(), a_block=(1, 0)
    )
    check_random(twin, from_torch(y).reshape(12, 19), BF16)


@each
def test_mm_bf16_and_tgv(framework: Framework) -> None:
    case = random_case(9, 6, 10, 65, "bf16", "bf16", bias=True)
    for fn in (cugemm.mm_bf16, cugemm.tgv_gemm, cugemm.tgv_gemm_sm100):
        for b in (case.b, column_major(case.b)):
            check_random(case, framework.call(fn, case.a, b, case.bias), BF16)
    check_random(case, framework.call(cugemm.mm_bf16, case.a, case.b, case.bias, False, None, F32), F32)
    half = random_case(9, 6, 10, 65, "fp16", "fp16")
    check_random(half, framework.call(cugemm.tgv_gemm_sm100, half.a, half.b), FP16)


# --- fp8 --------------------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("a_kind", ["", *BLOCKS])
@pytest.mark.parametrize("b_kind", ["", *BLOCKS])
def test_mm_fp8_scales(framework: Framework, a_kind: str, b_kind: str) -> None:
    """None, one element, per row x per column, 1 x 128, 128 x 128, in every pairing."""
    a_block, b_block = BLOCKS.get(a_kind), BLOCKS.get(b_kind)
    case = exact_case(10, 20, 150, 200, "e4m3", "e5m2", a_block=a_block, b_block=b_block and b_block[::-1], alpha=2.0, bias=True)
    y = framework.call(
        cugemm.mm_fp8, case.a, column_major(case.b), case.alpha, F32, a_scale=case.a_scale, b_scale=case.b_scale, bias=case.bias
    )  # fmt: skip
    check_exact(case, y, F32)


@each
@pytest.mark.parametrize("scalar", [0.25, 2, np.float32(0.5), np.float64(4.0), np.float16(2.0), np.int64(2), "array", "0-d"], ids=repr)
def test_scalars(framework: Framework, scalar: Any) -> None:
    """A scale or alpha may be a Python or NumPy scalar or an array of one element, of any rank."""
    value = 8.0 if isinstance(scalar, str) else float(scalar)
    given = {"array": np.full((1,), 8, np.float32), "0-d": np.full((), 8, np.float32)}[scalar] if isinstance(scalar, str) else scalar
    case = exact_case(11, 5, 6, 33, "e4m3", "e4m3", alpha=value)
    check_exact(case, framework.call(cugemm.mm_fp8, case.a, case.b, alpha=given), BF16)
    check_exact(case, framework.call(cugemm.mm_fp8, case.a, case.b, a_scale=given), BF16)
    check_exact(case, framework.call(cugemm.mm_fp8, case.a, case.b, b_scale=given), BF16)


@each
@pytest.mark.parametrize("dtype", [F32, FP16, BF16])
def test_scale_dtypes_and_vectors(framework: Framework, dtype: str) -> None:
    """[m] and [m, 1], [n] and [1, n]; float32, float16 or bfloat16."""
    case = exact_case(12, 5, 6, 33, "e4m3", "e4m3", a_block=(1, 0), b_block=(0, 1))
    sa, sb = (np.asarray(s).astype(oracles.dtype_of(dtype)) for s in (case.a_scale, case.b_scale))
    for a_scale in (sa, sa[:, 0]):
        for b_scale in (sb, sb[0]):
            check_exact(case, framework.call(cugemm.mm_fp8, case.a, case.b, a_scale=a_scale, b_scale=b_scale), BF16)


def test_scales_with_strides() -> None:
    case = exact_case(13, 20, 150, 260, "e4m3", "e4m3", a_block=(1, 128), b_block=(128, 128))
    for a_scale in (column_major(case.a_scale), embed(np.asarray(case.a_scale))):
        check_exact(case, cugemm.mm_fp8(case.a, case.b, a_scale=a_scale, b_scale=embed(np.asarray(case.b_scale))), BF16)
    every = np.repeat(np.asarray(case.a_scale), 2, axis=0)[::2]
    check_exact(case, cugemm.mm_fp8(case.a, case.b, a_scale=every, b_scale=case.b_scale), BF16)
    rows = exact_case(13, 20, 15, 26, "e4m3", "e4m3", a_block=(1, 0))
    spread = np.repeat(np.asarray(rows.a_scale)[:, 0], 3)[::3]
    check_exact(rows, cugemm.mm_fp8(rows.a, rows.b, a_scale=spread), BF16)


@each
def test_bmm_fp8(framework: Framework) -> None:
    case = exact_case(14, 6, 9, 40, "e4m3", "e5m2", batch=(3,), a_block=(0, 0), b_block=(0, 0))
    one = oracles.given_case(case.a, case.b, "e4m3", "e5m2", a_scale=0.5, b_scale=4.0)
    check_exact(one, framework.call(cugemm.bmm_fp8, case.a, column_major(case.b), 0.5, np.float32(4.0)), BF16)
    half = np.full((1,), 0.5, np.float32)
    check_exact(one, framework.call(cugemm.bmm_fp8, case.a, case.b, half, 8 * half, FP16), FP16)
    rows = exact_case(15, 6, 9, 40, "e4m3", "e4m3", batch=(3,), a_block=(1, 0), b_block=(0, 1))
    check_exact(rows, framework.call(cugemm.bmm_fp8, rows.a, rows.b, rows.a_scale, rows.b_scale, F32), F32)


@each
def test_bmm_fp8_short_form(framework: Framework) -> None:
    """16-bit A and one scale: it is B's. A 16-bit B is cast to e4m3, saturating."""
    case = exact_case(16, 6, 9, 40, "fp16", "e4m3", b_block=(0, 1))
    scale = np.asarray(case.b_scale)[0]
    check_exact(case, framework.call(cugemm.bmm_fp8, case.a, case.b, scale), FP16)
    rng = np.random.default_rng(0)
    wide = (rng.standard_normal((40, 9)) * 300).astype(np.float16)
    assert np.abs(wide.astype(float)).max() > 464
    stored = np.clip(wide.astype(np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    cast = oracles.given_case(case.a, stored, "fp16", "e4m3", b_scale=scale[None], b_block=(0, 1))
    for b in (wide, column_major(wide)):
        check_random(cast, framework.call(cugemm.bmm_fp8, case.a, b, scale), FP16)


def test_results_of_dlpack_producers_feed_the_next_call() -> None:
    """A class without a `from_dlpack` of its own gets NumPy arrays back, which go beside its arrays."""
    case = random_case(28, 6, 9, 40, "bf16", "bf16")
    x, w = Hidden(to_torch(case.a)), Hidden(to_torch(np.ascontiguousarray(case.b.T)))
    q = cugemm.quantize(w, "fp8_row")
    exact = case.a.astype(float) @ cugemm.dequantize(q, F32).astype(float).T
    assert np.abs(cugemm.linear(x, q, out_dtype=F32) - exact).max() < 1e-4
    assert cugemm.linear(x, w, activations="fp8_row").shape == (6, 9)


@each
@pytest.mark.parametrize("granularity", [(1, 128), (128, 128), (1, 1), (128, 1)], ids=str)
def test_groupwise(framework: Framework, granularity: tuple[int, int]) -> None:
    gm, gn = granularity
    case = exact_case(17, 140, 131, 300, "e4m3", "e4m3", a_block=(gm, 128), b_block=(128, gn))
    a, b = case.a, np.ascontiguousarray(case.b.T)
    sa, sb = np.asarray(case.a_scale), np.ascontiguousarray(np.asarray(case.b_scale).T)
    how: dict[str, Any] = {"scale_granularity_mnk": (gm, gn, 128)}
    fn = cugemm.gemm_fp8_nt_groupwise
    check_exact(case, framework.call(fn, a, b, sa, sb, scale_major_mode="K", **how), BF16)
    check_exact(case, framework.call(fn, a, b, np.ascontiguousarray(sa.T), np.ascontiguousarray(sb.T), scale_major_mode="MN", **how), BF16)
    check_exact(case, framework.call(fn, a, b, np.ascontiguousarray(sa.T), sb, backend="trtllm", out_dtype=F32, **how), F32)
    if granularity == (128, 128):
        for mode, x, y in (("K", sa, sb), ("MN", np.ascontiguousarray(sa.T), np.ascontiguousarray(sb.T))):
            check_exact(case, framework.call(cugemm.gemm_fp8_nt_blockscaled, a, b, x, y, scale_major_mode=mode), BF16)


def test_square_scales_are_read_as_the_mode_says() -> None:
    """m = n = 2, k = 256: scales of both modes have shape (2, 2)."""
    case = exact_case(29, 2, 2, 256, "e4m3", "e4m3", a_block=(1, 128), b_block=(128, 1))
    a, b, sa, sb = case.a, np.ascontiguousarray(case.b.T), np.asarray(case.a_scale), np.asarray(case.b_scale)
    assert not (np.array_equal(sa, sa.T) and np.array_equal(sb, sb.T))
    how: dict[str, Any] = {"scale_granularity_mnk": (1, 1, 128)}
    check_exact(case, cugemm.gemm_fp8_nt_groupwise(a, b, sa, np.ascontiguousarray(sb.T), "K", **how), BF16)
    check_exact(case, cugemm.gemm_fp8_nt_groupwise(a, b, np.ascontiguousarray(sa.T), sb, "MN", **how), BF16)


@each
def test_blockscale_sm90(framework: Framework) -> None:
    for block in ((128, 128), (128, 1)):
        case = exact_case(19, 5, 140, 300, "e4m3", "e4m3", a_block=(1, 128), b_block=block)
        w, sw = np.ascontiguousarray(case.b.T), np.ascontiguousarray(np.asarray(case.b_scale).T)
        y = framework.call(cugemm.fp8_blockscale_gemm_sm90, case.a, w, input_scale=case.a_scale, weight_scale=sw)
        check_exact(case, y, BF16)


@pytest.mark.parametrize("framework", FRAMEWORKS[:4], ids=repr)
def test_blockscale_sm90_quantises(framework: Framework) -> None:
    """bfloat16 operands: amax / 448 over 1 x 128 and 128 x 128."""
    rng = np.random.default_rng(1)
    x, w = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((5, 300), (140, 300)))

    def by_blocks(values: Any, rows: int) -> tuple[Any, Any]:
        v = values.astype(np.float32)
        scale = np.array(
            [[max(np.abs(v[i : i + rows, j : j + 128]).max(), 1e-12) for j in range(0, 300, 128)] for i in range(0, len(v), rows)]
        )
        scale = scale.astype(np.float32) / np.float32(448)
        spread = np.repeat(np.repeat(scale, rows, 0)[: len(v)], 128, 1)[:, :300]
        return (v / spread).astype(ml_dtypes.float8_e4m3fn), scale

    (xq, xs), (wq, ws) = by_blocks(x, 1), by_blocks(w, 128)
    case = oracles.given_case(xq, wq.T, "e4m3", "e4m3", a_scale=xs, a_block=(1, 128), b_scale=ws.T, b_block=(128, 128))
    check_random(case, framework.call(cugemm.fp8_blockscale_gemm_sm90, x, w), BF16)
    check_random(case, framework.call(cugemm.fp8_blockscale_gemm_sm90, x, wq, weight_scale=ws), BF16)


def test_quantized_operands_of_groupwise_bring_their_own_layout() -> None:
    """The scale of a Quantized lies along its data, whatever `scale_major_mode` says about loose scales."""
    rng = np.random.default_rng(6)
    a, b = (rng.standard_normal((2, 256)) * np.exp2(rng.uniform(-4, 4, (2, 256))) for _ in range(2))
    qa, qb = cugemm.quantize(a.astype(np.float32), "fp8_group"), cugemm.quantize(b.astype(np.float32), "fp8_group")
    exact = cugemm.dequantize(qa, F32).astype(float) @ cugemm.dequantize(qb, F32).astype(float).T
    for mode in ("K", "MN"):
        y = cugemm.gemm_fp8_nt_groupwise(qa, qb, None, None, mode, out_dtype=F32)
        assert np.allclose(y, exact, rtol=1e-5, atol=1e-4 * np.abs(exact).max())


# --- fp4 --------------------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("element", ["e2m1", "e2m1x2"])
def test_mm_fp4(framework: Framework, element: str) -> None:
    case = exact_case(20, 6, 10, 34, "fp16", element, b_block=(0, 1), alpha=2.0)
    scale = np.asarray(case.b_scale)[0]
    b = case.b | 0xA0 if element == "e2m1" else case.b
    for weights in (b, column_major(b)):
        check_exact(case, framework.call(cugemm.mm_fp4, case.a, weights, scale, alpha=2.0), FP16)
        check_exact(
            case, framework.call(cugemm.mm_fp4, case.a, weights, b_descale=np.asarray(case.b_scale), alpha=np.full(1, 2, np.float32)), FP16
        )
    plain = exact_case(20, 6, 10, 34, "bf16", element)
    check_exact(plain, framework.call(cugemm.mm_fp4, plain.a, plain.b, 1.0, out_dtype=F32), F32)


def test_fp4_in_a_quantized() -> None:
    case = exact_case(21, 6, 10, 34, "bf16", "e2m1x2", b_block=(0, 1))
    w = Quantized(np.ascontiguousarray(case.b.T), np.ascontiguousarray(np.asarray(case.b_scale).T), "fp4_row")
    assert w.shape == (10, 34)
    check_exact(case, cugemm.linear(case.a, w), BF16)
    check_exact(case, cugemm.matmul(case.a, w.T), BF16)
    check_exact(case, cugemm.mm_fp4(case.a, w.T), BF16)
    codes = oracles.decode(case.b, "e2m1x2", k_axis=0).T
    values = Quantized(
        jnp.asarray(codes.astype(ml_dtypes.float4_e2m1fn)), jnp.asarray(np.ascontiguousarray(np.asarray(case.b_scale).T)), "fp4_row"
    )
    assert values.shape == (10, 34), "JAX counts values"
    check_exact(case, np.asarray(cugemm.linear(jnp.asarray(case.a), values)), BF16)
    packed = torch.from_numpy(case.b.T.copy()).view(torch.float4_e2m1fn_x2)
    q = Quantized(packed, torch.from_numpy(np.ascontiguousarray(np.asarray(case.b_scale).T)), "fp4_row")
    check_exact(case, TORCH.back(cugemm.linear(to_torch(case.a), q)), BF16)


# --- Quantized --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS[:3], ids=repr)
@pytest.mark.parametrize("kind", list(BLOCKS))
@pytest.mark.parametrize("e5m2", [False, True])
def test_quantized_weights(framework: Framework, kind: str, e5m2: bool) -> None:
    """linear(x, q), matmul(x, q.T) and mm_fp8 agree with the dequantised product; dequantize undoes quantize within a step."""
    rng = np.random.default_rng(2)
    w = (rng.standard_normal((150, 260)) * np.exp2(rng.uniform(-3, 3, (150, 1)))).astype(ml_dtypes.bfloat16)
    fmt = f"fp8_{'e5m2_' if e5m2 else ''}{kind}"
    q = cugemm.quantize(framework.into(w), fmt)
    assert (q.shape, q.format.name, q.T.shape, q.T.T.k_axis) == ((150, 260), fmt, (260, 150), 1)
    data, scale = (
        (from_torch(x.view(torch.uint8)) if x.dtype.itemsize == 1 else from_torch(x) for x in (q.data, q.scale))
        if framework is TORCH
        else (np.asarray(q.data), np.asarray(q.scale))
    )
    data = data.view(ml_dtypes.float8_e5m2 if e5m2 else ml_dtypes.float8_e4m3fn)
    element, block = ("e5m2" if e5m2 else "e4m3"), BLOCKS[kind]
    shape = {"tensor": (1,), "row": (150, 1), "group": (150, 3), "block": (2, 3)}[kind]
    assert (scale.dtype, scale.shape) == (np.float32, shape)
    real = oracles.dequantised(oracles.decode(data, element), scale if kind != "tensor" else scale.item(), block)
    amax = np.repeat(np.repeat(scale, block[0] or 150, 0)[:150] if kind != "tensor" else scale[None], block[1] or 260, 1)[:, :260] * (
        57344 if e5m2 else 448
    )
    assert (
        np.abs(real - w.astype(float)) <= np.maximum(np.abs(w.astype(float)) * (2.0**-3 if e5m2 else 2.0**-4), amax * 2.0**-17) * 1.001
    ).all()

    x = rng.standard_normal((7, 260)).astype(ml_dtypes.bfloat16)
    case = oracles.given_case(
        x, data.T, "bf16", element, b_scale=scale.item() if kind == "tensor" else scale.T, b_block=block[::-1]
    )  # fmt: skip
    check_random(case, framework.back(cugemm.linear(framework.into(x), q)), BF16)
    check_random(case, framework.back(cugemm.matmul(framework.into(x), q.T)), BF16)
    back = cugemm.dequantize(q, "float32")
    assert np.array_equal(framework.back(back).astype(float), real.astype(np.float32))
    assert np.array_equal(framework.back(cugemm.dequantize(q.T, F32)), framework.back(back).T)
    xq = cugemm.quantize(framework.into(x), "fp8_row")
    both = framework.back(cugemm.mm_fp8(xq, q.T, out_dtype=F32))
    rows, factors = (np.asarray(framework.back(cugemm.dequantize(xq, F32))), np.asarray(real))
    assert np.allclose(both, rows.astype(float) @ factors.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("framework", [f for f in FRAMEWORKS if repr(f) != "dlpack"], ids=repr)  # a bare producer has no reshape
def test_dequantize_takes_the_scales_that_products_take(framework: Framework) -> None:
    x = np.random.default_rng(3).standard_normal((6, 64)).astype(np.float32)
    q = cugemm.quantize(x, "fp8_row")

    def check(of: Quantized, shape: tuple[int, ...]) -> None:
        wanted = cugemm.dequantize(of, F32)

        def call(data: Any, scale: Any) -> Any:
            return cugemm.dequantize(Quantized(data, scale, of.format), F32)

        np.testing.assert_array_equal(framework.call(call, of.data, of.scale.reshape(shape)), wanted)

    check(q, (6,))
    for shape in ((), (1, 1), (1,)):
        check(cugemm.quantize(x, "fp8_tensor"), shape)


def test_dequantize_says_what_must_be_contiguous() -> None:
    q = cugemm.quantize(np.ones((4, 256), np.float32), "fp8_group")
    np.testing.assert_array_equal(cugemm.dequantize(q[1:3], F32), np.ones((2, 256)))
    with pytest.raises(ValueError, match=r"dequantize: data .* contiguous copy"):
        cugemm.dequantize(q[:, :128], F32)
    bare = Quantized(q.data, np.ones((4, 1), np.float32), "fp8_row")
    np.testing.assert_array_equal(cugemm.dequantize(Quantized(bare.data, bare.scale[:, 0], "fp8_row").T, F32).shape, (256, 4))


def test_quantize_keeps_the_scale_of_rows_when_transposed_square() -> None:
    """n = k: a scale per row cannot be taken for one per k."""
    rng = np.random.default_rng(3)
    w = (rng.standard_normal((256, 256)) * np.exp2(rng.uniform(-3, 3, (256, 1)))).astype(np.float16)
    x = rng.standard_normal((3, 256)).astype(np.float16)
    for fmt in ("fp8_row", "fp8_group", "fp8_block"):
        q = cugemm.quantize(w, fmt)
        exact = x.astype(float) @ cugemm.dequantize(q, F32).astype(float).T
        for y in (cugemm.linear(x, q, out_dtype=F32), cugemm.matmul(x, q.T, out_dtype=F32)):
            assert (np.abs(y - exact) <= 1e-4 * np.abs(x.astype(float)) @ np.abs(w.astype(float)).T).all()


def test_quantize_3d_and_strides() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((2, 5, 130)).astype(np.float32)
    for fmt in ("fp8_tensor", "fp8_row", "fp8_group", "fp8_block"):
        q = cugemm.quantize(x, fmt)
        for strided in (column_major(x), embed(x, 2, 3)):
            other = cugemm.quantize(strided, fmt)
            oracles.check_bits(other.data, q.data)
            oracles.check_bits(other.scale, q.scale)
        batch = cugemm.dequantize(q, F32)
        assert batch.shape == x.shape
        assert (np.abs(batch - x) <= np.abs(x).max() * 2.0**-4).all()
    empty = cugemm.quantize(np.zeros((0, 64), np.float32), "fp8_row")
    assert (empty.data.shape, empty.scale.shape) == ((0, 64), (0, 1))


def test_batched_quantized() -> None:
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((3, 5, 200), (3, 7, 200)))
    for fmt in ("fp8_row", "fp8_group", "fp8_tensor"):
        qa = cugemm.quantize(a, fmt)
        exact = cugemm.dequantize(qa, F32).astype(float) @ b.astype(float).swapaxes(1, 2)
        y = cugemm.matmul(qa, b.swapaxes(1, 2), out_dtype=F32)
        assert np.abs(y - exact).max() < 1e-3
        qb = cugemm.quantize(b, fmt)
        exact = a.astype(float) @ cugemm.dequantize(qb, F32).astype(float).swapaxes(1, 2)
        assert qb.T.shape == (3, 200, 7)
        assert np.abs(cugemm.matmul(a, qb.T, out_dtype=F32) - exact).max() < 1e-3
        assert np.array_equal(cugemm.dequantize(qb.T, F32), cugemm.dequantize(qb, F32).swapaxes(1, 2))


# --- out= -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS[:2], ids=repr)
@pytest.mark.parametrize("dtype", [BF16, FP16, F32])
def test_out(framework: Framework, dtype: str) -> None:
    """Row-major, column-major, a slice of a wider buffer: returned itself, all written, nothing beside it."""
    case = random_case(22, 6, 9, 40, "bf16", "bf16", bias=True)
    a, w = framework.into(case.a), framework.into(np.ascontiguousarray(case.b.T))
    for make in (lambda p: p, column_major, lambda p: embed(p, 1, 3), lambda p: embed(p, 1, 3, transposed=True)):
        holder = make(oracles.poison((6, 9), dtype))
        out = framework.into(holder)
        assert cugemm.linear(a, w, framework.into(case.bias), out=out) is out
        check_random(case, framework.back(out), dtype)
        if holder.base is not None and holder.base.shape == (8, 15):
            edge = holder.base.astype(float).copy()
            edge[1:7, 3:12] = np.nan
            assert np.isnan(edge).all()


def test_out_of_one_fused_buffer() -> None:
    """Columns of one buffer beside each other: x, and q, k, v written next to it (legal: no byte is shared)."""
    case = random_case(23, 6, 8, 16, "bf16", "bf16")
    for transposed in (False, True):
        buffer = oracles.poison((40, 6) if transposed else (6, 40), BF16)
        view = buffer.T if transposed else buffer
        view[:, :16] = case.a
        for start in (16, 24, 32):
            out = view[:, start : start + 8]
            assert cugemm.matmul(view[:, :16], case.b, out=out) is out
            check_random(case, out, BF16)
        tensor = to_torch(view)
        tensor[:, 16:24] = float("nan")
        cugemm.matmul(tensor[:, :16], to_torch(case.b), out=tensor[:, 16:24])
        check_random(case, from_torch(tensor[:, 16:24]), BF16)
        with pytest.raises(ValueError, match="out shares memory with a"):
            cugemm.matmul(view[:, :16], case.b, out=view[:, 12:20])


def test_aliasing_is_never_missed(rng: np.random.Generator) -> None:
    """`share_bytes` against the sets of bytes themselves, on small random views near each other."""

    def random_view() -> tuple[View, set[int]]:
        dtype, size = [(FP16, 2), (F32, 4), ("uint8", 1)][rng.integers(3)]
        rank = int(rng.integers(1, 4))
        shape = tuple(int(n) for n in rng.choice([0, 1, 2, 3, 4], rank, p=[0.02, 0.18, 0.3, 0.3, 0.2]))
        strides = tuple(int(s) for s in rng.choice([0, 1, 1, 2, 3, 4, 6, 8, 12, 16], rank))
        view = View(int(rng.integers(1000, 1060)), shape, strides, dtype, -1)
        starts = [view.ptr + size * int(np.dot(index, strides)) for index in np.ndindex(shape)]
        return view, {start + i for start in starts for i in range(size)}

    for _ in range(4000):
        (a, bytes_a), (b, bytes_b) = random_view(), random_view()
        assert share_bytes(a, b) or not bytes_a & bytes_b, (a, b)
    left, right = View(1000, (4, 8), (40, 1), FP16, -1), View(1016, (4, 8), (40, 1), FP16, -1)
    assert not share_bytes(left, right), "slices of one fused buffer are legal"


def test_out_empty_and_batched() -> None:
    case = random_case(24, 6, 9, 40, "bf16", "bf16", batch=(3,))
    out = oracles.poison((3, 9, 6), F32).swapaxes(1, 2)
    assert cugemm.bmm_bf16(case.a, case.b, out=out) is out
    check_random(case, out, F32)
    out = np.empty((0, 9), np.float32)
    assert cugemm.matmul(case.a[0, :0], case.b[0], out=out) is out


def test_out_bumps_the_version_counter() -> None:
    a, b = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(4, 3, dtype=torch.bfloat16)
    out = torch.zeros(2, 3, dtype=torch.bfloat16)
    before = out._version
    cugemm.matmul(a, b, out=out)
    assert out._version > before
    with torch.inference_mode():
        fresh = torch.zeros(2, 3, dtype=torch.bfloat16)
        assert cugemm.matmul(a, b, out=fresh) is fresh


# --- segments ---------------------------------------------------------------------------------------------------------------------


def segments_case(m: int, experts: int, expert: list[int], element: str = "bf16") -> Case:
    case = exact_case(25, m, 10, 24, element, element, experts=experts)
    return oracles.given_case(case.a, case.b, element, element, expert=np.asarray(expert))


def check_wrong_values(framework: Framework, words: str, case: Case, *arguments: Any, **how: Any) -> None:
    """Indices that select nothing: an error that counts them, but for JAX, whose values are not there to be checked: zero rows."""
    before = launch.launches
    if "j" in framework.name:
        check_exact(case, framework.call(SegmentGEMMWrapper().run, case.a, case.b, *arguments, **how), BF16)
        return
    with pytest.raises(ValueError, match=words):
        framework.call(SegmentGEMMWrapper().run, case.a, case.b, *arguments, **how)
    assert launch.launches == before


@each
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("column_major_weights", [False, True])
def test_expert_indices(framework: Framework, dtype: Any, column_major_weights: bool) -> None:
    """Any order, repeats, unused experts."""
    expert = [2, 0, 2, 0, 1, 2, 0, 2, 1, 2]
    case = segments_case(10, 4, expert)
    weights = np.ascontiguousarray(case.b.swapaxes(1, 2)) if column_major_weights else case.b
    run = SegmentGEMMWrapper(num_experts=4, hidden_size=24, intermediate_size=10).forward
    check_exact(case, framework.call(run, case.a, weights, np.asarray(expert, dtype), weight_column_major=column_major_weights), BF16)
    expert[3:6] = [-2, 4, 2**31 - 1]
    wrong = segments_case(10, 4, expert)
    check_wrong_values(framework, r"expert_indices has 3 values outside \[-1, 4\)", wrong, np.asarray(expert, dtype))


SEGMENTS = {
    "plain": ([0, 3, 3, 7, 10], [0] * 3 + [2] * 4 + [3] * 3, ""),
    "gap at the start and end": ([2, 3, 5, 5, 8], [-1] * 2 + [0] + [1] * 2 + [3] * 3 + [-1] * 2, ""),
    "all the same": ([4, 4, 4, 4, 4], [-1] * 10, ""),
    "past m": ([0, 4, 11, 11, 11], [0] * 4 + [-1] * 6, "3 values outside"),
    "negative": ([-2, 3, 5, 6, 10], [-1] * 3 + [1] * 2 + [2] + [3] * 4, "1 value outside"),
    "goes back": ([0, 6, 2, 8, 10], [0] * 6 + [-1] * 2 + [3] * 2, "1 value below"),
    "goes back and stays below": ([0, 6, 2, 4, 5], [0] * 6 + [-1] * 4, "1 value below"),
    "goes back and catches up": ([0, 6, 2, 6, 9], [0] * 6 + [3] * 3 + [-1], "1 value below"),
    "one segment past m hides its successors": ([0, 20, 3, 6, 10], [-1] * 10, "1 value outside"),
}
"""indptr over ten rows -> the expert of each row where values are not checked (a GPU, JAX), and the complaint where they are. A segment
that begins before an earlier entry of indptr selects no rows."""


@each
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("name", list(SEGMENTS))
def test_indptr(framework: Framework, name: str, dtype: Any) -> None:
    indptr, expert, complaint = SEGMENTS[name]
    case = segments_case(10, 4, expert)
    given = {"seg_indptr": np.asarray(indptr, dtype)}
    if complaint:
        check_wrong_values(framework, f"seg_indptr has {complaint}", case, 4, **given)
    else:
        check_exact(case, framework.call(SegmentGEMMWrapper(np.zeros(8, np.uint8)).run, case.a, case.b, 4, **given), BF16)


@pytest.mark.parametrize("name", list(SEGMENTS))
def test_what_an_indptr_selects(name: str) -> None:
    """The definition, which the reference follows and kernels are tested against."""
    indptr, expert, _ = SEGMENTS[name]
    highest = np.maximum.accumulate(indptr)
    rows = [-1] * 10
    for s, (start, end) in enumerate(itertools.pairwise(indptr)):
        if start == highest[s] and 0 <= start <= end <= 10:
            rows[start:end] = [s] * (end - start)
    assert rows == expert, "the table above says what the rule says"
    assert reference.experts_from_segments(10, indptr=np.asarray(indptr), experts=4).tolist() == expert


@each
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_lens(framework: Framework, dtype: Any) -> None:
    """Lengths sum up to starts."""
    for lens, expert, complaint in (
        ([3, 0, 4, 3], [0] * 3 + [2] * 4 + [3] * 3, ""),
        ([3, 0, 4, 1], [0] * 3 + [2] * 4 + [3] + [-1] * 2, ""),
        ([0, 0, 0, 0], [-1] * 10, ""),
        ([3, -5, 4, 1], [0] * 3 + [2] * 4 + [3] + [-1] * 2, "1 value negative"),
        ([3, 9, 1, 1], [0] * 3 + [-1] * 7, "3 values past"),
        ([2**31 - 1, 2**31 - 1, 2**31 - 1, 5], [-1] * 10, "4 values past"),
    ):
        case = segments_case(10, 4, expert)
        given = {"seg_lens": np.asarray(lens, dtype)}
        if complaint:
            check_wrong_values(framework, f"seg_lens has {complaint}", case, **given)
        else:
            check_exact(case, framework.call(SegmentGEMMWrapper().run, case.a, case.b, **given), BF16)
        assert reference.experts_from_segments(10, lens=np.asarray(lens, dtype), experts=4).tolist() == expert


@each
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_weight_indices(framework: Framework, dtype: Any) -> None:
    """More segments than matrices, and repeats; matrices that do not exist are refused."""
    chosen = np.asarray([1, 0, 1, 0, 0], dtype)
    case = segments_case(10, 2, [1] * 2 + [0] * 2 + [1] * 2 + [0] * 4)
    run = SegmentGEMMWrapper().run
    for how in ({"seg_lens": [2] * 5}, {"seg_indptr": [0, 2, 4, 6, 8, 10]}):
        given = {key: np.asarray(value, dtype) for key, value in how.items()}
        check_exact(case, framework.call(run, case.a, case.b, 5, weight_indices=chosen, **given), BF16)
        bad = np.asarray([1, 0, 1, 7, -2], dtype)
        wrong = segments_case(10, 2, [1] * 2 + [0] * 2 + [1] * 2 + [-1] * 4)
        check_wrong_values(framework, r"weight_indices has 2 values outside \[-1, 2\)", wrong, 5, weight_indices=bad, **given)


@pytest.mark.parametrize("element", ["fp16", "e4m3", "e5m2"])
def test_segment_dtypes_and_out(element: str) -> None:
    case = segments_case(10, 4, [3, 2, 1, 0, 0, 1, 2, 3, 3, 0], element)
    indices = np.asarray(case.expert, np.int64)
    dtype = FP16 if element == "fp16" else BF16
    check_exact(case, SegmentGEMMWrapper().run(case.a, case.b, indices), dtype)
    for out in (oracles.poison((10, 10), F32), column_major(oracles.poison((10, 10), F32)), embed(oracles.poison((10, 10), F32))):
        assert SegmentGEMMWrapper().forward(case.a, case.b, indices, out=out) is out
        check_exact(case, out, F32)
        before = out.tobytes()
        check_wrong_values(NUMPY, "1 value outside", case, np.where(np.arange(10) == 4, 9, indices), out=out)
        assert out.tobytes() == before


@each
def test_segments_of_nothing(framework: Framework) -> None:
    run = SegmentGEMMWrapper().run
    a, b = np.zeros((0, 24), ml_dtypes.bfloat16), np.zeros((4, 24, 10), ml_dtypes.bfloat16)
    assert framework.call(run, a, b, np.zeros(0, np.int32)).shape == (0, 10)
    assert framework.call(run, a, b[:0], np.zeros(0, np.int32)).shape == (0, 10)
    a = np.ones((3, 24), ml_dtypes.bfloat16)
    for how in ({"seg_lens": np.zeros(0, np.int32)}, {"seg_indptr": np.zeros(1, np.int32)}):
        assert not framework.call(run, a, b, **how).astype(float).any()
        assert not framework.call(run, a, b[:0], **how).astype(float).any()
    assert not framework.call(run, a[:, :0], b[:, :0], np.zeros(3, np.int32)).astype(float).any()


@pytest.mark.parametrize("count", [4, np.int32(4), np.int64(4)], ids=repr)
def test_batch_size_may_be_any_integer(count: Any) -> None:
    """A NumPy integer has a shape, but is no array of expert indices."""
    case = segments_case(10, 4, SEGMENTS["plain"][1])
    check_exact(case, SegmentGEMMWrapper().run(case.a, case.b, count, seg_indptr=np.asarray(SEGMENTS["plain"][0], np.int32)), BF16)


# --- the contract of a call -------------------------------------------------------------------------------------------------------


def test_result_dtype_rules() -> None:
    ones = {name: np.ones((2, 2), oracles.dtype_of(name)) for name in (BF16, FP16, E4M3, E5M2)}
    for name, wanted in ((BF16, BF16), (FP16, FP16), (E4M3, BF16), (E5M2, BF16)):
        assert cugemm.matmul(ones[name], ones[FP16]).dtype.name == wanted
        assert str(cugemm.matmul(to_torch(ones[name]), to_torch(ones[E4M3])).dtype) == f"torch.{wanted}"
        assert cugemm.matmul(jnp.asarray(ones[name]), jnp.asarray(ones[E4M3])).dtype.name == wanted
        assert cugemm.linear(ones[name], ones[FP16], activations=None).dtype.name == wanted
        assert cugemm.matmul(ones[name], ones[FP16], out=np.empty((2, 2), np.float32)).dtype == np.float32
    for name in (BF16, FP16):
        assert cugemm.linear(ones[name], ones[FP16], activations="fp8_row").dtype.name == name
        assert str(cugemm.linear(to_torch(ones[name]), to_torch(ones[FP16]), activations="fp8_row").dtype) == f"torch.{name}"
    for asked in ("float16", np.float16, np.dtype("float16"), jnp.float16, torch.float16, "torch.float16"):
        assert cugemm.matmul(ones[BF16], ones[BF16], out_dtype=asked).dtype == np.float16
        assert cugemm.matmul(to_torch(ones[BF16]), to_torch(ones[BF16]), out_dtype=asked).dtype is torch.float16
        assert cugemm.matmul(ones[BF16], ones[BF16], out_dtype=asked, out=np.empty((2, 2), np.float16)).dtype == np.float16
    for asked in ("bfloat16", ml_dtypes.bfloat16, jnp.bfloat16, torch.bfloat16):
        assert cugemm.matmul(ones[FP16], ones[FP16], out_dtype=asked).dtype == ml_dtypes.bfloat16


def test_quantize_gives_the_framework_its_fp8_dtype() -> None:
    x = np.ones((2, 4), np.float32)
    assert cugemm.quantize(x).data.dtype == ml_dtypes.float8_e4m3fn
    assert cugemm.quantize(to_torch(x), "fp8_e5m2_row").data.dtype is torch.float8_e5m2
    assert cugemm.quantize(jnp.asarray(x)).data.dtype == jnp.float8_e4m3fn
    assert isinstance(cugemm.quantize(jnp.asarray(x)).scale, jax.Array)
    assert cugemm.dequantize(cugemm.quantize(x)).dtype == ml_dtypes.bfloat16
    q = cugemm.quantize(x)
    raw = Quantized(q.data.view(np.uint8), q.scale, q.format)
    assert np.array_equal(cugemm.dequantize(raw, F32), x)
    assert np.array_equal(cugemm.linear(x.astype(np.float16), raw), np.full((2, 2), 4, np.float16))


def test_operands_are_not_written() -> None:
    case = random_case(26, 6, 9, 40, "bf16", "bf16", bias=True)
    a, w, bias = case.a.copy(), np.ascontiguousarray(case.b.T), case.bias
    assert bias is not None
    for x in (a, w, bias):
        x.flags.writeable = False
    check_random(case, cugemm.linear(a, w, bias), BF16)
    assert a.tobytes() == case.a.tobytes()
    assert w.T.tobytes() == case.b.tobytes()


def test_special_values_pass_through() -> None:
    a = np.ones((3, 4), np.float32).astype(ml_dtypes.bfloat16)
    a[0, 0], a[1, 1] = np.nan, np.inf
    y = cugemm.matmul(a, np.ones((4, 2), ml_dtypes.bfloat16)).astype(float)
    assert np.isnan(y[0]).all()
    assert np.isinf(y[1]).all()
    assert (y[2] == 4).all()
    assert np.isnan(
        cugemm.mm_fp8(
            np.ones((2, 2), ml_dtypes.float8_e4m3fn), np.ones((2, 2), ml_dtypes.float8_e4m3fn), a_scale=np.full(1, np.nan, np.float32)
        ).astype(float)
    ).all()


def test_autograd_is_refused_in_backward_only() -> None:
    x = torch.ones(2, 8, dtype=torch.bfloat16, requires_grad=True)
    w = torch.nn.Parameter(torch.ones(3, 8, dtype=torch.bfloat16))
    e = torch.zeros(2, dtype=torch.int32)
    calls: dict[str, Callable[[], Any]] = {
        "linear": lambda: cugemm.linear(x, w),
        "matmul": lambda: cugemm.matmul(x, w.T),
        "mm_bf16": lambda: cugemm.mm_bf16(x, w.T),
        "tgv_gemm": lambda: cugemm.tgv_gemm(x, w.T),
        "mm_fp4": lambda: cugemm.mm_fp4(x, torch.full((8, 3), 2, dtype=torch.uint8), 1.0),
        "SegmentGEMMWrapper": lambda: SegmentGEMMWrapper().run(x, w.T[None], e),
        "dequantize": lambda: cugemm.dequantize(
            Quantized(torch.ones(2, 8).to(torch.float8_e4m3fn), torch.ones(2, 1, requires_grad=True), "fp8_row")
        ),
    }
    for name, call in calls.items():
        y = call()
        assert y.requires_grad, name
        assert y.detach().float().isfinite().all()
        with pytest.raises(RuntimeError, match=rf"{name}.* has no backward"):
            y.float().sum().backward()
        with torch.no_grad():
            assert not call().requires_grad
        with torch.inference_mode():
            assert not call().requires_grad
    y = cugemm.linear(torch.ones(1, 2, 8, dtype=torch.bfloat16), w)
    assert y.shape == (1, 2, 3)
    with pytest.raises(RuntimeError, match="linear has no backward"):
        y.float().sum().backward()
    assert x.grad is None
    plain = cugemm.linear(x.detach(), w.detach())
    assert not plain.requires_grad
    with torch.no_grad():
        out = torch.zeros(2, 3, dtype=torch.bfloat16)
        assert cugemm.linear(x, w, out=out) is out
        assert (out == 8).all()


@pytest.mark.parametrize("kind", ["meta", "fake", "spec"])
def test_abstract_arrays_launch_nothing(kind: str) -> None:
    def make(*shape: int, dtype: str = BF16) -> Any:
        if kind == "spec":
            return Spec(shape, dtype, device=-1)
        if kind == "meta":
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        with FakeTensorMode():
            return torch.empty(shape, dtype=getattr(torch, dtype))

    before = launch.launches
    f8 = {"dtype": E4M3}
    q = Quantized(make(16, 64, **f8), make(16, 1, dtype=F32), "fp8_row")
    results = {
        "linear": (cugemm.linear(make(4, 64), make(16, 64), make(16)), (4, 16), BF16),
        "linear(Quantized)": (cugemm.linear(make(4, 64, dtype=FP16), q), (4, 16), FP16),
        "matmul": (cugemm.matmul(make(3, 4, 64), make(64, 16)), (3, 4, 16), BF16),
        "mm_fp8": (cugemm.mm_fp8(make(4, 64, **f8), make(64, 16, **f8), out_dtype=F32), (4, 16), F32),
        "bmm_fp8": (cugemm.bmm_fp8(make(4, 64, dtype=FP16), make(64, 16, dtype=FP16), make(16, dtype=FP16)), (4, 16), FP16),
        "mm_fp4": (cugemm.mm_fp4(make(4, 64), make(64, 16, dtype="uint8"), make(16, dtype=F32)), (4, 16), BF16),
        "sm90": (cugemm.fp8_blockscale_gemm_sm90(make(4, 256), make(16, 256)), (4, 16), BF16),
        "segments": (SegmentGEMMWrapper().run(make(4, 64), make(2, 64, 16), make(4, dtype="int32")), (4, 16), BF16),
        "dequantize": (cugemm.dequantize(q), (16, 64), BF16),
        "quantize": (cugemm.quantize(make(4, 64)).data, (4, 64), E4M3),
    }
    if kind != "spec":
        results["linear 3-D"] = (cugemm.linear(make(2, 3, 64), make(16, 64)), (2, 3, 16), BF16)
        results["linear fp8"] = (cugemm.linear(make(2, 3, 64), q, activations="fp8_row"), (2, 3, 16), BF16)
    for name, (result, shape, dtype) in results.items():
        assert (tuple(result.shape), str(result.dtype).removeprefix("torch.")) == (shape, dtype), name
        assert type(result) is type(make(1)), name
        assert kind == "spec" or result.device == make(1).device, name
    assert launch.launches == before


def test_jax_shapes_only() -> None:
    before = launch.launches
    s = jax.ShapeDtypeStruct
    assert jax.eval_shape(cugemm.matmul, s((4, 64), jnp.bfloat16), s((64, 16), jnp.bfloat16)).shape == (4, 16)
    assert launch.launches == before


def test_plan_explain_warmup() -> None:
    def s(*shape: int, dtype: str = BF16) -> Spec:
        return Spec(shape, dtype, device=-1)

    before = launch.launches
    text = cugemm.explain(
        cugemm.mm_fp8, s(4, 256, dtype=E4M3), s(256, 16, dtype=E4M3), a_scale=s(4, 2, dtype=F32), b_scale=s(1, 16, dtype=F32)
    )
    assert all(
        part in text
        for part in (
            "cugemm.mm_fp8",
            "m = 4, n = 16, k = 256",
            "a_scale: float32, one for each 1 x 128",
            "b_scale: float32, one for each 1 x all",
            "NumPy reference",
        )
    )
    assert "grouped by indptr" in cugemm.explain(SegmentGEMMWrapper().run, s(4, 64), s(2, 64, 16), seg_indptr=s(3, dtype="int32"))
    text = cugemm.explain(cugemm.linear, s(4, 64), s(16, 64), activations="fp8_row")
    assert text.index("cugemm.quantize") < text.index("cugemm.linear")
    assert "cugemm.dequantize" in cugemm.explain(cugemm.dequantize, Quantized(s(16, 64, dtype=E4M3), s(16, 1, dtype=F32), "fp8_row"))
    assert "n = 16" in cugemm.explain(cugemm.matmul, s(4, 64), Quantized(s(16, 64, dtype=E4M3), s(16, 1, dtype=F32), "fp8_row").T)
    cugemm.warmup(cugemm.matmul, s(4, 64), s(64, 16), m=[1, 2, 300])
    cugemm.warmup(cugemm.matmul, s(4, 64), s(64, 16), m=7)
    p = cugemm.plan(cugemm.matmul, s(4, 64), s(64, 16))
    assert p.kernels == ["reference"]
    assert "matmul" in repr(p)
    assert launch.launches == before
    case = random_case(27, 4, 16, 64, "bf16", "bf16")
    check_random(case, p(case.a, case.b), BF16)
    fixed = cugemm.plan(cugemm.matmul, case.a, case.b, out_dtype=F32)
    check_random(case, fixed(case.a, case.b), F32)
    assert launch.launches == before + 2
    quantised = cugemm.quantize(np.ascontiguousarray(case.b.T))
    p = cugemm.plan(cugemm.linear, case.a, quantised)
    assert p(case.a, quantised).shape == (4, 16)


def test_spec() -> None:
    x = Spec((4, 64), torch.bfloat16)
    assert (x.shape, x.dtype, x.strides, x.ndim, x.T.shape, x.T.strides, repr(x)) == (
        (4, 64),
        BF16,
        (64, 1),
        2,
        (64, 4),
        (1, 64),
        "Spec((4, 64), 'bfloat16')",
    )


def test_every_public_name_shows_an_example_and_its_source() -> None:
    for name in cugemm.__all__:
        member = getattr(cugemm, name)
        if name in ("gemm", "Plan", "Spec") or (inspect.isclass(member) and issubclass(member, Exception)):
            assert member.__doc__
            continue
        text = inspect.getdoc(member) or ""
        assert ">>> " in text, name
        assert "cugemm." in text, name
    products = {cugemm.linear, cugemm.matmul, *(getattr(cugemm, name) for name in cugemm.gemm.__all__)}
    for member in products:
        text = inspect.getdoc(member) or ""
        first = text.splitlines()[0]
        assert "=" in first or "`" in first, f"{member.__name__}: the first line is the formula"


def test_gemm_holds_the_same_objects() -> None:
    assert sorted(cugemm.__all__) == cugemm.__all__
    assert len(set(cugemm.__all__)) == len(cugemm.__all__)
    for name in cugemm.gemm.__all__:
        assert getattr(cugemm.gemm, name) is getattr(cugemm, name)
        assert name in cugemm.__all__


def test_every_operation_is_found_by_its_name() -> None:
    assert all(op.name == name for name, op in problem.OPS.items())
    for name in (
        "linear",
        "matmul",
        "mm_bf16",
        "bmm_bf16",
        "mm_fp8",
        "bmm_fp8",
        "mm_fp4",
        "tgv_gemm",
        "tgv_gemm_sm100",
        "quantize",
        "dequantize",
    ):
        assert name in problem.OPS


def test_flashinfer_positions() -> None:
    """FlashInfer's positional order, exactly; what is ours is keyword-only."""
    orders = {
        "mm_bf16": "a b bias pdl out out_dtype backend",
        "bmm_bf16": "A B out out_dtype backend",
        "mm_fp8": "a b alpha out_dtype out backend",
        "bmm_fp8": "A B A_scale B_scale dtype out backend",
        "mm_fp4": "a b a_descale b_descale alpha out_dtype out block_size use_8x4_sf_layout backend use_nvfp4 enable_pdl",
        "gemm_fp8_nt_groupwise": "a b a_scale b_scale scale_major_mode mma_sm scale_granularity_mnk out out_dtype backend",
        "gemm_fp8_nt_blockscaled": "a b a_scale b_scale scale_major_mode mma_sm out out_dtype",
        "fp8_blockscale_gemm_sm90": "input weight input_scale weight_scale out out_dtype",
        "tgv_gemm_sm100": "a b bias pdl out",
    }
    for name, order in orders.items():
        parameters = inspect.signature(getattr(cugemm, name)).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == order.split(), name
    run = inspect.signature(SegmentGEMMWrapper.run).parameters.values()
    wanted = "x weights batch_size weight_column_major out seg_lens seg_indptr weight_indices"
    assert " ".join(p.name for p in run if p.kind is p.POSITIONAL_OR_KEYWORD) == f"self {wanted}"


# --- what only very large or very odd operands reach --------------------------------------------------------------------------------


def planned(a: Any, b: Any) -> Any:
    with launch.recording() as calls:
        cugemm.matmul(a, b)
    return calls[0].call.problem


def test_axes_and_lines_that_outgrow_32_bits() -> None:
    long = 2**30
    for a, b in ((Spec((1, long), BF16), Spec((long, 1), BF16)), (Spec((2, 8), BF16), Spec((8, long), BF16))):
        with pytest.raises(ValueError, match=r"matmul: an axis of 1073741824 is too long; .* below 2\*\*30"):
            planned(a, b)
    b = Spec((64, 16), BF16)
    assert planned(Spec((4, 64), BF16, strides=(2**28 - 8, 1)), b).vector
    assert not planned(Spec((4, 64), BF16, strides=(2**28, 1)), b).vector, "lines of 2**29 bytes go value by value"


def test_grouped_rows_far_from_the_start_go_value_by_value() -> None:
    wrapper, weights = SegmentGEMMWrapper(None), Spec((2, 16, 8192), BF16)
    for rows, vector in ((2**22 - 1, True), (2**22 + 1, False)):
        with launch.recording() as calls:
            wrapper.run(Spec((rows, 8192), BF16), weights, Spec((rows,), "int32"), True)
        assert calls[0].call.problem.vector is vector


def test_a_format_with_other_blocks_along_k_is_refused() -> None:
    mine = problem.ELEMENTS["e4m3"]
    for width in (48, 256):
        fmt = type(cugemm.quantize(np.ones((2, 4), np.float32)).format)("mine", mine, (1, width))
        q = Quantized(np.zeros((64, 512), ml_dtypes.float8_e4m3fn), np.ones((64, -(-512 // width)), np.float32), fmt)
        with pytest.raises(
            ValueError, match=rf"linear: w is of a format with one scale for each 1 x {width} values; along k it must be 32, 64, 128 or all"
        ):
            cugemm.linear(np.zeros((16, 512), ml_dtypes.bfloat16), q)


def test_jax_float4_packed_along_n_is_refused() -> None:
    if not hasattr(jnp, "float4_e2m1fn"):
        pytest.skip("this JAX has no float4")
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.zeros((8, 6), jnp.float4_e2m1fn)
    with pytest.raises(TypeError, match=r"matmul: b is float4_e2m1fn .* packs along n; pass it as \[n, k\]"):
        cugemm.matmul(x, w)
    assert cugemm.linear(x, jnp.zeros((6, 8), jnp.float4_e2m1fn)).shape == (4, 6)


def test_quantize_refuses_axes_past_2_to_the_31() -> None:
    with launch.recording(), pytest.raises(ValueError, match=r"quantize: x has shape \(2147483648, 1\); its axes must be below"):
        cugemm.quantize(Spec((2**31, 1), "float16"))
