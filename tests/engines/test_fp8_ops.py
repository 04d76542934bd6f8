"""The fused operations on 8-bit linear groups against their definition; without a GPU the product of codes is emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engines.native import fp8_ops, fp8_reference
from engines.native.fp8 import Fp8Weight, Mode
from engines.native.ops import Input, Ops
from engines.native.turns import SharedBuffers
from engines.native.weights import Block, Linear, LowRank, Part, Weight
from tests.engines.oracle import DEVICE, EPSILON, GPU, INTERPRETED, random
from tests.engines.test_fp8 import MODES

pytestmark = [INTERPRETED, pytest.mark.skipif(GPU, reason="tests/engines/test_fp8_gpu.py has the real products")]
TOKENS, RANKS = 19, 16


@pytest.fixture(autouse=True)
def _product_of_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **_: Any) -> Tensor:
        assert a.is_contiguous()
        assert b.stride(0) == 1
        assert scale_a.shape == (len(a), 1)
        assert scale_a.data_ptr() % 16 == 0
        assert len(a) % 16 == 0
        assert scale_b.shape == (1, b.shape[1])
        assert not any(size % 16 for size in b.shape)
        return (a.float() @ b.float()) * scale_a * scale_b

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)


def adapted(outputs: int, inputs: int, mode: Mode, room: int) -> Linear:
    fp8 = Fp8Weight.of(0.1 * random(outputs, inputs), mode, "group", SharedBuffers(), room, torch.float32)
    codes = fp8.forward.plain[:outputs]
    parts = (Part("group", slice(0, outputs)),)
    if not room:
        return Linear(codes, Weight(codes), None, parts, fp8=fp8)
    fp8.up[:, :RANKS], fp8.down[:RANKS] = 0.02 * random(outputs, RANKS), 0.1 * random(RANKS, inputs)
    block = Block("group", slice(0, outputs), slice(0, RANKS), Weight(fp8.up[:, :RANKS]))
    lora = LowRank(Weight(fp8.down[:RANKS]), fp8.up[:, :RANKS], (block,), 2.0, torch.zeros(8, dtype=torch.int32, device=DEVICE))
    return Linear(codes, Weight(codes), Weight(random(outputs)), parts, lora, fp8=fp8)


def near(found: Tensor, right: Tensor, most: float = 2e-3) -> None:
    assert found.shape == right.shape
    assert (found - right).norm() < most * right.norm()


@pytest.mark.parametrize("room", [0, 16, 32])
@pytest.mark.parametrize("mode", MODES)
def test_products(mode: Mode, room: int) -> None:
    linear = adapted(32, 48, mode, room)
    assert linear.fp8 is not None
    assert linear.padded_rank == room
    for _ in range(2):  # what an optimizer has changed is written behind the codes again
        linear.fp8.shared.forget()
        x, dy = random(TOKENS, 48 + room), random(TOKENS, 32 + room)
        y = fp8_ops.linear(Input(x, None), linear, room)
        near(y, fp8_reference.linear(Input(x, None), linear, 0))
        assert y.stride(0) == 32 + room
        if room:
            fp8_ops.fill(dy, linear)
            near(dy[:, 32 : 32 + RANKS], 2.0 * dy[:, :32] @ linear.fp8.up[:, :RANKS])
            assert not dy[:, 32 + RANKS :].any()
        near(fp8_ops.input_gradient(dy, linear), fp8_reference.input_gradient(dy, linear))
        linear.fp8.up.mul_(3.0)
        linear.fp8.down.mul_(0.5)


@pytest.mark.parametrize("room", [0, 16, 32])
def test_inputs(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, delta = Weight(1 + 0.1 * random(48)), random(TOKENS, 48), random(TOKENS, 48)
    linear = adapted(32, 48, "forward", room)
    assert linear.fp8 is not None
    linear.fp8.shared.forget()

    def made(ops: Ops) -> tuple[Input, Input]:
        return ops.norm(x, delta, weight, EPSILON, linear).input, ops.swiglu(random_gate_up, linear)

    random_gate_up = random(TOKENS, 96)
    mine, right = made(fp8_ops.FUSED_FP8), made(fp8_reference.REFERENCE_FP8)
    monkeypatch.setattr(fp8_ops, "MAX_ROW", 47)
    mine = (*mine, fp8_ops.swiglu(random_gate_up, linear))
    assert [each.scales is None for each in mine] == [False, False, True]
    part = slice(3, None)  # a piece of the rows, whose scales begin anywhere
    pieces = [Input(each.wide[part], None, None if each.scales is None else each.scales[part]) for each in mine]
    for found, each in zip(pieces, mine, strict=True):
        near(fp8_ops.linear(found, linear, 0), fp8_ops.linear(each, linear, 0)[part], 1e-6)
    for found, expected in zip(mine, (*right, right[1]), strict=True):
        near(fp8_ops.linear(found, linear, 0), fp8_reference.linear(expected, linear, 0))
        if room:
            assert found.low is not None
            assert expected.low is not None
            near(found.low, expected.low, 1e-5)
