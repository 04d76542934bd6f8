"""The command as a person types it: a sweep over a fake engine, its records, its exit code, its report, and its resumption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.store import load
from tests.sweeps import FAKES, TREE, overrides


def command(cache: Path, runs: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "harness", "--config-dir", str(FAKES), *overrides(cache, runs, *more)]


def harness(cache: Path, runs: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(cache, runs, *more), cwd=TREE, capture_output=True, text=True, check=False, timeout=300)


def test_a_sweep_records_reports_and_resumes(cache: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    sweep = ("-m", "engine.knobs.step_seconds=0.0,0.01", "repeat=range(2)")
    first = harness(cache, runs, *sweep)
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"report: {runs / 'report.html'}" in first.stdout.replace("\n", "")
    assert (runs / "report.html").exists()
    assert len(load(runs).stored) == 4
    second = harness(cache, runs, *sweep)
    assert second.returncode == 0
    assert len(load(runs).stored) == 4, "what is recorded is not run again"
    third = harness(cache, runs, *sweep, "rerun=all")
    assert third.returncode == 0
    assert len(load(runs).stored) == 8


@pytest.mark.parametrize(
    ("endings", "limits"),
    [
        (
            {
                "raise": "crash", "segfault": "crash", "garbage": "crash", "full_disk": "crash", "full_log": "crash",
                "host_oom": "oom_host", "oom": "oom", "unsupported": "unsupported", "ok": "ok",
            },
            (),
        ),
        ({"fork": "no_progress", "ok": "ok"}, ("limits.no_progress_seconds=15.0",)),  # fork leaves a child and hangs
    ],
    ids=["at once", "silent"],
)  # fmt: skip
def test_failing_cells_do_not_stop_the_others(cache: Path, tmp_path: Path, endings: dict[str, str], limits: tuple[str, ...]) -> None:
    """Whatever happens to a worker is a row of its own, and the last cell runs as if nothing had been."""
    runs = tmp_path / "runs"
    done = harness(cache, runs, "-m", f"engine.knobs.behaviour={','.join(endings)}", *limits)
    assert done.returncode == 5, done.stdout + done.stderr
    assert {str(stored.record.cell.engine.knobs["behaviour"]): stored.record.status for stored in load(runs).stored} == endings


def test_nothing_measured_is_never_success(cache: Path, tmp_path: Path) -> None:
    done = harness(cache, tmp_path / "runs", "engine.knobs.behaviour=unsupported")
    assert done.returncode == 6
    assert "this fake cannot do that" in done.stdout


def test_plan_only_runs_nothing_and_says_why(cache: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    done = harness(cache, runs, "-m", "engine.knobs.behaviour=ok,unsupported", "plan=only")
    assert done.returncode == 0
    assert "1 of 2 cells to run" in done.stdout
    assert "#0  engine.knobs.behaviour=ok\n" in done.stdout, "cells of a sweep are told apart"
    assert "this fake cannot do that" in done.stdout
    assert not runs.exists()


def test_a_mistake_is_exit_code_2_without_a_traceback(cache: Path, tmp_path: Path) -> None:
    done = harness(cache, tmp_path / "runs", "train.stepz=3", "train.steps=0")
    assert done.returncode == 2
    assert "did you mean 'train.steps'" in done.stderr
    assert "Traceback" not in done.stderr


def _hears_ctrl_c() -> None:
    """What a shell starts in the background ignores SIGINT, and so does all that it starts: not so a command in a terminal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_an_interrupt_stops_promptly_and_says_how_to_go_on(cache: Path, tmp_path: Path, how: str) -> None:
    runs = tmp_path / "runs"
    arguments = command(cache, runs, "-m", "engine.knobs.step_seconds=0.5", "repeat=range(50)")
    process = subprocess.Popen(
        arguments, cwd=TREE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=_hears_ctrl_c
    )
    deadline = time.monotonic() + 120
    while not any('"step"' in log.read_text() for log in runs.glob("work/*/events.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    began = time.monotonic()
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # a terminal tells its whole foreground group
    else:
        os.kill(process.pid, signal.SIGTERM)
    said, errors = process.communicate(timeout=30)
    assert time.monotonic() - began < 3
    assert process.returncode == 130
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    assert "of 4 steps; it will run again" in said
    workers = subprocess.run(["pgrep", "-f", str(runs)], capture_output=True, text=True, check=False)
    assert workers.stdout == ""
    assert load(runs).stored == (), "what was interrupted is no result"


@pytest.mark.parametrize("form", ["json", "md", "html"])
def test_the_report_can_be_made_again_from_disk(cache: Path, tmp_path: Path, form: str) -> None:
    runs = tmp_path / "runs"
    assert harness(cache, runs).returncode == 0
    report = [sys.executable, "-m", "harness.report", str(runs), "--out", str(tmp_path / "out"), "--format", form]
    done = subprocess.run(report, cwd=TREE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if form == "json":
        (row,) = json.loads(done.stdout)
        wanted = "machine model method data sequence_length samples_per_step engine knobs processes status reason tokens_per_second"
        assert set(f"{wanted} peak_allocated_gib parity repeats records".split()) <= set(row)
        assert (row["engine"], row["status"], row["peak_allocated_gib"]) == ("faulty", "ok", None)
    else:
        assert (tmp_path / "out" / f"report.{form}").exists()
