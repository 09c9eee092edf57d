"""Kernel source -> cubin (NVRTC) -> file in a cache -> function on a device. Everything up to the bytes works without a GPU.

A cubin is found by its name, `<stem>-<arch>-<key>`, where the key is the SHA-256 of what the compiler was given: source, headers, options
and its own version. No path is part of it, so cubins made on one machine serve another. On disk an entry is a directory of that name that
holds `<digest of the content>.cubin`: a file that does not match its own name is a miss. Files are written beside their place and renamed
into it, so processes need no lock; threads of one process wait for each other.

A *pack* is a cache directory with a `pack.json` that names the NVRTC versions it was built with. Its entries go before anything compiled
here, and need no NVRTC.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cugemm import driver
from cugemm.arch import Arch
from cugemm.errors import CompileError, CudaError

log = logging.getLogger("cugemm")

Version = tuple[int, int]
Origin = Literal["pack", "cache", "compile"]

OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=--warn-on-spills")
PACK = "pack.json"
INSTALL = 'pip install "cugemm[cuda12]"'
_INSTALL_13 = 'pip install "cugemm[cuda13]"'
_REMARK = re.compile(r"\(C75(?:08|10|11|13|14|15|17)\)|registers are spilled|spill stores", re.IGNORECASE)

stats: Counter[Origin] = Counter()
"""How many cubins this process took from a pack, from the cache, and from the compiler."""


class Job(NamedTuple):
    """One cubin to make: source file without suffix, arch, -D macros."""

    stem: str
    arch: Arch
    defines: Mapping[str, int]


class Built(NamedTuple):
    """What the compiler made of a job: the cubin (PTX for a compute_XX target) and its log."""

    job: Job
    image: bytes
    log: str


class Loaded(NamedTuple):
    """A kernel on a device: CUfunction handle, entry name, where its cubin came from. Keeps its module loaded while it lives."""

    function: int
    name: str
    origin: Origin
    module: Any


class _Found(NamedTuple):
    image: Path | bytes
    origin: Origin
    version: Version


# Sources and names


def kernel_dir() -> Path:
    """Where the kernel sources are: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for found in (here / "_kernels", here.parent / "kernels"):
        if found.is_dir():
            return found
    raise FileNotFoundError(
        f"cugemm's kernel sources are missing: neither {here / '_kernels'} nor {here.parent / 'kernels'}; reinstall cugemm."
    )


def _sources(job: Job, kernels: Path) -> tuple[bytes, dict[str, bytes]]:
    """The source of a job, and all headers by the name that #include uses."""
    headers = {f"common/{path.name}": path.read_bytes() for path in sorted((kernels / "common").glob("*.cuh"))}
    return (kernels / f"{job.stem}.cu").read_bytes(), headers


def _options(job: Job) -> tuple[str, ...]:
    # NOTE: no fast-math and no ftz: a UE8M0 scale of 2^-127 is a denormal.
    return (f"-arch={job.arch.target}", *OPTIONS, *(f"-D{name}={int(value)}" for name, value in sorted(job.defines.items())))


def entry_name(job: Job, version: Version, kernels: Path | None = None) -> str:
    """Name of the job's cubin made by NVRTC `version`: the same on every machine and in every directory."""
    source, headers = _sources(job, kernels or kernel_dir())
    digest = hashlib.sha256(repr((version, _options(job), job.stem)).encode())
    for name, text in [("", source), *headers.items()]:
        digest.update(f"\0{name}\0{len(text)}\0".encode() + text)
    return f"{job.stem}-{job.arch.name}-{digest.hexdigest()[:32]}"


# The compiler


def _import_nvrtc() -> Any:
    """CuPy's binding of NVRTC; ImportError that says what to install or set."""
    try:
        from cupy.cuda import nvrtc  # noqa: PLC0415 - `import cugemm` works without CuPy
    except ImportError as error:
        raise ImportError(
            f"compiling kernels needs CuPy and NVRTC ({error}): {INSTALL}, or beside torch >= 2.11 or jax[cuda13]: {_INSTALL_13}"
        ) from error
    except OSError as error:
        raise ImportError(
            f"import cupy failed because it cannot create its cache directory ({error}); set CUPY_CACHE_DIR to a writable directory."
        ) from error
    return nvrtc


def nvrtc_version() -> Version | None:
    """(major, minor) of the NVRTC that compiles here; None without CuPy or NVRTC."""
    try:
        major, minor = _import_nvrtc().getVersion()
    except (ImportError, RuntimeError):  # cuda-pathfinder's "not found" is a RuntimeError
        return None
    return int(major), int(minor)


def _require_nvrtc() -> tuple[Any, Version]:
    nvrtc = _import_nvrtc()
    version = nvrtc_version()
    if version is None:
        raise ImportError(f"CuPy is installed but NVRTC is not: {INSTALL} (CuPy for CUDA 12) or {_INSTALL_13} (CUDA 13).")
    return nvrtc, version


