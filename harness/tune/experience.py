"""What was measured before the search began, of its own kind of work and of others: where it begins, and how far it trusts that."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from harness.tune.cost_model import Spread, Timed
from harness.tune.memory_model import Peak
from harness.tune.space import Candidate, Scale, Space

# Held against the committed records: python -m harness.tune.left_out results. The noise of a step: other hosts, older code.
NOISE, _STARTUP_NOISE = 0.03, 5.0
_PEAK_NOISE, _OTHER_PEAK_NOISE = 0.02, 0.05  # memory is the same on every host; of another workload, as that of one engine is off
SPREAD = Spread(work=0.1, engine=0.05, startup=8.0)
_ELSEWHERE = Spread(work=0.1, engine=0.05, startup=8.0, own_work=3.0, own_engine=0.1)  # how fast this kind of GPU is, nobody knows


@dataclass(frozen=True, slots=True)
class Lesson:
    """A candidate that was measured; its ``work`` is empty where it is the work that is searched, on such a machine."""

    candidate: Candidate
    step_seconds: float
    startup_seconds: float
    peak_bytes: float | None


@dataclass(frozen=True, slots=True)
class Experience:
    """``lessons`` of one kind of ``gpu``; ``here``: the search is on one too. ``scale``: of the work that is searched, comparable with
    theirs. Without lessons a search begins with what the engines' YAML expects.
    """

    lessons: tuple[Lesson, ...] = ()
    gpu: str = ""
    here: bool = True
    scale: Scale | None = None

    @property
    def spread(self) -> Spread | None:
        """How far paces of workloads lie apart."""
        return None if not self.lessons else SPREAD if self.here else _ELSEWHERE

    @property
    def sentence(self) -> str:
        """What a search began with."""
        if not self.lessons:
            return "what the engines' YAML expects: no record teaches anything of this"
        others = {one.candidate.work for one in self.lessons if one.candidate.work}
        own = sum(not one.candidate.work for one in self.lessons)
        number = f"{len(self.lessons)} measured setting{'s' if len(self.lessons) > 1 else ''}"
        known = f"paces from {number} on {self.gpu}: {own} of this work"
        known += f", the rest of {len(others)} other{'s' if len(others) > 1 else ''}" if others else ""
        return known if self.here else f"{known}; none of this kind of GPU, so that only ratios carry over"

    def after(self, contradicted: Sequence[str]) -> str:
        """The same, and of what it did not hold here."""
        return f"{self.sentence}; contradicted here and left out: {', '.join(contradicted)}" if contradicted else self.sentence

    def with_lessons(self, space: Space) -> Space:
        """``space`` with what was measured before: what models see, of which only the candidates of ``space`` are asked about."""
        if not self.lessons:
            return space
        # Facts do not tell candidates apart: what models say of these holds for those of ``space``.
        own = [replace(one, facts=replace(one.facts, scale=self.scale)) for one in space.candidates]
        return Space(tuple(dict.fromkeys([*own, *(one.candidate for one in self.lessons)])), space.expected)

    def timed(self, but: Collection[str] = ()) -> list[Timed]:
        """Times of all engines but those that are named."""
        return [
            Timed(one.candidate, one.step_seconds, one.startup_seconds, NOISE, _STARTUP_NOISE)
            for one in self.lessons
            if one.candidate.engine not in but
        ]

    def peaks(self) -> list[Peak]:
        """Bytes that were taken."""
        return [
            Peak(one.candidate, one.peak_bytes, noise=_OTHER_PEAK_NOISE if one.candidate.work else _PEAK_NOISE)
            for one in self.lessons
            if one.peak_bytes
        ]


NOTHING = Experience()
