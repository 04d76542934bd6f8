"""The rows of the kernels around 8-bit products; the products themselves: ``python -m engines.native.bench_fp8``.

Legend: T tokens, H hidden, N outputs and K inputs of a linear group, P its padded ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engines.native import reference
from engines.native.bench_kernels.setting import Call, Row, Setting, bare, by
from engines.native.fp8 import SPLITS, Fp8Rows, split_thin
from engines.native.fp8_reference import decode_into
from engines.native.kernels.fp8 import decode_rows, quantise_wide, write_low, write_tail
from engines.native.kernels.fp8_inputs import rms_norm_codes, swiglu_codes
from harness.fp8 import ACTIVATION_MOST, quantise_rows

_FP32 = 4


def fp8_rows() -> Mapping[str, Callable[[Setting], Row]]:
    """Each kernel by the name of its row."""
    return {
        "quantise_wide": _quantise_wide,
        "write_tail": _write_tail,
        "write_low": _write_low,
        "decode_rows": _decode_rows,
        "rms_norm_codes": _rms_norm_codes,
        "swiglu_codes": _swiglu_codes,
    }


def _quantise_wide(s: Setting) -> Row:
    """The gradient of gate and up."""
    group = s.layer.gate_up
    columns, room = group.num_outputs, group.padded_rank
    wide = s.random(s.tokens, columns + room)
    return Row(
        kernel=quantise_wide,
        size=by(s.tokens, columns + room),
        ours=Call(lambda: quantise_wide(wide, columns)),
        reference=Call(lambda: _rounded(wide, columns)),
        num_bytes=s.tokens * (s.item * (columns + room) + columns + SPLITS * room + _FP32),
    )


def _write_tail(s: Setting) -> Row:
    """B behind gate and up."""
    group = s.layer.gate_up
    outputs, room = group.num_outputs, group.padded_rank
    rows, thin = _weight(s, outputs, 16, room), s.random(outputs, room)
    return Row(
        kernel=write_tail,
        size=by(outputs, room),
        ours=Call(lambda: write_tail(rows, thin)),
        reference=Call(lambda: split_thin(thin.float() / rows.scales[:outputs].unsqueeze(1), weight=True)),
        num_bytes=outputs * (s.item * room + SPLITS * room + _FP32),
    )


def _write_low(s: Setting) -> Row:
    """h A^T behind the codes of h."""
    columns, room = s.layer.down.num_inputs, s.layer.down.padded_rank
    codes, scales = quantise_wide(s.random(s.tokens, columns + room), columns)
    low = s.random(s.tokens, room)
    return Row(
        kernel=write_low,
        size=by(s.tokens, room),
        ours=Call(lambda: write_low(codes, scales, low)),
        reference=Call(lambda: split_thin(low.float() / scales.unsqueeze(1), weight=False)),
        num_bytes=s.tokens * (s.item * room + SPLITS * room + _FP32),
    )


def _decode_rows(s: Setting) -> Row:
    group = s.layer.down
    outputs, inputs = group.num_outputs, group.num_inputs
    rows, into = _weight(s, outputs, inputs, group.padded_rank), s.random(outputs, inputs)
    return Row(
        kernel=decode_rows,
        size=by(outputs, inputs),
        ours=Call(lambda: decode_rows(rows, into)),
        reference=Call(lambda: decode_into(rows, into)),
        num_bytes=outputs * (inputs * (1 + s.item) + _FP32),
    )


def _rms_norm_codes(s: Setting) -> Row:
    tokens, hidden, room = s.tokens, s.shape.hidden_size, s.layer.gate_up.padded_rank
    x, delta, weight, epsilon = s.random(tokens, hidden), s.random(tokens, hidden), s.layer.mlp_norm, s.shape.norm_epsilon
    plain = bare(hidden, s)
    return Row(
        kernel=rms_norm_codes,
        size=by(tokens, hidden),
        ours=Call(lambda: rms_norm_codes(x, weight.value, epsilon, room, delta)),
        reference=Call(lambda: quantise_rows(reference.norm(x, delta, weight, epsilon, plain).input.wide, ACTIVATION_MOST)),
        num_bytes=tokens * (hidden * (4 * s.item + 1) + 2 * _FP32) + s.item * hidden,
    )


def _swiglu_codes(s: Setting) -> Row:
    inner, room = s.shape.intermediate_size, s.layer.down.padded_rank
    gate_up, plain = s.random(s.tokens, 2 * inner, room=s.layer.gate_up.padded_rank), bare(inner, s)
    return Row(
        kernel=swiglu_codes,
        size=by(s.tokens, inner),
        ours=Call(lambda: swiglu_codes(gate_up, room)),
        reference=Call(lambda: quantise_rows(reference.swiglu(gate_up, plain).wide, ACTIVATION_MOST)),
        num_bytes=s.tokens * (inner * (3 * s.item + 1) + _FP32),
    )


def _weight(s: Setting, outputs: int, inputs: int, room: int) -> Fp8Rows:
    return Fp8Rows.of(torch.randn(outputs, inputs, device=s.device), room)


def _rounded(wide: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    codes, scales = quantise_rows(wide[:, :columns], ACTIVATION_MOST)
    return torch.cat([codes, split_thin(wide[:, columns:].float() / scales.unsqueeze(1), weight=False)], dim=1), scales
