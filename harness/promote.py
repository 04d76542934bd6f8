"""Copy records and their scores from a runs folder into results/, as evidence: ``python -m harness.promote [RUNS] [--to results]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import HarnessError, StoreError
from harness.record import Record
from harness.store import Stored, load, save_score, write_at_once


def main(arguments: Sequence[str] | None = None) -> int:
    """Promote what can be promoted and say what cannot and why. Exit code 0, 2 for a mistake, 6 when nothing could be promoted."""
    parser = argparse.ArgumentParser(prog="python -m harness.promote", description=__doc__)
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs"), help="where the records are (default: runs)")
    parser.add_argument("--to", type=Path, default=Path("results"), help="where evidence is kept (default: results)")
    options = parser.parse_args(arguments)
    try:
        promoted, refused = promote(options.runs, options.to)
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in refused:
        print(f"left out: {line}", file=sys.stderr)
    print(f"{len(promoted)} record(s) promoted to {options.to}")
    return 0 if promoted else 6


def promote(runs: Path, to: Path) -> tuple[list[Path], list[str]]:
    """Copy every record of ``runs`` that came from a committed tree, byte for byte, and its scores.

    Returns what was copied and, for the others, why not. Raises StoreError when ``runs`` is no folder or holds unreadable files.
    """
    if not runs.is_dir():
        raise StoreError(f"{runs}: there is no such folder; name the folder that a sweep wrote to (runs=…)")
    results = load(runs)
    if results.problems:
        raise StoreError("\n".join(results.problems))
    promoted, refused = [], []
    for stored in results.stored:
        reason = _refusal(stored.record)
        if reason:
            refused.append(f"{stored.path}: {reason}")
            continue
        promoted.append(_copy(runs, to, stored))
    return promoted, refused


def _refusal(record: Record) -> str | None:
    if record.provenance.dirty:
        return "its tree had uncommitted changes, so nobody can reproduce it"
    return None


def _copy(runs: Path, to: Path, stored: Stored) -> Path:
    target = to / stored.path
    content = (runs / stored.path).read_bytes()
    if target.exists() and target.read_bytes() != content:
        raise StoreError(f"{target}: there already, with other content; evidence is never overwritten")
    write_at_once(target, content)
    for score in filter(None, (stored.score, stored.base_score)):
        save_score(score, to)
    return target


if __name__ == "__main__":
    sys.exit(main())
