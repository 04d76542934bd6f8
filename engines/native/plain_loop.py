"""What a plain training loop around an autograd module needs: arrays on the device, AdamW, clipping; no step waits for the device."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from harness.spec import Lora, Method, Train


def to_device(array: npt.NDArray[Any], device: str) -> Tensor:
    """``array`` on ``device``, pinned on its way to a GPU: the copy does not stop the host until the GPU has caught up."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor


def groups(model: Any, method: Method) -> list[Any]:
    """What ``model`` trains, with B of every adapter in a group of its own where ``method`` gives it another learning rate (LoRA+)."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    ratio = method.b_learning_rate_ratio if isinstance(method, Lora) else 1.0
    if ratio == 1:
        return [parameter for _, parameter in trained]
    return [
        {"params": [parameter for name, parameter in trained if (".lora_B." in name) is of_b], "ratio": ratio if of_b else 1.0}
        for of_b in (False, True)
    ]


def adamw(parameters: list[Any], schedule: Train, device: str) -> torch.optim.AdamW:
    """AdamW as ``schedule`` says, of ``parameters`` or ``groups`` (norms and biases decay too); on a GPU torch's fused implementation."""
    return torch.optim.AdamW(
        parameters,
        lr=schedule.learning_rate,
        betas=(schedule.beta1, schedule.beta2),
        eps=schedule.epsilon,
        weight_decay=schedule.weight_decay,
        fused=device == "cuda",
    )


def adamw_8bit(parameters: list[Any], schedule: Train, device: str) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes: moments of weights with at least 4,096 values in 8 bits, blocks of 256; the weights as they are."""
    from bitsandbytes.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit(
        parameters,
        lr=schedule.learning_rate,
        betas=(schedule.beta1, schedule.beta2),
        eps=schedule.epsilon,
        weight_decay=schedule.weight_decay,
    )
    return made


def update(optimizer: torch.optim.Optimizer, parameters: list[Any], schedule: Train, index: int) -> Tensor:
    """Clip, make optimizer step ``index`` (0-based) and drop the gradients; returns their global norm before clipping."""
    if schedule.max_grad_norm is None:
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    else:
        norm = torch.nn.utils.clip_grad_norm_(parameters, schedule.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate_at(index) * group.get("ratio", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
