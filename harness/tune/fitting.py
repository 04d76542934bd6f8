"""What fits on cards of which size, with which settings, at what speed: from models of memory and time that stored records calibrate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.config import Config
from harness.engine import Machine, load, requires, tellers
from harness.interpreter import lack, located
from harness.spec import EngineSpec, Full, Workload, parse
from harness.tune.cost_model import CostModel, Timed
from harness.tune.experience import NOISE, SPREAD
from harness.tune.gaussian import Prediction
from harness.tune.learnt import Learnt, learnt, work_of
from harness.tune.lessons import Known
from harness.tune.memory_model import SURE, MemoryModel, Peak
from harness.tune.scale import CONTEXT_GIB, dense_facts, sized, with_footprint
from harness.tune.space import Candidate, Facts, Scale, Space, enumerate_space

SIZES_GIB = (8, 12, 16, 24, 48, 80)
PLANNED = 0.932  # of what the allocator may hold: an engine that plans its memory leaves the rest free (fused: 0.95 / 1.02)
# Deviations: of 50 settings of committed records, each foretold by all other work, 60 % were within one and 92 % within two
# (python -m harness.tune.left_out results, 2026-11-28).
NINE_OF_TEN = 2.0
_FLOAT_STATES = "adamw"  # of all weights: what harness.tune.scale counts of them
_FAR = 2.5  # times as much work a position: further from all records nothing tells how wrong the models are


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The fastest setting of one engine on cards of one size. ``num_runs``: that measured this very setting; 0: both figures are predicted.

    ``peak_bytes``: the most that the allocator holds. ``spread``: how far the speed may be off in nine of ten cases, a share of it; None
    where it was measured, and where no record of this engine is near enough to tell (``beyond``). ``sure``: whether it fits with two
    deviations to spare. ``needs_bytes``: of the smallest card for what needs least, where nothing fits.
    """

    size_gib: int
    engine: str
    setting: str | None
    peak_bytes: float | None
    tokens_per_second: float | None
    spread: float | None
    num_runs: int
    beyond: bool
    sure: bool
    needs_bytes: float


@dataclass(frozen=True, slots=True)
class Notes:
    """What is said beside the lines: what was ``left_out``, and what this machine lacks of what was considered (``absent``)."""

    left_out: dict[str, None] = field(default_factory=dict)
    absent: dict[str, None] = field(default_factory=dict)


def lines(
    configs: Mapping[str, Config], model: Mapping[str, Any], known: Known | None, sizes: Sequence[int] = SIZES_GIB
) -> tuple[list[Line], Notes]:
    """The best of each engine of ``configs`` for each size. What can run is asked of the engines as if every package were there: the cards
    are not this machine's. Samples are taken to be as long as the data allows.
    """
    notes = Notes()
    for name, config in configs.items():
        spec = EngineSpec(name=config.engine.name, module=config.engine.module, processes=1, environment={}, knobs={})
        if missing := lack(located(config.engine.python), requires(load(spec))):
            notes.absent[f"{name}: {missing}"] = None
    measured = learnt(configs, known.records, planned=True) if known else []
    found = [line for size in sizes for line in _of_size(configs, model, measured, size, notes)]
    return found, notes


def _of_size(configs: Mapping[str, Config], model: Mapping[str, Any], measured: Sequence[Learnt], size: int, notes: Notes) -> list[Line]:
    capacity = (size - CONTEXT_GIB) * 2**30
    asked = _asked(configs, model, size, capacity, notes)
    expected = {name: config.engine.searched_knobs for name, config in configs.items()}
    whole = Space((*asked.candidates, *(one.candidate for one in measured)), expected)
    scale = next((one.facts.scale for one in whole.candidates if one.facts.scale), Scale(0.0, 1.0, 1.0))
    memory = MemoryModel(whole, scale).predict([Peak(one.candidate, one.peak_bytes) for one in measured if one.peak_bytes])
    timed = [Timed(one.candidate, seconds, 0.0, NOISE) for one in measured if (seconds := one.step_seconds) is not None]
    steps = CostModel(whole, SPREAD).step(timed) if timed else None
    mine = {name: [one for one in asked.candidates if one.engine == name] for name in configs}
    return [_best(size, capacity, some, memory, steps, measured, whole) for some in mine.values() if some]


