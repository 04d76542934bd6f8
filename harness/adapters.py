"""Trained weights between training and scoring: kept by content under the store's root."""

from __future__ import annotations

import shutil
from pathlib import Path

from harness.errors import HarnessError
from harness.events import Event
from harness.record import TRAINED, Record
from harness.store import writing
from harness.weights import adapter_sha256


def adapter_folder(root: Path, adapter_sha256: str) -> Path:
    """Where the weights with this hash are kept until they are scored, or for good with ``keep=adapters``."""
    return root / "adapters" / adapter_sha256[:16]


def keep_for_good(root: Path, adapter_sha256: str) -> None:
    """Somebody asked for these weights (``keep=adapters``): no sweep that ends in the same ones deletes them any more."""
    mark = _mark(root, adapter_sha256)
    with writing(mark):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def is_kept_for_good(root: Path, adapter_sha256: str) -> bool:
    """Whether ``keep_for_good`` was said of these weights since they were made."""
    return _mark(root, adapter_sha256).exists()


def _mark(root: Path, adapter_sha256: str) -> Path:
    return root / "kept" / adapter_sha256[:16]


def drop_adapter(root: Path, adapter_sha256: str) -> None:
    """Delete these weights; killed halfway, nothing is left that looks like weights."""
    folder, away = adapter_folder(root, adapter_sha256), root / "work" / "dropped"
    with writing(folder):
        away.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(away / folder.name, ignore_errors=True)
        folder.rename(away / folder.name)
    shutil.rmtree(away, ignore_errors=True)


def has_its_adapter(last: Event, work: Path, root: Path) -> bool:
    """Whether the weights of a finished worker are there and whole."""
    if last["event"] == "failed":
        return True
    made = work / "adapter"
    if not made.is_dir():
        return adapter_folder(root, last["adapter_sha256"]).is_dir()
    try:
        return adapter_sha256(made) == str(last["adapter_sha256"])
    except HarnessError:
        return False


def keep_adapter(work: Path, root: Path, record: Record) -> None:
    """Adapters are kept by content: repeats that end in the same weights share one. What a failed cell left is of no use; what one left
    whose times are not to be trusted is as good as any.
    """
    sha = record.measurement.artifacts.adapter_sha256 if record.measurement else None
    if record.status in TRAINED and sha is not None:
        target = adapter_folder(root, sha)
        if (work / "adapter").exists() and not target.exists():
            _mark(root, sha).unlink(missing_ok=True)  # of weights that somebody has deleted
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                (work / "adapter").rename(target)
    shutil.rmtree(work / "adapter", ignore_errors=True)
