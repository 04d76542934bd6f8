"""Run a cell in a fresh process of the engine's own interpreter, watch it, stop it, and make its record."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness import resume
from harness.config import Request
from harness.endings import Ending, classify, doubted, last_lines
from harness.engine import Machine, declared_loss_norm
from harness.errors import ConfigError, HarnessError, StoreError, UnsupportedError
from harness.events import Event, EventReader, ending, measurement
from harness.guard import guarded
from harness.interpreter import environment
from harness.monitor import Monitor, monitoring
from harness.places import Prepared, WorkerJob
from harness.provenance import dated, provenance
from harness.ranks import logs_of_the_others, threads, worker_command
from harness.record import Artifacts, Record, Status
from harness.spec import Spec, parse
from harness.store import write_at_once, writing
from harness.watch import OnEvent, watch
from harness.weights import adapter_sha256

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_WORKER = {"TOKENIZERS_PARALLELISM": "false"}  # nothing is tokenised there, and a pool of threads is lost in a fork


def run_cell(
    request: Request,
    machine: Machine,
    prepared: Prepared,
    root: Path,
    on_event: OnEvent,
    *,
    held: int | None = None,
    earlier: Sequence[Record] = (),
    sweep: str | None = None,
    counts: Path | None = None,
) -> Record:
    """Run ``request`` and return its record; adapters of ok cells end under ``root``/adapters. Failure is a status, never an exception.

    ``held`` is the descriptor of our turn (see ``harness.turns``; None: nobody else is here), ``earlier`` what this cell is recorded as.
    ``counts``: count what each step costs, into this file; the record is then no timing, and none to store.
    Raises StoreError when nothing can be written under ``root``, or not as much as the trained weights will take.
    """
    work = _work(root, machine, request)
    came_from = provenance(request, sweep)
    came_from, notes = dated(came_from, earlier)
    saving = resume.saving(request, machine, prepared, came_from.engine_fingerprint, root, work)
    with writing(work):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _check_room(work, prepared)
    job = WorkerJob(
        cell=request.cell,
        machine=machine,
        prepared=prepared.model_copy(update={"notes": (*prepared.notes, *notes)}),
        provenance=came_from,
        out=str(work / "adapter"),
        events=str(work / "events.jsonl"),
        launched_monotonic=time.monotonic(),
        counts=None if counts is None else str(counts),
        saving=saving,
    )
    try:
        with contextlib.ExitStack() as stack:
            monitor = stack.enter_context(monitoring(_environment(request), machine.count)) if machine.device == "cuda" else None
            if monitor and (holder := monitor.busy()):
                return _record(job, "contended", f"{holder}; end it or wait for it, then run the same command again", 0.0, [])
            job = job.model_copy(update={"launched_monotonic": time.monotonic()})
            how, events = _run_worker(request, job, work, on_event, held, monitor)
    except UnsupportedError as error:
        return _record(job, "unsupported", str(error), 0.0, [])
    wall = time.monotonic() - job.launched_monotonic
    status, reason = classify(how, events, work)
    record = _record(job, status, reason, wall, events, monitor)
    _keep_adapter(work, root, record)
    resume.end(saving, record.status)
    return record


def recovered(request: Request, machine: Machine, root: Path, known: Sequence[Record]) -> Record | None:
    """The record that a sweep did not live to write: its worker had said how it ended. None when there is nothing of the kind.

    ``known``: what this cell is recorded as. What a worker left half done is not used: the cell runs again.
    """
    work = _work(root, machine, request)
    try:
        job = parse(WorkerJob, json.loads((work / "job.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, ConfigError):
        return None  # never started here, or by another version
    if any(record.provenance.started_utc == job.provenance.started_utc for record in known):
        return None
    with writing(work), EventReader(work / "events.jsonl") as reader:
        events = reader.new()
    last = ending(events)
    if last is None or reader.garbage is not None or not _has_its_adapter(last, work, root):
        return None
    status, reason = classify(Ending(None, 0), events, work)
    record = _record(job, status, reason, last["wall_seconds"], events)
    note = "recovered from the event log: the sweep was stopped before it could write this record"
    _keep_adapter(work, root, record)
    resume.end(job.saving, record.status)
    return record.model_copy(update={"notes": (*record.notes, note)})


def unsupported(request: Request, machine: Machine, reason: str) -> Record:
    """The record of a cell that cannot run, made without a process."""
    return Record(cell=request.cell, machine=machine, status="unsupported", reason=reason, provenance=provenance(request))


def run_door(module: str, job: Spec, job_path: Path, *, held: int | None, network: bool = False) -> None:
    """Run another door (prepare, score) in our interpreter on ``job``; its progress bar shows. Raises HarnessError with what it said.

    Only prepare may use the ``network``, to fetch a ``hub:`` source: what is measured or judged never depends on it.
    """
    write_at_once(job_path, job.model_dump_json(indent=1).encode())
    command = [sys.executable, "-m", module, str(job_path)]
    errors = job_path.with_suffix(".stderr")
    with writing(errors):
        stderr = errors.open("wb")
    with stderr, guarded(command, held=held, env=_with_tree({} if network else _OFFLINE), stderr=stderr) as process:
        code = process.wait()
    said = last_lines(errors)
    if code == 2:
        raise HarnessError(errors.read_text(errors="replace").strip())
    if code:
        raise HarnessError(f"{module} failed with exit code {code}:\n{said}")


def adapter_folder(root: Path, adapter_sha256: str) -> Path:
    """Where the weights with this hash are kept until they are scored, or for good with ``keep=adapters``."""
    return root / "adapters" / adapter_sha256[:16]


def drop_adapter(root: Path, adapter_sha256: str) -> None:
    """Delete these weights; killed halfway, nothing is left that looks like weights."""
    folder, away = adapter_folder(root, adapter_sha256), root / "work" / "dropped"
    with writing(folder):
        away.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(away / folder.name, ignore_errors=True)
        folder.rename(away / folder.name)
    shutil.rmtree(away, ignore_errors=True)


def _work(root: Path, machine: Machine, request: Request) -> Path:
    return root / "work" / f"{machine.key}-{request.cell.key}"


def _check_room(work: Path, prepared: Prepared) -> None:
    """The weights are written last: without room for them, the whole training would be for nothing."""
    like = Path(prepared.adapter_init or prepared.base)
    needed = sum(file.stat().st_size for file in like.rglob("*") if file.is_file())
    free = shutil.disk_usage(work).free
    if free < needed:
        raise StoreError(
            f"{work}: {free:,} bytes are free, and the trained weights will take about {needed:,}; "
            "free some space or choose another folder with runs=…"
        )


def _run_worker(
    request: Request, job: WorkerJob, work: Path, on_event: OnEvent, held: int | None, monitor: Monitor | None
) -> tuple[Ending, list[Event]]:
    events: list[Event] = []

    def told(event: Event) -> None:
        events.append(event)
        if monitor is not None:
            monitor.hear(event)
        on_event(event)

    kills_before = _kernel_oom_kills()
    write_at_once(work / "job.json", job.model_dump_json(indent=1).encode())
    command = worker_command(request.python or sys.executable, work / "job.json", request.cell.engine.processes)
    with writing(work):
        log, reader = (work / "log.txt").open("wb"), EventReader(work / "events.jsonl")
    with log, reader:
        with guarded(command, held=held, cwd=work, env=_environment(request), stdout=log, stderr=subprocess.STDOUT) as process:
            stopped, code = watch(process, reader, events, request.limits, told, monitor)
        for event in reader.new():  # said between our last look and its end
            told(event)
    return Ending(stopped, code, reader.garbage, _kernel_oom_kills() - kills_before), events


def _environment(request: Request) -> dict[str, str]:
    engine = request.cell.engine
    return _with_tree({**_OFFLINE, **_WORKER, **threads(request.machine.device, engine.processes), **engine.environment}, request.python)


def _with_tree(extra: dict[str, str], python: str | None = None) -> dict[str, str]:
    return {**environment(python), "PYTHONUNBUFFERED": "1", **extra}


def _record(
    job: WorkerJob, status: Status, reason: str | None, wall_seconds: float, events: Sequence[Event], monitor: Monitor | None = None
) -> Record:
    last = ending(events) or {}
    artifacts = Artifacts(
        tokens_sha256=Path(job.prepared.tokens).stem,
        base_sha256=job.prepared.base_sha256,
        adapter_init_sha256=job.prepared.adapter_init_sha256,
        adapter_sha256=last.get("adapter_sha256"),
    )
    measured = measurement([*resume.steps_before(job.saving), *events], artifacts, logs_of_the_others(Path(job.events).parent))
    if measured is not None and job.saving is not None:
        measured = measured.model_copy(update={"resumed_at": job.saving.resumed_at})
    if measured is not None and monitor is not None:
        measured = monitor.add_to(measured)
    status, reason = doubted(status, reason, measured, monitor.stranger if monitor else None)
    return Record(
        cell=job.cell,
        machine=job.machine,
        status=status,
        reason=reason,
        provenance=job.provenance.model_copy(update={"wall_seconds": wall_seconds}),
        measurement=measured,
        data=job.prepared.data,
        loss_norm=declared_loss_norm(job.cell.engine),
        notes=(*job.prepared.notes, *_emulated(job.machine)),
    )


def _emulated(machine: Machine) -> tuple[str, ...]:
    cap = machine.memory_cap_gib
    return (f"memory of {cap} GiB was emulated: the allocator was capped on a GPU of {machine.memory_gib} GiB",) if cap else ()


def _has_its_adapter(last: Event, work: Path, root: Path) -> bool:
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


def _keep_adapter(work: Path, root: Path, record: Record) -> None:
    """Adapters are kept by content: repeats that end in the same weights share one. What a failed cell left is of no use."""
    if record.status == "ok":
        assert record.measurement is not None
        assert record.measurement.artifacts.adapter_sha256 is not None
        target = adapter_folder(root, record.measurement.artifacts.adapter_sha256)
        if (work / "adapter").exists() and not target.exists():
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                (work / "adapter").rename(target)
    shutil.rmtree(work / "adapter", ignore_errors=True)


def _kernel_oom_kills() -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
