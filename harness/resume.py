"""Where a cell that was cut short goes on: its checkpoints, and the steps that earlier processes logged until the last of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from harness.config import Request
from harness.engine import Machine
from harness.errors import ConfigError
from harness.events import Event, EventReader
from harness.places import Prepared, Saving, WorkerJob
from harness.record import Status
from harness.spec import parse
from harness.store import write_at_once, writing

_CUT_SHORT: frozenset[Status] = frozenset({"timeout", "no_progress", "crash", "oom_host", "contended"})
_STEPS, _IDENTITY = "steps.jsonl", "made-by.txt"
_SAVED = re.compile(r"step-(\d{8})")


def saving(request: Request, machine: Machine, prepared: Prepared, fingerprint: str, root: Path, work: Path) -> Saving | None:
    """Where ``request`` saves its state and from where it goes on, None when it saves none. Ask before ``work``, the cell's folder, is
    cleared: the log of the process that was cut short is there.

    What another engine, or one that has changed since, or other data left is deleted. The last checkpoint counts whose steps are all in
    the log.
    """
    if request.save_every is None:
        return None
    folder = root / "checkpoints" / f"{machine.key}-{request.cell.key}"
    identity = " ".join([fingerprint, Path(prepared.tokens).stem, prepared.base_sha256, str(prepared.adapter_init_sha256)])
    with writing(folder):
        if _text(folder / _IDENTITY) != identity:
            shutil.rmtree(folder, ignore_errors=True)
        logged, at = _logged(folder, work)
        made = max((number for number in _saved(folder) if number <= len(logged)), default=0)
        write_at_once(folder / _STEPS, "".join(f"{json.dumps(event)}\n" for event in logged[:made]).encode())
        write_at_once(folder / _IDENTITY, identity.encode())
    resumed_at = (*(step for step in at if step < made), made) if made else ()
    return Saving(folder=str(folder), every=request.save_every, made=made, resumed_at=resumed_at)


def steps_before(saving: Saving | None) -> list[Event]:
    """The step events of the processes before this one."""
    return [] if saving is None else _kept(Path(saving.folder))[: saving.made]


def end(saving: Saving | None, status: Status) -> None:
    """Checkpoints of a cell that was not cut short are of no more use."""
    if saving is not None and status not in _CUT_SHORT:
        shutil.rmtree(saving.folder, ignore_errors=True)


def _logged(folder: Path, work: Path) -> tuple[list[Event], Sequence[int]]:
    """Every step event so far, and the steps at which a new process began."""
    kept = _kept(folder)
    try:
        before = parse(WorkerJob, json.loads((work / "job.json").read_text(encoding="utf-8"))).saving
    except (OSError, ValueError, ConfigError):
        return kept, ()  # the last process left nothing: killed while this was written, and everything is kept
    with EventReader(work / "events.jsonl") as reader:
        events = [event for event in reader.new() if event["event"] == "step"]
    return [*kept[: before.made if before else 0], *events], before.resumed_at if before else ()


def _kept(folder: Path) -> list[Event]:
    return [json.loads(line) for line in (_text(folder / _STEPS) or "").splitlines()]


def _saved(folder: Path) -> list[int]:
    """Steps after which the state is there; it is whole, because an engine renames what is complete."""
    return [int(found[1]) for path in folder.glob("step-*") if (found := _SAVED.fullmatch(path.name))]


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
