"""REFERENCE: every operation of the table forward and backward in plain torch, on any device.

Legend: T tokens, H hidden, N output and K input columns of a linear group, P its padded ranks, C query heads, G key-value
heads, D head dimension, S tokens of one document, L supervised rows, V vocabulary.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.native.gradient import add_product_
from engines.native.ops import Attended, HeadNorms, Heads, Input, Normed, NormSource, Ops
from engines.native.packed import Packed
from engines.native.weights import Linear, Weight


def embed(embedding_VH: Tensor, tokens_T: Tensor) -> Tensor:
    """Rows by index."""
    return embedding_VH[tokens_T]


def norm(x_TH: Tensor, delta_TH: Tensor | None, weight: Weight, epsilon: float, linear: Linear) -> Normed:
    """x / sqrt(mean(x^2) + epsilon) * w over the last dimension (Zhang and Sennrich 2019), normalised in float32."""
    x_TH = x_TH if delta_TH is None else x_TH + delta_TH
    inverse = _inverse_rms(_wide(x_TH), epsilon)
    return Normed(as_input(_scaled(x_TH, inverse, weight), linear), x_TH, inverse.squeeze(-1))


def norm_backward(dy_TH: Tensor, x_TH: Tensor, inverse_T: Tensor, weight: Weight, residual_TH: Tensor | None, padded_rank: int) -> Tensor:
    """With r = 1/rms and z = r x: dx = r (w dy - z mean(w dy z)) + residual, dw = sum(dy z); [T, H + P]."""
    dx_TH = _norm_backward(dy_TH, x_TH, inverse_T.unsqueeze(-1), weight)
    if residual_TH is not None:
        dx_TH.add_(residual_TH)
    return _with_room(dx_TH, padded_rank)


def plain_norm(x: Tensor, weight: Weight, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension."""
    return _scaled(x, _inverse_rms(_wide(x), epsilon), weight)


def plain_norm_backward(dy: Tensor, x: Tensor, weight: Weight, epsilon: float) -> Tensor:
    """The gradient of ``plain_norm`` by x."""
    return _norm_backward(dy, x, _inverse_rms(_wide(x), epsilon), weight)


def as_input(x_TK: Tensor, linear: Linear) -> Input:
    """[x | s x A^T]; a copy of ``x``, unless there are no adapters."""
    if linear.lora is None:
        return Input(x_TK, None)
    wide = _with_room(x_TK, linear.padded_rank)
    low_TP = wide[:, linear.num_inputs :]
    ranks = len(linear.lora.down.value)
    torch.mm(x_TK, linear.lora.down.value.t(), out=low_TP[:, :ranks])
    low_TP[:, :ranks].mul_(linear.lora.scale)
    return Input(wide, low_TP.clone())


def linear(input: Input, linear: Linear, room: int) -> Tensor:
    """x W^T + b + s (x A^T) B^T as one product of the wide input."""
    y_TN = F.linear(input.wide, linear.wide[: linear.num_outputs], None if linear.bias is None else linear.bias.value)
    return _with_room(y_TN, room)[:, : linear.num_outputs]


def fill(dy_TW: Tensor, linear: Linear) -> None:
    """s dy B into the columns from N on, zeros behind it."""
    if linear.lora is None:
        return
    d_low_TP, ranks = dy_TW[:, linear.num_outputs :], len(linear.lora.down.value)
    if d_low_TP.shape[1] > ranks:
        d_low_TP[:, ranks:].zero_()
    for block in linear.lora.blocks:
        torch.mm(dy_TW[:, block.output], block.up.value, out=d_low_TP[:, block.rank])
    d_low_TP.mul_(linear.lora.scale)


def input_gradient(dy_TW: Tensor, linear: Linear) -> Tensor:
    """dx = dy W + (s dy B) A as one product."""
    return dy_TW @ linear.wide[:, : linear.num_inputs]


def weight_gradients(dy_TW: Tensor, source: Tensor | NormSource, linear: Linear) -> None:
    """dA = (s dy B)^T x, dW = dy^T x, db = sum(dy)."""
    dy_TN = dy_TW[:, : linear.num_outputs]
    if linear.bias is not None and linear.bias.master is not None:
        linear.bias.add_gradient(dy_TN.sum(0))
    if not linear.is_trained:
        return
    x_TK = _scaled(source.x, source.inverse.unsqueeze(-1), source.weight) if isinstance(source, NormSource) else source
    linear.weight.add_product(dy_TN, x_TK)
    if linear.lora is not None:
        down = linear.lora.down.gradient
        assert down is not None
        add_product_(down, dy_TW[:, linear.num_outputs : linear.num_outputs + len(down)], x_TK)


