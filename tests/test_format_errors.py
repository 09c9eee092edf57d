"""Wrong scales, zero points, second scales, groups and `Quantized`s: each refused in words, as test_errors does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import format_oracles as formats
import gpu_formats
import numpy as np
import pytest
from test_errors import Case, T, V, numpy
from test_errors import test_refused_in_words as check

import cugemm
from cugemm import Quantized, Spec, values
from cugemm.api.common import gemm_options, product
from cugemm.arrays import framework_of
from cugemm.formats import E4M3, FP32, INT8, Format
from cugemm.problem import B_SCALE, B_TENSOR, A, B

U8, F32, I32, F8 = ({"dtype": name} for name in ("uint8", "float32", "int32", "float8_e4m3fn"))
X = (4, 64)


def nvfp4(rows: int = 16, k: int = 64, scale: tuple[int, ...] | None = None, **how: Any) -> Quantized:
    shape = (rows, -(-k // 16)) if scale is None else scale
    return Quantized(numpy(rows, k // 2, **U8), numpy(*shape, **U8), "nvfp4", **how)


def mxfp8(rows: int = 16, k: int = 64, scale: tuple[int, ...] | None = None, **how: Any) -> Quantized:
    shape = (rows, -(-k // 32)) if scale is None else scale
    return Quantized(numpy(rows, k, dtype="float8_e4m3fn"), numpy(*shape, **U8), "mxfp8", **how)


def uint4(rows: int = 16, k: int = 64, scale: tuple[int, ...] | None = None, zero: Any = None) -> Quantized:
    shape = (rows, -(-k // 32)) if scale is None else scale
    return Quantized(numpy(rows, k // 2, **U8), numpy(*shape, **F32), "uint4_g32", zero=numpy(*shape, **U8) if zero is None else zero)


def fp8(rows: int = 16, k: int = 64, fmt: Any = "fp8_row", scale: tuple[int, ...] | None = None, **how: Any) -> Quantized:
    return Quantized(numpy(rows, k, dtype="float8_e4m3fn"), numpy(*(scale or (rows, 1)), **F32), fmt, **how)


def stack() -> Quantized:
    return Quantized(numpy(3, 16, 32, **U8), numpy(3, 16, 4, **U8), "nvfp4")


def linear(w: Any, x: Any = None) -> tuple[Any, ...]:
    return cugemm.linear, numpy(*X) if x is None else x, w


def loose(
    a: Any, b: Any, *, fixed: dict[str, Any] | None = None, op: Any = gpu_formats.ANY, **arrays: Any
) -> tuple[Callable[[], Any]]:  # fmt: skip
    return (lambda: product(op, a, b, gemm_options(op, None, **(fixed or {})), **arrays),)


def grouped(kind: str, said: Any, x: Any = None, w: Any = None, op: Any = gpu_formats.ANY, **arrays: Any) -> tuple[Callable[[], Any]]:
    x = numpy(*X) if x is None else x
    w = numpy(2, 16, 64) if w is None else w
    return loose(x, w, fixed={"b_axes": "nk", "segments": kind}, op=op, segments=said, **arrays)


def masked(said: Any, **arrays: Any) -> tuple[Callable[[], Any]]:
    return grouped("masked", said, numpy(2, *X), **arrays)


def strided(x: Any) -> Any:
    return np.repeat(np.repeat(x, 2, axis=-1), 2, axis=-2)[..., ::2, ::2]


NV = {"b_scale_element": "e4m3", "b_element": "e2m1x2", "b_axes": "nk"}
ODD = Format("fp8_48", E4M3, (1, 48))
ODD_ZERO = Format("int8_zero", INT8, (1, 128), zero=True)

CASES = [
    # float scales
    Case("float-block", V, ("linear: ", "w is of a format", "1 x 48 values", "32, 64, 128 or all"),
        lambda: linear(fp8(fmt=ODD, scale=(16, 2)))),
    Case("float-dtype", T, ("linear: ", "w.scale is float64", "wanted float32, float16, bfloat16"), lambda: linear(
        Quantized(numpy(16, 64, dtype="int8"), numpy(16, 1, dtype="float64"), "int8_row"))),
    Case("float-shape", V, ("linear: ", "w.scale has shape (3, 16)", "(16, 3)", "1 x 32"), lambda: linear(
        Quantized(numpy(16, 40, **U8), numpy(3, 16, **F32), "int4_g32"), numpy(4, 80))),
    Case("float-span", V, ("linear: ", "w.scale of one matrix spans 4294967300 bytes", "fewer than 2**32: pass a copy"), lambda: linear(
        Quantized(Spec((3, 32), "uint8"), Spec((3, 2), "float32", strides=(2**29, 1)), "int4_g32"), Spec((4, 64), "bfloat16"))),
    Case("float-byte", T, ("linear: ", "w.scale is uint8", "wanted float32"), lambda: linear(
        Quantized(numpy(16, 32, **U8), numpy(16, 2, **U8), "int4_g32"))),
    Case("float-loose", V, ("any product: ", "a_scale has shape (5,)", "one element", "(4,) or (4, 1)"), lambda: loose(
        numpy(*X), numpy(64, 16), a_scale=numpy(5, **F32))),
    Case("float-loose-64", V, ("any product: ", "a_scale has shape (4, 4)", "1 x 128"), lambda: loose(
        numpy(4, 256), numpy(256, 16), a_scale=numpy(4, 4, **F32))),
    # byte scales
    Case("bytes-dtype", T, ("linear: ", "w.scale is float32", "e4m3 codes", "uint8 or float8_e4m3fn"), lambda: linear(
        Quantized(numpy(16, 32, **U8), numpy(16, 4, **F32), "nvfp4"))),
    Case("bytes-other-dtype", T, ("linear: ", "w.scale is float8_e4m3fn", "e8m0 codes", "float8_e8m0fnu"), lambda: linear(
        Quantized(numpy(16, 64, dtype="float8_e4m3fn"), numpy(16, 2, dtype="float8_e4m3fn"), "mxfp8"))),
    Case("bytes-shape", V, ("linear: ", "w.scale has shape (4, 16)", "w is (16, 32)", "16 values along k", "(16, 4)"), lambda: linear(
        nvfp4(scale=(4, 16)))),
    Case("bytes-shape-transposed", V, ("matmul: ", "b.scale has shape (16, 4)", "(4, 16)"), lambda: (
        cugemm.matmul, numpy(*X), Quantized(numpy(32, 16, **U8), numpy(16, 4, **U8), "nvfp4", k_axis=0))),
    Case("bytes-missing", T, ("any product: ", "b_scale is missing", "b needs an array of e4m3 scales"), lambda: loose(
        numpy(*X), numpy(16, 32, **U8), fixed=NV)),
    Case("bytes-number", T, ("any product: ", "b_scale is a number", "e4m3 scales"), lambda: loose(
        numpy(*X), numpy(16, 32, **U8), fixed=NV, b_scale=1.0)),
    Case("bytes-loose-shape", V, ("any product: ", "b_scale has shape (16, 3)", "(16, 4)"), lambda: loose(
        numpy(*X), numpy(16, 32, **U8), fixed=NV, b_scale=numpy(16, 3, **U8))),
    Case("bytes-too-many", V, ("linear: ", "scales; one matrix may have fewer than 2**32"), lambda: linear(
        Quantized(Spec((2**20, 2**16), "uint8"), Spec((2**20, 2**13), "uint8"), "nvfp4"), Spec((4, 2**17), "bfloat16"))),
    Case("tiles-linear", V, ("any product: ", "b_scale has shape (16, 4)", "128x4 tiles", "(128 rows x 4 blocks of 16 k)",
        "512", "(128, 4)",
        'scale_layout="linear"'),
        lambda: loose(numpy(*X), numpy(16, 32, **U8), fixed={**NV, "b_scale_layout": "128x4"}, b_scale=numpy(16, 4, **U8))),
    Case("tiles-strided", V, ("linear: ", "w.scale has shape (128, 4) and strides (16, 2)", "contiguous"), lambda: linear(
        Quantized(numpy(16, 32, **U8), strided(numpy(128, 4, **U8)), "nvfp4", scale_layout="128x4"))),
    Case("tiles-batch", V, ("any product: ", "b_scale", "for each of 3 matrices"), lambda: loose(
        numpy(3, *X), numpy(3, 16, 32, **U8), fixed={**NV, "b_scale_layout": "8x4"}, b_scale=numpy(2, 16, 4, **U8))),
    Case("tiles-layout", V, ("any product: ", "scale_layout is '4x4'", "'linear', '128x4', '8x4'"), lambda: loose(
        numpy(*X), numpy(16, 32, **U8), fixed={**NV, "b_scale_layout": "4x4"}, b_scale=numpy(16, 4, **U8))),
    # second scales
    Case("tensor-dtype", T, ("linear: ", "w.tensor_scale is int32", "wanted float32"), lambda: linear(nvfp4(tensor_scale=numpy(1, **I32)))),
    Case("tensor-shape", V, ("linear: ", "w.tensor_scale has shape (4,)", "one element, or (16,) or (16, 1)"), lambda: linear(
        nvfp4(tensor_scale=numpy(4, **F32)))),
    Case("tensor-shape-batch", V, ("matmul: ", "b.tensor_scale has shape (2,)", "(3,) for one per matrix", "(3, 16, 1)"), lambda: (
        cugemm.matmul, numpy(3, *X), Quantized(numpy(3, 16, 32, **U8), numpy(3, 16, 4, **U8), "nvfp4", tensor_scale=numpy(2, **F32)).T)),
    Case("tensor-alone", V, ("any product: ", "b_tensor_scale goes with scales that vary along k", "multiply it into b_scale"),
        lambda: loose(
        numpy(*X), numpy(64, 16), b_tensor=numpy(1, **F32))),
    Case("tensor-with-rows", V, ("any product: ", "a_tensor_scale goes with"), lambda: loose(
        numpy(*X), numpy(64, 16), a_scale=numpy(4, **F32), a_tensor=2.0)),
    # zero points
    Case("zero-dtype", T, ("linear: ", "w.zero is float32", "zero points are uint8"), lambda: linear(uint4(zero=numpy(16, 2, **F32)))),
    Case("zero-shape", V, ("linear: ", "w.zero has shape (1,)", "1 x 1 scales", "one zero point"), lambda: linear(
        uint4(1, 32, (1,)), numpy(4, 32))),
    Case("zero-of-int8", T, ("linear: ", "w.zero goes with uint4 values", "drop it"), lambda: linear(
        Quantized(numpy(16, 64, dtype="int8"), numpy(16, 1, **F32), ODD_ZERO, zero=numpy(16, 1, **U8)))),
    Case("zero-on-the-left", T, ("linear: ", "x is Quantized(uint4_g32", "zero points go with w only"), lambda: linear(
        numpy(16, 64), uint4(4, 64))),
    Case("zero-span", V, ("linear: ", "w.zero spans", "fewer than 2**32"), lambda: linear(
        Quantized(Spec((16, 32), "uint8"), Spec((16, 2), "float32"), "uint4_g32", zero=Spec((16, 2), "uint8", strides=(2**29, 1))),
        Spec(X, "bfloat16"))),
    # operands
    Case("two-scales-a", T, ("any product: ", "a is a Quantized", "drop a_scale"),
        lambda: loose(fp8(4), numpy(64, 16), a_scale=numpy(1, **F32))),
    Case("two-scales-b", T, ("any product: ", "b is a Quantized", "drop b_scale"), lambda: loose(
        numpy(*X), fp8(16).T, b_scale=numpy(1, **F32))),
    Case("axis", V, ("matmul: ", "b is Quantized(nvfp4", "with k along axis 1", "pass b.T"), lambda: (cugemm.matmul, numpy(*X), nvfp4())),
    Case("axis-left", V, ("linear: ", "x is Quantized(mxfp8", "with k along axis 0", "pass x.T"),
        lambda: linear(numpy(16, 4), mxfp8(64, 4).T)),
    Case("packed-k", V, ("linear: ", "k = 64", "k = 66", "w is packed, two values a byte"), lambda: linear(nvfp4(16, 66))),
    Case("panels", V, ("any product: ", "b has shape (2, 16, 64)", "(k/128, n, 128)"), lambda: loose(
        numpy(4, 128), numpy(2, 16, 64), fixed={"b_axes": "pnk"})),
    Case("panels-rank", V, ("any product: ", "b has shape (16, 128)", "wanted a 3-D array"), lambda: loose(
        numpy(4, 128), numpy(16, 128), fixed={"b_axes": "pnk"})),
    Case("panels-k", V, ("any product: ", "k = 128", "k = 256"), lambda: loose(numpy(4, 128), numpy(2, 16, 128), fixed={"b_axes": "pnk"})),
    # bias
    Case("bias-number", T, ("linear: ", "bias is a float", "(16,)"), lambda: (cugemm.linear, numpy(*X), numpy(16, 64), 1.0)),
    Case("bias-2d", V, ("any product: ", "bias has shape (4, 16)", "n = 16", "wanted (16,)."), lambda: loose(
        numpy(*X), numpy(64, 16), bias=numpy(4, 16))),
    Case("bias-2d-shape", V, ("any product", "bias has shape (5, 16)", "(16,) or (4, 16)"), lambda: loose(
        numpy(*X), numpy(64, 16), op=gpu_formats.ANY_2D, bias=numpy(5, 16))),
    Case("bias-experts", V, ("any product: ", "bias has shape (3, 16)", "(16,) or (2, 16)"), lambda: grouped(
        "indices", numpy(4, **I32), bias=numpy(3, 16))),
    Case("bias-dtype", T, ("any product: ", "bias is int32"), lambda: grouped("indices", numpy(4, **I32), bias=numpy(2, 16, **I32))),
    Case("bias-stride", V, ("any product: ", "bias has stride 2", "contiguous copy"), lambda: grouped(
        "indices", numpy(4, **I32), bias=strided(numpy(2, 16)))),
    # groups
    Case("masked-count", V, ("any product: ", "segments has shape (3,)", "b holds 2 matrices", "(2,)"), lambda: masked(numpy(3, **I32))),
    Case("masked-matrices", V, ("any product: ", "a (3, 4, 64) has 3 matrices", "b (2, 16, 64) has 2"), lambda: grouped(
        "masked", numpy(2, **I32), numpy(3, *X))),
    Case("masked-rank", V, ("any product: ", "a has shape (4, 64)", "wanted a 3-D array"), lambda: grouped("masked", numpy(2, **I32))),
    Case("masked-dtype", T, ("any product: ", "segments is float32", "int32 or int64"), lambda: masked(numpy(2, **F32))),
    Case("masked-missing", T, ("any product: ", "segments is missing", "int32 or int64"), lambda: masked(None)),
    Case("masked-negative", V, ("any product: ", "segments has 1 value outside [0, 4]"), lambda: masked(np.array([4, -1], np.int32))),
    Case("masked-past", V, ("any product: ", "segments has 2 values outside [0, 4]"), lambda: masked(np.array([5, 2**40]))),
    Case("indices-rows", V, ("any product: ", "segments has shape (5,)", "a has 4 rows", "(4,), or (4, several)"), lambda: grouped(
        "indices", numpy(5, **I32))),
    Case("indices-3d", V, ("any product: ", "segments has shape (4, 1, 1)", "1-D or 2-D"),
        lambda: grouped("indices", numpy(4, 1, 1, **I32))),
    Case("indices-2d-values", V, ("any product: ", "segments has 2 values outside [", ", 2)", "matrices of b"), lambda: grouped(
        "indices", np.array([[0, 1], [2, 0], [1, 1], [0, -7]], np.int32))),
    Case("indices-2d-strided", V, ("any product: ", "segments", "strides (8, 2)", "contiguous"), lambda: grouped(
        "indices", strided(numpy(4, 2, **I32)))),
    Case("indices-2d-rows", V, ("any product: ", "segments has shape (4, 2)", "1-D"), lambda: grouped(
        "indices", numpy(4, 2, **I32), rows=numpy(4, **I32))),
    Case("rows-dtype", T, ("any product: ", "rows is float32", "int32 or int64"), lambda: grouped(
        "indices", numpy(4, **I32), rows=numpy(4, **F32))),
    Case("rows-count", V, ("any product: ", "segments has shape (4,)", "6 rows", "(6,)"), lambda: grouped(
        "indices", numpy(4, **I32), rows=numpy(6, **I32))),
    Case("rows-values", V, ("any product: ", "rows has 2 values outside [", ", 4)", "rows of a"), lambda: grouped(
        "indices", numpy(3, **I32), rows=np.array([4, 0, -2]))),
    Case("indptr-empty", V, ("any product: ", "segments is empty"), lambda: grouped("indptr", numpy(0, **I32))),
    Case("indptr-many", V, ("any product: ", "segments names 3 segments", "2 matrices", "pass experts"), lambda: grouped(
        "indptr", numpy(4, **I32))),
    Case("indptr-experts", V, ("any product: ", "experts has shape (2,)", "3 segments"), lambda: grouped(
        "indptr", numpy(4, **I32), experts=numpy(2, **I32))),
    Case("lens-many", V, ("any product: ", "segments names 3 segments"), lambda: grouped("lens", numpy(3, **I32))),
    Case("pairs-out-shape", V, ("any product: ", "out has shape (8, 16)", "(4, 2, 16)"), lambda: grouped(
        "indices", numpy(4, 2, **I32), out=numpy(8, 16))),
    Case("pairs-out-strides", V, ("any product: ", "out has strides (48, 16, 1)", "lie as one"), lambda: grouped(
        "indices", numpy(4, 2, **I32), out=numpy(4, 3, 16)[:, :2])),
    # Quantized
    Case("q-format", V, ("Quantized: ", "format is 'nvfp5'", "nvfp4"),
        lambda: (Quantized, numpy(16, 32, **U8), numpy(16, 4, **U8), "nvfp5")),
    Case("q-format-type", V, ("Quantized: ", "format is 4"), lambda: (Quantized, numpy(16, 32, **U8), numpy(16, 4, **U8), 4)),
    Case("q-data", V, ("Quantized: ", "data has shape (64,)", "[rows, k]"), lambda: (Quantized, numpy(64, **U8), numpy(4, **U8), "nvfp4")),
    Case("q-data-list", T, ("Quantized: data",), lambda: (Quantized, [[1]], numpy(4, **U8), "nvfp4")),
    Case("q-zero-list", T, ("Quantized: zero",), lambda: (Quantized, numpy(16, 32, **U8), numpy(16, 2, **F32), "uint4_g32", {"zero": [1]})),
    Case("q-axis", V, ("Quantized: ", "k_axis is 2", "data has shape (16, 32)"), lambda: (nvfp4, {"k_axis": 2})),
    Case("q-axis-batch", V, ("Quantized: ", "k_axis is 0, the batch axis"), lambda: (
        Quantized, numpy(2, 16, 32, **U8), numpy(2, 16, 4, **U8), "nvfp4", {"k_axis": 0})),
    Case("q-shape", V, ("Quantized: ", "shape is (16, 32)", "data (16, 32) of format nvfp4 holds (16, 64)"), lambda: (
        nvfp4, {"shape": (16, 32)})),
    Case("q-scale-count", V, ("Quantized: ", "scale has shape (16, 2)", "nvfp4 of (16, 64) has 16 x 4 scales"),
        lambda: (nvfp4, {"scale": (16, 2)})),
    Case("q-scale-tiles", V, ("Quantized: ", "scale has shape (16, 4)", "16 x 4, padded to 128 x 4 scales"), lambda: (
        nvfp4, {"scale_layout": "128x4"})),
    Case("q-scale-stack", V, ("Quantized: ", "scale has shape (7, 4)", "4 x 4 scales for each matrix"), lambda: (
        Quantized, numpy(3, 4, 32, **U8), numpy(7, 4, **U8), "nvfp4")),
    Case("q-layout", V, ("Quantized: ", "scale_layout is '4x128'", "'128x4'"), lambda: (nvfp4, {"scale_layout": "4x128"})),
    Case("q-layout-floats", V, ("Quantized: ", "scale_layout is '128x4'", "fp8_row are floats, always linear"), lambda: (
        fp8, {"scale_layout": "128x4"})),
    Case("q-prepared", V, ("Quantized: ", "layout is 'shuffled'", "'canonical'"), lambda: (nvfp4, {"layout": "shuffled"})),
    Case("q-tensor", V, ("Quantized: ", "format fp8_row has no tensor_scale", "multiply it into scale"), lambda: (
        fp8, {"tensor_scale": numpy(1, **F32)})),
    Case("q-no-zero", V, ("Quantized: ", "format uint4_g32 needs zero"), lambda: (
        Quantized, numpy(16, 32, **U8), numpy(16, 2, **F32), "uint4_g32")),
    Case("q-a-zero", V, ("Quantized: ", "format int4_g32 has no zero points", "drop zero"), lambda: (
        Quantized, numpy(16, 32, **U8), numpy(16, 2, **F32), "int4_g32", {"zero": numpy(16, 2, **U8)})),
    Case("q-zero-shape", V, ("Quantized: ", "zero has shape (16, 1)", "scale has (16, 2)"), lambda: (uint4, {"zero": numpy(16, 1, **U8)})),
    # parts of a Quantized
    Case("part-integer", V, ("Quantized: ", "index 3 of shape (16, 64)", "wanted slices"), lambda: (lambda: nvfp4()[3],)),
    Case("part-many", V, ("Quantized: ", "index", "wanted slices"), lambda: (lambda: nvfp4()[:, :, :],)),
    Case("part-array", V, ("Quantized: ", "index", "wanted slices"), lambda: (lambda: nvfp4()[:, np.arange(3)],)),
    Case("part-step", V, ("Quantized: ", "rows 0:16:2 of 16"), lambda: (lambda: nvfp4()[::2],)),
    Case("part-k", V, ("Quantized: ", "k 0:24:1 of 64", "blocks of 16"), lambda: (lambda: nvfp4()[:, :24],)),
    Case("part-k-transposed", V, ("Quantized: ", "k 8:64:1 of 64", "blocks of 32"), lambda: (lambda: mxfp8().T[8:],)),
    Case("part-rows-of-blocks", V, ("Quantized: ", "rows 64:256:1 of 256", "blocks of 128"), lambda: (
        lambda: fp8(256, 256, "fp8_block", (2, 2))[64:],)),
    Case("part-tiles-k", V, ("Quantized: ", "scales in 128x4 tiles of shape (128, 4)", "along rows only"), lambda: (
        lambda: nvfp4(128, scale=(128, 4), scale_layout="128x4")[:, :32],)),
    Case("part-tiles-rows", V, ("Quantized: ", "rows 64:256:1 of 256", "blocks of 128"), lambda: (
        lambda: nvfp4(256, scale=(256, 4), scale_layout="128x4")[64:],)),
    Case("part-list", V, ("Quantized: ", "index list", "wanted slices"), lambda: (lambda: stack()[[0, 1]],)),
    Case("part-array-stack", V, ("Quantized: ", "index ndarray", "wanted slices"), lambda: (lambda: stack()[np.arange(2)],)),
    Case("part-mask", V, ("Quantized: ", "index (ndarray, slice", "wanted slices"),
        lambda: (lambda: stack()[np.ones(3, bool), :],)),
    Case("part-bool", V, ("Quantized: ", "index True", "wanted slices"), lambda: (lambda: stack()[True],)),
    Case("part-none", V, ("Quantized: ", "index None", "wanted slices"), lambda: (lambda: stack()[None],)),
    Case("part-float", V, ("Quantized: ", "index 1.0", "wanted slices"), lambda: (lambda: stack()[1.0],)),
    Case("part-ellipses", V, ("Quantized: ", "index (Ellipsis, Ellipsis)", "wanted slices"), lambda: (lambda: stack()[..., ...],)),
    Case("part-ellipsis-many", V, ("Quantized: ", "index", "wanted slices"), lambda: (lambda: stack()[..., :, :, :, :],)),
    Case("part-ellipsis-integer", V, ("Quantized: ", "index (Ellipsis, 3)", "wanted slices"), lambda: (lambda: stack()[..., 3],)),
    Case("part-past", IndexError, ("Quantized: ", "index 3 is outside the stack of 3 matrices"), lambda: (lambda: stack()[3],)),
    Case("part-before", IndexError, ("Quantized: ", "index -4 is outside the stack of 3"), lambda: (lambda: stack()[-4],)),
    Case("part-backwards", V, ("Quantized: ", "a step of -1", "wanted 1 or more"), lambda: (lambda: stack()[::-1],)),
    Case("part-text", V, ("Quantized: ", "rows of 16 is cut by slice('a', 'b', None)", "integers"), lambda: (
        lambda: nvfp4()[slice("a", "b")],)),
    Case("part-text-stack", V, ("Quantized: ", "the stack of 3 is cut by slice('a'",), lambda: (lambda: stack()[slice("a", None)],)),
    Case("part-step-zero", V, ("Quantized: ", "rows of 16 is cut by", "zero"), lambda: (lambda: nvfp4()[::0],)),
    Case("part-iterated", T, ("Quantized: ", "(16, 64)", "take slices"), lambda: (lambda: list(nvfp4()),)),
    Case("part-tensor", V, ("Quantized: ", "tensor_scale has shape (5,)", "cannot be cut"), lambda: (
        lambda: nvfp4(tensor_scale=numpy(5, **F32))[:8],)),
    Case("q-axis-type", T, ("Quantized: ", "k_axis is a str", "int"), lambda: (nvfp4, {"k_axis": "a"})),
    Case("q-axis-bool", T, ("Quantized: ", "k_axis is a bool", "int"), lambda: (nvfp4, {"k_axis": True})),
    Case("q-shape-type", T, ("Quantized: ", "shape is a int", "tuple", "(16, 64)"), lambda: (nvfp4, {"shape": 5})),
    Case("q-layout-type", T, ("Quantized: ", "scale_layout is a ndarray", "string"), lambda: (
        nvfp4, {"scale_layout": np.array(["linear"])})),
    Case("q-prepared-type", T, ("Quantized: ", "layout is a list", "string"), lambda: (nvfp4, {"layout": ["canonical"]})),
    Case("q-stack-rows-together", V, ("Quantized: ", "scale has shape (12, 1)", "4 x 1 scales for each matrix"), lambda: (
        Quantized, numpy(3, 4, 64, **F8), numpy(12, 1, **F32), "fp8_row")),
    Case("q-stack-two-axes", V, ("Quantized: ", "scale has shape (3, 4)", "4 x 1 scales for each matrix"), lambda: (
        Quantized, numpy(3, 4, 64, **F8), numpy(3, 4, **F32), "fp8_row")),
    Case("part-tiles-flat", V, ("Quantized: ", "scales in 8x4 tiles of shape (64,)"), lambda: (
        lambda: nvfp4(scale=(64,), scale_layout="8x4")[:8],)),
]  # fmt: skip


F8_16 = numpy(16, 128, **F8)
S16 = numpy(16, 1, **F32)
U8_16 = numpy(16, 64, **U8)
ODDS: dict[str, Any] = {"array": numpy(2, **F32), "list": [1, 2], "dict": {}, "float": 128.0, "long": 10**400, "text": "?"}
"""What no option may be."""


def option(function: Callable[..., Any], *arrays: Any, **named: Any) -> Callable[[str, Any], Any]:
    return lambda role, value: function(*arrays, **{**named, role: value})


GROUPED = (F8_16, numpy(2, 16, 128, **F8), S16, numpy(2, 1, 1, **F32), np.array([0, 8, 16], np.int32))
MASKED = (numpy(2, 16, 128, **F8), numpy(2, 16, 128, **F8), numpy(2, 16, 1, **F32), numpy(2, 1, 1, **F32), numpy(2, **I32), 4)
CODES = (U8_16, numpy(512, **U8))
OPTIONS: list[tuple[Callable[[str, Any], Any], str]] = [
    (option(cugemm.gemm_fp8_nt_groupwise, F8_16, F8_16, S16, numpy(1, 1, **F32), scale_major_mode="K"), role)
    for role in ("scale_granularity_mnk", "scale_major_mode", "backend", "out_dtype")
]
OPTIONS += [
    (option(cugemm.group_gemm_fp8_nt_groupwise, *GROUPED), role)
    for role in ("scale_granularity_mnk", "scale_major_mode", "mma_sm", "backend")
]
OPTIONS += [
    (option(cugemm.group_deepgemm_fp8_nt_groupwise, *GROUPED), "scale_granularity_mnk"),
    (option(cugemm.batch_deepgemm_fp8_nt_groupwise, *MASKED), "scale_granularity_mnk"),
    (option(cugemm.m_grouped_fp8_gemm_nt_contiguous, (F8_16, S16), GROUPED[1::2], numpy(16, 16), numpy(16, **I32)), "use_psum_layout"),
    (option(cugemm.fp8_gemm_nt, (F8_16, S16), (F8_16, numpy(1, 1, **F32)), numpy(16, 16)), "recipe"),
    (option(cugemm.fp8_gemm_nt, (F8_16, S16), (F8_16, S16), numpy(16, 16), recipe_b=(1, 128)), "recipe_a"),
]
OPTIONS += [
    (option(cugemm.moe_gemm_fp8_nt_groupwise, *GROUPED), role) for role in ("scale_granularity_mnk", "scale_major_mode", "is_gated")
]
OPTIONS += [
    (option(cugemm.group_gemm_mxfp8_mxfp4_nt_groupwise, *GROUPED), role)
    for role in ("mma_sm", "tile_m", "tile_n", "tile_k", "swap_ab", "scale_layout")
]
OPTIONS += [(option(cugemm.grouped_mm_fp4, *GROUPED), role) for role in ("block_size", "scale_layout", "backend")]
OPTIONS += [(option(cugemm.shuffle_matrix_sf_a, numpy(128, 4, **U8), 128), "num_elts_per_sf")]
OPTIONS += [(option(cugemm.shuffle_matrix_a, numpy(128, 4)), "epilogue_tile_m")]
OPTIONS += [
    (option(cugemm.fp4_quantize, numpy(16, 64), 1.0), role)
    for role in ("sf_vec_size", "sf_use_ue8m0", "is_sf_swizzled_layout", "is_sf_8x4_layout", "is_global_scale_inversed", "backend")
]
OPTIONS += [
    (option(cugemm.nvfp4_quantize, numpy(128, 64), 1.0), role)
    for role in ("sfLayout", "do_shuffle", "sf_vec_size", "backend", "per_token_activation")
]
OPTIONS += [
    (option(cugemm.mxfp8_quantize, numpy(16, 64)), role) for role in ("is_sf_swizzled_layout", "alignment", "sf_swizzle_layout", "backend")
]
OPTIONS += [(option(cugemm.make_nvfp4_global_scale, numpy(16, 64)), "per_token_activation")]
OPTIONS += [
    (option(cugemm.e2m1_and_ufp8sf_scale_to_float, *CODES), role)
    for role in ("sf_vec_size", "ufp8_type", "is_sf_swizzled_layout", "is_sf_8x4_layout")
]
OPTIONS += [(option(cugemm.mxfp4_dequantize_host, U8_16, numpy(16, 4, **U8)), "group_size")]
OPTIONS += [
    (option(cugemm.per_token_group_quant_8bit, numpy(16, 128), **({} if role == "group_size" else {"group_size": 128})), role)
    for role in ("group_size", "eps", "dst_dtype", "column_major_scales", "scale_tma_aligned", "scale_ue8m0", "backend")
]


@pytest.mark.parametrize("at", range(len(OPTIONS)), ids=lambda at: f"{at}-{OPTIONS[at][1]}")
def test_odd_options(at: int) -> None:
    """Arrays, containers and numbers of another type are refused by name, as are values that compare equal to the right ones."""
    call, role = OPTIONS[at]
    for kind, value in ODDS.items():
        if (role, kind) in (("eps", "float"), ("epilogue_tile_m", "long")):  # right ones
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            call(role, value)
        text = str(caught.value)
        assert role in text and ": " in text, (kind, text)
        for leak in ("truth value", "unhashable", "array(", "unsupported operand"):
            assert leak not in text, (kind, text)
    if role not in ("dst_dtype", "out_dtype", "sf_swizzle_layout", "recipe"):  # those have a meaning for None
        with pytest.raises((TypeError, ValueError), match=role):
            call(role, None)


def test_numbers_that_compare_equal_do_not_stay_in_caches() -> None:
    """A refused spelling, and NumPy's integers, leave nothing behind that a later call would get."""
    call = option(cugemm.gemm_fp8_nt_groupwise, F8_16, F8_16, S16, numpy(1, 1, **F32), scale_major_mode="K")
    for wrong in ((1.0, 128.0, 128.0), (True, 128, 128), (1, 128)):
        with pytest.raises(ValueError, match="scale_granularity_mnk"):
            call("scale_granularity_mnk", wrong)
    for right in ((np.int64(1), np.int32(128), 128), [1, 128, 128], (1, 128, 128)):
        assert call("scale_granularity_mnk", right).shape == (16, 16)


