"""The rows of the table: each kernel with its tensors, the bytes and products that it cannot do without, and what it is compared with.

Legend: T tokens, H hidden, K columns of h, N outputs and P padded ranks of a linear group, R its ranks, L rows of logits, V vocabulary,
C query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engines.native import fused_ops, optimizer, reference
from engines.native.bench import SCHEDULE
from engines.native.bench_kernels import liger
from engines.native.bench_kernels.attention import attention_rows
from engines.native.bench_kernels.fp8 import fp8_rows
from engines.native.bench_kernels.full import FULL_ROWS
from engines.native.bench_kernels.heads import HEAD_ROWS
from engines.native.bench_kernels.setting import Call, Row, Setting, bare, by, restore
from engines.native.kernels.adamw import FlatAdamW
from engines.native.kernels.cross_entropy import cross_entropy_
from engines.native.kernels.embedding import embed
from engines.native.kernels.nf4 import decode_nf4
from engines.native.kernels.outer import add_outer_
from engines.native.kernels.parts import copy_parts
from engines.native.kernels.rms_norm import rms_norm, rms_norm_backward
from engines.native.kernels.swiglu import swiglu, swiglu_backward_
from engines.native.kernels.swiglu_gradients import swiglu_gradients_
from engines.native.nf4 import decode_reference, placed
from engines.native.ops import NormSource
from engines.native.turns import copy_reference
from engines.native.weights import Arena, Linear, Weight
from harness.nf4 import quantise

_LOGITS = 2048  # rows at one time
_FP32 = 4


def _rms_norm(s: Setting) -> Row:
    tokens, hidden, room = s.tokens, s.shape.hidden_size, s.layer.gate_up.padded_rank
    x, delta, weight, epsilon = s.random(tokens, hidden), s.random(tokens, hidden), s.layer.mlp_norm, s.shape.norm_epsilon
    plain = bare(hidden, s)
    return Row(
        kernel=rms_norm,
        size=by(tokens, hidden),
        ours=Call(lambda: rms_norm(x, weight.value, epsilon, room, delta)),
        reference=Call(lambda: reference.norm(x, delta, weight, epsilon, plain)),
        num_bytes=s.item * (tokens * (4 * hidden + room) + hidden) + _FP32 * tokens,
        liger=lambda: liger.rms_norm(x, delta, weight.value, epsilon),
    )


def _rms_norm_backward(s: Setting) -> Row:
    tokens, hidden, room = s.tokens, s.shape.hidden_size, s.layer.output.padded_rank
    x, dy, residual = s.random(tokens, hidden), s.random(tokens, hidden), s.random(tokens, hidden, room=room)
    weight, epsilon = s.layer.mlp_norm, s.shape.norm_epsilon
    inverse = reference.norm(x, None, weight, epsilon, bare(hidden, s)).inverse
    return Row(
        kernel=rms_norm_backward,
        size=by(tokens, hidden),
        ours=Call(lambda: rms_norm_backward(dy, x, weight.value, inverse, residual, room)),
        reference=Call(lambda: reference.norm_backward(dy, x, inverse, weight, residual, room)),
        num_bytes=s.item * (tokens * (4 * hidden + room) + hidden) + _FP32 * tokens,
        liger=lambda: liger.rms_norm_backward(dy, residual, x, weight.value, epsilon),
    )


def _embed(s: Setting) -> Row:
    """Out of the GPU's memory; out of the host's it takes what the bus takes for as many bytes."""
    tokens, hidden = s.tokens, s.shape.hidden_size
    embedding, rows = s.random(s.shape.vocab_size, hidden), torch.randint(s.shape.vocab_size, (tokens,), device=s.device)
    return Row(
        kernel=embed,
        size=by(tokens, hidden),
        ours=Call(lambda: embed(embedding, rows)),
        reference=Call(lambda: reference.embed(embedding, rows)),
        num_bytes=tokens * (2 * s.item * hidden + 8),
    )


def _swiglu(s: Setting) -> Row:
    tokens, columns, room = s.tokens, s.shape.intermediate_size, s.layer.down.padded_rank
    gate_up, plain = s.random(tokens, 2 * columns, room=s.layer.gate_up.padded_rank), bare(columns, s)
    return Row(
        kernel=swiglu,
        size=by(tokens, columns),
        ours=Call(lambda: swiglu(gate_up, room)),
        reference=Call(lambda: reference.swiglu(gate_up, plain)),
        num_bytes=s.item * tokens * (3 * columns + room),
        liger=lambda: liger.swiglu(gate_up),
    )


def _swiglu_backward(s: Setting) -> Row:
    tokens, columns, room = s.tokens, s.shape.intermediate_size, s.layer.gate_up.padded_rank
    gate_up, dh, plain = s.random(tokens, 2 * columns, room=room), s.random(tokens, columns), bare(columns, s)
    resets = restore(gate_up), restore(dh)

    def put_back() -> None:
        for reset in resets:
            reset()

    return Row(
        kernel=swiglu_backward_,
        size=by(tokens, columns),
        ours=Call(lambda: swiglu_backward_(dh, gate_up, room), put_back),
        reference=Call(lambda: reference.swiglu_backward(dh, gate_up, dh, None, plain, plain), put_back),
        num_bytes=s.item * tokens * (6 * columns + room),
        liger=lambda: liger.swiglu_backward(dh, gate_up),
    )


def _swiglu_gradients(s: Setting) -> Row:
    tokens, columns, down, group = s.tokens, s.shape.intermediate_size, s.layer.down, s.layer.gate_up
    room, ranks = group.padded_rank, _ranks(down)
    gate_up, dh = s.random(tokens, 2 * columns, room=room), s.random(tokens, columns)
    dy, low = s.random(tokens, down.num_outputs + down.padded_rank), s.random(tokens, room)
    put_back = restore(gate_up)
    return Row(
        kernel=swiglu_gradients_,
        size=f"{by(tokens, columns)}, rank {ranks}",
        ours=Call(lambda: fused_ops.swiglu_backward(dh, gate_up, dy, low, down, group), put_back),
        reference=Call(lambda: reference.swiglu_backward(dh, gate_up, dy, low, down, group), put_back),
        num_bytes=s.item * tokens * (5 * columns + room + 3 * ranks) + 2 * _FP32 * 3 * columns * ranks,
    )


def _cross_entropy(s: Setting) -> Row:
    rows, vocabulary = min(s.tokens, _LOGITS), s.shape.vocab_size
    logits, losses = s.random(rows, vocabulary), torch.empty(rows, dtype=torch.float32, device=s.device)
    targets = torch.randint(vocabulary, (rows,), device=s.device)
    scale, put_back = torch.full((), 1 / rows, device=s.device), restore(logits)
    return Row(
        kernel=cross_entropy_,
        size=by(rows, vocabulary),
        ours=Call(lambda: cross_entropy_(logits, targets, losses, scale), put_back),
        reference=Call(lambda: losses_and_gradient(logits, targets, scale), put_back),
        num_bytes=2 * s.item * rows * vocabulary + (8 + _FP32) * rows,
        liger=lambda: liger.cross_entropy(logits, targets),
    )


def losses_and_gradient(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The part between the two products of ``reference.cross_entropy``, every row supervised."""
    log_p, places = logits.float().log_softmax(-1), targets.unsqueeze(1)
    losses = -log_p.gather(1, places).squeeze(1)
    gradient = log_p.exp().scatter_add(1, places, -torch.ones_like(places, dtype=log_p.dtype))
    return losses, gradient.mul(scale).to(logits.dtype)


