"""AdamW over one flat buffer of masters, its values of a step read from a tensor; in plain torch, on any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engines.native.weights import Arena, Weight
from harness.spec import Train

# Places in the tensor of a step's values; it lies on the device, so that a captured step can be replayed with others.
LEARNING_RATE, FIRST_CORRECTION, SECOND_CORRECTION, CLIP, LOSS_SCALE, STEP, NUM_SCALARS = range(7)


class Optimizer(Protocol):
    """What a step needs of an optimizer."""

    def step(self, scalars: Tensor) -> None:
        """Update the masters from their gradients, zero these, and hand the new values to the products."""

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """What it keeps from step to step beside the masters, by name."""


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) as ``schedule`` says, on everything that is trained (norms and biases decay too)."""

    def __init__(self, arena: Arena, trained: Sequence[Weight], schedule: Train, rates: Tensor | float = 1.0) -> None:
        """State of the masters' dtype, zeroed. ``rates``: each master's learning rate over the schedule's."""
        self._arena, self._trained, self._schedule = arena, tuple(trained), schedule
        self._first, self._second = torch.zeros_like(arena.masters), torch.zeros_like(arena.masters)
        self._rates = rates

    @property
    def kept(self) -> dict[str, Tensor]:
        """Both moments."""
        return {"first": self._first, "second": self._second}

    def step(self, scalars: Tensor) -> None:
        """p <- p (1 - lr wd) - lr (m / c1) / (sqrt(v / c2) + epsilon), with the clipped gradient in m and v."""
        schedule, masters, gradients = self._schedule, self._arena.masters, self._arena.gradients
        gradients.mul_(scalars[CLIP])
        self._first.lerp_(gradients, 1 - schedule.beta1)
        self._second.mul_(schedule.beta2).addcmul_(gradients, gradients, value=1 - schedule.beta2)
        gradients.zero_()
        rates = scalars[LEARNING_RATE] * self._rates
        masters.mul_(1 - rates * schedule.weight_decay)
        denominator = self._second.sqrt().div_(scalars[SECOND_CORRECTION].sqrt()).add_(schedule.epsilon)
        masters.sub_(self._first.div(denominator).mul_(rates / scalars[FIRST_CORRECTION]))
        for weight in self._trained:
            weight.publish()


def step_scalars(schedule: Train, index: int, num_labels: int) -> list[float]:
    """The values of optimizer step ``index`` (0-based) whose loss is a mean over ``num_labels``; the clip factor is set on the device."""
    corrections = 1 - schedule.beta1 ** (index + 1), 1 - schedule.beta2 ** (index + 1)
    return [schedule.learning_rate_at(index), *corrections, 1.0, 1.0 / num_labels, float(index)]


def clip_(gradients: Tensor, max_norm: float | None, scalars: Tensor) -> Tensor:
    """Set the clip factor from the global gradient norm, which is returned."""
    norm: Tensor = torch.linalg.vector_norm(gradients)
    if max_norm is not None:
        torch.clamp(max_norm / (norm + 1e-6), max=1.0, out=scalars[CLIP])
    return norm
