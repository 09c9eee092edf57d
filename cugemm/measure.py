"""How long something takes on a GPU: CUDA graphs replayed over buffers that are cold in L2, several graphs in turn, the median of each.

Also the two things that products are compared with: torch's own (cuBLASLt, CUTLASS), and a kernel that only reads the same bytes.
"""

from __future__ import annotations

import ctypes
import importlib
import statistics
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from cugemm import arch, compile, driver, launch

Array = np.ndarray[Any, Any]
Call = Callable[[int], object]
"""Enqueues call number i, on buffers that rotate with i."""

_GRAPH_US = 2000.0  # a graph this long makes its own launch, some 5 us, vanish
_MOST_CALLS = 512


def optional(name: str) -> Any:
    """A framework to compare with, None where it is not installed or does not load."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None


def to_device(x: Array) -> Any:
    """A CuPy copy of a NumPy array; 8- and 16-bit floats travel as integers, which CuPy copies whatever it knows of the dtype."""
    import cupy  # noqa: PLC0415 - only where there is a GPU

    carrier = {1: np.uint8, 2: np.uint16}.get(x.itemsize)
    return cupy.asarray(x) if carrier is None else cupy.asarray(np.ascontiguousarray(x).view(carrier)).view(x.dtype)


def to_host(x: Any) -> Array:
    """A NumPy copy of a CuPy array, or the NumPy array itself."""
    if isinstance(x, np.ndarray):
        return x
    carrier = {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize)
    return np.asarray(x.get()) if carrier is None else np.asarray(x.view(carrier).get()).view(x.dtype)


class Graph(Protocol):
    """`calls` calls, captured; `us` replays them once and answers microseconds per call."""

    calls: int

    def us(self) -> float: ...


class CupyGraph:
    """Calls on CuPy arrays, on a stream of its own. Arrays that they make come from a pool of its own: replays write to them again."""

    def __init__(self, call: Call, calls: int) -> None:
        import cupy  # noqa: PLC0415

        self.calls = calls
        self._call = call  # NOTE: owns the operands, whose addresses the graph holds
        cupy.cuda.Device().synchronize()  # operands were made on another stream
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._start, self._end = cupy.cuda.Event(), cupy.cuda.Event()
        self._elapsed = cupy.cuda.get_elapsed_time
        self._pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(self._pool.malloc), self._stream:
            call(0)  # compiles and loads, which a capture forbids
            self._stream.synchronize()
            self._stream.begin_capture()
            try:
                for i in range(calls):
                    call(i)
            except BaseException:
                with suppress(Exception):
                    self._stream.end_capture()
                raise
            self._graph = self._stream.end_capture()

    def us(self) -> float:
        self._start.record(self._stream)
        self._graph.launch(self._stream)
        self._end.record(self._stream)
        self._end.synchronize()
        return float(self._elapsed(self._start, self._end)) * 1e3 / self.calls


class TorchGraph:
    """Calls on torch tensors."""

    def __init__(self, call: Call, calls: int) -> None:
        torch = importlib.import_module("torch")
        self.calls = calls
        self._call = call  # NOTE: owns the operands, whose addresses the graph holds
        self._start, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # cuBLAS makes its workspace on the first call
            call(0)
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            for i in range(calls):
                call(i)

    def us(self) -> float:
        self._start.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) * 1e3 / self.calls


def graph(kind: Callable[[Call, int], Graph], call: Call, copies: int) -> Graph:
    """A graph of some 2 ms that visits each of `copies` buffers equally often."""
    once = kind(call, copies)
    once.us()
    turns = min(round(_GRAPH_US / (once.us() * copies)), _MOST_CALLS // copies)
    return once if turns <= 1 else kind(call, copies * turns)


def interleaved(graphs: Mapping[str, Graph], rounds: int = 7) -> dict[str, float]:
    """Median microseconds per call of each graph, all of them once per round, after one round that does not count."""
    seen: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 1):
        for name, one in graphs.items():
            us = one.us()
            if turn:
                seen[name].append(us)
    return {name: statistics.median(times) for name, times in seen.items()}


def chained(buffers: Sequence[Any], m: int, sizes: Sequence[tuple[int, int]]) -> list[tuple[Any, Any]]:
    """(x [m, k], out [m, n]), dense, of products with weights of (n, k) in `sizes`: each reads what the one before it wrote.

    buffers: three flat ones of m * max(n, k) values. The first is only read, by the first product: all replays begin with the same values.
    Where n of one product is less than k of the next, that one also reads values which have been there longer.
    """
    start, *pair = buffers
    found = []
    for i, (n, k) in enumerate(sizes):
        source, target = pair[i % 2] if i else start, pair[(i + 1) % 2]
        found.append((source[: m * k].reshape(m, k), target[: m * n].reshape(m, n)))
    return found


def copies_for(weight_bytes: int, l2_bytes: int) -> int:
    """Buffers to rotate over so that each is cold when its turn comes: three times L2 in all, and never one alone."""
    return max(2, -(-3 * l2_bytes // max(weight_bytes, 1)))


def host_us(
    calls: Mapping[str, Callable[[], object]], synchronize: Callable[[], object], rounds: int = 9, batch: int = 200
) -> dict[str, float]:
    """Median microseconds of host time per call, in turns. No call waits for the GPU: a batch is shorter than the launch queue."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            synchronize()
            started = time.perf_counter()
            for _ in range(batch):
                call()
            taken = time.perf_counter() - started
            if turn:
                seen[name].append(taken * 1e6 / batch)
    synchronize()
    return {name: statistics.median(times) for name, times in seen.items()}


