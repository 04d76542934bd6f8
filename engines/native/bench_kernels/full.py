"""The rows of the kernels that only a full fine-tune launches: a layer's weights by either optimizer, and its norms.

Legend: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engines.native import optimizer, reference
from engines.native.bench import SCHEDULE
from engines.native.bench_kernels.setting import Call, Row, Setting, bare, by
from engines.native.eight_bit import PlainEightBit
from engines.native.full import PlainFloat32
from engines.native.kernels.adamw_full import EightBitKernel, Float32Kernel
from engines.native.kernels.norm_weight import norm_weight_gradient, normed_again
from engines.native.store import BLOCK, Store

_FP32 = 4


def _norm_weight(s: Setting) -> Row:
    tokens, hidden = s.tokens, s.shape.hidden_size
    x, dy, inverse = s.random(tokens, hidden), s.random(tokens, hidden), _inverse(s)
    return Row(
        kernel=norm_weight_gradient,
        size=by(tokens, hidden),
        ours=Call(lambda: norm_weight_gradient(dy, x, inverse)),
        reference=Call(lambda: (dy.float() * (x.float() * inverse.unsqueeze(1))).sum(0)),
        num_bytes=2 * s.item * tokens * hidden + _FP32 * (tokens + hidden),
    )


def _normed_again(s: Setting) -> Row:
    tokens, hidden, weight, inverse = s.tokens, s.shape.hidden_size, s.layer.mlp_norm.value, _inverse(s)
    x = s.random(tokens, hidden)
    return Row(
        kernel=normed_again,
        size=by(tokens, hidden),
        ours=Call(lambda: normed_again(x, weight, inverse)),
        reference=Call(lambda: (x.float() * inverse.unsqueeze(1)).to(x.dtype) * weight),
        num_bytes=s.item * (2 * tokens * hidden + hidden) + _FP32 * tokens,
    )


def _inverse(s: Setting) -> Tensor:
    x = s.random(s.tokens, s.shape.hidden_size)
    return reference.norm(x, None, s.layer.mlp_norm, s.shape.norm_epsilon, bare(s.shape.hidden_size, s)).inverse


def _adamw_float32(s: Setting) -> Row:
    count, gradients, scalars = _layer(s)
    masters = torch.randn(count, device=s.device)
    values, other = torch.empty(count, dtype=s.dtype, device=s.device), masters.clone()
    ours, plain = Float32Kernel(masters, values, SCHEDULE), PlainFloat32(other, values, SCHEDULE)
    return Row(
        kernel=Float32Kernel,
        size=by(count),
        ours=Call(lambda: ours.update(slice(0, count), gradients, scalars)),
        reference=Call(lambda: plain.update(slice(0, count), gradients, scalars)),
        num_bytes=count * (7 * _FP32 + s.item),
    )


def _adamw_eight_bit(s: Setting) -> Row:
    """The reference takes float64 and many passes: it is there to be right."""
    count, gradients, scalars = _layer(s)
    weights = torch.randn(count, device=s.device).bfloat16()
    ours, plain = EightBitKernel(weights, SCHEDULE), PlainEightBit(weights.clone(), SCHEDULE)
    return Row(
        kernel=EightBitKernel,
        size=by(count),
        ours=Call(lambda: ours.update(slice(0, count), gradients, scalars)),
        reference=Call(lambda: plain.update(slice(0, count), gradients, scalars)),
        num_bytes=count * (_FP32 + 2 * 2 + 2 * 2) + count // BLOCK * 4 * _FP32,
        is_compiled=False,
    )


def _layer(s: Setting) -> tuple[int, Tensor, Tensor]:
    """How many values the linears of a layer have, random gradients of them, a step's values."""
    count = sum(Store.room(group.num_outputs * group.num_inputs) for group in s.layer.groups)
    return count, torch.randn(count, device=s.device), torch.tensor(optimizer.step_scalars(SCHEDULE, 0, 1), device=s.device)


FULL_ROWS: Mapping[str, Callable[[Setting], Row]] = {
    "norm_weight": _norm_weight,
    "normed_again": _normed_again,
    "adamw_float32": _adamw_float32,
    "adamw_eight_bit": _adamw_eight_bit,
}
