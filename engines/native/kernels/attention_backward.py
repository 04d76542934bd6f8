"""The backward pass of ``engines.native.kernels.attention``: two kernels without atomic additions, so that it makes the same bits again.

With p as there: dv_j = sum_i p_ij dy_i, ds_ij = p_ij (dy_i v_j - y_i dy_i), dq_i sqrt(D) = sum_j ds_ij k_j, dk_j sqrt(D) = sum_i ds_ij q_i.
dq, and y dy, which both need, by tiles of queries; dk and dv by tiles of keys, over all query heads that share them, so that no gradient of
keys is as wide as the queries. The reference is ``attention_backward`` of engines.native.reference.

Legend: T tokens, C query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.native.kernels.attention import (
    _LOG2_E,
    Cut,
    _check,
    _chosen,
    _constants,
    _put,
    _queries_of_program,
    _read_by_all,
    _rows_of,
    _seen,
    _stacked,
)
from engines.native.kernels.launching import OF_TOKENS


@triton.jit
def _back_to_queries(
    total, queries, gradients, logarithm, delta, tokens, position, k, v, start, T, kind, k_stride, v_stride, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    keys = start + tl.arange(0, BN)
    held = keys < T
    known = _rows_of(k, keys, kind, k_stride, held, D, BD)
    p = tl.exp2(tl.dot(queries, tl.trans(known), input_precision="ieee") * scale - logarithm[:, None])
    if MASKED:
        p = tl.where(_seen(tokens, keys, position), p, 0.0)
    dp = tl.dot(gradients, tl.trans(_rows_of(v, keys, kind, v_stride, held, D, BD)), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(known.dtype), known, total, input_precision="ieee")


@triton.jit(do_not_specialize=OF_TOKENS)
def _attend_backward_queries(
    q, k, v, y, dy, begins, sums, deltas, dq, T, C, group, q_stride, k_stride, v_stride, y_stride, dy_stride, dq_stride, scale, factor,
    APART: tl.constexpr, STACK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    first, end, tokens, heads, kind, there, position = _queries_of_program(begins, T, group, STACK, BM)
    queries = _rows_of(q, tokens, heads, q_stride, there, D, BD)
    gradients = _rows_of(dy, tokens, heads, dy_stride, there, D, BD)
    outputs = _rows_of(y, tokens, heads, y_stride, there, D, BD)
    delta = tl.sum(outputs.to(tl.float32) * gradients.to(tl.float32), axis=1)
    kept = tokens.to(tl.int64) * C + heads
    tl.store(deltas + kept, delta, mask=there)
    logarithm = tl.load(sums + kept, mask=there, other=0.0)
    total = tl.zeros((BM, BD), tl.float32)
    begin, whole = _read_by_all(begins, first, end, APART, BN)
    if APART:
        for start in range(begin, whole, BN):
            total = _back_to_queries(
                total, queries, gradients, logarithm, delta, tokens, position, k, v, start, T, kind, k_stride, v_stride, scale,
                False, D, BD, BN,
            )  # fmt: skip
    for start in range(whole, end, BN):
        total = _back_to_queries(
            total, queries, gradients, logarithm, delta, tokens, position, k, v, start, T, kind, k_stride, v_stride, scale, True, D, BD, BN
        )
    _put(dq, total * factor, tokens, heads, dq_stride, there, D, BD)


@triton.jit(do_not_specialize=OF_TOKENS)
def _attend_backward_keys(
    q, k, v, dy, ends, sums, deltas, dk, dv, T, C, group, q_stride, k_stride, v_stride, dy_stride, dk_stride, dv_stride, scale, factor,
    STACK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    first, kind = tl.program_id(0) * BN, tl.program_id(1)
    keys = first + tl.arange(0, BN)
    held = keys < T
    left = (tl.load(ends + keys, mask=held, other=0) - keys).to(tl.uint32)
    known = _rows_of(k, keys, kind, k_stride, held, D, BD)
    values = _rows_of(v, keys, kind, v_stride, held, D, BD)
    dk_total, dv_total = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
    end = tl.load(ends + tl.minimum(first + BN, T) - 1)
    for stack in range(kind * group, (kind + 1) * group, STACK):
        heads = stack + tl.arange(0, BM) % STACK
        for start in range(first, end, BM // STACK):
            tokens = start + tl.arange(0, BM) // STACK
            there = tokens < T
            queries = _rows_of(q, tokens, heads, q_stride, there, D, BD)
            gradients = _rows_of(dy, tokens, heads, dy_stride, there, D, BD)
            kept = tokens.to(tl.int64) * C + heads
            logarithm = tl.load(sums + kept, mask=there, other=0.0)
            delta = tl.load(deltas + kept, mask=there, other=0.0)
            p = tl.exp2(tl.dot(known, tl.trans(queries), input_precision="ieee") * scale - logarithm[None, :])
            ahead = (tokens[None, :] - keys[:, None]).to(tl.uint32)  # an earlier query is very far ahead
            p = tl.where(ahead < left[:, None], p, 0.0)
            dv_total = tl.dot(p.to(gradients.dtype), gradients, dv_total, input_precision="ieee")
            dp = tl.dot(values, tl.trans(gradients), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk_total = tl.dot(ds.to(queries.dtype), queries, dk_total, input_precision="ieee")
    _put(dk, dk_total * factor, keys, kind, dk_stride, held, D, BD)
    _put(dv, dv_total, keys, kind, dv_stride, held, D, BD)


def attend_backward(
    dy_TCD: Tensor, q_TCD: Tensor, k_TGD: Tensor, v_TGD: Tensor, y_TCD: Tensor, sums_TC: Tensor, begins_T: Tensor, ends_T: Tensor,
    queries_cut: Cut | None = None, keys_cut: Cut | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, each contiguous, of what ``attend`` left in ``y`` and returned; ``ends``: int32, where each token's document ends.

    ``queries_cut``, ``keys_cut``: of the two kernels; null for this GPU's. Raises ValueError for tensors that do not fit.
    """
    tokens, heads, head_dim = q_TCD.shape
    _check(begins_T, q=q_TCD, k=k_TGD, v=v_TGD, y=y_TCD, dy=dy_TCD)
    _check(ends_T, q=q_TCD)
    if sums_TC.shape != (tokens, heads) or not sums_TC.is_contiguous():
        raise ValueError(f"sums is {list(sums_TC.shape)}; expected what attend returned, [{tokens}, {heads}]")
    dq_TCD, dk_TGD, dv_TGD = (x.new_empty(x.shape) for x in (q_TCD, k_TGD, v_TGD))
    deltas_TC, group, factor = torch.empty_like(sums_TC), heads // k_TGD.shape[1], head_dim**-0.5
    cut = queries_cut or _chosen("attend_backward_queries", q_TCD)
    stack = _stacked(group, cut)
    _attend_backward_queries[(triton.cdiv(tokens * stack, cut.queries), heads // stack)](
        q_TCD, k_TGD, v_TGD, y_TCD, dy_TCD, begins_T, sums_TC, deltas_TC, dq_TCD, tokens, heads, group, q_TCD.stride(0), k_TGD.stride(0),
        v_TGD.stride(0), y_TCD.stride(0), dy_TCD.stride(0), dq_TCD.stride(0), factor * _LOG2_E, factor, APART=cut.apart,
        **_constants(head_dim, stack, cut),
    )  # fmt: skip
    cut = keys_cut or _chosen("attend_backward_keys", q_TCD)
    _attend_backward_keys[(triton.cdiv(tokens, cut.keys), k_TGD.shape[1])](
        q_TCD, k_TGD, v_TGD, dy_TCD, ends_T, sums_TC, deltas_TC, dk_TGD, dv_TGD, tokens, heads, group, q_TCD.stride(0), k_TGD.stride(0),
        v_TGD.stride(0), dy_TCD.stride(0), dk_TGD.stride(0), dv_TGD.stride(0), factor * _LOG2_E, factor,
        **_constants(head_dim, _stacked(group, cut), cut),
    )  # fmt: skip
    return dq_TCD, dk_TGD, dv_TGD
