"""Attention of packed documents by cuDNN where they are equally long, else by FlashAttention 2: called directly, without autograd.

H100, bf16, causal, 4 x 2,048 tokens, 32 query and 8 key-value heads of 128, forward and backward: cuDNN 0.26 and 0.98 ms, FlashAttention 2
0.51 and 1.56 ms; both take fewer key-value heads and survive graph capture (2026-11-24).

torch caches cuDNN's plans by the strides of q, k and v, but not by those of the output and its gradient, and a plan used with other
strides reads elsewhere: one process must keep to one layout, and does, because it trains one job (seen 2026-11-24 in a test that
trained with o_proj adapted and then without). The backward pass adds up dq in no fixed order (cuDNN, and FlashAttention 2 as well):
two runs of the same step agree to rounding, not to the bit; everything else does.

Legend: T tokens of B documents of S tokens, C query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engines.native.ops import Attended, Heads
from engines.native.packed import Packed
from engines.native.weights import Linear
from engines.native.wide_input import widened

_ATEN = torch.ops.aten


def attention(heads: Heads, packed: Packed, linear: Linear) -> Attended:
    """Causal softmax(q k^T / sqrt(D)) v within each document, as the input of ``linear``."""
    if packed.is_even:
        q, k, v = _by_document(heads, packed)
        output, *kept = _ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)
        statistics = (kept[0], kept[5], kept[6])
        output = output.transpose(1, 2).flatten(0, 1)
    else:
        output, *kept = _ATEN._flash_attention_forward(
            heads.queries, heads.keys, heads.values, packed.cumulative, packed.cumulative, packed.longest, packed.longest, 0.0, True, False
        )
        statistics = (kept[0], kept[1], kept[2])
    return Attended(widened(output.flatten(1), linear), statistics)  # backward reads the copy, so the original is freed


def attention_backward(dy_TCD: Tensor, heads: Heads, attended: Attended, packed: Packed) -> Heads:
    """dq, dk, dv, each contiguous."""
    _, num_heads, head_dim = heads.queries.shape
    output_TCD = attended.input.wide[:, : num_heads * head_dim].view(-1, num_heads, head_dim)
    log_sum, seed, offset = attended.statistics
    if not packed.is_even:
        longest, cumulative = packed.longest, packed.cumulative
        return Heads(
            *_ATEN._flash_attention_backward(
                dy_TCD, heads.queries, heads.keys, heads.values, output_TCD, log_sum, cumulative, cumulative, longest, longest,
                0.0, True, seed, offset,
            )
        )  # fmt: skip
    q, k, v = _by_document(heads, packed)
    dy, y = _split(dy_TCD, packed), _split(output_TCD, packed)
    longest = packed.longest
    gradients: tuple[Any, ...] = _ATEN._scaled_dot_product_cudnn_attention_backward(
        dy, q, k, v, y, log_sum, seed, offset, None, None, None, longest, longest, 0.0, True
    )
    return Heads(*(gradient.transpose(1, 2).flatten(0, 1) for gradient in gradients))


def _by_document(heads: Heads, packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    return _split(heads.queries, packed), _split(heads.keys, packed), _split(heads.values, packed)


def _split(x_TCD: Tensor, packed: Packed) -> Tensor:
    """[T, C, D] -> [B, C, S, D], a view."""
    return x_TCD.view(len(packed.lengths), packed.longest, *x_TCD.shape[1:]).transpose(1, 2)
