"""Whether other programs took cores from a cell while it ran: its rates are then not its own alone."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

BUSY = "other programs used"  # how the note begins
FULL = 0.9  # of the cores, from which on programs wait for each other
MATTERS = 0.25  # cores

_STAT = Path("/proc/stat")
_IDLE = (3, 4)  # idle, and idle while a disk is waited for, among the figures of proc_stat(5)


@dataclass(frozen=True, slots=True)
class Clocks:
    """Seconds: of the wall, of all cores that were busy since this machine started, of this process and what it has waited for."""

    wall: float
    busy: float
    own: float


def clocks() -> Clocks | None:
    """Now; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError):
        ticks = [int(word) for word in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
        busy = sum(ticks) - sum(ticks[place] for place in _IDLE)
        own = os.times()
        return Clocks(time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), own.user + own.system + own.children_user + own.children_system)
    return None


def taken_by_others(before: Clocks | None, after: Clocks | None, cores: int) -> tuple[str, ...]:
    """What to say of the time between where hardly a core was free and others had some of them; nothing otherwise."""
    if before is None or after is None or after.wall <= before.wall:
        return ()
    elapsed = after.wall - before.wall
    busy = (after.busy - before.busy) / elapsed
    others = busy - (after.own - before.own) / elapsed
    if busy < FULL * cores or others < MATTERS:
        return ()
    return (f"{BUSY} {others:.1f} of the {cores} cores while it ran, and hardly one was free: its rate is not its own alone",)
