"""Conversions on the GPU are the reference's bit for bit: golden files, every 16-bit value, every scale, shapes, strides, options."""

from __future__ import annotations

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_arrays
import numpy as np
import oracles
import pytest
from gpu_arrays import LAYOUTS, planned

import cugemm
from cugemm import launch
from cugemm import quantize_reference as reference
from cugemm.api.quantize import DEQUANTIZE, QUANTIZE
from cugemm.api.shuffle import INTERLEAVE
from cugemm.conversion import QuantizeOptions
from cugemm.formats import FORMATS, Format

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

Array = np.ndarray[Any, Any]
GOLDEN = Path(__file__).parent / "golden"
FP8 = {name: f for name, f in FORMATS.items() if name.startswith("fp8_")}
GROUPED = [name for name, f in FORMATS.items() if f.block[0] == 1 and f.block[1]]
BYTES = [name for name, f in FORMATS.items() if f.scale.name != "fp32"]
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
    results = reference.quantize(x, fmt)
    q = cugemm.quantize(dev.put(x), fmt.name)
    tensor = q.tensor_scale if fmt.tensor is not None else None
    for role, got, want in zip(
        ("data", "scale", "more"), (q.data, q.scale, q.zero if fmt.zero else tensor), (*results, None), strict=False
    ):
        if want is not None:
            oracles.check_bits(dev.fetch(got), want, f"{role}, {where}")
    assert q.shape == x.shape


def cast(dev: Any, x: Array, fmt: Format) -> Array:
    return np.asarray(dev.fetch(launch.run(QUANTIZE, (dev.put(x), None, None, None), QuantizeOptions(fmt.name, cast=True))))


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


# --- every format: values, scales, options ----------------------------------------------------------------------------------------


def mismatches(dev: Any, x: Array, name: str, where: str = "", **options: Any) -> int:
    """Count of wrong elements of any result of `quantize` on x; arrays among the options are arguments."""
    arguments = {role: options.pop(role, None) for role in ("tensor_scale", "pre_scale", "counts")}
    want = reference.quantize(x, FORMATS[name], **arguments, **{"layout" if k == "scale_layout" else k: v for k, v in options.items()})
    arrays = (dev.put(x), *(dev.put(a) for a in arguments.values()))
    got = launch.run(QUANTIZE, arrays, QuantizeOptions(name, **options))
    assert len(got) == len(want), where
    wrong = 0
    for g, w in zip(got, want, strict=True):
        fetched = dev.fetch(g)
        assert (fetched.shape, fetched.dtype) == (w.shape, w.dtype), where
        bits = f"u{w.dtype.itemsize}"
        wrong += int(np.count_nonzero(fetched.view(bits) != np.ascontiguousarray(w).view(bits)))
    return wrong


def check(dev: Any, x: Array, name: str, where: str = "", **options: Any) -> None:
    assert mismatches(dev, x, name, where, **options) == 0, f"{name} {x.shape} {x.dtype} {options} {where}"


def check_back(dev: Any, x: Array, name: str, dtype: str, **options: Any) -> None:
    """dequantize of what quantize made, NaN wherever and however the twin has them."""
    fmt = FORMATS[name]
    made = reference.quantize(x, fmt, **{"layout" if k == "scale_layout" else k: v for k, v in options.items()})
    tensor, zero = (made[2] if fmt.tensor is not None else None), (made[-1] if fmt.zero else None)
    layout, flat = options.get("scale_layout", "linear"), options.get("flat", False)
    want = reference.dequantize(made[0], made[1], fmt, dtype, tensor_scale=tensor, zero=zero, layout=layout, flat=flat)
    arrays = tuple(None if a is None else dev.put(a) for a in (made[0], made[1], tensor, zero))
    got = dev.fetch(launch.run(DEQUANTIZE, arrays, QuantizeOptions(name, dtype=dtype, scale_layout=layout, flat=flat)))
    nan = np.isnan(want.astype(np.float32))
    assert (np.isnan(got.astype(np.float32)) == nan).all(), name
    bits = f"u{want.dtype.itemsize}"
    oracles.check_bits(np.where(nan, 0, got.view(bits)), np.where(nan, 0, want.view(bits)), f"{name} {dtype} {options}")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", GROUPED)
