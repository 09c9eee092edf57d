"""Grouped products as users write them, in any framework: what test_grouped runs in host memory and test_gpu_grouped on a GPU.

Every function makes a problem from a seed, runs an entry twice in a `Framework`, and checks the result against float64 and its own bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import format_oracles as formats
import ml_dtypes
import numpy as np
import oracles
from format_oracles import Operand
from oracles import Array

import cugemm
from cugemm import Quantized

BF16 = "bfloat16"


class Framework(NamedTuple):
    """put takes a NumPy array to the framework, get brings a result back; `jit`: calls are traced by JAX."""

    name: str
    put: Callable[[Array], Any]
    get: Callable[[Any], Array]
    jit: bool = False
    writes: bool = True  # arrays can be written to

    def call(self, fn: Callable[..., Any], *args: Any, **how: Any) -> Array:
        """fn(*args, **how), twice: equal bits. Arrays and Operands are brought along."""
        given, named = [self.take(x) for x in args], {key: self.take(x) for key, x in how.items()}
        if self.jit:
            first, second = (self.get(self._jitted(fn, given, named)) for _ in range(2))
        else:
            first, second = (self.get(fn(*given, **named)) for _ in range(2))
        oracles.check_bits(second, first, f"{fn.__name__} twice")
        return first

    def take(self, x: Any) -> Any:
        if isinstance(x, Operand):
            if x.scale is None:
                return self.put(x.data)
            tensor, zero = (None if part is None else self.put(part) for part in (x.tensor, x.zero))
            return Quantized(self.put(x.data), self.put(x.scale), x.format, tensor_scale=tensor, zero=zero)
        return self.put(x) if isinstance(x, np.ndarray) else x

    def _jitted(self, fn: Callable[..., Any], args: list[Any], how: dict[str, Any]) -> Any:
        """Loose arrays are traced; a Quantized and what is no array are part of the program."""
        import jax

        traced = {i: x for i, x in enumerate(args) if isinstance(x, jax.Array)}
        named = {key: x for key, x in how.items() if isinstance(x, jax.Array)}
        return jax.jit(lambda t, kw: fn(*[t.get(i, x) for i, x in enumerate(args)], **{**how, **kw}))(traced, named)


class Groups(NamedTuple):
    """Segments of packed rows: indptr [groups + 1], and the group of each row, -1 for rows in none."""

    indptr: Array
    expert: Array

    @property
    def lens(self) -> Array:
        return np.diff(self.indptr)


def segments(rng: np.random.Generator, m: int, groups: int, dtype: str, *, gaps: bool = True) -> Groups:
    """Random ends, so that some groups are empty; `gaps`: rows before the first and behind the last group belong to none."""
    edges = np.sort(rng.integers(0, m + 1, groups + 1))
    if not gaps:
        edges[0], edges[-1] = 0, m
    expert = np.searchsorted(edges, np.arange(m), side="right") - 1
    expert[np.arange(m) >= edges[-1]] = -1
    expert = np.where((expert >= 0) & (expert < groups), expert, -1)
    return Groups(edges.astype(dtype), expert)


class Sizes(NamedTuple):
    m: int
    n: int
    k: int
    groups: int


def sizes(rng: np.random.Generator, even: bool = False) -> Sizes:
    m, n, k, groups = (int(x) for x in (rng.integers(1, 70), rng.integers(1, 150), rng.integers(1, 300), rng.integers(1, 7)))
    return Sizes(m, n, k + k % 2 if even else k, groups)


def operands(rng: np.random.Generator, size: Sizes, a: str, b: str, exact: bool, lead: tuple[int, ...] = ()) -> tuple[Operand, Operand]:
    shapes = ((*lead, size.m, size.k), (size.groups, size.n, size.k))
    if exact:
        return formats.exact_operand(rng, a, shapes[0], True), formats.exact_operand(rng, b, shapes[1], False)
    return formats.random_operand(rng, a, shapes[0]), formats.random_operand(rng, b, shapes[1])


def verify(out: Array, a: Operand, b: Operand, exact: bool, dtype: str = BF16, **how: Any) -> None:
    case = formats.answer(a, b, random_signs=not exact, **how)
    (oracles.check_exact if exact else oracles.check_random)(case, out.reshape(case.exact.shape), dtype)


# --- grouped_matmul -----------------------------------------------------------------------------------------------------------------


def matmul_indptr(f: Framework, seed: int, a: str, b: str, index: str, exact: bool = True) -> None:
    rng = np.random.default_rng(seed)
    size = sizes(rng, even=True)
    x, w = operands(rng, size, a, b, exact)
    groups, bias = segments(rng, size.m, size.groups, index), rng.integers(-8, 9, (size.groups, size.n)).astype(np.float32)
    out = f.call(cugemm.grouped_matmul, x, w, indptr=groups.indptr, bias=bias, out_dtype=BF16)
    verify(out, x, w, exact, expert=groups.expert, bias=bias)


def matmul_counts(f: Framework, seed: int, a: str, b: str, index: str, exact: bool = True) -> None:
    rng = np.random.default_rng(seed)
    size = sizes(rng, even=True)
    x, w = operands(rng, size, a, b, exact)
    groups = segments(rng, size.m, size.groups, index)
    lens = groups.lens.astype(index)
    expert = np.concatenate([np.repeat(np.arange(size.groups), lens), np.full(size.m - lens.sum(), -1)])
    out = f.call(cugemm.grouped_matmul, x, w, counts=lens, out_dtype="float32")
    verify(out, x, w, exact, "float32", expert=expert)


def matmul_masked(f: Framework, seed: int, a: str, b: str, index: str, exact: bool = True) -> None:
    rng = np.random.default_rng(seed)
    size = sizes(rng, even=True)
    x, w = operands(rng, size, a, b, exact, lead=(size.groups,))
    counts = rng.integers(0, size.m + 1, size.groups).astype(index)
    bias = rng.integers(-8, 9, size.n).astype(np.float32)
    out = f.call(cugemm.grouped_matmul, x, w, counts=counts, bias=bias, out_dtype=BF16)
    assert out.shape == (size.groups, size.m, size.n)
    verify(out, x, w, exact, counts=counts, bias=bias)


def matmul_indices(f: Framework, seed: int, a: str, b: str, index: str, exact: bool = True) -> None:
    rng = np.random.default_rng(seed)
    size = sizes(rng, even=True)
    x, w = operands(rng, size, a, b, exact)
    indices = rng.integers(0, size.groups, size.m).astype(index)
    out = f.call(cugemm.grouped_matmul, x, w, indices=indices, out_dtype=BF16)
    verify(out, x, w, exact, expert=indices)


def matmul_rows(f: Framework, seed: int, a: str, b: str, index: str, exact: bool = True) -> None:
    rng = np.random.default_rng(seed)
    size = sizes(rng, even=True)
    x, w = operands(rng, size, a, b, exact)
    rows = rng.integers(0, size.m, int(rng.integers(0, 100)))
    groups = segments(rng, len(rows), size.groups, index)
    out = f.call(cugemm.grouped_matmul, x, w, indptr=groups.indptr, rows=rows.astype(index), out_dtype=BF16)
    verify(out, x, w, exact, expert=groups.expert, source=rows)


def matmul_top_k(f: Framework, seed: int, a: str, b: str, index: str, exact: bool = True) -> None:
    rng = np.random.default_rng(seed)
    size, top = sizes(rng, even=True), int(rng.integers(1, 5))
    x, w = operands(rng, size, a, b, exact)
    indices = rng.integers(0, size.groups, (size.m, top)).astype(index)
    out = f.call(cugemm.grouped_matmul, x, w, indices=indices, out_dtype=BF16)
    assert out.shape == (size.m, top, size.n)
    verify(out, x, w, exact, expert=indices.reshape(-1), source=np.repeat(np.arange(size.m), top))


def matmul_pairs(f: Framework, seed: int, a: str, b: str, index: str, exact: bool = True) -> None:
    """x [m, j, k]: a row of its own for every pair."""
    rng = np.random.default_rng(seed)
    size, top = sizes(rng, even=True), int(rng.integers(1, 5))
    flat, w = operands(rng, size._replace(m=size.m * top), a, b, exact)

    def pairs(part: Array | None) -> Any:
        return part if part is None or part.size == 1 else part.reshape(size.m, top, -1)

    x = flat._replace(data=pairs(flat.data), scale=pairs(flat.scale), tensor=pairs(flat.tensor))
    indices = rng.integers(0, size.groups, (size.m, top)).astype(index)
    out = f.call(cugemm.grouped_matmul, x, w, indices=indices, out_dtype=BF16)
    assert out.shape == (size.m, top, size.n)
    verify(out, flat, w, exact, expert=indices.reshape(-1))


MATMULS: dict[str, Callable[..., None]] = {
    "indptr": matmul_indptr, "counts": matmul_counts, "masked": matmul_masked, "indices": matmul_indices, "rows": matmul_rows,
    "top-k": matmul_top_k, "pairs": matmul_pairs,
}  # fmt: skip
PAIRS = (
    ("bf16", "bf16"), ("fp16", "e4m3"), ("bf16", "fp8_row"), ("fp8_row", "fp8_row"), ("fp8_group", "fp8_block"), ("e5m2", "e4m3"),
    ("mxfp8", "mxfp4"), ("nvfp4", "nvfp4"), ("bf16", "nvfp4"), ("nvfp4_row", "mxfp8"), ("bf16", "uint4_g32"), ("int8_row", "int4_g64"),
)  # fmt: skip


def wild(f: Framework, seed: int, index: str) -> None:
    """Device values that are wrong: rows they do not select are zeros, without bias; other rows are right."""
    rng = np.random.default_rng(seed)
    size = sizes(rng)
    x, w = operands(rng, size, "bf16", "e4m3", True)
    bias = rng.integers(-8, 9, size.n).astype(np.float32)
    far = [-1, -2, -(2**31), 2**31 - 1, *([-(2**40), 2**40, 2**32] if index == "int64" else [])]

    def spoilt(values: Array, *near: int) -> Array:
        return np.where(rng.random(values.shape) < 0.3, rng.choice([*far, *near], values.shape), values).astype(index)

    indices = spoilt(rng.integers(0, size.groups, size.m), size.groups)
    out = f.call(cugemm.grouped_matmul, x, w, indices=indices, bias=bias, out_dtype=BF16)
    verify(out, x, w, True, expert=indices, bias=bias)

    pairs = spoilt(rng.integers(0, size.groups, (size.m, 3)), size.groups)
    out = f.call(cugemm.grouped_matmul, x, w, indices=pairs, bias=bias, out_dtype=BF16)
    verify(out, x, w, True, expert=pairs.reshape(-1), source=np.repeat(np.arange(size.m), 3), bias=bias)

    rows, chosen = spoilt(rng.integers(0, size.m, 50), size.m), rng.integers(0, size.groups, 50).astype(index)
    out = f.call(cugemm.grouped_matmul, x, w, indices=chosen, rows=rows, bias=bias, out_dtype=BF16)
    verify(out, x, w, True, expert=chosen, source=rows, bias=bias)

    indptr = spoilt(np.sort(rng.integers(0, size.m + 1, size.groups + 1)), size.m + 1)
    out = f.call(cugemm.grouped_matmul, x, w, indptr=indptr, bias=bias, out_dtype=BF16)
    verify(out, x, w, True, expert=experts_of(size.m, indptr), bias=bias)

    lens = spoilt(rng.integers(0, size.m // size.groups + 2, size.groups), size.m)
    ends = np.cumsum(np.clip(lens.astype(np.int64), 0, 2**31))
    out = f.call(cugemm.grouped_matmul, x, w, counts=lens, bias=bias, out_dtype=BF16)
    verify(out, x, w, True, expert=experts_of(size.m, np.append(0, ends)), bias=bias)

    x, _ = operands(rng, size, "bf16", "e4m3", True, lead=(size.groups,))
    counts = spoilt(rng.integers(0, size.m + 1, size.groups), size.m + 1)
    out = f.call(cugemm.grouped_matmul, x, w, counts=counts, bias=bias, out_dtype=BF16)
    verify(out, x, w, True, counts=counts, bias=bias)


def experts_of(m: int, indptr: Array) -> Array:
    """A segment with its ends out of order or outside [0, m], or one that begins before an earlier one did, has no rows."""
    expert, highest = np.full(m, -1), 0
    for e, (start, end) in enumerate(zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)):
        if highest <= start <= end <= m:
            expert[start:end] = e
        highest = max(highest, start)
    return expert


def masked_outs() -> list[Array]:
    """[3, 5, 8] in poisoned memory: packed, in a larger capacity, in wider rows, both, capacity first, columns first."""

    def memory(*shape: int) -> Array:
        return oracles.poison(shape, BF16)

    return [
        memory(3, 5, 8)[:], memory(3, 9, 8)[:, 2:7], memory(3, 5, 20)[:, :, 4:12], memory(4, 9, 20)[:3, 1:6, 4:12],
        memory(5, 3, 8).swapaxes(0, 1), memory(5, 7, 9)[:, 1:4, :8].swapaxes(0, 1), memory(3, 8, 5).swapaxes(1, 2),
        memory(3, 11, 7)[:, :8, :5].swapaxes(1, 2),
    ]  # fmt: skip


def root(x: Array) -> Array:
    """The bytes that `x` is a view of."""
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


# --- FlashInfer's and DeepGEMM's entries --------------------------------------------------------------------------------------------


def _with_gaps(scale: Array, groups: Groups, pad: int, fill: Any) -> Array:
    """Scales [m, blocks] where the rows of group g begin at (indptr[g] + g * (pad - 1)) // pad * pad, `fill` between them."""
    count = len(groups.indptr) - 1
    rows = (len(scale) + count * (pad - 1)) // pad * pad
    wide = np.full((rows, scale.shape[1]), fill, scale.dtype)
    for g, (start, end) in enumerate(zip(groups.indptr[:-1], groups.indptr[1:], strict=True)):
        at = (int(start) + g * (pad - 1)) // pad * pad
        wide[at : at + end - start] = scale[start:end]
    return wide


