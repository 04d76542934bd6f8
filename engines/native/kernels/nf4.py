"""NF4 decoded in one launch: both levels of scales, sixteen levels of values, into rows that may be longer in memory than the weight.

A block of 64 values of the flat weight has one scale, level[absmax] * nested + offset; a value is code[nibble] * scale. Products and the
sum are rounded apart (no fused multiply-add), as bitsandbytes rounds them, so that the bits agree. The reference is
``harness.nf4.decode``.

Legend: N rows and K columns of the weight.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.native import tiles
from engines.native.kernels.launching import check_rows
from harness.nf4 import BLOCK, NESTED_BLOCK, Quantised


@dataclass(frozen=True, slots=True)
class Cut:
    """What one program decodes: blocks of 64 values, and its warps."""

    blocks: int
    warps: int


CUT = Cut(blocks=32, warps=1)  # H200, 14,336 x 4,096 (2026-11-27, ms): 0.060, with 4 warps 0.069
CUTS = tuple(Cut(*sizes) for sizes in itertools.product((16, 32, 64), (1, 2, 4)))  # what --tune chooses among
_KEPT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _decode_nf4(
    packed, absmax, nested, code, levels, out, offset, count, K, stride,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """``WHOLE``: no block crosses a row, and the last one is full. ``KEPT``: the type that the weight was stored in."""
    HALF: tl.constexpr = BLOCK // 2
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = blocks * BLOCK < count
    scale = tl.load(levels + tl.load(absmax + blocks, mask=there, other=0).to(tl.int32))
    scale = scale * tl.load(nested + blocks // NESTED, mask=there, other=0.0) + offset
    places = blocks[:, None] * HALF + tl.arange(0, HALF)[None, :]
    both = tl.load(packed + places, mask=places * 2 < count, other=0).to(tl.int32)
    # The first value of a byte is its upper half.
    values = tl.load(code + tl.interleave(both >> 4, both & 15)) * scale[:, None]
    values = values.to(KEPT).to(out.dtype.element_ty)
    steps = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        row = blocks * BLOCK // K
        target = (row * stride + (blocks * BLOCK - row * K))[:, None] + steps
        tl.store(out + target, values, mask=there[:, None])
    else:
        place = blocks[:, None] * BLOCK + steps
        tl.store(out + place // K * stride + place % K, values, mask=place < count)


def decode_nf4(weight: Quantised, out: Tensor, cut: Cut | None = None) -> None:
    """Write the values of ``weight`` [N, K] into ``out``, by way of the type that it was stored in. ``cut``: null for this GPU's."""
    rows, columns = weight.shape
    check_rows("out", out, rows, columns)
    count = rows * columns
    cut = cut or tiles.chosen("decode_nf4", out.device, count, CUT)
    _decode_nf4[(triton.cdiv(count, BLOCK * cut.blocks),)](
        weight.packed, weight.absmax, weight.nested_absmax, weight.code, weight.levels, out, weight.offset, count, columns, out.stride(0),
        BLOCKS=cut.blocks, BLOCK=BLOCK, NESTED=NESTED_BLOCK, WHOLE=columns % BLOCK == 0, KEPT=_KEPT[weight.dtype],
        num_warps=cut.warps, enable_fp_fusion=False,
    )  # fmt: skip
