"""The decoder's weights: what the products read, what the optimizer updates, and the Hugging Face name of every part.

Legend: N output and K input columns of a linear group, V vocabulary, H hidden, R all ranks of a group together, P the same
rounded up to whole tiles, r one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engines.native.fp8 import Fp8Weight
from engines.native.gradient import Gradient, add_product_
from engines.native.store import Store
from engines.native.turns import SharedBuffers, Turn


@dataclass(frozen=True, slots=True)
class Weight:
    """``value`` is read by the products, in the compute dtype. ``master`` is what the optimizer updates, None when frozen.

    Both may be one tensor. ``master.grad`` is allocated once and lives as long as the weight; a weight of a store adds ``into`` its
    own place instead.
    """

    value: Tensor
    master: Tensor | None = None
    into: Gradient | None = None

    @property
    def gradient(self) -> Tensor | None:
        """The buffer that gradients are added to, None when frozen."""
        if self.into is not None:
            return self.into.buffer
        return None if self.master is None else self.master.grad

    def add_gradient(self, gradient: Tensor) -> None:
        """Add ``gradient`` of this weight's shape; for a frozen weight do nothing."""
        if self.into is not None:
            self.into.add(gradient)
        elif self.gradient is not None:
            self.gradient.add_(gradient)

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add left[T, M]^T right[T, N]; for a frozen weight do nothing."""
        if self.into is not None:
            self.into.add_product(left, right)
        elif self.gradient is not None:
            add_product_(self.gradient, left, right)

    def add_rows(self, rows: Tensor, gradients: Tensor) -> None:
        """Add ``gradients`` [T, N] to the rows [T] of this weight's, which may come more than once; for a frozen weight do nothing."""
        into = self.gradient if self.into is None else self.into.settled()
        if into is not None:
            into.index_add_(0, rows, gradients.to(into.dtype))

    def publish(self) -> None:
        """Hand an updated master to the products."""
        if self.master is not None and self.master is not self.value:
            self.value.copy_(self.master)


