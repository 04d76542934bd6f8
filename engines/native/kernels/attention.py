"""Causal attention inside short documents that are packed end to end, in tiles of tokens that may cut documents; backward beside it.

y_i = sum_j p_ij v_j, p_i = softmax(q_i k_j / sqrt(D)) over the tokens j <= i of i's own document (Vaswani et al. 2017), the scores never in
memory (Dao 2023, arXiv 2307.08691). A tile of queries walks over the keys from the beginning of its first token's document to its own end:
nothing depends on how many documents there are, and no program is without work. The heads that share keys stand above each other in a tile
(grouped queries), so that it has few tokens, and few keys are seen for nothing. The reference is ``attention`` of engines.native.reference.

Legend: T tokens, C query heads, G key-value heads, D head dimension. Kept for backward: the base-2 logarithm of each row's sum, [T, C].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.native import tiles
from engines.native.kernels.launching import OF_TOKENS, check_heads, head_block

_LOWEST = -3.0e38  # stands for minus infinity, but its difference with itself is a number
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Cut:
    """Queries at a time, of one head or of several of one token, keys, warps a program, stages of its pipeline; ``apart``, of kernels that
    walk over keys: those that all queries see have a loop of their own, which masks nothing.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    apart: bool = False


HEADS = 64, 128  # columns of a head at most; nothing decides more which cut is the fastest
# By the name in a table, of a kernel and a size of heads. They compile for every target of engines.native.ahead without a spill. Of the
# candidates that do, these were the fastest on an H100, at 14,336 tokens of documents like GSM8K's, but for the last two, where cuts that
# spill elsewhere are faster (64 queries of narrow heads, 32 keys and 4 warps for wide ones): its table has them.
CUTS: Mapping[str, Cut] = {
    **{f"attend_{head}": Cut(queries=64, keys=32, warps=4, stages=3) for head in HEADS},
    "attend_backward_queries_64": Cut(queries=64, keys=32, warps=4, stages=3),
    "attend_backward_queries_128": Cut(queries=64, keys=32, warps=4, stages=2),
    "attend_backward_keys_64": Cut(queries=32, keys=64, warps=4, stages=2),
    "attend_backward_keys_128": Cut(queries=16, keys=64, warps=8, stages=2),
}
_TRIED = (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3)
_TRIED_BY_KEYS = (32, 32, 4, 2), (32, 32, 8, 2), (32, 64, 8, 2), (32, 128, 8, 2), (64, 32, 8, 2), (64, 32, 8, 3)
_TRIED_BY_KEYS_64 = (32, 64, 4, 2), (64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2)
# What --tune chooses among. Wide heads would spill in more of them.
CANDIDATES: Mapping[str, tuple[Cut, ...]] = {
    **{
        f"{kernel}_{head}": tuple(Cut(*sizes, apart) for sizes in _TRIED for apart in (False, True))
        for kernel in ("attend", "attend_backward_queries")
        for head in HEADS
    },
    "attend_backward_keys_64": tuple(Cut(*sizes) for sizes in (*_TRIED_BY_KEYS, *_TRIED_BY_KEYS_64)),
    "attend_backward_keys_128": tuple(Cut(*sizes) for sizes in ((16, 64, 8, 2), *_TRIED_BY_KEYS)),
}


