"""Rotary embedding in place on the projected queries and keys, and its backward, which also lays the gradients side by side.

(a, b) -> (a cos - b sin, b cos + a sin) for the pairs (i, i + D/2) of every head (Su et al. 2021); backward turns by -sin.
The reference is ``rotate_`` and ``rotate_back`` of engines.native.reference.

Legend: T tokens, C query heads, G key-value heads, D head dimension, N = (C + 2G) D, P spare columns, written as zeros.
Kept for backward: nothing but the angles, [T, D/2] in float32, shared by all layers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engines.native.kernels.launching import check_heads, check_rows

_HEADS = 8  # heads a program: with D = 128 two loads of 1 KiB


@triton.jit
def _rotate(x, cosine, sine, num_heads, x_stride, HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, BLOCK)
    inside = (heads < num_heads)[:, None] & (pairs < HALF)[None, :]
    cos = tl.load(cosine + token * HALF + pairs, mask=pairs < HALF, other=1.0)[None, :]
    sin = tl.load(sine + token * HALF + pairs, mask=pairs < HALF, other=0.0)[None, :]
    place = x + token * x_stride + heads[:, None] * (2 * HALF) + pairs[None, :]
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (first * cos - second * sin).to(x.dtype.element_ty), mask=inside)
    tl.store(place + HALF, (second * cos + first * sin).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _turn_back(source, start, count, out, token, source_stride, cos, sin, HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    heads = start + tl.arange(0, HEADS)
    pairs = tl.arange(0, BLOCK)
    inside = (heads < count)[:, None] & (pairs < HALF)[None, :]
    offsets = heads[:, None] * (2 * HALF) + pairs[None, :]
    first = tl.load(source + token * source_stride + offsets, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + token * source_stride + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, (first * cos + second * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(out + offsets + HALF, (second * cos - first * sin).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _lay_values(
    dv, start, C, G, row, token, dv_stride, cos, sin,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """The gradients of some values as they are, behind queries and keys; with the first of them the zeros behind all."""
    _turn_back(dv, start, G, row + (C + G) * 2 * HALF, token, dv_stride, cos * 0 + 1, sin * 0, HALF, BLOCK, HEADS)
    if P > 0:
        if start == 0:
            spare = tl.arange(0, PAD)
            tl.store(row + (C + 2 * G) * 2 * HALF + spare, tl.zeros((PAD,), row.dtype.element_ty), mask=spare < P)


@triton.jit
def _rotate_back(
    dq, dk, dv, cosine, sine, out, C, G, dq_stride, dk_stride, dv_stride, out_stride, query_programs, key_programs,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    pairs = tl.arange(0, BLOCK)
    cos = tl.load(cosine + token * HALF + pairs, mask=pairs < HALF, other=1.0)[None, :]
    sin = tl.load(sine + token * HALF + pairs, mask=pairs < HALF, other=0.0)[None, :]
    row = out + token * out_stride
    if program < query_programs:
        _turn_back(dq, program * HEADS, C, row, token, dq_stride, cos, sin, HALF, BLOCK, HEADS)
    elif program < query_programs + key_programs:
        _turn_back(dk, (program - query_programs) * HEADS, G, row + C * 2 * HALF, token, dk_stride, cos, sin, HALF, BLOCK, HEADS)
    else:
        start = (program - query_programs - key_programs) * HEADS
        _lay_values(dv, start, C, G, row, token, dv_stride, cos, sin, HALF, BLOCK, HEADS, P, PAD)


def rotate_(x_TN: Tensor, num_heads: int, cosine: Tensor, sine: Tensor) -> None:
    """Rotate ``num_heads`` heads that lie side by side in the rows of ``x``, in place."""
    half = cosine.shape[1]
    check_rows("x", x_TN, len(cosine), num_heads * 2 * half)
    _rotate[(len(x_TN), triton.cdiv(num_heads, _HEADS))](
        x_TN, cosine, sine, num_heads, x_TN.stride(0), HALF=half, BLOCK=triton.next_power_of_2(half), HEADS=_HEADS, num_warps=2
    )


def rotate_back(dq_TCD: Tensor, dk_TGD: Tensor, dv_TGD: Tensor, cosine: Tensor, sine: Tensor, room: int) -> Tensor:
    """[T, N + ``room``]: dq and dk turned back, dv as it is, zeros in the room."""
    (tokens, heads, head_dim), kv_heads = dq_TCD.shape, dk_TGD.shape[1]
    half = head_dim // 2
    check_heads(dq=dq_TCD, dk=dk_TGD, dv=dv_TGD)
    out_TW = dq_TCD.new_empty(tokens, (heads + 2 * kv_heads) * head_dim + room)
    query_programs, key_programs = triton.cdiv(heads, _HEADS), triton.cdiv(kv_heads, _HEADS)
    _rotate_back[(tokens, query_programs + 2 * key_programs)](
        dq_TCD, dk_TGD, dv_TGD, cosine, sine, out_TW, heads, kv_heads,
        dq_TCD.stride(0), dk_TGD.stride(0), dv_TGD.stride(0), out_TW.stride(0), query_programs, key_programs,
        HALF=half, BLOCK=triton.next_power_of_2(half), HEADS=_HEADS, P=room, PAD=triton.next_power_of_2(max(1, room)), num_warps=2,
    )  # fmt: skip
    return out_TW
