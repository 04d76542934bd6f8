"""A cell in several processes is one cell: one record, rank 0's steps, the failure of whichever rank failed first."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import psutil
import pytest

from harness.config import Limits
from harness.launch import run_cell
from harness.ranks import crowded, died, ended, own_log, threads, worker_command
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
    assert [(one.rank, one.phase) for one in record.measurement.memory] == [
        (rank, phase) for rank in (0, 1) for phase in ("setup", "first_step", "steady")
    ]
    assert [(one.rank, len(one.seconds), one.waiting_seconds) for one in record.measurement.ranks] == [(0, 4, None), (1, 4, None)]
    assert record.measurement.ranks[0].seconds == record.measurement.steps.seconds
    assert all(one.peak_rss_bytes for one in record.measurement.memory if one.phase == "setup")
    begun = [line for line in (tmp_path / "work" / "diary.txt").read_text().splitlines() if line.startswith("begin")]
    assert len(begun) == 2


def test_a_rank_that_runs_out_of_memory_ends_the_others_and_is_told(prepared: Made, tmp_path: Path) -> None:
    record = run(prepared, tmp_path, behaviour="one_rank")
    assert record.status == "oom"
    assert record.reason is not None
    assert "CUDA out of memory" in record.reason
    left = [process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(process.info["cmdline"] or [])]
    assert left == []


def test_where_each_rank_stands_is_told_when_they_are_stopped(prepared: Made, tmp_path: Path) -> None:
    impatient = Limits(wall_seconds=60.0, no_progress_seconds=4.0)
    record = run(prepared, tmp_path, behaviour="apart", at_step=1, limits=impatient)
    assert (record.status, len(record.measurement.steps.losses) if record.measurement else 0) == ("no_progress", 1)
    first, second = (line for line in (record.reason or "").splitlines() if line.startswith("rank "))
    assert re.fullmatch(
        r"rank 0 stood in <engine-room>/tests/fakes/faulty.py:\d+ \(_wait_for_the_other\), there in .*threading.py:\d+ \(wait\)", first
    )
    assert re.fullmatch(r"rank 1 stood in <engine-room>/tests/fakes/faulty.py:\d+ \(_stray\)", second)


def test_one_process_needs_no_launcher() -> None:
    assert worker_command("python", Path("job.json"), 1) == ["python", "-m", "harness.worker", "job.json"]
    assert "torch.distributed.run" in worker_command(sys.executable, Path("job.json"), 2)


def test_ranks_share_the_cores_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 9)
    assert threads("cpu", 2) == {"OMP_NUM_THREADS": "4"}
    assert threads("cpu", 1) == threads("cuda", 2) == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads("cpu", 2) == {}


def test_more_threads_than_cores_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert crowded("cpu", 2) == crowded("cpu", 1) == crowded("cuda", 8) == ()
    (said,) = crowded("cpu", 3)
    assert said == (
        "3 ranks of OMP_NUM_THREADS=4 threads share 8 cores, which may slow them down several times: unset it, and each rank takes 2"
    )
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert crowded("cpu", 3) == ()


def test_each_rank_writes_a_log_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert own_log(Path("w/events.jsonl")) == Path("w/events.jsonl")
    monkeypatch.setenv("RANK", "3")
    assert own_log(Path("w/events.jsonl")) == Path("w/events-rank3.jsonl")


def test_the_first_failure_counts_even_after_rank_0_has_finished(tmp_path: Path) -> None:
    finished = {"event": "finished", "adapter_sha256": "a", "wall_seconds": 1.0}
    assert ended([finished], tmp_path) == finished
    for number, seconds in ((1, 3.0), (2, 2.0)):
        failed = {"event": "failed", "status": "crash", "reason": "lost", "wall_seconds": seconds}
        (tmp_path / f"events-rank{number}.jsonl").write_text(json.dumps(failed) + "\n")
    last = ended([finished], tmp_path)
    assert last is not None
    assert last["reason"] == "rank 2: lost"


def test_what_all_ranks_refuse_is_told_without_a_rank(tmp_path: Path) -> None:
    failed = {"event": "failed", "status": "unsupported", "reason": "no such GPU", "wall_seconds": 1.0}
    (tmp_path / "events-rank1.jsonl").write_text(json.dumps(failed) + "\n")
    last = ended([failed], tmp_path)
    assert last is not None
    assert last["reason"] == "no such GPU"


REPORT = """Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Failures:
[1]:
  time      : 2026-11-26_23:19:51
  rank      : 0 (local_rank: 0)
  exitcode  : {0} (pid: 21353)
Root Cause (first observed failure):
[0]:
  time      : 2026-11-26_23:19:51
  rank      : 1 (local_rank: 1)
  exitcode  : {1} (pid: 21354)
"""


@pytest.mark.parametrize(
    ("codes", "told", "dead"),
    [
        ((-15, -9), False, (1, -9)),
        ((70, -9), True, (1, -9)),  # rank 0 complained of the connection that rank 1's end had cut
        ((-11, 70), True, (0, -11)),
        ((-15, 70), True, None),  # it has said why
        ((-15, 7), False, (1, 7)),
        ((-6, 70), True, None),  # NCCL gave up waiting for rank 1
        ((-15, -6), False, (1, -6)),
    ],
)
def test_a_rank_that_died_without_a_word_is_told_from_those_that_it_left(codes: tuple[int, int], told: bool, dead: object) -> None:
    assert died(f"before\n{REPORT.format(*codes)}", told=told) == dead


def test_nobody_died_where_torchrun_has_nothing_to_report() -> None:
    assert died("  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 1)\n", told=False) is None
