"""The library's arithmetic in NumPy: what arrays in host memory run on, and what the kernels are tested against.

Numerics. Stored values and scales enter float64 without error (scales and alpha are float32, as in the kernels; a wider one is rounded to
it), and so does stored value * scale (24 + 24 bits). Products are summed in float64 by BLAS, one output tile at a time, within (k + 1) *
2**-53 * sum(|a| |b|) of the true sum; constant scales, alpha and bias follow in float64, and **one** rounding to nearest even gives the
output. Float64 throughout costs twice the time of float32 BLAS and needs no error analysis; tiles keep its memory near 0.25 GB.
Overflow gives inf, NaN and inf propagate as in IEEE 754 (0 * inf is NaN), and no NumPy warning leaves these functions.

Arguments are trusted here: `problem` has checked them, and the assertions below are for our own mistakes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from cugemm.formats import ALL, ELEMENTS, Format

Array: TypeAlias = NDArray[Any]

TILE = 2048
"""Rows, columns and k of a float64 tile. Large: a threaded BLAS call ends with its slowest thread, so small ones crawl on busy cores."""


class Groups(NamedTuple):
    """Grouped product: row i of the result is `a[i] @ b[expert[i]]`; an expert outside [0, len(b)) selects none and the row is zero."""

    expert: NDArray[np.integer[Any]]


class _Operand(NamedTuple):
    """One matrix with k as its last axis, so that a and b take the same code."""

    data: Array  # [rows, stored k]
    element: str
    scale: NDArray[np.float64]  # [rows | 1, k-blocks | 1]
    block: int  # values along k per scale

    @property
    def varies(self) -> bool:
        """Whether the scale varies along k."""
        return bool(self.scale.shape[1] > 1)

    def scale_of(self, rows: slice) -> NDArray[np.float64]:
        return self.scale if len(self.scale) == 1 else self.scale[rows]


def gemm(
    a: Array,
    b: Array,
    *,
    a_element: str,
    b_element: str,
    a_scale: ArrayLike | None = None,
    b_scale: ArrayLike | None = None,
    a_block: tuple[int, int] = (ALL, ALL),
    b_block: tuple[int, int] = (ALL, ALL),
    alpha: ArrayLike = 1.0,
    bias: Array | None = None,
    out_dtype: str = "bfloat16",
    groups: Groups | None = None,
) -> Array:
    """alpha * (a * a_scale) @ (b * b_scale) + bias, rounded once to `out_dtype`.

    a: [.., m, k] (e2m1x2: [.., m, k/2]) and b: [.., k, n] (e2m1x2: [.., k/2, n]) in the storage dtype of their elements, any strides; batch
    axes broadcast. With `groups`, a is [m, k] and b is [experts, k, n].
    a_scale: [.., ceil(m/gm), ceil(k/gk)] for a_block = (gm, gk), b_scale: [.., ceil(k/gk), ceil(n/gn)] for b_block = (gk, gn); `ALL` covers
    the whole axis, whose scale axis is then 1. None is 1; anything of one element scales the whole operand.
    bias: [n]. alpha: one element. out_dtype: "bfloat16", "float16" or "float32".

    Scales constant along k multiply the finished sum, others the partial sum of their k-block (seen only where a scale is inf). k = 0 gives
    the bias or zeros, whatever the scales.
    Returns [.., m, n]. Numerics: see the module.
    """
    with np.errstate(all="ignore"):
        bt = b.swapaxes(-1, -2)
        k = _logical_k(a, a_element)
        assert k == _logical_k(bt, b_element), f"k differs: a has {k}, b {_logical_k(bt, b_element)}"
        m, n = a.shape[-2], bt.shape[-2]
        sa = _row_scale(a_scale, a_block, m, k)
        b_scale_t = None if b_scale is None else np.asarray(b_scale)
        if b_scale_t is not None and b_scale_t.ndim >= 2:
            b_scale_t = b_scale_t.swapaxes(-1, -2)
        sb = _row_scale(b_scale_t, (b_block[1], b_block[0]), n, k)
        factor = _float32(alpha).reshape(())
        shift = None if bias is None else bias.astype(np.float64).reshape(n)
        dtype = _dtype(out_dtype)

        if groups is not None:
            assert (a.ndim, b.ndim, groups.expert.shape) == (2, 3, (m,))
            out = np.zeros((m, n), dtype)
            sa = np.broadcast_to(sa, (1, m, sa.shape[-1]))[0]
            sb = np.broadcast_to(sb, (len(b), *sb.shape[-2:]))
            for expert in range(len(b)):
                rows = np.flatnonzero(groups.expert == expert)
                if rows.size:
                    part = np.empty((rows.size, n), dtype)
                    _fill(
                        part,
                        _Operand(a[rows], a_element, sa[rows], a_block[1]),
                        _Operand(bt[expert], b_element, sb[expert], b_block[0]),
                        k,
                        factor,
                        shift,
                    )
                    out[rows] = part
            return out

        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a, bt, sa, sb = (np.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (a, bt, sa, sb))
        out = np.empty((*batch, m, n), dtype)
        for i in np.ndindex(batch):
            _fill(out[i], _Operand(a[i], a_element, sa[i], a_block[1]), _Operand(bt[i], b_element, sb[i], b_block[0]), k, factor, shift)
        return out


def _fill(out: Array, a: _Operand, b: _Operand, k: int, alpha: Array, bias: Array | None) -> None:
    """Compute one matrix product into out [m, n], tile by tile."""
    m, n = out.shape
    for i in range(0, m, TILE):
        for j in range(0, n, TILE):
            rows, columns = slice(i, min(i + TILE, m)), slice(j, min(j + TILE, n))
            if k:
                total = _sum(a, b, rows, columns, k)
                if not a.varies:
                    total *= a.scale_of(rows)
                if not b.varies:
                    total *= b.scale_of(columns).T
                total *= alpha
            else:
                total = np.zeros((rows.stop - rows.start, columns.stop - columns.start))
            if bias is not None:
                total += bias[columns]
            out[rows, columns] = _round(total, out.dtype)


def _sum(a: _Operand, b: _Operand, rows: slice, columns: slice, k: int) -> NDArray[np.float64]:
    """Sum over k of one tile, with the scales that vary along k.

    Finite scales go into the decoded values, which is exact and leaves BLAS long sums. An infinite one would make NaN of every stored zero
    there, so it waits for the partial sum of its k-block, as in the kernels.
    """
    late = [x.varies and not np.isfinite(x.scale).all() for x in (a, b)]
    edges = sorted({*range(0, k, TILE), k}.union(*(range(0, k, x.block) for x, wait in zip((a, b), late, strict=True) if wait)))
    total = np.zeros((rows.stop - rows.start, columns.stop - columns.start))
    partial = np.empty_like(total)
    for start, stop in pairwise(edges):
        va, vb = _decode(a, rows, start, stop), _decode(b, columns, start, stop)
        if a.varies and not late[0]:
            va *= a.scale_of(rows)[:, np.arange(start, stop) // a.block]
        if b.varies and not late[1]:
            vb *= b.scale_of(columns)[:, np.arange(start, stop) // b.block]
        np.matmul(va, vb.T, out=partial)
        if late[0]:
            partial *= a.scale_of(rows)[:, start // a.block, None]
        if late[1]:
            partial *= b.scale_of(columns)[:, start // b.block]
        total += partial
    return total


def _row_scale(scale: ArrayLike | None, block: tuple[int, int], rows: int, k: int) -> NDArray[np.float64]:
    """Scales of an operand with k last -> float64 [.., rows | 1, k-blocks | 1]."""
    if scale is None:
        return np.ones((1, 1))
    values = _float32(scale)
    if values.size == 1:
        return values.reshape(1, 1)
    wanted = tuple(1 if size == ALL else -(-length // size) for length, size in zip((rows, k), block, strict=True))
    assert values.shape[-2:] == wanted, f"scale is {values.shape}, wanted [.., {wanted[0]}, {wanted[1]}]"
    return values[..., np.arange(rows) // block[0], :] if block[0] > 1 else values


def _float32(values: ArrayLike) -> NDArray[np.float64]:
    """Float32 values, held in float64."""
    return np.asarray(values).astype(np.float32).astype(np.float64)


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


_CODES = np.arange(256, dtype=np.uint8)
_TABLES: dict[str, NDArray[np.float64]] = {
    "e4m3": _CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float64),
    "e5m2": _CODES.view(ml_dtypes.float8_e5m2).astype(np.float64),
    "e2m1": (_CODES & 15).view(ml_dtypes.float4_e2m1fn).astype(np.float64),
}
"""Value of every byte."""


def _logical_k(data: Array, element: str) -> int:
    return int(data.shape[-1] * ELEMENTS[element].per_byte)


def _decode(operand: _Operand, rows: slice, start: int, stop: int) -> NDArray[np.float64]:
    """Stored values [rows, start:stop of k] as float64, exactly."""
    element = operand.element
    if element == "e2m1x2":
        codes = operand.data[rows, start // 2 : -(-stop // 2)]
        values = np.empty((len(codes), 2 * codes.shape[1]))
        values[:, 0::2] = _TABLES["e2m1"][codes]  # looks at the low nibble only
        values[:, 1::2] = _TABLES["e2m1"][codes >> 4]
        return values[:, start % 2 :][:, : stop - start]
    data = operand.data[rows, start:stop]
    return _TABLES[element][data.view(np.uint8)] if element in _TABLES else data.astype(np.float64)


def _round(values: NDArray[Any], dtype: np.dtype[Any]) -> Array:
    """float64 or float32 -> dtype, one rounding to nearest even."""
    if dtype.name != "bfloat16" or values.dtype == np.float32:
        return values.astype(dtype)
    # ml_dtypes casts float64 -> bfloat16 through float32, which rounds twice (1 + 2**-8 + 2**-40 becomes 1). Rounding to odd on the way
    # keeps a sticky last bit, and float32 has 16 bits more than bfloat16 at every exponent, so the second rounding is then the correct one.
    wide = values.astype(np.float32)
    back = wide.astype(np.float64)
    bits = wide.view(np.uint32)
    bits -= np.abs(back) > np.abs(values)  # now truncated
    bits |= back != values
    return wide.astype(dtype)


def experts_from_segments(
    m: int,
    *,
    indptr: ArrayLike | None = None,
    lens: ArrayLike | None = None,
    weight_indices: ArrayLike | None = None,
    experts: int,
) -> NDArray[np.int64]:
    """Expert of each of m rows, -1 for none: row i in indptr[s] <= i < indptr[s + 1] has expert weight_indices[s], by default s.

    Give indptr [segments + 1], or lens [segments], whose starts are the exclusive prefix sums (a negative length counts as 0).
    A segment with start < 0, end < start or end > m selects no row, nor does one that begins below an earlier value of indptr, so that no
    row belongs to two segments. An expert outside [0, experts) is -1.
    """
    assert (indptr is None) != (lens is None), "give indptr or lens"
    if indptr is not None:
        edges = np.asarray(indptr).astype(np.int64)
        starts, ends = edges[:-1], edges[1:]
    else:
        # A length past m selects nobody and pushes its successors past m whatever its size: cutting it only keeps the sum from wrapping.
        lengths = np.clip(np.asarray(lens).astype(np.int64), 0, m + 1)
        ends = np.cumsum(lengths)
        starts = ends - lengths
    chosen = np.arange(len(starts)) if weight_indices is None else np.asarray(weight_indices).astype(np.int64)
    chosen = np.where((chosen >= 0) & (chosen < experts), chosen, -1)
    result = np.full(m, -1, np.int64)
    highest = np.maximum.accumulate(starts)
    for s in np.flatnonzero((starts == highest) & (starts >= 0) & (starts <= ends) & (ends <= m)):
        result[starts[s] : ends[s]] = chosen[s]
    return result


def quantize(x: Array, format: Format) -> tuple[Array, NDArray[np.float32]]:
    """data = round(x / scale), scale = max(amax, 1e-12) / element.max, amax = max |x| over the block: the bit-exact twin of the GPU kernel.

    x: float16, bfloat16 or float32 [m, k] or [batch, m, k], any strides. data: x's shape in the element's dtype, C-contiguous.
    scale, float32: [1] (tensor: the whole array), [.., m, 1] (row), [.., m, ceil(k/128)] (group), [.., ceil(m/128), ceil(k/128)] (block).

    Everything is float32 with IEEE division: amax ignores NaN (0 if nothing is left), and x / scale goes through `cast`. inf in
    a block makes its scale inf, its finite values 0 and the inf NaN.
    """
    element = format.element
    assert element.bits == 8, f"{format.name}: quantize knows 8-bit elements"
    with np.errstate(all="ignore"):
        x32 = x.astype(np.float32, order="C")
        size = np.abs(x32)
        size[np.isnan(size)] = 0
        if format.block == (ALL, ALL):
            amax = size.max(initial=0).reshape(1)
        else:
            amax = _block_max(_block_max(size, -1, format.block[1]), -2, format.block[0])
        scale = np.maximum(amax, np.float32(1e-12)) / np.float32(element.max)
        return cast(x32 / _spread(scale, x.shape, format), format), scale


def cast(x: Array, format: Format) -> Array:
    """round(x) in the element's dtype: clamped to +-element.max (inf too), to nearest even; NaN becomes code 0x7F whatever its sign."""
    element = format.element
    with np.errstate(all="ignore"):
        x32 = x.astype(np.float32, order="C")
        data = np.clip(x32, np.float32(-element.max), np.float32(element.max)).astype(_dtype(element.dtype))
        data.view(np.uint8)[np.isnan(x32)] = 0x7F
    return data


