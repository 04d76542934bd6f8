"""Tensors of a file to a GPU by several threads, each through pinned memory of its own and on a stream of its own.

Copied straight out of a mapped file, a 16 GB checkpoint took 6.6 to 8 s on its way to an H200 (records of 2026-11-26, all set-up but
imports), 2.4 GB/s where the bus carries 50: one thread faults the pages in and fills the driver's own buffer.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

_THREADS = 4
_STAGED_BYTES = 32 * 2**20  # of a tensor at one time and thread, two such buffers each
_SMALL_BYTES = 2**20  # less is not worth sharing


@dataclass(slots=True)
class _Lane:
    """One thread's way: two buffers that take turns, and the events after which each is free again."""

    device: torch.device
    stream: Any
    buffers: tuple[Tensor, Tensor]
    free: list[Any] = field(default_factory=lambda: [None, None])
    turn: int = 0

    @classmethod
    def on(cls, device: torch.device, num_bytes: int) -> _Lane:
        is_cuda = device.type == "cuda"
        first, second = (torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2))
        return cls(device, torch.cuda.Stream(device) if is_cuda else None, (first, second))  # type: ignore[no-untyped-call]

    def copy(self, target: Tensor, source: Tensor, begun: Any) -> None:
        """Issue the copy, after ``begun``; on a CPU it is made."""
        self.turn = 1 - self.turn
        if self.free[self.turn] is not None:
            self.free[self.turn].synchronize()
        staged = self.buffers[self.turn][: source.nbytes].view(source.dtype).view(source.shape)
        staged.copy_(source)
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            if self.stream is not None:
                self.stream.wait_event(begun)
            target.copy_(staged.to(self.device, non_blocking=True))  # types and strides are changed on the device
            self.free[self.turn] = None if self.stream is None else self.stream.record_event()


class Uploads:
    """Copies to ``device``; closed after use, when its buffers are let go."""

    def __init__(self, device: torch.device, *, shared: bool, staged_bytes: int = _STAGED_BYTES, small_bytes: int = _SMALL_BYTES) -> None:
        """``shared``: threads share a tensor, beginning with the first that is large enough; only worth it on the way to a GPU."""
        self._device, self._shared, self._staged_bytes, self._small_bytes = device, shared, staged_bytes, small_bytes
        where = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
        self._pool = ThreadPoolExecutor(_THREADS, "upload", initializer=self._begin, initargs=(where,))
        self._own = threading.local()
        self._lanes: list[_Lane] = []

    def copy(self, target: Tensor, source: Tensor) -> None:
        """``target.copy_(source)``; what the current stream does next finds it done."""
        if not self._is_shared(source):
            target.copy_(source)
            return
        rows = max(1, self._staged_bytes // source[0].nbytes)
        begun = torch.cuda.current_stream().record_event() if target.is_cuda else None
        pieces = [slice(start, start + rows) for start in range(0, len(source), rows)]
        for issued in [self._pool.submit(self._copy, target[piece], source[piece], begun) for piece in pieces]:
            issued.result()
        if target.is_cuda:
            for lane in self._lanes:
                torch.cuda.current_stream().wait_stream(lane.stream)

    def placed(self, source: Tensor) -> Tensor:
        """``source.to(device)``."""
        if not self._is_shared(source):
            return source.to(self._device)
        target = torch.empty_like(source, device=self._device)
        self.copy(target, source)
        return target

    def _is_shared(self, source: Tensor) -> bool:
        if not self._shared or source.device.type != "cpu" or not source.is_contiguous():
            return False
        return source.nbytes >= self._small_bytes and source[0].nbytes <= self._staged_bytes

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """All that was issued has been done."""
        self._pool.shutdown()
        if self._lanes and self._device.type == "cuda":
            torch.cuda.synchronize()
            self._lanes.clear()
            torch.cuda.empty_cache()  # what the lanes' streams have cached is of no use to others

    def _begin(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has a current one of its own
        self._own.lane = _Lane.on(device, self._staged_bytes)
        self._lanes.append(self._own.lane)

    def _copy(self, target: Tensor, source: Tensor, begun: Any) -> None:
        self._own.lane.copy(target, source, begun)
