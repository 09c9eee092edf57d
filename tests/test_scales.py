"""How byte scales of stacks are read: one set of tiles a matrix, one over all rows, or an error; never the one for the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest

import cugemm
from cugemm import Quantized

Array = np.ndarray[Any, Any]

RNG = np.random.default_rng(0)
W = (RNG.standard_normal((8, 16, 128)) * np.exp2(np.arange(8))[:, None, None]).astype(np.float32)
W100 = (RNG.standard_normal((2, 100, 128)) * np.exp2(np.arange(2))[:, None, None]).astype(np.float32)
X = RNG.standard_normal((8, 128)).astype(oracles.dtype_of("bfloat16"))
EACH = np.arange(8, dtype=np.int32)


def answer(x: Array, w: Array) -> Array:
    """Row i times matrix i."""
    return np.einsum("mk,mnk->mn", np.asarray(x, np.float64), np.asarray(w, np.float64))


def close(got: Array, want: Array) -> bool:
    return bool(np.linalg.norm(np.asarray(got, np.float64) - want, axis=-1).max() <= 0.01 * np.linalg.norm(want, axis=-1).max())


def test_a_stack_has_tiles_for_each_matrix() -> None:
    q = cugemm.quantize(W, "mxfp8", scale_layout="128x4")
    want = answer(X, cugemm.dequantize(q, "float32"))
    for scale in (q.scale, q.scale.reshape(8, -1), q.scale.swapaxes(1, 2)):
        part = Quantized(q.data, scale, "mxfp8", scale_layout="128x4")
        assert close(cugemm.grouped_matmul(X, part, indices=EACH, out_dtype="float32"), want)
    shared = Quantized(q.data, q.scale[:1], "mxfp8", scale_layout="128x4")
    same = np.stack([np.asarray(cugemm.dequantize(Quantized(d, q.scale[0], "mxfp8", scale_layout="128x4"), "float32")) for d in q.data])
    assert close(cugemm.grouped_matmul(X, shared, indices=EACH, out_dtype="float32"), answer(X, same))


def test_flat_tiles_are_not_those_of_each_matrix() -> None:
    """`mxfp8_quantize` of a stack lays tiles over all rows, which is what bmm_mxfp8 reads and a group does not."""
    for w in (W, W100):
        data, flat = cugemm.mxfp8_quantize(w.astype(oracles.dtype_of("bfloat16")))
        with pytest.raises(ValueError, match=r"scale"):
            cugemm.grouped_matmul(X[: len(w)], Quantized(data, flat, "mxfp8", scale_layout="128x4"), indices=EACH[: len(w)])
        rows, row_scales = cugemm.mxfp8_quantize(X[: len(w)])
        with pytest.raises(ValueError, match="contiguous bytes for each of"):
            cugemm.grouped_mm_mxfp8(rows, data, row_scales, flat, np.arange(len(w) + 1, dtype=np.int32))
        x = RNG.standard_normal((len(w), 5, 128)).astype(oracles.dtype_of("bfloat16"))
        q, s = cugemm.mxfp8_quantize(x)
        got = cugemm.bmm_mxfp8(q, data.swapaxes(1, 2), s, flat, "float32")
        want = np.einsum("bmk,bnk->bmn", cugemm.mxfp8_dequantize_host(q, s), cugemm.mxfp8_dequantize_host(data, flat))
        assert close(got, want)


def test_tiles_of_each_matrix_are_not_flat() -> None:
    qa, qw = (cugemm.quantize(x, "mxfp8", scale_layout="128x4") for x in (W100, W100))
    with pytest.raises(ValueError, match="over the rows of all matrices"):
        cugemm.bmm_mxfp8(qa.data, qw.data.swapaxes(1, 2), qa.scale, qw.scale, "float32")
    with pytest.raises(ValueError, match="mxfp8_dequantize_host: scale_tensor has shape"):
        cugemm.mxfp8_dequantize_host(qa.data, qa.scale)


def test_transposed_copies_are_refused() -> None:
    q, a = cugemm.quantize(W100[0], "mxfp8", scale_layout="128x4"), cugemm.quantize(X, "mxfp8", scale_layout="128x4")
    good = cugemm.mm_mxfp8(a.data, q.data.T, a.scale.reshape(-1), q.scale.T, out_dtype="float32")
    assert close(good, np.asarray(cugemm.dequantize(a, "float32"), np.float64) @ np.asarray(cugemm.dequantize(q, "float32")).T)
    with pytest.raises(ValueError, match="not a transposed copy"):
        cugemm.mm_mxfp8(a.data, q.data.T, a.scale.reshape(-1), np.ascontiguousarray(q.scale.T))
    with pytest.raises(ValueError, match="not a transposed copy"):  # the same numbers, in another order of memory
        cugemm.mm_mxfp8(a.data, q.data.T, a.scale.reshape(-1), np.asfortranarray(q.scale))
    stack = cugemm.quantize(W, "mxfp8", scale_layout="128x4")
    turned = Quantized(stack.data, np.ascontiguousarray(stack.scale.swapaxes(1, 2)), "mxfp8", scale_layout="128x4")
    with pytest.raises(ValueError, match="not a transposed copy"):
        cugemm.grouped_matmul(X, turned, indices=EACH)


def test_one_scale_per_row_or_per_matrix() -> None:
    """[batch] beside as many rows could be either."""
    a = RNG.standard_normal((8, 8, 64)).astype(oracles.dtype_of("float8_e4m3fn"))
    scale = np.exp2(np.arange(8)).astype(np.float32)
    with pytest.raises(ValueError, match=r"\(8, 1, 1\) for one per matrix"):
        cugemm.bmm_fp8(a, a.swapaxes(1, 2), scale, np.ones(1, np.float32))
    got = cugemm.bmm_fp8(a, a.swapaxes(1, 2), scale.reshape(8, 1, 1), np.ones(1, np.float32), "float32")
    values = a.astype(np.float64)
    assert close(got, np.einsum("b,bmk,bnk->bmn", scale, values, values))
