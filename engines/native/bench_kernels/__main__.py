"""``python -m engines.native.bench_kernels``: time every kernel against its reference, torch.compile, Liger's and its floor, on one GPU."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from triton.errors import TritonError

from engines.native import tiles
from engines.native.bench import CONF, model_shape
from engines.native.bench_kernels import liger, tune, variants
from engines.native.bench_kernels.rows import ROWS
from engines.native.bench_kernels.setting import DOCUMENT, Call, Row, Setting
from engines.native.bench_kernels.table import COLUMNS, Measured, Section, facts, head, line, page
from engines.native.bench_kernels.timing import Clock

# What building, compiling or launching a row raises when it cannot; running out of memory is a RuntimeError.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, ImportError, OSError, TritonError)
_LONGEST_REASON = 300
# At most 2,048 rows of logits, all adapters, a weight, a layer's weights: whatever the tokens.
_ONCE = ("cross_entropy", "adamw", "decode_nf4", "copy_parts", "write_tail", "decode_rows", "adamw_float32", "adamw_eight_bit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and perhaps write it; returns 1 when a row or a figure of it failed, 2 when the command is wrong."""
    options = _parsed(arguments)
    if not torch.cuda.is_available():
        print("error: python -m engines.native.bench_kernels needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 2
    with torch.no_grad():
        return _tune(options) if options.tune else _variants(options) if options.variants else _table(options)


def _table(options: argparse.Namespace) -> int:
    clock = Clock()
    limits = clock.limits()
    print("\n".join(facts(limits, torch.cuda.get_device_name())), flush=True)
    left_out = {"torch.compile"} if options.no_compile else set()
    left_out |= set() if liger.version() else {"Liger"}
    columns = tuple(name for name in COLUMNS if name not in left_out)

    def measure(name: str, make: Callable[[], Row]) -> Measured:
        row = measured(name, make, columns, clock.milliseconds, limits.floor)
        print(line(row), flush=True)
        return row

    sections = []
    for model in options.model:
        begin = time.perf_counter()
        print(f"\n{model}\n{head()}", flush=True)
        sections.append(Section(model, tuple(_rows_of(model, options, measure))))
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    if options.write:
        options.write.write_text(page(sections, limits, torch.cuda.get_device_name()), encoding="utf-8")
        print(f"written: {options.write}")
    failed = [f"{section.model} {row.name} {row.size}" for section in sections for row in section.rows if row.problems]
    print(f"failed: {', '.join(failed)}" if failed else "all rows measured")
    return 1 if failed else 0


def _rows_of(model: str, options: argparse.Namespace, measure: Callable[[str, Callable[[], Row]], Measured]) -> Iterator[Measured]:
    for tokens in options.tokens:
        setting = Setting.of(model_shape(model, None), tokens, torch.device("cuda"), torch.bfloat16)
        for name in options.only or ROWS:
            if name in _ONCE and tokens != options.tokens[0]:
                continue
            yield measure(name, partial(ROWS[name], setting))
        torch.cuda.empty_cache()


def measured(
    name: str, make: Callable[[], Row], columns: Sequence[str], milliseconds: Callable[[Call], float], floor: Callable[[int, int], float]
) -> Measured:
    """A row's figures in ``columns``; one that fails is a problem of its own and does not stop the others."""
    try:
        row = make()
    except FAILURES as error:
        return Measured(name, "", {}, problems=(reason("the tensors", error),))
    times: dict[str, float | None] = {}
    problems = []
    for column in columns:
        try:
            call = _call(row, column)
            times[column] = None if call is None else milliseconds(call)
        except FAILURES as error:
            problems.append(reason(column, error))
    return Measured(name, row.size, times, row.num_bytes, row.flops, floor(row.num_bytes, row.flops), tuple(problems))


def _call(row: Row, column: str) -> Call | None:
    """What a column times, None where a row has nothing there."""
    if column == "Liger":
        return row.liger() if row.liger is not None else None
    if column == "torch.compile":
        if not row.is_compiled:
            return None
        torch._dynamo.reset()  # a row's own compilation, not a recompilation of the row before
        return Call(torch.compile(row.reference.run, dynamic=False), row.reference.reset)
    return row.ours if column == "ours" else row.reference


def reason(what: str, error: BaseException) -> str:
    """One line."""
    return f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:_LONGEST_REASON]}"


