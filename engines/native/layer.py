"""One decoder layer, forward and explicit backward: each tensor is made on first use, and a plan says which are kept.

Legend: T tokens, R of them that go through the MLP (all, but in the top layer), H hidden, D head dimension, C query heads, G key-value
heads, N output and K input columns of a linear group, P its padded ranks, W = N + P.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from engines.native.host import Arriving, Host, Stored
from engines.native.ops import Attended, HeadNorms, Heads, Input, NormSource, Ops
from engines.native.packed import Packed
from engines.native.plan import Name, Plan
from engines.native.read_rows import ReadRows, rows_of, some
from engines.native.shape import LlamaShape
from engines.native.weights import LayerWeights

V = TypeVar("V")
_OF_MLP = ("middle", "mlp_inverse", "low_gate_up", "gate_up", "low_down")  # what the attention's half of backward does not read


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream [T, H] between two layers, the last addend still apart: the next norm adds it on its way."""

    x: Tensor
    delta: Tensor | None


class LayerPass:
    """The tensors of one layer in one forward and backward pass.

    A tensor that the plan dropped is computed again by the same operation on the same inputs, and one that it offloaded comes back
    bit by bit, so gradients do not depend on that; pieces change the order of sums. What backward never reads (the down
    projection) is never recomputed. Where the output is read at some ``rows`` only, all that comes behind attention is
    computed for these.
    """

    def __init__(
        self, ops: Ops, shape: LlamaShape, weights: LayerWeights, packed: Packed, stream: Stream, plan: Plan, host: Host,
        rows: ReadRows | None = None,
    ) -> None:  # fmt: skip
        """Nothing is computed yet; the sum of ``stream`` is the layer's input."""
        self._ops = ops
        self._shape = shape
        self._weights = weights
        self._packed = packed
        self._stream: Stream | None = stream
        self._plan = plan
        self._host = host
        self._read = ReadRows(len(packed.tokens)) if rows is None else rows
        self._made: dict[str, Any] = {}
        self._early: list[Stored] = []
        self._late: list[Stored] = []
        self._arriving: list[Arriving] = []

    def forward(self) -> Stream:
        """The layer's output, [R, H] twice; afterwards only what the plan keeps is held here."""
        ops, weights = self._ops, self._weights
        mlp_input = self._mlp_input()
        middle = self._middle()
        # Copies begin here in every layer and have until here in the next one: a whole layer's time.
        self._host.settle()
        self._leave()
        whole = "gate_up" in self._plan.held
        deltas, lows = [], []
        for rows in self._pieces(1 if whole else self._plan.pieces):
            gate_up_TN = self._gate_up(rows_of(mlp_input, rows))
            if whole:
                self._made["gate_up"] = gate_up_TN
            h = ops.swiglu(gate_up_TN, weights.down)
            del gate_up_TN
            lows.append(h.low)
            deltas.append(ops.linear(h, weights.down, 0))
            del h
        self._made["low_down"] = None if weights.down.lora is None else _joined([low for low in lows if low is not None])
        self._leave()
        return Stream(middle, _joined(deltas))

    def prefetch(self) -> None:
        """What the MLP's half of backward needs starts to come back from the host."""
        self._arriving += [self._host.fetch(stored) for stored in self._early]
        self._early = []

    def mlp_backward(self, dy_TW: Tensor) -> Tensor:
        """Add the gradients of the MLP's trained weights; returns that of the sum in the middle.

        ``dy_TW``: [R, H + P], P the padded rank of this layer's down projection; the result is the same of its output projection.
        """
        ops, weights = self._ops, self._weights
        self.prefetch()
        self._arrive()
        self._arriving = [self._host.fetch(stored) for stored in self._late]  # while the MLP computes
        self._late = []
        ops.fill(dy_TW, weights.down)
        gate_up_TN = self._made.pop("gate_up", None)
        mlp_input = self._mlp_input() if gate_up_TN is None else None
        middle, inverse = self._middle(), self._mlp_inverse()
        gradients = []
        for rows in self._pieces(self._plan.pieces):
            made_TN = self._gate_up(rows_of(mlp_input, rows)) if mlp_input is not None else gate_up_TN[rows]
            if rows.stop == len(dy_TW):
                mlp_input = gate_up_TN = None  # the last piece, perhaps the only one, needs them no more
            source = NormSource(middle[rows], inverse[rows], weights.mlp_norm)
            gradients.append(self._mlp_rows_backward(dy_TW[rows], made_TN, source, rows))
            del made_TN
        for name in _OF_MLP:
            self._made.pop(name, None)
        return _joined(gradients)

    def _mlp_rows_backward(self, dy_TW: Tensor, gate_up_TN: Tensor, source: NormSource, rows: slice) -> Tensor:
        ops, weights, hidden = self._ops, self._weights, self._shape.hidden_size
        low_down = some(self._made["low_down"], rows) if "low_down" in self._made else ops.swiglu(gate_up_TN, weights.down).low
        ops.up_gradients(dy_TW, low_down, weights.down)
        d_h_TK, low_gate_up = ops.input_gradient(dy_TW, weights.down), some(self._low_gate_up(), rows)
        d_gate_up_TW = ops.swiglu_backward(d_h_TK, gate_up_TN, dy_TW, low_gate_up, weights.down, weights.gate_up)
        del d_h_TK, gate_up_TN  # the gradient may lie where gate and up were
        ops.fill(d_gate_up_TW, weights.gate_up)
        ops.weight_gradients(d_gate_up_TW, source, weights.gate_up)
        d_normed_TH = ops.input_gradient(d_gate_up_TW, weights.gate_up)
        return ops.norm_backward(d_normed_TH, source.x, source.inverse, weights.mlp_norm, dy_TW[:, :hidden], weights.output.padded_rank)

    def attention_backward(self, d_middle_TW: Tensor, room: int | None) -> Tensor | None:
        """Add the gradients of the attention's trained weights; returns that of the layer's input.

        The result is [T, H + ``room``], the ``dy_TW`` of the layer below; None where ``room`` is None because nobody needs it.
        """
        self._arrive()
        d_qkv_TW = self._heads_backward(d_middle_TW)
        ops, weights = self._ops, self._weights
        ops.fill(d_qkv_TW, weights.qkv)
        inverse, x_TH = self._inverse(), self._input()
        ops.weight_gradients(d_qkv_TW, NormSource(x_TH, inverse, weights.input_norm), weights.qkv)
        ops.up_gradients(d_qkv_TW, self._low_qkv(), weights.qkv)
        if room is None:  # the lowest layer under a frozen embedding: its adapters need a gradient, its input does not
            return None
        d_normed_TH = ops.input_gradient(d_qkv_TW, weights.qkv)
        del d_qkv_TW
        d_middle_TH = self._read.spread(d_middle_TW[:, : self._shape.hidden_size])
        return ops.norm_backward(d_normed_TH, x_TH, inverse, weights.input_norm, d_middle_TH, room)

    def _heads_backward(self, d_middle_TW: Tensor) -> Tensor:
        """From the gradient of the output projection's result to that of query, key and value, [T, N + P]."""
        ops, weights, packed = self._ops, self._weights, self._packed
        heads, attended = self._heads(), self._attended()
        ops.fill(d_middle_TW, weights.output)
        projected_from = self._read.of_input(attended.input)
        ops.weight_gradients(d_middle_TW, projected_from.wide[:, : weights.output.num_inputs], weights.output)
        ops.up_gradients(d_middle_TW, projected_from.low, weights.output)
        del projected_from
        d_attended_TK = self._read.spread(ops.input_gradient(d_middle_TW, weights.output))
        d_heads = ops.attention_backward(d_attended_TK.view_as(heads.queries), heads, attended, packed)
        del d_attended_TK
        norms = self._head_norms()
        projected = None if norms is None else self._split(self._qkv())
        d_qkv_TW = ops.rotate_back(d_heads, projected, norms, packed, weights.qkv.padded_rank)
        for name in ("heads", "attended", "qkv"):
            self._made.pop(name, None)
        return d_qkv_TW

    def _head_norms(self) -> HeadNorms | None:
        weights = self._weights
        if weights.query_norm is None or weights.key_norm is None:
            return None
        return HeadNorms(weights.query_norm, weights.key_norm, self._shape.norm_epsilon)

    def _split(self, qkv_TN: Tensor) -> Heads:
        """Queries, keys and values as views; what stands behind them in a row is left out."""
        shape = self._shape
        q, k, v, _ = torch.tensor_split(
            qkv_TN, (shape.query_size, shape.query_size + shape.key_size, self._weights.qkv.num_outputs), dim=-1
        )
        q, k, v = (columns.view(len(columns), -1, shape.head_dim) for columns in (q, k, v))
        return Heads(q, k, v)

    # The tensors of the forward pass, in its order.

    def _make(self, name: Name, make: Callable[[], V]) -> V:
        if name not in self._made:
            self._made[name] = make()
        value: V = self._made[name]
        return value

    def _attention_input(self) -> Input:
        """The normed input, read once; its low-rank part and the reciprocal root mean squares come out of the same operation."""
        weights = self._weights
        stream = Stream(self._made["input"], None) if self._stream is None else self._stream
        made = self._ops.norm(stream.x, stream.delta, weights.input_norm, self._shape.norm_epsilon, weights.qkv)
        self._stream = None
        self._made.update(input=made.x, low_qkv=made.input.low, inverse=made.inverse)
        return made.input

    def _input(self) -> Tensor:
        """The sum of the stream; the first norm leaves it."""
        x_TH: Tensor = self._made["input"]
        return x_TH

    def _mlp_input(self) -> Input:
        """As ``_attention_input``, with the sum of the stream and the attention's output."""
        kept, weights = self._made.get("middle"), self._weights
        delta = self._ops.linear(self._read.of_input(self._attended().input), weights.output, 0) if kept is None else None
        x = self._read.of(self._input()) if kept is None else kept
        made = self._ops.norm(x, delta, weights.mlp_norm, self._shape.norm_epsilon, weights.gate_up)
        self._made.update(middle=made.x, low_gate_up=made.input.low, mlp_inverse=made.inverse)
        return made.input

    def _beside(self, name: Name, make: Callable[[], Input]) -> Any:
        """A tensor that ``make`` leaves beside the input that it returns."""
        if name not in self._made:
            make()
        return self._made[name]

    def _inverse(self) -> Tensor:
        inverse: Tensor = self._beside("inverse", self._attention_input)
        return inverse

    def _low_qkv(self) -> Tensor | None:
        low: Tensor | None = self._beside("low_qkv", self._attention_input)
        return low

    def _project(self) -> Tensor:
        return self._ops.linear(self._attention_input(), self._weights.qkv, 0)

    def _qkv(self) -> Tensor:
        """Only the norms of queries and keys read the projection again; otherwise it is rotated in place."""
        return self._make("qkv", self._project)

    def _heads(self) -> Heads:
        return self._make("heads", self._make_heads)

    def _make_heads(self) -> Heads:
        norms = self._head_norms()
        return self._ops.rotate(self._split(self._project() if norms is None else self._qkv()), norms, self._packed)

    def _attended(self) -> Attended:
        return self._make("attended", lambda: self._ops.attention(self._heads(), self._packed, self._weights.output))

    def _middle(self) -> Tensor:
        middle: Tensor = self._beside("middle", self._mlp_input)
        return middle

    def _mlp_inverse(self) -> Tensor:
        inverse: Tensor = self._beside("mlp_inverse", self._mlp_input)
        return inverse

    def _low_gate_up(self) -> Tensor | None:
        low: Tensor | None = self._beside("low_gate_up", self._mlp_input)
        return low

    def _gate_up(self, mlp_input: Input) -> Tensor:
        """With room behind each row, so that its gradient may take its place."""
        return self._ops.linear(mlp_input, self._weights.gate_up, self._weights.gate_up.padded_rank)

    # What is held when, and where.

    def _leave(self) -> None:
        """Of what has been made, what the plan offloads starts for the host, and what it does not keep is dropped."""
        plan = self._plan
        for names, stored in ((plan.early, self._early), (plan.offloaded - plan.early, self._late)):
            found: dict[str, Any] = {name: self._made[name] for name in sorted(names) if name in self._made}
            if found:
                stored.append(self._host.store(found))
        self._made = {name: made for name, made in self._made.items() if name in plan.kept}

    def _arrive(self) -> None:
        for arriving in self._arriving:
            self._made.update(arriving.taken())
        self._arriving = []

    def _pieces(self, count: int) -> list[slice]:
        """All rows of the MLP in ``count`` parts, fewer where there are fewer rows."""
        total = len(self._read)
        size = -(-total // count)
        return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
