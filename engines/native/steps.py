"""Optimizer steps over a decoder: forward, backward, clipping and update; on a GPU captured once and replayed.

Legend: T tokens, L supervised rows of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engines.native.buckets import shared_sizes
from engines.native.decoder import Decoder
from engines.native.full import InBackward
from engines.native.optimizer import LOSS_SCALE, Optimizer, clip_
from engines.native.packed import Angles, Key, Packed, to_device
from harness.data.tokens import Batch


@dataclass(frozen=True, slots=True)
class Outcome:
    """The loss of a step, a mean over its supervised tokens, and its gradient norm before clipping; overwritten by the next step."""

    loss: Tensor
    grad_norm: Tensor


@dataclass(frozen=True, slots=True)
class Ran:
    """An outcome, and the positions that the kernels worked on."""

    outcome: Outcome
    processed: int


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
        self._arena = decoder.weights.arena

    def run(self, batches: Sequence[Batch], scalars: Sequence[float]) -> Ran:
        """One optimizer step over ``batches``, their losses weighted by tokens."""
        packed, values = self.place(batches, scalars)
        return Ran(self.compute(packed, values), _positions(packed))

    def place(self, batches: Sequence[Batch], scalars: Sequence[float], *, shared: bool = False) -> tuple[list[Packed], Tensor]:
        """The inputs of ``compute``, on the device; ``shared``: uneven documents filled up to sizes that many steps share."""
        values = to_device(torch.tensor(scalars, dtype=torch.float32), self._arena.masters.device)
        sizes = [shared_sizes(batch) if shared and len(set(batch.lengths[0])) > 1 else None for batch in batches]
        return [self._angles.pack(batch, size) for batch, size in zip(batches, sizes, strict=True)], values

    def compute(self, micro_batches: Sequence[Packed], scalars: Tensor) -> Outcome:
        """Forward, backward and update; nothing in it waits for the device."""
        if isinstance(self._optimizer, InBackward):
            return self._inside(self._optimizer, micro_batches, scalars)
        loss = self.accumulate(micro_batches, scalars)
        self.meet(loss)
        return self.update(loss, scalars)

    @torch.no_grad()
    def _inside(self, optimizer: InBackward, micro_batches: Sequence[Packed], scalars: Tensor) -> Outcome:
        """Every weight is updated as soon as its gradient is whole."""
        (packed,) = micro_batches
        losses = self._decoder.accumulate(packed, scalars[LOSS_SCALE], partial(optimizer.ready, scalars=scalars))
        return Outcome(losses.sum() * scalars[LOSS_SCALE], optimizer.norm())

    @torch.no_grad()
    def accumulate(self, micro_batches: Sequence[Packed], scalars: Tensor) -> Tensor:
        """Forward and backward; returns this rank's part of the loss."""
        total = torch.zeros((), dtype=torch.float32, device=scalars.device)
        for packed in micro_batches:
            total += self._decoder.accumulate(packed, scalars[LOSS_SCALE]).sum()
        if self.exchange is not None:  # settled here, where it may be captured: later, beside a replay, it would zero what was replayed
            self._summed = self._arena.gradients
        return total * scalars[LOSS_SCALE]

    def meet(self, loss: Tensor) -> None:
        """What ranks exchange between backward and update, where gradients lie since ``accumulate``."""
        if self.exchange is not None:
            self.exchange(loss, self._summed)

    @torch.no_grad()
    def update(self, loss: Tensor, scalars: Tensor) -> Outcome:
        """Clip by the norm over all ranks, and step."""
        grad_norm = clip_(self._arena.gradients, self._max_grad_norm, scalars)
        self._optimizer.step(scalars)
        return Outcome(loss, grad_norm)


class ReplayedSteps:
    """Steps of one shape are launched by hand once, captured the second time, and replayed from then on (CUDA only).

    A replay launches the same kernels on the same addresses: the inputs are copied into the places that were captured. All
    graphs share one pool of memory, because only one of them runs at a time. Ranks exchange between two graphs, so that one whose step is
    new to it can meet others that replay theirs.
    """

    def __init__(self, steps: Steps) -> None:
        """Nothing is captured yet."""
        self._steps = steps
        self._pool = torch.cuda.graph_pool_handle()
        self._launched: set[tuple[Key, ...]] = set()
        self._captured: dict[tuple[Key, ...], _Captured] = {}

    def run(self, batches: Sequence[Batch], scalars: Sequence[float]) -> Ran:
        """As ``Steps.run``."""
        packed, values = self._steps.place(batches, scalars, shared=True)
        key = tuple(each.key for each in packed)
        if key not in self._launched:
            self._launched.add(key)
            return Ran(self._steps.compute(packed, values), _positions(packed))
        if key not in self._captured:
            torch.cuda.empty_cache()  # what the launched step left cached is of no use to the graph's own pool
            self._captured[key] = self._capture(packed, values)
        return Ran(self._captured[key].replay(packed, values), _positions(packed))

    def _capture(self, packed: Sequence[Packed], scalars: Tensor) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        if self._steps.exchange is None:
            with torch.cuda.graph(graph, pool=self._pool):
                outcome = self._steps.compute(packed, scalars)
            return _Captured(self._steps, graph, None, tuple(packed), scalars, outcome)
        second = torch.cuda.CUDAGraph()
        # What NCCL's own thread asks the device meanwhile is no part of the capture, and must not end it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = self._steps.accumulate(packed, scalars)
        with torch.cuda.graph(second, pool=self._pool, capture_error_mode="thread_local"):
            outcome = self._steps.update(loss, scalars)
        return _Captured(self._steps, graph, second, tuple(packed), scalars, outcome)


@dataclass(frozen=True, slots=True)
class _Captured:
    """``graph``: the whole step, or all of it before ranks exchange, where ``second`` is the rest."""

    steps: Steps
    graph: Any
    second: Any
    packed: tuple[Packed, ...]
    scalars: Tensor
    outcome: Outcome

    def replay(self, packed: Sequence[Packed], scalars: Tensor) -> Outcome:
        for mine, new in zip(self.packed, packed, strict=True):
            for into, source in zip(mine.tensors, new.tensors, strict=True):
                into.copy_(source)
        self.scalars.copy_(scalars)
        self.graph.replay()
        if self.second is not None:
            self.steps.meet(self.outcome.loss)
            self.second.replay()
        return self.outcome


def _positions(packed: Sequence[Packed]) -> int:
    return sum(len(each.tokens) for each in packed)