def test_every_value_alone(dev: Any, target: str, name: str) -> None:
    """Each of the 65,536 bf16 (and fp16) values as the only one of its block."""
    block = FORMATS[name].block[1]
    for dtype in ("bfloat16", "float16"):
        x = np.zeros((65536, block), np.uint16)
        x[np.arange(65536), np.arange(65536) % block] = np.arange(65536)
        with planned(target=target):
            check(dev, x.view(oracles.dtype_of(dtype)), name, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", BYTES)
def test_every_value_under_every_scale(dev: Any, target: str, name: str) -> None:
    """For each scale code a block maximum that gives it, beside every finite bf16 value up to that maximum."""
    fmt = FORMATS[name]
    block = fmt.block[1]
    every = np.arange(65536, dtype=np.uint16).view(oracles.dtype_of("bfloat16")).astype(np.float32)
    finite = np.unique(every[np.isfinite(every)])
    values = reference.scale_values(np.arange(255, dtype=np.uint8), fmt.scale)
    options: dict[str, Any] = {"tensor_scale": np.ones(1, np.float32)} if fmt.tensor is not None else {}
    wrong = total = 0
    with planned(target=target):
        for code in range(127 if fmt.scale.name == "e4m3" else 255):
            with np.errstate(over="ignore"):
                most = np.minimum(values[code] * np.float32(fmt.element.max), finite[-1])
            inside = np.append(finite[np.abs(finite) <= most], np.float32(-0.0))
            rows = -(-len(inside) // (block - 1))
            x = np.full((rows, block), most, np.float32)
            x[:, 1:] = np.resize(inside, rows * (block - 1)).reshape(rows, block - 1)
            wrong += mismatches(dev, x, name, **options)
            total += x.size
    print(f"{name} {target}: {total} values, {wrong} mismatches")
    assert wrong == 0


RANDOM_BLOCKS = 10**7


@pytest.mark.parametrize("name", GROUPED)
def test_ten_million_random_blocks(dev: Any, name: str) -> None:
    """Blocks of random bf16 within 16 binades of a random one (a few hold NaN or inf), and random bit patterns."""
    block = FORMATS[name].block[1]
    rows = 2**22 // block
    chunks = -(-RANDOM_BLOCKS // rows)
    options: dict[str, Any] = {"tensor_scale": np.array([0.011], np.float32)} if FORMATS[name].tensor is not None else {}

    def chunk(i: int) -> int:
        rng = np.random.default_rng([i, block])
        bits = rng.integers(0, 65536, (rows, block), dtype=np.uint16)
        if i % 4:
            down = bits >> 7 & 15
            exponent = np.maximum(rng.integers(0, 256, (rows, 1), dtype=np.uint16), down) - down
            bits = bits & 0x807F | exponent << 7
        return mismatches(dev, bits.view(oracles.dtype_of("bfloat16")), name, **options)

    start = time.perf_counter()
    first = chunk(0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy takes the time, mostly without the GIL
        wrong = first + sum(pool.map(chunk, range(1, chunks)))
    print(f"{name}: {chunks * rows} blocks of {block}, {wrong} mismatches, {time.perf_counter() - start:.1f} s")
    assert wrong == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in FP8])
def test_any_shape(dev: Any, name: str, dtype: str) -> None:
    rng = np.random.default_rng(12)
    shapes = [
        (1, 2),
        (3, 8),
        (1, 130),
        (129, 2),
        (17, 128),
        (65, 126),
        (127, 300),
        (257, 128),
        (1, 4098),
        (2, 3, 130),
        (3, 130, 258),
        (5, 2, 64),
    ]
    for i, shape in enumerate(shapes):
        x = wide(rng, shape, dtype) if i % 2 else rng.standard_normal(shape).astype(oracles.dtype_of(dtype))
        for layout in ("row", list(LAYOUTS)[i % 5]):
            check_quantize(dev, LAYOUTS[layout](x) if layout != "row" else x, FORMATS[name], f"{name} {shape} {layout}")
        check_back(dev, x, name, dtype)


@pytest.mark.parametrize("name", BYTES)
def test_scale_layouts(dev: Any, name: str) -> None:
    rng = np.random.default_rng(13)
    for layout, flat, shape in itertools.product(
        ("linear", "128x4", "8x4"), (False, True), ((5, 96), (130, 272), (3, 9, 160), (2, 128, 64))
    ):
        x = wide(rng, shape, "bfloat16")
        check(dev, x, name, scale_layout=layout, flat=flat)
        check(dev, oracles.embed(x), name, scale_layout=layout, flat=flat)
        check_back(dev, x, name, "bfloat16", scale_layout=layout, flat=flat)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GROUPED)
def test_options(dev: Any, name: str, dtype: str) -> None:
    """silu, pre_scale, counts, align, each alone and together, in every layout; scales that nothing was written to would show."""
    rng = np.random.default_rng(14)
    fmt = FORMATS[name]
    tiled = ("linear", "128x4", "8x4") if name in BYTES else ("linear",)
    x = wide(rng, (3, 70, 160), dtype)
    halves = np.concatenate([rng.standard_normal((3, 70, 160)) * 4, wide(rng, (3, 70, 160), dtype).astype(np.float32)], axis=-1)
    halves = halves.astype(oracles.dtype_of(dtype))
    for pre_dtype, counts_dtype, layout in itertools.product(("float32", "bfloat16"), ("int32", "int64"), tiled):
        pre = (rng.random(160) + 0.5).astype(oracles.dtype_of(pre_dtype))
        counts = np.array([70, 33, -2], counts_dtype)
        check(dev, x, name, counts=counts, pre_scale=pre, scale_layout=layout)
        check(dev, halves, name, counts=counts[::-1].copy(), scale_layout=layout, silu=True)
        check(dev, halves, name, pre_scale=pre, scale_layout=layout, silu=True, flat=name in BYTES)
        check(dev, x, name, scale_layout=layout, align=128)
    if fmt.scale.name == "fp32" and not fmt.zero:
        for group, axes, power in itertools.product((0, 16, 64, 256, 512), ("mk", "km"), (False, True)):
            check(dev, x, name, group=group, scale_axes=axes, ceil_scale=power, eps=1e-10)
    if fmt.tensor is not None:
        per = np.exp2(rng.integers(-9, 3, (3, 70, 1) if fmt.tensor[0] else (3,))).astype(np.float32) * np.float32(1.3)
        for scale, inverse, emit in itertools.product((0.37, np.array([2e-3], np.float32), per), (False, True), (False, True)):
            check(dev, x, name, tensor_scale=scale, encode_scale=inverse, emit_tensor=emit)


@pytest.mark.parametrize("target", TARGETS)
def test_silu_of_every_bf16_gate(dev: Any, target: str) -> None:
    gate = np.arange(65536, dtype=np.uint16).view(oracles.dtype_of("bfloat16")).reshape(512, 128)
    x = np.concatenate([gate, np.ones_like(gate)], axis=1)
    with planned(target=target):
        check(dev, x, "fp8_group", silu=True)
        check(dev, x.astype(np.float32), "nvfp4", silu=True, tensor_scale=np.ones(1, np.float32))


def test_interleave(dev: Any) -> None:
    rng = np.random.default_rng(15)
    for shape, layout, flat in itertools.product(((1, 1), (5, 7), (130, 9), (3, 33, 4), (2, 256, 12)), ("128x4", "8x4"), (False, True)):
        for dtype in ("uint8", "bfloat16"):
            scale = rng.integers(1, 250, shape).astype(oracles.dtype_of(dtype))
            options = QuantizeOptions("", scale_layout=layout, flat=flat)
            for source in (scale, oracles.embed(scale)):
                got = dev.fetch(launch.run(INTERLEAVE, (dev.put(source),), options))
                oracles.check_bits(got, launch.run(INTERLEAVE, (scale,), options), f"{shape} {layout}")


@pytest.mark.parametrize("name", FORMATS)
def test_large_and_long(dev: Any, name: str) -> None:
    """Many CTAs for one amax, and rows longer than registers hold."""
    rng = np.random.default_rng(16)
    for shape, dtype in itertools.product(((2049, 1536), (3, 40064)), ("bfloat16", "float32")):
        x = rng.standard_normal(shape).astype(oracles.dtype_of(dtype))
        x[-1, -1] = -77.0
        check_quantize(dev, x, FORMATS[name], name)
        check_back(dev, x, name, dtype)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 32), (5, 0), (2, 0, 4), (0, 3, 4), (2, 3, 0)], ids=str)
