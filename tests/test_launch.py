"""Every way a worker can end becomes a record with the right status, and leaves no process behind."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

import psutil
import pytest

from harness.config import Limits
from harness.launch import adapter_folder, run_cell
from harness.record import Record, dumps, loads
from tests import workloads
from tests.workloads import Made

IMPATIENT = Limits(wall_seconds=60.0, no_progress_seconds=4.0)


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
    assert all(memory.peak_allocated_bytes is None for memory in record.measurement.memory), "a CPU has no allocator peak"
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
    assert run(prepared, tmp_path, behaviour="hang", limits=IMPATIENT).status == "no_progress"
    slow = run(prepared, tmp_path, step_seconds=3.0, limits=Limits(wall_seconds=7.0, no_progress_seconds=30.0))
    assert slow.status == "timeout"
    assert slow.measurement is not None
    assert len(slow.measurement.steps.losses) >= 1


def test_the_whole_group_is_killed(prepared: Made, tmp_path: Path) -> None:
    record = run(prepared, tmp_path, behaviour="fork", limits=IMPATIENT)
    assert record.status == "no_progress"
    (pid_file,) = tmp_path.glob("work/*/child.pid")
    pid = int(pid_file.read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


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


def test_two_sweeps_on_one_store_take_turns_and_say_so(prepared: Made, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "work").mkdir()
    with (tmp_path / "work" / "measuring.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def hear(event: dict[str, object]) -> None:
            said.append(str(event["event"]))
            if event["event"] == "waiting":
                fcntl.flock(other, fcntl.LOCK_UN)

        assert run_cell(workloads.request(prepared.workload), workloads.MACHINE, prepared.prepared, tmp_path, hear).status == "ok"
    assert said[:2] == ["waiting", "started"]


def test_repeats_with_equal_weights_share_one_adapter(prepared: Made, tmp_path: Path) -> None:
    for repeat in range(2):
        request = workloads.request(prepared.workload, repeat=repeat)
        assert run_cell(request, workloads.MACHINE, prepared.prepared, tmp_path, lambda event: None).status == "ok"
    assert len(list((tmp_path / "adapters").iterdir())) == 1
