"""From source to cubin: the key, the cache under every kind of damage, packs, errors. Needs NVRTC but no GPU."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_tiny_kernels

from cugemm import arch, driver
from cugemm import compile as compiler
from cugemm.errors import CompileError, CudaError

Fresh = Callable[[], Path]

SM90 = arch.get("sm_90a")
needs_nvrtc = pytest.mark.requires("cupy")


@pytest.fixture(scope="module")
def version() -> compiler.Version:
    found = compiler.nvrtc_version()
    if found is None:
        pytest.skip("needs NVRTC, from cupy and its extra")
    return found


def content(image: Path | bytes) -> bytes:
    return image.read_bytes() if isinstance(image, Path) else image


def script(code: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh interpreter with the checkout importable."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    env = {name: value for name, value in env.items() if value != ""}
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done


# Compiler


def test_build_gives_an_elf_image_with_its_last_byte(tiny_kernels: Path, version: compiler.Version) -> None:
    built = compiler.build("tiny", SM90, {"N": 3}, kernels=tiny_kernels)
    assert built.image[:4] == b"\x7fELF"
    section_headers = int.from_bytes(built.image[40:48], "little")
    program_headers = int.from_bytes(built.image[32:40], "little")
    count, size = int.from_bytes(built.image[60:62], "little"), int.from_bytes(built.image[58:60], "little")
    segments, segment_size = int.from_bytes(built.image[56:58], "little"), int.from_bytes(built.image[54:56], "little")
    assert len(built.image) == max(section_headers + count * size, program_headers + segments * segment_size)
    assert built.log == ""


def test_a_ptx_target_gives_text(tiny_kernels: Path, version: compiler.Version) -> None:
    built = compiler.build("tiny", arch.get("compute_80"), {"N": 3}, kernels=tiny_kernels)
    assert b".target sm_80" in built.image and built.image.rstrip(b"\0\n ").endswith(b"}")


def test_an_error_carries_log_file_and_options(tiny_kernels: Path, version: compiler.Version) -> None:
    (tiny_kernels / "bad.cu").write_text('extern "C" __global__ void bad(float* x) { x[0] = no_such_name; }')
    with pytest.raises(CompileError) as caught:
        compiler.build("bad", SM90, {"N": 3}, kernels=tiny_kernels)
    text = str(caught.value)
    assert 'bad.cu(1): error: identifier "no_such_name" is undefined' in text
    assert "-arch=sm_90a" in text and "-DN=3" in text and "NVRTC" in text


def test_an_unknown_target_says_which_nvrtc_it_needs(tiny_kernels: Path, version: compiler.Version) -> None:
    future = SM90._replace(name="sm_200a", target="sm_200a", nvrtc=(99, 0))
    with pytest.raises(CompileError, match=r"sm_200a needs NVRTC 99\.0 or newer, this is \d+\.\d+: pip install -U"):
        compiler.build("tiny", future, {"N": 3}, kernels=tiny_kernels)


def test_remarks() -> None:
    text = """ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register resources
