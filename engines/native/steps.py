"""Optimizer steps over a decoder: forward and backward of every micro-batch, clipping and update; ``engines.native.replay`` captures them.

Legend: T tokens, L supervised rows of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engines.native.buckets import Row
from engines.native.decoder import Decoder
from engines.native.full import InBackward
from engines.native.optimizer import LOSS_SCALE, Optimizer, clip_
from engines.native.packed import Angles, Packed, to_device


@dataclass(frozen=True, slots=True)
class Outcome:
    """The loss of a step, a mean over its supervised tokens, and its gradient norm before clipping; overwritten by the next step."""

    loss: Tensor
    grad_norm: Tensor


class Steps:
    """Runs optimizer steps one after the other, each from its batches and its scalars."""

    def __init__(
        self,
        decoder: Decoder,
        angles: Angles,
        optimizer: Optimizer,
        max_grad_norm: float | None,
        exchange: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        """Nothing runs yet. ``exchange``: sums the loss and the gradients over ranks, in place; None: there is one.

        Raises ValueError where an optimizer inside backward is asked to clip, or to wait for other ranks.
        """
        if isinstance(optimizer, InBackward) and (max_grad_norm is not None or exchange is not None):
            raise ValueError(f"the norm is known when all has been updated; expected no max_grad_norm and one rank, got {max_grad_norm}")
        self.exchange = exchange
        self._decoder, self._angles, self._optimizer, self._max_grad_norm = decoder, angles, optimizer, max_grad_norm
        self.arena = decoder.weights.arena
        self._loss = torch.zeros((), dtype=torch.float32, device=self.arena.masters.device)

    @property
    def updates_inside(self) -> bool:
        """Whether backward updates the weights, so that a step is one piece, of one micro-batch."""
        return isinstance(self._optimizer, InBackward)

    def run(self, rows: Sequence[Row], scalars: Sequence[float]) -> Outcome:
        """One optimizer step over ``rows``, their losses weighted by tokens."""
        packed, values = self.place(rows, scalars)
        return self.compute(packed, values)

    def place(self, rows: Sequence[Row], scalars: Sequence[float]) -> tuple[list[Packed], Tensor]:
        """The inputs of ``compute``, on the device."""
        values = to_device(torch.tensor(scalars, dtype=torch.float32), self.arena.masters.device)
        return [self.pack(row) for row in rows], values

    def pack(self, row: Row) -> Packed:
        """One micro-batch on the device."""
        return self._angles.pack(row.batch, row.sizes)

    def compute(self, micro_batches: Sequence[Packed], scalars: Tensor) -> Outcome:
        """Forward, backward and update; nothing in it waits for the device."""
        if self.updates_inside:
            (packed,) = micro_batches
            return self.inside(packed, scalars)
        for packed in micro_batches:
            self.accumulate(packed, scalars)
        self.meet()
        return self.update(scalars)

    @torch.no_grad()
    def inside(self, packed: Packed, scalars: Tensor) -> Outcome:
        """A whole step in which every weight is updated as soon as its gradient is whole."""
        assert isinstance(self._optimizer, InBackward)
        losses = self._decoder.accumulate(packed, scalars[LOSS_SCALE], partial(self._optimizer.ready, scalars=scalars))
        return Outcome(losses.sum() * scalars[LOSS_SCALE], self._optimizer.norm())

    @torch.no_grad()
    def accumulate(self, packed: Packed, scalars: Tensor) -> None:
        """Forward and backward of one micro-batch: its losses and gradients join those of the step so far."""
        self._loss += self._decoder.accumulate(packed, scalars[LOSS_SCALE]).sum()
        self.arena.settle()

    def meet(self) -> None:
        """What ranks exchange between the last micro-batch and the update, where it lies."""
        if self.exchange is not None:
            self.exchange(self._loss, self.arena.gradients)

    @torch.no_grad()
    def update(self, scalars: Tensor) -> Outcome:
        """Clip by the norm over all ranks, and step; the next micro-batch is the first of another step."""
        loss = self._loss * scalars[LOSS_SCALE]
        grad_norm = clip_(self.arena.gradients, self._max_grad_norm, scalars)
        self._optimizer.step(scalars)
        self._loss.zero_()
        return Outcome(loss, grad_norm)
