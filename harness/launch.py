"""Run a cell in a fresh process group of the engine's own interpreter, watch it, stop it, and make its record."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from harness.config import Request
from harness.engine import Machine
from harness.errors import HarnessError
from harness.events import Event, EventReader, ending, measurement
from harness.fingerprint import engine_fingerprint, interpreter
from harness.machine import driver_version, host_id
from harness.places import Prepared
from harness.record import Artifacts, Provenance, Record, Status
from harness.spec import Spec
from harness.store import commit_of

TREE = Path(__file__).resolve().parent.parent
_TICK_SECONDS = 0.2
_LAST_LINES = 15
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended: why we stopped it (None: it ended by itself) and its exit code, negative for a signal."""

    stopped: Status | None
    exit_code: int


def run_cell(request: Request, machine: Machine, prepared: Prepared, root: Path, on_event: OnEvent, sweep: str | None = None) -> Record:
    """Run ``request`` and return its record; adapters of ok cells end under ``root``/adapters. Failure is a status, never an exception."""
    cell = request.cell
    work = root / "work" / f"{machine.key}-{cell.key}"
    with exclusive(root / "work" / "measuring.lock", lambda: on_event({"event": "waiting"})):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        started, began = datetime.now(UTC), time.monotonic()
        kills_before = _kernel_oom_kills()
        process = _start(request, machine, prepared, work)
        reader = EventReader(work / "events.jsonl")
        events: list[Event] = []
        try:
            how = _watch(process, reader, events, request, on_event)
        finally:
            _kill_group(process)
        wall = time.monotonic() - began
        status, reason = _classify(how, events, reader, work, _kernel_oom_kills() - kills_before)
    provenance = _provenance(request, started, wall, sweep)
    record = _record(request, machine, prepared, status, reason, provenance, events)
    if status == "ok":
        _keep_adapter(work, root, record)
    return record


def unsupported(request: Request, machine: Machine, reason: str) -> Record:
    """The record of a cell that cannot run, made without a process."""
    return Record(
        cell=request.cell, machine=machine, status="unsupported", reason=reason, provenance=_provenance(request, datetime.now(UTC), 0.0)
    )


def run_door(module: str, job: Spec, job_path: Path, *, network: bool = False) -> None:
    """Run another door (prepare, score) in our interpreter on ``job``; its progress bar shows. Raises HarnessError with what it said.

    Only prepare may use the ``network``, to fetch a ``hub:`` source: what is measured or judged never depends on it.
    """
    job_path.parent.mkdir(parents=True, exist_ok=True)
    job_path.write_text(job.model_dump_json(indent=1), encoding="utf-8")
    command = [sys.executable, "-m", module, str(job_path)]
    errors = job_path.with_suffix(".stderr")
    environment = _environment({}) if network else _environment(_OFFLINE)
    with errors.open("w") as stderr:
        done = subprocess.run(command, env=environment, check=False, stderr=stderr, stdin=subprocess.DEVNULL)
    said = errors.read_text(errors="replace").strip()
    if done.returncode == 2:
        raise HarnessError(said)
    if done.returncode:
        raise HarnessError(f"{module} failed with exit code {done.returncode}:\n{_tail(said)}")


