"""The gradients of thin matrices: sum over tokens of a wide and a thin row, read once, in a fixed order.

G[n, r] += sum_t x[t, n] l[t, r]: dB with x = dy and l = s x A^T, dA with x the input and l = s dy B. Where the input is a norm's
output, x w / rms, neither is made again: the thin row is multiplied by 1/rms and the result's columns by w.
The reference is ``weight_gradients`` of engines.native.reference.

Legend: T tokens, N columns of x, R ranks. Tokens are split over programs whose partial sums [splits, N, R] a second kernel adds in order,
so that the result does not depend on scheduling (atomics would). Kept for backward: nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.native.kernels.launching import check_rows

_COLUMNS = 64
_TOKENS = 128
_PROGRAMS = 528  # four for each of an H100's 132 multiprocessors


@triton.jit
def _outer_partial(
    x, thin, inverse, partial, T, N, R, x_stride, thin_stride, tokens_each,
    NORMED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    ranks = tl.arange(0, BR)
    total = tl.zeros((BN, BR), tl.float32)
    for first in range(split * tokens_each, tl.minimum(T, (split + 1) * tokens_each), BT):
        tokens = first + tl.arange(0, BT)
        there = tokens < tl.minimum(T, (split + 1) * tokens_each)
        rows = tokens.to(tl.int64)[:, None]
        wide = tl.load(x + rows * x_stride + columns[None, :], mask=there[:, None] & (columns < N)[None, :], other=0.0)
        low = tl.load(thin + rows * thin_stride + ranks[None, :], mask=there[:, None] & (ranks < R)[None, :], other=0.0)
        if NORMED:
            r = tl.load(inverse + tokens, mask=there, other=0.0)
            low = (low.to(tl.float32) * r[:, None]).to(thin.dtype.element_ty)
        total = tl.dot(tl.trans(wide), low, total, input_precision="ieee")
    place = partial + (split * N + columns.to(tl.int64)[:, None]) * R + ranks[None, :]
    tl.store(place, total, mask=(columns < N)[:, None] & (ranks < R)[None, :])


@triton.jit
def _outer_sum(
    partial, weight, gradient, N, R, splits, column_stride, rank_stride, NORMED: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, BR)
    inside = (columns < N)[:, None] & (ranks < R)[None, :]
    total = tl.zeros((BN, BR), tl.float32)
    for split in range(splits):
        place = partial + (split * N + columns.to(tl.int64)[:, None]) * R + ranks[None, :]
        total += tl.load(place, mask=inside, other=0.0)
    if NORMED:
        total *= tl.load(weight + columns, mask=columns < N, other=0.0).to(tl.float32)[:, None]
    place = gradient + columns.to(tl.int64)[:, None] * column_stride + ranks[None, :] * rank_stride
    before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (before + total).to(gradient.dtype.element_ty), mask=inside)


def add_outer_(gradient_NR: Tensor, x_TN: Tensor, thin_TR: Tensor, norm: tuple[Tensor, Tensor] | None = None) -> None:
    """gradient[N, R] += x^T thin; with ``norm`` = (1/rms [T], w [N]) the x that counts is x w / rms. Any strides of ``gradient``."""
    tokens, columns, ranks = len(x_TN), x_TN.shape[1], thin_TR.shape[1]
    check_rows("x", x_TN, tokens, columns)
    check_rows("thin", thin_TR, tokens, ranks)
    if gradient_NR.shape != (columns, ranks):
        raise ValueError(f"gradient is {list(gradient_NR.shape)}; expected [{columns}, {ranks}]")
    block = max(16, triton.next_power_of_2(ranks))
    tiles = triton.cdiv(columns, _COLUMNS)
    splits = max(1, min(triton.cdiv(_PROGRAMS, tiles), triton.cdiv(tokens, 2 * _TOKENS)))
    tokens_each = triton.cdiv(triton.cdiv(tokens, splits), _TOKENS) * _TOKENS
    splits = triton.cdiv(tokens, tokens_each)
    partial = torch.empty(splits, columns, ranks, dtype=torch.float32, device=x_TN.device)
    inverse, weight = (x_TN, x_TN) if norm is None else norm
    _outer_partial[(tiles, splits)](
        x_TN, thin_TR, inverse, partial, tokens, columns, ranks, x_TN.stride(0), thin_TR.stride(0), tokens_each,
        NORMED=norm is not None, BT=_TOKENS, BN=_COLUMNS, BR=block, num_warps=4, num_stages=3,
    )  # fmt: skip
    _outer_sum[(tiles,)](
        partial, weight, gradient_NR, columns, ranks, splits, gradient_NR.stride(0), gradient_NR.stride(1),
        NORMED=norm is not None, BN=_COLUMNS, BR=block, num_warps=4,
    )  # fmt: skip
