"""Dense products of block-scaled formats and FlashInfer's small entries, on host memory: numbers, layouts of scales, short forms, errors.

Expected values: float64 products of operands that oracles.py and format_oracles.py decode.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import format_oracles as formats
import ml_dtypes
import numpy as np
import oracles
import pytest
from dense_cases import answer, entries, flags, normal, side, tiles, turned
from format_oracles import FORMATS, Operand
from oracles import check_random, given_case
from test_api import FRAMEWORKS, Framework, column_major, each
from test_errors import BF16, E4M3, F32, FP16, Case, Hidden, jax_array, numpy, poisoned, readonly, tensor

import cugemm
from cugemm import Quantized, Spec, launch
from cugemm.formats import FORMATS as KNOWN

jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")

Array = np.ndarray[Any, Any]
eager = pytest.mark.parametrize("framework", FRAMEWORKS[:3], ids=repr)
writable = pytest.mark.parametrize("framework", FRAMEWORKS[:2], ids=repr)


def as_dtype(codes: Array, dtype: str) -> Array:
    return codes.view(getattr(ml_dtypes, dtype))


# --- mxfp8 ------------------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("shape", [(17, 13, 96), (3, 130, 70), (129, 5, 257), (1, 1, 1)], ids=str)
def test_mm_mxfp8(framework: Framework, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = side(1, "mxfp8", m, k), side(2, "mxfp8_e5m2", n, k)
    case = answer(a, b)
    sa, sb = tiles(a), tiles(b)
    check_random(case, framework.call(cugemm.mm_mxfp8, a.data, turned(b), sa.ravel(), sb.ravel()), BF16)
    check_random(case, framework.call(cugemm.mm_mxfp8, a.data, np.ascontiguousarray(turned(b)), sa, sb, out_dtype=F32), F32)
    codes = [as_dtype(s, "float8_e8m0fnu") for s in (sa, sb)]
    check_random(case, framework.call(cugemm.mm_mxfp8, column_major(a.data), turned(b), *codes, out_dtype=FP16, backend="cudnn"), FP16)
    eight = framework.call(cugemm.mm_mxfp8, a.data, turned(b), tiles(a, "8x4"), sb, use_8x4_sf_layout=True, skip_check=True)
    check_random(case, eight, BF16)
    linear = framework.call(
        cugemm.mm_mxfp8, a.data, turned(b), a.scale, np.ascontiguousarray(b.scale.T), out_dtype=F32, scale_layout="linear"
    )
    check_random(case, linear, F32)


@each
def test_bmm_mxfp8_scales_lie_over_all_rows(framework: Framework) -> None:
    a, b = side(3, "mxfp8", 3, 50, 96), side(4, "mxfp8", 3, 47, 96)  # 150 and 141 rows: matrices share tiles
    case = answer(a, b)
    sa, sb = (tiles(s, flat=True).ravel() for s in (a, b))
    check_random(case, framework.call(cugemm.bmm_mxfp8, a.data, turned(b), sa, sb, BF16), BF16)
    check_random(case, framework.call(cugemm.bmm_mxfp8, a.data, np.ascontiguousarray(turned(b)), sa, sb, dtype=F32, backend="cutlass"), F32)
    columns = np.ascontiguousarray(b.scale.swapaxes(1, 2))
    check_random(case, framework.call(cugemm.bmm_mxfp8, a.data, turned(b), a.scale, columns, F32, scale_layout="linear"), F32)


def test_bmm_mxfp8_broadcasts_and_takes_matrices() -> None:
    a, b = side(5, "mxfp8", 3, 50, 64), side(6, "mxfp8", 1, 9, 64)
    sa, sb = tiles(a, flat=True), tiles(b, flat=True)
    check_random(answer(a, b), cugemm.bmm_mxfp8(a.data, turned(b), sa, sb, F32), F32)
    one = answer(side(5, "mxfp8", 50, 64), side(6, "mxfp8", 9, 64))
    x, w = side(5, "mxfp8", 50, 64), side(6, "mxfp8", 9, 64)
    check_random(one, cugemm.bmm_mxfp8(x.data, turned(w), tiles(x), tiles(w)), BF16)


def test_bmm_mxfp8_of_quantized_has_tiles_for_each_matrix() -> None:
    a, b = side(7, "mxfp8", 3, 50, 64), side(8, "mxfp8", 3, 9, 64)
    qa, qb = (
        Quantized(s.data, tiles(s), "mxfp8", scale_layout="128x4") for s in (a, b)
    )  # fmt: skip
    check_random(answer(a, b), cugemm.bmm_mxfp8(qa, qb.T, dtype=F32), F32)
    flat = tiles(b, flat=True)
    check_random(answer(a, b), cugemm.bmm_mxfp8(qa, turned(b), None, flat, F32), F32)


# --- fp4 x fp4 --------------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("shape", [(17, 13, 96), (3, 130, 66), (129, 5, 258), (1, 1, 2)], ids=str)
def test_mm_fp4(framework: Framework, format: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = side(9, format, m, k), side(10, format, n, k)
    case = answer(a, b, alpha=0.375)
    sa, sb = tiles(a), tiles(b)
    how: dict[str, Any] = {"out_dtype": F32, **flags(format)}
    square = framework.name in {"jax", "jit"} and sb.shape[0] == sb.shape[1]
    check_random(case, framework.call(cugemm.mm_fp4, a.data, turned(b), sa, sb.ravel() if square else sb, 0.375, **how), F32)
    alpha = np.full((1,), 0.375, np.float32)
    check_random(case, framework.call(cugemm.mm_fp4, a.data, np.ascontiguousarray(turned(b)), sa.ravel(), sb.ravel(), alpha, **how), F32)
    if framework.name not in {"jax", "jit"}:
        check_random(case, framework.call(cugemm.mm_fp4, a.data, turned(b), sa, sb.T, alpha[0], **how), F32)
    eight = framework.call(cugemm.mm_fp4, a.data, turned(b), tiles(a, "8x4"), sb.ravel(), alpha, use_8x4_sf_layout=True, **how)
    check_random(case, eight, F32)
    rows = np.ascontiguousarray(b.scale.T)
    check_random(case, framework.call(cugemm.mm_fp4, a.data, turned(b), a.scale, rows, alpha, scale_layout="linear", **how), F32)
    own = "float8_e4m3fn" if format == "nvfp4" else "float8_e8m0fnu"
    how |= {"out_dtype": None, "backend": "cutlass", "enable_pdl": False, "skip_check": True}
    check_random(case, framework.call(cugemm.mm_fp4, a.data, turned(b), as_dtype(sa, own), as_dtype(sb.ravel(), own), alpha, **how), BF16)


@writable
def test_mm_fp4_writes_out_and_keeps_the_positions(framework: Framework) -> None:
    a, b = side(11, "mxfp4", 5, 64), side(12, "mxfp4", 7, 64)
    case = answer(a, b)
    arrays = [framework.into(x) for x in (a.data, turned(b), tiles(a), tiles(b).T)]
    out = framework.into(oracles.poison((5, 7), FP16))
    assert cugemm.mm_fp4(*arrays, None, None, out, 32, False, "auto", False, True) is out
    check_random(case, framework.back(out), FP16)


def test_mm_fp4_float4_tensors() -> None:
    a, b = side(13, "nvfp4", 5, 64), side(14, "nvfp4", 7, 64)
    x, w = (torch.from_numpy(s.data).view(torch.float4_e2m1fn_x2) for s in (a, b))
    y = cugemm.mm_fp4(x, w.T, torch.from_numpy(tiles(a)), torch.from_numpy(tiles(b)).T, out_dtype=torch.float32)
    check_random(answer(a, b), y.numpy(), F32)


def test_mm_fp4_every_scale_code() -> None:
    """A block each for all e4m3 codes and all e8m0 codes, NaN among them."""
    for format in ("nvfp4", "mxfp4"):
        block = FORMATS[format].block[1]
        codes = np.arange(256, dtype=np.uint8)[:, None]
        one = np.full((1, 1), 0x38 if format == "nvfp4" else 127, np.uint8)
        payloads = oracles.encode(np.tile([[1.0, 0.0]], (256, block // 2)), "e2m1x2"), oracles.encode(np.ones((1, block)), "e2m1x2")
        a, b = (
            Operand(format, data, scale, None, None, formats.values(format, data, scale))
            for data, scale in zip(payloads, (codes, one), strict=True)
        )
        y = cugemm.mm_fp4(a.data, turned(b), tiles(a), tiles(b), out_dtype=F32, **flags(format))
        oracles.check_exact(answer(a, b), y, F32)


# --- 16-bit x fp4 -----------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_mm_fp4_of_16_bit_activations_and_block_scales(framework: Framework, format: str, dtype: str) -> None:
    x, b = normal(15, 17, 96, dtype=dtype), side(16, format, 13, 96)
    case = answer(x, b, alpha=2.0)
    codes = tiles(b).ravel()
    check_random(case, framework.call(cugemm.mm_fp4, x, turned(b), None, codes, 2.0, **flags(format)), dtype)
    check_random(case, framework.call(cugemm.mm_fp4, x, turned(b), codes, alpha=2.0, out_dtype=F32, **flags(format)), F32)  # short form
    rows = np.ascontiguousarray(b.scale.T)
    how: dict[str, Any] = {"b_descale": rows, "alpha": 2.0, "scale_layout": "linear", "out_dtype": F32, **flags(format)}
    check_random(case, framework.call(cugemm.mm_fp4, x, np.ascontiguousarray(turned(b)), **how), F32)


@each
def test_mm_fp4_of_16_bit_activations_and_float_scales(framework: Framework) -> None:
    rng = np.random.default_rng(17)
    x, w = normal(18, 5, 64), oracles.encode(rng.standard_normal((64, 7)) * 2, "e2m1")
    packed = oracles.encode(oracles.decode(w, "e2m1"), "e2m1x2", k_axis=-2)
    s = rng.uniform(0.5, 2, 7).astype(np.float32)
    case = given_case(x, w, "bf16", "e2m1", b_scale=s[None], b_block=(0, 1), random_signs=True)
    for b in (w, packed):
        check_random(case, framework.call(cugemm.mm_fp4, x, b, s), BF16)
        check_random(case, framework.call(cugemm.mm_fp4, x, b, b_descale=s[None], out_dtype=F32), F32)


@each
def test_mm_bf16_fp4(framework: Framework) -> None:
    x, b = normal(19, 17, 96), side(20, "nvfp4", 130, 96)
    case, scales = answer(x, b, alpha=0.625), tiles(b)
    alpha = np.full((1,), 0.625, np.float32)

    def both(x: Any, *weight: Any, **how: Any) -> Any:
        prepared = cugemm.prepare_bf16_fp4_weights(*weight, backend="cudnn")
        return cugemm.mm_bf16_fp4(x, *prepared, backend="cudnn", **how)

    check_random(case, framework.call(both, x, b.data, scales, alpha), BF16)
    check_random(case, framework.call(both, x, b.data, scales.ravel(), alpha, out_dtype=F32, enable_pdl=False), F32)
    check_random(answer(x, b), framework.call(both, x, b.data, as_dtype(scales, E4M3)), BF16)


def test_mm_bf16_fp4_prepared_is_what_came() -> None:
    b = side(21, "nvfp4", 5, 64)
    scales = tiles(b)
    prepared = cugemm.prepare_bf16_fp4_weights(b.data, scales, None, backend="cute-dsl", block_size=16)
    assert prepared[0] is b.data and prepared[1] is scales and prepared[2] is None


# --- Quantized operands -----------------------------------------------------------------------------------------------------------


@eager
@pytest.mark.parametrize("layout", ["linear", "128x4", "8x4"])
def test_quantized_operands_bring_their_scales(framework: Framework, layout: str) -> None:
    def quantized(s: Operand, format: str) -> Quantized:
        scale = s.scale if layout == "linear" else tiles(s, layout)
        return Quantized(framework.into(s.data), framework.into(scale), format, scale_layout=layout)

    a, b = side(22, "nvfp4", 17, 96), side(23, "mxfp4", 13, 96)
    x, y = side(24, "mxfp8", 17, 96), side(25, "mxfp8", 13, 96)
    check_random(answer(a, b), framework.back(cugemm.mm_fp4(quantized(a, "nvfp4"), quantized(b, "mxfp4").T, out_dtype=F32)), F32)
    check_random(answer(x, y), framework.back(cugemm.mm_mxfp8(quantized(x, "mxfp8"), quantized(y, "mxfp8").T, out_dtype=F32)), F32)
    check_random(answer(x, b), framework.back(cugemm.linear(quantized(x, "mxfp8"), quantized(b, "mxfp4"), out_dtype=F32)), F32)
    check_random(answer(x, b), framework.back(cugemm.matmul(quantized(x, "mxfp8"), quantized(b, "mxfp4").T, out_dtype=F32)), F32)
    bits = normal(26, 17, 96)
    check_random(answer(bits, b), framework.back(cugemm.mm_fp4(framework.into(bits), quantized(b, "mxfp4").T)), BF16)
    loose = framework.into(tiles(a))
    check_random(answer(a, b), framework.back(cugemm.mm_fp4(framework.into(a.data), quantized(b, "mxfp4").T, loose)), BF16)
    check_random(answer(bits, a), framework.back(cugemm.mm_bf16_fp4(framework.into(bits), quantized(a, "nvfp4"))), BF16)


# --- every entry ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(entries(2, 2, 32)) - {"tinygemm_bf16"}))
def test_empty(name: str) -> None:
    """No row or no column: an empty result of the right shape."""
    for shape in ((0, 5, 32), (5, 0, 32)):
        entry = entries(*shape)[name]
        result = entry.call(entry.arrays, None, BF16)
        assert result.shape == entry.case.exact.shape and result.dtype == ml_dtypes.bfloat16


# --- the whole table --------------------------------------------------------------------------------------------------------------


WEIGHTS = list(KNOWN)
ACTIVATIONS = [name for name, fmt in KNOWN.items() if not fmt.zero]


@pytest.mark.parametrize("weight", [None, *WEIGHTS], ids=str)
def test_linear_of_every_pair(weight: str | None) -> None:
    """Against float64 of what `dequantize` says, which has tests of its own."""
    x, w = normal(27, 5, 160), normal(28, 33, 160)
    q = w if weight is None else cugemm.quantize(w, weight)
    right = (w if weight is None else cugemm.dequantize(q, F32)).astype(np.float64).T
    for activations in (None, *ACTIVATIONS):
        left = (x if activations is None else cugemm.dequantize(cugemm.quantize(x, activations), F32)).astype(np.float64)
        y = cugemm.linear(x, q, activations=activations, out_dtype=F32)
        bound = 2.0**-23 * (1.5 * 160 + 16) * (np.abs(left) @ np.abs(right))
        assert (np.abs(y - left @ right) <= bound).all(), activations
        if activations is None and weight is not None:
            assert (np.abs(cugemm.matmul(x, q.T, out_dtype=F32) - left @ right) <= bound).all()


@eager
@pytest.mark.parametrize(
    "activations", ["fp8_row", "mxfp8", "mxfp4", "nvfp4", "nvfp4_row", "int8_row", "int8_group", "int4_g64", "fp4_row"]
)
def test_activations_in_every_framework(framework: Framework, activations: str) -> None:
    x, w = normal(29, 2, 3, 128, dtype=FP16), normal(30, 16, 128, dtype=FP16)
    q = cugemm.quantize(w, "nvfp4")
    weight = Quantized(framework.into(q.data), framework.into(q.scale), "nvfp4", tensor_scale=framework.into(q.tensor_scale))
    bias = normal(31, 16, dtype=F32)
    y = framework.call(cugemm.linear, x, weight, bias, activations=activations)
    left = cugemm.dequantize(cugemm.quantize(x.reshape(6, 128), activations), F32).astype(np.float64)
    exact = (left @ cugemm.dequantize(q, F32).astype(np.float64).T + bias).reshape(2, 3, 16)
    assert y.dtype == np.float16 and (np.abs(y - exact) <= 2.0**-10 * np.abs(exact) + 1e-3).all()


def test_quantized_linear_in_every_format() -> None:
    x, w = normal(32, 6, 128), normal(33, 16, 128)
    for weight, activations in itertools.product(WEIGHTS, (None, "nvfp4", "mxfp8", "int8_row")):
        layer = cugemm.QuantizedLinear(w, format=weight, activations=activations)
        y = layer(x, out_dtype=F32)
        oracles.check_bits(y, cugemm.linear(x, cugemm.quantize(w, weight), activations=activations, out_dtype=F32))
        assert (layer.in_features, layer.out_features) == (128, 16)
        reference = x.astype(np.float64) @ w.astype(np.float64).T
        assert np.linalg.norm(y - reference) < 0.3 * np.linalg.norm(reference), (weight, activations)


# --- mm_fp8 with prepared weights -------------------------------------------------------------------------------------------------


@eager
def test_mm_fp8_prepared(framework: Framework) -> None:
    case = oracles.random_case(34, 5, 24, 384, "e4m3", "e4m3", alpha=0.5)
    weight = np.ascontiguousarray(case.b.T)

    def prepared(a: Any, w: Any, **how: Any) -> Any:
        b = cugemm.prepare_low_latency_gemm_weights(w, {})
        assert tuple(b.shape) == (3, 24, 128)
        return cugemm.mm_fp8(a, b, 0.5, **how)

    check_random(case, framework.call(prepared, case.a, weight), BF16)
    check_random(case, framework.call(prepared, case.a, weight, out_dtype=F32, backend="trtllm_low_latency"), F32)
    panels = np.ascontiguousarray(np.moveaxis(weight.reshape(24, 3, 128), 1, 0))  # a contiguous copy of the layout serves as well
    check_random(case, framework.call(cugemm.mm_fp8, case.a, panels, 0.5, out_dtype=F32), F32)


def test_mm_fp8_prepared_takes_scales_of_columns_and_blocks() -> None:
    for block in ((0, 1), (128, 1), (128, 128)):
        case = oracles.random_case(35, 5, 130, 256, "e5m2", "e4m3", a_block=(1, 128) if block[0] else (1, 0), b_block=block, bias=True)
        panels = cugemm.prepare_low_latency_gemm_weights(np.ascontiguousarray(case.b.T))
        y = cugemm.mm_fp8(case.a, panels, None, F32, a_scale=case.a_scale, b_scale=case.b_scale, bias=case.bias)
        check_random(case, y, F32)


def test_prepare_low_latency_is_a_view() -> None:
    w = torch.zeros(24, 256, dtype=torch.float8_e4m3fn)
    b = cugemm.prepare_low_latency_gemm_weights(w)
    assert b.shape == (2, 24, 128) and b.data_ptr() == w.data_ptr()
    spec = cugemm.prepare_low_latency_gemm_weights(Spec((24, 256), E4M3))
    assert (spec.shape, spec.strides) == ((2, 24, 128), (128, 256, 1))


# --- SVDQuant ---------------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("bias", [False, True])
def test_mm_nvfp4_svdquant(framework: Framework, bias: bool) -> None:
    a, b = side(36, "nvfp4", 17, 96), side(37, "nvfp4", 13, 96)
    d, l1 = normal(38, 17, 5), normal(39, 13, 5)
    shift = normal(40, 13) if bias else None
    residual = answer(a, b, alpha=0.25)
    low = 0.25 * (d.astype(np.float64) @ l1.astype(np.float64).T) + (0 if shift is None else shift.astype(np.float64))
    case = residual._replace(exact=residual.exact + low, peak=residual.peak + np.abs(low) + 4)
    how: dict[str, Any] = {} if shift is None else {"bias": shift}
    arrays = (a.data, b.data, tiles(a).ravel(), tiles(b))
    check_random(case, framework.call(cugemm.mm_nvfp4_svdquant, *arrays, np.full((1,), 0.25, np.float32), d, l1, **how), BF16)
    check_random(case, framework.call(cugemm.mm_nvfp4_svdquant, *arrays, 0.25, d, l1, backend="cutlass", enable_pdl=True, **how), BF16)


@writable
def test_mm_nvfp4_svdquant_writes_out(framework: Framework) -> None:
    a, b = side(36, "nvfp4", 17, 96), side(37, "nvfp4", 13, 96)
    d, l1 = np.zeros((17, 4), ml_dtypes.bfloat16), normal(39, 13, 4)
    out = framework.into(oracles.poison((17, 13), F32))
    arrays = [framework.into(x) for x in (a.data, b.data, tiles(a), tiles(b), np.ones((1,), np.float32), d, l1)]
    assert cugemm.mm_nvfp4_svdquant(*arrays, None, out) is out
    check_random(answer(a, b), framework.back(out), F32)


@eager
def test_svdquant_linear(framework: Framework) -> None:
    m, n, k, r = 20, 24, 64, 8
    x, smooth = normal(41, m, k), np.random.default_rng(42).uniform(0.5, 2, k).astype(ml_dtypes.bfloat16)
    b, l2t, l1, bias = side(43, "nvfp4", n, k), normal(44, k, r), normal(45, n, r), normal(46, n)
    amax = np.abs((x.astype(np.float32) * smooth.astype(np.float32)).astype(ml_dtypes.bfloat16).astype(np.float32)).max()
    g = np.array([448 * 6 / amax], np.float32)
    alpha = np.array([1 / (g[0] * 3)], np.float32)
    y = framework.call(cugemm.svdquant_linear, x, b.data, tiles(b).ravel(), alpha, smooth, l2t, l1, g, bias)
    q, sf = cugemm.nvfp4_quantize_smooth(x, smooth, g)
    d = cugemm.matmul(x, l2t)
    oracles.check_bits(y, cugemm.mm_nvfp4_svdquant(q, b.data, sf, tiles(b), alpha, d, l1, bias))
    decoded = (x.astype(np.float64) * smooth.astype(np.float64)) @ b.values.T
    exact = decoded * g[0] * alpha[0] + alpha[0] * (d.astype(np.float64) @ l1.astype(np.float64).T) + bias.astype(np.float64)
    assert np.linalg.norm(y - exact) < 0.15 * np.linalg.norm(exact)  # fp4 rounding of x; the bits are held above


# --- small products in place ------------------------------------------------------------------------------------------------------


@writable
@pytest.mark.parametrize("bias", [False, True])
def test_tinygemm(framework: Framework, bias: bool) -> None:
    case = oracles.random_case(47, 3, 33, 360, "bf16", "bf16", bias=bias)
    for dtype in (BF16, F32):
        out = framework.into(oracles.poison((3, 33), dtype))
        weight = framework.into(np.ascontiguousarray(case.b.T))
        assert cugemm.tinygemm_bf16(framework.into(case.a), weight, out, framework.into(case.bias) if bias else None, True) is None
        check_random(case, framework.back(out), dtype)


ROUTERS = {
    cugemm.mm_M1_16_K7168_N128: (7168, 128, BF16),
    cugemm.mm_M1_16_K7168_N256: (7168, 256, F32),
    cugemm.mm_M1_16_K6144_N256: (6144, 256, F32),
}


@writable
@pytest.mark.parametrize("fn", ROUTERS, ids=lambda fn: fn.__name__)
def test_routers(framework: Framework, fn: Any) -> None:
    k, n, dtype = ROUTERS[fn]
    for m in (1, 16):
        x, w = normal(48, m, k), normal(49, n, k)
        case = given_case(x, w.T, "bf16", "bf16", random_signs=True)
        out = framework.into(oracles.poison((m, n), dtype))
        assert fn(framework.into(x), framework.into(w).T, out, launch_with_pdl=False) is None
        check_random(case, framework.back(out), dtype)


def test_in_place_entries_refuse_jax() -> None:
    with pytest.raises(TypeError, match=r"tinygemm_bf16: out is written in place, and JAX arrays are immutable; call cugemm.linear"):
        cugemm.tinygemm_bf16(jax_array(4, 64), jax_array(16, 64), jax_array(4, 16))
    with pytest.raises(TypeError, match=r"mm_M1_16_K7168_N128: out is written in place.*call cugemm.mm_bf16"):
        cugemm.mm_M1_16_K7168_N128(jax_array(4, 7168), jax_array(7168, 128), numpy(4, 128))


# --- names and positions ----------------------------------------------------------------------------------------------------------

SIGNATURES = {
    "mm_bf16": "a b bias=None pdl=False out=None out_dtype backend",
    "bmm_bf16": "A B out=None out_dtype backend",
    "bmm_fp8": "A B A_scale B_scale dtype out=None backend",
    "mm_fp8": "a b alpha=None out_dtype out=None backend",
    "mm_mxfp8": "a b a_descale b_descale out=None out_dtype use_8x4_sf_layout=False backend",
    "bmm_mxfp8": "A B A_scale B_scale dtype out=None backend",
    "mm_fp4": (
        "a b a_descale b_descale alpha=None out_dtype out=None block_size=16 use_8x4_sf_layout=False backend use_nvfp4=True enable_pdl=True"
    ),
    "gemm_fp8_nt_groupwise": "a b a_scale b_scale scale_major_mode=None mma_sm=1 scale_granularity_mnk out=None out_dtype=None backend",
    "gemm_fp8_nt_blockscaled": "a b a_scale b_scale scale_major_mode mma_sm=1 out=None out_dtype=None",
    "fp8_blockscale_gemm_sm90": "input weight input_scale=None weight_scale=None out=None out_dtype=None",
    "mm_bf16_fp4": "a b b_descale alpha=None *backend *out_dtype=None *out=None *block_size=16 *enable_pdl=True",
    "prepare_bf16_fp4_weights": "b b_descale alpha=None *backend *block_size=16",
    "prepare_low_latency_gemm_weights": "w permutation_indices_cache",
    "mm_nvfp4_svdquant": "a b a_sf b_sf alpha d l1 bias=None out=None backend enable_pdl=None",
    "svdquant_linear": ("x weight_fp4 weight_sf alpha pre_quant_scale l2t_smoothed l1_scaled global_scale bias=None enable_pdl=None"),
    "tgv_gemm_sm100": "a b bias pdl=False out=None",
    "tinygemm_bf16": "input weight out bias=None use_pdl=False",
    "mm_M1_16_K7168_N128": "mat_a mat_b out launch_with_pdl=True",
    "mm_M1_16_K7168_N256": "mat_a mat_b out launch_with_pdl=True",
    "mm_M1_16_K6144_N256": "mat_a mat_b out launch_with_pdl=True",
}
"""FlashInfer 0.6.18: parameters in their order, `*` before keyword-only ones, defaults where they are plain values."""
SKIP_CHECK = set(SIGNATURES) - {
    "mm_fp8", "fp8_blockscale_gemm_sm90", "prepare_bf16_fp4_weights", "prepare_low_latency_gemm_weights", "svdquant_linear",
    "tgv_gemm_sm100",
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_flashinfer_positions(name: str) -> None:
    fn = getattr(cugemm.gemm, name)
    parameters = dict(inspect.signature(fn).parameters)
    positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    wanted = [word.partition("=") for word in SIGNATURES[name].split() if not word.startswith("*")]
    assert [p.name for p in positional] == [word for word, _, _ in wanted]
    for word, _, default in (w.lstrip("*").partition("=") for w in SIGNATURES[name].split()):
        if default:
            assert str(parameters[word].default) == default, word
    assert ("skip_check" in parameters) == (name in SKIP_CHECK)
    assert getattr(cugemm, name) is fn and name in cugemm.__all__ and name in cugemm.gemm.__all__


BACKENDS = {
    "mm_mxfp8": ("cutlass", "cute-dsl", "cudnn", "b12x", "auto", "portable"),
    "bmm_mxfp8": ("cudnn", "cutlass", "auto"),
    "mm_fp4": ("cudnn", "cutlass", "cute-dsl", "b12x", "auto"),
    "mm_bf16_fp4": ("cudnn", "cute-dsl", "auto"),
    "mm_nvfp4_svdquant": ("cutlass", "auto"),
}


def small(name: str) -> tuple[Any, ...]:
    """Positional operands of an entry."""
    u8, tiled = {"dtype": "uint8"}, numpy(128, 4, dtype="uint8")
    fp8, flat = {"dtype": E4M3}, numpy(512, dtype="uint8")
    return {
        "mm_mxfp8": (numpy(4, 64, **fp8), numpy(64, 16, **fp8), flat, flat),
        "bmm_mxfp8": (numpy(2, 4, 64, **fp8), numpy(2, 64, 16, **fp8), flat, flat),
        "mm_fp4": (numpy(4, 32, **u8), numpy(32, 16, **u8), tiled, tiled),
        "mm_bf16_fp4": (numpy(4, 64), numpy(16, 32, **u8), tiled),
        "mm_nvfp4_svdquant": (numpy(4, 32, **u8), numpy(16, 32, **u8), tiled, flat, 1.0, numpy(4, 8), numpy(16, 8)),
    }[name]


@pytest.mark.parametrize(("name", "backend"), [(name, b) for name, found in BACKENDS.items() for b in found])
def test_backends(name: str, backend: str) -> None:
    assert getattr(cugemm, name)(*small(name), backend=backend).dtype == ml_dtypes.bfloat16


# --- explain, plan ----------------------------------------------------------------------------------------------------------------


def test_explain_says_how_scales_lie() -> None:
    fp8, sf = {"dtype": E4M3}, numpy(512, dtype="uint8")
    text = cugemm.explain(
        cugemm.mm_mxfp8, numpy(4, 64, **fp8), numpy(64, 16, **fp8), numpy(8, 4, dtype="uint8"), sf, use_8x4_sf_layout=True
    )
    assert "a_descale: e8m0 codes, one for each 1 x 32 values (rows x k), in 8x4 tiles\n" in text
    assert "b_descale: e8m0 codes, one for each 1 x 32 values (rows x k), in 128x4 tiles\n" in text
    text = cugemm.explain(cugemm.bmm_mxfp8, *small("bmm_mxfp8"))
    assert "A_scale: e8m0 codes, one for each 1 x 32 values (rows x k), in 128x4 tiles, the rows of all matrices together\n" in text
    text = cugemm.explain(
        cugemm.mm_fp4, *small("mm_fp4")[:2], numpy(4, 4, dtype="uint8"), numpy(4, 16, dtype="uint8"), scale_layout="linear"
    )
    assert "b_descale: e4m3 codes, one for each 1 x 16 values (rows x k), linear\n" in text
    text = cugemm.explain(cugemm.linear, numpy(4, 64), cugemm.quantize(numpy(16, 64), "uint4_g64"), activations="nvfp4")
    assert "x.tensor_scale: float32, one for each all x all values" in text and "w.zero: uint8, one for each scale\n" in text
    text = cugemm.explain(cugemm.mm_fp8, numpy(4, 256, **fp8), cugemm.prepare_low_latency_gemm_weights(numpy(16, 256, **fp8)))
    assert "  b: panels of 128 k, each n x 128\n" in text
    q = Quantized(numpy(3, 16, 64, **fp8), numpy(3, 128, 4, dtype="uint8"), "mxfp8", scale_layout="128x4")
    assert "b.scale: e8m0 codes, one for each 1 x 32 values (rows x k), in 128x4 tiles, each matrix by itself\n" in cugemm.explain(
        cugemm.matmul, numpy(3, 4, 64), q.T
    )


@pytest.mark.parametrize("kind", ["numpy", "torch", "jax", "Spec"])
def test_explain_of_several_launches(kind: str) -> None:
    """Results that do not exist yet stand beside real arrays."""

    def make(*shape: int, dtype: str = BF16) -> Any:
        return {"numpy": numpy, "torch": tensor, "jax": jax_array, "Spec": lambda *s, dtype: Spec(s, dtype)}[kind](*shape, dtype=dtype)

    x, sf, one = make(4, 64), make(512, dtype="uint8"), make(1, dtype=F32)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], int]] = [
        (cugemm.linear, (x, make(16, 64)), {"activations": "nvfp4"}, 2),
        (cugemm.bmm_fp8, (x, make(64, 16), one), {}, 2),
        (cugemm.fp8_blockscale_gemm_sm90, (x, make(16, 64)), {}, 3),
        (cugemm.mm_nvfp4_svdquant, (make(4, 32, dtype="uint8"), make(16, 32, dtype="uint8"), sf, sf, one, make(4, 8), make(16, 8)), {}, 2),
        (cugemm.svdquant_linear, (x, make(16, 32, dtype="uint8"), sf, one, make(64), make(64, 8), make(16, 8), one, make(16)), {}, 4),
    ]
    before = launch.launches
    for fn, args, how, launches in calls:
        text = cugemm.explain(fn, *args, **how)
        assert len([line for line in text.splitlines() if line.startswith("cugemm.")]) == launches, text
    assert launch.launches == before


def test_plan_sees_all_of_a_quantized() -> None:
    x, w = normal(50, 4, 64), normal(51, 16, 64)
    one, two = cugemm.quantize(w, "nvfp4"), cugemm.quantize(w, "nvfp4", scale_layout="128x4")
    plan = cugemm.plan(cugemm.linear, x, one)
    oracles.check_bits(plan(x, one), cugemm.linear(x, one))
    with pytest.raises(ValueError, match="argument 1"):
        plan(x, two)
    with pytest.raises(ValueError, match="argument 1"):
        plan(x, Quantized(one.data, one.scale, "nvfp4"))  # no tensor scale


def test_plan_sees_pairs_options_and_frameworks() -> None:
    a, b = (cugemm.quantize(normal(seed, 8, 256), name) for seed, name in ((52, "fp8_group"), (53, "fp8_block")))
    longer = [cugemm.quantize(normal(seed, 8, 512), name) for seed, name in ((54, "fp8_group"), (55, "fp8_block"))]
    d = np.zeros((8, 8), ml_dtypes.bfloat16)
    plan = cugemm.plan(cugemm.fp8_gemm_nt, (a.data, a.scale), (b.data, b.scale), d)
    plan((a.data, a.scale), (b.data, b.scale), d)
    oracles.check_bits(d, cugemm.linear(a, b))
    with pytest.raises(ValueError, match="argument 0"):
        plan(*((q.data, q.scale) for q in longer), d)
    x = normal(56, 4, 64)
    with pytest.raises(ValueError, match="argument 1"):
        cugemm.plan(cugemm.quantize, x, "fp8_row")(x, "nvfp4")
    plan = cugemm.plan(cugemm.linear, x, x)
    with pytest.raises(ValueError, match=r"argument 0 is .* of PyTorch; the plan was made for .* of NumPy"):
        plan(torch.zeros(4, 64, dtype=torch.bfloat16), x)
    stand_in = cugemm.plan(cugemm.linear, cugemm.Spec((4, 64), "bfloat16", device=-1), cugemm.Spec((4, 64), "bfloat16", device=-1))
    oracles.check_bits(stand_in(x, x), cugemm.linear(x, x))


def test_a_number_is_checked_in_every_call() -> None:
    """... not just in the first one of its kind, whose checks are remembered."""
    given = {
        "weight_fp4": np.zeros((32, 32), np.uint8), "weight_sf": np.zeros((128, 4), np.uint8), "alpha": 1.0,
        "pre_quant_scale": normal(57, 1, 64)[0], "l2t_smoothed": normal(58, 64, 8), "l1_scaled": normal(59, 32, 8),
    }  # fmt: skip
    x = normal(60, 4, 64)
    cugemm.svdquant_linear(x, **given, global_scale=1.0)
    launched = launch.launches
    with pytest.raises(ValueError, match=r"^svdquant_linear: global_scale is a number outside float32"):
        cugemm.svdquant_linear(x, **given, global_scale=1e300)
    assert launch.launches == launched


# --- errors -----------------------------------------------------------------------------------------------------------------------

V, T = ValueError, TypeError
U8 = {"dtype": "uint8"}
FP8 = {"dtype": E4M3}


def mx(**how: Any) -> tuple[Any, ...]:
    """mm_mxfp8 of 4 x 16 x 64 with one argument replaced."""
    given = dict(zip(("a", "b", "a_descale", "b_descale"), small("mm_mxfp8"), strict=True))
    return cugemm.mm_mxfp8, given | how


def bmx(**how: Any) -> tuple[Any, ...]:
    given = dict(zip(("A", "B", "A_scale", "B_scale"), small("bmm_mxfp8"), strict=True))
    return cugemm.bmm_mxfp8, given | how


def fp4(**how: Any) -> tuple[Any, ...]:
    given = dict(zip(("a", "b", "a_descale", "b_descale"), small("mm_fp4"), strict=True))
    return cugemm.mm_fp4, given | how


def w4(**how: Any) -> tuple[Any, ...]:
    given = dict(zip(("a", "b", "b_descale"), small("mm_bf16_fp4"), strict=True))
    return cugemm.mm_bf16_fp4, given | how


def prepare(**how: Any) -> tuple[Any, ...]:
    return cugemm.prepare_bf16_fp4_weights, {"b": numpy(16, 32, **U8), "b_descale": numpy(128, 4, **U8)} | how


def svd(**how: Any) -> tuple[Any, ...]:
    given = dict(zip(("a", "b", "a_sf", "b_sf", "alpha", "d", "l1"), small("mm_nvfp4_svdquant"), strict=True))
    return cugemm.mm_nvfp4_svdquant, given | how


def lowrank(**how: Any) -> tuple[Any, ...]:
    names = ("x", "weight_fp4", "weight_sf", "alpha", "pre_quant_scale", "l2t_smoothed", "l1_scaled", "global_scale")
    arrays = (numpy(4, 64), numpy(16, 32, **U8), numpy(512, **U8), 1.0, numpy(64), numpy(64, 8), numpy(16, 8), 1.0)
    return cugemm.svdquant_linear, dict(zip(names, arrays, strict=True)) | how


def router(a: Any = None, b: Any = None, out: Any = None) -> tuple[Any, ...]:
    a, b = numpy(4, 7168) if a is None else a, numpy(128, 7168).T if b is None else b
    return cugemm.mm_M1_16_K7168_N128, {"mat_a": a, "mat_b": b, "out": poisoned(4, 128) if out is None else out}


def tiny(**how: Any) -> tuple[Any, ...]:
    return cugemm.tinygemm_bf16, {"input": numpy(4, 64), "weight": numpy(16, 64), "out": poisoned(4, 16)} | how


def nvfp4_weight() -> Any:
    return Quantized(numpy(16, 32, **U8), numpy(16, 4, **U8), "nvfp4")


REFUSED = [
    # mm_mxfp8
    Case("mxfp8-k", V, ("mm_mxfp8: ", "a (4, 64) has k = 64", "b (32, 16)", "k = 32", "agree"), lambda: mx(b=numpy(32, 16, **FP8))),
    Case("mxfp8-not-turned", V, ("mm_mxfp8: ", "b (16, 64)", "pass b.T"), lambda: mx(b=numpy(16, 64, **FP8))),
    Case("mxfp8-rank", V, ("mm_mxfp8: ", "a has shape (1, 4, 64)", "2-D"), lambda: mx(a=numpy(1, 4, 64, **FP8))),
    Case("mxfp8-bf16", T, ("mm_mxfp8: ", "a is bfloat16", "wanted float8_e4m3fn", "cugemm.quantize"), lambda: mx(a=numpy(4, 64))),
    Case("mxfp8-uint8", T, ("mm_mxfp8: ", "b is uint8", "e4m3 or e5m2?", "b.view("), lambda: mx(b=numpy(64, 16, **U8))),
    Case("mxfp8-missing", T, ("mm_mxfp8: ", "b_descale is missing", "array of e8m0 scales"), lambda: mx(b_descale=None)),
    Case("mxfp8-number", T, ("mm_mxfp8: ", "a_descale is a number", "array of e8m0 scales"), lambda: mx(a_descale=1.0)),
    Case(
        "mxfp8-float-scale", T, ("mm_mxfp8: ", "a_descale is float32", "e8m0 codes", "uint8"),
        lambda: mx(a_descale=numpy(4, 2, dtype=F32)),
    ),
    Case(
        "mxfp8-linear-unsaid", V, ("mm_mxfp8: ", "a_descale has shape (4, 2)", "128x4 tiles", "512", "(128, 4)", 'scale_layout="linear"'),
        lambda: mx(a_descale=numpy(4, 2, **U8)),
    ),
    Case("mxfp8-scale-long", V, ("mm_mxfp8: ", "b_descale has shape (1024,)", "512"), lambda: mx(b_descale=numpy(1024, **U8))),
    Case("mxfp8-8x4-unsaid", V, ("mm_mxfp8: ", "a_descale has shape (32,)", "128x4"), lambda: mx(a_descale=numpy(32, **U8))),
    Case(
        "mxfp8-8x4", V, ("mm_mxfp8: ", "a_descale has shape (512,)", "8x4 tiles", "take 32 contiguous bytes"),
        lambda: mx(use_8x4_sf_layout=True),
    ),
    Case(
        "mxfp8-linear-shape", V, ("mm_mxfp8: ", "b_descale has shape (16, 2)", "linear", "(2, 16)"),
        lambda: mx(a_descale=numpy(4, 2, **U8), b_descale=numpy(16, 2, **U8), scale_layout="linear"),
    ),
    Case("mxfp8-gaps", V, ("mm_mxfp8: ", "a_descale", "strides (2,)", "contiguous"), lambda: mx(a_descale=numpy(1024, **U8)[::2])),
    Case("mxfp8-layout", V, ("mm_mxfp8: ", "scale_layout is '4x4'", "'linear'", "'128x4'"), lambda: mx(scale_layout="4x4")),
    Case(
        "mxfp8-layouts", V, ("mm_mxfp8: ", "use_8x4_sf_layout is True", "scale_layout is 'linear'", "drop one"),
        lambda: mx(scale_layout="linear", use_8x4_sf_layout=True),
    ),
    Case("mxfp8-trtllm", V, ("mm_mxfp8: ", "backend is 'trtllm'", "shuffled", "backend='auto'"), lambda: mx(backend="trtllm")),
    Case("mxfp8-backend", V, ("mm_mxfp8: ", "backend is 'cublas'", "'cutlass'", "'b12x'"), lambda: mx(backend="cublas")),
    Case("mxfp8-out", V, ("mm_mxfp8: ", "out has shape (4, 15)", "(4, 16)"), lambda: mx(out=poisoned(4, 15))),
    Case("mxfp8-out-dtype", V, ("mm_mxfp8: ", "out_dtype is float8_e4m3fn", "bfloat16, float16, float32"), lambda: mx(out_dtype=E4M3)),
    Case("mxfp8-out-both", V, ("mm_mxfp8: ", "out is bfloat16, but out_dtype is float16"), lambda: mx(out=poisoned(4, 16), out_dtype=FP16)),
    Case("mxfp8-out-readonly", V, ("mm_mxfp8: ", "out is read-only"), lambda: mx(out=readonly(poisoned(4, 16)))),
    Case("mxfp8-framework", T, ("mm_mxfp8: ", "b_descale is a PyTorch array", "NumPy"), lambda: mx(b_descale=tensor(512, **U8))),
    Case("mxfp8-quantized-scale", T, ("mm_mxfp8: ", "a is a Quantized", "drop a_descale"), lambda: mx(a=mxfp8_activation())),
    Case(
        "mxfp8-quantized-axis", V, ("mm_mxfp8: ", "b is Quantized(mxfp8", "pass b.T"),
        lambda: mx(b=mxfp8_activation(), b_descale=None),
    ),
    # bmm_mxfp8
    Case("bmm_mxfp8-k", V, ("bmm_mxfp8: ", "A (2, 4, 64)", "B (2, 32, 16)", "agree"), lambda: bmx(B=numpy(2, 32, 16, **FP8))),
    Case("bmm_mxfp8-batch", V, ("bmm_mxfp8: ", "A (2, 4, 64) has 2 batches", "has 3"), lambda: bmx(B=numpy(3, 64, 16, **FP8))),
    Case(
        "bmm_mxfp8-padded-per-matrix", V, ("bmm_mxfp8: ", "A_scale has shape (1024,)", "128x4 tiles", "take 512 contiguous bytes"),
        lambda: bmx(A_scale=numpy(1024, **U8)),
    ),
    Case("bmm_mxfp8-missing", T, ("bmm_mxfp8: ", "B_scale is missing", "e8m0"), lambda: bmx(B_scale=None)),
    Case("bmm_mxfp8-backend", V, ("bmm_mxfp8: ", "backend is 'trtllm'", "'cudnn'"), lambda: bmx(backend="trtllm")),
    Case("bmm_mxfp8-fp16", T, ("bmm_mxfp8: ", "A is float16", "wanted float8"), lambda: bmx(A=numpy(2, 4, 64, dtype=FP16))),
    # mm_fp4
    Case(
        "fp4-k", V, ("mm_fp4: ", "a (4, 32) has k = 64", "b (16, 16)", "k = 32", "two values a byte"), lambda: fp4(b=numpy(16, 16, **U8))
    ),
    Case("fp4-not-turned", V, ("mm_fp4: ", "b (16, 32)", "k = 32"), lambda: fp4(b=numpy(16, 32, **U8))),
    Case("fp4-float32", T, ("mm_fp4: ", "a is float32", "e2m1x2 is stored as uint8"), lambda: fp4(a=numpy(4, 32, dtype=F32))),
    Case("fp4-fp8", T, ("mm_fp4: ", "b is float8_e4m3fn", "e2m1x2 is stored as uint8"), lambda: fp4(b=numpy(32, 16, **FP8))),
    Case("fp4-missing", T, ("mm_fp4: ", "a_descale is missing", "array of e4m3 scales"), lambda: fp4(a_descale=None)),
    Case(
        "fp4-number", T, ("mm_fp4: ", "b_descale is missing", "a is uint8", "block scales on both sides", "pass a unquantised"),
        lambda: (cugemm.mm_fp4, *small("mm_fp4")[:2], 1.0),
    ),
    Case("fp4-numbers", T, ("mm_fp4: ", "a_descale is a number", "array of e4m3 scales"), lambda: fp4(a_descale=1.0, b_descale=1.0)),
    Case("fp4-float-scale", T, ("mm_fp4: ", "b_descale is float32", "e4m3 codes"), lambda: fp4(b_descale=numpy(16, dtype=F32))),
    Case(
        "fp4-e8m0-for-nvfp4", T, ("mm_fp4: ", "a_descale is float8_e8m0fnu", "e4m3 codes", "float8_e4m3fn"),
        lambda: fp4(a_descale=numpy(128, 4, dtype="float8_e8m0fnu")),
    ),
    Case("fp4-nvfp4-32", V, ("mm_fp4: ", "block_size is 32", "nvfp4 has blocks of 16", "use_nvfp4=False"), lambda: fp4(block_size=32)),
    Case("fp4-mxfp4-16", V, ("mm_fp4: ", "block_size is 16", "mxfp4 has blocks of 32", "block_size=32"), lambda: fp4(use_nvfp4=False)),
    Case(
        "fp4-mxfp4-scales-of-nvfp4", V, ("mm_fp4: ", "a_descale has shape (128, 8)", "4 blocks of 32 k", "512"),
        lambda: fp4(a=numpy(4, 64, **U8), b=numpy(64, 16, **U8), a_descale=numpy(128, 8, **U8), use_nvfp4=False, block_size=32),
    ),
    Case(
        "fp4-linear-unsaid", V, ("mm_fp4: ", "b_descale has shape (16, 4)", "128x4 tiles", 'scale_layout="linear"'),
        lambda: fp4(b_descale=numpy(16, 4, **U8)),
    ),
    Case(
        "fp4-linear-untransposed", V, ("mm_fp4: ", "b_descale has shape (16, 4)", "linear", "(4, 16)"),
        lambda: fp4(a_descale=numpy(4, 4, **U8), b_descale=numpy(16, 4, **U8), scale_layout="linear"),
    ),
    Case(
        "fp4-scale-sliced", V, ("mm_fp4: ", "b_descale has shape (128, 4) and strides (8, 1)", "contiguous"),
        lambda: fp4(b_descale=numpy(128, 8, **U8)[:, :4]),
    ),
    Case(
        "fp4-jax-turned", V, ("mm_fp4: ", "b_descale is a JAX array of shape (4, 128)", ".T copies", "(128, 4) or 1-D"),
        lambda: jax_fp4(16, jax_array(128, 4, **U8).T),
    ),
    Case(
        "fp4-jax-square", V, ("mm_fp4: ", "b_descale is a JAX array of shape (128, 128), which fits b_sf and b_sf.T", "b_sf.reshape(-1)"),
        lambda: jax_fp4(16, jax_array(128, 128, **U8), k=2048),
    ),
    Case(
        "fp4-jax-a-turned", V, ("mm_fp4: ", "a_descale is a JAX array of shape (4, 128)", ".T copies", "(128, 4) or 1-D"),
        lambda: (cugemm.mm_fp4, jax_array(4, 32, **U8), jax_array(32, 16, **U8), jax_array(4, 128, **U8), jax_array(512, **U8)),
    ),
    Case(
        "mxfp8-jax-turned", V, ("mm_mxfp8: ", "a_descale is a JAX array of shape (4, 128)", ".T copies", "(128, 4) or 1-D"),
        lambda: jax_mxfp8(jax_array(128, 4, **U8).T, jax_array(512, **U8)),
    ),
    Case(
        "mxfp8-jax-b-turned", V, ("mm_mxfp8: ", "b_descale is a JAX array of shape (4, 128)", ".T copies", "(128, 4) or 1-D"),
        lambda: jax_mxfp8(jax_array(512, **U8), jax_array(128, 4, **U8).T),
    ),
    Case(
        "mxfp8-jax-square", V, ("mm_mxfp8: ", "b_descale is a JAX array of shape (128, 128), which fits b_sf and b_sf.T", "reshape(-1)"),
        lambda: jax_mxfp8(jax_array(128, 128, **U8), jax_array(128, 128, **U8), k=4096),
    ),
    Case(
        "bmm-mxfp8-jax-turned", V, ("bmm_mxfp8: ", "B_scale is a JAX array of shape (2, 4, 128)", ".T copies", "(2, 128, 4) or 1-D"),
        lambda: (
            cugemm.bmm_mxfp8, jax_array(2, 4, 64, **FP8), jax_array(2, 64, 128, **FP8), jax_array(512, **U8), jax_array(2, 4, 128, **U8)
        ),
    ),
    Case("fp4-no-scale", T, ("mm_fp4: ", "b_descale is missing", "mm_fp4(a, b, scale_of_b)"), lambda: fp4(a=numpy(4, 64), **_NO_SCALES)),
    Case(
        "fp4-no-scale-but-alpha", T, ("mm_fp4: ", "b_descale is missing"),
        lambda: fp4(a=numpy(4, 64), alpha=numpy(1, dtype=F32), **_NO_SCALES),
    ),
    Case("fp4-list-8x4", V, ("mm_fp4: ", "use_8x4_sf_layout is", "True or False"), lambda: fp4(use_8x4_sf_layout=[True, False])),
    Case("fp4-array-nvfp4", T, ("mm_fp4: ", "use_nvfp4 is a ndarray", "True or False"), lambda: fp4(use_nvfp4=numpy(3))),
    Case("fp4-array-block", T, ("mm_fp4: ", "block_size is a ndarray", "16 for nvfp4 or 32 for mxfp4"), lambda: fp4(block_size=numpy(3))),
    Case("fp4-list-layout", V, ("mm_fp4: ", "scale_layout is", "'linear', '128x4', '8x4'"), lambda: fp4(scale_layout=["linear"])),
    Case("fp4-tensor-backend", T, ("mm_fp4: ", "backend is a ", "string"), lambda: fp4(backend=numpy(3))),
    Case(
        "mxfp8-array-8x4", T, ("mm_mxfp8: ", "use_8x4_sf_layout is a ndarray", "True or False"),
        lambda: (cugemm.mm_mxfp8, mxfp8_activation(), mxfp8_activation().T, {"use_8x4_sf_layout": numpy(3)}),
    ),
    Case(
        "bmm-mxfp8-array-layout", T, ("bmm_mxfp8: ", "scale_layout is a ndarray", "'linear', '128x4', '8x4'"),
        lambda: (cugemm.bmm_mxfp8, mxfp8_activation(), mxfp8_activation().T, {"scale_layout": numpy(3)}),
    ),
    Case(
        "prepare-quantized", T, ("prepare_bf16_fp4_weights: ", "b_descale is Quantized(nvfp4", "q.data and q.scale"),
        lambda: (cugemm.prepare_bf16_fp4_weights, numpy(16, 32, **U8), nvfp4_weight()),
    ),
    Case(
        "prepare-array-block", T, ("prepare_bf16_fp4_weights: ", "block_size is a ndarray", "16"),
        lambda: (cugemm.prepare_bf16_fp4_weights, numpy(16, 32, **U8), numpy(512, **U8), {"block_size": numpy(3)}),
    ),
    Case("fp4-jax-layout", V, ("mm_fp4: ", "scale_layout is '4x4'"), lambda: (*jax_fp4(16, jax_array(512, **U8)), {"scale_layout": "4x4"})),
    Case("fp4-alpha-shape", V, ("mm_fp4: ", "alpha is float32 of shape (2,)", "one element"), lambda: fp4(alpha=numpy(2, dtype=F32))),
    Case("fp4-alpha-int", V, ("mm_fp4: ", "alpha is int32", "float32"), lambda: fp4(alpha=numpy(1, dtype="int32"))),
    Case("fp4-trtllm", V, ("mm_fp4: ", "backend is 'trtllm'", "shuffle_matrix_a", "backend='auto'"), lambda: fp4(backend="trtllm")),
    Case("fp4-backend", V, ("mm_fp4: ", "backend is 'cublas'", "'b12x'"), lambda: fp4(backend="cublas")),
    Case("fp4-out", V, ("mm_fp4: ", "out has shape (16, 4)", "(4, 16)"), lambda: fp4(out=poisoned(16, 4))),
    Case("fp4-quantized-b", T, ("mm_fp4: ", "b is a Quantized", "drop a_descale and b_descale"), lambda: fp4(b=nvfp4_weight().T)),
    Case("fp4-quantized-a", T, ("mm_fp4: ", "a is a Quantized", "drop a_descale"), lambda: fp4(a=nvfp4_weight())),
    Case("fp4-quantized-axis", V, ("mm_fp4: ", "b is Quantized(nvfp4", "pass b.T"), lambda: fp4(b=nvfp4_weight(), b_descale=None)),
    Case(
        "fp4-16-bit-8x4", V, ("mm_fp4: ", "use_8x4_sf_layout is True", "16-bit activations have no block scales"),
        lambda: fp4(a=numpy(4, 64), a_descale=None, use_8x4_sf_layout=True),
    ),
    Case("fp4-16-bit-both", T, ("mm_fp4: ", "a is bfloat16", "takes no a_descale"), lambda: fp4(a=numpy(4, 64))),
    Case(
        "fp4-16-bit-unpacked-blocks", V, ("mm_fp4: ", "a (4, 64) has k = 64", "k = 128", "b is packed"),
        lambda: fp4(a=numpy(4, 64), b=numpy(64, 16, **U8), a_descale=None),
    ),
    Case(
        "fp4-16-bit-block-size", V, ("mm_fp4: ", "block_size is 32", "nvfp4"), lambda: fp4(a=numpy(4, 64), a_descale=None, block_size=32)
    ),
    # mm_bf16_fp4
    Case("bf16_fp4-fp16", T, ("mm_bf16_fp4: ", "a is float16", "wanted bfloat16"), lambda: w4(a=numpy(4, 64, dtype=FP16))),
    Case("bf16_fp4-b", T, ("mm_bf16_fp4: ", "b is int8", "uint8"), lambda: w4(b=numpy(16, 32, dtype="int8"))),
    Case("bf16_fp4-alpha", T, ("mm_bf16_fp4: ", "alpha is bfloat16", "float32"), lambda: w4(alpha=numpy(1))),
    Case("bf16_fp4-alpha-shape", V, ("mm_bf16_fp4: ", "alpha has shape (2,)", "one"), lambda: w4(alpha=numpy(2, dtype=F32))),
    Case("bf16_fp4-block", V, ("mm_bf16_fp4: ", "block_size is 32", "16"), lambda: w4(block_size=32)),
    Case("bf16_fp4-k", V, ("mm_bf16_fp4: ", "a (4, 64)", "b (16, 16)", "[n, k]", "k = 32"), lambda: w4(b=numpy(16, 16, **U8))),
    Case("bf16_fp4-missing", T, ("mm_bf16_fp4: ", "b_descale is missing", "e4m3"), lambda: w4(b_descale=None)),
    Case("bf16_fp4-scale", V, ("mm_bf16_fp4: ", "b_descale has shape (16, 4)", "128x4"), lambda: w4(b_descale=numpy(16, 4, **U8))),
    Case("bf16_fp4-backend", V, ("mm_bf16_fp4: ", "backend is 'cutlass'", "'cudnn'", "'cute-dsl'"), lambda: w4(backend="cutlass")),
    Case("prepare-b", T, ("prepare_bf16_fp4_weights: ", "b is float8_e4m3fn", "uint8"), lambda: prepare(b=numpy(16, 32, **FP8))),
    Case("prepare-rank", V, ("prepare_bf16_fp4_weights: ", "b has shape (32,)", "[n, k/2]"), lambda: prepare(b=numpy(32, **U8))),
    Case("prepare-missing", T, ("prepare_bf16_fp4_weights: ", "b is a builtins.NoneType", "pass an array"), lambda: prepare(b=None)),
    Case(
        "prepare-number", T, ("prepare_bf16_fp4_weights: ", "b_descale is a builtins.float", "pass an array"),
        lambda: prepare(b_descale=1.0),
    ),
    Case(
        "prepare-size", V, ("prepare_bf16_fp4_weights: ", "b_descale has shape (16, 4)", "128x4 tiles"),
        lambda: prepare(b_descale=numpy(16, 4, **U8)),
    ),
    Case("prepare-dtype", T, ("prepare_bf16_fp4_weights: ", "b_descale is float32"), lambda: prepare(b_descale=numpy(128, 4, dtype=F32))),
    Case(
        "prepare-alpha", T, ("prepare_bf16_fp4_weights: ", "alpha is float64", "float32"),
        lambda: prepare(alpha=numpy(1, dtype="float64")),
    ),
    Case("prepare-alpha-shape", V, ("prepare_bf16_fp4_weights: ", "alpha has shape (1, 1)"), lambda: prepare(alpha=numpy(1, 1, dtype=F32))),
    Case("prepare-block", V, ("prepare_bf16_fp4_weights: ", "block_size is 32"), lambda: prepare(block_size=32)),
    Case("prepare-backend", V, ("prepare_bf16_fp4_weights: ", "backend is 'b12x'", "'cudnn'"), lambda: prepare(backend="b12x")),
    Case("prepare-mixed", T, ("prepare_bf16_fp4_weights: ", "b_descale is a builtins.list"), lambda: prepare(b_descale=[1, 2])),
    # mm_fp8 with panels
    Case(
        "panels-width", V, ("mm_fp8: ", "b has shape (2, 16, 64)", "(k/128, n, 128)", "prepare_low_latency_gemm_weights"),
        lambda: (cugemm.mm_fp8, numpy(4, 256, **FP8), numpy(2, 16, 64, **FP8)),
    ),
    Case(
        "panels-k", V, ("mm_fp8: ", "a (4, 256) has k = 256", "b (3, 16, 128)", "k = 384"),
        lambda: (cugemm.mm_fp8, numpy(4, 256, **FP8), numpy(3, 16, 128, **FP8)),
    ),
    Case(
        "panels-scale", V, ("mm_fp8: ", "b_scale has shape (16, 1)", "(1, 16)"),
        lambda: (cugemm.mm_fp8, numpy(4, 256, **FP8), numpy(2, 16, 128, **FP8), {"b_scale": numpy(16, 1, dtype=F32)}),
    ),
    Case(
        "prepare-low-latency-k", V, ("prepare_low_latency_gemm_weights: ", "w has shape (16, 200)", "multiple of 128", "pad k"),
        lambda: (cugemm.prepare_low_latency_gemm_weights, numpy(16, 200, **FP8), {"permutation_indices_cache": {}}),
    ),
    Case(
        "prepare-low-latency-rank", V, ("prepare_low_latency_gemm_weights: ", "w has shape (256,)", "[n, k]"),
        lambda: (cugemm.prepare_low_latency_gemm_weights, numpy(256, **FP8)),
    ),
    Case(
        "prepare-low-latency-dtype", T, ("prepare_low_latency_gemm_weights: ", "w is bfloat16", "float8_e4m3fn"),
        lambda: (cugemm.prepare_low_latency_gemm_weights, numpy(16, 256)),
    ),
    Case(
        "prepare-low-latency-quantized", T, ("prepare_low_latency_gemm_weights: ", "w is Quantized", "its data"),
        lambda: (cugemm.prepare_low_latency_gemm_weights, mxfp8_activation()),
    ),
    Case(
        "prepare-low-latency-dlpack", T, ("prepare_low_latency_gemm_weights: ", "w is a Hidden", "reshaped"),
        lambda: (cugemm.prepare_low_latency_gemm_weights, Hidden(tensor(16, 256, **FP8))),
    ),
    # SVDQuant
    Case("svd-rank", V, ("mm_nvfp4_svdquant(d, l1): ", "d (4, 8) has k = 8", "l1 (16, 6)"), lambda: svd(l1=numpy(16, 6))),
    Case("svd-d-rows", V, ("mm_nvfp4_svdquant: ", "d has shape (5, 8)", "a has shape (4, 32)", "rows"), lambda: svd(d=numpy(5, 8))),
    Case("svd-l1-rows", V, ("mm_nvfp4_svdquant: ", "l1 has shape (15, 8)", "b has shape (16, 32)"), lambda: svd(l1=numpy(15, 8))),
    Case("svd-d-dtype", T, ("mm_nvfp4_svdquant(d, l1): ", "d is float32", "wanted bfloat16"), lambda: svd(d=numpy(4, 8, dtype=F32))),
    Case("svd-k", V, ("mm_nvfp4_svdquant: ", "a (4, 32) has k = 64", "b (16, 16)"), lambda: svd(b=numpy(16, 16, **U8))),
    Case("svd-sf", V, ("mm_nvfp4_svdquant: ", "a_sf has shape (4, 4)", "128x4 tiles"), lambda: svd(a_sf=numpy(4, 4, **U8))),
    Case("svd-b_sf", T, ("mm_nvfp4_svdquant: ", "b_sf is missing", "e4m3"), lambda: svd(b_sf=None)),
    Case("svd-alpha", V, ("mm_nvfp4_svdquant", "alpha is float32 of shape (2,)"), lambda: svd(alpha=numpy(2, dtype=F32))),
    Case("svd-bias", V, ("mm_nvfp4_svdquant", "bias has shape (4,)", "(16,)"), lambda: svd(bias=numpy(4))),
    Case("svd-framework", T, ("mm_nvfp4_svdquant: ", "d is a PyTorch array", "a is a NumPy array"), lambda: svd(d=tensor(4, 8))),
    Case("svd-backend", V, ("mm_nvfp4_svdquant", "backend is 'cudnn'", "'cutlass'"), lambda: svd(backend="cudnn")),
    Case(
        "svdquant_linear-k", V, ("svdquant_linear: ", "a (4, 32) has k = 64", "weight_fp4 (16, 16)"),
        lambda: lowrank(weight_fp4=numpy(16, 16, **U8)),
    ),
    Case(
        "svdquant_linear-l2t", V, ("svdquant_linear(x, l2t_smoothed): ", "l2t_smoothed (8, 64)"),
        lambda: lowrank(l2t_smoothed=numpy(8, 64)),
    ),
    Case("svdquant_linear-l1", V, ("svdquant_linear(d, l1_scaled): ", "l1_scaled (16, 4)"), lambda: lowrank(l1_scaled=numpy(16, 4))),
    Case("svdquant_linear-sf", V, ("svdquant_linear: ", "weight_sf has shape (64,)", "128x4"), lambda: lowrank(weight_sf=numpy(64, **U8))),
    Case("svdquant_linear-x", T, ("svdquant_linear(x, l2t_smoothed): ", "x is float16"), lambda: lowrank(x=numpy(4, 64, dtype=FP16))),
    Case("svdquant_linear-smooth", V, ("pre_quant_scale has shape (32,)",), lambda: lowrank(pre_quant_scale=numpy(32))),
    # in place
    Case("tiny-out", T, ("tinygemm_bf16: ", "out is missing"), lambda: tiny(out=None)),
    Case("tiny-out-shape", V, ("tinygemm_bf16: ", "out has shape (16, 4)", "(4, 16)"), lambda: tiny(out=poisoned(16, 4))),
    Case("tiny-k", V, ("tinygemm_bf16: ", "input (4, 64)", "weight (16, 32)", "[n, k]"), lambda: tiny(weight=numpy(16, 32))),
    Case("tiny-turned", V, ("tinygemm_bf16: ", "weight (64, 16)", "pass weight.T"), lambda: tiny(weight=numpy(64, 16))),
    Case("tiny-fp16", T, ("tinygemm_bf16: ", "input is float16", "wanted bfloat16"), lambda: tiny(input=numpy(4, 64, dtype=FP16))),
    Case("tiny-bias", V, ("tinygemm_bf16: ", "bias has shape (4,)", "(16,)"), lambda: tiny(bias=numpy(4))),
    Case(
        "router-out", T, ("mm_M1_16_K7168_N128: ", "out is missing"),
        lambda: (cugemm.mm_M1_16_K7168_N128, numpy(4, 7168), numpy(7168, 128), None),
    ),
    Case(
        "router-17", V, ("mm_M1_16_K7168_N128: ", "num_tokens is 17", "1 to 16", "mm_bf16"),
        lambda: router(numpy(17, 7168), out=poisoned(17, 128)),
    ),
    Case("router-0", V, ("mm_M1_16_K7168_N128: ", "num_tokens is 0"), lambda: router(numpy(0, 7168), out=poisoned(0, 128))),
    Case(
        "router-hidden", V, ("mm_M1_16_K7168_N128: ", "hidden_dim is 7169 in mat_a and 7168 in mat_b", "7168"),
        lambda: router(numpy(4, 7169)),
    ),
    Case("router-experts", V, ("mm_M1_16_K7168_N128: ", "num_experts is 129", "128"), lambda: router(b=numpy(129, 7168).T)),
    Case("router-dtype", V, ("mm_M1_16_K7168_N128: ", "mat_a is float32", "bfloat16"), lambda: router(numpy(4, 7168, dtype=F32))),
    Case("router-b-dtype", V, ("mm_M1_16_K7168_N128: ", "mat_b is float16", "bfloat16"), lambda: router(b=numpy(128, 7168, dtype=FP16).T)),
    Case("router-out-dtype", V, ("mm_M1_16_K7168_N128: ", "out is float32", "bfloat16"), lambda: router(out=poisoned(4, 128, dtype=F32))),
    Case(
        "router-row-major", V, ("mm_M1_16_K7168_N128: ", "mat_b has strides (128, 1)", "column-major"),
        lambda: router(b=numpy(7168, 128)),
    ),
    Case("router-rank", V, ("mm_M1_16_K7168_N128: ", "mat_a has shape (7168,)", "(num_tokens, hidden_dim)"), lambda: router(numpy(7168))),
    Case(
        "router-all", V, ("num_tokens", "hidden_dim", "num_experts", "column-major"),
        lambda: router(numpy(17, 4), numpy(5, 7), poisoned(17, 7)),
    ),
    # linear and its layer
    Case(
        "activations-zero-points", V, ("linear: ", "activations is 'uint4_g64'", "zero points only weights", "wanted one of", "nvfp4"),
        lambda: (cugemm.linear, numpy(4, 64), numpy(16, 64), {"activations": "uint4_g64"}),
    ),
    Case(
        "activations-unknown", V, ("linear: ", "activations is 'fp8'; wanted one of", "mxfp8"),
        lambda: (cugemm.linear, numpy(4, 64), numpy(16, 64), {"activations": "fp8"}),
    ),
    Case(
        "activations-twice", T, ("linear: ", "x is a Quantized already", "drop activations"),
        lambda: (cugemm.linear, mxfp8_activation(), numpy(16, 64), {"activations": "fp8_row"}),
    ),
    Case(
        "layer-activations", V, ("QuantizedLinear: ", "activations is 'uint4_g32'", "zero points"),
        lambda: (cugemm.QuantizedLinear, numpy(16, 64), {"activations": "uint4_g32"}),
    ),
    Case(
        "zero-points-of-x", T, ("linear: ", "x is Quantized(uint4_g32", "zero points go with w only"),
        lambda: (cugemm.linear, cugemm.quantize(numpy(4, 64), "uint4_g32"), numpy(16, 64)),
    ),
]  # fmt: skip


def mxfp8_activation() -> Any:
    return Quantized(numpy(4, 64, **FP8), numpy(4, 2, **U8), "mxfp8")


def jax_fp4(n: int, b_descale: Any, k: int = 64) -> tuple[Any, ...]:
    a, b = jax_array(4, k // 2, **U8), jax_array(k // 2, n, **U8)
    return cugemm.mm_fp4, a, b, jax_array(128, -(-k // 64) * 4, **U8), b_descale


def jax_mxfp8(a_descale: Any, b_descale: Any, k: int = 64) -> tuple[Any, ...]:
    return cugemm.mm_mxfp8, jax_array(4, k, **FP8), jax_array(k, 16, **FP8), a_descale, b_descale


_NO_SCALES: dict[str, Any] = {"a_descale": None, "b_descale": None}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused_in_words(case: Case) -> None:
    function, *arguments = case.make()
    keywords = arguments.pop() if isinstance(arguments[-1], dict) else {}
    out = keywords.get("out")
    before, launched = None if out is None else out.tobytes(), launch.launches
    with pytest.raises(Exception) as raised:
        function(*arguments, **keywords)
    text = str(raised.value)
    assert raised.type is case.error, f"{raised.type.__name__}: {text}"
    at = 0
    for word in case.words:
        found = text.find(word, at)
        assert found >= 0, f"{word!r} is not where it should be in: {text}"
        at = found
    assert "\n" not in text and len(text) < 450, text
    assert launch.launches == launched, "something was launched"
    assert out is None or out.tobytes() == before, "out was written"


def test_names_of_refused_are_unique() -> None:
    assert len({case.name for case in REFUSED}) == len(REFUSED)
