"""Documents packed end to end on the device: tokens, rotary angles, and the rows that predict a supervised token.

Legend: T tokens of all documents, P positions of the longest document, D head dimension, L supervised rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engines.native.buckets import Sizes, filled, own_sizes
from engines.native.shape import LlamaShape, Rope
from harness.data.tokens import IGNORE, Batch

Integers = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Packed:
    """What one forward pass sees. Attention stays inside a document; ``lengths`` live on the host, so nothing waits for them.

    ``cosine``, ``sine``: [T, D/2], float32, of each token's position in its own document. ``cumulative``: int32, where documents
    start, and T, repeated for documents without tokens; ``begins``, ``ends``: [T], int32, of each token's own document. ``longest``:
    no document has more tokens; None as in ``Sizes``. ``rows``: [L], rising; ``targets``: [L], IGNORE for rows that only fill up.
    """

    tokens: Tensor
    cosine: Tensor
    sine: Tensor
    lengths: tuple[int, ...]
    cumulative: Tensor
    begins: Tensor
    ends: Tensor
    longest: int | None
    rows: Tensor
    targets: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that lies on the device."""
        return self.tokens, self.cosine, self.sine, self.cumulative, self.begins, self.ends, self.rows, self.targets

    @property
    def is_even(self) -> bool:
        """Whether all documents are as long as the longest."""
        return min(self.lengths) == self.longest

    @property
    def key(self) -> Key:
        """What two rows share when one launch sequence serves both."""
        evenly = self.longest if self.is_even else 0
        return len(self.tokens), len(self.cumulative), self.longest, len(self.rows), evenly


Key = tuple[int, int, int | None, int, int | None]


@dataclass(frozen=True, slots=True)
class Angles:
    """Rotary angles of every position, computed once: ``cosine`` and ``sine`` [P, D/2], float32."""

    cosine: Tensor
    sine: Tensor

    @classmethod
    def of(cls, shape: LlamaShape, num_positions: int, device: torch.device) -> Angles:
        """The angles of positions 0 .. ``num_positions`` - 1."""
        frequencies_D = _frequencies(shape.rope, shape.head_dim).to(device)
        angles_PD = torch.arange(num_positions, device=device, dtype=torch.float32)[:, None] * frequencies_D
        return cls(angles_PD.cos(), angles_PD.sin())

    def pack(self, batch: Batch, sizes: Sizes | None = None) -> Packed:
        """One packed row on the device, the angles of its positions looked up; filled up to ``sizes`` where they are given.

        The row that predicts a label stands one before it; a document's first label is IGNORE, so rows stay inside documents.
        """
        sizes = sizes or own_sizes(batch)
        batch = filled(batch, sizes)
        labelled = np.flatnonzero(batch.labels[0] != IGNORE)
        spare = sizes.num_rows - len(labelled)
        starts = np.cumsum((0, *batch.lengths[0]), dtype=np.int32)
        starts = np.pad(starts, (0, sizes.num_documents + 1 - len(starts)), mode="edge")
        rows = np.pad(labelled - 1, (0, spare), constant_values=sizes.num_tokens - 1)
        targets = np.pad(batch.labels[0, labelled], (0, spare), constant_values=IGNORE)
        arrays = (batch.input_ids[0], batch.position_ids[0], starts, *bounds(batch.lengths[0]), rows, targets)
        tokens, positions, *given = (to_device(torch.from_numpy(array), self.cosine.device) for array in arrays)
        cumulative, begins, ends, predicting, expected = given
        cosine, sine = self.cosine[positions], self.sine[positions]
        return Packed(tokens, cosine, sine, batch.lengths[0], cumulative, begins, ends, sizes.longest, predicting, expected)


def bounds(lengths: Sequence[int]) -> tuple[Integers, Integers]:
    """[T] int32: where the document of each token begins, and where it ends."""
    starts = np.cumsum((0, *lengths), dtype=np.int32)
    return np.repeat(starts[:-1], lengths), np.repeat(starts[1:], lengths)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; to a GPU out of pinned memory, so that the copy does not stop the host until the GPU has caught up."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _frequencies(rope: Rope, head_dim: int) -> Tensor:
    """theta^(-2i/D); ``linear`` divides all by ``factor``, ``llama3`` only the slow ones (Llama 3.1, smoothed in between)."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    wavelength = 2 * math.pi / plain
    turns = rope.original_max_positions / wavelength
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    scaled = plain / rope.factor
    blended = torch.where(turns < rope.low_freq_factor, scaled, (1 - smooth) * scaled + smooth * plain)
    return torch.where(turns > rope.high_freq_factor, plain, blended)