def _variants(options: argparse.Namespace) -> int:
    clock, failed = Clock(), 0
    for model in options.model:
        begin = time.perf_counter()
        print(f"\n{model}, {options.tokens[0]:,} tokens", flush=True)
        setting = Setting.of(model_shape(model, None), options.tokens[0], torch.device("cuda"), torch.bfloat16)
        for name in options.only or variants.VARIANTS:
            try:
                for text in variants.compared(name, setting, clock.milliseconds, FAILURES):
                    failed += "failed" in text
                    print(text, flush=True)
            except FAILURES as error:
                failed += 1
                print(f"{name}: failed: {reason('the tensors', error)}", flush=True)
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    return 1 if failed else 0


def _tune(options: argparse.Namespace) -> int:
    """Time what may be chosen among, and perhaps keep it for this GPU."""
    begin, clock, device = time.perf_counter(), Clock(), torch.cuda.get_device_name()
    settings = [
        Setting.of(model_shape(model, None), tokens, torch.device("cuda"), torch.bfloat16)
        for model in options.model
        for tokens in options.tokens
    ]
    found = []
    for one in tune.every(settings, options.only or tuple(tune.CHOICES), clock.milliseconds, FAILURES):
        found.append(one)
        print(one.line(), flush=True)
    print(f"{time.perf_counter() - begin:.0f} s; in use: {tiles.said(device)}")
    if options.write:
        words = " ".join(["python -m engines.native.bench_kernels --tune", *("--only" if options.only else "", *options.only)]).strip()
        provenance = ", ".join(fact.removeprefix("- ") for fact in facts(clock.limits(), device))
        print(f"written: {tiles.write(tune.table_of(found, device, provenance, words))}")
    return 0  # a candidate that does not launch here is one that is not chosen


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m engines.native.bench_kernels", description=__doc__)
    parser.add_argument("--model", nargs="+", default=["llama3_8b", "llama3_1b"], help="names of conf/model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 2048])
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"of {', '.join(ROWS)}; with --variants {', '.join(variants.VARIANTS)}; with --tune {', '.join(tune.CHOICES)}",
    )
    parser.add_argument(
        "--write",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="write the table as Markdown to FILE; with --tune, and no FILE, this GPU's table of tiles",
    )
    parser.add_argument("--tune", action="store_true", help="time the cuts that kernels may choose among, and name the best")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes most of the time")
    parser.add_argument("--variants", action="store_true", help="time other tiles of some kernels instead, at the first number of tokens")
    options = parser.parse_args(arguments)
    known = tuple(tune.CHOICES if options.tune else variants.VARIANTS if options.variants else ROWS)
    if unknown := [name for name in options.only if name not in known]:
        parser.error(f"--only {' '.join(unknown)}: no such rows; known: {', '.join(known)}")
    models = sorted(path.stem for path in CONF.glob("*.yaml"))
    if unknown := [name for name in options.model if name not in models]:
        parser.error(f"--model {' '.join(unknown)}: not in conf/model; known: {', '.join(models)}")
    if wrong := [tokens for tokens in options.tokens if tokens < 16 or tokens % min(tokens, DOCUMENT)]:
        parser.error(f"--tokens {wrong[0]}: expected at least 16, above {DOCUMENT} a multiple of it, which is the length of a document")
    if options.tune and (options.variants or options.write not in (None, Path())):
        parser.error("--tune goes without --variants, and its --write takes no file: the table lies where the engine looks for it")
    if not options.tune and options.write == Path():
        parser.error("--write needs a file: docs/kernels.md")
    if options.write and not options.tune and (options.only or options.no_compile or options.variants):
        parser.error("--write is for the whole table: drop --only, --no-compile and --variants")
    return options


if __name__ == "__main__":
    sys.exit(main())
