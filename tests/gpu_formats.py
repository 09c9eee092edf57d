"""Operands of `format_oracles` as arrays of a device, in any layout, and products of them: for test_formats, test_gpu_formats, gpu_fuzz."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import format_oracles as formats
import gpu_arrays
import numpy as np
import oracles
from format_oracles import FORMATS, Operand, Pair
from gpu_arrays import LAYOUTS, Placed
from oracles import Array, Case

from cugemm import Quantized, arch, compile, launch
from cugemm.api.common import gemm_options, product
from cugemm.catalog import Step
from cugemm.problem import FLOATS4, FLOATS8, FLOATS16, INTEGERS, ROLES, GemmOp

A = tuple(name for name, f in FORMATS.items() if not f.zero)
B = tuple(FORMATS)
"""Formats that a product takes on either side; zero points go with b."""
OUTS = ("bfloat16", "float16", "float32")

_EVERY = (*FLOATS16, *FLOATS8, *FLOATS4, *INTEGERS)
ANY = GemmOp("any product", ROLES, _EVERY[:-1], _EVERY, ranks=(2, 3))
ANY_2D = ANY._replace(name="any product with a 2-D bias", bias_2d=True)
"""Products with everything that an entry may allow."""


class Host:
    """`gpu_arrays.Cupy` for host memory: arrays stay what they are."""

    def put(self, x: Any) -> Any:
        return x

    def place(self, x: Array) -> Placed:
        return Placed(x, x, gpu_arrays.memory_of(x)[1], x)

    def get(self, placed: Placed) -> Array:
        return placed.like

    def bytes(self, placed: Placed) -> Array:
        return gpu_arrays.memory_of(placed.like)[0]

    def fetch(self, x: Any) -> Array:
        return np.asarray(x)


def is_rehearsal() -> bool:
    """Inside `warmed`, where products are recorded and give nothing."""
    return launch._recorder.calls is not None


def jobs(*runs: Callable[[], Any]) -> dict[Any, compile.Job]:
    """The cubins of what `runs` would launch, each once."""
    with launch.recording() as calls:
        for run in runs:
            run()
    found = {}
    for recorded in calls:
        if recorded.choice is not None:
            best, target = recorded.choice.best, recorded.choice.problem.arch
            for step in best.kernel.steps(recorded.call, best.config):
                if isinstance(step, Step):
                    found[step.source, step.defines, target] = compile.Job(step.source, arch.get(target), dict(step.defines))
    return found


def compiled(found: dict[Any, compile.Job]) -> int:
    """Compile many cubins at once; how many there are."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: compile.cubin(*job), found.values()))
    return len(found)


def warmed(*runs: Callable[[], Any]) -> int:
    """Record what `runs` would launch and compile it; how many cubins there are. Later the same runs find them."""
    return compiled(jobs(*runs))


def operand(dev: Any, x: Operand, layout: str = "row", scale_layout: str = "linear", strided_scale: bool = False) -> Any:
    """A plain array, or a Quantized; `strided_scale` embeds linear scales and zero points in larger poisoned buffers."""
    data = dev.put(LAYOUTS[layout](x.data))
    if x.scale is None:
        return data
    scale, zero = x.scale, x.zero
    if x.kind.scale in ("e4m3", "e8m0"):
        scale = formats.tiled(scale, scale_layout)
    else:
        scale_layout = "linear"
    if strided_scale and scale_layout == "linear" and scale.ndim > 1:
        scale = oracles.embed(scale)
        zero = None if zero is None else oracles.embed(zero, 2, 1)
    return Quantized(
        data, dev.put(scale), x.format, tensor_scale=None if x.tensor is None else dev.put(x.tensor),
        zero=None if zero is None else dev.put(zero), scale_layout=scale_layout,
    )  # fmt: skip


