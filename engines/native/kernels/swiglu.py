"""SwiGLU in one pass; backward makes h again and leaves both results where their inputs lay.

h = silu(g) u (Shazeer 2020), silu(g) = g sigma(g); dg = dh u sigma(g) (1 + g (1 - sigma(g))), du = dh silu(g).
The reference is ``swiglu`` and ``swiglu_backward`` of engines.native.reference. Making the adapters' thin products in the same pass was
tried and rejected: docs/log.md, 2026-11-24.

Legend: T rows, K columns of h; gate_up is [T, 2K + P] and h [T, K + P], P spare columns, written as zeros.
Kept for backward: gate_up, 2K values a row, which the gradient overwrites; h overwrites dh.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engines.native.kernels.launching import check_rows

# Elements a program where nothing is summed: eight a thread, so 16-byte loads.
_BLOCK = 1024
_WARPS = 4


@triton.jit
def _activate(gate, up, dtype: tl.constexpr):
    """silu(g) exactly and rounded, and h."""
    exact = gate * tl.sigmoid(gate)
    active = exact.to(dtype).to(tl.float32)
    return exact, active, (active * up).to(dtype)


@triton.jit
def _differentiate(gradient, gate, up, dtype: tl.constexpr):
    """h, dg and du."""
    exact, active, h = _activate(gate, up, dtype)
    sigma = tl.sigmoid(gate)
    return h, (gradient * up * (sigma + exact * (1.0 - sigma))).to(dtype), (gradient * active).to(dtype)


@triton.jit
def _zero_room(y, row, stride, start, P: tl.constexpr, PAD: tl.constexpr):
    spare = tl.arange(0, PAD)
    tl.store(y + row * stride + start + spare, tl.zeros((PAD,), y.dtype.element_ty), mask=spare < P)


@triton.jit
def _zero_rooms(y, rows, there, stride, start, P: tl.constexpr, PAD: tl.constexpr):
    """As ``_zero_room`` for a column of rows."""
    spare = tl.arange(0, PAD)[None, :]
    tl.store(y + rows * stride + start + spare, tl.zeros((1, PAD), y.dtype.element_ty), mask=there & (spare < P))


@triton.jit
def _swiglu_forward(gate_up, h, K, gate_up_stride, h_stride, BLOCK: tl.constexpr, P: tl.constexpr, PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    start = gate_up + row * gate_up_stride + columns
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + K, mask=inside, other=0.0).to(tl.float32)
    _, _, value = _activate(gate, up, h.dtype.element_ty)
    tl.store(h + row * h_stride + columns, value, mask=inside)
    if P > 0:
        if tl.program_id(1) == 0:
            _zero_room(h, row, h_stride, K, P, PAD)


@triton.jit
def _swiglu_backward(dh, gate_up, K, dh_stride, gate_up_stride, BLOCK: tl.constexpr, P: tl.constexpr, PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    start = gate_up + row * gate_up_stride + columns
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + K, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dh + row * dh_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, d_gate, d_up = _differentiate(gradient, gate, up, dh.dtype.element_ty)
    tl.store(dh + row * dh_stride + columns, value, mask=inside)
    tl.store(start, d_gate, mask=inside)
    tl.store(start + K, d_up, mask=inside)
    if P > 0:
        if tl.program_id(1) == 0:
            _zero_room(gate_up, row, gate_up_stride, 2 * K, P, PAD)


def swiglu(gate_up_TN: Tensor, room: int) -> Tensor:
    """h [T, K + ``room``] with zeros in the room, from gate_up [T, 2K] (rows may be longer in memory)."""
    rows, columns = gate_up_TN.shape[0], gate_up_TN.shape[1] // 2
    check_rows("gate_up", gate_up_TN, rows, 2 * columns)
    h_TW = gate_up_TN.new_empty(rows, columns + room)
    _swiglu_forward[(rows, triton.cdiv(columns, _BLOCK))](
        gate_up_TN, h_TW, columns, gate_up_TN.stride(0), h_TW.stride(0),
        BLOCK=_BLOCK, P=room, PAD=triton.next_power_of_2(max(1, room)), num_warps=_WARPS,
    )  # fmt: skip
    return h_TW


def swiglu_backward_(dh_TK: Tensor, gate_up_TN: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """(h in the place of ``dh``, gradient [T, 2K + ``room``] in the place of ``gate_up``), whose rows must have that room in memory."""
    rows, columns = dh_TK.shape
    check_rows("dh", dh_TK, rows, columns)
    check_rows("gate_up", gate_up_TN, rows, 2 * columns)
    if gate_up_TN.stride(0) < 2 * columns + room:
        raise ValueError(f"gate_up has rows of {gate_up_TN.stride(0)} elements in memory; expected {2 * columns} and a room of {room}")
    _swiglu_backward[(rows, triton.cdiv(columns, _BLOCK))](
        dh_TK, gate_up_TN, columns, dh_TK.stride(0), gate_up_TN.stride(0),
        BLOCK=_BLOCK, P=room, PAD=triton.next_power_of_2(max(1, room)), num_warps=_WARPS,
    )  # fmt: skip
    return dh_TK, gate_up_TN.as_strided((rows, 2 * columns + room), gate_up_TN.stride())
