"""What a row of the table is, and the tensors that rows are made of: one layer's weights and random activations.

Legend: T tokens, P padded ranks of a linear group, C query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engines.native.bench import random_weights
from engines.native.buckets import longest_asked_for
from engines.native.loader import Placement
from engines.native.ops import HeadNorms, Heads
from engines.native.packed import Angles, Packed, bounds
from engines.native.shape import LlamaShape
from engines.native.weights import LayerWeights, Linear, Weight

DOCUMENT = 2048  # tokens of an even document
_SHORT = 188, 81, 333, 150, 239, 113, 205


@dataclass(frozen=True, slots=True)
class Call:
    """Something to time. ``reset`` puts back what a call overwrites; its time does not count."""

    run: Callable[[], object]
    reset: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A kernel at one size. ``num_bytes`` and ``flops`` are the least that any implementation moves and computes.

    ``kernel``: the public function that ``ours`` launches. ``liger`` imports Liger when it is called.
    """

    kernel: Callable[..., object]
    size: str
    ours: Call
    reference: Call
    num_bytes: int
    flops: int = 0
    is_compiled: bool = True
    liger: Callable[[], Call] | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """A model's shape, one of its layers, and how many tokens pass through it."""

    shape: LlamaShape
    layer: LayerWeights
    tokens: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, shape: LlamaShape, tokens: int, device: torch.device, dtype: torch.dtype) -> Setting:
        """With random weights, adapters of rank 16 on all linears."""
        small = replace(shape, num_layers=1, vocab_size=8)
        weights = random_weights(small, Placement(device, dtype, torch.float32, 64))
        return cls(shape, weights.layers[0], tokens, device, dtype)

    @property
    def item(self) -> int:
        """Bytes of one activation."""
        return self.dtype.itemsize

    @property
    def even(self) -> tuple[int, ...]:
        """Documents of equal length."""
        return (DOCUMENT,) * (self.tokens // DOCUMENT) if self.tokens > DOCUMENT else (self.tokens,)

    @property
    def uneven(self) -> tuple[int, ...]:
        """A half, a quarter, an eighth of the tokens, and the rest."""
        lengths = self.tokens // 2, self.tokens // 4, self.tokens // 8
        return (*lengths, self.tokens - sum(lengths))

    @property
    def short(self) -> tuple[int, ...]:
        """Documents as long as questions and answers are, 80 to 333 tokens, in an order that repeats; the last is what is left."""
        lengths: list[int] = []
        for length in itertools.cycle(_SHORT):
            if sum(lengths) + length >= self.tokens:
                return (*lengths, self.tokens - sum(lengths))
            lengths.append(length)
        raise AssertionError("a cycle ends")

    def random(self, *size: int, room: int = 0) -> Tensor:
        """Normal values whose rows lie ``room`` elements apart in memory."""
        wide = torch.randn(*size[:-1], size[-1] + room, device=self.device, dtype=self.dtype)
        return wide[..., : size[-1]]

    def packed(self, lengths: Sequence[int]) -> Packed:
        """The angles and starts of documents of ``lengths``; no tokens and no targets."""
        angles = Angles.of(self.shape, max(lengths), self.device)
        positions = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        starts = torch.tensor([0, *lengths]).cumsum(0).to(self.device, torch.int32)
        begins, ends = (torch.from_numpy(each).to(self.device) for each in bounds(lengths))
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        turned = angles.cosine[positions], angles.sine[positions]
        return Packed(nothing, *turned, tuple(lengths), starts, begins, ends, longest_asked_for(lengths), nothing, nothing)

    def heads(self) -> Heads:
        """Queries, keys and values as views of one projected buffer, as in a step."""
        shape = self.shape
        qkv = self.random(self.tokens, shape.query_size + 2 * shape.key_size)
        q, k, v = (x.view(self.tokens, -1, shape.head_dim) for x in torch.split(qkv, [shape.query_size, shape.key_size, shape.key_size], 1))
        return Heads(q, k, v)

    def head_norms(self) -> HeadNorms:
        """Norms of queries and keys, also for shapes that have none."""
        query, key = (Weight(self.random(self.shape.head_dim)) for _ in range(2))
        return HeadNorms(query, key, self.shape.norm_epsilon)

    def head_gradients(self) -> Heads:
        """As attention's backward leaves them: each contiguous."""
        shape, tokens = self.shape, self.tokens
        counts = shape.num_heads, shape.num_kv_heads, shape.num_kv_heads
        return Heads(*(self.random(tokens, count, shape.head_dim) for count in counts))


def bare(columns: int, setting: Setting) -> Linear:
    """A linear without adapters for operations that ask for the group behind them."""
    weight = Weight(torch.zeros(1, columns, device=setting.device, dtype=setting.dtype))
    return Linear(weight.value, weight, None, ())


def restore(target: Tensor) -> Callable[[], object]:
    """Puts back the values that ``target`` has now."""
    before = target.detach().clone()

    def put_back() -> None:
        with torch.no_grad():
            target.copy_(before)

    return put_back


def by(*sizes: int) -> str:
    """``8,192 × 4,096``."""
    return " × ".join(f"{size:,}" for size in sizes)
