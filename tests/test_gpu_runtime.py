"""What surrounds a product on the GPU: graphs, threads, forks, plans, packs, alignment, aliasing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import gpu_arrays
import ml_dtypes
import numpy as np
import oracles
import pytest

import cugemm
from cugemm import compile as compiler
from cugemm import launch

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

Array = np.ndarray[Any, Any]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def dev() -> Any:
    return gpu_arrays.Cupy()


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


def small(seed: int = 0, m: int = 8, n: int = 16, k: int = 64) -> oracles.Case:
    return oracles.exact_case(seed, m, n, k, "bf16", "bf16")


# --- graphs -----------------------------------------------------------------------------------------------------------------------


def graph_calls(torch: Any) -> dict[str, tuple[Any, Any, Any]]:
    """name -> (input that changes, new values of it, the call): products with and without scratch, quantisers that clear memory."""
    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
    torch.manual_seed(0)
    x, w = torch.randn(24, 96, device="cuda", dtype=bf16), torch.randn(40, 96, device="cuda", dtype=bf16)
    a8, w8, scale = torch.randn(24, 96, device="cuda").to(fp8), torch.randn(40, 96, device="cuda").to(fp8), torch.rand(40, device="cuda")
    experts, index = torch.randn(3, 40, 96, device="cuda", dtype=bf16), torch.randint(-1, 4, (24,), device="cuda", dtype=torch.int64)
    wrapper = cugemm.SegmentGEMMWrapper(None)
    return {
        "linear": (x, torch.randn_like(x), lambda: cugemm.linear(x, w)),
        "mm_fp8": (a8, torch.randn(24, 96, device="cuda").to(fp8), lambda: cugemm.mm_fp8(a8, w8.T, b_scale=scale)),
        "experts": (index, torch.randint(-1, 4, (24,), device="cuda"), lambda: wrapper.run(x, experts, index, True)),
        "quantize": (x, torch.randn_like(x), lambda: cugemm.dequantize(cugemm.quantize(x, "fp8_tensor"), "float32")),
        "activations": (x, torch.randn_like(x), lambda: cugemm.linear(x, w8, activations="fp8_row")),
    }


def test_torch_graphs(torch: Any) -> None:
    """Warm, capture, replay with changed inputs: the bits of an ordinary call."""
    for name, (x, new, call) in graph_calls(torch).items():
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        old = x.clone()
        for value in (old, new, old):
            x.copy_(value)
            graph.replay()
            expected = call()
            torch.cuda.synchronize()
            assert torch.equal(y.view(torch.uint8), expected.view(torch.uint8)), name
            assert bool(y.float().isfinite().all()) and bool((y != 0).any()), name
        x.copy_(new)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, call()), name


def test_cupy_graphs(dev: Any) -> None:
    cupy = dev.cupy
    first, second = small(1), small(2)
    a, b = dev.put(first.a), dev.put(np.ascontiguousarray(first.b))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        out = cugemm.matmul(a, b)
        stream.synchronize()
        stream.begin_capture()
        assert cugemm.matmul(a, b, out=out) is out
        graph = stream.end_capture()
        for case in (first, second, first):
            a.view("uint16")[...] = dev.put(case.a.view(np.uint16))
            out.view("uint16").fill(0xFFFF)
            graph.launch(stream)
            stream.synchronize()
            changed = oracles.given_case(case.a, first.b, "bf16", "bf16", repro=case.repro)
            oracles.check_exact(changed, dev.fetch(out), "bfloat16")


def test_capture_of_a_cold_call_names_warmup(torch: Any, dev: Any) -> None:
    """... before anything is enqueued, so that the capture itself ends well, and warmup is all it takes."""
    case = small(3, 5, 24, 64)
    x, w = (torch.from_numpy(v.view(np.int16).copy()).cuda().view(torch.bfloat16) for v in (case.a, np.ascontiguousarray(case.b.T)))
    launch.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(cugemm.CaptureError, match=r"linear: .*warmup\(cugemm\.linear"):
            cugemm.linear(x, w)
        y = x + 1
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, x + 1), "the capture went on"
    del graph
    before = launch.launches
    cugemm.warmup(cugemm.linear, x, w)
    assert launch.launches == before, "warmup runs nothing"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cugemm.linear(x, w)
    graph.replay()
    assert torch.equal(y, cugemm.linear(x, w))
    del graph

    launch.clear()
    a, b = dev.put(case.a), dev.put(case.b)
    with dev.cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        with pytest.raises(cugemm.CaptureError, match="warmup"):
            cugemm.matmul(a, b)
        stream.end_capture()
    oracles.check_exact(case, dev.fetch(cugemm.matmul(a, b)), "bfloat16")


# --- threads and processes --------------------------------------------------------------------------------------------------------

CALLS, BATCH = 100_000, 64


def test_two_threads(dev: Any) -> None:
    """2 x 10^5 calls on 64 operands and results a thread: a pointer of the other thread in a launch would show. Checked on the device."""
    cupy = dev.cupy
    wrong: list[Any] = [None, None]
    errors: list[BaseException] = []
    barrier = threading.Barrier(2)

    def work(number: int) -> None:
        try:
            shapes = [(4, 8, 32), (3, 16, 32)]
            with cupy.cuda.Stream(non_blocking=True) as stream:
                sets = []
                for m, n, k in shapes:
                    cases = [oracles.exact_case(1000 * number + i, m, n, k, "bf16", "bf16") for i in range(BATCH // 2)]
                    a, b = ([dev.put(np.ascontiguousarray(getattr(c, side))) for c in cases] for side in "ab")
                    expected = dev.put(
                        np.stack([oracles.nearest(c.exact, "bfloat16").astype(ml_dtypes.bfloat16).view(np.uint16) for c in cases])
                    )
                    memory = cupy.full(expected.shape, 0xFFFF, "uint16")
                    sets.append((a, b, [memory[i].view(ml_dtypes.bfloat16) for i in range(len(cases))], memory, expected))
                bad = cupy.zeros((), "int64")
                stream.synchronize()
                barrier.wait()
                matmul = cugemm.matmul
                for round_ in range(CALLS // BATCH):
                    for a, b, out, _, _ in sets:
                        for x, y, z in zip(a, b, out, strict=True):
                            matmul(x, y, out=z)
                    if round_ % 32 == 0 or round_ == CALLS // BATCH - 1:
                        for *_, memory, expected in sets:
                            bad += (memory != expected).sum()
                            memory.fill(0xFFFF)
                stream.synchronize()
                wrong[number] = int(bad)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    before = launch.launches
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert wrong == [0, 0]
    assert launch.launches > before


def test_thread_without_a_context(dev: Any) -> None:
    """A thread that has called nothing of CUDA yet."""
    case = small(4)
    a, b = dev.put(case.a), dev.put(case.b)
    expert = oracles.exact_case(5, 20, 16, 64, "bf16", "bf16", experts=3)
    grouped = [dev.put(x) for x in (expert.a, expert.b, expert.expert.astype(np.int32))]
    wrapper = cugemm.SegmentGEMMWrapper(None)
    for cold in (True, False):
        results: list[Any] = []

        def work(results: list[Any] = results) -> None:
            try:
                results.append(cugemm.matmul(a, b))
                results.append(wrapper.run(*grouped))
            except Exception as error:
                results.append(error)

        if cold:
            launch.clear()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        dev.cupy.cuda.Device().synchronize()
        assert len(results) == 2 and not any(isinstance(r, Exception) for r in results), results
        oracles.check_exact(case, dev.fetch(results[0]), "bfloat16")
        oracles.check_exact(expert, dev.fetch(results[1]), "bfloat16")


def test_threads_that_miss_together_compile_once(dev: Any) -> None:
    case = small(6, 9, 24, 40)
    a, b = dev.put(case.a), dev.put(case.b)
    launch.clear()
    before = sum(compiler.stats.values())
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(cugemm.matmul(a, b))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dev.cupy.cuda.Device().synchronize()
    assert len(results) == 8 and sum(compiler.stats.values()) == before + 1
    for result in results:
        oracles.check_exact(case, dev.fetch(result), "bfloat16")


FORK = """
import os, sys
import numpy as np, cupy, cugemm
a = cupy.ones((4, 32), "float16")
assert bool((cugemm.matmul(a, a.T) == 32).all())
child = os.fork()
if child == 0:
    try:
        cugemm.matmul(a, a.T)
    except cugemm.CudaError as error:
        os._exit(0 if "fork" in str(error) and "spawn" in str(error) else 3)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(4)
    os._exit(5)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, os.waitstatus_to_exitcode(status)
