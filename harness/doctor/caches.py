"""What lies in the cache, whose it is, and deleting it: only entries that prepare made and can make again."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness.doctor.finding import Finding
from harness.doctor.hardware import GIB
from harness.errors import ConfigError, StoreError, nearest
from harness.record import Record
from harness.store import load
from harness.turns import turn

Kind = Literal["base", "adapter", "tokens", "unfinished"]
KINDS: tuple[Kind, ...] = ("base", "adapter", "tokens", "unfinished")
NAMES: dict[Kind, str] = {"base": r"[0-9a-f]{20}", "adapter": r".+-seed\d+-\d+", "tokens": r"[0-9a-f]{64}\.safetensors"}
MANIFEST = "manifest.json"
LEAST_FREE_BYTES = 2 * GIB  # the demo's base, tokens, adapters and records take less than half of it


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in the cache. ``used`` is when it was made or last read (seconds since the epoch), ``about`` what is known of it."""

    kind: Kind
    name: str
    path: Path
    num_bytes: int
    used: float
    about: str

    @property
    def age(self) -> str:
        """``3 days``, in the largest unit that fits."""
        seconds = max(0.0, time.time() - self.used)
        for unit, size in (("day", 86_400), ("hour", 3600), ("minute", 60)):
            if seconds >= size:
                count = int(seconds // size)
                return f"{count} {unit}{'s' if count > 1 else ''}"
        return "now"


def storage_findings(runs: Path, cache: Path) -> list[Finding]:
    """Free disk where records and caches go, and how much the cache holds."""
    held = entries(cache, runs)
    size = sum(entry.num_bytes for entry in held)
    kept = f"{len(held)} entries, {size / GIB:.2f} GiB in {cache} (python -m harness.doctor --cache)"
    return [_disk("runs", runs), _disk("cache", cache), Finding("storage", "cached", "ok", kept)]


def entries(cache: Path, runs: Path) -> list[Entry]:
    """Everything in ``cache`` that may be deleted, the largest first; ``runs`` holds the records that say what used it."""
    users = _users(runs)
    found = [_entry(kind, path, users) for kind in KINDS for path in _paths(cache, kind)]
    return sorted(found, key=lambda entry: (-entry.num_bytes, entry.name))


def select(held: Sequence[Entry], what: str) -> list[Entry]:
    """The entries that ``what`` means: ``all``, a kind, or the beginning of a name. Raises ConfigError when it means none."""
    if what == "all" or what in KINDS:
        return [entry for entry in held if what in ("all", entry.kind)]
    found = [entry for entry in held if entry.name.startswith(what)]
    if not found:
        known = [*KINDS, "all", *(entry.name for entry in held)]
        raise ConfigError(f"--purge {what}: no such kind or entry; {nearest(what, known)}")
    return found


def purge(chosen: Iterable[Entry], cache: Path, runs: Path) -> None:
    """Delete ``chosen``. Raises StoreError, before anything is deleted, while a sweep is at work in ``runs``."""
    if not (runs / "work").is_dir():
        _delete(chosen, cache)
        return
    with turn(runs, lambda: _refuse(runs)):
        _delete(chosen, cache)


def _refuse(runs: Path) -> None:
    raise StoreError(f"a sweep is at work in {runs} and may need these entries; purge when it has ended. Nothing was deleted")


def _delete(chosen: Iterable[Entry], cache: Path) -> None:
    chosen = list(chosen)
    for entry in chosen:
        if not entry.path.resolve().is_relative_to(cache.resolve()):
            raise StoreError(f"{entry.path} leads out of {cache}: remove the link yourself. Nothing was deleted")
    for entry in chosen:
        try:
            if entry.path.is_dir():
                shutil.rmtree(entry.path)
            else:
                entry.path.unlink()
        except OSError as error:
            raise StoreError(f"{entry.path}: cannot be deleted ({error.strerror}); change its rights or delete it yourself") from error


def _paths(cache: Path, kind: Kind) -> list[Path]:
    if kind == "unfinished":
        return [path for folder in NAMES for path in (cache / folder).glob("*.partial")]
    return [path for path in (cache / kind).glob("*") if re.fullmatch(NAMES[kind], path.name)]


def _entry(kind: Kind, path: Path, users: dict[str, set[str]]) -> Entry:
    files = [file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    manifest = _manifest(path)
    content = str(manifest.get(f"{kind}_sha256", path.stem))
    facts = [str(manifest.get("description", "")), *sorted(users.get(content, ()))]
    return Entry(
        kind,
        path.name,
        path,
        sum(file.stat().st_size for file in files),
        _last_used(path, files),
        ", ".join(fact for fact in facts if fact) or "used by no record here",
    )


def _last_used(path: Path, files: Sequence[Path]) -> float:
    """The manifest is left out: the doctor reads it."""
    status = [file.stat() for file in files if file.name != MANIFEST]
    return max((max(one.st_mtime, one.st_atime) for one in status), default=path.stat().st_mtime)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((path / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}  # tokens have none; of a broken one the name is all there is to show


def _users(runs: Path) -> dict[str, set[str]]:
    """The workloads that used a content hash, from the records of ``runs``."""
    users: dict[str, set[str]] = {}
    for record in (stored.record for stored in load(runs).stored):
        for content in _contents(record):
            users.setdefault(content, set()).add(record.cell.workload.label)
    return users


def _contents(record: Record) -> list[str]:
    if record.measurement is None:
        return []
    made = record.measurement.artifacts
    return [made.tokens_sha256, made.base_sha256, *filter(None, [made.adapter_init_sha256])]


def _disk(name: str, folder: Path) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    found = f"{free / GIB:.1f} GiB free at {folder}"
    if free >= LEAST_FREE_BYTES:
        return Finding("storage", name, "ok", found)
    remedy = (
        f"free {(LEAST_FREE_BYTES - free) / GIB:.1f} GiB (python -m harness.doctor --purge all), or choose another folder with {name}=DIR"
    )
    return Finding("storage", name, "problem", found, remedy, blocks=True)
