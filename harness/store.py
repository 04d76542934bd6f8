"""Records and scores on disk: one immutable JSON file each, written at once or not at all, found again by content."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from harness.engine import Machine
from harness.errors import ConfigError, RecordError, StoreError
from harness.floor import Floor, Floors
from harness.record import Record, Score, dumps, loads, loads_score
from harness.rounding import Rounding, Roundings
from harness.spec import Cell, parse
from harness.tuned import FOLDER as TUNED
from harness.tuned import Tuned
from harness.tuned import read as read_tuned
from harness.updates import UpdatePair, Updates, pair_key

SCORES = "scores"  # <root>/scores/<base>-<tokens>/<adapter or base>.json
UPDATES = "updates"  # <root>/updates/<start>/<weights>-<weights>.json
ROUNDINGS = "rounding"  # <root>/rounding/<base>-<tokens of the first step>.json
FLOORS = "limits"  # <root>/limits/<machine>/<workload>.json
# Folders of a root that hold no records of its own; ``checks`` holds those of checks, a root for each tree.
INTERNAL = ("work", "adapters", "kept", "checks", SCORES, UPDATES, ROUNDINGS, FLOORS, TUNED)


ScoreKey = tuple[str, str, str | None]  # base, tokens, weights (None: the base itself)


@dataclass(frozen=True, slots=True)
class Stored:
    """A record, where it lies (relative to its root), and the scores of its weights and of its base, where they are known."""

    record: Record
    path: str
    score: Score | None
    base_score: Score | None


@dataclass(frozen=True, slots=True)
class Results:
    """All that could be read, oldest first, one message for every file that could not, the pairs of updates that were compared, the
    floors that were measured, what searches found, and how far rounding moves first losses.
    """

    stored: tuple[Stored, ...]
    problems: tuple[str, ...]
    updates: Updates = field(default_factory=dict)
    floors: Floors = field(default_factory=dict)
    tuned: tuple[Tuned, ...] = ()
    roundings: Roundings = field(default_factory=dict)


def save(record: Record, root: Path) -> Path:
    """Write ``record`` to its place under ``root``. Raises StoreError when that cannot be done."""
    folder = _folder(root, record.machine, record.cell)
    started = datetime.fromisoformat(record.provenance.started_utc)
    name = f"{started:%Y%m%dT%H%M%S}.{started.microsecond // 1000:03d}Z-{record.provenance.commit[:8]}"
    return write_at_once(folder / f"{name}.json", dumps(record).encode())


def save_score(score: Score, root: Path) -> Path:
    """Write ``score`` to its place under ``root``. Raises StoreError when that cannot be done."""
    return write_at_once(score_path(root, score.base_sha256, score.tokens_sha256, score.adapter_sha256), dumps(score).encode())


def score_path(root: Path, base_sha256: str, tokens_sha256: str, adapter_sha256: str | None) -> Path:
    """Where the score of these weights on these held-out rows lies; ``adapter_sha256`` None: of the base itself."""
    name = adapter_sha256[:16] if adapter_sha256 else "base"
    return root / SCORES / f"{base_sha256[:12]}-{tokens_sha256[:12]}" / f"{name}.json"


def save_pair(pair: UpdatePair, root: Path) -> Path:
    """Write ``pair`` to its place under ``root``. Raises StoreError when that cannot be done."""
    return write_at_once(pair_path(root, pair.start_sha256, *pair.trained_sha256), (pair.model_dump_json(indent=1) + "\n").encode())


def save_rounding(rounding: Rounding, root: Path) -> Path:
    """Write ``rounding`` to its place under ``root``. Raises StoreError when that cannot be done."""
    path = rounding_path(root, rounding.base_sha256, rounding.stream_sha256)
    return write_at_once(path, (rounding.model_dump_json(indent=1) + "\n").encode())


def rounding_path(root: Path, base_sha256: str, stream_sha256: str) -> Path:
    """Where lies how far rounding moves the loss of this base over the tokens of this step."""
    return root / ROUNDINGS / f"{base_sha256[:12]}-{stream_sha256[:12]}.json"


def save_floor(floor: Floor, root: Path) -> Path:
    """Write ``floor`` to its place under ``root``; a later one replaces it. Raises StoreError when that cannot be done."""
    return write_at_once(root / FLOORS / floor.machine / f"{floor.workload}.json", (floor.model_dump_json(indent=1) + "\n").encode())


def pair_path(root: Path, start_sha256: str, one_sha256: str, other_sha256: str) -> Path:
    """Where lies what is known of the updates of two sets of weights."""
    start, first, second = pair_key(start_sha256, one_sha256, other_sha256)
    return root / UPDATES / start[:12] / f"{first[:16]}-{second[:16]}.json"


def read_pair(path: Path, source: str) -> UpdatePair:
    """The pair in ``path``. Raises RecordError naming ``source``."""
    try:
        return parse(UpdatePair, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        raise RecordError(f"{source}: not a valid pair of updates; delete it and run the sweep again: {error}") from error


def read_rounding(path: Path, source: str) -> Rounding:
    """The rounding in ``path``. Raises RecordError naming ``source``."""
    try:
        return parse(Rounding, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        raise RecordError(f"{source}: not a valid rounding of a first loss; delete it and run the sweep again: {error}") from error


def recorded(root: Path, machine: Machine, cell: Cell) -> list[Record]:
    """The records of one cell on one machine, oldest first, without reading any other; :func:`load` names the unreadable ones."""
    records = []
    for path in _json_files(_folder(root, machine, cell), "*.json"):
        with contextlib.suppress(RecordError):
            records.append(_read_record(path, path.name))
    return sorted(records, key=lambda record: record.provenance.started_utc)


def check_writable(root: Path) -> None:
    """Raises StoreError when nothing can be written under ``root``: better before a long run than after it."""
    probe = root / "work" / f".{os.getpid()}.writable"
    write_at_once(probe, b"yes\n")
    with writing(probe.parent):
        probe.unlink()


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """What the operating system refuses inside the block becomes a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{place}: cannot write ({error.strerror}); free some space or choose another folder with runs=…") from error


