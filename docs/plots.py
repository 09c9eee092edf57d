"""Pictures of recorded times, as SVG: microseconds over rows of a, one panel for each weight.

python docs/plots.py            write docs/benchmarks/small_m.svg from bench_h100_small_m.json; nothing while there is none
python docs/plots.py --check    exit with 1 if it differs from what would be written
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from cugemm import records
from cugemm.records import Document, Row

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TARGET = "docs/benchmarks/bench_h100_small_m.json", "docs/benchmarks/small_m.svg"
WIDTH, HEIGHT, COLUMNS = 300, 240, 3
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 28, 34
LINES = (("#0072b2", ""), ("#d55e00", "7 3"), ("#009e73", "2 3"), ("#cc79a7", "9 3 2 3"), ("#56b4e9", "4 4"), ("#e69f00", "12 4"))
"""Colour (told apart by the colour-blind too) and dash of each format, in the order of the document; those of baselines likewise, thin."""
Series = dict[str, dict[int, float]]


def series(rows: Sequence[Row]) -> tuple[Series, Series]:
    """{name: {m: us}} of formats and of baselines. What was not measured is left out."""
    ours: Series = {}
    peers: Series = {}
    for row in rows:
        if row["us"]:
            ours.setdefault(row["format"], {})[row["m"]] = row["us"]
        for name, us in row["baselines"].items():
            peers.setdefault(name, {})[row["m"]] = us
    return ours, peers


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from the last that is not above `low` to the first that is not below `high`."""
    steps = [f * 10.0**e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2) for f in (1, 2, 5)]
    first, last = max(s for s in steps if s <= low), min(s for s in steps if s >= high)
    return [s for s in steps if first <= s <= last]


def panel(title: str, lines: Sequence[tuple[str, dict[int, float]]], rows: Sequence[int], x0: float, y0: float) -> Iterator[str]:
    """Axes and lines; lines: (attributes, {m: us})."""
    marks = ticks(*(f(us for _, points in lines for us in points.values()) for f in (min, max)))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(m: float) -> float:
        return x0 + LEFT + width * math.log(m / rows[0]) / (math.log(rows[-1] / rows[0]) or 1)

    def y(us: float) -> float:
        return y0 + TOP + height * (1 - math.log(us / marks[0]) / (math.log(marks[-1] / marks[0]) or 1))

    yield f'<text x="{x0 + LEFT}" y="{y0 + 18}" font-weight="bold">{escape(title)}</text>'
    for us in marks:
        yield f'<path d="M{x0 + LEFT} {y(us):.1f}h{width}" stroke="#ddd"/>'
        yield f'<text x="{x0 + LEFT - 4}" y="{y(us) + 4:.1f}" text-anchor="end">{us:g}</text>'
    for m in (m for m in rows if math.log2(m) % 2 == 0):
        yield f'<text x="{x(m):.1f}" y="{y0 + HEIGHT - BOTTOM + 14}" text-anchor="middle">{m}</text>'
    for attributes, points in lines:
        yield f'<polyline points="{" ".join(f"{x(m):.1f},{y(us):.1f}" for m, us in sorted(points.items()))}" {attributes}/>'


def svg(document: Document) -> str:
    """The picture: panels in the order of the document, under them what the lines are."""
    found = [row for row in document["rows"] if "us" in row and row["op"] not in records.OTHERS]
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in found))
    rows = sorted({row["m"] for row in found})
    styles: dict[str, str] = {}
    for names, width in zip(series(found), (2, 0.8), strict=True):
        for name, (colour, dash) in zip(names, LINES, strict=False):
            styles[name] = f'fill="none" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash or "none"}"'
    parts: list[str] = []
    for i, (n, k) in enumerate(shapes):
        ours, peers = series([row for row in found if (row["n"], row["k"]) == (n, k)])
        lines = [(styles[name], points) for name, points in (peers | ours).items() if name in styles]
        if lines:
            parts += panel(f"{n} x {k}, us over m", lines, rows, i % COLUMNS * WIDTH, i // COLUMNS * HEIGHT)
    bottom = math.ceil(len(shapes) / COLUMNS) * HEIGHT
    for i, (name, style) in enumerate(styles.items()):
        at, y = LEFT + i % 5 * 170, bottom + 12 + i // 5 * 18
        parts += [f'<path d="M{at} {y}h36" {style}/>', f'<text x="{at + 42}" y="{y + 4}">{escape(name)}</text>']
    told = f"{document['gpu']}, driver {document['driver']}, {document['date']}, commit {document['commit']}"
    height = bottom + 18 * math.ceil(len(styles) / 5) + 26
    parts.append(f'<text x="{LEFT}" y="{height - 8}">{escape(told)}</text>')
    size = f'width="{COLUMNS * WIDTH}" height="{height}" viewBox="0 0 {COLUMNS * WIDTH} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    source, target = ROOT / SOURCE, ROOT / TARGET
    if not source.exists():
        return 0
    new = svg(records.load(source))
    if "--check" in (sys.argv[1:] if arguments is None else arguments):
        current = target.exists() and target.read_text(encoding="utf-8") == new
        if not current:
            print(f"{TARGET} differs from what is generated; run python docs/plots.py", file=sys.stderr)
        return int(not current)
    target.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
