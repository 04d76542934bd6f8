"""What a failure looks like is said in plain words: the mistake to look for first."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

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
