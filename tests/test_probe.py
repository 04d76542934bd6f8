"""The stopwatch: host clocks on a CPU; on a GPU events that are read only once they have passed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.data import StepTokens
from harness.events import EventLog, EventReader
from harness.probe import StepProbe
from harness.startup import ImportClock

TOKENS = StepTokens(input=8, loss=4, processed=10, sha256="ab")


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    with EventReader(path) as reader:
        return [event for event in reader.new() if event["event"] == kind]


def test_a_cpu_step_lasts_from_the_end_of_the_one_before(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    with EventLog(log) as sink:
        began = time.monotonic()
        time.sleep(0.05)
        probe = StepProbe(sink, ImportClock(), device="cpu", num_steps=3, began=began, data_seconds=0.01)
        probe.ready({"plan": "all kept", "loss_chunk": 7})
        for seconds in (0.02, 0.04, 0.01):
            time.sleep(seconds)
            probe.step(loss=1.0, grad_norm=None, tokens=TOKENS)
        probe.decided({"products": "1 of 2"})
        probe.finish()
    for event, slept in zip(events(log, "step"), (0.02, 0.04, 0.01), strict=True):
        assert slept <= event["seconds"] < slept + 0.5
    (ready,) = events(log, "ready")
    assert 0.05 <= ready["setup_seconds"] < 0.6
    assert ready["data_seconds"] == 0.01
    assert ready["chosen"] == {"plan": "all kept", "loss_chunk": 7}
    assert [event["chosen"] for event in events(log, "decided")] == [{"products": "1 of 2"}]
    assert [event["compiles"] for event in events(log, "step")] == [0, 0, 0]
    assert {event["host_seconds"] for event in events(log, "step")} == {None}, "a CPU has no second clock"
    assert [event["grad_norms"] for event in events(log, "step")] == [None, None, None]
    assert [event["memory"]["phase"] for event in events(log, "memory")] == ["setup", "first_step", "steady"]


def test_what_a_rank_waits_is_part_of_its_step(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    with EventLog(log) as sink:
        probe = StepProbe(sink, ImportClock(), device="cpu", num_steps=2, began=time.monotonic(), data_seconds=0.01)
        probe.ready()
        for _ in range(2):
            with probe.waits():
                time.sleep(0.03)
            for _ in range(3):
                with probe.exchanges():
                    time.sleep(0.02)
        probe.step(loss=1.0, grad_norm=None, tokens=TOKENS)
        probe.step(loss=1.0, grad_norm=None, tokens=TOKENS)
        probe.finish()
    first, second = events(log, "step")
    assert 0.06 <= first["waiting_seconds"] <= first["seconds"]
    assert 0.12 <= first["exchanging_seconds"] <= first["seconds"] - first["waiting_seconds"]
    assert (second["waiting_seconds"], second["exchanging_seconds"]) == (None, None)


class FakeEvent:
    """A CUDA event of a device whose work we let pass by hand."""

    clock = 0.0
    passed_until = 0.0
    synchronised = 0

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        FakeEvent.clock += 10.0
        self.at = FakeEvent.clock

    def query(self) -> bool:
        return self.at <= FakeEvent.passed_until

    def synchronize(self) -> None:
        if not self.query():
            FakeEvent.synchronised += 1

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


class FakeValues:
    """A pinned buffer."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], float] = {}

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple):
            return SimpleNamespace(copy_=lambda value, non_blocking: self.rows.__setitem__(key, value))
        return SimpleNamespace(tolist=lambda: [self.rows.get((key, 0)), self.rows.get((key, 1))])


class FakeScalar(float):
    """A scalar tensor on the device."""

    def detach(self) -> FakeScalar:
        return self

    def to(self, dtype: object) -> FakeScalar:
        return self

    def reshape(self, shape: object) -> FakeScalar:
        return self


def fake_torch() -> SimpleNamespace:
    retries = iter((1, 1, 4))  # counted since the process began: resetting the peaks does not reset it

    def stats() -> dict[str, int]:
        peaks = {f"{kind}_bytes.all.peak": size * 2**30 for kind, size in (("allocated", 3), ("active", 4), ("reserved", 5))}
        return {**peaks, "num_alloc_retries": next(retries)}

    cuda = SimpleNamespace(
        Event=FakeEvent, synchronize=lambda: None, memory_stats=stats, reset_peak_memory_stats=lambda: None, device_count=lambda: 1,
        memory_stats_as_nested_dict=lambda: {"reserved_bytes": {"all": {"current": 5 * 2**30}}},
        get_device_properties=lambda index: SimpleNamespace(uuid="0123-4567"),
    )  # fmt: skip
    return SimpleNamespace(cuda=cuda, float32="float32", full=lambda *a, **k: FakeValues(), as_tensor=FakeScalar)


def test_a_gpu_step_is_read_once_its_event_has_passed_and_never_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch())
    log = tmp_path / "events.jsonl"
    with EventLog(log) as sink:
        probe = StepProbe(sink, ImportClock(), device="cuda", num_steps=3, began=time.monotonic(), data_seconds=0.0)
        probe.ready()
        for loss in (3.0, 2.0, 1.0):
            with probe.exchanges():
                FakeEvent.clock += 5.0
            probe.step(loss=loss, grad_norm=0.5, tokens=TOKENS)
            assert FakeEvent.synchronised == 0
        assert events(log, "step") == [], "nothing has passed yet, so nothing may have been read"
        FakeEvent.passed_until = FakeEvent.clock
        probe.finish()
    assert [(event["losses"], event["grad_norms"], event["seconds"]) for event in events(log, "step")] == [
        (3.0, 0.5, 0.035), (2.0, 0.5, 0.035), (1.0, 0.5, 0.035),
    ]  # fmt: skip
    assert [(event["exchanging_seconds"], event["waiting_seconds"]) for event in events(log, "step")] == [(0.015, None)] * 3
    memory = [event["memory"] for event in events(log, "memory")]
    assert [memory[-1][f"peak_{kind}_bytes"] for kind in ("allocated", "active", "reserved")] == [3 * 2**30, 4 * 2**30, 5 * 2**30]
    assert [one["num_alloc_retries"] for one in memory] == [1, 0, 3], "of each phase"
    assert all(event["host_seconds"] >= 0 and event["reserved_bytes"] == 5 * 2**30 for event in events(log, "step"))
    assert events(log, "ready")[0]["gpus"] == ["0123-4567"]
