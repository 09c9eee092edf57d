"""`python -m cugemm info | demo | explain | compile | bench`: parses and prints; the work is in the modules of those names."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cugemm
from cugemm import arch, bench, cases, compile, demo, driver, info, records
from cugemm.arrays import HOST
from cugemm.errors import CudaError

_REFUSED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand. 0, or 2 with one line on stderr where the request cannot be met."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, ImportError, OSError, CudaError) as error:
        print(f"cugemm {options.command}: {error}", file=sys.stderr)
        return _REFUSED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m cugemm", description="Low-precision matrix products: what is here, what runs, how fast.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | demo | explain | compile | bench")
    for name, run, text, fill in (
        ("info", _info, "GPU, driver, compiler, cache, supported formats, and a fix for every problem found", _no_options),
        ("demo", _demo, "quantise the linear layers of a model, run them, compare with float64", _demo_options),
        ("explain", _explain, "which kernel a call takes, and why", _explain_options),
        ("compile", _compile, "compile the kernels of given shapes before they are needed", _compile_options),
        ("bench", _bench, "measure products beside torch's and beside what memory and arithmetic allow", _bench_options),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        fill(command)
    return parser


# info


def _no_options(command: argparse.ArgumentParser) -> None:
    """`info` has none."""


def _info(options: argparse.Namespace) -> None:
    found = info.survey()
    _print_pairs(found.facts)
    print(f"\nProducts a x b on {found.target.name}, scales per tensor, row, column, 1 x 128 or 128 x 128:\n")
    _print_table(info.support(found.target))
    print("\nProblems:" if found.problems else "\nNo problems found.")
    for obstacle in found.problems:
        print(f"  {obstacle.what}\n    -> {obstacle.fix}")


# demo


def _demo_options(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group()
    source.add_argument(
        "--checkpoint", metavar="FILE", help="a .safetensors file or a directory of them; default: the installed MiniLM example"
    )
    source.add_argument("--synthetic", choices=tuple(demo.SYNTHETIC), help="random weights in the shapes of a known model")
    command.add_argument("--formats", type=_words, default=demo.FORMATS, help=f"comma-separated, of {', '.join(cases.CASES)}")
    command.add_argument("--m", type=_positive, default=16, help="rows of activations (default 16)")


def _demo(options: argparse.Namespace) -> None:
    on_gpu, where = demo.where()
    print(where)
    if options.checkpoint:
        source = demo.from_checkpoint(options.checkpoint)
    else:
        source = demo.synthetic(options.synthetic) if options.synthetic else demo.default_source(on_gpu)
    print(f"{source.title}; m = {options.m} rows of random activations.\n")
    lines = list(demo.run(source, options.formats, options.m, on_gpu))
    _print_table([demo.HEADER, *map(demo.cells, lines)])
    print(f"\n{demo.LEGEND}\n\nWhole model:")
    for sentence in demo.summary(lines):
        print(f"  {sentence}")


# explain


def _explain_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("op", help="a function of cugemm, such as mm_fp8 or linear")
    command.add_argument(
        "--a", required=True, help="first operand: dtype:shape, like bfloat16:16x4096, or format:shape, like fp8_row:11008x4096"
    )
    command.add_argument("--b", required=True, help="second operand; :T behind it is the transposed view, like fp8_row:11008x4096:T")
    command.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="other arguments: a_scale=float32:16x1 out_dtype=float16 ..."
    )
    command.add_argument("--arch", help="plan for this arch; default: GPU 0, sm_90a where there is none")


def _explain(options: argparse.Namespace) -> None:
    fn = getattr(cugemm, options.op, None)
    if options.op not in cugemm.__all__ or not callable(fn):
        raise ValueError(f"{options.op!r} is no function of cugemm; wanted one of mm_bf16, mm_fp8, linear, matmul, ...")
    on_gpu = options.arch is None and driver.available()
    device = 0 if on_gpu else HOST
    operands = [cases.operand(text, device) for text in (options.a, options.b)]
    keywords = dict(_keyword(text, device) for text in options.set)
    target = arch.get(options.arch or "sm_90a")
    print(cugemm.explain(fn, *operands, **keywords) if on_gpu else cases.explain(fn, operands, keywords, target))


def _keyword(text: str, device: int) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not NAME=VALUE.")
    if ":" in value:
        return name, cases.operand(value, device)
    try:
        return name, float(value)
    except ValueError:
        return name, value


# compile


def _compile_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--list", action="store_true", help="print every config that any m may get, per format and weight, and compile nothing"
    )
    command.add_argument("--arch", type=_words, help="comma-separated, of " + ", ".join(arch.ARCHS) + "; default: GPU 0, else sm_90a")
    command.add_argument("--formats", type=_words, default=tuple(cases.CASES), help="comma-separated; default: all")
    command.add_argument("--shapes", type=_weights, default=cases.SHAPES, help="NxK,...; default: layers of Llama and DeepSeek")
    command.add_argument(
        "--pack", type=Path, metavar="DIR", help="write a pack for other machines (CUGEMM_CACHE_DIR=DIR) instead of the cache"
    )


def _compile(options: argparse.Namespace) -> None:
    names = options.arch or (info.survey().target.name,)
    for target in map(arch.get, names):
        if options.list:
            print(f"{target.name}:")
            listed = cases.configs(options.formats, options.shapes, target)
            _print_table([("format", "n", "k", "kernel", "config"), *((c.pair, str(c.n), str(c.k), c.kernel, c.config) for c in listed)])
            continue
        jobs = cases.jobs(options.formats, options.shapes, target)
        started = time.perf_counter()
        made = _compile_jobs(jobs, options.pack)
        seconds = time.perf_counter() - started
        print(f"{target.name}: {len(jobs)} kernels in {options.pack or compile.cache_dir()}, {made} of them compiled in {seconds:.1f} s")


def _compile_jobs(jobs: list[compile.Job], pack: Path | None) -> int:
    """Into a pack or the cache; how many were not there yet."""
    if pack is not None:
        return compile.write_pack(pack, jobs)
    before = compile.stats["compile"]
    for done, job in enumerate(jobs, 1):
        _show_progress(f"{done} of {len(jobs)}: {job.stem} for {job.arch.name}")
        compile.cubin(*job)
    _show_progress("")
    return compile.stats["compile"] - before


# bench


def _bench_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--preset", choices=tuple(cases.PRESETS), help="shapes and formats: baselines is the published set, quick (the default) a few of it"
    )
    command.add_argument("--formats", type=_words, help="comma-separated, of " + ", ".join(cases.CASES))
    command.add_argument("--shapes", type=_weights, help="NxK,... of the weights, each with every --m")
    command.add_argument("--m", type=_sizes, default=cases.ROWS, help="rows, comma-separated")
    command.add_argument("--seconds", type=float, default=540.0, help="start no further shape after this long (default 540)")
    command.add_argument("--host", action="store_true", help="host time of a warm call per framework instead")
    command.add_argument("--cold", action="store_true", help="time of the first call of a process instead")
    command.add_argument("--json", type=Path, metavar="FILE", help="record the document")
    command.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print recorded documents as Markdown and measure nothing")


def _bench(options: argparse.Namespace) -> None:
    if options.table:
        print(records.table(map(records.load, options.table)))
        return
    if not driver.available():
        raise ValueError("there is no GPU to measure; --table FILE prints recorded runs.")
    document = records.new_document()
    if options.host or options.cold:
        document["rows"] += (bench.host_rows() if options.host else []) + (bench.first_calls() if options.cold else [])
        _keep(document, options.json)
    else:
        _bench_products(options, document)
    print(records.table([document]))


def _bench_products(options: argparse.Namespace, document: records.Document) -> None:
    preset = cases.PRESETS[options.preset or "quick"]
    shapes = preset.shapes if options.shapes is None else [(m, n, k) for n, k in options.shapes for m in options.m]
    formats = options.formats or preset.formats
    until = time.monotonic() + options.seconds
    machine = bench.Bench()
    document["read_gbs"] = round(machine.read_gbs, 1)
    done = 0
    for rows in machine.rows(shapes, formats, until):
        done += 1
        document["rows"] += rows
        _keep(document, options.json)
        _show_progress(f"{done} of {len(shapes)} shapes")
    _show_progress("")
    if done < len(shapes):
        print(
            f"cugemm bench: {len(shapes) - done} of {len(shapes)} shapes left out, --seconds {options.seconds:.0f} is over", file=sys.stderr
        )


def _keep(document: records.Document, path: Path | None) -> None:
    if path is not None:
        records.save(document, path)


# Reading options and printing


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(_positive, _words(text)))


def _weights(text: str) -> tuple[tuple[int, int], ...]:
    """((n, k), ...) of a text like 11008x4096,4096x14336."""
    return tuple(map(_weight, _words(text)))


def _weight(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return _positive(n), _positive(k)


def _show_progress(text: str) -> None:
    """On a terminal, a line that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        print(f"{name:{width}}  {value}")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
