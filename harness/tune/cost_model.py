"""How long a candidate's step and start-up take, and how sure that is.

log seconds = log positions (or operations, where workloads differ) + machine + engine + knobs + log(1 + overhead(engine, knobs) / size of a
pass): a step is as long as its positions at the engine's pace, the roof that passes too short to fill the device do not reach. Start-up
is a sum. Every measured cell corrects the parameters that it shares with others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.tune.gaussian import Floats, Function, Prediction, corrected, independent
from harness.tune.space import Candidate, Space, design

_MACHINE = (np.log(1e-5), 3.0)  # seconds a position, of a machine that nothing is known of
_ENGINE_DEVIATION = 0.25
_KNOB_DEVIATION, _SHARE_OF_EXPECTATION = 0.05, 0.3
_OVERHEAD, _KNOB_OVERHEAD = (np.log(1000.0), 1.0), 0.3  # positions whose time a pass loses; launches are fewer with some knobs
_NOISE = 0.01
_STRAY = 0.025  # what the form of the model leaves out: how knobs act together
_STARTUP_SECONDS, _STARTUP_DEVIATION, _STARTUP_NOISE = 25.0, 15.0, 3.0
_KNOB_STARTUP = 5.0  # a knob may make an engine compile where nobody said so


@dataclass(frozen=True, slots=True)
class Spread:
    """How far paces of several workloads lie apart beside their operations: deviations of logarithms. ``work``: of a workload, all engines
    together; ``engine``: of one engine on it besides; ``startup``: seconds of that engine's start-up. ``own_work`` and ``own_engine``: the
    first two of what is searched (work "") where all that is known is of another kind of GPU.
    """

    work: float
    engine: float
    startup: float
    own_work: float | None = None
    own_engine: float | None = None


@dataclass(frozen=True, slots=True)
class Timed:
    """What was measured of a candidate: a mean step of the planned run, and all that a run takes besides its steps; and how far either may
    be from what the same would take here today, the step's as a logarithm.
    """

    candidate: Candidate
    step_seconds: float
    startup_seconds: float
    noise: float = _NOISE
    startup_noise: float = _STARTUP_NOISE


class CostModel:
    """Predicts every candidate of ``space``, corrected by what was timed. ``spread``: of candidates of several workloads; without it
    all workloads are taken to be alike.
    """

    def __init__(self, space: Space, spread: Spread | None = None) -> None:
        self._space = space
        self._row = {one: row for row, one in enumerate(space.candidates)}
        names = _step_names(space) | _work_names(space, spread)
        place = {name: index for index, name in enumerate(names)}
        self._prior = independent(names)
        self._design = design(space.candidates, place, lambda one: ["machine", f"{one.engine}:engine", *_works(one), *_knobs(one)])
        self._overhead = design(space.candidates, place, lambda one: [f"{name}:overhead" for name in (one.engine, *_knobs(one))])
        size = _launches_last(space)
        self._pass = np.array([size(one) * one.facts.positions / one.facts.num_passes for one in space.candidates])
        self._known = np.array([np.log(one.facts.positions * _flops(one) * _factor(space, one)) for one in space.candidates])
        startup = _startup_names(space) | _startup_work_names(space, spread)
        self._startup_prior = independent(startup)
        place = {name: index for index, name in enumerate(startup)}
        self._startup_design = design(space.candidates, place, lambda one: [one.engine, *_works(one), *_knobs(one)])
        self._startup_expected = np.array([space.startup_seconds(one) for one in space.candidates])

    def step(self, timed: Sequence[Timed]) -> Mapping[Candidate, Prediction]:
        """Seconds of a mean step."""
        rows = [self._row[one.candidate] for one in timed]
        observed = np.log([one.step_seconds for one in timed])
        noise, exact = np.array([one.noise for one in timed]), np.zeros(len(rows), dtype=bool)
        posterior = corrected(self._prior, self._function(rows), observed, noise, exact)
        everything = self._space.candidates
        middles, deviations = posterior.of(self._function(list(range(len(everything)))))
        sure = np.hypot(deviations, _STRAY)
        return {one: Prediction(float(np.exp(m)), float(d)) for one, m, d in zip(everything, middles, sure, strict=True)}

    def startup(self, timed: Sequence[Timed]) -> Mapping[Candidate, tuple[float, float]]:
        """Seconds of start-up, compiling included, and their deviation."""
        rows = np.array([self._row[one.candidate] for one in timed], dtype=int)
        observed = np.array([one.startup_seconds for one in timed]) - self._startup_expected[rows]
        noise, exact = np.array([one.startup_noise for one in timed]), np.zeros(len(rows), dtype=bool)
        matrix = self._startup_design
        posterior = corrected(self._startup_prior, lambda parameters: (matrix[rows] @ parameters, matrix[rows]), observed, noise, exact)
        values, deviations = posterior.of(lambda parameters: (matrix @ parameters, matrix))
        seconds = np.maximum(0.0, values + self._startup_expected)
        return {one: (float(value), float(sd)) for one, value, sd in zip(self._space.candidates, seconds, deviations, strict=True)}

    def _function(self, rows: Sequence[int]) -> Function:
        """Logarithms of the step times of the candidates in these rows."""
        which = np.array(rows, dtype=int)
        matrix, overhead, positions, known = self._design[which], self._overhead[which], self._pass[which], self._known[which]

        def function(parameters: Floats) -> tuple[Floats, Floats]:
            lost = np.exp(overhead @ parameters) / positions
            slopes = matrix + (lost / (1 + lost))[:, None] * overhead
            return known + matrix @ parameters + np.log1p(lost), slopes

        return function


def _step_names(space: Space) -> dict[str, tuple[float, float]]:
    """Every parameter of a step's time, with the mean and the deviation of its prior: logarithms."""
    names: dict[str, tuple[float, float]] = {"machine": _MACHINE}
    for engine, expected in space.expected.items():
        names[f"{engine}:engine"] = 0.0, _ENGINE_DEVIATION
        names[f"{engine}:overhead"] = _OVERHEAD
        for knob, searched in expected.items():
            for value in searched.values[1:] if knob != "micro_batch" else ():  # the first is the engine's own pace
                ratio = (searched.factor("seconds", value) or 1.0) / (searched.factor("seconds", searched.values[0]) or 1.0)
                deviation = _KNOB_DEVIATION + _SHARE_OF_EXPECTATION * abs(np.log(ratio))
                names[f"{engine}:{knob}={json.dumps(value)}"] = 0.0, float(deviation)
                names[f"{engine}:{knob}={json.dumps(value)}:overhead"] = 0.0, _KNOB_OVERHEAD
    return names


