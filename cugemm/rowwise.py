"""What is asked of the operations on rows, `combine` and `silu_and_mul`: the checks, and the call in the words of kernel and reference."""

from __future__ import annotations

from typing import NamedTuple

from cugemm.arrays import View, dense_strides
from cugemm.problem import INDEX_DTYPES, OUT_DTYPES, Argument, ArraySpec, _overlaps

GATES = ("first", "second")


class RowsOptions(NamedTuple):
    """`gate`: which half of x goes through silu."""

    out_dtype: str | None = None
    gate: str = "first"


class RowsProblem(NamedTuple):
    """The question that selection answers and the key of the plan cache."""

    op: str
    x: str  # dtype of the rows
    out: str
    backend: str = "auto"
    arch: str = ""
    device: int = 0

    def __str__(self) -> str:
        return f"{self.op} {self.x} -> {self.out}" + (f" on {self.arch}" if self.arch else "")


class RowsCall(NamedTuple):
    """One checked operation with an out of [batch, rows, columns]; combine has a batch of 1. Strides count elements.

    x_strides: (batch, row, column) of silu_and_mul's x; (token, term, column) of combine's y, with indices (0, row, column).
    select: the indices of combine, the counts of silu_and_mul.
    """

    problem: RowsProblem
    outputs: tuple[ArraySpec, ...]
    workspaces: tuple[ArraySpec, ...]
    batch: int
    rows: int
    columns: int
    x_strides: tuple[int, int, int]
    out_strides: tuple[int, int, int]
    topk: int = 0
    source_rows: int = 0
    weight_strides: tuple[int, int] = (0, 0)
    weight_dtype: str = "float32"
    select_strides: tuple[int, int] = (0, 0)
    select_dtype: str = "int32"
    gate: str = "first"

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.rows * self.columns * max(self.topk, 1)


class CombineOp(NamedTuple):
    """out[t] = sum over j of weights[t, j] * y[t, j], or of y[indices[t, j]]."""

    name: str = "combine"
    roles: tuple[str, ...] = ("y", "weights", "indices", "out")

    def check(self, views: tuple[Argument, ...], options: RowsOptions) -> RowsCall:
        """The checked call, or ValueError / TypeError with the argument's name, its value and the fix."""
        y, weights = _array(self.name, "y", views[0], OUT_DTYPES), _array(self.name, "weights", views[1], OUT_DTYPES)
        indices = None if views[2] is None else _array(self.name, "indices", views[2], INDEX_DTYPES)
        if len(weights.shape) != 2:
            raise ValueError(f"combine: weights has shape {weights.shape}; wanted [tokens, topk].")
        tokens, topk = weights.shape
        if indices is None:
            if len(y.shape) != 3:
                raise ValueError(f"combine: y has shape {y.shape}; wanted [tokens, topk, n], or pass indices and y as [rows, n].")
            if y.shape[:2] != weights.shape:
                raise ValueError(
                    f"combine: weights has shape {weights.shape}, but y {y.shape} has {y.shape[0]} tokens of {y.shape[1]} rows; "
                    "they must agree."
                )
            x_strides = (y.strides[0], y.strides[1], y.strides[2])
        else:
            if len(y.shape) != 2:
                raise ValueError(f"combine: y has shape {y.shape}; with indices it is [rows, n].")
            if indices.shape != weights.shape:
                raise ValueError(f"combine: indices has shape {indices.shape}, but weights has shape {weights.shape}; they must agree.")
            x_strides = (0, y.strides[0], y.strides[1])
        shape = (tokens, y.shape[-1])
        out_dtype, out_strides = _result(self.name, views[3], shape, options.out_dtype or y.dtype, options.out_dtype)
        problem = RowsProblem(self.name, y.dtype, out_dtype)
        call = RowsCall(problem, ((shape, out_dtype),), (), 1, tokens, shape[1], x_strides, (0, out_strides[0], out_strides[1]))
        call = call._replace(topk=topk, weight_strides=(weights.strides[0], weights.strides[1]), weight_dtype=weights.dtype)
        if indices is None:
            return call
        return call._replace(source_rows=y.shape[0], select_strides=(indices.strides[0], indices.strides[1]), select_dtype=indices.dtype)


