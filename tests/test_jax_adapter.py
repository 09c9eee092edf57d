"""cugemm.adapters.jax on CPU: eager and jitted calls of a toy operation reach `launch.run_views` with the right views; errors come back."""

import contextlib
import ctypes
import importlib
import os
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import cugemm
from cugemm import problem
from cugemm.arrays import HOST, View, host_array

jax = pytest.importorskip("jax")
jnp = jax.numpy
adapter = importlib.import_module("cugemm.adapters.jax")


FROM_XLA = (RuntimeError, ValueError)
"""What JAX makes of an error of the handler: JaxRuntimeError where it dispatches, ValueError where it waits for a result."""


@contextlib.contextmanager
def raises(kind: type[Exception], text: str) -> Iterator[None]:
    """pytest.raises on the whole of the message; its `match` also sees the note JAX adds about hidden frames."""
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    assert str(caught.value) == text


class Options(NamedTuple):
    out_dtype: str | None = None
    block: tuple[int, int] | None = None
    parts: int = 1
    scratch: int = 0


class Call(NamedTuple):
    outputs: tuple[tuple[tuple[int, ...], str], ...]
    workspaces: tuple[tuple[tuple[int, ...], str], ...]


class Scaled:
    """A toy operation: outputs are x * scale + i for i < parts, in float32 inside; y is only looked at."""

    name = "scaled"
    roles = ("x", "y", "scale", "out")

    def __init__(self) -> None:
        self.checked: list[tuple[Any, ...]] = []
        self.ran: list[tuple[Any, ...]] = []
        self.failure: BaseException | None = None

    def check(self, views: tuple[View | None, ...], options: Options) -> Call:
        self.checked.append((views, options))
        x, y, scale = views[:3]
        assert x is not None
        if y is not None and y.shape != x.shape:
            raise ValueError(f"scaled: y has shape {y.shape}, but x has shape {x.shape}; they must agree.")
        if scale is not None and scale.dtype != "float32":
            raise TypeError(f"scaled: scale is {scale.dtype}; wanted float32.")
        outputs = ((x.shape, options.out_dtype or x.dtype),) * options.parts
        return Call(outputs, (((3, 5), "int32"),) * options.scratch)

    def run(self, views: tuple[View | None, ...], options: Options, outputs: tuple[View, ...], workspaces: tuple[View, ...]) -> None:
        self.ran.append((views, options, outputs, workspaces, threading.get_ident()))
        if self.failure is not None:
            raise self.failure
        x, scale = (None if v is None else host_array(v) for v in (views[0], views[2]))
        for i, out in enumerate(outputs):
            target = host_array(out)
            if x.dtype == np.uint8:
                target[...] = x
            else:
                product = x.astype(np.float32) * (1 if scale is None else scale)
                target[...] = (product + i if i else product).astype(target.dtype)  # product + 0 would lose the sign of -0
        for workspace in workspaces:
            host_array(workspace)[...] = -1


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scaled]:
    op = Scaled()

    def run_views(op: Scaled, views: Any, options: Any, outputs: Any, workspaces: Any, stream: int) -> None:
        assert stream == 0
        op.run(views, options, outputs, workspaces)

    launch = types.ModuleType("cugemm.launch")
    launch.run_views = run_views  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cugemm.launch", launch)
    monkeypatch.setattr(cugemm, "launch", launch, raising=False)
    monkeypatch.setattr(problem, "OPS", {"scaled": op}, raising=False)
    monkeypatch.setattr(adapter, "_compiled", {})
    monkeypatch.setattr(adapter, "_known", {})
    jax.clear_caches()
    former = jax.config.jax_default_device
    jax.config.update("jax_default_device", jax.devices("cpu")[0])  # in all threads, also where JAX sees a GPU
    yield op
    jax.config.update("jax_default_device", former)


def scaled(op: Scaled, x: Any, y: Any = None, scale: Any = None, out: Any = None, **options: Any) -> Any:
    return adapter.run(op, (x, y, scale, out), Options(**options))


