"""The candidates: every choice of every engine's searched knobs, what each works on, and which surely need more memory than others."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import JsonValue

from harness.searched import PROCESSES, Kind, Searched
from harness.tune.gaussian import Floats

Expected = Mapping[str, Searched]  # by knob
KINDS: tuple[Kind, ...] = ("layers", "working", "logits")  # of what a token takes


@dataclass(frozen=True, slots=True)
class Scale:
    """What a workload is made of: ``weights`` bytes that are always there, ``trained``: adapters, their gradients and moments; bytes of a
    position in all ``layers``, everything kept, in the one layer that is at work (``working``), and in the ``logits``. Where workloads
    are to be compared: ``flops`` of a position, and ``num_layers``, to which the launches of a pass are in proportion.
    """

    weights: float
    layers: float
    logits: float
    working: float = 0.0
    trained: float = 0.0
    flops: float = 1.0
    num_layers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a candidate makes of a step's samples. ``positions``: that its kernels process in a mean step, padding too; ``num_passes``:
    micro-batches of it; ``largest``: positions of the largest micro-batch of the whole planned run.

    ``scale``: of its workload, where that is not the search's. Where an engine plans its own memory, ``own_bytes`` is the peak that it
    predicts and ``own_seconds`` the relative time of its plan.
    """

    positions: float
    num_passes: float
    largest: float
    scale: Scale | None = None
    own_bytes: float | None = None
    own_seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One engine with one choice of its searched knobs. ``choices``: knob and value (as JSON), in the order of the engine's YAML.
    ``work``: tells candidates of several workloads apart; ``setting``: what else was given where one was measured (the card, knobs that
    are not searched), by which an engine may plan otherwise. Empty of what is asked about.
    """

    engine: str
    choices: tuple[tuple[str, str], ...]
    facts: Facts = field(compare=False)
    work: str = ""
    setting: str = ""

    @property
    def values(self) -> dict[str, Any]:
        """What was chosen: the knobs, and the number of processes where that is searched."""
        return dict(_decoded(self.choices))

    @property
    def knobs(self) -> dict[str, Any]:
        """The knobs that were chosen."""
        return {name: value for name, value in self.values.items() if name != PROCESSES}

    @property
    def processes(self) -> int:
        """Ranks that share a step's samples."""
        return int(self.values.get(PROCESSES, 1))

    @property
    def title(self) -> str:
        """``fused micro_batch=4 recompute=fit``."""
        words = (f"{knob}={value if isinstance(value, str) else json.dumps(value)}" for knob, value in self.values.items())
        return " ".join([self.engine, *words])


@functools.lru_cache(maxsize=4096)
def _decoded(choices: tuple[tuple[str, str], ...]) -> tuple[tuple[str, Any], ...]:
    return tuple((knob, json.loads(value)) for knob, value in choices)


@dataclass(frozen=True, slots=True)
class Space:
    """All candidates that may run, and what is expected of their knobs, by engine."""

    candidates: tuple[Candidate, ...]
    expected: Mapping[str, Expected]

    def factor(self, candidate: Candidate, kind: Kind) -> float:
        """The product of what is expected of every knob; of one that fills what memory there is, the thriftiest."""
        product = 1.0
        for knob, value in candidate.values.items():
            searched = self.expected[candidate.engine][knob]
            factor = searched.factor(kind, value)
            product *= _least(searched, kind) if factor is None else factor
        return product

    def startup_seconds(self, candidate: Candidate) -> float:
        """What the knobs are expected to add to the engine's start-up."""
        return sum(self.expected[candidate.engine][knob].startup_seconds(value) for knob, value in candidate.values.items())

    def fills_memory(self, candidate: Candidate) -> bool:
        """Whether the engine takes as much as there is for this candidate, and makes do with less."""
        expected = self.expected[candidate.engine]
        return any(expected[knob].factor("layers", value) is None for knob, value in candidate.values.items())

    def needs_at_least(self, one: Candidate, other: Candidate) -> bool:
        """Whether ``one`` surely needs as much memory as ``other``, which may be itself: as many positions at once, and every knob the
        same or of a larger factor. What nothing is known of is never sure.
        """
        if one.engine != other.engine or one.facts.largest < other.facts.largest:
            return False
        theirs = other.values
        return all(self._as_much(one.engine, knob, value, theirs.get(knob)) for knob, value in one.values.items() if knob != "micro_batch")

    def _as_much(self, engine: str, knob: str, value: JsonValue, other: JsonValue) -> bool:
        if value == other:
            return True
        searched = self.expected[engine][knob]
        surely = False
        for kind in KINDS:
            mine, its = searched.factor(kind, value), searched.factor(kind, other)
            least = _least(searched, kind) if its is None else its
            if mine is None or mine < least:
                return False  # it makes do with less
            surely = surely or its is None or mine > its
        return surely


def _least(searched: Searched, kind: Kind) -> float:
    """The smallest factor of any value."""
    return min((factor for value in searched.values if (factor := searched.factor(kind, value)) is not None), default=1.0)


def design(candidates: Sequence[Candidate], place: Mapping[str, int], names: Callable[[Candidate], Sequence[str]]) -> Floats:
    """Which parameters a candidate has: 1 at the ``place`` of each of its ``names`` [N, P]. Names without a place count for nothing."""
    matrix = np.zeros((len(candidates), len(place)))
    for row, one in enumerate(candidates):
        for name in names(one):
            if name in place:
                matrix[row, place[name]] = 1.0
    return matrix


FactsOf = Callable[[str, Mapping[str, Any]], Facts | None]
"""What an engine with these knobs makes of a step; None where it cannot run at all."""


def enumerate_space(engines: Mapping[str, Expected], facts: FactsOf) -> Space:
    """Every combination for which there are ``facts``."""
    found = [
        Candidate(engine, tuple((knob, json.dumps(value)) for knob, value in values.items()), known)
        for engine, expected in engines.items()
        for values in _combinations(expected)
        if (known := facts(engine, values)) is not None
    ]
    return Space(tuple(found), engines)


def _combinations(expected: Expected) -> Iterator[dict[str, Any]]:
    names: Sequence[str] = list(expected)
    for values in itertools.product(*(expected[name].values for name in names)):
        yield dict(zip(names, values, strict=True))
