"""`plan`, `explain`, `warmup`: what a call would do, before it does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any, NamedTuple

from cugemm import launch
from cugemm.arrays import HOST, SPEC, Spec, framework_of, is_scalar
from cugemm.catalog import Step
from cugemm.launch import Recorded
from cugemm.problem import A_SCALE, A_TENSOR, B_SCALE, B_TENSOR, ZERO, B, GemmCall, bucket
from cugemm.quantized import Quantized
from cugemm.scales import Scale


def _record(name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Recorded]:
    if not callable(fn):
        raise TypeError(f"{name}: fn is a {type(fn).__name__}; pass a function of cugemm, such as cugemm.mm_fp8.")
    with launch.recording() as calls:
        fn(*args, **kwargs)
    if not calls:
        raise TypeError(f"{name}: {getattr(fn, '__name__', fn)!r} made no call that cugemm plans; pass a function of cugemm.")
    return calls


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Which kernel a call takes and why: the problem as it was read, all candidates with predicted times, every refusal.

    Arguments are those of the call; `cugemm.Spec(shape, dtype)`, jax.ShapeDtypeStruct and torch meta tensors stand for arrays. Nothing is
    run.

    >>> print(cugemm.explain(cugemm.linear, cugemm.Spec((8, 4096), "bfloat16"), cugemm.Spec((11008, 4096), "float8_e4m3fn")))
    """
    lines = []
    for recorded in _record("explain", fn, args, kwargs):
        lines.append(f"cugemm.{recorded.op.name}")
        if isinstance(recorded.call, GemmCall):
            lines += layouts(recorded)
        lines.append("  in host memory: NumPy reference" if recorded.choice is None else str(recorded.choice))
    return "\n".join(lines)


def layouts(recorded: Recorded) -> list[str]:
    """The product as it was read: sizes, and how every scale covers its operand and lies in memory."""
    call, roles = recorded.call, recorded.op.roles
    grouped = f", grouped by {call.segments}" if call.segments else ""
    lines = [f"  m = {call.m}, n = {call.n}, k = {call.k}, batch = {call.batch}{grouped}"]
    if call.b_panel:
        lines.append(f"  {roles[B]}: panels of 128 k, each n x 128")
    for position, scale in ((A_SCALE, call.a_scale), (B_SCALE, call.b_scale), (A_TENSOR, call.a_tensor), (B_TENSOR, call.b_tensor)):
        if scale is not None:
            lines.append(f"  {roles[position]}: {_scale(scale)}")
    if call.zero is not None:
        lines.append(f"  {roles[ZERO]}: {call.zero.dtype}, one for each scale")
    return lines


def _scale(scale: Scale) -> str:
    rows, k = ("all" if n == 0 else n for n in scale.block)
    kind = f"{scale.element} codes" if scale.element else scale.dtype
    tiled = scale.layout != "linear"
    where = f"in {scale.layout} tiles" if tiled else "linear"
    if scale.rows == "flat":
        where += ", the rows of all matrices together"
    elif scale.rows:
        where += f", the rows of each segment from a multiple of {scale.rows.removeprefix('pad')} on"
    elif tiled and scale.shape[0] > 1:
        where += ", each matrix by itself"
    return f"{kind}, one for each {rows} x {k} values (rows x k), {where}"


def warmup(fn: Callable[..., Any], *args: Any, m: int | Iterable[int] | None = None, **kwargs: Any) -> None:
    """Compile and load everything `fn(*args, **kwargs)` needs, so that its first call, or a graph capture, finds it ready. Nothing is run.

    m: further row counts to prepare for, one or several; plans are shared within a bucket of m.
    CompileError and CudaError where that fails.

    >>> cugemm.warmup(cugemm.mm_bf16, x, w.T, m=range(1, 257))
    """
    sizes = () if m is None else (m,) if isinstance(m, Integral) else tuple(m) if isinstance(m, Iterable) else None
    if sizes is None or any(not isinstance(size, Integral) or isinstance(size, bool) or size < 1 for size in sizes):
        shown = repr(m) if isinstance(m, (int, float, str)) else f"a {type(m).__name__}"
        raise TypeError(f"warmup: m is {shown}; pass a positive int or several of them.")
    for recorded in _record("warmup", fn, args, kwargs):
        if recorded.device == HOST:
            continue
        calls = {recorded.call.problem: recorded.call}
        if isinstance(recorded.call, GemmCall):
            for size in sizes:
                problem = recorded.call.problem._replace(m=bucket(int(size)))
                calls.setdefault(problem, recorded.call._replace(problem=problem, m=problem.m))
        for call in calls.values():
            choice = launch.choose(call, recorded.device)
            for step in choice.best.kernel.steps(call, choice.best.config):
                if isinstance(step, Step):
                    launch.load(step, choice.problem.arch, recorded.device)