assert bool((cugemm.matmul(a, a.T) == 32).all()), "the parent goes on"
print("ok")
"""


def in_a_process(code: str, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork() -> None:
    assert in_a_process(FORK).endswith("ok\n")


# --- plans, packs -----------------------------------------------------------------------------------------------------------------


def test_plan_explain_warmup(dev: Any) -> None:
    case = small(7, 33, 65, 128)
    a, b = dev.put(case.a), dev.put(case.b)
    before = launch.launches
    made = cugemm.plan(cugemm.matmul, a, b, out_dtype="float32")
    assert made.kernels == ["portable"]
    text = cugemm.explain(cugemm.matmul, a, b)
    assert ("portable" in text and "sm_90a" in text) or "sm_" in text
    cugemm.warmup(cugemm.matmul, cugemm.Spec((33, 128), "bfloat16"), cugemm.Spec((128, 65), "bfloat16"), m=[1, 300])
    assert launch.launches == before
    compiled = sum(compiler.stats.values())
    for _ in range(2):
        oracles.check_exact(case, dev.fetch(made(a, b)), "float32")
    assert launch.launches == before + 2
    assert sum(compiler.stats.values()) == compiled, "the plan had loaded everything"
    with pytest.raises(ValueError, match="plan was made for"):
        made(a[:5], b)
    with pytest.raises(ValueError, match="plan was made for"):
        made(dev.put(case.a.astype(np.float32)), b)


def test_new_m_in_a_known_bucket_compiles_nothing(dev: Any) -> None:
    b = dev.put(oracles.encode(np.ones((64, 40)), "bf16"))
    for m in (65, 96, 129, 192):
        cugemm.matmul(dev.put(oracles.encode(np.ones((m, 64)), "bf16")), b)
    before = sum(compiler.stats.values())
    for m in (66, 70, 95, 130, 191):
        y = dev.fetch(cugemm.matmul(dev.put(oracles.encode(np.ones((m, 64)), "bf16")), b))
        assert y.shape == (m, 40) and (y == 64).all()
    assert sum(compiler.stats.values()) == before


def test_launch_counter_and_empty_results(dev: Any) -> None:
    case = small(8)
    a, b = dev.put(case.a), dev.put(case.b)
    cugemm.matmul(a, b)
    before = launch.launches
    cugemm.matmul(a, b)
    assert launch.launches == before + 1
    for x, y in ((a[:0], b), (a, b[:, :0])):
        assert cugemm.matmul(x, y).size == 0
    with pytest.raises(ValueError, match="k = "):
        cugemm.matmul(a, a)
    assert launch.launches == before + 1


PACKED = """
import numpy as np, cupy, ml_dtypes, cugemm
from cugemm import compile as compiler
for a, b in (("float8_e4m3fn", "float8_e4m3fn"), ("bfloat16", "bfloat16")):
    ones = {"float8_e4m3fn": (0x38, "uint8"), "bfloat16": (0x3F80, "uint16")}
    x, w = (cupy.full(shape, *ones[name]).view(getattr(ml_dtypes, name)) for name, shape in ((a, (8, 256)), (b, (512, 256))))
    y = cugemm.linear(x, w, out_dtype="float32")
    assert bool((y == 256).all())
