"""The gradients of thin matrices: sum over tokens of a wide and a thin row, read once, in a fixed order, in one launch.

G[n, r] += sum_t x[t, n] l[t, r]: dB with x = dy and l = s x A^T, dA with x the input and l = s dy B. Where the input is a norm's
output, x w / rms, it is not made again: the thin row is multiplied by 1/rms and the result's columns by w. The columns of
x may fall into up to three blocks, each with ranks of its own (the B of a group). The reference is ``weight_gradients`` of
engines.native.reference.

Legend: T tokens, N columns of x, R ranks of a block. Tokens are split over programs; the last one to finish a tile adds all partial
sums [splits, N, R] in order, so that the result does not depend on scheduling (plain atomics would). Kept for backward: nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.native import tiles
from engines.native.kernels.launching import OF_TOKENS, Tile, check_counters, check_rows, split_tokens

COLUMNS = 64  # a tile; blocks must begin at multiples of it
TILE = Tile(tokens=128, warps=4, stages=3)
TILES = tuple(Tile(tokens, 4, stages) for tokens, stages in itertools.product((64, 128, 256), (2, 3)))  # what --tune chooses among
_PROGRAMS = 528  # four for each of an H100's 132 multiprocessors
_MAX_BLOCKS = 3
PARTIALS_AT_ONCE = 4  # an H100 holds four programs: 108 registers a thread at most, as many as fit into shared memory. With 8, 137: three


@triton.jit
def _add_partials(partial, places, inside, size, splits, AT_ONCE: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """The sum of all partial sums, ``size`` values apart, in order. ``AT_ONCE`` are fetched together; a loop of any length fetches one."""
    sums = tl.zeros((BN, BR), tl.float32)
    for first in range(0, splits, AT_ONCE):
        for each in tl.static_range(AT_ONCE):
            there = inside & (first + each < splits)  # 0 is added for others, which leaves every bit as it is
            sums += tl.load(partial + (first + each) * size + places, mask=there, other=0.0, cache_modifier=".cg")
    return sums


@triton.jit
def _add_result(sums, place, inside, weight, columns, N, NORMED: tl.constexpr):
    if NORMED:
        sums *= tl.load(weight + columns, mask=columns < N, other=0.0).to(tl.float32)[:, None]
    before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (before + sums).to(place.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=OF_TOKENS)
def _outer(
    x, thin, inverse, weight, partial, arrived, gradient, T, N, R, second, third, x_stride, thin_stride, column_stride, rank_stride,
    tokens_each, splits, NORMED: tl.constexpr, AT_ONCE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    columns = tile * BN + tl.arange(0, BN)
    ranks = tl.arange(0, BR)
    block = (tile * BN >= second).to(tl.int32) + (tile * BN >= third).to(tl.int32)
    total = tl.zeros((BN, BR), tl.float32)
    end = tl.minimum(T, (split + 1) * tokens_each)
    for first in range(split * tokens_each, end, BT):
        tokens = first + tl.arange(0, BT)
        there = tokens < end
        rows = tokens.to(tl.int64)[:, None]
        wide = tl.load(x + rows * x_stride + columns[None, :], mask=there[:, None] & (columns < N)[None, :], other=0.0)
        low = tl.load(thin + rows * thin_stride + (block * R + ranks)[None, :], mask=there[:, None] & (ranks < R)[None, :], other=0.0)
        if NORMED:
            r = tl.load(inverse + tokens, mask=there, other=0.0)
            low = (low.to(tl.float32) * r[:, None]).to(thin.dtype.element_ty)
        total = tl.dot(tl.trans(wide), low, total, input_precision="ieee")
    inside = (columns < N)[:, None] & (ranks < R)[None, :]
    places = columns.to(tl.int64)[:, None] * R + ranks[None, :]
    place = gradient + columns.to(tl.int64)[:, None] * column_stride + ranks[None, :] * rank_stride
    if splits > 1:
        tl.store(partial + split * N * R + places, total, mask=inside)
        tl.debug_barrier()  # every thread has stored before the program says so
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == splits - 1:
            sums = _add_partials(partial, places, inside, N * R, splits, AT_ONCE, BN, BR)
            tl.store(arrived + tile, 0)
            _add_result(sums, place, inside, weight, columns, N, NORMED)
    else:
        _add_result(total, place, inside, weight, columns, N, NORMED)


def add_outer_(
    gradient_NR: Tensor,
    x_TN: Tensor,
    thin_TR: Tensor,
    arrived: Tensor,
    norm: tuple[Tensor, Tensor] | None = None,
    starts: Sequence[int] = (),
    tile: Tile | None = None,
) -> None:
    """gradient[N, R] += x^T thin; with ``norm`` = (1/rms [T], w [N]) the x that counts is x w / rms. Any strides of ``gradient``.

    ``arrived``: int32 counters, one for each ``COLUMNS`` columns or more, zero before and after; nothing else may use them meanwhile.
    ``starts``: the columns where a second and a third block begin, multiples of ``COLUMNS``; block i reads the ranks from i R of ``thin``.
    ``tile``: null for this GPU's.
    """
    (columns, ranks), tokens = gradient_NR.shape, len(x_TN)
    if x_TN.shape[1] != columns:
        raise ValueError(f"gradient is {list(gradient_NR.shape)}; expected [{x_TN.shape[1]}, ranks]")
    check_rows("x", x_TN, tokens, columns)
    check_rows("thin", thin_TR, tokens, ranks * (len(starts) + 1))
    if len(starts) >= _MAX_BLOCKS or any(start % COLUMNS for start in starts):
        raise ValueError(f"blocks begin at {list(starts)}; expected at most {_MAX_BLOCKS - 1} multiples of {COLUMNS}")
    num_tiles = triton.cdiv(columns, COLUMNS)
    check_counters(arrived, num_tiles)
    tile = tile or tiles.chosen("outer" if norm is None else "outer_normed", x_TN.device, tokens * columns, TILE)
    splits, tokens_each = split_tokens(tokens, num_tiles, tile, _PROGRAMS)
    partial = torch.empty(splits if splits > 1 else 0, columns, ranks, dtype=torch.float32, device=x_TN.device)
    inverse, weight = (x_TN, x_TN) if norm is None else norm
    second, third = [*starts, columns, columns][:2]
    _outer[(num_tiles, splits)](
        x_TN, thin_TR, inverse, weight, partial, arrived, gradient_NR, tokens, columns, ranks, second, third,
        x_TN.stride(0), thin_TR.stride(0), gradient_NR.stride(0), gradient_NR.stride(1), tokens_each, splits,
        NORMED=norm is not None, AT_ONCE=PARTIALS_AT_ONCE, BT=tile.tokens, BN=COLUMNS, BR=max(16, triton.next_power_of_2(ranks)),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
