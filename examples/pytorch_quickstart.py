"""Source of pytorch_quickstart.ipynb; `python examples/build.py --execute` makes it."""

# %% [markdown]
# # cugemm with PyTorch
#
# Install, in a clone of the repository: `pip install -e '.[cuda13]' torch` (with torch 2.10 or older: `'.[cuda12]'`).
#
# Without a GPU this notebook runs on CPU tensors: the same calls, computed by the NumPy reference, on smaller matrices.

# %%
import time

import torch

import cugemm

gpu = torch.cuda.is_available()
device = "cuda" if gpu else "cpu"
print(torch.cuda.get_device_name() if gpu else "no GPU: NumPy reference")

# %% [markdown]
# ## A product
#
# `linear(x, w, bias)` is `torch.nn.functional.linear`, on torch's current stream, into memory of torch's allocator.

# %%
m, n, k = (64, 11008, 4096) if gpu else (8, 512, 1024)
generator = torch.Generator().manual_seed(0)
x = torch.randn(m, k, generator=generator).to(device, torch.bfloat16)
w = (torch.randn(n, k, generator=generator) / k**0.5).to(device, torch.bfloat16)
bias = torch.randn(n, generator=generator).to(device, torch.bfloat16)
exact = x.double() @ w.double().T + bias.double()


def error(y):
    """|y - exact| / |exact|, Frobenius norms, against float64."""
    return ((y.double() - exact).norm() / exact.norm()).item()


y = cugemm.linear(x, w, bias)
print(type(y), y.dtype, tuple(y.shape), f"error {error(y):.1e}; torch's {error(torch.nn.functional.linear(x, w, bias)):.1e}")

# %% [markdown]
# ## Quantise and multiply
#
# Weights alone (w8a16), or activations too (w8a8).

# %%
for weights, activations in (("fp8_tensor", "fp8_tensor"), ("fp8_row", "fp8_row"), ("fp8_block", "fp8_group")):
    q = cugemm.quantize(w, weights)
    w8a16, w8a8 = cugemm.linear(x, q, bias), cugemm.linear(x, q, bias, activations=activations)
    print(f"{weights:12s} w8a16 error {error(w8a16):.1e}   w8a8 error {error(w8a8):.1e}   {q}")

# %% [markdown]
# ## FlashInfer's names
#
# The same functions, in FlashInfer's positional orders: `import cugemm as flashinfer`.

# %%
import cugemm as flashinfer

a, b = cugemm.quantize(x, "fp8_tensor"), cugemm.quantize(w, "fp8_tensor")
out = flashinfer.bmm_fp8(a.data[None], b.data.T[None], a.scale, b.scale, torch.bfloat16)
print(tuple(out.shape), f"error {error(out[0] + bias):.1e}")

experts = torch.randn(4, k, 256, generator=generator).to(device, torch.bfloat16)
indices = torch.randint(0, 4, (m,), generator=generator, dtype=torch.int32).to(device)
wrapper = flashinfer.SegmentGEMMWrapper(num_experts=4, hidden_size=k, intermediate_size=256, device=device)
print(tuple(wrapper.forward(x, experts, indices).shape), "row i times experts[indices[i]]")

# %% [markdown]
# ## What will run

# %%
q = cugemm.quantize(w, "fp8_row")
print(cugemm.explain(cugemm.linear, x, q, bias))

# %% [markdown]
# ## In a CUDA graph
#
# `warmup` compiles and loads before the capture; inside one, a call that would have to do so raises `CaptureError`.

# %%
if gpu:
    cugemm.warmup(cugemm.linear, x, q, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cugemm.linear(x, q, bias)
    graph.replay()
    print("replayed, same bits as the call:", torch.equal(y, cugemm.linear(x, q, bias)))
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
        return sorted(times)[rounds // 2]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return sorted(times)[rounds // 2]


sizes = (1, 4, 16, 64, 256, 1024) if gpu else (1, 4, 16)
rows = {"torch bf16": [], "cugemm bf16": [], "cugemm fp8 weight": []}
for size in sizes:
    a = torch.randn(size, k, device=device, dtype=torch.bfloat16)
    rows["torch bf16"].append(microseconds(lambda a=a: torch.nn.functional.linear(a, w)))
    rows["cugemm bf16"].append(microseconds(lambda a=a: cugemm.linear(a, w)))
    rows["cugemm fp8 weight"].append(microseconds(lambda a=a: cugemm.linear(a, q)))

print(f"{'m':>18s}" + "".join(f"{size:10d}" for size in sizes))
for name, times in rows.items():
    print(f"{name:>18s}" + "".join(f"{us:10.1f}" for us in times))

# %%
from matplotlib import pyplot

figure, axes = pyplot.subplots(figsize=(6, 3.5))
for name, times in rows.items():
    axes.plot(sizes, times, marker="o", label=name)
axes.set(xscale="log", yscale="log", xlabel="m", ylabel="microseconds", title=f"n = {n}, k = {k}, {'GPU' if gpu else 'CPU reference'}")
axes.legend()
pyplot.show()
