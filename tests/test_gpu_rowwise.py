"""`combine` and `silu_and_mul` on the GPU are the NumPy twin bit for bit, over every dtype, layout and edge; nothing outside is touched."""

from __future__ import annotations

from typing import Any

import gpu_arrays
import numpy as np
import oracles
import pytest
from gpu_arrays import LAYOUTS, planned, untouched

from cugemm import rows_reference as twin
from cugemm.api.rowwise import combine, silu_and_mul

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

Array = np.ndarray[Any, Any]
DTYPES = ("bfloat16", "float16", "float32")
TARGETS = ("native", "compute_80", "compute_89")
SPECIAL = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-40, -6e-8, 65504.0, -87.5, -95.0, 3e38])


@pytest.fixture(scope="module")
def dev() -> Any:
    return gpu_arrays.Cupy()


def same(got: Array, expected: Array, where: str) -> None:
    """Equal bits; a NaN's sign and payload are the hardware's."""
    nan = np.isnan(expected.astype(np.float32))
    assert (np.isnan(got.astype(np.float32)) == nan).all(), where
    got, expected = np.ascontiguousarray(got), np.ascontiguousarray(expected)
    bits = f"u{expected.dtype.itemsize}"
    oracles.check_bits(np.where(nan, 0, got.view(bits)), np.where(nan, 0, expected.view(bits)), where)


