"""`python -m cugemm`, and the modules behind it: what is printed, what is measured how, what a recorded run must look like. No GPU."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import cugemm
from cugemm import __main__ as cli
from cugemm import arch, bench, calls, cases, compile, demo, driver, info, launch, measure, records
from cugemm.arrays import numpy_dtype
from cugemm.catalog import portable
from cugemm.formats import FORMATS

H100 = arch.H100
SM90 = arch.get("sm_90a")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "available", lambda: False)


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints: on stdout if it succeeds, on stderr if it does not."""
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


# info


def test_info_prints_versions_support_and_problems(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "info")
    assert re.search(rf"^cugemm +{re.escape(cugemm.__version__)}$", text, re.MULTILINE)
    assert re.search(rf"^numpy +{re.escape(np.__version__)}$", text, re.MULTILINE)
    assert re.search(r"^extra +cugemm\[cuda1[23]\], ", text, re.MULTILINE)
    assert str(compile.cache_dir()) in text
    for row in info.support(info.survey().target).rows:
        assert re.search(" +".join(map(re.escape, row)), text)
    assert "\n  -: uint4 as a: zero points go with b only" in text
    if not driver.available():
        assert "no NVIDIA driver" in text
        assert "    -> until then, arrays in host memory are computed by the NumPy reference" in text


