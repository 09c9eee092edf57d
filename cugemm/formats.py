"""Number formats: what a stored value means and how scales cover it.

An `Element` is one number encoding. A `Format` is an element plus the block of values that shares one scale; formats are data,
so a new one is one literal below. Sources: IEEE 754 (fp16), bfloat16, OCP OFP8 (e4m3fn, e5m2), OCP MX (e2m1).
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

ELEMENTS = {e.name: e for e in (BF16, FP16, E4M3, E5M2, E2M1, E2M1X2, FP32)}
BY_DTYPE = {e.dtype: e for e in (BF16, FP16, E4M3, E5M2, FP32)}
"""dtype name -> element, for the dtypes that say what they hold (uint8 does not)."""


class Format(NamedTuple):
    """A quantised format: `element`, and the `block` (rows, k) of values that shares one scale (`ALL` = the whole axis).

    real value = stored value * scale. Rows are the rows of an activation or the output features of a weight; k is the axis summed over.
    """

    name: str
    element: Element
    block: tuple[int, int]


FP8_TENSOR = Format("fp8_tensor", E4M3, (ALL, ALL))
FP8_ROW = Format("fp8_row", E4M3, (1, ALL))
FP8_GROUP = Format("fp8_group", E4M3, (1, 128))
FP8_BLOCK = Format("fp8_block", E4M3, (128, 128))
FP8_E5M2_TENSOR = Format("fp8_e5m2_tensor", E5M2, (ALL, ALL))
FP8_E5M2_ROW = Format("fp8_e5m2_row", E5M2, (1, ALL))
FP8_E5M2_GROUP = Format("fp8_e5m2_group", E5M2, (1, 128))
FP8_E5M2_BLOCK = Format("fp8_e5m2_block", E5M2, (128, 128))
FP4_ROW = Format("fp4_row", E2M1X2, (1, ALL))

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
        FP4_ROW,
    )
}
