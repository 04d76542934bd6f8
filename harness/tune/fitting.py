"""What fits on cards of which size, with which settings, at what speed: from models of memory and time that stored records calibrate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.config import Config
from harness.engine import Machine, load
from harness.record import Record
from harness.spec import EngineSpec, Workload, parse
from harness.stats import tokens_per_second
from harness.tune.asked import Result
from harness.tune.cost_model import CostModel, Timed
from harness.tune.experience import NOISE, SPREAD
from harness.tune.gaussian import Prediction
from harness.tune.lessons import CONTEXT_GIB, Known, learnt, sized, work_of
from harness.tune.memory_model import SURE, MemoryModel, Peak
from harness.tune.observed import result_of
from harness.tune.scale import dense_facts, with_footprint
from harness.tune.space import MEASURED, Candidate, Facts, Scale, Space, enumerate_space

SIZES_GIB = (8, 12, 16, 24, 48, 80)
_FAR = 2.5  # times as much work a position: further from all records nothing tells how wrong the models are


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The fastest setting of one engine on cards of one size. ``measured``: a record says so itself; otherwise both figures are predicted.

    ``beyond``: no record of this engine is near enough to say how far the prediction may be off. ``sure``: whether it fits with two
    deviations to spare. ``needs_bytes``: of what needs least, where nothing fits.
    """

    size_gib: int
    engine: str
    setting: str | None
    peak_bytes: float | None
    tokens_per_second: float | None
    deviation: float | None
    measured: bool
    beyond: bool
    sure: bool
    needs_bytes: float


def lines(
    configs: Mapping[str, Config], model: Mapping[str, Any], known: Known | None, sizes: Sequence[int] = SIZES_GIB
) -> tuple[list[Line], list[str]]:
    """The best of each engine of ``configs`` for each size, and what was not considered because a package is not here. Samples are taken
    to be as long as the data allows.
    """
    absent: dict[str, None] = {}
    found = [line for size in sizes for line in _of_size(configs, model, known, size, absent)]
    return found, list(absent)


def _of_size(
    configs: Mapping[str, Config], model: Mapping[str, Any], known: Known | None, size: int, absent: dict[str, None]
) -> list[Line]:
    capacity = (size - CONTEXT_GIB) * 2**30
    asked = _asked(configs, model, size, capacity, absent)
    known_cells = learnt(configs, known)
    expected = {name: config.engine.searched_knobs for name, config in configs.items()}
    whole = Space((*asked.candidates, *(one for one, _ in known_cells)), expected)
    scale = next((one.facts.scale for one in whole.candidates if one.facts.scale), Scale(0.0, 1.0, 1.0))
    results = [(one, result_of(record)) for one, record in known_cells]
    memory = MemoryModel(whole, scale).predict([Peak(one, result.peak_bytes) for one, result in results if result.peak_bytes])
    timed = [Timed(one, result.step_seconds, 0.0, NOISE) for one, result in results if result.step_seconds is not None]
    steps = CostModel(whole, SPREAD).step(timed)
    found = []
    for name in configs:
        mine = [one for one in asked.candidates if one.engine == name]
        if mine:
            records = {replace(one, work=one.work.removeprefix(MEASURED)): record for one, record in known_cells}
            found.append(_best(size, capacity, mine, memory, steps if timed else None, records, whole))
    return found


def _best(
    size: int,
    capacity: float,
    mine: Sequence[Candidate],
    memory: Mapping[Candidate, Prediction],
    steps: Mapping[Candidate, Prediction] | None,
    learnt: Mapping[Candidate, Record],
    space: Space,
) -> Line:
    least = min(memory[one].middle for one in mine)

    def peak(one: Candidate) -> float:
        return memory[one].middle

    def fits(one: Candidate, deviations: float) -> bool:
        own = one.facts.own_bytes
        return own <= capacity if own is not None and space.fills_memory(one) else memory[one].high(deviations) <= capacity

    sure = [one for one in mine if fits(one, SURE)]
    able = sure or [one for one in mine if fits(one, 0.0)]
    if not able:
        return Line(
            size_gib=size, engine=mine[0].engine, setting=None, peak_bytes=None, tokens_per_second=None, deviation=None, measured=False,
            beyond=False, sure=False, needs_bytes=least,
        )  # fmt: skip

    best = _fastest(able, steps, learnt, capacity) if steps else min(able, key=peak)
    known = learnt.get(best)
    own = _own(known, capacity)
    beyond = steps is not None and own is None and not any(_near(best, one) for one in learnt if one.engine == best.engine)
    predicted = best.facts.positions / steps[best].middle if steps else None
    return Line(
        size_gib=size,
        engine=best.engine,
        setting=" ".join(best.title.split(" ")[1:]),
        peak_bytes=own.peak_bytes if own is not None else peak(best),
        tokens_per_second=predicted if own is None else _measured_rate(known),
        deviation=None if own is not None or beyond or steps is None else steps[best].deviation,
        measured=own is not None,
        beyond=beyond,
        sure=bool(sure),
        needs_bytes=least,
    )