def dequantize(data: Array, scale: NDArray[np.float32], format: Format, dtype: str = "float32") -> Array:
    """data * scale in float32, rounded once to dtype (float32, float16 or bfloat16); shapes as `quantize` returns them."""
    assert format.element.bits == 8, f"{format.name}: dequantize knows 8-bit elements"
    with np.errstate(all="ignore"):
        product = data.astype(np.float32) * _spread(scale.astype(np.float32), data.shape, format)
        return _round(product, _dtype(dtype))


def _block_max(values: NDArray[np.float32], axis: int, block: int) -> NDArray[np.float32]:
    if block == ALL:
        return np.asarray(values.max(axis=axis, keepdims=True, initial=0), np.float32)
    length = values.shape[axis]
    return np.maximum.reduceat(values, np.arange(0, length, block), axis=axis) if length else values


def _spread(scale: NDArray[np.float32], shape: tuple[int, ...], format: Format) -> NDArray[np.float32]:
    """Scales laid out to broadcast against an array of this shape."""
    if format.block == (ALL, ALL):
        return scale.reshape((1,) * len(shape))
    rows, columns = (np.arange(length) // max(block, 1) for length, block in zip(shape[-2:], format.block, strict=True))
    if format.block[1] == ALL:
        columns = np.zeros(1, int)
    spread: NDArray[np.float32] = scale[..., rows, :][..., columns]
    return spread
