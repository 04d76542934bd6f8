"""How far a run is from a reference: each test's deviation in units of the smallest allowance, and which tests could not be made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.comparable import Run, final_updates, first_updates, measured, scored
from harness.record import Score
from harness.updates import Alike

# Floors of the allowances: what harmless changes (another kernel, another split) were seen to need, on SmolLM2 with GSM8K.
LOSS_FLOOR = 0.05  # divided by the square root of the step's labels
GRAD_NORM_FLOOR = 0.03  # |ln ratio|
FIRST_NORM_FLOOR = 0.002  # |ln ratio|: a learning rate that is 1 % off gives 0.01
FINAL_NORM_FLOOR = 0.003  # |ln ratio|
COSINE_FLOOR = 0.002  # 1 - cosine
HELD_OUT_FLOOR = 0.001

FIRST_LOSS = "loss of step 1"
LARGEST_LOSS = "largest loss deviation"
RMS_LOSS = "RMS of the loss deviations"
GRAD_NORM = "gradient norm of step 1"
FIRST_NORM = "update norm of step 1"
FINAL_NORM = "final update norm"
FIRST_DIRECTION = "direction of the first update"
FINAL_DIRECTION = "direction of the final update"
HELD_OUT = "held-out loss"
TESTS = (FIRST_LOSS, LARGEST_LOSS, RMS_LOSS, GRAD_NORM, FIRST_NORM, FIRST_DIRECTION, FINAL_NORM, FINAL_DIRECTION, HELD_OUT)


@dataclass(frozen=True, slots=True)
class Deviation:
    """One deviation. ``excess`` is in floors: 1 is the floor of the allowance, which is ``unit``.

    ``ratio``: of two norms; ``cosine``: of two updates.
    """

    name: str
    excess: float
    unit: float
    where: str = ""
    ratio: float | None = None
    cosine: float | None = None

    def text(self, allowed: float) -> str:
        """For example ``held-out loss: off by 0.0123, allowed 0.001``."""
        seen = "" if self.ratio is None else f"{self.ratio:.4f} x the reference's, ln "
        seen = seen if self.cosine is None else f"cosine {self.cosine:.5f}, "
        return f"{self.name}{self.where}: {seen}off by {self.excess * self.unit:.3g}, allowed {allowed * self.unit:.3g}"


def deviations(candidate: Run, reference: Run) -> tuple[list[Deviation], dict[str, str]]:
    """The tests that can be made, in the order of TESTS, and for the others why not. Both runs must miss nothing of ``comparable``."""
    a, b = measured(candidate).steps, measured(reference).steps
    floors = [loss_floor(labels) for labels in b.tokens_loss]
    gaps = [abs(x - y) for x, y in zip(a.losses, b.losses, strict=True)]
    off = [gap / floor for gap, floor in zip(gaps, floors, strict=True)]
    far = max(range(len(off)), key=off.__getitem__)
    first, final = first_updates(candidate, reference), final_updates(candidate, reference)
    found = [
        Deviation(FIRST_LOSS, off[0], floors[0]),
        Deviation(LARGEST_LOSS, off[far], floors[far], f" (step {far + 1})"),
        Deviation(RMS_LOSS, _rms(gaps) / _rms(floors), _rms(floors)),
        _ratio(GRAD_NORM, a.grad_norms[0], b.grad_norms[0], GRAD_NORM_FLOOR),
    ]
    if isinstance(first, Alike):
        found += [_ratio(FIRST_NORM, first.norm_ratio, 1.0, FIRST_NORM_FLOOR), _direction(FIRST_DIRECTION, first)]
    found += weights_deviations(scored(candidate.score), scored(reference.score), final if isinstance(final, Alike) else None)
    unknown = {name: first for name in (FIRST_NORM, FIRST_DIRECTION) if isinstance(first, str)}
    return found, unknown | ({FINAL_DIRECTION: final} if isinstance(final, str) else {})


def weights_deviations(candidate: Score, reference: Score, final: Alike | None) -> list[Deviation]:
    """The tests that need nothing but trained weights; that of direction only where it is known."""
    return [
        _ratio(FINAL_NORM, candidate.update_norm, reference.update_norm, FINAL_NORM_FLOOR),
        *([_direction(FINAL_DIRECTION, final)] if final else []),
        Deviation(HELD_OUT, abs(candidate.held_out_loss - reference.held_out_loss) / HELD_OUT_FLOOR, HELD_OUT_FLOOR),
    ]


def loss_floor(labels: int) -> float:
    """The smallest allowance for the loss of a step with so many labels."""
    return LOSS_FLOOR / math.sqrt(max(labels, 1))


def _ratio(name: str, mine: float | None, theirs: float | None, floor: float) -> Deviation:
    if mine == theirs:
        return Deviation(name, 0.0, floor, ratio=1.0)
    if not mine or not theirs or mine < 0 or theirs < 0:
        return Deviation(name, math.inf, floor, ratio=mine / theirs if mine is not None and theirs else None)
    return Deviation(name, abs(math.log(mine / theirs)) / floor, floor, ratio=mine / theirs)


def _direction(name: str, known: Alike) -> Deviation:
    return Deviation(name, (1.0 - known.cosine) / COSINE_FLOOR, COSINE_FLOOR, cosine=known.cosine)


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
