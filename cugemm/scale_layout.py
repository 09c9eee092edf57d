"""How the byte scales of block formats lie in memory.

linear: [rows, blocks of k], row-major. 128x4: tiles of 128 rows x 4 blocks, in which row r, block c is byte r % 32 * 16 + r // 32 * 4 + c;
8x4: tiles of 8 rows x 4 blocks, row-major. Tiles lie row-major, edges are padded to whole ones (with zeros). Source: the layouts that
tcgen05.mma reads and cuBLASLt and FlashInfer exchange (`SfLayout`).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE_ROWS = {"linear": 1, "128x4": 128, "8x4": 8}
"""Rows of a tile; the padded number of rows is a multiple."""


class SfLayout(IntEnum):
    """The layouts by FlashInfer's names and numbers. Source: FlashInfer `SfLayout`.

    >>> data, scale = cugemm.nvfp4_quantize(x, global_scale, sfLayout=cugemm.SfLayout.layout_128x4)
    """

    layout_128x4 = 0
    layout_8x4 = 1
    layout_linear = 2


def name_of(layout: int) -> str:
    """The layout's name in this library: "128x4", "8x4" or "linear"."""
    return SfLayout(layout).name.removeprefix("layout_")


def padded(rows: int, blocks: int, layout: str) -> tuple[int, int]:
    """(rows, blocks) with whole tiles; what a scale array of this layout holds."""
    if layout == "linear":
        return rows, blocks
    tile = TILE_ROWS[layout]
    return -(-rows // tile) * tile, -(-blocks // 4) * 4


def offsets(rows: int, blocks: int, layout: str) -> NDArray[np.int64]:
    """[rows, blocks]: the place in memory of each scale."""
    row, block = np.arange(rows, dtype=np.int64)[:, None], np.arange(blocks, dtype=np.int64)
    if layout == "linear":
        return row * blocks + block
    tile = TILE_ROWS[layout]
    inside = row % 32 * 16 + row % 128 // 32 * 4 if layout == "128x4" else row % 8 * 4
    return row // tile * tile * padded(rows, blocks, layout)[1] + block // 4 * (4 * tile) + inside + block % 4


def interleave(scale: NDArray[Any], layout: str) -> NDArray[Any]:
    """Linear scales [.., rows, blocks] -> [.., padded rows, padded blocks] in `layout`, each matrix by itself, zeros where padded."""
    *batch, rows, blocks = scale.shape
    high, wide = padded(rows, blocks, layout)
    out = np.zeros((*batch, high * wide), scale.dtype)
    out[..., offsets(rows, blocks, layout)] = scale
    return out.reshape(*batch, high, wide)


def deinterleave(memory: NDArray[Any], rows: int, blocks: int, layout: str) -> NDArray[Any]:
    """The inverse: [.., anything of the padded size] -> [.., rows, blocks] linear. `memory` has the tiles along its last axis, flat."""
    linear: NDArray[Any] = memory[..., offsets(rows, blocks, layout)]
    return linear
