"""What a model of transformers is given for a batch, and the proof that it keeps packed documents apart."""

from __future__ import annotations

from typing import Any

import numpy as np

from engines.native.plain_loop import to_device
from harness.data.tokens import Batch, Sample, pack


def inputs(batch: Batch, device: str, *, packed: bool, bounds: bool) -> dict[str, Any]:
    """What the model reads, and what keeps documents apart; never an attention mask.

    Padding stands on the right, where causal attention never looks, and has no labels. In ``packed`` rows transformers finds documents
    by positions that restart, but only without a mask and a cache. ``bounds``: FlashAttention's, else it asks the GPU in every layer.
    """
    given: dict[str, Any] = {"input_ids": to_device(batch.input_ids, device)}
    if packed:
        given["position_ids"] = to_device(batch.position_ids, device)
    if bounds:
        rows, positions = batch.input_ids.shape
        lengths = batch.lengths[0] if packed else (positions,) * rows
        offsets = to_device(np.cumsum((0, *lengths), dtype=np.int32), device)
        given |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    return given


def leak(model: Any, device: str, *, bounds: bool) -> float:
    """How far the logits of a packed row's second document move when its first one says something else: 0 is right, to the bit."""
    import torch

    first, second = 6, np.arange(1, 6, dtype=np.int32)
    rows = [pack([Sample(ids, ids), Sample(second, second)]) for ids in (np.full(first, token, np.int32) for token in (1, 2))]
    with torch.no_grad():
        one, other = (model(**inputs(row, device, packed=True, bounds=bounds), use_cache=False).logits[0, first:] for row in rows)
    return float((one - other).abs().max())
