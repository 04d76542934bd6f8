"""Records and scores on disk: one immutable JSON file each, written at once or not at all, found again by content."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from harness.engine import Machine
from harness.errors import ConfigError, RecordError, StoreError
from harness.floor import Floor, FloorKey, Floors
from harness.record import Record, Score, dumps, loads, loads_score
from harness.spec import Cell, parse
from harness.tuned import FOLDER as TUNED
from harness.tuned import Tuned
from harness.tuned import read as read_tuned
from harness.updates import PairKey, UpdatePair, Updates, pair_key

SCORES = "scores"  # <root>/scores/<base>-<tokens>/<adapter or base>.json
UPDATES = "updates"  # <root>/updates/<start>/<weights>-<weights>.json
FLOORS = "limits"  # <root>/limits/<machine>/<workload>.json
# Folders of a root that hold no records of its own; ``checks`` holds those of checks, a root for each tree.
INTERNAL = ("work", "adapters", "kept", "checks", SCORES, UPDATES, FLOORS, TUNED)


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
    floors that were measured, and what searches found.
    """

    stored: tuple[Stored, ...]
    problems: tuple[str, ...]
    updates: Updates = field(default_factory=dict)
    floors: Floors = field(default_factory=dict)
    tuned: tuple[Tuned, ...] = ()


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
    scores, problems = _scores(roots)
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
    updates, unread = _pairs(roots)
    floors, unread_floors = _floors(roots)
    tuned, unread_tuned = _tuned(roots)
    return Results(tuple(stored), (*problems, *unread, *unread_floors, *unread_tuned), updates, floors, tuned)


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


def _json_files(folder: Path, pattern: str) -> list[Path]:
    """What is hidden is a file that somebody was writing."""
    return [path for path in sorted(folder.glob(pattern)) if not path.name.startswith(".")]


def _record_files(root: Path) -> Iterable[Path]:
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.is_dir() and folder.name not in INTERNAL and not folder.name.startswith("."):
            yield from _json_files(folder, "*/*/*.json")


ScoreKey = tuple[str, str, str | None]


def _scores(roots: Iterable[Path]) -> tuple[dict[ScoreKey, Score], list[str]]:
    scores: dict[ScoreKey, Score] = {}
    problems = []
    for root in roots:
        for path in _json_files(root / SCORES, "*/*.json"):
            try:
                score = _read_score(path, f"{root.name}/{path.relative_to(root).as_posix()}")
            except RecordError as error:
                problems.append(str(error))
                continue
            scores[score.base_sha256, score.tokens_sha256, score.adapter_sha256] = score
    return scores, problems


def _pairs(roots: Iterable[Path]) -> tuple[dict[PairKey, UpdatePair], list[str]]:
    pairs: dict[PairKey, UpdatePair] = {}
    problems = []
    for root in roots:
        for path in _json_files(root / UPDATES, "*/*.json"):
            try:
                pair = read_pair(path, f"{root.name}/{path.relative_to(root).as_posix()}")
            except RecordError as error:
                problems.append(str(error))
                continue
            pairs[pair_key(pair.start_sha256, *pair.trained_sha256)] = pair
    return pairs, problems


def _floors(roots: Iterable[Path]) -> tuple[dict[FloorKey, Floor], list[str]]:
    floors: dict[FloorKey, Floor] = {}
    problems = []
    for path in (path for root in roots for path in _json_files(root / FLOORS, "*/*.json")):
        try:
            floor = parse(Floor, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError, ConfigError) as error:
            problems.append(f"{FLOORS}/{path.parent.name}/{path.name}: not a valid floor; measure it again (harness.limit): {error}")
            continue
        floors[floor.machine, floor.workload] = floor
    return floors, problems


def _tuned(roots: Iterable[Path]) -> tuple[tuple[Tuned, ...], list[str]]:
    found, problems = [], []
    for path in (path for root in roots for path in _json_files(root / TUNED, "*/*.yaml")):
        try:
            found.append(read_tuned(path))
        except ConfigError as error:
            problems.append(f"{TUNED}/{path.parent.name}/{error}")
    return tuple(found), problems


def _join(record: Record, path: str, scores: dict[ScoreKey, Score]) -> Stored:
    if record.measurement is None:
        return Stored(record, path, None, None)
    made = record.measurement.artifacts
    base = scores.get((made.base_sha256, made.tokens_sha256, None))
    score = scores.get((made.base_sha256, made.tokens_sha256, made.adapter_sha256)) if made.adapter_sha256 else None
    return Stored(record, path, score, base)