print(dict(compiler.stats))
"""


def test_cubins_of_a_pack(tmp_path: Path) -> None:
    """A directory with pack.json is used before the compiler; a second process compiles nothing."""
    directory = Path(os.environ["CUGEMM_CACHE_DIR"])
    if not (directory / "pack.json").is_file():  # make one of what the calls need
        directory = tmp_path / "pack"
        write = """
        import json, sys
        from cugemm import arch, compile as compiler, launch
        jobs, resolve = [], compiler._resolve
        compiler._resolve = lambda job, kernels: (jobs.append(job), resolve(job, kernels))[1]
        """
        code = textwrap.dedent(write) + PACKED + f"\nfrom pathlib import Path\nprint(compiler.write_pack(Path({str(directory)!r}), jobs))"
        in_a_process(code, CUGEMM_CACHE_DIR=str(tmp_path / "cache"))
        assert len(json.loads((directory / "pack.json").read_text())["cubins"]) >= 2
    stats = in_a_process(PACKED, CUGEMM_CACHE_DIR=str(directory))
    assert "'compile'" not in stats and "'pack'" in stats, stats


DEBUG = """
import numpy as np, cupy, cugemm, pytest
x, w = cupy.ones((4, 32), "float16"), cupy.ones((3, 32, 8), "float16")
wrapper = cugemm.SegmentGEMMWrapper(None)
good = wrapper.run(x, w, cupy.asarray(np.array([2, 0, 1, 2], np.int32)))
assert bool((good == 32).all())
cases = {
    "expert_indices has 2 values outside": lambda: wrapper.run(x, w, cupy.asarray(np.array([2, 3, -2, 0], np.int64))),
    "seg_indptr has 1 value below the one before": lambda: wrapper.run(x, w, 3, seg_indptr=cupy.asarray(np.array([0, 3, 2, 4], np.int32))),
    "seg_lens has 1 value negative": lambda: wrapper.run(x, w, 3, seg_lens=cupy.asarray(np.array([1, -1, 2], np.int32))),
    "weight_indices has 1 value outside": lambda: wrapper.run(
        x, w, 1, seg_lens=cupy.asarray(np.array([4])), weight_indices=cupy.asarray(np.array([3]))
    ),
    "b.scale has 1 value not finite": lambda: cugemm.matmul(x, cugemm.Quantized(
        cupy.zeros((8, 32), "uint8"), cupy.asarray(np.array([1, 2, 3, np.nan, 5, 6, 7, 8], np.float32)).reshape(8, 1), "fp8_row").T),
}
for text, call in cases.items():
    before = cugemm.launch.launches
    with pytest.raises(ValueError, match=text):
        call()
    assert cugemm.launch.launches == before, text
