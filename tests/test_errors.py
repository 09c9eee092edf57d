"""Wrong calls: each is refused with the function, the argument, what it is, and what to do; nothing runs and `out` keeps its bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from test_dlpack import Producer

import cugemm
from cugemm import Quantized, Spec, launch

jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
jnp = jax.numpy
FakeTensorMode = pytest.importorskip("torch._subclasses.fake_tensor").FakeTensorMode

BF16, FP16, F32, E4M3, E5M2 = "bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"


def numpy(*shape: int, dtype: str = BF16) -> Any:
    """Zero bits of any dtype."""
    return np.zeros(shape, getattr(ml_dtypes, dtype, dtype))


def tensor(*shape: int, dtype: str = BF16, device: str = "cpu") -> Any:
    return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)


def jax_array(*shape: int, dtype: str = BF16) -> Any:
    return jnp.zeros(shape, dtype)


def poisoned(*shape: int, dtype: str = BF16) -> Any:
    """All bits set: NaN in every float."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return np.full(int(np.prod(shape)) * kind.itemsize, 0xFF, np.uint8).view(kind).reshape(shape)


def poisoned_tensor(*shape: int, dtype: str = BF16) -> Any:
    return torch.full(shape, float("nan"), dtype=getattr(torch, dtype))


def fake(*shape: int, dtype: str = BF16) -> Any:
    with FakeTensorMode():
        return torch.zeros(shape, dtype=getattr(torch, dtype))


class Hidden:
    """An array that shows DLPack and nothing else of its framework."""

    def __init__(self, array: Any, device: tuple[int, int] | None = None) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **how: Any) -> object:
        return self.array.__dlpack__(**how)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device or self.array.__dlpack_device__()


class Case(NamedTuple):
    name: str
    error: type[Exception]
    words: tuple[str, ...]  # all of them, in this order
    make: Callable[[], tuple[Any, ...]]  # (function, *arguments[, keywords])


def quantized(fmt: str = "fp8_row", *shape: int, dtype: str = E4M3, scale: tuple[int, ...] = (16, 1)) -> Any:
    return Quantized(numpy(*(shape or (16, 64)), dtype=dtype), numpy(*scale, dtype=F32), fmt)


def wrapper(**how: Any) -> Any:
    return cugemm.SegmentGEMMWrapper(**how)


A, W, B = (4, 64), (16, 64), (64, 16)  # a [m, k]; weights as [n, k] and [k, n]
linear, matmul, mm_bf16, bmm_bf16, mm_fp8, bmm_fp8 = (
    getattr(cugemm, name) for name in ("linear", "matmul", "mm_bf16", "bmm_bf16", "mm_fp8", "bmm_fp8")
)
groupwise, blockscaled, sm90 = cugemm.gemm_fp8_nt_groupwise, cugemm.gemm_fp8_nt_blockscaled, cugemm.fp8_blockscale_gemm_sm90
tgv, tgv_sm100, mm_fp4, quantize, dequantize = cugemm.tgv_gemm, cugemm.tgv_gemm_sm100, cugemm.mm_fp4, cugemm.quantize, cugemm.dequantize
Segments = cugemm.SegmentGEMMWrapper
f8, f32 = {"dtype": E4M3}, {"dtype": F32}
V, T = ValueError, TypeError


def run(*args: Any, **how: Any) -> tuple[Any, ...]:
    return Segments().run, *args, how


