"""What a pattern of deviations looks like, in plain words: the mistake to look for first. A hint, never part of a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping

from harness.comparable import Run, measured
from harness.deviations import FINAL_NORM, FIRST_LOSS, FIRST_NORM, GRAD_NORM, HELD_OUT, Deviation
from harness.spec import Lora, Train

NEAR = 0.02  # |ln|: a ratio this near to that of a known mistake is taken for it


def suspicion(candidate: Run, reference: Run, tests: Mapping[str, Deviation], failed: frozenset[str]) -> str:
    """The likeliest mistake behind the tests called ``failed``, or an empty text."""
    if not any(measured(candidate).steps.losses):
        return "every loss is 0.0: the loss is not what is reported"
    if tests[FINAL_NORM].ratio == 0:
        return "the weights have not moved: nothing was trained"
    if FIRST_LOSS in failed:
        return _before_any_update(candidate, reference)
    if GRAD_NORM in failed:
        return _gradient(candidate, tests[GRAD_NORM].ratio)
    return _schedule(candidate.record.cell.workload.train, tests, failed)


def _before_any_update(candidate: Run, reference: Run) -> str:
    mine, theirs = measured(candidate).steps.losses[0], measured(reference).steps.losses[0]
    declared = candidate.record.loss_norm
    if declared not in (None, "token_global"):
        return f"the engine says its loss is a mean of another kind (loss_norm: {declared}), the workload's is over all labels of the step"
    return (
        f"the loss of step 1, before any update, is {mine:.4f} for {theirs:.4f}: another mean (of micro-batch means?), other labels, "
        "attention across documents, or another model function"
    )


def _gradient(candidate: Run, ratio: float | None) -> str:
    method = candidate.record.cell.workload.method
    if ratio is None:
        return "no gradient reached the trained weights"
    if isinstance(method, Lora) and any(_near(ratio, factor) for factor in (method.scale, 1 / method.scale)):
        return f"the gradient is {ratio:.4f} x, alpha / rank is {method.scale:g}: the LoRA scale forgotten, or applied twice?"
    return f"the same loss, but a gradient {ratio:.4f} x as long: a backward pass, or its scaling over micro-batches?"


def _schedule(train: Train, tests: Mapping[str, Deviation], failed: frozenset[str]) -> str:
    first = tests[FIRST_NORM].ratio if FIRST_NORM in tests else None
    final = tests[FINAL_NORM].ratio or math.inf
    if first is not None and FIRST_NORM in failed:
        peak = train.learning_rate / train.learning_rate_at(0)
        if peak > 1 + NEAR and _near(first, peak):
            return f"the first update is {first:.4f} x, the peak rate is {peak:g} x that of step 1: the schedule skipped (no warm-up)?"
        return f"the first update is {first:.4f} x: learning rate?"
    if FINAL_NORM in failed:
        return f"the final update is {final:.4f} x as long: learning rate, schedule, weight decay or betas?"
    return "the runs agree in norms, the saved weights do not: are they those that were trained?" if failed == {HELD_OUT} else ""


def _near(ratio: float, factor: float) -> bool:
    return ratio > 0 and abs(math.log(ratio / factor)) < NEAR
