"""What a search says while it runs, and at its end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from harness.tune.asked import View
from harness.tune.experience import NOTHING, Experience
from harness.tune.memory_model import SURE
from harness.tune.runner import Looked, Runner
from harness.tune.untried import kind_of
from harness.tuned import Tuned

_GIB = 2**30
_NEXT_TO_NOTHING = 0.01  # seconds


def state(
    view: View, looked: Sequence[Looked], spent: float, budget: float | None, planned_steps: int, experience: Experience = NOTHING
) -> list[str]:
    """Where it stands: the incumbent, what is ruled out and why, the bound, and what comes next; at first with what it begins."""
    of = f" of {budget / 60:g}" if budget is not None else ""
    lines = [f"[{len(looked)} runs, {spent / 60:.1f}{of} min]"]
    if view.incumbent is not None:
        lines[0] += f" best: {view.incumbent.title}, {plain_seconds(view.incumbent_seconds or 0.0)} for {planned_steps} steps"
    if view.contradicted:
        lines.append(f"  what it began with is contradicted here and left out: {', '.join(view.contradicted)}")
    if not looked:
        lines.append(f"  begins with {experience.sentence}")
    if view.incumbent is None and not experience.lessons:
        bound = "nothing is known of this machine yet"
    elif view.bound is None:
        bound = "nothing is left"
    elif view.bound < _NEXT_TO_NOTHING:
        bound = "nothing bounds yet how little some of what is left may take"
    else:
        bound = f"nothing left can take less than {plain_seconds(view.bound)}, by its optimistic bound"
    kinds = Counter(map(kind_of, view.ruled_out.values()))
    ruled = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"
    lines.append(f"  {bound}; ruled out of {len(view.forecasts)}: {ruled}")
    if view.next is not None:
        forecast = view.forecasts[view.next.candidate]
        lines.append(
            f"  next: {view.next.candidate.title}, {view.next.steps} steps; predicted {plain_seconds(forecast.total_seconds)}, at best "
            f"{plain_seconds(forecast.bound_seconds)}, {forecast.memory.middle / _GIB:.1f} GiB"
        )
    return lines


def plain_seconds(seconds: float) -> str:
    """With digits enough to tell short runs apart: ``1,234 s``, ``2.05 s``, ``less than 0.01 s``."""
    if seconds < _NEXT_TO_NOTHING:
        return f"less than {_NEXT_TO_NOTHING:g} s"
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def nothing(runner: Runner, capacity: float | None) -> list[str]:
    """That nothing was found: what was tried and why it cannot be chosen, and where memory is a limit what the least needs."""
    why = {} if runner.view is None else runner.view.ruled_out
    failed = [f"  {one.ask.candidate.title}: {why.get(one.ask.candidate, one.record.status)}" for one in runner.looked]
    least = [needs(runner.view, capacity)] if runner.view is not None and capacity is not None else []
    return [f"nothing was found: {runner.stopped}", *failed, *least]


def needs(view: View, capacity: float | None) -> str:
    """Why nothing could be tried: what the thriftiest candidate needs, by prediction, and what there is."""
    least, forecast = min(view.forecasts.items(), key=lambda item: item[1].memory.middle)
    there = "" if capacity is None else f"; {capacity / _GIB:.1f} GiB are there"
    memory = f"{forecast.memory.middle / _GIB:.1f} GiB"
    return f"at least {memory} are needed, by prediction, by {least.title} (perhaps {forecast.memory.high(SURE) / _GIB:.1f}){there}"


def summary(tuned: Tuned) -> list[str]:
    """What was found, what was tried, and why it ended."""
    peak = "" if tuned.peak_bytes is None else f", {tuned.peak_bytes / _GIB:.1f} GiB"
    knobs = " ".join(f"engine.knobs.{knob}={value if isinstance(value, str) else json.dumps(value)}" for knob, value in tuned.knobs.items())
    several = f" engine.processes={tuned.processes}" if tuned.processes > 1 else ""
    lines = [
        "",
        f"best: engine={tuned.engine}{several} {knobs}",
        f"  {plain_seconds(tuned.total_seconds)} for {tuned.planned_steps} steps: {tuned.startup_seconds:.1f} s of start-up as all looks "
        f"together have it, {tuned.step_seconds:.4g} s a step{peak}",
        f"  parity: {tuned.parity}",
        f"  began with {tuned.experience}",
        f"  stopped after {len(tuned.trials)} runs, {tuned.spent_seconds / 60:.1f} min: {tuned.stopped}",
    ]
    for trial in tuned.trials:
        took = plain_seconds(trial.total_seconds) if trial.total_seconds is not None else trial.status
        lines.append(f"  {took:>12}  (predicted {plain_seconds(trial.predicted_seconds)})  {trial.title}, {trial.steps} steps")
    measured = {trial.engine for trial in tuned.trials}
    best_of = {one.engine: one for one in reversed(tuned.predicted) if one.engine not in measured}
    for engine, one in sorted(best_of.items()):
        lines.append(f"  {engine} was never measured; its best, {plain_seconds(one.total_seconds)} by prediction ({one.title}): {one.why}")
    return [*lines, *(f"  left out: {reason}" for reason in tuned.left_out)]
