"""What this machine has and lacks: GPUs, driver, compiler, packages, cache; a fix for whatever stands in the way. Nothing here raises."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cugemm
from cugemm import arch, compile, driver, launch, select
from cugemm.api.dense import matmul
from cugemm.api.quantize import quantize
from cugemm.arrays import HOST, Spec
from cugemm.errors import NoKernelError
from cugemm.formats import BF16, FORMATS, FP16, FP32
from cugemm.problem import Problem

_T = TypeVar("_T")

_OLDEST_DRIVER = (12, 0)
_CUPY = ("cupy-cuda12x", "cupy-cuda13x")
_PACKAGES = ("numpy", "ml_dtypes", *_CUPY, "cupy", "torch", "jax", "jax-cuda12-plugin", "jax-cuda13-plugin", "safetensors")


class Obstacle(NamedTuple):
    """Something that stands in the way, and what to do about it."""

    what: str
    fix: str


class Environment(NamedTuple):
    """`facts`: (name, value) for display. `target`: the arch of GPU 0, or of an H100 where there is none."""

    facts: tuple[tuple[str, str], ...]
    problems: tuple[Obstacle, ...]
    target: arch.Arch


def survey() -> Environment:
    """Look at everything once."""
    packages = installed()
    extra, why = extra_for(packages, _quietly(driver.version))
    nvrtc = _quietly(compile.nvrtc_version)
    version = _quietly(driver.version)
    facts = [
        *_gpus(),
        ("driver", f"runs CUDA {_dotted(version)}" if version else "none"),
        ("NVRTC", _dotted(nvrtc) if nvrtc else "none"),
        *packages.items(),
        ("extra", f"cugemm[{extra}], {why}"),
        *(_quietly(lambda: list(_cache_facts())) or [("cache", "cannot be read")]),
    ]
    target = _target()
    return Environment(tuple(facts), tuple(find_problems(packages, extra, version, nvrtc, target)), target)


def installed() -> dict[str, str]:
    """Versions of the packages that matter here."""
    found = {"cugemm": cugemm.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def extra_for(packages: dict[str, str], driver_version: tuple[int, int] | None) -> tuple[str, str]:
    """("cuda12" or "cuda13", why): the extra whose CUDA libraries agree with those of torch and JAX, else with the driver."""
    tag = re.search(r"\+cu(\d\d)", packages.get("torch", ""))
    if tag and tag[1] in ("12", "13"):
        return f"cuda{tag[1]}", f"beside torch {packages['torch']}"
    for major in ("13", "12"):
        if f"jax-cuda{major}-plugin" in packages:
            return f"cuda{major}", f"beside jax[cuda{major}]"
    if "torch" in packages and "+" not in packages["torch"]:
        newer = _numbers(packages["torch"]) >= (2, 11)
        return ("cuda13", "beside torch >= 2.11") if newer else ("cuda12", "beside torch <= 2.10")
    if driver_version is not None:
        return ("cuda13", "for this driver") if driver_version >= (13, 0) else ("cuda12", "for this driver")
    return "cuda12", "for the oldest drivers; beside torch >= 2.11 or jax[cuda13] take cuda13"


def find_problems(
    packages: dict[str, str], extra: str, version: tuple[int, int] | None, nvrtc: tuple[int, int] | None, target: arch.Arch
) -> Iterator[Obstacle]:
    """Everything that keeps products off the GPU, makes them slow to start, or will break them."""
    install = f'pip install "cugemm[{extra}]"'
    if version is None:
        yield Obstacle(_why(driver.version), "until then, arrays in host memory are computed by the NumPy reference")
    elif not driver.available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        yield Obstacle("the driver shows no GPU", f"check nvidia-smi and CUDA_VISIBLE_DEVICES (now {visible!r})")
    elif version < _OLDEST_DRIVER:
        yield Obstacle(f"the driver runs CUDA {_dotted(version)}", "cugemm needs the driver of CUDA 12 (525) or newer: update it")
    reason = arch.refuse(target)
    if reason is not None:
        yield Obstacle(f"the GPU is {target.name}", f"a kernel {reason}; arrays in host memory work everywhere")
    cupys = [name for name in _CUPY if name in packages]
    if len(cupys) > 1:
        yield Obstacle(f"{' and '.join(cupys)} are both installed", f"pip uninstall {' '.join(cupys)}, then {install}")
    if not cupys and "cupy" not in packages:
        yield Obstacle("CuPy is not installed, so no kernel can be compiled or loaded", install)
    elif nvrtc is None:
        yield Obstacle(f"NVRTC cannot be used: {_why(compile._require_nvrtc)}", install)
    if nvrtc is not None:
        yield from _compiler_problems(nvrtc, version, target)
    yield from _file_problems()


def _compiler_problems(nvrtc: tuple[int, int], version: tuple[int, int] | None, target: arch.Arch) -> Iterator[Obstacle]:
    package = "nvidia-cuda-nvrtc-cu12" if nvrtc[0] == 12 else "nvidia-cuda-nvrtc"
    if nvrtc < target.nvrtc:
        wanted = _dotted(target.nvrtc)
        name = "nvidia-cuda-nvrtc-cu12" if target.nvrtc[0] == 12 else "nvidia-cuda-nvrtc"
        yield Obstacle(f"NVRTC {_dotted(nvrtc)} does not know {target.name}, which needs {wanted}", f'pip install -U "{name}>={wanted}"')
    if version is not None and (nvrtc[0] > version[0] or (target.is_ptx and nvrtc > version)):
        fix = 'update the driver, or pip install "cugemm[cuda12]"' if version[0] == 12 else f'pip install "{package}<={_dotted(version)}"'
        yield Obstacle(f"NVRTC {_dotted(nvrtc)} is newer than the driver, which runs CUDA {_dotted(version)}", fix)


def _file_problems() -> Iterator[Obstacle]:
    cache = compile.cache_dir()
    reason = unwritable(cache)
    if reason is not None:
        what = f"the cache {cache} cannot be written ({reason}), so every process compiles again"
        yield Obstacle(what, "set CUGEMM_CACHE_DIR to a writable directory")
    if "CUPY_CACHE_DIR" not in os.environ:
        cupy_cache = Path(os.path.expanduser("~")) / ".cupy" / "kernel_cache"
        reason = unwritable(cupy_cache)
        if reason is not None:
            yield Obstacle(f"CuPy's cache {cupy_cache} cannot be written ({reason})", "set CUPY_CACHE_DIR to a writable directory")


def unwritable(directory: Path) -> str | None:
    """Why no file can be made in a directory (or, where it does not exist, in the nearest one above it); None if one can."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    try:
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as error:
        return error.strerror or str(error)


