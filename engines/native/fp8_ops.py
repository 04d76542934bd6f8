"""FUSED_FP8: the fused operations on linear groups in e4m3, for GPUs with 8-bit floating-point tensor cores.

Legend: T tokens, N output and K input columns of a linear group, P its padded ranks, W = N + P.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engines.native.fp8 import Fp8Rows
from engines.native.fp8_reference import of
from engines.native.fused_ops import FUSED
from engines.native.kernels.fp8 import decode_rows, quantise_wide, write_tail
from engines.native.ops import Input
from engines.native.weights import Linear


def linear(input: Input, linear: Linear, room: int) -> Tensor:
    """The wide input rounded, and one 8-bit product, adapters included; rows of zeros below the weight make the room."""
    y_TN = _product(input.wide, linear.num_inputs, of(linear).forward_codes(write_tail), linear.num_outputs + room)[:, : linear.num_outputs]
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
    return _product(dy_TW, linear.num_outputs, fp8.turned_codes(write_tail), linear.num_inputs)


def _product(wide_TW: Tensor, num_columns: int, rows: Fp8Rows, num_rows: int) -> Tensor:
    """[T, M] in bf16; sums are kept in the tensor cores' own precision (fast accumulation)."""
    codes, scales_T = quantise_wide(wide_TW, num_columns)
    made: Tensor = torch._scaled_mm(
        codes, rows.codes[:num_rows].t(), scales_T.unsqueeze(1), rows.scales[:num_rows].unsqueeze(0), out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip
    return made


FUSED_FP8 = replace(FUSED, linear=linear, fill=fill, input_gradient=input_gradient)
