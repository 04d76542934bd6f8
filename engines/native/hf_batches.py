"""Batches for a model of transformers, what it is given for one, and the proof that it keeps packed documents apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engines.native.plain_loop import to_device
from harness.data.tokens import IGNORE, Batch, Ints, Sample, TokenFile, pack, pad


def lengths_vary(tokens: TokenFile) -> bool:
    """Whether some samples of training are longer than others."""
    return len(np.unique(np.diff(tokens.train.offsets))) > 1


def row_multiple(tokens: TokenFile, attention: str, *, compiled: bool) -> int:
    """What numbers of positions in a row are a multiple of: 8 where compiled code would else be made for such and again for the others.

    On a GPU Inductor asks it of the mask and of the sums that torch's attention leaves for backward (``sdpa_constraint``, torch 2.13);
    cuDNN's and FlashAttention over documents leave theirs in shapes for which there is nothing to ask.
    """
    return 8 if compiled and attention == "sdpa" and lengths_vary(tokens) else 1


def make_batch(samples: Sequence[Sample], *, packed: bool, multiple_of: int) -> Batch:
    """One sample a row, or all in one row; rows are filled up on the right to ``multiple_of`` positions."""
    if not packed:
        return pad(samples, multiple_of=multiple_of)
    batch = pack(samples)
    after = ((0, 0), (0, -batch.input_ids.shape[1] % multiple_of))
    return Batch(np.pad(batch.input_ids, after), np.pad(batch.labels, after, constant_values=IGNORE), batch.lengths)


def inputs(batch: Batch, device: str, *, packed: bool, bounds: bool) -> dict[str, Any]:
    """What the model reads, and what keeps documents apart; never an attention mask.

    Padding stands on the right, where causal attention never looks, and has no labels. In ``packed`` rows transformers finds documents
    by positions that restart, but only without a mask and a cache. ``bounds``: FlashAttention's, else it asks the GPU in every layer.
    """
    given: dict[str, Any] = {"input_ids": to_device(batch.input_ids, device)}
    if packed:
        given["position_ids"] = to_device(_positions(batch), device)
    if bounds:
        rows, positions = batch.input_ids.shape
        lengths = batch.lengths[0] if packed else (positions,) * rows
        offsets = to_device(np.cumsum((0, *lengths), dtype=np.int32), device)
        given |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    return given


def _positions(batch: Batch) -> Ints:
    """Of a packed row. Padding goes on with the last document: so a row with one needs no mask, with padding or without."""
    positions, lengths = batch.position_ids, batch.lengths[0]
    used = sum(lengths)
    positions[0, used:] = lengths[-1] + np.arange(positions.shape[1] - used)
    return positions


def leak(model: Any, device: str, *, bounds: bool) -> float:
    """How far the logits of a packed row's second document move when its first one says something else: 0 is right, to the bit."""
    import torch

    first, second = 6, np.arange(1, 6, dtype=np.int32)
    rows = [pack([Sample(ids, ids), Sample(second, second)]) for ids in (np.full(first, token, np.int32) for token in (1, 2))]
    with torch.no_grad():
        one, other = (model(**inputs(row, device, packed=True, bounds=bounds), use_cache=False).logits[0, first:] for row in rows)
    return float((one - other).abs().max())