# What products are compared with


class Stream:
    """The pure-read kernel (`kernels/stream.cu`) over an arena of device memory that all of its sizes share."""

    def __init__(self, arena_bytes: int, device: int = 0) -> None:
        import cupy  # noqa: PLC0415

        target, self._info = launch.machine(device)
        self._device = device
        self._arena = cupy.zeros(arena_bytes // 16 * 4, np.uint32)
        self._function = compile.load("stream", target, {}, "stream", device)
        self._current = cupy.cuda.get_current_stream
        self._copy = cupy.cuda.runtime.memcpyAsync, cupy.cuda.runtime.memcpyDeviceToDevice

    def call(self, size: int) -> Call:
        """Call i reads `size` bytes, at a place that no recent call has read; more than the arena in several launches."""
        arena, start = int(self._arena.nbytes), int(self._arena.data.ptr)
        whole, rest = divmod(size // 16 * 16, arena)
        if not whole and not rest:
            raise ValueError(f"the read kernel takes 16 bytes or more, not {size}")

        def read(i: int) -> None:
            for _ in range(whole):
                self._launch(start, arena // 16)
            if rest:
                self._launch(start + i % (arena // rest) * rest, rest // 16)

        return read

    def copy(self, size: int) -> Call:
        """Call i copies inside the arena, so that `size` bytes move: half of them are read, half written, at places as those of `call`."""
        each, half = size // 2, int(self._arena.nbytes) // 2
        if not 0 < each <= half:
            raise ValueError(f"a copy moves 2 to {2 * half} bytes, not {size}")
        start = int(self._arena.data.ptr)
        memcpy, kind = self._copy

        def copy(i: int) -> None:
            source = start + i % (half // each) * each
            memcpy(source + half, source, each, kind, int(self._current(self._device).ptr))

        return copy

    def copies(self, size: int) -> int:
        return max(1, min(int(self._arena.nbytes) // size, copies_for(size, self._info.l2_bytes)))

    def read_gbs(self) -> float:
        """Measured read bandwidth: the whole arena at once."""
        size = int(self._arena.nbytes)
        return size / interleaved({"": graph(CupyGraph, self.call(size), 1)})[""] / 1e3

    def _launch(self, data: int, chunks: int) -> None:
        args = ctypes.create_string_buffer(struct.pack("<2Qq", data, data, chunks))
        params = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        config = driver.LaunchConfig()
        config.grid[:], config.block[:] = (2 * self._info.sm_count, 1, 1), (512, 1, 1)
        config.stream = int(self._current(self._device).ptr)
        driver.launch(ctypes.addressof(config), self._function.function, ctypes.addressof(params), self._device)


def peak_tflops(target: arch.Arch, device: arch.Device, bits: int) -> float:
    """TFLOP/s that the best libraries sustain: 3/4 of the tensor cores' rate at full clock (on an H100 800 of 1071, fp8 1600 of 2141).

    bits: of the wider operand; 8 doubles the rate where there are fp8 tensor cores, 4 again where there are fp4 ones.
    """
    times = 1
    if bits <= 8 and target.features & {"wgmma", "tcgen05", "fp8_mma"}:
        times = 4 if bits <= 4 and target.features & {"tcgen05", "mma_block_scale"} else 2
    return 0.75 * times * target.mma16_flops * device.sm_count * device.clock_khz * 1e3 / 1e12


def torch_baseline(name: str, m: int, n: int, k: int, copies: int, places: Sequence[tuple[Any, Any]] = ()) -> Call:
    """torch's product of random operands, weights rotating over `copies`. What torch refuses, it raises.

    places: (x, out) of each call of a chain of 16-bit products; weights are then so small that values neither vanish nor overflow.
    """
    torch = importlib.import_module("torch")
    half = _torch_half(torch, name)
    x = torch.randn(m, k, device="cuda", dtype=half)
    weights = [torch.randn(n, k, device="cuda", dtype=half) for _ in range(copies)]
    if name in ("torch.bf16", "torch.fp16"):
        if places:
            weights = [w * k**-0.5 for w in weights]
        places = places or [(x, torch.empty(m, n, device="cuda", dtype=half))]
        return lambda i: torch.mm(places[i % len(places)][0], weights[i % copies].t(), out=places[i % len(places)][1])
    x8 = x.to(torch.float8_e4m3fn)
    weights8 = [w.to(torch.float8_e4m3fn).t() for w in weights]

    def scale(*shape: int) -> Any:
        return torch.rand(shape, device="cuda") + 0.5

    blocks_k = -(-k // 128)
    scale_a, scale_b, fast = {
        "torch.fp8_tensor": (scale(1), scale(1), True),
        "torch.fp8_row": (scale(m, 1), scale(1, n), True),
        # 1 x 128 beside 128 x 128: the scales of x are column-major
        "torch.fp8_block": (scale(blocks_k, m).t(), scale(-(-n // 128), blocks_k).t(), False),
    }[name]
    options = {"scale_a": scale_a, "scale_b": scale_b, "out_dtype": torch.bfloat16, "use_fast_accum": fast}
    return lambda i: torch._scaled_mm(x8, weights8[i % copies], **options)


def torch_chain(name: str, m: int, sizes: Sequence[tuple[int, int]], turns: int, copies: int) -> Call:
    """Call i: torch's products with a weight of each (n, k) of `sizes`, one after the other; fp8 ones read the same x every time."""
    torch = importlib.import_module("torch")
    buffers = [torch.randn(m * max(map(max, sizes)), device="cuda", dtype=_torch_half(torch, name)) for _ in range(3)]
    places = chained(buffers, m, [*sizes] * turns)
    calls = [torch_baseline(name, m, n, k, copies, places[at :: len(sizes)]) for at, (n, k) in enumerate(sizes)]

    def turn(i: int) -> None:
        for call in calls:
            call(i)

    return turn


def _torch_half(torch: Any, name: str) -> Any:
    return torch.float16 if name == "torch.fp16" else torch.bfloat16