X = np.arange(12, dtype=np.float32).reshape(3, 4) - 5


def test_eager(op: Scaled) -> None:
    x = jnp.asarray(X)
    result = scaled(op, x, scale=2.5)
    assert isinstance(result, jax.Array)
    assert not isinstance(result, jax.core.Tracer)
    np.testing.assert_array_equal(result, X * 2.5)
    (views, options), (seen, seen_options, outputs, workspaces, _) = op.checked[0], op.ran[0]
    assert views == (View(0, (3, 4), (4, 1), "float32", HOST), None, View(0, (), (), "float32", HOST), None)
    assert [v and v[1:5] for v in seen] == [v and v[1:5] for v in views]
    assert seen[0].ptr == x.unsafe_buffer_pointer()
    assert outputs[0].ptr not in (0, seen[0].ptr)
    assert options == seen_options == Options()
    assert workspaces == ()


def test_scalars_are_no_part_of_the_program(op: Scaled) -> None:
    x = jnp.asarray(X)
    for scale in (2, 0.25, np.float16(3), np.int64(7), jnp.float32(9)):
        np.testing.assert_array_equal(scaled(op, x, scale=scale), X * np.float32(scale))
    assert len(op.checked) == 1
    scaled(op, jnp.ones((5, 4)), scale=1.0)
    assert len(op.checked) == 2


def test_scalars_are_cached_by_their_bits(op: Scaled) -> None:
    x = jnp.ones(1)
    for value in (0.0, -0.0, np.nan, np.inf, 0.0, -0.0):
        assert np.asarray(scaled(op, x, scale=value)).tobytes() == np.float32(value).tobytes()
    there = jax.device_put(x, jax.devices("cpu")[0])  # committed, as its result is
    assert [scaled(op, v, scale=2.0).committed for v in (x, there)] == [False, True]


def test_a_scalar_met_first_while_tracing_does_not_leak(op: Scaled) -> None:
    x = jnp.asarray(X)
    f = jax.jit(lambda y: scaled(op, x, scale=123.5) + y)
    np.testing.assert_array_equal(f(X), X * 123.5 + X)
    np.testing.assert_array_equal(scaled(op, x, scale=123.5), X * 123.5)


def test_jit(op: Scaled) -> None:
    @jax.jit
    def f(x: Any, y: Any, unused: Any) -> Any:
        return scaled(op, x + 1, y, scale=2.0) * 3

    for _ in range(3):
        np.testing.assert_array_equal(f(X, X, X), (X + 1) * 2 * 3)
    assert len(op.checked) == 1
    assert len(op.ran) == 3
    assert op.checked[0][0][0].device == HOST


def test_jit_with_a_traced_scale_and_a_constant_operand(op: Scaled) -> None:
    constant = jnp.asarray(X)
    f = jax.jit(lambda s: scaled(op, constant, scale=s))
    np.testing.assert_array_equal(f(jnp.float32(4)), X * 4)
    with raises(TypeError, "scaled: scale is int32; wanted float32."):
        f(jnp.int32(4))


def test_transposed_operand_arrives_row_major(op: Scaled) -> None:
    np.testing.assert_array_equal(jax.jit(lambda x: scaled(op, x.T))(X), X.T)
    np.testing.assert_array_equal(scaled(op, jnp.asarray(X).T), X.T)


def test_donated_operand(op: Scaled) -> None:
    x = jnp.asarray(X) + 0
    f = jax.jit(lambda x: scaled(op, x, scale=2.0), donate_argnums=0)
    np.testing.assert_array_equal(f(x), X * 2)
    assert op.ran[0][0][0].ptr != op.ran[0][2][0].ptr  # XLA must not alias the result with an operand still being read


