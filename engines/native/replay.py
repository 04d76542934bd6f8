"""Steps whose pieces, every micro-batch and the update, are captured as CUDA graphs and replayed: the host launches each at once.

A replay runs the same kernels on the same addresses, its inputs copied into the places that were captured. A step of uneven documents
hardly ever repeats as a whole; its micro-batches, filled up to sizes that many share (``engines.native.buckets``), do. The first piece of a
sort is launched by hand, so that libraries load their kernels; all others, of whatever sizes, are captured where they come.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from engines.native.buckets import MOST_SIZES, Row, Sizes, filling
from engines.native.optimizer import NUM_SCALARS
from engines.native.packed import Packed
from engines.native.steps import Outcome, Steps

MOST_GRAPHS = 2 * MOST_SIZES + 8  # of first micro-batches, of others, of rows that are not filled up; what goes beyond is launched by hand

Piece = Callable[[], Outcome | None]
Replay = Callable[[], None]


class Capture(Protocol):
    """Makes a graph of a piece. Nothing of it runs; its outcome is there after a replay."""

    def __call__(self, piece: Piece, *, after_launches: bool) -> tuple[Replay, Outcome | None]:
        """``after_launches``: pieces were launched by hand since the last capture."""
        ...


class ReplayedSteps:
    """Runs as ``Steps`` do. What passes from one graph to the next, losses, gradients and the step's scalars, lies outside of their memory.
    Ranks exchange between two graphs, so that one whose sizes are new to it can meet others that replay theirs.
    """

    def __init__(self, steps: Steps, largest: Sizes | None = None, capture: Capture | None = None) -> None:
        """``largest``: of the sizes that rows are filled up to; captured now, so that smaller ones share its memory. ``capture``: by whom;
        None: CUDA.
        """
        self._steps, self._arena = steps, steps.arena
        self._capture = capture or _ByCuda("global" if steps.exchange is None else "thread_local")
        self._scalars = torch.zeros(NUM_SCALARS, dtype=torch.float32, device=self._arena.masters.device)
        self._launched: set[Hashable] = set()
        self._launches = False  # since the last capture
        self._captured: dict[Hashable, _Captured] = {}
        if largest is not None and not steps.updates_inside:
            self._make_room(largest)

    def run(self, rows: Sequence[Row], scalars: Sequence[float]) -> Outcome:
        """As ``Steps.run``; the outcome lies where the next step's will."""
        packed, values = self._steps.place(rows, scalars)
        self._scalars.copy_(values)
        outcome = self._whole(packed) if self._steps.updates_inside else self._in_pieces(packed)
        assert outcome is not None
        return outcome

    def _make_room(self, largest: Sizes) -> None:
        """Passes over nothing but filling, whose gradients are zero: launched, then captured."""
        packed = self._steps.pack(Row(filling(largest), largest))
        for _ in range(2):
            for first in (True, False) if self._arena.overwrites else (True,):
                self._micro_batch(packed, first=first)
        self._arena.expect(empty=True)

    def _whole(self, packed: Sequence[Packed]) -> Outcome | None:
        (one,) = packed
        return self._run(("step", one.is_even), one, lambda: self._steps.inside(one, self._scalars))

    def _in_pieces(self, packed: Sequence[Packed]) -> Outcome | None:
        for index, each in enumerate(packed):
            self._micro_batch(each, first=index == 0)
        self._arena.expect(empty=False)
        self._steps.meet()
        return self._run("update", None, lambda: self._steps.update(self._scalars))

    def _micro_batch(self, packed: Packed, *, first: bool) -> None:
        self._arena.expect(empty=first)  # a replay has said nothing to Python
        sort = ("first" if first and self._arena.overwrites else "any", packed.is_even)
        self._run(sort, packed, lambda: self._steps.accumulate(packed, self._scalars))

    def _run(self, sort: Hashable, packed: Packed | None, piece: Piece) -> Outcome | None:
        """``piece`` reads ``packed`` and what lies where it always does; pieces of a ``sort`` differ in sizes alone."""
        key = sort, packed.key if packed else None
        if key not in self._captured:
            if sort not in self._launched or len(self._captured) == MOST_GRAPHS:
                self._launched.add(sort)
                self._launches = True
                return piece()
            self._captured[key] = _Captured(*self._capture(piece, after_launches=self._launches), _tensors(packed))
            self._launches = False
        return self._captured[key].run(_tensors(packed))


@dataclass(frozen=True, slots=True)
class _Captured:
    """A piece, where its outcome will lie, and where its inputs do."""

    replay: Replay
    outcome: Outcome | None
    inputs: tuple[Tensor, ...]

    def run(self, inputs: tuple[Tensor, ...]) -> Outcome | None:
        for into, source in zip(self.inputs, inputs, strict=True):
            into.copy_(source)
        self.replay()
        return self.outcome


def _tensors(packed: Packed | None) -> tuple[Tensor, ...]:
    return () if packed is None else packed.tensors


class _ByCuda:
    """All graphs share one pool of memory, because only one of them runs at a time. The device goes on with what it has been given while a
    piece is captured, unless pieces were launched by hand since: what these hold no more is given back first, for the pool to take.
    """

    def __init__(self, mode: str) -> None:
        """``mode``: thread_local where NCCL has a thread, whose questions to the device are no part of a capture and must not end it."""
        self._mode, self._pool = mode, torch.cuda.graph_pool_handle()

    def __call__(self, piece: Piece, *, after_launches: bool) -> tuple[Replay, Outcome | None]:
        if after_launches:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(_stream()), recording(graph, self._pool, self._mode):
            outcome = piece()
        return graph.replay, outcome


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, pool: Any, mode: str) -> Iterator[None]:
    """What is launched inside goes into ``graph``. What breaks it off is what is raised, not that the graph could then not be ended."""
    graph.capture_begin(pool, mode)
    is_whole = False
    try:
        yield
        is_whole = True
    finally:
        with nullcontext() if is_whole else suppress(RuntimeError):  # "capturing stream has unjoined work", of a copy that went beside it
            graph.capture_end()


@cache
def _stream() -> torch.cuda.Stream:
    """Of all captures in a process: for every stream that products are launched on, cuBLAS keeps a workspace."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
