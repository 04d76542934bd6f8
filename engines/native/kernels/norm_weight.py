"""What training a norm's weight and the linears behind it takes of RMSNorm: dw, and the norm's output once more.

dw = sum_t dy x r with r = 1 / rms; y = bf16(x r) w as ``rms_norm`` made it. The reference is ``norm_backward`` and ``weight_gradients`` of
engines.native.reference.

Legend: T rows, H columns. Tokens are split over programs, whose partial sums [splits, H] are added in order afterwards.
Kept for backward: r [T] in float32, the norm's own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.native.kernels.launching import OF_TOKENS, Tile, check_rows, row_block, row_warps, split_tokens

COLUMNS = 128  # a tile
TILE = Tile(tokens=32, warps=4, stages=2)
_PROGRAMS = 1056  # eight for each of an H100's 132 multiprocessors


@triton.jit(do_not_specialize=OF_TOKENS)
def _norm_weight(dy, x, inverse, partial, T, H, dy_stride, x_stride, tokens_each, BT: tl.constexpr, BN: tl.constexpr):
    tile, split = tl.program_id(0), tl.program_id(1)
    columns = tile * BN + tl.arange(0, BN)
    there_columns = (columns < H)[None, :]
    total = tl.zeros((BT, BN), tl.float32)
    end = tl.minimum(T, (split + 1) * tokens_each)
    for first in range(split * tokens_each, end, BT):
        tokens = first + tl.arange(0, BT)
        inside = (tokens < end)[:, None] & there_columns
        rows = tokens.to(tl.int64)[:, None]
        r = tl.load(inverse + tokens, mask=tokens < end, other=0.0)
        gradient = tl.load(dy + rows * dy_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + rows * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total += gradient * (value * r[:, None])
    tl.store(partial + split.to(tl.int64) * H + columns, tl.sum(total, axis=0), mask=columns < H)


@triton.jit
def _normed_again(x, w, inverse, y, H, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(w + columns, mask=inside, other=0.0).to(tl.float32)
    normalised = (value * tl.load(inverse + row)).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * H + columns, (normalised * weight).to(y.dtype.element_ty), mask=inside)


def norm_weight_gradient(dy_TH: Tensor, x_TH: Tensor, inverse_T: Tensor) -> Tensor:
    """dw [H] in float32."""
    rows, columns = x_TH.shape
    check_rows("x", x_TH, rows, columns)
    check_rows("dy", dy_TH, rows, columns)
    tiles = triton.cdiv(columns, COLUMNS)
    splits, tokens_each = split_tokens(rows, tiles, TILE, _PROGRAMS)
    partial = torch.empty(splits, columns, dtype=torch.float32, device=x_TH.device)
    _norm_weight[(tiles, splits)](
        dy_TH, x_TH, inverse_T, partial, rows, columns, dy_TH.stride(0), x_TH.stride(0), tokens_each,
        BT=TILE.tokens, BN=COLUMNS, num_warps=TILE.warps, num_stages=TILE.stages,
    )  # fmt: skip
    return partial.sum(0)


def normed_again(x_TH: Tensor, w_H: Tensor, inverse_T: Tensor) -> Tensor:
    """The norm's output [T, H] from its input and the reciprocal root mean squares that it left."""
    rows, columns = x_TH.shape
    check_rows("x", x_TH, rows, columns)
    y_TH = x_TH.new_empty(rows, columns)
    block = row_block(columns)
    _normed_again[(rows,)](x_TH, w_H, inverse_T, y_TH, columns, x_TH.stride(0), BLOCK=block, num_warps=row_warps(block))
    return y_TH
