"""What stored records teach the models of time and memory: candidates of other runs beside those that are asked about."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.config import Config
from harness.engine import Machine
from harness.errors import ConfigError, UnsupportedError
from harness.flops import linears
from harness.record import Record
from harness.spec import Workload
from harness.store import Stored
from harness.tune.asked import Result
from harness.tune.experience import Experience, Lesson
from harness.tune.learnt import differing, learnt, work_of
from harness.tune.observed import result_of
from harness.tune.scale import sized
from harness.tune.space import Candidate, Scale, Space
from harness.tuned import name_of


@dataclass(frozen=True, slots=True)
class Known:
    """The records that calibrate the models: of one kind of GPU, dense samples, models of known shape."""

    gpu: str
    records: tuple[Record, ...]


def usable(records: Iterable[Record], gpu: str | None = None) -> Known | None:
    """Of the GPU that most of them are from, or of ``gpu``, a name or a part of one; None when there is none.

    Raises ConfigError where several names have that part.
    """
    able = [
        record
        for record in records
        if record.status == "ok"
        and record.measurement is not None
        and record.machine.device == "cuda"
        and record.machine.count == 1
        and record.cell.workload.data.source == "dense"
        and record.cell.workload.model.config is not None
        and _has_known_layers(record.cell.workload.model.config)
    ]
    names = [record.machine.name for record in able]
    chosen = _named(gpu, sorted(set(names))) if gpu else max(sorted(set(names)), key=names.count, default=None)
    mine = tuple(record for record in able if record.machine.name == chosen)
    return Known(str(chosen), mine) if mine else None


def _named(part: str, names: Sequence[str]) -> str | None:
    found = [name for name in names if part == name] or [name for name in names if part.casefold() in name.casefold()]
    if len(found) > 1:
        raise ConfigError(f"gpu={part}: that may be {' or '.join(found)}; say more of the name")
    return found[0] if found else None


def _has_known_layers(model: Mapping[str, Any]) -> bool:
    try:
        linears(model, 1)
    except UnsupportedError:
        return False
    return True


def experience(
    configs: Mapping[str, Config],
    records: Sequence[Record],
    search: Searching,
    positions: Callable[[Mapping[str, Any]], Sequence[float]],
) -> Experience:
    """What ``records`` tell of what is searched: those of its own kind of GPU, or where there are none of that of which there are most.
    ``positions``: of every step of the planned run with some knobs, none where all are alike.
    """
    model, workload, machine = search.model, search.workload, search.machine
    if machine.device == "cpu":
        return Experience()  # one is not like another of the same name
    uneven = _uneven(records, search, positions, configs) if workload.data.source != "dense" else []
    known = usable(record for record in records if record.machine.name == machine.name) or usable(records)
    here = bool(uneven) or known is None or known.gpu == machine.name
    lessons, scale = list(uneven), None
    if known is not None and (known.gpu == machine.name or not uneven) and _has_known_layers(model):
        compared = sized(model, workload)
        scale = replace(search.scale, flops=compared.flops, num_layers=compared.num_layers)
        lessons += [_lesson(_placed(one.candidate, one.record, search), one.result) for one in learnt(configs, known.records)]
    mine = tuple(one for one in lessons if one.candidate.engine in search.space.expected)
    return Experience(mine, machine.name if here else known.gpu if known else "", here, scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Searching:
    """What is searched: ``scale`` of ``workload`` on ``model``, a transformers configuration, and the candidates."""

    workload: Workload
    machine: Machine
    model: Mapping[str, Any]
    space: Space
    scale: Scale


def but_looks_of(planned: Workload, committed: Iterable[Stored], mine: Iterable[Stored]) -> list[Record]:
    """All records but those among ``mine``, the folder of a search, that are its own looks at the ``planned`` run: they answer its
    questions, and a search that goes on begins as it did.
    """
    here = [stored.record for stored in mine]
    looks = {_identity(record) for record in here if _planned(record.cell.workload) == planned}
    return [record for record in [*(stored.record for stored in committed), *here] if _identity(record) not in looks]


def _identity(record: Record) -> tuple[str, str]:
    return record.cell.key, record.provenance.started_utc


def _planned(workload: Workload) -> Workload:
    """The run that a look was stopped in."""
    return workload.model_copy(update={"train": workload.train.model_copy(update={"stop_after": None})})


def _placed(one: Candidate, record: Record, search: Searching) -> Candidate:
    """``one`` as a candidate of what is searched, where ``record`` is of that work on such a machine; else as one of other work."""
    theirs, mine = record.cell.workload, search.workload
    alike = (theirs.data.source, theirs.model, theirs.method) == (mine.data.source, mine.model, mine.method)
    if alike and work_of(theirs) == work_of(mine) and record.machine.key == search.machine.key:
        return replace(one, work="", setting="")
    return replace(one, work=f"{record.machine.name}: {work_of(theirs)}")


def _uneven(
    records: Sequence[Record],
    search: Searching,
    positions: Callable[[Mapping[str, Any]], Sequence[float]],
    configs: Mapping[str, Config],
) -> list[Lesson]:
    """Samples of several lengths: only runs that begin as the planned one does, on such a machine, can be compared; the newest of each."""
    planned, found = search.workload, dict[Candidate, Lesson]()
    by_choice = {(one.engine, one.choices): one for one in search.space.candidates}
    for record in records:
        engine, theirs, config = record.cell.engine, record.cell.workload, configs.get(record.cell.engine.name)
        begins_alike = name_of(theirs) == name_of(planned) and theirs.train.seed == planned.train.seed
        if not begins_alike or record.status != "ok" or record.machine.key != search.machine.key:
            continue
        if config is None or differing(config, engine.knobs):
            continue
        knobs = {**config.engine.knobs, **engine.knobs}
        one = by_choice.get((engine.name, tuple((knob, json.dumps(knobs[knob])) for knob in config.engine.searched_knobs)))
        if one is not None:
            found[one] = _lesson(one, result_of(record, planned.train.num_steps, positions=positions(knobs)))
    return list(found.values())


def _lesson(one: Candidate, result: Result) -> Lesson:
    assert result.step_seconds is not None
    assert result.startup_seconds is not None
    return Lesson(one, result.step_seconds, result.startup_seconds, result.peak_bytes)
