"""Buffers that the same linear groups of all layers share: each group's weight is there for its turn only, put there ahead of it.

What fills a buffer is a list of sources: NF4 that is decoded (``engines.native.nf4``), rows or bytes that ranks hold a part of each and
gather (``engines.native.divided``), or bytes that are gathered and then decoded. The adapters' matrices are copied behind them.

Where a source is a collective, all ranks must fill the same buffers in the same order, whatever the sizes of their batches. They do: the
order in which groups have to be filled follows from the plan alone, and what is started ahead of its turn is always the next one in it
(``Order``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

Wait = Callable[[], None]  # what is launched next runs after something that was started
Copy = Callable[[Sequence[Tensor], Sequence[Tensor]], None]  # writes matrices into places of one buffer


def copy_reference(values: Sequence[Tensor], places: Sequence[Tensor]) -> None:
    """In plain torch, on any device."""
    for value, place in zip(values, places, strict=True):
        place.copy_(value)


class Source(Protocol):
    """A part of what a group's products read."""

    def fill(self) -> None:
        """Launch what writes it to its place."""

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """What stays between turns, and what else it writes to."""


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


@dataclass(frozen=True, slots=True)
class _Due:
    """A turn for which a buffer has to be filled, and from when on in a pass that buffer is free: since the turn of ``after``, some time
    after the buffer of fill number ``since`` was filled and before the next one's; None: only when the turn has come.
    """

    turn: Turn
    since: int
    after: Turn | None


class Order:
    """In which order groups need their buffers filled in a pass. Every pass of a plan has the same, so from the second on the next ones
    are known and may be filled ``ahead`` of their turns, so many at most.

    Only what a group's halves of a layer have in common moves with the size of a batch: a piece more of its rows takes turns of the gate
    and up and of the down projection once more. So none of that decides when a buffer is free (``section``), and ranks whose batches
    differ in size agree on which buffer is filled after which.

    ``start``: how a buffer is filled ahead; None: not before it is its turn. ``stands_still``: around what products wait for.
    """

    def __init__(self, ahead: int = 1) -> None:
        """No pass has been seen."""
        self.start: Callable[[Callable[[], None]], Wait] | None = None
        self.stands_still: Callable[[], AbstractContextManager[None]] = nullcontext
        self._ahead = ahead
        self._due: list[_Due] = []
        self._seen: list[list[Turn]] = []  # of this pass: each turn that was filled for, and those taken until the next was
        self._launched = 0
        self._as_before = True

    def begin(self) -> None:
        """A pass begins."""
        if self._seen and [uses[0] for uses in self._seen] != [due.turn for due in self._due]:
            self._due = list(_due(self._seen))
        self._seen, self._launched, self._as_before = [], 0, True

    def taken(self, turn: Turn, *, first: bool) -> None:
        """``turn`` has begun, ``first``: for the first time since its buffer was filled. What may be filled now starts to be."""
        if first:
            index = len(self._seen)
            self._as_before &= index < len(self._due) and self._due[index].turn is turn
            self._seen.append([turn])
            self._launched = max(self._launched, index + 1)
        elif self._seen and self._seen[-1][-1] is not turn:
            self._seen[-1].append(turn)
        if self.start is None or not self._as_before:
            return
        while self._launched < min(len(self._due), len(self._seen) + self._ahead) and self._is_free(self._due[self._launched]):
            self._due[self._launched].turn.fill_ahead(self.start)
            self._launched += 1

    def _is_free(self, due: _Due) -> bool:
        now = len(self._seen) - 1
        return due.after is not None and (now > due.since or (now == due.since and due.after in self._seen[now]))


def _due(seen: list[list[Turn]]) -> Iterator[_Due]:
    for index, (turn, *_) in enumerate(seen):
        since, after = _free_since(seen, index)
        yield _Due(turn, since, after)


def _free_since(seen: list[list[Turn]], index: int) -> tuple[int, Turn | None]:
    """The first turn of another section after the last one that read the buffer of fill number ``index``."""
    shared = seen[index][0].shared
    found = ((i, place) for i in reversed(range(index)) for place in reversed(range(len(seen[i]))) if seen[i][place].shared is shared)
    last, place = next(found, (0, -1))
    reader = seen[last][place] if place >= 0 else None
    for i in range(last, index):
        begin = place + 1 if i == last else 0
        for at in range(begin, len(seen[i])):
            turn = seen[i][at]
            if (reader is None or turn.section != reader.section) and turn not in seen[i][:at]:
                return i, turn
    return index, None


@dataclass(slots=True)
class Shared:
    """A buffer, and whose turn it is. ``pending``: the holder's values are still on their way.

    Whoever uses it launches on one stream. A buffer that is filled beside that stream is a later turn's and not this one's, and its
    last use was launched before: so nobody writes what somebody reads.
    """

    buffer: Tensor
    order: Order = field(default_factory=Order)
    holder: object | None = None
    pending: Wait | None = None

    def arrive(self) -> None:
        """What is launched next finds the holder's values."""
        if self.pending is not None:
            with self.order.stands_still():
                self.pending()
            self.pending = None


class SharedBuffers:
    """One buffer for each kind of linear group; its corner and what lies between the blocks of B stay zero.

    ``num_passes``: how often what is made from the adapters has been out of date.
    """

    def __init__(self, ahead: int = 1) -> None:
        """None is made yet; ``ahead``: how many are filled before their turns, at most."""
        self._made: dict[str, Shared] = {}
        self._order = Order(ahead)
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

    def watch(self, around: Callable[[], AbstractContextManager[None]]) -> None:
        """``around``: entered where products wait for a buffer to be filled."""
        self._order.stands_still = around

    def forget(self) -> None:
        """What the buffers hold is out of date, because adapters have changed."""
        self.num_passes += 1
        self._order.begin()
        for shared in self._made.values():
            shared.arrive()
            shared.holder = None


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One group's use of a shared buffer: what its weight comes from, and ``thin`` copies of A and B with their places.

    ``section``: the half of a layer that it belongs to. Within one, how often groups take turns may depend on the size of a batch.
    """

    shared: Shared
    section: str
    sources: Sequence[Source]
    copy: Copy
    thin: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def take(self) -> None:
        """Fill the buffer, unless this group was the last to do so; those whose turns are next start to be filled beside what is launched
        now.
        """
        shared = self.shared
        first = shared.holder is not self or shared.pending is not None
        shared.arrive()
        if shared.holder is not self:
            with shared.order.stands_still():
                self._fill()
            shared.holder = self
        shared.order.taken(self, first=first)

    def fill_ahead(self, start: Callable[[Callable[[], None]], Wait]) -> None:
        """The buffer starts to be filled; nobody reads what it holds any more."""
        shared = self.shared
        shared.arrive()
        shared.pending = start(self._fill)
        shared.holder = self

    def _fill(self) -> None:
        for source in self.sources:
            source.fill()
        self.copy([value for value, _ in self.thin], [place for _, place in self.thin])

    def apart(self, place: Tensor) -> Tensor:
        """A tensor of its own for an A or a B, which is copied to ``place`` at every turn."""
        self.thin.append((torch.empty_like(place, memory_format=torch.contiguous_format), place))
        return self.thin[-1][0]

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """What stays between turns."""
        return *(tensor for source in self.sources for tensor in source.stored), *(value for value, _ in self.thin)
