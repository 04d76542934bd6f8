"""Causal attention inside short documents that are packed end to end, forward and backward, in tiles of tokens that may cut documents.

y_i = sum_j p_ij v_j, p_i = softmax(q_i k_j / sqrt(D)) over the tokens j <= i of i's own document (Vaswani et al. 2017), the scores never in
memory (Dao 2023, arXiv 2307.08691). A tile of queries walks over the keys from the beginning of its first token's document to its own end:
nothing depends on how many documents there are, and no program is without work. Backward is two kernels without atomic additions, so
that it makes the same bits again: dq, and y dy, which both need, by tiles of queries; dk and dv by tiles of keys, over all query heads that
share them, so that no gradient of keys is as wide as the queries. The reference is ``attention`` and ``attention_backward`` of
engines.native.reference.

Legend: T tokens, C query heads, G key-value heads, D head dimension. Kept for backward: the base-2 logarithm of each row's sum, [C, T].
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
from engines.native.kernels.launching import check_heads, head_block

_LOWEST = -3.0e38  # stands for minus infinity, but its difference with itself is a number
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Cut:
    """Queries and keys at a time, warps a program, stages of its pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# They compile for every target of engines.native.ahead without a spill; none has been timed yet. A row of a tile sees up to a tile of keys
# more than its document has, so tiles are small beside a document of GSM8K (217 tokens).
CUTS: Mapping[str, Cut] = {
    "attend": Cut(queries=64, keys=64, warps=4, stages=2),
    "attend_backward_queries": Cut(queries=64, keys=32, warps=4, stages=2),
    "attend_backward_keys": Cut(queries=32, keys=32, warps=4, stages=2),
}
HEADS = 64, 128  # columns of a head at most, each with entries of its own in a table: nothing decides more which cut is the fastest
_TRIED = (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3)
_TRIED_BY_KEYS = (32, 32, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2), (32, 128, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 64, 8, 2)
# What --tune chooses among, by the name in a table. Heads of 128 would spill in more of them.
CANDIDATES: Mapping[str, tuple[Cut, ...]] = {
    **{f"attend_{head}": tuple(Cut(*sizes) for sizes in _TRIED) for head in HEADS},
    **{f"attend_backward_queries_{head}": tuple(Cut(*sizes) for sizes in _TRIED) for head in HEADS},
    "attend_backward_keys_64": tuple(Cut(*sizes) for sizes in (*_TRIED_BY_KEYS, (64, 64, 4, 2), (64, 64, 4, 3))),
    "attend_backward_keys_128": tuple(Cut(*sizes) for sizes in _TRIED_BY_KEYS),
}


