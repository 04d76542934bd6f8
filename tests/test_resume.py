"""From where a cell goes on: the last checkpoint whose steps are all logged, by the same engine on the same data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness import resume
from harness.config import Request
from harness.places import Saving, WorkerJob
from harness.plan import plan
from harness.rank import failure_text
from harness.report import table
from tests import records, workloads
from tests.workloads import Made


@pytest.fixture
def request_(prepared: Made) -> Request:
    return workloads.request(prepared.workload).model_copy(update={"save_every": 2})


def begin(request: Request, prepared: Made, root: Path, fingerprint: str = "f") -> Saving:
    found = resume.saving(request, workloads.MACHINE, prepared.prepared, fingerprint, root, root / "work")
    assert found is not None
    return found


def left(request: Request, prepared: Made, root: Path, saving: Saving, steps: range, saved: tuple[int, ...]) -> None:
    """What a killed process leaves: its job, the steps that it logged, its checkpoints."""
    work = root / "work"
    work.mkdir(exist_ok=True)
    provenance = records.record().provenance
    job = WorkerJob(
        cell=request.cell, machine=workloads.MACHINE, prepared=prepared.prepared, provenance=provenance,
        out=str(work / "adapter"), events=str(work / "events.jsonl"), launched_monotonic=0.0, saving=saving,
    )  # fmt: skip
    (work / "job.json").write_text(job.model_dump_json())
    (work / "events.jsonl").write_text("".join(json.dumps(step(number)) + "\n" for number in steps))
    for number in saved:
        (Path(saving.folder) / f"step-{number:08d}").mkdir(parents=True)


def step(number: int) -> dict[str, Any]:
    tokens = {"tokens_input": 1, "tokens_loss": 1, "tokens_processed": 1, "stream_sha256": "s"}
    return {"event": "step", "seconds": 1.0, "losses": float(number), "grad_norms": None, **tokens}


def losses(saving: Saving) -> list[float]:
    return [event["losses"] for event in resume.steps_before(saving)]


def test_a_first_run_starts_and_goes_on_twice(request_: Request, prepared: Made, tmp_path: Path) -> None:
    first = begin(request_, prepared, tmp_path)
    assert (first.made, first.resumed_at, losses(first)) == (0, (), [])
    left(request_, prepared, tmp_path, first, range(5), (2, 4))
    second = begin(request_, prepared, tmp_path)
    assert (second.made, second.resumed_at, losses(second)) == (4, (4,), [0.0, 1.0, 2.0, 3.0])
    assert begin(request_, prepared, tmp_path) == second, "asked again before it began, the log of the first is still there"
    left(request_, prepared, tmp_path, second, range(4, 9), (6, 8))
    third = begin(request_, prepared, tmp_path)
    assert (third.made, third.resumed_at, losses(third)) == (8, (4, 8), [float(number) for number in range(8)])


def test_a_checkpoint_counts_once_its_steps_are_logged(request_: Request, prepared: Made, tmp_path: Path) -> None:
    """A GPU's last step may be missing in the log: then the one before counts."""
    first = begin(request_, prepared, tmp_path)
    left(request_, prepared, tmp_path, first, range(3), (2, 4))
    assert begin(request_, prepared, tmp_path).made == 2


def test_what_a_changed_engine_left_is_deleted(request_: Request, prepared: Made, tmp_path: Path) -> None:
    first = begin(request_, prepared, tmp_path)
    left(request_, prepared, tmp_path, first, range(5), (2, 4))
    (Path(first.folder) / "step-00000006.partial").mkdir()
    assert begin(request_, prepared, tmp_path, "g").made == 0
    assert not list(Path(first.folder).glob("step-*"))


def test_checkpoints_outlive_what_was_cut_short_only(request_: Request, prepared: Made, tmp_path: Path) -> None:
    saving = begin(request_, prepared, tmp_path)
    resume.end(saving, "crash")
    assert Path(saving.folder).is_dir()
    resume.end(saving, "ok")
    assert not Path(saving.folder).exists()
    resume.end(None, "ok")


def test_nothing_is_saved_unless_asked_for(prepared: Made, tmp_path: Path) -> None:
    asked = workloads.request(prepared.workload)
    assert resume.saving(asked, workloads.MACHINE, prepared.prepared, "f", tmp_path, tmp_path / "work") is None
    assert resume.steps_before(None) == []


def test_an_engine_that_cannot_save_is_refused_before_it_starts(request_: Request) -> None:
    (planned,) = plan([request_], [], "stale")
    assert planned.action == "unsupported"
    assert planned.reason is not None
    assert "writes no checkpoints; set save_every=null, or choose an engine that does" in planned.reason


def test_a_run_that_went_on_has_no_rate() -> None:
    made = records.record(rate=9999.0, repeat=0)
    assert made.measurement is not None
    went_on = made.model_copy(update={"measurement": made.measurement.model_copy(update={"resumed_at": (4, 8)})})
    assert failure_text(went_on) == "repeat 0: ok: it went on from a checkpoint after step 4, 8, so no rate is its own"
    shown = table(records.results([records.stored(went_on), records.stored(records.record(rate=1000.0, repeat=1))]))
    assert "9,999" not in shown
    assert "it went on from a checkpoint" in shown
