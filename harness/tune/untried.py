"""Of what a search did not measure: the most promising, and why it was not tried."""

from __future__ import annotations

from collections.abc import Collection
from typing import get_args

from harness.record import Status
from harness.tune.asked import View
from harness.tune.space import Candidate
from harness.tuned import Predicted

_SHOWN = 20  # and the best of every engine


def kind_of(reason: str) -> str:
    """The kind of a reason for ruling out, without its figures."""
    if reason.startswith("may not fit"):
        return "may not fit"
    if reason.startswith("needs at least as much"):
        return "needs as much as one that ran out"
    status = reason.partition(":")[0]
    return status if status in get_args(Status) else "trains something else"


def predicted(view: View, tried: Collection[Candidate], margin: float) -> tuple[Predicted, ...]:
    """The best by prediction first, of every engine at least one; ``margin``: a gain of interest."""
    worth = (view.incumbent_seconds or 0.0) * (1 - margin)
    late, beaten = "the time was over", f"cannot beat the best by {margin:.0%}, not even at best"
    ranked = sorted((one for one in view.forecasts if one not in tried), key=lambda one: view.forecasts[one].total_seconds)
    best_of = {one.engine: one for one in reversed(ranked)}
    shown = [one for place, one in enumerate(ranked) if place < _SHOWN or best_of[one.engine] == one]
    return tuple(
        Predicted(
            title=one.title,
            total_seconds=view.forecasts[one].total_seconds,
            least_seconds=view.forecasts[one].bound_seconds,
            peak_bytes=view.forecasts[one].memory.middle,
            why=view.ruled_out.get(one, late if view.forecasts[one].bound_seconds < worth else beaten),
        )
        for one in shown
    )
