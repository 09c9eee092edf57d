"""Conversions on the GPU are the reference's bit for bit: golden files, every 16-bit value, every code, odd shapes and strides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu_arrays
import numpy as np
import oracles
import pytest
from gpu_arrays import LAYOUTS, planned

import cugemm
from cugemm import launch, reference
from cugemm.conversion import QuantizeOptions
from cugemm.formats import FORMATS, Format
from cugemm.problem import OPS

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

Array = np.ndarray[Any, Any]
GOLDEN = Path(__file__).parent / "golden"
FP8 = {name: f for name, f in FORMATS.items() if f.element.bits == 8}
DTYPES = ("bfloat16", "float16", "float32")
BLOCKS = {"tensor": (0, 0), "row": (1, 0), "group": (1, 128), "block": (128, 128)}
TARGETS = ("native", "compute_80", "compute_89")


@pytest.fixture(scope="module")
def dev() -> Any:
    return gpu_arrays.Cupy()


def load(name: str) -> dict[str, Array]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def format_of(element: str, block: tuple[int, int]) -> Format:
    return next(f for f in FP8.values() if f.element.name == element and f.block == block)


def check_quantize(dev: Any, x: Array, fmt: Format, where: str) -> None:
    data, scale = reference.quantize(x, fmt)
    q = cugemm.quantize(dev.put(x), fmt.name)
    oracles.check_bits(dev.fetch(q.scale), scale, f"scale, {where}")
    oracles.check_bits(dev.fetch(q.data), data, f"data, {where}")
    assert q.shape == x.shape


def cast(dev: Any, x: Array, fmt: Format) -> Array:
    return np.asarray(dev.fetch(launch.run(OPS["quantize"], (dev.put(x),), QuantizeOptions(fmt.name, cast=True))))


def check_dequantize(dev: Any, data: Array, scale: Array, fmt: Format, dtype: str, where: str) -> None:
    expected = reference.dequantize(data, scale, fmt, dtype)
    got = dev.fetch(cugemm.dequantize(cugemm.Quantized(dev.put(data), dev.put(scale), fmt), dtype))
    nan = np.isnan(expected.astype(np.float32))
    assert (np.isnan(got.astype(np.float32)) == nan).all(), where
    bits = f"u{expected.dtype.itemsize}"
    oracles.check_bits(np.where(nan, 0, got.view(bits)), np.where(nan, 0, expected.view(bits)), f"{dtype}, {where}")


def wide(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Values over many binades with zeros, NaN, inf and subnormals strewn in."""
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-9, 10, shape))
    special = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-40, -6e-8, 65504.0])
    with np.errstate(all="ignore"):
        return np.where(rng.random(shape) < 0.004, rng.choice(special, shape), x).astype(oracles.dtype_of(dtype))


# --- golden -----------------------------------------------------------------------------------------------------------------------


def test_golden_quantised(dev: Any) -> None:
    golden = load("quantised")
    names = [n for n in golden if n.endswith("/data")]
    for name in names:
        case, element, kind, _ = name.split("/")
        fmt = format_of(element, BLOCKS[kind])
        x = golden[case].view(oracles.dtype_of(oracles.ENCODINGS[case[:4]].dtype))
        for source in (x, oracles.embed(x), oracles.embed(x, transposed=True)):
            q = cugemm.quantize(dev.put(source), fmt)
            oracles.check_bits(dev.fetch(q.data), golden[name].view(oracles.dtype_of(fmt.element.dtype)), name)
            oracles.check_bits(dev.fetch(q.scale), golden[name.replace("/data", "/scale")].view(np.float32), name)
    assert len(names) == 36


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@pytest.mark.parametrize("source", ["bf16", "fp16"])
def test_cast_of_every_16_bit_value(dev: Any, target: str, element: str, source: str) -> None:
    x = np.arange(65536, dtype=np.uint16).view(oracles.dtype_of(oracles.ENCODINGS[source].dtype)).reshape(257 - 1, 256)
    fmt = format_of(element, (0, 0))
    with planned(target=target):
        codes = cast(dev, x, fmt).view(np.uint8)
    nan = np.isnan(x.astype(np.float32))
    expected = np.where(nan, 0x7F, load("casts")[f"{source}_{element}_clamped"].reshape(x.shape)).astype(np.uint8)
    oracles.check_bits(codes, expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_float32_bit_patterns(dev: Any, target: str, element: str) -> None:
    """Random patterns, everything around each code and the middles between them, subnormals, NaN of both signs."""
    rng = np.random.default_rng(3)
    table = np.sort(oracles.TABLES[element][np.isfinite(oracles.TABLES[element])]).astype(np.float32)
    edges = np.concatenate([table, (table[1:] + table[:-1]) / 2])
    edges = np.concatenate([edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(-np.inf))])
    patterns = rng.integers(0, 2**32, 2**17, dtype=np.uint32)
    patterns[: len(edges)] = edges.view(np.uint32)
    patterns[-8:] = [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 1, 0x80000001]
    x = patterns.view(np.float32).reshape(128, 1024)
    fmt = format_of(element, (1, 128))
    with planned(target=target):
        oracles.check_bits(cast(dev, x, fmt), reference.cast(x, fmt))
        check_quantize(dev, x, fmt, "random patterns")


