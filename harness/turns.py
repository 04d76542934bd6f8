"""Sweeps on one store take turns: whoever measures, prepares or scores there does so alone, and sees what the others recorded."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.store import writing


@contextlib.contextmanager
def turn(root: Path, on_wait: Callable[[], None]) -> Iterator[int]:
    """Hold the store's lock; yields its descriptor. ``on_wait`` is called once when somebody else holds it.

    The kernel gives a lock back when its last holder is gone: hand the descriptor to a guard, and the turn lasts until its command is.
    """
    path = root / "work" / "measuring.lock"
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
