"""Quantized.prepare: weights where products read them fastest; on the CPU and (marked gpu) a GPU."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cugemm
from cugemm import Quantized, Spec, arch, launch, select

BF16 = ml_dtypes.bfloat16


def lying(data: Any, empty: Any) -> dict[str, Any]:
    """The same bytes [rows, length], transposed, at odd places, with gaps. empty: makes an array of bytes."""
    rows, length = data.shape
    turned, odd = empty((length, rows)), empty((rows, length + 17))
    turned[...], odd[:, 1 : 1 + length] = data.T, data
    apart = empty((rows, 2, length))
    apart[:, 1] = data
    return {"transposed": turned.T, "odd": odd[:, 1 : 1 + length], "apart": apart[:, 1]}


def check(framework: Any, name: str, k: int, host: Any) -> None:
    """framework: (to it, empty, its unsigned bytes)."""
    to, empty, byte = framework
    q = cugemm.quantize(to(np.random.default_rng(k).standard_normal((48, k)).astype(np.float32)), name)
    bytes_ = host(q.data.view(byte))
    for how, data in lying(to(bytes_), empty).items():
        given = Quantized(data.view(q.data.dtype), q.scale, name, tensor_scale=q.tensor_scale, zero=q.zero)
        for w, flip in ((given, False), (given.T, True)):
            made = w.prepare()
            rows = made.data.T if flip else made.data
            view = cugemm.arrays.framework_of(rows, "rows").view(rows, "rows")
            stays = how == "apart" and bytes_.shape[1] % 16 == 0
            assert (made is w) == stays, how
            assert view.strides == (bytes_.shape[1] * (2 if stays else 1), 1) and view.ptr % 16 == 0, how
            assert made.shape == w.shape and made.k_axis == w.k_axis and made.data.dtype == q.data.dtype
            np.testing.assert_array_equal(host(rows.view(byte)), bytes_)
            assert made.prepare() is made


FORMATS = ("fp8_tensor", "fp8_e5m2_row", "fp8_block", "nvfp4", "mxfp8", "int8_row", "int4_g128", "uint4_g32")


@pytest.mark.parametrize("k", [256, 272, 260])
@pytest.mark.parametrize("name", FORMATS)
def test_numpy(name: str, k: int) -> None:
    check((np.asarray, lambda shape: np.empty(shape, np.uint8), np.uint8), name, k, np.asarray)


@pytest.mark.requires("torch")
@pytest.mark.parametrize("name", FORMATS)
def test_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    check((torch.from_numpy, lambda shape: torch.empty(shape, dtype=torch.uint8), torch.uint8), name, 260, lambda x: x.numpy())


@pytest.mark.gpu
@pytest.mark.requires("cupy")
@pytest.mark.parametrize("name", FORMATS)
def test_cupy(name: str) -> None:
    import cupy

    check((cupy.asarray, lambda shape: cupy.empty(shape, np.uint8), np.uint8), name, 260, cupy.asnumpy)


def test_a_stack_and_what_stays() -> None:
    w = np.random.default_rng(0).standard_normal((3, 40, 64)).astype(np.float32)
    q = cugemm.quantize(w, "fp8_row")
    assert q.prepare() is q and q.T.prepare().data.base is not None
    turned = Quantized(np.ascontiguousarray(q.data.swapaxes(1, 2)).swapaxes(1, 2), q.scale, "fp8_row")
    made = turned.prepare()
    assert made.data.strides == (40 * 64, 64, 1)
    np.testing.assert_array_equal(made.data.view(np.uint8), q.data.view(np.uint8))
    spec = cugemm.quantize(Spec((40, 64), "bfloat16"), "fp8_row")
    assert spec.prepare() is spec


@pytest.mark.requires("jax")
def test_jax_arrays_stay() -> None:
    jnp = pytest.importorskip("jax.numpy")
    q = cugemm.quantize(jnp.ones((40, 64), jnp.bfloat16), "fp8_row")
    assert q.prepare() is q


def test_products_of_it_transpose_nothing() -> None:
    """What `explain` says of the weight, and of what is made of it; a layer does it by itself."""
    rng = np.random.default_rng(1)
    q = cugemm.quantize(rng.standard_normal((256, 512)).astype(np.float32), "fp8_row")
    x = cugemm.quantize(rng.standard_normal((512, 512)).astype(np.float32), "fp8_row")
    turned = Quantized(np.asfortranarray(q.data), q.scale, "fp8_row")

    def said(w: Quantized) -> str:
        with launch.recording() as calls:
            cugemm.linear(x, w)
        return str(select.choose(calls[0].call.problem._replace(arch="sm_90a", backend="hopper"), arch.H100).best.config)

    assert said(turned).endswith(", b transposed first") and "transposed" not in said(turned.prepare())
    layer = cugemm.QuantizedLinear(turned)
    assert layer.weight is not turned and cugemm.QuantizedLinear(q).weight is q
    rows = rng.standard_normal((3, 512)).astype(BF16)
    np.testing.assert_array_equal(layer(rows), cugemm.linear(rows, q))
