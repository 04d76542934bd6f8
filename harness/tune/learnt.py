"""Settings that were measured: candidates of stored runs, and which repeats speak for each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.config import Config
from harness.current import outgrown
from harness.engine import load
from harness.record import Record
from harness.searched import Searched
from harness.spec import Lora, Workload
from harness.stats import median, tokens_per_second
from harness.tune.asked import Result
from harness.tune.observed import result_of
from harness.tune.scale import capacity_bytes, dense_facts, sized, with_footprint
from harness.tune.space import Candidate

MICRO_BATCH = "micro_batch"


@dataclass(frozen=True, slots=True)
class Learnt:
    """A candidate and the ``runs`` of it, all of one workload. ``same``: what is not searched, the method and the model are as asked."""

    candidate: Candidate
    runs: tuple[Record, ...]
    same: bool

    @property
    def record(self) -> Record:
        """The newest: its start-up is of a machine that has compiled it before."""
        return max(self.runs, key=_moment)

    @property
    def result(self) -> Result:
        """Of that."""
        return result_of(self.record)

    @property
    def step_seconds(self) -> float | None:
        """The median of the runs, of each the median step."""
        found = [seconds for run in self.runs if (seconds := result_of(run).step_seconds) is not None]
        return median(found) if found else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of one GPU, as reports have it: the median of the runs, each over all its steady steps."""
        rates = [rate for run in self.runs if (rate := _rate(run))]
        return median(rates) / self.record.cell.engine.processes if rates else None

    @property
    def peak_bytes(self) -> float | None:
        """The most that the allocator held in any run; None where one of them was short of memory."""
        peaks = [result_of(run).peak_bytes for run in self.runs]
        known = [peak for peak in peaks if peak is not None]
        return max(known) if len(known) == len(peaks) else None


def learnt(configs: Mapping[str, Config], records: Sequence[Record], *, planned: bool = False) -> list[Learnt]:
    """Candidates of dense ``records`` whose searched knobs have values that the YAML lists, and whose others are as it has them; with
    ``planned`` those that the engine's forecast tells of may differ. Where several workloads have the same steps, the one speaks of which
    most were timed.
    """
    found: dict[Candidate, list[Record]] = {}
    for record in _of_today(records):
        for name, config in configs.items():
            if config.engine.name == record.cell.engine.name and (one := _candidate(name, config, record, planned=planned)) is not None:
                found.setdefault(one, []).append(record)
    speaking = {one: _speaking(runs) for one, runs in found.items()}
    return [Learnt(one, runs, all(_same(configs[one.engine], run) for run in runs)) for one, runs in speaking.items()]


def work_of(workload: Workload) -> str:
    """What tells the work of a step apart: model, method, length and number of samples."""
    return f"{workload.model.name} {workload.method.name} {workload.data.sequence_length} x {workload.train.samples_per_step}"


def differing(config: Config, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Of the knobs that are not searched those that are not as the YAML has them: a run in float32, say."""
    fixed = {knob: value for knob, value in config.engine.knobs.items() if knob not in config.engine.searched_knobs}
    return {knob: knobs[knob] for knob, value in fixed.items() if knobs.get(knob, value) != value}


def _candidate(name: str, config: Config, record: Record, *, planned: bool) -> Candidate | None:
    workload, knobs, engine = record.cell.workload, record.cell.engine.knobs, config.engine
    others = differing(config, knobs)
    if workload.model.config is None or not _listed(engine.searched_knobs, knobs) or not others.keys() <= _free(config, planned):
        return None
    facts = replace(dense_facts(workload, int(str(knobs[MICRO_BATCH]))), scale=sized(workload.model.config, workload))
    today = {**engine.knobs, **knobs}  # a knob that is younger than the record is as it is by default
    told = load(record.cell.engine), workload, workload.model.config, today, capacity_bytes(record.machine)
    facts = with_footprint(facts, *told, forecast=engine.forecast)
    chosen = {**knobs, MICRO_BATCH: _micro_batch(config, record)}
    choices = tuple((knob, json.dumps(chosen[knob])) for knob in engine.searched_knobs)
    given = [f"{knob}={json.dumps(value)}" for knob, value in others.items()]
    return Candidate(name, choices, facts, work_of(workload), " ".join([record.machine.key, *given, *_adapters(workload)]))


def _micro_batch(config: Config, record: Record) -> int:
    """Of more samples than a step has, all of them: the same, and a search knows it by that number where the YAML lists it."""
    value, samples = int(str(record.cell.engine.knobs[MICRO_BATCH])), record.cell.workload.train.samples_per_step
    searched = config.engine.searched_knobs.get(MICRO_BATCH)
    return samples if value > samples and searched is not None and samples in searched.values else value


def _free(config: Config, planned: bool) -> set[str]:
    return set(config.engine.planned_knobs) if planned else set()


def _adapters(workload: Workload) -> list[str]:
    """What of the method changes how much work a step is, and is not in ``work_of``."""
    return [f"rank={workload.method.rank} of {','.join(workload.method.targets)}"] if isinstance(workload.method, Lora) else []


def _same(config: Config, record: Record) -> bool:
    mine, theirs = config.model, record.cell.workload.model
    alike = (mine.name, mine.config, mine.dtype) == (theirs.name, theirs.config, theirs.dtype)
    return alike and config.method == record.cell.workload.method and not differing(config, record.cell.engine.knobs)


def _speaking(runs: Sequence[Record]) -> tuple[Record, ...]:
    """Those of the workload of which most steps were timed, of two the newer; of each repeat one."""
    groups: dict[str, list[Record]] = {}
    for run in runs:
        groups.setdefault(run.cell.workload.key, []).append(run)
    repeats = [_repeats(group) for group in groups.values()]
    return max(repeats, key=lambda group: (sum(map(_num_steps, group)), max(map(_moment, group))))


def _repeats(runs: Sequence[Record]) -> tuple[Record, ...]:
    """Of the runs of one cell the newest; where the same code ran it in several sittings, that of the sitting with most of ``runs``: as
    reports have it, one run alone would tear a block apart.
    """
    sizes = Counter(run.provenance.sweep for run in runs)
    cells: dict[str, list[Record]] = {}
    for run in runs:
        cells.setdefault(run.cell.key, []).append(run)
    found = []
    for cell in cells.values():
        code = max(cell, key=_moment).provenance.engine_fingerprint
        alike = [run for run in cell if run.provenance.engine_fingerprint == code]
        found.append(max(alike, key=lambda run: (sizes[run.provenance.sweep], _moment(run))))
    return tuple(found)


def _moment(run: Record) -> str:
    return run.provenance.started_utc


def _of_today(records: Sequence[Record]) -> list[Record]:
    """Without what an engine left before it had all its knobs, where it has been run with them since."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.machine.key, record.cell.workload.key), []).append(record)
    older = {place: outgrown(group) for place, group in groups.items()}
    return [record for place, group in groups.items() for record in group if record.cell.engine.key not in older[place]]


def _num_steps(run: Record) -> int:
    return len(run.measurement.steps.seconds) if run.measurement else 0


def _rate(run: Record) -> float | None:
    return tokens_per_second(run.measurement.steps) if run.measurement else None


def _listed(search: Mapping[str, Searched], knobs: Mapping[str, Any]) -> bool:
    return all(knob in knobs and knobs[knob] in searched.values for knob, searched in search.items())
