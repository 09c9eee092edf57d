"""What the documentation shows is run: README examples, its generated sections, the notebooks and their sources."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from conftest import ROOT

from cugemm import records

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL))
NOTEBOOKS = sorted(path.stem for path in (ROOT / "examples").glob("*_quickstart.py"))


def load(path: Path) -> ModuleType:
    """A script that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


LEAVE = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
"""At the end of a program: JAX's threads sometimes never end when the interpreter does, and it waits for them."""


def run(*command: str) -> str:
    """Output of Python with `command`, in a process that finds cugemm where this one does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "MPLBACKEND": "agg"}
    done = subprocess.run((sys.executable, *command), cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_has_an_example_for_each_framework() -> None:
    assert sorted(EXAMPLES) == ["cupy", "decode", "formats", "jax", "numpy", "torch"]


@pytest.mark.parametrize(
    "name",
    [
        "numpy",
        "formats",
        "decode",
        pytest.param("torch", marks=pytest.mark.requires("torch")),
        pytest.param("jax", marks=pytest.mark.requires("jax")),
        pytest.param("cupy", marks=pytest.mark.gpu),
    ],
)
def test_readme_example_runs(name: str) -> None:
    run("-c", EXAMPLES[name] + LEAVE)


def test_generated_sections_are_current() -> None:
    tables = load(ROOT / "docs" / "tables.py")
    for page in tables.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert tables.filled(text, page) == text, "run python docs/tables.py"


def test_what_batch_invariance_costs_has_a_table_once_it_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = load(ROOT / "docs" / "tables.py")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.batch_invariant() == "No recorded run yet."
    row = {
        "op": "batch_invariant", "format": "bf16", "m": 16, "n": 6144, "k": 4096, "groups": 1, "kernel": "skinny: 16 tokens", "us": 24.0,
        "floor_us": 16.0, "stream_us": 18.0, "baselines": {"cugemm": 20.0},
    }  # fmt: skip
    failed = {**row, "m": 1, "us": None, "baselines": {}, "note": "it failed"}
    (tmp_path / "docs" / "benchmarks").mkdir(parents=True)
    document = {**records.new_document(), "gpu": "H100", "rows": [row, failed]}
    records.save(document, tmp_path / "docs" / "benchmarks" / "bench_h100_batch_invariant.json")
    told, table = tables.batch_invariant().split("\n\n")
    assert told.startswith("H100, driver ")
    assert table.splitlines()[2:] == [
        "| 6144 x 4096 | 16 | bf16 | 20.0 | 24.0 | 1.20x | 18.0 | 16.0 | skinny: 16 tokens |",
        "| 6144 x 4096 | 1 | bf16 | - | - | - | 18.0 | 16.0 | skinny: 16 tokens |",
    ]
    assert tables.benchmarks() == "No recorded run yet.", "the README does not repeat it"


def test_chains_have_a_table_once_they_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = load(ROOT / "docs" / "tables.py")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setitem(tables.OTHER_ROWS, "chain", (8,))
    assert tables.benchmarks() == "No recorded run yet."
    row = {
        "op": "chain", "format": "bf16", "m": 8, "n": 28672, "k": 4096, "groups": 1, "kernel": "portable", "us": 100.0, "floor_us": 75.0,
        "stream_us": 80.0, "baselines": {"torch.bf16": 90.0}, "note": "chain of 64",
    }  # fmt: skip
    decode = {**row, "op": "decode", "m": 32, "n": 53248, "note": "a layer"}
    document = {**records.new_document(), "gpu": "H100", "rows": [row, decode, {**row, "m": 4096}]}
    (tmp_path / "docs" / "benchmarks").mkdir(parents=True)
    records.save(document, tmp_path / "docs" / "benchmarks" / "bench_chain.json")
    _, chains, layers = tables.benchmarks().split("\n\n")
    header = "| n x k | m | format | cugemm us | torch.bf16 us | stream us | floor us | rate | kernel | note |"
    assert chains.splitlines()[0] == layers.splitlines()[0] == header
    assert chains.splitlines()[2:] == [
        "| 28672 x 4096 | 8 | bf16 | 100.0 | 90.0 (0.90x) | 80.0 | 75.0 | 2354 GB/s | portable | chain of 64 |"
    ]
    assert layers.splitlines()[2].startswith("| 53248 x 4096 | 32 | bf16 | 100.0 |")


def test_the_picture_of_few_rows_is_current() -> None:
    assert load(ROOT / "docs" / "plots.py").main(["--check"]) == 0, "run python docs/plots.py"


def test_few_rows_have_a_picture_once_they_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = load(ROOT / "docs" / "plots.py")
    monkeypatch.setattr(plots, "ROOT", tmp_path)
    folder = tmp_path / "docs" / "benchmarks"
    folder.mkdir(parents=True)
    assert plots.main([]) == plots.main(["--check"]) == 0
    assert not list(folder.iterdir())
    row = {
        "op": "linear", "format": "bf16", "m": 1, "n": 512, "k": 256, "groups": 1, "kernel": "skinny", "us": 10.0, "floor_us": 1.0,
        "stream_us": 2.0, "baselines": {"torch.bf16": 20.0},
    }  # fmt: skip
    rows = [{**row, "m": m, "us": us, "n": n} for n in (512, 1024) for m, us in ((16, 100.0), (1, 10.0), (4, 20.0))]
    rows += [{**row, "format": "w4a16_nvfp4", "m": 4, "us": None, "note": "failed"}, {**row, "op": "chain", "n": 7}]
    records.save({**records.new_document(), "gpu": "H100 <1>", "rows": rows}, folder / "bench_h100_small_m.json")
    assert plots.main(["--check"]) == 1
    assert plots.main([]) == plots.main(["--check"]) == 0
    text = (folder / "small_m.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    name = "{http://www.w3.org/2000/svg}"
    told = [element.text for element in root.iter(f"{name}text")]
    assert {"512 x 256, us over m", "1024 x 256, us over m", "bf16", "torch.bf16"} <= set(told)
    assert "7 x 256, us over m" not in told and "w4a16_nvfp4" not in told
    assert told[-1] is not None and told[-1].startswith("H100 <1>")
    lines = [[tuple(map(float, point.split(","))) for point in line.get("points", "").split()] for line in root.iter(f"{name}polyline")]
    assert len(lines) == 4  # two panels, a baseline and a format each
    bottom, top, left, right = plots.HEIGHT - plots.BOTTOM, plots.TOP, plots.LEFT, plots.WIDTH - plots.RIGHT
    expected = [(left, bottom), (left + (right - left) / 2, bottom + (top - bottom) * math.log10(2)), (right, top)]
    assert lines[1] == [pytest.approx(point, abs=0.06) for point in expected], "10 to 100 us over 1 to 16 rows, both logarithmic"
    assert lines[3] == [(pytest.approx(x + plots.WIDTH, abs=0.06), y) for x, y in lines[1]]
    assert plots.ticks(3.0, 30.0) == [2, 5, 10, 20, 50]
    assert plots.ticks(7.0, 7.0) == [5, 10]


def test_functions_of_the_support_table_exist() -> None:
    import cugemm

    section = README.partition("<!-- support: begin -->")[2].partition("<!-- support: end -->")[0]
    names = set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE))
    assert names <= set(cugemm.__all__)
    assert {"linear", "matmul", "mm_fp8", "bmm_fp8", "mm_fp4", "SegmentGEMMWrapper"} <= names


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/decisions.md"])
def test_names_of_the_documentation_exist(page: str) -> None:
    """Every `cugemm.name` in prose is a public name or a module."""
    import cugemm

    text = (ROOT / page).read_text(encoding="utf-8")
    for name in set(re.findall(r"\bcugemm\.([a-z_]\w*(?:\.[a-z_]\w*)?|[A-Z]\w*)", text)):
        first = name.partition(".")[0]
        known = first in cugemm.__all__ or importlib.util.find_spec(f"cugemm.{name}") is not None
        assert known, f"{page} speaks of cugemm.{name}"


def test_there_are_three_notebooks() -> None:
    assert NOTEBOOKS == ["cupy_quickstart", "jax_quickstart", "pytorch_quickstart"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_matches_its_source(name: str) -> None:
    build = load(ROOT / "examples" / "build.py")
    content = json.loads((ROOT / "examples" / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert build.sources(content) == build.read(ROOT / "examples" / f"{name}.py"), "run python examples/build.py --execute"
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(output["output_type"] != "error" for cell in code for output in cell["outputs"])
    assert all(cell["execution_count"] for cell in code), "run python examples/build.py --execute"


@pytest.mark.parametrize(
    "name",
    [
        "cupy_quickstart",
        pytest.param("jax_quickstart", marks=pytest.mark.requires("jax")),
        pytest.param("pytorch_quickstart", marks=pytest.mark.requires("torch", "matplotlib")),
    ],
)
def test_notebook_source_runs(name: str) -> None:
    assert "error" in run(f"examples/{name}.py")


def test_cells_are_read_and_run(tmp_path: Path) -> None:
    build = load(ROOT / "examples" / "build.py")
    source = tmp_path / "x.py"
    source.write_text('"""Not a cell."""\n\n# %% [markdown]\n# # Title\n#\n# text\n\n# %%\na = 20\nprint("hello")\n\n\n# %%\na + 1\n')
    cells = build.read(source)
    assert cells == [("markdown", "# Title\n\ntext"), ("code", 'a = 20\nprint("hello")'), ("code", "a + 1")]
    content = build.notebook(cells)
    assert build.sources(content) == cells
    _, first, second = build._in_process(content)["cells"]
    assert first["outputs"] == [{"output_type": "stream", "name": "stdout", "text": ["hello\n"]}]
    assert second["outputs"][0]["data"] == {"text/plain": ["21"]} and second["execution_count"] == 2
