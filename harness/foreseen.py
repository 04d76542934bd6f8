"""What ``plan=only`` prints: the cells, why some are impossible, what the rest will take, and what a plan does not look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

from harness.config import Request
from harness.plan import Planned, least_memory_bytes, weights_bytes
from harness.progress import label

_GIB = 2**30
_IN_LABEL = ("engine=", "model=", "data=", "method=", "repeat=")  # what the label of a cell says of a sweep's values


def show(planned: Sequence[Planned], say: Callable[[str], None]) -> None:
    """Each cell of ``planned``, then time, disk and memory of those that are to run, and that their rows are still to be checked."""
    for cell in planned:
        own = [word for word in cell.request.overrides if not word.startswith(_IN_LABEL)]
        reason = [f"({cell.reason})"] if cell.reason else []
        say("  ".join([f"{cell.action:<12} {label(cell)}", *([" ".join(own)] if own else []), *reason]))
    waiting = [cell for cell in planned if cell.action == "run"]
    known = [cell.seconds for cell in waiting if cell.seconds is not None]
    time = str(timedelta(seconds=round(sum(known)))) if known else "not known"
    unknown = f", {len(waiting) - len(known)} without an earlier record to predict from" if len(known) < len(waiting) else ""
    say(f"{len(waiting)} of {len(planned)} cells to run; time (predicted): {time}{unknown}")
    requests = [cell.request for cell in waiting]
    for name, request in {request.cell.workload.model.name: request for request in requests}.items():
        say(f"{name}: {_sizes(request)}")
    for name in dict.fromkeys(request.cell.workload.data.name for request in requests if request.cell.workload.data.files):
        say(f"{name}: plan=only does not read its rows (train.epochs does, to count them); a run checks them all before it trains")


def _sizes(request: Request) -> str:
    disk, memory = weights_bytes(request), least_memory_bytes(request)
    if disk is None or memory is None:
        return "disk and memory are not known before its weights are loaded"
    return f"weights on disk {disk / _GIB:.2f} GiB, memory at least {memory / _GIB:.2f} GiB (predicted)"
