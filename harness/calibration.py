"""How far a candidate may stray from an anchor: what harmless variants of the anchor were seen to need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.comparable import Run, blocked, measured, missing, not_finite
from harness.deviations import FIRST_LOSS, TESTS, deviations, loss_floor

SPREAD = 2.0  # an allowance is at least this many times the largest deviation among harmless variants of the anchor
NUM_VARIANTS = 3  # fewer say nothing about how far harmless variants stray


@dataclass(frozen=True, slots=True)
class Calibration:
    """Per test, the allowance in floors, and from how many harmless variants that round differently it is known."""

    allowed: Mapping[str, float]
    known: Mapping[str, int]


def calibrate(reference: Run, variants: Sequence[Run], at_first: Sequence[Run] = (), rounded: Sequence[float] = ()) -> Calibration:
    """Per test, in floors: at least 1, and twice the largest deviation among the variants, once there are enough of them.

    ``at_first``: runs of the reference engine that round where ``reference`` is exact, or the other way round. Before any update both are
    the same function, so what lies between their first losses is rounding, and another engine's rounding may be as large: for that test
    alone they are variants too (docs/decisions/0023, 0029). Later losses of bf16 ``hf`` trail the truth's by more than rounding.
    ``rounded``: first losses of the same function in bf16 with its sums in other orders, variants of that test as well (0030).
    """
    seen: dict[str, list[float]] = {name: [] for name in TESTS}
    for variant in variants:
        problems = blocked(variant, reference)[0] or not_finite(variant) or missing(variant, reference)
        if problems:
            raise ValueError(f"not a variant of the reference: {problems[0]}")
        for test in deviations(variant, reference)[0]:
            seen[test.name].append(test.excess)
    steps = measured(reference).steps
    for first in (*(measured(other).steps.losses[0] for other in at_first), *rounded):
        seen[FIRST_LOSS].append(abs(first - steps.losses[0]) / loss_floor(steps.tokens_loss[0]))
    widened = {name: SPREAD * max(excesses) for name, excesses in seen.items() if len(excesses) >= NUM_VARIANTS}
    # Forward passes that differ in their splits only may agree to the bit: they show one rounding, however many they are.
    known = {name: len(set(excesses)) if name == FIRST_LOSS else len(excesses) for name, excesses in seen.items()}
    return Calibration({name: max(1.0, widened.get(name, 1.0)) for name in TESTS}, known)
