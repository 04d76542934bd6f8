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
from typing import Any, NoReturn

from harness.data.tokens import TokenFile
from harness.engine import Checkpoints, Job, Machine, load
from harness.errors import HarnessError, UnsupportedError
from harness.events import LOST_LOG, EventLog
from harness.flops import work
from harness.gates import counting
from harness.gemm import gemm_peak_flops
from harness.machine import cap_refused
from harness.places import WorkerJob
from harness.probe import StepProbe
from harness.ranks import FAILED, own_log, rank
from harness.record import Status
from harness.spec import Workload, parse
from harness.standing import be_ready
from harness.startup import ImportClock
from harness.syntax_trees import one_tree_at_a_time
from harness.weights import adapter_sha256


def main(path: str) -> int:
    """Train the cell and log how it went. Every ending of the engine becomes an event; the exit code is 0 for all of them, but for
    a failing one of several ranks: the others must not wait for it. Returns it, or that of a log that cannot be written.
    """
    began = time.monotonic()
    imports = ImportClock()
    one_tree_at_a_time()
    _die_with_parent()
    job = parse(WorkerJob, json.loads(Path(path).read_text(encoding="utf-8")))
    try:
        be_ready(Path(job.events).parent)
        with EventLog(own_log(Path(job.events))) as log:
            log.write("started", {"process_seconds": began - job.launched_monotonic})
            try:
                _train(job, log, imports, began)
                if rank() == 0:
                    log.write("finished", {"adapter_sha256": adapter_sha256(Path(job.out)), **_wall(job)})
            except BaseException as error:  # the one broad except of the house: whatever an engine raises is a result
                log.write("failed", {"status": _classify(error), "reason": _reason(error), **_wall(job)})
                if isinstance(error, KeyboardInterrupt):
                    raise
                if job.cell.engine.processes > 1:
                    return FAILED
    except OSError as error:
        print(f"{job.events}: cannot write the event log: {error}", file=sys.stderr)
        return LOST_LOG
    return 0


def _leave(code: int) -> NoReturn:
    """End this process now. All is said and written: tearing down the threads of a library, which may abort or hang, must not change it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # an engine may have closed or lost them
            stream.flush()
    os._exit(code)


def _wall(job: WorkerJob) -> dict[str, float]:
    return {"wall_seconds": time.monotonic() - job.launched_monotonic}


def _train(job: WorkerJob, log: EventLog, imports: ImportClock, began: float) -> None:
    cell = job.cell
    engine = load(cell.engine)
    knobs = parse(engine.Knobs, cell.engine.knobs, at="engine.knobs")
    num_steps = cell.workload.train.num_steps
    opened = time.monotonic()
    tokens = TokenFile.open(Path(job.prepared.tokens))
    data_seconds = time.monotonic() - opened
    _cap_memory(job.machine)
    probe = StepProbe(log, imports, device=job.machine.device, num_steps=num_steps, began=began, data_seconds=data_seconds)
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    adapter_init, saving = job.prepared.adapter_init, job.saving
    given = Job(
        workload=cell.workload,
        tokens=tokens,
        base=Path(job.prepared.base),
        adapter_init=Path(adapter_init) if adapter_init else None,
        out=out,
        device=job.machine.device,
        processes=cell.engine.processes,
        checkpoints=Checkpoints(folder=Path(saving.folder), every=saving.every, made=saving.made) if saving else None,
    )
    with counting(job.counts, job.machine.device, probe) as counted:
        engine.train(given, knobs, counted)
    probe.finish()
    expected = num_steps - (saving.made if saving else 0)
    if probe.num_steps != expected:
        raise RuntimeError(f"the engine reported {probe.num_steps} of {expected} steps")
    known = _work(job, tokens, _recomputed_fraction(engine, cell.workload, knobs))
    log.write("work", {**known, "gemm_peak_flops": gemm_peak_flops() if job.machine.device == "cuda" else None})


def _cap_memory(machine: Machine) -> None:
    """Emulate a smaller GPU: the allocator answers out of memory where a real one would, but for the driver's own half GiB."""
    cap = machine.memory_cap_gib
    if cap is None:
        return
    if refused := cap_refused(machine):
        raise UnsupportedError(refused)
    import torch

    for index in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(index).total_memory
        if cap * 2**30 > total:
            raise UnsupportedError(f"machine.memory_cap_gib={cap} is more than GPU {index} has ({total / 2**30:.1f} GiB)")
        torch.cuda.set_per_process_memory_fraction(cap * 2**30 / total, index)


def _work(job: WorkerJob, tokens: TokenFile, recomputed: float | None) -> dict[str, Any]:
    try:
        config = json.loads((Path(job.prepared.base) / "config.json").read_text(encoding="utf-8"))
        return {"work": work(config, job.cell.workload, tokens, recomputed).model_dump(mode="json"), "unknown": None}
    except UnsupportedError as error:
        return {"work": None, "unknown": str(error)}
    except OSError as error:
        return {"work": None, "unknown": f"config.json of the base cannot be read: {error.strerror}"}


def _recomputed_fraction(engine: Any, workload: Workload, knobs: Any) -> float | None:
    """What the engine says of it, null when it does not; see docs/adding-an-engine.md."""
    tell = getattr(engine, "recomputed_fraction", None)
    said: float | None = tell(workload, knobs) if tell is not None else None
    return said


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
    _leave(main(*sys.argv[1:]))