ptxas warning : Registers are spilled to local memory in function 'k', 36 bytes spill stores, 36 bytes spill loads
tiny.cu(3): warning #177-D: variable "i" was declared but never referenced
"""
    found = compiler.remarks(text)
    assert [("C7510" in line, "spilled" in line) for line in found] == [(True, False), (False, True)]
    assert compiler.remarks("ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized") != []
    assert compiler.remarks("ptxas info    : (C7507) something else") == []


def test_spills_are_remarked_by_the_compiler(tiny_kernels: Path, version: compiler.Version) -> None:
    (tiny_kernels / "spill.cu").write_text(
        """extern "C" __global__ void __maxnreg__(24) spill(float* x) {
    float a[32];
#pragma unroll
    for (int i = 0; i < 32; i++) a[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 32; i++) x[(31 - i) * 777 + threadIdx.x] = a[i] * a[(i * 7) & 31];
}"""
    )
    assert len(compiler.remarks(compiler.build("spill", SM90, {}, kernels=tiny_kernels).log)) == 1


def test_build_all_keeps_the_order(tiny_kernels: Path, version: compiler.Version) -> None:
    jobs = [compiler.Job("tiny", SM90, {"N": n}) for n in range(6)]
    assert [built.job.defines["N"] for built in compiler.build_all(jobs, kernels=tiny_kernels)] == list(range(6))


# Key


def test_the_name_holds_no_path_and_depends_on_every_input(tiny_kernels: Path, tmp_path: Path) -> None:
    def name(kernels: Path = tiny_kernels, target: str = "sm_90a", nvrtc: tuple[int, int] = (12, 9), n: int = 3) -> str:
        return compiler.entry_name(compiler.Job("tiny", arch.get(target), {"N": n, "M": 1}), nvrtc, kernels)

    first = name()
    assert first.startswith("tiny-sm_90a-")
    elsewhere = tmp_path / "else" / "where"
    shutil.copytree(tiny_kernels, elsewhere)
    assert name(elsewhere) == first
    assert compiler.entry_name(compiler.Job("tiny", SM90, {"M": 1, "N": 3}), (12, 9), tiny_kernels) == first
    (elsewhere / "common" / "scale.cuh").write_text("#pragma once\n__device__ float scale(int n) { return n * 3.0f; }\n")
    assert len({first, name(elsewhere), name(target="sm_80"), name(nvrtc=(13, 0)), name(n=4)}) == 5


def test_a_changed_include_is_compiled_again(tiny_kernels: Path, fresh_cache: Fresh, version: compiler.Version) -> None:
    fresh_cache()
    before = content(compiler.cubin("tiny", SM90, {"N": 3}, kernels=tiny_kernels))
    header = tiny_kernels / "common" / "scale.cuh"
    header.write_text(header.read_text().replace("2.0f", "5.0f"))
    assert content(compiler.cubin("tiny", SM90, {"N": 3}, kernels=tiny_kernels)) != before
    assert compiler.stats == {"compile": 2}


# Cache

WORKER = """
import hashlib, os, signal, sys
from pathlib import Path
from cugemm import arch, compile as compiler
kernels, count, kill = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
replace = os.replace
written = 0
def replace_or_die(source, target):
    global written
    written += 1
    if written == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
for n in range(count):
    image = compiler.cubin("tiny", arch.get("sm_90a"), {"N": n}, kernels=kernels)
    data = image.read_bytes() if isinstance(image, Path) else image
    print(n, hashlib.sha256(data).hexdigest(), flush=True)
print(dict(compiler.stats))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process the POSIX way")
def test_eight_processes_on_one_empty_cache_one_killed(tiny_kernels: Path, fresh_cache: Fresh, version: compiler.Version) -> None:
    cache, count = fresh_cache(), 20
    jobs = [compiler.Job("tiny", SM90, {"N": n}) for n in range(count)]
    right = [f"{n} {hashlib.sha256(b.image).hexdigest()}" for n, b in enumerate(compiler.build_all(jobs, kernels=tiny_kernels))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, tiny_kernels, str(count), "3" if i == 0 else "0"], env=env, stdout=subprocess.PIPE, text=True
        )
        for i in range(8)
    ]
    outputs = [worker.communicate(timeout=240)[0].splitlines() for worker in workers]
    assert [output[:count] for output in outputs[1:]] == [right] * 7
    assert [worker.returncode for worker in workers[1:]] == [0] * 7
    if workers[0].returncode == 0:  # the others were so fast that it wrote fewer than three
        assert outputs[0][:count] == right
    else:
        assert outputs[0] == right[: len(outputs[0])]
        assert len(list(cache.rglob("*.tmp"))) == 1
    compiler.stats.clear()
    for n in range(count):
        data = content(compiler.cubin("tiny", SM90, {"N": n}, kernels=tiny_kernels))
        assert f"{n} {hashlib.sha256(data).hexdigest()}" == right[n]
    assert compiler.stats == {"cache": count}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "renamed"])
