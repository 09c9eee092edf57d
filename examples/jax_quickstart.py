"""Source of jax_quickstart.ipynb; `python examples/build.py --execute` makes it."""

# %% [markdown]
# # cugemm with JAX
#
# Install, in a clone of the repository: `pip install -e '.[cuda13]' 'jax[cuda13]'`, or `'.[cuda12]' 'jax[cuda12]'`.
#
# Without a GPU this notebook runs on JAX's CPU backend: the same calls, computed by the NumPy reference, on smaller matrices.

# %%
import time

import jax
import jax.numpy as jnp
import numpy as np

import cugemm

gpu = jax.default_backend() == "gpu"
print(jax.devices()[0].device_kind if gpu else "no GPU: NumPy reference")

# %% [markdown]
# ## A product
#
# Eager calls and `jax.jit` take one path: an XLA FFI call. The kernel runs on XLA's stream, and XLA owns all memory.

# %%
m, n, k = (64, 11008, 4096) if gpu else (8, 512, 1024)
rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((m, k), dtype=np.float32), jnp.bfloat16)
w = jnp.asarray(rng.standard_normal((n, k), dtype=np.float32) / np.sqrt(k), jnp.bfloat16)
exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T


def error(y):
    """|y - exact| / |exact|, Frobenius norms, against float64."""
    return np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact)


y = cugemm.linear(x, w)
print(type(y).__name__, y.dtype, y.shape, f"error {error(y):.1e}")

# %% [markdown]
# ## Quantise and multiply
#
# Weights alone (w8a16), or activations too (w8a8).

# %%
for weights, activations in (("fp8_tensor", "fp8_tensor"), ("fp8_row", "fp8_row"), ("fp8_block", "fp8_group")):
    q = cugemm.quantize(w, weights)
    w8a16, w8a8 = cugemm.linear(x, q), cugemm.linear(x, q, activations=activations)
    print(f"{weights:12s} w8a16 error {error(w8a16):.1e}   w8a8 error {error(w8a8):.1e}   {q}")

# %% [markdown]
# ## In jax.jit
#
# A `Quantized` is not a pytree: pass its arrays and put them together inside. (One that is closed over becomes a constant of the program.)


# %%
@jax.jit
def layer(x, data, scale):
    y = cugemm.linear(x, cugemm.Quantized(data, scale, "fp8_row"), activations="fp8_row")
    return jax.nn.silu(y)


q = cugemm.quantize(w, "fp8_row")
print(
    f"difference to eager calls: {jnp.abs(layer(x, q.data, q.scale) - jax.nn.silu(cugemm.linear(x, q, activations='fp8_row'))).max():.1e}"
)

# %% [markdown]
# ## What will run
#
# `explain` takes `cugemm.Spec` in place of arrays and runs nothing.


# %%
def spec(array):
    return cugemm.Spec(array.shape, array.dtype, device=0 if gpu else -1)  # -1: host memory


print(cugemm.explain(cugemm.linear, spec(x), cugemm.Quantized(spec(q.data), spec(q.scale), "fp8_row")))

# %% [markdown]
# ## Times
#
# Programs of ten products in a row, so that the time of a launch hardly counts. `python -m cugemm bench` measures with cold weights, beside
# baselines and floors.


# %%
def microseconds(product, x, *weights, calls=10, rounds=7):
    """Per product: best over rounds. Each product reads a value of the one before, so none is dropped or merged."""

    @jax.jit
    def chain(x, *weights):
        for _ in range(calls):
            x = x.at[0, 0].set(product(x, *weights)[0, 0])
        return x

    chain(x, *weights).block_until_ready()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        chain(x, *weights).block_until_ready()
        times.append((time.perf_counter() - begin) * 1e6 / calls)
    return min(times)


def quantised(x, data, scale):
    return cugemm.linear(x, cugemm.Quantized(data, scale, "fp8_row"))


print(f"{'m':>5s}{'jnp bf16 us':>13s}{'bf16 us':>10s}{'fp8 weight us':>15s}")
for rows in (1, 8, 64) if gpu else (1, 8):
    a = x[:rows]
    times = microseconds(lambda x, w: x @ w.T, a, w), microseconds(cugemm.linear, a, w), microseconds(quantised, a, q.data, q.scale)
    print(f"{rows:5d}{times[0]:13.1f}{times[1]:10.1f}{times[2]:15.1f}")
