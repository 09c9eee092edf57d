"""How scales cover an operand: read from their shapes, strides and the operand's format (R18).

A scale multiplies stored values. `Scale` is what kernels and the reference see of one; everything a caller can get wrong about it is
refused here, with the shapes that would be right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cugemm.arrays import View, dense_strides, itemsize
from cugemm.formats import ALL, E4M3, E8M0
from cugemm.scale_layout import TILE_ROWS, padded

SCALE_DTYPES = ("float32", "float16", "bfloat16")
BYTE_SCALES = (E4M3.name, E8M0.name)
K_BLOCKS = (32, 64, 128)
"""Values along k that one float scale may cover, beside all of them."""
_BYTE_BLOCKS = {E4M3.name: (1, 16), E8M0.name: (1, 32)}
_MOST_BYTES = 2**32
"""Scales of one matrix: kernels count their bytes in 32 bits."""


class Scale(NamedTuple):
    """A scale as [matrices, row blocks, k blocks] with element strides, 0 where it repeats; `block` = (rows, k) values under one scale.

    element: "e4m3" or "e8m0" where scales are bytes, else "". layout: of bytes; tiled ones have no strides but the first.
    rows: "" each matrix has its own, "flat" the rows of all matrices follow each other, "pad4" and "pad128" the rows of segment s begin at
    (indptr[s] + s * (p - 1)) // p * p.
    """

    shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    block: tuple[int, int]
    dtype: str
    element: str = ""
    layout: str = "linear"
    rows: str = ""

    @property
    def by_k(self) -> bool:
        """Whether it is a float scale that changes along k, so that it cannot wait for the epilogue."""
        return not self.element and self.block[1] != ALL


class Covered(NamedTuple):
    """What a scale covers: an operand of `batch` matrices [rows, k], its name, and how its axes stand in the caller's arrays."""

    role: str
    of: str
    shape: tuple[int, ...]
    rows: int
    k: int
    batch: int
    row_first: bool


Refuse = Callable[[str], Exception]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def block_counts(rows: int, k: int, block: tuple[int, int]) -> tuple[int, int]:
    """How many scales lie along (rows, k)."""
    return (1 if block[0] == ALL else ceil_div(rows, block[0])), (1 if block[1] == ALL else ceil_div(k, block[1]))


def block_text(block: tuple[int, int]) -> str:
    rows, k = ("all" if n == ALL else str(n) for n in block)
    return f"{rows} x {k}"


def read_float(
    view: View,
    covered: Covered,
    declared: tuple[int, int] | None,
    blocks: tuple[tuple[int, int], ...],
    rows: str,
    refuse: Refuse,
    wrong: Refuse,
) -> Scale:
    """A float scale: one element, per row, or per block. `declared`: the block of the operand's format; `blocks`: what shapes may say."""
    if declared is not None and declared[1] not in (ALL, *K_BLOCKS):
        raise refuse(
            f"{covered.of} is of a format with one scale for each {block_text(declared)} values; along k it must be "
            f"{', '.join(map(str, K_BLOCKS))} or all."
        )
    if view.dtype not in SCALE_DTYPES:
        raise wrong(f"{covered.role} is {view.dtype}; wanted {', '.join(SCALE_DTYPES)}.")
    if view.size == 1 and (declared is None or block_counts(covered.rows, covered.k, declared) == (1, 1)):
        return Scale((1, 1, 1), (0, 0, 0), (ALL, ALL), view.dtype)
    either = len(covered.shape) == 3 and covered.batch == covered.rows > 1  # one per matrix, or one per row?
    if len(view.shape) == 1 and declared in (None, (1, ALL)) and view.shape == (covered.rows,) and not either:
        return Scale((1, covered.rows, 1), (0, view.strides[0], 0), (1, ALL), view.dtype, rows=rows)
    found = _matrices(view, covered)
    if found is not None:
        for block in (declared,) if declared else ((ALL, ALL), (1, ALL), *blocks):
            if found[0][1:] == block_counts(covered.rows, covered.k, block):
                span = itemsize(view.dtype) * sum((n - 1) * abs(step) for n, step in zip(found[0][1:], found[1][1:], strict=True))
                if found[0][2] > 1 and span >= _MOST_BYTES:
                    raise refuse(
                        f"{covered.role} of one matrix spans {span} bytes; scales that vary along k may span fewer than 2**32: pass a copy."
                    )
                return Scale(*found, block, view.dtype, rows=rows)
    raise refuse(
        f"{covered.role} has shape {view.shape}, but {covered.of} is {covered.shape}; wanted {_shapes(covered, declared, blocks)}."
    )