def group_fp8(f: Framework, seed: int, index: str, mode: str, gm: int, gn: int = 128) -> None:
    rng = np.random.default_rng(seed)
    size = sizes(rng)._replace(m=int(rng.integers(1, 400)))
    a, b = operands(rng, size, "fp8_block" if gm == 128 else "fp8_group", "fp8_block" if gn == 128 else "fp8_group", True)
    groups = segments(rng, size.m, size.groups, index)
    assert a.scale is not None and b.scale is not None
    scales = [a.scale, b.scale] if mode == "K" else [np.ascontiguousarray(s.swapaxes(-1, -2)) for s in (a.scale, b.scale)]
    out = f.call(
        cugemm.group_gemm_fp8_nt_groupwise, a.data, b.data, *scales, groups.indptr, (gm, gn, 128), mode,
        mma_sm=2, out_dtype="float16", backend="cutile",
    )  # fmt: skip
    verify(out, a, b, True, "float16", expert=groups.expert)


def group_mxfp4(f: Framework, seed: int, index: str, layout: str) -> None:
    rng = np.random.default_rng(seed)
    size = sizes(rng, even=True)
    a, b = operands(rng, size, ("mxfp8", "mxfp8_e5m2")[seed % 2], "mxfp4", True)
    groups = segments(rng, size.m, size.groups, index)
    assert a.scale is not None and b.scale is not None
    a_scale = formats.tiled(_with_gaps(a.scale, groups, 128, 0xFF), layout)
    out = f.call(
        cugemm.group_gemm_mxfp4_nt_groupwise, a.data, b.data, a_scale, formats.tiled(b.scale, layout), groups.indptr,
        1, 128, 64, 256, False, scale_layout=layout,
    )  # fmt: skip
    verify(out, a, b, True, expert=groups.expert)


