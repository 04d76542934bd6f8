"""Rows of the embedding by token, out of the GPU's memory or out of pinned memory of the host, which a kernel reads over the bus.

x_t = E[token_t]. Where the embedding waits on the host only the rows that occur are read, so a micro-batch costs its activations' bytes
over the bus: 67 MB of 8,192 tokens at 8B, where the embedding takes 1,051 MB of the GPU. The reference is ``embed`` of
engines.native.reference. Legend: T tokens, V vocabulary, H hidden. Kept for backward: nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.native.kernels.launching import check_rows

_COLUMNS = 2048  # a program; 4 KiB in bf16


@triton.jit
def _embed(embedding, tokens, out, H, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < H
    tl.store(out + row * H + columns, tl.load(embedding + tl.load(tokens + row) * stride + columns, mask=inside), mask=inside)


def embed(embedding_VH: Tensor, tokens_T: Tensor) -> Tensor:
    """[T, H] on the device of ``tokens`` (int64). An embedding on the host has to be pinned."""
    vocabulary, hidden = embedding_VH.shape
    check_rows("embedding", embedding_VH, vocabulary, hidden)
    out_TH = torch.empty(len(tokens_T), hidden, dtype=embedding_VH.dtype, device=tokens_T.device)
    block = min(_COLUMNS, int(triton.next_power_of_2(hidden)))
    _embed[(len(tokens_T), triton.cdiv(hidden, block))](
        embedding_VH, tokens_T, out_TH, hidden, embedding_VH.stride(0), BLOCK=block, num_warps=4
    )
    return out_TH
