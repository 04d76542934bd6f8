"""``python -m harness.report``: from stored results to report.html, report.md, a table or JSON rows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import HarnessError, StoreError
from harness.exits import leave_with
from harness.report.judged import judged
from harness.report.page import save_one, write
from harness.report.text import rows, table
from harness.store import Results, load

DEFAULT_ROOTS = ("results", "runs")
OK, USAGE, NOTHING_MEASURED = 0, 2, 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 2 when a folder is missing or cannot be written, or 6 when nothing measured was found."""
    options = _parser().parse_args(arguments)
    try:
        roots = _roots(options.roots)
        results = load(*roots)
        if results.stored:
            _report(results, options.format, options.out)
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    for problem in results.problems:
        print(f"warning: left out: {problem}", file=sys.stderr)
    if any(stored.record.status == "ok" and stored.record.measurement for stored in results.stored):
        return OK
    searched = ", ".join(map(str, roots)) or "nowhere: there is no folder results or runs here"
    found = f"{len(results.stored)} records, none of a run that ended ok" if results.stored else "no records"
    print(f"nothing measured: {found} (searched: {searched}); measure something with: python -m harness -m +sweep=demo", file=sys.stderr)
    return NOTHING_MEASURED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.report", description="Rank and report what was measured.")
    parser.add_argument("roots", nargs="*", type=Path, metavar="ROOT", help="folders of records (default: results and runs, if they exist)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where report.html and report.md are written (default: runs)")
    parser.add_argument(
        "--format",
        choices=["all", "html", "md", "json", "text"],
        default="all",
        help="html, md: write that file; json, text: print rows or the table; all: write both files, print the table (default)",
    )
    return parser


def _roots(given: Sequence[Path]) -> list[Path]:
    missing = [str(root) for root in given if not root.is_dir()]
    if missing:
        raise StoreError(f"no such folder: {', '.join(missing)}; give folders that hold records, for example runs")
    return list(given) or [Path(name) for name in DEFAULT_ROOTS if Path(name).is_dir()]


def _report(results: Results, format_: str, out: Path) -> None:
    if format_ == "json":
        print(json.dumps(rows(results), indent=1, allow_nan=False))
        return
    if format_ == "text":
        print(table(results))
        return
    if format_ == "all":
        groups = judged(results)
        print(table(results, groups))
        path = write(results, out, groups)
    else:
        path = save_one(results, out, f"report.{format_}")
    print(f"report: {path}")


if __name__ == "__main__":
    leave_with(main)