class Plan:
    """A call whose checks, selection and compilation are done: `plan(*args)` takes arrays that look like those it was made for.

    kernel, config: what was chosen for each launch of the call, as text.
    """

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._fn, self._kwargs = fn, kwargs
        self._looks = [_look(x) for x in args]
        calls = _record("plan", fn, args, kwargs)
        warmup(fn, *args, **kwargs)
        self.kernels = [r.choice.best.kernel.name if r.choice else "reference" for r in calls]
        self.configs = [str(r.choice.best.config) if r.choice else "" for r in calls]

    def __call__(self, *args: Any) -> Any:
        """Run. ValueError where an array has another shape, dtype, strides or device than the plan's."""
        if len(args) != len(self._looks):
            raise ValueError(f"{self!r}: got {len(args)} arguments; the plan was made for {len(self._looks)}.")
        for i, (x, wanted) in enumerate(zip(args, self._looks, strict=True)):
            look = _look(x)
            if not _fits(wanted, look):
                raise ValueError(f"{self!r}: argument {i} is {look}; the plan was made for {wanted}. Make another plan for it.")
        return self._fn(*args, **self._kwargs)

    def __repr__(self) -> str:
        return f"Plan({getattr(self._fn, '__name__', self._fn)}, {', '.join(self.kernels)})"


def plan(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
    """Check, select, compile and load once; the result runs `fn` on arrays of the same shape, dtype, strides and device.

    Arguments are those of the call; `cugemm.Spec`, jax.ShapeDtypeStruct and torch meta tensors stand for arrays. Keyword arguments are
    fixed.

    >>> p = cugemm.plan(cugemm.mm_bf16, x, w.T)
    >>> y = p(x, w.T)
    """
    return Plan(fn, args, kwargs)


class _Look(NamedTuple):
    """What a plan depends on. Device: ordinal, HOST, or None for a stand-in that says nothing of it (meta tensors).

    framework: the name of it, or empty for a stand-in of any.
    """

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...]
    device: int | None
    framework: str

    def fits(self, other: Any) -> bool:
        alike = isinstance(other, _Look) and self[:3] == other[:3] and self.framework in ("", other.framework)
        return alike and (self.device is None or self.device == other.device)

    def __str__(self) -> str:
        where = "no device" if self.device is None else "the host" if self.device == HOST else f"cuda:{self.device}"
        whose = f" of {self.framework}" if self.framework else ""
        return f"{self.dtype}{list(self.shape)} with strides {self.strides} on {where}{whose}"


def _look(x: Any) -> Any:
    """_Look of an array, tuple of them for a Quantized or a pair; options as they are, numbers as their types."""
    if type(x) is Quantized:
        return (x.format.name, x.k_axis, x.scale_layout, *(_look(part) for part in (x.data, x.scale, x.tensor_scale, x.zero)))
    if isinstance(x, (tuple, list)):
        return tuple(part if isinstance(part, int) else _look(part) for part in x)
    if x is None or isinstance(x, (str, bool)):
        return x
    if is_scalar(x) or not (hasattr(x, "shape") or hasattr(x, "__dlpack__")):
        return type(x)
    framework = framework_of(x, "plan: argument")
    view = framework.view(x, "plan: argument")
    meta = framework.abstract(x) and not isinstance(x, Spec) and view.device == HOST
    stand_in = framework.name == SPEC.name or meta
    return _Look(view.shape, view.dtype, view.strides, None if meta else view.device, "" if stand_in else framework.name)


def _fits(wanted: Any, look: Any) -> bool:
    if isinstance(wanted, _Look):
        return wanted.fits(look)
    if isinstance(wanted, tuple):
        return isinstance(look, tuple) and len(look) == len(wanted) and all(map(_fits, wanted, look))
    return bool(wanted == look)