class Support(NamedTuple):
    """The table of products: a row per kind of a, in its columns the kernel for each kind of b, "-" where `notes` say why there is none."""

    rows: list[tuple[str, ...]]
    notes: list[str]


def support(target: arch.Arch) -> Support:
    """What multiplies what, by asking `matmul` for every pair of formats and 1024 rows: the kernel that answers, or the refusal."""
    reason = arch.refuse(target)
    names = list(_kinds())
    notes: dict[str, list[tuple[str, str]]] = {}
    rows = [("a, b ->", *names)]
    for a in names:
        cells = []
        for b in names:
            answers = {reason: False} if reason else dict(_answer(asked, target) for asked in _asked(a, b))
            cells.append(" or ".join(sorted({answer if runs else "-" for answer, runs in answers.items()})))
            for refusal in [answer for answer, runs in answers.items() if not runs]:
                notes.setdefault(refusal, []).append((a, b))
        rows.append((a, *cells))
    return Support(rows, [f"{_pairs(pairs, names)}: {refusal}" for refusal, pairs in notes.items()])


def _kinds() -> dict[str, list[str]]:
    """What a product tells apart: formats by element and kind of scale, and 16-bit floats. Name -> dtypes or formats."""
    found = {element.name: [element.dtype] for element in (BF16, FP16)}
    for fmt in FORMATS.values():
        byte_scales = fmt.scale is not FP32
        name = (
            next(f.name for f in FORMATS.values() if (f.element, f.scale) == (fmt.element, fmt.scale)) if byte_scales else fmt.element.name
        )
        found.setdefault(name.removesuffix("x2"), []).append(fmt.name)
    return found


