"""Every format with every format on host memory: tables of products, scale layouts, codes, groups, frameworks; and `Quantized` itself."""

from __future__ import annotations

import zlib
from typing import Any

import format_oracles as formats
import gpu_formats
import ml_dtypes
import numpy as np
import oracles
import pytest
from format_oracles import BYTES, FORMATS
from gpu_formats import OUTS, Host, even, verify

import cugemm
from cugemm import Quantized, launch
from cugemm.api.common import gemm_options, product
from cugemm.formats import FORMATS as LIBRARY

pytestmark = pytest.mark.filterwarnings("error")

Array = np.ndarray[Any, Any]
SCALED = [name for name in FORMATS if name not in formats.PLAIN]
SHAPES = [(3, 17, 64), (7, 65, 130), (1, 5, 300), (33, 3, 257), (17, 130, 34), (2, 1, 16), (5, 9, 129)]
LAYOUTS = [("row", "row"), ("odd row", "column"), ("gaps", "odd column"), ("column", "gaps")]


@pytest.fixture
def dev() -> Host:
    return Host()


def seed_of(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def test_the_oracles_know_the_formats() -> None:
    """The names and what they stand for are the library's, apart from the variants of fp8 that differ in the element alone."""
    for name, fmt in LIBRARY.items():
        own = FORMATS.get(name)
        if own is None:
            assert name in ("fp8_e5m2_tensor", "fp8_e5m2_group", "fp8_e5m2_block"), name
            continue
        assert (own.element, own.block, own.scale, own.zero) == (fmt.element.name, fmt.block, fmt.scale.name, fmt.zero)
        assert fmt.tensor == {"": None, "one": (0, 0), "row": (1, 0)}[own.tensor]
    assert set(FORMATS) - set(LIBRARY) == set(formats.PLAIN)


# --- the table --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", gpu_formats.A)
def test_table(dev: Host, a: str) -> None:
    """a x b for every b: exact on the grid, within the bound on random data."""
    for b in gpu_formats.B:
        for exact in (True, False):
            seed = seed_of(a, b, exact)
            m, n, k = SHAPES[seed % len(SHAPES)]
            pair = formats.make(seed, m, n, even(k, a, b), a, b, exact=exact, bias=bool(seed & 64), alpha=(1.0, 0.5, -2.0)[seed % 3])
            dtype = OUTS[seed // 4 % 3]
            out = gpu_formats.run(
                dev, pair, dtype=dtype, layouts=LAYOUTS[seed // 16 % 4], out=("row", "odd row", "odd column")[seed % 3],
                strided_scale=bool(seed & 32),
            )  # fmt: skip
            formats.check(pair, out, dtype)


@pytest.mark.parametrize("a", gpu_formats.A)
def test_linear_and_matmul(dev: Host, a: str) -> None:
    for b in gpu_formats.B:
        seed = seed_of(a, b)
        m, n, k = SHAPES[seed % len(SHAPES)]
        pair = formats.make(seed, m, n, even(k, a, b), a, b, exact=True, bias=True)
        x, w = gpu_formats.operand(dev, pair.a), gpu_formats.operand(dev, pair.b)
        formats.check(pair, cugemm.linear(x, w, pair.bias, out_dtype="float32"), "float32")
        plain = formats.answer(pair.a, pair.b, repro=pair.case.repro)
        kind = "float16" if a == "fp16" else "bfloat16"  # what a result is without out_dtype
        formats.check(pair, cugemm.linear(x, w), kind, plain)
        formats.check(pair, cugemm.matmul(x, w.T), kind, plain)


@pytest.mark.parametrize("name", SCALED)
def test_shapes(dev: Host, name: str) -> None:
    """Odd and empty lengths, on either side."""
    odd = (1, 3, 7, 17, 63, 65, 127, 129, 255, 257)
    shapes = [(m, odd[(i + 3) % 10], odd[(i + 7) % 10]) for i, m in enumerate(odd)]
    shapes += [(1, 1, 1), (5, 7, 515), (0, 5, 8), (5, 0, 8), (5, 7, 0), (0, 0, 0), (1, 0, 0)]
    for i, (m, n, k) in enumerate(shapes):
        for a, b in ((name, "bf16"), ("e4m3", name)):
            if a in gpu_formats.A:
                pair = formats.make(i, m, n, even(k, a, b), a, b, exact=i % 2 == 0, bias=i % 3 == 0)
                verify(dev, pair, "float32", strided_scale=i % 2 == 1)


@pytest.mark.parametrize("name", SCALED)
def test_batches(dev: Host, name: str) -> None:
    for i, (left, right) in enumerate([((3,), (3,)), ((1,), (3,)), ((3,), (1,)), ((1,), (1,)), ((3,), ()), ((), (3,))]):
        rng = np.random.default_rng(i)
        m, n, k = SHAPES[(i + len(name)) % len(SHAPES)]
        a, b = (name, "fp8_group") if name in gpu_formats.A else ("bf16", name)
        for first, second in ((a, b), ("mxfp8", name)):
            x = formats.exact_operand(rng, first, (*left, m, even(k, first, second)), True)
            y = formats.exact_operand(rng, second, (*right, n, even(k, first, second)), False)
            case = formats.answer(x, y, repro=f"batches {name} {left} {right} exact=True")
            oracles.check_exact(case, gpu_formats.multiply(dev, x, y, case, strided_scale=i % 2 == 1), "bfloat16")


# --- byte scales ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["128x4", "8x4"])
@pytest.mark.parametrize("name", BYTES)
def test_scale_layouts(dev: Host, name: str, layout: str) -> None:
    for i, (m, n, k) in enumerate(
        [(1, 5, 16), (3, 129, 64), (130, 7, 300), (257, 9, 130), (8, 8, 128), (128, 128, 512), (0, 3, 64), (3, 4, 0)]
    ):
        for j, (a, b) in enumerate(((name, name), (name, "bf16"), ("fp8_row", name), (name, "mxfp8"))):
            pair = formats.make(i, m, n, k, a, b, exact=(i + j) % 2 == 0)
            other = layout if j % 2 else "linear"
            verify(dev, pair, OUTS[i % 3], scale_layouts=(layout, other))
            verify(dev, pair, OUTS[i % 3], scale_layouts=("8x4", layout))
    for batch in (1, 3):
        pair = formats.make(batch, 130, 140, 200, name, name, exact=True, batch=(batch,))
        verify(dev, pair, scale_layouts=(layout, layout))
        tiled = formats.tiled(pair.a.scale, layout)
        flat = Quantized(pair.a.data, tiled.reshape(batch, -1), name, tensor_scale=pair.a.tensor, scale_layout=layout)
        other = gpu_formats.operand(dev, pair.b)
        oracles.check_exact(pair.case, cugemm.matmul(flat, other.T), "bfloat16")


@pytest.mark.parametrize("name", BYTES)
def test_scales_given_loose(dev: Host, name: str) -> None:
    """As FlashInfer's entries get them: an array, its layout in the options, any shape or transposed; codes as uint8 or their own dtype."""
    kind = FORMATS[name]
    own = ml_dtypes.float8_e4m3fn if kind.scale == "e4m3" else ml_dtypes.float8_e8m0fnu
    pair = formats.make(5, 33, 130, 208, name, name, exact=True)
    a, b = pair.a, pair.b
    for layout in ("linear", "128x4", "8x4"):
        sa, sb = formats.tiled(a.scale, layout), formats.tiled(b.scale, layout)
        options = gemm_options(
            gpu_formats.ANY, None, a_element=kind.element, b_element=kind.element, a_scale_element=kind.scale, b_scale_element=kind.scale,
            a_scale_layout=layout, b_scale_layout=layout,
        )  # fmt: skip
        shapes = [(sa, sb.T), (sa.view(own), sb.view(own).T)]
        if layout != "linear":
            shapes += [(sa.reshape(-1), sb), (sa.reshape(2, -1), sb.reshape(1, 1, -1)), (sa.T, sb.reshape(-1, 8))]
        for first, second in shapes:
            out = product(gpu_formats.ANY, a.data, b.data.T, options, first, second, a_tensor=a.tensor, b_tensor=b.tensor)
            oracles.check_exact(pair.case, out, "bfloat16")


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("name", BYTES)
def test_flat_rows(dev: Host, name: str, rows: bool) -> None:
    """Scales of a stack laid out over the flattened rows, on either side."""
    kind = FORMATS[name]
    pair = formats.make(6, 9, 35, 208, name, name, exact=True, batch=(3,))
    for layout in ("linear", "128x4", "8x4"):
        sides = []
        for x in (pair.a, pair.b):
            flat = x.scale.reshape(-1, x.scale.shape[-1])
            sides.append(formats.tiled(flat if rows else x.scale, layout))
        how = "flat" if rows else ""
        options = gemm_options(
            gpu_formats.ANY, None, a_element=kind.element, b_element=kind.element, a_scale_element=kind.scale, b_scale_element=kind.scale,
            a_scale_layout=layout, b_scale_layout=layout, a_scale_rows=how, b_scale_rows=how, b_axes="nk",
        )  # fmt: skip
        out = product(gpu_formats.ANY, pair.a.data, pair.b.data, options, *sides, a_tensor=pair.a.tensor, b_tensor=pair.b.tensor)
        oracles.check_exact(pair.case, out, "bfloat16")


@pytest.mark.parametrize("name", BYTES)
def test_every_scale_code(dev: Host, name: str) -> None:
    """Row i has scale code i in its middle block; what `numpy.float32` makes of value * scale is what is summed."""
    x, y, case = gpu_formats.every_scale_code(name, k=96)
    out = gpu_formats.multiply(dev, x, y, case, dtype="float32")
    oracles.check_exact(case, out, "float32")
    assert np.isnan(out[255]).all() and np.isnan(out[127 if name.startswith("nvfp4") else 255]).all()


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].element in oracles.PACKED])
def test_every_stored_code(dev: Host, name: str) -> None:
    """Each byte is two values, the low nibble first."""
    kind = FORMATS[name]
    data = np.zeros((256, 64), np.uint8)
    data[np.arange(256), np.arange(256) % 64] = np.arange(256)
    rng = np.random.default_rng(1)
    like = formats.exact_operand(rng, name, (256, 128), False)
    zero = None if like.zero is None else rng.integers(0, 16, like.zero.shape).astype(np.uint8)
    x = formats.Operand(name, data, like.scale, like.tensor, zero, formats.values(name, data, like.scale, like.tensor, zero))
    eye = oracles.encode(np.eye(128), "bf16")
    one = formats.Operand("bf16", eye, None, None, None, np.eye(128))
    case = formats.answer(one, x, repro=f"every code of {name}")
    oracles.check_exact(case, gpu_formats.multiply(dev, one, x, case, dtype="float32"), "float32")
    if not kind.zero:
        case = formats.answer(x, one, repro=f"every code of {name}")
        oracles.check_exact(case, gpu_formats.multiply(dev, x, one, case, dtype="float32"), "float32")


