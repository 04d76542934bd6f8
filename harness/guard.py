"""Run a command so that nothing it starts outlives it, or us: a small process between the sweep and the worker sees to it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time

TYPE_CHECKING = False  # for type checkers; every cell waits for its guard, so nothing is imported that need not be: not typing either
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Sequence
    from typing import Any

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans below us become our children, also those that left the session or forked twice


@contextlib.contextmanager
def guarded(command: Sequence[str], *, held: int | None, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start ``command`` in a session of its own; yields its guard, which ends as the command does: same exit code, same signal.

    When the block ends, or this process does (however: the guard sees its stdin close), every descendant of the command is killed.
    ``held`` is a descriptor that stays open until the last of them is gone: a lock on it tells others when. ``settings`` go to Popen.
    """
    import subprocess

    kept = () if held is None else (held,)
    guard = [sys.executable, "-I", "-S", __file__, *command]  # nothing but the standard library
    process = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True, pass_fds=kept, **settings)
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()


def main(command: Sequence[str]) -> int:
    """Be the guard of ``command``, until it has ended or our owner is gone."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # the one that listed the folder
                os.set_inheritable(int(name), False)
    alarm, ring = os.pipe()
    os.set_blocking(ring, False)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    nothing = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    worker = os.posix_spawnp(command[0], list(command), os.environ, file_actions=[nothing], setsigdef=[signal.SIGCHLD])
    code = _wait(worker, alarm)
    _kill_descendants()
    return _end_as(code if code is not None else -signal.SIGKILL)


def _wait(worker: int, alarm: int) -> int | None:
    """The exit code of ``worker``, None when the owner went first. Sleeps until a child ends: the worker is being timed."""
    while True:
        for readable in select.select([0, alarm], [], [])[0]:
            os.read(readable, 4096)
            if readable == 0:
                return None
        code = _reap().get(worker)
        if code is not None:
            return code


def _reap() -> dict[int, int]:
    """Exit codes of the children that have ended, by process id."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended


def _kill_descendants() -> None:
    """Again until none is left: one may fork while we look. One that the kernel cannot end yet is waited for: it holds the machine."""
    refused: set[int] = set()
    while found := _descendants() - refused:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            except PermissionError:
                refused.add(pid)
        time.sleep(0.005)
        _reap()


def _descendants() -> set[int]:
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", errors="replace") as file:  # gone meanwhile
            parent = file.read().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(name))
    found: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting += below
    return found


def _end_as(code: int) -> int:
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
