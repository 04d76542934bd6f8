"""Frozen weights in e4m3 with a scale a row, as 8-bit products read them, the adapters' small matrices beside them.

An adapter rides in the 8-bit product of its group: a thin value is a sum of two codes, high + low, and three columns a rank make
high high + low high + high low, which leaves out one part in 256. So one product makes the adapted output, as in bf16 (decision 0007).

Legend: N output and K input columns of a linear group, P its padded ranks. M rows of L columns: N and K, or turned around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engines.native.fp8_reasons import Mode
from engines.native.turns import Shared, SharedBuffers
from harness.errors import UnsupportedError
from harness.fp8 import CODE, LARGEST, WEIGHT_MOST, quantise_rows

LOW_GAIN = 16.0  # what high leaves is at most a sixteenth of it
SPLITS = 3
# What a gradient row's largest magnitude becomes; less where its thin part needs room. Gradients have longer tails than activations.
GRADIENT_MOST = 256.0
RANK_MULTIPLE = 16  # columns of 8-bit products come in sixteens


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Rows:
    """``codes`` [M, L + 3P]: a weight, and behind each row the splits of its thin row; ``scales`` [M] of the rows, float32."""

    codes: Tensor
    scales: Tensor
    num_columns: int

    @classmethod
    def of(cls, values_ML: Tensor, padded_rank: int, room: int = 0) -> Fp8Rows:
        """``values`` rounded, its tails zero; ``room``: rows of zeros below."""
        rows, columns = values_ML.shape
        codes = torch.zeros(rows + room, columns + SPLITS * padded_rank, dtype=torch.uint8, device=values_ML.device).view(CODE)
        scales = torch.ones(rows + room, dtype=torch.float32, device=values_ML.device)
        codes[:rows, :columns], scales[:rows] = quantise_rows(values_ML, WEIGHT_MOST)
        return cls(codes, scales, columns)

    @property
    def plain(self) -> Tensor:
        """The codes of the weight alone, [M, L]."""
        return self.codes[:, : self.num_columns]


WriteTail = Callable[[Fp8Rows, Tensor], None]  # splits a thin matrix [M, P] into the tails of the first M rows
DecodeRows = Callable[[Fp8Rows, Tensor], None]  # writes the values of a weight [M, L] into a tensor of that size


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """A group's weight [N, K] as its products read it.

    ``forward``: rows of N with room for P rows of zeros below. ``turned``: rounded again from W^T, row by row, for the gradient of the
    input; None where that is made in the compute dtype, from the values of ``forward`` decoded into ``decoded`` [N + P, K], which the
    same groups of all layers share, with A below. ``up`` [N, P]: each block's B in its own rank columns; ``down`` [P, K]: A.
    """

    forward: Fp8Rows
    turned: Fp8Rows | None
    up: Tensor
    down: Tensor
    decoded: Shared | None
    shared: SharedBuffers
    fresh: dict[str, int]

    @classmethod
    def of(cls, weight_NK: Tensor, mode: Mode, kind: str, shared: SharedBuffers, padded_rank: int, dtype: torch.dtype) -> Fp8Weight:
        """``weight`` rounded, without adapters yet; ``kind``: which groups share a buffer; ``dtype``: of the adapters' copies."""
        (outputs, inputs), device = weight_NK.shape, weight_NK.device
        both = mode == "forward_and_input_gradients"
        return cls(
            Fp8Rows.of(weight_NK, padded_rank, room=padded_rank),
            Fp8Rows.of(weight_NK.t(), padded_rank) if both else None,
            torch.zeros(outputs, padded_rank, dtype=dtype, device=device),
            torch.zeros(padded_rank, inputs, dtype=dtype, device=device),
            None if both else shared.get(kind, outputs + padded_rank, inputs, dtype, device),
            shared,
            {},
        )

    @property
    def mode(self) -> Mode:
        """Which products are in 8 bits."""
        return "forward" if self.turned is None else "forward_and_input_gradients"

    def forward_codes(self, write: WriteTail) -> Fp8Rows:
        """``forward``, B in its tails."""
        self._refresh("forward", self.forward, self.up, write)
        return self.forward

    def turned_codes(self, write: WriteTail) -> Fp8Rows:
        """``turned``, A in its tails."""
        assert self.turned is not None
        self._refresh("turned", self.turned, self.down.t(), write)
        return self.turned

    def wide(self, decode: DecodeRows) -> Tensor:
        """[W, A] one below the other in the compute dtype, decoded unless this group was the last to do so."""
        assert self.decoded is not None
        buffer = self.decoded.buffer
        if self.decoded.holder is not self:
            outputs = len(self.up)
            decode(self.forward, buffer[:outputs])
            buffer[outputs:].copy_(self.down)
            self.decoded.holder = self
        return buffer

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """Every tensor that stays."""
        rows = [each for each in (self.forward, self.turned) if each is not None]
        buffer = () if self.decoded is None else (self.decoded.buffer,)
        return *(tensor for each in rows for tensor in (each.codes, each.scales)), self.up, self.down, *buffer

    def _refresh(self, name: str, rows: Fp8Rows, thin: Tensor, write: WriteTail) -> None:
        """Once a pass: the optimizer has changed the adapters since, and a captured step holds its own writing."""
        if thin.shape[1] and self.fresh.get(name) != self.shared.num_passes:
            write(rows, thin)
            self.fresh[name] = self.shared.num_passes


def split_thin(values: Tensor, *, weight: bool) -> Tensor:
    """[M, P] in units of the rows' scales to codes [M, 3P], ordered so that those of a weight and of an activation meet rightly."""
    scaled = values.clamp(-LARGEST, LARGEST)
    high = scaled.to(CODE)
    low = ((scaled - high.float()) * LOW_GAIN).to(CODE)
    less = (high.float() / LOW_GAIN).to(CODE)
    return torch.cat([high, less, low] if weight else [high, low, less], dim=1)


def check_not_outgrown(layers: Iterable[Any]) -> None:
    """Raise UnsupportedError where an adapter of ``layers`` (LayerWeights) has grown beyond what 8-bit products can hold of it."""
    for index, layer in enumerate(layers):
        for group in layer.groups:
            if group.fp8 is not None and (times := outgrown(group.fp8)) > 1:
                name = group.parts[0].name
                raise UnsupportedError(
                    f"layer {index}, {name}: adapter weights are {times:.3g} times what 8-bit products hold beside these weights "
                    f"({LARGEST / WEIGHT_MOST:g} x the row's largest), cut off; lower train.learning_rate or use operations=reference"
                )


def outgrown(weight: Fp8Weight) -> float:
    """The largest thin weight beside the most that tails hold for its row: above 1 it was cut off."""
    found = 0.0
    for rows, thin in ((weight.forward, weight.up), (weight.turned, weight.down.t())):
        if rows is not None and thin.shape[1]:
            most = LARGEST * rows.scales[: len(thin)]
            found = max(found, float((thin.float().abs().amax(1) / most).max()))
    return found
