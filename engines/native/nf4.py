"""Weights that stay packed in NF4 and take turns in a buffer that the same groups of all layers share.

Legend: N output and K input columns of a linear group, R all ranks of a group together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from harness.nf4 import Quantised, decode

Decode = Callable[[Quantised, Tensor], None]  # writes the values of a weight [N, K] into a tensor of that size
Copy = Callable[[Sequence[Tensor], Sequence[Tensor]], None]  # writes matrices into places of one buffer


def decode_reference(weight: Quantised, out: Tensor) -> None:
    """In plain torch, on any device."""
    out.copy_(decode(weight))


def copy_reference(values: Sequence[Tensor], places: Sequence[Tensor]) -> None:
    """In plain torch, on any device."""
    for value, place in zip(values, places, strict=True):
        place.copy_(value)


@dataclass(frozen=True, slots=True)
class Filling:
    """How a shared buffer is filled: ``decode`` for packed weights, ``copy`` for A and B."""

    decode: Decode = decode_reference
    copy: Copy = copy_reference


REFERENCE = Filling()


def placed(weight: Quantised, device: torch.device) -> Quantised:
    """``weight`` on ``device``."""
    names = ("packed", "absmax", "nested_absmax", "code", "levels")
    return replace(weight, **{name: getattr(weight, name).to(device) for name in names})


@dataclass(slots=True)
class Shared:
    """A buffer, and whose turn it is. One stream works on it, so the order of launches keeps turns apart."""

    buffer: Tensor
    holder: object | None = None


class SharedBuffers:
    """One buffer for each kind of linear group; its corner and what lies between the blocks of B stay zero.

    ``num_passes``: how often what is made from the adapters has been out of date.
    """

    def __init__(self) -> None:
        """None is made yet."""
        self._made: dict[str, Shared] = {}
        self.num_passes = 0

    def get(self, kind: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Shared:
        """That of ``kind``, of a size that all its groups have."""
        if kind not in self._made:
            self._made[kind] = Shared(torch.zeros(rows, columns, dtype=dtype, device=device))
        found = self._made[kind]
        if found.buffer.shape != (rows, columns):
            raise ValueError(f"{kind}: a buffer of {list(found.buffer.shape)} is shared, one of {[rows, columns]} was asked for")
        return found

    def forget(self) -> None:
        """What the buffers hold is out of date, because adapters have changed."""
        self.num_passes += 1
        for shared in self._made.values():
            shared.holder = None


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One group's use of a shared buffer: ``packed`` weights, each with its place, and ``thin`` copies of A and B with theirs."""

    shared: Shared
    packed: Sequence[tuple[Quantised, Tensor]]
    filling: Filling
    thin: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def take(self) -> None:
        """Fill the buffer, unless this group was the last to do so."""
        if self.shared.holder is self:
            return
        for weight, place in self.packed:
            self.filling.decode(weight, place)
        self.filling.copy([value for value, _ in self.thin], [place for _, place in self.thin])
        self.shared.holder = self

    def apart(self, place: Tensor) -> Tensor:
        """A tensor of its own for an A or a B, which is copied to ``place`` at every turn."""
        self.thin.append((torch.empty_like(place, memory_format=torch.contiguous_format), place))
        return self.thin[-1][0]

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """What stays between turns."""
        tensors = (each for w, _ in self.packed for each in (w.packed, w.absmax, w.nested_absmax, w.code, w.levels))
        return *tensors, *(value for value, _ in self.thin)
