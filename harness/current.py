"""Which of many records count: the newest of a cell, of an engine as it is now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from harness.record import Record
from harness.spec import EngineSpec


def latest(records: Iterable[Record]) -> tuple[Record, ...]:
    """The newest record of every (machine, cell): a cell that was run again counts once."""
    newest: dict[tuple[str, str], Record] = {}
    for record in records:
        key = (record.machine.key, record.cell.key)
        if key not in newest or newest[key].provenance.started_utc < record.provenance.started_utc:
            newest[key] = record
    return tuple(newest.values())


def current(records: Iterable[Record]) -> tuple[Record, ...]:
    """As ``latest``, without what an engine left before it had all its knobs, where it has been run with them since."""
    grouped: dict[tuple[str, str], list[Record]] = {}
    for record in latest(records):
        grouped.setdefault((record.machine.key, record.cell.workload.key), []).append(record)
    older = {place: outgrown(group) for place, group in grouped.items()}
    return tuple(record for place, group in grouped.items() for record in group if record.cell.engine.key not in older[place])


def outgrown(records: Sequence[Record]) -> dict[str, str]:
    """Keys of engines in ``records`` (one machine, one workload) that are others with fewer knobs, run earlier; and those others' keys.

    A knob that is new has a value that leaves an engine as it was, so a record without it is one of the same variant, made by older code.
    What could not run here (``unsupported``) takes nobody's place.
    """
    engines = {record.cell.engine.key: record.cell.engine for record in records}
    if len(engines) == 1:
        return {}
    run = dict.fromkeys(engines, "")
    for record in records:
        if record.status != "unsupported":
            run[record.cell.engine.key] = max(run[record.cell.engine.key], record.provenance.started_utc)
    found = {}
    for key, engine in engines.items():
        later = [other for other, grown in engines.items() if run[other] > run[key] and _has_grown(engine, grown)]
        if later:
            found[key] = max(later, key=lambda other: (len(engines[other].knobs), run[other]))
    return found


def _has_grown(engine: EngineSpec, grown: EngineSpec) -> bool:
    """Whether ``grown`` is ``engine`` but for knobs that it has besides."""
    if engine.knobs.keys() >= grown.knobs.keys() or grown.model_copy(update={"knobs": engine.knobs}) != engine:
        return False
    return all(name in grown.knobs and grown.knobs[name] == value for name, value in engine.knobs.items())