def test_several_outputs_and_workspaces(op: Scaled) -> None:
    x = jnp.asarray(X)
    for f in (scaled, jax.jit(scaled, static_argnums=0, static_argnames=("parts", "scratch", "out_dtype", "block"))):
        results = f(op, x, parts=3, scratch=2, out_dtype="float16", block=(1, 128))
        assert isinstance(results, tuple)
        assert len(results) == 3
        for i, result in enumerate(results):
            assert result.dtype == jnp.float16
            np.testing.assert_array_equal(result, (X + i).astype(np.float16))
        assert [w[1:4] for w in op.ran[-1][3]] == [((3, 5), (5, 1), "int32")] * 2
        assert op.ran[-1][1] == Options("float16", (1, 128), 3, 2)


@pytest.mark.parametrize("name", ["bool", "int8", "uint8", "int32", "float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"])
def test_dtypes(op: Scaled, name: str) -> None:
    x = jnp.asarray(X).astype(name)
    for f in (scaled, jax.jit(scaled, static_argnums=0)):
        result = f(op, x)
        assert result.dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(result).astype(np.float32), np.asarray(x).astype(np.float32))
    assert op.ran[0][0][0].dtype == op.ran[0][2][0].dtype == name


def test_e8m0(op: Scaled) -> None:
    if not hasattr(jnp, "float8_e8m0fnu"):
        pytest.skip("this jax has no float8_e8m0fnu")
    x = jnp.asarray([[0.25, 1.0, 64.0]]).astype("float8_e8m0fnu")
    assert scaled(op, x, scale=2.0).astype(jnp.float32).tolist() == [[0.5, 2.0, 128.0]]


def test_float4_is_two_values_a_byte(op: Scaled) -> None:
    if not hasattr(jnp, "float4_e2m1fn"):
        pytest.skip("this jax has no float4_e2m1fn")
    values = np.array([[0.5, -1, 1.5, 6], [2, 3, -4, 0]], np.float32)
    result = scaled(op, jnp.asarray(values).astype("float4_e2m1fn"), out_dtype="uint8")
    assert op.checked[0][0][0] == View(0, (2, 2), (2, 1), "float4_e2m1fn_x2", HOST)
    assert op.ran[0][0][0][1:4] == ((2, 2), (2, 1), "float4_e2m1fn_x2")
    assert np.asarray(result).tolist() == [[0xA1, 0x73], [0x54, 0x0E]]  # low nibble first
    with raises(TypeError, "scaled: x is float4_e2m1fn of shape (2, 3), whose rows share bytes; pad its last axis to an even length."):
        scaled(op, jnp.ones((2, 3)).astype("float4_e2m1fn"))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), ()])
def test_empty_and_rank_0(op: Scaled, shape: tuple[int, ...]) -> None:
    assert scaled(op, jnp.ones(shape)).shape == shape


def test_errors_of_check_come_while_tracing_as_they_are(op: Scaled) -> None:
    text = "scaled: y has shape (5,), but x has shape (3, 4); they must agree."
    for f in (scaled, jax.jit(scaled, static_argnums=0)):
        for _ in range(2):
            with raises(ValueError, text):
                f(op, jnp.asarray(X), jnp.ones(5))
    assert op.ran == []


def test_out_is_refused(op: Scaled) -> None:
    x = jnp.asarray(X)
    for f in (scaled, jax.jit(scaled, static_argnums=0)):
        with raises(TypeError, "scaled: JAX arrays are immutable: drop out="):
            f(op, x, out=x)


@pytest.mark.parametrize("bad", [X, [1.0], "a", True])
def test_other_frameworks_are_refused(op: Scaled, bad: Any) -> None:
    kind = f"{type(bad).__module__}.{type(bad).__name__}"
    with raises(TypeError, f"scaled: y is a {kind}, other arguments are JAX arrays; pass a jax.Array."):
        scaled(op, jnp.asarray(X), bad)


