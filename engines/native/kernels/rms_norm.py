"""The sum of the residual stream and its RMSNorm in one pass, forward; backward with the residual gradient added.

y = bf16(x r) w with r = 1 / sqrt(mean(x^2) + epsilon) (Zhang and Sennrich 2019); dx = r (w dy - z mean(w dy z)) + residual, z = x r.
The reference is ``norm`` and ``norm_backward`` of engines.native.reference.

Legend: T rows, H columns, P spare columns behind each row of the output, written as zeros.
Kept for backward: the sum x (the caller's), r [T] in float32: 4 bytes a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.native.kernels.launching import check_rows, row_block, row_warps


@triton.jit
def _rms_norm_forward(
    x, delta, w, sums, y, inverse, epsilon, H, x_stride, delta_stride, y_stride,
    BLOCK: tl.constexpr, P: tl.constexpr, PAD: tl.constexpr, HAS_DELTA: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + row * delta_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(y.dtype.element_ty)
        tl.store(sums + row * H + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, axis=0) / H + epsilon)
    tl.store(inverse + row, r)
    weight = tl.load(w + columns, mask=inside, other=0.0).to(tl.float32)
    normalised = (value * r).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * y_stride + columns, (normalised * weight).to(y.dtype.element_ty), mask=inside)
    if P > 0:
        spare = tl.arange(0, PAD)
        tl.store(y + row * y_stride + H + spare, tl.zeros((PAD,), y.dtype.element_ty), mask=spare < P)


@triton.jit
def _rms_norm_backward(
    dy, x, w, inverse, residual, dx, H, dy_stride, x_stride, residual_stride, dx_stride,
    BLOCK: tl.constexpr, P: tl.constexpr, PAD: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    r = tl.load(inverse + row)
    z = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32) * r
    scaled = tl.load(dy + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scaled *= tl.load(w + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(scaled * z, axis=0) / H
    value = (scaled - z * mean) * r
    if HAS_RESIDUAL:
        value += tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * dx_stride + columns, value.to(dx.dtype.element_ty), mask=inside)
    if P > 0:
        spare = tl.arange(0, PAD)
        tl.store(dx + row * dx_stride + H + spare, tl.zeros((PAD,), dx.dtype.element_ty), mask=spare < P)


def rms_norm(x_TH: Tensor, w_H: Tensor, epsilon: float, room: int, delta_TH: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(y [T, H + ``room``] with zeros in the room, r [T] in float32, the sum [T, H]: x itself where there is no ``delta``)."""
    rows, columns = x_TH.shape
    check_rows("x", x_TH, rows, columns)
    delta = x_TH if delta_TH is None else delta_TH
    check_rows("delta", delta, rows, columns)
    y_TW = x_TH.new_empty(rows, columns + room)
    sums_TH = x_TH if delta_TH is None else x_TH.new_empty(rows, columns)
    inverse_T = torch.empty(rows, dtype=torch.float32, device=x_TH.device)
    block = row_block(columns)
    _rms_norm_forward[(rows,)](
        x_TH, delta, w_H, sums_TH, y_TW, inverse_T, epsilon, columns, x_TH.stride(0), delta.stride(0), y_TW.stride(0),
        BLOCK=block, P=room, PAD=triton.next_power_of_2(max(1, room)), HAS_DELTA=delta_TH is not None, num_warps=row_warps(block),
    )  # fmt: skip
    return y_TW, inverse_T, sums_TH


def rms_norm_backward(dy_TH: Tensor, x_TH: Tensor, w_H: Tensor, inverse_T: Tensor, residual_TH: Tensor | None, room: int) -> Tensor:
    """dx [T, H + ``room``] with zeros in the room; ``residual`` [T, >= H] is added to it."""
    rows, columns = x_TH.shape
    check_rows("x", x_TH, rows, columns)
    check_rows("dy", dy_TH, rows, columns)
    residual = x_TH if residual_TH is None else residual_TH
    check_rows("residual", residual, rows, columns)
    dx_TW = x_TH.new_empty(rows, columns + room)
    block = row_block(columns)
    _rms_norm_backward[(rows,)](
        dy_TH, x_TH, w_H, inverse_T, residual, dx_TW, columns, dy_TH.stride(0), x_TH.stride(0), residual.stride(0), dx_TW.stride(0),
        BLOCK=block, P=room, PAD=triton.next_power_of_2(max(1, room)), HAS_RESIDUAL=residual_TH is not None, num_warps=row_warps(block),
    )  # fmt: skip
    return dx_TW