def group_nvfp4(f: Framework, seed: int, index: str, layout: str) -> None:
    rng = np.random.default_rng(seed)
    size = sizes(rng, even=True)
    a, b = operands(rng, size, "nvfp4", "nvfp4", True)
    groups = segments(rng, size.m, size.groups, index)
    assert a.scale is not None and b.scale is not None
    alpha = np.exp2(rng.integers(-2, 3, size.groups)).astype(np.float32)
    a_scale = formats.tiled(_with_gaps(a.scale, groups, 128, 0x7F), layout)
    out = f.call(
        cugemm.group_gemm_nvfp4_nt_groupwise, a.data, b.data, a_scale, formats.tiled(b.scale, layout), groups.indptr, alpha,
        128, 32, 128, True, scale_layout=layout, out_dtype="float32",
    )  # fmt: skip
    unit = np.ones(1, np.float32)
    a = a._replace(values=formats.values("nvfp4", a.data, a.scale, unit))
    b = b._replace(values=formats.values("nvfp4", b.data, b.scale, alpha))
    verify(out, a, b, True, "float32", expert=groups.expert)


def group_deepgemm(f: Framework, seed: int, index: str) -> None:
    rng = np.random.default_rng(seed)
    size = sizes(rng)
    a, b = operands(rng, size, "fp8_group", "fp8_block", True)
    indices = rng.integers(0, size.groups, size.m).astype(index)
    out = f.call(cugemm.group_deepgemm_fp8_nt_groupwise, a.data, b.data, a.scale, b.scale, indices)
    verify(out, a, b, True, expert=indices)


