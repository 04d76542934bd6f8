"""Measure what the harness itself costs, print each figure with its target and verdict, and with ``--write`` keep them in a page.

python -m scripts.bench_harness [--write docs/figures.md] [--only WORD] [--small]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import psutil
from rich.console import Console

from harness.machine import cpu_name
from harness.store import commit_of
from scripts.bench_figures import (
    SMALL,
    TREE,
    Figure,
    Sizes,
    cell_figures,
    compose_figures,
    import_figures,
    plan_figures,
    report_figures,
    start_figures,
    tokenise_figures,
)

PACKAGES = ("hydra-core", "pydantic", "tokenizers", "transformers")
INTRODUCTION = """# What the harness itself costs

Written by `make figures` (`python -m scripts.bench_harness --write docs/figures.md`), which exits with 1 when a figure misses its target.
Timings are of one machine on one day; run it to have yours.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when every figure meets its target, 1 when one does not, 2 when the command is wrong."""
    options = _parser().parse_args(arguments)
    if options.write and (options.small or options.only):
        print("error: --write is for the whole of the real sizes: drop --small and --only", file=sys.stderr)
        return 2
    chosen = {name: measure for name, measure in MEASURES.items() if not options.only or options.only in name}
    if not chosen:
        print(f"error: --only {options.only}: no such figures; known: {', '.join(MEASURES)}", file=sys.stderr)
        return 2
    load_average = os.getloadavg()[0]
    figures = list(_measured(chosen.values(), SMALL if options.small else Sizes()))
    if options.write:
        options.write.write_text(page(figures, load_average), encoding="utf-8")
        print(f"written: {options.write}")
    missed = [figure.name for figure in figures if not figure.passed]
    print(f"{len(figures) - len(missed)} of {len(figures)} figures meet their targets{': not ' if missed else ''}{', '.join(missed)}")
    return 1 if missed else 0


MEASURES: Mapping[str, Callable[[Sizes, Path], Iterable[Figure]]] = {
    "start": start_figures,
    "imports": import_figures,
    "cell": cell_figures,
    "plan": plan_figures,
    "compose": compose_figures,
    "report": report_figures,
    "tokenise": tokenise_figures,
}


def line(figure: Figure) -> str:
    """``pass  0.12 s (at most 0.35 s)  name``."""
    verdict = "pass  " if figure.passed else "FAILED"
    return f"{verdict} {_number(figure.value, figure.unit):>9} ({_target(figure)})  {figure.name}"


def page(figures: Sequence[Figure], load_average: float) -> str:
    """The figures as Markdown, with the machine, the versions and how each was measured."""
    commit, dirty = commit_of(TREE)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    facts = [
        f"- measured: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {commit[:8]}{' with local changes' if dirty else ''}",
        f"- machine: {cpu_name()}, {len(os.sched_getaffinity(0))} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB; "
        f"load average at the start {load_average:.2f}",
        f"- versions: Python {platform.python_version()}{_bytecode()}, {versions}",
    ]
    head = ["| figure | measured | target | verdict |", "|---|---|---|---|"]
    rows = [
        f"| {figure.name} | {_number(figure.value, figure.unit)} | {_target(figure)} | {'pass' if figure.passed else '**failed**'} |"
        for figure in figures
    ]
    how = [f"- {figure.name}: {figure.how}." for figure in figures]
    return "\n".join([INTRODUCTION, *facts, "", *head, *rows, "", "How each was measured:", "", *how, ""])


def _bytecode() -> str:
    """Said where it is so: every start then compiles the harness from its sources."""
    return " without cached bytecode (PYTHONDONTWRITEBYTECODE)" if sys.dont_write_bytecode else ""


def _measured(measures: Iterable[Callable[[Sizes, Path], Iterable[Figure]]], sizes: Sizes) -> Iterator[Figure]:
    """Each figure as soon as it is known; what takes minutes says what it is doing."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="engine-room-figures-") as folder:
        for measure in measures:
            with console.status(str(measure.__doc__)):
                for figure in measure(sizes, Path(folder)):
                    print(line(figure), flush=True)
                    yield figure


def _number(value: float, unit: str) -> str:
    digits = {"s": 2, "%": 0}.get(unit, 0)
    return f"{value:.{digits}f} {unit}".strip()


def _target(figure: Figure) -> str:
    return f"at {'least' if figure.at_least else 'most'} {figure.target:g} {figure.unit}".strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_harness", description="What the harness itself costs.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the figures as Markdown, pass or not")
    parser.add_argument("--only", metavar="WORD", help=f"only those whose name holds WORD: {', '.join(MEASURES)}")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it works: its figures mean nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
