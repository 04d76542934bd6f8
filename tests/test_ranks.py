"""A cell in several processes is one cell: one record, rank 0's steps, the failure of whichever rank failed first."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from harness.launch import run_cell
from harness.ranks import ended, own_log, worker_command
from harness.record import Record
from tests import workloads
from tests.workloads import Made


def run(made: Made, root: Path, **knobs: object) -> Record:
    return run_cell(workloads.request(made.workload, processes=2, **knobs), workloads.MACHINE, made.prepared, root, lambda event: None)


def test_two_ranks_leave_one_record_with_the_steps_of_the_first(prepared: Made, tmp_path: Path) -> None:
    record = run(prepared, tmp_path, step_seconds=0.01)
    assert (record.status, record.reason) == ("ok", None)
    assert record.measurement is not None
    assert record.measurement.steps.losses == (5.0, 2.5, 5.0 / 3, 1.25)
    assert record.measurement.artifacts.adapter_sha256
    begun = [line for line in (tmp_path / "work" / "diary.txt").read_text().splitlines() if line.startswith("begin")]
    assert len(begun) == 2


def test_a_rank_that_runs_out_of_memory_ends_the_others_and_is_told(prepared: Made, tmp_path: Path) -> None:
    record = run(prepared, tmp_path, behaviour="one_rank")
    assert record.status == "oom"
    assert record.reason is not None
    assert "CUDA out of memory" in record.reason
    left = [process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(process.info["cmdline"] or [])]
    assert left == []


def test_one_process_needs_no_launcher() -> None:
    assert worker_command("python", Path("job.json"), 1) == ["python", "-m", "harness.worker", "job.json"]
    assert "torch.distributed.run" in worker_command(sys.executable, Path("job.json"), 2)


def test_each_rank_writes_a_log_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert own_log(Path("w/events.jsonl")) == Path("w/events.jsonl")
    monkeypatch.setenv("RANK", "3")
    assert own_log(Path("w/events.jsonl")) == Path("w/events-rank3.jsonl")


def test_the_first_failure_counts_even_after_rank_0_has_finished(tmp_path: Path) -> None:
    finished = {"event": "finished", "adapter_sha256": "a", "wall_seconds": 1.0}
    assert ended([finished], tmp_path) == finished
    for number, seconds in ((1, 3.0), (2, 2.0)):
        failed = {"event": "failed", "status": "crash", "reason": f"rank {number}", "wall_seconds": seconds}
        (tmp_path / f"events-rank{number}.jsonl").write_text(json.dumps(failed) + "\n")
    last = ended([finished], tmp_path)
    assert last is not None
    assert last["reason"] == "rank 2"