@triton.jit
def _rows_of(x, tokens, heads, stride, there, D: tl.constexpr, BD: tl.constexpr):
    """[rows, BD] of a token and a head each; zeros beyond D and where nothing is."""
    columns = tl.arange(0, BD)
    place = x + (tokens.to(tl.int64) * stride + heads * D)[:, None] + columns[None, :]
    return tl.load(place, mask=there[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def _put(x, values, tokens, heads, stride, there, D: tl.constexpr, BD: tl.constexpr):
    columns = tl.arange(0, BD)
    place = x + (tokens.to(tl.int64) * stride + heads * D)[:, None] + columns[None, :]
    tl.store(place, values.to(x.dtype.element_ty), mask=there[:, None] & (columns < D)[None, :])


@triton.jit
def _queries_of_program(begins, T, group, STACK: tl.constexpr, BM: tl.constexpr):
    """Its first token and the one behind its last; of each row the token and the head; which head the keys have; which rows there are, and
    where they stand in their documents.
    """
    first, stack = tl.program_id(0) * (BM // STACK), tl.program_id(1) * STACK
    tokens, heads = first + tl.arange(0, BM) // STACK, stack + tl.arange(0, BM) % STACK
    there = tokens < T
    position = tokens - tl.load(begins + tokens, mask=there, other=0)
    return first, tl.minimum(first + BM // STACK, T), tokens, heads, stack // group, there, position


@triton.jit
def _seen(tokens, keys, position):
    """[rows, keys]: which keys stand in a token's document and not behind it; a later key is very far before it."""
    return (tokens[:, None] - keys[None, :]).to(tl.uint32) <= position.to(tl.uint32)[:, None]


@triton.jit
def _read_by_all(begins, first, end, APART: tl.constexpr, BN: tl.constexpr):
    """(Where the keys of a tile of queries begin, up to where whole tiles of keys are seen by all of them.)"""
    begin = tl.load(begins + first)
    whole = begin
    if APART:
        whole += tl.where(tl.load(begins + end - 1) == begin, (first - begin) // BN * BN, 0)
    return begin, whole


@triton.jit
def _attend_to(
    highest, total, output, queries, tokens, position, k, v, start, T, kind, k_stride, v_stride, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    keys = start + tl.arange(0, BN)
    held = keys < T
    scores = tl.dot(queries, tl.trans(_rows_of(k, keys, kind, k_stride, held, D, BD)), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(_seen(tokens, keys, position), scores, float("-inf"))
    above = tl.maximum(highest, tl.max(scores, axis=1))
    p = tl.exp2(scores - above[:, None])
    shrunk = tl.exp2(highest - above)
    values = _rows_of(v, keys, kind, v_stride, held, D, BD)
    output = tl.dot(p.to(values.dtype), values, output * shrunk[:, None], input_precision="ieee")
    return above, total * shrunk + tl.sum(p, axis=1), output


@triton.jit(do_not_specialize=OF_TOKENS)
def _attend(
    q, k, v, begins, y, sums, T, C, group, q_stride, k_stride, v_stride, y_stride, scale,
    LOWEST: tl.constexpr, APART: tl.constexpr, STACK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    first, end, tokens, heads, kind, there, position = _queries_of_program(begins, T, group, STACK, BM)
    queries = _rows_of(q, tokens, heads, q_stride, there, D, BD)
    highest = tl.full((BM,), LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    output = tl.zeros((BM, BD), tl.float32)
    begin, whole = _read_by_all(begins, first, end, APART, BN)
    if APART:
        for start in range(begin, whole, BN):
            highest, total, output = _attend_to(
                highest, total, output, queries, tokens, position, k, v, start, T, kind, k_stride, v_stride, scale, False, D, BD, BN
            )
    for start in range(whole, end, BN):
        highest, total, output = _attend_to(
            highest, total, output, queries, tokens, position, k, v, start, T, kind, k_stride, v_stride, scale, True, D, BD, BN
        )
    _put(y, output / total[:, None], tokens, heads, y_stride, there, D, BD)
    tl.store(sums + tokens.to(tl.int64) * C + heads, highest + tl.log2(total), mask=there)


def attend(q_TCD: Tensor, k_TGD: Tensor, v_TGD: Tensor, begins_T: Tensor, y_TCD: Tensor, cut: Cut | None = None) -> Tensor:
    """Write attention's output into ``y`` (any row stride); returns what backward wants kept, [T, C] in float32.

    ``begins``: int32, where each token's document begins. ``cut``: null for this GPU's. Raises ValueError for tensors that do not fit.
    """
    tokens, heads, head_dim = q_TCD.shape
    _check(begins_T, q=q_TCD, k=k_TGD, v=v_TGD, y=y_TCD)
    sums_TC = torch.empty(tokens, heads, dtype=torch.float32, device=q_TCD.device)
    cut, group = cut or _chosen("attend", q_TCD), heads // k_TGD.shape[1]
    stack = _stacked(group, cut)
    _attend[(triton.cdiv(tokens * stack, cut.queries), heads // stack)](
        q_TCD, k_TGD, v_TGD, begins_T, y_TCD, sums_TC, tokens, heads, group,
        q_TCD.stride(0), k_TGD.stride(0), v_TGD.stride(0), y_TCD.stride(0), head_dim**-0.5 * _LOG2_E, LOWEST=_LOWEST,
        APART=cut.apart, **_constants(head_dim, stack, cut),
    )  # fmt: skip
    return sums_TC


def _stacked(group: int, cut: Cut) -> int:
    """How many heads that share keys lie above each other in a tile: the largest power of two that divides the group, 16 at most."""
    return min(group & -group, 16, cut.queries)


def _chosen(kernel: str, q_TCD: Tensor) -> Cut:
    name = _name(kernel, q_TCD.shape[2])
    return tiles.chosen(name, q_TCD.device, q_TCD.numel(), CUTS[name])


def _name(kernel: str, head_dim: int) -> str:
    """In a table. Raises ValueError for heads that are too wide."""
    fitting = [head for head in HEADS if head_dim <= head]
    if not fitting:
        raise ValueError(f"heads have {head_dim} columns; expected at most {HEADS[-1]}")
    return f"{kernel}_{fitting[0]}"


def _constants(head_dim: int, stack: int, cut: Cut) -> dict[str, int]:
    return {
        "STACK": stack, "D": head_dim, "BD": head_block(head_dim), "BM": cut.queries, "BN": cut.keys,
        "num_warps": cut.warps, "num_stages": cut.stages,
    }  # fmt: skip


def _check(bounds_T: Tensor, **heads: Tensor) -> None:
    tokens, num_heads, head_dim = heads["q"].shape
    check_heads(**heads)
    if bounds_T.shape != (tokens,) or bounds_T.dtype != torch.int32:
        raise ValueError(f"a document's bounds are {list(bounds_T.shape)} of {bounds_T.dtype}; expected [{tokens}] of torch.int32")
    kinds = heads["k"].shape[1] if "k" in heads else num_heads
    for name, x in heads.items():
        expected = [tokens, kinds if name in ("k", "v") else num_heads, head_dim]
        if list(x.shape) != expected or (name == "k" and num_heads % kinds):
            raise ValueError(f"{name} is {list(x.shape)}; q is {[tokens, num_heads, head_dim]}, whose heads are a multiple of k's and v's")
