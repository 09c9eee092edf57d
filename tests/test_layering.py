"""Imports go one way, frameworks are named in few rooms, and what the README says exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

ROOMS = (
    {"errors", "formats", "scale_layout", "dlpack", "driver", "arch"},
    {"arrays", "scales", "quantized"},
    {"problem", "conversion", "rowwise"},
    {"catalog", "reference", "quantize_reference", "rows_reference"},
    {"host", "host_product", "select", "intake", "values"},
    {"compile", "tensormap", "packed", "launch"},
    {"plan"},
    {"api"},
    {"", "gemm", "adapters", "layers", "checkpoints", "tune"}
    | {"cases", "calls", "measure", "records", "bench", "bench_host", "demo", "info", "__main__"},
)
"""Rooms of the package, leaves first: a module imports from its own row and the rows above it. "" is cugemm/__init__.py."""
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
UPWARD = {("arrays", "adapters"), ("launch", "adapters")}
"""Allowed inside functions: the adapter of a framework is imported when its first array arrives."""
FRAMEWORKS = {"torch", "jax", "jaxlib"}
MEASURE_FRAMEWORKS = {"bench", "bench_host", "cases", "measure"}
"""They run torch beside us."""
NAME_FRAMEWORKS = {"arrays", "adapters", "info"} | MEASURE_FRAMEWORKS


class Import(NamedTuple):
    target: str  # dotted, absolute
    lazy: bool  # inside a function
    line: int


def modules() -> dict[str, Path]:
    """Dotted name below cugemm ("" for the package itself) -> file."""
    found = {}
    for path in sorted((ROOT / "cugemm").rglob("*.py")):
        parts = path.relative_to(ROOT / "cugemm").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path) -> Iterator[Import]:
    package = ["cugemm", *module.split(".")] if module else ["cugemm"]
    if path.name != "__init__.py":
        package = package[:-1]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, lazy, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                source = ".".join([*base, *([child.module] if child.module else [])])
                yield from (Import(f"{source}.{alias.name}", lazy, child.lineno) for alias in child.names)
            elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
                yield from visit(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from visit(ast.parse(path.read_text()), False)


def room(dotted: str) -> str:
    return dotted.partition(".")[0]


def inside(target: str, known: dict[str, Path]) -> str | None:
    """The module of the package that an import of `target` loads, None for other packages."""
    if room(target) != "cugemm":
        return None
    name = target.partition(".")[2]
    return name if name in known else name.rpartition(".")[0]


def test_every_module_has_a_room() -> None:
    assert sorted({room(name) for name in modules()} - set(RANK)) == []


def test_imports_go_one_way() -> None:
    known, wrong = modules(), []
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for found in imports(name, path):
            target = inside(found.target, known)
            if target is None:
                continue
            edge = (room(name), room(target))
            if RANK[edge[1]] > RANK[edge[0]] and not (found.lazy and edge in UPWARD):
                wrong.append(f"{path.name}:{found.line} ({edge[0]}) imports cugemm.{target}")
            if not found.lazy and target and target != name:
                graph[name].add(target)
    assert wrong == []
    for package in ("catalog", "adapters", "api"):  # a package's own __init__ and its modules see each other
        for name, targets in graph.items():
            if room(name) == package:
                targets.discard(package)
    list(TopologicalSorter(graph).static_order())  # CycleError names the cycle


def test_only_arrays_and_adapters_name_frameworks() -> None:
    wrong = []
    for name, path in modules().items():
        if room(name) in NAME_FRAMEWORKS:
            continue
        wrong += [f"{path.name}:{i.line} imports {i.target}" for i in imports(name, path) if room(i.target) in FRAMEWORKS]
        for node in ast.walk(ast.parse(path.read_text())):
            if (isinstance(node, ast.Name) and node.id in FRAMEWORKS) or (isinstance(node, ast.Constant) and node.value in FRAMEWORKS):
                wrong.append(f"{path.name}:{node.lineno} names {ast.unparse(node)}")
    assert wrong == []


def test_frameworks_are_imported_in_adapters_alone() -> None:
    wrong = [
        f"{path.name}:{i.line} imports {i.target}"
        for name, path in modules().items()
        if room(name) not in {"adapters"} | MEASURE_FRAMEWORKS
        for i in imports(name, path)
        if room(i.target) in FRAMEWORKS
    ]
    assert wrong == []


def test_cupy_is_imported_inside_functions_only() -> None:
    wrong = [
        f"{path.name}:{i.line}" for name, path in modules().items() for i in imports(name, path) if room(i.target) == "cupy" and not i.lazy
    ]
    assert wrong == []


def test_import_loads_no_framework() -> None:
    code = "import sys, cugemm; print(sorted({'torch', 'jax', 'jaxlib', 'cupy', 'tvm_ffi'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_public_names_are_all_and_sorted() -> None:
    import cugemm

    assert list(cugemm.__all__) == sorted(cugemm.__all__)
    public = {name for name, value in vars(cugemm).items() if not name.startswith("_") and not _is_submodule(value)}
    assert public == {name for name in cugemm.__all__ if not _is_submodule(getattr(cugemm, name))}


def _is_submodule(value: object) -> bool:
    return type(value).__name__ == "module" and str(getattr(value, "__name__", "")).startswith("cugemm.")


# README

_LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"^\.{0,2}/?[\w.-]+(?:/[\w.-]+)*(?:/|\.(?:py|md|cu|cuh|json|ipynb|toml|txt|svg|png))$")
_COMMAND = re.compile(r"python3? -m cugemm ([a-z][\w-]*)")


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_every_path_in_the_readme_exists(readme: str) -> None:
    prose = re.sub(r"^```.*?^```", "", readme, flags=re.MULTILINE | re.DOTALL)
    paths = set(_LINK.findall(readme)) | {code for code in _CODE.findall(prose) if _PATH.match(code)}
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


def test_every_command_in_the_readme_exists(readme: str) -> None:
    commands = set(_COMMAND.findall(readme))
    assert "demo" in commands
    for command in sorted(commands):
        done = subprocess.run([sys.executable, "-m", "cugemm", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"python -m cugemm {command}: {done.stderr}"


def test_the_readme_marks_its_two_commands(readme: str) -> None:
    blocks = dict(re.findall(r"<!-- command: (\w+) -->\s*```\w*\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL))
    assert sorted(blocks) == ["run", "test"]
    assert "-m cugemm demo" in blocks["run"]
    assert "-m pytest" in blocks["test"]
