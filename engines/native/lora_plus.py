"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): which of the trained values are B's, whose learning rate is another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engines.native.weights import DecoderWeights, Weight, named_adapters


def are_of_b(weights: DecoderWeights, trained: Sequence[Weight]) -> list[bool]:
    """For each of ``trained`` whether it is the B of an adapter."""
    ups = {id(weight) for name, weight, _ in named_adapters(weights) if name.endswith("lora_B.weight")}
    return [id(weight) in ups for weight in trained]


def rates(weights: DecoderWeights, trained: Sequence[Weight], ratio: float) -> Tensor | float:
    """Each master's learning rate over the schedule's, in the order of the arena; ``trained`` fill it in that order."""
    if ratio == 1:
        return 1.0
    of_b = are_of_b(weights, trained)
    masters = [weight.master for weight in trained if weight.master is not None]
    return torch.cat([torch.full((each.numel(),), ratio if b else 1.0) for each, b in zip(masters, of_b, strict=True)]).to(masters[0])