def up_gradients(dy_TW: Tensor, low_TP: Tensor | None, linear: Linear) -> None:
    """dB = dy^T (s x A^T)."""
    if linear.lora is None:
        return
    assert low_TP is not None
    for block in linear.lora.blocks:
        assert block.up.gradient is not None
        add_product_(block.up.gradient, dy_TW[:, block.output], low_TP[:, block.rank])


def rotate(projected: Heads, norms: HeadNorms | None, packed: Packed) -> Heads:
    """Rotate the pairs (i, i + D/2) of every query and key by the token's angles (Su et al. 2021), after their norms if they have any."""
    queries, keys = projected.queries, projected.keys
    if norms is not None:
        queries, keys = plain_norm(queries, norms.query, norms.epsilon), plain_norm(keys, norms.key, norms.epsilon)
    _rotate_(queries, packed.cosine, packed.sine)
    _rotate_(keys, packed.cosine, packed.sine)
    return Heads(queries, keys, projected.values)


def rotate_back(gradients: Heads, projected: Heads | None, norms: HeadNorms | None, packed: Packed, padded_rank: int) -> Tensor:
    """Backward of a rotation is the rotation by the negative angles."""
    columns = [each.flatten(1) for each in (gradients.queries, gradients.keys, gradients.values)]
    dy_TW = _with_room(torch.cat(columns, dim=1), padded_rank)
    queries, keys = columns[0].shape[1], columns[1].shape[1]
    for start, size, like in ((0, queries, gradients.queries), (queries, keys, gradients.keys)):
        _rotate_(dy_TW[:, start : start + size].view(like.shape), packed.cosine, -packed.sine)
    if projected is not None and norms is not None:
        norm_heads_backward_(dy_TW, projected, norms)
    return dy_TW


def norm_heads_backward_(dy_TW: Tensor, projected: Heads, norms: HeadNorms) -> None:
    """Through the norms, in place: the gradients of queries and keys, which begin the rows of ``dy``."""
    start = 0
    for x_TCD, weight in ((projected.queries, norms.query), (projected.keys, norms.key)):
        size = x_TCD.shape[1] * x_TCD.shape[2]
        dy_TCD = dy_TW[:, start : start + size].view(x_TCD.shape)
        dy_TCD.copy_(plain_norm_backward(dy_TCD, x_TCD, weight, norms.epsilon))
        start += size


def attention(heads: Heads, packed: Packed, linear: Linear) -> Attended:
    """Causal softmax(q k^T / sqrt(D)) v within each document; query heads share key-value heads in runs of C / G."""
    output_TCD = heads.queries.new_empty(heads.queries.shape)
    for document in _documents(packed.lengths):
        q, k, v = (x[document].transpose(0, 1).unsqueeze(0) for x in (heads.queries, heads.keys, heads.values))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        output_TCD[document] = attended[0].transpose(0, 1)
    return Attended(as_input(output_TCD.flatten(1), linear), ())


def attention_backward(dy_TCD: Tensor, heads: Heads, attended: Attended, packed: Packed) -> Heads:
    """dq, dk, dv from recomputed probabilities in float32.

    dS = P (dP - rowsum(dy y)): the query heads of one key-value head stand below each other, so one product sums over them.
    """
    (_, num_heads, head_dim), num_kv_heads = heads.queries.shape, heads.keys.shape[1]
    output_TCD = attended.input.wide[:, : num_heads * head_dim].view(-1, num_heads, head_dim)
    into = Heads(*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (heads.queries, heads.keys, heads.values)))
    group = num_heads // num_kv_heads
    scale = head_dim**-0.5
    for document in _documents(packed.lengths):
        length = document.stop - document.start
        q, dy, y = (_grouped(x[document], num_kv_heads) for x in (heads.queries, dy_TCD, output_TCD))
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
    return into


