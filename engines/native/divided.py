"""A frozen base divided among ranks: each keeps an equal part of every linear group, and all parts are gathered for the group's turn.

A plain group is divided by rows of its wide buffer (``engines.native.weights.Linear``), so that gathering writes what the products read,
nothing is copied; the room behind each row travels too (P of K + P columns). A group in NF4 is divided by bytes, codes and scales behind
one another: they are gathered into a buffer of their own and decoded from there. What does not divide evenly is filled up with zeros.

Legend: N output and K input columns of a linear group, P its padded ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed

from harness.nf4 import Quantised

Gather = Callable[[Tensor, Tensor], None]  # this rank's part, and where the parts of all ranks go, one behind the other
_ALIGNMENT = 16  # bytes: what a kernel reads in one go
_SHARDED = ("packed", "absmax", "nested_absmax")


def gather_parts(part: Tensor, whole: Tensor) -> None:
    """Over all ranks, as bytes: not every backend knows every type."""
    distributed.all_gather_into_tensor(whole.view(-1).view(torch.uint8), part.view(-1).view(torch.uint8))


@dataclass(frozen=True, slots=True)
class Division:
    """What is divided among ``count`` ranks, and which of them this is."""

    rank: int
    count: int
    gather: Gather = gather_parts

    def part(self, total: int) -> int:
        """Of ``total``, how many each rank has; the last may have fewer that are more than filling."""
        return -(-total // self.count)

    def span(self, total: int) -> slice:
        """Those that this rank has."""
        each = self.part(total)
        return slice(min(self.rank * each, total), min((self.rank + 1) * each, total))


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """This rank's ``part`` of what is gathered into ``whole``."""

    part: Tensor
    whole: Tensor
    gather: Gather

    def fill(self) -> None:
        """Gather. All ranks must do it together."""
        self.gather(self.part, self.whole)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The part, and the buffer that others gather into as well."""
        return self.part, self.whole


def joined(weights: Sequence[Quantised], division: Division, device: str = "cpu") -> Tensor:
    """The bytes of ``weights`` behind one another, each tensor's from a multiple of 16 on, and zeros up to as many for every rank.

    ``device``: cpu, or meta, where no byte is read.
    """
    spans = list(_spans(weights))
    total = division.count * _aligned(division.part(spans[-1][-1].stop))
    whole = torch.zeros(total, dtype=torch.uint8, device=device)
    for weight, places in zip(weights, spans, strict=True):
        for name, place in zip(_SHARDED, places, strict=True):
            tensor: Tensor = getattr(weight, name)
            whole[place] = tensor.contiguous().view(torch.uint8).cpu()
    return whole


def found_in(whole: Tensor, weights: Sequence[Quantised]) -> list[Quantised]:
    """``weights`` whose tensors are views of ``whole``, where ``joined`` bytes will lie; their levels go where that is."""
    found = []
    for weight, places in zip(weights, _spans(weights), strict=True):
        packed, absmax, nested = (whole[place].view(getattr(weight, name).dtype) for name, place in zip(_SHARDED, places, strict=True))
        code, levels = (values.to(whole.device, copy=True) for values in (weight.code, weight.levels))
        found.append(replace(weight, packed=packed, absmax=absmax, nested_absmax=nested, code=code, levels=levels))
    return found


def _spans(weights: Sequence[Quantised]) -> Iterator[list[slice]]:
    end = 0
    for weight in weights:
        places = []
        for name in _SHARDED:
            start = _aligned(end)
            end = start + getattr(weight, name).nbytes
            places.append(slice(start, end))
        yield places


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
