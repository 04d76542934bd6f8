"""What the end of a worker means: its status, and a reason that helps."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.events import LOST_LOG, Event
from harness.ranks import died, ended
from harness.record import Measurement, Status, is_traceback
from harness.steady import steady

TREE = Path(__file__).resolve().parent.parent
_LAST_LINES = 15
_SMALLER = "use a smaller model, a smaller micro-batch or more memory"
_LAST_BYTES = 2**16  # a worker may have printed gigabytes


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended: why we stopped it (None: it ended by itself) and its exit code, negative for a signal.

    ``garbage``: what it wrote into its event log that is no event. ``oom_kills``: processes the kernel ended meanwhile for lack of memory.
    ``standing``: where its ranks stood when we stopped it, a line each.
    """

    stopped: Status | None
    exit_code: int
    garbage: str | None = None
    oom_kills: int = 0
    standing: str = ""


def classify(how: Ending, events: Sequence[Event], work: Path) -> tuple[Status, str | None]:
    """Status and reason of a cell whose worker ended like this; ``work`` is its folder. ``ok`` needs its word and its exit code."""
    last = ended(events, work)
    if how.garbage is not None:
        return "crash", _scrub(f"the worker wrote {how.garbage}", work)
    if how.stopped:
        stood = f"\n{how.standing}\n" if how.standing else " "
        said = f"stopped by the harness after the last of {len(events)} events;{stood}its last lines:\n{last_lines(work / 'log.txt')}"
        return how.stopped, _scrub(said, work)
    told = last is not None and last["event"] == "failed"
    if dead := died(_end(work / "log.txt"), told=told):  # before the words of those that it left
        return _dead(*dead, how)
    if last is not None and told:
        return last["status"], _scrub(last["reason"], work)
    if last is not None and how.exit_code == 0 and events[0]["event"] == "started":
        return "ok", None
    if how.exit_code == -signal.SIGKILL and how.oom_kills > 0:
        return "oom_host", f"the kernel ended the worker for lack of host memory; {_SMALLER}"
    if how.exit_code == LOST_LOG:
        said = "the worker could not write its event log: is the disk full, or did the engine close or replace its files?"
        return "crash", _scrub(f"{said} Its last lines:\n{last_lines(work / 'log.txt')}", work)
    return "crash", _scrub(f"the worker ended with {_name(how.exit_code)}; its last lines:\n{last_lines(work / 'log.txt')}", work)


def _dead(rank: int, exit_code: int, how: Ending) -> tuple[Status, str]:
    """Of one of several ranks, which could not say anything; the others were stopped for it."""
    if exit_code == -signal.SIGKILL and how.oom_kills > 0:
        return "oom_host", f"the kernel ended rank {rank} for lack of host memory; {_SMALLER}, or fewer processes"
    return "crash", f"rank {rank} ended with {_name(exit_code)} and without a word, the other ranks were stopped; see the cell's log.txt"


def doubted(status: Status, reason: str | None, measured: Measurement | None, stranger: str | None) -> tuple[Status, str | None]:
    """``status``, unless what was measured is not to be trusted: another process was on the GPU, or the run never became steady."""
    if stranger is not None and status in ("ok", "oom", "timeout", "no_progress"):
        return "contended", f"{stranger}; {reason or 'it ran to its end'}"
    if status == "ok" and measured is not None and not measured.resumed_at and (problem := steady(measured.steps).problem):
        return "unsteady", f"{problem}; take more steps, or look for what else this machine does"
    return status, reason


def heard_from_afar(reason: str | None, status: Status, nodes: int, *, met: bool) -> str | None:
    """``reason``, and what it may come from where there are several ``nodes``. ``met``: whether a worker has started, which torchrun does
    when all nodes are there.
    """
    if nodes == 1 or reason is None:
        return reason
    if status in ("timeout", "no_progress") and not met:
        how = "run the same command on each with its own machine.nodes.rank, and let all reach machine.nodes.endpoint"
        return f"the {nodes} nodes have not met: {how}; {reason}"
    if status == "crash" and is_traceback(reason):  # it may only tell that a rank of another node is gone
        return f"{reason} (a rank that died on another of the {nodes} nodes is named there)"
    return reason


def last_lines(path: Path) -> str:
    """The end of what a process printed to ``path``; nothing when there is no such file."""
    return "\n".join(_end(path).strip().splitlines()[-_LAST_LINES:])


def _end(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LAST_BYTES))
        return file.read().replace(b"\0", b"").decode(errors="replace")


def _name(exit_code: int) -> str:
    """SIGSEGV or exit code 7; real-time signals have no name."""
    try:
        return signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
    except ValueError:
        return f"signal {-exit_code}"


def _scrub(text: str, work: Path) -> str:
    """A record names no path of the machine that made it."""
    names = {work: "<work>", TREE: "<engine-room>", Path(sys.prefix): "<python>", Path(sys.base_prefix): "<python>", Path.home(): "~"}
    for path, name in names.items():
        text = text.replace(str(path), name)
    return text