def g(m: int = 4, n: int = 16, k: int = 256) -> tuple[Any, ...]:
    """Operands and "K" scales of the groupwise entries."""
    return numpy(m, k, **f8), numpy(n, k, **f8), numpy(m, -(-k // 128), **f32), numpy(-(-n // 128), -(-k // 128), **f32)


def readonly(x: Any) -> Any:
    x.flags.writeable = False
    return x


def broadcast(x: Any, *shape: int) -> Any:
    """A writable array with stride 0."""
    return np.lib.stride_tricks.as_strided(x, shape, (0, *x.strides[1:]), writeable=True)


def overlapping(rows: int, columns: int, pitch: int) -> Any:
    x = poisoned(rows * pitch + columns)
    return np.lib.stride_tricks.as_strided(x, (rows, columns), (2 * pitch, 2), writeable=True)


def square(fn: Any, which: str) -> tuple[Any, ...]:
    a, b = poisoned(16, 16), poisoned(16, 32)
    return fn, a, b[:, :16], {"out": a if which == "out_is_a" else b[:, 8:24]}


def aliased_bias() -> tuple[Any, ...]:
    out = poisoned(4, 16)
    return linear, numpy(*A), numpy(*W), out[2], {"out": out}


def aliased_indices() -> tuple[Any, ...]:
    out = poisoned(4, 16, dtype=F32)
    return Segments().run, numpy(*A), numpy(2, *B), out[0, :4].view(np.int32), {"out": out}


def per_tensor() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(A), 0.1, 0, torch.qint8)


AGREE = "they must agree"
CASES = [
    # k
    Case(
        "linear-k",
        V,
        ("linear: ", "x (4, 64) has k = 64", "w (16, 32)", "[n, k]", "k = 32", AGREE),
        lambda: (linear, numpy(*A), numpy(16, 32)),
    ),
    Case("linear-k-transposed", V, ("linear: ", "w (64, 16)", "pass w.T"), lambda: (linear, numpy(*A), numpy(*B))),
    Case(
        "matmul-k",
        V,
        ("matmul: ", "a (4, 64) has k = 64", "b (16, 64)", "[k, n]", "k = 16", "pass b.T"),
        lambda: (matmul, numpy(*A), numpy(*W)),
    ),
    Case("mm_bf16-k", V, ("mm_bf16: ", "a (4, 64)", "b (16, 64)", "pass b.T"), lambda: (mm_bf16, numpy(*A), numpy(*W))),
    Case("bmm_bf16-k", V, ("bmm_bf16: ", "A (2, 4, 64)", "B (2, 32, 16)", AGREE), lambda: (bmm_bf16, numpy(2, *A), numpy(2, 32, 16))),
    Case("mm_fp8-k", V, ("mm_fp8: ", "a (4, 64)", "b (63, 16)", AGREE), lambda: (mm_fp8, numpy(*A, **f8), numpy(63, 16, **f8))),
    Case(
        "bmm_fp8-k", V, ("bmm_fp8: ", "A (4, 64)", "B (32, 16)", AGREE), lambda: (bmm_fp8, numpy(*A, **f8), numpy(32, 16, **f8), 1.0, 1.0)
    ),
    Case(
        "groupwise-k",
        V,
        ("gemm_fp8_nt_groupwise: ", "a (4, 256)", "b (16, 128)", AGREE),
        lambda: (groupwise, g()[0], numpy(16, 128, **f8), *g()[2:], "K"),
    ),
    Case(
        "blockscaled-k",
        V,
        ("gemm_fp8_nt_blockscaled: ", "a (4, 256)", "b (16, 128)"),
        lambda: (blockscaled, g()[0], numpy(16, 128, **f8), *g()[2:]),
    ),
    Case(
        "sm90-k", V, ("fp8_blockscale_gemm_sm90: ", "input (4, 64)", "weight (16, 128)", AGREE), lambda: (sm90, numpy(*A), numpy(16, 128))
    ),
    Case("tgv-k", V, ("tgv_gemm: ", "a (4, 64)", "b (16, 64)", "pass b.T"), lambda: (tgv, numpy(*A), numpy(*W))),
    Case("tgv_sm100-k", V, ("tgv_gemm_sm100: ", "a (4, 64)", "b (16, 64)", "pass b.T"), lambda: (tgv_sm100, numpy(*A), numpy(*W))),
    Case(
        "mm_fp4-k",
        V,
        ("mm_fp4: ", "a (4, 64)", "b (16, 16)", "k = 16", AGREE),
        lambda: (mm_fp4, numpy(*A), numpy(16, 16, dtype="uint8"), 1.0),
    ),
    Case(
        "mm_fp4-quantized-k",
        V,
        ("mm_fp4: ", "k = 64", "k = 128", "b is packed"),
        lambda: (mm_fp4, numpy(*A), quantized("fp4_row", 16, 64, dtype="uint8").T),
    ),
    Case(
        "segments-k",
        V,
        ("SegmentGEMMWrapper", "x (4, 64)", "weights (2, 32, 16)", AGREE),
        lambda: run(numpy(*A), numpy(2, 32, 16), numpy(4, dtype="int32")),
    ),
    # rank
    Case("linear-w-rank", V, ("linear: ", "w has shape (2, 16, 64)", "2-D"), lambda: (linear, numpy(*A), numpy(2, *W))),
    Case("linear-x-0d", V, ("linear: ", "x has shape ()", "wanted [.., k]"), lambda: (linear, numpy(), numpy(*W))),
    Case("matmul-rank", V, ("matmul: ", "a has shape (64,)", "2-D or 3-D"), lambda: (matmul, numpy(64), numpy(*B))),
    Case("matmul-rank-4", V, ("matmul: ", "b has shape (1, 1, 64, 16)", "2-D or 3-D"), lambda: (matmul, numpy(*A), numpy(1, 1, *B))),
    Case("mm_bf16-rank", V, ("mm_bf16: ", "a has shape (1, 4, 64)", "2-D"), lambda: (mm_bf16, numpy(1, *A), numpy(*B))),
    Case("mm_fp4-rank", V, ("mm_fp4: ", "b has shape (64,)", "2-D"), lambda: (mm_fp4, numpy(*A), numpy(64, dtype="uint8"), 1.0)),
    Case(
        "segments-weights-rank",
        V,
        ("SegmentGEMMWrapper", "weights has shape (64, 16)", "3-D"),
        lambda: run(numpy(*A), numpy(*B), numpy(4, dtype="int32")),
    ),
    Case(
        "bmm-batch",
        V,
        ("bmm_bf16: ", "A (2, 4, 64) has 2 batches", "B (3, 64, 16) has 3", "be 1"),
        lambda: (bmm_bf16, numpy(2, *A), numpy(3, *B)),
    ),
    # dtypes of operands
    Case("linear-float32", T, ("linear: ", "x is float32", "wanted bfloat16", "cast it"), lambda: (linear, numpy(*A, **f32), numpy(*W))),
    Case(
        "mm_bf16-half", T, ("mm_bf16: ", "b is float16", "wanted bfloat16", "cast it"), lambda: (mm_bf16, numpy(*A), numpy(*B, dtype=FP16))
    ),
    Case("matmul-int", T, ("matmul: ", "a is int32", "wanted", "cast it"), lambda: (matmul, numpy(*A, dtype="int32"), numpy(*B))),
    Case("matmul-bool", T, ("matmul: ", "a is bool", "wanted", "cast it"), lambda: (matmul, numpy(*A, dtype="bool"), numpy(*B))),
    Case(
        "mm_fp8-half",
        T,
        ("mm_fp8: ", "a is float16", "wanted float8_e4m3fn, float8_e5m2", "cugemm.quantize"),
        lambda: (mm_fp8, numpy(*A, dtype=FP16), numpy(*B, **f8)),
    ),
    Case(
        "mm_fp8-uint8",
        T,
        ("mm_fp8: ", "a is uint8", "e4m3 or e5m2?", "a.view(", "Quantized"),
        lambda: (mm_fp8, numpy(*A, dtype="uint8"), numpy(*B, **f8)),
    ),
    Case("linear-uint8", T, ("linear: ", "w is uint8", "w.view(", "Quantized"), lambda: (linear, numpy(*A), numpy(*W, dtype="uint8"))),
    Case(
        "bmm_fp8-uint8",
        T,
        ("bmm_fp8: ", "B is uint8", "B.view(", "Quantized"),
        lambda: (bmm_fp8, numpy(*A, dtype=FP16), numpy(*B, dtype="uint8"), 1.0),
    ),
    Case(
        "mm_fp8-e4m3fnuz",
        T,
        ("mm_fp8: ", "a is float8_e4m3fnuz", "wanted"),
        lambda: (mm_fp8, numpy(*A, dtype="float8_e4m3fnuz"), numpy(*B, **f8)),
    ),
    Case(
        "sm90-e5m2",
        T,
        ("fp8_blockscale_gemm_sm90: ", "input is float8_e5m2", "float8_e4m3fn"),
        lambda: (sm90, numpy(4, 128, dtype=E5M2), numpy(16, 128, **f8), numpy(4, 1, **f32), numpy(16, 1, **f32)),
    ),
    Case(
        "sm90-mixed",
        V,
        ("fp8_blockscale_gemm_sm90: ", "input is float8_e4m3fn", "weight is bfloat16", "quantise the weight"),
        lambda: (sm90, numpy(4, 128, **f8), numpy(16, 128), numpy(4, 1, **f32)),
    ),
    Case(
        "sm90-scale-missing",
        V,
        ("fp8_blockscale_gemm_sm90: ", "input_scale is needed"),
        lambda: (sm90, numpy(4, 128, **f8), numpy(16, 128, **f8)),
    ),
    Case(
        "sm90-scale-extra",
        V,
        ("fp8_blockscale_gemm_sm90: ", "input is bfloat16", "input_scale must be None"),
        lambda: (sm90, numpy(4, 128), numpy(16, 128), numpy(4, 1, **f32)),
    ),
    Case(
        "mm_fp4-fp4-activations",
        T,
        ("mm_fp4: ", "a is uint8", "bfloat16 or float16", "pass a unquantised"),
        lambda: (mm_fp4, numpy(4, 32, dtype="uint8"), numpy(32, 16, dtype="uint8"), 1.0),
    ),
    Case("mm_fp4-int8-weights", T, ("mm_fp4: ", "b is int8", "uint8", "pass"), lambda: (mm_fp4, numpy(*A), numpy(*B, dtype="int8"), 1.0)),
    Case(
        "mm_fp4-two-scales",
        T,
        ("mm_fp4: ", "a is bfloat16", "no a_descale", "mm_fp4(a, b, "),
        lambda: (mm_fp4, numpy(*A), numpy(*B, dtype="uint8"), 1.0, 2.0),
    ),
    # scales
    Case(
        "mm_fp8-scale-shape",
        V,
        ("mm_fp8: ", "a_scale has shape (5,)", "a is (4, 64)", "wanted one element", "(4,)"),
        lambda: (mm_fp8, numpy(*A, **f8), numpy(*B, **f8), {"a_scale": numpy(5, **f32)}),
    ),
    Case(
        "mm_fp8-scale-column",
        V,
        ("mm_fp8: ", "b_scale has shape (16, 1)", "(1, 16)"),
        lambda: (mm_fp8, numpy(*A, **f8), numpy(*B, **f8), {"b_scale": numpy(16, 1, **f32)}),
    ),
    Case(
        "mm_fp8-scale-dtype",
        T,
        ("mm_fp8: ", "a_scale is float64", "wanted float32"),
        lambda: (mm_fp8, numpy(*A, **f8), numpy(*B, **f8), {"a_scale": numpy(4, dtype="float64")}),
    ),
    Case(
        "mm_fp8-scale-e8m0",
        T,
        ("mm_fp8: ", "b_scale is float8_e8m0fnu", "wanted float32"),
        lambda: (mm_fp8, numpy(*A, **f8), numpy(*B, **f8), {"b_scale": numpy(1, dtype="float8_e8m0fnu")}),
    ),
    Case(
        "mm_fp8-scale-rank",
        V,
        ("mm_fp8: ", "a_scale has shape (1, 1, 4, 1)", "wanted"),
        lambda: (mm_fp8, numpy(*A, **f8), numpy(*B, **f8), {"a_scale": numpy(1, 1, 4, 1, **f32)}),
    ),
    Case(
        "bmm_fp8-scale-missing",
        T,
        ("bmm_fp8: ", "B_scale is missing", "pass both"),
        lambda: (bmm_fp8, numpy(2, *A, **f8), numpy(2, *B, **f8), 1.0),
    ),
    Case(
        "bmm_fp8-scale-batch",
        V,
        ("bmm_fp8: ", "B_scale has shape (3, 1, 16)", "wanted"),
        lambda: (bmm_fp8, numpy(2, *A, **f8), numpy(2, *B, **f8), 1.0, numpy(3, 1, 16, **f32)),
    ),
    Case(
        "groupwise-a-scale",
        V,
        ("gemm_fp8_nt_groupwise: ", "a_scale has shape (2, 4)", "a is (4, 256)", "(4, 2)"),
        lambda: (groupwise, *g()[:2], numpy(2, 4, **f32), g()[3], "K"),
    ),
    Case(
        "groupwise-b-scale",
        V,
        ("gemm_fp8_nt_groupwise: ", "b_scale has shape (2, 1)", "(1, 2)", "128 x 128"),
        lambda: (groupwise, *g()[:3], numpy(2, 1, **f32), "K"),
    ),
    Case("groupwise-mn", V, ("gemm_fp8_nt_groupwise: ", "a_scale has shape (4, 2)", "(2, 4)"), lambda: (groupwise, *g(), "MN")),
    Case("groupwise-mode-none", V, ("gemm_fp8_nt_groupwise: ", "scale_major_mode is None", "'K'", "'MN'"), lambda: (groupwise, *g())),
    Case("groupwise-mode", V, ("gemm_fp8_nt_groupwise: ", "scale_major_mode is 'mn'", "'K'", "'MN'"), lambda: (groupwise, *g(), "mn")),
    Case(
        "groupwise-granularity",
        V,
        ("gemm_fp8_nt_groupwise: ", "scale_granularity_mnk is (1, 64, 128)", "128"),
        lambda: (groupwise, *g(), "K", 1, (1, 64, 128)),
    ),
    Case(
        "groupwise-granularity-k",
        V,
        ("gemm_fp8_nt_groupwise: ", "scale_granularity_mnk is (1, 128, 32)", "128"),
        lambda: (groupwise, *g(), "K", 1, (1, 128, 32)),
    ),
    Case(
        "groupwise-granularity-2",
        V,
        ("gemm_fp8_nt_groupwise: ", "scale_granularity_mnk is (1, 128)", "128"),
        lambda: (groupwise, *g(), "K", 1, (1, 128)),
    ),
    Case(
        "groupwise-scale-int",
        T,
        ("gemm_fp8_nt_groupwise: ", "b_scale is int32", "wanted float32"),
        lambda: (groupwise, *g()[:3], numpy(1, 2, dtype="int32"), "K"),
    ),
    Case(
        "groupwise-scale-none",
        T,
        ("gemm_fp8_nt_groupwise: ", "a_scale is missing", "pass"),
        lambda: (groupwise, *g()[:2], None, g()[3], "K"),
    ),
    Case("blockscaled-mode", V, ("gemm_fp8_nt_blockscaled: ", "scale_major_mode is 'X'", "'K'"), lambda: (blockscaled, *g(), "X")),
    Case("blockscaled-scale", V, ("gemm_fp8_nt_blockscaled: ", "a_scale has shape (4, 2)", "(1, 2)"), lambda: (blockscaled, *g(), "K")),
    Case(
        "mm_fp4-scale",
        V,
        ("mm_fp4: ", "b_descale has shape (64,)", "(16,)"),
        lambda: (mm_fp4, numpy(*A), numpy(*B, dtype="uint8"), numpy(64, **f32)),
    ),
    Case(
        "mm_fp4-swizzled",
        V,
        ("mm_fp4: ", "b (64, 16)", "k = 128", "b is packed"),
        lambda: (mm_fp4, numpy(*A), numpy(*B, dtype="uint8"), numpy(4, 16, dtype="uint8")),
    ),
    Case(
        "scale-string",
        T,
        ("mm_fp8: ", "a_scale is a builtins.str", "pass an array"),
        lambda: (mm_fp8, numpy(*A, **f8), numpy(*B, **f8), {"a_scale": "2"}),
    ),
    # alpha and bias
    Case(
        "mm_fp8-alpha",
        V,
        ("mm_fp8: ", "alpha is float32 of shape (2,)", "one element"),
        lambda: (mm_fp8, numpy(*A, **f8), numpy(*B, **f8), numpy(2, **f32)),
    ),
    Case(
        "mm_fp4-alpha-int",
        V,
        ("mm_fp4: ", "alpha is int32 of shape (1,)", "float32"),
        lambda: (mm_fp4, numpy(*A), numpy(*B, dtype="uint8"), 1.0, None, numpy(1, dtype="int32")),
    ),
    Case(
        "linear-bias-shape",
        V,
        ("linear: ", "bias has shape (4,)", "n = 16", "wanted (16,)"),
        lambda: (linear, numpy(*A), numpy(*W), numpy(4)),
    ),
    Case("linear-bias-2d", V, ("linear: ", "bias has shape (1, 16)", "wanted (16,)"), lambda: (linear, numpy(*A), numpy(*W), numpy(1, 16))),
    Case(
        "linear-bias-dtype",
        T,
        ("linear: ", "bias is int32", "wanted float32"),
        lambda: (linear, numpy(*A), numpy(*W), numpy(16, dtype="int32")),
    ),
    Case("tgv-bias-stride", V, ("tgv_gemm: ", "bias has stride 2", "contiguous copy"), lambda: (tgv, numpy(*A), numpy(*B), numpy(32)[::2])),
    Case(
        "mm_bf16-bias-scalar",
        T,
        ("mm_bf16: ", "bias is a float", "pass an array of shape (16,)"),
        lambda: (mm_bf16, numpy(*A), numpy(*B), 1.0),
    ),
    # out
    Case(
        "out-shape",
        V,
        ("mm_bf16: ", "out has shape (16, 4)", "the result has shape (4, 16)", "drop it"),
        lambda: (mm_bf16, numpy(*A), numpy(*B), {"out": poisoned(16, 4)}),
    ),
    Case(
        "out-rank",
        V,
        ("bmm_bf16: ", "out has shape (1, 4, 16)", "(4, 16)"),
        lambda: (bmm_bf16, numpy(*A), numpy(*B), {"out": poisoned(1, 4, 16)}),
    ),
    Case(
        "out-dtype",
        V,
        ("mm_bf16: ", "out is float64", "bfloat16, float16, float32"),
        lambda: (mm_bf16, numpy(*A), numpy(*B), {"out": poisoned(4, 16, dtype="float64")}),
    ),
    Case(
        "out-int",
        V,
        ("matmul: ", "out is int32", "bfloat16, float16, float32"),
        lambda: (matmul, numpy(*A), numpy(*B), {"out": poisoned(4, 16, dtype="int32")}),
    ),
    Case(
        "out-and-out_dtype",
        V,
        ("matmul: ", "out is float32", "out_dtype is bfloat16", "drop one"),
        lambda: (matmul, numpy(*A), numpy(*B), {"out": poisoned(4, 16, dtype=F32), "out_dtype": BF16}),
    ),
    Case(
        "out-readonly",
        V,
        ("matmul: ", "out is read-only", "writable"),
        lambda: (matmul, numpy(*A), numpy(*B), {"out": readonly(poisoned(4, 16))}),
    ),
    Case(
        "out-stride-0",
        V,
        ("matmul: ", "out has strides (0, 1)", "share memory"),
        lambda: (matmul, numpy(*A), numpy(*B), {"out": broadcast(poisoned(1, 16), 4, 16)}),
    ),
    Case(
        "out-strided",
        V,
        ("matmul: ", "out has strides (64, 2)", "contiguous"),
        lambda: (matmul, numpy(*A), numpy(*B), {"out": poisoned(4, 64)[:, :32:2]}),
    ),
    Case(
        "out-overlapping-rows",
        V,
        ("matmul: ", "out has strides (8, 1)", "share memory"),
        lambda: (matmul, numpy(*A), numpy(*B), {"out": overlapping(4, 16, 8)}),
    ),
    Case(
        "out-negative",
        V,
        ("matmul: ", "out", "negative strides (-16, 1)", "pass a copy"),
        lambda: (matmul, numpy(*A), numpy(*B), {"out": poisoned(4, 16)[::-1]}),
    ),
    Case("out-is-a", V, ("matmul: ", "out shares memory with a", "out of its own"), lambda: square(matmul, "out_is_a")),
    Case("out-in-b", V, ("matmul: ", "out shares memory with b", "out of its own"), lambda: square(matmul, "out_in_b")),
    Case("out-in-bias", V, ("linear: ", "out shares memory with bias", "out of its own"), aliased_bias),
    Case(
        "out-torch-for-numpy",
        T,
        ("matmul: ", "out is a PyTorch array", "a is a NumPy array", "convert"),
        lambda: (matmul, numpy(*A), numpy(*B), {"out": poisoned_tensor(4, 16)}),
    ),
    Case(
        "out-list",
        T,
        ("matmul: ", "out is a builtins.list", "np.asarray"),
        lambda: (matmul, numpy(*A), numpy(*B), {"out": [[0.0] * 16] * 4}),
    ),
    Case(
        "out-scalar",
        T,
        ("matmul: ", "out is a float", "pass an array of shape (4, 16)"),
        lambda: (matmul, numpy(*A), numpy(*B), {"out": 0.0}),
    ),
    Case(
        "out-linear-3d",
        V,
        ("linear: ", "out has shape (2, 4, 16)", "(2, 3, 16)"),
        lambda: (linear, numpy(2, 3, 64), numpy(*W), {"out": poisoned(2, 4, 16)}),
    ),
    Case(
        "out-linear-3d-columns",
        V,
        ("linear: ", "out has shape", "17", "16"),
        lambda: (linear, numpy(2, 3, 64), numpy(*W), {"out": poisoned(2, 3, 17)}),
    ),
    Case(
        "out-linear-3d-gaps",
        V,
        ("linear: ", "out has shape (2, 3, 16)", "collapsible"),
        lambda: (linear, numpy(2, 3, 64), numpy(*W), {"out": poisoned(2, 4, 16)[:, :3]}),
    ),
    Case(
        "out-requires-grad",
        V,
        ("matmul: ", "out=", "drop out=", "torch.no_grad()"),
        lambda: (matmul, tensor(*A).requires_grad_(), tensor(*B), {"out": poisoned_tensor(4, 16)}),
    ),
    Case(
        "out-itself-requires-grad",
        V,
        ("matmul: ", "out=", "drop out="),
        lambda: (matmul, tensor(*A), tensor(*B), {"out": poisoned_tensor(4, 16).requires_grad_()}),
    ),
    Case(
        "out-jax",
        T,
        ("matmul: ", "JAX arrays are immutable: drop out="),
        lambda: (matmul, jax_array(*A), jax_array(*B), {"out": jax_array(4, 16)}),
    ),
    Case("out-numpy-for-jax", T, ("matmul: ", "drop out="), lambda: (matmul, jax_array(*A), jax_array(*B), {"out": poisoned(4, 16)})),
    Case(
        "out-segments",
        V,
        ("SegmentGEMMWrapper", "out has shape (3, 16)", "(4, 16)"),
        lambda: run(numpy(*A), numpy(2, *B), numpy(4, dtype="int32"), out=poisoned(3, 16)),
    ),
    Case("out-segments-is-indices", V, ("SegmentGEMMWrapper", "out shares memory with expert_indices"), aliased_indices),
    Case(
        "out-groupwise-dtype",
        V,
        ("gemm_fp8_nt_groupwise: ", "out is float8_e4m3fn", "bfloat16, float16, float32"),
        lambda: (groupwise, *g(), "K", {"out": poisoned(4, 16, **f8)}),
    ),
    # options
    Case(
        "backend",
        V,
        ("linear: ", "backend is 'cutlas'", "'auto'", "'portable'"),
        lambda: (linear, numpy(*A), numpy(*W), {"backend": "cutlas"}),
    ),
    Case(
        "backend-bf16", V, ("mm_bf16: ", "backend is 'trtllm'", "'cudnn'"), lambda: (mm_bf16, numpy(*A), numpy(*B), {"backend": "trtllm"})
    ),
    Case("backend-None", V, ("matmul: ", "backend is None", "'auto'"), lambda: (matmul, numpy(*A), numpy(*B), {"backend": None})),
    Case(
        "backend-fp4",
        V,
        ("mm_fp4: ", "backend is 'cublas'", "'cutlass'"),
        lambda: (mm_fp4, numpy(*A), numpy(*B, dtype="uint8"), 1.0, {"backend": "cublas"}),
    ),
    Case("backend-segments", V, ("SegmentGEMMWrapper", "backend is 'sm70'", "'sm80', 'sm90'"), lambda: (Segments, None, "sm70")),
    Case(
        "accumulate",
        V,
        ("linear: ", "accumulate is 'fp16'", "'fast', 'promoted', 'fp32'"),
        lambda: (linear, numpy(*A), numpy(*W), {"accumulate": "fp16"}),
    ),
    Case(
        "accumulate-None",
        V,
        ("mm_fp8: ", "accumulate is None", "'fast'"),
        lambda: (mm_fp8, numpy(*A, **f8), numpy(*B, **f8), {"accumulate": None}),
    ),
    Case(
        "out_dtype-fp8",
        V,
        ("matmul: ", "out_dtype is float8_e4m3fn", "bfloat16, float16, float32"),
        lambda: (matmul, numpy(*A), numpy(*B), {"out_dtype": E4M3}),
    ),
    Case(
        "out_dtype-typo",
        T,
        ("matmul: ", "out_dtype", "'bf16'", "'bfloat16'"),
        lambda: (matmul, numpy(*A), numpy(*B), {"out_dtype": "bf16"}),
    ),
    Case(
        "out_dtype-int",
        T,
        ("matmul: ", "out_dtype", "3", "not a dtype", "'bfloat16'"),
        lambda: (matmul, numpy(*A), numpy(*B), {"out_dtype": 3}),
    ),
    Case(
        "out_dtype-unhashable",
        T,
        ("matmul: ", "out_dtype", "not a dtype", "'bfloat16'"),
        lambda: (matmul, numpy(*A), numpy(*B), {"out_dtype": ["float16"]}),
    ),
    Case(
        "out_dtype-torch",
        V,
        ("matmul: ", "out_dtype is float64", "float32"),
        lambda: (matmul, tensor(*A), tensor(*B), {"out_dtype": torch.float64}),
    ),
    Case(
        "out_dtype-array",
        T,
        ("mm_fp8: ", "out_dtype is an array", "a_scale="),
        lambda: (mm_fp8, numpy(*A, **f8), numpy(*B, **f8), numpy(1, **f32), numpy(1, **f32)),
    ),
    Case(
        "out_dtype-tensor",
        T,
        ("mm_fp8: ", "out_dtype is an array", "b_scale="),
        lambda: (mm_fp8, tensor(*A, **f8), tensor(*B, **f8), tensor(1, **f32), tensor(1, **f32)),
    ),
    Case(
        "dtype-bmm_fp8", T, ("bmm_fp8: ", "dtype is an array"), lambda: (bmm_fp8, numpy(*A, **f8), numpy(*B, **f8), 1.0, 1.0, numpy(4, 16))
    ),
    # what is no array
    Case("list", T, ("linear: ", "x is a builtins.list", "np.asarray"), lambda: (linear, [[1.0]], numpy(1, 1))),
    Case("list-b", T, ("mm_fp8: ", "b is a builtins.list", "np.asarray"), lambda: (mm_fp8, numpy(*A, **f8), [[1.0]])),
    Case("list-fp4", T, ("mm_fp4: ", "b is a builtins.list", "np.asarray"), lambda: (mm_fp4, numpy(*A), [[1, 2]], 1.0)),
    Case("list-groupwise", T, ("gemm_fp8_nt_groupwise: ", "a is a builtins.list"), lambda: (groupwise, [[1.0]], *g()[1:], "K")),
    Case("list-sm90", T, ("fp8_blockscale_gemm_sm90: ", "input is a builtins.list"), lambda: (sm90, [[1.0]], numpy(16, 128))),
    Case(
        "list-segments",
        T,
        ("SegmentGEMMWrapper", "weights is a builtins.list"),
        lambda: run(numpy(*A), [numpy(*B)], numpy(4, dtype="int32")),
    ),
    Case("none", T, ("matmul: ", "b is missing", "pass an array"), lambda: (matmul, numpy(*A), None)),
    Case("none-linear", T, ("linear: ", "x is a builtins.NoneType", "pass an array"), lambda: (linear, None, numpy(*W))),
    Case("scalar", T, ("matmul: ", "a", "float", "pass an array"), lambda: (matmul, 2.0, numpy(*B))),
    Case("scalars", T, ("matmul: ", "a", "pass an array"), lambda: (matmul, 2.0, 3.0)),
    Case("string", T, ("matmul: ", "b is a builtins.str", "pass an array"), lambda: (matmul, numpy(*A), "b")),
    Case(
        "bool-scale", T, ("mm_fp8: ", "a_scale is a builtins.bool"), lambda: (mm_fp8, numpy(*A, **f8), numpy(*B, **f8), {"a_scale": True})
    ),
    Case(
        "masked",
        T,
        ("matmul: ", "a is a NumPy masked array", "x.filled"),
        lambda: (matmul, np.ma.masked_array(numpy(*A, dtype=FP16)), numpy(*B, dtype=FP16)),
    ),
    Case(
        "big-endian", T, ("matmul: ", "a has byte order '>f2'", "newbyteorder"), lambda: (matmul, np.zeros(A, ">f2"), numpy(*B, dtype=FP16))
    ),
    Case("object", T, ("matmul: ", "a is object", "wanted"), lambda: (matmul, np.zeros(A, object), numpy(*B))),
    Case("negative", V, ("matmul: ", "a", "negative strides (-64, 1)", "pass a copy"), lambda: (matmul, numpy(*A)[::-1], numpy(*B))),
    Case("sparse", T, ("matmul: ", "a is a sparse_coo torch tensor", "to_dense"), lambda: (matmul, tensor(*A).to_sparse(), tensor(*B))),
    Case(
        "nested",
        T,
        ("matmul: ", "a is a nested torch tensor", "padded"),
        lambda: (matmul, torch.nested.nested_tensor([tensor(*A)], layout=torch.jagged), tensor(*B)),
    ),
    Case("quantised-tensor", T, ("matmul: ", "a is a quantized torch tensor", "dequantize"), lambda: (matmul, per_tensor(), tensor(*B))),
    Case("neg-bit", T, ("matmul: ", "a is a lazily negated", "resolve_neg"), lambda: (matmul, torch._neg_view(tensor(*A)), tensor(*B))),
    Case("neg-bit-b", T, ("linear: ", "w is a lazily negated", "resolve_neg"), lambda: (linear, tensor(*A), torch._neg_view(tensor(*W)))),
    Case("complex", T, ("matmul: ", "a is complex64", "wanted"), lambda: (matmul, tensor(*A, dtype="complex64"), tensor(*B))),
    # frameworks and devices
    Case("numpy-torch", T, ("matmul: ", "b is a PyTorch array", "a is a NumPy array", "convert"), lambda: (matmul, numpy(*A), tensor(*B))),
    Case("torch-jax", T, ("matmul: ", "a", "other arguments are JAX arrays", "jax.Array"), lambda: (matmul, tensor(*A), jax_array(*B))),
    Case(
        "jax-numpy-scale",
        T,
        ("mm_fp8: ", "a_scale", "JAX", "jax.Array"),
        lambda: (mm_fp8, jax_array(*A, **f8), jax_array(*B, **f8), {"a_scale": numpy(4, **f32)}),
    ),
    Case(
        "torch-numpy-bias",
        T,
        ("linear: ", "bias is a NumPy array", "x is a PyTorch array"),
        lambda: (linear, tensor(*A), tensor(*W), numpy(16)),
    ),
    Case(
        "dlpack-on-metal",
        T,
        ("matmul: ", "a", "Metal"),
        lambda: (matmul, Producer(A, None, dtype=(4, 16, 1), device=(8, 0)), Hidden(tensor(*B))),
    ),
    Case("meta-cpu", T, ("matmul: ", "b is on the host", "a is on meta", "move"), lambda: (matmul, tensor(*A, device="meta"), tensor(*B))),
    Case("cpu-meta", T, ("matmul: ", "b is on meta", "a is on the host", "move"), lambda: (matmul, tensor(*A), tensor(*B, device="meta"))),
    Case("fake-real", T, ("matmul: ", "b", "a", "fake"), lambda: (matmul, fake(*A), tensor(*B))),
    Case("spec-numpy", T, ("matmul: ", "b is a NumPy array", "a is a Spec array"), lambda: (matmul, Spec(A, BF16, device=-1), numpy(*B))),
    Case("meta-k", V, ("matmul: ", "k = 64", "k = 32", AGREE), lambda: (matmul, tensor(*A, device="meta"), tensor(32, 16, device="meta"))),
    Case("fake-k", V, ("matmul: ", "k = 64", "k = 32", AGREE), lambda: (matmul, fake(*A), fake(32, 16))),
    Case("jax-k", V, ("matmul: ", "k = 64", "k = 32", AGREE), lambda: (matmul, jax_array(*A), jax_array(32, 16))),
    Case("jax-dtype", T, ("matmul: ", "a is float32", "cast it"), lambda: (matmul, jax_array(*A, **f32), jax_array(*B))),
    Case("jit-k", V, ("mm_bf16: ", "k = 64", "k = 32", AGREE), lambda: (jax.jit(mm_bf16), jax_array(*A), jax_array(32, 16))),
    Case(
        "grad",
        T,
        ("matmul has no derivative", "stop_gradient"),
        lambda: (jax.grad(lambda a, b: matmul(a, b).astype(F32).sum()), jax_array(*A), jax_array(*B)),
    ),
    Case("vmap", T, ("matmul cannot be vmapped",), lambda: (jax.vmap(matmul), jax_array(2, *A), jax_array(2, *B))),
    Case("dlpack-k", V, ("matmul: ", "k = 64", "k = 32", AGREE), lambda: (matmul, Hidden(tensor(*A)), Hidden(tensor(32, 16)))),
    # segments
    Case(
        "segments-nothing",
        V,
        ("SegmentGEMMWrapper.run: ", "nothing says", "expert_indices", "seg_indptr"),
        lambda: run(numpy(*A), numpy(2, *B), 2),
    ),
    Case(
        "segments-both",
        V,
        ("SegmentGEMMWrapper.run: ", "seg_indptr and seg_lens", "pass one"),
        lambda: run(numpy(*A), numpy(2, *B), 2, seg_lens=numpy(2, dtype="int32"), seg_indptr=numpy(3, dtype="int32")),
    ),
    Case(
        "segments-indices-count",
        V,
        ("SegmentGEMMWrapper", "expert_indices has shape (3,)", "x has 4 rows", "(4,)"),
        lambda: run(numpy(*A), numpy(2, *B), numpy(3, dtype="int32")),
    ),
    Case(
        "segments-indices-float",
        T,
        ("SegmentGEMMWrapper", "expert_indices is float32", "int32 or int64"),
        lambda: run(numpy(*A), numpy(2, *B), numpy(4, **f32)),
    ),
    Case(
        "segments-indices-3d",
        V,
        ("SegmentGEMMWrapper", "expert_indices has shape (4, 1, 1)", "wanted [m]"),
        lambda: run(numpy(*A), numpy(2, *B), numpy(4, 1, 1, dtype="int32")),
    ),
    Case(
        "segments-indices-strided",
        V,
        ("SegmentGEMMWrapper", "expert_indices", "strides (2,)", "contiguous"),
        lambda: run(numpy(*A), numpy(2, *B), numpy(8, dtype="int32")[::2]),
    ),
    Case(
        "segments-indices-list",
        T,
        ("SegmentGEMMWrapper", "expert_indices is a builtins.list", "np.asarray"),
        lambda: run(numpy(*A), numpy(2, *B), [0, 1, 0, 1]),
    ),
    Case(
        "segments-indptr-empty",
        V,
        ("SegmentGEMMWrapper", "seg_indptr is empty", "one element more"),
        lambda: run(numpy(*A), numpy(2, *B), seg_indptr=numpy(0, dtype="int32")),
    ),
    Case(
        "segments-count",
        V,
        ("SegmentGEMMWrapper", "seg_indptr names 3 segments", "weights holds 2", "weight_indices"),
        lambda: run(numpy(*A), numpy(2, *B), seg_indptr=numpy(4, dtype="int32")),
    ),
    Case(
        "segments-batch-size",
        V,
        ("SegmentGEMMWrapper.run: ", "batch_size is 3", "seg_lens has shape (2,)"),
        lambda: run(numpy(*A), numpy(2, *B), 3, seg_lens=numpy(2, dtype="int32")),
    ),
    Case(
        "segments-weight-indices",
        V,
        ("SegmentGEMMWrapper", "weight_indices has shape (3,)", "2 segments", "(2,)"),
        lambda: run(numpy(*A), numpy(2, *B), seg_lens=numpy(2, dtype="int32"), weight_indices=numpy(3, dtype="int32")),
    ),
    Case(
        "segments-weight-indices-float",
        T,
        ("SegmentGEMMWrapper", "weight_indices is float32", "int32 or int64"),
        lambda: run(numpy(*A), numpy(2, *B), seg_lens=numpy(2, dtype="int32"), weight_indices=numpy(2, **f32)),
    ),
    Case(
        "segments-weight-indices-extra",
        V,
        ("SegmentGEMMWrapper.run: ", "weight_indices", "expert_indices"),
        lambda: run(numpy(*A), numpy(2, *B), numpy(4, dtype="int32"), weight_indices=numpy(2, dtype="int32")),
    ),
    Case(
        "segments-shape",
        V,
        ("SegmentGEMMWrapper.run: ", "weights have shape (2, 64, 16)", "(3, 64, 16)"),
        lambda: (wrapper(num_experts=3, hidden_size=64, intermediate_size=16).run, numpy(*A), numpy(2, *B), numpy(4, dtype="int32")),
    ),
    Case("segments-half-built", T, ("SegmentGEMMWrapper: ", "num_experts", "together"), lambda: (Segments, {"num_experts": 3})),
    Case(
        "segments-half-built-workspace",
        T,
        ("SegmentGEMMWrapper: ", "num_experts", "together"),
        lambda: (Segments, numpy(8), {"num_experts": 3}),
    ),
    Case(
        "segments-negative",
        V,
        ("SegmentGEMMWrapper: ", "(-1, 4, 4)", "negative"),
        lambda: (Segments, {"num_experts": -1, "hidden_size": 4, "intermediate_size": 4}),
    ),
    Case(
        "segments-mixed",
        T,
        ("SegmentGEMMWrapper", "expert_indices is a NumPy array", "x is a PyTorch array"),
        lambda: run(tensor(*A), tensor(2, *B), numpy(4, dtype="int32")),
    ),
    Case(
        "segments-value",
        V,
        ("SegmentGEMMWrapper", "expert_indices has 4 values outside [-1, 2)", "correct"),
        lambda: run(numpy(*A), numpy(2, *B), numpy(4, dtype="int32") - 2, out=poisoned(4, 16)),
    ),
    Case(
        "segments-indptr-value",
        V,
        ("SegmentGEMMWrapper", "seg_indptr has 1 value outside [0, 4]", "correct"),
        lambda: run(numpy(*A), numpy(2, *B), seg_indptr=np.array([0, 2, 5]), out=poisoned(4, 16)),
    ),
    Case(
        "segments-lens-value",
        V,
        ("SegmentGEMMWrapper", "seg_lens has 1 value negative", "correct"),
        lambda: run(numpy(*A), numpy(2, *B), seg_lens=np.array([2, -1]), out=poisoned(4, 16)),
    ),
    # quantize, dequantize, Quantized
    Case("quantize-format", V, ("quantize: ", "format is 'fp8'", "fp8_row"), lambda: (quantize, numpy(*A), "fp8")),
    Case("quantize-format-fp5", V, ("quantize: ", "format is 'fp5_row'", "fp8_row"), lambda: (quantize, numpy(*A), "fp5_row")),
    Case("quantize-format-type", V, ("quantize: ", "format is", "fp8_row"), lambda: (quantize, numpy(*A), 8)),
    Case(
        "quantize-dtype", T, ("quantize: ", "x is int32", "wanted bfloat16, float16, float32"), lambda: (quantize, numpy(*A, dtype="int32"))
    ),
    Case(
        "quantize-float64",
        T,
        ("quantize: ", "x is float64", "wanted bfloat16, float16, float32"),
        lambda: (quantize, numpy(*A, dtype="float64")),
    ),
    Case("quantize-rank", V, ("quantize: ", "x has shape (64,)", "[rows, k]"), lambda: (quantize, numpy(64))),
    Case("quantize-list", T, ("quantize: ", "x is a builtins.list", "np.asarray"), lambda: (quantize, [[1.0]])),
    Case("quantize-none", T, ("quantize: ", "x", "pass an array"), lambda: (quantize, None)),
    Case("quantize-negative", V, ("quantize: ", "x has negative strides", "pass a copy"), lambda: (quantize, numpy(*A)[:, ::-1])),
    Case(
        "linear-activations",
        V,
        ("linear: ", "activations is 'fp8'", "fp8_row"),
        lambda: (linear, numpy(*A), numpy(*W, **f8), {"activations": "fp8"}),
    ),
    Case(
        "linear-activations-quantized",
        T,
        ("linear: ", "x is a Quantized", "drop activations"),
        lambda: (linear, quantized("fp8_row", 4, 64, scale=(4, 1)), numpy(*W, **f8), {"activations": "fp8_row"}),
    ),
    Case("dequantize-array", T, ("dequantize: ", "q is a ndarray", "Quantized"), lambda: (dequantize, numpy(*A))),
    Case(
        "dequantize-dtype",
        V,
        ("dequantize: ", "dtype is float64", "bfloat16, float16, float32"),
        lambda: (dequantize, quantized(), "float64"),
    ),
    Case("dequantize-dtype-none", T, ("dequantize: ", "dtype", "not a dtype", "'bfloat16'"), lambda: (dequantize, quantized(), "bf16")),
    Case(
        "dequantize-scale",
        V,
        ("Quantized: ", "scale has shape (15, 1)", "16 x 1 scales"),
        lambda: (lambda: dequantize(quantized(scale=(15, 1))),),
    ),
    Case("dequantize-payload", T, ("dequantize: ", "data is float8_e5m2", "float8_e4m3fn"), lambda: (dequantize, quantized(dtype=E5M2))),
    Case(
        "quantized-format",
        V,
        ("Quantized: ", "format is 'int4'", "fp8_row"),
        lambda: (Quantized, numpy(16, 64, **f8), numpy(16, 1, **f32), "int4"),
    ),
    Case(
        "quantized-rank",
        V,
        ("Quantized: ", "data has shape (64,)", "[rows, k]"),
        lambda: (Quantized, numpy(64, **f8), numpy(1, **f32), "fp8_tensor"),
    ),
    Case(
        "quantized-shape",
        V,
        ("Quantized: ", "shape is (16, 32)", "(16, 64)"),
        lambda: (Quantized, numpy(16, 64, **f8), numpy(16, 1, **f32), "fp8_row", (16, 32)),
    ),
    Case(
        "quantized-axis",
        V,
        ("Quantized: ", "k_axis is 0", "last two"),
        lambda: (Quantized, numpy(2, 16, 64, **f8), numpy(1, **f32), "fp8_tensor", (), 0),
    ),
    Case(
        "quantized-axis-range",
        V,
        (
            "Quantized: ",
            "k_axis is 2",
        ),
        lambda: (Quantized, numpy(16, 64, **f8), numpy(1, **f32), "fp8_tensor", (), 2),
    ),
    Case(
        "quantized-list",
        T,
        ("Quantized: ", "data is a builtins.list", "np.asarray"),
        lambda: (Quantized, [[1.0]], numpy(1, **f32), "fp8_tensor"),
    ),
    Case(
        "quantized-two-scales",
        T,
        ("mm_fp8: ", "b is a Quantized", "drop b_scale"),
        lambda: (mm_fp8, numpy(*A, **f8), quantized().T, {"b_scale": 1.0}),
    ),
    Case("quantized-not-transposed", V, ("matmul: ", "b", "k along axis 1", "pass b.T"), lambda: (matmul, numpy(*A), quantized())),
    Case("quantized-transposed", V, ("linear: ", "w", "k along axis 0", "pass w.T"), lambda: (linear, numpy(*A), quantized().T)),
    Case(
        "quantized-scale-shape",
        V,
        ("Quantized: ", "scale has shape (15, 1)", "16 x 1 scales"),
        lambda: (lambda: linear(numpy(*A), quantized(scale=(15, 1))),),
    ),
    Case("quantized-payload", T, ("linear: ", "w is float8_e5m2", "float8_e4m3fn"), lambda: (linear, numpy(*A), quantized(dtype=E5M2))),
    Case(
        "quantized-scale-scalar-row",
        V,
        ("Quantized: ", "scale has shape (1, 1)", "16 x 1 scales"),
        lambda: (lambda: linear(numpy(*A), quantized(scale=(1, 1))),),
    ),
    Case(
        "quantized-scale-other",
        T,
        ("linear: ", "w.scale is a PyTorch array", "x is a NumPy array"),
        lambda: (linear, numpy(*A), Quantized(numpy(16, 64, **f8), tensor(16, 1, **f32), "fp8_row")),
    ),
    # plan, explain, warmup, Spec
    Case("plan-fn", T, ("plan: ", "fn is a str", "cugemm.mm_fp8"), lambda: (cugemm.plan, "matmul", numpy(*A), numpy(*B))),
    Case("explain-other", T, ("explain: ", "'len'", "cugemm"), lambda: (cugemm.explain, len, (1, 2))),
    Case(
        "warmup-k",
        V,
        ("matmul: ", "k = 64", AGREE),
        lambda: (cugemm.warmup, matmul, Spec(A, BF16, device=-1), Spec((32, 16), BF16, device=-1)),
    ),
    Case(
        "warmup-m", T, ("warmup: ", "m is"), lambda: (cugemm.warmup, matmul, Spec(A, BF16, device=-1), Spec(B, BF16, device=-1), {"m": 2.5})
    ),
    Case(
        "plan-shape",
        V,
        ("matmul", "argument 0 is bfloat16[5, 64]", "bfloat16[4, 64]", "another plan"),
        lambda: (cugemm.plan(matmul, numpy(*A), numpy(*B)), numpy(5, 64), numpy(*B)),
    ),
    Case(
        "plan-dtype",
        V,
        ("matmul", "argument 1 is float16", "bfloat16[64, 16]"),
        lambda: (cugemm.plan(matmul, numpy(*A), numpy(*B)), numpy(*A), numpy(*B, dtype=FP16)),
    ),
    Case("plan-count", V, ("matmul", "got 1 arguments", "2"), lambda: (cugemm.plan(matmul, numpy(*A), numpy(*B)), numpy(*A))),
    Case(
        "plan-strides", V, ("matmul", "argument 1", "strides"), lambda: (cugemm.plan(matmul, numpy(*A), numpy(*B)), numpy(*A), numpy(*W).T)
    ),
    Case(
        "plan-device",
        V,
        ("matmul", "argument 0"),
        lambda: (cugemm.plan(matmul, tensor(*A), tensor(*B)), tensor(*A, device="meta"), tensor(*B, device="meta")),
    ),
    Case("spec-dtype", T, ("'bf16' is not a dtype", "'bfloat16'"), lambda: (Spec, A, "bf16")),
    Case("spec-strides", V, ("Spec: ", "strides (1,)", "shape (4, 64)", "one stride per axis"), lambda: (Spec, A, BF16, {"strides": (1,)})),
    Case("spec-negative", V, ("Spec: ", "shape (-4, 64)"), lambda: (Spec, (-4, 64), BF16)),
    # values that used to pass silently, or to escape as somebody else's error
    Case(
        "mm_fp4-quantized-scale",
        T,
        ("mm_fp4: ", "b is a Quantized", "drop a_descale"),
        lambda: (mm_fp4, numpy(*A), quantized("fp4_row", 16, 32, dtype="uint8").T, 3.0),
    ),
    Case(
        "mm_fp4-8x4",
        V,
        ("mm_fp4: ", "use_8x4_sf_layout is True", "drop it"),
        lambda: (mm_fp4, numpy(*A), numpy(*B, dtype="uint8"), 1.0, {"use_8x4_sf_layout": True}),
    ),
    Case(
        "mm_fp4-jax-float4",
        T,
        ("mm_fp4: ", "b is float4_e2m1fn of shape (64, 16)", "along n", "pass it as [n, k]"),
        lambda: (mm_fp4, jax_array(*A), jax_array(*B, dtype="float4_e2m1fn"), 1.0),
    ),
    Case(
        "mm_fp4-torch-float4",
        V,
        ("mm_fp4: ", "k = 64", "k = 128", "b is packed"),
        lambda: (mm_fp4, tensor(*A), tensor(*B, dtype="uint8").view(torch.float4_e2m1fn_x2), 1.0),
    ),
    Case(
        "jax-float4-odd",
        T,
        ("linear: ", "w is float4_e2m1fn of shape (16, 63)", "pad"),
        lambda: (linear, jax_array(4, 63), jax_array(16, 63, dtype="float4_e2m1fn")),
    ),
    Case(
        "groupwise-trtllm-mode",
        V,
        ("gemm_fp8_nt_groupwise: ", "scale_major_mode is 'K'", "'trtllm'", "pass None"),
        lambda: (groupwise, *g(), "K", {"backend": "trtllm"}),
    ),
    Case(
        "groupwise-granularity-int",
        V,
        ("gemm_fp8_nt_groupwise: ", "scale_granularity_mnk is 128", "wanted"),
        lambda: (groupwise, *g(), "K", 1, 128),
    ),
    Case(
        "backend-list", T, ("linear: ", "backend is a list", "pass a string"), lambda: (linear, numpy(*A), numpy(*W), {"backend": ["auto"]})
    ),
    Case(
        "accumulate-list",
        T,
        ("linear: ", "accumulate is a list", "pass a string"),
        lambda: (linear, numpy(*A), numpy(*W), {"accumulate": ["fast"]}),
    ),
    Case(
        "quantized-format-none",
        V,
        ("Quantized: ", "format is None", "fp8_row"),
        lambda: (Quantized, numpy(16, 64, **f8), numpy(16, 1, **f32), None),
    ),
    Case(
        "quantized-scale-none",
        T,
        ("Quantized: ", "scale is a builtins.NoneType", "pass an array"),
        lambda: (Quantized, numpy(16, 64, **f8), None, "fp8_row"),
    ),
    Case("scale-huge", V, ("mm_fp8: ", "a_scale", "float32"), lambda: (mm_fp8, numpy(*A, **f8), numpy(*B, **f8), {"a_scale": 10**400})),
    Case("scale-wide", V, ("mm_fp8: ", "alpha", "float32"), lambda: (mm_fp8, numpy(*A, **f8), numpy(*B, **f8), 1e39)),
    Case(
        "scale-complex",
        T,
        ("mm_fp8: ", "a_scale is a", "complex64"),
        lambda: (mm_fp8, numpy(*A, **f8), numpy(*B, **f8), {"a_scale": np.complex64(2)}),
    ),
    Case(
        "scale-numpy-string",
        T,
        ("mm_fp8: ", "a_scale is a", "str"),
        lambda: (mm_fp8, numpy(*A, **f8), numpy(*B, **f8), {"a_scale": np.str_("2")}),
    ),
    Case(
        "scale-datetime",
        T,
        ("mm_fp8: ", "a_scale is a", "datetime64"),
        lambda: (mm_fp8, numpy(*A, **f8), numpy(*B, **f8), {"a_scale": np.datetime64("2020")}),
    ),
    Case(
        "long-axis",
        V,
        ("matmul: ", "axis of 2147483648", "below 2**30"),
        lambda: (matmul, Spec((2**31, 8), BF16, device=-1), Spec((8, 4), BF16, device=-1)),
    ),
    Case(
        "bmm_fp8-cast-k",
        V,
        ("bmm_fp8: ", "A (4, 64) has k = 64", "B (32, 16) has k = 32"),
        lambda: (bmm_fp8, numpy(*A, dtype=FP16), numpy(32, 16, dtype=FP16), 1.0),
    ),
    Case(
        "linear-activations-k",
        V,
        ("linear: ", "x (4, 64) has k = 64", "w (16, 32) has k = 32"),
        lambda: (linear, numpy(*A), numpy(16, 32), {"activations": "fp8_row"}),
    ),
    Case("quantize-format-list", T, ("quantize: ", "format is a list", "'fp8_row'"), lambda: (quantize, numpy(*A), ["fp8_row"])),
    Case("quantize-layout-list", T, ("quantize: ", "scale_layout is a list"), lambda: (quantize, numpy(*A), "nvfp4", {"scale_layout": []})),
    Case("dequantize-dtype-list", T, ("dequantize: ", "dtype is a list"), lambda: (dequantize, quantized(), ["bfloat16"])),
    Case(
        "linear-out_dtype-spec",
        T,
        ("linear: ", "out_dtype", "is not a dtype"),
        lambda: (linear, numpy(*A), numpy(*W), {"out_dtype": Spec((2,), F32)}),
    ),
    Case(
        "bmm_fp8-dtype",
        V,
        ("bmm_fp8: ", "dtype is int8", "bfloat16"),
        lambda: (bmm_fp8, numpy(*A, **f8), numpy(64, 16, **f8), 1.0, 1.0, "int8"),
    ),
    Case(
        "linear-strings",
        T,
        ("linear: ", "x is an array of str", "numbers"),
        lambda: (linear, np.zeros((4, 64), "U1"), numpy(*W), {"out": poisoned(4, 16)}),
    ),
    Case("mxfp4_quantize-class", T, ("mxfp4_quantize: ", "a "), lambda: (cugemm.mxfp4_quantize, np.float32)),
    Case("mxfp4_quantize-quantized", T, ("mxfp4_quantize: ", "a is Quantized(", "already"), lambda: (cugemm.mxfp4_quantize, quantized())),
    Case("alignment", V, ("mxfp8_quantize: ", "alignment is True"), lambda: (cugemm.mxfp8_quantize, numpy(*A), True, True)),
    Case(
        "mxfp8_dequantize_host-dtype",
        T,
        ("mxfp8_dequantize_host: ", "input is float32"),
        lambda: (cugemm.mxfp8_dequantize_host, numpy(4, 32, dtype=F32), np.zeros(512, np.uint8)),
    ),
    Case(
        "e2m1-scale",
        V,
        ("e2m1_and_ufp8sf_scale_to_float: ", "ufp8_scale_tensor has shape (9,)", "e2m1_tensor (4, 16)"),
        lambda: (cugemm.e2m1_and_ufp8sf_scale_to_float, np.zeros((4, 16), np.uint8), np.zeros(9, np.uint8)),
    ),
    Case("mxfp4_dequantize-text", T, ("mxfp4_dequantize: ", "a_fp4"), lambda: (cugemm.mxfp4_dequantize, "x", np.zeros(512, np.uint8))),
    Case(
        "interleave-dtype",
        T,
        ("block_scale_interleave: ", "unswizzled_sf is int32"),
        lambda: (cugemm.block_scale_interleave, np.zeros((4, 4), np.int32)),
    ),
    Case(
        "shuffle_sf-dtype",
        T,
        ("shuffle_matrix_sf_a: ", "input_tensor is int32"),
        lambda: (cugemm.shuffle_matrix_sf_a, np.zeros((128, 4), np.int32), 128),
    ),
    Case("spec-shape", T, ("Spec: ", "shape is 3", "ints"), lambda: (Spec, 3, BF16)),
    Case("spec-size", T, ("Spec: ", "shape is (2.5,)"), lambda: (Spec, (2.5,), BF16)),
    Case("spec-device", T, ("Spec: ", "device is 'cuda'"), lambda: (Spec, (2,), BF16, {"device": "cuda"})),
    Case("spec-no-dtype", T, ("Spec: ", "None is not a dtype"), lambda: (Spec, (2,), None)),
    Case("spec-function", T, ("Spec: ", "'finfo' is not a dtype"), lambda: (Spec, (2,), "finfo")),
    Case(
        "wrapper-column-major",
        V,
        ("SegmentGEMMWrapper.run: ", "weight_column_major is 'False'"),
        lambda: (
            cugemm.SegmentGEMMWrapper().run,
            numpy(*A),
            numpy(2, 64, 64),
            {"weight_column_major": "False", "seg_indptr": np.array([0, 2, 4], np.int32)},
        ),
    ),
    Case(
        "wrapper-batch_size",
        T,
        ("SegmentGEMMWrapper.run: ", "batch_size is 2.0", "an int"),
        lambda: (cugemm.SegmentGEMMWrapper().run, numpy(*A), numpy(2, 64, 64), 2.0, {"seg_indptr": np.array([0, 2, 4], np.int32)}),
    ),
    Case(
        "wrapper-sizes",
        V,
        ("SegmentGEMMWrapper: ", "('8', 4, 4)", "ints"),
        lambda: (cugemm.SegmentGEMMWrapper, {"num_experts": "8", "hidden_size": 4, "intermediate_size": 4}),
    ),
    Case("warmup-array", T, ("warmup: ", "m is a ndarray"), lambda: (cugemm.warmup, linear, numpy(*A), numpy(*W), {"m": np.zeros(2)})),
    # What the second step refuses, before the first one runs.
    Case(
        "linear-activations-bias",
        V,
        ("linear: ", "bias has shape (15,)", "n = 16", "(16,)"),
        lambda: (linear, numpy(*A), numpy(16, 64), numpy(15), {"activations": "fp8_row"}),
    ),
    Case(
        "linear-activations-dtype",
        T,
        ("linear: quantize: ", "x is int32", "bfloat16, float16, float32"),
        lambda: (linear, numpy(*A, dtype="int32"), numpy(16, 64), {"activations": "fp8_row"}),
    ),
    Case(
        "linear-activations-out",
        V,
        ("linear: ", "out has shape (4, 15)", "(4, 16)"),
        lambda: (linear, numpy(*A), numpy(16, 64), {"activations": "nvfp4", "out": poisoned(4, 15)}),
    ),
    Case(
        "bmm_fp8-cast-out",
        V,
        ("bmm_fp8: ", "out has shape (4, 15)", "(4, 16)"),
        lambda: (bmm_fp8, numpy(*A, dtype=FP16), numpy(64, 16, dtype=FP16), 1.0, {"out": poisoned(4, 15, dtype=FP16)}),
    ),
    Case(
        "blockscale-quantised-scale",
        V,
        ("fp8_blockscale_gemm_sm90: ", "weight_scale has shape (3, 1)", "weight is (256, 64)", "(2, 1)"),
        lambda: (cugemm.fp8_blockscale_gemm_sm90, numpy(*A), numpy(256, 64, dtype=E4M3), None, numpy(3, 1, dtype=F32)),
    ),
]


def bits(x: Any) -> bytes | None:
    if isinstance(x, torch.Tensor):
        x = x.detach().view(torch.uint8).numpy()
    return np.ascontiguousarray(x).tobytes() if isinstance(x, np.ndarray) else None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused_in_words(case: Case) -> None:
    function, *arguments = case.make()
    keywords = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
    out = keywords.get("out")
    before, launched = bits(out), launch.launches
    with pytest.raises(Exception) as raised:
        function(*arguments, **keywords)
    text = str(raised.value)
    assert raised.type is case.error, f"{raised.type.__name__}: {text}"
    at = 0
    for word in case.words:
        found = text.find(word, at)
        assert found >= 0, f"{word!r} is not where it should be in: {text}"
        at = found
    assert "\n" not in text
    assert len(text) < 400, text
    assert launch.launches == launched, "something was launched"
    assert bits(out) == before, "out was written"


def test_enough_cases() -> None:
    assert len(CASES) >= 150
    assert len({case.name for case in CASES}) == len(CASES)


def test_errors_of_the_first_argument_come_first_and_do_not_stick() -> None:
    """A refused call leaves the next one right."""
    a, b = np.ones((2, 4), ml_dtypes.bfloat16), np.ones((4, 3), ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match="k = 4"):
        matmul(a, b.T)
    assert matmul(a, b).astype(float).tolist() == [[4.0] * 3] * 2
