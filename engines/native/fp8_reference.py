"""The operations on linear groups in e4m3 by their definition, in plain torch on any device: what the 8-bit products stand for.

y = round(x) round(W)^T + b + s (x A^T) B^T, each row of x and of W rounded to e4m3 with a scale of its own (``harness.fp8``); the
gradient passes straight through the rounding of x. For that gradient W is the rounded one, or W^T and dy are rounded anew, row by row.

Legend: T tokens, N output and K input columns of a linear group, P its padded ranks, W = N + P.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engines.native.fp8 import GRADIENT_MOST, Fp8Rows, Fp8Weight
from engines.native.ops import Input
from engines.native.reference import REFERENCE
from engines.native.weights import Linear
from harness.fp8 import decode_rows, quantise_rows, rounded


def decode_into(rows: Fp8Rows, out: Tensor) -> None:
    """The values of the first rows, rounded to the type of ``out``."""
    out.copy_(decode_rows(rows.plain[: len(out)], rows.scales[: len(out)]))


def linear(input: Input, linear: Linear, room: int) -> Tensor:
    """Two products, the adapters' in the type of x."""
    fp8, (x_TK, low_TP) = of(linear), input.wide.tensor_split([linear.num_inputs], dim=1)
    y_TN = rounded(x_TK) @ decode_rows(fp8.forward.plain, fp8.forward.scales)[: linear.num_outputs].t().to(x_TK.dtype)
    if low_TP.shape[1]:
        y_TN.addmm_(low_TP, fp8.up.t())
    if linear.bias is not None:
        y_TN.add_(linear.bias.value)
    return torch.nn.functional.pad(y_TN, (0, room))[:, : linear.num_outputs] if room else y_TN


def input_gradient(dy_TW: Tensor, linear: Linear) -> Tensor:
    """dx = dy W + (s dy B) A."""
    fp8 = of(linear)
    if fp8.turned is None:
        return dy_TW @ fp8.wide(decode_into)
    dy_TN, d_low_TP = dy_TW.tensor_split([linear.num_outputs], dim=1)
    rounded_TN = decode_rows(*quantise_rows(dy_TN, GRADIENT_MOST)).to(dy_TN.dtype)
    dx_TK = rounded_TN @ decode_rows(fp8.turned.plain, fp8.turned.scales).t().to(dy_TN.dtype)
    return dx_TK.addmm_(d_low_TP, fp8.down) if d_low_TP.shape[1] else dx_TK


def of(linear: Linear) -> Fp8Weight:
    """The weight in e4m3; these operations know no other."""
    assert linear.fp8 is not None
    return linear.fp8


REFERENCE_FP8 = replace(REFERENCE, linear=linear, input_gradient=input_gradient)