@triton.jit
def _rows_of(x, rows, head, stride, there, D: tl.constexpr, BD: tl.constexpr):
    """[rows, BD] of one head; zeros beyond D and where nothing is."""
    columns = tl.arange(0, BD)
    place = x + rows.to(tl.int64)[:, None] * stride + head * D + columns[None, :]
    return tl.load(place, mask=there[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def _put(x, values, rows, head, stride, there, D: tl.constexpr, BD: tl.constexpr):
    columns = tl.arange(0, BD)
    place = x + rows.to(tl.int64)[:, None] * stride + head * D + columns[None, :]
    tl.store(place, values.to(x.dtype.element_ty), mask=there[:, None] & (columns < D)[None, :])


@triton.jit
def _attend(
    q, k, v, begins, y, sums, T, group, q_stride, k_stride, v_stride, y_stride, scale,
    LOWEST: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * BM, tl.program_id(1)
    rows = first + tl.arange(0, BM)
    there = rows < T
    position = rows - tl.load(begins + rows, mask=there, other=0)
    queries = _rows_of(q, rows, head, q_stride, there, D, BD)
    highest = tl.full((BM,), LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    output = tl.zeros((BM, BD), tl.float32)
    for start in range(tl.load(begins + first) // BN * BN, tl.minimum(first + BM, T), BN):
        keys = start + tl.arange(0, BN)
        held = keys < T
        scores = tl.dot(queries, tl.trans(_rows_of(k, keys, head // group, k_stride, held, D, BD)), input_precision="ieee") * scale
        behind = (rows[:, None] - keys[None, :]).to(tl.uint32)  # a later key is very far behind
        scores = tl.where(behind <= position.to(tl.uint32)[:, None], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, axis=1))
        p = tl.exp2(scores - above[:, None])
        shrunk = tl.exp2(highest - above)
        total = total * shrunk + tl.sum(p, axis=1)
        values = _rows_of(v, keys, head // group, v_stride, held, D, BD)
        output = tl.dot(p.to(values.dtype), values, output * shrunk[:, None], input_precision="ieee")
        highest = above
    _put(y, output / total[:, None], rows, head, y_stride, there, D, BD)
    tl.store(sums + head.to(tl.int64) * T + rows, highest + tl.log2(total), mask=there)


@triton.jit
def _attend_backward_queries(
    q, k, v, y, dy, begins, sums, deltas, dq, T, group, q_stride, k_stride, v_stride, y_stride, dy_stride, dq_stride, scale, factor,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * BM, tl.program_id(1)
    rows = first + tl.arange(0, BM)
    there = rows < T
    position = rows - tl.load(begins + rows, mask=there, other=0)
    queries = _rows_of(q, rows, head, q_stride, there, D, BD)
    gradients = _rows_of(dy, rows, head, dy_stride, there, D, BD)
    outputs = _rows_of(y, rows, head, y_stride, there, D, BD)
    delta = tl.sum(outputs.to(tl.float32) * gradients.to(tl.float32), axis=1)
    kept = head.to(tl.int64) * T + rows
    tl.store(deltas + kept, delta, mask=there)
    logarithm = tl.load(sums + kept, mask=there, other=0.0)
    total = tl.zeros((BM, BD), tl.float32)
    for start in range(tl.load(begins + first) // BN * BN, tl.minimum(first + BM, T), BN):
        keys = start + tl.arange(0, BN)
        held = keys < T
        known = _rows_of(k, keys, head // group, k_stride, held, D, BD)
        scores = tl.dot(queries, tl.trans(known), input_precision="ieee") * scale
        behind = (rows[:, None] - keys[None, :]).to(tl.uint32)
        p = tl.where(behind <= position.to(tl.uint32)[:, None], tl.exp2(scores - logarithm[:, None]), 0.0)
        values = _rows_of(v, keys, head // group, v_stride, held, D, BD)
        dp = tl.dot(gradients, tl.trans(values), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        total = tl.dot(ds.to(known.dtype), known, total, input_precision="ieee")
    _put(dq, total * factor, rows, head, dq_stride, there, D, BD)


@triton.jit
def _attend_backward_keys(
    q, k, v, dy, ends, sums, deltas, dk, dv, T, group, q_stride, k_stride, v_stride, dy_stride, dk_stride, dv_stride, scale, factor,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    first, kind = tl.program_id(0) * BN, tl.program_id(1)
    keys = first + tl.arange(0, BN)
    held = keys < T
    left = tl.load(ends + keys, mask=held, other=0) - keys
    known = _rows_of(k, keys, kind, k_stride, held, D, BD)
    values = _rows_of(v, keys, kind, v_stride, held, D, BD)
    dk_total, dv_total = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
    end = tl.load(ends + tl.minimum(first + BN, T) - 1)
    for head in range(kind * group, (kind + 1) * group):
        for start in range(first // BM * BM, end, BM):
            rows = start + tl.arange(0, BM)
            there = rows < T
            queries = _rows_of(q, rows, head, q_stride, there, D, BD)
            gradients = _rows_of(dy, rows, head, dy_stride, there, D, BD)
            kept = tl.cast(head, tl.int64) * T + rows
            logarithm = tl.load(sums + kept, mask=there, other=0.0)
            delta = tl.load(deltas + kept, mask=there, other=0.0)
            scores = tl.dot(known, tl.trans(queries), input_precision="ieee") * scale
            ahead = (rows[None, :] - keys[:, None]).to(tl.uint32)  # an earlier query is very far ahead
            p = tl.where(ahead < left.to(tl.uint32)[:, None], tl.exp2(scores - logarithm[None, :]), 0.0)
            dv_total = tl.dot(p.to(gradients.dtype), gradients, dv_total, input_precision="ieee")
            dp = tl.dot(values, tl.trans(gradients), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk_total = tl.dot(ds.to(queries.dtype), queries, dk_total, input_precision="ieee")
    _put(dk, dk_total * factor, keys, kind, dk_stride, held, D, BD)
    _put(dv, dv_total, keys, kind, dv_stride, held, D, BD)


def attend(q_TCD: Tensor, k_TGD: Tensor, v_TGD: Tensor, begins_T: Tensor, y_TCD: Tensor, cut: Cut | None = None) -> Tensor:
    """Write attention's output into ``y`` (any row stride); returns what backward wants kept, [C, T] in float32.

    ``begins``: int32, where each token's document begins. ``cut``: null for this GPU's. Raises ValueError for tensors that do not fit.
    """
    tokens, heads, head_dim = q_TCD.shape
    _check(begins_T, q=q_TCD, k=k_TGD, v=v_TGD, y=y_TCD)
    sums_CT = torch.empty(heads, tokens, dtype=torch.float32, device=q_TCD.device)
    cut = cut or _chosen("attend", q_TCD)
    _attend[(triton.cdiv(tokens, cut.queries), heads)](
        q_TCD, k_TGD, v_TGD, begins_T, y_TCD, sums_CT, tokens, heads // k_TGD.shape[1],
        q_TCD.stride(0), k_TGD.stride(0), v_TGD.stride(0), y_TCD.stride(0), head_dim**-0.5 * _LOG2_E, LOWEST=_LOWEST,
        **_constants(head_dim, cut),
    )  # fmt: skip
    return sums_CT


def attend_backward(
    dy_TCD: Tensor, q_TCD: Tensor, k_TGD: Tensor, v_TGD: Tensor, y_TCD: Tensor, sums_CT: Tensor, begins_T: Tensor, ends_T: Tensor,
    queries_cut: Cut | None = None, keys_cut: Cut | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, each contiguous, of what ``attend`` left in ``y`` and returned; ``ends``: int32, where each token's document ends.

    ``queries_cut``, ``keys_cut``: of the two kernels; null for this GPU's. Raises ValueError for tensors that do not fit.
    """
    tokens, heads, head_dim = q_TCD.shape
    _check(begins_T, q=q_TCD, k=k_TGD, v=v_TGD, y=y_TCD, dy=dy_TCD)
    _check(ends_T, q=q_TCD)
    if sums_CT.shape != (heads, tokens) or not sums_CT.is_contiguous():
        raise ValueError(f"sums is {list(sums_CT.shape)}; expected what attend returned, [{heads}, {tokens}]")
    dq_TCD, dk_TGD, dv_TGD = (x.new_empty(x.shape) for x in (q_TCD, k_TGD, v_TGD))
    deltas_CT, group, factor = torch.empty_like(sums_CT), heads // k_TGD.shape[1], head_dim**-0.5
    cut = queries_cut or _chosen("attend_backward_queries", q_TCD)
    _attend_backward_queries[(triton.cdiv(tokens, cut.queries), heads)](
        q_TCD, k_TGD, v_TGD, y_TCD, dy_TCD, begins_T, sums_CT, deltas_CT, dq_TCD, tokens, group, q_TCD.stride(0), k_TGD.stride(0),
        v_TGD.stride(0), y_TCD.stride(0), dy_TCD.stride(0), dq_TCD.stride(0), factor * _LOG2_E, factor, **_constants(head_dim, cut),
    )  # fmt: skip
    cut = keys_cut or _chosen("attend_backward_keys", q_TCD)
    _attend_backward_keys[(triton.cdiv(tokens, cut.keys), k_TGD.shape[1])](
        q_TCD, k_TGD, v_TGD, dy_TCD, ends_T, sums_CT, deltas_CT, dk_TGD, dv_TGD, tokens, group, q_TCD.stride(0), k_TGD.stride(0),
        v_TGD.stride(0), dy_TCD.stride(0), dk_TGD.stride(0), dv_TGD.stride(0), factor * _LOG2_E, factor, **_constants(head_dim, cut),
    )  # fmt: skip
    return dq_TCD, dk_TGD, dv_TGD


def _chosen(kernel: str, q_TCD: Tensor) -> Cut:
    return tiles.chosen(_name(kernel, q_TCD.shape[2]), q_TCD.device, q_TCD.numel(), CUTS[kernel])


def _name(kernel: str, head_dim: int) -> str:
    """In a table."""
    return f"{kernel}_{next((head for head in HEADS if head_dim <= head), head_block(head_dim))}"


def _constants(head_dim: int, cut: Cut) -> dict[str, int]:
    return {
        "D": head_dim, "BD": head_block(head_dim), "BM": cut.queries, "BN": cut.keys, "num_warps": cut.warps, "num_stages": cut.stages,
    }  # fmt: skip


def _check(bounds_T: Tensor, **heads: Tensor) -> None:
    tokens, num_heads, head_dim = heads["q"].shape
    check_heads(**heads)
    if bounds_T.shape != (tokens,) or bounds_T.dtype != torch.int32:
        raise ValueError(f"a document's bounds are {list(bounds_T.shape)} of {bounds_T.dtype}; expected [{tokens}] of torch.int32")
    for name, x in heads.items():
        fewer = name in ("k", "v") and num_heads % x.shape[1] == 0
        if (len(x), x.shape[2]) != (tokens, head_dim) or (x.shape[1] != num_heads and not fewer):
            raise ValueError(f"{name} is {list(x.shape)}; q is {[tokens, num_heads, head_dim]}, whose heads are a multiple of k's and v's")
