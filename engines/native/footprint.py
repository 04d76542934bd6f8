"""How much memory a step needs, by what it is for and by when.

Legend: T tokens, H hidden, I intermediate, N columns of query, key and value, Q of the queries, P padded ranks, L supervised rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engines.native.buckets import Extent
from engines.native.fp8_reasons import Mode
from engines.native.plan import Name, Plan
from engines.native.shape import LlamaShape

if TYPE_CHECKING:
    from engines.native.weights import DecoderWeights

# cuBLAS keeps 32 MiB for the stream that launches and as much for the one that is captured (Hopper; less elsewhere).
WORKSPACES = 2 * 32 * 2**20


@dataclass(frozen=True, slots=True)
class Load:
    """What one forward and backward pass works on: tokens, tokens of the longest document, supervised rows, rows of logits at once."""

    num_tokens: int
    longest: int
    num_rows: int
    loss_chunk: int


def largest_load(found: Extent, loss_chunk: int) -> Load:
    """The most of each over the rows of a run, and over what some of them are filled up to."""
    tokens, rows = (found.largest.num_tokens, found.largest.num_rows) if found.largest else (0, 0)
    return Load(max(tokens, found.num_tokens), found.longest, max(rows, found.num_rows), loss_chunk)


def stored_bytes(weights: DecoderWeights) -> int:
    """Bytes of all weights, masters and gradients on their device, what shares memory counted once."""
    tensors = [weights.embedding.value, weights.norm.value, weights.head.value, *weights.arena.tensors]
    for layer in weights.layers:
        tensors += [norm.value for _, norm in layer.norms]
        for group in layer.groups:
            tensors += group.stored
    tensors = [tensor for tensor in tensors if tensor.device == weights.norm.value.device]  # an embedding may wait on the host
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@dataclass(frozen=True, slots=True)
class Ranks:
    """Padded ranks of the four linear groups of a layer."""

    qkv: int
    output: int
    gate_up: int
    down: int


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """One layer under one plan: what it ``kept`` between its passes, what leaves for the host (``away``), how much of that has to be back
    ``early``; and its highest points beside what other layers hold, in the two halves of its forward and of its backward pass."""

    kept: int
    away: int
    early: int
    attention: int
    mlp: int
    mlp_backward: int
    attention_backward: int


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Bytes of a step by what they are for.

    ``static``: what is there all the time; ``element_bytes``: of an activation; ``fp8``: the products that round their input to 8 bits;
    ``movable``: of the embedding, where it is there and could wait on the host; ``loaded``: what is there before it is moved.
    """

    shape: LlamaShape
    ranks: Ranks
    load: Load
    static: int
    element_bytes: int
    fp8: Mode | None = None
    movable: int = 0
    loaded: int = 0

    @classmethod
    def of(cls, shape: LlamaShape, weights: DecoderWeights, load: Load, *, may_move: bool = False) -> MemoryModel:
        """For weights that are loaded: their own bytes, two moments of the trained values, angles and the packed row. ``may_move``: an
        embedding that is frozen and no head may be moved to the host.
        """
        ranks = Ranks(*(group.padded_rank for group in weights.layers[0].groups))
        moments = weights.arena.state_bytes
        angles = 4 * shape.head_dim * (load.longest + load.num_tokens)
        workspaces = WORKSPACES if weights.norm.value.is_cuda else 0
        loaded = stored_bytes(weights)
        static = loaded + moments + angles + 32 * load.num_tokens + workspaces
        eight = weights.layers[0].qkv.fp8
        apart = weights.embedding.master is None and weights.head is not weights.embedding
        movable = weights.embedding.value.nbytes if may_move and apart else 0
        item, mode = weights.norm.value.element_size(), None if eight is None else eight.mode
        return cls(shape, ranks, load, static, item, mode, movable, loaded)

    def moved(self) -> MemoryModel:
        """The same with the embedding on the host."""
        return replace(self, static=self.static - self.movable, movable=0)

    def bytes_of(self, name: Name) -> int:
        """One held tensor of one layer."""
        shape, ranks = self.shape, self.ranks
        columns = {
            "input": shape.hidden_size,
            "heads": self._heads,
            "qkv": self._heads if shape.qk_norm else 0,
            "attended": shape.query_size + ranks.output,
            "middle": shape.hidden_size,
            "gate_up": 2 * shape.intermediate_size + ranks.gate_up,
            "low_qkv": ranks.qkv,
            "low_gate_up": ranks.gate_up,
            "low_down": ranks.down,
        }
        statistics = {"inverse": 4, "mlp_inverse": 4, "attended": 4 * shape.num_heads}
        return self.load.num_tokens * (columns.get(name, 0) * self.element_bytes + statistics.get(name, 0))

    def total(self, names: Iterable[Name]) -> int:
        """All of ``names`` of one layer."""
        return sum(self.bytes_of(name) for name in names)

    def layer(self, plan: Plan) -> LayerBytes:
        """A layer under ``plan``."""
        own = self.total(plan.held)
        return LayerBytes(
            self.total(plan.kept),
            self.total(plan.offloaded),
            self.total(plan.early),
            self._attention(),
            own + self._mlp(plan),
            own + self._mlp_backward(plan),
            self.total(plan.held - {"middle", "mlp_inverse", "low_gate_up", "gate_up", "low_down"}) + self._attention_backward(plan),
        )

    def peak(self, plans: Sequence[Plan], loss_chunk: int | None = None) -> int:
        """The most that is allocated at one time during a step; ``loss_chunk``: the load's unless it is given."""
        return self.peak_of([self.layer(plan) for plan in plans], loss_chunk or self.load.loss_chunk)

    def peak_of(self, layers: Sequence[LayerBytes], loss_chunk: int) -> int:
        """As ``peak``, of layers that are known."""
        most, below = 0, 0
        for layer, previous in zip(layers, (None, *layers[:-1]), strict=True):
            # What the layer before sends away is let go in the middle of this one.
            most = max(most, below + layer.attention + (previous.away if previous else 0), below + layer.mlp)
            below += layer.kept
        most = max(most, below + self._loss(loss_chunk))
        for layer, under in zip(layers[::-1], (*layers[-2::-1], None), strict=True):
            below -= layer.kept
            most = max(most, below + layer.mlp_backward, below + layer.attention_backward + (under.early if under else 0))
        return self.static + most

    @property
    def _heads(self) -> int:
        return self.shape.query_size + 2 * self.shape.key_size

    def _span(self, columns: float) -> int:
        """Bytes of so many columns of all tokens."""
        return int(self.load.num_tokens * self.element_bytes * columns)

    def _codes(self, columns: int, padded_rank: int) -> float:
        """What a product's input takes in 8 bits, its adapter split in three, in columns of activations."""
        return 0.0 if self.fp8 is None else (columns + 3 * padded_rank) / self.element_bytes

    def _backward_codes(self, columns: int, padded_rank: int) -> float:
        return self._codes(columns, padded_rank) if self.fp8 == "forward_and_input_gradients" else 0.0

    def _made(self, columns: int, padded_rank: int) -> float:
        """The input of a product while a norm or SwiGLU makes it."""
        return columns + padded_rank + self._codes(columns, padded_rank)

    def _read(self, columns: int, padded_rank: int) -> float:
        """The same once the thin part is there: of 8-bit products only the codes stay."""
        return columns + padded_rank if self.fp8 is None else self._codes(columns, padded_rank)

    def _attention(self) -> int:
        """Forward up to the sum in the middle: the incoming pair, the input, the heads, attention's output twice, its projection."""
        hidden, ranks, queries = self.shape.hidden_size, self.ranks, self.shape.query_size
        norm, project = 3 * hidden + self._made(hidden, ranks.qkv), hidden + self._read(hidden, ranks.qkv) + self._heads
        attend = hidden + self._heads + 2 * queries + ranks.output
        middle = hidden + self._heads + queries + ranks.output + 2 * hidden + self._made(hidden, ranks.gate_up)
        return self._span(max(norm, project, attend, middle))

    def _mlp(self, plan: Plan) -> int:
        """Forward from there, beside what the layer holds: the sum and its norm, and gate, up and h of some rows at a time."""
        shape, ranks = self.shape, self.ranks
        hidden, inner = shape.hidden_size, shape.intermediate_size
        whole = "gate_up" in plan.held
        pieces = 1 if whole else plan.pieces
        rows = max(
            self._made(inner, ranks.down) + (0 if whole else 2 * inner + ranks.gate_up),
            self._read(inner, ranks.down) + hidden,
        )
        middle = 0 if "middle" in plan.held else hidden
        rest = max(hidden * (pieces - 1) / pieces + rows / pieces, 2 * hidden)
        return self._span(middle + self._read(hidden, ranks.gate_up) + rest)

    def _mlp_backward(self, plan: Plan) -> int:
        """The gradient that comes in, what is made again for this half, and gate, up and their gradients of some rows at a time."""
        shape, ranks, pieces, held = self.shape, self.ranks, plan.pieces, plan.held
        hidden, inner = shape.hidden_size, shape.intermediate_size
        again = 0
        if "middle" not in held:
            again += hidden
            if "attended" not in held:
                again += shape.query_size + ranks.output + (0 if "heads" in held else self._heads)
        gate_up = 0 if "gate_up" in held else 2 * inner + ranks.gate_up
        normed = 0 if "gate_up" in held else self._read(hidden, ranks.gate_up)
        done = (hidden + ranks.output) / pieces
        first, second = (self._backward_codes(*each) for each in ((hidden, ranks.down), (2 * inner, ranks.gate_up)))
        widest = inner + first
        if "low_down" not in held:  # h is made again for it
            widest = max(widest, self._made(inner, ranks.down))
        last = (pieces - 1) * done + (gate_up + max(widest, hidden + max(hidden + ranks.output, second))) / pieces
        before_last: float = normed + gate_up
        if pieces > 1:
            before_last = (pieces - 2) * done + normed + (gate_up + max(widest, hidden + second)) / pieces
        return self._span(hidden + ranks.down + again + max(last, before_last, 2 * hidden + normed if again else 0))

    def _attention_backward(self, plan: Plan) -> int:
        """The gradient in the middle, what is made again, and the gradients of the heads: dq is summed in float32 before it is rounded."""
        shape, ranks, held = self.shape, self.ranks, plan.held
        hidden, queries, heads = shape.hidden_size, shape.query_size, self._heads
        again = (0 if "attended" in held else queries + ranks.output) + (0 if "heads" in held else heads)
        gradients = max(queries + heads + queries * 4 // self.element_bytes, 2 * heads + ranks.qkv)
        return self._span(hidden + ranks.output + again + gradients)

    def _loss(self, chunk: int) -> int:
        """At the end of forward: three tensors of supervised rows and a chunk of logits, or one tensor more."""
        rows, hidden = self.load.num_rows, self.shape.hidden_size
        return self.element_bytes * (3 * rows * hidden + max(min(chunk, rows) * self.shape.vocab_size, rows * hidden))
