"""SwiGLU backward and the thin gradients beside it in one pass: h is made again, used, and never written.

dg = dh u sigma(g) (1 + g (1 - sigma(g))), du = dh silu(g) take the place of g and u; on the way
G_h[k, r] += sum_t h[t, k] l[t, r], G_g += dg^T l_g and G_u += du^T l_u: dA of the down projection (h = silu(g) u is its input, l = s dy B)
and both dB of the gate and up projections (l_g, l_u = s x A^T). Three launches read and wrote 1.8 times as much.
The reference is ``swiglu_backward`` of engines.native.reference.

Legend: T tokens, K columns of h, R ranks of each of the three; gate_up is [T, 2K + P], P spare columns, written as zeros. Tokens are split
over programs; the last one to finish a tile adds all partial sums [splits, 3, K, R] in order, so that the result does not depend on
scheduling. Kept for backward: gate_up, 2K values a row.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.native import tiles
from engines.native.kernels.launching import OF_TOKENS, Tile, check_counters, check_rows, split_tokens
from engines.native.kernels.outer import PARTIALS_AT_ONCE, _add_partials
from engines.native.kernels.swiglu import _differentiate, _zero_rooms

COLUMNS = 64  # a tile
# 64 tokens do not fit into registers. H100, 8,192 x 14,336 (2026-11-26, ms): 0.46, with 16 tokens 0.53, with 8 warps 0.57 or more.
TILE = Tile(tokens=32, warps=4, stages=3)
TILES = tuple(Tile(*sizes) for sizes in itertools.product((16, 32), (4, 8), (2, 3)))  # what --tune chooses among
_PROGRAMS = 1056  # eight for each of an H100's 132 multiprocessors; with four 0.49 ms


@triton.jit
def _store_sums(sums, place, inside):
    before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (before + sums).to(place.dtype.element_ty), mask=inside)


@triton.jit
def _add_results(
    of_h, of_gate, of_up, d_input, d_outputs, columns, ranks, inside, K, input_column_stride, input_rank_stride, output_stride
):  # fmt: skip
    wide = columns.to(tl.int64)[:, None]
    _store_sums(of_h, d_input + wide * input_column_stride + ranks[None, :] * input_rank_stride, inside)
    _store_sums(of_gate, d_outputs + wide * output_stride + ranks[None, :], inside)
    _store_sums(of_up, d_outputs + (K + wide) * output_stride + ranks[None, :], inside)


@triton.jit(do_not_specialize=OF_TOKENS)
def _swiglu_gradients(
    dh, gate_up, thin, low, partial, arrived, d_input, d_outputs, T, K, R, dh_stride, gate_up_stride, thin_stride, low_stride,
    input_column_stride, input_rank_stride, output_stride, tokens_each, splits, AT_ONCE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr, P: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    columns = tile * BN + tl.arange(0, BN)
    ranks = tl.arange(0, BR)
    there_columns, there_ranks = (columns < K)[None, :], (ranks < R)[None, :]
    of_h, of_gate, of_up = tl.zeros((BN, BR), tl.float32), tl.zeros((BN, BR), tl.float32), tl.zeros((BN, BR), tl.float32)
    end = tl.minimum(T, (split + 1) * tokens_each)
    for first in range(split * tokens_each, end, BT):
        tokens = first + tl.arange(0, BT)
        there = (tokens < end)[:, None]
        rows = tokens.to(tl.int64)[:, None]
        inside = there & there_columns
        start = gate_up + rows * gate_up_stride + columns[None, :]
        gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(start + K, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(dh + rows * dh_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        thin_rows = tl.load(thin + rows * thin_stride + ranks[None, :], mask=there & there_ranks, other=0.0)
        low_gate = tl.load(low + rows * low_stride + ranks[None, :], mask=there & there_ranks, other=0.0)
        low_up = tl.load(low + rows * low_stride + (R + ranks)[None, :], mask=there & there_ranks, other=0.0)
        h, d_gate, d_up = _differentiate(gradient, gate, up, dh.dtype.element_ty)
        tl.store(start, d_gate, mask=inside)
        tl.store(start + K, d_up, mask=inside)
        of_h = tl.dot(tl.trans(h), thin_rows, of_h, input_precision="ieee")
        of_gate = tl.dot(tl.trans(d_gate), low_gate, of_gate, input_precision="ieee")
        of_up = tl.dot(tl.trans(d_up), low_up, of_up, input_precision="ieee")
        if P > 0:
            if tile == 0:
                _zero_rooms(gate_up, rows, there, gate_up_stride, 2 * K, P, PAD)
    inside = (columns < K)[:, None] & there_ranks
    size = tl.cast(K, tl.int64) * R
    places = columns.to(tl.int64)[:, None] * R + ranks[None, :]
    if splits > 1:
        mine = partial + split * 3 * size + places
        tl.store(mine, of_h, mask=inside)
        tl.store(mine + size, of_gate, mask=inside)
        tl.store(mine + 2 * size, of_up, mask=inside)
        tl.debug_barrier()  # every thread has stored before the program says so
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == splits - 1:
            all_h = _add_partials(partial, places, inside, 3 * size, splits, AT_ONCE, BN, BR)
            all_gate = _add_partials(partial + size, places, inside, 3 * size, splits, AT_ONCE, BN, BR)
            all_up = _add_partials(partial + 2 * size, places, inside, 3 * size, splits, AT_ONCE, BN, BR)
            tl.store(arrived + tile, 0)
            _add_results(
                all_h, all_gate, all_up, d_input, d_outputs, columns, ranks, inside, K,
                input_column_stride, input_rank_stride, output_stride,
            )  # fmt: skip
    else:
        _add_results(
            of_h, of_gate, of_up, d_input, d_outputs, columns, ranks, inside, K, input_column_stride, input_rank_stride, output_stride
        )


def swiglu_gradients_(
    dh_TK: Tensor,
    gate_up_TN: Tensor,
    room: int,
    thin_TR: Tensor,
    low_TP: Tensor,
    d_input_RK: Tensor,
    d_outputs_NR: Tensor,
    arrived: Tensor,
    tile: Tile | None = None,
) -> Tensor:
    """The gradient [T, 2K + ``room``] in the place of ``gate_up``, whose rows must have that room in memory; dh is left as it is.

    Adds h^T thin, transposed, to ``d_input`` [R, K], and dg^T low[:, :R] and du^T low[:, R:2R], one below the other, to ``d_outputs``
    [2K, R]. ``arrived``: int32 counters, one for each ``COLUMNS`` columns of h, zero before and after. ``tile``: null for this GPU's.
    """
    (tokens, columns), ranks = dh_TK.shape, len(d_input_RK)
    check_rows("dh", dh_TK, tokens, columns)
    check_rows("gate_up", gate_up_TN, tokens, 2 * columns)
    check_rows("thin", thin_TR, tokens, ranks)
    check_rows("low", low_TP, tokens, 2 * ranks)
    check_rows("d_outputs", d_outputs_NR, 2 * columns, ranks)
    if gate_up_TN.stride(0) < 2 * columns + room:
        raise ValueError(f"gate_up has rows of {gate_up_TN.stride(0)} elements in memory; expected {2 * columns} and a room of {room}")
    num_tiles = triton.cdiv(columns, COLUMNS)
    check_counters(arrived, num_tiles)
    tile = tile or tiles.chosen("swiglu_gradients", dh_TK.device, tokens * columns, TILE)
    splits, tokens_each = split_tokens(tokens, num_tiles, tile, _PROGRAMS)
    partial = torch.empty(splits if splits > 1 else 0, 3, columns, ranks, dtype=torch.float32, device=dh_TK.device)
    _swiglu_gradients[(num_tiles, splits)](
        dh_TK, gate_up_TN, thin_TR, low_TP, partial, arrived, d_input_RK, d_outputs_NR, tokens, columns, ranks,
        dh_TK.stride(0), gate_up_TN.stride(0), thin_TR.stride(0), low_TP.stride(0),
        d_input_RK.stride(1), d_input_RK.stride(0), d_outputs_NR.stride(0), tokens_each, splits,
        AT_ONCE=PARTIALS_AT_ONCE, BT=tile.tokens, BN=COLUMNS, BR=max(16, triton.next_power_of_2(ranks)),
        P=room, PAD=triton.next_power_of_2(max(1, room)), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return gate_up_TN.as_strided((tokens, 2 * columns + room), gate_up_TN.stride())