def test_info_survives_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    home = tmp_path / "file"
    home.write_text("not a directory")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUGEMM", "CUPY", "XDG"))}
    done = subprocess.run(
        [sys.executable, "-m", "cugemm", "info"],
        env={**kept, "HOME": str(home), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"the cache {home}/.cache/cugemm cannot be written (Not a directory)" in done.stdout
    assert "-> set CUGEMM_CACHE_DIR to a writable directory" in done.stdout
    assert f"CuPy's cache {home}/.cupy/kernel_cache cannot be written" in done.stdout


@pytest.mark.parametrize(
    ("packages", "driver_version", "wanted"),
    [
        ({"torch": "2.13.0+cu130"}, None, "cuda13"),
        ({"torch": "2.13.0+cu126"}, (13, 0), "cuda12"),
        ({"torch": "2.11.0"}, None, "cuda13"),
        ({"torch": "2.10.1"}, (13, 0), "cuda12"),
        ({"torch": "2.9.0"}, None, "cuda12"),
        ({"torch": "2.13.0+cpu"}, (13, 1), "cuda13"),
        ({"torch": "2.13.0+cpu", "jax-cuda12-plugin": "0.10.2"}, (13, 1), "cuda12"),
        ({"jax-cuda13-plugin": "0.10.2"}, None, "cuda13"),
        ({}, (13, 0), "cuda13"),
        ({}, (12, 9), "cuda12"),
        ({}, None, "cuda12"),
    ],
)
def test_which_extra_fits(packages: dict[str, str], driver_version: tuple[int, int] | None, wanted: str) -> None:
    assert info.extra_for(packages, driver_version)[0] == wanted


def problems(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    packages: dict[str, str],
    version: tuple[int, int] | None = (12, 9),
    nvrtc: tuple[int, int] | None = (12, 9),
    target: str = "sm_90a",
    gpu: bool = True,
) -> list[tuple[str, str]]:
    monkeypatch.setenv("CUGEMM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "available", lambda: gpu)
    record = arch.of_capability(7, 5) if target == "sm_75" else arch.get(target)
    return [tuple(found) for found in info.find_problems(packages, "cuda12", version, nvrtc, record)]


CUPY = {"cupy-cuda12x": "14.2.0"}


def test_nothing_wrong_is_no_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert problems(monkeypatch, tmp_path, packages=CUPY) == []


@pytest.mark.parametrize(
    ("state", "what", "fix"),
    [
        ({"packages": {}}, "CuPy is not installed, so no kernel can be compiled or loaded", 'pip install "cugemm[cuda12]"'),
        (
            {"packages": {**CUPY, "cupy-cuda13x": "14.2.0"}},
            "cupy-cuda12x and cupy-cuda13x are both installed",
            'pip uninstall cupy-cuda12x cupy-cuda13x, then pip install "cugemm[cuda12]"',
        ),
        (
            {"packages": CUPY, "version": (11, 8)},
            "the driver runs CUDA 11.8",
            "cugemm needs the driver of CUDA 12 (525) or newer: update it",
        ),
        ({"packages": CUPY, "target": "sm_75"}, "the GPU is sm_75", "a kernel needs sm_80 or newer; arrays in host memory work everywhere"),
        (
            {"packages": CUPY, "nvrtc": (12, 8), "target": "sm_121a"},
            "NVRTC 12.8 does not know sm_121a, which needs 12.9",
            'pip install -U "nvidia-cuda-nvrtc-cu12>=12.9"',
        ),
        (
            {"packages": CUPY, "nvrtc": (13, 0)},
            "NVRTC 13.0 is newer than the driver, which runs CUDA 12.9",
            'update the driver, or pip install "cugemm[cuda12]"',
        ),
        ({"packages": CUPY, "gpu": False}, "the driver shows no GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES (now '3')"),
    ],
)  # fmt: skip
def test_every_problem_has_its_fix(state: dict[str, Any], what: str, fix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert (what, fix) in problems(monkeypatch, tmp_path, **state)


def test_a_newer_minor_nvrtc_is_fine_for_cubins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert problems(monkeypatch, tmp_path, packages=CUPY, version=(12, 4), nvrtc=(12, 9)) == []


def test_unwritable_looks_at_the_nearest_directory_that_exists(tmp_path: Path) -> None:
    assert info.unwritable(tmp_path / "not" / "yet") is None
    (tmp_path / "file").write_text("")
    assert info.unwritable(tmp_path / "file" / "below") == "Not a directory"


def test_support_is_asked_of_the_api_and_the_kernels() -> None:
    found = info.support(SM90)
    assert found.rows[0] == (
        "a, b ->", "bf16", "fp16", "e4m3", "e5m2", "mxfp8", "mxfp8_e5m2", "e2m1", "mxfp4", "nvfp4", "int8", "int4", "uint4"
    )  # fmt: skip
    assert [row[0] for row in found.rows[1:]] == list(found.rows[0][1:])
    cells = {(row[0], b): cell for row in found.rows[1:] for b, cell in zip(found.rows[0][1:], row[1:], strict=True)}
    assert {a for (a, _), cell in cells.items() if cell == "-"} == {"uint4"}
    hopper = {("bf16", "bf16"), ("fp16", "fp16"), *itertools.product(("e4m3", "e5m2"), repeat=2)}
    assert {pair for pair, cell in cells.items() if "hopper" in cell} == hopper
    assert set(cells.values()) == {"-", "hopper", "hopper or portable", "portable"}
    assert found.notes == ["uint4 as a: zero points go with b only: dequantise it, or use int4."]


def test_the_refusal_of_the_support_table_is_that_of_the_api() -> None:
    q = calls.operand("uint4_g128:16x256")
    with pytest.raises(TypeError, match="zero points go with b only: dequantise it, or use int4"), launch.recording():
        cugemm.matmul(q, calls.operand("bf16:256x16"))


def test_support_of_a_gpu_without_kernels() -> None:
    found = info.support(arch.of_capability(7, 5))
    assert {cell for row in found.rows[1:] for cell in row[1:]} == {"-"}
    assert found.notes == ["all: needs sm_80 or newer"]


def test_a_kernel_that_refuses_shows_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = portable.Portable.refuse

    def no_integers(self: Any, problem: Any) -> str | None:
        return "multiplies no integers" if getattr(problem, "b", "").startswith("int8") else refuse(self, problem)

    monkeypatch.setattr(portable.Portable, "refuse", no_integers)
    found = info.support(SM90)
    column = found.rows[0].index("int8")
    assert {row[column] for row in found.rows[1:]} == {"-"}
    assert any(note.startswith("bf16 x int8: no kernel for bf16 x int8") for note in found.notes)


# explain


def test_every_public_operation_has_a_call() -> None:
    others = {
        "CaptureError", "CompileError", "CudaError", "HostWarning", "NoKernelError", "Plan", "Quantized", "SfLayout", "Spec", "explain",
        "gemm", "plan", "warmup",
    }  # fmt: skip
    assert set(calls.CALLS) == set(cugemm.__all__) - others


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("op", sorted(calls.CALLS))
def test_explain_knows_every_operation(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = launch.launches
    text = run(capsys, "explain", op, "--arch", "sm_89")
    assert launch.launches == before
    lines = text.splitlines()
    arguments = calls.call_text(op)
    assert lines[0] == op
    assert [line.split(" = ")[0] for line in lines[1 : len(arguments) + 1]] == [f"  {name}" for name in arguments]
    if "no kernel: checks, views and copies in the caller's framework" in lines:
        assert op in ("prepare_bf16_fp4_weights", "prepare_low_latency_gemm_weights", "shuffle_matrix_a")
    else:
        assert re.search(r"^cugemm\.\w+", text, re.MULTILINE)
        assert re.search(r"^  -> \w+ +\d+\.\d us predicted", text, re.MULTILINE)
        assert " on sm_89\n" in text


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("op", ["quantize", "dequantize", "linear", "grouped_matmul"])
def test_explain_takes_every_format(op: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "explain", op, "--format", name, "--m", "24", "--n", "256", "--k", "512", "--groups", "3", "--topk", "1")
    assert f"cugemm.{op}" in text
    if op in ("linear", "grouped_matmul"):
        shape = "(256, 512)" if op == "linear" else "(3, 256, 512)"
        assert f"Quantized({name}, shape={shape}" in text


@pytest.mark.usefixtures("no_gpu")
def test_explain_needs_no_gpu_and_launches_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = launch.launches
    arguments = (
        "explain",
        "mm_fp8",
        "--a",
        "float8_e4m3fn:16x4096",
        "--b",
        "fp8_row:11008x4096:T",
        "--set",
        "a_scale=float32:16x1",
        "alpha=2",
    )
    text = run(capsys, *arguments)
    assert launch.launches == before
    assert text.startswith("mm_fp8\n  a = Spec((16, 4096), 'float8_e4m3fn')\n  b = Quantized(fp8_row, shape=(4096, 11008), transposed, ")
    assert "\n  alpha = 2\ncugemm.mm_fp8\n  m = 16, n = 11008, k = 4096, batch = 1\n" in text
    assert "\ne4m3 x e4m3 -> bfloat16 on sm_90a\n" in text
    assert re.search(r"^  -> (hopper|swap_ab) +\d+\.\d us predicted   (tile \d+x\d+, |\d+ tokens, )", text, re.MULTILINE)
    assert "quantize   refused: converts matrices, does not multiply them" in text


@pytest.mark.usefixtures("no_gpu")
def test_explain_plans_for_another_arch_and_shows_quantisation(capsys: pytest.CaptureFixture[str]) -> None:
    operands = ("--a", "bfloat16:16x4096", "--b", "fp8_row:11008x4096")
    text = run(capsys, "explain", "linear", *operands, "--set", "activations=fp8_row", "--arch", "sm_89")
    assert "cugemm.quantize\n  gives float8_e4m3fn[16, 4096], float32[16, 1]\n" in text
    assert "quantize bfloat16 -> e4m3 on sm_89\n" in text
    assert "cugemm.linear\n  m = 16, n = 11008, k = 4096, batch = 1\n" in text
    assert "\ne4m3 x e4m3 -> bfloat16 on sm_89\n" in text


@pytest.mark.usefixtures("no_gpu")
def test_explain_prints_the_scale_layouts_it_read(capsys: pytest.CaptureFixture[str]) -> None:
    """R19: 14 of 16 shapes cannot tell tiles from rows."""
    text = run(capsys, "explain", "mm_fp4", "--m", "100")
    assert "a_descale: e4m3 codes, one for each 1 x 16 values (rows x k), in 128x4 tiles" in text
    assert "b_descale: e4m3 codes, one for each 1 x 16 values (rows x k), in 128x4 tiles" in text
    text = run(capsys, "explain", "linear", "--a", "mxfp8@8x4", "--b", "nvfp4")
    assert "x.scale: e8m0 codes, one for each 1 x 32 values (rows x k), in 8x4 tiles" in text
    assert "w.scale: e4m3 codes, one for each 1 x 16 values (rows x k), linear" in text
    text = run(capsys, "explain", "quantize", "--format", "nvfp4@128x4", "--m", "100")
    assert "gives uint8[100, 2048], uint8[128, 256], float32[1]" in text
    assert "scale: e4m3, one for each 1 x 16 values (rows x k), in 128x4 tiles" in text


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("nothing",), "'nothing' is no operation of cugemm; wanted one of QuantizedLinear"),
        (("explain",), "'explain' is no operation of cugemm"),
        (("mm_fp8", "--a", "bfloat16:2xx2"), "operand 'bfloat16:2xx2': invalid literal"),
        (("mm_fp8", "--a", "bfloat17:2x2"), "operand 'bfloat17:2x2': 'bfloat17' is not a dtype"),
        (("mm_fp8", "--a", "mxfp8@4x4:2x64"), "operand 'mxfp8@4x4:2x64': quantize: scale_layout is '4x4'"),
        (("mm_bf16", "--a", "bfloat16:2x2:t", "--b", "bfloat16:2x2"), "operand 'bfloat16:2x2:t' has 't'; only T (transposed)"),
        (("mm_bf16", "--a", "bfloat16:2x2:scale"), "has 'scale'; only T (transposed), flat, last, and of a format data, scale, pair"),
        (("linear", "--a", "bf16:m/0xk"), "operand 'bf16:m/0xk': integer division or modulo by zero"),
        (("linear", "--a", "nvfp4:4x64:last"), "has 'last'; only T (transposed)"),
        (("linear", "--a", "nvfp4:4x64:pair:T"), "has 'T'; only T (transposed)"),
        (("linear", "--a", "nvfp4:4x64:flat"), "has 'flat'; only T (transposed)"),
        (("linear", "--a", "bf16@128x4"), "@128x4 says how the scales of a format lie"),
        (("linear", "--a", "nvfp4@"), "@ says how the scales of a format lie"),
        (("mm_bf16", "--a", "bfloat16:8:T"), "operand 'bfloat16:8:T' has 'T', which needs more axes."),
        (("mm_bf16", "--a", "bfloat16:8x8:last"), "operand 'bfloat16:8x8:last' has 'last', which needs more axes."),
        (("mm_bf16", "--a", "bfloat16:2x3", "--b", "bfloat16:2x2"), "a (2, 3) has k = 3, but b (2, 2) read as [k, n] has k = 2"),
        (("mm_bf16", "--a", "bfloat16:2x2", "--b", "bfloat16:2x2", "--set", "alpha"), "'alpha' is not NAME=VALUE."),
        (("mm_bf16", "--arch", "sm_7"), "arch is 'sm_7'; wanted one of sm_80, sm_86"),
        (("mm_bf16", "--a", "float8_e4m3fn"), "mm_bf16: a is float8_e4m3fn; wanted bfloat16"),
        (("mm_bf16", "--set", "beta=1"), "unexpected keyword argument 'beta'"),
        (("mm_bf16", "--format", "nvfp4"), "mm_bf16 has no format to choose; its arguments are a, b."),
        (("quantize", "--b", "nvfp4"), "quantize has no operand b to replace; its arguments are x, format."),
        (("quantize", "--format", "fp9"), "quantize: format is 'fp9'; wanted one of fp8_tensor"),
        (("matmul", "--a", "uint4_g128"), "zero points go with b only: dequantise it, or use int4"),
    ],
)
def test_explain_refuses_in_one_line(arguments: tuple[str, ...], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "explain", *arguments, code=2)
    assert text.startswith("cugemm explain: ")
    assert text.count("\n") == 1
    assert wanted in text


def test_operands_as_text() -> None:
    plain = calls.operand("float8_e4m3fn:16x64:T")
    assert isinstance(plain, cugemm.Spec)
    assert (plain.shape, plain.strides, plain.dtype) == ((64, 16), (1, 64), "float8_e4m3fn")
    assert calls.operand("e4m3:16x64").dtype == plain.dtype
    packed = calls.operand("fp4_row:16x64")
    assert isinstance(packed, cugemm.Quantized)
    assert (packed.shape, packed.data.shape, packed.data.dtype, packed.scale.shape) == ((16, 64), (16, 32), "uint8", (16, 1))
    blocked = calls.operand("fp8_block:300x200:T")
    assert (blocked.shape, blocked.scale.shape) == ((200, 300), (2, 3))
    tiled = calls.operand("nvfp4@128x4:100x96")
    assert (tiled.scale_layout, tiled.scale.shape, tiled.tensor_scale.shape) == ("128x4", (128, 8), (1,))
    assert calls.operand("uint4_g32:8x64").zero.shape == (8, 2)
    assert calls.operand("nvfp4@128x4:100x96:scale:flat").shape == (1024,)
    data, scale = calls.operand("mxfp8:2x4x64:pair")
    assert (data.shape, scale.shape) == ((2, 4, 64), (2, 4, 2))
    assert calls.operand("bf16:2x3x4:T").strides == (12, 1, 4)


def test_shapes_as_text() -> None:
    sizes = {"m": 5, "n": 7, "k": 32, "g": 3, "t": 2}
    assert calls.operand("bf16:m*txg+1x2*n", sizes=sizes).shape == (10, 4, 14)
    assert calls.operand("bf16:g*127+m/128*128xk/16", sizes=sizes).shape == ((3 * 127 + 5) // 128 * 128, 2)
    assert [calls.value(text, sizes=sizes) for text in ("m", "3", "0.5", "None", "True", "K")] == [5, 3, 0.5, None, True, "K"]


# compile


@pytest.mark.parametrize("target", [name for name, found in arch.ARCHS.items() if not found.is_ptx])
def test_the_configs_of_a_format_and_weight_are_few(target: str) -> None:
    weights = cases.SHAPES[::4]
    listed = list(cases.configs(cases.CASES, weights, arch.get(target)))
    assert len(listed) == len(set(listed))
    products = [c for c in listed if c.n]
    assert {(c.n, c.k) for c in products} == set(weights)
    counts = {key: len(list(group)) for key, group in itertools.groupby(products, key=lambda c: (c.what, c.n, c.k))}
    assert len(counts) == len(cases.CASES) * len(weights)
    assert {c.kernel for c in listed if not c.n} == {"quantize", "block_quantize", "rows"}
    assert 1 <= max(counts.values()) <= 16


def test_compile_list_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "compile", "--list", "--arch", "sm_80,sm_90a", "--formats", "fp8_row", "--shapes", "11008x4096")
    assert [line for line in text.splitlines() if line.startswith("sm_")] == ["sm_80:", "sm_90a:"]
    lines = [line for line in text.splitlines() if line.startswith("fp8_row (e4m3 x e4m3)")]
    wanted = [c for name in ("sm_80", "sm_90a") for c in cases.configs(["fp8_row"], [(11008, 4096)], arch.get(name)) if c.n]
    assert len(lines) == len(wanted)
    assert all(re.search(r" 11008  4096  ((portable|hopper) +tile|(skinny|swap_ab) +\d+ tokens, )", line) for line in lines)
    assert len(re.findall(r"^quantize bfloat16 -> e4m3 +any +any +quantize +", text, re.MULTILINE)) == 2


def test_jobs_hold_every_best_config_once() -> None:
    asked: Any = ["fp8_row", "fp8_tensor", "w8a16_fp8"], [(4096, 4096), (11008, 4096)], SM90
    jobs = cases.jobs(*asked)
    keys = [(job.stem, tuple(sorted(job.defines.items()))) for job in jobs]
    assert len(keys) == len(set(keys))
    tiles = {job.defines["BLOCK_M"] for job in jobs if job.stem == "portable"}
    listed = list(cases.configs(*asked))
    assert {c.kernel for c in listed if c.n} >= {"portable", "skinny", "hopper"}
    assert len(tiles) >= 2
    assert len({c.config for c in listed if c.kernel == "portable"}) == len([job for job in jobs if job.stem == "portable"])
    tokens = {job.defines["TOKENS"] for job in jobs if job.stem == "skinny"}
    assert tokens >= {1, 2, 4, 8, 16}
    assert {job.defines["MODE"] for job in jobs if job.stem == "quantize"} == {0, 1}
    assert {(job.defines["MODE"], job.defines["X_ELEMENT"]) for job in jobs if job.stem == "rows"} == {(0, 0), (0, 6), (1, 0)}


def test_jobs_of_every_format_have_sources() -> None:
    jobs = cases.jobs(cases.CASES, [(4096, 4096)], SM90)
    assert {job.stem for job in jobs} == {"portable", "skinny", "swap_ab", "hopper", "quantize", "block_quantize", "rows", "segments"}
    assert all((compile.kernel_dir() / f"{job.stem}.cu").exists() for job in jobs)
    sides = ("A_ELEMENT", "A_SCALE", "B_ELEMENT", "B_SCALE")
    pairs = {tuple(job.defines[side] for side in sides) for job in jobs if job.stem in ("portable", "hopper")}
    assert len(pairs) == len(
        {
            (case.activations and FORMATS[case.activations][1:4:2], case.weights and FORMATS[case.weights][1:4:2], case.dtype)
            for case in cases.CASES.values()
        }
    )


@pytest.mark.requires("cupy")
def test_compile_writes_a_pack_and_a_second_time_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if compile.nvrtc_version() is None:
        pytest.skip("needs NVRTC")
    monkeypatch.setattr(cases, "jobs", lambda *_: [compile.Job("stream", SM90, {})])
    arguments = ("compile", "--arch", "sm_90a", "--pack", str(tmp_path / "pack"))
    assert run(capsys, *arguments).startswith(f"sm_90a: 1 kernels in {tmp_path / 'pack'}, 1 of them compiled in ")
    assert ", 0 of them compiled in " in run(capsys, *arguments)
    assert len(json.loads((tmp_path / "pack" / compile.PACK).read_text())["cubins"]) == 1
    monkeypatch.setenv("CUGEMM_CACHE_DIR", str(tmp_path / "cache"))
    assert ", 1 of them compiled in " in run(capsys, *arguments[:3])
    assert ", 0 of them compiled in " in run(capsys, *arguments[:3])


@pytest.mark.parametrize("text", ["4096", "4096x", "x4096", "0x4096", "4096x-1", "axb", "1x2x3"])
def test_bad_shapes_are_refused_by_name(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compile", "--list", "--shapes", text])
    assert "argument --shapes: " in (said := capsys.readouterr().err)
    assert "is not a positive number" in said


# cases


def test_traffic_counts_each_byte_once() -> None:
    m, n, k = 3, 200, 320
    bytes16, blocks16, blocks32 = m * k + n * k, (m + n) * k // 16, (m + n) * k // 32
    wanted = {
        "bf16": 2 * bytes16,
        "fp16": 2 * bytes16,
        "fp8_tensor": bytes16 + 8,
        "fp8_row": bytes16 + 4 * (m + n),
        "fp8_block": bytes16 + 4 * m * 3 + 4 * 2 * 3,
        "w8a16_fp8": 2 * m * k + n * k + 4 * n,
        "mxfp8": bytes16 + blocks32,
        "nvfp4": bytes16 // 2 + blocks16 + 8,
        "mxfp4": bytes16 // 2 + blocks32,
        "w4a16_nvfp4": 2 * m * k + n * k // 2 + n * k // 16 + 4,
        "w4a16_mxfp4": 2 * m * k + n * k // 2 + n * k // 32,
        "int4_g128": 2 * m * k + n * k // 2 + 4 * n * 3,
        "int8": 2 * m * k + n * k + 4 * n,
    }
    assert {name: cases.traffic(case, m, n, k) - 2 * m * n for name, case in cases.CASES.items()} == wanted
    assert cases.stored("uint4_g128", n, k) == n * k // 2 + 5 * n * 3
    assert cases.stored("nvfp4_row", n, k) == n * k // 2 + n * k // 16 + 4 * n


def stored_bytes(weight: Any) -> int:
    """Bytes of a weight as `Case.weight` returned it, scales and zero points included."""
    parts = (weight.data, weight.scale, weight.tensor_scale, weight.zero) if isinstance(weight, cugemm.Quantized) else (weight,)
    return sum(int(x.nbytes) for x in parts if x is not None)


@pytest.mark.parametrize("name", cases.CASES)
def test_a_case_computes_x_w_transposed(name: str, rng: np.random.Generator) -> None:
    case = cases.CASES[name]
    x, w = (rng.standard_normal(shape).astype(numpy_dtype(case.dtype)) for shape in ((5, 256), (130, 256)))
    a, b = case.activation(x), case.weight(w)
    assert stored_bytes(b) == cases.stored(case.weights, 130, 256)
    y = case.product(a, b)
    assert (y.shape, y.dtype.name) == ((5, 130), case.dtype)
    right = x.astype(np.float64) @ w.astype(np.float64).T
    error = np.linalg.norm(y.astype(np.float64) - right) / np.linalg.norm(right)
    coarse = {4: 0.2, 8: 0.05}
    assert error < (0.003 if case.weights is None else coarse[FORMATS[case.weights].element.bits])
    out = np.empty_like(y)
    assert case.product(a, b, out) is out
    assert out.tobytes() == y.tobytes()
    assert case.layer(x, b).tobytes() == y.tobytes(), "x is quantised on the way"


def test_presets_hold_the_published_shapes() -> None:
    shapes = cases.PRESETS["baselines"].shapes
    assert len(shapes) == len(set(shapes)) == 2 + 9 * 7
    assert {(1, 28672, 4096), (4096, 7168, 2048), (8192, 8192, 8192), (128, 2112, 7168)} <= set(shapes)
    assert cases.PRESETS["baselines"].formats == ("bf16", "fp16", "fp8_tensor", "fp8_row", "fp8_block", "w8a16_fp8")
    assert set(cases.PRESETS["formats"].formats) == set(cases.CASES) - {"fp16"}
    assert {(1, 28672, 4096), (16, 4096, 4096), (128, 4096, 4096), (1024, 28672, 4096)} < set(cases.PRESETS["formats"].shapes)
    with pytest.raises(ValueError, match="format is 'fp9'; wanted one of bf16, fp16, fp8_tensor"):
        cases.case("fp9")


@pytest.mark.parametrize("quantiser", cases.QUANTISERS, ids=str)
def test_quantisers_move_what_is_counted(quantiser: cases.Quantiser, rng: np.random.Generator) -> None:
    x = rng.standard_normal((128, 512)).astype(numpy_dtype("bfloat16"))
    q = quantiser(x)
    given = 4 * (quantiser.tensor_scale is not None)
    assert abs(x.nbytes + stored_bytes(q) - cases.quantiser_traffic(quantiser.format, 128, 512)) <= given
    (recorded,) = cases.record_quantiser(quantiser, 128, 512)
    assert recorded.call.problem.element == FORMATS[quantiser.format].element.name


@pytest.mark.parametrize("name", cases.LAYER_FORMATS)
def test_a_mixture_is_a_sum_over_experts(name: str, rng: np.random.Generator) -> None:
    layer, m = cases.Layer("tiny", 4, 2, 128, 256), 5
    case = cases.CASES[name]
    indices, weights = cases.route(layer, m, 0)
    assert all(len(set(row)) == layer.topk for row in indices.tolist())
    assert np.allclose(weights.sum(axis=1), 1)
    x, w13, w2 = (
        (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(numpy_dtype("bfloat16"))
        for shape in ((m, 128), (4, 512, 128), (4, 128, 256))
    )
    y = cases.mixture(case, x, case.weight(w13), case.weight(w2), indices, weights).astype(np.float64)
    right = np.zeros((m, 128))
    for t, row in enumerate(indices):
        for j, e in enumerate(row):
            h = w13[e].astype(np.float64) @ x[t].astype(np.float64)
            right[t] += weights[t, j] * (w2[e].astype(np.float64) @ (h[:256] / (1 + np.exp(-h[:256])) * h[256:]))
    bits = 16 if case.weights is None else FORMATS[case.weights].element.bits
    assert np.linalg.norm(y - right) < {16: 0.01, 8: 0.08, 4: 0.3}[bits] * np.linalg.norm(right)
    assert len(cases.record_layer(layer, case, m)) == 2


@pytest.mark.parametrize("name", cases.PRESETS["decode"].formats)
def test_a_chain_is_recorded_by_its_products(name: str) -> None:
    case, chain = cases.case(name), cases.DECODE
    n, k = chain.whole
    assert n * k == 4096 * (6144 + 4096 + 28672 + 14336)
    assert cases.PRESETS["decode"].shapes == tuple((m, n, k) for m in (1, 8, 32))
    read = {"bf16": 2.0, "w4a16_nvfp4": 9 / 16}.get(name, 1.0) * n * k
    assert cases.chain_traffic(case, chain, 1) == pytest.approx(read, rel=2e-3)
    for overlap in (False, True):
        found = cases.record_chain(chain, case, 8, overlap)
        assert [(recorded.call.n, recorded.call.k) for recorded in found] == list(chain.sizes)
        assert {recorded.call.problem.pdl for recorded in found} == {"static" if overlap else ""}


# measure


class FakeGraph:
    """Answers given times in turn."""

    def __init__(self, times: Sequence[float], calls: int = 1, log: list[str] | None = None, name: str = "") -> None:
        self.calls, self._times, self._log, self._name = calls, list(times), log, name

    def us(self) -> float:
        if self._log is not None:
            self._log.append(self._name)
        return self._times.pop(0) if len(self._times) > 1 else self._times[0]


def test_interleaved_takes_turns_and_the_median_without_the_first_round() -> None:
    log: list[str] = []
    graphs = {"a": FakeGraph([99, 1, 3, 2], log=log, name="a"), "b": FakeGraph([0, 7, 5, 6], log=log, name="b")}
    assert measure.interleaved(graphs, rounds=3) == {"a": 2, "b": 6}
    assert log == ["a", "b"] * 4


@pytest.mark.parametrize(("us", "copies", "calls"), [(5.0, 30, 390), (1.0, 30, 510), (700.0, 2, 2), (400.0, 2, 4), (5000.0, 2, 2)])
def test_a_graph_lasts_two_milliseconds_and_visits_copies_equally(us: float, copies: int, calls: int) -> None:
    made = measure.graph(lambda call, n: FakeGraph([us], n), lambda i: None, copies)
    assert made.calls == calls
    assert made.calls % copies == 0


def test_copies_are_cold() -> None:
    l2 = 50 << 20
    assert measure.copies_for(7168 * 2048, l2) * 7168 * 2048 >= 3 * l2
    assert measure.copies_for(28672 * 4096 * 2, l2) == 2
    assert measure.copies_for(0, l2) == 3 * l2


def test_a_chain_reads_what_it_wrote() -> None:
    sizes = [(6, 4), (4, 4), (9, 4), (4, 8)] * 2
    buffers = [np.full(3 * 9, i) for i in range(3)]
    places = measure.chained(buffers, 3, sizes)
    assert [(x.shape, out.shape) for x, out in places] == [((3, k), (3, n)) for n, k in sizes]
    assert all(x.flags.c_contiguous and out.flags.c_contiguous and not np.shares_memory(x, out) for x, out in places)
    for (_, out), (x, _) in itertools.pairwise(places):
        assert out.ctypes.data == x.ctypes.data
    assert np.shares_memory(places[0][0], buffers[0])
    assert not any(np.shares_memory(out, buffers[0]) for _, out in places), "replays begin with other values"


class FakeTensor(np.ndarray):
    def t(self) -> Any:
        return self.T


def test_torch_is_chained_the_same_way(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    log: list[tuple[Any, Any, Any]] = []

    def mm(x: Any, w: Any, out: Any) -> None:
        np.matmul(x, w, out=out)
        log.append((x.copy(), w, out.copy()))

    torch = SimpleNamespace(
        float16="float16", bfloat16="bfloat16", mm=mm, randn=lambda *shape, **_: rng.standard_normal(shape).view(FakeTensor), empty=None
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", torch)
    sizes = [(384, 256), (256, 384)]
    call = measure.torch_chain("torch.bf16", 2, sizes, 3, 2)
    for i in range(3):
        call(i)
    assert [w.shape for _, w, _ in log] == [(k, n) for n, k in sizes] * 3
    for (_, _, out), (x, _, _) in itertools.pairwise(log):
        assert np.array_equal(out.reshape(-1)[: x.size], x.reshape(-1))
    assert [np.shares_memory(w, log[0][1]) for _, w, _ in log] == [True, False, False, False, True, False]
    assert all(0.7 < out.std() < 1.4 for _, _, out in log)


def test_host_time_is_a_median_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    cost = {"a": 2e-6, "b": 5e-6}
    calls: dict[str, Callable[[], object]] = {}
    counts = dict.fromkeys(cost, 0)

    def make(name: str) -> Callable[[], object]:
        def call() -> None:
            nonlocal clock
            counts[name] += 1
            clock += cost[name]

        return call

    calls = {name: make(name) for name in cost}
    synchronised = []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock)
    times = measure.host_us(calls, lambda: synchronised.append(1), rounds=3, batch=10)
    assert times == pytest.approx({"a": 2.0, "b": 5.0})
    assert counts == {"a": 40, "b": 40}
    assert len(synchronised) == 2 * 4 + 1


def test_peaks_of_an_h100() -> None:
    assert measure.peak_tflops(SM90, H100, 16) == pytest.approx(803, abs=1)
    assert measure.peak_tflops(SM90, H100, 8) == measure.peak_tflops(SM90, H100, 4) == pytest.approx(1606, abs=1)
    b200 = arch.get("sm_100a")
    assert measure.peak_tflops(b200, H100, 4) == 2 * measure.peak_tflops(b200, H100, 8) == 4 * measure.peak_tflops(b200, H100, 16)
    bits = {name: cases.operand_bits(case) for name, case in cases.CASES.items()}
    assert (bits["nvfp4"], bits["mxfp8"], bits["fp8_row"], bits["int8"], bits["w4a16_nvfp4"]) == (4, 8, 8, 16, 16)
    a100 = H100._replace(sm_count=108, clock_khz=1_410_000)
    assert measure.peak_tflops(arch.get("sm_80"), a100, 8) == pytest.approx(0.75 * 312, abs=1)


@pytest.mark.requires("cupy")
@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_100a", "sm_120a", "compute_80"])
def test_the_read_kernel_compiles_clean(target: str) -> None:
    if compile.nvrtc_version() is None:
        pytest.skip("needs NVRTC")
    assert compile.remarks(compile.build("stream", arch.get(target), {}).log) == []


class FakeCupy:
    """The part of CuPy that a CupyGraph uses, as a log of what was asked."""

    def __init__(self) -> None:
        log = self.log = []

        class Stream:
            def __init__(self, non_blocking: bool) -> None:
                log.append(f"stream {non_blocking}")

            def __enter__(self) -> None:
                log.append("enter")

            def __exit__(self, *_: object) -> None:
                log.append("exit")

            def synchronize(self) -> None:
                log.append("synchronize stream")

            def begin_capture(self) -> None:
                log.append("begin")

            def end_capture(self) -> Any:
                log.append("end")
                return SimpleNamespace(launch=lambda stream: log.append("launch"))

        event = SimpleNamespace(record=lambda stream: log.append("record"), synchronize=lambda: log.append("wait"))
        device = SimpleNamespace(synchronize=lambda: log.append("synchronize device"))
        self.cuda = SimpleNamespace(
            Stream=Stream, Event=lambda: event, Device=lambda: device, get_elapsed_time=lambda start, end: 0.5,
            MemoryPool=lambda: SimpleNamespace(malloc="own pool"), using_allocator=self.allocator,
        )  # fmt: skip

    @contextlib.contextmanager
    def allocator(self, malloc: object) -> Iterator[None]:
        self.log.append(f"allocate in {malloc}")
        yield
        self.log.append("allocate as before")


def test_a_cupy_graph_warms_captures_and_keeps_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    operand = type("Operand", (), {})()
    alive = weakref.ref(operand)
    made = measure.CupyGraph(lambda i, operand=operand: cupy.log.append(f"call {i}"), 2)
    del operand
    assert cupy.log == [
        "synchronize device", "stream True", "allocate in own pool", "enter", "call 0", "synchronize stream", "begin", "call 0", "call 1",
        "end", "exit", "allocate as before",
    ]  # fmt: skip
    cupy.log.clear()
    assert made.us() == 250.0
    assert cupy.log == ["record", "launch", "record", "wait"]
    assert alive() is not None, "the graph reads memory that nobody owns"


def test_a_call_that_fails_in_a_capture_ends_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)

    def call(i: int) -> None:
        if i == 1:
            raise cugemm.CaptureError("not warm")

    with pytest.raises(cugemm.CaptureError, match="not warm"):
        measure.CupyGraph(call, 2)
    assert cupy.log[-3:] == ["begin", "end", "exit"]


# bench


def gpu_row(**changed: Any) -> dict[str, Any]:
    row = {
        "op": "mm_fp8", "format": "fp8_row", "m": 16, "n": 11008, "k": 4096, "groups": 1, "kernel": "portable: tile 16x32x256",
        "us": 30.0, "floor_us": 14.6, "stream_us": 16.0, "baselines": {"torch.fp8_row": 21.0, "torch.bf16": 36.0},
    }  # fmt: skip
    return {**row, **changed}


def host_row(**changed: Any) -> dict[str, Any]:
    row = {
        "op": "mm_fp8", "format": "fp8_tensor", "m": 16, "n": 4096, "k": 4096, "groups": 1, "kernel": "portable",
        "host_us": 7.5, "host_baselines": {"torch.fp8_tensor": 20.9}, "note": "PyTorch, warm",
    }  # fmt: skip
    return {**row, **changed}


def document(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "gpu": "NVIDIA H100 80GB HBM3 (132 SM, sm_90a)", "driver": "580.65.06", "cuda": "13.0", "versions": {"cugemm": "0.1.0"},
        "commit": "0123456789ab", "date": "2026-11-22", "read_gbs": 3110.0, "rows": list(rows),
    }  # fmt: skip


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def test_the_schema_takes_good_documents() -> None:
    assert records.validate(document()) == []
    assert records.validate(document(gpu_row(), gpu_row(note="x"), gpu_row(us=None, note="it failed"), host_row())) == []


@pytest.mark.parametrize(
    ("bad", "wanted"),
    [
        (without(document(), "commit"), "document lacks commit"),
        ({**document(), "method": ""}, "document has method, which is not in the schema"),
        ({**document(), "read_gbs": "fast"}, "document.read_gbs is 'fast'; wanted float"),
        (document(without(gpu_row(), "stream_us")), "rows[0] lacks stream_us"),
        (document(gpu_row(), gpu_row(speed=3)), "rows[1] has speed, which is not in the schema"),
        (document(gpu_row(m=1.5)), "rows[0].m is 1.5; wanted int"),
        (document(gpu_row(m=True)), "rows[0].m is True; wanted int"),
        (document(gpu_row(us=None)), "rows[0] was not measured and has no note that says why"),
        (document(gpu_row(floor_us=None, note="x")), "rows[0].floor_us is None; wanted float"),
        (document(gpu_row(baselines={"torch.bf16": None})), "rows[0].baselines['torch.bf16'] is not a number"),
        (document(gpu_row(baselines={"torch.bf16": float("nan")})), "rows[0].baselines['torch.bf16'] is not a number"),
        (document(without(host_row(), "host_baselines")), "rows[0] lacks host_baselines"),
        (document(host_row(us=1.0)), "rows[0] has us, which is not in the schema"),
    ],
)
def test_the_schema_names_what_is_wrong(bad: dict[str, Any], wanted: str) -> None:
    assert wanted in records.validate(bad)


def test_a_new_document_is_valid() -> None:
    made = records.new_document()
    assert records.validate(made) == []
    assert made["versions"]["numpy"] == np.__version__
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", made["date"])


def test_tables_come_from_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    failed = gpu_row(m=8192, n=8192, k=8192, us=None, stream_us=None, baselines={"torch.bf16": 1518.5}, note="fp8_row: CudaError: broken")
    records.save(document(gpu_row(), failed, host_row()), path)
    lines = run(capsys, "bench", "--table", str(path)).splitlines()
    assert lines[0] == (
        "2026-11-22, commit 0123456789ab: NVIDIA H100 80GB HBM3 (132 SM, sm_90a), driver 580.65.06, CUDA 13.0, read bandwidth 3110 GB/s, "
        "cugemm 0.1.0."
    )
    start = lines.index("### fp8_row")
    assert lines[start + 2 : start + 6] == [
        "| n x k | m | cugemm us | torch.fp8_row us | torch.bf16 us | stream us | floor us | rate | kernel | note |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 11008 x 4096 | 16 | 30.0 | 21.0 (0.70x) | 36.0 (1.20x) | 16.0 | 14.6 | 1518 GB/s | portable: tile 16x32x256 |  |",
        "| 8192 x 8192 | 8192 | - | - | 1518.5 | - | 14.6 | - | portable: tile 16x32x256 | fp8_row: CudaError: broken |",
    ]
    start = lines.index("### Host time")
    assert lines[start + 4] == "| mm_fp8: PyTorch, warm | 16 x 4096 x 4096 | 7.5 | 20.9 |"


def test_a_file_that_is_no_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"rows": []}')
    text = run(capsys, "bench", "--table", str(path), code=2)
    assert "other.json is not a benchmark document: document lacks gpu; document lacks driver" in text


@pytest.mark.usefixtures("no_gpu")
def test_bench_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "bench", code=2) == "cugemm bench: there is no GPU to measure; --table FILE prints recorded runs.\n"


def test_values_from_a_pool_cover_everything_once() -> None:
    for size, start in ((0, 3), (5, 3), (10, 0), (23, 7)):
        taken = np.concatenate([np.arange(s, s + length) for _, s, length in bench.pieces(size, start, 10)] or [np.empty(0)])
        assert taken.tolist() == [(start + i) % 10 for i in range(size)]
        positions = [at for at, _, _ in bench.pieces(size, start, 10)]
        assert positions == sorted(positions)


@pytest.fixture
def fake_bench(monkeypatch: pytest.MonkeyPatch) -> bench.Bench:
    """A Bench whose GPU is imagined: products 100 us, peers 200 us, reads 50 us."""
    made = bench.Bench.__new__(bench.Bench)
    made._target, made._info, made.read_gbs = SM90, H100, 3110.0
    monkeypatch.setattr(bench.Bench, "_ours", lambda *_: FakeGraph([100.0]))
    monkeypatch.setattr(bench.Bench, "_torch", lambda *_: FakeGraph([200.0]))
    monkeypatch.setattr(bench.Bench, "_read", lambda *_: FakeGraph([50.0]))
    monkeypatch.setattr(bench.Bench, "_chain", lambda self, chain, case, m, overlap: FakeGraph([80.0 if overlap else 90.0]))
    monkeypatch.setattr(bench.Bench, "_torch_chain", lambda *_: FakeGraph([190.0]))
    monkeypatch.setattr(bench, "_free", lambda: None)
    monkeypatch.setattr(measure, "optional", lambda name: sys)
    monkeypatch.setattr(cases, "chosen", lambda *_: ("portable", "tile"))
    return made


def test_rows_hold_time_baselines_floor_and_stream(fake_bench: bench.Bench) -> None:
    (rows,) = fake_bench.rows([(16, 11008, 4096)], ["bf16", "fp8_row"], until=float("inf"))
    assert records.validate(document(*rows)) == []
    size = 2 * 16 * 4096 + 2 * 11008 * 4096 + 2 * 16 * 11008
    assert rows[0] == {
        "op": "mm_bf16", "format": "bf16", "m": 16, "n": 11008, "k": 4096, "groups": 1, "kernel": "portable: tile",
        "us": 100.0, "floor_us": round(size / 3110e3, 2), "stream_us": 50.0, "baselines": {"torch.bf16": 200.0},
    }  # fmt: skip
    assert rows[1]["baselines"] == {"torch.fp8_row": 200.0, "torch.bf16": 200.0}
    ((large,),) = fake_bench.rows([(8192, 8192, 8192)], ["fp8_row"], until=float("inf"))
    assert large["floor_us"] == pytest.approx(2 * 8192**3 / 1606e6, rel=1e-3)


def test_a_peer_or_product_that_fails_is_a_note(fake_bench: bench.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, name: Any, *_: Any) -> Any:
        if name == "torch.fp8_block":
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand a long trace")
        return FakeGraph([200.0])

    def fail(self: Any, case: Any, *_: Any) -> Any:
        if case.format == "fp8_row":
            raise cugemm.CudaError("launch failed")
        return FakeGraph([100.0])

    monkeypatch.setattr(bench.Bench, "_torch", refuse)
    monkeypatch.setattr(bench.Bench, "_ours", fail)
    (rows,) = fake_bench.rows([(1, 2112, 7168)], ["fp8_row", "fp8_block"], until=float("inf"))
    assert records.validate(document(*rows)) == []
    assert (rows[0]["us"], rows[0]["note"]) == (None, "fp8_row: CudaError: launch failed")
    assert rows[0]["baselines"] == {"torch.fp8_row": 200.0, "torch.bf16": 200.0}
    assert (rows[1]["us"], rows[1]["note"]) == (100.0, "torch.fp8_block: RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED")
    assert rows[1]["baselines"] == {"torch.bf16": 200.0}


def test_an_error_while_measuring_leaves_notes_in_all_rows(fake_bench: bench.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graphs: Any, rounds: int = 7) -> Any:
        raise cugemm.CudaError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(measure, "interleaved", broken)
    (rows,) = fake_bench.rows([(1, 2112, 7168)], ["bf16", "fp8_row"], until=float("inf"))
    assert records.validate(document(*rows)) == []
    assert [row["note"] for row in rows] == ["CudaError: CUDA_ERROR_ILLEGAL_ADDRESS"] * 2


def test_no_shape_is_begun_when_time_is_over(fake_bench: bench.Bench) -> None:
    assert list(fake_bench.rows([(1, 2112, 7168)], ["bf16"], until=-1.0)) == []
    assert list(fake_bench.quantiser_rows([(16, 4096)], until=-1.0)) == []
    assert list(fake_bench.chain_rows([(cases.DECODE, 1)], ["bf16"], until=-1.0)) == []
    assert list(fake_bench.layer_rows([(cases.LAYERS[0], 1)], ["bf16"], until=-1.0)) == []


def test_batch_invariance_stands_beside_the_plain_product(fake_bench: bench.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.Bench, "_ours", lambda self, case, m, n, k, invariant=False: FakeGraph([120.0 if invariant else 100.0]))
    (rows,) = fake_bench.invariant_rows([(16, 11008, 4096)], ["bf16", "fp8_block"], until=float("inf"))
    size = 2 * 16 * 4096 + 2 * 11008 * 4096 + 2 * 16 * 11008
    assert rows[0] == {
        "op": "batch_invariant", "format": "bf16", "m": 16, "n": 11008, "k": 4096, "groups": 1, "kernel": "portable: tile", "us": 120.0,
        "floor_us": round(size / 3110e3, 2), "stream_us": 50.0, "baselines": {"cugemm": 100.0},
    }  # fmt: skip
    assert records.validate(document(*rows)) == []
    assert "| 11008 x 4096 | 16 | fp8_block | 100.0 | 120.0 | 1.20x | 50.0 |" in records.table([document(*rows)])


@pytest.mark.parametrize("name", cases.CASES)
def test_every_case_can_be_batch_invariant(name: str) -> None:
    plain, invariant = (cases.record(cases.case(name), 16, 256, 512, batch_invariant=flag)[-1].call.problem for flag in (False, True))
    assert invariant.batch_invariant
    assert invariant._replace(accumulate=plain.accumulate) == plain._replace(batch_invariant=True)


def test_a_chain_is_a_row_without_and_one_with_overlap(fake_bench: bench.Bench, tmp_path: Path, capsys: Any) -> None:
    (rows,) = fake_bench.chain_rows([(cases.Chain("", ((11008, 4096),), 64), 16)], ["bf16", "fp8_row"], until=float("inf"))
    size = 2 * 16 * 4096 + 2 * 11008 * 4096 + 2 * 16 * 11008
    assert rows[0] == {
        "op": "chain", "format": "bf16", "m": 16, "n": 11008, "k": 4096, "groups": 1, "kernel": "portable: tile", "us": 90.0,
        "floor_us": round(size / 3110e3, 2), "stream_us": 50.0, "baselines": {"torch.bf16": 190.0}, "note": "chain of 64",
    }  # fmt: skip
    assert rows[1] == {**rows[0], "us": 80.0, "note": "chain of 64, pdl, static weights"}
    assert [row["format"] for row in rows] == ["bf16", "bf16", "fp8_row", "fp8_row"]
    assert rows[3]["baselines"] == {"torch.fp8_row": 190.0, "torch.bf16": 190.0}
    records.save(document(gpu_row(), *rows), tmp_path / "run.json")
    text = run(capsys, "bench", "--table", str(tmp_path / "run.json"))
    assert text.count("### ") == 2
    assert f"| 11008 x 4096 | 16 | bf16 | 80.0 | 190.0 (2.38x) | - | 50.0 | {rows[1]['floor_us']:.1f} | {size / 80e3:.0f} GB/s |" in text


def test_a_layer_of_a_decode_step_is_two_rows(fake_bench: bench.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, chain: Any, case: Any, m: int, overlap: bool) -> Any:
        if overlap:
            raise cugemm.CudaError("launch failed")
        return FakeGraph([90.0])

    monkeypatch.setattr(bench.Bench, "_chain", fail)
    (rows,) = fake_bench.chain_rows([(cases.DECODE, 8)], ["w8a16_fp8", "fp8_tensor"], until=float("inf"))
    assert records.validate(document(*rows)) == []
    weights = 4096 * 53248
    assert {**rows[0], "floor_us": 0.0} == {
        "op": "decode", "format": "w8a16_fp8", "m": 8, "n": 53248, "k": 4096, "groups": 1, "kernel": "portable: tile", "us": 90.0,
        "floor_us": 0.0, "stream_us": 50.0, "baselines": {"torch.bf16": 190.0, "torch.fp8_tensor": 190.0},
        "note": "Llama-3-8B, 219.4 MB a layer, chain of 8 layers",
    }  # fmt: skip
    assert rows[0]["floor_us"] == pytest.approx(weights / 3110e3, rel=0.01)
    assert rows[1]["us"] is None
    assert rows[1]["note"] == (
        "Llama-3-8B, 219.4 MB a layer, chain of 8 layers, pdl, static weights; w8a16_fp8, pdl: CudaError: launch failed"
    )
    assert rows[2]["baselines"] == rows[0]["baselines"]


@pytest.fixture
def host_bench(monkeypatch: pytest.MonkeyPatch) -> tuple[bench.Bench, list[list[Any]]]:
    """A Bench whose graphs run their calls at once, on host arrays, and keep the arguments of each product with its result."""
    made = bench.Bench.__new__(bench.Bench)
    seen: list[list[Any]] = []

    def values(self: Any, shape: tuple[int, ...], dtype: str, seed: int, scale: float = 1.0) -> Any:
        return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(numpy_dtype(dtype))

    def link(case: cases.Case, a: Any, b: Any, out: Any, *, overlap: bool) -> None:
        seen.append([a.copy() if isinstance(a, np.ndarray) else a, b, out, cugemm.linear(a, b, out=out).copy(), overlap])

    def at_once(call: Any, calls: int) -> Any:
        for i in range(calls):
            call(i)
        return FakeGraph([1.0], calls)

    monkeypatch.setattr(bench.Bench, "_values", values)
    monkeypatch.setattr(cases.Case, "link", link)
    monkeypatch.setattr(measure, "CupyGraph", at_once)
    return made, seen


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp8_tensor", "w4a16_nvfp4"])
def test_products_of_a_chain_depend_on_each_other(name: str, host_bench: Any) -> None:
    made, seen = host_bench
    case, sizes = cases.case(name), ((384, 256), (256, 256), (512, 256), (256, 512))
    assert made._chain(cases.Chain("model", sizes, 3), case, 2, True).calls == 3
    assert len({id(b) for _, b, *_ in seen}) == len(seen) == 12, "every layer has weights of its own"
    assert [(y.shape[1], a.shape[1], overlap) for a, _, _, y, overlap in seen] == [(n, k, True) for n, k in sizes] * 3
    assert all(0.5 < np.std(y.astype(np.float64)) < 2 for _, _, _, y, _ in seen), "values neither vanish nor overflow"
    for (_, _, _, y, _), (a, *_) in itertools.pairwise(seen):
        if case.activations is None:
            assert y.reshape(-1)[: a.size].tobytes() == a.tobytes()
        else:
            assert any(a is first for first, *_ in seen[:4])


def test_weights_of_a_chain_rotate(host_bench: Any) -> None:
    made, seen = host_bench
    for copies, wanted in ((3, [0, 1, 2, 0, 1]), (9, [0, 1, 2, 3, 4])):
        seen.clear()
        made._copies = lambda size, copies=copies: copies
        made._chain(cases.Chain("", ((128, 256),), 5), cases.case("bf16"), 1, False)
        order = list(dict.fromkeys(id(b) for _, b, *_ in seen))
        assert [order.index(id(b)) for _, b, *_ in seen] == wanted


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--shapes", "128x64", "--m", "1,8"], [(1, 128, 64), (8, 128, 64)]),
        (["--shapes", "128x64", "--m", "1,8", "--chain", "40"], [(cases.Chain("", ((128, 64),), 40), m) for m in (1, 8)]),
        (["--preset", "decode"], [(cases.DECODE, m) for m in (1, 8, 32)]),
        (["--preset", "decode", "--chain", "2"], [(cases.DECODE._replace(turns=2), m) for m in (1, 8, 32)]),
        (["--preset", "decode", "--shapes", "128x64", "--m", "3"], [(3, 128, 64)]),
        (["--preset", "batch_invariant"], ["invariant", *((m, n, k) for n, k in cases.DECODE.sizes for m in (1, 16, 64, 512))]),
        (["--preset", "batch_invariant", "--shapes", "128x64", "--m", "3"], ["invariant", (3, 128, 64)]),
    ],
)
def test_what_is_measured(arguments: list[str], wanted: list[Any]) -> None:
    machine = SimpleNamespace(
        rows=lambda shapes, *_: shapes, chain_rows=lambda chains, *_: chains, invariant_rows=lambda shapes, *_: ("invariant", *shapes)
    )  # fmt: skip
    total, shapes = cli._to_measure(cli._parser().parse_args(["bench", *arguments]), machine, 0.0)
    assert (total, list(shapes)) == (len(wanted) - ("invariant" in wanted), wanted)


