"""`grouped_matmul`: products whose rows choose their weights, as the experts of a mixture do."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

from cugemm.api.common import dtype_of, gemm_options, is_float16, product, same_k, shape_of
from cugemm.api.dense import check_activations
from cugemm.api.quantize import QUANTIZE, quantize
from cugemm.api.rehearsal import alike, check_out, rehearse, reshaped
from cugemm.api.rowwise import combine
from cugemm.arrays import Spec, framework_of
from cugemm.conversion import QuantizeOptions
from cugemm.formats import ALL, BF16, FORMATS, INT4X2, INT8, UINT4X2
from cugemm.launch import run
from cugemm.problem import FLOATS4, FLOATS8, FLOATS16, OUT_DTYPES, GemmOp, GemmOptions
from cugemm.problem import product as register
from cugemm.quantized import Quantized
from cugemm.scales import block_counts

_LEFT = (*FLOATS16, *FLOATS8, *FLOATS4, INT8.name, INT4X2.name)
_RIGHT = (*_LEFT, UINT4X2.name)
_CALLED = {
    "a": "x", "b": "experts", "a_scale": "x.scale", "b_scale": "experts.scale", "a_tensor_scale": "x.tensor_scale",
    "b_tensor_scale": "experts.tensor_scale", "zero": "experts.zero", "experts": "expert_map",
}  # fmt: skip
_INDPTR = register("grouped_matmul", _LEFT, _RIGHT, called={**_CALLED, "segments": "indptr"})
_OPS = {
    said: _INDPTR._replace(roles=tuple(said if role == "indptr" else role for role in _INDPTR.roles))
    for said in ("indptr", "indices", "counts")
}
"""One operation under three names of one argument; calls differ in their options too."""


def grouped_matmul(
    x: Any,
    experts: Any,
    *,
    indptr: Any = None,
    indices: Any = None,
    counts: Any = None,
    rows: Any = None,
    weights: Any = None,
    bias: Any = None,
    activations: str | None = None,
    out: Any = None,
    out_dtype: Any = None,
    accumulate: str = "fast",
    backend: str = "auto",
) -> Any:
    """y[i] = x[i] @ experts[e(i)].T + bias[e(i)]: every row of x times the matrix of its own expert.

    x: 16-bit floats, float8, int8 or a Quantized without zero points. experts: [E, n, k], the same or a Quantized of any format.
    One of these says which expert a row has, as int32 or int64 where x lives:
        indptr [S + 1]   x [m, k]: rows indptr[e] to indptr[e + 1] belong to expert e; S <= E. y is [m, n]
        counts [S]       x [m, k]: the same by lengths, packed without gaps. y is [m, n]
        counts [E]       x [E, capacity, k]: the first counts[e] rows of matrix e; the others may hold anything. y is [E, capacity, n]
        indices [m]      x [m, k]: the expert of each row, in any order. y is [m, n]
        indices [m, j]   x [m, k], or [m, j, k] with a row for each pair: the experts of each row (top-k). y is [m, j, n]
    rows: [M], of a 2-D x, whose row rows[i] then stands for x[i] (gather); indptr, counts or 1-D indices speak about these M rows.
    weights: [m, j] float, with 2-D indices: y [m, n] is the sum over j of weights[i, j] * y[i, j], in the order of j (`combine`).
    bias: [n] or [E, n], any float. activations: quantise x to this format first, as in `linear`.
    out: of y's shape. out_dtype: default x's dtype if it is a 16-bit float, else bfloat16. accumulate, backend: as in `linear`.

    Rows without an expert are zeros, without bias: those outside every segment or from counts[e] on, those with an index of -1 or any other
    that is no expert (or, in `rows`, no row), those of segments that reach past m or begin before an earlier one's end. On a GPU nothing is
    read back and nothing synchronises, so calls can be captured and replayed with other values; in host memory values other than -1 that
    select nothing are a ValueError.
    Raises TypeError and ValueError that name the argument, before anything is launched; NoKernelError with every kernel's reason.
    Numerics: as `linear`; with weights y[i, j] is float32, and products and sums over j are rounded to float32. Bits are the same in every
    run. Source: FlashInfer's grouped products and fused MoE; ScatterMoE (Tan et al., arXiv:2403.08245) for the gather.

    >>> h = cugemm.silu_and_mul(cugemm.grouped_matmul(x, w13, indices=topk))                  # [m, j, f]
    >>> y = cugemm.grouped_matmul(h, w2, indices=topk, weights=probabilities)                 # [m, n]
    """
    given = {name: value for name, value in (("indptr", indptr), ("indices", indices), ("counts", counts)) if value is not None}
    if len(given) != 1:
        shown = " and ".join(given) if given else "nothing"
        raise ValueError(f"grouped_matmul: {shown} says which rows go where; pass one of indptr, indices and counts.")
    ((name, said),) = given.items()
    op, shape = _OPS[name], shape_of("grouped_matmul", "x", x)
    pairs = shape_of("grouped_matmul", name, said) if name == "indices" else ()
    kind = {"indptr": "indptr", "indices": "indices", "counts": "masked" if len(shape) == 3 else "lens"}[name]
    options = gemm_options(op, out_dtype, backend, (), accumulate, b_axes="nk", segments=kind)
    if rows is not None and len(shape) == 3:
        raise op.error(f"rows gathers rows of a 2-D x, but x has shape {shape}; drop rows, or pass x as [rows, k].")
    if activations is not None:
        _check_activations(op, x, experts, activations, masked=kind == "masked")
    if weights is not None:
        _check_weights(op, weights, pairs)
        if out is not None:
            _check_combined(op, experts, pairs, out, options.out_dtype)
    paired = len(shape) == 3 and name == "indices"
    if activations is None and weights is None and not paired:
        return product(op, x, experts, options, segments=said, rows=rows, bias=bias, out=out)
    if paired and pairs != shape[:2]:
        raise op.error(f"indices has shape {pairs}, but x {shape} has {shape[0]} x {shape[1]} rows; they must agree.")
    if options.out_dtype is None and out is None:
        options = options._replace(out_dtype=dtype_of(x) if is_float16(x) else BF16.dtype)
    if paired:
        check_out("grouped_matmul", {"x": x, "out": out})  # a reshape of x may copy
        x, said = _as_rows(op, x, shape), reshaped(said, (pairs[0] * pairs[1],))
    arrays = (x, experts, said, rows, weights, bias, out)
    body = functools.partial(_in_steps, op, options, activations, pairs if paired else ())
    rehearse("grouped_matmul", (options, activations), body, *arrays, roles=("x", "experts", name, "rows", "weights", "bias", "out"))
    return body(*arrays)


def _in_steps(
    op: GemmOp, options: GemmOptions, activations: str | None, pairs: tuple[int, ...],
    x: Any, experts: Any, said: Any, rows: Any, weights: Any, bias: Any, out: Any,
) -> Any:  # fmt: skip
    """Quantise, multiply, combine: those of them that were asked for. `pairs`: the shape of 2-D indices that were made 1-D."""
    if activations is not None:
        x = _quantized(x, activations, said) if options.segments == "masked" else quantize(x, activations)
        experts, said, rows, weights, bias, out = alike(x, experts, said, rows, weights, bias, out)
    into = None if weights is not None else out
    if into is not None and pairs:
        into = _flat(op, out, (*pairs, shape_of("grouped_matmul", "experts", experts)[1]))
    wanted = options if weights is None else options._replace(out_dtype="float32")
    y = product(op, x, experts, wanted, segments=said, rows=rows, bias=bias, out=into)
    if pairs:
        y = reshaped(y, (*pairs, y.shape[-1]))
    if weights is None:
        return y if out is None else out
    weights, out = alike(y, weights, out)
    return combine(y, weights, out=out, out_dtype=options.out_dtype)


def _check_activations(op: GemmOp, x: Any, experts: Any, activations: str, masked: bool) -> None:
    check_activations("grouped_matmul", activations)
    if type(x) is Quantized:
        raise TypeError("grouped_matmul: x is a Quantized already; drop activations.")
    if masked and FORMATS[activations].block[0] != 1:
        raise op.error(
            f"activations is {activations!r}, whose scales cover several rows, used and unused ones of a 3-D x alike; "
            "take a format with scales per row or per group, such as 'fp8_row', 'fp8_group' or 'nvfp4'."
        )
    same_k(op, x, experts, -1)


def _check_weights(op: GemmOp, weights: Any, pairs: tuple[int, ...]) -> None:
    if len(pairs) != 2:
        raise op.error(
            "weights combine the experts of each row, so they go with indices [m, experts per row]; pass these, or drop weights."
        )
    shape = shape_of("grouped_matmul", "weights", weights)
    if shape != pairs:
        raise op.error(f"weights has shape {shape}, but indices has shape {pairs}; they must agree.")
    if dtype_of(weights) not in OUT_DTYPES:
        raise op.wrong_type(f"weights is {dtype_of(weights)}; wanted {', '.join(OUT_DTYPES)}.")


def _check_combined(op: GemmOp, experts: Any, pairs: tuple[int, ...], out: Any, asked: str | None) -> None:
    """The out of `combine`, in this function's name."""
    found, dtype = shape_of("grouped_matmul", "out", out), dtype_of(out)
    wanted = (pairs[0], *shape_of("grouped_matmul", "experts", experts)[1:2])
    if found != wanted:
        raise op.error(f"out has shape {found}, but the result has shape {wanted}; pass out of that shape or drop it.")
    if dtype not in OUT_DTYPES:
        raise op.error(f"out is {dtype}; results come as {', '.join(OUT_DTYPES)}.")
    if asked not in (None, dtype):
        raise op.error(f"out is {dtype}, but out_dtype is {asked}; drop one of them.")


