"""The worker's event log: one JSON line an event, appended as it happens, so that a killed cell keeps what it measured."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from harness.record import Artifacts, Measurement, Memory, RankSteps, Startup, Status, Steps, Work
from harness.spec import Spec, parse

Event = dict[str, Any]
LOST_LOG = os.EX_IOERR  # a worker's exit code: it could not write its log, so it could not say anything else either

_MOST_BYTES = 2**22  # read at once, and so the longest line; a step is a few hundred bytes


class EventLog:
    """Appends to a file: ``started``, ``ready``, ``step``, ``memory``, ``decided``, ``work``, and an ending, ``finished`` or ``failed``."""

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
    """Reads a growing event log: complete lines only, each once.

    Open it before the writer starts: the file is made, and stays open, so that a log that its worker deletes is still heard.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b", buffering=0)
        self._offset = 0
        self.garbage: str | None = None

    def __enter__(self) -> EventReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def new(self) -> list[Event]:
        """The events appended since the last call. A line that is no event is told in ``garbage`` and ends the reading."""
        events: list[Event] = []
        while self.garbage is None and (lines := self._complete_lines()):
            for line in lines:
                event = _event(line)
                if event is None:
                    self.garbage = f"a line that is no event: {line[:200].decode(errors='replace')}"
                    break
                events.append(event)
        return events

    def _complete_lines(self) -> list[bytes]:
        """The next lines, and the offset moved behind them. What has no end yet is left for the next call."""
        size = os.fstat(self._file.fileno()).st_size
        if size < self._offset:
            self.garbage = f"nothing: its event log was cut from {self._offset} to {size} bytes"
            return []
        complete, newline, rest = os.pread(self._file.fileno(), _MOST_BYTES, self._offset).rpartition(b"\n")
        if not newline and len(rest) == _MOST_BYTES:
            self.garbage = f"a line of more than {_MOST_BYTES} bytes: {rest[:200].decode(errors='replace')}"
        self._offset += len(complete) + len(newline)
        return complete.split(b"\n") if newline else []


class _Started(Spec):
    event: Literal["started"]
    process_seconds: float


class _Ready(Spec):
    """``at``: the monotonic clock, which all processes of a host share. ``gpus``: UUIDs of the devices that the process sees."""

    event: Literal["ready"]
    setup_seconds: float
    import_seconds: float | None = None
    data_seconds: float | None = None
    at: float | None = None
    gpus: tuple[str, ...] = ()
    chosen: dict[str, str | int | float] | None = None


class _Decided(Spec):
    event: Literal["decided"]
    chosen: dict[str, str | int | float]


class _Step(Spec):
    """One value of each of the record's ``Steps``, and the memory in use."""

    event: Literal["step"]
    seconds: float
    losses: float
    grad_norms: float | None
    tokens_input: int
    tokens_loss: int
    tokens_processed: int
    stream_sha256: str
    host_seconds: float | None = None
    reserved_bytes: int | None = None
    compiles: int | None = None
    waiting_seconds: float | None = None
    exchanging_seconds: float | None = None
    rss_bytes: int | None = None


class _Memory(Spec):
    """``at``: the monotonic clock when the phase ended."""

    event: Literal["memory"]
    memory: Memory
    at: float | None = None


class _Work(Spec):
    """``unknown``: why the work of this model is not known."""

    event: Literal["work"]
    work: Work | None
    unknown: str | None
    gemm_peak_flops: float | None


class _Finished(Spec):
    """``wall_seconds``: since the launch, by the monotonic clock."""

    event: Literal["finished"]
    adapter_sha256: str
    wall_seconds: float


class _Failed(Spec):
    event: Literal["failed"]
    status: Status
    reason: str
    wall_seconds: float


_EVENT: TypeAdapter[object] = TypeAdapter(
    Annotated[_Started | _Ready | _Decided | _Step | _Memory | _Work | _Finished | _Failed, Field(discriminator="event")]
)


def _event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
        _EVENT.validate_json(line)
    except (ValueError, RecursionError):
        return None
    assert isinstance(event, dict)
    return event


def ending(events: Sequence[Event]) -> Event | None:
    """The ``finished`` or ``failed`` event, if the worker got that far."""
    return next((event for event in events if event["event"] in ("finished", "failed")), None)


def measurement(
    events: Sequence[Event], artifacts: Artifacts, others: Mapping[int, Sequence[Event]] = types.MappingProxyType({})
) -> Measurement | None:
    """What the log holds, as the record's measurement; None when the worker did not even start. ``others``: the logs of the other ranks."""
    started = next((event for event in events if event["event"] == "started"), None)
    if started is None:
        return None
    ready = next((event for event in events if event["event"] == "ready"), None)
    steps = [event for event in events if event["event"] == "step"]
    work = next((event for event in events if event["event"] == "work"), {"work": None, "unknown": None, "gemm_peak_flops": None})
    columns: dict[str, Any] = {name: _column(name, steps) for name in Steps.model_fields}
    return Measurement(
        startup=Startup(
            process_seconds=started["process_seconds"],
            **{name: ready.get(name) if ready else None for name in ("setup_seconds", "data_seconds", "import_seconds")},
        ),
        steps=Steps(**columns),
        memory=tuple(Memory(**event["memory"]) for said in (events, *others.values()) for event in said if event["event"] == "memory"),
        artifacts=artifacts,
        ranks=tuple(_rank_steps(rank, said) for rank, said in ({0: events, **others} if others else {}).items()),
        chosen=_chosen(events),
        work=parse(Work, work["work"]) if work["work"] else None,
        work_unknown=work["unknown"],
        gemm_peak_flops=work["gemm_peak_flops"],
    )


def _chosen(events: Sequence[Event]) -> dict[str, str | int | float] | None:
    """What the engine decided before its first step and later."""
    told = [event.get("chosen") or {} for event in events if event["event"] in ("ready", "decided")]
    return {name: value for each in told for name, value in each.items()} or None


def _rank_steps(rank: int, events: Sequence[Event]) -> RankSteps:
    steps = [event for event in events if event["event"] == "step"]

    def of_all(name: str) -> tuple[Any, ...] | None:
        values = tuple(step.get(name) for step in steps)
        return values if values and None not in values else None

    seconds = tuple(step["seconds"] for step in steps)
    waiting, exchanging = of_all("waiting_seconds"), of_all("exchanging_seconds")
    return RankSteps(rank=rank, seconds=seconds, waiting_seconds=waiting, exchanging_seconds=exchanging)


def _column(name: str, steps: Sequence[Event]) -> tuple[Any, ...] | None:
    """One value a step; null where a column that may be missing has no value."""
    values = tuple(step.get(name) for step in steps)
    if Steps.model_fields[name].is_required():
        return values
    return values if values and None not in values else None