def read_bytes(view: View, covered: Covered, element: str, layout: str, rows: str, refuse: Refuse, wrong: Refuse) -> Scale:
    """A byte scale (e4m3 for each 16 values along k, e8m0 for each 32) in its memory layout."""
    own = "float8_e4m3fn" if element == E4M3.name else "float8_e8m0fnu"
    if view.dtype not in ("uint8", own):
        raise wrong(f"{covered.role} is {view.dtype}; scales of {covered.of} are {element} codes: pass them as uint8 or {own}.")
    block = _BYTE_BLOCKS[element]
    flat = rows == "flat"
    count, blocks = (1 if flat else covered.batch), ceil_div(covered.k, block[1])
    length = covered.rows * (covered.batch if flat else 1)
    high, wide = padded(length, blocks, layout)
    if high * wide >= _MOST_BYTES:
        raise refuse(f"{covered.of} {covered.shape} has {high * wide} scales; one matrix may have fewer than 2**32.")
    if layout == "linear":
        found = _matrices(view, covered._replace(batch=count))
        if found is not None and found[0][1:] == (length, blocks):
            return Scale(*found, block, view.dtype, element, layout, rows)
        wanted = f"({length}, {blocks})" if covered.row_first else f"({blocks}, {length})"
        raise refuse(
            f"{covered.role} has shape {view.shape}, but {covered.of} is {covered.shape}; linear scales, one for each "
            f"{block[1]} values along k, have shape {wanted}."
        )
    each = high * wide
    step = tiled_step(view, covered.rows, blocks, covered.batch, layout, flat)
    if step is not None:
        return Scale((count if step else 1, length, blocks), (0 if count == 1 else step, 0, 0), block, view.dtype, element, layout, rows)
    several = f" for each of {count} matrices" if count > 1 else " over the rows of all matrices" if flat and covered.batch > 1 else ""
    raise refuse(
        f"{covered.role} has shape {view.shape} and strides {view.strides}, but {covered.of} is {covered.shape}; scales in {layout} tiles "
        f"({TILE_ROWS[layout]} rows x 4 blocks of {block[1]} k) take {each} contiguous bytes{several}, for example "
        f"({f'{count}, ' if count > 1 else ''}{high}, {wide}); "
        'linear ones need scale_layout="linear" or a cugemm.Quantized that says so; pass tiles as they were made, not a transposed copy.'
    )


def rows_held(view: View, k: int, element: str) -> int:
    """Rows of an array of byte scales, row-major or in 128x4 tiles in whatever shape."""
    if len(view.shape) == 2:
        return view.shape[0]
    return view.size // max(padded(1, ceil_div(k, _BYTE_BLOCKS[element][1]), "128x4")[1], 1)


def read_tensor(view: View, covered: Covered, refuse: Refuse, wrong: Refuse) -> Scale:
    """The second, float scale: one element, one per matrix ([batch] of a 3-D operand), or one per row."""
    if view.dtype not in SCALE_DTYPES:
        raise wrong(f"{covered.role} is {view.dtype}; wanted {', '.join(SCALE_DTYPES)}.")
    if view.size == 1:
        return Scale((1, 1, 1), (0, 0, 0), (ALL, ALL), view.dtype)
    if len(covered.shape) == 3 and view.shape in ((covered.batch,), (covered.batch, 1, 1)):
        return Scale((covered.batch, 1, 1), (view.strides[0], 0, 0), (ALL, ALL), view.dtype)
    if len(covered.shape) == 2 and view.shape == (covered.rows,):
        return Scale((1, covered.rows, 1), (0, view.strides[0], 0), (1, ALL), view.dtype)
    found = _matrices(view, covered._replace(row_first=True))  # [.., rows, 1] whichever way round the operand stands
    if found is not None and found[0][1:] == (covered.rows, 1):
        return Scale(*found, (1, ALL), view.dtype)
    rows = f"({covered.rows},) or ({covered.rows}, 1)" if len(covered.shape) == 2 else f"({covered.batch}, {covered.rows}, 1)"
    matrices = f", ({covered.batch},) for one per matrix" if len(covered.shape) == 3 else ""
    raise refuse(
        f"{covered.role} has shape {view.shape}, but {covered.of} is {covered.shape}; "
        f"wanted one element{matrices}, or {rows} for one per row."
    )


