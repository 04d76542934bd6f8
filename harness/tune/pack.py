"""``python -m harness.tune.pack OUT FOLDER ...``: the records of a grid in one compressed file, which is how a grid is committed."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.errors import HarnessError, RecordError, StoreError
from harness.record import Record, loads
from harness.store import load, write_at_once

SUFFIX = ".jsonl.gz"
USAGE = """python -m harness.tune.pack OUT.jsonl.gz PLACE [PLACE ...]

Every record under the places, folders (lanes of one grid) or packed files, as a line of OUT, which python -m harness.tune.replay reads."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack; returns 0, 2 for a wrong command, 6 where there is nothing to pack."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) < 2 or not words[0].endswith(SUFFIX):
        print(USAGE)
        return 2
    try:
        places = [records_of(Path(word)) for word in words[1:]]
        records = list({(one.cell.key, one.provenance.started_utc): one for found, _ in places for one in found}.values())
        for problem in (problem for _, problems in places for problem in problems):
            print(f"warning: left out: {problem}", file=sys.stderr)
        if not records:
            print("no records", file=sys.stderr)
            return 6
        write(Path(words[0]), records)
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, StoreError) else 6
    print(f"{len(records)} records in {words[0]}")
    return 0


def write(path: Path, records: Iterable[Record]) -> None:
    """The same records make the same bytes."""
    lines = [json.dumps(record.model_dump(mode="json"), sort_keys=True, separators=(",", ":")) for record in records]
    write_at_once(path, gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))


def read(path: Path) -> list[Record]:
    """What ``write`` wrote. Raises RecordError naming file and line."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise RecordError(f"{path.name}: cannot be read: {error}; restore it from git") from error
    return [loads(line, f"{path.name}:{number}") for number, line in enumerate(lines, 1)]


def records_of(place: Path) -> tuple[list[Record], tuple[str, ...]]:
    """The records of a folder or of a packed file, and what could not be read. Raises HarnessError where there is no such place."""
    if place.is_file():
        return read(place), ()
    if not place.is_dir():
        raise HarnessError(f"there is no {place}: expected a folder of records, or a file *{SUFFIX}")
    results = load(place)
    return [stored.record for stored in results.stored], results.problems


if __name__ == "__main__":
    sys.exit(main())
