"""Run a cell in a fresh process of the engine's own interpreter, watch it, stop it, and make its record."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness import resume
from harness.adapters import has_its_adapter, keep_adapter
from harness.config import Request
from harness.cores import clocks, taken_by_others
from harness.endings import Ending, classify, doubted, heard_from_afar, last_lines
from harness.engine import Machine, declared_loss_norm
from harness.errors import ConfigError, HarnessError, StoreError, UnsupportedError
from harness.events import Event, EventReader, ending, measurement
from harness.guard import guarded
from harness.interpreter import environment
from harness.monitor import Monitor, monitoring
from harness.places import Prepared, Saving, WorkerJob
from harness.provenance import dated, provenance
from harness.ranks import crowded, logs_of_the_others, threads, worker_command
from harness.record import Artifacts, Provenance, Record, Status, in_a_line
from harness.spec import Spec, parse
from harness.standing import standing
from harness.store import write_at_once, writing
from harness.watch import OnEvent, watch

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
    crowd = crowded(machine.device, request.cell.engine.processes // machine.nodes)
    noted = prepared.model_copy(update={"notes": (*prepared.notes, *notes, *crowd)})
    job = _job(request, machine, noted, came_from, work, counts=None if counts is None else str(counts), saving=saving)
    try:
        with contextlib.ExitStack() as stack:
            monitor = (
                stack.enter_context(monitoring(_environment(request), machine.count // machine.nodes)) if machine.device == "cuda" else None
            )
            if monitor and (holder := monitor.busy()):
                return _record(job, "contended", f"{holder}; end it or wait for it, then run the same command again", 0.0, [])
            job = job.model_copy(update={"launched_monotonic": time.monotonic()})
            before = clocks()
            how, events = _run_worker(request, job, work, on_event, held, monitor)
    except UnsupportedError as error:
        return _record(job, "unsupported", str(error), 0.0, [])
    wall = time.monotonic() - job.launched_monotonic
    status, reason = classify(how, events, work)
    record = _record(job, status, reason, wall, events, monitor)
    if machine.device == "cpu":
        taken = taken_by_others(before, clocks(), os.cpu_count() or 1)
        record = record.model_copy(update={"notes": (*record.notes, *taken)})
    keep_adapter(work, root, record)
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
    if last is None or reader.garbage is not None or not has_its_adapter(last, work, root):
        return None
    status, reason = classify(Ending(None, 0), events, work)
    record = _record(job, status, reason, last["wall_seconds"], events)
    note = "recovered from the event log: the sweep was stopped before it could write this record"
    keep_adapter(work, root, record)
    resume.end(job.saving, record.status)
    return record.model_copy(update={"notes": (*record.notes, note)})


def follow(request: Request, machine: Machine, prepared: Prepared, root: Path, *, held: int | None) -> str | None:
    """Run this node's ranks of ``request``, whose record another node makes; returns why they did not end well, None when they did."""
    work = _work(root, machine, request)
    with writing(work):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        log = (work / "log.txt").open("wb")
    job = _job(request, machine, prepared, provenance(request), work)
    write_at_once(work / "job.json", job.model_dump_json(indent=1).encode())
    settings = {"cwd": work, "env": _environment(request), "stdout": log, "stderr": subprocess.STDOUT}
    with log, guarded(_command(request, work), held=held, **settings) as process:
        try:
            code = process.wait(timeout=request.limits.wall_seconds)
        except subprocess.TimeoutExpired:
            code = None
    if code == 0:
        return None
    overdue: tuple[Status, str] = ("timeout", f"stopped after limits.wall_seconds={request.limits.wall_seconds}")
    status, reason = overdue if code is None else classify(Ending(None, code), [], work)
    met = bool(logs_of_the_others(work))
    return f"{status}: {in_a_line(heard_from_afar(reason, status, machine.nodes, met=met) or '')}"


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
    command = _command(request, work)
    with writing(work):
        log, reader = (work / "log.txt").open("wb"), EventReader(work / "events.jsonl")
    with log, reader:
        with guarded(command, held=held, cwd=work, env=_environment(request), stdout=log, stderr=subprocess.STDOUT) as process:
            stopped, code = watch(process, reader, events, request.limits, told, monitor)
            where = standing(work) if stopped else ""
        for event in reader.new():  # said between our last look and its end
            told(event)
    return Ending(stopped, code, reader.garbage, _kernel_oom_kills() - kills_before, where), events


def _job(
    request: Request,
    machine: Machine,
    prepared: Prepared,
    came_from: Provenance,
    work: Path,
    counts: str | None = None,
    saving: Saving | None = None,
) -> WorkerJob:
    return WorkerJob(
        cell=request.cell,
        machine=machine,
        prepared=prepared,
        provenance=came_from,
        out=str(work / "adapter"),
        events=str(work / "events.jsonl"),
        launched_monotonic=time.monotonic(),
        counts=counts,
        saving=saving,
    )


def _command(request: Request, work: Path) -> list[str]:
    return worker_command(request.python or sys.executable, work / "job.json", request.cell.engine.processes, request.machine.nodes)


def _environment(request: Request) -> dict[str, str]:
    engine = request.cell.engine
    return _with_tree(
        {**_OFFLINE, **_WORKER, **threads(request.machine.device, engine.processes // request.machine.nodes.count), **engine.environment},
        request.python,
    )


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
    reason = heard_from_afar(reason, status, job.machine.nodes, met=bool(events))
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


def _kernel_oom_kills() -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
