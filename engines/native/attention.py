"""Attention of packed documents: by cuDNN where they are equally long, by kernels of our own where they are short on the whole, else by
FlashAttention 2; all called directly, without autograd.

H100, bf16, causal, 4 x 2,048 tokens, 32 query and 8 key-value heads of 128, forward and backward: cuDNN 0.26 and 0.98 ms, FlashAttention 2
0.51 and 1.56 ms; both take fewer key-value heads and survive graph capture (2026-11-24). For 64 documents of 80 to 570 tokens, 14,376 in
all, 32 and 8 heads of 64, FlashAttention 2 takes 0.27 and 0.71 ms, five and seven times what their bytes need; over a third of its
backward pass does not attend, but copies and adds up (2026-11-28). cuDNN's ragged interface, as torch 2.11 calls it, cannot be captured.

torch caches cuDNN's plans by the strides of q, k and v, but not by those of the output and its gradient, and a plan used with other
strides reads elsewhere (NaN in a process that trained with o_proj adapted and then without, 2026-11-24; an illegal address in one that
then trained all weights, 2026-11-28): what comes in other strides than the first is copied into those.

The backward passes of cuDNN and FlashAttention 2 add up dq in no fixed order: two runs of the same step agree to rounding, not to the
bit; everything else does, our own kernels too.

Legend: T tokens of B documents of S tokens, C query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engines.native.kernels.attention import HEADS, attend
from engines.native.kernels.attention_backward import attend_backward
from engines.native.ops import Attended, Heads
from engines.native.packed import Packed
from engines.native.weights import Linear
from engines.native.wide_input import room_for, widened, with_low

Statistics = tuple[Tensor, ...]  # of a forward pass, kept for backward

_ATEN = torch.ops.aten
# Elements from row to row of dy and of the output with which this process first went backward, by what torch finds a plan of cuDNN by.
_PLANNED: dict[tuple[object, ...], tuple[int, int]] = {}


def by_own_kernels(heads: Heads, packed: Packed) -> bool:
    """Whether documents of ``packed`` are uneven and short (``engines.native.buckets.are_short``), and heads not too wide.

    Where they are long FlashAttention 2 takes less time: backward it makes five products where ours make seven.
    """
    return packed.longest is None and heads.queries.shape[2] <= HEADS[-1]


def attention(heads: Heads, packed: Packed, linear: Linear) -> Attended:
    """Causal softmax(q k^T / sqrt(D)) v within each document, as the input of ``linear``."""
    if by_own_kernels(heads, packed):
        wide_TW = room_for(heads.queries, len(heads.queries), linear)
        sums_TC = attend(heads.queries, heads.keys, heads.values, packed.begins, _output(wide_TW, heads))
        return Attended(with_low(wide_TW, linear, outlives=False), (sums_TC,))
    output_TCD, statistics = (_cudnn if packed.is_even else flash)(heads, packed)
    return Attended(widened(output_TCD.flatten(1), linear), statistics)  # backward reads the copy, so the original is freed


def attention_backward(dy_TCD: Tensor, heads: Heads, attended: Attended, packed: Packed) -> Heads:
    """dq, dk, dv, each contiguous."""
    output_TCD, statistics = _output(attended.input.wide, heads), attended.statistics
    if by_own_kernels(heads, packed):
        (sums_TC,), bounds = statistics, (packed.begins, packed.ends)
        return Heads(*attend_backward(dy_TCD, heads.queries, heads.keys, heads.values, output_TCD, sums_TC, *bounds))
    return (_cudnn_backward if packed.is_even else flash_backward)(dy_TCD, heads, output_TCD, statistics, packed)


def flash(heads: Heads, packed: Packed) -> tuple[Tensor, Statistics]:
    """FlashAttention 2: the output [T, C, D], and what its backward wants kept."""
    longest, cumulative = _longest(packed), packed.cumulative
    output_TCD, *kept = _ATEN._flash_attention_forward(
        heads.queries, heads.keys, heads.values, cumulative, cumulative, longest, longest, 0.0, True, False
    )
    return output_TCD, tuple(kept[:3])


def flash_backward(dy_TCD: Tensor, heads: Heads, output_TCD: Tensor, statistics: Statistics, packed: Packed) -> Heads:
    """dq, dk, dv of what ``flash`` returned."""
    longest, cumulative = _longest(packed), packed.cumulative
    log_sum, seed, offset = statistics
    return Heads(
        *_ATEN._flash_attention_backward(
            dy_TCD, heads.queries, heads.keys, heads.values, output_TCD, log_sum, cumulative, cumulative, longest, longest,
            0.0, True, seed, offset,
        )
    )  # fmt: skip


def _cudnn(heads: Heads, packed: Packed) -> tuple[Tensor, Statistics]:
    q, k, v = _by_document(heads, packed)
    output, *kept = _ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)
    return output.transpose(1, 2).flatten(0, 1), (kept[0], kept[5], kept[6])


def _cudnn_backward(dy_TCD: Tensor, heads: Heads, output_TCD: Tensor, statistics: Statistics, packed: Packed) -> Heads:
    q, k, v = _by_document(heads, packed)
    planned = _PLANNED.setdefault((q.shape, k.shape, q.stride(), k.stride(), v.stride()), (dy_TCD.stride(0), output_TCD.stride(0)))
    dy, y = (_split(in_rows_of(x_TCD, width), packed) for x_TCD, width in zip((dy_TCD, output_TCD), planned, strict=True))
    (log_sum, seed, offset), longest = statistics, q.shape[2]
    gradients: tuple[Any, ...] = _ATEN._scaled_dot_product_cudnn_attention_backward(
        dy, q, k, v, y, log_sum, seed, offset, None, None, None, longest, longest, 0.0, True
    )
    return Heads(*(gradient.transpose(1, 2).flatten(0, 1) for gradient in gradients))


def in_rows_of(x_TCD: Tensor, width: int) -> Tensor:
    """``x_TCD`` with ``width`` elements, C D or more, from the begin of a row to that of the next; itself where it has them."""
    if x_TCD.stride(0) == width:
        return x_TCD
    num_tokens, num_heads, head_dim = x_TCD.shape
    return _heads_of(x_TCD.new_empty(num_tokens, width), num_heads, head_dim).copy_(x_TCD)


def _output(wide_TW: Tensor, heads: Heads) -> Tensor:
    """[T, C, D], a view of the left part of what the group behind attention reads."""
    return _heads_of(wide_TW, *heads.queries.shape[1:])


def _heads_of(wide_TW: Tensor, num_heads: int, head_dim: int) -> Tensor:
    return wide_TW[:, : num_heads * head_dim].view(-1, num_heads, head_dim)


def _by_document(heads: Heads, packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    return _split(heads.queries, packed), _split(heads.keys, packed), _split(heads.values, packed)


def _split(x_TCD: Tensor, packed: Packed) -> Tensor:
    """[T, C, D] -> [B, C, S, D], a view."""
    return x_TCD.view(len(packed.lengths), -1, *x_TCD.shape[1:]).transpose(1, 2)


def _longest(packed: Packed) -> int:
    """Tokens of the longest document at most, of wide heads in short documents too."""
    return len(packed.tokens) if packed.longest is None else packed.longest
