"""What a search left, for the page: what was tried, speed against memory, predicted against measured, and why it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from harness.report.numbers import GIB
from harness.report.plots import COLOURS, Plot
from harness.report.svg import Axis, Line, Mark, chart
from harness.tuned import Trial, Tuned

_NO_PEAKS = "memory was not measured: there is no allocator's peak on a CPU, so no front of speed against memory either"
_MEASURED, _PREDICTED = COLOURS[0], COLOURS[1]


@dataclass(frozen=True, slots=True)
class Table:
    """Cells of text under their titles."""

    name: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Tuning:
    """One search."""

    title: str
    facts: tuple[str, ...]
    tried: Table
    untried: Table
    plots: tuple[Plot, ...]


def tuning(found: Tuned) -> Tuning:
    """What the templates show of ``found``."""
    budget = "" if found.budget_seconds is None else f" of {found.budget_seconds / 60:.0f}"
    ruled = ", ".join(f"{count} {kind}" for kind, count in sorted(found.ruled_out.items())) or "none"
    bound = "nothing was left" if found.bound_seconds is None else f"what was left cannot take less than {found.bound_seconds:,.0f} s"
    facts = (
        f"best: {found.engine} {found.setting}: {found.total_seconds:,.0f} s for {found.planned_steps} steps, "
        f"start-up {found.startup_seconds:.1f} s, {found.step_seconds:.4g} s a step",
        f"parity: {found.parity}",
        f"stopped after {len(found.trials)} runs, {found.spent_seconds / 60:.1f}{budget} minutes: {found.stopped}",
        *([f"it began with {found.experience}"] if found.experience else []),
        f"of {found.num_candidates} candidates ruled out: {ruled}; {bound}, by its optimistic bound",
        *(f"left out: {reason}" for reason in found.left_out),
        *([] if any(trial.peak_bytes for trial in found.trials) else [_NO_PEAKS]),
        f"on {found.machine}, {found.tuned_utc[:10]}, commit {found.commit[:8]}",
    )
    return Tuning(f"{found.workload}, {found.planned_steps} steps", facts, _tried(found), _untried(found), tuple(_plots(found)))


def front(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Of what ran, those than which nobody ends the planned run both sooner and leaner; the leanest first."""
    ran = [trial for trial in trials if trial.total_seconds is not None and trial.peak_bytes is not None and trial.status != "unfit"]
    best: list[Trial] = []
    for trial in sorted(ran, key=lambda one: (one.peak_bytes or 0.0, one.total_seconds or 0.0)):
        if not best or (trial.total_seconds or 0.0) < (best[-1].total_seconds or 0.0):
            best.append(trial)
    return tuple(best)


def _tried(found: Tuned) -> Table:
    best = front(found.trials)
    rows = tuple(
        (
            trial.title,
            str(trial.steps),
            _seconds(trial.total_seconds) or trial.status,
            _seconds(trial.predicted_seconds),
            "" if trial.step_seconds is None else f"{trial.step_seconds:.4g}",
            "" if trial.startup_seconds is None else f"{trial.startup_seconds:.1f}",
            _gib(trial.peak_bytes),
            _gib(trial.predicted_bytes),
            "yes" if trial in best else "",
            trial.reason or "",
        )
        for trial in found.trials
    )
    times, sizes = ("planned run, s", "predicted before", "s a step", "start-up s"), ("peak GiB", "predicted before")
    head = ("candidate", "steps", *times, *sizes, "front", "why not")
    return Table("Tried, in this order", head, rows)


def _untried(found: Tuned) -> Table:
    rows = [(one.title, _seconds(one.total_seconds), _seconds(one.least_seconds), _gib(one.peak_bytes), one.why) for one in found.predicted]
    head = ("candidate", "predicted s", "at best", "predicted GiB", "why not tried")
    return Table("Not measured, the most promising first", head, tuple(rows))


def _plots(found: Tuned) -> list[Plot]:
    ran = [trial for trial in found.trials if trial.total_seconds is not None and trial.step_seconds is not None]
    drawn = []
    if held := [trial for trial in ran if trial.peak_bytes is not None]:
        drawn.append(_speed_and_memory(held, found))
    if ran:
        drawn.append(_foretold(ran))
    return drawn


def _speed_and_memory(held: Sequence[Trial], found: Tuned) -> Plot:
    guesses = [
        Mark(one.total_seconds, one.peak_bytes / GIB, _PREDICTED, "diamond", f"predicted: {one.title}", 3.0) for one in found.predicted
    ]
    marks = [
        Mark(trial.total_seconds or 0.0, (trial.peak_bytes or 0.0) / GIB, _MEASURED, "circle", f"measured: {trial.title}") for trial in held
    ]
    leaders = front(held)
    edge = Line([(trial.total_seconds or 0.0, (trial.peak_bytes or 0.0) / GIB) for trial in leaders], _MEASURED, "front", 1.0)
    best = [f"{trial.title} {_seconds(trial.total_seconds)} s in {_gib(trial.peak_bytes)} GiB" for trial in leaders]
    svg = chart(
        Axis("planned run, s"), Axis("peak GiB", zero=True), [*guesses, edge, *marks], f"Time against memory; the front: {', '.join(best)}"
    )
    return Plot("The planned run against peak memory: measured (circles, the front joined) and predicted only (diamonds)", Markup(svg))


def _foretold(ran: Sequence[Trial]) -> Plot:
    values = [value for trial in ran for value in (trial.predicted_seconds, trial.total_seconds or 0.0)]
    ends = (min(values), max(values))
    equal = Line([(ends[0], ends[0]), (ends[1], ends[1])], "currentColor", "as predicted", 1.0, dashed=True)
    marks = [Mark(trial.predicted_seconds, trial.total_seconds or 0.0, _MEASURED, "circle", trial.title) for trial in ran]
    pairs = [f"{trial.title}: predicted {_seconds(trial.predicted_seconds)}, measured {_seconds(trial.total_seconds)}" for trial in ran]
    svg = chart(
        Axis("predicted before, s"), Axis("measured, s"), [equal, *marks], f"Predicted against measured seconds; {', '.join(pairs)}"
    )
    return Plot("The planned run: predicted before it was tried, and measured", Markup(svg))


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}"
