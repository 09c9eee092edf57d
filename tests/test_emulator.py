"""Mbarriers and products of warpgroups in the emulator (tests/emulator): right when used by the rules, and wrong or an error when not."""

from __future__ import annotations

import shutil

import emulated
import numpy as np
import oracles
import pytest
from oracles import Array

from cugemm.catalog import Step

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# d += a b^T in two steps of k, both in one group; b's core matrices lie in another order when `apart`.
PRODUCT = """
struct Args { u64 a, b, d; i32 fault, apart; };
extern "C" __global__ void product(const Args args) {
    const u32 t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4;
    const u32 k_bytes = args.apart ? BLOCKS * 128 : 128, rows_bytes = args.apart ? 128 : 512;
    const u32 *a = reinterpret_cast<const u32*>(args.a) + row * 16 + t % 4;
    const Chunk* b = reinterpret_cast<const Chunk*>(args.b);
    float d[BLOCKS][4], *out = reinterpret_cast<float*>(args.d) + row * BLOCKS * 8 + t % 4 * 2;
    u32 x[2][4];
    const auto fill = [&](u32 flip) {
        for (u32 i = t; i < BLOCKS * 32; i += 128) {
            const u32* c = b[i ^ flip].word;
            store_shared_16(i / 32 * rows_bytes + i % 4 * k_bytes + i / 4 % 8 * 16, c[0], c[1], c[2], c[3]);
        }
        if (args.fault != 1) fence_async_proxy();
    };
    const auto each = [&](auto f) {
        for (u32 i = 0; i < BLOCKS * 4; ++i) f(d[i / 4][i % 4], out[i % 4 / 2 * BLOCKS * 64 + i / 4 * 8 + i % 2]);
    };
    each([](float& mine, float& there) { mine = there; });
    for (u32 i = 0; i < 8; ++i) x[i / 4][i % 4] = a[i / 4 * 8 + i % 2 * 128 + i % 4 / 2 * 4];
    fill(0);
    __syncthreads();
    if (args.fault != 2) wgmma_fence();
    MULTIPLY(d, x[0], matrix_descriptor(0, k_bytes, rows_bytes));
    MULTIPLY(d, x[1], matrix_descriptor(2 * k_bytes, k_bytes, rows_bytes));
    if (args.fault != 3) wgmma_commit();
    if (args.fault == 4) x[1][2] = 0;
    if (args.fault == 5) fill(1);
    if (args.fault == 6) wgmma_wait<1>();
    if (args.fault < 6) wgmma_wait<0>();
    each([](float& mine, float& there) { there = mine; });
    wgmma_wait<0>();
}
"""
# Warp 0 hands 32 numbers on to warp 1, ten times over three stages.
RING = """
struct Args { u64 to; i32 fault, unused; };
extern "C" __global__ void ring(const Args args) {
    const u32 t = threadIdx.x, lane = t % 32, full = 384, empty = 408;
    if (t == 0 && args.fault != 1)
        for (u32 i = 0; i < 6; ++i) mbarrier_init(full + 8 * i, 32);
    __syncthreads();
    for (u32 i = 0; i < 10; ++i) {
        const u32 stage = i % 3, parity = i / 3 % 2, mine = stage * 128 + lane * 4, other = stage * 128 + (lane ^ 5) * 4;
        if (t < 32) {
            if (args.fault != 2) mbarrier_wait(empty + 8 * stage, parity ^ 1);
            store_shared_u32(mine, 100 * i + lane);
            if (args.fault != 3 || i < 7 || lane) mbarrier_arrive(full + 8 * stage);
        } else {
            if (args.fault != 4) mbarrier_wait(full + 8 * stage, parity);
            if (args.fault == 5) mbarrier_arrive(empty + 8 * stage);
            reinterpret_cast<u32*>(args.to)[32 * i + lane] = load_shared_u16(other);
            if (args.fault != 5) mbarrier_arrive(empty + 8 * stage);
        }
    }
}
"""
# Each of two CTAs writes to the other.
REMOTE = """
struct Args { u64 to; i32 fault, unused; };
extern "C" __global__ void remote(const Args args) {
    const u32 t = threadIdx.x, rank = cluster_rank();
    const u32 first = args.fault == 4 ? 0 : shared_address(emulator::memory()), barrier = first + 1024;
    const float x[4] = {float(t), float(rank), 2, 3};
    if (t == 0) mbarrier_init(barrier, 64), mbarrier_init_done();
    cluster_arrive();
    if (args.fault != 1) cluster_wait();
    store_remote_16(first + t * 16, rank ^ 1, x);
    mbarrier_arrive_remote(barrier, args.fault == 2 ? rank : rank ^ 1);
    if (args.fault != 3) mbarrier_wait(barrier, 0);
    reinterpret_cast<Chunk*>(args.to)[rank * 64 + t] = load_shared_16(first + (t ^ 40) * 16);
    if (args.fault == 1) cluster_wait();
}
"""


