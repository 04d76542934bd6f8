"""The event log as it may be found: half written, cut, full of rubbish, or gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.events import Event, EventLog, EventReader, measurement
from harness.record import Artifacts

READY = {"setup_seconds": 1.5}
LINE = json.dumps({"event": "ready", **READY}).encode() + b"\n"


def test_a_half_written_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventReader(path) as reader, path.open("ab", buffering=0) as file:
        assert reader.new() == [], "a log that has not been begun yet"
        file.write(LINE + LINE[:9])
        assert len(reader.new()) == 1
        assert reader.new() == []
        file.write(LINE[9:] + LINE)
        assert [event["setup_seconds"] for event in reader.new()] == [1.5, 1.5]
        assert reader.garbage is None


@pytest.mark.parametrize(
    ("rubbish", "says"),
    [
        (b"\0" * 64 + b"\n", "no event"),
        (b"[1]\n", "[1]"),
        (b"\n", "no event"),
        (b"[" * 100_000 + b"\n", "[[["),
        (b'{"event": "dance"}\n', "dance"),
        (b'{"event": "ready", "setup_seconds": "soon"}\n', "soon"),
        (b'{"event": "failed", "status": "tired", "reason": "", "wall_seconds": 1.0}\n', "tired"),
        (b"x" * 2**22, "a line of more than"),
    ],
)
def test_what_is_no_event_is_told_and_ends_the_reading(tmp_path: Path, rubbish: bytes, says: str) -> None:
    path = tmp_path / "events.jsonl"
    with EventReader(path) as reader:
        path.write_bytes(LINE + rubbish + LINE)
        assert len(reader.new()) == 1
        assert reader.new() == []
        assert reader.garbage is not None
        assert says in reader.garbage
        assert len(reader.garbage) < 300


def test_a_log_that_is_cut_is_told(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventReader(path) as reader:
        path.write_bytes(LINE * 3)
        assert len(reader.new()) == 3
        path.write_bytes(LINE)
        assert reader.new() == []
        assert reader.garbage is not None
        assert "cut" in reader.garbage


def test_a_log_that_is_deleted_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventReader(path) as reader, EventLog(path) as log:
        log.write("ready", READY)
        path.unlink()
        log.write("ready", READY)
        assert len(reader.new()) == 2


def test_many_lines_at_once_are_all_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventReader(path) as reader:
        path.write_bytes(LINE * 200_000)  # more than is read at once
        assert len(reader.new()) == 200_000


@pytest.mark.parametrize(
    ("said", "chosen"),
    [
        ([{"event": "ready"}], None),
        ([{"event": "ready", "chosen": {"plan": "all kept"}}], {"plan": "all kept"}),
        ([{"event": "ready", "chosen": {"a": 1, "b": 1}}, {"event": "decided", "chosen": {"b": 2, "c": 3}}], {"a": 1, "b": 2, "c": 3}),
        ([{"event": "ready"}, {"event": "decided", "chosen": {"c": 3}}], {"c": 3}),
    ],
    ids=["nothing", "at_set_up", "both", "later"],
)
def test_what_was_decided_later_is_recorded_too(said: list[Event], chosen: dict[str, int] | None) -> None:
    artifacts = Artifacts(tokens_sha256="0", base_sha256="0", adapter_init_sha256=None, adapter_sha256=None)
    found = measurement([{"event": "started", "process_seconds": 1.0}, *said], artifacts)
    assert found is not None
    assert found.chosen == chosen


def test_a_decision_is_an_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventReader(path) as reader, EventLog(path) as log:
        log.write("decided", {"chosen": {"products": "1 of 2"}})
        assert [event["chosen"] for event in reader.new()] == [{"products": "1 of 2"}]
