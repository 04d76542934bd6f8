"""Sweeps over fake engines as processes of their own, forked from a server that has imported everything, and what they leave behind."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
from rich.console import Console

from harness.config import Request, Settings, requests
from harness.sweep import run

TREE = Path(__file__).resolve().parent.parent
FAKES = TREE / "tests" / "fakes" / "conf"
SMALL = ("model=tiny_llama", "data=dense", "data.sequence_length=16", "data.num_samples=8", "train.steps=4", "train.samples_per_step=2")


def overrides(cache: Path, runs: Path, *more: str) -> list[str]:
    return ["engine=faulty", "machine=cpu", *SMALL, f"cache={cache}", f"runs={runs}", *more]


@dataclass(frozen=True)
class Diary:
    """What the fake engines wrote themselves: how often each cell began and ended, and the children they let loose."""

    begun: Counter[str]
    ended: Counter[str]
    children: tuple[int, ...]


@dataclass(frozen=True)
class Sweeps:
    """The same sweep, started as often as one likes; all that it prints is appended to one file."""

    settings: Settings
    cells: tuple[Request, ...]
    runs: Path

    @classmethod
    def of(cls, cache: Path, runs: Path, *more: str) -> Sweeps:
        place = f"hydra.searchpath=[file://{FAKES}]"
        settings, cells = requests([place, *overrides(cache, runs, *more)], multirun=True)
        return cls(settings, tuple(cells), runs)

    def start(self) -> ForkServerProcess:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["harness.sweep", "harness.config", __name__])
        process = context.Process(target=_sweep, args=(self.settings, self.cells, self.runs.with_name("printed.txt")))
        process.start()
        return process

    def printed(self) -> str:
        return self.runs.with_name("printed.txt").read_text()

    def diary(self) -> Diary:
        path = self.runs / "work" / "diary.txt"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        begun, ended = (Counter(line[1] for line in lines if line[0] == what) for what in ("begin", "end"))
        return Diary(begun, ended, tuple(int(line[2]) for line in lines if line[0] == "child"))

    def left_alive(self, *, within_seconds: float) -> list[str]:
        """Processes of this sweep that are still there after so long: doors, guards, workers and what the engines let loose."""
        deadline = time.monotonic() + within_seconds
        while (found := self._alive()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return found

    def _alive(self) -> list[str]:
        children = set(self.diary().children)
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            mine = process.info["pid"] in children or any(str(self.runs) in part for part in process.info["cmdline"] or [])
            if mine and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(f"{process.info['pid']} {process.info['cmdline']}")
        return found


def _sweep(settings: Settings, cells: tuple[Request, ...], printed: Path) -> None:
    with printed.open("a") as file:
        code = run(settings, cells, Console(file=file, width=300))
    sys.exit(int(code))
