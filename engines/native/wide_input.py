"""The wide input of a linear group made by one product behind whatever wrote its left part.

Legend: T tokens, K input columns of a linear group, P its padded ranks, W = K + P.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engines.native.ops import Input
from engines.native.weights import Linear


def with_low(wide_TW: Tensor, linear: Linear, *, outlives: bool) -> Input:
    """Write s x A^T behind x; ``outlives``: the thin part is copied, so that it may be kept when ``wide`` is not."""
    if linear.lora is None:
        return Input(wide_TW, None)
    inputs, down = linear.num_inputs, linear.lora.down.value
    into = wide_TW[:, inputs : inputs + len(down)]
    torch.addmm(into, wide_TW[:, :inputs], down.t(), beta=0, alpha=linear.lora.scale, out=into)
    low_TP = wide_TW[:, inputs:]
    return Input(wide_TW, low_TP.clone() if outlives else low_TP)


def widened(x_TK: Tensor, linear: Linear) -> Input:
    """The wide input of ``linear`` from an x that lies elsewhere; its thin part is a view."""
    if linear.lora is None:
        return Input(x_TK, None)
    wide_TW = room_for(x_TK, len(x_TK), linear)
    wide_TW[:, : linear.num_inputs].copy_(x_TK)
    return with_low(wide_TW, linear, outlives=False)


def room_for(like: Tensor, num_tokens: int, linear: Linear) -> Tensor:
    """A wide input whose left part is yet to be written, in the type of ``like``; behind it zeros."""
    wide_TW = like.new_empty(num_tokens, linear.num_inputs + linear.padded_rank)
    wide_TW[:, linear.num_inputs :].zero_()
    return wide_TW