def build(stem: str, arch: Arch, defines: Mapping[str, int], *, kernels: Path | None = None) -> Built:
    """Run NVRTC, always; no cache. CompileError with the whole log."""
    job = Job(stem, arch, defines)
    nvrtc, version = _require_nvrtc()
    if version < arch.nvrtc:
        needed, found = _dotted(arch.nvrtc), _dotted(version)
        package = "nvidia-cuda-nvrtc-cu12" if arch.nvrtc[0] == 12 else "nvidia-cuda-nvrtc"
        raise CompileError(f'{arch.target} needs NVRTC {needed} or newer, this is {found}: pip install -U "{package}>={needed}"')
    source, headers = _sources(job, kernels or kernel_dir())
    options = _options(job)
    program = nvrtc.createProgram(source.decode(), f"{stem}.cu", list(headers.values()), [name.encode() for name in headers])
    try:
        failed = ""
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            failed = str(error)
        text = nvrtc.getProgramLog(program).rstrip("\0\n")
        if failed:
            raise CompileError(f"{stem}.cu does not compile: {failed}, NVRTC {_dotted(version)}, {' '.join(options)}\n{text}")
        # NOTE: getCUBIN drops the last byte, which is always 0.
        image = nvrtc.getPTX(program) if arch.is_ptx else nvrtc.getCUBIN(program) + b"\0"
    finally:
        nvrtc.destroyProgram(program)
    return Built(job, image, text)


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def build_all(jobs: Iterable[Job], *, threads: int = 2, kernels: Path | None = None) -> Iterator[Built]:
    """Build many jobs on a few threads (NVRTC runs without the GIL); results in the order of the jobs, the first CompileError ends it."""
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda job: build(*job, kernels=kernels), jobs)


def remarks(text: str) -> list[str]:
    """The lines of a compiler log that mean a slow kernel: serialised wgmma (C75xx), spilled registers. Fatal in CI, logged elsewhere."""
    return [line.strip() for line in text.splitlines() if _REMARK.search(line)]


