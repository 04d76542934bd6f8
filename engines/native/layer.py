"""One decoder layer, forward and explicit backward: each tensor is made on first use, and a plan says which are kept.

Legend: T tokens, H hidden, D head dimension, C query heads, G key-value heads, N columns of a linear group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from engines.native.ops import Attended, Heads, Ops
from engines.native.packed import Packed
from engines.native.shape import LlamaShape
from engines.native.weights import LayerWeights, Linear, Weight

Name = Literal[
    "normed", "low_qkv", "qkv", "heads", "attended", "low_output", "middle", "mlp_normed", "low_gate_up", "gate_up", "swiglu", "low_down"
]
Plan = frozenset[Name]  # the tensors of a layer that are kept for backward; the layer's input always is
V = TypeVar("V")

KEEP_INPUT: Plan = frozenset()
# Everything backward reads except what one cheap pass over a kept tensor makes again (normed, mlp_normed, swiglu).
KEEP_PRODUCTS: Plan = frozenset(
    ("low_qkv", "qkv", "heads", "attended", "low_output", "middle", "low_gate_up", "gate_up", "low_down"),
)


class LayerPass:
    """The tensors of one layer in one forward and backward pass.

    A tensor that the plan dropped is computed again by the same operation on the same inputs, so gradients do not depend on
    the plan, and what backward never reads (the down projection) is never recomputed.
    """

    def __init__(self, ops: Ops, shape: LlamaShape, weights: LayerWeights, packed: Packed, x_TH: Tensor) -> None:
        """Nothing is computed yet; ``x_TH`` is the layer's input."""
        self._ops = ops
        self._shape = shape
        self._weights = weights
        self._packed = packed
        self._x_TH = x_TH
        self._made: dict[str, Any] = {}

    def forward(self, plan: Plan) -> Tensor:
        """The layer's output [T, H]; afterwards only the tensors of ``plan`` (and the input) are held."""
        y_TH = self._ops.linear(self._swiglu(), self._weights.down, self._low_down()).add_(self._middle())
        self._made = {name: made for name, made in self._made.items() if name in plan}
        return y_TH

    def backward(self, dy_TH: Tensor, need_input: bool) -> Tensor | None:
        """Add the gradients of the layer's trained weights; returns that of its input, None where nobody needs it."""
        d_middle_TH = self._mlp_backward(dy_TH)
        return self._attention_backward(d_middle_TH, need_input)

    def _mlp_backward(self, dy_TH: Tensor) -> Tensor:
        ops, weights = self._ops, self._weights
        d_swiglu = self._linear_backward(dy_TH, self._swiglu, self._low_down, weights.down)
        d_gate_up = ops.swiglu_backward(d_swiglu, self._gate_up())
        d_normed = self._linear_backward(d_gate_up, self._mlp_normed, self._low_gate_up, weights.gate_up)
        return ops.rms_norm_backward(d_normed, self._middle(), weights.mlp_norm, self._shape.norm_epsilon).add_(dy_TH)

    def _attention_backward(self, d_middle_TH: Tensor, need_input: bool) -> Tensor | None:
        ops, weights, packed = self._ops, self._weights, self._packed
        d_output = self._linear_backward(d_middle_TH, self._attended_flat, self._low_output, weights.output)
        heads = self._heads()
        d_qkv_TN = d_middle_TH.new_empty(len(d_middle_TH), self._shape.query_size + 2 * self._shape.key_size)
        d_heads = self._split(d_qkv_TN)
        ops.attention_backward(d_output.view_as(heads.queries), heads, self._attended(), packed.lengths, d_heads)
        ops.rotate_(d_heads.queries, packed.cosine, -packed.sine)
        ops.rotate_(d_heads.keys, packed.cosine, -packed.sine)
        if weights.query_norm is not None and weights.key_norm is not None:
            projected = self._split(self._qkv())
            self._head_norm_backward(d_heads.queries, projected.queries, weights.query_norm)
            self._head_norm_backward(d_heads.keys, projected.keys, weights.key_norm)
        if not need_input:
            self._trained_only_backward(d_qkv_TN)
            return None
        d_normed = self._linear_backward(d_qkv_TN, self._normed, self._low_qkv, weights.qkv)
        return ops.rms_norm_backward(d_normed, self._x_TH, weights.input_norm, self._shape.norm_epsilon).add_(d_middle_TH)

    def _trained_only_backward(self, d_qkv_TN: Tensor) -> None:
        """The lowest layer under a frozen embedding: its adapters need a gradient, its input does not."""
        if self._weights.qkv.is_trained:
            self._ops.linear_backward(d_qkv_TN, self._normed(), self._low_qkv(), self._weights.qkv, False)

    def _head_norm_backward(self, dy_TCD: Tensor, x_TCD: Tensor, weight: Weight) -> None:
        dy_TCD.copy_(self._ops.rms_norm_backward(dy_TCD, x_TCD, weight, self._shape.norm_epsilon))

    def _linear_backward(
        self, dy: Tensor, make_input: Callable[[], Tensor], make_low: Callable[[], Tensor | None], linear: Linear
    ) -> Tensor:
        """A frozen group does not read its input, so nothing is recomputed for it."""
        x = make_input() if linear.is_trained else None
        low = make_low() if linear.is_trained else None
        dx = self._ops.linear_backward(dy, x, low, linear, True)
        assert dx is not None  # need_input is True
        return dx

    def _split(self, qkv_TN: Tensor) -> Heads:
        shape = self._shape
        q, k, v = torch.split(qkv_TN, [shape.query_size, shape.key_size, shape.key_size], dim=-1)
        q, k, v = (columns.view(len(columns), -1, shape.head_dim) for columns in (q, k, v))
        return Heads(q, k, v)

    # The tensors of the forward pass, in its order.

    def _make(self, name: Name, make: Callable[[], V]) -> V:
        if name not in self._made:
            self._made[name] = make()
        value: V = self._made[name]
        return value

    def _make_low(self, name: Name, make_input: Callable[[], Tensor], linear: Linear) -> Tensor | None:
        lora = linear.lora
        return None if lora is None else self._make(name, lambda: self._ops.low_rank(make_input(), lora))

    def _normed(self) -> Tensor:
        return self._make("normed", lambda: self._ops.rms_norm(self._x_TH, self._weights.input_norm, self._shape.norm_epsilon))

    def _low_qkv(self) -> Tensor | None:
        return self._make_low("low_qkv", self._normed, self._weights.qkv)

    def _project(self) -> Tensor:
        return self._ops.linear(self._normed(), self._weights.qkv, self._low_qkv())

    def _qkv(self) -> Tensor:
        """Only the norms of queries and keys read the projection again; otherwise it is rotated in place."""
        return self._make("qkv", self._project)

    def _heads(self) -> Heads:
        return self._make("heads", self._make_heads)

    def _make_heads(self) -> Heads:
        ops, weights, packed = self._ops, self._weights, self._packed
        if weights.query_norm is None or weights.key_norm is None:
            heads = self._split(self._project())
        else:
            projected = self._split(self._qkv())
            queries = ops.rms_norm(projected.queries, weights.query_norm, self._shape.norm_epsilon)
            heads = Heads(queries, ops.rms_norm(projected.keys, weights.key_norm, self._shape.norm_epsilon), projected.values)
        ops.rotate_(heads.queries, packed.cosine, packed.sine)
        ops.rotate_(heads.keys, packed.cosine, packed.sine)
        return heads

    def _attended(self) -> Attended:
        return self._make("attended", lambda: self._ops.attention(self._heads(), self._packed.lengths))

    def _attended_flat(self) -> Tensor:
        return self._attended().output.flatten(1)

    def _low_output(self) -> Tensor | None:
        return self._make_low("low_output", self._attended_flat, self._weights.output)

    def _middle(self) -> Tensor:
        return self._make("middle", self._make_middle)

    def _make_middle(self) -> Tensor:
        return self._ops.linear(self._attended_flat(), self._weights.output, self._low_output()).add_(self._x_TH)

    def _mlp_normed(self) -> Tensor:
        return self._make("mlp_normed", lambda: self._ops.rms_norm(self._middle(), self._weights.mlp_norm, self._shape.norm_epsilon))

    def _low_gate_up(self) -> Tensor | None:
        return self._make_low("low_gate_up", self._mlp_normed, self._weights.gate_up)

    def _gate_up(self) -> Tensor:
        return self._make("gate_up", lambda: self._ops.linear(self._mlp_normed(), self._weights.gate_up, self._low_gate_up()))

    def _swiglu(self) -> Tensor:
        return self._make("swiglu", lambda: self._ops.swiglu(self._gate_up()))

    def _low_down(self) -> Tensor | None:
        return self._make_low("low_down", self._swiglu, self._weights.down)
