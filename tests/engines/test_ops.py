"""Every reference operation, forward and backward, against torch's own functions and autograd in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.native.ops import REFERENCE, Heads
from engines.native.weights import Block, Linear, LowRank, Part, Weight, trained

LENGTHS = (1, 5, 3)
TOKENS = sum(LENGTHS)
EPSILON = 1e-5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def random(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def weight(*size: int) -> Weight:
    return trained(random(*size), torch.float64)


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
def test_rms_norm(size: tuple[int, ...]) -> None:
    x, dy, w = random(*size), random(*size), weight(6)
    y, (dx, dw) = autograd(lambda x, w: F.rms_norm(x, (6,), w, EPSILON), dy, x, w.value)
    same(REFERENCE.rms_norm(x, w, EPSILON), y)
    same(REFERENCE.rms_norm_backward(dy, x, w, EPSILON), dx)
    same(gradient(w), dw)


def test_rms_norm_keeps_the_dtype_and_a_frozen_weight_takes_no_gradient() -> None:
    x = torch.randn(4, 6).bfloat16()
    frozen = Weight(torch.ones(6, dtype=torch.bfloat16))
    assert REFERENCE.rms_norm(x, frozen, EPSILON).dtype == torch.bfloat16
    assert REFERENCE.rms_norm_backward(x, x, frozen, EPSILON).dtype == torch.bfloat16
    assert frozen.gradient is None


def test_rotation_and_its_inverse() -> None:
    x, angles = random(TOKENS, 3, 8), random(TOKENS, 4)
    turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.view_as_real(turned).movedim(-1, -2).flatten(-2)
    rotated = x.clone()
    REFERENCE.rotate_(rotated, angles.cos(), angles.sin())
    same(rotated, expected)
    REFERENCE.rotate_(rotated, angles.cos(), -angles.sin())
    same(rotated, x)


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
    attended = REFERENCE.attention(Heads(q, k, v), LENGTHS)
    same(attended.output, y)
    found = Heads(*(torch.full_like(x, float("nan")) for x in (q, k, v)))
    REFERENCE.attention_backward(dy, Heads(q, k, v), attended, LENGTHS, found)
    for each, right in zip((found.queries, found.keys, found.values), expected, strict=True):
        same(each, right)


def test_swiglu() -> None:
    gate_up, dy = random(TOKENS, 10), random(TOKENS, 5)
    y, (expected,) = autograd(lambda x: F.silu(x[:, :5]) * x[:, 5:], dy, gate_up)
    same(REFERENCE.swiglu(gate_up), y)
    same(REFERENCE.swiglu_backward(dy, gate_up), expected)


def test_full_linear_with_bias() -> None:
    x, dy = random(TOKENS, 6), random(TOKENS, 5)
    group = Linear(weight(5, 6), weight(5), (Part("a", slice(0, 5)),))
    assert group.bias is not None
    y, (dx, dw, db) = autograd(F.linear, dy, x, group.weight.value, group.bias.value)
    same(REFERENCE.linear(x, group, None), y)
    found = REFERENCE.linear_backward(dy, x, None, group, True)
    assert found is not None
    same(found, dx)
    same(gradient(group.weight), dw)
    same(gradient(group.bias), db)
    assert REFERENCE.linear_backward(dy, x, None, group, False) is None
    same(gradient(group.weight), 2 * dw)


def test_a_group_of_three_linears_two_of_them_adapted() -> None:
    x, dy, base = random(TOKENS, 6), random(TOKENS, 10), random(10, 6)
    blocks = (Block("a", slice(0, 4), slice(0, 2), slice(0, 4)), Block("c", slice(7, 10), slice(2, 4), slice(4, 7)))
    lora = LowRank(weight(4, 6), weight(7, 2), blocks, scale=2.5)
    group = Linear(Weight(base), None, (Part("a", slice(0, 4)), Part("b", slice(4, 7)), Part("c", slice(7, 10))), lora)

    def plain(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        a, c = x @ down[:2].t() @ up[:4].t(), x @ down[2:].t() @ up[4:].t()
        return x @ base.t() + 2.5 * torch.cat((a, torch.zeros(TOKENS, 3, dtype=x.dtype), c), dim=1)

    y, (dx, d_down, d_up) = autograd(plain, dy, x, lora.down.value, lora.up.value)
    low = REFERENCE.low_rank(x, lora)
    same(REFERENCE.linear(x, group, low), y)
    found = REFERENCE.linear_backward(dy, x, low, group, True)
    assert found is not None
    same(found, dx)
    same(gradient(lora.down), d_down)
    same(gradient(lora.up), d_up)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_cross_entropy(chunk: int) -> None:
    hidden, head, targets = random(TOKENS, 6), weight(11, 6), torch.randint(0, 11, (TOKENS,))
    expected = F.cross_entropy(hidden @ head.value.t(), targets, reduction="none")
    summed = 0.25 * torch.ones((), dtype=torch.float64)
    _, (dx, dw) = autograd(lambda x, w: F.cross_entropy(x @ w.t(), targets, reduction="sum"), summed, hidden, head.value)
    losses, d_hidden = REFERENCE.cross_entropy(hidden, head, targets, 0.25, chunk)
    same(losses, expected)
    same(d_hidden, dx)
    same(gradient(head), dw)


def test_cross_entropy_of_no_row_is_empty() -> None:
    losses, d_hidden = REFERENCE.cross_entropy(random(0, 6), weight(11, 6), torch.zeros(0, dtype=torch.int64), 1.0, 4)
    assert losses.shape == (0,)
    assert d_hidden.shape == (0, 6)


def test_a_gradient_in_another_dtype_than_its_master_is_added() -> None:
    group = Linear(trained(torch.randn(5, 6), torch.bfloat16), None, (Part("a", slice(0, 5)),))
    x, dy = torch.randn(TOKENS, 6).bfloat16(), torch.randn(TOKENS, 5).bfloat16()
    REFERENCE.linear_backward(dy, x, None, group, False)
    assert group.weight.value.dtype == torch.bfloat16
    assert gradient(group.weight).dtype == torch.float32
    torch.testing.assert_close(gradient(group.weight), dy.float().t() @ x.float(), rtol=2e-2, atol=2e-2)
