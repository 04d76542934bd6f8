"""How much memory a candidate needs: weights, what a token takes in layers and logits, and how sure that is.

bytes = weights + constant(engine) + positions at once * (layers + the larger of working and logits, each of engine and knobs): affine in
tokens for each choice of the other knobs. ``layers`` is what all layers keep for backward, ``working`` what the one at work takes besides:
it is there whatever is recomputed, and what compiles, captures or pads acts on it. Logits are freed before the layers go backward. The
choices share the engine's parameters, so that two probes of an engine say much about all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.searched import Kind
from harness.tune.gaussian import Floats, Function, Prediction, corrected, independent
from harness.tune.space import KINDS, Candidate, Scale, Space, design

_WORKSPACE_BYTES = 0.15 * 2**30  # of cuBLAS and of what is rounded up, beside weights and adapters
_WEIGHTS_DEVIATION, _CONSTANT_DEVIATION, _ENGINE_DEVIATION = 0.02, 0.5, 0.35  # of logarithms
_KNOB_DEVIATION: Mapping[Kind, float] = {"layers": 0.05, "working": 0.2, "logits": 0.05}  # one layer at work is what compilers differ in
_SHARE_OF_EXPECTATION = 0.25
_SHARP = 4.0  # of the larger of working and logits: a power mean, so that it has a slope everywhere
_LEAST_FACTOR = 0.01  # a factor of zero says "next to nothing"
_OWN_DEVIATION = 0.02  # of what an engine predicts itself: what it allocates
_RESERVED = 0.17  # of working: what the allocator holds besides for an engine that plans (fused on H100 and H200: 10 of 60 bytes a column)
_NOISE = 0.02  # the allocator's rounding and its order of things
_STRAY = 0.03  # what the form of the model leaves out
SURE, LIKELY = 2.0, 1.0  # deviations that must lie between a prediction and the capacity; of what is only to calibrate


@dataclass(frozen=True, slots=True)
class Peak:
    """The bytes that a candidate took, or needed at least when it ran out (``at_least``); ``noise``: how far they may be, as a logarithm,
    from what it takes here.
    """

    candidate: Candidate
    bytes: float
    at_least: bool = False
    noise: float = _NOISE


class MemoryModel:
    """Predicts every candidate of ``space`` from ``scale``, corrected by peaks."""

    def __init__(self, space: Space, scale: Scale) -> None:
        self._space = space
        self._row = {one: row for row, one in enumerate(space.candidates)}
        names = _names(space)
        place = {name: index for index, name in enumerate(names)}
        self._prior = independent(names)
        self._fixed = [_fixed(what, space, scale, place) for what in ("held", "constant")]
        self._parts = [_part(kind, space, scale, place) for kind in KINDS]

    def predict(self, peaks: Sequence[Peak]) -> Mapping[Candidate, Prediction]:
        """Peak bytes of every candidate. One that fills what memory there is: the least that it makes do with."""
        used = [peak for peak in peaks if peak.at_least or peak.candidate.facts.own_bytes or not self._space.fills_memory(peak.candidate)]
        posterior = corrected(
            self._prior,
            self._function([self._row[peak.candidate] for peak in used]),
            np.log([peak.bytes for peak in used]),
            np.array([peak.noise for peak in used]),
            np.array([peak.at_least for peak in used], dtype=bool),
        )
        everything = self._space.candidates
        middles, deviations = posterior.of(self._function(list(range(len(everything)))))
        sure = np.hypot(deviations, _STRAY)
        return {one: Prediction(float(np.exp(m)), float(d)) for one, m, d in zip(everything, middles, sure, strict=True)}

    def _function(self, rows: Sequence[int]) -> Function:
        """Logarithms of the peaks of the candidates in these rows."""
        which, chosen = np.array(rows, dtype=int), np.arange(len(rows))
        fixed = [(base[which], at[which]) for base, at in self._fixed]
        parts = [(base[which], matrix[which]) for base, matrix in self._parts]

        def function(parameters: Floats) -> tuple[Floats, Floats]:
            held = [base * np.exp(parameters[at]) for base, at in fixed]
            layers, *others = (base * np.exp(matrix @ parameters) for base, matrix in parts)
            larger = sum(size**_SHARP for size in others) ** (1 / _SHARP)
            total = sum(held) + layers + larger
            slopes = (layers / total)[:, None] * parts[0][1]
            for size, (_, at) in zip(held, fixed, strict=True):
                slopes[chosen, at] += size / total
            for size, (_, matrix) in zip(others, parts[1:], strict=True):
                share = np.divide(size**_SHARP, larger ** (_SHARP - 1), out=np.zeros_like(larger), where=larger > 0)
                slopes += (share / total)[:, None] * matrix
            return np.log(total), slopes

        return function


def _names(space: Space) -> dict[str, tuple[float, float]]:
    """Every parameter, the mean of its prior and the deviation; all are logarithms of what corrects an expectation."""
    names: dict[str, tuple[float, float]] = {}
    for engine, expected in space.expected.items():
        names[f"{engine}:weights"] = 0.0, _WEIGHTS_DEVIATION
        names[f"{engine}:constant"] = 0.0, _CONSTANT_DEVIATION
        names[f"{engine}:own"] = 0.0, _OWN_DEVIATION
        for kind in KINDS:
            names[f"{engine}:{kind}"] = 0.0, _ENGINE_DEVIATION
            for knob, searched in expected.items():
                for value in searched.values if knob != "micro_batch" else ():
                    expectation = abs(np.log(max(searched.factor(kind, value) or 1.0, _LEAST_FACTOR)))
                    deviation = _KNOB_DEVIATION[kind] + _SHARE_OF_EXPECTATION * expectation
                    names[f"{engine}:{kind}:{knob}={json.dumps(value)}"] = 0.0, float(deviation)
    return names


def _fixed(what: str, space: Space, scale: Scale, place: Mapping[str, int]) -> tuple[Floats, npt.NDArray[np.int_]]:
    """Expected bytes that do not grow with positions [N], and which parameter corrects them [N]. What is ``held``: the weights, or all that
    an engine plans itself.
    """

    def expected(one: Candidate) -> float:
        size, own = one.facts.scale or scale, one.facts.own_bytes
        if what == "held":
            return own or size.weights
        return _WORKSPACE_BYTES + (0.0 if own else size.trained)

    def name(one: Candidate) -> str:
        return "constant" if what == "constant" else "own" if one.facts.own_bytes else "weights"

    places = [place[f"{one.engine}:{name(one)}"] for one in space.candidates]
    return np.array([expected(one) for one in space.candidates]), np.array(places, dtype=int)


def _part(kind: Kind, space: Space, scale: Scale, place: Mapping[str, int]) -> tuple[Floats, Floats]:
    """Expected bytes of all positions at once [N], and which parameters correct them [N, P]."""

    def expected(one: Candidate) -> float:
        size = one.facts.scale or scale
        whole = {"layers": size.layers, "working": size.working, "logits": size.logits}[kind]
        if one.facts.own_bytes:  # planned, but for what the allocator rounds up and cannot lend from one pool to another
            whole = _RESERVED * size.working if kind == "working" else 0.0
            return whole * one.facts.largest
        return whole * one.facts.largest * max(_LEAST_FACTOR, space.factor(one, kind))

    def names(one: Candidate) -> list[str]:
        return [f"{one.engine}:{kind}", *(f"{one.engine}:{kind}:{knob}={value}" for knob, value in one.choices)]

    return np.array([expected(one) for one in space.candidates]), design(space.candidates, place, names)
