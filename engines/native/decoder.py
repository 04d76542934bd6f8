"""The whole decoder: embedding, layers, final norm and linear cross-entropy, forward and backward without autograd.

Legend: T tokens, H hidden, L supervised rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engines.native.layer import LayerPass, Plan
from engines.native.ops import Ops
from engines.native.packed import Packed
from engines.native.shape import LlamaShape
from engines.native.weights import DecoderWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A decoder's weights and how it computes. ``plan``: what each layer keeps; ``loss_chunk``: rows of logits at one time."""

    shape: LlamaShape
    weights: DecoderWeights
    ops: Ops
    plan: Plan
    loss_chunk: int

    @torch.no_grad()
    def accumulate(self, packed: Packed, scale: float) -> Tensor:
        """Add ``scale`` times the gradient of the summed losses to every trained weight; returns the losses [L], float32."""
        ops, weights, epsilon = self.ops, self.weights, self.shape.norm_epsilon
        x_TH = weights.embedding.value[packed.tokens]
        passes = []
        for layer in weights.layers:
            passes.append(LayerPass(ops, self.shape, layer, packed, x_TH))
            x_TH = passes[-1].forward(self.plan)

        # Only rows that predict a supervised token reach the loss: the rest of the sequence needs no norm and no logits.
        last_LH = x_TH[packed.rows]
        normed_LH = ops.rms_norm(last_LH, weights.norm, epsilon)
        losses, d_normed_LH = ops.cross_entropy(normed_LH, weights.head, packed.targets, scale, self.loss_chunk)
        d_last_LH = ops.rms_norm_backward(d_normed_LH, last_LH, weights.norm, epsilon)

        d_x_TH: Tensor | None = torch.zeros_like(x_TH).index_copy_(0, packed.rows, d_last_LH)
        while passes and d_x_TH is not None:
            # Popped, so that a layer's tensors are freed as soon as it is done; the lowest needs no dx unless it is trained.
            d_x_TH = passes.pop().backward(d_x_TH, need_input=bool(passes) or weights.embedding.master is not None)
        if d_x_TH is not None and weights.embedding.gradient is not None:
            gradient = weights.embedding.gradient
            gradient.index_add_(0, packed.tokens, d_x_TH.to(gradient.dtype))
        return losses
