"""Turns on a store: one at a time, and not over while anything that a sweep started is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil

from harness.turns import turn


def silent() -> None:
    """Nobody is told."""


def test_who_has_to_wait_says_so_once(tmp_path: Path) -> None:
    order: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        with turn(tmp_path, lambda: (order.append("waits"), waiting.set())):
            order.append("second")

    other = threading.Thread(target=second)
    with turn(tmp_path, silent):
        other.start()
        assert waiting.wait(10)
        order.append("first")
    other.join()
    assert order == ["waits", "first", "second"]


def test_a_turn_lasts_until_all_that_its_killed_holder_started_is_gone(tmp_path: Path) -> None:
    """The guard is stopped, so that it notices late: only when somebody else has come and waits."""
    holder = f"""
import pathlib, sys
from harness.guard import guarded
from harness.turns import turn
with turn(pathlib.Path({str(tmp_path)!r}), print) as held:
    with guarded([sys.executable, "-c", "import time; print('asleep', flush=True); time.sleep(3600)", "{tmp_path}"], held=held) as guard:
        print(guard.pid, flush=True)
        guard.wait()
"""
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first, second = sorted(process.stdout.readline().strip() for _ in range(2))
        guard, said = int(first), second
        assert said == "asleep"
        os.kill(guard, signal.SIGSTOP)
        process.kill()
        process.stdout.close()
    told: list[int] = []

    def go_on() -> None:
        told.append(len(_sleepers(tmp_path)))
        os.kill(guard, signal.SIGCONT)

    with turn(tmp_path, go_on):
        assert (told, _sleepers(tmp_path)) == ([1], [])


def _sleepers(place: Path) -> list[int]:
    """The command itself: not its guard."""
    found = psutil.process_iter(["pid", "cmdline"])
    return [
        process.info["pid"]
        for process in found
        if (process.info["cmdline"] or [])[-1:] == [str(place)] and "-I" not in process.info["cmdline"]
    ]
