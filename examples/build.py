"""Notebooks from their sources: NAME.py in cells ("# %%" code, "# %% [markdown]" text) -> NAME.ipynb.

    python examples/build.py                    write the notebooks without outputs
    python examples/build.py --execute          run them first: in a Jupyter kernel where nbclient is installed, else in this process
    python examples/build.py --check            exit with 1 if a notebook's cells differ from its source
    python examples/build.py --output DIR ...   write to, or check in, another directory

Names of notebooks may follow; default: all. A cell that raises ends the run.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
_CELL = "# %%"
_TEXT = "# %% [markdown]"


class Cell(NamedTuple):
    kind: str  # "code" or "markdown"
    source: str


def read(path: Path) -> list[Cell]:
    """The cells of a source file. What stands before the first marker belongs to no cell."""
    cells: list[Cell] = []
    lines: list[str] | None = None
    kind = ""

    def end() -> None:
        if lines is not None:
            text = [line.removeprefix("#").removeprefix(" ") for line in lines] if kind == "markdown" else lines
            cells.append(Cell(kind, "\n".join(text).strip("\n")))

    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(_CELL):
            end()
            kind, lines = ("markdown" if line.startswith(_TEXT) else "code"), []
        elif lines is not None:
            lines.append(line)
    end()
    return cells


def notebook(cells: list[Cell]) -> dict[str, Any]:
    """Notebook format 4.5, no outputs."""
    made: list[dict[str, Any]] = []
    for number, cell in enumerate(cells):
        entry = {"cell_type": cell.kind, "id": f"cell-{number}", "metadata": {}, "source": cell.source.splitlines(keepends=True)}
        made.append(entry | ({"execution_count": None, "outputs": []} if cell.kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}


def sources(content: dict[str, Any]) -> list[Cell]:
    """The cells of a notebook."""
    return [Cell(cell["cell_type"], "".join(cell["source"])) for cell in content["cells"]]


def execute(content: dict[str, Any]) -> dict[str, Any]:
    """The notebook with its outputs."""
    if all(importlib.util.find_spec(name) for name in ("nbclient", "nbformat", "ipykernel")):
        return _in_kernel(content)
    return _in_process(content)


def _in_kernel(content: dict[str, Any]) -> dict[str, Any]:
    import nbclient
    import nbformat

    node = nbformat.reads(json.dumps(content), as_version=4)
    nbclient.NotebookClient(
        node, timeout=600, kernel_name="python3", coalesce_streams=True, resources={"metadata": {"path": str(HERE)}}
    ).execute()
    executed: dict[str, Any] = json.loads(nbformat.writes(node))
    executed["metadata"] = content["metadata"]  # not the Python version of whoever ran it
    for cell in executed["cells"]:
        cell["metadata"] = {}  # nor the time of day
        if cell["cell_type"] == "code":  # nor warnings with paths
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    return executed


def _in_process(content: dict[str, Any]) -> dict[str, Any]:
    space: dict[str, Any] = {"__name__": "__main__"}
    if importlib.util.find_spec("matplotlib"):
        import matplotlib

        matplotlib.use("Agg")
    count = 0
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell["execution_count"], cell["outputs"] = count, _run("".join(cell["source"]), space, count)
    return content


def _run(source: str, space: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The outputs of one cell: what it prints, the figures it leaves open, the value of a last expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {count}", "exec"), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), space)  # type: ignore[attr-defined]
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)})
    for image in _figures():
        data = {"image/png": base64.b64encode(image).decode() + "\n", "text/plain": ["<Figure>"]}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        outputs.append({"output_type": "execute_result", "data": data, "metadata": {}, "execution_count": count})
    return outputs


def _figures() -> Iterator[bytes]:
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return
    for number in pyplot.get_fignums():
        image = io.BytesIO()
        pyplot.figure(number).savefig(image, format="png", bbox_inches="tight")
        yield image.getvalue()
    pyplot.close("all")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks without suffix; default: all")
    parser.add_argument("--execute", action="store_true", help="run the cells and keep their outputs")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--output", type=Path, default=HERE, metavar="DIR", help="where the notebooks are, default beside their sources")
    options = parser.parse_args()
    found = sorted(path.stem for path in HERE.glob("*_quickstart.py"))
    if unknown := sorted(set(options.names) - set(found)):
        parser.error(f"no source for {', '.join(unknown)}; there are {', '.join(found)}")
    stale = []
    for name in options.names or found:
        target = options.output / f"{name}.ipynb"
        content = notebook(read(HERE / f"{name}.py"))
        if options.check:
            if not target.exists() or sources(json.loads(target.read_text(encoding="utf-8"))) != sources(content):
                stale.append(str(target))
            continue
        if options.execute:
            print(f"{name} ...", flush=True)
            content = execute(content)
        options.output.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(target)
    if stale:
        print(f"differ from their sources: {', '.join(stale)}; run python examples/build.py --execute", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
