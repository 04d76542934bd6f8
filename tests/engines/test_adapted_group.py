"""The fused operations of an adapted linear group, from norm to gradients, against the reference operations in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engines.native import fused_ops, reference
from engines.native.ops import Input, NormSource
from engines.native.weights import Arena, Block, Linear, LowRank, Part, Weight
from tests.engines.oracle import DEVICE, EPSILON, INTERPRETED, judged, random

pytestmark = INTERPRETED


def group(num_inputs: int, outputs: Sequence[int], rank: int, dtype: torch.dtype, padded: int) -> Linear:
    """A group of linears, the second not adapted, with its buffer and arena."""
    total, adapted = sum(outputs), [index for index in range(len(outputs)) if index != 1]
    wide = torch.zeros(total + padded, num_inputs + padded, dtype=dtype, device=DEVICE)
    wide[:total, :num_inputs] = 0.1 * random(total, num_inputs)
    arena = Arena(rank * (len(adapted) * num_inputs + sum(outputs[index] for index in adapted)), torch.float32, DEVICE)
    ranks = rank * len(adapted)
    down = Weight(wide[total : total + ranks, :num_inputs], arena.take(ranks, num_inputs).normal_())
    parts, blocks, start = [], [], 0
    for index, size in enumerate(outputs):
        rows = slice(start, start := start + size)
        parts.append(Part(str(index), rows))
        if index in adapted:
            columns = slice(len(blocks) * rank, (len(blocks) + 1) * rank)
            value = wide[rows, num_inputs + columns.start : num_inputs + columns.stop]
            blocks.append(Block(str(index), rows, columns, Weight(value, arena.take(size, rank).normal_())))
    for weight in (down, *(block.up for block in blocks)):
        weight.publish()
    bias = Weight(random(total).to(dtype))
    return Linear(wide, Weight(wide[:total, :num_inputs]), bias, tuple(parts), LowRank(down, tuple(blocks), 2.5))


def doubled(linear: Linear) -> Linear:
    """The same group in float64, sharing nothing."""
    assert linear.lora is not None
    assert linear.bias is not None
    wide, total, inputs = linear.wide.double(), linear.num_outputs, linear.num_inputs

    def trained(value: Tensor) -> Weight:
        master = value.clone()
        master.grad = torch.zeros_like(master)
        return Weight(value, master)

    ranks = len(linear.lora.down.value)
    blocks = tuple(
        Block(block.name, block.output, block.rank, trained(wide[block.output, inputs + block.rank.start : inputs + block.rank.stop]))
        for block in linear.lora.blocks
    )
    lora = LowRank(trained(wide[total : total + ranks, :inputs]), blocks, linear.lora.scale)
    return Linear(wide, Weight(wide[:total, :inputs]), Weight(linear.bias.value.double()), linear.parts, lora)


def grad(weight: Weight) -> Tensor:
    assert weight.gradient is not None
    return weight.gradient


def test_an_adapted_group(dtype: torch.dtype) -> None:
    linear = group(40, (24, 8, 32), 4, dtype, padded=16)
    truth = doubled(linear)
    x, dy, add = random(33, 40, dtype=dtype), random(33, 64, dtype=dtype), random(33, 64, dtype=dtype)
    w, residual_norm = Weight((1 + 0.1 * random(40)).to(dtype)), Weight((1 + 0.1 * random(40)).double())
    residual_norm = Weight(w.value.double())
    made, right = fused_ops.norm(x, w, EPSILON, linear), reference.norm(x.double(), residual_norm, EPSILON, truth)
    usual = reference.norm(x, w, EPSILON, linear)
    judged(made.input.wide, usual.input.wide, right.input.wide)
    for added in (None, add):
        wide = None if added is None else added.double()
        y = fused_ops.linear(made.input, linear, added, 8)
        judged(y, reference.linear(usual.input, linear, added, 0), reference.linear(right.input, truth, wide, 0))
    dys = [torch.nn.functional.pad(each, (0, 16)) for each in (dy, dy.clone(), dy.double())]
    fused_ops.fill(dys[0], linear)
    reference.fill(dys[1], linear)
    reference.fill(dys[2], truth)
    judged(*dys)
    judged(*(reference.input_gradient(each, of) for each, of in zip(dys, (linear, linear, truth), strict=True)))
    assert linear.lora is not None
    assert truth.lora is not None
    fused_ops.weight_gradients(dys[0], NormSource(x, made.inverse, w), made.input.low, linear)
    ours = [grad(linear.lora.down).clone(), *(grad(block.up).clone() for block in linear.lora.blocks)]
    for weight in (linear.lora.down, *(block.up for block in linear.lora.blocks)):
        grad(weight).zero_()
    reference.weight_gradients(dys[1], NormSource(x, usual.inverse, w), usual.input.low, linear)
    reference.weight_gradients(dys[2], NormSource(x.double(), right.inverse, residual_norm), right.input.low, truth)
    theirs = [grad(linear.lora.down), *(grad(block.up) for block in linear.lora.blocks)]
    expected = [grad(truth.lora.down), *(grad(block.up) for block in truth.lora.blocks)]
    for triple in zip(ours, theirs, expected, strict=True):
        judged(*triple, dtype)


def test_inputs_without_adapters_pass_through() -> None:
    x = random(3, 6)
    weight = Weight(random(5, 6))
    frozen = Linear(weight.value, weight, None, ())
    made = fused_ops.norm(x, Weight(torch.ones(6, device=DEVICE)), EPSILON, frozen)
    assert made.input.low is None
    torch.testing.assert_close(fused_ops.linear(Input(x, None), frozen, None, 0), x @ weight.value.t())