def test_a_damaged_entry_is_a_miss_and_replaced(damage: str, tiny_kernels: Path, fresh_cache: Fresh, version: compiler.Version) -> None:
    fresh_cache()
    path = compiler.cubin("tiny", SM90, {"N": 3}, kernels=tiny_kernels)
    assert isinstance(path, Path)
    right = path.read_bytes()
    if damage == "renamed":
        path.rename(path.with_name("0" * 32 + ".cubin"))
    else:
        path.write_bytes({"truncated": right[: len(right) // 2], "flipped": right[:-1] + b"\x01", "empty": b""}[damage])
    again = compiler.cubin("tiny", SM90, {"N": 3}, kernels=tiny_kernels)
    assert again == path
    assert content(again) == right
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert compiler.stats == {"compile": 2}


def mounted(directory: Path, options: str) -> bool:
    directory.mkdir(parents=True, exist_ok=True)
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", directory], capture_output=True, check=False).returncode == 0


def refuse_writes_below(cache: Path, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For machines that let nobody mount: writing a file below `cache` fails as the file system would."""
    write = Path.write_bytes

    def refusing(self: Path, data: Any) -> int:
        if cache in self.parents:
            write(self, data[:100])
            raise OSError(error, os.strerror(error), str(self))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", refusing)


@pytest.mark.parametrize("simulated", [False, True], ids=["mounted", "simulated"])
@pytest.mark.parametrize(("options", "error"), [("ro", errno.EROFS), ("size=4k", errno.ENOSPC)], ids=["read-only", "full"])
def test_a_cache_that_cannot_be_written(
    options: str,
    error: int,
    simulated: bool,
    tiny_kernels: Path,
    fresh_cache: Fresh,
    version: compiler.Version,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = fresh_cache()
    mount = not simulated and mounted(cache, options)
    if not mount:
        if not simulated:
            pytest.skip("may not mount a file system here")
        refuse_writes_below(cache, error, monkeypatch)
    try:
        if mount and error == errno.ENOSPC:
            (cache / "ballast").write_bytes(b"x" * 4096)
        with caplog.at_level(logging.WARNING, "cugemm"):
            images = [compiler.cubin("tiny", SM90, {"N": n % 3}, kernels=tiny_kernels) for n in range(6)]
        for n, image in enumerate(images):
            assert isinstance(image, Path)
            assert cache not in image.parents
            assert image.read_bytes() == compiler.build("tiny", SM90, {"N": n % 3}, kernels=tiny_kernels).image
        assert compiler.stats == {"compile": 3, "cache": 3}
        assert len(caplog.records) == 1
        assert os.strerror(error) in caplog.text and "CUGEMM_CACHE_DIR" in caplog.text
        assert not list(cache.rglob("*.tmp"))
    finally:
        if mount:
            subprocess.run(["umount", cache], check=True)


def test_a_readable_cache_that_cannot_be_written_still_hits(
    tiny_kernels: Path, fresh_cache: Fresh, version: compiler.Version, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = fresh_cache()
    path = compiler.cubin("tiny", SM90, {"N": 3}, kernels=tiny_kernels)
    refuse_writes_below(cache, errno.EROFS, monkeypatch)
    assert compiler.cubin("tiny", SM90, {"N": 3}, kernels=tiny_kernels) == path
    assert caplog.records == []


def test_no_place_at_all_means_memory(
    tiny_kernels: Path, fresh_cache: Fresh, version: compiler.Version, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh_cache()
    refuse_writes_below(Path("/"), errno.ENOSPC, monkeypatch)
    first = compiler.cubin("tiny", SM90, {"N": 3}, kernels=tiny_kernels)
    assert isinstance(first, bytes)
    assert first == compiler.build("tiny", SM90, {"N": 3}, kernels=tiny_kernels).image
    assert compiler.cubin("tiny", SM90, {"N": 3}, kernels=tiny_kernels) is first
    assert len(caplog.records) == 1


def test_the_private_directory_goes_with_its_process(tiny_kernels: Path, version: compiler.Version) -> None:
    code = """
import sys
from pathlib import Path
from cugemm import arch, compile as compiler
print(compiler.cubin("tiny", arch.get("sm_90a"), {"N": 1}, kernels=Path(sys.argv[1])))
"""
    done = script(code, tiny_kernels, CUGEMM_CACHE_DIR="/proc/nope")
    assert "cannot keep compiled kernels" in done.stderr
    path = Path(done.stdout.strip())
    assert path.suffix == ".cubin"
    assert not path.exists()


def test_threads_compile_once(tiny_kernels: Path, fresh_cache: Fresh, version: compiler.Version) -> None:
    fresh_cache()
    start = threading.Barrier(8)
    images: list[Path | bytes] = []

    def work() -> None:
        start.wait()
        images.append(compiler.cubin("tiny", SM90, {"N": 3}, kernels=tiny_kernels))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(images) == 8 and len(set(images)) == 1
    assert compiler.stats == {"compile": 1, "cache": 7}


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"CUGEMM_CACHE_DIR": "/a/b", "HOME": "/h"}, "/a/b"),
        ("linux", {"HOME": "/h"}, "/h/.cache/cugemm"),
        ("linux", {"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/cugemm"),
        ("darwin", {"HOME": "/h"}, "/h/Library/Caches/cugemm"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/cugemm/Cache"),
    ],
)
def test_cache_dir(platform: str, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUGEMM_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(compiler.sys, "platform", platform)
    assert compiler.cache_dir().as_posix() == expected


# Packs


def jobs_of(numbers: range) -> list[compiler.Job]:
    return [compiler.Job("tiny", SM90, {"N": n}) for n in numbers]


def test_a_pack_goes_before_the_compiler_and_needs_none(
    tiny_kernels: Path, tmp_path: Path, fresh_cache: Fresh, version: compiler.Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = fresh_cache()
    assert compiler.write_pack(cache, jobs_of(range(3)), kernels=tiny_kernels) == 3
    assert compiler.write_pack(cache, jobs_of(range(4)), kernels=tiny_kernels) == 1
    pack = json.loads((cache / "pack.json").read_text())
    assert pack["nvrtc"] == [list(version)] and len(pack["cubins"]) == 4
    elsewhere = write_tiny_kernels(tmp_path / "another" / "checkout")
    # This machine has another NVRTC; then none.
    monkeypatch.setattr(compiler, "_require_nvrtc", lambda: (compiler._import_nvrtc(), (99, 9)))
    for n in range(4):
        expected = compiler.entry_name(compiler.Job("tiny", SM90, {"N": n}), version, tiny_kernels)
        image = compiler.cubin("tiny", SM90, {"N": n}, kernels=elsewhere)
        assert isinstance(image, Path) and image.parent.name == expected
    assert compiler.stats == {"pack": 4}
    assert compiler.cubin("tiny", SM90, {"N": 9}, kernels=elsewhere)
    assert compiler.cubin("tiny", SM90, {"N": 9}, kernels=elsewhere)
    assert compiler.stats == {"pack": 4, "compile": 1, "cache": 1}

    def nothing() -> Any:
        raise ImportError("no NVRTC")

    monkeypatch.setattr(compiler, "_require_nvrtc", nothing)
    assert compiler.cubin("tiny", SM90, {"N": 0}, kernels=elsewhere)
    with pytest.raises(ImportError, match="no NVRTC"):
        compiler.cubin("tiny", SM90, {"N": 10}, kernels=elsewhere)


def test_a_changed_source_is_not_served_from_the_pack(tiny_kernels: Path, fresh_cache: Fresh, version: compiler.Version) -> None:
    cache = fresh_cache()
    compiler.write_pack(cache, jobs_of(range(1)), kernels=tiny_kernels)
    (tiny_kernels / "common" / "scale.cuh").write_text("#pragma once\n__device__ float scale(int n) { return n; }\n")
    compiler.cubin("tiny", SM90, {"N": 0}, kernels=tiny_kernels)
    assert compiler.stats == {"compile": 1}


def test_a_damaged_pack_entry_is_compiled(tiny_kernels: Path, fresh_cache: Fresh, version: compiler.Version) -> None:
    cache = fresh_cache()
    compiler.write_pack(cache, jobs_of(range(1)), kernels=tiny_kernels)
    (path,) = cache.rglob("*.cubin")
    right = path.read_bytes()
    path.write_bytes(right[:50])
    assert content(compiler.cubin("tiny", SM90, {"N": 0}, kernels=tiny_kernels)) == right
    assert compiler.stats == {"compile": 1}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"nvrtc": [1]}', '{"nvrtc": [[12, 9]], "cubins": 3}'])
def test_a_damaged_pack_list_is_ignored_aloud(
    text: str, tiny_kernels: Path, fresh_cache: Fresh, version: compiler.Version, caplog: pytest.LogCaptureFixture
) -> None:
    cache = fresh_cache()
    cache.mkdir()
    (cache / "pack.json").write_text(text)
    compiler.cubin("tiny", SM90, {"N": 0}, kernels=tiny_kernels)
    assert compiler.stats == {"compile": 1}
    assert "pack.json is not readable" in caplog.text


# What may be missing


def test_without_cupy_the_error_has_the_pip_line() -> None:
    code = """
import sys
sys.modules["cupy"] = None
from cugemm import arch, compile as compiler
assert compiler.nvrtc_version() is None
try:
    compiler.load("portable", arch.get("sm_90a"), {}, "portable", 0)
except ImportError as error:
    print(error)
"""
    assert 'pip install "cugemm[cuda12]"' in script(code).stdout


@needs_nvrtc
def test_without_nvrtc_the_error_has_the_pip_line(tiny_kernels: Path, fresh_cache: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh_cache()

    class Binding:
        @staticmethod
        def getVersion() -> tuple[int, int]:  # noqa: N802 - CuPy's name
            raise RuntimeError("libnvrtc.so.12 not found")

    monkeypatch.setattr(compiler, "_import_nvrtc", lambda: Binding)
    assert compiler.nvrtc_version() is None
    with pytest.raises(ImportError, match=r'NVRTC is not: pip install "cugemm\[cuda12\]"'):
        compiler.cubin("tiny", SM90, {"N": 0}, kernels=tiny_kernels)


@needs_nvrtc
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a directory nobody can write to")
def test_an_unwritable_home_names_cupys_variable() -> None:
    code = """
import cugemm.formats
from cugemm import compile as compiler
try:
    compiler._import_nvrtc()
except ImportError as error:
    print(error)
"""
    assert "set CUPY_CACHE_DIR to a writable directory" in script(code, HOME="/proc/nope", CUPY_CACHE_DIR="", XDG_CACHE_HOME="").stdout


def test_neither_cuda_path_nor_path_is_needed(tiny_kernels: Path, tmp_path: Path, version: compiler.Version) -> None:
    code = """
import sys
from pathlib import Path
from cugemm import arch, compile as compiler
print(compiler.cubin("tiny", arch.get("sm_90a"), {"N": 1}, kernels=Path(sys.argv[1])))
"""
    done = script(
        code, tiny_kernels, CUDA_PATH="", CUDA_HOME="", PATH="/nonexistent", LD_LIBRARY_PATH="", CUGEMM_CACHE_DIR=str(tmp_path / "c")
    )
    assert Path(done.stdout.strip()).read_bytes() == compiler.build("tiny", SM90, {"N": 1}, kernels=tiny_kernels).image


@pytest.mark.parametrize(
    ("target", "nvrtc", "have", "loads"),
    [
        ("sm_90a", (12, 9), (12, 4), True),  # CUDA minor versions are compatible for cubins
        ("sm_90a", (12, 9), (13, 0), True),
        ("sm_90a", (13, 0), (12, 9), False),
        ("compute_80", (12, 9), (12, 9), True),
        ("compute_80", (12, 9), (12, 4), False),  # but not for PTX
    ],
)
def test_a_driver_older_than_the_compiler(
    target: str, nvrtc: tuple[int, int], have: tuple[int, int], loads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "version", lambda: have)
    if loads:
        compiler._check_driver(arch.get(target), nvrtc)
    else:
        with pytest.raises(CudaError, match=rf"{target} that this driver cannot load: it runs CUDA {have[0]}\.{have[1]}"):
            compiler._check_driver(arch.get(target), nvrtc)


# Devices


@pytest.mark.gpu
def test_load_from_file_and_from_memory(tiny_kernels: Path, fresh_cache: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    fresh_cache()
    target = arch.of_capability(*driver.capability(0))
    for n, expected in ((3, "compile"), (3, "cache"), (4, "compile")):
        if n == 4:
            refuse_writes_below(Path("/"), errno.ENOSPC, monkeypatch)
        loaded = compiler.load("tiny", target, {"N": n}, "tiny", 0, kernels=tiny_kernels)
        assert loaded.origin == expected
        x = cupy.zeros(32, dtype="float32")
        cupy.cuda.driver.launchKernel(loaded.function, 1, 1, 1, 32, 1, 1, 0, 0, _argument(x.data.ptr), 0)
        assert (x.get() == 2.0 * n).all()


def _argument(pointer: int) -> int:
    """Address of a kernel's argument table of one pointer, kept for good."""
    import ctypes

    value = ctypes.c_void_p(pointer)
    table = (ctypes.c_void_p * 1)(ctypes.addressof(value))
    _kept.extend([value, table])
    return ctypes.addressof(table)


_kept: list[Any] = []
