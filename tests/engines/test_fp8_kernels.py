"""Kernels of 8-bit linear layers: codes and scales bit by bit, and the split adapter's product against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engines.native.fp8 import TAIL_GAIN, Fp8Rows, split_thin
from engines.native.kernels.fp8 import decode_rows, quantise_wide, write_tail
from harness.fp8 import LARGEST, quantise_rows
from harness.fp8 import decode_rows as decoded
from tests.engines.oracle import DEVICE, INTERPRETED, random

pytestmark = INTERPRETED


def values(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Over the whole range of codes: the smallest, those that round to nothing, ties, and a row of zeros."""
    made = random(rows, columns, dtype=dtype, room=3) * torch.logspace(-7, 0, columns, device=DEVICE).to(dtype)
    made[0, : columns // 2] = (torch.arange(columns // 2, device=DEVICE) * 2.0**-10).to(dtype)
    made[0, -1] = LARGEST
    if rows > 1:
        made[1] = 0
    return made


@pytest.mark.parametrize(("rows", "columns", "room"), [(1, 48, 0), (3, 100, 16), (2, 40, 3)])
@pytest.mark.parametrize("most", [32768, 32])
def test_activations(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, room: int, most: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr("engines.native.kernels.fp8.MAX_ROW", most)
    x, thin = values(rows, columns, dtype), 0.05 * random(rows, room, dtype=dtype)
    codes, scales = quantise_wide(torch.cat([x, thin], dim=1), columns)
    right, right_scales = quantise_rows(torch.cat([x, TAIL_GAIN * thin], dim=1))
    assert scales.equal(right_scales)
    assert codes[:, :columns].float().equal(right[:, :columns].float())
    expected = split_thin(thin.float() * (LARGEST / (scales * LARGEST)).unsqueeze(1), weight=False)
    torch.testing.assert_close(codes[:, columns:].float(), expected.float(), rtol=0.07, atol=2**-9)


def test_a_large_thin_part_is_not_cut_off() -> None:
    wide = torch.ones(2, 32, device=DEVICE)
    wide[0, -16:] = 50.0
    codes, scales = quantise_wide(wide, 16)
    torch.testing.assert_close(scales, torch.tensor([TAIL_GAIN * 50 / LARGEST, TAIL_GAIN / LARGEST], device=DEVICE))
    assert codes[0, 16].float() == LARGEST


@pytest.mark.parametrize(("rows", "columns", "room", "turned"), [(5, 24, 16, False), (70, 16, 3, True)])
def test_weights_are_split_and_decoded(rows: int, columns: int, room: int, turned: bool, dtype: torch.dtype) -> None:
    weight = values(rows, columns, dtype)
    made = Fp8Rows.of(weight, room, room=2)
    thin = random(room, rows, dtype=dtype).t() if turned else random(rows, room, dtype=dtype)
    thin[0] = 1e4
    write_tail(made, thin)
    expected = split_thin(thin.float() / made.scales[:rows].unsqueeze(1), weight=True)
    torch.testing.assert_close(made.codes[:rows, columns:].float(), expected.float(), rtol=0.07, atol=2**-9)
    assert (made.codes[0, columns : columns + room].float() == LARGEST).all()
    assert not made.codes[rows:].float().any()
    found = torch.empty(rows, columns + 4, dtype=dtype, device=DEVICE)[:, :columns]
    decode_rows(made, found)
    assert found.equal(decoded(*quantise_rows(weight)).to(dtype))
    with pytest.raises(ValueError, match="for tails of"):
        write_tail(made, thin[:, 1:])


@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.3])
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
