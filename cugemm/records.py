"""Recorded benchmark runs: JSON documents of one schema, held by `validate`, and the Markdown tables made from them."""

from __future__ import annotations

import datetime
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cugemm import cases, compile, driver, info, launch
from cugemm.cases import Case
from cugemm.errors import NoKernelError
from cugemm.formats import FORMATS

Row = dict[str, Any]
Document = dict[str, Any]

_DOCUMENT = {"gpu": str, "driver": str, "cuda": str, "versions": dict, "commit": str, "date": str, "read_gbs": float, "rows": list}
_PRODUCT = {"op": str, "format": str, "m": int, "n": int, "k": int, "groups": int, "kernel": str}
_GPU = {**_PRODUCT, "us": float, "floor_us": float, "stream_us": float, "baselines": dict}
_HOST = {**_PRODUCT, "host_us": float, "host_baselines": dict}
_RIDGE = 250
"""Flops per byte from which a row shows TFLOP/s: about where the tensor cores of an H100, and not its memory, set the floor."""
_MISSING = {"us", "stream_us", "host_us"}
"""Null where they could not be measured; the note of the row says why."""


def new_document(read_gbs: float = 0.0) -> Document:
    """A document about this machine, without rows."""
    cuda = ".".join(map(str, driver.version())) if driver.available() else ""
    target, device = launch.machine(0) if driver.available() else (None, None)
    return {
        "gpu": f"{device.name} ({device.sm_count} SM, {target.name})" if device and target else "",
        "driver": _driver_version(),
        "cuda": cuda,
        "versions": versions(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "read_gbs": round(read_gbs, 1),
        "rows": [],
    }


def versions() -> dict[str, str]:
    """Versions of what has a say in a number. Nothing is imported for it."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), **info.installed()}
    nvrtc = compile.nvrtc_version()
    return found if nvrtc is None else {**found, "nvrtc": ".".join(map(str, nvrtc))}


def _driver_version() -> str:
    """The kernel driver's own version ("580.65.06"), which CUDA does not tell; empty where the system does not either."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return ""
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), "")


def _commit() -> str:
    """The commit of the checkout that this package runs from, with + where it has been changed; empty outside of one."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ("git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"), cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def validate(document: Mapping[str, Any]) -> list[str]:
    """What is wrong with a document, in words; empty if nothing is."""
    wrong = _mismatches("document", document, _DOCUMENT, ())
    for i, row in enumerate(document.get("rows", ())):
        wrong += _mismatches(f"rows[{i}]", row, _HOST if "host_us" in row else _GPU, ("note",))
        for name in ("baselines", "host_baselines"):
            bad = [key for key, us in row.get(name, {}).items() if not isinstance(us, (int, float)) or not math.isfinite(us)]
            wrong += [f"rows[{i}].{name}[{key!r}] is not a number" for key in bad]
        if "note" not in row and any(row.get(name, 0.0) is None for name in _MISSING):
            wrong.append(f"rows[{i}] was not measured and has no note that says why")
    return wrong


def _mismatches(where: str, got: Mapping[str, Any], wanted: Mapping[str, type], optional: Sequence[str]) -> list[str]:
    wrong = [f"{where} lacks {name}" for name in wanted if name not in got]
    wrong += [f"{where} has {name}, which is not in the schema" for name in got if name not in wanted and name not in optional]
    for name, kind in wanted.items():
        value = got.get(name)
        if name not in got or (value is None and name in _MISSING):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            wrong.append(f"{where}.{name} is {value!r}; wanted {kind.__name__}")
    return wrong


def save(document: Document, path: Path) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n")
    wrong = validate(document)
    assert not wrong, wrong


def load(path: Path) -> Document:
    """A recorded document; ValueError with what is wrong with it."""
    document: Document = json.loads(path.read_text())
    wrong = validate(document)
    if wrong:
        raise ValueError(f"{path} is not a benchmark document: {'; '.join(wrong[:5])}.")
    return document


# Rows


def product(case: Case, m: int, n: int, k: int) -> Row:
    return named(case.op, case.format, (m, n, k), 1, functools.partial(cases.record, case, m, n, k, 0))


def named(op: str, name: str, shape: tuple[int, int, int], groups: int, record: Callable[[], list[launch.Recorded]]) -> Row:
    """The part of a row that says what was measured; the kernel is that of the last recorded call."""
    try:
        kernel = ": ".join(cases.chosen(record()[-1]))
    except NoKernelError:
        kernel = "none"
    m, n, k = shape
    return {"op": op, "format": name, "m": m, "n": n, "k": k, "groups": groups, "kernel": kernel}


def row(product: Row, note: str = "", **measured: Any) -> Row:
    """What was measured, and times: to a hundredth of a microsecond, peers only where there is a time."""
    return {**product, **{name: _rounded(value) for name, value in measured.items()}, **({"note": note} if note else {})}


def _rounded(time: Any) -> Any:
    if isinstance(time, Mapping):
        return {name: _rounded(us) for name, us in time.items() if us is not None}
    return None if time is None else round(float(time), 2)


def reason(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"


# Tables


def table(documents: Iterable[Document]) -> str:
    """Markdown of recorded documents: per document a line on the machine, a table for each format and other operation, host times."""
    return "\n\n".join("\n\n".join(_tables(document)) for document in documents)


def _tables(document: Document) -> Iterator[str]:
    parts = [document["gpu"], f"driver {document['driver']}", f"CUDA {document['cuda']}", f"read bandwidth {document['read_gbs']:.0f} GB/s"]
    parts += [f"{name} {version}" for name, version in document["versions"].items()]
    yield f"{document['date']}, commit {document['commit'] or 'unknown'}: {', '.join(parts)}."
    gpu = [row for row in document["rows"] if "us" in row]
    products = [row for row in gpu if row["op"] not in OTHERS]
    for name in dict.fromkeys(row["format"] for row in products):
        yield f"### {name}\n\n{product_table([row for row in products if row['format'] == name])}"
    for op, table in OTHERS.items():
        rows = [row for row in gpu if row["op"] == op]
        if rows:
            yield f"### {op}\n\n{table(rows)}"
    host = [row for row in document["rows"] if "host_us" in row]
    if host:
        yield _host_table(host)


def product_table(rows: Sequence[Row], formats: bool = False) -> str:
    """Products beside their peers; formats: with a column for it."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row["baselines"]))
    header = (
        "n x k", "m", *["format"] * formats, "cugemm us", *(f"{peer} us" for peer in peers), "stream us", "floor us", "rate", "kernel",
        "note",
    )  # fmt: skip
    lines = [
        (
            f"{row['n']} x {row['k']}", str(row["m"]), *[row["format"]] * formats, _shown(row["us"]),
            *(_against(row, peer) for peer in peers), _shown(row["stream_us"]), _shown(row["floor_us"]), _rate(row), row["kernel"],
            row.get("note", ""),
        )
        for row in rows
    ]  # fmt: skip
    if not any(line[-1] for line in lines):
        header, lines = header[:-1], [line[:-1] for line in lines]
    return markdown(header, lines)


