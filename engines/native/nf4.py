"""Weights that stay packed in NF4 and take turns in a buffer that the same groups of all layers share.

Legend: N output and K input columns of a linear group, R all ranks of a group together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
    return moved(weight, lambda tensor: tensor.to(device))


def moved(weight: Quantised, place: Callable[[Tensor], Tensor]) -> Quantised:
    """``weight``, each of its tensors where ``place`` puts it."""
    names = ("packed", "absmax", "nested_absmax", "code", "levels")
    parts: dict[str, Any] = {name: place(getattr(weight, name)) for name in names}
    return replace(weight, **parts)


Wait = Callable[[], None]  # what is launched next runs after something that was started


def beside_cuda() -> Callable[[Callable[[], None]], Wait]:
    """Starts work on a stream of its own, after all that has been launched so far and beside what is launched from now on."""
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def start(work: Callable[[], None]) -> Wait:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        done = stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(done)

    return start


class Order:
    """In which order groups take their turns in a pass. Every pass has the same, so from the second on each one's successor is known.

    ``start``: how a successor's buffer is filled meanwhile; None: not before it is its turn.
    """

    def __init__(self) -> None:
        """No pass has been seen."""
        self.start: Callable[[Callable[[], None]], Wait] | None = None
        self._before: list[Turn] = []
        self._now: list[Turn] = []

    def begin(self) -> None:
        """A pass begins."""
        self._before, self._now = self._now or self._before, []

    def successor(self, turn: Turn) -> Turn | None:
        """Whose turn comes after that of ``turn``, which begins now; None where it has begun before, or where nobody can tell."""
        if self._now and self._now[-1] is turn:
            return None
        self._now.append(turn)
        known = len(self._now) < len(self._before) and self._before[len(self._now) - 1] is turn
        return self._before[len(self._now)] if known else None


@dataclass(slots=True)
class Shared:
    """A buffer, and whose turn it is. ``pending``: the holder's values are still on their way.

    Whoever uses it launches on one stream. A buffer that is filled beside that stream is the next turn's and not this one's, and its
    last use was launched before: so nobody writes what somebody reads.
    """

    buffer: Tensor
    order: Order = field(default_factory=Order)
    holder: object | None = None
    pending: Wait | None = None

    def arrive(self) -> None:
        """What is launched next finds the holder's values."""
        if self.pending is not None:
            self.pending()
            self.pending = None


class SharedBuffers:
    """One buffer for each kind of linear group; its corner and what lies between the blocks of B stay zero.

    ``num_passes``: how often what is made from the adapters has been out of date.
    """

    def __init__(self) -> None:
        """None is made yet."""
        self._made: dict[str, Shared] = {}
        self._order = Order()
        self.num_passes = 0

    def get(self, kind: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Shared:
        """That of ``kind``, of a size that all its groups have."""
        if kind not in self._made:
            self._made[kind] = Shared(torch.zeros(rows, columns, dtype=dtype, device=device), self._order)
            if device.type == "cuda" and self._order.start is None:
                self._order.start = beside_cuda()
        found = self._made[kind]
        if found.buffer.shape != (rows, columns):
            raise ValueError(f"{kind}: a buffer of {list(found.buffer.shape)} is shared, one of {[rows, columns]} was asked for")
        return found

    def forget(self) -> None:
        """What the buffers hold is out of date, because adapters have changed."""
        self.num_passes += 1
        self._order.begin()
        for shared in self._made.values():
            shared.arrive()
            shared.holder = None


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One group's use of a shared buffer: ``packed`` weights, each with its place, and ``thin`` copies of A and B with theirs."""

    shared: Shared
    packed: Sequence[tuple[Quantised, Tensor]]
    filling: Filling
    thin: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def take(self) -> None:
        """Fill the buffer, unless this group was the last to do so; the next turn's starts to be filled beside what is launched now."""
        shared = self.shared
        shared.arrive()
        if shared.holder is not self:
            self._fill()
            shared.holder = self
        following = shared.order.successor(self)
        if following is not None and shared.order.start is not None:
            other = following.shared
            if other is not shared and other.holder is not following:
                other.arrive()
                other.pending = shared.order.start(following._fill)
                other.holder = following

    def _fill(self) -> None:
        for weight, place in self.packed:
            self.filling.decode(weight, place)
        self.filling.copy([value for value, _ in self.thin], [place for _, place in self.thin])

    def apart(self, place: Tensor) -> Tensor:
        """A tensor of its own for an A or a B, which is copied to ``place`` at every turn."""
        self.thin.append((torch.empty_like(place, memory_format=torch.contiguous_format), place))
        return self.thin[-1][0]

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """What stays between turns."""
        tensors = (each for w, _ in self.packed for each in (w.packed, w.absmax, w.nested_absmax, w.code, w.levels))
        return *tensors, *(value for value, _ in self.thin)