print("ok")
"""


def test_debug_checks_values_on_the_gpu() -> None:
    assert in_a_process(DEBUG, CUGEMM_DEBUG="1").endswith("ok\n")


def test_this_run_came_from_the_pack() -> None:
    """When CUGEMM_CACHE_DIR is a pack, everything the tests before this one ran for this GPU was in it."""
    if not (Path(os.environ["CUGEMM_CACHE_DIR"]) / "pack.json").is_file():
        pytest.skip("CUGEMM_CACHE_DIR is no pack")
    assert compiler.stats["pack"] > 0
    assert compiler.stats["compile"] == 0, dict(compiler.stats)


# --- alignment, aliasing, values --------------------------------------------------------------------------------------------------


def test_a_pointer_that_loses_its_alignment(dev: Any) -> None:
    """The plan of an aligned operand does not serve one of the same shape, strides and dtype that starts elsewhere, and the other way."""
    case = oracles.exact_case(9, 17, 24, 64, "e4m3", "e4m3")
    b = dev.put(np.asfortranarray(case.b))
    memory = dev.cupy.zeros(17 * 64 + 32, "uint8")
    plain = dev.put(case.a.view(np.uint8))
    for shift in (0, 1, 8, 15, 16, 3, 0):
        a = memory[shift : shift + 17 * 64].reshape(17, 64)
        a[...] = plain
        oracles.check_exact(case, dev.fetch(cugemm.mm_fp8(a.view(case.a.dtype), b)), "bfloat16")
    out = dev.cupy.full((17 * 24 + 8,), 0xFFFF, "uint16")
    for shift in (0, 1, 2, 3, 0):
        z = out[shift : shift + 17 * 24].reshape(17, 24).view(ml_dtypes.bfloat16)
        cugemm.mm_fp8(plain.view(case.a.dtype), b, out=z)
        oracles.check_exact(case, dev.fetch(z), "bfloat16")


def test_out_that_shares_memory(dev: Any) -> None:
    """Refused cold and warm; slices of one fused buffer are fine, cold and warm."""
    case = small(10, 16, 16, 16)
    fused = oracles.poison((16, 64), "bfloat16")
    fused[:, :16] = case.a
    buffer = dev.put(fused)
    a, b = buffer[:, :16], dev.put(case.b)
    for _ in range(3):
        out = buffer[:, 16:32]
        assert cugemm.matmul(a, b, out=out) is out
        oracles.check_exact(case, dev.fetch(out), "bfloat16")
    for overlapping in (buffer[:, 8:24], buffer[:, :16]):
        before = launch.launches
        for _ in range(2):
            with pytest.raises(ValueError, match="out shares memory with a"):
                cugemm.matmul(a, b, out=overlapping)
        assert launch.launches == before
    oracles.check_bits(dev.fetch(buffer[:, :16]), case.a)


def test_scalars_by_value(dev: Any) -> None:
    """A value is no part of a plan; one past float32 is refused, warm calls included."""
    case = oracles.exact_case(11, 5, 8, 32, "e4m3", "e4m3")
    a, b = dev.put(case.a), dev.put(case.b)
    for alpha in (1.0, 2.0, -0.5, 1.0, np.float32(4), np.float64(0.25), 3):
        scaled = oracles.given_case(case.a, case.b, "e4m3", "e4m3", alpha=float(alpha))
        oracles.check_exact(scaled, dev.fetch(cugemm.mm_fp8(a, b, alpha, "float32")), "float32")
    for x, y in ((case.a, case.b), (a, b), (a, dev.put(np.asfortranarray(case.b)))):
        with pytest.raises(ValueError, match="alpha is a number outside float32"):  # on the host, warm, cold
            cugemm.mm_fp8(x, y, 1e39, "float32")
