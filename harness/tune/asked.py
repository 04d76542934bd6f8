"""What a search asks, what it is told, and where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from harness.tune.gaussian import Prediction
from harness.tune.space import Candidate

Outcome = Literal["ok", "oom", "failed", "unfit"]
"""``failed``: it crashed, hung or is unsupported after all; ``unfit``: it trained something else than the reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Measure ``candidate`` for ``steps``; ``round`` tells repeats of it apart."""

    candidate: Candidate
    steps: int
    round: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came out. ``step_seconds``: of a mean step of the planned run; ``startup_seconds``: all that a run takes besides its steps.

    ``peak_bytes``: what has to fit, null where nobody counts it; ``cost_seconds``: what measuring took, whatever came out.
    """

    outcome: Outcome
    cost_seconds: float
    step_seconds: float | None = None
    startup_seconds: float | None = None
    peak_bytes: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected of a candidate now: its total, that total's optimistic bound and what one may hope for, and the memory it takes."""

    total_seconds: float
    bound_seconds: float
    hope_seconds: float
    step: Prediction
    startup_seconds: float
    memory: Prediction


@dataclass(frozen=True, slots=True)
class View:
    """Where a search stands. ``ruled_out``: why, of every candidate that is not to be tried; ``bound``: the best that is still possible;
    ``contradicted``: engines of which looks took something else than experience foretold, so that it does not count.
    """

    incumbent: Candidate | None
    incumbent_seconds: float | None
    forecasts: Mapping[Candidate, Forecast]
    ruled_out: Mapping[Candidate, str]
    bound: float | None
    next: Ask | None
    stopped: str | None
    contradicted: tuple[str, ...] = ()


Told = tuple[Ask, Result]