# --- formats, shapes, strides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FP8)
def test_shapes_and_strides(dev: Any, name: str, dtype: str) -> None:
    rng = np.random.default_rng(11)
    fmt = FP8[name]
    shapes = [
        (1, 1),
        (3, 7),
        (1, 131),
        (129, 1),
        (17, 129),
        (65, 127),
        (127, 300),
        (257, 128),
        (1, 4099),
        (2, 3, 130),
        (3, 130, 257),
        (5, 2, 64),
    ]
    for i, shape in enumerate(shapes):
        x = wide(rng, shape, dtype) if i % 2 else rng.standard_normal(shape).astype(oracles.dtype_of(dtype))
        for layout in ("row", list(LAYOUTS)[i % 5]):
            check_quantize(dev, LAYOUTS[layout](x) if layout != "row" else x, fmt, f"{name} {shape} {layout}")
        data, scale = reference.quantize(x, fmt)
        check_dequantize(dev, data, scale, fmt, dtype, f"{name} {shape}")


@pytest.mark.parametrize("name", ["fp8_row", "fp8_e5m2_group", "fp8_tensor"])
def test_dequantize_every_code(dev: Any, name: str) -> None:
    rng = np.random.default_rng(2)
    fmt = FP8[name]
    data = np.broadcast_to(np.arange(256, dtype=np.uint8), (40, 256)).copy().view(oracles.dtype_of(fmt.element.dtype))
    _, like = reference.quantize(np.ones((40, 256), np.float32), fmt)
    scale = np.exp2(rng.uniform(-140, 120, like.shape)).astype(np.float32)
    scale.reshape(-1)[:1] = 1.0
    if scale.size > 4:
        scale.reshape(-1)[1:4] = np.inf, np.nan, 0.0
    for dtype in DTYPES:
        check_dequantize(dev, data, scale, fmt, dtype, name)


def test_transposed_and_payload_bytes(dev: Any) -> None:
    x = np.random.default_rng(1).standard_normal((130, 200)).astype(np.float32)
    q = cugemm.quantize(dev.put(x), "fp8_block")
    whole = dev.fetch(cugemm.dequantize(q, "float32"))
    np.testing.assert_array_equal(dev.fetch(cugemm.dequantize(q.T, "float32")), whole.T)
    as_bytes = cugemm.Quantized(q.data.view("uint8"), q.scale, "fp8_block")
    np.testing.assert_array_equal(dev.fetch(cugemm.dequantize(as_bytes, "float32")), whole)
    assert (np.abs(whole - x) <= np.abs(x) / 16 + np.abs(x).max() / 448 / 2).all()


def test_all_nan_and_twice(dev: Any) -> None:
    x = np.full((3, 260), np.nan, np.float32)
    x[1, 5] = 3.0
    for name, fmt in FP8.items():
        check_quantize(dev, x, fmt, name)
        check_quantize(dev, np.zeros((3, 260), np.float32), fmt, f"zeros {name}")
        check_quantize(dev, x, fmt, f"again {name}")  # the running amax starts at zero again


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (5, 0), (2, 0, 4), (0, 3, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_row", "fp8_group", "fp8_block"])
def test_empty(dev: Any, shape: tuple[int, ...], name: str) -> None:
    """No values, but perhaps scales: those of an empty block are the smallest."""
    for _ in range(2):  # the memory of the poison comes back as that of the result
        junk = [dev.put(np.full(16, np.nan, np.float32)) for _ in range(4)]
        del junk
        check_quantize(dev, np.zeros(shape, np.float32), FP8[name], f"{name} {shape}")


def test_large(dev: Any) -> None:
    """Many CTAs share one amax; offsets beyond 2^31 bytes are those of the products."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((2049, 1500)).astype(np.float32)
    x[2048, 1499] = -77.0
    for name in ("fp8_tensor", "fp8_block", "fp8_row", "fp8_group"):
        check_quantize(dev, x, FP8[name], name)
