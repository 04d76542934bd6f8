"""Seeded random values for every tensor of a model: the same bits on every machine, made in any order and in parallel."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from harness.weights.tensors import CHUNK, Floats

Kind = Literal["normal", "ones", "zeros"]


def random_values(kinds: Mapping[str, Kind], seed: int, standard_deviation: float) -> Callable[[str, int, int], Floats]:
    """Values for :func:`harness.weights.tensors.write_model`: each chunk of each tensor has a generator of its own."""

    def values(name: str, start: int, stop: int) -> Floats:
        if kinds[name] != "normal":
            return np.full(stop - start, 1.0 if kinds[name] == "ones" else 0.0, np.float32)
        drawn = generator(f"{seed}:{name}:{start // CHUNK}").standard_normal(stop - start, dtype=np.float32)
        drawn *= np.float32(standard_deviation)
        return drawn

    return values


def kaiming_uniform(name: str, seed: int, shape: tuple[int, int]) -> Floats:
    """An adapter's A, [rank, in]: uniform within 1/sqrt(in), which is kaiming uniform with a = sqrt(5) (He et al. 2015; PEFT's choice)."""
    bound = 1.0 / math.sqrt(shape[1])
    drawn = generator(f"{seed}:{name}").random(shape, dtype=np.float32)
    return (drawn * np.float32(2.0 * bound) - np.float32(bound)).astype(np.float32)


def generator(label: str) -> np.random.Generator:
    """A generator seeded by the sha-256 of ``label``, so that no tensor depends on the order of the others."""
    return np.random.Generator(np.random.SFC64(int.from_bytes(hashlib.sha256(label.encode()).digest(), "little")))
