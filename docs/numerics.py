"""The generated parts of docs/numerics.md: measured errors of every format and accumulation mode.

python docs/numerics.py                       rewrite them from the recorded document
python docs/numerics.py --check               exit with 1 if it differs from what would be written
python docs/numerics.py --measure OUT.json    measure: on the GPU with CuPy or torch, else on host arrays
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import cugemm
from cugemm import driver, measure, quantize_reference, records
from cugemm.arrays import numpy_dtype
from cugemm.formats import ALL, E4M3, E8M0, FORMATS
from cugemm.problem import ACCUMULATE, FLOATS8

Array = np.ndarray[Any, Any]
Row = dict[str, Any]
Document = dict[str, Any]
_Item = TypeVar("_Item")

ROOT = Path(__file__).resolve().parent.parent
RECORDED = tuple(ROOT / "docs" / "benchmarks" / name for name in ("numerics_h100.json", "numerics_host.json"))
"""The page shows the first of these that exists."""

DATA = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy": lambda rng, shape: rng.standard_t(3, shape),
    "positive": lambda rng, shape: np.abs(rng.standard_normal(shape)),
}
TITLES = {
    "normal": "Standard normal",
    "heavy": "Heavy-tailed: Student's t, 3 degrees of freedom",
    "positive": "Positive: |standard normal|",
}
FLOATS = {"bfloat16": "bf16", "float16": "fp16"}
"""Operands that are rounded and have no scale."""
PAIRS = (
    ("bfloat16", "bfloat16"), ("float16", "float16"), ("fp8_tensor", "fp8_tensor"), ("fp8_row", "fp8_row"), ("fp8_group", "fp8_block"),
    ("bfloat16", "fp8_row"), ("mxfp8", "mxfp8"), ("float16", "mxfp8"), ("mxfp4", "mxfp4"), ("bfloat16", "mxfp4"), ("nvfp4", "nvfp4"),
    ("bfloat16", "nvfp4"), ("fp8_row", "nvfp4"), ("int8_row", "int8_row"), ("bfloat16", "int8_row"), ("bfloat16", "int4_g32"),
    ("bfloat16", "int4_g64"), ("bfloat16", "int4_g128"), ("bfloat16", "uint4_g128"),
)  # fmt: skip
"""(activations, weights) of the measured products."""
ROWS, COLUMNS, SEED = 256, 256, 7
KS = {"gpu": (1024, 4096, 16384), "host": (1024, 4096)}
_ONE = {E4M3.name: 0x38, E8M0.name: 127}
"""The code of a scale of 1."""


# Measuring ------------------------------------------------------------------------------------------------------------------------


def place() -> str:
    """Where products run here: "cupy", "torch" or "host"."""
    if driver.available():
        if measure.optional("cupy") is not None:
            return "cupy"
        torch = measure.optional("torch")
        if torch is not None and torch.cuda.is_available():
            return "torch"
    return "host"


def put(x: Array, where: str) -> Any:
    """A float array on the device."""
    if where != "torch":
        return measure.to_device(x) if where == "cupy" else x
    import torch  # noqa: PLC0415 - only where there is a GPU and no CuPy

    return torch.from_numpy(x.view(np.int16) if x.itemsize == 2 else x).cuda().view(getattr(torch, x.dtype.name))


def get(x: Any) -> Array:
    """A host copy of an array that `put` or cugemm made."""
    if not hasattr(x, "cpu"):
        return measure.to_host(x)
    import torch  # noqa: PLC0415

    carrier = {1: torch.uint8, 2: torch.int16}.get(x.element_size(), x.dtype)
    host: Array = x.view(carrier).cpu().numpy().view(numpy_dtype(str(x.dtype).removeprefix("torch.")))
    return host


def operand(x: Array, name: str, where: str) -> tuple[Any, Array]:
    """float32 x [rows, k] in a format, on the device; and in float64 exactly what the stored bits stand for."""
    if name in FLOATS:
        rounded = x.astype(numpy_dtype(name))
        return put(rounded, where), rounded.astype(np.float64)
    q = cugemm.quantize(put(x, where), name)
    return q, real(q)


def real(q: cugemm.Quantized) -> Array:
    """(stored - zero) * scale * tensor_scale in float64, where nothing rounds."""
    fmt = q.format
    data, scale = get(q.data), get(q.scale)
    zero, tensor = (None if part is None else get(part) for part in (q.zero, q.tensor_scale))
    ones = np.full_like(scale, _ONE.get(fmt.scale.name, 1))
    values: Array = cugemm.dequantize(cugemm.Quantized(data, ones, fmt, zero=zero), "float32").astype(np.float64)
    if fmt.scale.name in _ONE:
        scale = quantize_reference.scale_values(scale, fmt.scale)
    factor = scale.astype(np.float64)
    for axis, block in enumerate(fmt.block):
        if block not in (ALL, 1):
            factor = np.repeat(factor, block, axis=axis)
    if factor.ndim == 2:
        factor = factor[: values.shape[0], : values.shape[1]]
    values *= factor
    return values if tensor is None else values * tensor.astype(np.float64)


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def each(measured: Callable[[_Item], Row | list[Row]], items: Iterable[_Item], where: str) -> list[Any]:
    """What `measured` makes of each item, in order. On a GPU at once: compiling their kernels is most of the time."""
    with ThreadPoolExecutor(1 if where == "host" else os.cpu_count()) as pool:
        return list(pool.map(measured, items))


def conversions(rows: int, k: int, data: str, where: str) -> list[Row]:
    """A row for each format: the error of quantising and going back."""
    x = draw(data, rows, k, 0)

    def row(name: str) -> Row:
        q, back = operand(x, name, where)
        error = rms(back - x) / rms(x)
        parts = [q] if name in FLOATS else [part for part in (q.data, q.scale, q.zero, q.tensor_scale) if part is not None]
        bits = 8 * sum(part.nbytes for part in parts) / x.size
        snr = -20 * float(np.log10(error))
        return {"data": data, "format": FLOATS.get(name, name), "bits": round(bits, 3), "rms": short(error), "snr_db": round(snr, 2)}

    return each(row, (*FLOATS, *FORMATS), where)


def products(m: int, n: int, k: int, data: str, where: str) -> list[Row]:
    """A row for each pair of formats, result dtype and set of accumulation modes that gave the same bits."""
    x, w = draw(data, m, k, 1), draw(data, n, k, 2)
    unquantised = x.astype(np.float64) @ w.T.astype(np.float64)
    head = {"data": data, "m": m, "n": n, "k": k}

    def rows(pair: tuple[str, str]) -> list[Row]:
        named = {"x": FLOATS.get(pair[0], pair[0]), "w": FLOATS.get(pair[1], pair[1])}
        return [{**head, **named, **row} for row in _errors(x, w, pair, unquantised, where)]

    return [row for found in each(rows, PAIRS, where) for row in found]


def _errors(x: Array, w: Array, pair: tuple[str, str], unquantised: Array, where: str) -> Iterator[Row]:
    (a, left), (b, right) = operand(x, pair[0], where), operand(w, pair[1], where)
    exact, size = left @ right.T, np.abs(left) @ np.abs(right.T)
    both_fp8 = all(name in FORMATS and FORMATS[name].element.name in FLOATS8 for name in pair)
    for dtype in ("float32", "bfloat16"):
        results: dict[bytes, list[str]] = {}
        for accumulate in ACCUMULATE if both_fp8 else ("fast",):
            y = get(cugemm.linear(a, b, out_dtype=dtype, accumulate=accumulate)).astype(np.float64)
            results.setdefault(y.tobytes(), []).append(accumulate)
        for found, modes in results.items():
            y = np.frombuffer(found).reshape(exact.shape)
            row: Row = {"out": dtype, "accumulate": ", ".join(modes) if both_fp8 else ""}
            for name, wanted in (("sum", exact), ("all", unquantised)):
                off = np.abs(y - wanted)
                row |= {f"{name}_rms": short(rms(off) / rms(wanted)), f"{name}_max": short(off.max() / rms(wanted))}
            if dtype == "float32":
                row["sum_units"] = short(float((np.abs(y - exact) / size).max() * 2**24))
            yield row


def draw(data: str, rows: int, k: int, role: int) -> Array:
    """The same float32 numbers in every run."""
    values: Array = DATA[data](np.random.default_rng([SEED, role, rows, k]), (rows, k)).astype(np.float32)
    return values


def short(value: float) -> float:
    return float(f"{value:.3g}")


def measured(rows: int = ROWS, columns: int = COLUMNS, ks: Sequence[int] = (), where: str = "") -> Document:
    """A document about this machine; ValueError if an error is not a finite number."""
    where = where or place()
    ks = ks or KS["host" if where == "host" else "gpu"]
    head = {name: value for name, value in records.new_document().items() if name not in ("rows", "read_gbs")}
    if where == "host":
        head |= {"gpu": "", "driver": "", "cuda": ""}
    document = {
        **head, "arrays": {"cupy": "CuPy", "torch": "PyTorch", "host": "NumPy"}[where], "seed": SEED, "rows": rows, "k": min(4096, max(ks)),
        "quantisation": [row for data in DATA for row in conversions(rows, min(4096, max(ks)), data, where)],
        "products": [row for k in ks for data in DATA for row in products(rows, columns, k, data, where)],
    }  # fmt: skip
    bad = [
        row
        for part in ("quantisation", "products")
        for row in document[part]
        if any(isinstance(v, float) and not math.isfinite(v) for v in row.values())
    ]
    if bad:
        raise ValueError(f"not finite: {bad}")
    return document


def save(document: Document, path: Path) -> None:
    """JSON with a line for each row."""
    lists = {name: value for name, value in document.items() if isinstance(value, list)}
    text = json.dumps({name: [] if name in lists else value for name, value in document.items()}, indent=1)
    for name, rows in lists.items():
        text = text.replace(f'"{name}": []', f'"{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]")
    path.write_text(text + "\n", encoding="utf-8")


# The page ------------------------------------------------------------------------------------------------------------------------


def _run(document: Document) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    if document["gpu"]:
        where = f"{document['gpu']}, driver {document['driver']}, CUDA {document['cuda']}, arrays of {document['arrays']}"
    else:
        where = "Without a GPU, by the NumPy reference, which sums in float64: what the kernel adds is one rounding here"
    return _wrapped(f"{where}; {document['date']}, commit {document['commit']}. {versions}.")


def _conversions(rows: list[Row]) -> str:
    """A line for each format, two columns for each kind of data."""
    found = {(row["format"], row["data"]): row for row in rows}
    header = ("format", "bits", *(f"{data}: {what}" for data in DATA for what in ("rel. rms", "SNR dB")))
    lines = []
    for name in dict.fromkeys(row["format"] for row in rows):
        mine = [found[name, data] for data in DATA]
        cells = [cell for row in mine for cell in (f"{row['rms']:.1e}", f"{row['snr_db']:.1f}")]
        lines.append((name, f"{mine[0]['bits']:.2f}", *cells))
    return records.markdown(header, lines)


def _tables(rows: list[Row], *columns: str) -> str:
    """A table for each kind of data: a line for each pair of formats, a column for each k."""
    ks = sorted({row["k"] for row in rows})
    parts = []
    for data, title in TITLES.items():
        lines: dict[str, dict[int, str]] = {}
        for row in rows:
            if (row["data"], row["out"]) == (data, "float32"):
                cells = (f"{row[name]:.1f}" if name.endswith("units") else f"{row[name]:.1e}" for name in columns)
                lines.setdefault(_label(row), {})[row["k"]] = " / ".join(cells)
        body = [(label, *(found.get(k, "-") for k in ks)) for label, found in lines.items()]
        parts.append(f"{title}:\n\n{records.markdown(('x, w', *(f'k = {k}' for k in ks)), body)}")
    return "\n\n".join(parts)


def _label(row: Row) -> str:
    modes = row["accumulate"] if row["accumulate"] not in ("", ", ".join(ACCUMULATE)) else ""
    return f"{row['x']}, {row['w']}" + (f" ({modes})" if modes else "")


def _modes(rows: list[Row]) -> str:
    """Sentences on accumulation modes and bfloat16 results."""
    fp8 = [row for row in rows if row["accumulate"]]
    same = [row for row in fp8 if row["accumulate"] == ", ".join(ACCUMULATE)]
    told = (
        f"Accumulation modes: in all {len(fp8)} products of fp8 by fp8 measured, {', '.join(map(repr, ACCUMULATE))} gave the same bits."
        if len(same) == len(fp8)
        else "Accumulation modes that gave other bits have lines of their own."
    )
    narrow = [row["sum_rms"] for row in rows if row["out"] == "bfloat16"]
    widest = f"relative rms {min(narrow):.1e} to {max(narrow):.1e} over all of them; half a step of bfloat16 is at most 3.9e-03 of a value."
    return "\n\n".join((_wrapped(told), _wrapped(f"Bfloat16 results of the same products: {widest}")))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 140, break_long_words=False, break_on_hyphens=False)


SECTIONS: dict[str, Callable[[Document], str]] = {
    "run": _run,
    "conversions": lambda document: _conversions(document["quantisation"]),
    "sums": lambda document: "\n\n".join((_tables(document["products"], "sum_rms", "sum_max", "sum_units"), _modes(document["products"]))),
    "costs": lambda document: _tables(document["products"], "all_rms", "all_max"),
}


def filled(text: str, document: Document) -> str:
    """`text` with every section between its marker comments generated anew."""
    for name, generate in SECTIONS.items():
        between = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
        section = f"\n{generate(document)}\n\n"
        text, count = between.subn(lambda match, section=section: match[1] + section + match[2], text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"numerics.md has {count} sections <!-- {name}: begin --> ... <!-- {name}: end -->; wanted 1.")
    return text


def recorded() -> Document:
    """The document that the page shows."""
    path = next((path for path in RECORDED if path.exists()), None)
    if path is None:
        raise FileNotFoundError(f"none of {', '.join(map(str, RECORDED))} exists; run python docs/numerics.py --measure OUT.json.")
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--measure", metavar="OUT.json", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.measure is not None:
        started, where = time.perf_counter(), place()
        print("On the GPU." if where != "host" else "No GPU, or neither CuPy nor torch for it: the NumPy reference computes the products.")
        save(measured(where=where), chosen.measure)
        print(f"{chosen.measure}: {time.perf_counter() - started:.0f} s")
        return 0
    path = ROOT / "docs" / "numerics.md"
    text = path.read_text(encoding="utf-8")
    new = filled(text, recorded())
    if chosen.check:
        if new != text:
            print("docs/numerics.md differs from what is generated; run python docs/numerics.py", file=sys.stderr)
        return int(new != text)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
