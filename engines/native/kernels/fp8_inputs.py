"""RMSNorm and SwiGLU that also round what they make to e4m3, for 8-bit products; the unrounded result is what the adapters read.

The values are those of ``rms_norm`` and ``swiglu``, their codes and scales those of ``quantise_wide``, but for the scale, which here
knows nothing of the thin part: ``write_low`` stores that behind the codes once it is known.
References: ``norm`` and ``swiglu`` of engines.native.reference, ``harness.fp8``.

Legend: T rows, H columns of x, K of h; codes are [T, H + 3P] or [T, K + 3P], P spare columns in three parts that stay unwritten.
Kept for backward: as there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.native.fp8 import SPLITS
from engines.native.kernels.fp8 import _to_code
from engines.native.kernels.launching import check_rows, row_block, row_warps
from engines.native.kernels.swiglu import _activate
from harness.fp8 import ACTIVATION_MOST, CODE


@triton.jit
def _store_codes(values, codes, scales, row, columns, inside, codes_stride, MOST: tl.constexpr, BY_HAND: tl.constexpr):
    largest = tl.max(tl.abs(values), axis=0)
    largest = tl.where(largest > 0.0, largest, 1.0)
    most = tl.full((1,), MOST, tl.float32)
    tl.store(scales + row + tl.arange(0, 1), tl.div_rn(largest + tl.zeros((1,), tl.float32), most))
    factor = tl.div_rn(most, largest + tl.zeros((1,), tl.float32))
    tl.store(codes + row * codes_stride + columns, _to_code(values * factor, codes.dtype.element_ty, BY_HAND), mask=inside)


@triton.jit
def _rms_norm_codes(
    x, delta, w, sums, y, inverse, codes, scales, epsilon, H, x_stride, delta_stride, y_stride, codes_stride,
    BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr, MOST: tl.constexpr, BY_HAND: tl.constexpr,
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
    made = (normalised * weight).to(y.dtype.element_ty)
    tl.store(y + row * y_stride + columns, made, mask=inside)
    _store_codes(made.to(tl.float32), codes, scales, row, columns, inside, codes_stride, MOST, BY_HAND)


@triton.jit
def _swiglu_codes(
    gate_up, h, codes, scales, K, gate_up_stride, h_stride, codes_stride,
    BLOCK: tl.constexpr, MOST: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    start = gate_up + row * gate_up_stride + columns
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + K, mask=inside, other=0.0).to(tl.float32)
    _, _, value = _activate(gate, up, h.dtype.element_ty)
    tl.store(h + row * h_stride + columns, value, mask=inside)
    _store_codes(value.to(tl.float32), codes, scales, row, columns, inside, codes_stride, MOST, BY_HAND)


def rms_norm_codes(x_TH: Tensor, w_H: Tensor, epsilon: float, room: int, delta_TH: Tensor | None) -> tuple[Tensor, ...]:
    """(y [T, H], r [T] in float32, the sum [T, H], codes [T, H + 3 ``room``], scales [T]): as ``rms_norm``, without room behind y."""
    rows, columns = x_TH.shape
    check_rows("x", x_TH, rows, columns)
    delta = x_TH if delta_TH is None else delta_TH
    check_rows("delta", delta, rows, columns)
    y_TH = x_TH.new_empty(rows, columns)
    sums_TH = x_TH if delta_TH is None else torch.empty_like(y_TH)
    inverse_T = torch.empty(rows, dtype=torch.float32, device=x_TH.device)
    codes, scales_T = _room_for_codes(x_TH, columns, room)
    block = row_block(columns)
    _rms_norm_codes[(rows,)](
        x_TH, delta, w_H, sums_TH, y_TH, inverse_T, codes, scales_T, epsilon, columns, x_TH.stride(0), delta.stride(0), y_TH.stride(0),
        codes.stride(0), BLOCK=block, HAS_DELTA=delta_TH is not None, MOST=ACTIVATION_MOST, BY_HAND=triton.knobs.runtime.interpret,
        num_warps=row_warps(block),
    )  # fmt: skip
    return y_TH, inverse_T, sums_TH, codes, scales_T


def swiglu_codes(gate_up_TN: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """(h [T, K], codes [T, K + 3 ``room``], scales [T]) from gate_up [T, 2K], whose rows may be longer in memory."""
    rows, columns = gate_up_TN.shape[0], gate_up_TN.shape[1] // 2
    check_rows("gate_up", gate_up_TN, rows, 2 * columns)
    h_TK = gate_up_TN.new_empty(rows, columns)
    codes, scales_T = _room_for_codes(gate_up_TN, columns, room)
    block = row_block(columns)
    _swiglu_codes[(rows,)](
        gate_up_TN, h_TK, codes, scales_T, columns, gate_up_TN.stride(0), h_TK.stride(0), codes.stride(0),
        BLOCK=block, MOST=ACTIVATION_MOST, BY_HAND=triton.knobs.runtime.interpret, num_warps=row_warps(block),
    )  # fmt: skip
    return h_TK, codes, scales_T


def _room_for_codes(like: Tensor, columns: int, room: int) -> tuple[Tensor, Tensor]:
    rows = len(like)
    codes = torch.empty(rows, columns + SPLITS * room, dtype=CODE, device=like.device)
    return codes, torch.empty(rows, dtype=torch.float32, device=like.device)
