"""Source of cupy_quickstart.ipynb; `python examples/build.py --execute` makes it."""

# %% [markdown]
# # cugemm with CuPy
#
# Install, in a clone of the repository: `pip install -e '.[cuda12]'` (CUDA 13: `'.[cuda13]'`).
#
# Without a GPU this notebook runs on NumPy arrays: the same calls, computed by the NumPy reference, on smaller matrices.

# %%
import time

import numpy as np

import cugemm

try:
    import cupy

    gpu = cupy.cuda.is_available()
except ImportError:
    gpu = False
xp = cupy if gpu else np
print(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode() if gpu else "no GPU: NumPy reference")

# %% [markdown]
# ## A product
#
# `linear(x, w)` is `x @ w.T`, as layers store their weights: `x [m, k]`, `w [n, k]`.

# %%
m, n, k = (64, 11008, 4096) if gpu else (8, 512, 1024)
rng = np.random.default_rng(0)
x_host = rng.standard_normal((m, k), dtype=np.float32).astype(np.float16)
w_host = (rng.standard_normal((n, k), dtype=np.float32) / np.sqrt(k)).astype(np.float16)
exact = x_host.astype(np.float64) @ w_host.astype(np.float64).T

x, w = xp.asarray(x_host), xp.asarray(w_host)
y = cugemm.linear(x, w)


def error(y):
    """|y - exact| / |exact|, Frobenius norms, against float64."""
    y = (y.get() if gpu else y).astype(np.float64)
    return np.linalg.norm(y - exact) / np.linalg.norm(exact)


print(type(y).__module__, y.dtype, y.shape, f"error {error(y):.1e}")

# %% [markdown]
# ## Quantise and multiply
#
# `quantize` keeps data, scale and format together in a `Quantized`. Weights alone (w8a16), or activations too (w8a8).

# %%
print(f"{'weight':12s}{'bytes':>10s}{'w8a16 error':>14s}{'w8a8 error':>14s}")
print(f"{'fp16':12s}{w.nbytes:10d}{error(y):14.1e}")
for weights, activations in (("fp8_tensor", "fp8_tensor"), ("fp8_row", "fp8_row"), ("fp8_block", "fp8_group")):
    q = cugemm.quantize(w, weights)
    w8a16, w8a8 = cugemm.linear(x, q), cugemm.linear(x, q, activations=activations)
    print(f"{weights:12s}{q.data.nbytes + q.scale.nbytes:10d}{error(w8a16):14.1e}{error(w8a8):14.1e}")

# %% [markdown]
# ## What will run
#
# `explain` takes the arguments of the call, runs nothing, and prints the problem as it was read, every candidate with its predicted
# time, and why other kernels refused.

# %%
q = cugemm.quantize(w, "fp8_row")
print(q)
print(cugemm.explain(cugemm.linear, x, q))

# %% [markdown]
# ## In a CUDA graph
#
# `warmup` compiles and loads before the capture; inside one, a call that would have to do so raises `CaptureError`.

# %%
if gpu:
    out = cupy.empty((m, n), cupy.float16)
    cugemm.warmup(cugemm.linear, x, q, out=out)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()  # x and q were written on another stream
    with stream:
        stream.begin_capture()
        cugemm.linear(x, q, out=out)
        graph = stream.end_capture()
        graph.launch()
    stream.synchronize()
    print("replayed, same bits as the call:", bool((out == cugemm.linear(x, q)).all()))
else:
    print("no GPU: nothing to capture")

# %% [markdown]
# ## Times
#
# Calls replayed from a graph, median; weights that fit stay in the L2 cache. `python -m cugemm bench` measures with cold weights, beside
# baselines and floors.


# %%
def microseconds(call, calls=20, rounds=7):
    """Per call: median over rounds."""
    call()
    times = []
    if not gpu:
        for _ in range(rounds):
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e6)
        return float(np.median(times))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        for _ in range(calls):
            call()
        graph = stream.end_capture()
        graph.launch()
        for _ in range(rounds):
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record()
            graph.launch()
            end.record()
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(begin, end) * 1e3 / calls)
    return float(np.median(times))


print(f"{'m':>5s}{'fp16 us':>10s}{'fp8 weight us':>15s}")
for rows in (1, 8, 64) if gpu else (1, 8):
    a, out = x[:rows], xp.empty((rows, n), np.float16)
    plain = microseconds(lambda a=a, out=out: cugemm.linear(a, w, out=out))
    quantised = microseconds(lambda a=a, out=out: cugemm.linear(a, q, out=out))
    print(f"{rows:5d}{plain:10.1f}{quantised:15.1f}")
