"""FUSED_FP8: the fused operations on linear groups in e4m3, for GPUs with 8-bit floating-point tensor cores.

Legend: T tokens, N output and K input columns of a linear group, P its padded ranks, W = N + P.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engines.native.fp8 import GRADIENT_MOST, Fp8Rows
from engines.native.fp8_reference import of
from engines.native.fused_ops import FUSED
from engines.native.kernels.fp8 import decode_rows, quantise_wide, write_low, write_tail
from engines.native.kernels.fp8_inputs import rms_norm_codes, swiglu_codes
from engines.native.kernels.launching import MAX_ROW
from engines.native.ops import Input, Normed
from engines.native.weights import Linear, Weight


def norm(x_TH: Tensor, delta_TH: Tensor | None, weight: Weight, epsilon: float, linear: Linear) -> Normed:
    """The sum, its RMSNorm and that rounded, in one kernel; the unrounded one lives until x A^T is made."""
    y_TH, inverse_T, sum_TH, codes, scales_T = rms_norm_codes(x_TH, weight.value, epsilon, linear.padded_rank, delta_TH)
    return Normed(_with_low(y_TH, codes, scales_T, linear), sum_TH, inverse_T)


def swiglu(gate_up_TN: Tensor, linear: Linear) -> Input:
    """h and its codes in one kernel, and one product for h A^T; rows too wide for that are rounded by the product that reads them."""
    if linear.num_inputs > MAX_ROW:
        return FUSED.swiglu(gate_up_TN, linear)
    h_TK, codes, scales_T = swiglu_codes(gate_up_TN, linear.padded_rank)
    return _with_low(h_TK, codes, scales_T, linear)


def linear(input: Input, linear: Linear, room: int) -> Tensor:
    """One 8-bit product, adapters included; rows of zeros below the weight make the room. Attention's output is rounded here."""
    outputs, rows = linear.num_outputs, of(linear).forward_codes(write_tail)
    read = (input.wide, input.scales) if input.scales is not None else quantise_wide(input.wide, linear.num_inputs)
    y_TN = _product(*read, rows, outputs + room)[:, :outputs]
    return y_TN if linear.bias is None else y_TN.add_(linear.bias.value)


def fill(dy_TW: Tensor, linear: Linear) -> None:
    """s dy B into the columns from N on, one product in bf16."""
    if linear.lora is None:
        return
    outputs, into = linear.num_outputs, dy_TW[:, linear.num_outputs :]
    torch.addmm(into, dy_TW[:, :outputs], of(linear).up, beta=0, alpha=linear.lora.scale, out=into)


def input_gradient(dy_TW: Tensor, linear: Linear) -> Tensor:
    """dx from the filled dy: one 8-bit product of its rounded rows, or one in bf16 with the decoded weight."""
    fp8 = of(linear)
    if fp8.turned is None:
        return dy_TW @ fp8.wide(decode_rows)
    return _product(*quantise_wide(dy_TW, linear.num_outputs, GRADIENT_MOST), fp8.turned_codes(write_tail), linear.num_inputs)


def _with_low(x_TK: Tensor, codes: Tensor, scales_T: Tensor, linear: Linear) -> Input:
    """s x A^T, and its split behind the codes of x."""
    if linear.lora is None:
        return Input(codes, None, scales_T)
    down_PK = of(linear).down
    low_TP = x_TK.new_empty(len(x_TK), len(down_PK))
    torch.addmm(low_TP, x_TK, down_PK.t(), beta=0, alpha=linear.lora.scale, out=low_TP)
    write_low(codes, scales_T, low_TP)
    return Input(codes, low_TP, scales_T)


def _product(codes: Tensor, scales_T: Tensor, rows: Fp8Rows, num_rows: int) -> Tensor:
    """[T, M] in bf16; sums are kept in the tensor cores' own precision (fast accumulation)."""
    made: Tensor = torch._scaled_mm(
        codes, rows.codes[:num_rows].t(), scales_T.unsqueeze(1), rows.scales[:num_rows].unsqueeze(0), out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip
    return made


FUSED_FP8 = replace(FUSED, norm=norm, swiglu=swiglu, linear=linear, fill=fill, input_gradient=input_gradient)
