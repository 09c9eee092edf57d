"""Grouped products in host memory: every entry in NumPy, PyTorch and JAX against float64, a mixture of experts, every error text."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import grouped_cases as cases
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
import torch
from conftest import ROOT
from grouped_cases import ENTRIES, MASKED_KINDS, MATMULS, PAIRS, Framework, groups_last, tiles_last
from oracles import Array
from test_dlpack import Hidden

import cugemm
from cugemm import Quantized, Spec, launch
from cugemm.api import rehearsal
from cugemm.catalog import segments
from cugemm.catalog.step import NULL, Step, Zero
from cugemm.problem import EXPERTS, OUT, ROWS, SEGMENTS

BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn


def to_torch(x: Array) -> Any:
    plain = np.ascontiguousarray(x)
    if x.dtype.name == "bfloat16" or x.dtype.name.startswith("float8"):
        return torch.from_numpy(plain.view(np.uint8 if x.itemsize == 1 else np.int16)).view(getattr(torch, x.dtype.name))
    return torch.from_numpy(plain)


def from_torch(x: Any) -> Array:
    assert isinstance(x, torch.Tensor)
    return x.view(torch.int16).numpy().view(BF16) if x.dtype is torch.bfloat16 else x.numpy()


NUMPY = Framework("numpy", lambda x: x, lambda x: x)
TORCH = Framework("torch", to_torch, from_torch)
JAX = Framework("jax", jnp.asarray, np.asarray, writes=False)
JIT = Framework("jit", jnp.asarray, np.asarray, jit=True, writes=False)
FRAMEWORKS = (NUMPY, TORCH, JAX, JIT)
each = pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda f: f.name)
indices_of = pytest.mark.parametrize("index", ["int32", "int64"])


# --- numbers ------------------------------------------------------------------------------------------------------------------------


@indices_of
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("kind", MATMULS)
def test_grouped_matmul(kind: str, pair: tuple[str, str], index: str) -> None:
    for seed in range(3):
        MATMULS[kind](NUMPY, seed, *pair, index, seed < 2)


@pytest.mark.parametrize("framework", FRAMEWORKS[1:], ids=lambda f: f.name)
@pytest.mark.parametrize("kind", MATMULS)
def test_grouped_matmul_in_frameworks(kind: str, framework: Framework) -> None:
    for seed, pair in enumerate((("bf16", "bf16"), ("fp8_row", "nvfp4"), ("mxfp8", "uint4_g32"))):
        MATMULS[kind](framework, seed, *pair, "int32")


# DeepGEMM's functions write into `d`; test_deepgemm_refuses_jax has the frameworks that cannot be written to.
@pytest.mark.parametrize(
    ("name", "framework"),
    [pytest.param(name, f, id=f"{name}-{f.name}") for name in ENTRIES for f in FRAMEWORKS if f.writes or name != "deepgemm"],
)
def test_entries(name: str, framework: Framework) -> None:
    for seed in range(4 if framework is NUMPY else 1):
        ENTRIES[name](framework, seed, ("int32", "int64")[seed % 2])


@each
@pytest.mark.parametrize("kind", ["bf16", "fp8_row", "nvfp4"])
def test_moe_layer(kind: str, framework: Framework) -> None:
    cases.run_layer(framework, cases.layer(1, 37, 96, 64, 7, 2, kind))
    cases.run_layer(framework, cases.layer(2, 1, 130, 34, 3, 1, kind, "int64"))


@pytest.mark.parametrize("groups", [1, 2, 129, 512])
def test_many_groups(groups: int) -> None:
    """Most of them empty; segments, lengths, indices and masks agree bit for bit."""
    rng = np.random.default_rng(groups)
    x = rng.standard_normal((70, 48)).astype(BF16)
    w = rng.standard_normal((groups, 24, 48)).astype(BF16)
    part = cases.segments(rng, 70, groups, "int32", gaps=False)
    y = cugemm.grouped_matmul(x, w, indptr=part.indptr)
    exact = np.einsum("mk,mnk->mn", x.astype(float), w.astype(float)[part.expert])
    assert (np.abs(y.astype(float) - exact) <= np.abs(exact) * 2.0**-8 + 1e-30).all()
    for kind, said in (("counts", part.lens.astype(np.int32)), ("indices", part.expert.astype(np.int64))):
        oracles.check_bits(cugemm.grouped_matmul(x, w, **{kind: said}), y)
    capacity = int(part.lens.max())
    slots = np.full((groups, capacity, 48), np.nan, BF16)
    for g in range(groups):
        slots[g, : part.lens[g]] = x[part.indptr[g] : part.indptr[g + 1]]
    masked = cugemm.grouped_matmul(slots, w, counts=part.lens)
    oracles.check_bits(np.concatenate([masked[g, : part.lens[g]] for g in range(groups)]), y)
    assert all((masked[g, part.lens[g] :] == 0).all() for g in range(groups))


@each
def test_nothing_to_do(framework: Framework) -> None:
    w, none = np.ones((2, 8, 16), BF16), np.zeros(0, np.int32)
    call = framework.call
    assert call(cugemm.grouped_matmul, np.ones((0, 16), BF16), w, indices=none).shape == (0, 8)
    assert call(cugemm.grouped_matmul, np.ones((0, 3, 16), BF16), w, indices=np.zeros((0, 3), np.int32)).shape == (0, 3, 8)
    assert call(cugemm.grouped_matmul, np.ones((3, 16), BF16), w, indices=np.zeros((3, 0), np.int32)).shape == (3, 0, 8)
    assert call(cugemm.grouped_matmul, np.ones((3, 16), BF16), w, indptr=np.zeros(3, np.int32), rows=none).shape == (0, 8)
    y = call(cugemm.grouped_matmul, np.ones((3, 16), BF16), w, indptr=np.zeros(1, np.int32), bias=np.ones(8, np.float32))
    assert y.shape == (3, 8) and not y.any(), "rows without a group are zeros, without bias"
    y = call(cugemm.grouped_matmul, np.ones((2, 3, 16), BF16), w, counts=np.zeros(2, np.int32), bias=np.ones(8, np.float32))
    assert y.shape == (2, 3, 8) and not y.any()
    nothing = np.ones((2, 0), BF16), np.ones((2, 8, 0), BF16)
    y = call(cugemm.grouped_matmul, *nothing, indices=np.ones(2, np.int32), bias=np.ones(8, np.float32))
    assert (y == 1).all(), "k = 0 gives the bias"


@each
@pytest.mark.parametrize("name", ["grouped_matmul", "deepgemm"])
def test_minus_one_is_no_expert(name: str, framework: Framework) -> None:
    """... in host memory too, where other wrong indices are errors: it is how padding rows are marked."""
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((6, 128)).astype(E4M3), rng.standard_normal((3, 8, 128)).astype(E4M3)
    indices = np.array([2, -1, 0, 0, -1, 1], np.int32)
    if name == "grouped_matmul":
        y = framework.call(cugemm.grouped_matmul, x, w, indices=indices, bias=np.ones(8, np.float32), out_dtype="float32")
        z = framework.call(cugemm.grouped_matmul, x, w, indices=np.abs(indices), bias=np.ones(8, np.float32), out_dtype="float32")
    else:
        scales = np.ones((6, 1), np.float32), np.ones((3, 1, 1), np.float32)
        y = framework.call(cugemm.group_deepgemm_fp8_nt_groupwise, x, w, *scales, indices, out_dtype="float32")
        z = framework.call(cugemm.group_deepgemm_fp8_nt_groupwise, x, w, *scales, np.abs(indices), out_dtype="float32")
    assert not y[indices < 0].any()
    assert (y[indices >= 0] == z[indices >= 0]).all() and z.all()


# --- calls of several steps -----------------------------------------------------------------------------------------------------------


ACTIVATIONS = ("fp8_row", "fp8_group", "fp8_tensor", "mxfp8", "nvfp4", "nvfp4_row", "int8_row")


@pytest.mark.parametrize(
    ("framework", "activations"),  # jit, which is slow, with two of them
    [pytest.param(f, name, id=f"{name}-{f.name}") for f in FRAMEWORKS for name in (("fp8_row", "nvfp4") if f.jit else ACTIVATIONS)],
)
@pytest.mark.parametrize("kind", ["indptr", "top-k", "pairs", "masked"])
def test_activations_are_quantised_first(kind: str, activations: str, framework: Framework) -> None:
    rng = np.random.default_rng(4)
    w = rng.standard_normal((3, 24, 64)).astype(BF16)
    said: dict[str, Array]
    if kind == "indptr":
        x, said = rng.standard_normal((9, 64)).astype(BF16), {"indptr": np.array([0, 4, 4, 9], np.int32)}
    elif kind == "top-k":
        x, said = rng.standard_normal((9, 64)).astype(BF16), {"indices": rng.integers(0, 3, (9, 2)).astype(np.int32)}
    elif kind == "pairs":
        x, said = rng.standard_normal((9, 2, 64)).astype(BF16), {"indices": rng.integers(0, 3, (9, 2)).astype(np.int32)}
    else:
        x, said = rng.standard_normal((3, 9, 64)).astype(BF16), {"counts": np.array([4, 0, 9], np.int32)}
        if activations == "fp8_tensor":
            return
    y = framework.call(cugemm.grouped_matmul, x, w, activations=activations, **said)
    assert y.dtype == oracles.dtype_of("bfloat16"), "as x"
    if kind == "masked":
        used = np.arange(9) < said["counts"][:, None]
        dirty = np.where(used[..., None], x, np.array(np.nan, BF16))
        unused = framework.call(cugemm.grouped_matmul, dirty, w, activations=activations, **said)
        oracles.check_bits(unused, y, "unused rows may hold anything")
        x = np.where(used[..., None], x, np.array(0, BF16))
    rows = x.reshape(-1, 64) if kind == "pairs" else x
    q = cugemm.quantize(rows, activations)
    flat = {"indices": said["indices"].reshape(-1)} if kind == "pairs" else said
    by_hand = cugemm.grouped_matmul(q, w, out_dtype="bfloat16", **flat)
    oracles.check_bits(y, by_hand.reshape(y.shape))


@each
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_weights_combine_in_order(dtype: str | None, pairs: bool, framework: Framework) -> None:
    rng = np.random.default_rng(5)
    indices, weights = rng.integers(0, 4, (11, 3)).astype(np.int32), rng.random((11, 3)).astype(np.float32)
    x = rng.standard_normal((11, 3, 40) if pairs else (11, 40)).astype(BF16)
    w, bias = rng.standard_normal((4, 17, 40)).astype(BF16), rng.standard_normal((4, 17)).astype(np.float32)
    y = framework.call(cugemm.grouped_matmul, x, w, indices=indices, weights=weights, bias=bias, out_dtype=dtype)
    terms = cugemm.grouped_matmul(x, w, indices=indices, bias=bias, out_dtype="float32")
    total = np.zeros((11, 17), np.float32)
    for j in range(3):
        total = total + weights[:, j, None] * terms[:, j] if j else weights[:, 0, None] * terms[:, 0]
    assert (y == total.astype(oracles.dtype_of(dtype or "bfloat16"))).all() and y.dtype == oracles.dtype_of(dtype or "bfloat16")


@pytest.mark.parametrize("framework", [NUMPY, TORCH], ids=lambda f: f.name)
def test_out(framework: Framework) -> None:
    """Every shape of result into memory of the caller, which is returned itself."""
    rng = np.random.default_rng(6)
    put, get = framework.put, framework.get
    w, x = put(rng.standard_normal((3, 8, 32)).astype(BF16)), rng.standard_normal((5, 2, 32)).astype(BF16)
    indices, weights = put(rng.integers(0, 3, (5, 2)).astype(np.int32)), put(rng.random((5, 2)).astype(np.float32))
    for rows, how, shape in (
        (x[:, 0], {"indices": indices}, (5, 2, 8)),
        (x, {"indices": indices}, (5, 2, 8)),
        (x, {"indices": indices, "weights": weights}, (5, 8)),
        (x[:, 0], {"indices": indices, "weights": weights, "activations": "fp8_row"}, (5, 8)),
        (x[:3], {"counts": put(np.array([1, 0, 2], np.int32))}, (3, 2, 8)),
        (x[:, 1], {"indptr": put(np.array([0, 2, 2, 5], np.int32))}, (5, 8)),
    ):
        out = put(oracles.poison(shape, "float32"))
        assert cugemm.grouped_matmul(put(rows), w, out=out, **how) is out
        oracles.check_bits(get(out), get(cugemm.grouped_matmul(put(rows), w, out_dtype="float32", **how)))


def test_masked_out_of_any_strides() -> None:
    rng = np.random.default_rng(7)
    x, w, counts = rng.standard_normal((3, 5, 32)).astype(BF16), rng.standard_normal((3, 8, 32)).astype(BF16), np.array([5, 0, 2], np.int32)
    expected = cugemm.grouped_matmul(x, w, counts=counts)
    for out in cases.masked_outs():
        cugemm.grouped_matmul(x, w, counts=counts, out=out)
        assert (out == expected).all()
        out.view(np.uint16)[...] = 0xFFFF
        assert (cases.root(out) == 0xFF).all(), "nothing around it was written"


def test_every_error_comes_before_the_first_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    x, w = rng.standard_normal((6, 64)).astype(BF16), rng.standard_normal((3, 8, 64)).astype(BF16)
    indices, weights = rng.integers(0, 3, (6, 2)).astype(np.int32), rng.random((6, 2)).astype(np.float32)
    good = {"indices": indices, "weights": weights, "activations": "fp8_row"}
    bad: list[dict[str, Any]] = [
        {"out": np.empty((5, 8), np.float32)}, {"out": np.empty((6, 8), np.int32)}, {"bias": np.ones(9, np.float32)},
        {"weights": to_torch(weights)}, {"out": np.empty((6, 8), BF16), "out_dtype": "float32"}, {"indices": indices.astype(np.uint8)},
        {"weights": weights[::-1]}, {"out": torch.empty(6, 8)},
    ]  # fmt: skip
    for framework in (NUMPY, JAX):
        for change in bad:
            if framework is JAX and any(isinstance(v, torch.Tensor) or k == "weights" for k, v in change.items()):
                continue
            how = {k: framework.put(v) if isinstance(v, np.ndarray) else v for k, v in {**good, **change}.items()}
            before = launch.launches
            with pytest.raises((TypeError, ValueError)):
                cugemm.grouped_matmul(framework.put(x), framework.put(w), **how)
            assert launch.launches == before, change
    cugemm.grouped_matmul(x, w, **good)
    monkeypatch.setattr(rehearsal, "recording", lambda: pytest.fail("a second call is not rehearsed"))
    cugemm.grouped_matmul(x, w, **good)
    monkeypatch.setattr(rehearsal, "_SEEN", {})
    monkeypatch.undo()
    cugemm.grouped_matmul(x, w, **good)


@pytest.mark.parametrize("put", [lambda x: x, to_torch], ids=["numpy", "torch"])
def test_out_is_compared_with_every_operand_in_every_call(put: Callable[[Array], Any]) -> None:
    rng = np.random.default_rng(9)
    x, w = (put(rng.standard_normal(shape).astype(BF16)) for shape in ((6, 64), (3, 64, 64)))
    pairs, share, one = (put(a) for a in (np.zeros((6, 2), np.int32), np.full((6, 2), 0.5, np.float32), np.zeros(6, np.int32)))
    out, square = put(np.zeros((6, 64), BF16)), put(np.zeros((64, 64), BF16))
    rows = put(np.zeros((6, 2, 64), BF16))
    calls: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {
        "x and weights": (lambda o: cugemm.grouped_matmul(x, w, indices=pairs, weights=share, out=o), out, x),
        "x and activations": (lambda o: cugemm.grouped_matmul(x, w, indices=one, activations="fp8_row", out=o), out, x),
        "x of pairs": (lambda o: cugemm.grouped_matmul(rows, w, indices=pairs, activations="fp8_row", out=o), rows * 0, rows),
        "x": (lambda o: cugemm.linear(x, square, activations="fp8_row", out=o), out, x),
        "w": (lambda o: cugemm.linear(x, square, activations="fp8_row", out=o), out, square[:6]),
        "x of three axes": (lambda o: cugemm.linear(rows, square, activations="fp8_row", out=o), rows * 0, rows),
    }
    for name, (call, good, bad) in calls.items():
        for _ in range(2):
            before = launch.launches
            with pytest.raises(ValueError, match=rf"out shares memory with {'w' if name == 'w' else 'x'}; pass an out of its own"):
                call(bad)
            assert launch.launches == before, name
            call(good)


def test_pairs_of_a_quantized() -> None:
    rng = np.random.default_rng(10)
    x, w = rng.standard_normal((3, 2, 64)).astype(BF16), rng.standard_normal((4, 8, 64)).astype(BF16)
    indices = rng.integers(0, 4, (3, 2)).astype(np.int32)

    def both(q: Quantized) -> None:
        y = cugemm.grouped_matmul(q, w, indices=indices, out_dtype="float32")
        flat = cugemm.linear(cugemm.dequantize(q, "bfloat16").reshape(6, 64), w.reshape(32, 64), out_dtype="float32").reshape(3, 2, 4, 8)
        picked = np.take_along_axis(flat, indices[..., None, None], 2)[:, :, 0]
        np.testing.assert_allclose(y, picked, rtol=1e-2, atol=1e-1)

    q = cugemm.quantize(x, "nvfp4")
    for tensor_scale in (None, 0.5, 1, np.float32(2), np.ones(1, np.float32)):
        both(Quantized(q.data, q.scale, "nvfp4", tensor_scale=tensor_scale))
    row = cugemm.quantize(x, "nvfp4_row")
    assert row.tensor_scale.shape == (3, 2, 1)
    both(row)
    eight = cugemm.quantize(x, "fp8_tensor")
    both(eight)
    refused = {
        "one per matrix": Quantized(eight.data, np.ones((3, 1, 1), np.float32), "fp8_tensor"),
        "shared by matrices": Quantized(eight.data, np.ones((2, 1), np.float32), "fp8_row"),
        "tensor scales of matrices": Quantized(q.data, q.scale, "nvfp4", tensor_scale=np.ones(3, np.float32)),
    }
    for name, x3 in refused.items():
        with pytest.raises(ValueError, match=r"grouped_matmul: x is .*do not follow its rows one by one; pass it as \[6, 64\]"):
            pytest.fail(f"{name}: {cugemm.grouped_matmul(x3, w, indices=indices)}")
    with pytest.raises(TypeError, match="zero points go with experts only"):
        cugemm.grouped_matmul(cugemm.quantize(x, "uint4_g32"), w, indices=indices)


def test_expert_indices_have_one_axis() -> None:
    x, w = np.ones((6, 16), BF16), np.ones((3, 16, 8), BF16)
    with pytest.raises(ValueError, match=r"expert_indices has shape \(6, 2\); wanted \[m\].*grouped_matmul\(x, experts, indices=...\)"):
        cugemm.SegmentGEMMWrapper().run(x, w, np.zeros((6, 2), np.int32))


def test_combined_out_is_refused_in_the_name_of_the_call() -> None:
    x, w, weights = np.ones((6, 64), BF16), np.ones((3, 8, 64), BF16), np.ones((6, 2), np.float32)
    for out, text in (
        (np.empty((5, 8), BF16), "out has shape (5, 8), but the result has shape (6, 8); pass out of that shape or drop it."),
        (np.empty((6, 8), np.int32), "out is int32; results come as "),
        (np.empty((6, 8), BF16), "out is bfloat16, but out_dtype is float32; drop one of them."),
    ):
        with pytest.raises(ValueError, match=re.escape(f"grouped_matmul: {text}")):
            cugemm.grouped_matmul(x, w, indices=np.zeros((6, 2), np.int32), weights=weights, out=out, out_dtype="float32")


def test_the_list_of_rehearsals_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[Any, tuple[str, ...]] = {(i,): () for i in range(rehearsal._MOST)}
    monkeypatch.setattr(rehearsal, "_SEEN", seen)
    x, w = np.ones((2, 16), BF16), np.ones((1, 8, 16), BF16)
    cugemm.grouped_matmul(x, w, indices=np.zeros(2, np.int32), activations="fp8_row")
    assert len(seen) == 1


# --- what is planned ------------------------------------------------------------------------------------------------------------------


def spec(*shape: int, dtype: str = "bfloat16") -> Spec:
    return Spec(shape, dtype)


def quantized(fmt: str, *shape: int) -> Quantized:
    """A Quantized of zeros as Specs on a GPU."""
    q = cugemm.quantize(np.zeros(shape, np.float32), fmt)
    return specs(q)


def specs(q: Quantized) -> Quantized:
    def part(x: Any) -> Any:
        return None if x is None else Spec(x.shape, x.dtype)

    return Quantized(part(q.data), part(q.scale), q.format, tensor_scale=part(q.tensor_scale), zero=part(q.zero))


I32 = "int32"
NVFP4 = {"ab_dtype": "float4_e2m1fn", "sf_dtype": "float8_e4m3fn", "sf_vec_size": 16}
MXFP8 = {"ab_dtype": "float8_e4m3fn", "sf_dtype": "float8_e8m0fnu", "sf_vec_size": 32}
F8 = "float8_e4m3fn"
GROUPWISE = (spec(40, 256, dtype=F8), spec(3, 24, 256, dtype=F8), spec(40, 2, dtype="float32"), spec(3, 1, 2, dtype="float32"))
MASKED = (spec(3, 40, 256, dtype=F8), GROUPWISE[1], spec(3, 40, 2, dtype="float32"), GROUPWISE[3])
PAIRED = ((GROUPWISE[0], GROUPWISE[2]), (GROUPWISE[1], GROUPWISE[3]))
EXPLAINED: dict[str, Callable[[], str]] = {
    "grouped_matmul": lambda: cugemm.explain(cugemm.grouped_matmul, spec(40, 64), spec(3, 24, 64), indptr=spec(4, dtype=I32)),
    "grouped_matmul masked": lambda: cugemm.explain(
        cugemm.grouped_matmul, spec(3, 40, 64), quantized("nvfp4", 3, 24, 64), counts=spec(3, dtype=I32)
    ),
    "grouped_matmul indices": lambda: cugemm.explain(
        cugemm.grouped_matmul, spec(40, 64), quantized("int4_g32", 3, 24, 64), indices=spec(40, 2, dtype="int64"),
        weights=spec(40, 2, dtype="float32"), activations="fp8_row",
    ),
    "group_gemm_fp8_nt_groupwise": lambda: cugemm.explain(
        cugemm.group_gemm_fp8_nt_groupwise, *GROUPWISE, spec(4, dtype=I32), scale_major_mode="K"
    ),
    "group_gemm_mxfp8_mxfp4_nt_groupwise": lambda: cugemm.explain(
        cugemm.group_gemm_mxfp8_mxfp4_nt_groupwise, GROUPWISE[0], spec(3, 24, 128, dtype="uint8"), spec(384, 8, dtype="uint8"),
        spec(3, 128, 8, dtype="uint8"), spec(4, dtype=I32),
    ),
    "group_gemm_nvfp4_nt_groupwise": lambda: cugemm.explain(
        cugemm.group_gemm_nvfp4_nt_groupwise, spec(40, 128, dtype="uint8"), spec(3, 24, 128, dtype="uint8"), spec(384, 16, dtype="uint8"),
        spec(3, 128, 16, dtype="uint8"), spec(4, dtype=I32), spec(3, dtype="float32"),
    ),
    "group_deepgemm_fp8_nt_groupwise": lambda: cugemm.explain(cugemm.group_deepgemm_fp8_nt_groupwise, *GROUPWISE, spec(40, dtype=I32)),
    "batch_deepgemm_fp8_nt_groupwise": lambda: cugemm.explain(cugemm.batch_deepgemm_fp8_nt_groupwise, *MASKED, spec(3, dtype=I32), 16),
    "grouped_gemm_nt_masked": lambda: cugemm.explain(
        cugemm.grouped_gemm_nt_masked, (spec(40, 128, 3, dtype="uint8"), spec(32, 4, 1, 4, 4, 3, dtype="uint8")),
        (spec(24, 128, 3, dtype="uint8"), spec(3, 128, 16, dtype=F8)), None, spec(3, dtype=I32), c_dtype="bfloat16", **NVFP4,
    ),
    "grouped_mm_bf16": lambda: cugemm.explain(cugemm.grouped_mm_bf16, spec(40, 64), spec(3, 24, 64), spec(4, dtype=I32)),
    "grouped_mm_fp8": lambda: cugemm.explain(cugemm.grouped_mm_fp8, GROUPWISE[0], GROUPWISE[1], spec(4, dtype=I32), 0.5),
    "grouped_mm_mxfp8": lambda: cugemm.explain(
        cugemm.grouped_mm_mxfp8, *GROUPWISE[:2], spec(128, 8, dtype="uint8"), spec(3, 128, 8, dtype="uint8"), spec(4, dtype=I32)
    ),
    "grouped_mm_fp4": lambda: cugemm.explain(
        cugemm.grouped_mm_fp4, spec(40, 128, dtype="uint8"), spec(3, 24, 128, dtype="uint8"), spec(128, 16, dtype=F8),
        spec(3, 128, 16, dtype=F8), spec(4, dtype=I32),
    ),
    "moe_gemm_fp8_nt_groupwise": lambda: cugemm.explain(
        cugemm.moe_gemm_fp8_nt_groupwise, *GROUPWISE[:2], spec(2, 48, dtype="float32"), spec(3, 2, 1, dtype="float32"), spec(4, dtype=I32),
        is_gated=True,
    ),
    "fp8_gemm_nt": lambda: cugemm.explain(
        cugemm.fp8_gemm_nt, PAIRED[0], (spec(24, 256, dtype=F8), spec(1, 2, dtype="float32")), spec(40, 24), spec(40, 24)
    ),
    "m_grouped_fp8_gemm_nt_contiguous": lambda: cugemm.explain(
        cugemm.m_grouped_fp8_gemm_nt_contiguous, *PAIRED, spec(40, 24), spec(40, dtype=I32)
    ),
    "m_grouped_fp8_gemm_nt_masked": lambda: cugemm.explain(
        cugemm.m_grouped_fp8_gemm_nt_masked, (MASKED[0], MASKED[2]), (MASKED[1], MASKED[3]), spec(3, 40, 24), spec(3, dtype=I32), 8
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPLAINED)
def test_explain(name: str) -> None:
    text = EXPLAINED[name]()
    assert f"cugemm.{name.partition(' ')[0]}\n  m = " in text and re.search(r"-> (portable|skinny|hopper) ", text)
    assert ("grouped by" in text) == (name != "fp8_gemm_nt")
    steps = {"grouped_matmul indices": ["quantize", "combine"], "moe_gemm_fp8_nt_groupwise": ["silu_and_mul"]}
    assert [step for step in ("quantize", "combine", "silu_and_mul") if f"cugemm.{step}\n" in text] == steps.get(name, [])


@pytest.mark.parametrize("framework", [f for f in FRAMEWORKS if not f.jit], ids=lambda f: f.name)  # tracers are no arrays to explain
def test_explain_takes_arrays_too(framework: Framework) -> None:
    put = framework.put
    x, w = put(np.zeros((6, 2, 64), BF16)), put(np.zeros((3, 8, 64), BF16))
    indices, weights = put(np.zeros((6, 2), np.int32)), put(np.zeros((6, 2), np.float32))
    before = launch.launches
    text = cugemm.explain(cugemm.grouped_matmul, x, w, indices=indices, weights=weights, activations="nvfp4")
    assert text.count("in host memory: NumPy reference") == 3 and launch.launches == before


def planned(*args: Any, **how: Any) -> Any:
    with launch.recording() as calls:
        cugemm.grouped_matmul(*args, **how)
    (recorded,) = calls
    return recorded.call


def test_steps_of_a_grouping() -> None:
    """Which arrays a product reads as they are, and which of them first become int32."""
    x, w = spec(40, 64), spec(3, 24, 64)

    def grouping(a: Spec = x, **how: Any) -> tuple[list[int], tuple[int, ...], tuple[Any, ...]]:
        call = planned(a, w, **how)
        found = segments.steps(call)
        assert isinstance(found.steps[0], Zero)
        modes = [dict(step.defines)["MODE"] for step in found.steps if isinstance(step, Step)]
        return modes, (found.indptr, found.row_map, found.expert_map, found.rows), call.workspaces

    narrow, mine = segments._NARROW, OUT + 1
    assert grouping(indptr=spec(4, dtype=I32)) == ([], (SEGMENTS, NULL, NULL, NULL), ())
    assert grouping(indptr=spec(4, dtype="int64")) == ([narrow], (mine, NULL, NULL, NULL), (((4,), I32),))
    assert grouping(counts=spec(3, dtype=I32)) == ([segments._SUM], (mine, NULL, NULL, NULL), (((4,), I32),))
    assert grouping(indptr=spec(4, dtype=I32), rows=spec(9, dtype=I32)) == ([], (SEGMENTS, NULL, NULL, ROWS), ())
    assert grouping(indptr=spec(4, dtype="int64"), rows=spec(9, dtype="int64")) == (
        [narrow, narrow], (mine, NULL, NULL, mine + 1), (((4,), I32), ((9,), I32))
    )  # fmt: skip
    assert grouping(indices=spec(40, 2, dtype="int64")) == ([segments._SORT], (mine, mine + 1, NULL, NULL), (((4,), I32), ((80,), I32)))
    assert grouping(indices=spec(9, dtype=I32), rows=spec(9, dtype="int64")) == (
        [segments._SORT, narrow], (mine, mine + 1, NULL, mine + 2), (((4,), I32), ((9,), I32), ((9,), I32))
    )  # fmt: skip
    masked = spec(3, 40, 64)
    assert grouping(masked, counts=spec(3, dtype=I32)) == ([], (SEGMENTS, NULL, NULL, NULL), ())
    modes, positions, workspaces = grouping(masked, counts=spec(3, dtype="int64"))
    assert (modes, positions) == ([narrow], (mine, NULL, NULL, NULL)) and workspaces[0][0][0] >= 3
    with launch.recording() as calls:
        cugemm.SegmentGEMMWrapper().run(x, spec(5, 64, 24), 3, seg_lens=spec(3, dtype=I32), weight_indices=spec(3, dtype=I32))
    found = segments.steps(calls[0].call)
    assert (found.indptr, found.expert_map) == (mine, EXPERTS)


@pytest.mark.parametrize("number", range(8))
def test_clearing_writes_the_result_and_nothing_else(number: int) -> None:
    out = cases.masked_outs()[number]
    call = planned(
        spec(3, 5, 64), spec(3, 8, 64), counts=spec(3, dtype=I32),
        out=Spec(out.shape, "bfloat16", strides=tuple(s // 2 for s in out.strides)),
    )  # fmt: skip
    zeros = [step for step in segments.steps(call).steps if isinstance(step, Zero)]
    assert len(zeros) == (3 if number in (3, 5, 7) else 1)
    memory = cases.root(out)
    begin = out.ctypes.data - memory.ctypes.data
    for zero in zeros:
        for line in range(zero.height):
            at = begin + zero.offset + line * zero.pitch
            assert (memory[at : at + zero.width] == 0xFF).all() and at + zero.width <= len(memory), "once, and inside"
            memory[at : at + zero.width] = 0
    assert not out.view(np.uint16).any()
    out.view(np.uint16)[...] = 0xFFFF
    assert (memory == 0xFF).all()


# --- what is refused ------------------------------------------------------------------------------------------------------------------

X, W, INDPTR, TOP = np.ones((6, 64), BF16), np.ones((3, 8, 64), BF16), np.array([0, 2, 2, 6], np.int32), np.zeros((6, 2), np.int32)
X3, P = np.ones((6, 2, 64), BF16), np.ones((6, 2), np.float32)
A8, B8 = np.ones((6, 256), E4M3), np.ones((3, 8, 256), E4M3)
SA, SB = np.ones((6, 2), np.float32), np.ones((3, 1, 2), np.float32)
U8A, U8B = np.zeros((6, 128), np.uint8), np.zeros((3, 8, 128), np.uint8)
SFA, SFB = np.zeros((384, 8), np.uint8), np.zeros((3, 128, 8), np.uint8)
FLAT = np.zeros((128, 8), np.uint8)
D = np.zeros((6, 8), BF16)
X128 = np.zeros((3, 6, 128), BF16)
L4 = groups_last(np.zeros((3, 6, 64), np.uint8)), tiles_last(np.zeros((3, 128, 8), np.uint8))
R4 = groups_last(np.zeros((3, 8, 64), np.uint8)), tiles_last(np.zeros((3, 128, 8), np.uint8))
gm, g8 = cugemm.grouped_matmul, cugemm.group_gemm_fp8_nt_groupwise
mx4, nv4 = cugemm.group_gemm_mxfp8_mxfp4_nt_groupwise, cugemm.group_gemm_nvfp4_nt_groupwise
dense, contiguous = cugemm.fp8_gemm_nt, cugemm.m_grouped_fp8_gemm_nt_contiguous
B, SF16 = (B8[0], SB[0]), (np.zeros((384, 16), np.uint8), np.zeros((3, 128, 16), np.uint8))
QX, QW = cugemm.quantize(X), cugemm.quantize(np.ones((3, 8, 256), np.float32), "nvfp4")
Q3 = Quantized(
    np.zeros((6, 2, 32), np.uint8), np.zeros((6, 128, 4), np.uint8), "nvfp4", tensor_scale=np.ones(1, np.float32), scale_layout="128x4"
)  # fmt: skip
ERRORS: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    # grouped_matmul
    "nothing says": (
        ValueError,
        lambda: gm(X, W),
        "grouped_matmul: nothing says which rows go where; pass one of indptr, indices and counts.",
    ),
    "two say": (ValueError, lambda: gm(X, W, indptr=INDPTR, counts=TOP), "grouped_matmul: indptr and counts says which rows go where"),
    "x is no array": (TypeError, lambda: gm([1], W, indptr=INDPTR), "grouped_matmul: x"),
    "rows of 3-D": (
        ValueError,
        lambda: gm(X3, W, indices=TOP, rows=TOP),
        "grouped_matmul: rows gathers rows of a 2-D x, but x has shape (6, 2, 64); drop rows",
    ),
    "rows of masked": (ValueError, lambda: gm(X3[:3], W, counts=INDPTR[:3], rows=TOP), "rows gathers rows of a 2-D x"),
    "indptr of 3-D": (ValueError, lambda: gm(X3, W, indptr=INDPTR), "grouped_matmul: x has shape (6, 2, 64); wanted a 2-D array."),
    "pairs differ": (
        ValueError,
        lambda: gm(X3, W, indices=TOP[:5]),
        "indices has shape (5, 2), but x (6, 2, 64) has 6 x 2 rows; they must agree.",
    ),
    "pairs 1-D": (
        ValueError,
        lambda: gm(X3, W, indices=TOP[:, 0]),
        "indices has shape (6,), but x (6, 2, 64) has 6 x 2 rows; they must agree.",
    ),
    "weights without pairs": (
        ValueError,
        lambda: gm(X, W, indices=np.zeros(6, np.int32), weights=P),
        "weights combine the experts of each row, so they go with indices [m, experts per row]",
    ),
    "weights of indptr": (ValueError, lambda: gm(X, W, indptr=INDPTR, weights=P), "weights combine the experts of each row"),
    "weights shape": (
        ValueError,
        lambda: gm(X, W, indices=TOP, weights=P[:, :1]),
        "weights has shape (6, 1), but indices has shape (6, 2); they must agree.",
    ),
    "weights dtype": (TypeError, lambda: gm(X, W, indices=TOP, weights=TOP), "weights is int32; wanted bfloat16, float16, float32."),
    "activations": (
        ValueError,
        lambda: gm(X, W, indices=TOP, activations="fp7"),
        "grouped_matmul: activations is 'fp7'; wanted one of fp8_tensor, ",
    ),
    "activations uint4": (
        ValueError,
        lambda: gm(X, W, indices=TOP, activations="uint4_g32"),
        "activations is 'uint4_g32', whose zero points only weights can have",
    ),
    "activations twice": (
        TypeError,
        lambda: gm(QX, W, indices=TOP, activations="fp8_row"),
        "grouped_matmul: x is a Quantized already; drop activations.",
    ),
    "activations masked": (
        ValueError,
        lambda: gm(X3[:3], W, counts=INDPTR[:3], activations="fp8_block"),
        "activations is 'fp8_block', whose scales cover several rows, used and unused ones of a 3-D x alike",
    ),
    "activations k": (
        ValueError,
        lambda: gm(X[:, :32], W, indices=TOP, activations="fp8_row"),
        "x (6, 32) has k = 32, but experts (3, 8, 64) has k = 64; they must agree.",
    ),
    "k": (ValueError, lambda: gm(X[:, :32], W, indices=TOP), "x (6, 32) has k = 32, but experts (3, 8, 64) read as [n, k] has k = 64"),
    "experts 2-D": (ValueError, lambda: gm(X, W[0], indices=TOP), "experts has shape (8, 64); wanted a 3-D array."),
    "indptr dtype": (
        TypeError,
        lambda: gm(X, W, indptr=P[:, 0]),
        "indptr is float32; wanted an int32 or int64 array on the device of the operands.",
    ),
    "indptr empty": (
        ValueError,
        lambda: gm(X, W, indptr=INDPTR[:0]),
        "indptr is empty; an indptr has one element more than there are segments.",
    ),
    "indptr long": (ValueError, lambda: gm(X, W, indptr=np.zeros(6, np.int32)), "indptr names 5 segments, but experts holds 3 matrices"),
    "indptr 2-D": (ValueError, lambda: gm(X, W, indptr=TOP), "indptr has shape (6, 2) and strides (2, 1); wanted a contiguous 1-D array."),
    "indptr strided": (
        ValueError,
        lambda: gm(X, W, indptr=np.zeros(8, np.int32)[::2]),
        "indptr has shape (4,) and strides (2,); wanted a contiguous 1-D array.",
    ),
    "indptr goes down": (ValueError, lambda: gm(X, W, indptr=np.array([0, 3, 2, 6], np.int32)), "indptr has 1 value below the one before"),
    "indptr past m": (ValueError, lambda: gm(X, W, indptr=np.array([0, 3, 7, 8], np.int32)), "indptr has 2 values outside [0, 6]"),
    "counts past m": (ValueError, lambda: gm(X, W, counts=np.array([3, 3, 1], np.int32)), "counts has 1 value past the last of the 6 rows"),
    "counts negative": (ValueError, lambda: gm(X, W, counts=np.array([3, -3, 1], np.int32)), "counts has 1 value negative"),
    "masked counts": (ValueError, lambda: gm(X3[:3], W, counts=np.array([3, 0, -1], np.int32)), "counts has 2 values outside [0, 2]"),
    "masked length": (
        ValueError,
        lambda: gm(X3[:3], W, counts=INDPTR),
        "counts has shape (4,), but experts holds 3 matrices; wanted (3,).",
    ),
    "masked matrices": (
        ValueError,
        lambda: gm(X3, W, counts=INDPTR[:3]),
        "x (6, 2, 64) has 6 matrices, but experts (3, 8, 64) has 3; they must agree.",
    ),
    "indices length": (
        ValueError,
        lambda: gm(X, W, indices=TOP[:5, 0].copy()),
        "indices has shape (5,), but x has 6 rows; wanted (6,), or (6, several).",
    ),
    "indices values": (
        ValueError,
        lambda: gm(X, W, indices=np.full(6, 3, np.int32)),
        "indices has 6 values outside [-1, 3), the matrices of experts; -1 is none",
    ),
    "rows values": (
        ValueError,
        lambda: gm(X, W, indptr=INDPTR[:3], rows=np.array([0, 6], np.int32)),
        "rows has 1 value outside [-1, 6), the rows of x; -1 is none",
    ),
    "rows length": (
        ValueError,
        lambda: gm(X, W, indices=TOP[:5, 0].copy(), rows=TOP[:, 0].copy()),
        "indices has shape (5,), but x has 6 rows; wanted (6,).",
    ),
    "bias": (
        ValueError,
        lambda: gm(X, W, indices=TOP, bias=P[:, 0]),
        "bias has shape (6,), but the result has n = 8 columns; wanted (8,) or (3, 8).",
    ),
    "out": (ValueError, lambda: gm(X, W, indices=TOP, out=D), "out has shape (6, 8), but the result has shape (6, 2, 8)"),
    "out of pairs": (
        ValueError,
        lambda: gm(X3, W, indices=TOP, out=D),
        "grouped_matmul: out has shape (6, 8), but the result has shape (6, 2, 8)",
    ),
    "out apart": (
        ValueError,
        lambda: gm(X3, W, indices=TOP, out=np.zeros((6, 3, 8), BF16)[:, :2]),
        "out has strides (24, 8, 1); its first two axes must lie as one.",
    ),
    "out in jax": (
        TypeError,
        lambda: gm(jnp.asarray(X), jnp.asarray(W), indices=jnp.asarray(TOP), weights=jnp.asarray(P), out=jnp.asarray(D)),
        "grouped_matmul: JAX arrays are immutable: drop out=",
    ),
    "tiled pairs": (
        ValueError,
        lambda: gm(Q3, W, indices=TOP),
        "whose scales do not follow its rows one by one; pass it as [12, 64], with 1-D indices.",
    ),
    "frameworks": (
        TypeError,
        lambda: gm(X, to_torch(W), indices=TOP),
        "experts is a PyTorch array, but x is a NumPy array; convert one of them.",
    ),
    "x dtype": (TypeError, lambda: gm(SA, W, indices=TOP), "x is float32; wanted"),
    "backend": (ValueError, lambda: gm(X, W, indices=TOP, backend="cutlass"), "backend is 'cutlass'; wanted one of 'auto', 'hopper'"),
    "accumulate": (
        ValueError,
        lambda: gm(X, W, indices=TOP, accumulate="slow"),
        "accumulate is 'slow'; wanted one of 'fast', 'promoted', 'fp32'.",
    ),
    "out_dtype": (
        ValueError,
        lambda: gm(X, W, indices=TOP, out_dtype="int8"),
        "out_dtype is int8; results come as bfloat16, float16, float32.",
    ),
    # FlashInfer's entries
    "mma_sm": (ValueError, lambda: g8(A8, B8, SA, SB, INDPTR, mma_sm=3), "group_gemm_fp8_nt_groupwise: mma_sm is 3; wanted 1 or 2."),
    "mode": (
        ValueError,
        lambda: g8(A8, B8, SA, SB, INDPTR, scale_major_mode="N"),
        "scale_major_mode is 'N'; wanted 'MN' for scales [.., k/128, rows] or 'K'",
    ),
    "granularity": (
        ValueError,
        lambda: g8(A8, B8, SA, SB, INDPTR, (1, 64, 128)),
        "scale_granularity_mnk is (1, 64, 128); wanted (1 or 128, 1 or 128, 128).",
    ),
    "a_scale missing": (TypeError, lambda: g8(A8, B8, None, SB, INDPTR), "a_scale is missing; pass one float32 scale per block of a."),
    "b_scale missing": (
        TypeError,
        lambda: cugemm.group_deepgemm_fp8_nt_groupwise(A8, B8, SA, None, INDPTR),
        "b_scale is missing; pass one float32 scale per block of b.",
    ),
    "scale mode": (
        ValueError,
        lambda: g8(A8, B8, SA, SB, INDPTR),
        "a_scale has shape (6, 2), but a is (6, 256); wanted (2, 6), one scale for each 1 x 128",
    ),
    "scale dtype": (
        TypeError,
        lambda: g8(A8, B8, SA.astype(np.int32), SB, INDPTR, scale_major_mode="K"),
        "a_scale is int32; wanted float32, float16, bfloat16.",
    ),
    "a bf16": (TypeError, lambda: g8(X, B8, SA, SB, INDPTR, scale_major_mode="K"), "a is bfloat16; wanted float8_e4m3fn, float8_e5m2"),
    "m_indptr": (ValueError, lambda: g8(A8, B8, SA, SB, INDPTR[:0], scale_major_mode="K"), "m_indptr is empty"),
    "backend of group": (
        ValueError,
        lambda: g8(A8, B8, SA, SB, INDPTR, scale_major_mode="K", backend="cutlass"),
        "wanted one of 'auto', 'hopper', 'skinny', 'swap_ab', 'portable', 'trtllm', 'cutile'.",
    ),
    "mma_sm mx": (
        ValueError,
        lambda: mx4(A8, U8B, SFA, SFB, INDPTR, 4),
        "group_gemm_mxfp8_mxfp4_nt_groupwise: mma_sm is 4; wanted 1 or 2.",
    ),
    "tile_m": (ValueError, lambda: mx4(A8, U8B, SFA, SFB, INDPTR, tile_m=64), "tile_m is 64; wanted 128."),
    "tile_n": (
        ValueError,
        lambda: nv4(U8A, U8B, SFA, SFB, INDPTR, tile_n=48),
        "group_gemm_nvfp4_nt_groupwise: tile_n is 48; wanted 32 or 64 or 128 or 192 or 256.",
    ),
    "tile_k": (ValueError, lambda: nv4(U8A, U8B, SFA, SFB, INDPTR, tile_k=64), "tile_k is 64; wanted 128 or 256."),
    "swap_ab": (ValueError, lambda: nv4(U8A, U8B, SFA, SFB, INDPTR, swap_ab=2), "swap_ab is 2; wanted True or False."),
    "padded scales": (
        ValueError,
        lambda: mx4(A8, U8B, FLAT, SFB, INDPTR),
        "scales in 128x4 tiles (128 rows x 4 blocks of 32 k) take 3072 contiguous bytes, for example (384, 8)",
    ),
    "byte scale dtype": (
        TypeError,
        lambda: mx4(A8, U8B, SA, SFB, INDPTR),
        "a_scale is float32; scales of a are e8m0 codes: pass them as uint8 or float8_e8m0fnu.",
    ),
    "byte scale missing": (TypeError, lambda: mx4(A8, U8B, None, SFB, INDPTR), "a_scale is missing; a needs an array of e8m0 scales."),
    "scale_layout": (
        ValueError,
        lambda: mx4(A8, U8B, SFA, SFB, INDPTR, scale_layout="64x4"),
        "scale_layout is '64x4'; wanted one of 'linear', '128x4', '8x4'.",
    ),
    "alpha": (
        ValueError,
        lambda: nv4(U8A, U8B, *SF16, INDPTR, np.ones(4, np.float32)),
        "group_gemm_nvfp4_nt_groupwise: alpha is of shape (4,); wanted one element, or (3,).",
    ),
    "alpha of columns": (
        ValueError,
        lambda: nv4(U8A, U8B, *SF16, INDPTR, np.ones((8, 1), np.float32)),
        "group_gemm_nvfp4_nt_groupwise: alpha is of shape (8, 1); wanted one element, or (3,).",
    ),
    "too few groups": (
        ValueError,
        lambda: cugemm.grouped_mm_bf16(X, W, INDPTR[:2]),
        "grouped_mm_bf16: m_indptr has shape (2,), but b holds 3 matrices; wanted (4,).",
    ),
    "alpha twice": (
        TypeError,
        lambda: nv4(U8A, QW, SFA, None, INDPTR, P[0]),
        "b is a Quantized, which has its own tensor_scale; drop alpha.",
    ),
    "expected_m": (
        TypeError,
        lambda: cugemm.batch_deepgemm_fp8_nt_groupwise(A8, B8, SA, SB, INDPTR[:3], INDPTR),
        "expected_m is ndarray; wanted the rows",
    ),
    "tactic": (
        ValueError,
        lambda: cugemm.grouped_mm_bf16(X, W, INDPTR, tactic=-2),
        "grouped_mm_bf16: tactic is -2; wanted -1 or the number of a plan",
    ),
    "mm backend": (
        ValueError,
        lambda: cugemm.grouped_mm_fp8(A8, B8, INDPTR, backend="trtllm"),
        "backend is 'trtllm'; wanted one of 'auto', 'hopper', 'skinny', 'swap_ab', 'portable', 'cudnn'.",
    ),
    "mm alpha": (
        ValueError,
        lambda: cugemm.grouped_mm_fp8(A8, B8, INDPTR, P[0]),
        "alpha is float32 of shape (2,); wanted a Python float or one element",
    ),
    "block_size": (
        ValueError,
        lambda: cugemm.grouped_mm_fp4(U8A, U8B, FLAT, SFB, INDPTR, block_size=64),
        "block_size is 64; wanted 16 for nvfp4 or 32 for mxfp4.",
    ),
    "a_descale": (
        ValueError,
        lambda: cugemm.grouped_mm_mxfp8(A8, B8, SFA, SFB, INDPTR),
        "a_descale has shape (384, 8) and strides (8, 1), but a is (6, 256); scales in 128x4 tiles",
    ),
    "moe granularity": (
        ValueError,
        lambda: cugemm.moe_gemm_fp8_nt_groupwise(A8, B8, SA, SB, INDPTR, (128, 128, 128)),
        "scale_granularity_mnk is (128, 128, 128); wanted (1, 128, 128).",
    ),
    "moe mode": (
        ValueError,
        lambda: cugemm.moe_gemm_fp8_nt_groupwise(A8, B8, SA, SB, INDPTR, scale_major_mode="K"),
        "scale_major_mode is 'K'; wanted 'MN'.",
    ),
    "moe scale": (
        ValueError,
        lambda: cugemm.moe_gemm_fp8_nt_groupwise(A8, B8, SA, SB, INDPTR),
        "a_scale has shape (6, 2), but a is (6, 256); wanted (2, 12)",
    ),
    "moe odd": (
        ValueError,
        lambda: cugemm.moe_gemm_fp8_nt_groupwise(A8, B8[:, :7], SA, SB, INDPTR, is_gated=True),
        "b has shape (3, 7, 256), but with is_gated its rows are two halves; 7 is odd.",
    ),
    # the masked product with its groups last
    "masked pair": (TypeError, lambda: last(L4[0]), "grouped_gemm_nt_masked: lhs is ndarray; pass (data, scales)."),
    "masked half": (TypeError, lambda: last((L4[0], None)), "lhs[1] is missing; pass arrays, (data, scales), or use"),
    "masked triple": (TypeError, lambda: last(rhs=(*R4, R4)), "rhs is 3 values; pass (data, scales)."),
    "masked rank": (ValueError, lambda: last((L4[0][0], L4[1])), "lhs[0] has shape (64, 3); wanted [rows, k, groups]"),
    "masked k": (ValueError, lambda: last((L4[0][:, :32], L4[1][:, :, :, :, :1])), "lhs[0] (6, 32, 3) and rhs[0] (8, 64, 3) differ in k"),
    "masked groups": (ValueError, lambda: last(rhs=(R4[0][..., :2], R4[1][..., :2])), "differ in k or in groups; wanted [m, k, groups]"),
    "masked tiles": (
        ValueError,
        lambda: last((L4[0], L4[1][:, :, :, :, :1])),
        "lhs[1] has shape (32, 4, 1, 4, 1, 3), but lhs[0] is (6, 64, 3); wanted (32, 4, 1, 4, 2, 3), one scale for each 16 values.",
    ),
    "masked flat tiles": (ValueError, lambda: last(rhs=(R4[0], SFB[:, :, :4])), "rhs[1] has shape (3, 128, 4)"),
    "masked scale dtype": (
        TypeError,
        lambda: last((L4[0], L4[1].astype(np.float32))),
        "lhs[1] is float32; scales of lhs[0] are e4m3 codes",
    ),
    "masked dtype": (
        TypeError,
        lambda: last((groups_last(X128), L4[1][:, :, :, :, :1]), (groups_last(B8[:, :, :128]), R4[1][:, :, :, :, :1]), **MXFP8),
        "lhs[0] is bfloat16, but e4m3 is stored as float8_e4m3fn",
    ),
    "masked ab_dtype": (
        ValueError,
        lambda: last(ab_dtype="int8"),
        "ab_dtype is 'int8'; wanted 'float4_e2m1fn' or 'float8_e4m3fn' or 'float8_e5m2'.",
    ),
    "masked sf_dtype": (ValueError, lambda: last(sf_dtype="float32"), "sf_dtype is 'float32'; wanted 'float8_e4m3fn' or 'float8_e8m0fnu'."),
    "masked vector": (ValueError, lambda: last(sf_vec_size=64), "sf_vec_size is 64; wanted 16 or 32."),
    "masked kind": (
        ValueError,
        lambda: last(sf_vec_size=32),
        "ab_dtype is float4_e2m1fn with sf_dtype float8_e4m3fn and sf_vec_size 32; wanted float4_e2m1fn with float8_e4m3fn, 16, ",
    ),
    "masked c_dtype": (
        ValueError,
        lambda: last(c_dtype="float8_e4m3fn"),
        "c_dtype is float8_e4m3fn; results come as bfloat16, float16, float32.",
    ),
    "masked out": (ValueError, lambda: last(out=np.zeros((3, 6, 8), BF16)), "out has shape (3, 6, 8); wanted [m, n, groups], (6, 8, 3)."),
    "masked out dtype": (
        ValueError,
        lambda: last(out=np.zeros((6, 8, 3), np.float32)),
        "out is float32, but c_dtype is bfloat16; make them agree, or drop one",
    ),
    "masked alpha": (
        ValueError,
        lambda: last(alpha=np.ones(4, np.float32)),
        "alpha is of shape (4,); wanted one element, or (3,) or (1, 1, 3).",
    ),
    "masked alpha rows": (ValueError, lambda: last(alpha=np.ones((3, 1), np.float32)), "alpha is of shape (3, 1)"),
    "masked alpha quantized": (ValueError, lambda: last(alpha=QX), "alpha is a Quantized; wanted one element"),
    "masked no c_dtype": (TypeError, lambda: last(c_dtype=None), "c_dtype is None; pass 'bfloat16', 'float16' or 'float32'."),
    "masked dlpack scale": (TypeError, lambda: last((L4[0], Hidden(L4[1]))), "lhs[1] is a Hidden, whose axes cannot be swapped"),
    "masked quantized": (TypeError, lambda: last((QX, L4[1])), "lhs[0] is a Quantized, which has its groups first; pass arrays"),
    "masked_m": (ValueError, lambda: last(masked_m=INDPTR), "masked_m has shape (4,), but rhs[0] holds 3 matrices; wanted (3,)."),
    "masked fused": (ValueError, lambda: last(is_swap_ab=True), "is_swap_ab is True; this is not supported"),
    "masked weights": (ValueError, lambda: last(topk_weights=P), "topk_weights is a ndarray; this is not supported"),
    "masked unknown": (TypeError, lambda: last(tiler=1), "grouped_gemm_nt_masked() got an unexpected keyword argument 'tiler'"),
    # DeepGEMM's names
    "d missing": (
        TypeError,
        lambda: dense((A8, SA), B, None),
        "fp8_gemm_nt: d is missing; pass the array to write, or call cugemm.gemm_fp8_nt_groupwise, which returns one.",
    ),
    "pair": (TypeError, lambda: dense(A8, B, D), "a is ndarray; pass (a, scale of a), or a cugemm.Quantized."),
    "triple": (TypeError, lambda: dense((A8, SA), (B8[0], SB[0], SB), D), "b is 3 values; pass (b, scale of b), or a cugemm.Quantized."),
    "half a pair": (TypeError, lambda: dense((A8, None), B, D), "a is tuple; pass (a, scale of a)"),
    "recipe": (
        ValueError,
        lambda: dense((A8, SA), B, D, recipe=(1, 128, 32)),
        "recipe is (1, 128, 32); wanted 1 or 128 rows and 128 values along k",
    ),
    "recipe kind": (ValueError, lambda: dense((A8, SA), B, D, recipe=128), "recipe is 128; wanted 1 or 128 rows"),
    "recipes": (
        ValueError,
        lambda: dense((A8, SA), B, D, recipe_a=(1, 128), recipe_b=(64, 128)),
        "recipe_a is (1, 128) and recipe_b (64, 128); wanted",
    ),
    "recipe twice": (
        ValueError,
        lambda: dense((A8, SA), B, D, recipe=(1, 128, 128), recipe_a=(1, 128)),
        "recipe says what recipe_a and recipe_b say; drop one or the other.",
    ),
    "recipe half": (ValueError, lambda: dense((A8, SA), B, D, recipe_b=(1, 128)), "pass recipe_a and recipe_b together, or neither."),
    "c": (ValueError, lambda: dense((A8, SA), B, D, D[0]), "c has shape (8,), but d has shape (6, 8); they must agree."),
    "c is d": (ValueError, lambda: dense((A8, SA), B, D, D), "fp8_gemm_nt: out shares memory with c; pass an out of its own."),
    "packed ue8m0": (TypeError, lambda: dense((A8, SA.view(np.int32)), B, D), "a[1] is int32; wanted float32, float16, bfloat16."),
    "deepgemm scale": (
        ValueError,
        lambda: dense((A8, SA[:5]), B, D),
        "a[1] has shape (5, 2), but a[0] is (6, 256); wanted (6, 2), one scale for each 1 x 128",
    ),
    "psum": (
        ValueError,
        lambda: contiguous((A8, SA), (B8, SB), D, INDPTR, use_psum_layout=True),
        "use_psum_layout is not supported; pass the group of each row in grouped_layout",
    ),
    "layout": (ValueError, lambda: contiguous((A8, SA), (B8, SB), D, INDPTR), "grouped_layout has shape (4,), but a[0] has 6 rows"),
    "masked expected": (
        TypeError,
        lambda: cugemm.m_grouped_fp8_gemm_nt_masked((A8, SA), (B8, SB), D, INDPTR, None),
        "m_grouped_fp8_gemm_nt_masked: expected_m is NoneType; wanted the rows that a group has on average, an int.",
    ),
}


def last(lhs: Any = None, rhs: Any = None, out: Any = None, masked_m: Any = None, **how: Any) -> Any:
    """grouped_gemm_nt_masked of nvfp4 operands, some of them replaced."""
    lhs, rhs, masked_m = L4 if lhs is None else lhs, R4 if rhs is None else rhs, INDPTR[:3] if masked_m is None else masked_m
    return cugemm.grouped_gemm_nt_masked(lhs, rhs, out, masked_m, **{"c_dtype": "bfloat16", **NVFP4, **how})


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    kind, call, text = ERRORS[name]
    before = launch.launches
    with pytest.raises(kind, match=re.escape(text)) as caught:
        call()
    assert type(caught.value) is kind and launch.launches == before
    assert "array([" not in str(caught.value), "messages show no values"


def test_masked_takes_what_the_grouped_quantisers_return() -> None:
    """... and plans the product that `grouped_matmul` plans of the same arrays in their own axes, without a copy."""
    rng = np.random.default_rng(8)
    x, w = rng.standard_normal((3, 40, 96)).astype(BF16), rng.standard_normal((3, 24, 96)).astype(BF16)
    counts, used = np.array([40, 0, 7], np.int32), np.array([24, 24, 24], np.int32)
    for quantise, kind in ((cugemm.scaled_fp4_grouped_quantize, "nvfp4"), (cugemm.mxfp8_grouped_quantize, "mxfp8")):
        scale = (np.full(3, 16, np.float32),) if kind == "nvfp4" else ()
        a, b = quantise(x, counts, *scale), quantise(w, used, *scale)
        names = dict(zip(("ab_dtype", "sf_dtype", "sf_vec_size"), MASKED_KINDS[kind], strict=True))
        alpha = np.full(3, 2.0**-8, np.float32) if scale else None
        y = cugemm.grouped_gemm_nt_masked(a, b, None, counts, c_dtype="float32", alpha=alpha, **names)
        assert y.shape == (40, 24, 3)
        copied = (a[0], np.ascontiguousarray(a[1])), (b[0], np.asfortranarray(b[1]))
        again = cugemm.grouped_gemm_nt_masked(*copied, None, counts, c_dtype="float32", alpha=alpha, **names)
        oracles.check_bits(np.ascontiguousarray(again), np.ascontiguousarray(y), "scales in another order of memory")
        own = [(np.moveaxis(data, 2, 0), np.moveaxis(tiles, (5, 2, 4), (0, 1, 2)).reshape(3, 128, -1)) for data, tiles in (a, b)]
        qa, qb = (
            Quantized(data, tiles, kind, scale_layout="128x4", tensor_scale=t) for (data, tiles), t in zip(own, (None, alpha), strict=True)
        )
        oracles.check_bits(np.ascontiguousarray(np.moveaxis(y, 2, 0)), cugemm.grouped_matmul(qa, qb, counts=counts, out_dtype="float32"))
        exact = np.einsum("gmk,gnk->gmn", x.astype(float), w.astype(float)) * (np.arange(40) < counts[:, None])[..., None]
        assert np.abs(np.moveaxis(y, 2, 0) - exact).max() < (8 if kind == "nvfp4" else 3)

        given = [
            tuple(Spec(part.shape, str(part.dtype), strides=[n // part.itemsize for n in part.strides]) for part in pair) for pair in (a, b)
        ]
        mine, counted = (None if alpha is None else spec(3, dtype="float32")), spec(3, dtype=I32)
        with launch.recording() as calls:
            cugemm.grouped_gemm_nt_masked(*given, None, counted, c_dtype="float32", alpha=mine, **names)
            qs = (
                Quantized(*(Spec(x.shape, str(x.dtype)) for x in pair), kind, scale_layout="128x4", tensor_scale=t)
                for pair, t in zip(own, (None, mine), strict=True)
            )
            cugemm.grouped_matmul(*qs, counts=counted, out_dtype="float32")
        first, second = (recorded.call for recorded in calls)
        assert first == second


@pytest.mark.parametrize("layout", ["128x4", "linear"])
def test_padded_scales_may_have_more_rows(layout: str) -> None:
    """A buffer for the most rows serves fewer; what lies behind is not read."""
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 256, (200, 32)).astype(np.uint8), rng.integers(0, 256, (3, 24, 32)).astype(np.uint8)
    rows, indptr = (200 + 3 * 127) // 128 * 128, np.array([0, 70, 70, 200], np.int32)
    linear = rng.integers(0, 0x7F, (rows + 256, 4)).astype(np.uint8)
    b_scale = rng.integers(0, 0x7F, (3, 128, 4)).astype(np.uint8)[:, : 24 if layout == "linear" else 128]

    def product(rows: int) -> Array:
        shown = cases.formats.tiled(linear[:rows], layout)
        result: Array = nv4(a, b, shown, b_scale, indptr, out_dtype="float32", scale_layout=layout)
        return result

    linear[rows:] = 0x7F
    assert not np.isnan(product(rows)).any()
    for more in (128, 256):
        oracles.check_bits(product(rows + more), product(rows))


def test_skip_check_changes_nothing() -> None:
    plain = cugemm.grouped_mm_bf16(X, W, INDPTR)
    oracles.check_bits(cugemm.grouped_mm_bf16(X, W, INDPTR, skip_check=True), plain)
    functions = {name: getattr(cugemm, name) for name in cugemm.__all__ if inspect.isfunction(getattr(cugemm, name))}
    decorated = {name for name, function in functions.items() if "skip_check" in inspect.signature(function).parameters}
    groups = {"group_gemm_fp8", "group_gemm_mxfp8_mxfp4", "group_gemm_nvfp4", "group_deepgemm_fp8", "batch_deepgemm_fp8", "gemm_fp8"}
    assert {f"{name}_nt_groupwise" for name in groups} <= decorated
    assert {f"grouped_mm_{name}" for name in ("bf16", "fp8", "mxfp8", "fp4")} <= decorated
    assert {"m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked", "nvfp4_quantize_smooth", "mm_fp4", "bmm_fp8"} <= decorated


def test_deepgemm_refuses_jax() -> None:
    a, sa, b, sb, d = (jnp.asarray(x) for x in (A8, SA, B8[0], SB[0], D))
    with pytest.raises(TypeError, match=r"d is a JAX array, which is immutable; call cugemm\.gemm_fp8_nt_groupwise"):
        cugemm.fp8_gemm_nt((a, sa), (b, sb), d)


def test_quantized_operands_of_entries() -> None:
    """... bring scales that follow the rows of a, whatever the entry's own layout is."""
    rng = np.random.default_rng(9)
    x, w = rng.standard_normal((6, 256)).astype(np.float32), rng.standard_normal((3, 8, 256)).astype(np.float32)
    a8, b8 = cugemm.quantize(x, "fp8_group"), cugemm.quantize(w, "fp8_block")
    expected = cugemm.grouped_matmul(a8, b8, indptr=INDPTR)
    oracles.check_bits(g8(a8, b8, None, None, INDPTR), expected)
    oracles.check_bits(cugemm.moe_gemm_fp8_nt_groupwise(a8, b8, None, None, INDPTR), expected)
    d = np.zeros((6, 8), BF16)
    cugemm.m_grouped_fp8_gemm_nt_contiguous(a8, b8, d, np.array([0, 0, 2, 2, 2, 2], np.int32))
    oracles.check_bits(d, expected)
    mx, m4 = cugemm.quantize(x, "mxfp8", scale_layout="128x4"), cugemm.quantize(w, "mxfp4")
    oracles.check_bits(mx4(mx, m4, None, None, INDPTR), cugemm.grouped_matmul(mx, m4, indptr=INDPTR))
    a4, b4 = cugemm.quantize(x, "nvfp4"), cugemm.quantize(w, "nvfp4", scale_layout="128x4")
    expected = cugemm.grouped_matmul(a4, b4, indptr=INDPTR)
    oracles.check_bits(nv4(a4, b4, None, None, INDPTR), expected)
    oracles.check_bits(cugemm.grouped_mm_fp4(a4, b4, None, None, INDPTR), expected)


def test_the_example_runs() -> None:
    """Every error that it prints is small, and the forms of the layer agree."""
    done = subprocess.run([sys.executable, ROOT / "examples" / "moe.py"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    errors = {
        line.partition(" error ")[0]: float(line.partition(" error ")[2][:7]) for line in done.stdout.splitlines() if " error " in line
    }
    assert len(errors) == 8 and max(errors.values()) < 0.3 and errors["sorted rows:"] < 0.006
    assert "same bits again: True" in done.stdout
