"""Kernels of 8-bit linear layers: codes and scales bit by bit, and the split adapter's product against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engines.native.fp8 import GRADIENT_MOST, LOW_GAIN, Fp8Rows, split_thin
from engines.native.kernels.fp8 import decode_rows, quantise_wide, write_low, write_tail
from engines.native.kernels.fp8_inputs import rms_norm_codes, swiglu_codes
from engines.native.kernels.rms_norm import rms_norm
from engines.native.kernels.swiglu import swiglu
from harness.fp8 import ACTIVATION_MOST, LARGEST, WEIGHT_MOST, quantise_rows
from harness.fp8 import decode_rows as decoded
from tests.engines.oracle import DEVICE, EPSILON, INTERPRETED, random

pytestmark = INTERPRETED


def values(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Over the whole range of codes: the smallest, those that round to nothing, ties, and a row of zeros."""
    made = random(rows, columns, dtype=dtype, room=3) * torch.logspace(-7, 0, columns, device=DEVICE).to(dtype)
    made[0, : columns // 2] = (torch.arange(columns // 2, device=DEVICE) * 2.0**-10).to(dtype)
    made[0, -1] = ACTIVATION_MOST
    if rows > 1:
        made[1] = 0
    return made


@pytest.mark.parametrize(("rows", "columns", "room"), [(1, 48, 0), (3, 100, 16), (2, 40, 3)])
@pytest.mark.parametrize(("widest", "most"), [(32768, ACTIVATION_MOST), (32, ACTIVATION_MOST), (32, GRADIENT_MOST)])
def test_rows_with_thin_parts(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, room: int, widest: int, most: float, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("engines.native.kernels.fp8.MAX_ROW", widest)
    x, thin = values(rows, columns, dtype), 0.02 * random(rows, room, dtype=dtype)
    thin[1:2] = 0  # as x is there
    codes, scales = quantise_wide(torch.cat([x, thin], dim=1), columns, most)
    right, right_scales = quantise_rows(x, most)
    assert scales.equal(right_scales)
    assert codes[:, :columns].float().equal(right.float())
    split_rightly(codes[:, columns:], thin.float() / scales.unsqueeze(1), weight=False)


def test_a_large_thin_part_is_not_cut_off() -> None:
    wide = torch.ones(2, 32, device=DEVICE)
    wide[0, -16:] = 50.0  # beside 1: more than 28 times as large
    codes, scales = quantise_wide(wide, 16)
    torch.testing.assert_close(scales, torch.tensor([50 / LARGEST, 1 / ACTIVATION_MOST], device=DEVICE))
    assert codes[0, 16].float() == LARGEST
    write_low(codes, scales, torch.full((2, 16), 1e3, device=DEVICE))
    assert (codes[:, 16:32].float() == LARGEST).all()


@pytest.mark.parametrize(("rows", "columns", "room", "turned"), [(5, 24, 16, False), (70, 16, 3, True)])
def test_weights_are_split_and_decoded(rows: int, columns: int, room: int, turned: bool, dtype: torch.dtype) -> None:
    weight = values(rows, columns, dtype)
    made = Fp8Rows.of(weight, room, room=2)
    thin = random(room, rows, dtype=dtype).t() if turned else random(rows, room, dtype=dtype)
    thin[0] = 1e4
    write_tail(made, thin)
    split_rightly(made.codes[:rows, columns:], thin.float() / made.scales[:rows].unsqueeze(1), weight=True)
    assert (made.codes[0, columns : columns + room].float() == LARGEST).all()
    assert not made.codes[rows:].float().any()
    found = torch.empty(rows, columns + 4, dtype=dtype, device=DEVICE)[:, :columns]
    decode_rows(made, found)
    assert found.equal(decoded(*quantise_rows(weight, WEIGHT_MOST)).to(dtype))
    with pytest.raises(ValueError, match="for tails of"):
        write_tail(made, thin[:, 1:])


@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.1])
def test_the_split_keeps_an_adapter(size: float, dtype: torch.dtype) -> None:
    """One product of codes is s x A^T B^T within one part in a hundred, from the first steps' B to one as large as its weight."""
    tokens, outputs, columns, ranks = 6, 5, 32, 16
    x, low = random(tokens, columns, dtype=dtype), 0.5 * random(tokens, ranks, dtype=dtype)
    weight, up = 0.1 * random(outputs, columns), (size * random(outputs, ranks)).to(dtype)
    made = Fp8Rows.of(weight, ranks)
    write_tail(made, up)
    codes, scales = quantise_wide(torch.cat([x, low], dim=1), columns)
    tails = codes[:, columns:].double() @ made.codes[:, columns:].double().t()
    found = tails * scales.double().unsqueeze(1) * made.scales.double()
    truth = low.double() @ up.double().t()
    assert (found - truth).norm() < 0.01 * truth.norm()


@pytest.mark.parametrize("columns", [7, 64])
@pytest.mark.parametrize("rows", [1, 5])
def test_producers_round_what_they_make(rows: int, columns: int, dtype: torch.dtype) -> None:
    x, delta, w = random(rows, columns, dtype=dtype), random(rows, columns, dtype=dtype, room=2), (1 + 0.1 * random(columns)).to(dtype)
    gate_up = random(rows, 2 * columns, dtype=dtype, room=8)
    for residue in (delta, None):
        y, inverse, summed, codes, scales = rms_norm_codes(x, w, EPSILON, 16, residue)
        right = rms_norm(x, w, EPSILON, 0, residue)
        assert all(found.equal(expected) for found, expected in zip((y, inverse, summed), right, strict=True))
        rounded_alike(y, codes, scales)
    h, codes, scales = swiglu_codes(gate_up, 16)
    assert h.equal(swiglu(gate_up, 0))
    rounded_alike(h, codes, scales)


def split_rightly(codes: Tensor, values: Tensor, *, weight: bool) -> None:
    """As the reference splits, but that another rounding before it may fall to the next code: so by what the codes stand for."""
    values = values.clamp(-LARGEST, LARGEST)
    for found in (codes, split_thin(values, weight=weight)):
        first, second, third = found.float().chunk(3, dim=1)
        high, low, less = (first, third, second) if weight else (first, second, third)
        assert ((high - values).abs() <= values.abs() / 15 + 2**-10).all()
        assert ((high + low / LOW_GAIN - values).abs() <= values.abs() / 240 + 2**-14).all()
        assert ((less - high / LOW_GAIN).abs() <= high.abs() / 240 + 2**-10).all()


def rounded_alike(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    right, right_scales = quantise_rows(x, ACTIVATION_MOST)
    assert scales.equal(right_scales)
    assert codes[:, : x.shape[1]].float().equal(right.float())
    assert codes.shape[1] == x.shape[1] + 48
