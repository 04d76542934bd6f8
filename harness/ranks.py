"""A cell in several processes: torchrun starts a worker for each rank; rank 0 speaks for all, another one only of its own failure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from harness.events import Event, EventReader, ending

FAILED = os.EX_SOFTWARE  # the exit code of a rank whose engine failed: torchrun ends the others, which may be waiting for it


def worker_command(python: str, job: Path, processes: int) -> list[str]:
    """What runs ``job``, a file, in ``python``: the worker itself, or torchrun over one worker a rank of this host."""
    worker = ["-m", "harness.worker", str(job)]
    if processes == 1:
        return [python, *worker]
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *worker]


def rank() -> int:
    """Of this process among those of its cell, as torchrun numbers them."""
    return int(os.environ.get("RANK", "0"))


def own_log(events: Path) -> Path:
    """The event log of this rank: ``events`` itself for rank 0, a file beside it for the others."""
    return events if rank() == 0 else events.with_name(f"{events.stem}-rank{rank()}{events.suffix}")


def ended(events: Sequence[Event], work: Path) -> Event | None:
    """How the cell ended by its workers' own words: the first failure of any rank, or else the ending in ``events``, rank 0's log."""
    endings = [ending(events)]
    for path in sorted(work.glob("events-rank*.jsonl")):
        with EventReader(path) as reader:
            endings.append(ending(reader.new()))
    failed = [one for one in endings if one is not None and one["event"] == "failed"]
    return min(failed, key=lambda one: float(one["wall_seconds"])) if failed else endings[0]