def _fastest(
    able: Sequence[Candidate], steps: Mapping[Candidate, Prediction], learnt: Mapping[Candidate, Record], capacity: float
) -> Candidate:
    """By the models, which err alike on all; but of what was measured the fastest, unless they foretell something unmeasured to be faster
    by more than it may be off.
    """
    best = min(able, key=lambda one: steps[one].middle)
    own = {one: result.step_seconds for one in able if (result := _own(learnt.get(one), capacity)) and result.step_seconds}
    known = min(own, key=lambda one: own[one], default=best)
    return known if best in own or own.get(known, math.inf) <= steps[best].high(1.0) else best


def _near(one: Candidate, known: Candidate) -> bool:
    """Whether ``known`` says something of ``one``: the same method, and positions that take about as much work."""
    (_, method, *_), (_, its_method, *_) = one.work.split(), known.work.split()
    flops, its = (each.facts.scale.flops if each.facts.scale else 0.0 for each in (one, known))
    return method == its_method and flops <= _FAR * its and its <= _FAR * flops


def _measured_rate(record: Record | None) -> float | None:
    """Of one GPU, as reports have it: over all steady steps, not the median one, of which a prediction is made."""
    rate = tokens_per_second(record.measurement.steps) if record and record.measurement else None
    return rate / record.cell.engine.processes if record and rate else None


def _own(record: Record | None, capacity: float) -> Result | None:
    """What was measured of this very setting; an engine that fills what memory there is does otherwise where there is less."""
    result = None if record is None else result_of(record)
    return result if result is not None and result.peak_bytes is not None and result.peak_bytes <= capacity else None


def _asked(configs: Mapping[str, Config], model: Mapping[str, Any], size: int, capacity: float, absent: dict[str, None]) -> Space:
    first = next(iter(configs.values()))
    processes = first.engine.processes
    machine = Machine(device="cuda", name="any", count=processes, memory_gib=size)
    whole = Workload(model=first.model, data=first.data, method=first.method, train=first.train)
    workload = share_of(whole, processes)
    scale = sized(model, workload)

    def facts(name: str, values: Mapping[str, Any]) -> Facts | None:
        config = configs[name]
        spec = EngineSpec(name=config.engine.name, module=config.engine.module, processes=1, environment={}, knobs={})
        engine, knobs = load(spec), {**config.engine.knobs, **values}
        if int(knobs["micro_batch"]) > workload.train.samples_per_step:
            return None
        if processes > 1 and not hasattr(engine, "footprint"):
            absent[f"{name}: what it needs on {processes} GPUs is not known"] = None
            return None
        if reason := engine.unsupported(whole, parse(engine.Knobs, knobs, at="engine.knobs"), machine):
            absent.update(dict.fromkeys(f"{name}: {one}" for one in reason.split("; ") if "pip install" in one))
            return None
        plain = replace(dense_facts(workload, int(knobs["micro_batch"])), scale=scale)
        return with_footprint(plain, engine, workload, model, knobs, capacity, processes)

    space = enumerate_space({name: config.engine.searched_knobs for name, config in configs.items()}, facts)
    return Space(tuple(replace(one, work=work_of(workload)) for one in space.candidates), space.expected)


def share_of(workload: Workload, processes: int) -> Workload:
    """Of a step the samples that one of ``processes`` trains on, where it has most."""
    samples = -(-workload.train.samples_per_step // processes)
    return workload.model_copy(update={"train": workload.train.model_copy(update={"samples_per_step": samples})})