@pytest.mark.parametrize("failure", [RuntimeError("the bias is on fire: ü"), KeyError("x"), KeyboardInterrupt(), MemoryError("lots")])
def test_errors_in_the_handler_surface(op: Scaled, failure: BaseException) -> None:
    op.failure = failure
    with pytest.raises(FROM_XLA, match=f"{type(failure).__name__}: {failure}"):
        jax.block_until_ready(scaled(op, jnp.asarray(X)))
    op.failure = None
    np.testing.assert_array_equal(scaled(op, jnp.asarray(X)), X)


def test_grad(op: Scaled) -> None:
    text = (
        "scaled has no derivative: cugemm computes inference only; put jax.lax.stop_gradient around its operands, "
        "or give the function that calls it a derivative with jax.custom_vjp."
    )

    def loss(x: Any) -> Any:
        return scaled(op, x).sum()

    x = jnp.asarray(X)
    for f in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.grad(jax.jit(loss)), lambda x: jax.jvp(loss, (x,), (x,)), jax.hessian(loss)):
        with raises(TypeError, text):
            f(x)


def test_grad_around_it(op: Scaled) -> None:
    def with_stop(x: Any) -> Any:
        return (scaled(op, jax.lax.stop_gradient(x)) * x).sum()

    x = jnp.asarray(X)
    for f in (jax.grad(with_stop), jax.jit(jax.grad(with_stop))):
        np.testing.assert_array_equal(f(x), X)
    np.testing.assert_array_equal(jax.grad(lambda x, w: (x * scaled(op, w)).sum())(x, x), X)


def test_custom_vjp(op: Scaled) -> None:
    f = jax.custom_vjp(lambda x: scaled(op, x, scale=3.0))
    f.defvjp(lambda x: (scaled(op, x, scale=3.0), None), lambda _, g: (scaled(op, g, scale=3.0),))
    np.testing.assert_array_equal(jax.grad(lambda x: f(x).sum())(jnp.asarray(X)), np.full_like(X, 3))


def test_vmap(op: Scaled) -> None:
    x = jnp.asarray(X)
    text = "scaled cannot be vmapped; pass the batch as an axis of a batched function (bmm_fp8, matmul), or loop with jax.lax.map."
    for f in (jax.vmap(lambda x: scaled(op, x)), jax.jit(jax.vmap(lambda x: scaled(op, x))), jax.vmap(jax.jit(lambda x: scaled(op, x)))):
        with raises(TypeError, text):
            f(x)
    np.testing.assert_array_equal(jax.lax.map(lambda x: scaled(op, x), x), X)


def test_inside_control_flow(op: Scaled) -> None:
    f = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: scaled(op, x, scale=2.0), x))
    np.testing.assert_array_equal(f(X), X * 8)


def test_shape_only_tracing_runs_nothing(op: Scaled) -> None:
    shape = jax.eval_shape(lambda x: scaled(op, x, out_dtype="bfloat16"), jax.ShapeDtypeStruct((3, 4), jnp.float32))
    assert (shape.shape, shape.dtype) == ((3, 4), jnp.bfloat16)
    assert op.ran == []


def test_threads(op: Scaled) -> None:
    errors: list[Any] = []

    def work(k: int) -> None:
        for i in range(100):
            x = jnp.full((k + 1, 4), float(i))
            if not np.array_equal(scaled(op, x, scale=k), np.full((k + 1, 4), i * k, np.float32)):
                errors.append((k, i))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(op.ran) == 400


def test_operand_deleted_after_the_call(op: Scaled) -> None:
    for i in range(20):
        x = jnp.full((64, 64), float(i))
        result = scaled(op, x, scale=2.0)
        del x
        jnp.zeros((64, 64)).block_until_ready()
        assert (np.asarray(result) == 2 * i).all()