def test_out_dtype_is_a_quantized() -> None:
    with pytest.raises(TypeError, match="linear: out_dtype"):
        cugemm.linear(numpy(4, 64), numpy(16, 64), out_dtype=nvfp4())
    with pytest.raises(TypeError, match="any product: b_scale_layout is a list"):
        gemm_options(gpu_formats.ANY, None, b_scale_layout=["linear"])


def test_global_scale_of_mxfp4() -> None:
    q, sf = numpy(16, 32, **U8) + np.uint8(0x22), numpy(512, **U8) + np.uint8(127)
    call = option(cugemm.e2m1_and_ufp8sf_scale_to_float, q, sf, sf_vec_size=32, ufp8_type=0)
    for g in (2.0, np.float64(2), np.array(2, np.float32), np.full((1, 1, 1), 2, np.float32)):
        x = call("global_scale_tensor", g)
        assert (x.shape, x.dtype) == ((16, 64), np.float32) and (x == 2.0).all()
    for wrong in (np.ones(1), np.ones(1, np.int32), "2"):
        with pytest.raises(TypeError, match="global_scale_tensor"):
            call("global_scale_tensor", wrong)
    for long in (10**400, 1e300, float("nan")):
        with pytest.raises(ValueError, match="global_scale_tensor"):
            call("global_scale_tensor", long)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    check(case)


