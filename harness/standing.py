"""Where the ranks of a cell stand when it is stopped: each leaves its stacks beside the event log when it is asked for them."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from harness.ranks import rank

_TREE = Path(__file__).resolve().parent.parent
_PATIENCE_SECONDS = 1.0  # a process that does not run (stopped, or deep in a driver) does not answer
_NAME = re.compile(r"standing-(\d+)-(\d+)\.txt")
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)


def be_ready(work: Path) -> None:
    """Let this worker answer ``standing``. By a signal that is handled in C, so also where no Python runs; the steps cost nothing."""
    file = (work / f"standing-{rank()}-{os.getpid()}.txt").open("w", encoding="utf-8")
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)  # which keeps the file open


def standing(work: Path) -> str:
    """Ask every worker whose cell has the folder ``work`` for its stacks, while it lives: a line a rank, empty when none answers.

    All threads are in the files ``standing-RANK-PID.txt`` of ``work``.
    """
    asked = {}
    for path in work.glob("standing-*.txt"):
        if (name := _NAME.fullmatch(path.name)) and _is_worker(int(name[2]), work):
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(int(name[2]), signal.SIGUSR1)
                asked[int(name[1])] = path
    until = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < until and not all(path.stat().st_size for path in asked.values()):
        time.sleep(0.02)
    time.sleep(0.05 if asked else 0.0)  # to write the rest
    lines = {number: _place(path.read_text(encoding="utf-8", errors="replace")) for number, path in sorted(asked.items())}
    if len(lines) == 1:
        return next(f"it stood {place}" for place in lines.values())
    return "\n".join(f"rank {number} stood {place}" for number, place in lines.items())


def _is_worker(process: int, work: Path) -> bool:
    """Whether a process of that number is of this cell still: its folder is where workers are started."""
    try:
        return Path(f"/proc/{process}/cwd").resolve(strict=True) == work.resolve()
    except OSError:
        return False


def _place(dump: str) -> str:
    """The innermost place, and the innermost of ours where that is another, of the thread that was asked: the main one."""
    current = dump[dump.rfind("Current thread") :] if "Current thread" in dump else dump
    frames = _FRAME.findall(current)
    if not frames:
        return "where it did not answer"
    own = next((frame for frame in frames if Path(frame[0]).is_relative_to(_TREE)), frames[0])
    return f"in {_said(own)}" + ("" if own is frames[0] else f", there in {_said(frames[0])}")


def _said(frame: Sequence[str]) -> str:
    file, line, function = frame
    return f"{file}:{line} ({function})"
