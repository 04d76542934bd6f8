"""One decoder layer, forward and explicit backward: each tensor is made on first use, and a plan says which are kept.

Legend: T tokens, H hidden, D head dimension, C query heads, G key-value heads, N output and K input columns of a linear group,
P its padded ranks, W = N + P.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from engines.native.ops import Attended, Heads, Input, NormSource, Ops
from engines.native.packed import Packed
from engines.native.shape import LlamaShape
from engines.native.weights import LayerWeights, Weight

Name = Literal["inverse", "low_qkv", "qkv", "heads", "attended", "middle", "mlp_inverse", "low_gate_up", "gate_up", "low_down"]
Plan = frozenset[Name]  # the tensors of a layer that are kept for backward; the layer's input always is
V = TypeVar("V")

KEEP_INPUT: Plan = frozenset()
# Everything backward reads. Norm outputs and h are never kept: what needs them makes them again in one cheap pass, or does without.
KEEP_ALL: Plan = frozenset(get_args(Name))


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream [T, H] between two layers, the last addend still apart: the next norm adds it on its way."""

    x: Tensor
    delta: Tensor | None


class LayerPass:
    """The tensors of one layer in one forward and backward pass.

    A tensor that the plan dropped is computed again by the same operation on the same inputs, so gradients do not depend on
    the plan, and what backward never reads (the down projection) is never recomputed.
    """

    def __init__(self, ops: Ops, shape: LlamaShape, weights: LayerWeights, packed: Packed, stream: Stream) -> None:
        """Nothing is computed yet; the sum of ``stream`` is the layer's input."""
        self._ops = ops
        self._shape = shape
        self._weights = weights
        self._packed = packed
        self._stream = stream
        self._made: dict[str, Any] = {}

    def forward(self, plan: Plan) -> Stream:
        """The layer's output; afterwards only the tensors of ``plan`` (and the input) are held."""
        delta_TH = self._ops.linear(self._swiglu(), self._weights.down, 0)
        output = Stream(self._middle(), delta_TH)
        self._made = {name: made for name, made in self._made.items() if name in plan}
        return output

    def backward(self, dy_TW: Tensor, room: int | None) -> Tensor | None:
        """Add the gradients of the layer's trained weights; returns that of its input.

        ``dy_TW``: [T, H + P], P the padded rank of this layer's down projection. The result is [T, H + ``room``], the same of the
        layer below; None where ``room`` is None because nobody needs it.
        """
        d_middle_TW = self._mlp_backward(dy_TW)
        return self._attention_backward(d_middle_TW, room)

    def _mlp_backward(self, dy_TW: Tensor) -> Tensor:
        ops, weights, hidden = self._ops, self._weights, self._shape.hidden_size
        low_down, low_gate_up, gate_up_TN = self._low_down(), self._low_gate_up(), self._gate_up()
        ops.fill(dy_TW, weights.down)
        ops.up_gradients(dy_TW, low_down, weights.down)
        d_h_TK = ops.input_gradient(dy_TW, weights.down)
        d_gate_up_TW = ops.swiglu_backward(d_h_TK, gate_up_TN, dy_TW, low_gate_up, weights.down, weights.gate_up)
        del self._made["gate_up"], d_h_TK  # the gradient may lie where gate and up were
        ops.fill(d_gate_up_TW, weights.gate_up)
        middle, inverse = self._middle(), self._mlp_inverse()
        ops.weight_gradients(d_gate_up_TW, NormSource(middle, inverse, weights.mlp_norm), weights.gate_up)
        d_normed_TH = ops.input_gradient(d_gate_up_TW, weights.gate_up)
        del d_gate_up_TW
        return ops.norm_backward(d_normed_TH, middle, inverse, weights.mlp_norm, dy_TW[:, :hidden], weights.output.padded_rank)

    def _attention_backward(self, d_middle_TW: Tensor, room: int | None) -> Tensor | None:
        ops, weights, packed = self._ops, self._weights, self._packed
        heads, attended = self._heads(), self._attended()
        ops.fill(d_middle_TW, weights.output)
        x_TK = attended.input.wide[:, : weights.output.num_inputs]
        ops.weight_gradients(d_middle_TW, x_TK, weights.output)
        ops.up_gradients(d_middle_TW, attended.input.low, weights.output)
        d_attended_TK = ops.input_gradient(d_middle_TW, weights.output)
        d_heads = ops.attention_backward(d_attended_TK.view_as(heads.queries), heads, attended, packed)
        d_qkv_TW = ops.rotate_back(d_heads, packed, weights.qkv.padded_rank)
        if weights.query_norm is not None and weights.key_norm is not None:
            d_projected, projected = self._split(d_qkv_TW), self._split(self._qkv())
            self._head_norm_backward(d_projected.queries, projected.queries, weights.query_norm)
            self._head_norm_backward(d_projected.keys, projected.keys, weights.key_norm)
        ops.fill(d_qkv_TW, weights.qkv)
        inverse, x_TH = self._inverse(), self._stream.x
        ops.weight_gradients(d_qkv_TW, NormSource(x_TH, inverse, weights.input_norm), weights.qkv)
        ops.up_gradients(d_qkv_TW, self._low_qkv(), weights.qkv)
        if room is None:  # the lowest layer under a frozen embedding: its adapters need a gradient, its input does not
            return None
        d_normed_TH = ops.input_gradient(d_qkv_TW, weights.qkv)
        d_middle_TH = d_middle_TW[:, : self._shape.hidden_size]
        return ops.norm_backward(d_normed_TH, x_TH, inverse, weights.input_norm, d_middle_TH, room)

    def _head_norm_backward(self, dy_TCD: Tensor, x_TCD: Tensor, weight: Weight) -> None:
        dy_TCD.copy_(self._ops.plain_norm_backward(dy_TCD, x_TCD, weight, self._shape.norm_epsilon))

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
        stream, weights = self._stream, self._weights
        made = self._ops.norm(stream.x, stream.delta, weights.input_norm, self._shape.norm_epsilon, weights.qkv)
        self._stream = Stream(made.x, None)
        self._made.update(low_qkv=made.input.low, inverse=made.inverse)
        return made.input

    def _mlp_input(self) -> Input:
        """As ``_attention_input``, with the sum of the stream and the attention's output."""
        kept, weights = self._made.get("middle"), self._weights
        delta = self._ops.linear(self._attended().input, weights.output, 0) if kept is None else None
        x = self._stream.x if kept is None else kept
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
        ops, weights = self._ops, self._weights
        if weights.query_norm is None or weights.key_norm is None:
            heads = self._split(self._project())
        else:
            projected = self._split(self._qkv())
            queries = ops.plain_norm(projected.queries, weights.query_norm, self._shape.norm_epsilon)
            heads = Heads(queries, ops.plain_norm(projected.keys, weights.key_norm, self._shape.norm_epsilon), projected.values)
        ops.rotate_(heads, self._packed)
        return heads

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

    def _gate_up(self) -> Tensor:
        """With room behind each row, so that its gradient may take its place."""
        room = self._weights.gate_up.padded_rank
        return self._make("gate_up", lambda: self._ops.linear(self._mlp_input(), self._weights.gate_up, room))

    def _swiglu(self) -> Input:
        made = self._ops.swiglu(self._gate_up(), self._weights.down)
        self._made["low_down"] = made.low
        return made

    def _low_down(self) -> Tensor | None:
        low: Tensor | None = self._beside("low_down", self._swiglu)
        return low
