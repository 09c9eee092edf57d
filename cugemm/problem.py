"""What is asked: operands and options become a checked `Call`, or an error in words.

`GemmOp.check` looks at shapes, dtypes, scales, layouts and `out`, and raises every error a caller can cause. What passes is a `Call`: the
product in the words that kernels and the reference share (a [batch, m, k], b [batch, k, n], strides of every array), holding a `Problem`,
the part that selection and the plan cache see. Nothing here touches memory or knows a framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cugemm.arrays import View, dense_strides, itemsize
from cugemm.formats import ALL, BF16, BY_DTYPE, E2M1, E2M1X2, E4M3, E5M2, ELEMENTS, FP16, Element

Argument = View | float | None
ArraySpec = tuple[tuple[int, ...], str]

FLOATS16 = (BF16.name, FP16.name)
FLOATS8 = (E4M3.name, E5M2.name)
FLOATS4 = (E2M1.name, E2M1X2.name)
OUT_DTYPES = ("bfloat16", "float16", "float32")
SCALE_DTYPES = ("float32", "float16", "bfloat16")
INDEX_DTYPES = ("int32", "int64")
ACCUMULATE = ("fast", "promoted", "fp32")

A, B, A_SCALE, B_SCALE, ALPHA, BIAS, SEGMENTS, EXPERTS, OUT = range(9)
"""Positions of a product's array arguments; `GemmOp.roles` names them for messages."""

_LONGEST = 2**30
"""Axes must be shorter: kernels count the bytes of a row of 16-bit values in an int."""

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


def bucket(m: int) -> int:
    """The class of m that shares a plan: the smallest bucket that holds it."""
    for size in BUCKETS:
        if m <= size:
            return size
    return BUCKETS[-1]


class Problem(NamedTuple):
    """The question that selection answers and the key of the plan cache; m is `bucket(m)`."""

    m: int
    n: int
    k: int
    batch: int
    grouped: bool
    a: str
    b: str
    a_major: str
    b_major: str
    vector: bool
    block_scaled: bool
    out: str
    accumulate: str
    backend: str
    arch: str = ""
    device: int = 0

    def __str__(self) -> str:
        where = f" on {self.arch}" if self.arch else ""
        return f"{self.a} x {self.b} -> {self.out}{where}"


class Scale(NamedTuple):
    """A scale as [batch, row blocks, k blocks] with element strides, 0 where it repeats; `block` = (rows, k) values under one scale."""

    shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    block: tuple[int, int]
    dtype: str

    @property
    def by_k(self) -> bool:
        """Whether it changes along k or covers several rows, so that it cannot wait for the epilogue."""
        return self.block[1] != ALL or self.block[0] not in (ALL, 1)


class GemmOptions(NamedTuple):
    """Everything about a product that is no array; values survive JSON."""

    a_element: str | None = None
    b_element: str | None = None
    a_block: tuple[int, int] | None = None
    b_block: tuple[int, int] | None = None
    b_axes: str = "kn"
    a_scale_axes: str = "mk"
    b_scale_axes: str = ""  # empty: the axes of b
    out_dtype: str | None = None
    accumulate: str = "fast"
    segments: str = ""  # what SEGMENTS holds: "indices", "indptr" or "lens"
    backend: str = "auto"


class GemmCall(NamedTuple):
    """One checked product. Strides: (batch, row, k) for a, (batch, column, k) for b, (batch, row, column) for out, in stored elements."""

    problem: Problem
    outputs: tuple[ArraySpec, ...]
    workspaces: tuple[ArraySpec, ...]
    m: int
    n: int
    k: int
    batch: int
    experts: int
    a_strides: tuple[int, int, int]
    b_strides: tuple[int, int, int]
    out_strides: tuple[int, int, int]
    a_scale: Scale | None
    b_scale: Scale | None
    alpha_dtype: str | None
    bias_dtype: str | None
    segments: str
    segment_dtype: str | None
    expert_dtype: str | None

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k * (1 if self.segments else self.batch)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def contiguous_hint(role: str) -> str:
    return f"pass {role} as a contiguous copy"


