"""GPU architectures as data: what NVRTC calls them, how much shared memory they have, what their kernels may use.

An arch is one record below. Sources: CUDA C++ Programming Guide, "Compute Capabilities"; PTX ISA, target notes of each instruction;
published peak rates of the data-center part of each capability.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from cugemm import driver

Feature = Literal["fp8_cvt", "fp8_mma", "pdl", "cluster", "tma", "wgmma", "tcgen05", "fp4_cvt", "mma_block_scale"]
"""fp8_cvt: cvt of e4m3 and e5m2; fp8_mma: mma.sync with fp8 operands; pdl: griddepcontrol; fp4_cvt: cvt of e2m1; mma_block_scale: mma.sync
with block scales. The others are the PTX instruction families of that name. `cluster` on sm_120 has no multicast."""


class Arch(NamedTuple):
    """One compilation target. `name` is the key everywhere; what follows it is what the planner asks."""

    name: str
    target: str
    """NVRTC's -arch value: "sm_90a" makes a cubin, "compute_80" PTX, which the driver of any newer device translates."""
    capability: tuple[int, int]
    max_smem: int
    """Most dynamic shared memory of one block, bytes."""
    smem_per_sm: int
    """Shared memory of one SM, bytes; each resident block takes 1024 of it beside its own."""
    mma16_flops: int
    """Peak dense fp16/bf16 tensor-core flops per SM and clock, fp32 accumulation."""
    features: frozenset[Feature]
    nvrtc: tuple[int, int]
    """Oldest NVRTC that knows the target."""

    @property
    def is_ptx(self) -> bool:
        return self.target.startswith("compute_")


_KB = 1024
_ADA: frozenset[Feature] = frozenset({"fp8_cvt", "fp8_mma"})
_HOPPER: frozenset[Feature] = _ADA | {"pdl", "cluster", "tma", "wgmma"}
_BLACKWELL: frozenset[Feature] = _ADA | {"pdl", "cluster", "tma", "fp4_cvt", "tcgen05"}
_BLACKWELL_RTX: frozenset[Feature] = _ADA | {"pdl", "cluster", "tma", "fp4_cvt", "mma_block_scale"}
_NONE: frozenset[Feature] = frozenset()
_OLDEST_NVRTC = (12, 8)

ARCHS: dict[str, Arch] = {
    a.name: a
    for a in (
        Arch("sm_80", "sm_80", (8, 0), 163 * _KB, 164 * _KB, 2048, _NONE, _OLDEST_NVRTC),
        Arch("sm_86", "sm_86", (8, 6), 99 * _KB, 100 * _KB, 1024, _NONE, _OLDEST_NVRTC),
        Arch("sm_87", "sm_87", (8, 7), 163 * _KB, 164 * _KB, 2048, _NONE, _OLDEST_NVRTC),
        Arch("sm_89", "sm_89", (8, 9), 99 * _KB, 100 * _KB, 1024, _ADA, _OLDEST_NVRTC),
        Arch("sm_90a", "sm_90a", (9, 0), 227 * _KB, 228 * _KB, 4096, _HOPPER, _OLDEST_NVRTC),
        Arch("sm_100a", "sm_100a", (10, 0), 227 * _KB, 228 * _KB, 8192, _BLACKWELL, _OLDEST_NVRTC),
        Arch("sm_103a", "sm_103a", (10, 3), 227 * _KB, 228 * _KB, 8192, _BLACKWELL, (12, 9)),
        Arch("sm_110a", "sm_110a", (11, 0), 227 * _KB, 228 * _KB, 8192, _BLACKWELL, (13, 0)),
        Arch("sm_120a", "sm_120a", (12, 0), 99 * _KB, 100 * _KB, 1024, _BLACKWELL_RTX, _OLDEST_NVRTC),
        Arch("sm_121a", "sm_121a", (12, 1), 99 * _KB, 100 * _KB, 1024, _BLACKWELL_RTX, (12, 9)),
        # PTX runs on its own capability and everything newer, so its shared memory is what the smallest of them has.
        Arch("compute_80", "compute_80", (8, 0), 99 * _KB, 100 * _KB, 1024, _NONE, _OLDEST_NVRTC),
        Arch("compute_89", "compute_89", (8, 9), 99 * _KB, 100 * _KB, 1024, _ADA, _OLDEST_NVRTC),
        Arch("compute_90", "compute_90", (9, 0), 99 * _KB, 100 * _KB, 1024, _ADA | {"pdl", "cluster", "tma"}, _OLDEST_NVRTC),
        Arch("compute_100", "compute_100", (10, 0), 99 * _KB, 100 * _KB, 1024, _ADA | {"pdl", "cluster", "tma"}, _OLDEST_NVRTC),
        Arch("compute_120", "compute_120", (12, 0), 99 * _KB, 100 * _KB, 1024, _ADA | {"pdl", "cluster", "tma"}, _OLDEST_NVRTC),
    )
}


def get(name: str) -> Arch:
    """The arch called `name` ("sm_90a", "compute_80"); ValueError with the names that exist."""
    try:
        return ARCHS[name]
    except KeyError:
        raise ValueError(f"arch is {name!r}; wanted one of {', '.join(ARCHS)}.") from None


def of_capability(major: int, minor: int) -> Arch:
    """The arch of a device: its own record, or for a capability not listed the newest PTX it can translate.

    A device older than sm_80 gets a record without features, which every kernel refuses in the words of `refuse`.
    """
    capability = (major, minor)
    if capability < (8, 0):
        name = f"sm_{major}{minor}"
        return Arch(name, name, capability, 48 * _KB, 48 * _KB, 0, _NONE, _OLDEST_NVRTC)
    exact = next((a for a in ARCHS.values() if a.capability == capability and not a.is_ptx), None)
    return exact or max((a for a in ARCHS.values() if a.is_ptx and a.capability <= capability), key=lambda a: a.capability)


def refuse(arch: Arch) -> str | None:
    """Why no kernel runs on `arch`, None if there may be one."""
    return None if arch.capability >= (8, 0) else "needs sm_80 or newer"


class Device(NamedTuple):
    """What the cost model reads from one GPU (parts of one capability differ: H100 PCIe, H20 and a MIG slice are all sm_90a)."""

    name: str
    sm_count: int
    clock_khz: int
    read_gbs: float
    """Bandwidth of a pure-read kernel, GB/s."""
    l2_bytes: int
    smem_per_sm: int


H100 = Device("NVIDIA H100 80GB HBM3", 132, 1_980_000, 3110.0, 50 * _KB * _KB, 228 * _KB)
"""What plans assume where there is no GPU to ask; read_gbs measured."""


def read_gbs(memory_clock_khz: int, bus_bits: int) -> float:
    """Bandwidth a pure-read kernel reaches: two transfers a clock, 93 % of which arrive (measured on the H100)."""
    return 0.93 * 2 * memory_clock_khz * 1e3 * bus_bits / 8 / 1e9


def device_info(device: int) -> Device:
    """Ask the driver about CUDA device `device`."""
    bandwidth = read_gbs(driver.attribute(device, "memory_clock_rate"), driver.attribute(device, "global_memory_bus_width"))
    return Device(
        driver.device_name(device),
        driver.attribute(device, "multiprocessor_count"),
        driver.attribute(device, "clock_rate") or H100.clock_khz,
        bandwidth or H100.read_gbs,  # integrated and virtual GPUs may answer 0
        driver.attribute(device, "l2_cache_size") or H100.l2_bytes,
        driver.attribute(device, "max_shared_memory_per_multiprocessor"),
    )
