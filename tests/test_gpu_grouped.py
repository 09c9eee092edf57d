"""Grouped products on a GPU: every entry in CuPy, PyTorch and JAX against float64, a mixture of experts, graphs whose groups change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu_arrays
import grouped_cases as cases
import ml_dtypes
import numpy as np
import oracles
import pytest
from grouped_cases import ENTRIES, MATMULS, PAIRS, Framework

import cugemm

pytestmark = pytest.mark.gpu

BF16 = ml_dtypes.bfloat16
CUDA = "cuda"


def _cupy() -> Framework:
    dev = gpu_arrays.Cupy()
    return Framework("cupy", dev.put, dev.fetch)


def _torch() -> Framework:
    torch = pytest.importorskip("torch")

    def put(x: Any) -> Any:
        plain = np.ascontiguousarray(x)
        if x.dtype.name == "bfloat16" or x.dtype.name.startswith("float8"):
            plain = plain.view(np.uint8 if x.itemsize == 1 else np.int16)
        return torch.from_numpy(plain.copy()).to(CUDA).view(getattr(torch, x.dtype.name))

    def get(x: Any) -> Any:
        return x.cpu().view(torch.int16).numpy().view(BF16) if x.dtype is torch.bfloat16 else x.cpu().numpy()

    return Framework("torch", put, get)


def _jax(jit: bool) -> Framework:
    jax = pytest.importorskip("jax")
    if CUDA == "cuda" and jax.default_backend() != "gpu":
        pytest.skip("needs jax with CUDA")
    return Framework("jit" if jit else "jax", jax.numpy.asarray, np.asarray, jit=jit, writes=False)


MAKERS: dict[str, Callable[[], Framework]] = {"cupy": _cupy, "torch": _torch, "jax": lambda: _jax(False), "jit": lambda: _jax(True)}


@pytest.fixture(scope="module", params=MAKERS)
def framework(request: pytest.FixtureRequest) -> Framework:
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def cupy() -> Framework:
    return _cupy()


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("kind", MATMULS)
def test_grouped_matmul(kind: str, pair: tuple[str, str], cupy: Framework) -> None:
    for seed in range(6):
        MATMULS[kind](cupy, seed, *pair, ("int32", "int64")[seed % 2], seed < 4)


@pytest.mark.parametrize("kind", MATMULS)
def test_grouped_matmul_in_frameworks(kind: str, framework: Framework) -> None:
    for seed, pair in enumerate((("bf16", "bf16"), ("fp8_row", "nvfp4"), ("mxfp8", "uint4_g32"))):
        MATMULS[kind](framework, seed, *pair, "int32")


@pytest.mark.parametrize("name", ENTRIES)
def test_entries(name: str, framework: Framework) -> None:
    if name == "deepgemm" and not framework.writes:
        pytest.skip("needs arrays that can be written to")
    for seed in range(6 if framework.name == "cupy" else 2):
        ENTRIES[name](framework, seed, ("int32", "int64")[seed % 2])


@pytest.mark.parametrize("kind", ["bf16", "fp8_row", "nvfp4"])
def test_moe_layer(kind: str, framework: Framework) -> None:
    for seed, shape in enumerate(((64, 512, 256, 16, 4), (1, 256, 192, 8, 2), (300, 130, 66, 64, 2), (17, 256, 128, 512, 8))):
        cases.run_layer(framework, cases.layer(seed, *shape, kind, ("int32", "int64")[seed % 2]))


@pytest.mark.parametrize("index", ["int32", "int64"])
def test_wrong_device_values_select_nothing(index: str, cupy: Framework) -> None:
    for seed in range(20):
        cases.wild(cupy, seed, index)


@pytest.mark.parametrize("groups", [1, 2, 129, 512])
def test_many_groups(groups: int, cupy: Framework) -> None:
    """Segments, lengths, indices and masks agree bit for bit, and with the reference."""
    rng = np.random.default_rng(groups)
    m = 700
    x, w = rng.standard_normal((m, 80)).astype(BF16), rng.standard_normal((groups, 72, 80)).astype(BF16)
    part = cases.segments(rng, m, groups, "int32", gaps=False)
    y = cupy.call(cugemm.grouped_matmul, x, w, indptr=part.indptr)
    exact = np.einsum("mk,mnk->mn", x.astype(float), w.astype(float)[part.expert])
    peak = np.einsum("mk,mnk->mn", np.abs(x.astype(float)), np.abs(w.astype(float)[part.expert]))
    assert (np.abs(y.astype(float) - exact) <= np.abs(exact) * 2.0**-8 + peak * 80 * 2.0**-22).all()
    for kind, said in (("counts", part.lens.astype(np.int32)), ("indices", part.expert.astype(np.int64))):
        oracles.check_bits(cupy.call(cugemm.grouped_matmul, x, w, **{kind: said}), y, kind)
    capacity = int(part.lens.max())
    slots = np.full((groups, capacity, 80), np.nan, BF16)
    for g in range(groups):
        slots[g, : part.lens[g]] = x[part.indptr[g] : part.indptr[g + 1]]
    masked = cupy.call(cugemm.grouped_matmul, slots, w, counts=part.lens.astype(np.int32))
    got = np.concatenate([masked[g, : part.lens[g]] for g in range(groups)]).astype(float)
    assert (np.abs(got - exact) <= np.abs(exact) * 2.0**-8 + peak * 80 * 2.0**-22).all()
    assert all((masked[g, part.lens[g] :] == 0).all() for g in range(groups))


def test_masked_outs_of_any_strides(cupy: Framework) -> None:
    """Only the result is cleared and written, wherever its matrices, rows and columns lie."""
    dev = gpu_arrays.Cupy()
    rng = np.random.default_rng(11)
    x, w = rng.standard_normal((3, 5, 32)).astype(BF16), rng.standard_normal((3, 8, 32)).astype(BF16)
    counts = np.array([4, 0, 2], np.int64)
    expected = cupy.call(cugemm.grouped_matmul, x, w, counts=counts)
    for out in cases.masked_outs():
        placed = dev.place(out)
        cugemm.grouped_matmul(dev.put(x), dev.put(w), counts=dev.put(counts), out=placed.array)
        oracles.check_bits(np.ascontiguousarray(dev.get(placed)), expected)
        assert gpu_arrays.untouched(dev.bytes(placed), placed), out.strides


# --- graphs -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bf16", "fp8_row", "nvfp4"])
@pytest.mark.parametrize("form", ["top-k", "activations", "packed", "masked", "deepgemm"])
def test_graph_whose_groups_change(kind: str, form: str) -> None:
    """Captured once, replayed with other tokens, experts, weights and counts: the bits of an ordinary call, and right."""
    f = _torch()
    torch = pytest.importorskip("torch")
    first = cases.layer(1, 48, 256, 128, 8, 2, kind)
    others = [cases.layer(seed, 48, 256, 128, 8, 2, kind) for seed in (2, 3)]
    w13, w2 = f.take(first.w13), f.take(first.w2)
    place, call, check = GRAPHS[form](f, first, w13, w2)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for tokens in (first, *others, first):
        part = tokens._replace(w13=first.w13, w2=first.w2)
        place(part)
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        replayed = f.get(y).copy()
        oracles.check_bits(replayed, f.get(call()), form)
        check(part, replayed)


Graph = tuple[Callable[[cases.Layer], None], Callable[[], Any], Callable[[cases.Layer, Any], None]]


def _top_k(f: Framework, part: cases.Layer, w13: Any, w2: Any, activations: str | None = None) -> Graph:
    """(put another layer's inputs into the captured arrays, the call, the check)."""
    held = [f.put(x) for x in (part.x, part.indices, part.weights)]

    def place(new: cases.Layer) -> None:
        for old, x in zip(held, (new.x, new.indices, new.weights), strict=True):
            old.copy_(f.put(x))

    def call() -> Any:
        x, indices, weights = held
        h = cugemm.silu_and_mul(cugemm.grouped_matmul(x, w13, indices=indices, activations=activations))
        return cugemm.grouped_matmul(h, w2, indices=indices, weights=weights, activations=activations)

    def close(new: cases.Layer, out: Any) -> None:
        if activations is None:
            cases.check_layer(new, out)
        else:
            exact = cases.exact_layer(new)
            assert np.linalg.norm(out.astype(float) - exact) <= 0.08 * np.linalg.norm(exact)

    return place, call, close


def _packed(f: Framework, part: cases.Layer, w13: Any, w2: Any) -> Graph:
    held = [f.put(x) for x in (part.x, *cases.sorted_by_expert(part), part.weights)]

    def place(new: cases.Layer) -> None:
        for old, x in zip(held, (new.x, *cases.sorted_by_expert(new), new.weights), strict=True):
            old.copy_(f.put(x))

    def call() -> Any:
        x, rows, indptr, places, weights = held
        return cases.packed(x, w13, w2, rows, indptr, places, weights)

    return place, call, cases.check_layer


def _masked_inputs(part: cases.Layer) -> tuple[Any, Any]:
    """Tokens sorted into the slots of their first expert: [experts, 48, d] and how many each has."""
    experts = len(part.w13.data)
    counts = np.bincount(part.indices[:, 0], minlength=experts).astype(np.int32)
    slots = np.full((experts, len(part.x), part.x.shape[1]), np.nan, BF16)
    for e in range(experts):
        slots[e, : counts[e]] = part.x[part.indices[:, 0] == e]
    return slots, counts


def _masked_check(part: cases.Layer, out: Any) -> None:
    slots, counts = _masked_inputs(part)
    for e, count in enumerate(counts):
        x, w = slots[e, :count].astype(float), part.w13.values[e]
        bound = np.abs(x @ w.T) * 2.0**-8 + (np.abs(x) @ np.abs(w).T) * 2 * x.shape[1] * 2.0**-23
        assert (np.abs(out[e, :count].astype(float) - x @ w.T) <= bound).all()
        assert not out[e, count:].any()


def _masked(f: Framework, part: cases.Layer, w13: Any, w2: Any) -> Graph:
    held = [f.put(x) for x in _masked_inputs(part)]

    def place(new: cases.Layer) -> None:
        for old, x in zip(held, _masked_inputs(new), strict=True):
            old.copy_(f.put(x))

    return place, lambda: cugemm.grouped_matmul(held[0], w13, counts=held[1]), _masked_check


def _deepgemm(f: Framework, part: cases.Layer, w13: Any, w2: Any) -> Graph:
    """fp8 operands of any kind of layer: m_indices change, -1 marks padding."""
    rng = np.random.default_rng(12)
    size = cases.Sizes(96, 200, 384, 8)
    a, b = cases.operands(rng, size, "fp8_group", "fp8_block", True)
    both = [(f.put(x.data), f.put(x.scale)) for x in (a, b)]
    indices, d = f.put(np.zeros(96, np.int32)), f.put(oracles.poison((96, 200), "bfloat16"))

    def chosen(new: cases.Layer) -> Any:
        return np.where(new.indices.reshape(-1) % 3 == 0, -1, new.indices.reshape(-1)).astype(np.int32)

    def call() -> Any:
        cugemm.m_grouped_fp8_gemm_nt_contiguous(*both, d, indices)
        return d

    return (
        lambda new: indices.copy_(f.put(chosen(new))),
        call,
        lambda new, out: cases.verify(out, a, b, True, expert=chosen(new)),
    )


GRAPHS: dict[str, Callable[..., Graph]] = {
    "top-k": _top_k, "activations": lambda *args: _top_k(*args, "fp8_row"), "packed": _packed, "masked": _masked, "deepgemm": _deepgemm,
}  # fmt: skip


def test_cupy_graph(cupy: Framework) -> None:
    """A grouped product with int64 indices, whose scratch comes from CuPy's pool, captured and replayed with other indices."""
    dev = gpu_arrays.Cupy()
    rng = np.random.default_rng(13)
    size = cases.Sizes(50, 96, 128, 5)
    a, b = cases.operands(rng, size, "bf16", "nvfp4", True)
    x, w, out = dev.put(a.data), cupy.take(b), dev.put(oracles.poison((50, 96), "bfloat16"))
    indices = dev.put(rng.integers(0, 5, 50))
    with dev.cupy.cuda.Stream(non_blocking=True) as stream:
        cugemm.grouped_matmul(x, w, indices=indices, out=out)
        stream.synchronize()
        stream.begin_capture()
        assert cugemm.grouped_matmul(x, w, indices=indices, out=out) is out
        graph = stream.end_capture()
        for seed in range(3):
            new = np.random.default_rng(seed).integers(-1, 6, 50)
            indices[...] = dev.put(new)
            graph.launch(stream)
            stream.synchronize()
            cases.verify(dev.fetch(out), a, b, True, expert=new)