@functools.cache
def _asked(a: str, b: str) -> tuple[Problem | str, ...]:
    """The problems that products of two kinds come down to, whatever blocks their scales cover; a text where the API refuses."""
    found: dict[Problem | str, None] = {}
    for x, w in itertools.product(_kinds()[a], _kinds()[b]):
        try:
            with launch.recording() as calls:
                matmul(_operand(x, 1024), _operand(w, 4096).T)
            found[calls[-1].call.problem] = None
        except (ValueError, TypeError) as error:
            found[str(error).rpartition("; ")[2]] = None  # what to do about it; before it stands which array is meant
    return tuple(found)


@functools.cache
def _operand(name: str, rows: int) -> Any:
    """A stand-in for [rows, k] values of a dtype or format."""
    x = Spec((rows, 4096), name if name not in FORMATS else BF16.dtype, device=HOST)
    with launch.recording():
        return quantize(x, name) if name in FORMATS else x


def _answer(asked: Problem | str, target: arch.Arch) -> tuple[str, bool]:
    """(kernel or refusal, whether it runs)."""
    if isinstance(asked, str):
        return asked, False
    try:
        choice = select.choose(asked._replace(arch=target.name), arch.H100._replace(smem_per_sm=target.smem_per_sm))
    except NoKernelError as error:
        return str(error), False
    return choice.best.kernel.name, True


def _pairs(pairs: list[tuple[str, str]], names: list[str]) -> str:
    """Pairs in words, whole rows put together."""
    whole = [a for a in names if all((a, b) in pairs for b in names)]
    if whole == names:
        return "all"
    return ", ".join([*(f"{a} as a" for a in whole), *(f"{a} x {b}" for a, b in pairs if a not in whole)])


def _gpus() -> Iterator[tuple[str, str]]:
    try:
        count = driver.device_count()
    except Exception:  # whatever is wrong with the driver is told under problems
        count = 0
    if count == 0:
        yield "GPU", f"none; the tables below are for {_target().name}"
    for device in range(count):
        try:
            info = arch.device_info(device)
            name = arch.of_capability(*driver.capability(device)).name
            memory = driver.total_memory(device) / 2**30
            yield f"GPU {device}", f"{info.name}, {name}, {info.sm_count} SM, {memory:.0f} GiB, about {info.read_gbs:.0f} GB/s read"
        except Exception as error:  # one bad device does not hide the others
            yield f"GPU {device}", f"cannot be asked: {error}"


def _target() -> arch.Arch:
    """Arch of GPU 0; the H100's where there is none."""
    found = _quietly(lambda: arch.of_capability(*driver.capability(0)))
    return found or arch.get("sm_90a")


def _cache_facts() -> Iterator[tuple[str, str]]:
    cache = compile.cache_dir()
    files = [path for path in cache.glob("*/*") if path.is_file()] if cache.is_dir() else []
    size = sum(path.stat().st_size for path in files)
    yield "cache", f"{cache}, {len(files)} kernels, {size / 1e6:.1f} MB"
    pack = cache / compile.PACK
    if pack.exists():
        yield "pack", str(pack)


def _quietly(ask: Callable[[], _T]) -> _T | None:
    try:
        return ask()
    except Exception:  # a survey reports what it can
        return None


def _why(ask: Callable[[], object]) -> str:
    try:
        ask()
    except Exception as error:
        return str(error)
    return "it answers nothing"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+", maxsplit=1)[0])[:2])


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
