"""The fused operations of an adapted linear group, from norm to gradients, against the reference operations in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engines.native import fused_ops, reference
from engines.native.ops import Input, NormSource
from engines.native.weights import Arena, Block, Linear, LowRank, Part, Weight
from tests.engines.oracle import DEVICE, EPSILON, INTERPRETED, judged, random

pytestmark = INTERPRETED


def group(num_inputs: int, outputs: Sequence[int], adapted: Sequence[int], dtype: torch.dtype) -> Linear:
    """A group of linears, those ``adapted`` with rank 4, padded to 16 ranks."""
    total, rank, room = sum(outputs), 4, 16
    wide = torch.zeros(total + room, num_inputs + room, dtype=dtype, device=DEVICE)
    wide[:total, :num_inputs] = 0.1 * random(total, num_inputs)
    rows = [sum(outputs[:index]) for index in range(len(outputs) + 1)]
    parts = tuple(Part(str(index), slice(rows[index], rows[index + 1])) for index in range(len(outputs)))
    sizes = [outputs[index] for index in adapted]
    arena = Arena(rank * (len(adapted) * num_inputs + sum(sizes)), torch.float32, DEVICE)
    down = Weight(wide[total : total + rank * len(adapted), :num_inputs], arena.take(rank * len(adapted), num_inputs))
    up, start, blocks = arena.take(sum(sizes), rank), 0, []
    for index, size, part in zip(range(len(adapted)), sizes, (parts[index] for index in adapted), strict=True):
        columns = slice(index * rank, (index + 1) * rank)
        value = wide[part.rows, num_inputs + columns.start : num_inputs + columns.stop]
        blocks.append(Block(part.name, part.rows, columns, Weight(value, Arena.part(up, slice(start, start := start + size)))))
    arena.masters.normal_()
    for weight in (down, *(block.up for block in blocks)):
        weight.publish()
    arrived = torch.zeros(max(total, num_inputs) // 16 + 1, dtype=torch.int32, device=DEVICE)
    lora = LowRank(down, up, tuple(blocks), 2.5, arrived)
    return Linear(wide, Weight(wide[:total, :num_inputs]), Weight(random(total).to(dtype)), parts, lora)


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
    down = trained(wide[total : total + ranks, :inputs])
    lora = LowRank(down, linear.lora.up.double(), blocks, linear.lora.scale, linear.lora.arrived)
    return Linear(wide, Weight(wide[:total, :inputs]), Weight(linear.bias.value.double()), linear.parts, lora)


def grad(weight: Weight) -> Tensor:
    assert weight.gradient is not None
    return weight.gradient


@pytest.mark.parametrize(("outputs", "adapted"), [((24, 8, 32), (0, 2)), ((64, 64, 36), (0, 1, 2)), ((24, 8, 32), (0, 1, 2))])
def test_an_adapted_group(outputs: tuple[int, ...], adapted: tuple[int, ...], dtype: torch.dtype) -> None:
    linear = group(40, outputs, adapted, dtype)
    total = sum(outputs)
    truth = doubled(linear)
    x, dy = random(33, 40, dtype=dtype), random(33, total, dtype=dtype)
    w, residual_norm = Weight((1 + 0.1 * random(40)).to(dtype)), Weight((1 + 0.1 * random(40)).double())
    residual_norm = Weight(w.value.double())
    made, right = fused_ops.norm(x, None, w, EPSILON, linear), reference.norm(x.double(), None, residual_norm, EPSILON, truth)
    usual = reference.norm(x, None, w, EPSILON, linear)
    judged(made.input.wide, usual.input.wide, right.input.wide)
    judged(fused_ops.linear(made.input, linear, 8), reference.linear(usual.input, linear, 0), reference.linear(right.input, truth, 0))
    dys = [torch.nn.functional.pad(each, (0, 16)) for each in (dy, dy.clone(), dy.double())]
    fused_ops.fill(dys[0], linear)
    reference.fill(dys[1], linear)
    reference.fill(dys[2], truth)
    judged(*dys)
    judged(*(reference.input_gradient(each, of) for each, of in zip(dys, (linear, linear, truth), strict=True)))
    assert linear.lora is not None
    assert truth.lora is not None
    fused_ops.weight_gradients(dys[0], NormSource(x, made.inverse, w), linear)
    fused_ops.up_gradients(dys[0], made.input.low, linear)
    ours = [grad(linear.lora.down).clone(), *(grad(block.up).clone() for block in linear.lora.blocks)]
    for weight in (linear.lora.down, *(block.up for block in linear.lora.blocks)):
        grad(weight).zero_()
    reference.weight_gradients(dys[1], NormSource(x, usual.inverse, w), linear)
    reference.up_gradients(dys[1], usual.input.low, linear)
    reference.weight_gradients(dys[2], NormSource(x.double(), right.inverse, residual_norm), truth)
    reference.up_gradients(dys[2], right.input.low, truth)
    theirs = [grad(linear.lora.down), *(grad(block.up) for block in linear.lora.blocks)]
    expected = [grad(truth.lora.down), *(grad(block.up) for block in truth.lora.blocks)]
    for triple in zip(ours, theirs, expected, strict=True):
        judged(*triple, dtype)


def test_inputs_without_adapters_pass_through() -> None:
    x = random(3, 6)
    weight = Weight(random(5, 6))
    frozen = Linear(weight.value, weight, None, ())
    made = fused_ops.norm(x, None, Weight(torch.ones(6, device=DEVICE)), EPSILON, frozen)
    assert made.input.low is None
    torch.testing.assert_close(fused_ops.linear(Input(x, None), frozen, 0), x @ weight.value.t())
