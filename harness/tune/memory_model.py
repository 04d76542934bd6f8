"""How much memory a candidate needs: weights, what a token takes in layers and logits, and how sure that is.

bytes = constant(engine) + positions at once * (layers(engine, knobs) + logits(engine, knobs)): affine in tokens for each choice of the
other knobs. The choices share the engine's parameters, so that two probes of an engine say much about all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.searched import Kind
from harness.tune.gaussian import Floats, Function, Prediction, corrected, independent
from harness.tune.space import KINDS, Candidate, Scale, Space, design

_CONTEXT_BYTES = 0.3 * 2**30  # workspaces and adapters beside the weights
_CONSTANT_DEVIATION, _ENGINE_DEVIATION = 0.2, 0.35  # of logarithms
_KNOB_DEVIATION, _SHARE_OF_EXPECTATION = 0.05, 0.25
_LEAST_FACTOR = 0.01  # a factor of zero says "next to nothing"
_OWN_DEVIATION = 0.05  # of what an engine predicts itself
_NOISE = 0.02  # the allocator's rounding and its order of things
_STRAY = 0.03  # what the form of the model leaves out
SURE, LIKELY = 2.0, 1.0  # deviations that must lie between a prediction and the capacity; of what is only to calibrate


@dataclass(frozen=True, slots=True)
class Peak:
    """The bytes that a candidate took, or needed at least when it ran out (``at_least``)."""

    candidate: Candidate
    bytes: float
    at_least: bool = False


class MemoryModel:
    """Predicts every candidate of ``space`` from ``scale``, corrected by peaks."""

    def __init__(self, space: Space, scale: Scale) -> None:
        self._space = space
        self._row = {one: row for row, one in enumerate(space.candidates)}
        names = _names(space)
        place = {name: index for index, name in enumerate(names)}
        self._prior = independent(names)
        self._constant = np.array([place[f"{one.engine}:constant"] for one in space.candidates], dtype=int)
        self._own_place = np.array([place[f"{one.engine}:own"] for one in space.candidates], dtype=int)
        self._fixed = np.array([(one.facts.scale or scale).weights + _CONTEXT_BYTES for one in space.candidates])
        self._own = np.array([one.facts.own_bytes or 0.0 for one in space.candidates])
        self._parts = [_part(kind, space, scale, place) for kind in KINDS]

    def predict(self, peaks: Sequence[Peak]) -> Mapping[Candidate, Prediction]:
        """Peak bytes of every candidate. One that fills what memory there is: the least that it makes do with."""
        used = [peak for peak in peaks if peak.at_least or peak.candidate.facts.own_bytes or not self._space.fills_memory(peak.candidate)]
        posterior = corrected(
            self._prior,
            self._function([self._row[peak.candidate] for peak in used]),
            np.log([peak.bytes for peak in used]),
            np.full(len(used), _NOISE),
            np.array([peak.at_least for peak in used], dtype=bool),
        )
        everything = self._space.candidates
        middles, deviations = posterior.of(self._function(list(range(len(everything)))))
        sure = np.hypot(deviations, _STRAY)
        return {one: Prediction(float(np.exp(m)), float(d)) for one, m, d in zip(everything, middles, sure, strict=True)}

    def _function(self, rows: Sequence[int]) -> Function:
        """Logarithms of the peaks of the candidates in these rows."""
        which, chosen = np.array(rows, dtype=int), np.arange(len(rows))
        constant, own_place, own, weights = self._constant[which], self._own_place[which], self._own[which], self._fixed[which]
        parts = [(base[which], matrix[which]) for base, matrix in self._parts]
        planned = own > 0

        def function(parameters: Floats) -> tuple[Floats, Floats]:
            fixed = weights * np.exp(parameters[constant])
            sizes = [base * np.exp(matrix @ parameters) for base, matrix in parts]
            total = fixed + sum(sizes)
            slopes = np.zeros((len(rows), len(parameters)))
            slopes[chosen, constant] = fixed / total
            for size, (_, matrix) in zip(sizes, parts, strict=True):
                slopes += (size / total)[:, None] * matrix
            values = np.log(total)
            values[planned] = np.log(own[planned]) + parameters[own_place[planned]]
            slopes[planned] = 0.0
            slopes[chosen[planned], own_place[planned]] = 1.0
            return values, slopes

        return function


def _names(space: Space) -> dict[str, tuple[float, float]]:
    """Every parameter, the mean of its prior and the deviation; all are logarithms of what corrects an expectation."""
    names: dict[str, tuple[float, float]] = {}
    for engine, expected in space.expected.items():
        names[f"{engine}:constant"] = 0.0, _CONSTANT_DEVIATION
        names[f"{engine}:own"] = _OWN_DEVIATION, _OWN_DEVIATION
        for kind in KINDS:
            names[f"{engine}:{kind}"] = 0.0, _ENGINE_DEVIATION
            for knob, searched in expected.items():
                for value in searched.values if knob != "micro_batch" else ():
                    expectation = abs(np.log(max(searched.factor(kind, value) or 1.0, _LEAST_FACTOR)))
                    deviation = _KNOB_DEVIATION + _SHARE_OF_EXPECTATION * expectation
                    names[f"{engine}:{kind}:{knob}={json.dumps(value)}"] = 0.0, float(deviation)
    return names


def _part(kind: Kind, space: Space, scale: Scale, place: Mapping[str, int]) -> tuple[Floats, Floats]:
    """Expected bytes of all positions at once [N], and which parameters correct them [N, P]."""

    def expected(one: Candidate) -> float:
        size = one.facts.scale or scale
        whole = size.layers if kind == "layers" else size.logits
        return whole * one.facts.largest * max(_LEAST_FACTOR, space.factor(one, kind))

    def names(one: Candidate) -> list[str]:
        return [f"{one.engine}:{kind}", *(f"{one.engine}:{kind}:{knob}={value}" for knob, value in one.choices)]

    return np.array([expected(one) for one in space.candidates]), design(space.candidates, place, names)