class SiluAndMulOp(NamedTuple):
    """out = silu(one half of x) * the other half."""

    name: str = "silu_and_mul"
    roles: tuple[str, ...] = ("x", "counts", "out")

    def check(self, views: tuple[Argument, ...], options: RowsOptions) -> RowsCall:
        """The checked call, or ValueError / TypeError with the argument's name, its value and the fix."""
        x = _array(self.name, "x", views[0], OUT_DTYPES)
        counts = None if views[1] is None else _array(self.name, "counts", views[1], INDEX_DTYPES)
        if not x.shape or x.shape[-1] % 2:
            raise ValueError(f"silu_and_mul: x has shape {x.shape}; its last axis holds two halves, so its length must be even.")
        if counts is not None and len(x.shape) != 3:
            raise ValueError(f"silu_and_mul: x has shape {x.shape}; with counts it is [groups, rows, 2n].")
        if counts is not None and counts.shape != x.shape[:1]:
            raise ValueError(
                f"silu_and_mul: counts has shape {counts.shape}, but x {x.shape} has {x.shape[0]} groups; wanted {x.shape[:1]}."
            )
        shape = (*x.shape[:-1], x.shape[-1] // 2)
        out_dtype, out_strides = _result(self.name, views[2], shape, options.out_dtype or x.dtype, options.out_dtype)
        axes = list(zip(shape[:-1], x.strides[:-1], out_strides[:-1], strict=True))
        if counts is None:
            axes = _merged(axes)
        if len(axes) > 2:
            role, view = ("x", x) if views[2] is None or len(_merged([(n, s, 0) for n, s, _ in axes])) > 2 else ("out", views[2])
            assert isinstance(view, View)
            raise ValueError(
                f"silu_and_mul: {role} {view.shape} has strides {view.strides}, which are not those of a matrix, or a batch of them; "
                f"pass {role} as a contiguous array."
            )
        (batch, x_batch, out_batch), (rows, x_row, out_row) = [(1, 0, 0), (1, 0, 0), *axes][-2:]
        problem = RowsProblem(self.name, x.dtype, out_dtype)
        x_strides, out_steps = (x_batch, x_row, x.strides[-1]), (out_batch, out_row, out_strides[-1])
        call = RowsCall(problem, ((shape, out_dtype),), (), batch, rows, shape[-1], x_strides, out_steps, gate=options.gate)
        return call if counts is None else call._replace(select_strides=(counts.strides[0], 0), select_dtype=counts.dtype)


def _array(name: str, role: str, view: Argument, dtypes: tuple[str, ...]) -> View:
    if not isinstance(view, View):
        shown = "missing" if view is None else f"the scalar {type(view).__name__}"
        raise TypeError(f"{name}: {role} is {shown}; pass an array.")
    if view.dtype not in dtypes:
        raise TypeError(f"{name}: {role} is {view.dtype}; wanted {', '.join(dtypes)}.")
    if max(view.shape, default=0) >= 2**31:
        raise ValueError(f"{name}: {role} has shape {view.shape}; its axes must be below 2**31.")
    return view


def _result(name: str, out: Argument, shape: tuple[int, ...], dtype: str, asked: str | None) -> tuple[str, tuple[int, ...]]:
    """dtype and strides of the result: those of `out`, if there is one that can hold it."""
    if out is None:
        if dtype not in OUT_DTYPES:
            raise ValueError(f"{name}: out_dtype is {dtype}; results come as {', '.join(OUT_DTYPES)}.")
        return dtype, dense_strides(shape)
    if not isinstance(out, View):
        raise TypeError(f"{name}: out is a {type(out).__name__}; pass an array of shape {shape}.")
    if out.dtype not in OUT_DTYPES:
        raise ValueError(f"{name}: out is {out.dtype}; results come as {', '.join(OUT_DTYPES)}.")
    if asked is not None and asked != out.dtype:
        raise ValueError(f"{name}: out is {out.dtype}, but out_dtype is {asked}; drop one of them.")
    if out.shape != shape:
        raise ValueError(f"{name}: out has shape {out.shape}, but the result has shape {shape}; pass out of that shape or drop it.")
    if out.readonly:
        raise ValueError(f"{name}: out is read-only; pass a writable array.")
    if 0 in shape:  # nothing is written, and strides of empty arrays mean nothing
        return out.dtype, dense_strides(shape)
    steps = [s for s, n in zip(out.strides, shape, strict=True) if n > 1]
    if len(steps) > 1 and 1 not in steps:
        raise ValueError(f"{name}: out has strides {out.strides}; one of its axes must be contiguous (stride 1).")
    if _overlaps(shape, out.strides):
        raise ValueError(f"{name}: out has strides {out.strides}: several elements share memory; pass an array of its own.")
    return out.dtype, out.strides


def _merged(axes: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Axes (length, stride of x, stride of out) with neighbours that step as one put together; all empty where one is."""
    if any(n == 0 for n, _, _ in axes):
        return [(0, 0, 0)]
    found: list[tuple[int, int, int]] = []
    for n, *steps in axes:
        if n == 1:
            continue
        if found and list(found[-1][1:]) == [n * s for s in steps]:
            found[-1] = (found[-1][0] * n, steps[0], steps[1])
        else:
            found.append((n, steps[0], steps[1]))
    return found