def multiply(
    dev: Any, a: Operand, b: Operand, case: Case, *, layouts: tuple[str, str] = ("row", "row"), out: str = "row", dtype: str = "bfloat16",
    scale_layouts: tuple[str, str] = ("linear", "linear"), strided_scale: bool = False, shape: tuple[int, ...] | None = None,
    op: GemmOp = ANY, segments: str = "", said: Array | None = None, alpha_on_device: bool = False, backend: str = "auto",
    accumulate: str = "fast", **arrays: Array | None,
) -> Array:  # fmt: skip
    """Multiply twice: into a poisoned `out` whose surroundings must stay, and into a fresh result. Equal bits; the value of both.

    In a rehearsal, the call is recorded and the answer is the expected one.
    """
    options = gemm_options(op, dtype, backend, accumulate=accumulate, b_axes="nk", segments=segments)
    left = operand(dev, a, layouts[0], scale_layouts[0], strided_scale)
    right = operand(dev, b, layouts[1], scale_layouts[1], strided_scale)
    alpha: Any = None if case.alpha == 1 else case.alpha
    if alpha_on_device:
        alpha = dev.put(np.full((1,), case.alpha, np.float32))
    given = {name: dev.put(x) for name, x in ({**arrays, "segments": said}).items() if x is not None}
    placed = dev.place(LAYOUTS[out](oracles.poison(case.exact.shape, dtype)).reshape(shape or case.exact.shape))
    result = product(op, left, right, options, alpha=alpha, out=placed.array, **given)
    if is_rehearsal():
        return oracles.nearest(case.exact, dtype).astype(oracles.dtype_of(dtype))
    assert result is placed.array
    into = np.ascontiguousarray(dev.get(placed))
    assert gpu_arrays.untouched(dev.bytes(placed), placed), f"wrote around out; {case.repro}"
    fresh = product(op, left, right, options, alpha=alpha, **given)
    oracles.check_bits(dev.fetch(fresh), into, f"out={out!r} and a fresh result differ; {case.repro}")
    return into.reshape(case.exact.shape)


def run(dev: Any, pair: Pair, **options: Any) -> Array:
    return multiply(dev, pair.a, pair.b, pair.case, bias=pair.bias, **options)


def verify(dev: Any, pair: Pair, dtype: str = "bfloat16", **options: Any) -> None:
    """Run a pair and check it. fp8 sums may stay in the tensor cores."""
    formats.check(pair, run(dev, pair, dtype=dtype, **options), dtype, narrow=True)


def even(k: int, *names: str) -> int:
    """k as pairs of packed values need it."""
    return k + k % 2 if any(FORMATS[name].element in oracles.PACKED for name in names) else k


# --- groups -----------------------------------------------------------------------------------------------------------------------


def grouped(
    dev: Any, seed: int, kind: str, a: str, b: str, *, exact: bool, index_dtype: str = "int32", wild: float = 0.125, **options: Any
) -> None:
    """Make, run and check one grouped product: kind is a key of `GROUPS`; sizes, indices out of range and bias follow from the seed."""
    rng = np.random.default_rng([seed, list(GROUPS).index(kind)])
    experts, n, k = int(rng.integers(1, 6)), int(rng.integers(1, 150)), even(int(rng.integers(1, 300)), a, b)
    rows = int(rng.integers(1, 90))
    masked = kind == "masked"
    pair = formats.make(seed, rows, n, k, a, b, exact=exact, **({"batch": (experts,)} if masked else {"experts": experts}))
    said, expert, source, counts, arrays = GROUPS[kind](rng, rows, experts, wild)
    bias = None
    if seed % 3:
        bias = rng.integers(-8, 9, (n,) if seed % 3 == 1 else (experts, n)).astype(np.float32)
    case = formats.answer(
        pair.a, pair.b, bias=bias, expert=expert, source=source, counts=counts, alpha=(1.0, 0.5, -2.0)[seed % 3],
        random_signs=not exact, repro=f"grouped(dev, {seed}, {kind!r}, {a!r}, {b!r}, exact={exact}, index_dtype={index_dtype!r})",
    )  # fmt: skip
    arrays = {name: x.astype(index_dtype) for name, x in arrays.items()}
    shape = (*said.shape, n) if kind == "top-k" else None
    dtype = OUTS[seed % 3 if exact else 2]
    out = multiply(
        dev, pair.a, pair.b, case, dtype=dtype, segments=_SEGMENTS[kind], said=said.astype(index_dtype), bias=bias, shape=shape, **arrays,
        **options,
    )  # fmt: skip
    formats.check(pair, out, dtype, case, narrow=True)


