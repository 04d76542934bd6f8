"""FUSED_FULL: the fused operations where every weight is trained, so that backward adds up the gradients of weights, norms and biases.

Legend: T tokens, H hidden, N output and K input columns of a linear group, L supervised rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engines.native import fused_ops, reference
from engines.native.fused_ops import FUSED
from engines.native.kernels.norm_weight import norm_weight_gradient, normed_again
from engines.native.kernels.rms_norm import rms_norm, rms_norm_backward
from engines.native.kernels.swiglu import swiglu_backward_
from engines.native.ops import HeadNorms, Heads, NormSource
from engines.native.packed import Packed
from engines.native.weights import Linear, Weight


def norm_backward(dy_TH: Tensor, x_TH: Tensor, inverse_T: Tensor, weight: Weight, residual_TH: Tensor | None, padded_rank: int) -> Tensor:
    """The norm's weight in a kernel of its own."""
    weight.add_gradient(norm_weight_gradient(dy_TH, x_TH, inverse_T))
    return fused_ops.norm_backward(dy_TH, x_TH, inverse_T, weight, residual_TH, padded_rank)


def plain_norm_backward(dy: Tensor, x: Tensor, weight: Weight, epsilon: float) -> Tensor:
    """As ``norm_backward``, the rows' root mean squares made again."""
    _, inverse, _ = rms_norm(x, weight.value, epsilon, 0)
    weight.add_gradient(norm_weight_gradient(dy, x, inverse))
    return rms_norm_backward(dy, x, weight.value, inverse, None, 0)


def rotate_back(gradients: Heads, projected: Heads | None, norms: HeadNorms | None, packed: Packed, padded_rank: int) -> Tensor:
    """One kernel; the norms of heads, whose weights are trained, by the reference behind it."""
    dy_TW = fused_ops.rotate_back(gradients, None, None, packed, padded_rank)
    if projected is not None and norms is not None:
        reference.norm_heads_backward_(dy_TW, projected, norms)
    return dy_TW


def weight_gradients(dy_TN: Tensor, source: Tensor | NormSource, linear: Linear) -> None:
    """dW = dy^T x in one product, a normed x made again in one pass; db = sum(dy)."""
    if linear.bias is not None:
        linear.bias.add_gradient(dy_TN.sum(0, dtype=torch.float32))
    x_TK = normed_again(source.x, source.weight.value, source.inverse) if isinstance(source, NormSource) else source
    linear.weight.add_product(dy_TN, x_TK)


def swiglu_backward(d_h_TK: Tensor, gate_up_TN: Tensor, dy_TW: Tensor, low_TP: Tensor | None, down: Linear, group: Linear) -> Tensor:
    """One kernel, h in the place of its gradient and both gradients in that of gate and up; then the product for ``down``."""
    h_TK, gradient_TN = swiglu_backward_(d_h_TK, gate_up_TN, 0)
    weight_gradients(dy_TW, h_TK, down)
    return gradient_TN


FUSED_FULL = replace(
    FUSED,
    norm_backward=norm_backward,
    plain_norm_backward=plain_norm_backward,
    rotate_back=rotate_back,
    weight_gradients=weight_gradients,
    swiglu_backward=swiglu_backward,
)
