"""Every way a worker can end becomes a record with the right status, and leaves no process behind."""

from __future__ import annotations

import itertools
import re
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import psutil
import pytest

from harness.adapters import adapter_folder
from harness.config import Limits
from harness.launch import run_cell
from harness.record import Price, Record, dumps, loads
from harness.store import load, recorded, save
from tests import workloads
from tests.workloads import Made

IMPATIENT = Limits(wall_seconds=60.0, no_progress_seconds=3.0)


def run(made: Made, root: Path, *, limits: Limits | None = None, **knobs: object) -> Record:
    request = workloads.request(made.workload, limits=limits, **knobs)
    return run_cell(request, workloads.MACHINE, made.prepared, root, lambda event: None)


def test_an_ok_cell_keeps_everything_it_measured(prepared: Made, tmp_path: Path) -> None:
    record = run(prepared, tmp_path, step_seconds=0.01)
    assert record.status == "ok"
    assert record.reason is None
    assert record.measurement is not None
    steps = record.measurement.steps
    assert steps.losses == (5.0, 2.5, 5.0 / 3, 1.25)
    assert all(0.01 <= seconds < 1 for seconds in steps.seconds)
    assert all(tokens > 0 for tokens in steps.tokens_input)
    assert [memory.phase for memory in record.measurement.memory] == ["setup", "first_step", "steady"]
    assert all(memory.peak_rss_bytes for memory in record.measurement.memory)
    of_a_gpu = ("peak_allocated_bytes", "peak_active_bytes", "peak_reserved_bytes", "peak_device_bytes", "num_alloc_retries")
    assert {getattr(memory, name) for memory in record.measurement.memory for name in of_a_gpu} == {None}, "a CPU has none of these"
    assert (steps.host_seconds, steps.reserved_bytes, record.measurement.gpus, record.measurement.gemm_peak_flops) == (None, None, (), None)
    assert steps.compiles == (0, 0, 0, 0)
    startup = record.measurement.startup
    assert None not in (startup.setup_seconds, startup.data_seconds, startup.import_seconds)
    assert record.measurement.work is None
    assert record.measurement.work_unknown == "config.json of the base cannot be read: No such file or directory"
    adapter = record.measurement.artifacts.adapter_sha256
    assert adapter
    assert (adapter_folder(tmp_path, adapter) / "adapter_model.safetensors").exists()
    assert loads(dumps(record), "round trip") == record


@pytest.mark.parametrize(
    ("behaviour", "status", "says"),
    [
        ("raise", "crash", "<b>broken</b> on purpose"),
        ("exit", "crash", "exit code 7"),
        ("segfault", "crash", "SIGSEGV"),
        ("kill", "crash", "SIGKILL"),
        ("host_oom", "oom_host", "no more"),
        ("oom", "oom", "CUDA out of memory"),
        ("garbage", "crash", "no event"),
        ("few_steps", "crash", "3 of 4 steps"),
        ("no_adapter", "crash", "adapter"),
        ("refuse", "unsupported", "wrong kind"),
        ("address_space", "oom_host", "Unable to allocate"),
        ("wrong_event", "crash", "quick"),
        ("endless_line", "crash", "a line of more than"),
        ("cut_log", "crash", "event log was cut"),
        ("full_log", "crash", "is the disk full"),
        ("full_disk", "crash", "the disk is full: free some space"),
        ("shout", "crash", "hoarse"),
    ],
)
def test_every_ending_has_its_status(prepared: Made, tmp_path: Path, behaviour: str, status: str, says: str) -> None:
    record = run(prepared, tmp_path, behaviour=behaviour)
    assert record.status == status
    assert record.reason is not None
    assert says in record.reason


@pytest.mark.parametrize("behaviour", ["exit", "segfault", "kill", "raise"])
def test_a_cell_that_dies_keeps_the_steps_it_made(prepared: Made, tmp_path: Path, behaviour: str) -> None:
    record = run(prepared, tmp_path, behaviour=behaviour, at_step=2)
    assert record.measurement is not None
    assert record.measurement.steps.losses == (5.0, 2.5)


def test_no_progress_and_timeout_are_told_apart(prepared: Made, tmp_path: Path) -> None:
    hung = run(prepared, tmp_path, behaviour="hang", limits=IMPATIENT)
    assert hung.status == "no_progress"
    assert re.search(r"^it stood in <engine-room>/tests/fakes/faulty.py:\d+ \(_misbehave\)$", hung.reason or "", re.MULTILINE)
    slow = run(prepared, tmp_path, step_seconds=3.0, limits=Limits(wall_seconds=7.0, no_progress_seconds=30.0))
    assert slow.status == "timeout"
    assert slow.measurement is not None
    assert len(slow.measurement.steps.losses) >= 1


@pytest.mark.parametrize(("behaviour", "status"), [("fork", "no_progress"), ("escape", "ok")])
def test_nothing_that_a_worker_started_outlives_its_cell(prepared: Made, tmp_path: Path, behaviour: str, status: str) -> None:
    assert run(prepared, tmp_path, behaviour=behaviour, limits=IMPATIENT).status == status
    (child,) = (line for line in (tmp_path / "work" / "diary.txt").read_text().splitlines() if line.startswith("child"))
    assert not psutil.pid_exists(int(child.split()[2]))


