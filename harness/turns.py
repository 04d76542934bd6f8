"""Sweeps on one store take turns: whoever measures, prepares or scores there does so alone, and sees what the others recorded.

Sweeps that each see GPUs of their own (CUDA_VISIBLE_DEVICES) measure at the same time, and still prepare and score one at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from harness.store import writing


@contextlib.contextmanager
def turn(root: Path, on_wait: Callable[[], None], share: str | None = None) -> Iterator[int]:
    """Hold the store's lock; yields its descriptor. ``on_wait`` is called once when somebody else holds it.

    ``share``: a part of the machine, or a kind of work; only who holds the same share, or the whole, is waited for. The kernel gives a
    lock back when its last holder is gone: hand the descriptor to a guard, and the turn lasts until its command is. (With a ``share``
    that holds for others on it; who waits for the whole goes on when this process is gone.)
    """
    with contextlib.ExitStack() as stack:
        whole = stack.enter_context(_open(root, "measuring.lock"))
        if share is None:
            _lock(whole, fcntl.LOCK_EX, on_wait)
            yield whole.fileno()
            return
        told = _once(on_wait)
        _lock(whole, fcntl.LOCK_SH, told)
        mine = stack.enter_context(_open(root, f"measuring-{share}.lock"))
        _lock(mine, fcntl.LOCK_EX, told)
        yield mine.fileno()


@contextlib.contextmanager
def alone(root: Path) -> Iterator[bool]:
    """Whether nobody else is at work on this store; if so, nobody begins until the block ends."""
    with _open(root, "measuring.lock") as whole:
        try:
            fcntl.flock(whole, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def gpu_of(environment: Mapping[str, str], *, cuda: bool) -> str | None:
    """The share of a machine that is measured on: the one GPU that this environment shows, or None, the whole machine.

    Several GPUs are no share: two sweeps might have one of them in common.
    """
    shown = environment.get("CUDA_VISIBLE_DEVICES", "").strip()
    return f"gpu-{shown}" if cuda and shown.replace("-", "").isalnum() else None


def _open(root: Path, name: str) -> IO[str]:
    path = root / "work" / name
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a")


def _lock(file: IO[str], mode: int, on_wait: Callable[[], None]) -> None:
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        on_wait()
        fcntl.flock(file, mode)


def _once(call: Callable[[], None]) -> Callable[[], None]:
    called = False

    def first() -> None:
        nonlocal called
        if not called:
            called = True
            call()

    return first