def test_empty_of_every_format(dev: Any, shape: tuple[int, ...], name: str) -> None:
    check_quantize(dev, np.zeros(shape, np.float32), FORMATS[name], f"{name} {shape}")


def test_capture(dev: Any) -> None:
    """quantize and dequantize of every format in one CUDA graph: replayed on new values, it gives what a call would."""
    cupy = dev.cupy
    rng = np.random.default_rng(17)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        x = dev.put(rng.standard_normal((130, 256)).astype(np.float32))

        def convert() -> tuple[dict[str, Any], dict[str, Any]]:
            made = {name: cugemm.quantize(x, name) for name in FORMATS}
            return made, {name: cugemm.dequantize(q, "float32") for name, q in made.items()}

        warm = convert()  # compiles, and leaves the memory of its results to the capture
        stream.synchronize()
        del warm
        stream.begin_capture()
        made, backs = convert()
        graph = stream.end_capture()
        for _ in range(2):
            new = rng.standard_normal((130, 256)).astype(np.float32)
            x[...] = dev.put(new)
            graph.launch(stream)
            stream.synchronize()
            for name, q in made.items():
                want = reference.quantize(new, FORMATS[name])
                oracles.check_bits(dev.fetch(q.data), want[0], name)
                oracles.check_bits(dev.fetch(q.scale), want[1], name)
                assert np.isfinite(dev.fetch(backs[name])).all()