def swiglu(gate_up_TN: Tensor, linear: Linear) -> Input:
    """silu(gate) * up (Shazeer 2020); gate and up are the two halves of the columns."""
    gate, up = gate_up_TN.chunk(2, dim=-1)
    return as_input(F.silu(gate).mul_(up), linear)


def swiglu_backward(d_h_TK: Tensor, gate_up_TN: Tensor, dy_TW: Tensor, low_TP: Tensor | None, down: Linear, group: Linear) -> Tensor:
    """d gate = dh up silu'(gate), d up = dh silu(gate) side by side; h again for the gradients of ``down``."""
    gate, up = gate_up_TN.chunk(2, dim=-1)
    active = F.silu(gate)
    gradient = gate_up_TN.new_zeros(len(gate_up_TN), gate_up_TN.shape[1] + group.padded_rank)
    d_gate, d_up = gradient[:, : gate_up_TN.shape[1]].chunk(2, dim=-1)
    d_gate.copy_(torch.ops.aten.silu_backward(d_h_TK * up, gate))
    torch.mul(d_h_TK, active, out=d_up)
    weight_gradients(dy_TW, active.mul_(up), down)
    up_gradients(gradient, low_TP, group)
    return gradient


def cross_entropy(hidden_LH: Tensor, head: Weight, targets_L: Tensor, scale: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Losses [L] in float32 and ``scale`` times their gradient by ``hidden``, ``chunk`` rows of logits at a time.

    The gradient, softmax - onehot, is made in the forward pass, where the logits are. A row whose target is negative counts nothing.
    """
    d_hidden_LH = torch.empty_like(hidden_LH)
    losses = []
    for start in range(0, len(hidden_LH), chunk):
        rows = slice(start, start + chunk)
        hidden, targets = hidden_LH[rows], targets_L[rows].clamp_min(0).unsqueeze(1)
        log_p = _wide(hidden @ head.value.t()).log_softmax(-1)
        counts = (targets_L[rows] >= 0).to(log_p.dtype)
        losses.append(-log_p.gather(1, targets).squeeze(1) * counts)
        d_logits = log_p.exp_().scatter_add_(1, targets, -torch.ones_like(targets, dtype=log_p.dtype))
        d_logits = d_logits.mul_(counts.unsqueeze(1) * scale).to(hidden.dtype)
        torch.mm(d_logits, head.value, out=d_hidden_LH[rows])
        head.add_product(d_logits, hidden)
    return torch.cat(losses) if losses else _wide(hidden_LH.new_empty(0)), d_hidden_LH


REFERENCE = Ops(
    embed=embed,
    norm=norm,
    norm_backward=norm_backward,
    plain_norm=plain_norm,
    plain_norm_backward=plain_norm_backward,
    linear=linear,
    fill=fill,
    input_gradient=input_gradient,
    weight_gradients=weight_gradients,
    up_gradients=up_gradients,
    rotate=rotate,
    rotate_back=rotate_back,
    attention=attention,
    attention_backward=attention_backward,
    swiglu=swiglu,
    swiglu_backward=swiglu_backward,
    cross_entropy=cross_entropy,
)


def _scaled(x: Tensor, inverse: Tensor, weight: Weight) -> Tensor:
    return (_wide(x) * inverse).to(x.dtype) * weight.value


def _norm_backward(dy: Tensor, x: Tensor, inverse: Tensor, weight: Weight) -> Tensor:
    normalised = _wide(x) * inverse
    dy = _wide(dy)
    if weight.master is not None:
        weight.add_gradient((dy * normalised).flatten(0, -2).sum(0))
    scaled = dy * weight.value
    mean = torch.linalg.vecdot(scaled, normalised).unsqueeze(-1) / x.shape[-1]
    return torch.addcmul(scaled, normalised, mean, value=-1).mul_(inverse).to(x.dtype)


def _rotate_(x_TCD: Tensor, cosine: Tensor, sine: Tensor) -> None:
    first, second = x_TCD.chunk(2, dim=-1)
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    rotated = torch.addcmul(first * cosine, second, sine, value=-1)
    second.copy_(torch.addcmul(second * cosine, first, sine))
    first.copy_(rotated)


def _with_room(x_TK: Tensor, room: int) -> Tensor:
    """``x`` with ``room`` zero columns behind it; x itself where none are asked for."""
    return F.pad(x_TK, (0, room)) if room else x_TK


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
