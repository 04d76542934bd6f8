"""AdamW on everything: after backward, or inside it, each section as soon as its gradients are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from engines.native.eight_bit import PlainEightBit
from engines.native.optimizer import CLIP, FIRST_CORRECTION, LEARNING_RATE, SECOND_CORRECTION
from engines.native.store import Section, Store
from harness.spec import Train


class Rule(Protocol):
    """Updates a part of the flat weights, by a kernel or in plain torch."""

    def update(self, span: slice, gradients: Tensor, scalars: Tensor) -> Tensor:
        """Update ``span``, a whole number of blocks, from its ``gradients``; returns the sum of their squares before clipping."""

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """What it keeps from step to step beside the weights, by name."""


class PlainFloat32:
    """AdamW on flat masters with moments of their type, in plain torch on any device; the products get a copy of theirs."""

    def __init__(self, masters: Tensor, values: Tensor, schedule: Train) -> None:
        """Moments zero."""
        self._masters, self._values, self._schedule = masters, values, schedule
        self._first, self._second = torch.zeros_like(masters), torch.zeros_like(masters)

    @property
    def kept(self) -> dict[str, Tensor]:
        """Both moments."""
        return {"first": self._first, "second": self._second}

    def update(self, span: slice, gradients: Tensor, scalars: Tensor) -> Tensor:
        """Update ``span`` of the masters; returns the sum of the squared gradients before clipping."""
        schedule, masters = self._schedule, self._masters[span]
        first, second = self._first[span], self._second[span]
        g = gradients * scalars[CLIP]
        first.lerp_(g, 1 - schedule.beta1)
        second.mul_(schedule.beta2).addcmul_(g, g, value=1 - schedule.beta2)
        masters.mul_(1 - scalars[LEARNING_RATE] * schedule.weight_decay)
        denominator = second.sqrt().div_(scalars[SECOND_CORRECTION].sqrt()).add_(schedule.epsilon)
        masters.sub_(first.div(denominator).mul_(scalars[LEARNING_RATE] / scalars[FIRST_CORRECTION]))
        if self._values is not self._masters:
            self._values[span] = masters.to(self._values.dtype)
        return gradients.square().sum()


class AfterBackward:
    """All of the store at once, its gradients held until then: they may be clipped, and come from several micro-batches."""

    def __init__(self, store: Store, rule: Rule) -> None:
        """Nothing has been added yet."""
        self._store, self._rule = store, rule

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """As the rule keeps it."""
        return self._rule.kept

    def step(self, scalars: Tensor) -> None:
        """Update everything; the gradients have been used."""
        gradients = self._store.gradients
        self._rule.update(slice(0, len(gradients)), gradients, scalars)
        self._store.expect(empty=True)


class InBackward:
    """Section by section, when its gradients are all there and nothing reads its weights any more in this step.

    So no step may have a second micro-batch, whose forward pass would read them, nor clip: the norm is known only at the end.
    """

    def __init__(self, store: Store, rule: Rule) -> None:
        """Nothing is ready yet."""
        self._store, self._rule = store, rule
        self._squares: list[Tensor] = []

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """As the rule keeps it."""
        return self._rule.kept

    def step(self, scalars: Tensor) -> None:
        """Everything has been updated."""

    def ready(self, section: Section, scalars: Tensor) -> None:
        """Update ``section``."""
        part = self._store.sections[section]
        self._squares.append(self._rule.update(part.span, part.settled(), scalars))
        part.expect(empty=True)

    def norm(self) -> Tensor:
        """The global norm of the gradients of the sections since it was last asked for."""
        total = torch.stack(self._squares).sum().sqrt()
        self._squares.clear()
        return total


def full_optimizer(store: Store, schedule: Train, *, kernels: bool) -> AfterBackward | InBackward:
    """AdamW on ``store`` as its training says, by ``kernels`` or in plain torch."""
    rule = _kernel(store, schedule) if kernels else _plain(store, schedule)
    return InBackward(store, rule) if store.training.in_backward else AfterBackward(store, rule)


def _plain(store: Store, schedule: Train) -> Rule:
    if store.training.state == "int8":
        return PlainEightBit(store.values, schedule)
    return PlainFloat32(store.masters, store.values, schedule)


def _kernel(store: Store, schedule: Train) -> Rule:
    from engines.native.kernels.adamw_full import EightBitKernel, Float32Kernel

    if store.training.state == "int8":
        return EightBitKernel(store.values, schedule)
    return Float32Kernel(store.masters, store.values, schedule)
