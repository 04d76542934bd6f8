"""Everything that a full fine-tune trains in flat buffers: weights, masters, and gradients of all weights or of one section at a time.

Each weight begins at a multiple of ``BLOCK`` values, so that a block of quantised optimizer state never spans two weights; what lies
between is zero and stays so. Weights that are ready for their update at the same time make a section, contiguous in the buffers: the
embedding, each layer, the head with the final norm. A tied head belongs to the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from engines.native.gradient import Gradient

BLOCK = 256
OptimizerState = Literal["fp32", "int8"]
Section = int | Literal["embedding", "head"]


@dataclass(frozen=True, slots=True)
class Training:
    """How everything is trained. ``state``: fp32 masters and moments, or int8 moments beside weights that are rounded at random.

    ``in_backward``: each section is updated as soon as its gradients are there, and these are held no longer.
    """

    state: OptimizerState = "fp32"
    in_backward: bool = False


@dataclass(slots=True)
class Part:
    """One section: from where to where it goes in the buffers, and its weights' gradients with their places in it."""

    start: int
    stop: int
    gradients: list[tuple[Gradient, int, torch.Size]] = field(default_factory=list)
    buffer: Tensor | None = None

    @property
    def span(self) -> slice:
        """Its place in the flat buffers."""
        return slice(self.start, self.stop)

    def settled(self) -> Tensor:
        """All its gradients, flat, float32."""
        for gradient, _, _ in self.gradients:
            gradient.settled()
        assert self.buffer is not None
        return self.buffer

    def expect(self, *, empty: bool) -> None:
        """The gradients have been used, or have not."""
        for gradient, _, _ in self.gradients:
            gradient.expect(empty=empty)


class Store:
    """Flat ``values``, read by the products, and ``masters``, updated by the optimizer: one tensor where their types are the same."""

    overwrites = True  # the first gradient of a step, so that its micro-batch is another one to capture

    def __init__(self, num_elements: int, compute_dtype: torch.dtype, train_dtype: torch.dtype, device: torch.device, training: Training):
        """Room for ``num_elements`` values, those between weights counted. Masters of ``train_dtype``, or none beside the values."""
        self.training = training
        self.values = torch.zeros(num_elements, dtype=compute_dtype, device=device)
        same = training.state == "int8" or train_dtype == compute_dtype
        self.masters = self.values if same else torch.zeros(num_elements, dtype=train_dtype, device=device)
        self.sections: dict[Section, Part] = {}
        self._taken = 0
        self._buffers: list[Tensor] = []

    @staticmethod
    def room(num_elements: int) -> int:
        """Values that a weight of ``num_elements`` takes."""
        return -(-num_elements // BLOCK) * BLOCK

    def begin(self, section: Section) -> None:
        """What is taken from now on belongs to ``section``."""
        self.sections[section] = Part(self._taken, self._taken)

    def take(self, *size: int) -> tuple[Tensor, Tensor, Gradient]:
        """The value and the master of a weight of ``size``, and its gradient."""
        count, section = torch.Size(size).numel(), next(reversed(self.sections.values()))
        start, self._taken = self._taken, self._taken + self.room(count)
        if self._taken > len(self.values):
            raise ValueError(f"the store holds {len(self.values)} values, {self._taken} were asked for")
        gradient = Gradient()
        section.gradients.append((gradient, start - section.start, torch.Size(size)))
        section.stop = self._taken
        value = self.values[start : start + count].view(size)
        return value, value if self.masters is self.values else self.masters[start : start + count].view(size), gradient

    def finish(self) -> None:
        """All weights are taken: make the buffers of their gradients, as few as ``training`` allows."""
        same = self.masters is self.values
        self.values = self.values[: self._taken]
        self.masters = self.values if same else self.masters[: self._taken]
        if not self.training.in_backward:
            self._buffers = [self._zeros(self._taken)]
            for part in self.sections.values():
                self._place(part, self._buffers[0][part.span])
            return
        layers = [part for name, part in self.sections.items() if isinstance(name, int)]
        ends = [part for name, part in self.sections.items() if not isinstance(name, int)]
        # The head's gradients have been used when the embedding's begin, unless they are one tensor: then the norm is alone in its section.
        together = len(ends[-1].gradients) > 1
        for group in (layers, *([ends] if together else [[each] for each in ends])):
            buffer = self._zeros(max(part.stop - part.start for part in group))
            self._buffers.append(buffer)
            for part in group:
                self._place(part, buffer[: part.stop - part.start])

    def _zeros(self, count: int) -> Tensor:
        """Gradients of the masters' type, float32 where there are no masters."""
        dtype = torch.float32 if self.training.state == "int8" else self.masters.dtype
        return torch.zeros(count, dtype=dtype, device=self.values.device)

    @staticmethod
    def _place(part: Part, buffer: Tensor) -> None:
        part.buffer = buffer
        for gradient, start, size in part.gradients:
            gradient.place(buffer[start : start + size.numel()].view(size))

    @property
    def gradients(self) -> Tensor:
        """Those of all sections, flat, settled; only where they are held."""
        assert not self.training.in_backward, "gradients are not held"
        self.settle()
        return self._buffers[0]

    def settle(self) -> None:
        """Zero what nothing was added to in this step."""
        for part in self.sections.values():
            part.settled()

    def expect(self, *, empty: bool) -> None:
        """What the buffers hold has been used, or has not: a replayed pass or update says nothing to Python."""
        for part in self.sections.values():
            part.expect(empty=empty)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All buffers but the optimizer's."""
        return self.values, self.masters, *self._buffers

    @property
    def state_bytes(self) -> int:
        """What the optimizer keeps beside them: two moments, in int8 with a scale for each block."""
        return 2 * self.masters.nbytes if self.training.state == "fp32" else 2 * (self._taken + 4 * (self._taken // BLOCK))
