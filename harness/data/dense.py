"""Dense data: samples of random token ids of one exact length, all supervised, the same bits whatever library draws random numbers."""

from __future__ import annotations

import hashlib

import numpy as np

from harness.data.split import is_held_out
from harness.data.tokens import IGNORE, Sample


def dense_samples(num_samples: int, sequence_length: int, vocab_size: int, held_out_fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out samples, ``num_samples`` together; sample i depends on its number, length and vocabulary only."""
    train: list[Sample] = []
    held_out: list[Sample] = []
    for index in range(num_samples):
        stream = hashlib.shake_256(f"dense:{vocab_size}:{sequence_length}:{index}".encode()).digest(4 * sequence_length)
        ids = (np.frombuffer(stream, dtype="<u4") % vocab_size).astype(np.int32)  # bias below vocab_size / 2**32
        labels = ids.copy()
        labels[:1] = IGNORE
        held = is_held_out(hashlib.sha256(ids.tobytes()).digest(), held_out_fraction)
        (held_out if held else train).append(Sample(ids, labels))
    return train, held_out