def batch_deepgemm(f: Framework, seed: int, index: str) -> None:
    rng = np.random.default_rng(seed)
    size = sizes(rng)
    a, b = operands(rng, size, "fp8_group", "fp8_block", True, lead=(size.groups,))
    counts = rng.integers(0, size.m + 1, size.groups).astype(index)
    out = f.call(cugemm.batch_deepgemm_fp8_nt_groupwise, a.data, b.data, a.scale, b.scale, counts, 16)
    verify(out, a, b, True, counts=counts)


def mm_bf16(f: Framework, seed: int, index: str) -> None:
    rng = np.random.default_rng(seed)
    size = sizes(rng)
    a, b = operands(rng, size, "bf16", "bf16", False)
    groups = segments(rng, size.m, size.groups, index)
    out = f.call(cugemm.grouped_mm_bf16, a, b, groups.indptr, None, "float32", backend="cudnn", tactic=3)
    verify(out, a, b, False, "float32", expert=groups.expert)


def mm_fp8(f: Framework, seed: int, index: str) -> None:
    rng = np.random.default_rng(seed)
    size = sizes(rng)
    a, b = operands(rng, size, "e4m3", "e5m2", True)
    groups = segments(rng, size.m, size.groups, index)
    out = f.call(cugemm.grouped_mm_fp8, a, b, groups.indptr, np.full(1, 0.25, np.float32), out_dtype="float16")
    verify(out, a, b, True, "float16", expert=groups.expert, alpha=0.25)


