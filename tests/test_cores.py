"""A cell that had to share its cores says so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.config import Request
from harness.cores import BUSY, Clocks, clocks, taken_by_others
from harness.launch import run_cell
from harness.machine import detect
from tests import workloads
from tests.workloads import Made

BEFORE = Clocks(wall=100.0, busy=500.0, own=10.0)


@pytest.mark.parametrize(
    ("busy", "own", "says"),
    [(20.0, 12.0, "0.8 of the 2 cores"), (20.0, 19.0, None), (15.0, 5.0, None), (18.5, 14.0, "0.5 of the 2 cores")],
    ids=["others had most", "all were its own", "a core was free", "just about full"],
)
def test_others_count_where_hardly_a_core_was_free(busy: float, own: float, says: str | None) -> None:
    after = Clocks(wall=110.0, busy=500.0 + busy, own=10.0 + own)
    said = taken_by_others(BEFORE, after, 2)
    assert [says in note and note.startswith(BUSY) for note in said if says] == ([True] if says else [])
    assert bool(said) == (says is not None)


def test_where_the_system_says_nothing_nothing_is_said() -> None:
    assert taken_by_others(None, BEFORE, 2) == taken_by_others(BEFORE, None, 2) == taken_by_others(BEFORE, BEFORE, 2) == ()


@pytest.mark.skipif(clocks() is None, reason="no /proc/stat here")
def test_a_cell_beside_busy_programs_notes_it(prepared: Made, tmp_path: Path) -> None:
    request: Request = workloads.request(prepared.workload, step_seconds=0.02)
    count = (os.cpu_count() or 1) + 1
    burning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.2)
        record = run_cell(request, detect("cpu"), prepared.prepared, tmp_path, lambda event: None)
    finally:
        for one in burning:
            one.kill()
            one.wait()
    assert record.status == "ok"
    assert any(note.startswith(BUSY) for note in record.notes)
