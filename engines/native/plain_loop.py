"""What a plain training loop around an autograd module needs: arrays on the device, AdamW, clipping; no step waits for the device."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from harness.spec import Train


def to_device(array: npt.NDArray[Any], device: str) -> Tensor:
    """``array`` on ``device``, pinned on its way to a GPU: the copy does not stop the host until the GPU has caught up."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor


def adamw(parameters: list[Any], schedule: Train, device: str) -> torch.optim.AdamW:
    """AdamW as ``schedule`` says, one group (norms and biases decay too); on a GPU torch's fused implementation."""
    return torch.optim.AdamW(
        parameters,
        lr=schedule.learning_rate,
        betas=(schedule.beta1, schedule.beta2),
        eps=schedule.epsilon,
        weight_decay=schedule.weight_decay,
        fused=device == "cuda",
    )


def update(optimizer: torch.optim.AdamW, parameters: list[Any], schedule: Train, index: int) -> Tensor:
    """Clip, make optimizer step ``index`` (0-based) and drop the gradients; returns their global norm before clipping."""
    if schedule.max_grad_norm is None:
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    else:
        norm = torch.nn.utils.clip_grad_norm_(parameters, schedule.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate_at(index)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