class Arena:
    """One flat buffer of masters and one of gradients, so that the optimizer and the norm see one tensor each."""

    overwrites = False  # gradients are added to what the update has zeroed, the first of a step like all others

    def __init__(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for ``num_elements`` trained values of ``dtype``, gradients zeroed."""
        self.masters = torch.zeros(num_elements, dtype=dtype, device=device)
        self.masters.grad = self.gradients = torch.zeros_like(self.masters)
        self._taken = 0

    @staticmethod
    def part(master: Tensor, rows: slice) -> Tensor:
        """Some rows of a master as a master of their own."""
        piece = master[rows]
        assert master.grad is not None
        piece.grad = master.grad[rows]
        return piece

    def take(self, *size: int) -> Tensor:
        """A master of ``size`` inside the arena, its ``grad`` the same place of the gradients."""
        start, self._taken = self._taken, self._taken + torch.Size(size).numel()
        if self._taken > len(self.masters):
            raise ValueError(f"the arena holds {len(self.masters)} values, {self._taken} were asked for")
        master = self.masters[start : self._taken].view(size)
        master.grad = self.gradients[start : self._taken].view(size)
        return master

    def settle(self) -> None:
        """Gradients are whole as they are."""

    def expect(self, *, empty: bool) -> None:
        """As ``Store.expect``; what is zeroed need not be told."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All buffers but the optimizer's."""
        return self.masters, self.gradients

    @property
    def state_bytes(self) -> int:
        """What the optimizer keeps beside them: two moments of the masters' type."""
        return 2 * self.masters.nbytes


@dataclass(frozen=True, slots=True)
class Part:
    """One linear of a group: its name in the layer (``self_attn.q_proj``) and its rows of the group's weight."""

    name: str
    rows: slice


@dataclass(frozen=True, slots=True)
class Block:
    """One adapted linear of a group: its output columns, its columns of x A^T, and its B [columns, r]."""

    name: str
    output: slice
    rank: slice
    up: Weight


@dataclass(frozen=True, slots=True)
class LowRank:
    """The adapters of a group (Hu et al. 2021): ``down`` is A [R, K] of all blocks; every block has its own B.

    ``up``: the masters of all B, one below the other; the blocks' masters are views of it. ``arrived``: counters for a kernel that
    adds partial sums, int32, zero between launches.
    """

    down: Weight
    up: Tensor
    blocks: tuple[Block, ...]
    scale: float
    arrived: Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """A group of linears that read the same input, as one product: ``weight`` [N, K], ``bias`` [N].

    ``wide`` [N + P, K + P] holds everything the products read: rows below N are [W | B], where each block's B stands in its own
    rank columns; rows from N are A. So [x | s x A^T] times the upper rows' transpose is the adapted output and [dy | s dy B]
    times the left columns the gradient of x, one product each; ``weight`` and the adapters are views of it. P is 0 without
    adapters. The lower right corner is zero and not read.

    ``turn``: the buffer is shared with the groups of other layers, and the weight is decoded into it when the products ask for it.
    ``fp8``: the products read that instead; ``buffer`` and ``weight`` are its codes [N, K].
    """

    buffer: Tensor
    weight: Weight
    bias: Weight | None
    parts: tuple[Part, ...]
    lora: LowRank | None = None
    turn: Turn | None = None
    fp8: Fp8Weight | None = None

    @property
    def wide(self) -> Tensor:
        """The buffer, with this group's weight and adapters in it."""
        if self.turn is not None:
            self.turn.take()
        return self.buffer

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """Every tensor that stays, perhaps views of one another; masters lie in the arena."""
        bias = () if self.bias is None else (self.bias.value,)
        if self.fp8 is not None:
            return *self.fp8.stored, *bias
        if self.turn is None:
            return self.buffer, *bias
        return self.buffer, *bias, *self.turn.stored

    @property
    def num_inputs(self) -> int:
        """K."""
        return self.weight.value.shape[1]

    @property
    def num_outputs(self) -> int:
        """N."""
        return self.weight.value.shape[0]

    @property
    def padded_rank(self) -> int:
        """P."""
        return self.buffer.shape[1] - self.num_inputs if self.fp8 is None else self.fp8.up.shape[1]

    @property
    def is_trained(self) -> bool:
        """Whether backward needs this group's input."""
        return self.lora is not None or self.weight.master is not None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer."""

    input_norm: Weight
    qkv: Linear
    query_norm: Weight | None
    key_norm: Weight | None
    output: Linear
    mlp_norm: Weight
    gate_up: Linear
    down: Linear

    @property
    def groups(self) -> tuple[Linear, ...]:
        """The linear groups in the order of the forward pass."""
        return self.qkv, self.output, self.gate_up, self.down

    @property
    def norms(self) -> tuple[tuple[str, Weight], ...]:
        """The norms that exist, by name."""
        named = (
            ("input_layernorm", self.input_norm),
            ("self_attn.q_norm", self.query_norm),
            ("self_attn.k_norm", self.key_norm),
            ("post_attention_layernorm", self.mlp_norm),
        )
        return tuple((name, weight) for name, weight in named if weight is not None)


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """The whole decoder. With a tied head ``head`` *is* ``embedding`` ([V, H]), and both add to the same gradient."""

    embedding: Weight
    layers: tuple[LayerWeights, ...]
    norm: Weight
    head: Weight
    arena: Arena | Store
    shared: SharedBuffers = field(default_factory=SharedBuffers)


WHOLE = slice(None)


def named_weights(weights: DecoderWeights) -> Iterator[tuple[str, Weight, slice]]:
    """(Hugging Face name, weight, rows of it) of every tensor of a checkpoint; a tied head is not listed."""
    yield "model.embed_tokens.weight", weights.embedding, WHOLE
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        for name, norm in layer.norms:
            yield f"{prefix}.{name}.weight", norm, WHOLE
        for group in layer.groups:
            for part in group.parts:
                yield f"{prefix}.{part.name}.weight", group.weight, part.rows
                if group.bias is not None:
                    yield f"{prefix}.{part.name}.bias", group.bias, part.rows
    yield "model.norm.weight", weights.norm, WHOLE
    if weights.head is not weights.embedding:
        yield "lm_head.weight", weights.head, WHOLE


def named_adapters(weights: DecoderWeights) -> Iterator[tuple[str, Weight, slice]]:
    """(name such as ``model.layers.0.mlp.up_proj.lora_A.weight``, weight, rows of it) of every adapter tensor."""
    for index, layer in enumerate(weights.layers):
        for group in layer.groups:
            if group.lora is None:
                continue
            for block in group.lora.blocks:
                yield f"model.layers.{index}.{block.name}.lora_A.weight", group.lora.down, block.rank
                yield f"model.layers.{index}.{block.name}.lora_B.weight", block.up, WHOLE


def trained_weights(weights: DecoderWeights) -> tuple[Weight, ...]:
    """Every trained weight once, in a fixed order."""
    found: dict[int, Weight] = {}
    for _, weight, _ in (*named_weights(weights), *named_adapters(weights)):
        if weight.master is not None:
            found.setdefault(id(weight), weight)
    return tuple(found.values())
