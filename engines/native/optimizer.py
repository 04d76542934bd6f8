"""The optimizer that every engine of this house steps with."""

from __future__ import annotations

from typing import Any

import torch

from harness.spec import Train


def adamw(parameters: list[Any], schedule: Train, device: str) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) as ``schedule`` says, one group; on a GPU torch's fused implementation."""
    return torch.optim.AdamW(
        parameters,
        lr=schedule.learning_rate,
        betas=(schedule.beta1, schedule.beta2),
        eps=schedule.epsilon,
        weight_decay=schedule.weight_decay,
        fused=device == "cuda",
    )
