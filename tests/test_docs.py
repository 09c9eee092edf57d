"""What the pages of docs/ say of names, formats and measurements is so."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_readme import load

import cugemm
from cugemm.formats import FORMATS

GUIDE, FLASHINFER, NUMERICS = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("guide.md", "flashinfer.md", "numerics.md"))

OURS = {
    "CaptureError", "CompileError", "CudaError", "HostWarning", "NoKernelError", "Plan", "Quantized", "QuantizedLinear", "Spec", "combine",
    "dequantize", "explain", "fp8_gemm_nt", "gemm", "grouped_matmul", "linear", "matmul", "plan", "quantize", "silu_and_mul", "tgv_gemm",
    "warmup",
}  # fmt: skip
"""Names of `cugemm` that are not FlashInfer's."""


@pytest.fixture(scope="module")
def numerics() -> Any:
    return load(ROOT / "docs" / "numerics.py")


def entries() -> dict[str, str]:
    """name -> "same", "better" or "not yet", of every row of the page."""
    found: dict[str, str] = {}
    for line in FLASHINFER.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        state = next((cell for cell in cells[1:3] if cell in ("same", "better", "not yet")), None)
        if state:
            for name in re.findall(r"`(\w+)`", cells[0]):
                assert name not in found, f"{name} has two rows"
                found[name] = state
    return found


def test_every_flashinfer_name_has_a_row() -> None:
    rows = entries()
    assert set(cugemm.__all__) >= OURS
    missing = (set(cugemm.__all__) | set(cugemm.gemm.__all__)) - OURS - set(rows)
    assert not missing, f"docs/flashinfer.md has no row for {sorted(missing)}"


@pytest.mark.parametrize(("name", "state"), entries().items())
def test_a_row_says_what_is_there(name: str, state: str) -> None:
    assert (hasattr(cugemm, name) and name in cugemm.__all__ and name not in OURS) == (state != "not yet")


def test_links_between_pages_lead_somewhere() -> None:
    kernels = ("docs/kernels/skinny.md", "docs/kernels/swap_ab.md", "kernels/README.md")
    pages = ("docs/guide.md", "docs/flashinfer.md", "docs/numerics.md", "docs/decisions.md", *kernels)
    for name in pages:
        page = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)]+)\)", page):
            path, _, anchor = target.partition("#")
            text = ((ROOT / name).parent / path).read_text(encoding="utf-8") if path else page
            titles = {
                re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            }
            assert not anchor or anchor in titles, target


@pytest.mark.parametrize("page", ["guide", "numerics"])
def test_every_format_is_documented(page: str) -> None:
    """By its name, or by the part before `_*`."""
    text = {"guide": GUIDE, "numerics": NUMERICS}[page]
    named = set(re.findall(r"`(\w+)`", text))
    families = set(re.findall(r"`(\w+_)\*`", text))
    missing = [name for name in FORMATS if name not in named and not any(name.startswith(family) for family in families)]
    assert not missing


def test_guide_examples_run() -> None:
    """The indented blocks that begin with `# runs`, on host arrays."""
    blocks = re.findall(r"(?:^    .*\n|^\n)+", GUIDE, re.MULTILINE)
    runs = [block for block in blocks if block.strip().startswith("# runs")]
    assert runs
    for block in runs:
        exec(compile("\n".join(line[4:] for line in block.splitlines()), "guide.md", "exec"), {})


def test_numerics_page_is_current(numerics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert numerics.main(["--check"]) == 0
    monkeypatch.setattr(numerics, "filled", lambda text, document: text + "x")
    assert numerics.main(["--check"]) == 1


def test_recorded_numerics_hold(numerics: Any) -> None:
    """No sum beyond the bound of the tests, no error that is no number, every format and pair in every kind of data."""
    document = numerics.recorded()
    assert {(row["format"], row["data"]) for row in document["quantisation"]} == {
        (name, data) for name in (*numerics.FLOATS.values(), *FORMATS) for data in numerics.DATA
    }
    pairs = [tuple(numerics.FLOATS.get(name, name) for name in pair) for pair in numerics.PAIRS]
    rows = document["products"]
    for data in numerics.DATA:
        for k in {row["k"] for row in rows}:
            assert {(row["x"], row["w"]) for row in rows if (row["data"], row["k"]) == (data, k)} == set(pairs)
    for row in (*document["quantisation"], *rows):
        assert all(math.isfinite(value) for value in row.values() if not isinstance(value, str))
    for row in rows:
        assert row.get("sum_units", 0) <= 3.125 * row["k"] + 25
        assert row["sum_rms"] < (1e-3 if row["out"] == "float32" else 2.0**-8 + 1e-3)  # positive sums are off by k truncations


def test_measuring(numerics: Any, tmp_path: Path) -> None:
    """A small run on host arrays: the reference rounds once, so sums are right to half a step of float32."""
    document = numerics.measured(16, 8, (160,), "host")
    numerics.save(document, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == document
    assert document["gpu"] == "" and document["arrays"] == "NumPy"
    for row in document["products"]:
        assert row["sum_rms"] <= (2.0**-24 if row["out"] == "float32" else 2.0**-8)
        assert row["all_rms"] < 0.4
    assert numerics.filled(NUMERICS, document) != NUMERICS


def test_real_values_are_exact(numerics: Any) -> None:
    """What products are compared with: float64, and only its rounding to float32 is what `dequantize` gives."""
    x = numerics.draw("heavy", 130, 160, 3)
    for name in FORMATS:
        q, values = numerics.operand(x, name, "host")
        back = cugemm.dequantize(q, "float32")
        assert values.dtype == "float64"
        assert (abs(values - back) <= abs(values) * 2.0**-22).all(), name