@contextmanager
def _progress(job: Job) -> Iterator[None]:
    """On a terminal, a line about a compilation that takes more than a second."""
    started, shown = time.perf_counter(), threading.Event()

    def show() -> None:
        shown.set()
        print(f"cugemm: compiling {job.stem}.cu for {job.arch.name} (kept for next time) ...", end="", file=sys.stderr, flush=True)

    timer = threading.Timer(1.0, show)
    timer.daemon = True
    if sys.stderr is not None and sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if shown.is_set():
            print(f" {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


# The cache


def cache_dir() -> Path:
    """$CUGEMM_CACHE_DIR, else cugemm's place in the platform's cache directory."""
    if chosen := os.environ.get("CUGEMM_CACHE_DIR"):
        return Path(chosen)
    try:
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "cugemm" / "Cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "cugemm"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cugemm"
    except RuntimeError:  # no home directory
        return _private_dir()


_lock = threading.Lock()
_key_locks: dict[str, threading.Lock] = {}
_memory: dict[str, bytes] = {}
_private: Path | None = None
_warned = False


def _private_dir() -> Path:
    """A directory of this process alone, removed when it ends."""
    global _private
    with _lock:
        if _private is None:
            _private = Path(tempfile.mkdtemp(prefix="cugemm-"))
            atexit.register(_remove_private, os.getpid())
        return _private


def _remove_private(owner: int) -> None:
    if os.getpid() == owner and _private is not None:  # a forked child leaves its parent's directory alone
        shutil.rmtree(_private, ignore_errors=True)


def _digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()[:32]


def _find(root: Path, name: str) -> Path | None:
    """The intact file of an entry; damaged ones are removed."""
    with suppress(OSError):
        for path in (root / name).iterdir():
            if path.suffix in (".cubin", ".ptx"):
                if _digest(path.read_bytes()) == path.stem:
                    return path
                with suppress(OSError):
                    path.unlink()
    return None


def _put(root: Path, name: str, built: Built) -> Path:
    """Store an entry; OSError if it cannot be."""
    directory = root / name
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{_digest(built.image)}{'.ptx' if built.job.arch.is_ptx else '.cubin'}"
    _write(path, built.image)
    return path


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.stem[:8]}-{os.urandom(4).hex()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _keep(name: str, built: Built) -> Path | bytes:
    """Store an entry where it can be stored: the cache, else a private directory, else memory. One warning if not the cache."""
    global _warned
    for place in (cache_dir, _private_dir):
        try:
            return _put(place(), name, built)
        except OSError as error:
            if not _warned:
                _warned = True
                log.warning("cugemm cannot keep compiled kernels (%s) and will compile them again next time; set CUGEMM_CACHE_DIR.", error)
    _memory[name] = built.image
    return built.image


def _kept(name: str) -> Path | bytes | None:
    return _find(cache_dir(), name) or (_private and _find(_private, name)) or _memory.get(name)


def _read_pack(root: Path) -> tuple[list[Version], dict[str, str]]:
    """NVRTC versions and {entry: digest} of the pack in `root`, empty if there is none."""
    try:
        pack = json.loads((root / PACK).read_bytes())
        return [(major, minor) for major, minor in pack["nvrtc"]], dict(pack["cubins"])
    except FileNotFoundError:
        return [], {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is not readable as a pack of kernels and is ignored: %r", root / PACK, error)
        return [], {}


def write_pack(directory: Path, jobs: Iterable[Job], *, threads: int = 2, kernels: Path | None = None) -> int:
    """Compile `jobs` into a pack, for machines that set CUGEMM_CACHE_DIR to it. Adds to what is there; answers how many were compiled."""
    _, version = _require_nvrtc()
    versions, cubins = _read_pack(directory)
    missing = {}
    for job in jobs:
        name = entry_name(job, version, kernels)
        found = _find(directory, name)
        if found is None:
            missing[name] = job
        else:
            cubins[name] = found.stem
    for name, built in zip(missing, build_all(missing.values(), threads=threads, kernels=kernels), strict=True):
        cubins[name] = _put(directory, name, built).stem
    directory.mkdir(parents=True, exist_ok=True)
    content = {"nvrtc": sorted({*versions, version}), "cubins": dict(sorted(cubins.items()))}
    _write(directory / PACK, json.dumps(content, indent=1).encode())
    return len(missing)


# What the launcher calls


def _from_pack(job: Job, kernels: Path | None) -> _Found | None:
    root = cache_dir()
    versions, cubins = _read_pack(root)
    for version in reversed(versions):
        name = entry_name(job, version, kernels)
        path = _find(root, name) if name in cubins else None
        if path is not None and path.stem == cubins[name]:
            return _Found(path, "pack", version)
    return None


def _resolve(job: Job, kernels: Path | None) -> _Found:
    found = _from_pack(job, kernels)
    if found is None:
        _, version = _require_nvrtc()
        name = entry_name(job, version, kernels)
        with _lock:
            key_lock = _key_locks.setdefault(name, threading.Lock())
        with key_lock:
            image = _kept(name)
            if image is not None:
                found = _Found(image, "cache", version)
            else:
                with _progress(job):
                    built = build(*job, kernels=kernels)
                for remark in remarks(built.log):
                    log.info("%s: %s", name, remark)
                found = _Found(_keep(name, built), "compile", version)
    with _lock:
        stats[found.origin] += 1
    return found


def cubin(stem: str, arch: Arch, defines: Mapping[str, int], *, kernels: Path | None = None) -> Path | bytes:
    """The compiled `stem`.cu for `arch`: a file in the cache, or its bytes where nothing can be written. Compiles on a miss."""
    return _resolve(Job(stem, arch, defines), kernels).image


def load(stem: str, arch: Arch, defines: Mapping[str, int], entry: str, device: int, *, kernels: Path | None = None) -> Loaded:
    """The function `entry` of `stem`.cu on CUDA device `device`; compiles on a miss, loads always (the caller keeps the result).

    CompileError with NVRTC's log; CudaError where the driver is older than the compiler; ImportError with the pip line without CuPy, NVRTC.
    """
    _import_nvrtc()  # its errors say what to do
    import cupy  # noqa: PLC0415 - `import cugemm` works without CuPy

    found = _resolve(Job(stem, arch, defines), kernels)
    _check_driver(arch, found.version)
    with cupy.cuda.Device(device):
        if isinstance(found.image, Path):
            module = cupy.RawModule(path=str(found.image))
            function = module.get_function(entry).kernel.ptr
        else:
            module = cupy.cuda.Module()
            module.load(found.image)
            function = module.get_function(entry).ptr
    return Loaded(int(function), entry, found.origin, module)


def _check_driver(arch: Arch, version: Version) -> None:
    """A driver loads cubins of its own CUDA major or older, and PTX of its own CUDA version or older."""
    have = driver.version()
    if version <= have or (version[0] == have[0] and not arch.is_ptx):
        return
    extra = "cugemm[cuda12]" if have[0] == 12 else f"nvidia-cuda-nvrtc<={_dotted(have)}"
    raise CudaError(
        f"NVRTC {_dotted(version)} made code for {arch.target} that this driver cannot load: it runs CUDA {_dotted(have)}. "
        f'Update the driver, or uninstall nvidia-cuda-nvrtc (CuPy takes the newest NVRTC it finds) and pip install "{extra}".'
    )
