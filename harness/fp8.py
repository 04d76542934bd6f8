"""Linear layers in 8-bit floating point, e4m3, with a scale a row: how values are rounded, and a model that computes as such layers do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CODE = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa, no infinity (Micikevicius et al. 2022, arXiv 2209.05433)
LARGEST = 448.0
# What a row's largest magnitude becomes. Not 448: an adapter's values may stand behind a row in the same scale, up to 3.5 times as large
# as its weights, 28 times as its activations. Values below 1/8,000 (1/1,000) of the largest lose by it. Powers of two: every device then
# makes the same scales, however it divides.
WEIGHT_MOST, ACTIVATION_MOST = 128.0, 16.0


def quantise_rows(values: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """(codes of ``values``'s size, the scale of each row, float32).

    A row is the last dimension: the inputs of one output of a weight, the features of one token. Its largest magnitude becomes
    ``most``; a row of zeros has the scale 1 / ``most``.
    """
    wide = values.float()
    largest = wide.abs().amax(-1)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    whole = torch.full_like(largest, most)  # by a number a GPU would divide inexactly
    return (wide * (whole / largest).unsqueeze(-1)).to(CODE), largest / whole


def decode_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """The values of ``codes``, float32."""
    return codes.float() * scales.unsqueeze(-1)


class _StraightThrough(torch.autograd.Function):
    """Rounded values whose gradient is that of the values themselves (Bengio et al. 2013, arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return decode_rows(*quantise_rows(values, ACTIVATION_MOST)).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def rounded(values: Tensor) -> Tensor:
    """``values`` as an 8-bit linear layer reads them, in their own type; the gradient passes straight through."""
    made: Tensor = _StraightThrough.apply(values)  # type: ignore[no-untyped-call]
    return made


def emulate(model: Any) -> None:
    """Make every linear layer but the head compute in plain torch what an 8-bit one does: its weight and its input rounded row by row.

    What an adapter reads stays as it is. Weights must be as the base stores them, or wider.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            module.weight.data = decode_rows(*quantise_rows(module.weight.data, WEIGHT_MOST)).to(module.weight.dtype)
            module.register_forward_pre_hook(_round_input)


def _round_input(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return rounded(inputs[0]), *inputs[1:]
