"""Cross-entropy over a chunk of logits: losses out, and the logits turned into their own gradient in place.

loss = log sum exp(z) - z_target; dz = scale (softmax(z) - onehot). Two passes over a row: the first with a running maximum
(Milakov and Gimelshein 2018), the second mostly out of the L2 cache. The reference is ``cross_entropy`` of engines.native.reference.

Legend: L rows, V vocabulary. Kept for backward: nothing; the gradient is made here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from engines.native import tiles
from engines.native.kernels.launching import check_rows

_LOWEST = -3.0e38  # stands for minus infinity, but its difference with itself is a number


@dataclass(frozen=True, slots=True)
class Sweep:
    """How a program walks along its row: columns at a time, warps, and what the L2 cache is told to do with either pass ("": nothing)."""

    block: int
    warps: int
    first: str = ""
    second: str = ""


SWEEP = Sweep(block=16384, warps=32)  # H100, 2,048 x 128,256 (2026-11-26, ms): 0.52; 8,192 columns and 16 warps 0.56 or more

_HINTS = ("", ""), ("evict_last", "evict_first")
# What --tune chooses among.
SWEEPS = tuple(Sweep(*sizes, *hints) for *sizes, hints in itertools.product((8192, 16384), (16, 32), _HINTS))


@triton.jit
def _cross_entropy(
    logits, targets, losses, scale, V, stride,
    BLOCK: tl.constexpr, LOWEST: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    highest = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = tl.load(start + columns, mask=columns < V, other=LOWEST, eviction_policy=FIRST).to(tl.float32)
        above = tl.maximum(highest, z)
        total = total * tl.exp(highest - above) + tl.exp(z - above)
        highest = above
    top = tl.max(highest, axis=0)
    above_all = tl.sum(total * tl.exp(highest - top), axis=0)  # lanes that saw no column weigh exp(LOWEST - top) = 0
    target = tl.load(targets + row)
    counts = target >= 0
    loss = tl.log(above_all) + (top - tl.load(start + tl.maximum(target, 0)).to(tl.float32))
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    factor = tl.where(counts, tl.load(scale), 0.0)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = tl.load(start + columns, mask=columns < V, other=LOWEST, eviction_policy=SECOND).to(tl.float32)
        p = tl.exp(z - top) / above_all - tl.where(columns == target, 1.0, 0.0)
        tl.store(start + columns, (p * factor).to(logits.dtype.element_ty), mask=columns < V)


def cross_entropy_(logits_LV: Tensor, targets_L: Tensor, losses_L: Tensor, scale: Tensor, sweep: Sweep | None = None) -> None:
    """Write float32 ``losses`` and leave ``scale`` (one float32 on the device) times the gradient in ``logits``.

    A row whose target is negative counts nothing: loss and gradient are zero. ``sweep``: null for this GPU's.
    """
    rows, vocabulary = logits_LV.shape
    check_rows("logits", logits_LV, rows, vocabulary)
    if targets_L.shape != (rows,) or losses_L.shape != (rows,):
        raise ValueError(f"targets {list(targets_L.shape)} and losses {list(losses_L.shape)} do not fit {rows} rows of logits")
    sweep = sweep or tiles.chosen("cross_entropy", logits_LV.device, rows * vocabulary, SWEEP)
    block = min(sweep.block, triton.next_power_of_2(vocabulary))
    _cross_entropy[(rows,)](
        logits_LV, targets_L, losses_L, scale, vocabulary, logits_LV.stride(0),
        BLOCK=block, LOWEST=_LOWEST, FIRST=sweep.first, SECOND=sweep.second, num_warps=sweep.warps,
    )  # fmt: skip
