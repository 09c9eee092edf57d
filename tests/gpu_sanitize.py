"""Some hundred small calls over all kernels, for compute-sanitizer; exits with the number of wrong results.

    compute-sanitizer --tool memcheck python tests/gpu_sanitize.py
    compute-sanitizer --tool racecheck python tests/gpu_sanitize.py hopper skinny

Names are those of the functions below that are to run, all without any.

Every array is a cudaMalloc of its own that ends with its last element, so that a read one byte past it shows.
"""

from __future__ import annotations

import sys
from typing import Any

import format_oracles as formats
import gpu_arrays
import gpu_formats
import numpy as np
import oracles

import cugemm
from cugemm import launch, quantize_reference
from cugemm.api.common import product
from cugemm.formats import FORMATS
from cugemm.problem import OPS, GemmOptions

Array = np.ndarray[Any, Any]

DENSE: list[tuple[str, str, tuple[str, str], int]] = [
    ("bf16", "bf16", ("row", "column"), 0), ("bf16", "bf16", ("row", "row"), 1), ("fp16", "bf16", ("column", "column"), 2),
    ("e4m3", "e4m3", ("row", "column"), 1), ("e4m3", "e5m2", ("column", "row"), 2), ("bf16", "e2m1x2", ("row", "column"), 1),
    ("fp16", "e2m1", ("row", "row"), 2), ("e4m3", "fp16", ("odd", "gaps"), 1), ("e2m1x2", "e4m3", ("odd", "odd column"), 0),
    ("bf16", "bf16", ("odd column", "odd"), 2),
]  # fmt: skip
BLOCKS = [
    ("bf16", "nvfp4"), ("nvfp4", "nvfp4"), ("mxfp8", "mxfp4"), ("fp16", "mxfp4"), ("bf16", "uint4_g32"), ("fp16", "int4_g64"),
    ("int8_row", "int4_g128"), ("fp8_group", "mxfp8"), ("nvfp4_row", "int4_g32"),
]  # fmt: skip
FEW_ROWS = [("bf16", "bf16"), ("bf16", "fp8_row"), ("fp8_group", "fp8_block"), ("bf16", "nvfp4"), ("bf16", "mxfp8"), ("fp16", "int4_g128")]
HOPPER = [
    ("bf16", "bf16", "fast"), ("e4m3", "e5m2", "fast"), ("fp8_row", "fp8_row", "promoted"), ("fp8_group", "fp8_block", "promoted"),
    ("e4m3", "e5m2", "fp32"),
]  # fmt: skip
SHAPES = [(1, 1, 2), (17, 33, 66), (129, 131, 258)]