# --- second scales, bias, panels --------------------------------------------------------------------------------------------------


def test_tensor_scales(dev: Host) -> None:
    """One, one per matrix, one per row, as 16-bit floats and numbers, for byte scales and floats that vary along k."""
    rng = np.random.default_rng(3)
    for name in ("nvfp4", "mxfp4", "mxfp8", "int4_g32", "fp8_group"):
        for batch in ((), (3,)):
            pair = formats.make(7, 9, 11, 256, name, name, exact=True, batch=batch)
            a, b = (x._replace(tensor=None, values=formats.values(x.format, x.data, x.scale)) for x in (pair.a, pair.b))
            kind = FORMATS[name]
            scale = {} if kind.scale == "fp32" else {"a_scale_element": kind.scale, "b_scale_element": kind.scale}
            options = gemm_options(
                gpu_formats.ANY, "float32", a_element=kind.element, b_element=kind.element, a_block=kind.block, b_block=kind.block,
                b_axes="nk", **scale,
            )  # fmt: skip
            shapes = [(1,), (*batch, 9, 1)] + ([(3,), (3, 1, 1)] if batch else [(9,)])
            for shape in shapes:
                tensor = np.exp2(rng.integers(-3, 4, shape)).astype(rng.choice([np.float32, np.float16]))
                rows = tensor.reshape(-1, 1) if shape == (9,) else tensor
                left = a._replace(values=formats.values(name, a.data, a.scale, rows))
                case = formats.answer(left, b._replace(values=2.0 * b.values), repro=f"{name} {batch} {shape}")
                for two in (2.0, np.array(2, np.float32), np.array([2], ml_dtypes.bfloat16)):
                    out = product(gpu_formats.ANY, a.data, b.data, options, a.scale, b.scale, tensor, two)
                    oracles.check_exact(case, out, "float32")