def read_zero(view: View, covered: Covered, scale: Scale | None, refuse: Refuse, wrong: Refuse) -> Scale:
    """Zero points: uint8, one for each scale."""
    if view.dtype != "uint8":
        raise wrong(f"{covered.role} is {view.dtype}; zero points are uint8.")
    found = _matrices(view, covered)
    if scale is None or found is None or found[0][1:] != scale.shape[1:]:
        has = "has no scale" if scale is None else f"has {scale.shape[1]} x {scale.shape[2]} scales along (rows, k)"
        raise refuse(f"{covered.role} has shape {view.shape}, but {covered.of} {has}; give each scale one zero point, in the same shape.")
    if view.span() >= _MOST_BYTES:
        raise refuse(f"{covered.role} spans {view.span()} bytes; zero points may span fewer than 2**32.")
    return Scale(*found, scale.block, view.dtype)


def _matrices(view: View, covered: Covered) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
    """(shape, strides) of a 2-D or 3-D scale as [matrices, rows, k]; None for other ranks and batches."""
    if len(view.shape) != 2 and not (len(view.shape) == 3 and view.shape[0] in (1, covered.batch)):
        return None
    row, k = (-2, -1) if covered.row_first else (-1, -2)
    steps = [0 if n == 1 else s for n, s in zip(view.shape, view.strides, strict=True)]
    batched = len(view.shape) == 3
    return (view.shape[0] if batched else 1, view.shape[row], view.shape[k]), (steps[0] if batched else 0, steps[row], steps[k])


def tiled_step(view: View, rows: int, blocks: int, count: int, layout: str, flat: bool) -> int | None:
    """Bytes from the tiles of one of `count` matrices [rows, blocks] to the next, 0 where all share them; None if that is not what it is.

    `flat`: one set of tiles over the rows of all matrices. The last two axes may be a transposed view, as FlashInfer passes `b_sf.T`, but
    not a transposed copy, nor a column-major one, whose bytes lie otherwise. What could be flat as well as one set for each matrix is
    neither, unless both are the same bytes: a shape that begins with `count` says the second.
    """
    high, wide = padded(rows * count, blocks, layout) if flat else padded(rows, blocks, layout)
    each, several, whole = high * wide, count > 1, rows % TILE_ROWS[layout] == 0
    if view.size == 0:
        return each if each * (1 if flat else count) == 0 else None
    row_major = view.strides == dense_strides(view.shape)
    if len(view.shape) >= 2 and min(high, wide) > 1 and high != wide:
        column_major = view.strides[-2] < view.strides[-1]
        if (view.shape[-2:] == (wide, high) and row_major) or (view.shape[-2:] == (high, wide) and column_major):
            return None
    begins = len(view.shape) >= 2 and view.shape[0] == count
    if flat or not several:
        wrong = flat and several and begins and not whole
        return each if view.size == each and _dense(view.shape, view.strides) and not wrong else None
    if view.size == each and len(view.shape) == 3 and view.shape[0] == 1 and _dense(view.shape, view.strides):
        return 0
    if view.size != each * count:
        return None
    if begins and len(view.shape) == 3 and _dense(view.shape[1:], view.strides[1:]):
        return view.strides[0]
    return each if row_major and (begins or whole) else None


def _dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements follow each other without gaps, row-major or, of two axes, transposed."""
    axes = [(n, s) for n, s in zip(shape, strides, strict=True) if n > 1]
    if len(axes) == 2 and axes[0][1] < axes[1][1]:
        axes.reverse()
    span = 1
    for n, s in reversed(axes):
        if s != span:
            return False
        span *= n
    return True


def _shapes(covered: Covered, declared: tuple[int, int] | None, blocks: tuple[tuple[int, int], ...]) -> str:
    rows, k, row_first = covered.rows, covered.k, covered.row_first

    def shape(block: tuple[int, int]) -> str:
        first, second = block_counts(rows, k, block)
        return f"({first}, {second})" if row_first else f"({second}, {first})"

    if declared is not None:
        return f"{shape(declared)}, one scale for each {block_text(declared)} of its format"
    named = [f"({rows},) or {shape((1, ALL))} for one per row" if row_first else f"({rows},) or {shape((1, ALL))} for one per column"]
    named += [f"{shape(block)} for one per {block_text(block)} along (rows, k)" for block in blocks]
    if len(covered.shape) == 3 and covered.batch > 1:
        named.append(f"({covered.batch}, 1, 1) for one per matrix, or any of these with the axis of {covered.batch} matrices in front")
    return ", ".join(["one element", *named])
