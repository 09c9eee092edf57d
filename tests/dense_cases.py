"""FlashInfer's dense entries: operands with loose scales (of `format_oracles`), calls and answers, for test_dense and test_gpu_dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import format_oracles as formats
import numpy as np
import oracles
from format_oracles import FORMATS, Operand
from oracles import Array, Case

import cugemm

BF16, FP16 = "bfloat16", "float16"


def side(seed: int, format: str, *shape: int) -> Operand:
    """A random operand [.., rows, k] without a second scale: entries take that as alpha."""
    x = formats.random_operand(np.random.default_rng([seed, *shape]), format, shape)
    return x._replace(tensor=None, values=formats.values(format, x.data, x.scale))


def plain(x: Array) -> Operand:
    """A 16-bit array as an operand."""
    element = next(name for name in ("bf16", "fp16") if oracles.ENCODINGS[name].dtype == x.dtype.name)
    return Operand(element, x, None, None, None, oracles.decode(x, element))


def normal(seed: int, *shape: int, dtype: str = "bfloat16") -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(oracles.dtype_of(dtype))


def turned(x: Operand) -> Array:
    """The stored values as [.., k, rows], a view."""
    return x.data.swapaxes(-1, -2)


def tiles(x: Operand | Array, layout: str = "128x4", *, flat: bool = False) -> Array:
    """The scale codes in tiles, padded with codes that are NaN, because nobody may read them; `flat`: rows of all matrices together."""
    scale = x if isinstance(x, np.ndarray) else x.scale
    assert scale is not None
    scale = scale.reshape(scale.size // max(scale.shape[-1], 1), scale.shape[-1]) if flat else scale
    return np.where(formats.tiled(np.ones_like(scale), layout) == 1, formats.tiled(scale, layout), np.uint8(0xFF))


def answer(a: Operand | Array, b: Operand, **how: Any) -> Case:
    """The case of a @ b.T, of random data."""
    left = plain(a) if isinstance(a, np.ndarray) else a
    repro = f"{left.format} {left.data.shape} x {b.format} {b.data.shape} {how}"
    return formats.answer(left, b, random_signs=True, repro=repro, **how)


def flags(format: str) -> dict[str, Any]:
    """What `mm_fp4` is told about a format."""
    return {"use_nvfp4": format == "nvfp4", "block_size": FORMATS[format].block[1]}


class Entry(NamedTuple):
    """call(arrays, out, dtype) with the arrays on a device; "a" and "b" go through every layout, the others stay as they are."""

    arrays: dict[str, Array]
    case: Case
    call: Callable[[Any, Any, str | None], Any]


def block_entries(m: int, n: int, k: int) -> dict[str, Entry]:
    """Both operands in a block-scaled format."""
    x, w = side(1, "mxfp8", m, k), side(2, "mxfp8_e5m2", n, k)
    eight = {"a": x.data, "b": turned(w), "sa": tiles(x), "sb": tiles(w).ravel()}
    found = {
        "mm_mxfp8": Entry(eight, answer(x, w), lambda v, out, dtype: cugemm.mm_mxfp8(v["a"], v["b"], v["sa"], v["sb"], out, dtype)),
        "mm_mxfp8 8x4": Entry(
            eight | {"sa": tiles(x, "8x4")}, answer(x, w),
            lambda v, out, dtype: cugemm.mm_mxfp8(v["a"], v["b"], v["sa"], v["sb"], out, dtype, use_8x4_sf_layout=True),
        ),
        "mm_mxfp8 linear": Entry(
            eight | {"sa": x.scale, "sb": w.scale}, answer(x, w),
            lambda v, out, dtype: cugemm.mm_mxfp8(v["a"], v["b"], v["sa"], v["sb"].T, out, dtype, scale_layout="linear"),
        ),
    }  # fmt: skip
    xs, ws = side(3, "mxfp8", 3, m, k), side(4, "mxfp8", 3, n, k)
    found["bmm_mxfp8"] = Entry(
        {"a": xs.data, "b": turned(ws), "sa": tiles(xs, flat=True).ravel(), "sb": tiles(ws, flat=True).ravel()}, answer(xs, ws),
        lambda v, out, dtype: cugemm.bmm_mxfp8(v["a"], v["b"], v["sa"], v["sb"], dtype, out),
    )  # fmt: skip
    for format in ("nvfp4", "mxfp4"):
        p, q, told = side(5, format, m, k), side(6, format, n, k), flags(format)
        four = {"a": p.data, "b": turned(q), "sa": tiles(p), "sb": tiles(q), "alpha": np.full((1,), 0.375, np.float32)}
        case = answer(p, q, alpha=0.375)

        def mm_fp4(v: Any, out: Any, dtype: Any, told: Any = told, turn: bool = True, **how: Any) -> Any:
            return cugemm.mm_fp4(v["a"], v["b"], v["sa"], v["sb"].T if turn else v["sb"], v["alpha"], dtype, out, **told, **how)

        found |= {
            f"mm_fp4 {format}": Entry(four, case, mm_fp4),
            f"mm_fp4 {format} flat": Entry(
                four | {"sb": tiles(q).ravel()}, case, lambda *x, f=mm_fp4: f(*x, turn=False)
            ),
            f"mm_fp4 {format} 8x4": Entry(four | {"sa": tiles(p, "8x4")}, case, lambda *x, f=mm_fp4: f(*x, use_8x4_sf_layout=True)),
            f"mm_fp4 {format} linear": Entry(
                four | {"sa": p.scale, "sb": q.scale}, case, lambda *x, f=mm_fp4: f(*x, scale_layout="linear")
            ),
        }  # fmt: skip
    return found


def weight_entries(m: int, n: int, k: int) -> dict[str, Entry]:
    """16-bit activations, and the small products."""
    found = {}
    for format in ("nvfp4", "mxfp4"):
        for dtype in (BF16, FP16):
            x, w, told = normal(7, m, k, dtype=dtype), side(8, format, n, k), flags(format)
            found[f"mm_fp4 {dtype} x {format}"] = Entry(
                {"a": x, "b": turned(w), "sb": tiles(w)}, answer(x, w),
                lambda v, out, dtype, told=told: cugemm.mm_fp4(v["a"], v["b"], None, v["sb"].T, None, dtype, out, **told),
            )  # fmt: skip
    x, w, l1 = normal(9, m, k), side(10, "nvfp4", n, k), normal(11, n, 24)
    found["mm_bf16_fp4"] = Entry(
        {"a": x, "b": w.data, "sb": tiles(w)}, answer(x, w),
        lambda v, out, dtype: cugemm.mm_bf16_fp4(
            v["a"], *cugemm.prepare_bf16_fp4_weights(v["b"], v["sb"], None), out=out, out_dtype=dtype
        ),
    )  # fmt: skip
    p, d, bias = side(12, "nvfp4", m, k), normal(13, m, 24), normal(14, n)
    residual = answer(p, w, alpha=0.25)
    low = 0.25 * (d.astype(np.float64) @ l1.astype(np.float64).T) + bias.astype(np.float64)
    found["mm_nvfp4_svdquant"] = Entry(
        {"a": p.data, "b": w.data, "sa": tiles(p), "sb": tiles(w).ravel(), "d": d, "l1": l1, "bias": bias},
        residual._replace(exact=residual.exact + low, peak=residual.peak + np.abs(low) + 24),
        lambda v, out, dtype: cugemm.mm_nvfp4_svdquant(v["a"], v["b"], v["sa"], v["sb"], 0.25, v["d"], v["l1"], v["bias"], out),
    )  # fmt: skip
    thin = oracles.random_case(15, m, n, k, "bf16", "bf16", bias=True)
    found["tinygemm_bf16"] = Entry(
        {"a": thin.a, "b": thin.b.T, "bias": thin.bias}, thin, lambda v, out, dtype: cugemm.tinygemm_bf16(v["a"], v["b"], out, v["bias"])
    )  # fmt: skip
    k = -(-k // 128) * 128
    blocks: dict[str, dict[str, Any]] = {
        "one": {}, "columns": {"a_block": (1, 0), "b_block": (0, 1)}, "blocks": {"a_block": (1, 128), "b_block": (128, 128)}
    }  # fmt: skip
    for name, scale in blocks.items():
        case = oracles.random_case(16, m, n, k, "e4m3", "e4m3", alpha=0.5, **scale)
        given = {"sa": case.a_scale, "sb": case.b_scale} if scale else {}
        found[f"mm_fp8 panels {name}"] = Entry(
            {"a": case.a, "b": case.b.T, **given}, case,
            lambda v, out, dtype: cugemm.mm_fp8(
                v["a"], cugemm.prepare_low_latency_gemm_weights(v["b"]), 0.5, dtype, out, a_scale=v.get("sa"), b_scale=v.get("sb")
            ),
        )  # fmt: skip
    return found


def entries(m: int, n: int, k: int) -> dict[str, Entry]:
    return block_entries(m, n, k) | weight_entries(m, n, k)
