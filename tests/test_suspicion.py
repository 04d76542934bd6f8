"""What a failure looks like is said in plain words: the mistake to look for first."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from harness.comparable import Run
from harness.parity import judge
from tests.test_parity import HELD_OUT, LOSSES, STEPS, UPDATE, candidate, run


@pytest.mark.parametrize(
    ("changed", "hint"),
    [
        ({"losses": (0.0,) * 20}, "every loss is 0.0"),
        ({"update_norm": 0.0, "first_norm": 0.0}, "nothing was trained"),
        ({"first_norm": 0.505, "update_norm": UPDATE * 1.01}, "the first update is 1.0100 x: learning rate?"),
        ({"first_norm": 1.0}, "the schedule skipped (no warm-up)?"),
        ({"grad_norms": (0.4, *STEPS.grad_norms[1:])}, "the LoRA scale forgotten"),
        ({"grad_norms": (1.1, *STEPS.grad_norms[1:])}, "a backward pass, or its scaling over micro-batches?"),
        ({"losses": tuple(x + 0.1 for x in LOSSES)}, "of micro-batch means?"),
        ({"update_norm": UPDATE * 1.01}, "schedule, weight decay or betas?"),
        ({"held_out_loss": HELD_OUT + 0.01}, "are they those that were trained?"),
    ],
)
def test_a_failure_is_named_in_plain_words(changed: dict[str, Any], hint: str) -> None:
    found = candidate(**changed)
    assert hint in found.hint
    assert found.hint in found.detail


def test_an_engine_that_declares_another_mean_is_named_by_it() -> None:
    told = run("fused", losses=tuple(x + 0.1 for x in LOSSES))
    told = dataclasses.replace(told, record=told.record.model_copy(update={"loss_norm": "micro_mean"}))
    assert "loss_norm: micro_mean" in judge(told, run()).hint


def in_bf16(one: Run, **knobs: Any) -> Run:
    spec = one.record.cell.engine
    changed = spec.model_copy(update={"knobs": {**spec.knobs, "compute_dtype": "bfloat16", **knobs}})
    return dataclasses.replace(one, record=one.record.model_copy(update={"cell": one.record.cell.model_copy(update={"engine": changed})}))


ROUNDING = "rounding: this run computes in bfloat16, the reference in float32; compare it with hf in bfloat16"


@pytest.mark.parametrize(
    ("changed", "mistake"),
    [
        ({"update_norm": UPDATE * 1.01}, "the final update is 1.0100 x as long: learning rate, schedule, weight decay or betas?"),
        ({"first_norm": 0.505}, "the first update is 1.0100 x: learning rate?"),
        ({"grad_norms": (1.1, *STEPS.grad_norms[1:])}, "the same loss, but a gradient 1.3750 x as long: a backward pass, "),
        ({"losses": tuple(x + 0.1 for x in LOSSES)}, "the loss of step 1, before any update, is "),
        ({"held_out_loss": HELD_OUT + 0.01}, "the runs agree in norms"),
    ],
)
def test_in_another_type_rounding_comes_before_a_guess(changed: dict[str, Any], mistake: str) -> None:
    hint = judge(in_bf16(run("fused", **changed)), run()).hint
    assert hint.startswith(f"{ROUNDING}, and where it strays from that too: {mistake}")
    assert judge(run("fused", **changed), run()).hint.startswith(mistake), "in one type it is no rounding"


def test_a_deviation_that_looks_like_nothing_is_rounding_in_another_type() -> None:
    assert judge(in_bf16(run("fused", cosine=0.99)), run()).hint == ROUNDING
    assert judge(run("fused", cosine=0.99), run()).hint == ""


def test_runs_that_differ_in_their_type_alone_differ_by_rounding() -> None:
    assert judge(in_bf16(run(update_norm=UPDATE * 1.01)), run()).hint == (
        "rounding: the two differ in nothing but compute_dtype (bfloat16, the reference float32)"
    )
    assert judge(in_bf16(run(update_norm=UPDATE * 1.01), micro_batch=2), run()).hint.startswith(ROUNDING)


@pytest.mark.parametrize(
    ("changed", "hint"),
    [
        ({"first_norm": 1.0}, "the schedule skipped (no warm-up)?"),
        ({"grad_norms": (0.4, *STEPS.grad_norms[1:])}, "the LoRA scale forgotten"),
        ({"update_norm": 0.0, "first_norm": 0.0}, "nothing was trained"),
    ],
)
def test_a_mistake_of_just_its_size_is_no_rounding(changed: dict[str, Any], hint: str) -> None:
    found = judge(in_bf16(run("fused", **changed)), run()).hint
    assert hint in found
    assert "rounding" not in found
