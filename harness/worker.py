"""Run one cell in this process, in the engine's own interpreter: ``python -m harness.worker JOB.json``."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from harness.data.tokens import TokenFile
from harness.engine import Job, load
from harness.errors import HarnessError, UnsupportedError
from harness.events import LOST_LOG, EventLog
from harness.places import WorkerJob
from harness.probe import StepProbe
from harness.record import Status
from harness.spec import parse
from harness.weights import adapter_sha256


def main(path: str) -> None:
    """Train the cell and log how it went. Every ending of the engine becomes an event; the exit code is 0 for all of them."""
    began = time.monotonic()
    _die_with_parent()
    job = parse(WorkerJob, json.loads(Path(path).read_text(encoding="utf-8")))
    try:
        with EventLog(Path(job.events)) as log:
            log.write("started", {"process_seconds": began - job.launched_monotonic})
            try:
                adapter = _train(job, log)
                log.write("finished", {"adapter_sha256": adapter, **_wall(job)})
            except BaseException as error:  # the one broad except of the house: whatever an engine raises is a result
                log.write("failed", {"status": _classify(error), "reason": _reason(error), **_wall(job)})
                if isinstance(error, KeyboardInterrupt):
                    raise
    except OSError as error:
        print(f"{job.events}: cannot write the event log: {error}", file=sys.stderr)
        sys.exit(LOST_LOG)


def _wall(job: WorkerJob) -> dict[str, float]:
    return {"wall_seconds": time.monotonic() - job.launched_monotonic}


def _train(job: WorkerJob, log: EventLog) -> str:
    cell = job.cell
    engine = load(cell.engine)
    knobs = parse(engine.Knobs, cell.engine.knobs, at="engine.knobs")
    num_steps = cell.workload.train.steps
    probe = StepProbe(log, device=job.machine.device, num_steps=num_steps)
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    adapter_init = job.prepared.adapter_init
    engine.train(
        Job(
            workload=cell.workload,
            tokens=TokenFile.open(Path(job.prepared.tokens)),
            base=Path(job.prepared.base),
            adapter_init=Path(adapter_init) if adapter_init else None,
            out=out,
            device=job.machine.device,
            processes=cell.engine.processes,
        ),
        knobs,
        probe,
    )
    probe.finish()
    if probe.num_steps != num_steps:
        raise RuntimeError(f"the engine reported {probe.num_steps} of {num_steps} steps")
    return adapter_sha256(out)


def _classify(error: BaseException) -> Status:
    if isinstance(error, UnsupportedError):
        return "unsupported"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "oom"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return "oom_host"
    return "crash"


def _reason(error: BaseException) -> str:
    if isinstance(error, HarnessError):
        return str(error)
    said = "".join(traceback.format_exception(error, limit=-8)).strip()
    full = any(os.strerror(number) in said for number in (errno.ENOSPC, errno.EDQUOT))  # not every writer raises OSError
    return f"{said}\nthe disk is full: free some space, or choose another folder with runs=…" if full else said


def _die_with_parent() -> None:
    """A worker whose sweep was killed must not go on holding the machine; and the host's OOM killer should choose us, not the sweep."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if os.getppid() == 1:
        sys.exit("the process that launched this worker is gone")


if __name__ == "__main__":
    main(*sys.argv[1:])
