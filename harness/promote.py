"""Copy records and their scores from a runs folder into results/, as evidence: ``python -m harness.promote [RUNS] [--to results]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import HarnessError, StoreError
from harness.exits import leave_with
from harness.record import Record
from harness.store import Results, Stored, load, pair_path, rounding_path, save_floor, save_pair, save_rounding, save_score, write_at_once


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
    """Copy every record of ``runs`` that came from a committed tree, byte for byte, its scores, its floor, and what its verdict needs.

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
    _copy_pairs(results, to)
    _copy_roundings(results, to)
    _copy_floors(results, to)
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


def _copy_pairs(results: Results, to: Path) -> None:
    """What is known of the updates of the promoted records; what is known already stays: measured again, its last digits differ."""
    clean = [stored.record.measurement for stored in results.stored if not _refusal(stored.record)]
    promoted = {measurement.artifacts.adapter_sha256 for measurement in clean if measurement}
    for pair in results.updates.values():
        known = pair_path(to, pair.start_sha256, *pair.trained_sha256).exists()
        if promoted.issuperset(pair.trained_sha256) and not known:
            save_pair(pair, to)


def _copy_roundings(results: Results, to: Path) -> None:
    """How far rounding moves first losses of the promoted records; what is known already stays, as of pairs."""
    clean = [stored.record.measurement for stored in results.stored if not _refusal(stored.record)]
    promoted = {(one.artifacts.base_sha256, sha) for one in clean if one for sha in one.steps.stream_sha256[:1]}
    for key in sorted(promoted & set(results.roundings)):
        if not rounding_path(to, *key).exists():
            save_rounding(results.roundings[key], to)


def _copy_floors(results: Results, to: Path) -> None:
    """What the promoted records are held against."""
    clean = [stored.record for stored in results.stored if not _refusal(stored.record)]
    for key in sorted({(record.machine.key, record.cell.workload.key) for record in clean} & set(results.floors)):
        save_floor(results.floors[key], to)


if __name__ == "__main__":
    leave_with(main)
