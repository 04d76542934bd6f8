"""The ops table of the decoder layer, and REFERENCE: every operation forward and backward in plain torch, on any device.

Legend: T tokens, H hidden, N output and K input columns, R all ranks of a group, C query heads, G key-value heads, D head
dimension, S tokens of one document, L supervised rows, V vocabulary. Backward operations add weight gradients to their buffers
and return the gradient of the input.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.native.weights import Linear, LowRank, Weight, add_product_


@dataclass(frozen=True, slots=True)
class Attended:
    """Attention's output [T, C, D] and what its own backward wants kept (nothing, or the log-sum-exp of each row)."""

    output: Tensor
    statistics: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """Rotated queries [T, C, D], keys and values [T, G, D]; may be views of one buffer. Also the shape of their gradients."""

    queries: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """The operations a decoder layer is made of; another table computes the same functions faster."""

    rms_norm: Callable[[Tensor, Weight, float], Tensor]
    rms_norm_backward: Callable[[Tensor, Tensor, Weight, float], Tensor]
    rotate_: Callable[[Tensor, Tensor, Tensor], None]
    attention: Callable[[Heads, tuple[int, ...]], Attended]
    attention_backward: Callable[[Tensor, Heads, Attended, tuple[int, ...], Heads], None]
    swiglu: Callable[[Tensor], Tensor]
    swiglu_backward: Callable[[Tensor, Tensor], Tensor]
    low_rank: Callable[[Tensor, LowRank], Tensor]
    linear: Callable[[Tensor, Linear, Tensor | None], Tensor]
    linear_backward: Callable[[Tensor, Tensor | None, Tensor | None, Linear, bool], Tensor | None]
    cross_entropy: Callable[[Tensor, Weight, Tensor, float, int], tuple[Tensor, Tensor]]


def rms_norm(x_TH: Tensor, weight: Weight, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * w over the last dimension (Zhang and Sennrich 2019), normalised in float32."""
    x = _wide(x_TH)
    return (x * _inverse_rms(x, epsilon)).to(x_TH.dtype) * weight.value


def rms_norm_backward(dy_TH: Tensor, x_TH: Tensor, weight: Weight, epsilon: float) -> Tensor:
    """With r = 1/rms and z = r x: dx = r (w dy - z mean(w dy z)), dw = sum(dy z)."""
    x = _wide(x_TH)
    inverse = _inverse_rms(x, epsilon)
    normalised = x * inverse
    dy = _wide(dy_TH)
    if weight.master is not None:
        weight.add_gradient((dy * normalised).flatten(0, -2).sum(0))
    scaled = dy * weight.value
    mean = torch.linalg.vecdot(scaled, normalised).unsqueeze(-1) / x.shape[-1]
    return torch.addcmul(scaled, normalised, mean, value=-1).mul_(inverse).to(x_TH.dtype)


def rotate_(x_TCD: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """Rotate the pairs (i, i + D/2) of every head by the token's angles, in place; backward is the rotation by -sine."""
    first, second = x_TCD.chunk(2, dim=-1)
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    rotated = torch.addcmul(first * cosine, second, sine, value=-1)
    second.copy_(torch.addcmul(second * cosine, first, sine))
    first.copy_(rotated)


def attention(heads: Heads, lengths: tuple[int, ...]) -> Attended:
    """Causal softmax(q k^T / sqrt(D)) v within each document; query heads share key-value heads in runs of C / G."""
    output_TCD = heads.queries.new_empty(heads.queries.shape)
    for document in _documents(lengths):
        q, k, v = (x[document].transpose(0, 1).unsqueeze(0) for x in (heads.queries, heads.keys, heads.values))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        output_TCD[document] = attended[0].transpose(0, 1)
    return Attended(output_TCD, ())


def attention_backward(dy_TCD: Tensor, heads: Heads, attended: Attended, lengths: tuple[int, ...], into: Heads) -> None:
    """Write dq, dk, dv ``into`` buffers, from recomputed probabilities in float32.

    dS = P (dP - rowsum(dy y)): the query heads of one key-value head stand below each other, so one product sums over them.
    """
    (_, num_heads, head_dim), num_kv_heads = heads.queries.shape, heads.keys.shape[1]
    group = num_heads // num_kv_heads
    scale = head_dim**-0.5
    for document in _documents(lengths):
        length = document.stop - document.start
        q, dy, y = (_grouped(x[document], num_kv_heads) for x in (heads.queries, dy_TCD, attended.output))
        k, v = (_wide(x[document]).transpose(0, 1) for x in (heads.keys, heads.values))
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale).view(num_kv_heads, group, length, length)
        p = scores.masked_fill_(hidden, float("-inf")).softmax(-1).view(num_kv_heads, group * length, length)
        dp = torch.bmm(dy, v.transpose(1, 2))
        ds = dp.sub_(torch.linalg.vecdot(dy, y).unsqueeze(-1)).mul_(p).mul_(scale)
        into.values[document] = torch.bmm(p.transpose(1, 2), dy).transpose(0, 1)
        into.keys[document] = torch.bmm(ds.transpose(1, 2), q).transpose(0, 1)
        dq = torch.bmm(ds, k).view(num_heads, length, head_dim)
        into.queries[document] = dq.transpose(0, 1)