def launch(name: str, source: str, defines: tuple[tuple[str, int | str], ...], threads: int, smem: int, arrays: list[Array],
           tail: tuple[int, int], seed: int, eager: bool = False, grid: int = 1) -> None:  # fmt: skip
    (emulated._sources() / f"{name}.cu").write_text('#include "common/hopper.cuh"\n' + source)
    step = Step(name, defines, grid, threads, smem, tuple(range(len(arrays))), (), np.array(tail, np.int32).tobytes())  # type: ignore[arg-type]
    emulated._launch(step, [x.ctypes.data for x in arrays], [], "sm_90a", seed, eager)


def product(dtype: str, n: int, fault: int, seed: int, eager: bool = False) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    a, b = ((rng.integers(-99, 100, (rows, 32)) / 16).astype(oracles.dtype_of(dtype)) for rows in (64, n))
    d = rng.standard_normal((64, n), np.float32)
    right = d
    for k in (0, 16):
        right = (right + a[:, k : k + 16].astype(np.float64) @ b[:, k : k + 16].astype(np.float64).T).astype(np.float32)
    call = {"bfloat16": "wgmma_bf16", "float16": "wgmma_fp16"}[dtype]
    launch("product", PRODUCT, (("BLOCKS", n // 8), ("MULTIPLY", call)), 128, 64 * n, [a, b, d], (fault, seed % 2), seed, eager)
    return d, right


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("dtype", "n"), [("bfloat16", 8), ("bfloat16", 16), ("bfloat16", 64), ("float16", 32), ("float16", 128)])
def test_products(dtype: str, n: int, eager: bool) -> None:
    for seed in range(4):
        oracles.check_bits(*product(dtype, n, 0, seed, eager))


@pytest.mark.parametrize("fault", [1, 4, 5, 6, 7], ids=["no proxy fence", "a changes", "b changes", "waits for too few", "reads early"])
def test_wrong_products(fault: int) -> None:
    for seed in range(4):
        got, right = product("bfloat16", 16, fault, seed)
        assert not np.array_equal(got, right)
        assert np.isnan(got).all() == (fault == 1)


@pytest.mark.parametrize(("fault", "what"), [(2, "without wgmma_fence"), (3, "ends ahead of its products")])
def test_refused_products(fault: int, what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        product("bfloat16", 16, fault, 1)


def ring(fault: int, seed: int) -> bool:
    got = np.zeros((10, 32), np.uint32)
    try:
        launch("ring", RING, (), 64, 432, [got], (fault, 0), seed)
    except AssertionError:  # a phase too far
        return False
    return np.array_equal(got, 100 * np.arange(10)[:, None] + (np.arange(32) ^ 5))


def remote(fault: int, seed: int) -> bool:
    got = np.zeros((2, 64, 4), np.float32)
    launch("remote", REMOTE, (("SPLIT", 2),), 64, 1032, [got], (fault, 0), seed, grid=2)
    return np.array_equal(got, [[[t ^ 40, 1 - rank, 2, 3] for t in range(64)] for rank in range(2)])


def test_barriers() -> None:
    assert all(ring(0, seed) and remote(0, seed) for seed in range(20))


@pytest.mark.parametrize("fault", [2, 4, 5], ids=["no wait for empty", "no wait for full", "released early"])
def test_wrong_ring(fault: int) -> None:
    assert not any(ring(fault, seed) for seed in range(20))


@pytest.mark.parametrize("fault", [2, 3], ids=["arrives at its own", "no wait"])
def test_wrong_remote(fault: int) -> None:
    assert not all(remote(fault, seed) for seed in range(20))


def test_too_large() -> None:
    with pytest.raises(AssertionError, match="too large: 1 CTAs of 64 threads with 232464 bytes of shared memory"):
        launch("ring", RING, (), 64, 232464, [np.zeros(320, np.uint32)], (0, 0), 1)


def test_stuck() -> None:
    with pytest.raises(AssertionError, match="wait for each other for ever"):
        launch("ring", RING, (), 64, 432, [np.zeros(320, np.uint32)], (3, 0), 1)
    with pytest.raises(AssertionError, match="no mbarrier was initialised"):
        launch("ring", RING, (), 64, 432, [np.zeros(320, np.uint32)], (1, 0), 1)
    with pytest.raises(AssertionError, match="no mbarrier was initialised"):
        any(remote(1, seed) for seed in range(20))


def test_addresses_tell_the_rank() -> None:
    with pytest.raises(AssertionError, match=r"shared memory of another CTA, at \(1024\), block 1"):
        remote(4, 0)
