"""The kernels between the projection of heads and attention against float64: rotation, with and without norms."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engines.native import fused_ops, reference
from engines.native.buckets import longest_asked_for
from engines.native.ops import HeadNorms, Heads
from engines.native.packed import Packed, bounds
from engines.native.weights import Weight
from tests.engines.oracle import DEVICE, EPSILON, INTERPRETED, judged, random

pytestmark = INTERPRETED


def double(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def packed(lengths: Sequence[int], half: int) -> Packed:
    positions = torch.cat([torch.arange(length) for length in lengths]).to(DEVICE)
    angles = positions[:, None] * torch.rand(half, device=DEVICE)
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    begins, ends = (torch.from_numpy(each).to(DEVICE) for each in bounds(lengths))
    return Packed(nothing, angles.cos(), angles.sin(), tuple(lengths), starts, begins, ends, longest_asked_for(lengths), nothing, nothing)


def heads_of(qkv: Tensor, heads: int, kv_heads: int, head_dim: int) -> list[Tensor]:
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    return [part.unflatten(1, (-1, head_dim)) for part in qkv.split(sizes, 1)]


def head_norms(head_dim: int, dtype: torch.dtype) -> tuple[HeadNorms, HeadNorms]:
    weights = random(head_dim, dtype=dtype), random(head_dim, dtype=dtype)
    return HeadNorms(*map(Weight, weights), EPSILON), HeadNorms(*map(Weight, double(*weights)), EPSILON)


def of(heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    return heads.queries, heads.keys, heads.values


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 6), (9, 3, 64), (16, 8, 16)])
@pytest.mark.parametrize("normed", [False, True])
def test_rotary(heads: int, kv_heads: int, head_dim: int, normed: bool, dtype: torch.dtype) -> None:
    row = packed((4, 1, 6), head_dim // 2)
    columns = (heads + 2 * kv_heads) * head_dim
    qkv = random(11, columns, dtype=dtype, room=8)
    split = heads_of(qkv, heads, kv_heads, head_dim)
    norms, wide = head_norms(head_dim, dtype) if normed else (None, None)
    gradients = Heads(*(torch.randn_like(part, memory_format=torch.contiguous_format) for part in split))
    expected = reference.rotate_back(Heads(*double(*of(gradients))), Heads(*double(*split)), wide, row, 0)
    usual = reference.rotate_back(gradients, Heads(*split), norms, row, 0)
    back = fused_ops.rotate_back(gradients, Heads(*split), norms, row, 4)
    judged(back[:, :columns], usual, expected)
    assert (back[:, columns:] == 0).all()
    truth = reference.rotate(Heads(*double(*split)), wide, row)
    plain = reference.rotate(Heads(*(part.clone() for part in split)), norms, row)
    found = fused_ops.rotate(Heads(*split), norms, row)
    for ours, theirs, right in zip(*map(of, (found, plain, truth)), strict=True):
        judged(ours, theirs, right)


def test_heads_that_lie_apart_are_refused() -> None:
    split = [part.clone() for part in heads_of(random(3, 40), 3, 1, 8)]
    with pytest.raises(ValueError, match="expected views of one projection"):
        fused_ops.rotate(Heads(*split), None, packed((3,), 4))