def swiglu(gate_up_TN: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020); gate and up are the two halves of the columns."""
    gate, up = gate_up_TN.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward(dy_TK: Tensor, gate_up_TN: Tensor) -> Tensor:
    """d gate = dy up silu'(gate), d up = dy silu(gate), side by side as ``gate_up`` is."""
    gate, up = gate_up_TN.chunk(2, dim=-1)
    gradient = torch.empty_like(gate_up_TN)
    d_gate, d_up = gradient.chunk(2, dim=-1)
    d_gate.copy_(torch.ops.aten.silu_backward(dy_TK * up, gate))
    torch.mul(dy_TK, F.silu(gate), out=d_up)
    return gradient


def low_rank(x_TK: Tensor, lora: LowRank) -> Tensor:
    """x A^T of all blocks at once, [T, R]; forward and backward share it."""
    return x_TK @ lora.down.value.t()


def linear(x_TK: Tensor, weights: Linear, low_TR: Tensor | None) -> Tensor:
    """x W^T + b + s (x A^T) B^T."""
    bias = None if weights.bias is None else weights.bias.value
    y_TN = F.linear(x_TK, weights.weight.value, bias)
    if weights.lora is not None and low_TR is not None:
        for block in weights.lora.blocks:
            up = weights.lora.up.value[block.rows]
            y_TN[:, block.output].addmm_(low_TR[:, block.rank], up.t(), alpha=weights.lora.scale)
    return y_TN


def linear_backward(dy_TN: Tensor, x_TK: Tensor | None, low_TR: Tensor | None, weights: Linear, need_input: bool) -> Tensor | None:
    """dx = dy W + s (dy B) A, dA = s (dy B)^T x, dB = s dy^T (x A^T), dW = dy^T x, db = sum(dy). ``x`` only where trained."""
    if weights.weight.gradient is not None and x_TK is not None:
        add_product_(weights.weight.gradient, dy_TN, x_TK)
    if weights.bias is not None and weights.bias.master is not None:
        weights.bias.add_gradient(dy_TN.sum(0))
    dx_TK = dy_TN @ weights.weight.value if need_input else None
    if weights.lora is not None and x_TK is not None and low_TR is not None:
        d_low_TR = _lora_backward(dy_TN, x_TK, low_TR, weights.lora)
        if dx_TK is not None:
            dx_TK.addmm_(d_low_TR, weights.lora.down.value)
    return dx_TK


def cross_entropy(hidden_LH: Tensor, head: Weight, targets_L: Tensor, scale: float, chunk: int) -> tuple[Tensor, Tensor]:
    """Losses [L] in float32 and ``scale`` times their gradient by ``hidden``, ``chunk`` rows of logits at a time.

    The gradient, softmax - onehot, is made in the forward pass, where the logits are.
    """
    d_hidden_LH = torch.empty_like(hidden_LH)
    losses = []
    for start in range(0, len(hidden_LH), chunk):
        rows = slice(start, start + chunk)
        hidden, targets = hidden_LH[rows], targets_L[rows].unsqueeze(1)
        log_p = _wide(hidden @ head.value.t()).log_softmax(-1)
        losses.append(-log_p.gather(1, targets).squeeze(1))
        d_logits = log_p.exp_().scatter_add_(1, targets, -torch.ones_like(targets, dtype=log_p.dtype)).to(hidden.dtype)
        torch.mul(d_logits @ head.value, scale, out=d_hidden_LH[rows])
        if head.gradient is not None:
            add_product_(head.gradient, d_logits, hidden, scale)
    return torch.cat(losses) if losses else _wide(hidden_LH.new_empty(0)), d_hidden_LH


REFERENCE = Ops(
    rms_norm=rms_norm,
    rms_norm_backward=rms_norm_backward,
    rotate_=rotate_,
    attention=attention,
    attention_backward=attention_backward,
    swiglu=swiglu,
    swiglu_backward=swiglu_backward,
    low_rank=low_rank,
    linear=linear,
    linear_backward=linear_backward,
    cross_entropy=cross_entropy,
)


def _lora_backward(dy_TN: Tensor, x_TK: Tensor, low_TR: Tensor, lora: LowRank) -> Tensor:
    """Add dA and dB; returns s dy B, [T, R]."""
    d_low_TR = torch.empty_like(low_TR)
    assert lora.up.gradient is not None
    assert lora.down.gradient is not None
    for block in lora.blocks:
        dy = dy_TN[:, block.output]
        torch.mm(dy, lora.up.value[block.rows], out=d_low_TR[:, block.rank])
        add_product_(lora.up.gradient[block.rows], dy, low_TR[:, block.rank], lora.scale)
    d_low_TR.mul_(lora.scale)
    add_product_(lora.down.gradient, d_low_TR, x_TK)
    return d_low_TR


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    return torch.rsqrt(mean_square + epsilon)


def _documents(lengths: tuple[int, ...]) -> list[slice]:
    return [slice(end - length, end) for end, length in zip(itertools.accumulate(lengths), lengths, strict=True)]


def _grouped(x_SCD: Tensor, num_kv_heads: int) -> Tensor:
    """[S, C, D] -> [G, C/G * S, D], at least float32."""
    return _wide(x_SCD).transpose(0, 1).reshape(num_kv_heads, -1, x_SCD.shape[-1])