def _outer_down(s: Setting) -> Row:
    tokens, hidden, group = s.tokens, s.shape.hidden_size, s.layer.gate_up
    ranks = _ranks(group)
    dy, x = s.random(tokens, group.num_outputs + group.padded_rank), s.random(tokens, hidden)
    source = NormSource(x, torch.rand(tokens, device=s.device) + 0.5, s.layer.mlp_norm)
    return Row(
        kernel=add_outer_,
        size=f"{by(tokens, hidden)}, rank {ranks}",
        ours=Call(lambda: fused_ops.weight_gradients(dy, source, group)),
        reference=Call(lambda: reference.weight_gradients(dy, source, group)),
        num_bytes=s.item * (tokens * (hidden + ranks) + hidden) + _FP32 * (tokens + 2 * hidden * ranks),
    )


def _outer_up(s: Setting) -> Row:
    tokens, group = s.tokens, s.layer.qkv
    assert group.lora is not None
    outputs, ranks, each = group.num_outputs, _ranks(group), group.lora.up.shape[1]
    dy, low = s.random(tokens, outputs, room=group.padded_rank), s.random(tokens, group.padded_rank)
    return Row(
        kernel=add_outer_,
        size=f"{by(tokens, outputs)}, rank 3 × {each}",
        ours=Call(lambda: fused_ops.up_gradients(dy, low, group)),
        reference=Call(lambda: reference.up_gradients(dy, low, group)),
        num_bytes=s.item * tokens * (outputs + ranks) + 2 * _FP32 * outputs * each,
    )


