"""The library's arithmetic in NumPy: what arrays in host memory run on, and what the kernels are tested against.

Numerics. Stored values and scales enter float64 without error (scales and alpha are float32, as in the kernels; a wider one is rounded to
it), and so does stored value * scale (24 + 24 bits). Products are summed in float64 by BLAS, one output tile at a time, within (k + 1) *
2**-53 * sum(|a| |b|) of the true sum; constant scales, alpha and bias follow in float64, and **one** rounding to nearest even gives the
output. Float64 throughout costs twice the time of float32 BLAS and needs no error analysis; tiles keep its memory near 0.25 GB.
Overflow gives inf, NaN and inf propagate as in IEEE 754 (0 * inf is NaN), and no NumPy warning leaves these functions.

Arguments are trusted here: `problem` has checked them, and the assertions below are for our own mistakes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from cugemm.formats import ALL, ELEMENTS

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
    bytes: str  # element of byte scales, "" for floats
    tensor: NDArray[np.float64]  # [rows | 1, 1]
    zero: NDArray[np.float64]  # [rows | 1, k-blocks | 1]

    @property
    def varies(self) -> bool:
        """Whether the scale belongs to the values: it is a byte of their format, or it varies along k."""
        return bool(self.bytes or self.scale.shape[1] > 1)

    def constant(self, rows: slice) -> NDArray[np.float64]:
        """What the finished sums are multiplied by."""
        tensor = _rows_of(self.tensor, rows)
        return tensor if self.varies else tensor * _rows_of(self.scale, rows)


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
    a_scale_element: str = "",
    b_scale_element: str = "",
    a_tensor: ArrayLike | None = None,
    b_tensor: ArrayLike | None = None,
    b_zero: ArrayLike | None = None,
    alpha: ArrayLike = 1.0,
    bias: Array | None = None,
    out_dtype: str = "bfloat16",
    groups: Groups | None = None,
    counts: Array | None = None,
) -> Array:
    """alpha * (a * a_scale * a_tensor) @ ((b - b_zero) * b_scale * b_tensor) + bias, rounded once to `out_dtype`.

    a: [.., m, k] (packed: [.., m, k/2]) and b: [.., k, n] (packed: [.., k/2, n]) in the storage dtype of their elements, any strides; batch
    axes broadcast. With `groups`, a is [m, k] and b is [experts, k, n]. With `counts` [batch], rows >= counts[i] of matrix i are zero.
    a_scale: [.., ceil(m/gm), ceil(k/gk)] for a_block = (gm, gk), b_scale: [.., ceil(k/gk), ceil(n/gn)] for b_block = (gk, gn); `ALL` covers
    the whole axis, whose scale axis is then 1. None is 1; anything of one element scales the whole operand.
    a_scale_element, b_scale_element: "e4m3" or "e8m0" where scales are codes (uint8), always linear; e4m3 and e8m0 NaN make NaN of their
    block, zeros too, and a value of 2**128 or more is inf, as float32 would hold it.
    a_tensor: one element, [.., 1, 1] or [.., m, 1]; b_tensor: one element, [.., 1, 1] or [.., 1, n]. b_zero: uint8, one for each b_scale.
    bias: [n] or [m, n]; with groups or counts [n] or [experts, n]. alpha: one element. out_dtype: "bfloat16", "float16" or "float32".

    Scales constant along k multiply the finished sum, others the partial sum of their k-block (seen only where a scale is inf). k = 0 gives
    the bias or zeros, whatever the scales.
    Returns [.., m, n]. Numerics: see the module.
    """
    with np.errstate(all="ignore"):
        bt, factor, dtype = b.swapaxes(-1, -2), _float32(alpha).reshape(()), _dtype(out_dtype)
        k = _logical_k(a, a_element)
        assert k == _logical_k(bt, b_element), f"k differs: a has {k}, b {_logical_k(bt, b_element)}"
        m, n = a.shape[-2], bt.shape[-2]
        batch = a.shape[:-2] if groups else np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        shift = None if bias is None else np.atleast_2d(bias.astype(np.float64))
        sides = (
            _operands(a, a_element, a_scale, a_block, a_scale_element, a_tensor, None, batch),
            _operands(
                bt, b_element, _transposed(b_scale), b_block[::-1], b_scale_element, _transposed(b_tensor), _transposed(b_zero),
                b.shape[:-2] if groups else batch,
            ),
        )  # fmt: skip
        out = np.zeros((*batch, m, n), dtype)
        if groups is not None:
            assert (a.ndim, b.ndim, groups.expert.shape) == (2, 3, (m,))
            for expert in range(len(b)):
                rows = np.flatnonzero(groups.expert == expert)
                if rows.size:
                    part = np.empty((rows.size, n), dtype)
                    _fill(part, _take(sides[0](()), rows), sides[1]((expert,)), k, factor, _shift_of(shift, expert))
                    out[rows] = part
            return out
        for i in np.ndindex(batch):
            if counts is None:
                _fill(out[i], sides[0](i), sides[1](i), k, factor, shift)
            else:
                stop = int(np.clip(counts[i], 0, m))
                left = _take(sides[0](i), slice(0, stop))
                _fill(out[i][:stop], left, sides[1](i), k, factor, _shift_of(shift, i[0]))
        return out


def _operands(
    data: Array, element: str, scale: ArrayLike | None, block: tuple[int, int], scale_element: str, tensor: ArrayLike | None,
    zero: ArrayLike | None, batch: tuple[int, ...],
) -> Callable[[tuple[int, ...]], _Operand]:  # fmt: skip
    """The operand of each matrix of a batch, from arrays with k last."""
    rows, k = data.shape[-2], _logical_k(data, element)
    if scale_element:
        scale = _TABLES[scale_element][np.asarray(scale)]
    parts = (
        data,
        np.ones((1, 1)) if scale is None else _by_row(_float32(scale), block, rows, k),
        np.ones((1, 1)) if tensor is None else _by_row(_float32(tensor), (1, ALL), rows, k),
        np.zeros((1, 1)) if zero is None else _by_row(_float32(zero), block, rows, k),
    )
    spread = [np.broadcast_to(x, (*batch, *x.shape[-2:])) if batch else x.reshape(x.shape[-2:]) for x in parts]

    def of(index: tuple[int, ...]) -> _Operand:
        stored, scales, tensors, zeros = (x[index] for x in spread)
        return _Operand(stored, element, scales, block[1], scale_element, tensors, zeros)

    return of


def _take(x: _Operand, rows: Array | slice) -> _Operand:
    """Some rows of an operand."""
    return x._replace(data=x.data[rows], scale=_rows_of(x.scale, rows), tensor=_rows_of(x.tensor, rows), zero=_rows_of(x.zero, rows))


def _rows_of(scale: NDArray[np.float64], rows: Array | slice) -> NDArray[np.float64]:
    return scale if len(scale) == 1 else scale[rows]


def _shift_of(bias: NDArray[np.float64] | None, expert: int) -> NDArray[np.float64] | None:
    """The bias of one expert, where each has its own."""
    return bias if bias is None or len(bias) == 1 else bias[[expert]]


def _transposed(x: ArrayLike | None) -> ArrayLike | None:
    return x if x is None or np.ndim(x) < 2 else np.swapaxes(x, -1, -2)


def _fill(out: Array, a: _Operand, b: _Operand, k: int, alpha: Array, bias: Array | None) -> None:
    """Compute one matrix product into out [m, n], tile by tile; bias [m | 1, n]."""
    m, n = out.shape
    for i in range(0, m, TILE):
        for j in range(0, n, TILE):
            rows, columns = slice(i, min(i + TILE, m)), slice(j, min(j + TILE, n))
            if k:
                total = _sum(a, b, rows, columns, k)
                total *= a.constant(rows)
                total *= b.constant(columns).T
                total *= alpha
            else:
                total = np.zeros((rows.stop - rows.start, columns.stop - columns.start))
            if bias is not None:
                total += _rows_of(bias, rows)[:, columns]
            out[rows, columns] = _round(total, out.dtype)


def _sum(a: _Operand, b: _Operand, rows: slice, columns: slice, k: int) -> NDArray[np.float64]:
    """Sum over k of one tile, with the scales that vary along k.

    Finite scales go into the decoded values, which is exact and leaves BLAS long sums. An infinite one would make NaN of every stored zero
    there, so it waits for the partial sum of its k-block, as in the kernels.
    """
    late = [x.varies and bool(np.isinf(x.scale).any()) for x in (a, b)]
    edges = sorted({*range(0, k, TILE), k}.union(*(range(0, k, x.block) for x, wait in zip((a, b), late, strict=True) if wait)))
    total = np.zeros((rows.stop - rows.start, columns.stop - columns.start))
    partial = np.empty_like(total)
    for start, stop in pairwise(edges):
        np.matmul(_values(a, rows, start, stop, late[0]), _values(b, columns, start, stop, late[1]).T, out=partial)
        if late[0]:
            partial *= _rows_of(a.scale, rows)[:, start // a.block, None]
        if late[1]:
            partial *= _rows_of(b.scale, columns)[:, start // b.block]
        total += partial
    return total


def _values(x: _Operand, rows: slice, start: int, stop: int, late: bool) -> NDArray[np.float64]:
    """Values [rows, start:stop of k], with the scale if it varies along k and is not left for later."""
    values = _decode(x, rows, start, stop)
    blocks = np.arange(start, stop) // max(x.block, 1)

    def along_k(scale: NDArray[np.float64]) -> NDArray[np.float64]:
        own = _rows_of(scale, rows)
        return own if own.shape[1] == 1 else own[:, blocks]

    if x.zero.any():
        values -= along_k(x.zero)
    if x.varies and not late:
        values *= along_k(x.scale)
        if x.bytes:
            values = _float32(values)
    return values


def _by_row(values: NDArray[np.float64], block: tuple[int, int], rows: int, k: int) -> NDArray[np.float64]:
    """Scales of an operand with k last, one for each block -> [.., rows | 1, k-blocks | 1]."""
    if values.size == 1:
        return values.reshape(1, 1)
    wanted = tuple(1 if size == ALL else -(-length // size) for length, size in zip((rows, k), block, strict=True))
    assert values.shape[-1] == wanted[1] and values.shape[-2] in (1, wanted[0]), (
        f"scale is {values.shape}, wanted [.., {wanted[0]}, {wanted[1]}]"
    )
    return values[..., np.arange(rows) // block[0], :] if block[0] > 1 and values.shape[-2] > 1 else values


def _float32(values: ArrayLike) -> NDArray[np.float64]:
    """Float32 values, held in float64."""
    return np.asarray(values).astype(np.float32).astype(np.float64)


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


_CODES = np.arange(256, dtype=np.uint8)
_TABLES: dict[str, NDArray[np.float64]] = {
    "e4m3": _CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float64),
    "e5m2": _CODES.view(ml_dtypes.float8_e5m2).astype(np.float64),
    "e8m0": _CODES.view(ml_dtypes.float8_e8m0fnu).astype(np.float64),
    "e2m1": (_CODES & 15).view(ml_dtypes.float4_e2m1fn).astype(np.float64),
    "e2m1x2": (_CODES & 15).view(ml_dtypes.float4_e2m1fn).astype(np.float64),
    "int4x2": (_CODES & 15 ^ 8).astype(np.float64) - 8,
    "uint4x2": (_CODES & 15).astype(np.float64),
}
"""Value of every byte; of packed elements, of its low nibble."""


def _logical_k(data: Array, element: str) -> int:
    return int(data.shape[-1] * ELEMENTS[element].per_byte)


def _decode(operand: _Operand, rows: slice, start: int, stop: int) -> NDArray[np.float64]:
    """Stored values [rows, start:stop of k] as float64, exactly."""
    element = operand.element
    if ELEMENTS[element].per_byte == 2:
        codes = operand.data[rows, start // 2 : -(-stop // 2)]
        values = np.empty((len(codes), 2 * codes.shape[1]))
        values[:, 0::2] = _TABLES[element][codes]
        values[:, 1::2] = _TABLES[element][codes >> 4]
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


def segments_of(
    m: int, *, indptr: ArrayLike | None = None, lens: ArrayLike | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """(start of each segment, segment of each of m rows or -1): row i in indptr[s] <= i < indptr[s + 1] is in segment s.

    Give indptr [segments + 1], or lens [segments], whose starts are the exclusive prefix sums (a negative length counts as 0).
    A segment with start < 0, end < start or end > m has no row, nor does one that begins below an earlier value of indptr, so that no row
    belongs to two segments.
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
    result = np.full(m, -1, np.int64)
    highest = np.maximum.accumulate(starts)
    for s in np.flatnonzero((starts == highest) & (starts >= 0) & (starts <= ends) & (ends <= m)):
        result[starts[s] : ends[s]] = s
    return starts, result


def experts_from_segments(
    m: int,
    *,
    indptr: ArrayLike | None = None,
    lens: ArrayLike | None = None,
    weight_indices: ArrayLike | None = None,
    experts: int,
) -> NDArray[np.int64]:
    """Expert of each of m rows, -1 for none: weight_indices[s] in segment s (see `segments_of`), by default s.

    An expert outside [0, experts) is -1.
    """
    starts, segment = segments_of(m, indptr=indptr, lens=lens)
    chosen = np.arange(len(starts)) if weight_indices is None else np.asarray(weight_indices).astype(np.int64)
    chosen = np.append(np.where((chosen >= 0) & (chosen < experts), chosen, -1), -1)
    result: NDArray[np.int64] = chosen[segment]
    return result
