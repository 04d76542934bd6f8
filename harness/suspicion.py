"""What a pattern of deviations looks like, in plain words: the mistake to look for first. A hint, never part of a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping

from harness.comparable import Run, dtype_of, measured
from harness.deviations import FINAL_NORM, FIRST_LOSS, FIRST_NORM, GRAD_NORM, HELD_OUT, Deviation
from harness.spec import Lora, Train

NEAR = 0.02  # |ln|: a ratio this near to that of a known mistake is taken for it


def suspicion(candidate: Run, reference: Run, tests: Mapping[str, Deviation], failed: frozenset[str]) -> str:
    """The likeliest mistake behind the tests called ``failed``, or an empty text. What a number proves is said as it is; of the rest
    rounding comes first where the two compute in different types.
    """
    if not any(measured(candidate).steps.losses):
        return "every loss is 0.0: the loss is not what is reported"
    if tests[FINAL_NORM].ratio == 0:
        return "the weights have not moved: nothing was trained"
    return _known(candidate, tests, failed) or _guess(candidate, reference, _unknown(candidate, reference, tests, failed))


def _known(candidate: Run, tests: Mapping[str, Deviation], failed: frozenset[str]) -> str:
    """A mistake of just this size."""
    if FIRST_LOSS in failed:
        declared = candidate.record.loss_norm
        if declared in (None, "token_global"):
            return ""
        return f"the engine says its loss is a mean of another kind (loss_norm: {declared}), the workload's is over all labels of the step"
    if GRAD_NORM in failed:
        return _gradient(candidate, tests[GRAD_NORM].ratio)
    return _schedule_skipped(candidate.record.cell.workload.train, tests, failed)


def _unknown(candidate: Run, reference: Run, tests: Mapping[str, Deviation], failed: frozenset[str]) -> str:
    """What makes deviations of any size where the first of the failed tests is."""
    if FIRST_LOSS in failed:
        mine, theirs = measured(candidate).steps.losses[0], measured(reference).steps.losses[0]
        return (
            f"the loss of step 1, before any update, is {mine:.4f} for {theirs:.4f}: another mean (of micro-batch means?), other labels, "
            "attention across documents, or another model function"
        )
    if GRAD_NORM in failed:
        return f"the same loss, but a gradient {_times(tests[GRAD_NORM])} as long: a backward pass, or its scaling over micro-batches?"
    if FIRST_NORM in failed:
        return f"the first update is {_times(tests[FIRST_NORM])}: learning rate?"
    if FINAL_NORM in failed:
        return f"the final update is {_times(tests[FINAL_NORM])} as long: learning rate, schedule, weight decay or betas?"
    return "the runs agree in norms, the saved weights do not: are they those that were trained?" if failed == {HELD_OUT} else ""


def _guess(candidate: Run, reference: Run, mistake: str) -> str:
    """``mistake``, or what is nothing but rounding: the type is a knob, and harmless."""
    one, other = candidate.record.cell.engine, reference.record.cell.engine
    mine, theirs = dtype_of(candidate), dtype_of(reference)
    if mine == theirs:
        return mistake
    if one.name == other.name and {**one.knobs, "compute_dtype": theirs} == {**other.knobs, "compute_dtype": theirs}:
        return f"rounding: the two differ in nothing but compute_dtype ({mine}, the reference {theirs})"
    rounding = f"rounding: this run computes in {mine}, the reference in {theirs}; compare it with hf in {mine}"
    return f"{rounding}, and where it strays from that too: {mistake}" if mistake else rounding


def _gradient(candidate: Run, ratio: float | None) -> str:
    method = candidate.record.cell.workload.method
    if ratio is None:
        return "no gradient reached the trained weights"
    if isinstance(method, Lora) and any(_near(ratio, factor) for factor in (method.scale, 1 / method.scale)):
        return f"the gradient is {ratio:.4f} x, alpha / rank is {method.scale:g}: the LoRA scale forgotten, or applied twice?"
    return ""


def _schedule_skipped(train: Train, tests: Mapping[str, Deviation], failed: frozenset[str]) -> str:
    first = tests[FIRST_NORM].ratio if FIRST_NORM in failed else None
    peak = train.learning_rate / train.learning_rate_at(0)
    if first is None or peak <= 1 + NEAR or not _near(first, peak):
        return ""
    return f"the first update is {first:.4f} x, the peak rate is {peak:g} x that of step 1: the schedule skipped (no warm-up)?"


def _times(test: Deviation) -> str:
    return f"{math.inf if test.ratio is None else test.ratio:.4f} x"


def _near(ratio: float, factor: float) -> bool:
    return ratio > 0 and abs(math.log(ratio / factor)) < NEAR
