"""What is asked: operands and options become a checked `Call`, or an error in words.

`GemmOp.check` looks at shapes, dtypes, scales, layouts and `out`, and raises every error a caller can cause. What passes is a `Call`: the
product in the words that kernels and the reference share (a [batch, m, k], b [batch, k, n], strides of every array), holding a `Problem`,
the part that selection and the plan cache see. Nothing here touches memory or knows a framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cugemm.arrays import View, dense_strides, itemsize
from cugemm.formats import ALL, BF16, BY_DTYPE, E2M1, E2M1X2, E4M3, E5M2, ELEMENTS, FORMATS, FP16, INT4X2, INT8, LAYOUTS, UINT4X2, Element
from cugemm.scales import BYTE_SCALES, SCALE_DTYPES, Covered, Scale, read_bytes, read_float, read_tensor, read_zero, rows_held

Argument = View | float | None
ArraySpec = tuple[tuple[int, ...], str]

FLOATS16 = (BF16.name, FP16.name)
FLOATS8 = (E4M3.name, E5M2.name)
FLOATS4 = (E2M1.name, E2M1X2.name)
INTEGERS = (INT8.name, INT4X2.name, UINT4X2.name)
OUT_DTYPES = ("bfloat16", "float16", "float32")
INDEX_DTYPES = ("int32", "int64")
ACCUMULATE = ("fast", "promoted", "fp32")

A, B, A_SCALE, B_SCALE, A_TENSOR, B_TENSOR, ZERO, ALPHA, BIAS, SEGMENTS, EXPERTS, ROWS, OUT = range(13)
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
    """The question that selection answers and the key of the plan cache; m is `bucket(m)`.

    a, b: elements. a_scale, b_scale: the element of scales that go into the values ("e4m3", "e8m0"), else "". zero: b has zero points.
    scale_block: the fewest values along k under one float scale, 0 where none varies along k. vector: both operands can be read in 16-byte
    pieces, along the axes a_major and b_major say; b_vector: b can along k, and so can its scales; a_vector: a can along a_major, and its
    rows do not overlap. pdl: "", or what may happen to b before
    the kernel ahead has ended, "prefetch" or "static" (loads). scratch: kernels may ask for memory (`Step.scratch`). in_order: rows of a
    are those of the result, one after the other, b is one array without panels, and no line of either overlaps the next. column_scales:
    float scales that vary along k do so for each column by itself.
    """

    m: int
    n: int
    k: int
    batch: int
    grouped: bool
    a: str
    b: str
    a_scale: str
    b_scale: str
    zero: bool
    scale_block: int
    a_major: str
    b_major: str
    vector: bool
    out: str
    accumulate: str
    backend: str
    arch: str = ""
    device: int = 0
    pdl: str = ""
    batch_invariant: bool = False
    b_vector: bool = False
    a_vector: bool = True
    scratch: bool = True
    in_order: bool = False
    column_scales: bool = False

    def __str__(self) -> str:
        where = f" on {self.arch}" if self.arch else ""
        return f"{_kind(self.a, self.a_scale)} x {_kind(self.b, self.b_scale)} -> {self.out}{where}"


def _kind(element: str, scale: str) -> str:
    """What an operand is called in a message: the format that has this element and these scales, else the element."""
    if not scale:
        return element
    named = (name for name, fmt in FORMATS.items() if (fmt.element.name, fmt.scale.name) == (element, scale))
    return next(named, f"{element} under {scale} scales")


class GemmOptions(NamedTuple):
    """Everything about a product that is no array; values survive JSON."""

    a_element: str | None = None
    b_element: str | None = None
    a_block: tuple[int, int] | None = None
    b_block: tuple[int, int] | None = None
    a_scale_element: str = ""  # "e4m3" or "e8m0": what the bytes of the scale are; empty: floats
    b_scale_element: str = ""
    a_scale_layout: str = "linear"
    b_scale_layout: str = "linear"
    a_scale_rows: str = ""  # see `Scale.rows`
    b_scale_rows: str = ""
    b_axes: str = "kn"  # "kn", "nk", or "pnk": panels of 128 k, each [n, 128]
    a_scale_axes: str = "mk"
    b_scale_axes: str = ""  # empty: the axes of b
    out_dtype: str | None = None
    accumulate: str = "fast"
    segments: str = ""  # what SEGMENTS holds: "indices", "indptr", "lens" or "masked"
    backend: str = "auto"
    pdl: bool = False
    static_weights: bool = False
    batch_invariant: bool = False


class GemmCall(NamedTuple):
    """One checked product. Strides: (batch, row, k) for a, (batch, column, k) for b, (batch, row, column) for out, in stored elements.

    m: rows of the result. Row r of it comes from row ROWS[r] of a, where there is such an array, else from row r // a_repeat; a has a_rows.
    b_panel: stored elements from one panel of 128 k to the next, 0 where b has none. bias_strides: (expert, row).
    """

    problem: Problem
    outputs: tuple[ArraySpec, ...]
    workspaces: tuple[ArraySpec, ...]
    m: int
    n: int
    k: int
    batch: int
    experts: int
    a_rows: int
    a_repeat: int
    a_strides: tuple[int, int, int]
    b_strides: tuple[int, int, int]
    b_panel: int
    out_strides: tuple[int, int, int]
    a_scale: Scale | None
    b_scale: Scale | None
    a_tensor: Scale | None
    b_tensor: Scale | None
    zero: Scale | None
    alpha_dtype: str | None
    bias_dtype: str | None
    bias_strides: tuple[int, int]
    segments: str
    segment_dtype: str | None
    expert_dtype: str | None
    rows_dtype: str | None

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k * (1 if self.segments not in ("", "masked") else self.batch)


class Segments(NamedTuple):
    """Of a grouped product: rows of the result, segments, and the dtypes of the arrays that say which rows go where.

    repeat: rows of the result that one row of a gives (experts per token).
    """

    rows: int
    number: int = 0
    dtype: str | None = None
    expert_dtype: str | None = None
    rows_dtype: str | None = None
    repeat: int = 1


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
    bias_2d: bool = False
    every_group: bool = False
    out_dtype_role: str = "out_dtype"

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
        for layout in (options.a_scale_layout, options.b_scale_layout):
            if layout not in LAYOUTS:
                raise self.error(f"scale_layout is {layout!r}; wanted one of {', '.join(map(repr, LAYOUTS))}.")
        grouped = options.segments not in ("", "masked")
        for view, position in ((a, A), (b, B)):
            ranks = ((3,) if options.segments else self.ranks) if position == B or options.segments == "masked" else self.ranks
            if position == A and grouped:
                ranks = (2,)
            if position == B and options.b_axes == "pnk":
                ranks = (3,)
            if len(view.shape) not in ranks:
                wanted = " or ".join(f"{rank}-D" for rank in ranks)
                raise self.error(f"{self.roles[position]} has shape {view.shape}; wanted a {wanted} array.")
        b_view, b_panel = self.panels(b) if options.b_axes == "pnk" else (b, 0)
        b_axes = (-1, -2) if options.b_axes == "kn" else (-2, -1)
        a_rows, k_a, a_strides, batch_a = self.matrix(a, (-2, -1), a_element)
        n, k_b, b_strides, batch_b = self.matrix(b_view, b_axes, b_element)
        if k_a != k_b:
            packed = "".join(
                f" ({self.roles[p]} is packed, two values a byte)" for p, e in ((A, a_element), (B, b_element)) if e.per_byte > 1
            )
            fix = f"pass {self.roles[B]}.T" if n == k_a and len(b.shape) == 2 else "they must agree"
            raise self.error(
                f"{self.roles[A]} {a.shape} has k = {k_a}, but {self.roles[B]} {b.shape} "
                f"read as [{', '.join(options.b_axes)}] has k = {k_b}{packed}; {fix}."
            )
        batch, experts = self.batches(a, b, batch_a, batch_b, options.segments)
        segments = self.segments(views, options, a_rows, experts)
        m = segments.rows
        covered_a = Covered("", self.roles[A], a.shape, a_rows, k_a, batch_a, options.a_scale_axes == "mk")
        covered_b = Covered("", self.roles[B], b.shape, n, k_a, batch_b, (options.b_scale_axes or options.b_axes) != "kn")
        a_scale = self.scale(views, A_SCALE, covered_a, options, segments.number)
        b_scale = self.scale(views, B_SCALE, covered_b, options, segments.number)
        a_tensor, b_tensor = self.tensor(views, A_TENSOR, covered_a), self.tensor(views, B_TENSOR, covered_b)
        zero = self.zero(views, covered_b, b_scale, b_element)
        for position, scale, tensor in ((A_TENSOR, a_scale, a_tensor), (B_TENSOR, b_scale, b_tensor)):
            if (tensor or isinstance(views[position], float)) and not (scale and (scale.element or scale.by_k)):
                raise self.error(f"{self.roles[position]} goes with scales that vary along k; multiply it into {self.roles[position - 2]}.")
        alpha_dtype = self.one_element(views[ALPHA], ALPHA)
        out_dtype = self.out_dtype(views[OUT], options, a_element)
        out_shape = self.out_shape(a, b, batch, m, n, options, views)
        out_strides = self.out(views[OUT], out_shape, out_dtype, grouped)
        bias_dtype, bias_strides = self.bias(views[BIAS], m, n, batch_b if options.segments else 0)
        if m * n and max(m, n, k_a) >= _LONGEST:
            raise self.error(f"an axis of {max(m, n, k_a)} is too long; m, n and k must be below 2**30.")
        a_major, b_major, vector = self.layout((a, a_strides, a_element), (b_view, b_strides, b_element), grouped, b_panel)
        if (a_major == "mn" and a_scale and a_scale.element) or (b_major == "mn" and b_scale and b_scale.element):
            a_major, b_major, vector = "k", "k", False  # a piece along the rows would need the block scales of all of them
        problem = Problem(  # of an empty result as of a small one: nothing is launched, but plan and explain ask
            bucket(m), max(n, 1), k_a, max(segments.number if grouped else batch, 1), grouped, a_element.name, b_element.name,
            a_scale.element if a_scale else "", b_scale.element if b_scale else "", zero is not None,
            min((s.block[1] for s in (a_scale, b_scale) if s is not None and s.by_k), default=0),
            a_major, b_major, vector, out_dtype, options.accumulate, options.backend,
            pdl=("static" if options.static_weights else "prefetch") if options.pdl else "", batch_invariant=options.batch_invariant,
            b_vector=_streams(b_view, b_strides, b_element, b_panel) and not _straddles(b_scale, n),
            a_vector=_major(a, a_strides, a_element)[1] and _lines_apart(a_strides, a_rows, k_a),
            in_order=options.segments != "indices" and views[ROWS] is None and not b_panel and _lines_apart(b_strides, n, k_a),
            column_scales=b_scale is not None and b_scale.by_k and b_scale.block[0] not in (128, ALL),
        )  # fmt: skip
        return GemmCall(
            problem, ((out_shape, out_dtype),), _segment_workspaces(options.segments, segments, m), m, n, k_a,
            segments.number if grouped else batch, experts, a_rows, segments.repeat,
            a_strides, b_strides, b_panel, out_strides, a_scale, b_scale, a_tensor, b_tensor, zero, alpha_dtype, bias_dtype, bias_strides,
            options.segments, segments.dtype, segments.expert_dtype, segments.rows_dtype,
        )  # fmt: skip

    def panels(self, b: View) -> tuple[View, int]:
        """(b [k/128, n, 128] as [n, k] with the strides inside a panel, stored elements from one panel to the next)."""
        if len(b.shape) != 3 or b.shape[2] != 128:
            raise self.error(
                f"{self.roles[B]} has shape {b.shape}; wanted (k/128, n, 128), as prepare_low_latency_gemm_weights returns it."
            )
        count, n, width = b.shape
        return b._replace(shape=(n, count * width), strides=(b.strides[1], b.strides[2])), b.strides[0]

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

    def batches(self, a: View, b: View, batch_a: int, batch_b: int, segments: str) -> tuple[int, int]:
        if segments not in ("", "masked"):
            return 1, batch_b
        if batch_a != batch_b and (segments or 1 not in (batch_a, batch_b)):
            unit = "matrices" if segments else "batches"
            raise self.error(
                f"{self.roles[A]} {a.shape} has {batch_a} {unit}, but {self.roles[B]} {b.shape} has {batch_b}; "
                f"they must agree{'' if segments else ', or one be 1'}."
            )
        return (batch_b if batch_a == 1 else batch_a), batch_b if segments else 1

    def layout(
        self,
        a: tuple[View, tuple[int, int, int], Element],
        b: tuple[View, tuple[int, int, int], Element],
        grouped: bool,
        b_panel: int,
    ) -> tuple[str, str, bool]:
        """Which axis of each operand is contiguous, and whether both can be read in 16-byte pieces."""
        a_major, a_vector = _major(*a)
        b_major, b_vector = _major(*b)
        if grouped and (a_major == "mn" or a[0].span() >= 2**36):
            a_vector = False  # segments begin anywhere, so pieces along m would straddle them; and rows are found from the start of a
        if b_panel % 16 or (b_panel and b_major == "mn"):
            b_vector = False
        return (a_major, b_major, True) if a_vector and b_vector else ("k", "k", False)

    # -- scales, epilogue ------------------------------------------------------------------------------------------------------

    def scale(self, views: tuple[Argument, ...], position: int, covered: Covered, options: GemmOptions, segments: int) -> Scale | None:
        """How a scale covers its operand: bytes as the operand's format says, floats as their shape says."""
        own = position == A_SCALE
        element = options.a_scale_element if own else options.b_scale_element
        rows = options.a_scale_rows if own else options.b_scale_rows
        view = views[position]
        if not isinstance(view, View):
            if element:
                shown = "missing" if view is None else "a number"
                raise self.wrong_type(f"{self.roles[position]} is {shown}; {covered.of} needs an array of {element} scales.")
            return None
        covered = covered._replace(role=self.roles[position])
        if rows.startswith("pad"):
            pad = int(rows[3:])
            covered = covered._replace(rows=(covered.rows + segments * (pad - 1)) // pad * pad)
            if element in BYTE_SCALES:
                covered = covered._replace(rows=max(covered.rows, rows_held(view, covered.k, element)))
        if element in BYTE_SCALES:
            layout = options.a_scale_layout if own else options.b_scale_layout
            return read_bytes(view, covered, element, layout, rows, self.error, self.wrong_type)
        declared = options.a_block if own else options.b_block
        return read_float(view, covered, declared, self.blocks, rows, self.error, self.wrong_type)

    def tensor(self, views: tuple[Argument, ...], position: int, covered: Covered) -> Scale | None:
        view = views[position]
        if not isinstance(view, View):
            return None
        return read_tensor(view, covered._replace(role=self.roles[position]), self.error, self.wrong_type)

    def zero(self, views: tuple[Argument, ...], covered: Covered, scale: Scale | None, element: Element) -> Scale | None:
        view = views[ZERO]
        if view is None:
            return None
        if not isinstance(view, View) or element.name != UINT4X2.name:
            raise self.wrong_type(f"{self.roles[ZERO]} goes with uint4 values of {covered.of}, as an array of uint8; drop it.")
        return read_zero(view, covered._replace(role=self.roles[ZERO]), scale, self.error, self.wrong_type)

    def one_element(self, view: Argument, position: int) -> str | None:
        if not isinstance(view, View):
            return None
        if view.dtype not in SCALE_DTYPES or view.size != 1:
            raise self.error(
                f"{self.roles[position]} is {view.dtype} of shape {view.shape}; "
                f"wanted a Python float or one element of {', '.join(SCALE_DTYPES)}."
            )
        return view.dtype

    def bias(self, view: Argument, m: int, n: int, experts: int) -> tuple[str | None, tuple[int, int]]:
        """(dtype, strides along experts and rows): [n], of grouped products also [experts, n], and [m, n] where the operation says so."""
        if view is None:
            return None, (0, 0)
        wanted = (f"({n},)", *([f"({experts}, {n})"] if experts else []), *([f"({m}, {n})"] if self.bias_2d else []))
        if not isinstance(view, View):
            raise self.wrong_type(f"{self.roles[BIAS]} is a {type(view).__name__}; pass an array of shape {' or '.join(wanted)}.")
        if view.shape not in ((n,), *([(experts, n)] if experts else []), *([(m, n)] if self.bias_2d else [])):
            raise self.error(
                f"{self.roles[BIAS]} has shape {view.shape}, but the result has n = {n} columns; wanted {' or '.join(wanted)}."
            )
        if view.dtype not in SCALE_DTYPES:
            raise self.wrong_type(f"{self.roles[BIAS]} is {view.dtype}; wanted {', '.join(SCALE_DTYPES)}.")
        if view.strides[-1] != 1 and n > 1 and view.size:
            raise self.error(f"{self.roles[BIAS]} has stride {view.strides[-1]}; {contiguous_hint(self.roles[BIAS])}.")
        step = view.strides[0] if len(view.shape) == 2 and view.shape[0] > 1 else 0
        return view.dtype, (0, step) if self.bias_2d else (step, 0)

    def segments(self, views: tuple[Argument, ...], options: GemmOptions, a_rows: int, experts: int) -> Segments:
        """Which rows a grouped product has, and what says so."""
        kind, gather = options.segments, self.vector_of(views[ROWS], ROWS, optional=True)
        m = gather.shape[0] if gather else a_rows
        if not kind:
            return Segments(m, rows_dtype=gather.dtype if gather else None)
        said = self.vector_of(views[SEGMENTS], SEGMENTS, ranks=(1, 2) if kind == "indices" and gather is None else (1,))
        assert said is not None
        if kind == "masked":
            if gather is not None:
                raise self.error(f"{self.roles[ROWS]} gathers rows of a 2-D {self.roles[A]}; drop it, or pass packed rows and an indptr.")
            if said.shape != (experts,):
                raise self.error(
                    f"{self.roles[SEGMENTS]} has shape {said.shape}, but {self.roles[B]} holds {experts} matrices; wanted ({experts},)."
                )
            return Segments(a_rows, experts, said.dtype)
        if kind == "indices":
            if said.shape[0] != m:
                wanted = f"({m},)" + ("" if gather else f", or ({m}, several)")
                raise self.error(f"{self.roles[SEGMENTS]} has shape {said.shape}, but {self.roles[A]} has {m} rows; wanted {wanted}.")
            repeat = said.shape[1] if len(said.shape) == 2 else 1
            return Segments(said.size, experts, said.dtype, None, gather.dtype if gather else None, repeat)
        count = said.shape[0] - (kind == "indptr")
        if count < 0:
            raise self.error(f"{self.roles[SEGMENTS]} is empty; an indptr has one element more than there are segments.")
        chosen = self.vector_of(views[EXPERTS], EXPERTS, optional=True)
        if self.every_group and count != experts:
            raise self.error(
                f"{self.roles[SEGMENTS]} has shape {said.shape}, but {self.roles[B]} holds {experts} matrices; wanted ({experts + 1},)."
            )
        if chosen is None and count > experts:
            raise self.error(
                f"{self.roles[SEGMENTS]} names {count} segments, but {self.roles[B]} holds {experts} matrices; pass {self.roles[EXPERTS]}."
            )
        if chosen is not None and chosen.shape != (count,):
            raise self.error(f"{self.roles[EXPERTS]} has shape {chosen.shape}, but there are {count} segments; wanted ({count},).")
        return Segments(m, count, said.dtype, chosen.dtype if chosen else None, gather.dtype if gather else None)

    def vector_of(self, view: Argument, position: int, optional: bool = False, ranks: tuple[int, ...] = (1,)) -> View | None:
        if view is None and optional:
            return None
        role = self.roles[position]
        found = view if isinstance(view, View) else None
        if found is None or found.dtype not in INDEX_DTYPES:
            shown = found.dtype if found else "missing" if view is None else type(view).__name__
            raise self.wrong_type(f"{role} is {shown}; wanted an int32 or int64 array on the device of the operands.")
        if len(found.shape) not in ranks or (found.size > 1 and found.strides != dense_strides(found.shape)):
            wanted = " or ".join(f"{rank}-D" for rank in ranks)
            raise self.error(f"{role} has shape {found.shape} and strides {found.strides}; wanted a contiguous {wanted} array.")
        return found

    # -- result ----------------------------------------------------------------------------------------------------------------

    def out_dtype(self, out: Argument, options: GemmOptions, a_element: Element) -> str:
        asked = options.out_dtype
        if isinstance(out, View):
            if asked is not None and asked != out.dtype:
                raise self.error(f"out is {out.dtype}, but {self.out_dtype_role} is {asked}; make them agree, or drop one.")
            asked = out.dtype
        if asked is None:
            asked = a_element.dtype if a_element.name in FLOATS16 else BF16.dtype
        if asked not in OUT_DTYPES:
            name = "out" if isinstance(out, View) else self.out_dtype_role
            raise self.error(f"{name} is {asked}; results come as {', '.join(OUT_DTYPES)}.")
        return asked

    def out_shape(
        self, a: View, b: View, batch: int, m: int, n: int, options: GemmOptions, views: tuple[Argument, ...]
    ) -> tuple[int, ...]:  # fmt: skip
        said = views[SEGMENTS]
        if options.segments == "indices" and isinstance(said, View) and len(said.shape) == 2:
            return (*said.shape, n)
        batched = len(a.shape) == 3 if options.segments or options.b_axes == "pnk" else max(len(a.shape), len(b.shape)) == 3
        return (batch, m, n) if batched else (m, n)

    def out(self, out: Argument, shape: tuple[int, ...], dtype: str, grouped: bool) -> tuple[int, int, int]:
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
        if grouped and len(shape) == 3 and 0 not in shape:  # (token, expert) pairs, which are the rows of one product
            step = strides[1] if shape[1] > 1 else strides[0]
            if shape[0] > 1 and strides[0] != shape[1] * step:
                raise self.error(
                    f"out has strides {strides}; its first two axes must lie as one (stride {shape[1] * step} along the first)."
                )
            return 0, step, strides[2]
        return strides[0] if len(shape) == 3 else 0, strides[-2], strides[-1]


OPS: dict[str, Any] = {}
"""Every operation by name: how a call that was stored as text (a compiled JAX program) finds it again."""


def register(op: Any) -> Any:
    OPS[op.name] = op
    return op


ROLES = (
    "a", "b", "a_scale", "b_scale", "a_tensor_scale", "b_tensor_scale", "zero", "alpha", "bias", "segments", "experts", "rows", "out"
)  # fmt: skip


def product(
    name: str,
    a_elements: tuple[str, ...],
    b_elements: tuple[str, ...],
    /,
    *,
    ranks: tuple[int, ...] = (2,),
    called: Mapping[str, str] | None = None,
    bias_2d: bool = False,
    every_group: bool = False,
) -> GemmOp:
    """Register a product; `called` renames its arguments for messages ({"b": "weight"}); `bias_2d`: the bias may be [m, n].

    every_group: an indptr has one segment for each matrix of b, not fewer.
    """
    called = called or {}
    roles = tuple(called.get(role, role) for role in ROLES)
    op = GemmOp(
        name, roles, a_elements, b_elements, ranks,
        bias_2d=bias_2d, every_group=every_group, out_dtype_role=called.get("out_dtype", "out_dtype"),
    )  # fmt: skip
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


def _lines_apart(strides: tuple[int, int, int], rows: int, k: int) -> bool:
    """Whether the lines of an operand, along k or along its rows, begin behind each other's end."""
    _, row, step = strides
    return (rows == 1 or row >= k) if step == 1 else (k == 1 or step >= rows)


def _streams(b: View, strides: tuple[int, int, int], element: Element, panel: int) -> bool:
    """Whether b is read along k in 16-byte pieces, panels of 128 bytes included."""
    return _major(b, strides, element) == ("k", True) and (not panel or (itemsize(b.dtype) == 1 and panel % 16 == 0))


def _straddles(scale: Scale | None, n: int) -> bool:
    """Whether 32 rows of a matrix may lie in two tiles of scales."""
    return scale is not None and scale.rows == "flat" and scale.layout != "linear" and n % 32 != 0


def _segment_workspaces(kind: str, segments: Segments, m: int) -> tuple[ArraySpec, ...]:
    """int32 scratch of a grouped product: the indptr or counts, the row map of indices, the narrowed expert map, the narrowed rows."""
    wanted: list[ArraySpec] = []
    if kind in ("indices", "lens") or (kind in ("indptr", "masked") and segments.dtype != "int32"):
        wanted.append(((segments.number + 1,), "int32"))
    if kind == "indices":
        wanted.append(((max(m, 1),), "int32"))
    if segments.expert_dtype == "int64":
        wanted.append(((max(segments.number, 1),), "int32"))
    if segments.rows_dtype == "int64":
        wanted.append(((max(m, 1),), "int32"))
    return tuple(wanted)
