"""Rows rounded to e4m3 for 8-bit products: activations with their thin parts split behind them, thin parts alone, and weights decoded.

q = e4m3(x m / max |x|) row by row, the scale max |x| / m; m is 16 for activations, 256 for gradients. A thin value v, in that scale,
becomes high = e4m3(v), low = e4m3(16 (v - high)), less = e4m3(high / 16): three columns of an activation high, low, less, of a weight
high, less, low. Where v would exceed 448 the scale grows with it; a thin part that comes later, when the scale is fixed, is cut off
there. References: ``harness.fp8`` and ``split_thin`` of engines.native.fp8.

Legend: T rows, L columns, P columns of a thin part. Kept for backward: nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.native.fp8 import LOW_GAIN, SPLITS, Fp8Rows
from engines.native.kernels.launching import check_rows
from harness.fp8 import ACTIVATION_MOST, CODE, LARGEST

MAX_ROW = 32768  # what one program holds in registers, 32 values a thread; wider rows are read twice
_EACH = 1024  # values a warp
_TAIL_ROWS = 64  # a program
_BLOCK = 2048  # columns a program decodes


@triton.jit
def _nearest(values):
    """The nearest values of e4m3, ties to even, in float32; of magnitudes up to 448."""
    bits = values.to(tl.int32, bitcast=True)
    bits = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) << 20
    small = (values + 24576.0) - 24576.0  # multiples of 2^-9, the least code
    return tl.where(tl.abs(values) < 0.015625, small, bits.to(tl.float32, bitcast=True))


@triton.jit
def _to_code(values, dtype: tl.constexpr, BY_HAND: tl.constexpr):
    """The nearest code; ``BY_HAND``: rounded before the conversion, which Triton's interpreter gets wrong."""
    if BY_HAND:
        values = _nearest(values)
    return values.to(dtype)


@triton.jit
def _store_thin(
    scaled, place, inside, FIRST: tl.constexpr, SECOND: tl.constexpr, P: tl.constexpr, GAIN: tl.constexpr, BY_HAND: tl.constexpr
):
    """high at ``place``, low and less ``FIRST`` and ``SECOND`` times P columns behind.

    high is not made by converting there and back: ptxas 12.8 then unpacks a register that was never written (F2FP.UNPACK_B of R1 on
    sm_90, two pairs of four; an H200's adapters were garbage by it, 2026-11-27).
    """
    exact = _nearest(scaled)
    tl.store(place, exact.to(place.dtype.element_ty), mask=inside)
    tl.store(place + FIRST * P, _to_code((scaled - exact) * GAIN, place.dtype.element_ty, BY_HAND), mask=inside)
    tl.store(place + SECOND * P, _to_code(exact / GAIN, place.dtype.element_ty, BY_HAND), mask=inside)


