"""What a record says about a candidate: how it ended, a step's time after its first steps, its start-up and its memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from harness.record import Measurement, Record, cause
from harness.tune.asked import Outcome, Result

_OUTCOMES: dict[str, Outcome] = {"ok": "ok", "unsteady": "ok", "oom": "oom", "oom_host": "oom"}


def result_of(record: Record, steps: int | None = None, *, positions: Sequence[float] = (), unfit: str | None = None) -> Result:
    """The result of ``record``, or of its first ``steps`` as if it had been stopped there.

    ``positions``: of every step of the planned run, where they differ: what was measured is stretched from its steps to all. ``unfit``:
    why it trained something else than the reference.
    """
    measured, wall = record.measurement, record.provenance.wall_seconds
    outcome = _OUTCOMES.get(record.status, "failed")
    if outcome != "ok" or measured is None:
        return Result(outcome=outcome, cost_seconds=wall, reason=f"{record.status}: {cause(record)}")
    seconds = measured.steps.seconds
    used = seconds if steps is None else seconds[:steps]
    first = _settled(measured, len(used))
    step = statistics.median(used[first:])
    planned = step
    if positions:
        planned = sum(used[first:]) / sum(positions[first : len(used)]) * statistics.fmean(positions)
    startup = wall - sum(seconds) + sum(value - step for value in used[:first])
    cost = wall - sum(seconds[len(used) :])
    if unfit is not None:
        return Result(outcome="unfit", cost_seconds=cost, reason=unfit)
    return Result(outcome="ok", cost_seconds=cost, step_seconds=planned, startup_seconds=startup, peak_bytes=peak_bytes(measured))


def peak_bytes(measured: Measurement) -> float | None:
    """What has to fit: the most that the allocator held. Null on a CPU, and where it gave blocks back because there was no more."""
    if any(memory.num_alloc_retries for memory in measured.memory):
        return None
    peaks = [memory.peak_reserved_bytes for memory in measured.memory if memory.peak_reserved_bytes is not None]
    return float(max(peaks)) if peaks else None


def _settled(measured: Measurement, count: int) -> int:
    """The first of ``count`` steps after the last that compiled something; at least one, at most half of them is left out."""
    compiled = max((index + 1 for index, number in enumerate((measured.steps.compiles or ())[:count]) if number), default=1)
    return min(max(1, compiled), count // 2)
