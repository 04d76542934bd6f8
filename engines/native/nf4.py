"""Weights that stay packed in NF4 and are decoded into the buffer of their turn.

Legend: N output and K input columns of a linear group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engines.native.turns import Copy, copy_reference
from harness.nf4 import Quantised, decode

Decode = Callable[[Quantised, Tensor], None]  # writes the values of a weight [N, K] into a tensor of that size


def decode_reference(weight: Quantised, out: Tensor) -> None:
    """In plain torch, on any device."""
    out.copy_(decode(weight))


@dataclass(frozen=True, slots=True)
class Filling:
    """How a shared buffer is filled: ``decode`` for packed weights, ``copy`` for A and B."""

    decode: Decode = decode_reference
    copy: Copy = copy_reference


REFERENCE = Filling()


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """A packed ``weight`` [N, K] and its ``place`` in a shared buffer."""

    weight: Quantised
    place: Tensor
    decode: Decode

    def fill(self) -> None:
        """Decode."""
        self.decode(self.weight, self.place)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """What is packed."""
        weight = self.weight
        return weight.packed, weight.absmax, weight.nested_absmax, weight.code, weight.levels


def placed(weight: Quantised, device: torch.device) -> Quantised:
    """``weight`` on ``device``."""
    return moved(weight, lambda tensor: tensor.to(device))


def moved(weight: Quantised, place: Callable[[Tensor], Tensor]) -> Quantised:
    """``weight``, each of its tensors where ``place`` puts it."""
    names = ("packed", "absmax", "nested_absmax", "code", "levels")
    parts: dict[str, Any] = {name: place(getattr(weight, name)) for name in names}
    return replace(weight, **parts)
