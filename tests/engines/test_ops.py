"""Every reference operation, forward and backward, against torch's own functions and autograd in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.native.ops import HeadNorms, Heads, NormSource
from engines.native.packed import Packed
from engines.native.reference import REFERENCE, as_input
from engines.native.weights import Block, Linear, LowRank, Part, Weight

LENGTHS = (1, 5, 3)
TOKENS = sum(LENGTHS)
EPSILON = 1e-5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def random(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def trained(value: Tensor, dtype: torch.dtype = torch.float64) -> Weight:
    """A weight with a master and a zeroed gradient beside its value."""
    master = value.clone()
    master.grad = torch.zeros_like(master)
    return Weight(value.to(dtype), master)


def weight(*size: int) -> Weight:
    return trained(random(*size))


def whole(weights: Weight, bias: Weight | None = None) -> Linear:
    """One linear without adapters."""
    return Linear(weights.value, weights, bias, (Part("a", slice(0, len(weights.value))),))


def packed(angles: Tensor) -> Packed:
    nothing = torch.empty(0, dtype=torch.int64)
    return Packed(nothing, angles.cos(), angles.sin(), LENGTHS, nothing, nothing, nothing, max(LENGTHS), nothing, nothing)


def autograd(function: Callable[..., Tensor], dy: Tensor, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    y = function(*leaves)
    y.backward(dy)
    return y.detach(), tuple(leaf.grad for leaf in leaves if leaf.grad is not None)


def gradient(each: Weight) -> Tensor:
    assert each.gradient is not None
    return each.gradient


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [(TOKENS, 6), (TOKENS, 3, 6)], ids=["rows", "heads"])
def test_plain_norm(size: tuple[int, ...]) -> None:
    x, dy, w = random(*size), random(*size), weight(6)
    y, (dx, dw) = autograd(lambda x, w: F.rms_norm(x, (6,), w, EPSILON), dy, x, w.value)
    same(REFERENCE.plain_norm(x, w, EPSILON), y)
    same(REFERENCE.plain_norm_backward(dy, x, w, EPSILON), dx)
    same(gradient(w), dw)


def test_norm_as_an_input_and_its_backward_with_a_residual() -> None:
    x, dy, residual, w = random(TOKENS, 6), random(TOKENS, 6), random(TOKENS, 6), weight(6)
    y, (dx, dw) = autograd(lambda x, w: F.rms_norm(x, (6,), w, EPSILON), dy, x, w.value)
    made = REFERENCE.norm(x, None, w, EPSILON, whole(weight(5, 6)))
    same(made.input.wide, y)
    assert made.input.low is None
    summed = REFERENCE.norm(x - residual, residual, w, EPSILON, whole(weight(5, 6)))
    same(summed.x, x)
    same(summed.input.wide, y)
    found = REFERENCE.norm_backward(dy, x, made.inverse, w, residual, 3)
    same(found[:, :6], dx + residual)
    assert not found[:, 6:].any()
    same(REFERENCE.norm_backward(dy, x, made.inverse, w, None, 0), dx)
    same(gradient(w), 2 * dw)


def test_norm_keeps_the_dtype_and_a_frozen_weight_takes_no_gradient() -> None:
    x = torch.randn(4, 6).bfloat16()
    frozen = Weight(torch.ones(6, dtype=torch.bfloat16))
    assert REFERENCE.plain_norm(x, frozen, EPSILON).dtype == torch.bfloat16
    assert REFERENCE.plain_norm_backward(x, x, frozen, EPSILON).dtype == torch.bfloat16
    assert frozen.gradient is None


def test_rotation_and_its_inverse() -> None:
    q, k, v, angles = random(TOKENS, 3, 8), random(TOKENS, 1, 8), random(TOKENS, 1, 8), random(TOKENS, 4)

    def turned(x: Tensor) -> Tensor:
        product = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(product).movedim(-1, -2).flatten(-2)

    heads = Heads(q.clone(), k.clone(), v.clone())
    assert REFERENCE.rotate(heads, None, packed(angles)).queries is heads.queries, "in place"
    same(heads.queries, turned(q))
    same(heads.keys, turned(k))
    same(heads.values, v)
    back = REFERENCE.rotate_back(heads, None, None, packed(angles), 2)
    same(back[:, :-2], torch.cat((q, k, v), dim=1).flatten(1))
    assert not back[:, -2:].any()


def test_rotation_of_normed_heads() -> None:
    q, k, v, angles = random(TOKENS, 3, 8), random(TOKENS, 1, 8), random(TOKENS, 1, 8), random(TOKENS, 4)
    dq, dk, dv = random(TOKENS, 3, 8), random(TOKENS, 1, 8), random(TOKENS, 1, 8)
    norms = HeadNorms(weight(8), weight(8), EPSILON)

    def both(x: Tensor, w: Tensor) -> Tensor:
        first, second = F.rms_norm(x, (8,), w, EPSILON).chunk(2, -1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    projected = Heads(q.clone(), k.clone(), v)
    made = REFERENCE.rotate(projected, norms, packed(angles))
    found = REFERENCE.rotate_back(Heads(dq, dk, dv), projected, norms, packed(angles), 2)
    for x, dy, w, ours, columns in ((q, dq, norms.query, made.queries, slice(0, 24)), (k, dk, norms.key, made.keys, slice(24, 32))):
        y, (dx, dw) = autograd(both, dy, x, w.value)
        same(ours, y)
        same(found[:, columns], dx.flatten(1))
        same(gradient(w), dw)
    same(projected.queries, q)
    same(found[:, 32:-2], dv.flatten(1))
    assert made.values is v


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (6, 1)])
def test_attention(heads: int, kv_heads: int) -> None:
    q, k, v, dy = random(TOKENS, heads, 4), random(TOKENS, kv_heads, 4), random(TOKENS, kv_heads, 4), random(TOKENS, heads, 4)
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    visible = (document[:, None] == document) & torch.ones(TOKENS, TOKENS).tril().bool()

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / 2.0
        return torch.einsum("hij,jhd->ihd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)

    y, expected = autograd(masked, dy, q, k, v)
    row = packed(random(TOKENS, 2))
    attended = REFERENCE.attention(Heads(q, k, v), row, whole(weight(3, heads * 4)))
    same(attended.input.wide, y.flatten(1))
    found = REFERENCE.attention_backward(dy, Heads(q, k, v), attended, row)
    for each, right in zip((found.queries, found.keys, found.values), expected, strict=True):
        same(each, right)


def test_swiglu() -> None:
    gate_up, dy = random(TOKENS, 10), random(TOKENS, 5)
    y, (expected,) = autograd(lambda x: F.silu(x[:, :5]) * x[:, 5:], dy, gate_up)
    same(REFERENCE.swiglu(gate_up, whole(weight(3, 5))).wide, y)
    down, d_y = whole(weight(3, 5)), random(TOKENS, 3)
    found = REFERENCE.swiglu_backward(dy, gate_up, d_y, None, down, whole(weight(10, 6)))
    same(found, expected)
    same(gradient(down.weight), d_y.t() @ y)


def test_full_linear_with_bias() -> None:
    x, dy = random(TOKENS, 6), random(TOKENS, 5)
    group = whole(weight(5, 6), weight(5))
    assert group.bias is not None
    y, (dx, dw, db) = autograd(F.linear, dy, x, group.weight.value, group.bias.value)
    for room in (0, 2):
        same(REFERENCE.linear(as_input(x, group), group, room), y)
    REFERENCE.fill(dy, group)  # nothing to fill
    same(REFERENCE.input_gradient(dy, group), dx)
    REFERENCE.weight_gradients(dy, x, group)
    REFERENCE.up_gradients(dy, None, group)  # nothing to add
    same(gradient(group.weight), dw)
    same(gradient(group.bias), db)
    w, inverse = weight(6), random(TOKENS)
    REFERENCE.weight_gradients(dy, NormSource(x, inverse, w), group)
    same(gradient(group.weight), dw + dy.t() @ (x * inverse[:, None] * w.value))


def test_a_group_of_three_linears_two_of_them_adapted() -> None:
    x, dy, base = random(TOKENS, 6), random(TOKENS, 10), random(10, 6)
    wide = torch.zeros(10 + 5, 6 + 5, dtype=torch.float64)  # four ranks, padded to five
    wide[:10, :6] = base
    down, first, third = random(4, 6), random(4, 2), random(3, 2)
    wide[10:14, :6], wide[:4, 6:8], wide[7:10, 8:10] = down, first, third
    blocks = (
        Block("a", slice(0, 4), slice(0, 2), trained(wide[:4, 6:8])),
        Block("c", slice(7, 10), slice(2, 4), trained(wide[7:10, 8:10])),
    )
    nothing = torch.empty(0)
    lora = LowRank(trained(wide[10:14, :6]), nothing, blocks, 2.5, nothing)
    group = Linear(wide, Weight(wide[:10, :6]), None, (Part("a", slice(0, 4)), Part("b", slice(4, 7)), Part("c", slice(7, 10))), lora)

    def plain(x: Tensor, down: Tensor, first: Tensor, third: Tensor) -> Tensor:
        a, c = x @ down[:2].t() @ first.t(), x @ down[2:].t() @ third.t()
        return x @ base.t() + 2.5 * torch.cat((a, torch.zeros(TOKENS, 3, dtype=x.dtype), c), dim=1)

    y, (dx, d_down, d_first, d_third) = autograd(plain, dy, x, down, first, third)
    made = as_input(x, group)
    same(REFERENCE.linear(made, group, 0), y)
    filled = F.pad(dy, (0, 5))
    REFERENCE.fill(filled, group)
    same(REFERENCE.input_gradient(filled, group), dx)
    REFERENCE.weight_gradients(filled, x, group)
    REFERENCE.up_gradients(filled, made.low, group)
    same(gradient(lora.down), d_down)
    same(gradient(blocks[0].up), d_first)
    same(gradient(blocks[1].up), d_third)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_cross_entropy(chunk: int) -> None:
    hidden, head, targets = random(TOKENS, 6), weight(11, 6), torch.randint(0, 11, (TOKENS,))
    targets[2] = -100
    expected = F.cross_entropy(hidden @ head.value.t(), targets, reduction="none")
    summed = 0.25 * torch.ones((), dtype=torch.float64)
    _, (dx, dw) = autograd(lambda x, w: F.cross_entropy(x @ w.t(), targets, reduction="sum"), summed, hidden, head.value)
    losses, d_hidden = REFERENCE.cross_entropy(hidden, head, targets, torch.tensor(0.25), chunk)
    same(losses, expected)
    same(d_hidden, dx)
    same(gradient(head), dw)


def test_cross_entropy_of_no_row_is_empty() -> None:
    losses, d_hidden = REFERENCE.cross_entropy(random(0, 6), weight(11, 6), torch.zeros(0, dtype=torch.int64), torch.tensor(1.0), 4)
    assert losses.shape == (0,)
    assert d_hidden.shape == (0, 6)


def test_a_gradient_in_another_dtype_than_its_master_is_added() -> None:
    group = whole(trained(torch.randn(5, 6), torch.bfloat16))
    x, dy = torch.randn(TOKENS, 6).bfloat16(), torch.randn(TOKENS, 5).bfloat16()
    REFERENCE.weight_gradients(dy, x, group)
    assert group.weight.value.dtype == torch.bfloat16
    assert gradient(group.weight).dtype == torch.float32
    torch.testing.assert_close(gradient(group.weight), dy.float().t() @ x.float(), rtol=2e-2, atol=2e-2)