def test_bias_of_every_shape(dev: Host) -> None:
    rng = np.random.default_rng(4)
    pair = formats.make(8, 9, 11, 64, "nvfp4", "bf16", exact=True)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        bias = rng.integers(-8, 9, (9, 11)).astype(dtype)
        case = formats.answer(pair.a, pair.b, bias=bias, repro=f"2-D bias {dtype}")
        for given in (bias, oracles.embed(bias)):
            oracles.check_exact(case, gpu_formats.multiply(dev, pair.a, pair.b, case, op=gpu_formats.ANY_2D, bias=given), "bfloat16")


@pytest.mark.parametrize("b", ["bf16", "e4m3", "fp8_row", "mxfp8"])
def test_panels_of_128_k(dev: Host, b: str) -> None:
    """b [k/128, n, 128], as prepare_low_latency_gemm_weights leaves it."""
    pair = formats.make(9, 5, 70, 384, "e4m3", b, exact=True)
    kind = FORMATS[b]
    panels = np.ascontiguousarray(pair.b.data.reshape(70, 3, 128).swapaxes(0, 1))
    scale = {"b_scale_element": "e8m0"} if kind.scale == "e8m0" else {"b_block": kind.block} if kind.scale else {}
    options = gemm_options(gpu_formats.ANY, None, b_axes="pnk", b_scale_axes="nk", **scale)
    out = product(gpu_formats.ANY, pair.a.data, panels, options, None, pair.b.scale)
    oracles.check_exact(pair.case, out, "bfloat16")


