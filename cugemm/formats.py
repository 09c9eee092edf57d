"""Number formats: what a stored value means and how scales cover it.

An `Element` is one number encoding. A `Format` is an element plus the block of values that shares one scale; formats are data,
so a new one is one literal below. Sources: IEEE 754 (fp16), bfloat16, OCP OFP8 (e4m3fn, e5m2), OCP MX (e2m1, e8m0, MXFP8, MXFP4), NVIDIA
NVFP4.
"""

from __future__ import annotations

from typing import NamedTuple

ALL = 0
"""In `Format.block`: the scale covers the whole axis."""


class Element(NamedTuple):
    """One number encoding. `dtype` is the NumPy / ml_dtypes name of an array that holds it; `code` is its number in the kernels."""

    name: str
    dtype: str
    code: int
    bits: int
    max: float
    per_byte: int = 1  # values in one stored byte (2: low nibble is the even k index), 1 for everything not packed


BF16 = Element("bf16", "bfloat16", 0, 16, 3.3895313892515355e38)
FP16 = Element("fp16", "float16", 1, 16, 65504.0)
E4M3 = Element("e4m3", "float8_e4m3fn", 2, 8, 448.0)
E5M2 = Element("e5m2", "float8_e5m2", 3, 8, 57344.0)
E2M1 = Element("e2m1", "uint8", 4, 8, 6.0)
"""One fp4 code in the low nibble of each byte; the high nibble is ignored."""
E2M1X2 = Element("e2m1x2", "uint8", 5, 4, 6.0, per_byte=2)
"""Two fp4 codes a byte along k, low nibble = even k."""
FP32 = Element("fp32", "float32", 6, 32, 3.4028234663852886e38)
INT8 = Element("int8", "int8", 7, 8, 127.0)
INT4X2 = Element("int4x2", "uint8", 8, 4, 7.0, per_byte=2)
"""Two's complement, -8..7; two codes a byte along k, low nibble = even k."""
UINT4X2 = Element("uint4x2", "uint8", 9, 4, 15.0, per_byte=2)
"""0..15, packed as int4x2; a zero point is subtracted before the scale multiplies."""
E8M0 = Element("e8m0", "float8_e8m0fnu", 10, 8, 2.0**127)
"""Scales only: 2**(code - 127), code 255 is NaN."""

ELEMENTS = {e.name: e for e in (BF16, FP16, E4M3, E5M2, E2M1, E2M1X2, FP32, INT8, INT4X2, UINT4X2, E8M0)}
BY_DTYPE = {e.dtype: e for e in (BF16, FP16, E4M3, E5M2, FP32, INT8, E8M0)}
"""dtype name -> element, for the dtypes that say what they hold (uint8 does not)."""


class Format(NamedTuple):
    """A quantised format: `element`, and the `block` (rows, k) of values that shares one scale (`ALL` = the whole axis).

    real value = (stored value - zero) * scale * tensor_scale. Rows are the rows of an activation or the output features of a weight; k is
    the axis summed over. scale: its element; e4m3 and e8m0 are a byte each, fp32 stands for any float. tensor: the block of the second,
    float32 scale, None where there is none. zero: whether each block has a zero point (uint8).
    """

    name: str
    element: Element
    block: tuple[int, int]
    scale: Element = FP32
    tensor: tuple[int, int] | None = None
    zero: bool = False


FP8_TENSOR = Format("fp8_tensor", E4M3, (ALL, ALL))
FP8_ROW = Format("fp8_row", E4M3, (1, ALL))
FP8_GROUP = Format("fp8_group", E4M3, (1, 128))
FP8_BLOCK = Format("fp8_block", E4M3, (128, 128))
FP8_E5M2_TENSOR = Format("fp8_e5m2_tensor", E5M2, (ALL, ALL))
FP8_E5M2_ROW = Format("fp8_e5m2_row", E5M2, (1, ALL))
FP8_E5M2_GROUP = Format("fp8_e5m2_group", E5M2, (1, 128))
FP8_E5M2_BLOCK = Format("fp8_e5m2_block", E5M2, (128, 128))
MXFP8 = Format("mxfp8", E4M3, (1, 32), E8M0)
MXFP8_E5M2 = Format("mxfp8_e5m2", E5M2, (1, 32), E8M0)
FP4_ROW = Format("fp4_row", E2M1X2, (1, ALL))
MXFP4 = Format("mxfp4", E2M1X2, (1, 32), E8M0)
NVFP4 = Format("nvfp4", E2M1X2, (1, 16), E4M3, tensor=(ALL, ALL))
NVFP4_ROW = Format("nvfp4_row", E2M1X2, (1, 16), E4M3, tensor=(1, ALL))
INT8_TENSOR = Format("int8_tensor", INT8, (ALL, ALL))
INT8_ROW = Format("int8_row", INT8, (1, ALL))
INT8_GROUP = Format("int8_group", INT8, (1, 128))
INT4_ROW = Format("int4_row", INT4X2, (1, ALL))
INT4_G32 = Format("int4_g32", INT4X2, (1, 32))
INT4_G64 = Format("int4_g64", INT4X2, (1, 64))
INT4_G128 = Format("int4_g128", INT4X2, (1, 128))
UINT4_G32 = Format("uint4_g32", UINT4X2, (1, 32), zero=True)
UINT4_G64 = Format("uint4_g64", UINT4X2, (1, 64), zero=True)
UINT4_G128 = Format("uint4_g128", UINT4X2, (1, 128), zero=True)

FORMATS = {
    f.name: f
    for f in (
        FP8_TENSOR,
        FP8_ROW,
        FP8_GROUP,
        FP8_BLOCK,
        FP8_E5M2_TENSOR,
        FP8_E5M2_ROW,
        FP8_E5M2_GROUP,
        FP8_E5M2_BLOCK,
        MXFP8,
        MXFP8_E5M2,
        FP4_ROW,
        MXFP4,
        NVFP4,
        NVFP4_ROW,
        INT8_TENSOR,
        INT8_ROW,
        INT8_GROUP,
        INT4_ROW,
        INT4_G32,
        INT4_G64,
        INT4_G128,
        UINT4_G32,
        UINT4_G64,
        UINT4_G128,
    )
}

LAYOUTS = ("linear", "128x4", "8x4")
"""How byte scales lie in memory: row-major, or in tiles of 128 (or 8) rows x 4 blocks of k (scale_layout.py)."""