def mm_mxfp8(f: Framework, seed: int, index: str, layout: str) -> None:
    rng = np.random.default_rng(seed)
    size = sizes(rng)
    a, b = operands(rng, size, "mxfp8", "mxfp8_e5m2", True)
    groups = segments(rng, size.m, size.groups, index)
    assert a.scale is not None and b.scale is not None
    a_scale, b_scale = formats.tiled(a.scale, layout), formats.tiled(b.scale, layout)
    out = f.call(cugemm.grouped_mm_mxfp8, a.data, b.data, a_scale, b_scale, groups.indptr, scale_layout=layout)
    verify(out, a, b, True, expert=groups.expert)


def mm_fp4(f: Framework, seed: int, index: str, layout: str) -> None:
    rng = np.random.default_rng(seed)
    size, kind = sizes(rng, even=True), ("nvfp4", "mxfp4")[seed % 2]
    a, b = operands(rng, size, kind, kind, True)
    groups = segments(rng, size.m, size.groups, index)
    assert a.scale is not None and b.scale is not None
    unit = None if kind == "mxfp4" else np.ones(1, np.float32)
    a, b = (x._replace(values=formats.values(kind, x.data, x.scale, unit)) for x in (a, b))
    assert a.scale is not None and b.scale is not None
    out = f.call(
        cugemm.grouped_mm_fp4, a.data, b.data, formats.tiled(a.scale, layout), formats.tiled(b.scale, layout), groups.indptr, 0.5,
        block_size=16 if kind == "nvfp4" else 32, scale_layout=layout,
    )  # fmt: skip
    verify(out, a, b, True, expert=groups.expert, alpha=0.5)


def moe_fp8(f: Framework, seed: int, index: str) -> None:
    """With and without the gate, which is the second half."""
    rng = np.random.default_rng(seed)
    size = sizes(rng)
    size = size._replace(n=size.n + size.n % 2)
    a, b = operands(rng, size, "fp8_group", "fp8_block", True)
    groups = segments(rng, size.m, size.groups, index)
    assert a.scale is not None and b.scale is not None
    a_scale = np.ascontiguousarray(_with_gaps(a.scale, groups, 4, np.nan).T)
    b_scale = np.ascontiguousarray(b.scale.swapaxes(1, 2))
    y = f.call(cugemm.moe_gemm_fp8_nt_groupwise, a.data, b.data, a_scale, b_scale, groups.indptr, out_dtype="float32")
    verify(y, a, b, True, "float32", expert=groups.expert)
    out = f.call(cugemm.moe_gemm_fp8_nt_groupwise, a.data, b.data, a_scale, b_scale, groups.indptr, is_gated=True)
    half = size.n // 2
    up, gate = y[:, :half].astype(np.float64), y[:, half:].astype(np.float64)
    exact = np.asarray(up * silu(gate))
    assert out.shape == (size.m, half) and out.dtype == oracles.dtype_of(BF16)
    assert (np.abs(out.astype(np.float64) - exact) <= np.abs(exact) * (2.0**-8 * 1.01) + 1e-38).all()