def tight(x: Array, *, transposed: bool = False, vector: bool = True) -> Array:
    """The same values, each row at a multiple of 16 bytes (or at an odd place and pitch), in memory that ends with the last one."""
    if transposed:
        return tight(x.swapaxes(-1, -2), vector=vector).swapaxes(-1, -2)
    size = x.dtype.itemsize
    rows, columns = x.shape
    pitch = -(-columns * size // 16) * 16 // size if vector else columns + 1 + columns % 2
    first = 0 if vector else 1
    memory = oracles.poison((first + max((rows - 1) * pitch + columns, 0),), x.dtype.name)
    view = np.ndarray(x.shape, x.dtype, memory, first * size, (pitch * size, size))
    view[...] = x
    return view


def gaps(x: Array) -> Array:
    size = x.dtype.itemsize
    rows, columns = x.shape
    memory = oracles.poison((1 + (rows - 1) * (2 * columns + 3) + 2 * (columns - 1) + 1,), x.dtype.name)
    view = np.ndarray(x.shape, x.dtype, memory, size, ((2 * columns + 3) * size, 2 * size))
    view[...] = x
    return view


def lay(x: Array, layout: str) -> Array:
    return gaps(x) if layout == "gaps" else tight(x, transposed="column" in layout, vector="odd" not in layout)


def dense(dev: Any, number: int) -> None:
    a, b, layouts, tile = DENSE[number]
    elements = {f"{side}_element": element for side, element in (("a", a), ("b", b)) if element.startswith("e2m1")}
    for i, (m, n, k) in enumerate(SHAPES):
        for by_k in (False, True):
            if by_k and number % 3:
                continue
            blocks = {"a_block": (1, 128), "b_block": (128, 128)} if by_k else {"a_block": (1, 0), "b_block": (0, 1)}
            case = oracles.exact_case(i, m, n, k, a, b, bias=True, **blocks)
            options = GemmOptions(**elements, a_block=case.a_block, b_block=case.b_block[::-1], out_dtype=("bfloat16", "float32")[i % 2])
            operands = [dev.put(lay(x, layout)) for x, layout in zip((case.a, case.b), layouts, strict=True)]
            out = dev.place(lay(oracles.poison((m, n), options.out_dtype), ("row", "odd", "odd column")[i]))
            with gpu_arrays.planned(tile if by_k or i else tile + 1):
                given = {"a_scale": dev.put(case.a_scale), "b_scale": dev.put(case.b_scale), "bias": dev.put(case.bias)}
                product(OPS["matmul"], *operands, options, **given, out=out.array)
            oracles.check_exact(case, np.ascontiguousarray(dev.get(out)), options.out_dtype)


def grouped(dev: Any, tile: int) -> None:
    m, experts = 43, 3
    wrapper = cugemm.SegmentGEMMWrapper(None)
    base = oracles.exact_case(1, m, 35, 66, "bf16", "bf16", experts=experts)
    w = dev.put(np.ascontiguousarray(base.b))
    calls: list[tuple[Array, dict[str, Any]]] = [
        (base.expert, {"batch_size": base.expert}),
        (np.repeat([0, -1, 2], [20, 3, 20]), {"seg_indptr": [0, 20, 20, 20], "weight_indices": [0, 7, 2]}),
        (np.full(m, -1), {"seg_indptr": [-9, 2**31 - 1, -(2**31), m + 1]}),
        (np.repeat([0, 1, 2], [10, 20, 13]), {"seg_lens": [10, 20, 13]}),
        (np.repeat([0, -1], [10, 33]), {"seg_lens": [10, 2**31 - 1, 5]}),
    ]
    calls[1][0][:] = np.repeat([0, -1], [20, 23])
    for expert, named in calls:
        case = oracles.given_case(base.a, base.b, "bf16", "bf16", expert=expert, repro=f"{base.repro} {named}")
        for index in ("int32", "int64"):
            arrays = {name: dev.put(np.asarray(value, index)) for name, value in named.items()}
            out = dev.place(tight(oracles.poison((m, 35), "bfloat16"), vector=index == "int32"))
            with gpu_arrays.planned(tile):
                wrapper.run(dev.put(base.a), w, out=out.array, **arrays)
            oracles.check_exact(case, np.ascontiguousarray(dev.get(out)), "bfloat16")


def blocks(dev: Any, number: int) -> None:
    """Formats with block scales or zero points, linear and tiled, in pieces and value by value."""
    a, b = BLOCKS[number]
    for i, (m, n, k) in enumerate(SHAPES):
        pair = formats.make(i, m, n, k, a, b, exact=True)
        for layouts, scale_layout in ((("row", "row"), "128x4"), (("odd row", "gaps"), "linear"), (("row", "row"), "8x4")):
            with gpu_arrays.planned(number + i):
                gpu_formats.verify(dev, pair, layouts=layouts, scale_layouts=(scale_layout, scale_layout))


def few_rows(dev: Any, kernel: str, number: int) -> None:
    """One CTA or a cluster for each tile, pieces of a, matrices, counts out of range, no k."""
    a, b = FEW_ROWS[number]
    for i, (m, n, k) in enumerate([*SHAPES, (5, 70, 528), (64, 40, 130), (3, 5, 0)]):
        pair = formats.make(i, min(m, 64), n, k, a, b, exact=True, bias=True)
        for tile in range(number + i, 60, 13):
            with gpu_arrays.planned(tile):
                gpu_formats.verify(dev, pair, backend=kernel, scale_layouts=("linear", ("linear", "128x4", "8x4")[tile % 3]))
    pair, counts = formats.make(9, 9, 40, 264, a, b, exact=True, batch=(3,)), np.array([4, -3, 17])
    case = formats.answer(pair.a, pair.b, counts=counts, repro=f"{kernel}(dev, {number}) exact=True")
    for tile in (0, 11, 30):
        with gpu_arrays.planned(tile):
            out = gpu_formats.multiply(dev, pair.a, pair.b, case, backend=kernel, segments="masked", said=counts)
            formats.check(pair, out, "bfloat16", case)


def skinny(dev: Any, number: int) -> None:
    few_rows(dev, "skinny", number)


def swap_ab(dev: Any, number: int) -> None:
    few_rows(dev, "swap_ab", number)


def hopper(dev: Any, number: int) -> None:
    """Tiles with tails on every side, clusters that share or cut k, matrices, counts out of range."""
    a, b, accumulate = HOPPER[number]
    for i, (m, n, k) in enumerate([(1, 16, 16), (130, 136, 272), (300, 40, 1040)]):
        pair = formats.make(i, m, n, k, a, b, exact=True, bias=True)
        for tile in range(number + i, 16, 5):
            with gpu_arrays.planned(tile):
                gpu_formats.verify(dev, pair, backend="hopper", accumulate=accumulate)
    pair, counts = formats.make(9, 70, 40, 272, a, b, exact=True, batch=(3,)), np.array([4, -3, 170])
    case = formats.answer(pair.a, pair.b, counts=counts, repro=f"hopper(dev, {number}) exact=True")
    out = gpu_formats.multiply(dev, pair.a, pair.b, case, backend="hopper", segments="masked", said=counts, accumulate=accumulate)
    formats.check(pair, out, "bfloat16", case)


def chosen(dev: Any, kind: str) -> None:
    """Groups in every form, with indices out of range."""
    for seed, (a, b) in enumerate((("bf16", "nvfp4"), ("mxfp8", "mxfp4"), ("fp8_group", "fp8_block"))):
        gpu_formats.grouped(dev, seed, kind, a, b, exact=True, index_dtype=("int32", "int64")[seed % 2])


def rows(dev: Any, dtype: str) -> None:
    rng = np.random.default_rng(0)
    for tokens, top, n in ((1, 1, 1), (7, 3, 130), (33, 2, 515)):
        y = rng.standard_normal((tokens * top, 2 * n)).astype(oracles.dtype_of(dtype))
        weights = rng.random((tokens, top)).astype(np.float32)
        indices = rng.integers(-2, tokens * top + 2, (tokens, top))
        oracles.check_bits(
            dev.fetch(cugemm.combine(dev.put(y), dev.put(weights), indices=dev.put(indices))),
            cugemm.combine(y, weights, indices=indices), f"combine {tokens} {top} {n}",
        )  # fmt: skip
        oracles.check_bits(dev.fetch(cugemm.silu_and_mul(dev.put(y))), cugemm.silu_and_mul(y), f"silu_and_mul {tokens * top} {n}")


def conversions(dev: Any, dtype: str) -> None:
    rng = np.random.default_rng(0)
    for name, fmt in FORMATS.items():
        scale_layout = "linear" if fmt.scale.name == "fp32" else "128x4"
        for layout, shape in (("row", (1, 2)), ("odd", (17, 130)), ("column", (130, 258))):
            x = lay(rng.standard_normal(shape).astype(oracles.dtype_of(dtype)), layout)
            data, scale, *more = quantize_reference.quantize(x, fmt, layout=scale_layout)
            q = cugemm.quantize(dev.put(x), name, scale_layout=scale_layout)
            oracles.check_bits(dev.fetch(q.data), data, name)
            oracles.check_bits(dev.fetch(q.scale), scale, name)
            tensor, zero = (more[0] if fmt.tensor is not None else None), (more[-1] if fmt.zero else None)
            back = quantize_reference.dequantize(data, scale, fmt, dtype, tensor_scale=tensor, zero=zero, layout=scale_layout)
            oracles.check_bits(dev.fetch(cugemm.dequantize(q, dtype)), back, name)


def main() -> int:
    dev = gpu_arrays.Cupy()
    dev.unpooled()
    few = (skinny, swap_ab) if "wgmma" in launch.machine(0)[0].features else (skinny,)
    todo = [
        *((dense, i) for i in range(len(DENSE))),
        *((grouped, tile) for tile in range(3)),
        *((blocks, i) for i in range(len(BLOCKS))),
        *((kernel, i) for kernel in few for i in range(len(FEW_ROWS))),
        *((hopper, i) for i in range(len(HOPPER)) if swap_ab in few),
        *((chosen, kind) for kind in gpu_formats.GROUPS),
        (rows, "bfloat16"),
        (rows, "float32"),
        (conversions, "bfloat16"),
        (conversions, "float32"),
    ]
    todo = [(check, argument) for check, argument in todo if check.__name__ in sys.argv[1:] or not sys.argv[1:]]
    wrong = 0
    for check, argument in todo:
        try:
            check(dev, argument)
        except Exception as error:
            wrong += 1
            print(f"{check.__name__}({argument!r}): {type(error).__name__}: {error}", flush=True)
    print(f"{launch.launches} launches, {wrong} of {len(todo)} groups wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