def _adamw(s: Setting) -> Row:
    (arena, weights), (mine, my_weights) = _adapters(s), _adapters(s)
    scalars = torch.tensor(optimizer.step_scalars(SCHEDULE, 0, 1), device=s.device)
    plain = optimizer.AdamW(arena, weights, SCHEDULE)
    betas, decay = (SCHEDULE.beta1, SCHEDULE.beta2), SCHEDULE.weight_decay
    fused = FlatAdamW(mine.masters, [weight.value for weight in my_weights], betas, SCHEDULE.epsilon, decay)
    count = len(mine.masters)
    return Row(
        kernel=FlatAdamW,
        size=by(count),
        ours=Call(lambda: fused.step(scalars)),
        reference=Call(lambda: plain.step(scalars)),
        num_bytes=count * (2 * 4 * _FP32 + s.item),
    )


def _decode_nf4(s: Setting) -> Row:
    group = s.layer.down
    outputs, inputs = group.num_outputs, group.num_inputs
    weight = placed(quantise(torch.randn(outputs, inputs).to(s.dtype)), s.device)
    into = s.random(outputs, inputs, room=group.padded_rank)
    return Row(
        kernel=decode_nf4,
        size=by(outputs, inputs),
        ours=Call(lambda: decode_nf4(weight, into)),
        reference=Call(lambda: decode_reference(weight, into)),
        num_bytes=sum(each.nbytes for each in (weight.packed, weight.absmax, weight.nested_absmax)) + s.item * outputs * inputs,
    )


def _copy_parts(s: Setting) -> Row:
    group = s.layer.gate_up
    lora, outputs, inputs = group.lora, group.num_outputs, group.num_inputs
    assert lora is not None
    buffer = s.random(outputs + group.padded_rank, inputs, room=group.padded_rank)
    wide = buffer.as_strided((len(buffer), inputs + group.padded_rank), (buffer.stride(0), 1))
    places = [wide[block.output, inputs + block.rank.start : inputs + block.rank.stop] for block in lora.blocks]
    places.append(wide[outputs : outputs + len(lora.down.value), :inputs])
    values = [s.random(*place.shape) for place in places]
    count = sum(value.numel() for value in values)
    return Row(
        kernel=copy_parts,
        size=" + ".join(by(*value.shape) for value in values),
        ours=Call(lambda: copy_parts(values, places)),
        reference=Call(lambda: copy_reference(values, places)),
        num_bytes=2 * s.item * count,
    )


def _adapters(s: Setting) -> tuple[Arena, list[Weight]]:
    """As many values as all layers' adapters, those of a kind below each other; rows of B lie a padded rank apart, not a weight's row."""
    sizes = []
    for group in s.layer.groups:
        assert group.lora is not None
        sizes.append((len(group.lora.down.value), group.num_inputs, group.padded_rank))
        sizes += [
            (len(block.up.value), block.up.value.shape[1], group.padded_rank - block.up.value.shape[1]) for block in group.lora.blocks
        ]
    layers = s.shape.num_layers
    arena = Arena(sum(layers * rows * columns for rows, columns, _ in sizes), torch.float32, s.device)
    arena.gradients.normal_()
    places = [(layers * rows, columns + room) for rows, columns, room in sizes]
    buffer = s.random(sum(rows * columns for rows, columns in places))  # one, so that the optimizer's anchor keeps all of it alive
    pieces = torch.split(buffer, [rows * columns for rows, columns in places])
    values = [piece.view(place)[:, :columns] for piece, place, (_, columns, _) in zip(pieces, places, sizes, strict=True)]
    return arena, [Weight(value, arena.take(*value.shape)) for value in values]


def _ranks(group: Linear) -> int:
    assert group.lora is not None
    return len(group.lora.down.value)


ROWS: Mapping[str, Callable[[Setting], Row]] = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "swiglu_gradients": _swiglu_gradients,
    **HEAD_ROWS,
    "cross_entropy": _cross_entropy,
    "embed": _embed,
    "outer_dA": _outer_down,
    "outer_dB": _outer_up,
    "adamw": _adamw,
    "decode_nf4": _decode_nf4,
    "copy_parts": _copy_parts,
    **FULL_ROWS,
    **attention_rows(),
    **fp8_rows(),
}
