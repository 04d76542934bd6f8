"""Wait for a worker: read what it says, look at its GPUs, and stop it when it takes too long."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Callable

from harness.config import Limits
from harness.events import Event, EventReader, ending
from harness.monitor import Monitor
from harness.record import Status

_TICK_SECONDS = 0.2
_GPU_TICK_SECONDS = 0.1  # also how often its memory is sampled
_LEAVE_SECONDS = 30.0  # a worker that has said how it ended and does not go (a thread of a library, often) is sent home

OnEvent = Callable[[Event], None]


def watch(
    process: subprocess.Popen[bytes], reader: EventReader, events: list[Event], limits: Limits, told: OnEvent, monitor: Monitor | None
) -> tuple[Status | None, int]:
    """Wait without spinning; monotonic time only, so that a clock that jumps stops nothing. Returns why we stopped it, or its exit code.

    What it says goes to ``told``, which appends it to ``events``; ``monitor``: where there is a GPU to look at.
    """
    began = progressed = time.monotonic()
    descriptor = os.pidfd_open(process.pid)
    try:
        while True:
            ended = bool(select.select([descriptor], [], [], _GPU_TICK_SECONDS if monitor else _TICK_SECONDS)[0])
            for event in reader.new():
                progressed = time.monotonic()
                told(event)
            now = time.monotonic()
            if ended:
                return None, process.wait()
            if reader.garbage is not None or _lingers(events, now - progressed, limits):
                return None, 0
            if overdue := _overdue(now - began, now - progressed, limits):
                return overdue, 0
            if monitor is not None:
                monitor.sample(process.pid)
    finally:
        os.close(descriptor)


def _lingers(events: list[Event], silent_seconds: float, limits: Limits) -> bool:
    return ending(events[-1:]) is not None and silent_seconds > min(_LEAVE_SECONDS, limits.no_progress_seconds)


def _overdue(running_seconds: float, silent_seconds: float, limits: Limits) -> Status | None:
    if limits.wall_seconds is not None and running_seconds > limits.wall_seconds:
        return "timeout"
    return "no_progress" if silent_seconds > limits.no_progress_seconds else None
