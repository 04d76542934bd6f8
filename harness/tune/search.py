"""Which candidate to measure next, for how many steps, and when to stop: a pure policy that has no idea who measures.

The objective is the time of the planned run: start-up, with all compiling, and every step. First the candidate with the best optimistic
bound is measured for few steps, as long as one can still beat the incumbent by a margin; what cannot fit is never tried, what ran out of
memory rules out all that surely needs as much. Then those too close to tell race over more steps, in turns whose order is reversed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from harness.tune.asked import Ask, Forecast, Result, Told, View
from harness.tune.cost_model import CostModel, Timed
from harness.tune.experience import NOTHING, Experience
from harness.tune.gaussian import Prediction
from harness.tune.memory_model import LIKELY, SURE, MemoryModel, Peak
from harness.tune.space import Candidate, Scale, Space

_CONTRADICTED = 3.0  # deviations


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """``planned_steps``: of the run that all this is for. ``rungs``: steps of a first look, then of the races among those too close to
    tell. ``margin``: a gain of interest; ``close``: too close to tell after a first look. ``bound_deviations``: how optimistic the bound is
    that ends the search, ``hope_deviations`` that by which the next candidate is chosen. ``most_runs``: all counted, None: no limit.
    """

    planned_steps: int
    rungs: tuple[int, ...] = (8, 24)
    margin: float = 0.01
    close: float = 0.02
    bound_deviations: float = 2.0
    hope_deviations: float = 1.0
    most_runs: int | None = None
    most_contenders: int = 3


@dataclass(frozen=True)
class Search:
    """A search over ``space``. ``capacity_bytes``: what there is, None where memory is no limit. ``experience``: where it begins; what its
    own looks contradict does not count.
    """

    space: Space
    scale: Scale
    capacity_bytes: float | None
    rules: Rules
    experience: Experience = NOTHING
    memory: MemoryModel = field(init=False)
    cost: CostModel = field(init=False)

    def __post_init__(self) -> None:
        known = self.experience.with_lessons(self.space)
        object.__setattr__(self, "memory", MemoryModel(known, self.scale))
        object.__setattr__(self, "cost", CostModel(known, self.experience.spread))

    def view(self, told: Sequence[Told]) -> View:
        """What follows from all that was ``told``, oldest first. The same answers always lead to the same next question."""
        timed = _timed(told)
        contradicted = self._contradicted(timed)
        forecasts = self._forecasts(told, [*timed, *self.experience.timed(but=contradicted)])
        ruled_out = self._ruled_out(told, forecasts)
        totals = self._totals(told, forecasts)
        incumbent = min(totals, key=lambda one: totals[one], default=None)
        best = None if incumbent is None else totals[incumbent]
        tried = {ask.candidate for ask, _ in told}
        open_ones = {one: forecast for one, forecast in forecasts.items() if one not in tried and one not in ruled_out}
        bound = min((forecast.bound_seconds for forecast in open_ones.values()), default=None)

        def view(ask: Ask | None, stopped: str | None = None) -> View:
            return View(incumbent, best, forecasts, ruled_out, bound, ask, stopped, contradicted)

        if self.rules.most_runs is not None and len(told) >= self.rules.most_runs:
            return view(None, f"{len(told)} runs were all that it was given")
        worth = math.inf if best is None else best * (1 - self.rules.margin)
        if (promising := self._promising(open_ones, forecasts, tried, worth)) is not None:
            return view(Ask(candidate=promising, steps=self.rules.rungs[0]))
        if race := self._race(told, totals):
            return view(race)
        if best is None:
            return view(None, "nothing that it may try is left")
        left = "nothing else is left" if bound is None else f"nothing left can take less than {bound:.1f} s, by its optimistic bound"
        return view(None, f"{left}; the best takes {best:.1f} s")

    def _totals(self, told: Sequence[Told], forecasts: Mapping[Candidate, Forecast]) -> dict[Candidate, float]:
        """Seconds of the planned run of every candidate that ran, by its longest look. The start-up is what all runs of its engine say of
        it: one start alone varies by seconds, which would decide a short run.
        """
        totals = {}
        for one, results in _by_candidate(told).items():
            longest = max(ask.steps for ask, _ in results)
            looks = [result for ask, result in results if ask.steps == longest]
            if all(result.outcome == "ok" for _, result in results):
                steps = [result.step_seconds for result in looks if result.step_seconds is not None]
                totals[one] = self._total(forecasts[one].startup_seconds, statistics.fmean(steps))
        return totals

    def _total(self, startup: float, step: float) -> float:
        return startup + self.rules.planned_steps * step

    def _optimistic(self, startup: tuple[float, float], step: Prediction, deviations: float) -> float:
        """The planned run if start-up and steps, each on its own, turn out so many deviations better together."""
        gain = math.hypot(deviations * startup[1], self.rules.planned_steps * (step.middle - step.low(deviations)))
        return max(0.0, self._total(startup[0], step.middle) - gain)

    def _promising(
        self, open_ones: Mapping[Candidate, Forecast], forecasts: Mapping[Candidate, Forecast], tried: set[Candidate], worth: float
    ) -> Candidate | None:
        """What one may hope most of; None when not even a bound is below ``worth``. What would be better, if only it were surely to fit,
        is asked about by a smaller micro-batch of the same: two points of one line say where it ends.
        """
        hopeful = {one: forecast for one, forecast in open_ones.items() if forecast.bound_seconds < worth}
        if tried and (unknown := self._of_unknown_engines(hopeful, tried)):
            hopeful = unknown
        best = min(hopeful, key=lambda one: (hopeful[one].hope_seconds, one.title), default=None)
        least = worth if best is None else min(worth, hopeful[best].hope_seconds)
        for one, forecast in sorted(forecasts.items(), key=lambda item: (item[1].hope_seconds, item[0].title)):
            if forecast.hope_seconds >= least:
                break
            if self._may_fit(one, forecast) and (probe := self._calibrating(one, forecasts, open_ones, tried)) is not None:
                return probe
        return best

    def _of_unknown_engines(self, hopeful: Mapping[Candidate, Forecast], tried: Collection[Candidate]) -> dict[Candidate, Forecast]:
        """Those of engines that nobody has measured: one look each comes before a second look at another. What is known of that one pulls
        its other settings ahead of what is only assumed of these.
        """
        known = {one.engine for one in tried} | {lesson.candidate.engine for lesson in self.experience.lessons}
        return {one: forecast for one, forecast in hopeful.items() if one.engine not in known}

    def _may_fit(self, one: Candidate, forecast: Forecast) -> bool:
        """Whether it is only not sure that ``one`` fits."""
        capacity = self.capacity_bytes
        return capacity is not None and forecast.memory.middle <= capacity < forecast.memory.high(SURE)

    def _calibrating(
        self, one: Candidate, forecasts: Mapping[Candidate, Forecast], open_ones: Collection[Candidate], tried: set[Candidate]
    ) -> Candidate | None:
        """Of ``one`` with its micro-batch or a smaller one: the largest that surely fits, or else the smallest, where that is likely to.
        None when there is no such, or when one of them was tried.
        """
        line = [
            other
            for other in self.space.candidates
            if other.facts.largest <= one.facts.largest and other.engine == one.engine and _but_micro_batch(other) == _but_micro_batch(one)
        ]
        if any(other in tried for other in line):
            return None
        surely = max((other for other in line if other in open_ones), key=lambda other: other.facts.largest, default=None)
        smallest = min(line, key=lambda other: other.facts.largest)
        assert self.capacity_bytes is not None
        return surely or (smallest if forecasts[smallest].memory.high(LIKELY) <= self.capacity_bytes else None)

    def _forecasts(self, told: Sequence[Told], timed: Sequence[Timed]) -> dict[Candidate, Forecast]:
        peaks = self.experience.peaks()
        peaks += [Peak(ask.candidate, result.peak_bytes) for ask, result in told if result.outcome == "ok" and result.peak_bytes]
        if self.capacity_bytes is not None:
            peaks += [Peak(ask.candidate, self.capacity_bytes, at_least=True) for ask, result in told if result.outcome == "oom"]
        steps, startups, memory = self.cost.step(timed), self.cost.startup(timed), self.memory.predict(peaks)
        return {
            one: Forecast(
                self._total(startups[one][0], steps[one].middle),
                self._optimistic(startups[one], steps[one], self.rules.bound_deviations),
                self._optimistic(startups[one], steps[one], self.rules.hope_deviations),
                steps[one],
                startups[one][0],
                memory[one],
            )
            for one in self.space.candidates
        }

    def _contradicted(self, timed: Sequence[Timed]) -> tuple[str, ...]:
        """Engines of which a look took so much more or less than experience foretold that it tells nothing of them here."""
        if not timed or not self.experience.lessons:
            return ()
        foretold = self.cost.step(self.experience.timed())
        off = {one: abs(math.log(one.step_seconds / foretold[one.candidate].middle)) for one in timed}
        return tuple(sorted({one.candidate.engine for one in timed if off[one] > _CONTRADICTED * foretold[one.candidate].deviation}))

    def _ruled_out(self, told: Sequence[Told], forecasts: Mapping[Candidate, Forecast]) -> dict[Candidate, str]:
        ruled_out: dict[Candidate, str] = {}
        for one in self.space.candidates:
            for ask, result in told:
                if result.outcome == "oom" and self.space.needs_at_least(one, ask.candidate):
                    ruled_out[one] = f"needs at least as much memory as {ask.candidate.title}, which ran out"
                elif result.outcome in ("failed", "unfit") and one == ask.candidate:
                    ruled_out[one] = result.reason or result.outcome
            memory = forecasts[one].memory
            if one not in ruled_out and self.capacity_bytes is not None and not self._surely_fits(one, memory, self.capacity_bytes):
                ruled_out[one] = f"may not fit: {memory.middle / 2**30:.1f} GiB predicted, up to {memory.high(SURE) / 2**30:.1f}"
        return ruled_out

    def _surely_fits(self, one: Candidate, memory: Prediction, capacity: float) -> bool:
        """An engine that fills what memory there is by a plan of its own stays within it, if the plan does."""
        if one.facts.own_bytes is not None and self.space.fills_memory(one):
            return one.facts.own_bytes <= capacity
        return memory.high(SURE) <= capacity

    def _race(self, told: Sequence[Told], totals: Mapping[Candidate, float]) -> Ask | None:
        """The next run of the race: all contenders once a round, the order reversed in every second one, so that drift favours none."""
        runs = _by_candidate(told)
        for rung in self.rules.rungs[1:]:
            contenders = self._contenders(totals)
            if len(contenders) < 2:
                return None
            for number in range(2):
                for one in contenders if number % 2 == 0 else contenders[::-1]:
                    done = [ask for ask, _ in runs[one] if ask.steps == rung]
                    if len(done) <= number:
                        return Ask(candidate=one, steps=rung, round=number)
        return None

    def _contenders(self, totals: Mapping[Candidate, float]) -> list[Candidate]:
        ranked = sorted(totals, key=lambda one: (totals[one], one.title))
        close = [one for one in ranked if totals[one] <= totals[ranked[0]] * (1 + self.rules.close)]
        return close[: self.rules.most_contenders]


def search(policy: Search, measure: Callable[[Ask], Result], *, on_view: Callable[[View], None] | None = None) -> list[Told]:
    """Ask and ``measure`` until the policy stops."""
    known: list[Told] = []
    while True:
        view = policy.view(known)
        if on_view is not None:
            on_view(view)
        if view.next is None:
            return known
        known.append((view.next, measure(view.next)))


def _timed(told: Sequence[Told]) -> list[Timed]:
    return [
        Timed(ask.candidate, result.step_seconds, result.startup_seconds)
        for ask, result in told
        if result.outcome == "ok" and result.step_seconds is not None and result.startup_seconds is not None
    ]


def _but_micro_batch(one: Candidate) -> tuple[tuple[str, str], ...]:
    return tuple(choice for choice in one.choices if choice[0] != "micro_batch")


def _by_candidate(told: Sequence[Told]) -> dict[Candidate, list[Told]]:
    found: dict[Candidate, list[Told]] = {}
    for ask, result in told:
        found.setdefault(ask.candidate, []).append((ask, result))
    return found
