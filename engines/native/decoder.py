"""The whole decoder: embedding, layers, final norm and linear cross-entropy, forward and backward without autograd.

Legend: T tokens, H hidden, L supervised rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engines.native.host import Host
from engines.native.layer import LayerPass, Stream
from engines.native.ops import Ops
from engines.native.packed import Packed
from engines.native.plan import Plan
from engines.native.read_rows import ReadRows
from engines.native.shape import LlamaShape
from engines.native.store import Section
from engines.native.weights import DecoderWeights


def _nobody_waits(section: Section) -> None:
    """Gradients stay where they are until the optimizer's step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A decoder's weights and how it computes. ``plans``: what each layer keeps; ``loss_chunk``: rows of logits at one time;
    ``host``: where offloaded tensors wait, one pass at a time."""

    shape: LlamaShape
    weights: DecoderWeights
    ops: Ops
    plans: tuple[Plan, ...]
    loss_chunk: int
    host: Host = field(default_factory=Host)

    @torch.no_grad()
    def accumulate(self, packed: Packed, scale: Tensor, ready: Callable[[Section], None] = _nobody_waits) -> Tensor:
        """Add ``scale`` (a scalar) times the gradient of the summed losses to every trained weight; returns the losses [L], float32.

        ``ready`` is told of each section once its gradients are all there and nothing reads its weights any more.
        """
        ops, weights, epsilon = self.ops, self.weights, self.shape.norm_epsilon
        stream = Stream(ops.embed(weights.embedding.value, packed.tokens), None)
        passes: list[LayerPass] = []
        self.host.begin()
        weights.shared.forget()  # the optimizer has stepped, or another decoder's step was captured
        read = ReadRows.supervised(packed)
        supervised = read.then(packed.rows)
        for index, (layer, plan) in enumerate(zip(weights.layers, self.plans, strict=True), start=1):
            rows = read if index == len(weights.layers) else None
            passes.append(LayerPass(ops, self.shape, layer, packed, stream, plan, self.host, rows))
            del stream  # the pass lets go of it once its first norm has read it
            stream = passes[-1].forward()
        self.host.settle()

        # Only rows that predict a supervised token reach the loss: the rest of the sequence needs no norm and no logits.
        last_LH = supervised.of(stream.x)
        if stream.delta is not None:
            last_LH = last_LH + supervised.of(stream.delta)  # apart: the layer may hold what it is made from
        del stream
        normed_LH = ops.plain_norm(last_LH, weights.norm, epsilon)
        losses, d_normed_LH = ops.cross_entropy(normed_LH, weights.head, packed.targets, scale, self.loss_chunk)
        del normed_LH
        passes[-1].prefetch()
        d_last_LH = ops.plain_norm_backward(d_normed_LH, last_LH, weights.norm, epsilon)
        del d_normed_LH
        ready("head")

        rooms = [layer.down.padded_rank for layer in weights.layers]
        del last_LH
        d_x_TW: Tensor | None = supervised.spread(d_last_LH, rooms[-1])
        del d_last_LH
        while passes and d_x_TW is not None:
            # Popped, so that a layer's tensors are freed as soon as it is done; the lowest needs no dx unless it is trained.
            layer_pass = passes.pop()
            d_x_TW = layer_pass.mlp_backward(d_x_TW)
            if passes:
                passes[-1].prefetch()  # while the attention of this layer computes
            needed = bool(passes) or weights.embedding.master is not None
            d_x_TW = layer_pass.attention_backward(d_x_TW, (rooms[len(passes) - 1] if passes else 0) if needed else None)
            ready(len(passes))
        if d_x_TW is not None:
            weights.embedding.add_rows(packed.tokens, d_x_TW)
            ready("embedding")
        return losses
