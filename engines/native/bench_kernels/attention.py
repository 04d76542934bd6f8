"""The rows of attention: the engine's three back ends, forward and backward. Even documents, which go to cuDNN, and long uneven ones, which
go to FlashAttention 2, beside torch's own choice for them; short uneven ones, which go to our own kernels, beside FlashAttention 2.

Legend: T tokens of documents of S tokens, C query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.native import attention as dispatch
from engines.native import reference
from engines.native.bench_kernels.setting import Call, Row, Setting, bare
from engines.native.kernels.attention import attend
from engines.native.kernels.attention_backward import attend_backward
from engines.native.ops import Attended, Heads, Input
from engines.native.packed import Packed

_FORWARD, _BACKWARD = 2, 5  # products over the causal half: q k^T, p v; q k^T again, dy v^T, dv, dk, dq


def attention_rows() -> Mapping[str, Callable[[Setting], Row]]:
    """By name; those of our own kernels are named after them."""
    return {
        "attend": _short,
        "attend_backward": _short_backward,
        "attention_even": partial(_forward, is_even=True),
        "attention_even_backward": partial(_backward, is_even=True),
        "attention_uneven": partial(_forward, is_even=False),
        "attention_uneven_backward": partial(_backward, is_even=False),
    }


def causal_flops(s: Setting, lengths: Sequence[int], num_products: int) -> int:
    """Two operations for each of D columns, for every pair of a token and one not after it."""
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return 2 * num_products * pairs * s.shape.query_size


def _forward(s: Setting, *, is_even: bool) -> Row:
    lengths = s.even if is_even else s.uneven
    heads, packed, plain = s.heads(), s.packed(lengths), bare(s.shape.query_size, s)
    parts = _by_document(heads, lengths, is_even)
    return Row(
        kernel=dispatch.attention,
        size=_size(s, lengths),
        ours=Call(lambda: dispatch.attention(heads, packed, plain)),
        reference=Call(lambda: [_attend(part) for part in parts]),
        num_bytes=s.item * s.tokens * 2 * (s.shape.query_size + s.shape.key_size),
        flops=causal_flops(s, lengths, _FORWARD),
        is_compiled=False,
    )


def _backward(s: Setting, *, is_even: bool) -> Row:
    lengths = s.even if is_even else s.uneven
    heads, packed, dy = s.heads(), s.packed(lengths), s.random(s.tokens, s.shape.num_heads, s.shape.head_dim)
    attended = dispatch.attention(heads, packed, bare(s.shape.query_size, s))
    with torch.enable_grad():
        leaves = Heads(*(x.detach().requires_grad_() for x in (heads.queries, heads.keys, heads.values)))
        parts = _by_document(leaves, lengths, is_even)
        outputs = [_attend(part) for part in parts]
    gradients = _split(dy, lengths, is_even)
    inputs = [x for part in parts for x in part]
    return Row(
        kernel=dispatch.attention_backward,
        size=_size(s, lengths),
        ours=Call(lambda: dispatch.attention_backward(dy, heads, attended, packed)),
        reference=Call(lambda: torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)),
        num_bytes=s.item * s.tokens * 4 * (s.shape.query_size + s.shape.key_size),
        flops=causal_flops(s, lengths, _BACKWARD),
        is_compiled=False,
    )


def _short(s: Setting) -> Row:
    heads, packed, y = s.heads(), s.packed(s.short), s.random(s.tokens, s.shape.num_heads, s.shape.head_dim)
    return Row(
        kernel=attend,
        size=_size(s, s.short),
        ours=Call(lambda: attend(heads.queries, heads.keys, heads.values, packed.begins, y)),
        reference=Call(lambda: _usual(s, heads, packed)),
        num_bytes=s.item * s.tokens * 2 * (s.shape.query_size + s.shape.key_size),
        flops=causal_flops(s, s.short, _FORWARD),
        is_compiled=False,
    )


def _short_backward(s: Setting) -> Row:
    heads, packed, dy = s.heads(), s.packed(s.short), s.random(s.tokens, s.shape.num_heads, s.shape.head_dim)
    given, y = (heads.queries, heads.keys, heads.values), torch.empty_like(dy)
    sums, usual = attend(*given, packed.begins, y), _usual(s, heads, packed)
    return Row(
        kernel=attend_backward,
        size=_size(s, s.short),
        ours=Call(lambda: attend_backward(dy, *given, y, sums, packed.begins, packed.ends)),
        reference=Call(lambda: _usual_backward(dy, heads, usual, packed)),
        num_bytes=s.item * s.tokens * 4 * (s.shape.query_size + s.shape.key_size),
        flops=causal_flops(s, s.short, _BACKWARD),
        is_compiled=False,
    )


def _usual(s: Setting, heads: Heads, packed: Packed) -> tuple[Tensor, tuple[Tensor, ...]]:
    """FlashAttention 2, which there is on a GPU in 16 bits; else the reference operations."""
    if heads.queries.dtype == torch.bfloat16 and heads.queries.is_cuda:
        return dispatch.flash(heads, _with_longest(packed))
    return reference.attention(heads, packed, bare(s.shape.query_size, s)).input.wide.view(heads.queries.shape), ()


def _usual_backward(dy: Tensor, heads: Heads, usual: tuple[Tensor, tuple[Tensor, ...]], packed: Packed) -> Heads:
    output, statistics = usual
    if statistics:
        return dispatch.flash_backward(dy, heads, output, statistics, _with_longest(packed))
    return reference.attention_backward(dy, heads, Attended(Input(output.flatten(1), None), ()), packed)


def _with_longest(packed: Packed) -> Packed:
    """What FlashAttention 2 is told at its best, where our own kernels ask for nothing."""
    return replace(packed, longest=max(packed.lengths))


def _size(s: Setting, lengths: Sequence[int]) -> str:
    documents = f"{len(lengths)} × {lengths[0]:,}" if len(set(lengths)) == 1 else " + ".join(f"{length:,}" for length in lengths)
    if lengths == s.short:
        documents = f"{len(lengths)} × {min(lengths):,} to {max(lengths):,}"
    return f"{documents}, {s.shape.num_heads}/{s.shape.num_kv_heads} heads of {s.shape.head_dim}"


def _attend(part: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    q, k, v = part
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def _by_document(heads: Heads, lengths: Sequence[int], is_even: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    parts = (_split(x, lengths, is_even) for x in (heads.queries, heads.keys, heads.values))
    return list(zip(*parts, strict=True))


def _split(x_TCD: Tensor, lengths: Sequence[int], is_even: bool) -> list[Tensor]:
    """[1, C, S, D] for each document, or one [B, C, S, D] where all are equally long; views."""
    if is_even:
        return [x_TCD.view(len(lengths), lengths[0], *x_TCD.shape[1:]).transpose(1, 2)]
    return [document.transpose(0, 1).unsqueeze(0) for document in torch.split(x_TCD, list(lengths))]
