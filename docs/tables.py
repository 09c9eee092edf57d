"""The generated parts of README.md, what the kernels accept and recorded times; of docs/numerics.md what batch_invariant costs; and of
docs/kernels/hopper.md its times.

python docs/tables.py            rewrite them
python docs/tables.py --check    exit with 1 if they differ from what would be written
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import cugemm
from cugemm import arch, info, records
from cugemm.formats import ALL, ELEMENTS, FORMATS, FP32
from cugemm.problem import OPS, GemmOp
from cugemm.records import Row

ROOT = Path(__file__).resolve().parent.parent
SHAPES = (*((m, n, k) for n, k in ((7168, 2048), (28672, 4096)) for m in (1, 8, 16, 128)), (4096, 4096, 4096), (8192, 8192, 8192))
"""(m, n, k) of the recorded products that the README shows; docs/benchmarks has all."""
OTHER_ROWS = {"chain": (1,), "decode": (1, 8, 32), "quantize": (4096,), "moe": (16, 1024)}
"""m of the other operations' rows that it shows."""


def support() -> str:
    """The kernel for every pair of formats, once per group of architectures that agree; the formats; what each function takes."""
    answers: dict[str, list[str]] = {}
    for target in arch.ARCHS.values():
        if not target.is_ptx:
            answers.setdefault(_table(info.support(target)), []).append(target.name)
    parts = [f"The kernel for a x b on {', '.join(names)}:\n\n{answer}" for answer, names in answers.items()]
    return "\n\n".join([*parts, f"The formats:\n\n{_formats()}", f"What each product takes, by element:\n\n{_functions()}"])


def _table(found: info.Support) -> str:
    header, *rows = found.rows
    return "\n\n".join([records.markdown(header, rows), *(f"-: {note}" for note in found.notes)])


def _formats() -> str:
    rows = [
        (
            fmt.name, fmt.element.name, _block(fmt.block), "float32" if fmt.scale is FP32 else f"{fmt.scale.name} byte",
            "-" if fmt.tensor is None else f"float32 for {_block(fmt.tensor)}", "uint8" if fmt.zero else "-",
        )
        for fmt in FORMATS.values()
    ]  # fmt: skip
    return records.markdown(("format", "element", "values per scale (rows x k)", "scale", "second scale", "zero point"), rows)


def _block(block: tuple[int, int]) -> str:
    return " x ".join("all" if n == ALL else str(n) for n in block)


def _functions() -> str:
    """Public products. An operation may be registered several times, `name(how)` or `Class.method`, for several ways to call it."""
    found: dict[str, list[GemmOp]] = {}
    for op in OPS.values():
        name = re.split(r"[.(]", op.name)[0]
        if isinstance(op, GemmOp) and name in cugemm.__all__:
            found.setdefault(name, []).append(op)
    rows = []
    for name, ops in sorted(found.items(), key=lambda item: item[0].lower()):
        own = [op for op in ops if op.name == name] or ops  # of a call in steps, the one that gives the result
        a, b = (_elements({e for op in own for e in elements(op)}) for elements in (lambda op: op.a_elements, lambda op: op.b_elements))
        rows.append((f"`{name}`", a, b))
    return records.markdown(("function", "a", "b"), rows)


def _elements(names: set[str]) -> str:
    return " ".join(name for name in ELEMENTS if name in names)


def benchmarks() -> str:
    """Rows of SHAPES from every recorded document, one table per document; behind it those of other operations."""
    documents = [records.load(path) for path in sorted((ROOT / "docs" / "benchmarks").glob("bench_*.json"))]
    parts = []
    for document in documents:
        rows = [row for row in document["rows"] if row.get("us")]
        products = [row for row in rows if row["op"] not in records.OTHERS and (row["m"], row["n"], row["k"]) in SHAPES]
        tables = []
        if products:
            header = ("format", "m", "n x k", "us", "stream us", "floor us", "peers, us")
            tables.append(records.markdown(header, _times(sorted(products, key=lambda row: (row["n"], row["k"], row["m"])))))
        for op, table in records.OTHERS.items():
            own = [row for row in rows if row["op"] == op and row["m"] in OTHER_ROWS.get(op, ())]
            if own:
                tables.append(table(own))
        if tables:
            parts += [_told(document), *tables]
    return "\n\n".join(parts) or "No recorded run yet."


