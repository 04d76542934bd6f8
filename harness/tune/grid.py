"""A grid of records as a machine that answers a search without being there."""

from __future__ import annotations

import functools
import json
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import JsonValue

from harness.compose import CONF
from harness.engine import Machine, load
from harness.errors import ConfigError
from harness.record import Record
from harness.searched import Searched
from harness.spec import Spec, Workload, parse
from harness.tune.asked import Ask, Result
from harness.tune.observed import result_of
from harness.tune.scale import capacity_bytes, dense_facts, scale_of, with_footprint
from harness.tune.space import Candidate, Facts, Scale, Space, enumerate_space


@dataclass(frozen=True)
class Grid:
    """Every candidate that was measured exhaustively, with its records, the first repeat first."""

    workload: Workload
    machine: Machine
    space: Space
    scale: Scale
    records: Mapping[Candidate, Sequence[Record]]

    @property
    def capacity_bytes(self) -> float | None:
        """What an allocator may hold there."""
        return capacity_bytes(self.machine)

    @property
    def seconds(self) -> float:
        """What measuring every candidate once took."""
        return sum(records[0].provenance.wall_seconds for records in self.records.values())

    def measure(self, ask: Ask) -> Result:
        """The first steps of its record; in later rounds of its next repeat, where there is one."""
        records = self.records[ask.candidate]
        return result_of(records[min(ask.round, len(records) - 1)], ask.steps)

    def total_seconds(self, candidate: Candidate, planned_steps: int) -> float | None:
        """The planned run by all steps of all repeats; None when it does not run. Where a cell was measured again because it was among the
        best (harness.tune.remeasure), the measurement that chose it does not count: it is too good by its noise.
        """
        records = self.records[candidate]
        results = [result_of(record) for record in [record for record in records if record.cell.repeat > 0] or records]
        steps = [result.step_seconds for result in results if result.step_seconds is not None]
        startups = [result.startup_seconds for result in results if result.startup_seconds is not None]
        return statistics.median(startups) + planned_steps * statistics.median(steps) if steps and startups else None

    def only(self, engines: Collection[str]) -> Grid:
        """The part of these engines."""
        kept = {one: records for one, records in self.records.items() if one.engine in engines}
        expected = {engine: knobs for engine, knobs in self.space.expected.items() if engine in engines}
        return Grid(self.workload, self.machine, Space(tuple(kept), expected), self.scale, kept)


def grids(records: Sequence[Record], conf: Path = CONF) -> list[Grid]:
    """One grid for each machine and workload. Raises ConfigError where samples are uneven: their lengths are in no record."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        if record.status not in ("unsupported", "contended"):
            groups[record.machine.key, record.cell.workload.key].append(record)
    return [_grid(group, conf) for group in groups.values() if len(group) > 1]


def _grid(records: Sequence[Record], conf: Path) -> Grid:
    workload, machine = records[0].cell.workload, records[0].machine
    if workload.data.source != "dense":
        raise ConfigError(f"{workload.label}: a grid can be replayed where all samples have one length (data=dense)")
    records = [_with_todays_knobs(record, conf) for record in records]
    by_engine: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_engine[record.cell.engine.name].append(record)
    expected = {engine: _expected(engine, mine, conf) for engine, mine in by_engine.items()}
    by_choice: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: (record.cell.repeat, record.provenance.started_utc)):
        by_choice[_choice(record.cell.engine.name, record.cell.engine.knobs, expected)].append(record)

    config = workload.model.config or {}

    def facts(name: str, chosen: Mapping[str, Any]) -> Facts | None:
        mine = by_choice.get(_choice(name, chosen, expected))
        if mine is None:
            return None
        spec = mine[0].cell.engine
        plain = dense_facts(workload, int(chosen["micro_batch"]))
        return with_footprint(plain, load(spec), workload, config, spec.knobs, capacity_bytes(machine))

    space = enumerate_space(expected, facts)
    mine = {one: by_choice[_choice(one.engine, one.values, expected)] for one in space.candidates}
    return Grid(workload, machine, space, scale_of(config, workload), mine)


def _expected(engine: str, records: Sequence[Record], conf: Path) -> dict[str, Searched]:
    """Of the knobs that differ in the grid, and the micro-batch: the values there are, with what the engine's YAML expects of them."""
    known = searched(engine, conf)
    found: dict[str, Searched] = {}
    for knob in records[0].cell.engine.knobs:
        values: dict[str, JsonValue] = {}
        for record in records:
            value = record.cell.engine.knobs.get(knob)
            values.setdefault(json.dumps(value), value)
        if len(values) > 1 or knob == "micro_batch":
            every = list(values.values())
            found[knob] = known[knob].among(every) if knob in known else Searched(values=tuple(every))
    return found


@functools.cache
def _yaml_knobs(path: Path) -> dict[str, JsonValue]:
    knobs: dict[str, JsonValue] = yaml.safe_load(path.read_text(encoding="utf-8"))["knobs"] if path.is_file() else {}
    return {knob: value for knob, value in knobs.items() if not str(value).startswith("${")}


def _with_todays_knobs(record: Record, conf: Path) -> Record:
    """A knob that is younger than the record is as its engine's YAML has it, but for knobs that follow the machine."""
    spec = record.cell.engine
    filled = spec.model_copy(update={"knobs": {**_yaml_knobs(conf / "engine" / f"{spec.name}.yaml"), **spec.knobs}})
    return record.model_copy(update={"cell": record.cell.model_copy(update={"engine": filled})})


def searched(engine: str, conf: Path = CONF) -> dict[str, Searched]:
    """The search block of ``conf/engine/<engine>.yaml``; nothing where there is no such file."""
    path = conf / "engine" / f"{engine}.yaml"
    if not path.is_file():
        return {}
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))["search"]
    return {knob: parse(_One, {"knob": said}, at=f"search.{knob}").knob for knob, said in raw.items()}


class _One(Spec):
    """A knob's entry alone, in either of its forms."""

    knob: Searched


def _choice(engine: str, knobs: Mapping[str, Any], expected: Mapping[str, Mapping[str, Searched]]) -> tuple[str, str]:
    return engine, json.dumps({knob: knobs.get(knob) for knob in expected[engine]})