@contextlib.contextmanager
def exclusive(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock file: two sweeps on one store take turns, cell by cell, instead of disturbing each other's figures.

    ``on_wait`` is called once when somebody else holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start(request: Request, machine: Machine, prepared: Prepared, work: Path) -> subprocess.Popen[bytes]:
    job = {
        "cell": request.cell.model_dump(mode="json"),
        "machine": machine.model_dump(mode="json"),
        "prepared": prepared.model_dump(mode="json"),
        "out": str(work / "adapter"),
        "events": str(work / "events.jsonl"),
        "launched_monotonic": time.monotonic(),
    }
    (work / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
    with (work / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [request.python or sys.executable, "-m", "harness.worker", str(work / "job.json")],
            cwd=work,
            env=_environment({**_OFFLINE, **request.cell.engine.environment}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _environment(extra: dict[str, str]) -> dict[str, str]:
    path = os.pathsep.join([str(TREE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **extra}


def _watch(process: subprocess.Popen[bytes], reader: EventReader, events: list[Event], request: Request, on_event: OnEvent) -> Ending:
    """Wait without spinning; monotonic time only, so that a clock that jumps stops nothing."""
    began = progressed = time.monotonic()
    limits = request.limits
    descriptor = os.pidfd_open(process.pid)
    try:
        while True:
            ended = bool(select.select([descriptor], [], [], _TICK_SECONDS)[0])
            for event in reader.new():
                events.append(event)
                progressed = time.monotonic()
                on_event(event)
            now = time.monotonic()
            if ended:
                return Ending(None, process.wait())
            if now - began > limits.wall_seconds:
                return Ending("timeout", 0)
            if now - progressed > limits.no_progress_seconds:
                return Ending("no_progress", 0)
    finally:
        os.close(descriptor)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """The worker and all it forked: the group outlives its leader."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _classify(how: Ending, events: Sequence[Event], reader: EventReader, work: Path, oom_kills: int) -> tuple[Status, str | None]:
    last = ending(events)
    log = work / "log.txt"
    tail = _tail(log.read_text(errors="replace")) if log.exists() else ""
    if how.stopped:
        return how.stopped, _scrub(f"stopped by the harness after the last of {len(events)} events; its last lines:\n{tail}", work)
    if reader.garbage is not None:
        return "crash", f"the worker wrote something that is no event: {reader.garbage}"
    if last is not None and last["event"] == "failed":
        return last["status"], _scrub(str(last["reason"]), work)
    if last is not None and how.exit_code == 0:
        return "ok", None
    if how.exit_code == -signal.SIGKILL and oom_kills > 0:
        return "oom_host", "the kernel ended the worker for lack of host memory; use a smaller model, a smaller micro-batch or more memory"
    name = signal.Signals(-how.exit_code).name if how.exit_code < 0 else f"exit code {how.exit_code}"
    return "crash", _scrub(f"the worker ended with {name}; its last lines:\n{tail}", work)


def _record(
    request: Request, machine: Machine, prepared: Prepared, status: Status, reason: str | None, provenance: Provenance, events: list[Event]
) -> Record:
    last = ending(events) or {}
    artifacts = Artifacts(
        tokens_sha256=Path(prepared.tokens).stem,
        base_sha256=prepared.base_sha256,
        adapter_init_sha256=prepared.adapter_init_sha256,
        adapter_sha256=last.get("adapter_sha256"),
    )
    return Record(
        cell=request.cell,
        machine=machine,
        status=status,
        reason=reason,
        provenance=provenance,
        measurement=measurement(events, artifacts),
        notes=prepared.notes,
    )


def _provenance(request: Request, started: datetime, wall_seconds: float, sweep: str | None = None) -> Provenance:
    commit, dirty = commit_of(TREE)
    python, packages = interpreter(request.python, request.packages)
    return Provenance(
        started_utc=started.isoformat(timespec="milliseconds"),
        wall_seconds=wall_seconds,
        commit=commit,
        dirty=dirty,
        engine_fingerprint=engine_fingerprint(request.cell.engine.module, request.python, request.packages),
        python=python,
        packages=packages,
        driver=driver_version() if request.machine.device == "cuda" else None,
        sweep=sweep,
        host=f"{host_id()} {platform.system()} {platform.release().partition('-')[0]}",
    )


def _keep_adapter(work: Path, root: Path, record: Record) -> None:
    """Adapters are kept by content: repeats that end in the same weights share one."""
    assert record.measurement is not None
    adapter_sha256 = record.measurement.artifacts.adapter_sha256
    assert adapter_sha256 is not None
    target = adapter_folder(root, adapter_sha256)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        (work / "adapter").rename(target)


def adapter_folder(root: Path, adapter_sha256: str) -> Path:
    """Where the weights with this hash are kept until they are scored, or for good with ``keep=adapters``."""
    return root / "adapters" / adapter_sha256[:16]


def _kernel_oom_kills() -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_LAST_LINES:])


def _scrub(text: str, work: Path) -> str:
    """A record names no path of the machine that made it."""
    names = {work: "<work>", TREE: "<engine-room>", Path(sys.prefix): "<python>", Path(sys.base_prefix): "<python>", Path.home(): "~"}
    for path, name in names.items():
        text = text.replace(str(path), name)
    return text