def test_offsets_past_two_gigabytes(dev: Any) -> None:
    """The last rows of 4.3e9 bytes of bf16 are quantised as by themselves."""
    cupy = dev.cupy
    rows, k = 2**19 + 3, 4096
    if cupy.cuda.Device().mem_info[0] < 12e9:
        pytest.skip("needs 12 GB")
    x = cupy.zeros((rows, k), "uint16").view(oracles.dtype_of("bfloat16"))
    tail = np.random.default_rng(18).standard_normal((5, k)).astype(oracles.dtype_of("bfloat16"))
    x.view("uint16")[-5:] = cupy.asarray(tail.view(np.uint16))
    for name in ("nvfp4", "mxfp8", "fp8_row", "fp8_group", "int4_g32"):
        options = {"tensor_scale": cupy.ones(1, "float32")} if name == "nvfp4" else {}
        q = cugemm.quantize(x, name, **options)
        want = reference.quantize(tail, FORMATS[name], **({"tensor_scale": np.float32(1)} if options else {}))
        oracles.check_bits(dev.fetch(q.data[-5:]), want[0], name)
        oracles.check_bits(dev.fetch(q.scale[-5:]), want[1], name)
        back = dev.fetch(cugemm.dequantize(q, "bfloat16")[-5:])
        expected = reference.dequantize(want[0], want[1], FORMATS[name], "bfloat16", tensor_scale=np.float32(1) if options else None)
        oracles.check_bits(back, expected, name)
        assert not dev.fetch(q.data[:3]).view(np.uint8).any()
        del q
        dev.free()