def test_quantisers_stand_beside_a_copy(fake_bench: bench.Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(bench.Bench, "_quantiser", lambda *_: FakeGraph([40.0]))
    monkeypatch.setattr(bench.Bench, "_copy", lambda *_: FakeGraph([36.0]))
    (rows,) = fake_bench.quantiser_rows([(4096, 8192)], until=float("inf"))
    assert [row["format"] for row in rows] == [quantiser.format for quantiser in cases.QUANTISERS]
    size = 4096 * 8192 * 3 + 4096 * 4
    assert rows[1] == {
        "op": "quantize", "format": "fp8_row", "m": 4096, "n": 0, "k": 8192, "groups": 1, "kernel": "portable: tile",
        "us": 40.0, "floor_us": round(size / 3110e3, 2), "stream_us": 50.0, "baselines": {"copy": 36.0},
    }  # fmt: skip
    records.save(document(gpu_row(), *rows), tmp_path / "run.json")
    text = run(capsys, "bench", "--table", str(tmp_path / "run.json"))
    assert text.count("### ") == 2
    assert f"| 4096 x 8192 | fp8_row | 40.0 | {size / 40e3:.0f} | 36.0 | {size / 36e3:.0f} | 0.90 | {size / 3110e3:.1f} |" in text


def test_a_mixture_is_a_row(fake_bench: bench.Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(bench.Bench, "_layer", lambda *_: FakeGraph([400.0]))
    layer = cases.LAYERS[0]
    ((row,),) = fake_bench.layer_rows([(layer, 1)], ["fp8_block"], until=float("inf"))
    weights = layer.topk * 3 * layer.inner * layer.hidden
    assert row["floor_us"] == pytest.approx(weights * (1 + 4 / 128**2) / 3110e3, rel=0.01)
    assert {**row, "floor_us": 0.0} == {
        "op": "moe", "format": "fp8_block", "m": 1, "n": 768, "k": 2048, "groups": 128, "kernel": "portable: tile",
        "us": 400.0, "floor_us": 0.0, "stream_us": 50.0, "baselines": {}, "note": "Qwen3-30B-A3B, 8 of 128 experts, 8 in use",
    }  # fmt: skip
    records.save(document(row), tmp_path / "run.json")
    assert "| Qwen3-30B-A3B, 8 of 128 experts, 8 in use | 1 | fp8_block | 400.0 | 50.0 |" in run(
        capsys, "bench", "--table", str(tmp_path / "run.json")
    )


# demo


def test_errors_against_float64() -> None:
    right = np.array([[3.0, 4.0]])
    got = np.array([[3.0, 4.5]])
    assert demo.errors([got], [right]) == pytest.approx((0.5 / 5.0, 0.5 / np.sqrt(12.5)))
    assert demo.errors([right, got], [right, right]) == pytest.approx((0.5 / np.sqrt(50), 0.5 / np.sqrt(12.5)))
    assert np.isnan(demo.errors([np.array([[np.nan, 4.0]])], [right])).all()


def test_exact_is_float64_whatever_the_block(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = rng.standard_normal((3, 40)).astype(np.float32), rng.standard_normal((50, 40)).astype(np.float32)
    monkeypatch.setattr(demo, "_BLOCK", 7)
    assert demo.exact(x, w).dtype == np.float64
    np.testing.assert_allclose(demo.exact(x, w), np.einsum("mk,nk->mn", x.astype(np.float64), w.astype(np.float64)), rtol=1e-12, atol=1e-12)


def test_how_many_layers_are_run() -> None:
    def layers(n: int, k: int, count: int) -> demo.Group:
        return demo.Group("", n, k, (lambda: np.empty(0),) * count)

    assert demo.measured(layers(384, 384, 25), on_gpu=False) == demo.measured(layers(384, 384, 25), on_gpu=True) == 25
    assert demo.measured(layers(28672, 4096, 32), on_gpu=True) == 2
    for n, k in ((28672, 4096), (3, 1 << 25)):
        group = layers(n, k, 32)
        assert demo.rows(group, on_gpu=True) == n
        assert 1 <= demo.rows(group, on_gpu=False) < n
        assert demo.rows(group, on_gpu=False) * k * demo.measured(group, on_gpu=False) <= max(4 << 20, k)


@pytest.fixture
def small_model(tmp_path: Path, rng: np.random.Generator) -> Path:
    pytest.importorskip("safetensors")
    from safetensors.numpy import save_file

    tensors = {f"layers.{i}.up.weight": rng.standard_normal((200, 130), np.float32) for i in range(3)}
    tensors["layers.0.down.weight"] = rng.standard_normal((130, 200), np.float32)
    tensors["embed.weight"] = rng.standard_normal((130, 200), np.float32)
    save_file(tensors, str(tmp_path / "model.safetensors"))
    return tmp_path / "model.safetensors"


def test_demo_measures_what_it_says(small_model: Path) -> None:
    source = demo.from_checkpoint(small_model)
    assert source.title == f"4 linear layers of {small_model} (1 other tensors left as they are)"
    lines = list(demo.run(source, m=5))
    assert [(line.group, line.format) for line in lines] == [(g, f) for g in ("down", "up") for f in demo.FORMATS]
    by = {(line.group, line.format): line for line in lines}
    up = by["up", "fp8_row"]
    assert (up.layers, up.measured, up.n, up.k, up.nbytes, up.kernel) == (3, 3, 200, 130, 3 * (200 * 130 + 4 * 200), "reference")
    assert by["up", "bf16"].nbytes == 3 * 2 * 200 * 130
    assert by["up", "fp8_block"].nbytes == 3 * (200 * 130 + 4 * 2 * 2)
    for group in ("down", "up"):
        assert 0.001 < by[group, "bf16"].error < 0.004
        assert 0.02 < by[group, "w8a16_fp8"].error < by[group, "fp8_row"].error < 0.05
        assert all(line.error < line.worst < 1.0 for line in lines)
        assert by[group, "int8"].error < by[group, "w8a16_fp8"].error
        assert by[group, "fp8_row"].error < by[group, "nvfp4"].error < by[group, "mxfp4"].error < 0.25
        assert by[group, "w4a16_nvfp4"].error < by[group, "nvfp4"].error
        assert all(line.us is None and line.layer_us > 0 for line in lines)
    assert demo.summary(lines)[0].startswith(f"bf16: {(4 * 2 * 26000) / 1e6:.1f} MB, 1.00 of bf16, relative error ")
    assert demo.summary(lines)[2].startswith("fp8_row: 0.1 MB, 0.51 of bf16, relative error 3.")


@pytest.mark.usefixtures("no_gpu")
def test_demo_prints_a_table_on_a_machine_without_a_gpu(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "demo", "--checkpoint", str(small_model), "--formats", "bf16,fp8_block", "--m", "3").splitlines()
    assert lines[0] == "No GPU here: the NumPy reference computes these numbers; its times say nothing about a GPU."
    assert lines[1].endswith("; m = 3 rows of random activations.")
    assert lines[3].split() == [
        "layers",
        "count",
        "n",
        "x",
        "k",
        "format",
        "MB",
        "rel.",
        "error",
        "max",
        "error",
        "us",
        "us",
        "with",
        "x",
        "rate",
        "kernel",
    ]
    table = [line.split() for line in lines[4:8]]
    assert [(row[0], row[1], row[5], row[-1]) for row in table] == [
        ("down", "1", "bf16", "reference"), ("down", "1", "fp8_block", "reference"),
        ("up", "3", "bf16", "reference"), ("up", "3", "fp8_block", "reference"),
    ]  # fmt: skip
    assert lines[-2].startswith("  bf16: 0.2 MB, 1.00 of bf16, relative error ")
    assert lines[-1].startswith("  fp8_block: 0.1 MB, 0.50 of bf16, relative error ")


@pytest.mark.usefixtures("no_gpu")
def test_demo_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    assert "nothing does not exist" in run(capsys, "demo", "--checkpoint", str(tmp_path / "nothing"), code=2)
    assert "format is 'fp9'" in run(capsys, "demo", "--synthetic", "llama-1b", "--formats", "fp9", code=2)


def test_synthetic_models_are_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.SYNTHETIC, "tiny", (("up", 64, 32, 2), ("down", 32, 64, 2)))
    first, again = demo.synthetic("tiny"), demo.synthetic("tiny")
    weights = [load() for group in first.groups for load in group.weights]
    assert [w.tobytes() for w in weights] == [load().tobytes() for group in again.groups for load in group.weights]
    assert len({w.tobytes() for w in weights}) == 4
    assert {w.dtype.name for w in weights} == {"bfloat16"}
    with pytest.raises(ValueError, match="synthetic model is 'gpt'; wanted one of llama-1b, llama-8b"):
        demo.synthetic("gpt")


def test_without_the_example_package_the_demo_is_synthetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.checkpoints, "example", lambda: None)
    assert demo.default_source(on_gpu=False).title == "random weights in the shapes of llama-1b"
    assert demo.default_source(on_gpu=True).title == "random weights in the shapes of llama-8b"
