"""Records and scores on disk: one immutable JSON file each, written at once or not at all, found again by content."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from harness.errors import RecordError, StoreError
from harness.record import Record, Score, dumps, loads, loads_score

SCORES = "scores"  # <root>/scores/<base>-<tokens>/<adapter or base>.json
INTERNAL = ("work", "adapters", SCORES)  # folders of a root that hold no records


@dataclass(frozen=True, slots=True)
class Stored:
    """A record, where it lies (relative to its root), and the scores of its weights and of its base, where they are known."""

    record: Record
    path: str
    score: Score | None
    base_score: Score | None


@dataclass(frozen=True, slots=True)
class Results:
    """All that could be read, oldest first, and one message for every file that could not."""

    stored: tuple[Stored, ...]
    problems: tuple[str, ...]


def save(record: Record, root: Path) -> Path:
    """Write ``record`` to its place under ``root``. Raises StoreError when that cannot be done."""
    folder = root / record.machine.key / record.cell.workload.label / f"{record.cell.engine.name}-{record.cell.key}"
    started = datetime.fromisoformat(record.provenance.started_utc)
    name = f"{started:%Y%m%dT%H%M%S}.{started.microsecond // 1000:03d}Z-{record.provenance.commit[:8]}"
    return _write(folder / f"{name}.json", dumps(record))


def save_score(score: Score, root: Path) -> Path:
    """Write ``score`` to its place under ``root``. Raises StoreError when that cannot be done."""
    return _write(score_path(root, score.base_sha256, score.tokens_sha256, score.adapter_sha256), dumps(score))


def score_path(root: Path, base_sha256: str, tokens_sha256: str, adapter_sha256: str | None) -> Path:
    """Where the score of these weights on these held-out rows lies; ``adapter_sha256`` None: of the base itself."""
    name = adapter_sha256[:16] if adapter_sha256 else "base"
    return root / SCORES / f"{base_sha256[:12]}-{tokens_sha256[:12]}" / f"{name}.json"


def load(*roots: Path) -> Results:
    """Read every record under ``roots``, each joined with its scores from any of them."""
    scores, problems = _scores(roots)
    stored = []
    for root in roots:
        for path in _record_files(root):
            relative = path.relative_to(root).as_posix()
            try:
                record = loads(path.read_text(encoding="utf-8"), f"{root.name}/{relative}")
            except (RecordError, OSError, UnicodeDecodeError) as error:
                problems.append(str(error))
                continue
            stored.append(_join(record, relative, scores))
    stored.sort(key=lambda entry: (entry.record.provenance.started_utc, entry.path))
    return Results(tuple(stored), tuple(problems))


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


def _write(path: Path, text: str) -> Path:
    """Appear at once under a name that was not there before, or raise."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise StoreError(f"{path.parent}: cannot write ({error.strerror}); free some space or choose another folder with runs=…") from error
    return path


def _record_files(root: Path) -> Iterable[Path]:
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.is_dir() and folder.name not in INTERNAL and not folder.name.startswith("."):
            yield from (path for path in sorted(folder.glob("*/*/*.json")) if not path.name.startswith("."))


ScoreKey = tuple[str, str, str | None]


def _scores(roots: Iterable[Path]) -> tuple[dict[ScoreKey, Score], list[str]]:
    scores: dict[ScoreKey, Score] = {}
    problems = []
    for root in roots:
        for path in sorted((root / SCORES).glob("*/*.json")):
            if path.name.startswith("."):
                continue
            try:
                score = loads_score(path.read_text(encoding="utf-8"), f"{root.name}/{path.relative_to(root).as_posix()}")
            except (RecordError, OSError, UnicodeDecodeError) as error:
                problems.append(str(error))
                continue
            scores[score.base_sha256, score.tokens_sha256, score.adapter_sha256] = score
    return scores, problems


def _join(record: Record, path: str, scores: dict[ScoreKey, Score]) -> Stored:
    if record.measurement is None:
        return Stored(record, path, None, None)
    made = record.measurement.artifacts
    base = scores.get((made.base_sha256, made.tokens_sha256, None))
    score = scores.get((made.base_sha256, made.tokens_sha256, made.adapter_sha256)) if made.adapter_sha256 else None
    return Stored(record, path, score, base)
