"""Which rank trains on which samples of a step, and in which micro-batches: the same answer on every rank, without a word between them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.data.tokens import IGNORE, Batch, Sample, StepTokens

Cost = Callable[[int], float]
"""What a sample of so many tokens costs, in a unit of its own."""

# A batch of two positions without a label: its rank takes part in what all ranks do together, and adds nothing. Known by identity.
IDLE = Batch(np.zeros((1, 2), np.int64), np.full((1, 2), IGNORE, np.int64), ((2,),))


@dataclass(frozen=True, slots=True)
class Split:
    """A step as all ranks train on it: ``batches`` of every rank, as many of each (:data:`IDLE` ones where a rank has too few samples)."""

    batches: tuple[tuple[Batch, ...], ...]
    tokens: StepTokens


def cost_of(config: dict[str, Any], num_parameters: int) -> Cost:
    """Multiplications of a sample's forward pass: ``num_parameters`` a token, and causal attention's share, which grows with the square."""
    layers, width = int(config.get("num_hidden_layers", 0)), int(config.get("hidden_size", 0))
    heads = config.get("num_attention_heads")
    attended = 0 if heads is None else layers * int(heads) * int(config.get("head_dim") or width // int(heads))
    return lambda length: length * (num_parameters + attended * length)


def shares(costs: Sequence[float], ranks: int) -> tuple[tuple[int, ...], ...]:
    """For every rank the samples (places in ``costs``) that it trains on, dearest first: costs as even as the greedy rule makes them.

    No rank has more than its part of the count, rounded up: it would need more micro-batches, for which the others wait.
    """
    most = -(-len(costs) // ranks)
    loads, taken = [0.0] * ranks, [list[int]() for _ in range(ranks)]
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        rank = min((rank for rank in range(ranks) if len(taken[rank]) < most), key=lambda rank: (loads[rank], rank))
        taken[rank].append(place)
        loads[rank] += costs[place]
    return tuple(tuple(places) for places in taken)


def split(samples: Sequence[Sample], ranks: int, cost: Cost, *, micro_batch: int, make_batch: Callable[[Sequence[Sample]], Batch]) -> Split:
    """``samples`` among ``ranks``, at most ``micro_batch`` a batch; every rank makes as many batches as the one with most samples needs.

    A rank's samples go from dear to cheap, so the batches that ranks compute at the same time are alike, and padding is short.
    """
    parts = shares([cost(len(sample)) for sample in samples], ranks)
    count = -(-max(len(part) for part in parts) // micro_batch)
    batches = tuple(tuple(_batches([samples[place] for place in part], count, make_batch)) for part in parts)
    every = [batch for one in batches for batch in one]
    positions = sum(batch.input_ids.size for batch in every)
    return Split(batches, StepTokens.of([batch for batch in every if batch is not IDLE], processed=positions))


def fingerprint(split: Split) -> bytes:
    """What two ranks that split a step alike have in common: all documents, and who trains on how many positions."""
    shapes = [[batch.lengths for batch in one] for one in split.batches]
    return hashlib.sha256(f"{split.tokens.sha256} {shapes}".encode()).digest()


def _batches(samples: Sequence[Sample], count: int, make_batch: Callable[[Sequence[Sample]], Batch]) -> list[Batch]:
    """``samples`` in ``count`` runs of almost one length; the longer runs come last, where samples are cheap."""
    least, rest = divmod(len(samples), count)
    sizes = [least + (number >= count - rest) for number in range(count)]
    stops = np.cumsum(sizes).tolist()
    return [make_batch(samples[stop - size : stop]) if size else IDLE for size, stop in zip(sizes, stops, strict=True)]