def _work_names(space: Space, spread: Spread | None) -> dict[str, tuple[float, float]]:
    """Of every workload, and of every engine on it, where they may differ."""
    names: dict[str, tuple[float, float]] = {}
    if spread is None:
        return names
    own = spread.own_work or spread.work, spread.own_engine or spread.engine
    for one in space.candidates:
        for name, deviation in zip(_works(one), (spread.work, spread.engine) if one.work else own, strict=True):
            names[name] = 0.0, deviation
    return names


def _startup_work_names(space: Space, spread: Spread | None) -> dict[str, tuple[float, float]]:
    return {_works(one)[1]: (0.0, spread.startup) for one in space.candidates} if spread else {}


def _works(one: Candidate) -> tuple[str, str]:
    return f"work:{one.work}", f"{one.engine}:work:{one.work}"


def _flops(one: Candidate) -> float:
    return 1.0 if one.facts.scale is None else one.facts.scale.flops


def _launches_last(space: Space) -> Callable[[Candidate], float]:
    """How long a position works against the launches of a pass, in proportion to the first candidate's: in a model of few operations and
    many layers a pass must be longer to fill the device.
    """
    scales = [one.facts.scale for one in space.candidates if one.facts.scale is not None]

    def of(one: Candidate) -> float:
        mine = one.facts.scale
        return 1.0 if mine is None else (mine.flops / scales[0].flops) / (mine.num_layers / scales[0].num_layers)

    return of


def _factor(space: Space, candidate: Candidate) -> float:
    """What is expected of the knobs, against the first value of each."""
    first = np.prod([searched.factor("seconds", searched.values[0]) or 1.0 for searched in space.expected[candidate.engine].values()])
    own = candidate.facts.own_seconds if space.fills_memory(candidate) else 1.0  # of a fixed plan the YAML says what it costs
    return float(own * space.factor(candidate, "seconds") / first)


def _startup_names(space: Space) -> dict[str, tuple[float, float]]:
    names: dict[str, tuple[float, float]] = {}
    for engine, expected in space.expected.items():
        names[engine] = _STARTUP_SECONDS, _STARTUP_DEVIATION
        for knob, searched in expected.items():
            for value in searched.values if knob != "micro_batch" else ():
                names[f"{engine}:{knob}={json.dumps(value)}"] = 0.0, _KNOB_STARTUP + abs(searched.startup_seconds(value))
    return names


def _knobs(candidate: Candidate) -> list[str]:
    return [f"{candidate.engine}:{knob}={value}" for knob, value in candidate.choices]