class GemmOp(NamedTuple):
    """A public product: what it is called, what its arguments are called, what it accepts."""

    name: str
    roles: tuple[str, ...]
    a_elements: tuple[str, ...]
    b_elements: tuple[str, ...]
    ranks: tuple[int, ...] = (2,)
    blocks: tuple[tuple[int, int], ...] = ((1, 128), (128, 128))

    # -- helpers ---------------------------------------------------------------------------------------------------------------

    def error(self, text: str) -> ValueError:
        return ValueError(f"{self.name}: {text}")

    def wrong_type(self, text: str) -> TypeError:
        return TypeError(f"{self.name}: {text}")

    def array(self, views: tuple[Argument, ...], position: int) -> View:
        view = views[position]
        if not isinstance(view, View):
            shown = "missing" if view is None else f"the scalar {type(view).__name__}"
            raise self.wrong_type(f"{self.roles[position]} is {shown}; pass an array.")
        return view

    def element(self, view: View, position: int, declared: str | None) -> Element:
        """The element of an operand: its dtype says it, or, for uint8 payloads, the caller did."""
        role, allowed = self.roles[position], (self.a_elements, self.b_elements)[position]
        payload = view.dtype in ("uint8", "float4_e2m1fn_x2")
        if view.dtype == "float4_e2m1fn_x2":  # says itself that it is packed, whatever its shape was taken for
            declared = E2M1X2.name
        found = BY_DTYPE.get(view.dtype) if declared is None else ELEMENTS[declared]
        if payload and declared is None:
            raise self.wrong_type(
                f"{role} is {view.dtype}, which does not say what its bytes mean (e4m3 or e5m2? fp4?); "
                f"pass {role}.view(float8_e4m3fn dtype), or a cugemm.Quantized, which names the format."
            )
        if found is None or found.name not in allowed:
            wanted = ", ".join(sorted({ELEMENTS[name].dtype for name in allowed}))
            raise self.wrong_type(f"{role} is {view.dtype}; wanted {wanted}; cast it, or quantise it with cugemm.quantize.")
        if declared is not None and not payload and view.dtype != found.dtype:
            raise self.wrong_type(f"{role} is {view.dtype}, but {found.name} is stored as {found.dtype}; pass the payload in that dtype.")
        return found

    # -- operands --------------------------------------------------------------------------------------------------------------

    def check(self, views: tuple[Argument, ...], options: GemmOptions) -> GemmCall:
        """The checked call, or ValueError / TypeError with the argument's name, its value and the fix."""
        a, b = self.array(views, A), self.array(views, B)
        a_element, b_element = self.element(a, A, options.a_element), self.element(b, B, options.b_element)
        if options.accumulate not in ACCUMULATE:
            raise self.error(f"accumulate is {options.accumulate!r}; wanted one of {', '.join(map(repr, ACCUMULATE))}.")
        grouped = bool(options.segments)
        for view, position in ((a, A), (b, B)):
            ranks = ((2,), (3,))[position] if grouped else self.ranks
            if len(view.shape) not in ranks:
                wanted = " or ".join(f"{rank}-D" for rank in ranks)
                raise self.error(f"{self.roles[position]} has shape {view.shape}; wanted a {wanted} array.")
        a_axes, b_axes = (-2, -1), ((-1, -2) if options.b_axes == "kn" else (-2, -1))
        m, k_a, a_strides, batch_a = self.matrix(a, a_axes, a_element)
        n, k_b, b_strides, batch_b = self.matrix(b, b_axes, b_element)
        if k_a != k_b:
            packed = "".join(
                f" ({self.roles[p]} is packed, two values a byte)" for p, e in ((A, a_element), (B, b_element)) if e.per_byte > 1
            )
            fix = f"pass {self.roles[B]}.T" if n == k_a and len(b.shape) == 2 else "they must agree"
            raise self.error(
                f"{self.roles[A]} {a.shape} has k = {k_a}, but {self.roles[B]} {b.shape} "
                f"read as [{options.b_axes[0]}, {options.b_axes[1]}] has k = {k_b}{packed}; {fix}."
            )
        batch, experts = self.batches(a, b, batch_a, batch_b, grouped)
        a_scale = self.scale(views[A_SCALE], A_SCALE, m, k_a, batch_a, options.a_scale_axes == "mk", options.a_block, a)
        b_scale_axes = options.b_scale_axes or options.b_axes
        b_scale = self.scale(views[B_SCALE], B_SCALE, n, k_a, batch_b, b_scale_axes == "nk", options.b_block, b)
        alpha_dtype = self.one_element(views[ALPHA], ALPHA)
        bias_dtype = self.bias(views[BIAS], n)
        segment_dtype, expert_dtype, segments = self.segments(views, options, m, experts)
        out_dtype = self.out_dtype(views[OUT], options, a_element)
        out_shape = (*((batch,) if max(len(a.shape), 0 if grouped else len(b.shape)) == 3 else ()), m, n)
        out_strides = self.out(views[OUT], out_shape, out_dtype)
        if m * n and max(m, n, k_a) >= _LONGEST:
            raise self.error(f"an axis of {max(m, n, k_a)} is too long; m, n and k must be below 2**30.")
        block_scaled = any(s is not None and s.by_k for s in (a_scale, b_scale))
        a_major, b_major, vector = self.layout((a, a_strides, a_element), (b, b_strides, b_element), grouped)
        problem = Problem(
            bucket(m), n, k_a, segments if grouped else batch, grouped, a_element.name, b_element.name,
            a_major, b_major, vector, block_scaled, out_dtype, options.accumulate, options.backend,
        )  # fmt: skip
        workspaces = _segment_workspaces(options.segments, segment_dtype, expert_dtype, m, segments)
        return GemmCall(
            problem, ((out_shape, out_dtype),), workspaces, m, n, k_a, segments if grouped else batch, experts, a_strides, b_strides,
            out_strides, a_scale, b_scale, alpha_dtype, bias_dtype, options.segments, segment_dtype, expert_dtype,
        )  # fmt: skip

    def matrix(self, view: View, axes: tuple[int, int], element: Element) -> tuple[int, int, tuple[int, int, int], int]:
        """(rows, k, strides as (batch, row, k), batch) of an operand; strides of axes of length 1 count as 0."""
        row, k = axes
        steps = [0 if n == 1 else s for n, s in zip(view.shape, view.strides, strict=True)]
        batched = len(view.shape) == 3
        k_step = steps[k] if view.shape[k] > 1 else 1
        return (
            view.shape[row],
            view.shape[k] * element.per_byte,
            (steps[0] if batched else 0, steps[row], k_step),
            (view.shape[0] if batched else 1),
        )

    def batches(self, a: View, b: View, batch_a: int, batch_b: int, grouped: bool) -> tuple[int, int]:
        if grouped:
            return 1, batch_b
        if batch_a != batch_b and 1 not in (batch_a, batch_b):
            raise self.error(
                f"{self.roles[A]} {a.shape} has {batch_a} batches, but {self.roles[B]} {b.shape} has {batch_b}; "
                "they must agree, or one be 1."
            )
        return (batch_b if batch_a == 1 else batch_a), 1

    def layout(
        self,
        a: tuple[View, tuple[int, int, int], Element],
        b: tuple[View, tuple[int, int, int], Element],
        grouped: bool,
    ) -> tuple[str, str, bool]:
        """Which axis of each operand is contiguous, and whether both can be read in 16-byte pieces."""
        a_major, a_vector = _major(*a)
        b_major, b_vector = _major(*b)
        if grouped and (a_major == "mn" or a[0].span() >= 2**36):
            a_vector = False  # segments begin anywhere, so pieces along m would straddle them; and rows are found from the start of a
        return (a_major, b_major, True) if a_vector and b_vector else ("k", "k", False)

    # -- scales, epilogue ------------------------------------------------------------------------------------------------------

    def scale(
        self, view: Argument, position: int, rows: int, k: int, batch: int, row_first: bool, declared: tuple[int, int] | None, operand: View
    ) -> Scale | None:  # fmt: skip
        """How a scale covers its operand, read from its shape (R18): one element, per row, or per block of `self.blocks`."""
        if not isinstance(view, View):
            return None
        role, of = self.roles[position], self.roles[position - 2]
        if declared is not None and declared[1] not in (ALL, 128):
            raise self.error(f"{of} is of a format with one scale for each {_block_text(declared)} values; along k it must be 128 or all.")
        if view.dtype not in SCALE_DTYPES:
            raise self.wrong_type(f"{role} is {view.dtype}; wanted {', '.join(SCALE_DTYPES)}.")
        if view.size == 1 and (declared is None or _blocks(rows, k, declared) == (1, 1)):
            return Scale((1, 1, 1), (0, 0, 0), (ALL, ALL), view.dtype)
        axes = (-2, -1) if row_first else (-1, -2)
        if len(view.shape) == 1 and declared in (None, (1, ALL)) and view.shape == (rows,):
            return Scale((1, rows, 1), (0, view.strides[0], 0), (1, ALL), view.dtype)
        if len(view.shape) == 2 or (len(view.shape) == 3 and view.shape[0] in (1, batch)):
            got = (view.shape[axes[0]], view.shape[axes[1]])
            steps = [0 if n == 1 else s for n, s in zip(view.shape, view.strides, strict=True)]
            strides = (steps[0] if len(view.shape) == 3 else 0, steps[axes[0]], steps[axes[1]])
            for block in (declared,) if declared else ((ALL, ALL), (1, ALL), *self.blocks):
                if got == _blocks(rows, k, block):
                    return Scale((view.shape[0] if len(view.shape) == 3 else 1, *got), strides, block, view.dtype)
        raise self.error(
            f"{role} has shape {view.shape}, but {of} is {operand.shape}; wanted {self.scale_shapes(rows, k, row_first, declared)}."
        )

    def scale_shapes(self, rows: int, k: int, row_first: bool, declared: tuple[int, int] | None) -> str:
        def shape(block: tuple[int, int]) -> str:
            first, second = _blocks(rows, k, block)
            return f"({first}, {second})" if row_first else f"({second}, {first})"

        if declared is not None:
            return f"{shape(declared)}, one scale for each {_block_text(declared)} of its format"
        named = [f"({rows},) or {shape((1, ALL))} for one per row" if row_first else f"({rows},) or {shape((1, ALL))} for one per column"]
        named += [f"{shape(block)} for one per {_block_text(block)} along (rows, k)" for block in self.blocks]
        return ", ".join(["one element", *named])

    def one_element(self, view: Argument, position: int) -> str | None:
        if not isinstance(view, View):
            return None
        if view.dtype not in SCALE_DTYPES or view.size != 1:
            raise self.error(
                f"{self.roles[position]} is {view.dtype} of shape {view.shape}; "
                f"wanted a Python float or one element of {', '.join(SCALE_DTYPES)}."
            )
        return view.dtype

    def bias(self, view: Argument, n: int) -> str | None:
        if view is None:
            return None
        if not isinstance(view, View):
            raise self.wrong_type(f"{self.roles[BIAS]} is a {type(view).__name__}; pass an array of shape ({n},).")
        if view.shape != (n,):
            raise self.error(f"{self.roles[BIAS]} has shape {view.shape}, but the result has n = {n} columns; wanted ({n},).")
        if view.dtype not in SCALE_DTYPES:
            raise self.wrong_type(f"{self.roles[BIAS]} is {view.dtype}; wanted {', '.join(SCALE_DTYPES)}.")
        if view.strides[0] != 1 and n > 1:
            raise self.error(f"{self.roles[BIAS]} has stride {view.strides[0]}; {contiguous_hint(self.roles[BIAS])}.")
        return view.dtype

    def segments(self, views: tuple[Argument, ...], options: GemmOptions, m: int, experts: int) -> tuple[str | None, str | None, int]:
        """(dtype of the segment array, dtype of the expert map, number of segments) of a grouped product."""
        if not options.segments:
            return None, None, 0
        rows = self.vector_of(views[SEGMENTS], SEGMENTS)
        assert rows is not None
        if options.segments == "indices":
            if rows.shape != (m,):
                raise self.error(f"{self.roles[SEGMENTS]} has shape {rows.shape}, but {self.roles[A]} has {m} rows; wanted ({m},).")
            return rows.dtype, None, experts
        count = rows.shape[0] - (options.segments == "indptr")
        if count < 0:
            raise self.error(f"{self.roles[SEGMENTS]} is empty; an indptr has one element more than there are segments.")
        chosen = self.vector_of(views[EXPERTS], EXPERTS, optional=True)
        if chosen is None and count > experts:
            raise self.error(
                f"{self.roles[SEGMENTS]} names {count} segments, but {self.roles[B]} holds {experts} matrices; pass {self.roles[EXPERTS]}."
            )
        if chosen is not None and chosen.shape != (count,):
            raise self.error(f"{self.roles[EXPERTS]} has shape {chosen.shape}, but there are {count} segments; wanted ({count},).")
        return rows.dtype, chosen.dtype if chosen else None, count

    def vector_of(self, view: Argument, position: int, optional: bool = False) -> View | None:
        if view is None and optional:
            return None
        role = self.roles[position]
        found = view if isinstance(view, View) else None
        if found is None or found.dtype not in INDEX_DTYPES:
            shown = found.dtype if found else "missing" if view is None else type(view).__name__
            raise self.wrong_type(f"{role} is {shown}; wanted an int32 or int64 array on the device of the operands.")
        if len(found.shape) != 1 or (found.shape[0] > 1 and found.strides[0] != 1):
            raise self.error(f"{role} has shape {found.shape} and strides {found.strides}; wanted a contiguous 1-D array.")
        return found

    # -- result ----------------------------------------------------------------------------------------------------------------

    def out_dtype(self, out: Argument, options: GemmOptions, a_element: Element) -> str:
        asked = options.out_dtype
        if isinstance(out, View):
            if asked is not None and asked != out.dtype:
                raise self.error(f"out is {out.dtype}, but out_dtype is {asked}; drop one of them.")
            asked = out.dtype
        if asked is None:
            asked = a_element.dtype if a_element.name in FLOATS16 else BF16.dtype
        if asked not in OUT_DTYPES:
            name = "out" if isinstance(out, View) else "out_dtype"
            raise self.error(f"{name} is {asked}; results come as {', '.join(OUT_DTYPES)}.")
        return asked

    def out(self, out: Argument, shape: tuple[int, ...], dtype: str) -> tuple[int, int, int]:
        if out is None:
            strides = dense_strides(shape)
        else:
            if not isinstance(out, View):
                raise self.wrong_type(f"out is a {type(out).__name__}; pass an array of shape {shape}.")
            if out.shape != shape:
                raise self.error(f"out has shape {out.shape}, but the result has shape {shape}; pass out of that shape or drop it.")
            if out.readonly:
                raise self.error("out is read-only; pass a writable array.")
            strides = out.strides
            if 0 in shape:  # nothing is written, and strides of empty arrays mean nothing
                strides = dense_strides(shape)
            if shape[-1] > 1 and shape[-2] > 1 and 1 not in strides[-2:]:
                raise self.error(f"out has strides {strides}; one of its last two axes must be contiguous (stride 1).")
            if _overlaps(shape, strides):
                raise self.error(f"out has strides {strides}: several elements share memory; pass an array of its own.")
        return strides[0] if len(shape) == 3 else 0, strides[-2], strides[-1]