def test_the_program_carries_all_the_handler_needs(op: Scaled, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process that runs an exported program: nothing traced here, everything read from the attribute."""
    f = jax.jit(lambda x: scaled(op, x, scale=2.0, block=(1, 128), parts=2))
    x = jnp.asarray(X)
    f(x)
    monkeypatch.setattr(adapter, "_known", {})
    with pytest.raises(FROM_XLA, match="TypeError: scaled: options of unknown type test_jax_adapter:Options"):
        jax.block_until_ready(f(x))  # a module outside the library is not imported on the word of a file
    monkeypatch.setitem(sys.modules, "cugemm.options_of_this_test", types.SimpleNamespace(Options=Options))  # type: ignore[arg-type]
    monkeypatch.setattr(Options, "__module__", "cugemm.options_of_this_test")
    g = jax.jit(lambda x: scaled(op, x, scale=2.0, block=(1, 128), parts=2))
    np.testing.assert_array_equal(g(x)[1], X * 2 + 1)
    monkeypatch.setattr(adapter, "_known", {})
    np.testing.assert_array_equal(g(x)[0], X * 2)
    assert op.ran[-1][1] == Options(None, (1, 128), 2, 0)


class FakeXla:
    """An XLA_FFI_CallFrame of a GPU program, for what a machine without a GPU cannot run otherwise."""

    def __init__(self, attribute: bytes, buffers: int, results: int, *, functions: int = 18, fails: bool = False) -> None:
        self.errors: list[str] = []
        word = ctypes.c_uint64

        def create(address: int) -> int:
            self.errors.append(ctypes.c_char_p.from_address(address + 16).value.decode())
            return 0xE0

        def answer(value: int, of: Any) -> Any:
            def call(address: int) -> int:
                assert word.from_address(address + 16).value == 0xC0
                of.from_address(address + 24).value = value
                return 0xE1 if fails else 0

            return call

        prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
        self.functions = [prototype(create), prototype(answer(0x7777_0000_8888, word)), prototype(answer(3, ctypes.c_int32))]
        table = [0] * functions
        for place, function in zip((0, 4, 17), self.functions, strict=True):
            if place < functions:
                table[place] = ctypes.cast(function, ctypes.c_void_p).value or 0
        header = [0, 0, 24, 0, 3 << 32, 0]  # struct_size, extension, XLA_FFI_Api_Version {size, extension, major 0, minor 3}, internal
        self.api = (word * (len(header) + functions))(*header, *table)
        self.api[0] = ctypes.sizeof(self.api)
        self.memory = [(word * 6)(48, 0, 11, 0x1000 * (i + 1), 0, 0) for i in range(buffers + results)]
        at = [ctypes.addressof(m) for m in self.memory]
        self.args, self.rets = (word * buffers)(*at[:buffers]), (word * results)(*at[buffers:])
        self.text = ctypes.create_string_buffer(attribute)
        self.span = (word * 2)(ctypes.addressof(self.text), len(attribute))
        self.attributes = (word * 1)(ctypes.addressof(self.span))
        self.frame = (word * 22)()
        self.frame[2:5] = (ctypes.addressof(self.api), 0xC0, 0xABCD_0000_0003)  # the upper half of `stage` is padding
        for at, n, items in ((7, buffers, self.args), (12, results, self.rets), (18, 1, self.attributes)):
            self.frame[at], self.frame[at + 2] = n, ctypes.addressof(items)

    def call(self) -> int | None:
        adapter._functions.cache_clear()  # unlike XLA's, this api goes, and its address comes again
        return adapter._handle(ctypes.addressof(self.frame), True)


def test_the_gpu_handler_finds_device_and_stream(op: Scaled, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(cugemm.launch, "run_views", lambda *args: seen.append(args))
    jax.eval_shape(lambda x: scaled(op, x, scale=2.0, scratch=1), jax.ShapeDtypeStruct((3, 4), jnp.float32))
    (attribute,) = adapter._known
    assert FakeXla(attribute, 2, 2).call() is None
    x, scale = View(0x1000, (3, 4), (4, 1), "float32", 3), View(0x2000, (), (), "float32", 3)
    y, scratch = View(0x3000, (3, 4), (4, 1), "float32", 3), View(0x4000, (3, 5), (5, 1), "int32", 3)
    assert seen == [(op, (x, None, scale, None), Options(scratch=1), (y,), (scratch,), 0x7777_0000_8888)]

    monkeypatch.setattr(adapter.driver, "current_device", lambda: 5)
    assert FakeXla(attribute, 2, 2, functions=16).call() is None  # an older XLA
    assert seen[1][3][0].device == 5

    no_stream = FakeXla(attribute, 2, 2, fails=True)
    assert no_stream.call() == 0xE0
    assert no_stream.errors == ["RuntimeError: XLA has no CUDA stream for this call"]
    assert len(seen) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("jit", [False, True])
def test_gpu_operand_deleted_and_its_memory_taken_again(jit: bool) -> None:
    """Reading the pointer of a JAX array and launching on another stream fails this 30 times of 30."""
    devices = [d for d in jax.devices() if d.platform == "gpu"]
    if not devices:
        pytest.skip("this jax has no GPU")
    n = 4096
    f = jax.jit(cugemm.matmul) if jit else cugemm.matmul
    with jax.default_device(devices[0]):
        identity = jnp.eye(n, dtype=jnp.bfloat16)
        for i in range(30):
            x = jnp.full((n, n), i, jnp.bfloat16)
            y = f(x, identity)
            del x
            taken = jnp.full((n, n), 77, jnp.bfloat16)
            assert y.devices() == taken.devices() == {devices[0]}
            assert bool((y == i).all())


def test_disable_jit(op: Scaled) -> None:
    with jax.disable_jit():
        np.testing.assert_array_equal(scaled(op, jnp.asarray(X), scale=2.0), X * 2)


def test_lowering_for_other_platforms(op: Scaled) -> None:
    traced = jax.jit(lambda x: scaled(op, x)).trace(jax.ShapeDtypeStruct((3, 4), jnp.float32))
    assert "custom_call @cugemm" in traced.lower(lowering_platforms=("cuda",)).as_text()
    text = "scaled: cugemm runs on CPUs and NVIDIA GPUs, not on rocm; place the arrays on one of jax.devices('cuda')."
    with raises(TypeError, text):
        traced.lower(lowering_platforms=("rocm",))


def test_several_devices() -> None:
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import test_jax_adapter as t
op = t.Scaled()
one, two = jax.devices()
mesh = Mesh(np.array([one, two]), ("d",))
x = jnp.ones((4, 4))
spread = jax.device_put(x, NamedSharding(mesh, P("d")))
there = jax.device_put(x, two)

def says(text, f, *args, **kw):
    try:
        f(*args, **kw)
    except TypeError as error:
        assert text in str(error), error
    else:
        raise AssertionError(text)

says("scaled: x is spread over 2 devices; use shard_map", t.scaled, op, spread)
says("scaled: the program runs on several devices; use shard_map", jax.jit(lambda x: t.scaled(op, x)), spread)
says(f"scaled: x is on {one}, but y is on {two}; move one with jax.device_put.", t.scaled, op, x, there)
import sys, types, cugemm
cugemm.launch = sys.modules["cugemm.launch"] = types.SimpleNamespace(run_views=lambda op, v, o, outs, w, s: op.run(v, o, outs, w))
assert t.scaled(op, there, scale=3.0).devices() == {two}
shard_map = getattr(jax, "shard_map", None)
if shard_map is None:
    from jax.experimental.shard_map import shard_map
f = jax.jit(shard_map(lambda x: t.scaled(op, x, scale=3.0), mesh=mesh, in_specs=P("d"), out_specs=P("d")))
assert (np.asarray(f(spread)) == 3).all()
assert {v[0][0].shape for v in op.ran[-2:]} == {(2, 4)}
"""
    here = Path(__file__).parent
    paths = ";".join(f"sys.path.insert(0, {str(p)!r})" for p in (here, here.parent))
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", f"import sys;{paths}\n{code}"], check=True, env=environment, timeout=120)