def _told(document: records.Document) -> str:
    return f"{document['gpu']}, driver {document['driver']}, {document['date']}, commit {document['commit']}:"


def batch_invariant() -> str:
    path = ROOT / "docs" / "benchmarks" / "bench_h100_batch_invariant.json"
    if not path.exists():
        return "No recorded run yet."
    document = records.load(path)
    return f"{_told(document)}\n\n{records.invariant_table(document['rows'])}"


def _times(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        peers = ", ".join(f"{name} {us:.1f}" for name, us in row["baselines"].items())
        stream = "-" if row["stream_us"] is None else f"{row['stream_us']:.1f}"
        yield row["format"], str(row["m"]), f"{row['n']} x {row['k']}", f"{row['us']:.1f}", stream, f"{row['floor_us']:.1f}", peers


def hopper() -> str:
    """Times of torch, and of other kernels, over that of the fastest configuration: geometric mean over weights, and the least of them."""
    document = json.loads((ROOT / "docs" / "benchmarks" / "hopper_configs.json").read_text())
    gain: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for name, m, _, _, torch_us, rival_us, times in document["rows"]:
        for peer, us in (("torch", torch_us), ("others", rival_us)):
            if us is not None:
                gain[name, peer, m].append(us / min(us for _, us in times))
    columns = list(dict.fromkeys((name, peer) for name, peer, _ in sorted(gain, key=lambda key: (key[0], key[1] == "others"))))

    def cell(*key: object) -> str:
        found = gain.get(key)  # type: ignore[call-overload]
        return f"{statistics.geometric_mean(found):.2f} ({min(found):.2f})" if found else "-"

    rows = [(str(m), *(cell(*column, m) for column in columns)) for m in sorted({m for *_, m in gain})]
    return f"{_told(document)}\n\n{records.markdown(('m', *(f'{name} / {peer}' for name, peer in columns)), rows)}"


LADDER = {
    "first on a GPU": "as it was", "results by TMA, scales by producers": "as it was", "descriptors in uniform registers": "as it was",
    "warpgroups apart": "apart 128x160, b shared",
}  # fmt: skip
"""Of each run the variant to show."""
RUNGS = (("bf16", 4096, 7168, 2048), ("fp8_tensor", 4096, 7168, 2048), ("fp8_tensor", 8192, 8192, 8192))


def ladder() -> str:
    """us and torch's us in the same run, of the first tile in each run, at every step of hopper.cu."""
    document = json.loads((ROOT / "docs" / "benchmarks" / "hopper_ladder.json").read_text())
    runs = {run["what"]: run["rows"] for run in document["runs"]}

    def cell(what: str, variant: str, product: tuple[object, ...]) -> str:
        us = next(times for *found, _, times in runs[what] if tuple(found) == product)
        torch_us = next(value for name, value in us.items() if name.startswith("torch"))
        return f"{us[variant]:.1f}, torch {torch_us:.1f}: {torch_us / us[variant]:.2f}"

    header = ("step", *(f"{name} {m} x {n} x {k}" for name, m, n, k in RUNGS))
    return records.markdown(header, [(what, *(cell(what, variant, product) for product in RUNGS)) for what, variant in LADDER.items()])


PAGES = {
    "README.md": {"support": support, "hopper": hopper, "benchmarks": benchmarks},
    "docs/numerics.md": {"batch_invariant": batch_invariant},
    "docs/kernels/hopper.md": {"hopper": hopper, "ladder": ladder},
}


def filled(text: str, page: str = "README.md") -> str:
    """`text` with every section between its marker comments generated anew."""
    for name, generate in PAGES[page].items():
        between = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
        section = f"\n{generate()}\n\n"
        text, count = between.subn(lambda match, section=section: match[1] + section + match[2], text)
        if count != 1:
            raise ValueError(f"{page} has {count} sections <!-- {name}: begin --> ... <!-- {name}: end -->; wanted 1.")
    return text


def main() -> int:
    differ = 0
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        new = filled(text, page)
        if "--check" not in sys.argv[1:]:
            (ROOT / page).write_text(new, encoding="utf-8")
        elif new != text:
            print(f"{page} differs from what is generated; run python docs/tables.py", file=sys.stderr)
            differ = 1
    return differ


if __name__ == "__main__":
    sys.exit(main())