def deepgemm(f: Framework, seed: int, index: str) -> None:
    """The three names write into d; c is added."""
    rng = np.random.default_rng(seed)
    size = sizes(rng)
    a, b = operands(rng, size, "fp8_group", "fp8_block", True)
    both = [(f.put(x.data), f.put(x.scale)) for x in (a, b)]
    indices = rng.integers(0, size.groups, size.m).astype(index)
    d = f.put(oracles.poison((size.m, size.n), BF16))
    assert cugemm.m_grouped_fp8_gemm_nt_contiguous(*both, d, f.put(indices)) is None
    verify(f.get(d), a, b, True, expert=indices)

    dense = Operand("fp8_block", b.data[0], None if b.scale is None else b.scale[0], None, None, b.values[0])
    c = rng.integers(-8, 9, (size.m, size.n)).astype(np.float32)
    d = f.put(oracles.poison((size.m, size.n), "float32"))
    assert cugemm.fp8_gemm_nt(both[0], (f.put(dense.data), f.put(dense.scale)), d, f.put(c), recipe_a=(1, 128), recipe_b=(128, 128)) is None
    verify(f.get(d), a, dense, True, "float32", bias=c)

    a, _ = operands(rng, size, "fp8_group", "fp8_block", True, lead=(size.groups,))
    counts = rng.integers(0, size.m + 1, size.groups).astype(index)
    d = f.put(oracles.poison((size.groups, size.m, size.n), BF16))
    assert cugemm.m_grouped_fp8_gemm_nt_masked((f.put(a.data), f.put(a.scale)), both[1], d, f.put(counts), 8, (1, 128, 128)) is None
    verify(f.get(d), a, b, True, counts=counts)


def groups_last(x: Any) -> Any:
    return x.swapaxes(1, 2).swapaxes(0, 2)  # [groups, rows, columns] -> [rows, columns, groups]


