"""Turns on a store: one at a time, and not over while anything that a sweep started is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from harness.turns import alone, gpu_of, turn


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


def test_shares_are_measured_on_at_the_same_time_and_the_whole_alone(tmp_path: Path) -> None:
    order: list[str] = []
    begun = {share: threading.Event() for share in ("gpu-1", "gpu-0", "all")}

    def take(share: str | None) -> None:
        with turn(tmp_path, begun[share or "all"].set, share):
            order.append(share or "all")

    others = [threading.Thread(target=take, args=(share,)) for share in ("gpu-1", "gpu-0", None)]
    with turn(tmp_path, silent, "gpu-0"):
        others[0].start()
        others[0].join(10)
        assert order == ["gpu-1"], "another GPU is free"
        for other, share in zip(others[1:], ("gpu-0", "all"), strict=True):
            other.start()
            assert begun[share].wait(10), "the same GPU and the whole machine are not"
        order.append("mine ends")
    for other in others:
        other.join(10)
    assert order[:2] == ["gpu-1", "mine ends"]
    assert sorted(order[2:]) == ["all", "gpu-0"]


def test_alone_is_who_shares_with_nobody(tmp_path: Path) -> None:
    with alone(tmp_path) as nobody:
        assert nobody
    with turn(tmp_path, silent, "gpu-1"), alone(tmp_path) as nobody:
        assert not nobody
    with turn(tmp_path, silent), alone(tmp_path) as nobody:
        assert not nobody


@pytest.mark.parametrize(
    ("shown", "cuda", "share"),
    [
        ("3", True, "gpu-3"),
        ("GPU-8f2c", True, "gpu-GPU-8f2c"),
        ("0,1", True, None),
        ("", True, None),
        (None, True, None),
        ("3", False, None),
    ],
)
def test_the_one_gpu_that_is_shown_is_a_share(shown: str | None, cuda: bool, share: str | None) -> None:
    assert gpu_of({} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}, cuda=cuda) == share


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