def quantiser_table(rows: Sequence[Row]) -> str:
    """Quantisers beside copies of as many bytes."""
    header = ("rows x k", "format", "cugemm us", "GB/s", "copy us", "copy GB/s", "of copy", "floor us", "kernel", "note")
    lines = []
    for row in rows:
        size = cases.quantiser_traffic(row["format"], row["m"], row["k"]) if row["format"] in FORMATS else 0
        copy = row["baselines"].get("copy")
        share = f"{copy / row['us']:.2f}" if copy and row["us"] else "-"
        lines.append(
            (
                f"{row['m']} x {row['k']}", row["format"], _shown(row["us"]), _speed(size, row["us"]), _shown(copy), _speed(size, copy),
                share, _shown(row["floor_us"]), row["kernel"], row.get("note", ""),
            )
        )  # fmt: skip
    return markdown(header, lines)


def layer_table(rows: Sequence[Row]) -> str:
    """Mixtures of experts, quantisers included."""
    header = ("layer", "tokens", "format", "cugemm us", "stream us", "floor us", "last product")
    lines = [
        (
            row.get("note", ""), str(row["m"]), row["format"], _shown(row["us"]), _shown(row["stream_us"]), _shown(row["floor_us"]),
            row["kernel"],
        )
        for row in rows
    ]  # fmt: skip
    return markdown(header, lines)


def invariant_table(rows: Sequence[Row]) -> str:
    """What batch_invariant=True costs."""
    header = ("n x k", "m", "format", "us", "batch_invariant us", "cost", "stream us", "floor us", "kernel if batch_invariant")
    lines = []
    for row in rows:
        plain = row["baselines"].get("cugemm")
        cost = f"{row['us'] / plain:.2f}x" if plain and row["us"] else "-"
        lines.append(
            (
                f"{row['n']} x {row['k']}", str(row["m"]), row["format"], _shown(plain), _shown(row["us"]), cost, _shown(row["stream_us"]),
                _shown(row["floor_us"]), row["kernel"],
            )
        )  # fmt: skip
    return markdown(header, lines)


OTHERS: dict[str, Callable[[Sequence[Row]], str]] = {
    "chain": functools.partial(product_table, formats=True),
    "decode": functools.partial(product_table, formats=True),
    "batch_invariant": invariant_table,
    "quantize": quantiser_table,
    "moe": layer_table,
}
"""Rows that are no product beside its peers, and their tables."""


def _host_table(rows: Sequence[Row]) -> str:
    peers = list(dict.fromkeys(peer for row in rows for peer in row["host_baselines"]))
    header = ("call", "m x n x k", "host us", *(f"{peer} us" for peer in peers))
    lines = [
        (
            f"{row['op']}: {row.get('note', '')}", f"{row['m']} x {row['n']} x {row['k']}", _shown(row["host_us"]),
            *(_shown(row["host_baselines"].get(peer)) for peer in peers),
        )
        for row in rows
    ]  # fmt: skip
    return f"### Host time\n\n{markdown(header, lines)}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _shown(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}"


def _speed(size: int, us: float | None) -> str:
    return f"{size / us / 1e3:.0f}" if size and us else "-"


def _against(row: Row, peer: str) -> str:
    """A peer's time, and how many times as fast as it we are."""
    us = row["baselines"].get(peer)
    return _shown(us) if us is None or not row["us"] else f"{us:.1f} ({us / row['us']:.2f}x)"


def _rate(row: Row) -> str:
    """GB/s where memory sets the floor, else TFLOP/s; "-" for a format that this version does not know."""
    if not row["us"] or row["format"] not in cases.CASES:
        return "-"
    m, n, k = row["m"], row["n"], row["k"]
    size, flops = cases.traffic(cases.CASES[row["format"]], m, n, k), cases.flops(m, n, k)
    return f"{flops / row['us'] / 1e6:.0f} TFLOP/s" if flops > _RIDGE * size else f"{size / row['us'] / 1e3:.0f} GB/s"