@triton.jit
def _quantise_wide(
    x, codes, scales, L, x_stride, codes_stride,
    BLOCK: tl.constexpr, P: tl.constexpr, PAD: tl.constexpr, SINGLE: tl.constexpr, MOST: tl.constexpr, LIMIT: tl.constexpr,
    GAIN: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start, into = x + row * x_stride, codes + row * codes_stride
    columns = tl.arange(0, BLOCK)
    ranks = tl.arange(0, PAD)
    thin = tl.load(start + L + ranks, mask=ranks < P, other=0.0).to(tl.float32)
    held = tl.load(start + columns, mask=columns < L, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(held), axis=0), tl.max(tl.abs(thin), axis=0) * (MOST / LIMIT))
    if not SINGLE:
        for first in range(BLOCK, L, BLOCK):
            more = tl.load(start + first + columns, mask=first + columns < L, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(more), axis=0))
    largest = tl.where(largest > 0.0, largest, 1.0)
    factor = tl.div_rn(tl.full((1,), MOST, tl.float32), largest)
    tl.store(scales + row + tl.arange(0, 1), tl.div_rn(largest + tl.zeros((1,), tl.float32), tl.full((1,), MOST, tl.float32)))
    tl.store(into + columns, _to_code(held * factor, codes.dtype.element_ty, BY_HAND), mask=columns < L)
    if not SINGLE:
        for first in range(BLOCK, L, BLOCK):
            inside = first + columns < L
            more = tl.load(start + first + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(into + first + columns, _to_code(more * factor, codes.dtype.element_ty, BY_HAND), mask=inside)
    if P > 0:
        _store_thin(thin * factor, into + L + ranks, ranks < P, 1, 2, P, GAIN, BY_HAND)


@triton.jit
def _write_tail(
    thin, codes, scales, M, L, row_stride, rank_stride, codes_stride,
    ROWS: tl.constexpr, P: tl.constexpr, PAD: tl.constexpr, LIMIT: tl.constexpr, GAIN: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, PAD)[None, :]
    wide = rows.to(tl.int64)[:, None]
    inside = (rows < M)[:, None] & (ranks < P)
    scale = tl.load(scales + rows, mask=rows < M, other=1.0)
    value = tl.load(thin + wide * row_stride + ranks * rank_stride, mask=inside, other=0.0).to(tl.float32)
    value = tl.minimum(tl.maximum(value / scale[:, None], -LIMIT), LIMIT)
    _store_thin(value, codes + wide * codes_stride + L + ranks, inside, FIRST, SECOND, P, GAIN, BY_HAND)


@triton.jit
def _decode_rows(codes, scales, out, L, codes_stride, out_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < L
    value = tl.load(codes + row * codes_stride + columns, mask=inside, other=0.0).to(tl.float32) * tl.load(scales + row)
    tl.store(out + row * out_stride + columns, value.to(out.dtype.element_ty), mask=inside)


def quantise_wide(wide_TW: Tensor, num_columns: int, most: float = ACTIVATION_MOST) -> tuple[Tensor, Tensor]:
    """(codes [T, L + 3P], scales [T]) of [x | thin part]: L = ``num_columns`` columns and P behind them.

    A row's largest magnitude becomes ``most``, a power of two, less where the thin part would exceed 448 in that scale.
    """
    rows, room = len(wide_TW), wide_TW.shape[1] - num_columns
    check_rows("wide", wide_TW, rows, num_columns)
    codes = torch.empty(rows, num_columns + SPLITS * room, dtype=CODE, device=wide_TW.device)
    scales_T = torch.empty(rows, dtype=torch.float32, device=wide_TW.device)
    block = min(MAX_ROW, triton.next_power_of_2(num_columns))
    _quantise_wide[(rows,)](
        wide_TW, codes, scales_T, num_columns, wide_TW.stride(0), codes.stride(0),
        BLOCK=block, P=room, PAD=triton.next_power_of_2(max(1, room)), SINGLE=block >= num_columns, MOST=most,
        LIMIT=LARGEST, GAIN=LOW_GAIN, BY_HAND=triton.knobs.runtime.interpret, num_warps=max(1, block // _EACH),
    )  # fmt: skip
    return codes, scales_T


def write_tail(rows: Fp8Rows, thin_MP: Tensor) -> None:
    """Split ``thin`` [M, P], of any strides, into the tails of the first M of ``rows``, a weight."""
    _write(rows.codes, rows.scales, rows.num_columns, thin_MP, first=2, second=1)


def write_low(codes: Tensor, scales_T: Tensor, low_TP: Tensor) -> None:
    """Split ``low`` [T, P] into the last 3P columns of ``codes``, an activation."""
    _write(codes, scales_T, codes.shape[1] - SPLITS * low_TP.shape[1], low_TP, first=1, second=2)


def _write(codes: Tensor, scales: Tensor, num_columns: int, thin_MP: Tensor, *, first: int, second: int) -> None:
    count, room = thin_MP.shape
    if count > len(codes) or codes.shape[1] != num_columns + SPLITS * room:
        raise ValueError(f"thin is {list(thin_MP.shape)} for tails of {codes.shape[1] - num_columns} columns of {len(codes)} rows")
    _write_tail[(triton.cdiv(count, _TAIL_ROWS),)](
        thin_MP, codes, scales, count, num_columns, thin_MP.stride(0), thin_MP.stride(1), codes.stride(0),
        ROWS=_TAIL_ROWS, P=room, PAD=triton.next_power_of_2(room), LIMIT=LARGEST, GAIN=LOW_GAIN, FIRST=first, SECOND=second,
        BY_HAND=triton.knobs.runtime.interpret, num_warps=4,
    )  # fmt: skip


def decode_rows(rows: Fp8Rows, out: Tensor) -> None:
    """Write the values of the first rows into ``out`` [M, L]."""
    check_rows("out", out, len(out), rows.num_columns)
    _decode_rows[(len(out), triton.cdiv(rows.num_columns, _BLOCK))](
        rows.codes, rows.scales, out, rows.num_columns, rows.codes.stride(0), out.stride(0), BLOCK=_BLOCK, num_warps=4
    )
