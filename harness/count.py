"""``python -m harness.count --out FILE [OVERRIDE …]``: run the first steps of one cell and count what each costs; nothing is timed."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.compose import searchpath
from harness.config import Request, requests
from harness.errors import ConfigError, HarnessError
from harness.exits import leave_with
from harness.gates import Counted, Counts, counted_part
from harness.launch import run_cell, unsupported
from harness.plan import plan
from harness.preparing import prepared
from harness.record import Record
from harness.spec import parse
from harness.store import write_at_once

OK, USAGE, NOT_COUNTED = 0, 2, 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the counted run to FILE. Returns 0, 2 for a mistake, 5 when the cell did not end ok (FILE has the reason)."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        if options.config_dir:
            options.overrides.insert(0, searchpath(options.config_dir))
        settings, found = requests(options.overrides, multirun=None)
        counted = _count(found[0], Path(settings.cache).expanduser().resolve())
        write_at_once(options.out.resolve(), (counted.model_dump_json(indent=1) + "\n").encode())
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    if counted.counts is None:
        print(f"{counted.record.status}: {counted.record.reason}", file=sys.stderr)
        return NOT_COUNTED
    print(f"counted {len(counted.counts.peak_bytes)} steps: {options.out}")
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.count", description="Count what the first steps of one cell cost.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the counted run is written, as JSON")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder of your own options, as of python -m harness")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as of python -m harness, without sweeps")
    return parser


def _count(asked: Request, cache: Path) -> Counted:
    request = asked.model_copy(update={"cell": asked.cell.model_copy(update={"workload": counted_part(asked.cell.workload)})})
    planned = plan([request], [], "all")[0]
    if planned.action == "unsupported":
        return Counted(record=unsupported(request, planned.machine, str(planned.reason)), counts=None)
    with tempfile.TemporaryDirectory() as work:
        place = prepared(request, str(cache), Path(work), held=None, say=print)
        counts = Path(work) / "counts.json"
        record = run_cell(request, planned.machine, place, Path(work), lambda event: None, counts=counts)
        return Counted(record=record, counts=_read(counts, record))


def _read(counts: Path, record: Record) -> Counts | None:
    if record.status != "ok":
        return None
    try:
        return parse(Counts, json.loads(counts.read_text(encoding="utf-8")))
    except OSError as error:
        name = record.cell.engine.name
        raise ConfigError(f"engine {name} left no counts: its interpreter runs a harness that cannot count ({error.strerror})") from error


if __name__ == "__main__":
    leave_with(main)
