"""RMSNorm of every query and key and their rotary embedding in one pass, forward and backward (Qwen3's layers).

With z = x r, r = 1 / sqrt(mean(x^2) + epsilon) over the D values of a head: forward rotates z w; backward turns the gradient back to g
and makes r (w g - z mean(w g z)) of it, side by side with the values' gradient. The reference is ``rotate`` and ``rotate_back`` of
engines.native.reference.

Legend: T tokens, C query heads, G key-value heads, D head dimension, N = (C + 2G) D, P spare columns, written as zeros.
Kept for backward: nothing; r is made again from the projected heads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engines.native.kernels.launching import check_heads, check_rows
from engines.native.kernels.rotary import _lay_values

_HEADS = 8  # heads a program
_WARPS = 4


@triton.jit
def _norm_rotate(
    x, query_weight, key_weight, out, cosine, sine, C, num_heads, epsilon, x_stride,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, BLOCK)
    real = pairs < HALF
    inside = (heads < num_heads)[:, None] & real[None, :]
    cos = tl.load(cosine + token * HALF + pairs, mask=real, other=1.0)[None, :]
    sin = tl.load(sine + token * HALF + pairs, mask=real, other=0.0)[None, :]
    offsets = heads[:, None] * (2 * HALF) + pairs[None, :]
    first = tl.load(x + token * x_stride + offsets, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + token * x_stride + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF) + epsilon)[:, None]
    is_query = (heads < C)[:, None]
    query_first = tl.load(query_weight + pairs, mask=real, other=0.0)[None, :]
    query_second = tl.load(query_weight + HALF + pairs, mask=real, other=0.0)[None, :]
    key_first = tl.load(key_weight + pairs, mask=real, other=0.0)[None, :]
    key_second = tl.load(key_weight + HALF + pairs, mask=real, other=0.0)[None, :]
    first = (first * r).to(out.dtype.element_ty).to(tl.float32) * tl.where(is_query, query_first, key_first).to(tl.float32)
    second = (second * r).to(out.dtype.element_ty).to(tl.float32) * tl.where(is_query, query_second, key_second).to(tl.float32)
    place = out + token * num_heads * (2 * HALF) + offsets
    tl.store(place, (first * cos - second * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(place + HALF, (second * cos + first * sin).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_back(
    dy, x, weight, epsilon, start, count, out, token, dy_stride, x_stride, cos, sin,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    heads = start + tl.arange(0, HEADS)
    pairs = tl.arange(0, BLOCK)
    real = pairs < HALF
    inside = (heads < count)[:, None] & real[None, :]
    offsets = heads[:, None] * (2 * HALF) + pairs[None, :]
    dy_first = tl.load(dy + token * dy_stride + offsets, mask=inside, other=0.0).to(tl.float32)
    dy_second = tl.load(dy + token * dy_stride + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(x + token * x_stride + offsets, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + token * x_stride + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF) + epsilon)[:, None]
    first *= r
    second *= r
    g_first = (dy_first * cos + dy_second * sin) * tl.load(weight + pairs, mask=real, other=0.0).to(tl.float32)[None, :]
    g_second = (dy_second * cos - dy_first * sin) * tl.load(weight + HALF + pairs, mask=real, other=0.0).to(tl.float32)[None, :]
    mean = ((tl.sum(g_first * first, axis=1) + tl.sum(g_second * second, axis=1)) / (2 * HALF))[:, None]
    tl.store(out + offsets, ((g_first - first * mean) * r).to(out.dtype.element_ty), mask=inside)
    tl.store(out + offsets + HALF, ((g_second - second * mean) * r).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rotate_back(
    dq, dk, dv, x, query_weight, key_weight, cosine, sine, out, C, G, epsilon, dq_stride, dk_stride, dv_stride, x_stride, out_stride,
    query_programs, key_programs, HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    pairs = tl.arange(0, BLOCK)
    cos = tl.load(cosine + token * HALF + pairs, mask=pairs < HALF, other=1.0)[None, :]
    sin = tl.load(sine + token * HALF + pairs, mask=pairs < HALF, other=0.0)[None, :]
    row = out + token * out_stride
    if program < query_programs:
        _norm_back(dq, x, query_weight, epsilon, program * HEADS, C, row, token, dq_stride, x_stride, cos, sin, HALF, BLOCK, HEADS)
    elif program < query_programs + key_programs:
        start, skipped = (program - query_programs) * HEADS, C * 2 * HALF
        _norm_back(dk, x + skipped, key_weight, epsilon, start, G, row + skipped, token, dk_stride, x_stride, cos, sin, HALF, BLOCK, HEADS)
    else:
        start = (program - query_programs - key_programs) * HEADS
        _lay_values(dv, start, C, G, row, token, dv_stride, cos, sin, HALF, BLOCK, HEADS, P, PAD)


def norm_rotate(
    x_TN: Tensor, num_heads: int, num_kv_heads: int, query_weight: Tensor, key_weight: Tensor, epsilon: float, cosine: Tensor, sine: Tensor
) -> Tensor:
    """[T, C + G, D]: the queries and keys that lie side by side in the rows of ``x``, normed by their weights [D] and rotated."""
    half, together = cosine.shape[1], num_heads + num_kv_heads
    check_rows("x", x_TN, len(cosine), together * 2 * half)
    out = x_TN.new_empty(len(x_TN), together, 2 * half)
    _norm_rotate[(len(x_TN), triton.cdiv(together, _HEADS))](
        x_TN, query_weight, key_weight, out, cosine, sine, num_heads, together, epsilon, x_TN.stride(0),
        HALF=half, BLOCK=triton.next_power_of_2(half), HEADS=_HEADS, num_warps=_WARPS,
    )  # fmt: skip
    return out


def norm_rotate_back(
    dq_TCD: Tensor, dk_TGD: Tensor, dv_TGD: Tensor, x_TN: Tensor, query_weight: Tensor, key_weight: Tensor, epsilon: float, cosine: Tensor,
    sine: Tensor, room: int,
) -> Tensor:  # fmt: skip
    """[T, N + ``room``]: dq and dk turned back and through their norms, dv as it is, zeros in the room. ``x``: as in forward."""
    (tokens, heads, head_dim), kv_heads = dq_TCD.shape, dk_TGD.shape[1]
    half = head_dim // 2
    check_rows("x", x_TN, tokens, (heads + kv_heads) * head_dim)
    check_heads(dq=dq_TCD, dk=dk_TGD, dv=dv_TGD)
    out_TW = dq_TCD.new_empty(tokens, (heads + 2 * kv_heads) * head_dim + room)
    query_programs, key_programs = triton.cdiv(heads, _HEADS), triton.cdiv(kv_heads, _HEADS)
    _norm_rotate_back[(tokens, query_programs + 2 * key_programs)](
        dq_TCD, dk_TGD, dv_TGD, x_TN, query_weight, key_weight, cosine, sine, out_TW, heads, kv_heads, epsilon,
        dq_TCD.stride(0), dk_TGD.stride(0), dv_TGD.stride(0), x_TN.stride(0), out_TW.stride(0), query_programs, key_programs,
        HALF=half, BLOCK=triton.next_power_of_2(half), HEADS=_HEADS, P=room, PAD=triton.next_power_of_2(max(1, room)), num_warps=_WARPS,
    )  # fmt: skip
    return out_TW
