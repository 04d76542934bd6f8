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
    """What one program decodes, for each of its threads so many times eight values, and its warps."""

    parts: int
    warps: int

    @property
    def words(self) -> int:
        """Of four bytes each, one for each thread."""
        return 32 * self.warps


CUT = Cut(parts=4, warps=4)  # the fastest of CUTS for 8,192 x 2,048 and 14,336 x 4,096 on an H200 (docs/log.md, 2026-11-28)
CUTS = tuple(Cut(*sizes) for sizes in itertools.product((1, 2, 4, 8), (1, 2, 4)))  # what --tune chooses among
_KEPT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_WORD = tl.constexpr(8)  # values in four bytes
_AT_ONCE = 1024  # values of a program where rows end inside of blocks


@triton.jit
def _scale_of(blocks, there, absmax, nested, levels, offset, NESTED: tl.constexpr):
    scale = tl.load(levels + tl.load(absmax + blocks, mask=there, other=0).to(tl.int32))
    return scale * tl.load(nested + blocks // NESTED, mask=there, other=0.0) + offset


@triton.jit
def _decode_nf4(
    words, absmax, nested, code, levels, out, offset, num_words, K, stride,
    PARTS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """A thread reads four bytes and writes what is in them, eight values, at once; its warp what follows each other in memory."""
    steps = tl.arange(0, _WORD)
    shifts = (steps ^ 1) * 4  # the first value of a byte is its upper half
    for part in tl.static_range(PARTS):
        at = (tl.program_id(0) * PARTS + part) * WORDS + tl.arange(0, WORDS)
        there = at < num_words
        scale = _scale_of(at // (BLOCK // _WORD), there, absmax, nested, levels, offset, NESTED)
        eight = tl.load(words + at, mask=there, other=0)
        values = tl.load(code + ((eight[:, None] >> shifts[None, :]) & 15)) * scale[:, None]
        row = at // (K // _WORD)
        target = row.to(tl.int64) * stride + (at - row * (K // _WORD)) * _WORD
        tl.store(out + target[:, None] + steps[None, :], values.to(KEPT).to(out.dtype.element_ty), mask=there[:, None])


@triton.jit
def _decode_nf4_by_values(
    packed, absmax, nested, code, levels, out, offset, count, K, stride,
    VALUES: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Of any K: a row may end inside of a block, even of a byte."""
    at = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    there = at < count
    scale = _scale_of(at // BLOCK, there, absmax, nested, levels, offset, NESTED)
    both = tl.load(packed + at // 2, mask=there, other=0).to(tl.int32)
    values = tl.load(code + ((both >> ((at & 1) ^ 1).to(tl.int32) * 4) & 15)) * scale
    tl.store(out + at // K * stride + at % K, values.to(KEPT).to(out.dtype.element_ty), mask=there)


def decode_nf4(weight: Quantised, out: Tensor, cut: Cut | None = None) -> None:
    """Write the values of ``weight`` [N, K] into ``out``, by way of the type that it was stored in. ``cut``: null for this GPU's."""
    rows, columns = weight.shape
    check_rows("out", out, rows, columns)
    count = rows * columns
    scales = weight.absmax, weight.nested_absmax, weight.code, weight.levels, out, weight.offset
    kinds = {"BLOCK": BLOCK, "NESTED": NESTED_BLOCK, "KEPT": _KEPT[weight.dtype]}
    packed = weight.packed.flatten()
    if columns % BLOCK or packed.data_ptr() % torch.int32.itemsize:
        _decode_nf4_by_values[(triton.cdiv(count, _AT_ONCE),)](
            packed, *scales, count, columns, out.stride(0), VALUES=_AT_ONCE, **kinds, enable_fp_fusion=False
        )
        return
    cut = cut or tiles.chosen("decode_nf4", out.device, count, CUT)
    words = packed.view(torch.int32)
    _decode_nf4[(triton.cdiv(len(words), cut.words * cut.parts),)](
        words, *scales, len(words), columns, out.stride(0), PARTS=cut.parts, WORDS=cut.words, **kinds, num_warps=cut.warps,
        enable_fp_fusion=False,
    )  # fmt: skip