def wide(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Values over many binades with NaN, inf, zeros and subnormals strewn in."""
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-9, 8, shape))
    with np.errstate(all="ignore"):
        return np.asarray(np.where(rng.random(shape) < 0.01, rng.choice(SPECIAL, shape), x).astype(oracles.dtype_of(dtype)))


def check_combine(dev: Any, y: Array, weights: Array, indices: Array | None, out_dtype: str, where: str) -> None:
    got = combine(dev.put(y), dev.put(weights), indices=dev.put(indices), out_dtype=out_dtype)
    same(dev.fetch(got), twin.combine(y, weights, indices, out_dtype), where)


def check_silu(dev: Any, x: Array, counts: Array | None, gate: str, out_dtype: str, where: str) -> None:
    got = silu_and_mul(dev.put(x), gate=gate, counts=dev.put(counts), out_dtype=out_dtype)
    same(dev.fetch(got), twin.silu_and_mul(x, counts, gate, out_dtype), where)


# --- silu over its whole domain ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_silu_of_every_16_bit_value(dev: Any, target: str, dtype: str) -> None:
    gate = np.arange(65536, dtype=np.uint16).view(oracles.dtype_of(dtype)).reshape(256, 256)
    x = np.concatenate([gate, np.ones_like(gate)], axis=1)
    with planned(target=target):
        for out_dtype in ("float32", dtype):
            check_silu(dev, x, None, "first", out_dtype, f"{dtype} {target}")


@pytest.mark.parametrize("target", TARGETS)
def test_silu_of_float32_patterns(dev: Any, target: str) -> None:
    """16 million random patterns, and as many values where exp neither overflows nor vanishes."""
    rng = np.random.default_rng(0)
    with planned(target=target):
        for _ in range(8):
            gate = rng.integers(0, 2**32, (1024, 2048), dtype=np.uint32).view(np.float32)
            check_silu(dev, np.concatenate([gate, np.ones_like(gate)], axis=1), None, "first", "float32", "patterns")
            gate = rng.uniform(-110, 95, (1024, 2048)).astype(np.float32)
            check_silu(dev, np.concatenate([gate, gate], axis=1), None, "second", "float32", "uniform")


# --- shapes, dtypes, layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine(dev: Any, dtype: str, out_dtype: str, target: str) -> None:
    rng = np.random.default_rng(1)
    shapes = [(1, 1, 1), (3, 2, 7), (5, 8, 8), (17, 3, 129), (33, 4, 256), (2, 10, 2049), (257, 1, 24), (4, 13, 64)]
    with planned(target=target):
        for i, shape in enumerate(shapes):
            y = wide(rng, shape, dtype)
            weights = wide(rng, shape[:2], DTYPES[i % 3])
            for layout in ("row", list(LAYOUTS)[i % 5]):
                check_combine(dev, LAYOUTS[layout](y), LAYOUTS[layout](weights), None, out_dtype, f"{shape} {layout}")
            rows = max(shape[0] // 2, 1)
            indices = rng.integers(-2, rows + 2, shape[:2]).astype(("int32", "int64")[i % 2])
            indices[0, 0], indices[-1, -1] = np.iinfo(indices.dtype).min, np.iinfo(indices.dtype).max
            for layout in ("row", list(LAYOUTS)[i % 5]):
                flat = LAYOUTS[layout](y.reshape(-1, shape[2])[:rows])
                check_combine(dev, flat, weights, indices, out_dtype, f"{shape} {layout} indices")
        turned = np.ascontiguousarray(wide(rng, (4, 9, 40), dtype)).swapaxes(0, 1)
        check_combine(dev, turned, wide(rng, (9, 4), "float32"), None, out_dtype, "topk first")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dev: Any, dtype: str, out_dtype: str, target: str) -> None:
    rng = np.random.default_rng(2)
    shapes = [(1, 2), (3, 14), (5, 16), (17, 258), (33, 512), (2, 4098), (257, 48), (3, 5, 64), (2, 130, 34), (4, 3, 2)]
    with planned(target=target):
        for i, shape in enumerate(shapes):
            x = wide(rng, shape, dtype)
            for layout in ("row", list(LAYOUTS)[i % 5]):
                check_silu(dev, LAYOUTS[layout](x), None, ("first", "second")[i % 2], out_dtype, f"{shape} {layout}")
            if len(shape) == 3:
                for index_dtype in ("int32", "int64"):
                    counts = rng.integers(-1, shape[1] + 3, shape[0]).astype(index_dtype)
                    check_silu(dev, LAYOUTS["row"](x), counts, "first", out_dtype, f"{shape} counts")
        check_silu(dev, wide(rng, (7, 2, 3, 16), dtype), None, "first", out_dtype, "4-D")
        check_silu(dev, wide(rng, (18,), dtype), None, "second", out_dtype, "1-D")


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_alignment(dev: Any, dtype: str, offset: int) -> None:
    """Arrays that begin `offset` values past a 16-byte boundary, and results that do."""
    rng = np.random.default_rng(3)
    x = wide(rng, (6, 4, 48), dtype)
    weights = wide(rng, (6, 4), "float32")
    moved = oracles.poison((x.size + offset,), dtype)[offset:].reshape(x.shape)
    moved[...] = x
    check_combine(dev, moved, weights, None, dtype, f"{dtype} + {offset}")
    check_silu(dev, moved, None, "first", dtype, f"{dtype} + {offset}")
    out = oracles.poison((6 * 48 + offset + 8,), dtype)[offset : offset + 6 * 48].reshape(6, 48)
    placed = dev.place(out)
    assert combine(dev.put(x), dev.put(weights), out=placed.array) is placed.array
    same(dev.get(placed), twin.combine(x, weights, None, dtype), "out")
    assert untouched(dev.bytes(placed), placed)


@pytest.mark.parametrize("layout", ["row", "odd row", "column"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_out(dev: Any, dtype: str, layout: str) -> None:
    """Everything is written, nothing around it is."""
    rng = np.random.default_rng(4)
    x, counts = wide(rng, (3, 9, 2 * 29), "bfloat16"), np.array([4, 0, 9], np.int32)
    for _ in range(2):  # the second call is a warm one
        placed = dev.place(LAYOUTS[layout](oracles.poison((3, 9, 29), dtype)))
        assert silu_and_mul(dev.put(x), counts=dev.put(counts), out=placed.array) is placed.array
        same(dev.get(placed), twin.silu_and_mul(x, counts, "first", dtype), layout)
        assert untouched(dev.bytes(placed), placed)


@pytest.mark.parametrize("shape", [(0, 2, 4), (3, 0, 4), (3, 2, 0)], ids=str)
def test_empty(dev: Any, shape: tuple[int, ...]) -> None:
    x, weights = np.zeros(shape, np.float32), np.zeros(shape[:2], np.float32)
    check_combine(dev, x, weights, None, "bfloat16", str(shape))
    check_silu(dev, x, None, "first", "bfloat16", str(shape))
    check_silu(dev, x, np.ones(shape[0], np.int32), "first", "bfloat16", str(shape))
    check_combine(dev, np.zeros((0, 5), np.float32), np.ones((3, 2), np.float32), np.zeros((3, 2), np.int64), "float16", "no rows")


def test_rows_behind_the_counts_are_not_read(dev: Any) -> None:
    """x is a view whose rows behind the count would begin far outside of any memory."""
    cupy = dev.cupy
    x = np.random.default_rng(5).standard_normal((1, 32)).astype(np.float32)
    memory = dev.put(x)
    strided = cupy.ndarray((1, 3, 32), "float32", memory.data, strides=(0, 2**44, 4))
    got = dev.fetch(silu_and_mul(strided, counts=dev.put(np.array([1], np.int32))))
    same(got[:, :1], twin.silu_and_mul(x[None], None, "first", "float32"), "the one row")
    assert not got[:, 1:].any()


def test_offsets_beyond_32_bits(dev: Any) -> None:
    """Rows 2**32 bytes apart, by stride and by index."""
    cupy = dev.cupy
    try:
        memory = cupy.zeros(2**32 + 4096, "uint8")
    except cupy.cuda.memory.OutOfMemoryError:
        pytest.skip("needs 4 GB of free GPU memory")
    y = np.random.default_rng(6).standard_normal((2, 64)).astype(np.float32)
    strided = cupy.ndarray((2, 64), "float32", memory.data, strides=(2**32, 4))
    strided[...] = cupy.asarray(y)
    weights = np.array([[0.5, 2.0], [1.0, -1.0]], np.float32)
    indices = np.array([[1, 0], [-1, 1]], np.int64)
    got = combine(strided, cupy.asarray(weights), indices=cupy.asarray(indices))
    same(dev.fetch(got), twin.combine(y, weights, indices, "float32"), "indices")
    same(dev.fetch(silu_and_mul(strided)), twin.silu_and_mul(y, None, "first", "float32"), "silu")
    del strided, memory
    dev.free()


def test_large_and_twice(dev: Any) -> None:
    """Many CTAs; the same bits again."""
    rng = np.random.default_rng(7)
    y, weights = wide(rng, (3000, 1500), "bfloat16"), rng.random((1111, 8)).astype(np.float32)
    indices = rng.integers(-1, 3001, (1111, 8)).astype(np.int32)
    for _ in range(2):
        check_combine(dev, y, weights, indices, "bfloat16", "combine")
        check_silu(dev, y, None, "first", "bfloat16", "silu")


# --- frameworks -------------------------------------------------------------------------------------------------------------------


def test_torch_and_capture(dev: Any) -> None:
    """A captured graph reads counts, indices and weights anew at each replay."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(8)
    x, places = rng.standard_normal((4, 6, 40)).astype(np.float32), rng.integers(-1, 24, (10, 3)).astype(np.int64)
    weights, counts = rng.random((10, 3)).astype(np.float32), np.array([6, 2, 0, 5], np.int32)
    tx, tp, tw, tc = (torch.from_numpy(v).cuda() for v in (x, places, weights, counts))

    def layer() -> Any:
        return combine(silu_and_mul(tx, counts=tc).reshape(24, 20), tw, indices=tp, out_dtype="bfloat16")

    def expected() -> Array:
        h = twin.silu_and_mul(x, tc.cpu().numpy(), "first", "float32").reshape(24, 20)
        return twin.combine(h, tw.cpu().numpy(), tp.cpu().numpy(), "bfloat16")

    def back(y: Any) -> Array:
        return np.asarray(y.view(torch.int16).cpu().numpy().view(oracles.dtype_of("bfloat16")))

    for _ in range(2):
        same(back(layer()), expected(), "eager")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    for change in (0, 1):
        tc.copy_(torch.tensor([1, 6, 3, 0]) + change)
        tp.copy_(torch.flip(tp, (0,)))
        tw.mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        same(back(y), expected(), f"replay {change}")


def test_jax(dev: Any) -> None:
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("needs jax with CUDA")
    rng = np.random.default_rng(9)
    x, places = rng.standard_normal((4, 6, 40)).astype(np.float32), rng.integers(-1, 24, (10, 3)).astype(np.int32)
    weights, counts = rng.random((10, 3)).astype(np.float32), np.array([6, 2, 0, 5], np.int32)

    def layer(x: Any, counts: Any, weights: Any, places: Any) -> Any:
        return combine(silu_and_mul(x, counts=counts).reshape(24, 20), weights, indices=places)

    expected = twin.combine(twin.silu_and_mul(x, counts, "first", "float32").reshape(24, 20), weights, places, "float32")
    arrays = [jax.numpy.asarray(v) for v in (x, counts, weights, places)]
    for function in (layer, jax.jit(layer)):
        for _ in range(2):
            same(np.asarray(function(*arrays)), expected, "jax")
