"""`python -m cugemm info | demo | explain | compile | bench`: parses and prints; the work is in the modules of those names."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cugemm import arch, bench, bench_host, calls, cases, compile, demo, driver, info, records
from cugemm.arrays import HOST
from cugemm.errors import CudaError
from cugemm.formats import FORMATS

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
        (
            "bench",
            _bench,
            "measure products, quantisers and mixtures beside torch, copies, and what memory and arithmetic allow",
            _bench_options,
        ),
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
    print(f"\nProducts a x b on {found.target.name}, with all scales of each format:\n")
    table = info.support(found.target)
    _print_table(table.rows)
    for note in table.notes:
        print(f"  -: {note}")
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
    command.add_argument("op", help="an operation of cugemm, such as mm_fp8, linear or quantize; any other name lists them")
    command.add_argument(
        "--a",
        help="first argument: a dtype or format, like bfloat16 or nvfp4@128x4 (its scales in tiles), or with a shape, bfloat16:16x4096",
    )
    command.add_argument("--b", help="second argument; :T behind a shape is the transposed view, like fp8_row:11008x4096:T")
    command.add_argument("--format", help="of quantize, else of every operand that has a format: " + ", ".join(FORMATS))
    for letter, name, text in (
        ("m", "m", "rows"), ("n", "n", "output features"), ("k", "k", "inner size"), ("g", "groups", "groups, experts or matrices"),
        ("t", "topk", "experts of a row"),
    ):  # fmt: skip
        default = calls.SIZES[letter]
        command.add_argument(f"--{name}", dest=letter, type=_positive, default=default, help=f"{text} (default {default})")
    command.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="other arguments: a_scale=float32:16x1 out_dtype=float16 indptr=int32:g+1 ...",
    )
    command.add_argument("--arch", help="plan for this arch; default: GPU 0, sm_90a where there is none")


def _explain(options: argparse.Namespace) -> None:
    on_gpu = options.arch is None and driver.available()
    target = None if on_gpu else arch.get(options.arch or "sm_90a")
    sizes = {letter: getattr(options, letter) for letter in calls.SIZES}
    texts = calls.call_text(options.op, options.a, options.b, options.format) | dict(map(_assignment, options.set))
    arguments = {name: calls.value(text, 0 if on_gpu else HOST, sizes) for name, text in texts.items()}
    print(calls.explain(options.op, arguments, target))


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not NAME=VALUE.")
    return name, value


# compile


def _compile_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--list",
        action="store_true",
        help="print every config that any m may get, per format and weight, and those of conversions; compile nothing",
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
            cells = ((c.what, str(c.n or "any"), str(c.k or "any"), c.kernel, c.config) for c in listed)
            _print_table([("what", "n", "k", "kernel", "config"), *cells])
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
        "what", nargs="?", choices=("products", "quantize", "moe"), default="products", help="what to measure (default: products)"
    )
    command.add_argument(
        "--preset",
        choices=tuple(cases.PRESETS),
        help="of products: baselines is the published set, formats has every format on a few shapes, decode is what one step of "
        f"{cases.DECODE.name} multiplies, batch_invariant what batch_invariant=True costs there, quick (the default) is the smallest",
    )
    command.add_argument(
        "--chain",
        type=_positive,
        metavar="N",
        help="of products: N in one graph, each of what the one before it wrote; 32 or more, so that their weights are cold. "
        "With decode: N layers (default 8)",
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
        document["rows"] += (bench_host.host_rows() if options.host else []) + (bench_host.first_calls() if options.cold else [])
        _keep(document, options.json)
    else:
        _bench_gpu(options, document)
    print(records.table([document]))


def _bench_gpu(options: argparse.Namespace, document: records.Document) -> None:
    """Everything that is measured on the GPU, a shape at a time; what is done is kept if the rest fails."""
    until = time.monotonic() + options.seconds
    machine = bench.Bench()
    document["read_gbs"] = round(machine.read_gbs, 1)
    total, measured = _to_measure(options, machine, until)
    done = 0
    for rows in measured:
        done += 1
        document["rows"] += rows
        _keep(document, options.json)
        _show_progress(f"{done} of {total} shapes")
    _show_progress("")
    if done < total:
        print(f"cugemm bench: {total - done} of {total} shapes left out, --seconds {options.seconds:.0f} is over", file=sys.stderr)


def _to_measure(options: argparse.Namespace, machine: bench.Bench, until: float) -> tuple[int, Iterator[list[records.Row]]]:
    """How many shapes, and their rows."""
    if options.what == "quantize":
        return len(cases.QUANTISED), machine.quantiser_rows(cases.QUANTISED, until)
    if options.what == "moe":
        layers = [(layer, m) for layer in cases.LAYERS for m in cases.LAYER_ROWS]
        return len(layers), machine.layer_rows(layers, options.formats or cases.LAYER_FORMATS, until)
    preset = cases.PRESETS[options.preset or "quick"]
    formats, shapes, layer = options.formats or preset.formats, preset.shapes, preset.chain
    if options.shapes is not None:
        shapes, layer = tuple((m, n, k) for n, k in options.shapes for m in options.m), None
    turns = options.chain or (layer and layer.turns)
    if turns is None:
        rows = machine.invariant_rows if preset.batch_invariant else machine.rows
        return len(shapes), rows(shapes, formats, until)
    chains = [(layer._replace(turns=turns) if layer else cases.Chain("", ((n, k),), turns), m) for m, n, k in shapes]
    return len(chains), machine.chain_rows(chains, formats, until)


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
