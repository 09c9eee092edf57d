"""What `kernels/rows.cu` computes, in NumPy and bit for bit: float32 operations in the same order, each rounded on its own.

Arguments are trusted here, as in `reference`: `rowwise` has checked them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cugemm.arrays import Array, numpy_dtype

Float32 = NDArray[np.float32]

_MAGIC = np.float32(1.5 * 2**23)
"""Adding it rounds to an integer, which its low bits then hold."""
_LOG2_E = np.float32(float.fromhex("0x1.715476p+0"))
_LN2 = tuple(np.float32(float.fromhex(part)) for part in ("0x1.62e4p-1", "0x1.7f7d1cp-20"))
_POLYNOMIAL = tuple(
    np.float32(float.fromhex(c)) for c in ("0x1.6a2256p-10", "0x1.123b02p-7", "0x1.5558f8p-5", "0x1.55549p-3", "0x1.fffffcp-2")
)
"""q of exp(r) = 1 + r + r**2 q(r) for |r| <= ln 2 / 2, highest power first."""


def exp32(x: Float32) -> Float32:
    """exp(x) in float32, within 1 ulp: the twin of `exp32` in kernels/common/exp.cuh, which explains the steps."""
    with np.errstate(all="ignore"):
        bounded = np.minimum(np.maximum(np.where(np.isnan(x), np.float32(0), x), np.float32(-105)), np.float32(89))
        shifted = bounded * _LOG2_E + _MAGIC
        n = np.asarray(shifted).view(np.int32) - _MAGIC.view(np.int32)
        count = shifted - _MAGIC
        r = bounded - count * _LN2[0] - count * _LN2[1]
        q = np.full_like(r, _POLYNOMIAL[0])
        for coefficient in _POLYNOMIAL[1:]:
            q = q * r + coefficient
        e = r * r * q + r + np.float32(1)
        half = n >> 1
        scaled = e * _power_of_two(half) * _power_of_two(n - half)
        result: Float32 = np.where(np.isnan(x), x, scaled)
        return result


def silu32(x: Float32) -> Float32:
    """x / (1 + exp(-x)) in float32: the twin of `silu` in kernels/common/exp.cuh. -inf gives NaN, as that quotient does."""
    with np.errstate(all="ignore"):
        e = exp32(-np.abs(x))
        result: Float32 = np.where(x < 0, x * e, x) / (e + np.float32(1))
        return result


def _power_of_two(n: NDArray[np.int32]) -> Float32:
    bits: NDArray[np.int32] = (n + np.int32(127)) << np.int32(23)
    return bits.view(np.float32)


def combine(y: Array, weights: Array, indices: Array | None, out_dtype: str) -> Array:
    """out[t, n] = sum over j of weights[t, j] * y[t, j, n], or of y[indices[t, j], n]; an index outside y adds nothing.

    Products and sums are float32, each rounded, in the order of j; one rounding gives out_dtype.
    """
    with np.errstate(all="ignore"):
        tokens, topk = weights.shape
        total = np.zeros((tokens, y.shape[-1]), np.float32)
        for j in range(topk):
            weight = weights[:, j, None].astype(np.float32)
            if indices is None:
                total += weight * y[:, j].astype(np.float32)
            else:
                here = np.flatnonzero((indices[:, j] >= 0) & (indices[:, j] < len(y)))
                total[here] += weight[here] * y[indices[here, j]].astype(np.float32)
        return total.astype(numpy_dtype(out_dtype))


def silu_and_mul(x: Array, counts: Array | None, gate: str, out_dtype: str) -> Array:
    """silu(x[.., :n]) * x[.., n:] in float32, rounded once to out_dtype; gate="second": x[.., :n] * silu(x[.., n:]).

    counts [groups] with x [groups, rows, 2n]: rows from counts[g] on are zeros.
    """
    with np.errstate(all="ignore"):
        halves = np.split(x, 2, axis=-1)
        up, through = halves if gate == "second" else reversed(halves)
        result = (silu32(through.astype(np.float32)) * up.astype(np.float32)).astype(numpy_dtype(out_dtype))
        if counts is not None:
            result[np.arange(x.shape[1]) >= counts[:, None]] = 0
        return result
