"""Host memory that tensors wait in between forward and backward, copied beside the computation.

On a GPU each direction has a stream of its own, tied to the computing stream by events alone: nothing waits for the device, so a step can
be captured as one graph (the copies fork from the captured stream and are joined again before it ends). What is copied away is held until
the computing stream has waited for the copy, only then may the allocator give its memory to others; what comes back is allocated on the
computing stream before its copy may begin. On a CPU the same copies are made in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.native.plan import SLAB_BYTES  # a slab never moves: captured graphs point into it

_ALIGNMENT = 512
_SMALL_BYTES = 1024  # seeds and counters stay where they are
_SHARE = 0.5  # of the free memory: pinned pages cannot be swapped, and loading, scoring and the page cache want theirs


def usable_bytes() -> float:
    """What may be pinned: a share of the host memory that is free now, the limit of a container heeded."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    free = 1024 * next(int(words[1]) for words in lines if words[0] == "MemAvailable:")
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup of version 2, or no limit ("max")
        limit = free
    return _SHARE * min(free, limit)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies in one of the buffers that were copied."""

    buffer: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def on(self, buffers: list[Tensor]) -> Tensor:
        buffer = buffers[self.buffer]
        empty = torch.empty(0, dtype=self.dtype, device=buffer.device)
        return empty.set_(buffer.untyped_storage(), self.offset, self.size, self.stride)


@dataclass(frozen=True, slots=True)
class Stored:
    """Values whose tensors wait on the host: each of their buffers whole, in one or more pieces."""

    values: dict[str, Any]
    buffers: tuple[tuple[Tensor, ...], ...]
    device: torch.device


@dataclass(frozen=True, slots=True)
class Arriving:
    """Values on their way back to the device; ``taken`` makes the computing stream wait for them."""

    values: dict[str, Any]
    event: Any

    def taken(self) -> dict[str, Any]:
        """The values, to be used by what is launched from now on."""
        _wait(self.event)
        return self.values


class Host:
    """Takes tensors over in the forward pass and gives them back in the backward pass, with the same strides."""

    def __init__(self, slab_bytes: int = SLAB_BYTES) -> None:
        """Memory is allocated at first use: by a step that is launched, before one of its shape is captured."""
        self._slab_bytes = slab_bytes
        self._slabs: list[Tensor] = []
        self._used = 0
        self._leaving: list[tuple[Any, list[Tensor]]] = []
        self._streams: tuple[Any, Any] | None = None

    @property
    def num_bytes(self) -> int:
        """Host memory that is allocated."""
        return sum(len(slab) for slab in self._slabs)

    def begin(self) -> None:
        """A pass begins: what an earlier one stored is not needed any more."""
        self._used = 0
        self._leaving.clear()

    def store(self, values: Mapping[str, Any]) -> Stored:
        """Start copying every buffer that ``values`` (tensors, and tuples and dataclasses of them) lie in; it is held until ``settle``."""
        buffers: dict[int, tuple[int, Tensor]] = {}

        def leave(tensor: Tensor) -> Tensor | _Place:
            storage = tensor.untyped_storage()
            if storage.nbytes() < _SMALL_BYTES:
                return tensor
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            index, _ = buffers.setdefault(storage._cdata, (len(buffers), flat))
            return _Place(index, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

        left = {name: _mapped(value, Tensor, leave) for name, value in values.items()}
        flats = [flat for _, flat in buffers.values()]
        device = flats[0].device if flats else torch.device("cpu")
        stored = Stored(left, tuple(self._take(len(flat), device) for flat in flats), device)
        pairs = [(piece, part) for flat, pieces in zip(flats, stored.buffers, strict=True) for piece, part in _parts(flat, pieces)]
        self._leaving.append((self._copy(pairs, device, outward=True), flats))
        return stored

    def settle(self) -> None:
        """The computing stream waits for all copies to the host; then what was copied is let go."""
        for event, _ in self._leaving:
            _wait(event)
        self._leaving.clear()

    def fetch(self, stored: Stored) -> Arriving:
        """Start copying back, into new memory on the device."""
        flats = [torch.empty(sum(map(len, pieces)), dtype=torch.uint8, device=stored.device) for pieces in stored.buffers]
        pairs = [(part, piece) for flat, pieces in zip(flats, stored.buffers, strict=True) for piece, part in _parts(flat, pieces)]
        event = self._copy(pairs, stored.device, outward=False)
        return Arriving({name: _mapped(value, _Place, lambda place: place.on(flats)) for name, value in stored.values.items()}, event)

    def _copy(self, pairs: list[tuple[Tensor, Tensor]], device: torch.device, *, outward: bool) -> Any:
        """Copy (into, source) after all that was launched so far; the event of its end, None where there are no streams."""
        if device.type != "cuda":
            for into, source in pairs:
                into.copy_(source)
            return None
        if self._streams is None:
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[0 if outward else 1]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for into, source in pairs:
                into.copy_(source, non_blocking=True)
            return stream.record_event()

    def _take(self, num_bytes: int, device: torch.device) -> tuple[Tensor, ...]:
        """The next free bytes, in pieces where they go over the end of a slab; the same ones in every pass of a shape."""
        pieces = []
        while num_bytes:
            index, start = divmod(self._used, self._slab_bytes)
            if index == len(self._slabs):
                self._slabs.append(torch.empty(self._slab_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda"))
            size = min(num_bytes, self._slab_bytes - start)
            pieces.append(self._slabs[index][start : start + size])
            self._used += size
            num_bytes -= size
        self._used += -self._used % _ALIGNMENT
        return tuple(pieces)


def _wait(event: Any) -> None:
    """What is launched from now on comes after ``event``; None is over already."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def _parts(flat: Tensor, pieces: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """Each piece with its part of ``flat``."""
    parts = torch.split(flat, [len(piece) for piece in pieces])
    return list(zip(pieces, parts, strict=True))


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """``value`` with everything of ``kind`` in it changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_mapped(each, kind, change) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(*(_mapped(getattr(value, field.name), kind, change) for field in fields(value)))
    return value
