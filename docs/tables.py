"""The generated parts of README.md: what the kernels accept, and recorded times.

python docs/tables.py            rewrite them
python docs/tables.py --check    exit with 1 if they differ from what would be written
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from cugemm import arch, info, records
from cugemm.api import dense, grouped, tgv  # noqa: F401 - they register their operations
from cugemm.formats import ELEMENTS
from cugemm.problem import OPS, GemmOp
from cugemm.records import Row

ROOT = Path(__file__).resolve().parent.parent
SHAPES = (*((m, n, k) for n, k in ((7168, 2048), (28672, 4096)) for m in (1, 8, 16, 128)), (4096, 4096, 4096), (8192, 8192, 8192))
"""(m, n, k) of the recorded rows that the README shows; docs/benchmarks has all."""


def support() -> str:
    """The kernel for every pair of elements, once per group of architectures that agree, and what each function takes."""
    answers: dict[str, list[str]] = {}
    for target in arch.ARCHS.values():
        if not target.is_ptx:
            answers.setdefault(_pairs(*info.support(target)), []).append(target.name)
    parts = [f"{', '.join(names)}:\n{answer}" for answer, names in answers.items()]
    return "\n\n".join([*parts, f"What each function takes (e2m1: one fp4 code a byte, e2m1x2: two):\n\n{_functions()}"])


def _pairs(header: tuple[str, ...], *rows: tuple[str, ...]) -> str:
    """A table, or a sentence where one kernel takes all."""
    kernels = {cell for row in rows for cell in row[1:]}
    if len(kernels) == 1:
        return f"`{kernels.pop()}` multiplies every pair of {', '.join(header[1:])}."
    return f"the kernel for a x b:\n\n{records.markdown(header, rows)}"


def _functions() -> str:
    rows = [
        (f"`{op.name}`", _dtypes(op.a_elements), _dtypes(op.b_elements), " or ".join(f"{rank}-D" for rank in op.ranks))
        for op in sorted(OPS.values(), key=lambda op: op.name)
        if isinstance(op, GemmOp) and not op.name.startswith("SegmentGEMMWrapper")
    ]
    op = OPS["SegmentGEMMWrapper.run"]
    rows.append(("`SegmentGEMMWrapper`", _dtypes(op.a_elements), _dtypes(op.b_elements), "2-D, weights 3-D"))
    return records.markdown(("function", "a", "b", "axes"), rows)


def _dtypes(elements: tuple[str, ...]) -> str:
    return " ".join(name for name in ELEMENTS if name in elements)


def benchmarks() -> str:
    """Rows of SHAPES from every recorded document, one table per document."""
    documents = [records.load(path) for path in sorted((ROOT / "docs" / "benchmarks").glob("bench_*.json"))]
    parts = []
    for document in documents:
        rows = [row for row in document["rows"] if row.get("us") and (row["m"], row["n"], row["k"]) in SHAPES]
        if rows:
            header = ("format", "m", "n x k", "us", "stream us", "floor us", "peers, us")
            table = records.markdown(header, _times(sorted(rows, key=lambda row: (row["n"], row["k"], row["m"]))))
            parts.append(f"{document['gpu']}, driver {document['driver']}, {document['date']}, commit {document['commit']}:\n\n{table}")
    return "\n\n".join(parts) or "No recorded run yet."


def _times(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        peers = ", ".join(f"{name} {us:.1f}" for name, us in row["baselines"].items())
        stream = "-" if row["stream_us"] is None else f"{row['stream_us']:.1f}"
        yield row["format"], str(row["m"]), f"{row['n']} x {row['k']}", f"{row['us']:.1f}", stream, f"{row['floor_us']:.1f}", peers


SECTIONS = {"support": support, "benchmarks": benchmarks}


def filled(text: str) -> str:
    """`text` with every section between its marker comments generated anew."""
    for name, generate in SECTIONS.items():
        between = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
        section = f"\n{generate()}\n\n"
        text, count = between.subn(lambda match, section=section: match[1] + section + match[2], text)
        if count != 1:
            raise ValueError(f"README.md has {count} sections <!-- {name}: begin --> ... <!-- {name}: end -->; wanted 1.")
    return text


def main() -> int:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = filled(text)
    if "--check" in sys.argv[1:]:
        if new != text:
            print("README.md differs from what is generated; run python docs/tables.py", file=sys.stderr)
        return int(new != text)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
