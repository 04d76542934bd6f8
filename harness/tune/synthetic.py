"""A made-up machine for trying the policy without a GPU: roofline-like, noisy, and out of memory where a candidate does not fit.

Nothing here was measured. Its form is not the models': knobs act on each other, what fills memory slows down as memory gets short, passes
that are too short wait for their launches, and what is expected in the YAML is true only within a scatter drawn from ``seed``.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
from dataclasses import dataclass
from typing import Any

from harness.tune.asked import Ask, Result
from harness.tune.space import KINDS, Candidate, Scale, Space

_PACE = 1.2e-5  # seconds a position
_INTERACTION = 0.008  # of each pair of knobs
_AGAIN = 0.3  # of a step, to make all activations again


@dataclass(frozen=True)
class SyntheticMachine:
    """Answers questions about ``space``; ``noise``: of a run."""

    space: Space
    scale: Scale
    capacity_bytes: float
    seed: int
    noise: float = 0.005

    def measure(self, ask: Ask) -> Result:
        """A run that is not one."""
        one = ask.candidate
        startup = self._startup(one)
        needed = self.peak_bytes(one)
        if needed > self.capacity_bytes:
            return Result(outcome="oom", cost_seconds=0.8 * startup, reason="out of memory (synthetic)")
        noise = self.noise / math.sqrt(ask.steps / 8)
        step = self.step_seconds(one) * math.exp(noise * self._draw("noise", one.title, ask.steps, ask.round))
        cost = startup + ask.steps * step
        return Result(outcome="ok", cost_seconds=cost, step_seconds=step, startup_seconds=startup, peak_bytes=needed)

    def total_seconds(self, candidate: Candidate, planned_steps: int) -> float | None:
        """The truth about the planned run; None where it does not fit."""
        if self.peak_bytes(candidate) > self.capacity_bytes:
            return None
        return self._startup(candidate) + planned_steps * self.step_seconds(candidate)

    def step_seconds(self, candidate: Candidate) -> float:
        """Work at the engine's pace; each pass waits at least for its launches."""
        one, facts = candidate, candidate.facts
        logs = self._draw("engine", one.engine) * 0.2
        for knob, value in one.choices:
            if knob != "micro_batch":
                logs += self._scattered("seconds", one, knob, value)
        for pair in itertools.combinations(one.choices, 2):
            logs += _INTERACTION * self._draw("pair", one.engine, *pair)
        if self.space.fills_memory(one):
            wanted = self._bytes(one, thrifty=False)
            logs += math.log1p(_AGAIN * max(0.0, min(1.0, (wanted - self.capacity_bytes) / (wanted - self._bytes(one, thrifty=True)))))
        work = _PACE * math.exp(logs) * facts.positions / facts.num_passes
        launches = 0.02 * math.exp(0.5 * self._draw("launches", one.engine))
        return facts.num_passes * math.hypot(work, launches)

    def peak_bytes(self, candidate: Candidate) -> float:
        """What the allocator would hold; of what fills memory, no more than there is."""
        if self.space.fills_memory(candidate):
            return max(self._bytes(candidate, thrifty=True), min(self._bytes(candidate, thrifty=False), 0.95 * self.capacity_bytes))
        return self._bytes(candidate, thrifty=True)

    def _bytes(self, one: Candidate, *, thrifty: bool) -> float:
        total = self.scale.weights + 2**30 * (0.4 + 0.1 * self._draw("context", one.engine))
        for kind in KINDS:
            whole = {"layers": self.scale.layers, "working": self.scale.working, "logits": self.scale.logits}[kind]
            size = whole * math.exp(0.3 * self._draw(kind, one.engine))
            if thrifty or kind != "layers":
                size *= max(0.01, self.space.factor(one, kind))
            for knob, value in one.choices:
                if knob != "micro_batch":
                    size *= math.exp(self._scattered(kind, one, knob, value) - math.log(max(0.01, self._expected(kind, one, knob, value))))
            total += size * one.facts.largest
        return total * (1 + 0.01 * self._draw("rounding", one.title))

    def _startup(self, one: Candidate) -> float:
        own = 22 * math.exp(0.4 * self._draw("startup", one.engine))
        return own + self.space.startup_seconds(one) * math.exp(0.4 * self._draw("compile", one.engine))

    def _scattered(self, kind: Any, one: Candidate, knob: str, value: str) -> float:
        """The logarithm of what a knob really does: what is expected, give or take a fifth of it and 4 %."""
        expected = math.log(max(0.01, self._expected(kind, one, knob, value)))
        return expected + (0.04 + 0.2 * abs(expected)) * self._draw(kind, one.engine, knob, value)

    def _expected(self, kind: Any, one: Candidate, knob: str, value: str) -> float:
        searched = self.space.expected[one.engine][knob]
        factor = searched.factor(kind, one.values[knob])
        return 1.0 if factor is None else factor

    def _draw(self, *what: object) -> float:
        """A standard normal number that depends on the seed and on ``what`` alone."""
        digest = hashlib.sha256(repr((self.seed, what)).encode()).digest()
        return statistics.NormalDist().inv_cdf((int.from_bytes(digest[:6], "big") + 0.5) / 2**48)
