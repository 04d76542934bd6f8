"""A cell in several processes: torchrun starts a worker for each rank; rank 0 speaks for all, another one only of its own failure."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

from harness.events import LOST_LOG, Event, EventReader, ending
from harness.places import Nodes

ONE_NODE = Nodes()
FAILED = os.EX_SOFTWARE  # the exit code of a rank whose engine failed: torchrun ends the others, which may be waiting for it
_REPORT = "ChildFailedError"  # torchrun's own last words: a table of the ranks that ended in any other way than well
_REPORTED = re.compile(r"^ *rank *: (\d+) .*\n *exitcode *: (-?\d+) ", re.MULTILINE)


def worker_command(python: str, job: Path, processes: int, nodes: Nodes = ONE_NODE) -> list[str]:
    """What runs ``job``, a file, in ``python``: the worker itself, or torchrun over one worker a rank of this host, which is one of
    ``nodes``. Ranks are numbered node by node, so that rank 0 is where the record is made.
    """
    worker = ["-m", "harness.worker", str(job)]
    if processes == 1:
        return [python, *worker]
    place = ["--standalone"]
    if nodes.count > 1:
        assert nodes.endpoint is not None
        host, _, port = nodes.endpoint.partition(":")
        place = ["--nnodes", str(nodes.count), "--node-rank", str(nodes.rank), "--master-addr", host, "--master-port", port]
    return [python, "-m", "torch.distributed.run", *place, "--nproc-per-node", str(processes // nodes.count), *worker]


def threads(device: str, processes: int) -> dict[str, str]:
    """Several ranks share a CPU's cores evenly; left alone, torchrun would give each a single thread. What is set already stays."""
    if device != "cpu" or processes == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}


def crowded(device: str, processes: int) -> tuple[str, ...]:
    """What to say where ranks would take more threads than a CPU has cores, because the number of threads is set: nothing otherwise."""
    given, cores = os.environ.get("OMP_NUM_THREADS", ""), os.cpu_count() or 1
    if device != "cpu" or processes == 1 or not given.isdecimal() or int(given) * processes <= cores:
        return ()
    return (
        f"{processes} ranks of OMP_NUM_THREADS={given} threads share {cores} cores, which may slow them down several times: unset it, "
        f"and each rank takes {max(1, cores // processes)}",
    )


def rank() -> int:
    """Of this process among those of its cell, as torchrun numbers them."""
    return int(os.environ.get("RANK", "0"))


def own_log(events: Path) -> Path:
    """The event log of this rank: ``events`` itself for rank 0, a file beside it for the others."""
    return events if rank() == 0 else events.with_name(f"{events.stem}-rank{rank()}{events.suffix}")


def logs_of_the_others(work: Path) -> dict[int, list[Event]]:
    """What the ranks beside rank 0 logged in ``work``, the cell's folder, by rank."""
    logged = {}
    for path in work.glob("events-rank*.jsonl"):
        with EventReader(path) as reader:
            logged[int(path.stem.removeprefix("events-rank"))] = reader.new()
    return dict(sorted(logged.items()))


def ended(events: Sequence[Event], work: Path) -> Event | None:
    """How the cell ended by its workers' own words: the first failure of any rank, or else the ending in ``events``, rank 0's log.

    The failure of one of several ranks names it; what is ``unsupported`` all of them say.
    """
    others = logs_of_the_others(work)
    endings = [_of_rank(0, ending(events)) if others else ending(events)]
    endings += [_of_rank(number, ending(said)) for number, said in others.items()]
    failed = [one for one in endings if one is not None and one["event"] == "failed"]
    return min(failed, key=lambda one: float(one["wall_seconds"])) if failed else endings[0]


def died(printed: str, *, told: bool) -> tuple[int, int] | None:
    """The rank that ended without a word, and its exit code (negative for a signal), out of what torchrun ``printed`` at the end of a cell.

    None when there is none: a rank that failed has said so, and those that torchrun stopped did not die. ``told``: whether any rank has
    failed by its own word; one that aborts then does so because the others have left it.
    """
    report = printed[printed.rfind(_REPORT) :] if _REPORT in printed else ""
    quiet = {0, FAILED, LOST_LOG, -signal.SIGTERM, *((-signal.SIGABRT,) if told else ())}
    found = [(int(rank), int(code)) for rank, code in _REPORTED.findall(report)]
    return next(((rank, code) for rank, code in found if code not in quiet), None)


def _of_rank(number: int, event: Event | None) -> Event | None:
    if event is None or event["event"] != "failed" or event["status"] == "unsupported":
        return event
    return {**event, "reason": f"rank {number}: {event['reason']}"}