def tiles_last(scale: Any) -> Any:
    """[groups, padded rows, padded blocks] -> [32, 4, tile rows, 4, tile columns, groups]: what the grouped quantisers return."""
    groups, high, wide = scale.shape
    tiles = scale.reshape((groups, high // 128, wide // 4, 32, 4, 4))
    for pair in ((0, 3), (1, 4), (2, 4), (3, 5)):
        tiles = tiles.swapaxes(*pair)
    return tiles


MASKED_KINDS = {  # format -> ab_dtype, sf_dtype, sf_vec_size
    "nvfp4": ("float4_e2m1fn", "float8_e4m3fn", 16),
    "mxfp4": ("float4_e2m1fn", "float8_e8m0fnu", 32),
    "mxfp8": ("float8_e4m3fn", "float8_e8m0fnu", 32),
    "mxfp8_e5m2": ("float8_e5m2", "float8_e8m0fnu", 32),
}


def masked(f: Framework, seed: int, index: str, kind: str) -> None:
    """Groups along the last axis; tiles as six axes or, of b, three; alpha in each of its shapes; out given and not."""
    rng = np.random.default_rng(seed)
    size = sizes(rng, even=True)
    a, b = operands(rng, size, kind, kind, True, lead=(size.groups,))
    assert a.scale is not None and b.scale is not None
    counts = rng.integers(0, size.m + 1, size.groups).astype(index)
    alpha = np.exp2(rng.integers(-2, 3, size.groups)).astype(np.float32)
    unit = np.ones(1, np.float32) if kind == "nvfp4" else None
    a = a._replace(values=formats.values(kind, a.data, a.scale, unit))
    b = b._replace(values=formats.values(kind, b.data, b.scale, unit) * alpha[:, None, None])
    ab, sf, vector = MASKED_KINDS[kind]
    dtype = ("float32", BF16, "float16")[seed % 3]

    def call(a: Any, a_sf: Any, b: Any, b_sf: Any, counts: Any, alpha: Any, out: Any = None) -> Any:
        return cugemm.grouped_gemm_nt_masked(
            (groups_last(a), tiles_last(a_sf)), (groups_last(b), b_sf if seed % 2 else tiles_last(b_sf)), out, counts,
            ab_dtype=ab, sf_dtype=sf, c_dtype=dtype, sf_vec_size=vector, alpha=alpha, alpha_dtype="float32", is_swap_ab=False,
        )  # fmt: skip

    arrays = (a.data, formats.tiled(a.scale, "128x4"), b.data, formats.tiled(b.scale, "128x4"), counts)
    alpha = alpha.reshape(1, 1, -1) if seed % 2 else alpha
    y = f.call(call, *arrays, alpha)
    assert y.shape == (size.m, size.n, size.groups)
    verify(np.moveaxis(y, 2, 0), a, b, True, dtype, counts=counts)
    if f.writes:
        out = groups_last(f.put(oracles.poison((size.groups, size.m, size.n), dtype)))
        assert call(*(f.put(x) for x in (*arrays, alpha)), out) is out
        oracles.check_bits(np.ascontiguousarray(f.get(out)), np.ascontiguousarray(y), "into out")


ENTRIES: dict[str, Callable[[Framework, int, str], None]] = {
    "group fp8 K": lambda f, seed, index: group_fp8(f, seed, index, "K", 1),
    "group fp8 MN": lambda f, seed, index: group_fp8(f, seed, index, "MN", 1),
    "group fp8 K 128": lambda f, seed, index: group_fp8(f, seed, index, "K", 128),
    "group fp8 MN 128": lambda f, seed, index: group_fp8(f, seed, index, "MN", 128),
    "group fp8 K 1 1": lambda f, seed, index: group_fp8(f, seed, index, "K", 1, 1),
    "group mxfp4": lambda f, seed, index: group_mxfp4(f, seed, index, "128x4"),
    "group mxfp4 linear": lambda f, seed, index: group_mxfp4(f, seed, index, "linear"),
    "group nvfp4": lambda f, seed, index: group_nvfp4(f, seed, index, "128x4"),
    "group nvfp4 linear": lambda f, seed, index: group_nvfp4(f, seed, index, "linear"),
    "group deepgemm": group_deepgemm,
    "batch deepgemm": batch_deepgemm,
    **{f"masked {kind}": functools.partial(masked, kind=kind) for kind in MASKED_KINDS},
    "mm bf16": mm_bf16,
    "mm fp8": mm_fp8,
    "mm mxfp8": lambda f, seed, index: mm_mxfp8(f, seed, index, "128x4"),
    "mm mxfp8 linear": lambda f, seed, index: mm_mxfp8(f, seed, index, "linear"),
    "mm fp4": lambda f, seed, index: mm_fp4(f, seed, index, "128x4"),
    "mm fp4 linear": lambda f, seed, index: mm_fp4(f, seed, index, "linear"),
    "moe fp8": moe_fp8,
    "deepgemm": deepgemm,
}


# --- a mixture-of-experts layer -----------------------------------------------------------------------------------------------------


def silu(v: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(v / (1 + np.exp(-v)))


class Layer(NamedTuple):
    """gate and up projection w13 [experts, 2 f, d], down projection w2 [experts, d, f]; tokens x [m, d]; what the router chose."""

    x: Array
    w13: Operand
    w2: Operand
    indices: Array  # [m, top]
    weights: Array  # [m, top] float32
    f: int


def layer(seed: int, m: int, d: int, f: int, experts: int, top: int, kind: str, index: str = "int32") -> Layer:
    """Random tokens and experts; a softmax over the router's logits picks `top` experts a token and weights them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, d)).astype(ml_dtypes.bfloat16)
    w13, w2 = (_scaled(formats.random_operand(rng, kind, shape)) for shape in ((experts, 2 * f, d), (experts, d, f)))
    logits = rng.standard_normal((m, experts))
    logits[:, : experts // 3] -= 50  # nobody comes here
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top]
    chosen = np.exp(np.take_along_axis(logits, order, 1))
    weights = (chosen / chosen.sum(1, keepdims=True)).astype(np.float32)
    return Layer(x, w13, w2, order.astype(index), weights, f)


def _scaled(w: Operand) -> Operand:
    """Weights of size 1 / sqrt(k), as trained ones are: a power of two goes into the values' scale."""
    factor = 2.0 ** -round(np.log2(w.values.shape[-1]) / 2)
    if w.tensor is not None:
        return w._replace(tensor=w.tensor * np.float32(factor), values=w.values * factor)
    if w.scale is not None:
        return w._replace(scale=w.scale * np.float32(factor), values=w.values * factor)
    return w._replace(data=(w.data.astype(np.float32) * np.float32(factor)).astype(w.data.dtype), values=w.values * factor)


def forward(x: Any, w13: Any, w2: Any, indices: Any, weights: Any) -> Any:
    """The layer in three calls."""
    h = cugemm.silu_and_mul(cugemm.grouped_matmul(x, w13, indices=indices))
    return cugemm.grouped_matmul(h, w2, indices=indices, weights=weights)


def packed(x: Any, w13: Any, w2: Any, rows: Any, indptr: Any, places: Any, weights: Any) -> Any:
    """The same with rows sorted by expert: gathered from x, and found again by `combine`."""
    h = cugemm.silu_and_mul(cugemm.grouped_matmul(x, w13, indptr=indptr, rows=rows))
    y = cugemm.grouped_matmul(h, w2, indptr=indptr, out_dtype="float32")
    return cugemm.combine(y, weights, indices=places, out_dtype=BF16)


def sorted_by_expert(part: Layer) -> tuple[Array, Array, Array]:
    """(token of each sorted row, indptr, place of each (token, expert) among the sorted rows)."""
    flat, dtype = part.indices.reshape(-1), part.indices.dtype
    order = np.argsort(flat, kind="stable")
    places = np.empty(len(flat), dtype)
    places[order] = np.arange(len(flat))
    indptr = np.searchsorted(flat[order], np.arange(len(part.w13.data) + 1)).astype(dtype)
    return (order // part.indices.shape[1]).astype(dtype), indptr, places.reshape(part.indices.shape)


def exact_layer(part: Layer) -> Array:
    """float64."""
    x = part.x.astype(np.float64)
    exact = np.zeros((len(x), part.w2.values.shape[1]))
    for e in range(len(part.w13.values)):
        token, j = np.nonzero(part.indices == e)
        g, v = np.split(x[token] @ part.w13.values[e].T, 2, axis=1)
        np.add.at(exact, token, part.weights[token, j].astype(np.float64)[:, None] * ((silu(g) * v) @ part.w2.values[e].T))
    return exact


def check_layer(part: Layer, out: Array) -> None:
    """Against float64, within the error that bf16 intermediates and fp32 sums may make.

    u = 2^-9 is half a step of bfloat16, relative; t(k) the truncations of a tensor-core sum of k products (oracles.error_bound), as a
    factor of sum |x| |w|. The gate g and the value v come with errors dg, dv <= u |.| + t(d) peak; |silu'| <= 1.1 and |silu''| <= 0.5, so
    dh <= (1.1 dg + 0.25 dg^2) (|v| + dv) + |silu(g)| dv + u |h|, which reaches the result through |w2|.
    """
    u, x = 2.0**-9, part.x.astype(np.float64)
    exact = exact_layer(part)
    bound = np.zeros_like(exact)
    for e in range(len(part.w13.values)):
        token, j = np.nonzero(part.indices == e)
        if not len(token):
            continue
        w13, w2, p = part.w13.values[e], part.w2.values[e], part.weights[token, j].astype(np.float64)[:, None]
        both = x[token] @ w13.T
        error = u * np.abs(both) * 1.01 + _truncation(x.shape[1]) * (np.abs(x[token]) @ np.abs(w13).T)
        (g, v), (dg, dv) = np.split(both, 2, axis=1), np.split(error, 2, axis=1)
        h = silu(g) * v
        dh = (1.1 * dg + 0.25 * dg**2) * (np.abs(v) + dv) + np.abs(silu(g)) * dv
        dh += u * 1.01 * (np.abs(h) + dh)
        peak = (np.abs(h) + dh) @ np.abs(w2).T
        np.add.at(bound, token, p * (dh @ np.abs(w2).T + (_truncation(part.f) + 2.0**-20) * peak))
    bound += u * 1.01 * (np.abs(exact) + bound) + 1e-30
    assert out.shape == exact.shape and out.dtype == oracles.dtype_of(BF16)
    error = np.abs(out.astype(np.float64) - exact)
    assert (error <= bound).all(), f"{int((~(error <= bound)).sum())} of {out.size} values off, by up to {np.max(error / bound):.3g} bounds"
    assert np.linalg.norm(error) <= 0.01 * np.linalg.norm(exact), "the bound is far from tight"


def _truncation(k: int) -> float:
    return ((oracles.PER_PRODUCT * k + 8) * 2 + k / 8 + 8) * 2.0**-24


def run_layer(f: Framework, part: Layer) -> None:
    """Both forms, each twice with equal bits, against float64."""
    out = f.call(forward, part.x, part.w13, part.w2, part.indices, part.weights)
    check_layer(part, out)
    rows, indptr, places = sorted_by_expert(part)
    check_layer(part, f.call(packed, part.x, part.w13, part.w2, rows, indptr, places, part.weights))
