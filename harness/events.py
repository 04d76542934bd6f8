"""The worker's event log: one JSON line an event, appended as it happens, so that a killed cell keeps what it measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.record import Artifacts, Measurement, Memory, Startup, Steps

Event = dict[str, Any]


class EventLog:
    """Appends events to a file. ``started``, ``ready``, ``step``, ``memory`` and one ending: ``finished`` or ``failed``."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, event: str, fields: dict[str, Any]) -> None:
        """Append one event and hand it to the operating system."""
        self._file.write(json.dumps({"event": event, **fields}) + "\n")
        self._file.flush()


class EventReader:
    """Reads a growing event log: complete lines only, each once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.garbage: str | None = None

    def new(self) -> list[Event]:
        """The events appended since the last call. A line that is no event is kept in ``garbage`` and ends the reading."""
        if self.garbage is not None or not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        events = []
        for line in complete.splitlines():
            event = _event(line)
            if event is None:
                self.garbage = line[:200].decode(errors="replace")
                break
            events.append(event)
        return events


def _event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def ending(events: Sequence[Event]) -> Event | None:
    """The ``finished`` or ``failed`` event, if the worker got that far."""
    return next((event for event in events if event["event"] in ("finished", "failed")), None)


def measurement(events: Sequence[Event], artifacts: Artifacts) -> Measurement | None:
    """What the log holds, as the record's measurement; None when the worker did not even start."""
    started = next((event for event in events if event["event"] == "started"), None)
    if started is None:
        return None
    ready = next((event for event in events if event["event"] == "ready"), None)
    steps = [event for event in events if event["event"] == "step"]
    columns = {name: tuple(step[name] for step in steps) for name in STEP_FIELDS}
    return Measurement(
        startup=Startup(process_seconds=started["process_seconds"], setup_seconds=ready["setup_seconds"] if ready else None),
        steps=Steps(**columns),
        memory=tuple(Memory(**event["memory"]) for event in events if event["event"] == "memory"),
        artifacts=artifacts,
    )


STEP_FIELDS = tuple(Steps.model_fields)