OPS: dict[str, Any] = {}
"""Every operation by name: how a call that was stored as text (a compiled JAX program) finds it again."""


def register(op: Any) -> Any:
    OPS[op.name] = op
    return op


ROLES = ("a", "b", "a_scale", "b_scale", "alpha", "bias", "segments", "experts", "out")


def product(
    name: str,
    a_elements: tuple[str, ...],
    b_elements: tuple[str, ...],
    /,
    *,
    ranks: tuple[int, ...] = (2,),
    called: Mapping[str, str] | None = None,
) -> GemmOp:
    """Register a product; `called` renames its arguments for messages ({"b": "weight"})."""
    op = GemmOp(name, tuple((called or {}).get(role, role) for role in ROLES), a_elements, b_elements, ranks)
    OPS[name] = op
    return op


def _overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two elements may share memory: an axis steps by less than what the finer ones span."""
    span = 1
    for step, n in sorted((s, n) for n, s in zip(shape, strides, strict=True) if n > 1):
        if step < span:
            return True
        span += (n - 1) * step
    return False


def _blocks(rows: int, k: int, block: tuple[int, int]) -> tuple[int, int]:
    """How many scales lie along (rows, k)."""
    return (1 if block[0] == ALL else ceil_div(rows, block[0])), (1 if block[1] == ALL else ceil_div(k, block[1]))


def _block_text(block: tuple[int, int]) -> str:
    rows, k = ("all" if n == ALL else str(n) for n in block)
    return f"{rows} x {k}"


def _major(view: View, strides: tuple[int, int, int], element: Element) -> tuple[str, bool]:
    """("k" or "mn", readable in 16-byte pieces) of one operand."""
    batch, row, k = strides
    size = itemsize(view.dtype)

    def aligned(line: int) -> bool:
        # The kernel counts a tile's 16-byte pieces in 32 bits: wider lines go value by value.
        return view.ptr % 16 == 0 and line * size % 16 == 0 and batch * size % 16 == 0 and line * size < 2**29

    if k == 1 and aligned(row):
        return "k", True
    if row == 1 and element.per_byte == 1 and aligned(k):
        return "mn", True
    return "k", False


def _segment_workspaces(kind: str, segment_dtype: str | None, expert_dtype: str | None, m: int, segments: int) -> tuple[ArraySpec, ...]:
    """int32 scratch of a grouped product: the indptr, the row map of indices, the narrowed expert map."""
    wanted: list[ArraySpec] = []
    if kind in ("indices", "lens") or (kind == "indptr" and segment_dtype != "int32"):
        wanted.append(((segments + 1,), "int32"))
    if kind == "indices":
        wanted.append(((max(m, 1),), "int32"))
    if expert_dtype == "int64":
        wanted.append(((max(segments, 1),), "int32"))
    return tuple(wanted)
