"""Reads the tensors of a checkpoint into the groups, buffers and masters that a decoder is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from engines.native.divided import Division, Gathered, found_in, joined
from engines.native.fp8 import Fp8Weight
from engines.native.fp8_reasons import Mode
from engines.native.lora import Adapter
from engines.native.nf4 import REFERENCE, Decoded, Filling, moved
from engines.native.store import Section, Store, Training
from engines.native.turns import Shared, SharedBuffers, Source, Turn
from engines.native.uploading import Uploads
from engines.native.weights import WHOLE, Arena, Block, Linear, LowRank, Part, Weight
from harness.errors import UnsupportedError, WeightsError
from harness.nf4 import PARTS, STATE, Quantised, from_tensors

_AHEAD = 2  # gathers: query, key and value's product is too short to hide that of the output projection and of gate and up behind it
Adapted = list[tuple[Part, Tensor, Tensor]]  # of a group: its adapted linears with their A and B
SourcesOf = Callable[[Shared, Tensor], Sequence[Source]]  # what comes into a shared buffer and the place of a weight in it


@dataclass(frozen=True, slots=True)
class Placement:
    """Where weights go: read by the products in ``compute_dtype``, masters of what is trained in ``train_dtype``.

    ``rank_multiple``: the ranks of a linear group are padded with zeros to whole multiples of it. cuBLAS likes 64 on a GPU
    (Llama-3.2-1B shape, 16,384 tokens, H100: 46.0 + 45.4 ms of products a step against 48.2 + 47.6 unpadded).
    ``filling``: how weights in NF4 and the adapters beside them come into the buffer that the products read. ``fp8``: linear layers in
    e4m3, for which products. ``training``: how everything is trained, where there are no adapters. ``division``: of the linear groups
    among ranks, under adapters; None: each rank has them whole.
    """

    device: torch.device
    compute_dtype: torch.dtype
    train_dtype: torch.dtype
    rank_multiple: int = 1
    filling: Filling = REFERENCE
    fp8: Mode | None = None
    training: Training = field(default_factory=Training)
    division: Division | None = None


class Loader:
    """Reads tensors by name into groups, and remembers which names were read."""

    def __init__(self, tensors: Mapping[str, Any], placement: Placement, adapter: Adapter | None, uploads: Uploads) -> None:
        """Nothing is read yet."""
        self._tensors, self._uploads = tensors, uploads
        self._placement = placement
        self._adapter = adapter
        self.arena = Arena(0 if adapter is None else adapter.num_elements, placement.train_dtype, placement.device)
        types = placement.compute_dtype, placement.train_dtype, placement.device
        self.store = Store(self._num_trained(), *types, placement.training) if adapter is None else None
        self.shared = SharedBuffers(1 if placement.division is None else _AHEAD)
        self.read_names: set[str] = set()

    def weight(self, name: str, size: tuple[int, ...]) -> Weight:
        """The weight called ``name``, of ``size``."""
        return self._group([(name, WHOLE)], size)

    def linear(self, layer: int, parts: tuple[tuple[str, int], ...], num_inputs: int, has_bias: bool) -> Linear:
        """The linears ``parts`` (name in the layer, output columns), which read the same input, as one group."""
        ends = list(accumulate(rows for _, rows in parts))
        spans = tuple(Part(name, slice(end - rows, end)) for (name, rows), end in zip(parts, ends, strict=True))
        prefix = f"model.layers.{layer}"
        adapted = [] if self._adapter is None else self._adapter.blocks(prefix, spans)
        names = [f"{prefix}.{part.name}.weight" for part in spans]
        if any(f"{name}{STATE}" in self._tensors for name in names):
            return self._packed(prefix, spans, num_inputs, has_bias, adapted)
        if self._placement.fp8 is not None:
            return self._fp8(prefix, spans, num_inputs, has_bias, adapted, self._placement.fp8)
        if self._placement.division is not None:
            return self._divided(prefix, spans, num_inputs, has_bias, adapted, self._placement.division)
        wide, view = self._wide(ends[-1], num_inputs, len(adapted))
        weight = self._group([(name, part.rows) for name, part in zip(names, spans, strict=True)], (ends[-1], num_inputs), view)
        lora = self._low_rank(adapted, *_thin(wide, ends[-1], num_inputs)) if wide is not None else None
        return Linear(weight.value if wide is None else wide, weight, self._bias(prefix, spans) if has_bias else None, spans, lora)

    def _bias(self, prefix: str, spans: tuple[Part, ...]) -> Weight:
        return self._group([(f"{prefix}.{part.name}.bias", part.rows) for part in spans], (spans[-1].rows.stop,))

    def _packed(self, prefix: str, spans: tuple[Part, ...], num_inputs: int, has_bias: bool, adapted: Adapted) -> Linear:
        """A group whose weights stay in NF4."""
        if self._adapter is None:
            raise UnsupportedError("the base is stored in NF4, whose weights cannot be trained; use a method with adapters")
        place = self._placement
        weights = [self._quantised(f"{prefix}.{part.name}.weight", part.rows, num_inputs) for part in spans]

        def sources(shared: Shared, view_NK: Tensor) -> list[Source]:
            gathers: list[Source] = []
            if place.division is None:
                here = [moved(weight, self._uploads.placed) for weight in weights]
            else:
                stored = joined(weights, place.division, "meta" if place.device.type == "meta" else "cpu")
                whole = self.shared.get(f"{_kind(spans, adapted)} packed", 1, len(stored), torch.uint8, place.device).buffer[0]
                here = found_in(whole, weights)
                gathers.append(Gathered(stored[place.division.span(len(stored))].to(place.device, copy=True), whole, place.division.gather))
            return [*gathers, *(Decoded(one, view_NK[part.rows], place.filling.decode) for one, part in zip(here, spans, strict=True))]

        return self._taking_turns(prefix, spans, num_inputs, has_bias, adapted, sources)

    def _divided(
        self, prefix: str, spans: tuple[Part, ...], num_inputs: int, has_bias: bool, adapted: Adapted, division: Division
    ) -> Linear:
        """A group of whose rows each rank has a part."""
        if self._adapter is None:
            raise UnsupportedError("weights that are trained are not divided among ranks; use a method with adapters")
        place, outputs = self._placement, spans[-1].rows.stop
        part = torch.zeros(division.part(outputs), num_inputs + self._room(len(adapted)), dtype=place.compute_dtype, device=place.device)
        mine = division.span(outputs)
        for span in spans:
            self._read_rows(f"{prefix}.{span.name}.weight", span.rows, mine, part[:, :num_inputs])

        def sources(shared: Shared, view_NK: Tensor) -> list[Source]:
            return [Gathered(part, shared.buffer[: division.count * len(part)], division.gather)]

        return self._taking_turns(prefix, spans, num_inputs, has_bias, adapted, sources)

    def _read_rows(self, name: str, rows: slice, mine: slice, part: Tensor) -> None:
        """Those of ``rows``, which the weight called ``name`` has in its group, that are ``mine``, into ``part``; no others are read."""
        self._expect_there(name)
        stored = self._tensors[name].get_slice(name)
        self._expect_size(name, stored.get_shape(), (rows.stop - rows.start, part.shape[1]))
        start, stop = max(rows.start, mine.start), min(rows.stop, mine.stop)
        if start < stop:
            self._uploads.copy(part[start - mine.start : stop - mine.start], stored[start - rows.start : stop - rows.start])
        self.read_names.add(name)

    def _taking_turns(
        self, prefix: str, spans: tuple[Part, ...], num_inputs: int, has_bias: bool, adapted: Adapted, sources_of: SourcesOf
    ) -> Linear:
        """A group whose weight comes into a buffer that it shares with those of other layers, its adapters beside it."""
        place, outputs, room = self._placement, spans[-1].rows.stop, self._room(len(adapted))
        rows = outputs + room
        # Gathered rows that fill up the last rank's part may reach beyond those of A, which are copied later.
        most = rows if place.division is None else max(rows, place.division.count * place.division.part(outputs))
        shared = self.shared.get(_kind(spans, adapted), most, num_inputs + room, place.compute_dtype, place.device)
        buffer = shared.buffer[:rows]
        view = buffer[:outputs, :num_inputs]
        section = f"{prefix}.{spans[0].name.partition('.')[0]}"
        turn = Turn(shared, section, sources_of(shared, view), place.filling.copy)
        lora = self._low_rank(adapted, *_thin(buffer, outputs, num_inputs), turn) if adapted else None
        return Linear(buffer, Weight(view), self._bias(prefix, spans) if has_bias else None, spans, lora, turn)

    def _fp8(self, prefix: str, spans: tuple[Part, ...], num_inputs: int, has_bias: bool, adapted: Adapted, mode: Mode) -> Linear:
        """A group whose weights are rounded to e4m3 from what the base stores."""
        if self._adapter is None:
            raise UnsupportedError("weights in fp8 cannot be trained; use a method with adapters")
        place, size = self._placement, (spans[-1].rows.stop, num_inputs)
        stored = torch.empty(size, dtype=torch.float32, device=place.device)
        self._group([(f"{prefix}.{part.name}.weight", part.rows) for part in spans], size, stored)
        kind = "+".join(part.name for part in spans)
        fp8 = Fp8Weight.of(stored, mode, kind, self.shared, self._room(len(adapted)), place.compute_dtype)
        codes = fp8.forward.plain[: size[0]]
        lora = self._low_rank(adapted, fp8.up, fp8.down) if adapted else None
        return Linear(codes, Weight(codes), self._bias(prefix, spans) if has_bias else None, spans, lora, fp8=fp8)

    def _quantised(self, name: str, rows: slice, num_inputs: int) -> Quantised:
        if f"{name}{STATE}" not in self._tensors:
            raise UnsupportedError(f"{name} is not in NF4, others of its group are; quantise all linear layers but the head")
        weight = from_tensors(name, lambda wanted: self._tensors[wanted].get_tensor(wanted))
        self._expect_size(name, weight.shape, (rows.stop - rows.start, num_inputs))
        self.read_names.update(f"{name}{part}" for part in ("", *PARTS, STATE))
        return weight

    def begin(self, section: Section) -> None:
        """What is read from now on is trained as one section."""
        if self.store is not None:
            self.store.begin(section)

    def _num_trained(self) -> int:
        """At most: the tensors of a group are one weight."""
        return sum(Store.room(math.prod(file.get_slice(name).get_shape())) for name, file in self._tensors.items())

    def _wide(self, num_outputs: int, num_inputs: int, num_adapted: int) -> tuple[Tensor | None, Tensor | None]:
        """The buffer of an adapted group and the place of its weight in it; nothing where nothing is adapted."""
        if self._adapter is None or not num_adapted:
            return None, None
        place, room = self._placement, self._room(num_adapted)
        wide = torch.zeros(num_outputs + room, num_inputs + room, dtype=place.compute_dtype, device=place.device)
        return wide, wide[:num_outputs, :num_inputs]

    def _room(self, num_adapted: int) -> int:
        """P."""
        assert self._adapter is not None
        multiple = self._placement.rank_multiple
        return -(-num_adapted * self._adapter.rank // multiple) * multiple

    def _low_rank(self, adapted: Adapted, up_NP: Tensor, down_PK: Tensor, turn: Turn | None = None) -> LowRank:
        """The adapters of a group where its products read them; where that is shared, with copies of their own."""
        assert self._adapter is not None
        rank = self._adapter.rank
        blocks = []
        down = self._master(torch.cat([down for _, down, _ in adapted]))
        stacked = self._master(torch.cat([up for _, _, up in adapted]))
        num_rows = 0
        for index, (part, _, up) in enumerate(adapted):
            columns = slice(index * rank, (index + 1) * rank)
            value = up_NP[part.rows, columns]
            value = value if turn is None else turn.apart(value)
            master = Arena.part(stacked, slice(num_rows, num_rows := num_rows + len(up)))
            blocks.append(Block(part.name, part.rows, columns, Weight(value, master)))
        down_value = down_PK[: len(down)]
        down_value = down_value if turn is None else turn.apart(down_value)
        arrived = torch.zeros(-(-max(len(up_NP), down_PK.shape[1]) // 16), dtype=torch.int32, device=up_NP.device)
        lora = LowRank(Weight(down_value, down), stacked, tuple(blocks), self._adapter.scale, arrived)
        for weight in (lora.down, *(block.up for block in blocks)):
            weight.publish()
        return lora

    def _master(self, values: Tensor) -> Tensor:
        return self.arena.take(*values.shape).copy_(values)

    def _group(self, rows_by_name: Sequence[tuple[str, slice]], size: tuple[int, ...], view: Tensor | None = None) -> Weight:
        """Read tensors into the rows of one weight: into ``view`` where it is given, else into a tensor of its own."""
        for name, _ in rows_by_name:
            self._expect_there(name)
        weight = self._new(size) if view is None else Weight(view)
        for name, rows in rows_by_name:
            target = (weight.value if weight.master is None else weight.master)[rows]
            tensor = self._tensors[name].get_tensor(name)
            self._expect_size(name, tensor.shape, target.shape)
            self._uploads.copy(target, tensor)
            self.read_names.add(name)
        weight.publish()
        return weight

    def _expect_there(self, name: str) -> None:
        if name not in self._tensors:
            raise WeightsError(f"{name}: not in the checkpoint, though its config.json asks for it; get the weights again")

    @staticmethod
    def _expect_size(name: str, found: Sequence[int], expected: Sequence[int]) -> None:
        if tuple(found) != tuple(expected):
            raise WeightsError(f"{name}: has shape {list(found)}, config.json says {list(expected)}; get the weights again")

    def _new(self, size: tuple[int, ...]) -> Weight:
        if self.store is not None:
            return Weight(*self.store.take(*size))
        return Weight(torch.empty(size, dtype=self._placement.compute_dtype, device=self._placement.device))


def _thin(wide: Tensor, num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor]:
    """The places of B [N, P] and of A [P, K] in a buffer."""
    return wide[:num_outputs, num_inputs:], wide[num_outputs:, :num_inputs]


def _kind(spans: tuple[Part, ...], adapted: Adapted) -> str:
    """What groups that share a buffer have in common: the same linears, the same of them adapted."""
    return "+".join(f"{part.name}{'*' if any(part is each for each, _, _ in adapted) else ''}" for part in spans)
