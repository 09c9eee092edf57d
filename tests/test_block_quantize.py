"""FlashInfer's quantisers and their ways back: golden vectors bit for bit, shapes, layouts, errors; on the CPU and (marked gpu) a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest

from cugemm import launch
from cugemm.api.block_dequantize import e2m1_and_ufp8sf_scale_to_float, mxfp4_dequantize, mxfp4_dequantize_host, mxfp8_dequantize_host
from cugemm.api.block_quantize import (
    fp4_quantize,
    make_nvfp4_global_scale,
    mxfp4_quantize,
    mxfp8_quantize,
    nvfp4_batched_quantize,
    nvfp4_quantize,
    nvfp4_quantize_smooth,
    silu_and_mul_nvfp4_quantize,
)
from cugemm.api.group_quantize import mxfp8_grouped_quantize, per_token_group_quant_8bit, scaled_fp4_grouped_quantize
from cugemm.api.quantize import dequantize, quantize
from cugemm.api.shuffle import INTERLEAVE, block_scale_interleave, nvfp4_block_scale_interleave, shuffle_matrix_a, shuffle_matrix_sf_a
from cugemm.arrays import Spec
from cugemm.conversion import QuantizeOptions
from cugemm.formats import FORMATS
from cugemm.plan import explain
from cugemm.quantized import Quantized
from cugemm.scale_layout import SfLayout

pytestmark = pytest.mark.filterwarnings("default")

Array = np.ndarray[Any, Any]
BF16 = oracles.dtype_of("bfloat16")
E4M3 = oracles.dtype_of("float8_e4m3fn")
LAYOUTS = {SfLayout.layout_128x4: 128, SfLayout.layout_8x4: 8, SfLayout.layout_linear: 1}

with np.load(Path(__file__).parent / "golden" / "blocks.npz") as _file:
    GOLDEN: dict[str, Array] = dict(_file)
CASES = [name for name in GOLDEN if "/" not in name]


# --- where arrays live ------------------------------------------------------------------------------------------------------------


class Numpy:
    """Takes NumPy arrays to a framework and back. `strided`: whether its arrays have strides of their own."""

    strided = True

    def put(self, x: Any) -> Any:
        return x

    def fetch(self, x: Any) -> Array:
        return np.asarray(x)


class Jax(Numpy):
    strided = False

    def put(self, x: Any) -> Any:
        import jax

        return jax.device_put(x, jax.devices("cpu")[0]) if isinstance(x, np.ndarray) else x


class Torch(Numpy):
    def __init__(self, device: str) -> None:
        self.device = device

    def put(self, x: Any) -> Any:
        import torch

        if not isinstance(x, np.ndarray):
            return x
        signed = torch.from_numpy(x.view(f"i{x.dtype.itemsize}")) if x.dtype.name != "uint8" else torch.from_numpy(x)
        return signed.to(self.device).view(getattr(torch, x.dtype.name))

    def fetch(self, x: Any) -> Array:
        import torch

        signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        name = str(x.dtype).removeprefix("torch.")
        return np.asarray(x.view(signed).cpu().numpy().view(oracles.dtype_of(name)))


def _cupy() -> Any:
    import gpu_arrays

    return gpu_arrays.Cupy()


PLACES: dict[str, Callable[[], Any]] = {
    "numpy": Numpy,
    "torch": lambda: Torch("cpu"),
    "jax": Jax,
    "cupy": _cupy,
    "torch cuda": lambda: Torch("cuda"),
}
_MARKS = {"torch": [pytest.mark.requires("torch")], "jax": [pytest.mark.requires("jax")], "cupy": [pytest.mark.gpu]}
_MARKS["torch cuda"] = [pytest.mark.gpu, *_MARKS["torch"]]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=_MARKS.get(name, [])) for name in PLACES])
def dev(request: pytest.FixtureRequest) -> Any:
    if request.param == "torch cuda":
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch sees no GPU")
    return PLACES[request.param]()


def strided(dev: Any) -> bool:
    return getattr(dev, "strided", True)


def strides_of(x: Any) -> tuple[int, ...]:
    """In elements."""
    return tuple(x.stride()) if hasattr(x, "stride") else tuple(n // x.dtype.itemsize for n in x.strides)


def golden(name: str, dtype: str = "uint8") -> Array:
    return GOLDEN[name].view(oracles.dtype_of(dtype))


def inputs(case: str) -> Array:
    return golden(case, oracles.ENCODINGS[case[:4]].dtype)


def same(dev: Any, got: Any, wanted: Array, where: str = "") -> None:
    """Same dtype, shape and bytes; NaN is NaN."""
    array = np.ascontiguousarray(dev.fetch(got))
    if array.dtype.kind == "f" or array.dtype == BF16:
        np.testing.assert_array_equal(np.isnan(array.astype(np.float32)), np.isnan(wanted.astype(np.float32)), err_msg=where)
        array, wanted = (np.where(np.isnan(x.astype(np.float32)), np.zeros((), x.dtype), x) for x in (array, wanted))
    oracles.check_bits(array, np.ascontiguousarray(wanted), where)


def draw(kind: str, shape: tuple[int, ...], dtype: Any = BF16, seed: int = 3) -> Array:
    """The kinds of FlashInfer's quantiser fuzz."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if kind == "tiny":
        x *= 1e-30
    elif kind == "large":
        x *= 1e4
    elif kind == "mixed_rows":
        x *= 10.0 ** rng.integers(-6, 5, (*shape[:-1], 1))
    elif kind == "with_zeros":
        x *= rng.random(shape) < 0.2
        x[..., : shape[-1] // 2] = 0
    elif kind == "skewed":
        x = np.abs(x) ** 3
    return np.asarray(x).astype(dtype)


KINDS = ("normal", "tiny", "large", "mixed_rows", "with_zeros", "skewed")


def global_scale(x: Array) -> Array:
    """448 * 6 / amax, float32 [1]."""
    return (np.float32(2688) / np.abs(x.astype(np.float32)).max().reshape(1)).astype(np.float32)


def untiled(memory: Array, rows: int, blocks: int, tile: int) -> Array:
    """Scales in tiles (or row-major, tile 1) -> [rows, blocks], and that everything else is zero."""
    if tile == 1:
        return memory.reshape(rows, blocks)
    high, wide = -(-rows // tile) * tile, -(-blocks // 4) * 4
    flat = memory.reshape(-1)
    assert flat.shape == (high * wide,)
    if tile == 8:
        full = flat.reshape(high // 8, wide // 4, 8, 4).transpose(0, 2, 1, 3).reshape(high, wide)
    else:
        full = flat.reshape(high // 128, wide // 4, 32, 4, 4).transpose(0, 3, 2, 1, 4).reshape(high, wide)
    padding = full.copy()
    padding[:rows, :blocks] = 0
    assert not padding.any()
    return full[:rows, :blocks]


def real(q: Array, sf: Array, block: int, scale: str) -> Array:
    """float64 values of packed e2m1 (or e4m3) and linear scales."""
    values = oracles.decode(q, "e2m1x2" if q.dtype == np.uint8 else "e4m3")
    factors = GOLDEN[f"table/{scale}"].astype(np.float64)[sf]
    return values * np.repeat(factors, block, axis=-1)[..., : values.shape[-1]]


# --- golden -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_golden_flashinfer_entries(dev: Any, case: str) -> None:
    x = inputs(case)
    k = x.shape[-1]
    lead = x.reshape(-1, k).shape[0]
    checked = 0
    for i in range(4):
        g = golden(f"{case}/nvfp4/{i}/global_scale", "float32")
        data, scale = GOLDEN[f"{case}/nvfp4/{i}/data"], GOLDEN[f"{case}/nvfp4/{i}/scale"]
        for layout, tile in LAYOUTS.items():
            q, sf = nvfp4_quantize(dev.put(x), dev.put(g), sfLayout=layout)
            same(dev, q, data, f"{case} {i} {layout}")
            linear = untiled(dev.fetch(sf), lead, scale.shape[-1], tile)
            oracles.check_bits(np.ascontiguousarray(linear), scale.reshape(lead, -1), f"{case} {i} {layout}")
            checked += 1
        q, sf = fp4_quantize(dev.put(oracles.embed(x)) if strided(dev) else dev.put(x), float(g[0]), is_sf_swizzled_layout=False)
        same(dev, q, data)
        same(dev, sf, scale.reshape(lead, -1))
    for layout, tile in LAYOUTS.items():
        q, sf = mxfp4_quantize(dev.put(x), sfLayout=layout)
        same(dev, q, GOLDEN[f"{case}/mxfp4/data"], case)
        scale = GOLDEN[f"{case}/mxfp4/scale"]
        oracles.check_bits(np.ascontiguousarray(untiled(dev.fetch(sf), lead, scale.shape[-1], tile)), scale.reshape(lead, -1), case)
        q, sf = mxfp8_quantize(dev.put(x), sf_swizzle_layout=layout)
        data, scale = golden(f"{case}/mxfp8/data", "float8_e4m3fn"), GOLDEN[f"{case}/mxfp8/scale"]
        same(dev, q[..., :k], data, case)
        assert not dev.fetch(q).view(np.uint8)[..., k:].any()
        oracles.check_bits(np.ascontiguousarray(untiled(dev.fetch(sf), lead, scale.shape[-1], tile)), scale.reshape(lead, -1), case)
    assert checked == 12


@pytest.mark.parametrize("case", CASES)
def test_golden_quantize(dev: Any, case: str) -> None:
    x = inputs(case)
    names = [name for name in FORMATS if f"{case}/{name}/data" in GOLDEN] + [f"{n}_te" for n in ("nvfp4", "nvfp4_row")]
    checked = 0
    for name in names:
        if f"{case}/{name}/data" not in GOLDEN:
            continue
        fmt = FORMATS[name.removesuffix("_te")]
        sources = [x, oracles.embed(x), oracles.embed(x, transposed=True)] if strided(dev) else [x]
        for source in sources:
            q = quantize(dev.put(source), fmt)
            same(dev, q.data, golden(f"{case}/{name}/data", fmt.element.dtype), f"{case} {name}")
            same(dev, q.scale, golden(f"{case}/{name}/scale", "uint8" if fmt.scale.bits == 8 else "float32"), f"{case} {name}")
            if fmt.zero:
                same(dev, q.zero, GOLDEN[f"{case}/{name}/zero"], f"{case} {name}")
            if fmt.tensor is not None:
                same(dev, q.tensor_scale, golden(f"{case}/{name}/tensor_scale", "float32"), f"{case} {name}")
        checked += 1
    assert checked >= 10


def test_golden_layouts(dev: Any) -> None:
    shapes = [name.split("/")[1] for name in GOLDEN if name.startswith("layout/") and name.count("/") == 1]
    for shape in shapes:
        scale = GOLDEN[f"layout/{shape}"]
        for layout in ("128x4", "8x4"):
            want = GOLDEN[f"layout/{shape}/{layout}"]
            out = launch.run(INTERLEAVE, (dev.put(scale),), QuantizeOptions("", scale_layout=layout))
            same(dev, out, want, f"{shape} {layout}")
        for dtype in ("uint8", "bfloat16"):
            linear, tiled = (x.astype(oracles.dtype_of(dtype)) for x in (scale, GOLDEN[f"layout/{shape}/128x4"]))
            same(dev, block_scale_interleave(dev.put(linear)), tiled.reshape(-1), shape)
            twice = np.stack([linear, linear[::-1]])
            out = dev.fetch(block_scale_interleave(dev.put(twice)))
            oracles.check_bits(out[: tiled.size], tiled.reshape(-1))
            oracles.check_bits(np.ascontiguousarray(untiled(out[tiled.size :], *linear.shape, 128)), np.ascontiguousarray(linear[::-1]))
    assert len(shapes) == 6
    assert nvfp4_block_scale_interleave is block_scale_interleave


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8", "int4_g32", "uint4_g32"])
def test_golden_dequantised(dev: Any, name: str) -> None:
    fmt = FORMATS[name]
    data = golden(f"dequantised/{name}/data", fmt.element.dtype)
    bytes_ = fmt.scale.bits == 8
    scale = golden(f"dequantised/{name}/scale", "uint8" if bytes_ else "float32")
    tensor = golden(f"dequantised/{name}/tensor_scale", "float32") if fmt.tensor else None
    zero = GOLDEN[f"dequantised/{name}/zero"] if fmt.zero else None
    q = Quantized(dev.put(data), dev.put(scale), fmt, tensor_scale=dev.put(tensor), zero=dev.put(zero))
    for dtype in ("float32", "bfloat16", "float16"):
        same(dev, dequantize(q, dtype), golden(f"dequantised/{name}/{dtype}", dtype), f"{name} {dtype}")
    want = golden(f"dequantised/{name}/float32", "float32")
    for layout in LAYOUTS if bytes_ else ():
        tiled = scale
        if layout != SfLayout.layout_linear:
            options = QuantizeOptions("", scale_layout=layout.name.removeprefix("layout_"))
            tiled = dev.fetch(launch.run(INTERLEAVE, (dev.put(scale),), options))
        flags = {"is_sf_swizzled_layout": layout != 2, "is_sf_8x4_layout": layout == 1}
        for sf in (tiled, tiled.reshape(-1)):
            placed = dev.put(np.ascontiguousarray(sf))
            if name == "nvfp4":
                same(dev, e2m1_and_ufp8sf_scale_to_float(dev.put(data), placed, dev.put(tensor), **flags), want, str(layout))
            elif name == "mxfp4":
                same(dev, mxfp4_dequantize(dev.put(data), placed, layout), want, str(layout))
                same(dev, e2m1_and_ufp8sf_scale_to_float(dev.put(data), placed, None, 32, 0, **flags), want, str(layout))
            else:
                same(dev, mxfp8_dequantize_host(dev.put(data), placed, sf_swizzle_layout=layout), want, str(layout))
    if name == "mxfp4":
        same(dev, mxfp4_dequantize_host(dev.put(data), dev.put(scale)), want)
        out = dev.fetch(e2m1_and_ufp8sf_scale_to_float(dev.put(data), dev.put(scale), dev.put(np.array([0.37], np.float32)), 32, 0, False))
        np.testing.assert_allclose(out, want * np.float32(0.37), rtol=0, atol=2.0**-126)  # frameworks may flush subnormals


def test_every_scale_code(dev: Any) -> None:
    """e8m0 under e4m3 and e2m1, e4m3 under e2m1: the value of 1 under each code."""
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(GOLDEN["table/e8m0"], GOLDEN["table/e8m0_ml_dtypes"])
    ones = np.full((256, 16), 0x22, np.uint8)  # e2m1 code 2 is 1
    for got, table in (
        (mxfp8_dequantize_host(dev.put(np.ones((256, 32), E4M3)), dev.put(codes), False), "e8m0"),
        (mxfp4_dequantize(dev.put(ones), dev.put(codes[:, None].copy()), SfLayout.layout_linear), "e8m0"),
        (e2m1_and_ufp8sf_scale_to_float(dev.put(ones[:, :8].copy()), dev.put(codes), 1.0, is_sf_swizzled_layout=False), "e4m3"),
    ):
        array = dev.fetch(got)
        same(dev, got, np.repeat(GOLDEN[f"table/{table}"][:, None], array.shape[1], axis=1), table)


# --- shapes and meanings ----------------------------------------------------------------------------------------------------------


def up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@pytest.mark.parametrize("shape", [(1, 32), (7, 48), (129, 160), (2, 65, 64), (2, 3, 5, 96)], ids=str)
def test_shapes_and_dtypes(dev: Any, shape: tuple[int, ...]) -> None:
    x = draw("normal", shape)
    m, k = int(np.prod(shape[:-1])), shape[-1]
    g = dev.put(global_scale(x))
    placed = dev.put(x)
    for layout, tile in LAYOUTS.items():
        high, wide = up(m, tile), (lambda blocks, tile=tile: blocks if tile == 1 else up(blocks, 4))
        flags = {"is_sf_swizzled_layout": tile != 1, "is_sf_8x4_layout": tile == 8}
        for (q, sf), block in (
            (fp4_quantize(placed, g, **flags), 16),
            (nvfp4_quantize(placed, g, layout), 16),
            (nvfp4_quantize(placed, 1 / 2688, layout, per_token_activation=True)[:2], 16),
            (fp4_quantize(placed, None, 32, True, **flags), 32),
            (mxfp4_quantize(placed, sfLayout=layout), 32),
        ):
            found = dev.fetch(q), dev.fetch(sf)
            assert [a.dtype for a in found] == [np.uint8, np.uint8]
            assert found[0].shape == (*shape[:-1], k // 2)
            assert found[1].shape == (high, wide(-(-k // block))), layout
        for alignment in (32, 128):
            q, sf = mxfp8_quantize(placed, alignment=alignment, sf_swizzle_layout=layout)
            padded = up(k, alignment)
            assert dev.fetch(q).shape == (*shape[:-1], padded) and dev.fetch(q).dtype == E4M3
            assert dev.fetch(sf).shape == (high * wide(padded // 32),) and dev.fetch(sf).dtype == np.uint8
    both = np.concatenate([x, x], axis=-1)
    q, sf = silu_and_mul_nvfp4_quantize(dev.put(both), g)
    assert dev.fetch(q).shape == (m, k // 2) and dev.fetch(sf).shape == (up(m, 128), up(-(-k // 16), 4))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(dev: Any, kind: str) -> None:
    """Errors of half a step of the format; scales are finite whatever the data."""
    x = draw(kind, (64, 256))
    x32 = x.astype(np.float64)
    g = global_scale(x)
    q, sf = nvfp4_quantize(dev.put(x), dev.put(g))
    scale = untiled(dev.fetch(sf), 64, 16, 128)
    assert not (scale & 0x7F == 0x7F).any()
    back = dev.fetch(e2m1_and_ufp8sf_scale_to_float(q, sf, dev.put(1 / g)))
    np.testing.assert_array_equal(back, (real(dev.fetch(q), scale, 16, "e4m3") * np.float64((1 / g)[0])).astype(np.float32))
    vecmax = np.repeat(np.abs(x32).reshape(64, 16, 16).max(-1), 16, axis=-1)
    step = np.float64(2.0**-9) / np.float64(g[0])  # of e4m3 scales below its normal numbers
    assert (np.abs(back - x32) <= vecmax * (1 / 6 + 1 / 16) + 6 * step).all()
    per_token = nvfp4_quantize(dev.put(x), 1 / 2688, per_token_activation=True)
    s = dev.fetch(per_token[2])
    amax = np.abs(x32).max(-1)
    np.testing.assert_allclose(s, np.where(amax > 0, amax / 2688, 1), rtol=1e-6)
    back = real(dev.fetch(per_token[0]), untiled(dev.fetch(per_token[1]), 64, 16, 128), 16, "e4m3") * s.astype(np.float64)[:, None]
    assert (np.abs(back - x32) <= vecmax * (1 / 6 + 1 / 16) + 6 * 2.0**-9 * s[:, None]).all()
    q, sf = mxfp4_quantize(dev.put(x))
    scale = untiled(dev.fetch(sf), 64, 8, 128)
    back = dev.fetch(mxfp4_dequantize(q, sf))
    vecmax = np.repeat(np.abs(x32).reshape(64, 8, 32).max(-1), 32, axis=-1)
    assert (np.abs(back - x32) <= vecmax / 3 * (1 + 1e-6)).all() and not (scale == 255).any()
    q, sf = mxfp8_quantize(dev.put(x))
    scale = untiled(dev.fetch(sf), 64, 8, 128)
    back = dev.fetch(mxfp8_dequantize_host(q, sf))
    assert (np.abs(back - x32) <= np.maximum(np.abs(x32) / 16, vecmax * 2.0**-16)).all() and not (scale == 255).any()


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_finite(dev: Any, kind: str) -> None:
    for rows in (1, 7):
        for k in (16, 48, 1024):
            x = draw(kind, (rows, k), seed=rows * k)
            if not x.astype(np.float32).any():
                continue
            for sf, nan in (
                (nvfp4_quantize(dev.put(x), dev.put(global_scale(x)))[1], 0x7F),
                (nvfp4_quantize(dev.put(x), 1 / 2688, per_token_activation=True)[1], 0x7F),
                (mxfp4_quantize(dev.put(x))[1], 0xFF),
                (mxfp8_quantize(dev.put(x))[1], 0xFF),
            ):
                assert not (dev.fetch(sf) == nan).any(), (rows, k)


def test_rows_of_all_leading_axes_share_the_tiles(dev: Any) -> None:
    x = draw("mixed_rows", (3, 50, 64))
    flat = x.reshape(150, 64)
    g = float(global_scale(x)[0])
    for fn, args in ((fp4_quantize, (g,)), (nvfp4_quantize, (g,)), (mxfp4_quantize, ()), (mxfp8_quantize, ())):
        for a, b in zip(fn(dev.put(x), *args), fn(dev.put(flat), *args), strict=True):
            same(dev, a, dev.fetch(b).reshape(dev.fetch(a).shape), fn.__name__)
    per_row = np.linspace(10, 300, 150, dtype=np.float32)
    q, sf = nvfp4_quantize(dev.put(x), dev.put(per_row))
    want = [nvfp4_quantize(flat[i : i + 1], float(per_row[i]), 2) for i in range(150)]
    same(dev, q, np.concatenate([w[0] for w in want]).reshape(3, 50, 32))
    oracles.check_bits(np.ascontiguousarray(untiled(dev.fetch(sf), 150, 4, 128)), np.concatenate([w[1] for w in want]))


def test_inverse_global_scale(dev: Any) -> None:
    x = draw("normal", (16, 64))
    t = np.array([1 / 64], np.float32)  # its inverse is exact
    want = fp4_quantize(dev.put(x), 64.0)
    for got in (fp4_quantize(dev.put(x), dev.put(t), is_global_scale_inversed=True), fp4_quantize(dev.put(x), dev.put(1 / t))):
        for a, b in zip(got, want, strict=True):
            same(dev, a, dev.fetch(b))


def test_column_major_is_quantised_along_its_contiguous_axis(dev: Any) -> None:
    x = draw("normal", (48, 64))
    g = float(global_scale(x)[0])
    for fn, args in ((fp4_quantize, (g,)), (mxfp4_quantize, ())):
        want = fn(dev.put(x), *args)
        got = fn(dev.put(x).T, *args)
        if not strided(dev):
            assert got[0].shape == (64, 24)
            continue
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(dev.fetch(a), dev.fetch(b).T)


def test_do_shuffle_and_shuffles(dev: Any) -> None:
    x = draw("mixed_rows", (256, 64))
    for rows, tile in ((32, 128), (16, 64), (16, 8)):
        order = [base + r // 8 + r % 8 * (rows // 8) for base in range(0, 256, rows) for r in range(rows)]
        same(dev, shuffle_matrix_a(dev.put(x), tile), x[order], str(tile))
        scale = np.random.default_rng(1).integers(0, 256, (256, 6), np.uint8)
        tiled = dev.fetch(shuffle_matrix_sf_a(dev.put(scale), tile))
        oracles.check_bits(np.ascontiguousarray(untiled(tiled, 256, 6, 128)), scale[order])
    order = [base + r // 8 + r % 8 * 4 for base in range(0, 256, 32) for r in range(32)]
    g = global_scale(x)
    q, sf = nvfp4_quantize(dev.put(x), dev.put(g), do_shuffle=True)
    plain = nvfp4_quantize(dev.put(x), dev.put(g), SfLayout.layout_linear)
    same(dev, q, dev.fetch(plain[0])[order])
    assert dev.fetch(sf).shape == (256, 4)
    oracles.check_bits(np.ascontiguousarray(untiled(dev.fetch(sf), 256, 4, 128)), dev.fetch(plain[1])[order])
    shuffled = nvfp4_quantize(dev.put(x), 1 / 2688, do_shuffle=True, per_token_activation=True)
    plain = nvfp4_quantize(dev.put(x), 1 / 2688, SfLayout.layout_linear, per_token_activation=True)
    same(dev, shuffled[0], dev.fetch(plain[0])[order])
    same(dev, shuffled[2], dev.fetch(plain[2])[order])


def test_per_token_equals_rows_by_themselves(dev: Any) -> None:
    x = draw("mixed_rows", (5, 64))
    indices = dev.put(np.arange(5, dtype=np.int32))
    base = make_nvfp4_global_scale(dev.put(x), True)
    q, sf, s = nvfp4_quantize(dev.put(x), base, 2, per_token_activation=True, expanded_idx_to_permuted_idx=indices)
    for i in range(5):
        one, scale = nvfp4_quantize(x[i : i + 1], global_scale(x[i]), 2)
        oracles.check_bits(dev.fetch(q)[i : i + 1].copy(), one)
        oracles.check_bits(dev.fetch(sf)[i : i + 1].copy(), scale)
        assert dev.fetch(s)[i] == 1 / global_scale(x[i])[0]


def test_batched(dev: Any) -> None:
    x = draw("normal", (3, 130, 48))
    for g in (np.array([5], np.float32), np.array([5, 6, 7], np.float32)):
        q, sf = nvfp4_batched_quantize(dev.put(x), dev.put(g))
        assert dev.fetch(sf).shape == (3, 256 * 4)
        for i in range(3):
            one, scale = nvfp4_quantize(x[i], float(g[i % len(g)]))
            oracles.check_bits(dev.fetch(q)[i].copy(), one)
            oracles.check_bits(dev.fetch(sf)[i].copy(), scale.reshape(-1))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_grouped(dev: Any, dtype: Any) -> None:
    x = draw("normal", (4, 130, 80))
    x[0, 0, 0] = np.nan  # of a row that no count reaches
    counts = np.array([0, 130, 7, 999], dtype)
    live = np.minimum(counts, 130)
    g = np.array([3, 4, 5, 6], np.float32)
    q, sf = scaled_fp4_grouped_quantize(dev.put(x), dev.put(counts), dev.put(g))
    assert dev.fetch(q).shape == (130, 40, 4) and dev.fetch(q).dtype == np.uint8
    assert dev.fetch(sf).shape == (32, 4, 2, 4, 2, 4) and dev.fetch(sf).dtype == E4M3
    if strided(dev):
        assert strides_of(q) == (40, 1, 130 * 40) and strides_of(sf) == (16, 4, 1024, 1, 512, 2048)
    tiles = dev.fetch(sf).view(np.uint8).transpose(5, 2, 4, 0, 1, 3)
    q8, sf8 = mxfp8_grouped_quantize(dev.put(x), dev.put(counts))
    assert dev.fetch(q8).shape == (130, 128, 4) and dev.fetch(q8).dtype == E4M3
    assert dev.fetch(sf8).shape == (32, 4, 2, 4, 1, 4) and dev.fetch(sf8).dtype == np.uint8
    tiles8 = dev.fetch(sf8).transpose(5, 2, 4, 0, 1, 3)
    for i in range(4):
        n = int(live[i])
        data, scale = dev.fetch(q)[:, :, i], untiled(tiles[i], 130, 5, 128)
        data8, scale8 = dev.fetch(q8).view(np.uint8)[:, :, i], untiled(tiles8[i], 130, 4, 128)
        assert not data[n:].any() and not scale[n:].any() and not data8[n:].any() and not scale8[n:].any()
        if n:
            want = nvfp4_quantize(x[i, :n].copy(), float(g[i]), 2)
            oracles.check_bits(data[:n].copy(), want[0])
            oracles.check_bits(scale[:n].copy(), want[1])
            want = mxfp8_quantize(x[i, :n].copy(), False, 128)
            oracles.check_bits(data8[:n].copy(), want[0].view(np.uint8))
            oracles.check_bits(scale8[:n].copy(), want[1].reshape(n, 4))


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16], ids=lambda d: np.dtype(d).name)
def test_silu_and_mul(dev: Any, dtype: Any) -> None:
    """The float64 product, rounded to x's dtype and quantised, but where a last bit of float32 decides a rounding."""
    x = (draw("normal", (2, 33, 128), np.float32) * 4).astype(dtype)
    gate, up_ = np.split(x.astype(np.float64), 2, axis=-1)
    h = (gate / (1 + np.exp(-gate)) * up_).reshape(66, 64).astype(dtype).astype(np.float64)
    g = np.float32(2688) / np.abs(h).max()
    for layout, tile in (({}, 128), ({"is_sf_8x4_layout": True}, 8), ({"is_sf_swizzled_layout": False}, 1)):
        q, sf = silu_and_mul_nvfp4_quantize(dev.put(x), float(g), **layout)
        want = nvfp4_quantize(h.astype(np.float32), float(g), 2)
        scale = untiled(dev.fetch(sf), 66, 4, tile)
        assert (scale != want[1]).mean() < 0.01
        got, exact = real(dev.fetch(q), scale, 16, "e4m3") / g, real(*want, 16, "e4m3") / g
        assert (got != exact).mean() < 0.01
        bound = np.repeat(np.abs(h).reshape(66, 4, 16).max(-1), 16, axis=-1) * (1 / 6 + 1 / 16 + 2.0**-8) + 6 * 2.0**-9 / g
        assert (np.abs(got - h) <= bound).all()


def test_smooth(dev: Any) -> None:
    x = draw("normal", (20, 64))
    smooth = draw("skewed", (64,)) + np.asarray(0.5, BF16)
    product = (x.astype(np.float32) * smooth.astype(np.float32)).astype(BF16)
    g = global_scale(product)
    q, sf = nvfp4_quantize_smooth(dev.put(x), dev.put(smooth), dev.put(g))
    want = nvfp4_quantize(product, g)
    same(dev, q, want[0])
    same(dev, sf, want[1].reshape(-1))


def test_make_global_scale(dev: Any) -> None:
    for shape in ((7, 33), (2, 3, 16), (2, 2, 2, 6)):
        x = draw("normal", shape)
        g = dev.fetch(make_nvfp4_global_scale(dev.put(x), False))
        assert g.shape == (1,) and g.dtype == np.float32
        np.testing.assert_allclose(g, global_scale(x), rtol=2.0**-23)
    assert dev.fetch(make_nvfp4_global_scale(dev.put(x), True))[0] == np.float32(1 / 2688)
    assert dev.fetch(make_nvfp4_global_scale(dev.put(x), False, 12.5))[0] == 12.5
    assert dev.fetch(make_nvfp4_global_scale(dev.put(np.zeros((2, 4), np.float32)), False))[0] == 1


# --- 8 bits by groups -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256, 512])
def test_per_token_group(dev: Any, group: int, dtype: str) -> None:
    x = draw("mixed_rows", (11, 1024), np.float32)
    x[2, :group] = 0
    largest = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}[dtype]
    parts = x.reshape(11, -1, group)
    for eps in (1e-10, 0.5):
        s = (np.maximum(np.abs(parts).max(-1), np.float32(eps)) / np.float32(largest)).astype(np.float32)
        for ue8m0 in (False, True):
            scale = np.exp2(np.ceil(np.log2(s.astype(np.float64)))).astype(np.float32) if ue8m0 else s
            ratio = parts / scale[..., None]
            codes = np.rint(ratio).astype(np.int8) if dtype == "int8" else ratio.astype(oracles.dtype_of(dtype))
            q, got = per_token_group_quant_8bit(dev.put(x), group, eps, dtype, scale_ue8m0=ue8m0)
            same(dev, got, scale, f"{group} {eps} {ue8m0}")
            same(dev, q, codes.reshape(x.shape), f"{group} {eps} {ue8m0}")


def test_per_token_group_layouts(dev: Any) -> None:
    x = draw("normal", (5, 256))
    q, s = per_token_group_quant_8bit(dev.put(x), 64)
    assert dev.fetch(q).dtype == E4M3 and dev.fetch(s).shape == (5, 4)
    for aligned, pitch in ((False, 5), (True, 8)):
        column = per_token_group_quant_8bit(dev.put(x), 64, column_major_scales=True, scale_tma_aligned=aligned)
        same(dev, column[0], dev.fetch(q))
        np.testing.assert_array_equal(dev.fetch(column[1]), dev.fetch(s))
        if strided(dev):
            assert strides_of(column[1]) == (1, pitch)
    for shape in ((2, 5, 128), (2, 2, 3, 128), (128,)):
        x = draw("normal", shape, np.float16)
        q, s = per_token_group_quant_8bit(dev.put(x), 32, dst_dtype="int8")
        flat = per_token_group_quant_8bit(x.reshape(-1, 128), 32, dst_dtype="int8")
        same(dev, q, flat[0].reshape(shape))
        same(dev, s, flat[1].reshape(*shape[:-1], 4))


@pytest.mark.requires("torch")
def test_dtypes_of_every_kind_name_the_same_result() -> None:
    import torch

    x = draw("normal", (4, 128))
    want = per_token_group_quant_8bit(x, 128)
    for dtype in (None, "float8_e4m3fn", torch.float8_e4m3fn, E4M3, E4M3.type):
        got = per_token_group_quant_8bit(x, 128, dst_dtype=dtype)
        oracles.check_bits(got[0], want[0])


# --- empty, planned, traced -------------------------------------------------------------------------------------------------------


def test_empty(dev: Any) -> None:
    for shape in ((0, 64), (3, 0), (2, 0, 32)):
        x = dev.put(np.zeros(shape, BF16))
        m, k = int(np.prod(shape[:-1])), shape[-1]
        for fn, args in ((nvfp4_quantize, (1.0,)), (mxfp4_quantize, ())):
            q, sf = fn(x, *args)
            assert dev.fetch(q).shape == (*shape[:-1], k // 2)
            assert dev.fetch(sf).shape == (up(m, 128), up(-(-k // (16 if args else 32)), 4)) and not dev.fetch(sf).any()
        q, sf = mxfp8_quantize(x)
        assert dev.fetch(q).shape == shape and not dev.fetch(sf).any()


def test_planning() -> None:
    """Spec stands for every array; nothing runs."""
    x, g = Spec((4, 64), "bfloat16"), Spec((1,), "float32")
    before = launch.launches
    for fn, args in (
        (fp4_quantize, (x, g)),
        (nvfp4_quantize, (x, g)),
        (mxfp4_quantize, (x,)),
        (mxfp8_quantize, (x,)),
        (mxfp8_quantize, (Spec((2, 2, 2, 64), "float16"),)),
        (nvfp4_batched_quantize, (Spec((2, 4, 64), "bfloat16"), g)),
        (silu_and_mul_nvfp4_quantize, (x, g)),
        (nvfp4_quantize_smooth, (x, Spec((64,), "bfloat16"), g)),
        (scaled_fp4_grouped_quantize, (Spec((2, 4, 64), "bfloat16"), Spec((2,), "int32"), Spec((2,), "float32"))),
        (mxfp8_grouped_quantize, (Spec((2, 4, 64), "bfloat16"), Spec((2,), "int32"))),
        (per_token_group_quant_8bit, (x, 32)),
        (make_nvfp4_global_scale, (x, False)),
        (block_scale_interleave, (Spec((4, 4), "uint8"),)),
        (e2m1_and_ufp8sf_scale_to_float, (Spec((4, 32), "uint8"), Spec((512,), "uint8"), g)),
        (mxfp4_dequantize, (Spec((4, 32), "uint8"), Spec((512,), "uint8"))),
        (mxfp8_dequantize_host, (Spec((4, 64), "float8_e4m3fn"), Spec((512,), "uint8"))),
    ):
        assert "cugemm." in explain(fn, *args), fn.__name__
    keywords = {"column_major_scales": True, "scale_tma_aligned": True}
    assert "cugemm." in explain(per_token_group_quant_8bit, Spec((5, 64), "bfloat16"), 32, **keywords)
    assert launch.launches == before


@pytest.mark.requires("jax")
def test_inside_jit() -> None:
    import jax

    x, g = draw("normal", (16, 64)), np.array([3.0], np.float32)
    for fn, args in ((nvfp4_quantize, (x, g)), (fp4_quantize, (x, g)), (mxfp4_quantize, (x,)), (mxfp8_quantize, (x,))):
        placed = tuple(jax.device_put(a, jax.devices("cpu")[0]) for a in args)
        for got, want in zip(jax.jit(fn)(*placed), fn(*args), strict=True):
            oracles.check_bits(np.asarray(got), want, fn.__name__)


@pytest.mark.requires("torch")
def test_meta_tensors() -> None:
    import torch

    q, sf = mxfp8_quantize(torch.empty(5, 96, dtype=torch.bfloat16, device="meta"))
    assert (q.device.type, q.dtype, tuple(q.shape), tuple(sf.shape)) == ("meta", torch.float8_e4m3fn, (5, 96), (128 * 4,))


# --- errors -----------------------------------------------------------------------------------------------------------------------

X = draw("normal", (4, 64))
X3 = draw("normal", (2, 4, 64))
Q, SF = np.zeros((4, 32), np.uint8), np.zeros((4, 4), np.uint8)
COUNTS = np.array([1, 2], np.int32)
F64 = X.astype(np.float64)

ERRORS: list[tuple[type[Exception], tuple[str, ...], Callable[[], Any]]] = [
    (ValueError, ("fp4_quantize", "backend", "'nope'", "'cute-dsl'"), lambda: fp4_quantize(X, 1.0, backend="nope")),
    (ValueError, ("fp4_quantize", "sf_vec_size is 32", "sf_use_ue8m0"), lambda: fp4_quantize(X, 1.0, 32)),
    (ValueError, ("fp4_quantize", "sf_vec_size is 16", "mxfp4"), lambda: fp4_quantize(X, 1.0, 16, True)),
    (ValueError, ("fp4_quantize", "sf_vec_size is 24"), lambda: fp4_quantize(X, 1.0, 24)),
    (ValueError, ("fp4_quantize", "global_scale is 3.0", "multiply"), lambda: fp4_quantize(X, 3.0, 32, True)),
    (TypeError, ("fp4_quantize", "global_scale is missing"), lambda: fp4_quantize(X)),
    (TypeError, ("fp4_quantize", "float64"), lambda: fp4_quantize(F64, 1.0)),
    (TypeError, ("fp4_quantize", "input", "list"), lambda: fp4_quantize([[1.0]], 1.0)),
    (ValueError, ("fp4_quantize", "(64,)", "[rows, k]"), lambda: fp4_quantize(X[0], 1.0)),
    (ValueError, ("fp4_quantize", "k = 63", "64"), lambda: fp4_quantize(X[:, :63].copy(), 1.0)),
    (TypeError, ("fp4_quantize", "global_scale", "float64"), lambda: fp4_quantize(X, np.ones(1))),
    (ValueError, ("fp4_quantize", "global_scale", "(3,)"), lambda: fp4_quantize(X, np.ones(3, np.float32))),
    (TypeError, ("nvfp4_quantize", "a_global_sf is missing"), lambda: nvfp4_quantize(X, None)),
    (ValueError, ("nvfp4_quantize", "sf_vec_size is 32"), lambda: nvfp4_quantize(X, 1.0, sf_vec_size=32)),
    (ValueError, ("nvfp4_quantize", "sfLayout is 7", "layout_8x4"), lambda: nvfp4_quantize(X, 1.0, 7)),
    (ValueError, ("nvfp4_quantize", "backend"), lambda: nvfp4_quantize(X, 1.0, backend="cutile")),
    (ValueError, ("nvfp4_quantize", "do_shuffle", "128", "(4, 64)"), lambda: nvfp4_quantize(X, 1.0, do_shuffle=True)),
    (ValueError, ("nvfp4_quantize", "do_shuffle", "8x4"), lambda: nvfp4_quantize(draw("normal", (128, 32)), 1.0, 1, True)),
    (ValueError, ("nvfp4_quantize", "a_global_sf is 2.0", "448 * 6"), lambda: nvfp4_quantize(X, 2.0, per_token_activation=True)),
    (ValueError, ("nvfp4_quantize", "expanded_idx"), lambda: nvfp4_quantize(X, 1.0, expanded_idx_to_permuted_idx=COUNTS)),
    (ValueError, ("mxfp4_quantize", "sfLayout is 'swizzled'"), lambda: mxfp4_quantize(X, sfLayout="swizzled")),  # type: ignore[arg-type]
    (ValueError, ("mxfp4_quantize", "backend"), lambda: mxfp4_quantize(X, "triton")),
    (TypeError, ("mxfp4_quantize", "int32"), lambda: mxfp4_quantize(X.astype(np.int32))),
    (ValueError, ("mxfp8_quantize", "alignment is 48", "32"), lambda: mxfp8_quantize(X, alignment=48)),
    (ValueError, ("mxfp8_quantize", "alignment is 0"), lambda: mxfp8_quantize(X, alignment=0)),
    (ValueError, ("mxfp8_quantize", "sf_swizzle_layout is 3"), lambda: mxfp8_quantize(X, sf_swizzle_layout=3)),
    (ValueError, ("mxfp8_quantize", "backend"), lambda: mxfp8_quantize(X, backend="")),
    (ValueError, ("nvfp4_batched_quantize", "(4, 64)", "[batch, m, k]"), lambda: nvfp4_batched_quantize(X, 1.0)),
    (ValueError, ("nvfp4_batched_quantize", "sf_vec_size"), lambda: nvfp4_batched_quantize(X3, 1.0, 32)),
    (TypeError, ("nvfp4_batched_quantize", "a_global_sf is missing"), lambda: nvfp4_batched_quantize(X3, None)),
    (ValueError, ("nvfp4_batched_quantize", "a_global_sf", "(3,)"), lambda: nvfp4_batched_quantize(X3, np.ones(3, np.float32))),
    (ValueError, ("silu_and_mul_nvfp4_quantize", "63"), lambda: silu_and_mul_nvfp4_quantize(X[:, :63].copy(), 1.0)),
    (ValueError, ("silu_and_mul_nvfp4_quantize", "sf_vec_size"), lambda: silu_and_mul_nvfp4_quantize(X, 1.0, 32)),
    (TypeError, ("silu_and_mul_nvfp4_quantize", "global_scale is missing"), lambda: silu_and_mul_nvfp4_quantize(X, None)),
    (ValueError, ("nvfp4_quantize_smooth", "pre_quant_scale", "(4,)", "64"), lambda: nvfp4_quantize_smooth(X, X[:, 0].copy(), 1.0)),
    (ValueError, ("nvfp4_quantize_smooth", "(2, 4, 64)", "[m, k]"), lambda: nvfp4_quantize_smooth(X3, X[0], 1.0)),
    (TypeError, ("nvfp4_quantize_smooth", "pre_quant_scale is missing", "k factors"), lambda: nvfp4_quantize_smooth(X, None, 1.0)),
    (ValueError, ("nvfp4_quantize_smooth", "backend"), lambda: nvfp4_quantize_smooth(X, X[0], 1.0, backend="cuda")),
    (ValueError, ("scaled_fp4_grouped_quantize", "(4, 64)", "groups"), lambda: scaled_fp4_grouped_quantize(X, COUNTS, 1.0)),
    (TypeError, ("scaled_fp4_grouped_quantize", "mask is missing"), lambda: scaled_fp4_grouped_quantize(X3, None, 1.0)),
    (TypeError, ("scaled_fp4_grouped_quantize", "a_global_sf is missing"), lambda: scaled_fp4_grouped_quantize(X3, COUNTS, None)),
    (TypeError, ("scaled_fp4_grouped_quantize", "mask", "float32"), lambda: scaled_fp4_grouped_quantize(X3, np.ones(2, np.float32), 1.0)),
    (ValueError, ("mxfp8_grouped_quantize", "mask", "(3,)", "(2,)"), lambda: mxfp8_grouped_quantize(X3, np.ones(3, np.int32))),
    (ValueError, ("mxfp8_grouped_quantize", "(4, 64)"), lambda: mxfp8_grouped_quantize(X, COUNTS)),
    (ValueError, ("per_token_group_quant_8bit", "group_size is 24", "128"), lambda: per_token_group_quant_8bit(X, 24)),
    (ValueError, ("per_token_group_quant_8bit", "(4, 64)", "128"), lambda: per_token_group_quant_8bit(X, 128)),
    (ValueError, ("per_token_group_quant_8bit", "dst_dtype", "int8"), lambda: per_token_group_quant_8bit(X, 64, dst_dtype="int16")),
    (TypeError, ("per_token_group_quant_8bit", "dst_dtype"), lambda: per_token_group_quant_8bit(X, 64, dst_dtype=3)),
    (ValueError, ("per_token_group_quant_8bit", "tma"), lambda: per_token_group_quant_8bit(X, 64, scale_tma_aligned=True)),
    (ValueError, ("per_token_group_quant_8bit", "(2, 4, 64)"), lambda: per_token_group_quant_8bit(X3, 64, column_major_scales=True)),
    (ValueError, ("per_token_group_quant_8bit", "backend"), lambda: per_token_group_quant_8bit(X, 64, backend="cuda")),
    (ValueError, ("per_token_group_quant_8bit", "eps is -1"), lambda: per_token_group_quant_8bit(X, 64, -1.0)),
    (ValueError, ("nvfp4_4over6_config",), lambda: make_nvfp4_global_scale(X, False, None, object())),  # type: ignore[arg-type]
    (TypeError, ("make_nvfp4_global_scale", "global_scale"), lambda: make_nvfp4_global_scale(X, False, np.ones(1, np.float32))),  # type: ignore[arg-type]
    (ValueError, ("(4,)", "[rows, blocks]"), lambda: block_scale_interleave(SF[0])),
    (TypeError, ("float64", "uint8"), lambda: block_scale_interleave(SF.astype(np.float64))),
    (ValueError, ("shuffle_matrix_a", "(4, 64)", "32"), lambda: shuffle_matrix_a(X, 128)),
    (ValueError, ("shuffle_matrix_a", "(2, 4, 64)"), lambda: shuffle_matrix_a(X3, 128)),
    (ValueError, ("shuffle_matrix_a", "epilogue_tile_m is 0"), lambda: shuffle_matrix_a(X, 0)),
    (TypeError, ("shuffle_matrix_a", "input_tensor"), lambda: shuffle_matrix_a([1], 128)),
    (ValueError, ("shuffle_matrix_sf_a", "(4, 4)", "128"), lambda: shuffle_matrix_sf_a(SF, 128)),
    (ValueError, ("shuffle_matrix_sf_a", "num_elts_per_sf is 8"), lambda: shuffle_matrix_sf_a(SF, 128, 8)),
    (ValueError, ("sf_scale_to_float", "sf_vec_size is 32", "ufp8_type 1"), lambda: e2m1_and_ufp8sf_scale_to_float(Q, SF, 1.0, 32)),
    (ValueError, ("sf_scale_to_float", "is_sf_8x4_layout"), lambda: e2m1_and_ufp8sf_scale_to_float(Q, SF, 1.0, 16, 1, False, True)),
    (ValueError, ("global_scale_tensor", "(2,)"), lambda: e2m1_and_ufp8sf_scale_to_float(Q, SF, np.ones(2, np.float32))),
    (ValueError, ("(4, 4)", "(128, 4)"), lambda: e2m1_and_ufp8sf_scale_to_float(Q, SF, 1.0)),  # linear scales, tiled ones announced
    (TypeError, ("int32",), lambda: mxfp4_dequantize(Q.astype(np.int32), SF)),
    (ValueError, ("mxfp4_dequantize", "sfLayout is 9"), lambda: mxfp4_dequantize(Q, SF, 9)),
    (ValueError, ("mxfp4_dequantize_host", "group_size is 16"), lambda: mxfp4_dequantize_host(Q, SF, 16)),
    (ValueError, ("(4, 4)", "(4, 2)"), lambda: mxfp4_dequantize_host(Q, SF)),
    (ValueError, ("mxfp8_dequantize_host", "sf_swizzle_layout is 5"), lambda: mxfp8_dequantize_host(Q, SF, True, 5)),
    (TypeError, ("float32", "uint8"), lambda: mxfp8_dequantize_host(X.astype(E4M3), SF.astype(np.float32), False)),
]  # fmt: skip


@pytest.mark.parametrize("i", range(len(ERRORS)))
def test_refused_in_words(i: int) -> None:
    kind, words, call = ERRORS[i]
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind, caught.value
    for word in words:
        assert word in str(caught.value), f"{caught.value} lacks {word}"
