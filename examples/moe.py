"""A mixture-of-experts layer, in cells ("# %%"): `python examples/moe.py` runs them all."""

# %% [markdown]
# # A mixture-of-experts layer
#
# Route, gate and up projection, SwiGLU, down projection, weighted sum: the layer of a mixture-of-experts transformer in three calls, in
# bf16 and with quantised experts, against float64. PyTorch here; CuPy and JAX arrays go through the same calls.
#
# Install, in a clone of the repository: `pip install -e '.[cuda13]' torch` (with torch 2.10 or older: `'.[cuda12]'`). Without a GPU it
# runs on CPU tensors: the same calls, computed by the NumPy reference, on a smaller layer.

# %%
import torch

import cugemm

gpu = torch.cuda.is_available()
device = "cuda" if gpu else "cpu"
print(torch.cuda.get_device_name() if gpu else "no GPU: NumPy reference")

tokens, d, f, experts, top = (512, 2048, 768, 64, 8) if gpu else (48, 128, 64, 16, 4)
generator = torch.Generator().manual_seed(0)


def normal(*shape, scale=1.0):
    return (scale * torch.randn(*shape, generator=generator)).to(device, torch.bfloat16)


x = normal(tokens, d)
router = normal(experts, d, scale=d**-0.5)
w13 = normal(experts, 2 * f, d, scale=d**-0.5)  # gate in the first f rows of each expert, up in the others
w2 = normal(experts, d, f, scale=f**-0.5)

# %% [markdown]
# ## The layer
#
# `indices` [tokens, top] names the experts of each token. Nothing is sorted or gathered by hand, nothing is read back from the GPU:
#
# 1. `grouped_matmul(x, w13, indices=indices)` multiplies token t with its experts `indices[t, j]`: [tokens, top, 2 f].
# 2. `silu_and_mul` is the gate: [tokens, top, f].
# 3. `grouped_matmul(h, w2, indices=indices, weights=weights)` multiplies every row h[t, j] with its own expert and sums over j, in the
#    order of j, so that every run gives the same bits: [tokens, d].


# %%
def route(x):
    """Experts of each token and their weights: softmax over the router's logits, the largest ones, normalised."""
    probabilities = torch.softmax(cugemm.linear(x, router, out_dtype="float32"), dim=-1)
    weights, indices = torch.topk(probabilities, top, dim=-1)
    return indices, weights / weights.sum(-1, keepdim=True)


def layer(x, w13, w2, indices, weights, activations=None):
    h = cugemm.silu_and_mul(cugemm.grouped_matmul(x, w13, indices=indices, activations=activations))
    return cugemm.grouped_matmul(h, w2, indices=indices, weights=weights, activations=activations)


def exact(x, w13, w2, indices, weights):
    """The same in float64, expert by expert."""
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e in range(experts):
        token, j = torch.nonzero(indices == e, as_tuple=True)
        gate, up = (x[token].double() @ w13[e].double().T).chunk(2, dim=-1)
        part = (torch.nn.functional.silu(gate) * up) @ w2[e].double().T
        y.index_add_(0, token, weights[token, j].double()[:, None] * part)
    return y


indices, weights = route(x)
wanted = exact(x, w13, w2, indices, weights)


def error(y):
    """|y - wanted| / |wanted|, Frobenius norms."""
    return ((y.double() - wanted).norm() / wanted.norm()).item()


y = layer(x, w13, w2, indices, weights)
print(tuple(y.shape), y.dtype, f"error {error(y):.1e}; same bits again: {torch.equal(y, layer(x, w13, w2, indices, weights))}")

# %% [markdown]
# ## Quantised experts
#
# Weights in the formats that checkpoints come in; with `activations=` tokens are quantised on the fly as well.

# %%
for weight_format, activations in (
    ("fp8_row", None), ("fp8_block", "fp8_group"), ("mxfp8", "mxfp8"), ("nvfp4", None), ("nvfp4", "nvfp4"), ("int4_g128", None),
):  # fmt: skip
    q13, q2 = cugemm.quantize(w13, weight_format), cugemm.quantize(w2, weight_format)
    y = layer(x, q13, q2, indices, weights, activations)
    print(f"{weight_format:10s} experts, {activations or 'bf16':9s} tokens: error {error(y):.1e}")

# %% [markdown]
# ## Sorted rows
#
# A system that sorts tokens by expert itself (after an all-to-all, say) passes segments. `rows` gathers from x, `combine` finds the results
# again; or x has a fixed capacity for each expert, and `counts` says how much of it is used.

# %%
order = torch.argsort(indices.reshape(-1), stable=True)
indptr = torch.searchsorted(indices.reshape(-1)[order], torch.arange(experts + 1, device=device)).to(torch.int32)
places = torch.empty_like(order)
places[order] = torch.arange(len(order), device=device)

h = cugemm.silu_and_mul(cugemm.grouped_matmul(x, w13, indptr=indptr, rows=order // top))
rows = cugemm.grouped_matmul(h, w2, indptr=indptr, out_dtype="float32")
y = cugemm.combine(rows, weights, indices=places.reshape(tokens, top), out_dtype="bfloat16")
print(f"sorted rows: error {error(y):.1e}")

counts = torch.diff(indptr)
slots = torch.zeros(experts, int(counts.max()), d, device=device, dtype=torch.bfloat16)
for e in range(experts):
    slots[e, : counts[e]] = x[order[indptr[e] : indptr[e + 1]] // top]
masked = cugemm.grouped_matmul(slots, w13, counts=counts)
print("capacity:", tuple(masked.shape), "rows that are not used are zeros:", not masked[0, counts[0] :].any().item())

# %% [markdown]
# ## In a CUDA graph
#
# Which expert gets which token is data on the device, so one captured graph serves every routing.

# %%
if gpu:
    held = x.clone()

    def step():
        indices, weights = route(held)
        return layer(held, w13, w2, indices, weights)

    step()  # compiles and loads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for _ in range(3):
        held.copy_(normal(tokens, d))
        graph.replay()
        print("replayed with other tokens, same bits as the call:", torch.equal(y, step()))
else:
    print("no GPU: nothing to capture")

# %% [markdown]
# ## What runs

# %%
print(cugemm.explain(cugemm.grouped_matmul, x, cugemm.quantize(w13, "nvfp4"), indices=indices, activations="fp8_row"))
