"""How good a search was, held against a grid that knows everything: regret, runs, time, memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from harness.tune.asked import Ask, Result, Told
from harness.tune.gaussian import Prediction
from harness.tune.memory_model import SURE, Peak
from harness.tune.search import Search
from harness.tune.space import Candidate, Space


class Truth(Protocol):
    """What is known of every candidate: a grid, or a made-up machine."""

    @property
    def space(self) -> Space:
        """Its candidates."""

    def measure(self, ask: Ask) -> Result:
        """A run."""

    def total_seconds(self, candidate: Candidate, planned_steps: int) -> float | None:
        """The planned run; None when it does not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One search. ``regret``: how much longer its choice takes than the best of the grid; infinite when it found nothing.

    ``grid_share``: the time it measured for, of what the whole grid took. ``num_late_ooms``: out of memory though its engine had been
    measured before.
    """

    regret: float
    num_runs: int
    grid_share: float
    num_ooms: int
    num_late_ooms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryJudged:
    """Predictions for what was not measured. ``error``: the mean of \\|predicted / true - 1\\|, ``beyond_weights``: of what is not weights;
    null where nothing could be compared. ``num_false_fits``: predicted surely to fit, though it ran out.
    """

    num: int
    error: float | None
    beyond_weights: float | None
    num_false_fits: int


def judged(told: Sequence[Told], truth: Truth, planned_steps: int, grid_seconds: float, chosen: Candidate | None = None) -> Judged:
    """Judge what was ``told``; ``chosen``: by the policy, else the best by its own measurements."""
    totals = {one: total for one in truth.space.candidates if (total := truth.total_seconds(one, planned_steps)) is not None}
    pick = chosen or _best(told, planned_steps)
    engines: set[str] = set()
    late = 0
    for ask, result in told:
        late += result.outcome == "oom" and ask.candidate.engine in engines
        engines.add(ask.candidate.engine)
    return Judged(
        regret=totals[pick] / min(totals.values()) - 1 if pick in totals else float("inf"),
        num_runs=len(told),
        grid_share=sum(result.cost_seconds for _, result in told) / grid_seconds,
        num_ooms=sum(result.outcome == "oom" for _, result in told),
        num_late_ooms=late,
    )


def _best(told: Sequence[Told], planned_steps: int) -> Candidate | None:
    totals = {
        ask.candidate: result.startup_seconds + planned_steps * result.step_seconds
        for ask, result in told
        if result.outcome == "ok" and result.startup_seconds is not None and result.step_seconds is not None
    }
    return min(totals, key=lambda one: totals[one], default=None)


def memory_judged(policy: Search, told: Sequence[Told], truth: Truth) -> MemoryJudged:
    """Hold a search's last predictions against every candidate that it did not measure."""
    measured = {ask.candidate for ask, _ in told}
    forecasts = policy.view(told).forecasts
    return _held_against(policy, truth, {one: forecasts[one].memory for one in truth.space.candidates if one not in measured})


def calibrated(policy: Search, truth: Truth) -> MemoryJudged:
    """The memory model alone: of every line (knobs equal but the micro-batch) the two smallest passes are known, the others foretold."""
    steps = policy.rules.rungs[0]
    lines: dict[object, list[Candidate]] = {}
    for one in truth.space.candidates:
        lines.setdefault((one.engine, tuple(choice for choice in one.choices if choice[0] != "micro_batch")), []).append(one)
    peaks, rest = [], []
    for line in lines.values():
        ordered = sorted(line, key=lambda one: one.facts.largest)
        known = [Peak(one, size) for one in ordered[:2] if (size := truth.measure(Ask(candidate=one, steps=steps)).peak_bytes)]
        if len(known) == 2:
            peaks += known
            rest += ordered[2:]
    predicted = policy.memory.predict(peaks)
    return _held_against(policy, truth, {one: predicted[one] for one in rest})


def _held_against(policy: Search, truth: Truth, predicted: Mapping[Candidate, Prediction]) -> MemoryJudged:
    """What fills memory there is, by a plan that it does not tell, has no peak to predict."""
    capacity, weights = policy.capacity_bytes, policy.scale.weights
    errors, beyond, false_fits = [], [], 0
    for one, guess in predicted.items():
        result = truth.measure(Ask(candidate=one, steps=policy.rules.rungs[0]))
        false_fits += result.outcome == "oom" and capacity is not None and guess.high(SURE) <= capacity
        if result.peak_bytes and not (truth.space.fills_memory(one) and not one.facts.own_bytes):
            errors.append(abs(guess.middle / result.peak_bytes - 1))
            beyond.append(abs((guess.middle - weights) / (result.peak_bytes - weights) - 1))
    return MemoryJudged(
        num=len(errors),
        error=statistics.fmean(errors) if errors else None,
        beyond_weights=statistics.fmean(beyond) if beyond else None,
        num_false_fits=false_fits,
    )


def near_best(truth: Truth, planned_steps: int, within: float = 0.03) -> float:
    """The share of candidates, those that do not run included, that take at most so much longer than the best."""
    totals = [truth.total_seconds(one, planned_steps) for one in truth.space.candidates]
    known = [total for total in totals if total is not None]
    return sum(total <= min(known) * (1 + within) for total in known) / len(totals)


def over(values: Iterable[Judged], of: Callable[[Judged], float]) -> tuple[float, float]:
    """The median and the worst."""
    numbers = sorted(of(value) for value in values)
    return statistics.median(numbers), numbers[-1]