def write_at_once(path: Path, content: bytes) -> Path:
    """Write ``path`` so that it appears complete or not at all, whatever is killed or full. Raises StoreError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path.parent):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
    return path


def load(*roots: Path) -> Results:
    """Read every record under ``roots``, each joined with its scores from any of them."""
    read_scores, problems = _all(roots, SCORES, "*/*.json", _read_score)
    scores = {(score.base_sha256, score.tokens_sha256, score.adapter_sha256): score for score in read_scores}
    stored = []
    for root in roots:
        for path in _record_files(root):
            relative = path.relative_to(root).as_posix()
            try:
                record = _read_record(path, f"{root.name}/{relative}")
            except RecordError as error:
                problems.append(str(error))
                continue
            stored.append(_join(record, relative, scores))
    stored.sort(key=lambda entry: (entry.record.provenance.started_utc, entry.path))
    pairs, unread_pairs = _all(roots, UPDATES, "*/*.json", read_pair)
    floors, unread_floors = _all(roots, FLOORS, "*/*.json", _read_floor)
    roundings, unread_roundings = _all(roots, ROUNDINGS, "*.json", read_rounding)
    tuned, unread_tuned = _all(roots, TUNED, "*/*.yaml", _read_tuned)
    return Results(
        stored=tuple(stored),
        problems=(*problems, *unread_pairs, *unread_floors, *unread_tuned, *unread_roundings),
        updates={pair_key(pair.start_sha256, *pair.trained_sha256): pair for pair in pairs},
        floors={(floor.machine, floor.workload): floor for floor in floors},
        tuned=tuple(tuned),
        roundings={(one.base_sha256, one.stream_sha256): one for one in roundings},
    )


def commit_of(tree: Path) -> tuple[str, bool]:
    """The commit of ``tree`` and whether it has uncommitted changes; a file ``.commit`` speaks for a tree whose git does not answer."""
    commit = _git(tree, "rev-parse", "HEAD")
    if commit is not None:
        return commit, bool(_git(tree, "status", "--porcelain", "--untracked-files=no"))
    stamp = tree / ".commit"
    return (stamp.read_text(encoding="utf-8").strip(), False) if stamp.is_file() else ("unknown", True)


def _git(tree: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(tree), *arguments], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _folder(root: Path, machine: Machine, cell: Cell) -> Path:
    return root / machine.key / cell.workload.label / f"{cell.engine.name}-{cell.key}"


def _read_record(path: Path, source: str) -> Record:
    try:
        return loads(path.read_text(encoding="utf-8"), source)
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(f"{source}: cannot be read: {error}; delete it or restore it from git") from error


def _read_score(path: Path, source: str) -> Score:
    try:
        return loads_score(path.read_text(encoding="utf-8"), source)
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(f"{source}: cannot be read: {error}; delete it and run the sweep again") from error


def _read_floor(path: Path, source: str) -> Floor:
    try:
        return parse(Floor, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        raise RecordError(f"{source}: not a valid floor; measure it again (harness.limit): {error}") from error


def _json_files(folder: Path, pattern: str) -> list[Path]:
    """What is hidden is a file that somebody was writing."""
    return [path for path in sorted(folder.glob(pattern)) if not path.name.startswith(".")]


def _record_files(root: Path) -> Iterable[Path]:
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.is_dir() and folder.name not in INTERNAL and not folder.name.startswith("."):
            yield from _json_files(folder, "*/*/*.json")


T = TypeVar("T")


def _all(roots: Iterable[Path], folder: str, pattern: str, read: Callable[[Path, str], T]) -> tuple[list[T], list[str]]:
    """What ``read``, which raises RecordError, makes of every such file, and a message for each that it cannot read."""
    found, problems = [], []
    for root in roots:
        for path in _json_files(root / folder, pattern):
            try:
                found.append(read(path, f"{root.name}/{path.relative_to(root).as_posix()}"))
            except RecordError as error:
                problems.append(str(error))
    return found, problems


def _read_tuned(path: Path, source: str) -> Tuned:
    try:
        return read_tuned(path)
    except ConfigError as error:
        raise RecordError(f"{Path(source).parent.as_posix()}/{error}") from error


def _join(record: Record, path: str, scores: Mapping[ScoreKey, Score]) -> Stored:
    if record.measurement is None:
        return Stored(record, path, None, None)
    made = record.measurement.artifacts
    base = scores.get((made.base_sha256, made.tokens_sha256, None))
    score = scores.get((made.base_sha256, made.tokens_sha256, made.adapter_sha256)) if made.adapter_sha256 else None
    return Stored(record, path, score, base)