# --- groups -----------------------------------------------------------------------------------------------------------------------

GROUPED = ["bf16", "e4m3", "fp8_row", "fp8_group", "fp8_block", "mxfp8", "mxfp4", "nvfp4", "nvfp4_row", "int4_g32", "int8_row", "fp4_row"]


@pytest.mark.parametrize("kind", gpu_formats.GROUPS)
@pytest.mark.parametrize("wild", [0.0, 0.25])
def test_groups(dev: Host, kind: str, wild: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to say which rows go where x formats on either side; indices out of range once the check of host values is off."""
    if wild:
        monkeypatch.setattr(launch.values, "check", lambda *_: None)
    for i, b in enumerate([*GROUPED, "uint4_g64"]):
        for j in range(4 if wild else 1):
            a = GROUPED[(3 * i + 5 * j) % len(GROUPED)]
            seed = 100 * i + j
            layout = ("linear", "128x4", "8x4")[j % 3]
            gpu_formats.grouped(
                dev, seed, kind, a, b, exact=j % 2 == 0, wild=wild, index_dtype=("int32", "int64")[j // 2], scale_layouts=(layout, layout)
            )


@pytest.mark.parametrize("pad", [4, 128])
@pytest.mark.parametrize("kind", ["indptr", "lens"])
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "fp8_group"])
def test_padded_segments(dev: Host, name: str, kind: str, pad: int) -> None:
    for edges in ([0, 5, 5, 70, 75], [0, 1, 2, 3, 75], [0, 75, 75, 75, 75], [0, 0, 0, 0, 0]):
        gpu_formats.padded_segments(dev, name, kind, pad, edges)


# --- Quantized --------------------------------------------------------------------------------------------------------------------


def shown(q: Quantized) -> Array:
    """What a Quantized holds, [.., rows, k], read off products with the identity."""
    q = q if q.k_axis == q.ndim - 1 else q.T
    eye = np.eye(q.shape[-1], dtype=np.float32).astype(ml_dtypes.bfloat16)
    return np.asarray(cugemm.matmul(eye, q.T, out_dtype="float32").swapaxes(-1, -2))


@pytest.mark.parametrize("name", SCALED)
def test_parts(dev: Host, name: str) -> None:
    """q[...] is a view and holds the values of that part: rows, whole blocks of k, matrices of a stack, either way round."""
    down, across = FORMATS[name].block
    for batch in ((), (3,)):
        x = formats.exact_operand(np.random.default_rng(8), name, (*batch, 300, 288), False)
        q, values = gpu_formats.operand(dev, x), x.values.astype(np.float32)
        for rows in (
            [np.s_[128:256], np.s_[256:1000]] if batch else [np.s_[:], np.s_[128:256], np.s_[128:], np.s_[256:1000], np.s_[128:128]]
        ):
            for k in [np.s_[:], np.s_[128:256], np.s_[256:]] if across else [np.s_[:], np.s_[2:6], np.s_[6:]]:
                for stack in [(np.s_[:],), (np.s_[1:],), (2,), (-1,)] if batch else [()]:
                    index = (*stack, rows, k)
                    part = q[index]
                    assert np.may_share_memory(part.data, q.data) or not part.data.size
                    np.testing.assert_array_equal(shown(part), values[index])
                    np.testing.assert_array_equal(shown(q.T[(*stack, k, rows)]), values[index])
        if down != 128:
            np.testing.assert_array_equal(shown(q[(*[np.s_[:]] * len(batch), np.s_[3:7])]), values[..., 3:7, :])
        np.testing.assert_array_equal(shown(q[1] if batch else q[:128]), values[1] if batch else values[:128])


@pytest.mark.parametrize("layout", ["128x4", "8x4"])
@pytest.mark.parametrize("name", BYTES)
def test_parts_of_tiles(dev: Host, name: str, layout: str) -> None:
    for batch in ((), (2,)):
        x = formats.exact_operand(np.random.default_rng(8), name, (*batch, 300, 288), False)
        q = gpu_formats.operand(dev, x, scale_layout=layout)
        for rows in (np.s_[:], np.s_[128:256], np.s_[128:], np.s_[:128]):
            for stack in [(np.s_[:],), (np.s_[1:],), (1,)] if batch else [()]:
                np.testing.assert_array_equal(shown(q[(*stack, rows)]), x.values.astype(np.float32)[(*stack, rows)])


def test_parts_of_stacks(dev: Host) -> None:
    """Integers of any kind, one Ellipsis, iteration; scales shared by the stack; second scales of every shape that products read."""
    rng = np.random.default_rng(8)
    x = formats.exact_operand(rng, "nvfp4", (3, 32, 64), False)
    q = gpu_formats.operand(dev, x)
    values = x.values.astype(np.float32)
    assert len(q) == 3 and len(q[0]) == 32
    for i, part in enumerate(q):
        np.testing.assert_array_equal(shown(part), values[i])
    for index in (np.int64(-1), ..., (..., np.s_[:16]), (1, ...), np.s_[::2], (0, np.s_[8:]), np.s_[1:], (np.s_[:], ..., np.s_[:])):
        np.testing.assert_array_equal(shown(q[index]), values[index])
    for shape in ((), (1,), (3,), (3, 1, 1), (32, 1), (1, 32, 1), (3, 32, 1)):
        tensor = np.exp2(rng.integers(-3, 4, shape)).astype(np.float32).reshape(shape)
        wide = tensor[:, None, None] if shape == (3,) else tensor
        for name in ("nvfp4", "nvfp4_row"):
            own = Quantized(q.data, q.scale, name, tensor_scale=tensor)
            whole = formats.values("nvfp4", x.data, x.scale).astype(np.float32) * wide
            for index in (0, 2, np.s_[1:], (1, np.s_[4:8]), (np.s_[:], np.s_[2:5]), (np.s_[:1], np.s_[4:5])):
                np.testing.assert_array_equal(shown(own[index]), whole[index])
    for scale in (x.scale[0], x.scale[:1]):
        shared = Quantized(q.data, scale, "nvfp4")
        whole = formats.values("nvfp4", x.data, np.broadcast_to(x.scale[:1], x.scale.shape)).astype(np.float32)
        for index in (2, np.s_[1:], (np.s_[1:], np.s_[4:8], np.s_[16:48]), (-1, np.s_[:], np.s_[32:])):
            np.testing.assert_array_equal(shown(shared[index]), whole[index])
            assert not isinstance(index, int) or shared.T[index].shape == (64, 32)
    tiled = Quantized(q.data, formats.tiled(x.scale[:1], "8x4"), "nvfp4", scale_layout="8x4")
    np.testing.assert_array_equal(shown(tiled[1, 8:16]), whole[1, 8:16])


def test_parts_under_second_scales_of_one_matrix(dev: Host) -> None:
    x = formats.exact_operand(np.random.default_rng(8), "nvfp4", (32, 64), False)
    plain = formats.values("nvfp4", x.data, x.scale).astype(np.float32)
    rows = np.exp2(np.arange(32) % 5).astype(np.float32)
    for name in ("nvfp4", "nvfp4_row"):
        for tensor in (0.5, np.float32(0.5), np.array([0.5], np.float32), rows, rows[:, None]):
            q = Quantized(x.data, x.scale, name, tensor_scale=tensor)
            factor = rows[:, None] if np.size(tensor) > 1 else np.full((32, 1), 0.5, np.float32)
            np.testing.assert_array_equal(shown(q[0:8]), (plain * factor)[0:8])
            np.testing.assert_array_equal(shown(q.T[16:, 4:20]), (plain * factor)[4:20, 16:])
    row = Quantized(np.ones((32, 64), np.int8), rows, "int8_row")
    np.testing.assert_array_equal(shown(row[4:20]), np.repeat(rows[4:20, None], 64, axis=1))


def test_shuffled_rows_of_a_column_major_matrix() -> None:
    """The rows that do_shuffle moves are those that are quantised: of the transpose, where its k is contiguous."""
    x = np.random.default_rng(8).standard_normal((128, 64)).astype(np.float32)
    q, sf = cugemm.nvfp4_quantize(x, 100.0, do_shuffle=True)
    turned, sf_turned = cugemm.nvfp4_quantize(x.T, 100.0, do_shuffle=True)
    np.testing.assert_array_equal(turned, q.T)
    np.testing.assert_array_equal(sf_turned, sf.T)
    with pytest.raises(ValueError, match=r"column-major a \[k, m\] with m a multiple of 128 .* a has shape \(128, 64\)"):
        cugemm.nvfp4_quantize(np.asfortranarray(x), 100.0, do_shuffle=True)


def test_equal_only_to_itself() -> None:
    """Arrays do not compare to one truth value: a Quantized is equal to itself alone, and may be a key."""
    q = cugemm.quantize(np.ones((16, 64), np.float32), "nvfp4")
    assert (q == q[:], len({q, q, q[:]}), [q[:], q].index(q)) == (False, 2, 1)


@pytest.mark.parametrize("name", SCALED)
def test_transposed_twice_and_printed(dev: Host, name: str) -> None:
    x = formats.exact_operand(np.random.default_rng(9), name, (12, 64), False)
    q = gpu_formats.operand(dev, x)
    again = q.T.T
    assert (q.shape, q.k_axis, q.T.shape, q.T.k_axis, again.k_axis) == ((12, 64), 1, (64, 12), 0, 1)
    np.testing.assert_array_equal(again.data, q.data)
    np.testing.assert_array_equal(again.scale, q.scale)
    assert np.shares_memory(q.T.data, q.data)
    text = repr(q)
    assert text.startswith(f"Quantized({name}, shape=(12, 64), data=numpy {q.data.dtype}[")
    assert ("tensor_scale=" in text, "zero=" in text) == (x.tensor is not None, x.zero is not None)
    assert ", transposed" in repr(q.T)
    if name in BYTES:
        assert "in 128x4 tiles" in repr(gpu_formats.operand(dev, x, scale_layout="128x4"))
    with pytest.raises(AttributeError):
        q.scale = None


# --- frameworks -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.requires("torch")
def test_torch(name: str) -> None:
    torch = pytest.importorskip("torch")

    class Torch(Host):
        def put(self, x: Any) -> Any:
            if not isinstance(x, np.ndarray):
                return x
            raw = torch.from_numpy(np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}" if x.dtype.itemsize < 4 else x.dtype))
            return raw if x.dtype.itemsize == 4 or x.dtype == np.uint8 else raw.view(getattr(torch, x.dtype.name))

    pair = formats.make(11, 9, 33, 130, "bf16", name, exact=True)
    x, w = (gpu_formats.operand(Torch(), side, scale_layout="128x4") for side in (pair.a, pair.b))
    got = cugemm.linear(x, w, out_dtype=torch.float32)
    assert isinstance(got, torch.Tensor)
    oracles.check_exact(pair.case, got.numpy(), "float32")


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "int4_g64", "uint4_g32", "int8_row"])
@pytest.mark.requires("jax")
def test_jax(name: str) -> None:
    jnp = pytest.importorskip("jax.numpy")

    class Jax(Host):
        def put(self, x: Any) -> Any:
            return jnp.asarray(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x

    pair = formats.make(12, 9, 33, 130, "bf16", name, exact=True)
    x, w = (gpu_formats.operand(Jax(), side, scale_layout="128x4") for side in (pair.a, pair.b))
    oracles.check_exact(pair.case, np.asarray(cugemm.linear(x, w, out_dtype="float32")), "float32")


@pytest.mark.requires("jax")
def test_jax_parts() -> None:
    """JAX clamps what is out of bounds, and counts the values of its float4: neither is the caller's business."""
    jnp = pytest.importorskip("jax.numpy")
    x = formats.exact_operand(np.random.default_rng(8), "nvfp4", (3, 16, 64), False)
    scale = jnp.asarray(x.scale)
    q = Quantized(jnp.asarray(x.data), scale, "nvfp4")
    assert len(list(q)) == 3
    with pytest.raises(IndexError, match="index 7 is outside the stack of 3"):
        q[7]
    if hasattr(jnp, "float4_e2m1fn"):
        values = Quantized(jnp.zeros((3, 16, 64), jnp.float4_e2m1fn), scale, "nvfp4")
        part = values[1, 4:8, 16:48]
        assert (part.shape, part.data.shape, part.scale.shape) == ((4, 32), (4, 32), (4, 2))