def test_a_log_that_is_deleted_is_still_heard(prepared: Made, tmp_path: Path) -> None:
    record = run(prepared, tmp_path, behaviour="delete_log")
    assert record.status == "ok"
    assert record.measurement is not None
    assert len(record.measurement.steps.losses) == 4


def test_a_worker_that_has_said_how_it_ended_and_does_not_go_is_sent_home(prepared: Made, tmp_path: Path) -> None:
    assert run(prepared, tmp_path, behaviour="linger", limits=IMPATIENT).status == "ok"


@pytest.mark.parametrize("processes", [1, 2])
def test_what_would_abort_while_python_ends_loses_no_measurement(prepared: Made, tmp_path: Path, processes: int) -> None:
    request = workloads.request(prepared.workload, processes=processes, limits=IMPATIENT, behaviour="abort_late")
    record = run_cell(request, workloads.MACHINE, prepared.prepared, tmp_path, lambda event: None)
    assert (record.status, record.reason) == ("ok", None)
    assert record.measurement is not None
    assert len(record.measurement.steps.losses) == 4


def test_the_kernel_that_ends_a_worker_for_memory_is_told_from_a_person(
    monkeypatch: pytest.MonkeyPatch, prepared: Made, tmp_path: Path
) -> None:
    kills = itertools.count()
    monkeypatch.setattr("harness.launch._kernel_oom_kills", lambda: next(kills))
    record = run(prepared, tmp_path, behaviour="kill")
    assert record.status == "oom_host"
    assert record.reason is not None
    assert "smaller micro-batch" in record.reason


def test_a_clock_that_goes_back_changes_no_duration_and_no_order(monkeypatch: pytest.MonkeyPatch, prepared: Made, tmp_path: Path) -> None:
    """Every look at the wall clock finds it a day earlier, or two days later."""
    now = [datetime(2030, 1, 10, tzinfo=UTC)]

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            now[0] += timedelta(days=2) if now[0].day % 5 == 0 else timedelta(days=-1)
            return now[0]

    def jumping_time() -> float:
        return Jumping.now().timestamp()

    monkeypatch.setattr("harness.provenance.datetime", Jumping)
    monkeypatch.setattr("time.time", jumping_time)
    made: list[Record] = []
    for _ in range(4):
        request = workloads.request(prepared.workload)
        record = run_cell(request, workloads.MACHINE, prepared.prepared, tmp_path, lambda event: None, earlier=made)
        assert record.status == "ok"
        assert 0 < record.provenance.wall_seconds < 30
        save(record, tmp_path)
        made.append(record)
    assert recorded(tmp_path, workloads.MACHINE, made[0].cell) == made, "four files, in the order of their making"
    assert [stored.record for stored in load(tmp_path).stored] == made
    notes = [any("the clock said" in note for note in record.notes) for record in made]
    assert notes == [False, True, True, True], "a date that was not the clock's says so"


def test_a_loss_that_is_not_a_number_survives_the_record(prepared: Made, tmp_path: Path) -> None:
    record = run(prepared, tmp_path, behaviour="nan")
    assert record.status == "ok"
    assert "NaN" in dumps(record)
    again = loads(dumps(record), "round trip")
    assert again.measurement is not None
    assert all(loss != loss for loss in again.measurement.steps.losses)


def test_a_record_names_no_path_of_this_machine(prepared: Made, tmp_path: Path) -> None:
    text = dumps(run(prepared, tmp_path, behaviour="raise"))
    assert str(Path.home()) + "/" not in text
    assert str(Path(__file__).resolve().parent.parent) not in text
    assert str(tmp_path) not in text


def test_a_price_is_kept_with_the_record(prepared: Made, tmp_path: Path) -> None:
    price = Price(dollars_per_hour=2.5, date="2026-11-24")
    request = workloads.request(prepared.workload)
    request = request.model_copy(update={"machine": request.machine.model_copy(update={"price": price})})
    assert run_cell(request, workloads.MACHINE, prepared.prepared, tmp_path, lambda event: None).provenance.price == price


def test_a_memory_cap_has_no_meaning_on_a_cpu(prepared: Made, tmp_path: Path) -> None:
    capped = workloads.MACHINE.model_copy(update={"memory_cap_gib": 4})
    record = run_cell(workloads.request(prepared.workload), capped, prepared.prepared, tmp_path, lambda event: None)
    assert record.status == "unsupported"
    assert record.reason is not None
    assert "machine.memory_cap_gib caps the allocator of a GPU" in record.reason


def test_repeats_with_equal_weights_share_one_adapter(prepared: Made, tmp_path: Path) -> None:
    for repeat in range(2):
        request = workloads.request(prepared.workload, repeat=repeat)
        assert run_cell(request, workloads.MACHINE, prepared.prepared, tmp_path, lambda event: None).status == "ok"
    assert len(list((tmp_path / "adapters").iterdir())) == 1