def _quantized(x: Any, activations: str, counts: Any) -> Quantized:
    """`quantize` that leaves out the rows of a masked x that hold anything."""
    fmt = FORMATS[activations]
    if fmt.block == (1, ALL):  # a row's scale is its own
        return quantize(x, activations)
    data, scale, *tensor = run(QUANTIZE, (x, None, None, counts), QuantizeOptions(activations, emit_tensor=fmt.tensor is not None))
    return Quantized(data, scale, fmt, tensor_scale=tensor[0] if tensor else None)


def _as_rows(op: GemmOp, x: Any, shape: tuple[int, ...]) -> Any:
    """x [m, j, k] as [m * j, k]."""
    count = shape[0] * shape[1]
    if type(x) is not Quantized:
        return _flattened(op, x, (count, shape[2]))
    fmt = x.format
    if x.zero is not None:
        raise op.wrong_type(f"x is {x!r}; zero points go with experts only: dequantise it, or use int4.")
    one_scale = fmt.block == (ALL, ALL)
    if x.k_axis != 2 and not one_scale:
        raise op.error(f"x is {x!r} with k along axis {x.k_axis}, but axis 2 of x is summed over; pass x.T.")

    def part(scales: Any, width: int, one_for_all: bool) -> Any:
        """Scales of [count, width]; one for the whole array stays."""
        size = math.prod(getattr(scales, "shape", ()))
        if not hasattr(scales, "shape") or (size == 1 and one_for_all):  # no array, or one scale for all
            return scales
        if one_for_all or size != count * width:
            raise op.error(
                f"x is {x!r}, whose scales do not follow its rows one by one; pass it as [{count}, {shape[2]}], with 1-D indices."
            )
        return _flattened(op, scales, (count, width))

    if fmt.block[0] > 1 or x.scale_layout != "linear":
        raise op.error(f"x is {x!r}, whose scales do not follow its rows one by one; pass it as [{count}, {shape[2]}], with 1-D indices.")
    scale = part(x.scale, block_counts(1, shape[2], fmt.block)[1], one_scale)
    tensor = part(x.tensor_scale, 1, math.prod(getattr(x.tensor_scale, "shape", ())) == 1 or fmt.tensor == (ALL, ALL))
    data = _flattened(op, x.data, (count, x.data.shape[2]))
    return replace(x, data=data, scale=scale, tensor_scale=tensor, shape=(), k_axis=-1)


def _flattened(op: GemmOp, x: Any, shape: tuple[int, int]) -> Any:
    if not isinstance(x, Spec) and not hasattr(x, "reshape"):
        raise op.wrong_type(f"x is a {type(x).__name__}, which has no reshape; pass it as {list(shape)}, with 1-D indices.")
    return reshaped(x, shape)


def _flat(op: GemmOp, out: Any, shape: tuple[int, ...]) -> Any:
    """out of this shape [m, j, n] as [m * j, n]: the same memory."""
    found = shape_of("grouped_matmul", "out", out)
    if found != shape:
        raise op.error(f"out has shape {found}, but the result has shape {shape}; pass out of that shape or drop it.")
    flat = reshaped(out, (shape[0] * shape[1], shape[2]))
    framework = framework_of(out, "out")
    # NOTE: a reshape that copies would lose the result, so the addresses are compared.
    if not isinstance(out, Spec) and framework.view(out, "out").ptr != framework.view(flat, "out").ptr:
        raise op.error(f"out has strides {framework.view(out, 'out').strides}; its first two axes must lie as one.")
    return flat