def _best(
    size: int,
    capacity: float,
    mine: Sequence[Candidate],
    memory: Mapping[Candidate, Prediction],
    steps: Mapping[Candidate, Prediction] | None,
    measured: Sequence[Learnt],
    space: Space,
) -> Line:
    def plans(one: Candidate) -> bool:
        return one.facts.own_bytes is not None and space.fills_memory(one)

    def fits(one: Candidate, deviations: float) -> bool:
        own = one.facts.own_bytes
        return own <= PLANNED * capacity if own is not None and plans(one) else memory[one].high(deviations) <= capacity

    sure = [one for one in mine if fits(one, SURE)]
    able = sure or [one for one in mine if fits(one, 0.0)]
    if not able:
        least = min((one.facts.own_bytes or 0.0) / PLANNED if plans(one) else memory[one].middle for one in mine)
        return Line(
            size_gib=size, engine=mine[0].engine, setting=None, peak_bytes=None, tokens_per_second=None, spread=None, num_runs=0,
            beyond=False, sure=False, needs_bytes=least + CONTEXT_GIB * 2**30,
        )  # fmt: skip

    by_setting = {one: found for one in able if (found := _measured(one, measured, capacity)) is not None}
    best = _fastest(able, steps, by_setting) if steps else min(able, key=lambda one: memory[one].middle)
    own = by_setting.get(best)
    beyond = steps is not None and own is None and not any(_near(best, one.candidate) for one in measured)
    predicted = best.facts.positions / steps[best].middle if steps else None
    return Line(
        size_gib=size,
        engine=best.engine,
        setting=" ".join(best.title.split(" ")[1:]),
        peak_bytes=own.peak_bytes if own else memory[best].middle,
        tokens_per_second=own.tokens_per_second if own else predicted,
        spread=None if own or beyond or steps is None else NINE_OF_TEN * steps[best].deviation,
        num_runs=len(own.runs) if own else 0,
        beyond=beyond,
        sure=bool(sure),
        needs_bytes=0.0,
    )


def _fastest(able: Sequence[Candidate], steps: Mapping[Candidate, Prediction], measured: Mapping[Candidate, Learnt]) -> Candidate:
    """By the models, which err alike on all; but of what was measured the fastest, unless they foretell something unmeasured to be faster
    by more than it may be off.
    """
    best = min(able, key=lambda one: steps[one].middle)
    own = {one: seconds for one, found in measured.items() if (seconds := found.step_seconds)}
    known = min(own, key=lambda one: own[one], default=best)
    return known if best in own or own.get(known, math.inf) <= steps[best].high(1.0) else best


def _measured(one: Candidate, measured: Sequence[Learnt], capacity: float) -> Learnt | None:
    """What was measured of this very setting, under the plan that the engine will make here; of several the one with most runs."""
    found = [
        learnt
        for learnt in measured
        if learnt.same
        and replace(learnt.candidate, setting="") == one
        and learnt.peak_bytes is not None
        and learnt.peak_bytes <= capacity
        and _same_plan(learnt.candidate.facts, one.facts)
    ]
    return max(found, key=lambda learnt: len(learnt.runs), default=None)


def _same_plan(measured: Facts, here: Facts) -> bool:
    if measured.own_bytes is None or here.own_bytes is None:
        return measured.own_bytes == here.own_bytes
    return math.isclose(measured.own_bytes, here.own_bytes, rel_tol=1e-3) and math.isclose(
        measured.own_seconds, here.own_seconds, rel_tol=1e-3
    )


def _near(one: Candidate, known: Candidate) -> bool:
    """Whether ``known`` says something of ``one``: the same engine and method, and positions that take about as much work."""
    (_, method, *_), (_, its_method, *_) = one.work.split(), known.work.split()
    flops, its = (each.facts.scale.flops if each.facts.scale else 0.0 for each in (one, known))
    return one.engine == known.engine and method == its_method and flops <= _FAR * its and its <= _FAR * flops


def _asked(configs: Mapping[str, Config], model: Mapping[str, Any], size: int, capacity: float, notes: Notes) -> Space:
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
        if unknown := _unknown(engine, config, whole, processes):
            notes.left_out[f"{name}: {unknown}"] = None
            return None
        reason = engine.unsupported(whole, parse(engine.Knobs, knobs, at="engine.knobs"), machine)
        if reason and not _only_packages(reason):
            return None
        notes.absent.update(dict.fromkeys(f"{name}: {one}" for one in _packages(reason or "")))
        plain = replace(dense_facts(workload, int(knobs["micro_batch"])), scale=scale)
        return with_footprint(plain, engine, workload, model, knobs, capacity, processes, config.engine.forecast)

    space = enumerate_space({name: config.engine.searched_knobs for name, config in configs.items()}, facts)
    return Space(tuple(replace(one, work=work_of(workload)) for one in space.candidates), space.expected)


def _unknown(engine: object, config: Config, workload: Workload, processes: int) -> str | None:
    """Why nothing can be said of the memory of ``engine``."""
    if tellers(engine, config.engine.forecast):
        return None
    if processes > 1:
        return f"what it needs on {processes} GPUs is not known"
    optimizer = config.engine.knobs.get("optimizer", _FLOAT_STATES)
    if isinstance(workload.method, Full) and optimizer != _FLOAT_STATES:
        return f"what its optimizer={optimizer} keeps of every weight is not known"
    return None


def _packages(reason: str) -> list[str]:
    """Of the reasons of an engine those that installing something takes away."""
    return [one for one in reason.split("; ") if "pip install" in one]


def _only_packages(reason: str) -> bool:
    return all("pip install" in one or one.endswith("does without") for one in reason.split("; "))


def share_of(workload: Workload, processes: int) -> Workload:
    """Of a step the samples that one of ``processes`` trains on, where it has most."""
    samples = -(-workload.train.samples_per_step // processes)
    return workload.model_copy(update={"train": workload.train.model_copy(update={"samples_per_step": samples})})