def padded_segments(dev: Any, name: str, kind: str, pad: int, edges: list[int]) -> None:
    """Scales of a whose segments begin at multiples of `pad` rows, NaN between them."""
    bounds, m, experts = np.array(edges), edges[-1], len(edges) - 1
    pair = formats.make(10, m, 33, 256, name, "e4m3", exact=True, experts=experts)
    own, linear = FORMATS[name], pair.a.scale
    assert linear is not None
    coded = own.scale != "fp32"
    scale = oracles.poison(((m + experts * (pad - 1)) // pad * pad, linear.shape[1]), linear.dtype.name)
    for s in range(experts):
        start = (edges[s] + s * (pad - 1)) // pad * pad
        scale[start : start + edges[s + 1] - edges[s]] = linear[edges[s] : edges[s + 1]]
    repro = f"padded_segments(dev, {name!r}, {kind!r}, {pad}, {edges})"
    case = formats.answer(pair.a, pair.b, expert=_expert_of(m, bounds), repro=repro)
    said = (bounds if kind == "indptr" else np.diff(bounds)).astype(np.int32)
    for layout in ("linear", "128x4", "8x4") if coded else ("linear",):
        options = gemm_options(
            ANY, None, a_element=own.element, a_block=None if coded else own.block, a_scale_element=own.scale if coded else "",
            a_scale_layout=layout, a_scale_rows=f"pad{pad}", b_axes="nk", segments=kind,
        )  # fmt: skip
        arrays = {"a_scale": formats.tiled(scale, layout), "a_tensor": pair.a.tensor, "segments": said}
        placed = {name: dev.put(x) for name, x in arrays.items() if x is not None}
        out = product(ANY, dev.put(pair.a.data), dev.put(pair.b.data), options, **placed)
        if not is_rehearsal():
            oracles.check_exact(case, dev.fetch(out), "bfloat16")


def _indptr(rng: np.random.Generator, m: int, experts: int, wild: float) -> Any:
    edges = np.sort(rng.integers(0, m + 1, experts + 1))
    return edges, _expert_of(m, edges), None, None, {}


def _expert_of(m: int, edges: Array) -> Array:
    row = np.arange(m)
    expert = np.searchsorted(edges, row, side="right") - 1
    return np.where((expert >= 0) & (row < edges[-1]), expert, -1)


def _lens(rng: np.random.Generator, m: int, experts: int, wild: float) -> Any:
    edges = np.sort(rng.integers(0, m + 1, experts + 1))
    edges[0] = 0
    return np.diff(edges), _expert_of(m, edges), None, None, {}


def _weighted(rng: np.random.Generator, m: int, experts: int, wild: float) -> Any:
    edges = np.sort(rng.integers(0, m + 1, experts + 4))
    chosen = _wild(rng, experts, experts + 3, wild)
    segment = _expert_of(m, edges)
    return edges, np.where(segment < 0, -1, chosen[segment]), None, None, {"experts": chosen}


def _wild(rng: np.random.Generator, bound: int, size: Any, wild: float) -> Array:
    """Indices of which the share `wild` is out of [0, bound)."""
    return np.where(rng.random(size) < wild, rng.choice([-1, -7, bound, bound + 5], size), rng.integers(0, bound, size))


def _indices(rng: np.random.Generator, m: int, experts: int, wild: float) -> Any:
    expert = _wild(rng, experts, m, wild)
    return expert, expert, None, None, {}


def _top_k(rng: np.random.Generator, m: int, experts: int, wild: float) -> Any:
    chosen = _wild(rng, experts, (m, int(rng.integers(1, 5))), wild)
    return chosen, chosen.reshape(-1), np.repeat(np.arange(m), chosen.shape[1]), None, {}


def _gathered(rng: np.random.Generator, m: int, experts: int, wild: float) -> Any:
    rows = _wild(rng, m, int(rng.integers(1, 120)), wild)
    edges = np.sort(rng.integers(0, len(rows) + 1, experts + 1))
    return edges, _expert_of(len(rows), edges), rows, None, {"rows": rows}


def _gathered_indices(rng: np.random.Generator, m: int, experts: int, wild: float) -> Any:
    rows = _wild(rng, m, int(rng.integers(1, 120)), wild)
    expert = _wild(rng, experts, len(rows), wild)
    return expert, expert, rows, None, {"rows": rows}


def _masked(rng: np.random.Generator, m: int, experts: int, wild: float) -> Any:
    counts = np.where(rng.random(experts) < wild, rng.choice([-3, m + 9], experts), rng.integers(0, m + 1, experts))
    return counts, None, None, counts, {}


GROUPS = {
    "indptr": _indptr, "lens": _lens, "weights": _weighted, "indices": _indices, "top-k": _top_k, "rows": _gathered,
    "rows by index": _gathered_indices, "masked": _masked,
}  # fmt: skip
"""(rng, m, experts, share of indices out of range) -> what says which rows go where, expert of each row of the result, its row of a,
counts, and further arrays."""
_SEGMENTS = {
    "indptr": "indptr", "lens": "lens", "weights": "indptr", "indices": "indices", "top-k": "indices", "rows": "indptr",
    "rows by index": "indices", "masked": "masked",
}  # fmt: skip


# --- codes ------------------------------------------------------------------------------------------------------------------------


def every_scale_code(name: str, k: int, columns: int = 8, where: str = "middle", other: str = "bf16") -> tuple[Operand, Operand, Case]:
    """256 rows under scale code i, in one block in the `middle` with code 1.0 around it or `everywhere`, times small columns.

    The values summed are those of float32, so that 2**128 and more is inf; NaN codes make NaN of their row.
    """
    kind = FORMATS[name]
    rng = np.random.default_rng(k)
    like = formats.random_operand(rng, name, (256, k))
    assert like.scale is not None
    scale = np.full(like.scale.shape, 0x38 if kind.scale == "e4m3" else 127, np.uint8)
    scale[:, slice(None) if where == "everywhere" else slice(scale.shape[1] // 2, scale.shape[1] // 2 + 1)] = np.arange(256)[:, None]
    tensor = None if like.tensor is None else np.ones_like(like.tensor)
    with np.errstate(all="ignore"):
        exact = formats.values(name, like.data, scale, tensor).astype(np.float32).astype(np.float64)
    x = Operand(name, like.data, scale, tensor, None, exact)
    y = formats.random_operand(rng, other, (columns, k))
    repro = f"every_scale_code({name!r}, {k}, {columns}, {where!r}, {other!r})"
    return x, y, formats.answer(x, y, random_signs=True, repro=repro)


# --- frameworks -------------------------------------------------------------------------------------------------------------------

CUDA = "cuda"


class Torch:
    """Arrays as tensors of the same strides and alignment."""

    def __init__(self) -> None:
        import torch

        self.torch = torch

    def put(self, x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        raw, offset = gpu_arrays.memory_of(x)
        size = x.dtype.itemsize
        memory = self.torch.from_numpy(raw).to(CUDA)
        pieces = memory[offset : offset + (raw.size - offset) // size * size]
        dtype = getattr(self.torch, x.dtype.name)
        flat = self.torch.empty(0, dtype=dtype, device=memory.device) if x.size == 0 else self.whole(pieces, size).view(dtype)
        return flat.as_strided(x.shape, [step // size for step in x.strides])

    def whole(self, pieces: Any, size: int) -> Any:
        """Bytes that begin at a multiple of `size`; torch views no others as wider elements."""
        assert pieces.data_ptr() % size == 0, f"an array of {size}-byte elements at an odd address"
        return pieces

    def fetch(self, x: Any) -> Array:
        name = str(x.dtype).removeprefix("torch.")
        # NOTE: an axis of length 1 may keep any stride in `contiguous`, and torch views no such array as bytes.
        plain = x.detach().contiguous().reshape(-1).view(self.torch.uint8).cpu().numpy()
        return np.asarray(plain.view(oracles.dtype_of(name)).reshape(tuple(x.shape)))


class Dlpack(Torch):
    """Objects that offer their memory and nothing else; results are CuPy's, on the host NumPy's."""

    def put(self, x: Any) -> Any:
        return Hidden(super().put(x)) if isinstance(x, np.ndarray) else x

    def fetch(self, x: Any) -> Array:
        return x if isinstance(x, np.ndarray) else gpu_arrays.Cupy().fetch(x)


class Hidden:
    def __init__(self, x: Any) -> None:
        self._x = x

    def __dlpack__(self, **options: Any) -> Any:
        return self._x.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._x.__dlpack_device__()


class Jax:
    """Row-major arrays; JAX has no others."""

    def __init__(self) -> None:
        import jax

        self.numpy = jax.numpy

    def put(self, x: Any) -> Any:
        return self.numpy.asarray(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x

    def fetch(self, x: Any) -> Array:
        return np.asarray(x)


FRAMEWORKS: dict[str, Callable[[], Any]] = {"cupy": gpu_arrays.Cupy, "torch": Torch, "dlpack": Dlpack, "jax": Jax}


def usable(name: str) -> bool:
    """Whether a framework is installed and computes on the GPU."""
    module = "torch" if name == "dlpack" else name
    if name != "cupy" and importlib.util.find_spec(module) is None:
        return False
    if name != "jax" or CUDA == "cpu":
        return True
    Jax()
    import jax

    return bool(jax.default_backend() == "gpu")
