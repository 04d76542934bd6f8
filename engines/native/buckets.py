"""Sizes that many steps share, so that a captured step fits them all: what is missing is filled up with tokens that nothing depends on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.data.tokens import IGNORE, Batch

_STEPS_AN_OCTAVE = 16  # sizes between two powers of two: at most 1/16 too large
_SMALLEST = 64
FILLER = 128  # tokens of a document of filling at most; short, so that its attention costs nothing


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a captured step is made for: tokens, documents, tokens of the longest document at most, supervised rows."""

    num_tokens: int
    num_documents: int
    longest: int
    num_rows: int


def shared_sizes(batch: Batch) -> Sizes:
    """Sizes for ``batch`` (one packed row): each rounded up, with at least one token of filling for the rows that fill up."""
    lengths = batch.lengths[0]
    labelled = int((batch.labels[0] != IGNORE).sum())
    tokens = rounded_up(sum(lengths) + 1)
    fillers = -(-_step(tokens) // FILLER) + 1
    longest = 1 << (max(*lengths, FILLER) - 1).bit_length()
    return Sizes(tokens, len(lengths) + fillers, longest, rounded_up(labelled))


def positions(batch: Batch, *, shared: bool) -> int:
    """What the kernels work on for ``batch`` (one packed row); ``shared``: uneven documents filled up to shared sizes."""
    lengths = batch.lengths[0]
    return shared_sizes(batch).num_tokens if shared and len(set(lengths)) > 1 else sum(lengths)


def filled(batch: Batch, sizes: Sizes) -> Batch:
    """``batch`` with documents of filling up to ``sizes.num_tokens``; none of their tokens is supervised."""
    missing = sizes.num_tokens - sum(batch.lengths[0])
    fillers = [min(FILLER, missing - start) for start in range(0, missing, FILLER)]
    ids = np.pad(batch.input_ids, ((0, 0), (0, missing)))
    labels = np.pad(batch.labels, ((0, 0), (0, missing)), constant_values=IGNORE)
    return Batch(ids, labels, ((*batch.lengths[0], *fillers),))


def rounded_up(count: int) -> int:
    """The next of sixteen sizes between two powers of two."""
    step = _step(count)
    return -(-count // step) * step


def _step(count: int) -> int:
    return max(_SMALLEST, (1 << (count - 1).bit_length()) // 2 // _STEPS_AN_OCTAVE)