# --- values on a device, in debug mode --------------------------------------------------------------------------------------------


def test_scales_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN codes are counted where they scale something, not in what pads the tiles; arrays in host memory pose as a GPU's."""
    monkeypatch.setattr(values.driver, "synchronize", lambda stream: None)

    def refusal(w: Quantized) -> str:
        arrays = {A: numpy(*X), B: w.data, B_SCALE: w.scale, B_TENSOR: w.tensor_scale}
        views: list[Any] = [None] * len(gpu_formats.ANY.roles)
        for position, x in arrays.items():
            views[position] = None if x is None else framework_of(x, "x").view(x, "x")
        fmt = w.format
        scale = {} if fmt.scale is FP32 else {"b_scale_element": fmt.scale.name, "b_scale_layout": w.scale_layout}
        options = gemm_options(gpu_formats.ANY, None, b_axes="nk", b_element=fmt.element.name, b_block=fmt.block, **scale)
        call = gpu_formats.ANY.check(tuple(views), options)
        try:
            values.check(gpu_formats.ANY, call, tuple(views), 0, 0)
        except ValueError as error:
            return str(error)
        return ""

    for layout in ("linear", "128x4", "8x4"):
        for make, wrong, fine in ((nvfp4, (0x7F, 0xFF), 0x7E), (mxfp8, (0xFF,), 0x7F)):
            for code in wrong:
                linear = make().scale + np.uint8(fine)
                padding = formats.tiled(np.ones_like(linear), layout) == 0
                for count in (0, 2):
                    linear[3, 1] = linear[15, 0] = code if count else fine
                    tiles = np.where(padding, np.uint8(0xFF), formats.tiled(linear, layout))
                    q = replace(make(scale=tiles.shape, scale_layout=layout), scale=tiles)
                    assert refusal(q).startswith("any product: b_scale has 2 values not finite" if count else "")
                    assert bool(refusal(q)) == bool(count)
    assert "b_tensor_scale has 1 value not finite" in refusal(nvfp4(tensor_scale=np.array([np.inf], np.float32)))
    assert refusal(fp8()) == ""
