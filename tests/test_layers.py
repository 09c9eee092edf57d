"""QuantizedLinear against float64 of its dequantised weight."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import cugemm
from cugemm import launch


@pytest.mark.parametrize("format", ["fp8_tensor", "fp8_row", "fp8_block", "fp8_e5m2_group"])
def test_numbers(rng: np.random.Generator, format: str) -> None:
    weight, x = rng.standard_normal((40, 300)).astype(np.float32), rng.standard_normal((2, 3, 300)).astype(ml_dtypes.bfloat16)
    bias = rng.standard_normal(40).astype(np.float32)
    layer = cugemm.QuantizedLinear(weight, bias, format=format)
    assert (layer.in_features, layer.out_features) == (300, 40) and format in repr(layer)
    expected = x.astype(np.float64) @ cugemm.dequantize(layer.weight, "float32").astype(np.float64).T + bias
    y = layer(x, out_dtype="float32")
    assert y.shape == (2, 3, 40)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-5)
    assert layer.forward(x).dtype == ml_dtypes.bfloat16


def test_quantised_activations_and_given_weight(rng: np.random.Generator) -> None:
    weight = cugemm.quantize(rng.standard_normal((24, 64)).astype(np.float32), "fp8_row")
    x = rng.standard_normal((5, 64)).astype(np.float16)
    layer = cugemm.QuantizedLinear(weight, activations="fp8_row")
    assert layer.weight is weight
    rounded = cugemm.dequantize(cugemm.quantize(x, "fp8_row"), "float32").astype(np.float64)
    expected = rounded @ cugemm.dequantize(weight, "float32").astype(np.float64).T
    np.testing.assert_allclose(layer(x, out_dtype="float32"), expected, rtol=1e-6, atol=1e-5)
    out = np.zeros((5, 24), np.float16)
    assert layer(x, out=out) is out and out.any()


def test_refusals(rng: np.random.Generator) -> None:
    weight = cugemm.quantize(rng.standard_normal((24, 64)).astype(np.float32), "fp8_row")
    before = launch.launches
    with pytest.raises(ValueError, match=r"QuantizedLinear: weight is .* k along axis 1"):
        cugemm.QuantizedLinear(weight.T)
    with pytest.raises(ValueError, match=r"linear: x .* k = 63"):
        cugemm.QuantizedLinear(weight)(np.zeros((2, 63), np.float16))
    with pytest.raises(ValueError, match="format is 'fp9'"):
        cugemm.QuantizedLinear(np.zeros((4, 4), np.float16), format="fp9")
    assert launch.launches == before
