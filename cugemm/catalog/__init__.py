"""The kernels that exist; the first that is willing takes calls whose kernel may not follow m (`batch_invariant`).

To add one: its file here, its source of the same stem in kernels/, one word in the list.
"""

from cugemm.catalog import block_quantize, hopper, portable, rows, skinny, swap_ab
from cugemm.catalog import quantize as conversion
from cugemm.catalog.step import Kernel, Step, TensorMap, Zero

KERNELS: tuple[Kernel, ...] = (
    hopper.KERNEL, skinny.KERNEL, swap_ab.KERNEL, portable.KERNEL, conversion.KERNEL, block_quantize.KERNEL, rows.KERNEL
)  # fmt: skip

__all__ = ["KERNELS", "Kernel", "Step", "TensorMap", "Zero"]
