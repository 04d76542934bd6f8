"""Which rows are trained on and which are held out, decided by each row's content alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from harness.data.tokenise import Tokenised
from harness.data.tokens import Sample


@dataclass(frozen=True, slots=True)
class SplitSamples:
    """``train`` in the order of the file, ``held_out`` in the order of the rows' hashes, and the ``counts`` of what went where."""

    train: list[Sample]
    held_out: list[Sample]
    counts: dict[str, int]


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Whether a row with this sha-256 is held out: its first 8 bytes, as a number in [0, 1), lie below ``fraction``."""
    return int.from_bytes(digest[:8]) < fraction * 2**64


def split_samples(tokenised: Iterable[Tokenised], *, fraction: float, most_held_out: int) -> SplitSamples:
    """Drop samples without a supervised label, hold out ``fraction`` of the rest by hash, keep the first ``most_held_out`` of these.

    Held-out rows beyond that number are neither trained on nor scored.
    """
    train: list[Sample] = []
    held_out: list[tuple[bytes, Sample]] = []
    counts = {"rows": 0, "samples_truncated": 0, "tokens_truncated": 0, "samples_dropped": 0}
    for item in tokenised:
        counts["rows"] += 1
        counts["samples_truncated"] += item.tokens_truncated > 0
        counts["tokens_truncated"] += item.tokens_truncated
        digest = item.row.digest()
        if item.sample.num_labels == 0:
            counts["samples_dropped"] += 1
        elif is_held_out(digest, fraction):
            held_out.append((digest, item.sample))
        else:
            train.append(item.sample)
    held_out.sort(key=lambda pair: pair[0])
    counts |= {"train": len(train), "held_out": min(len(held_out), most_held_out), "held_out_unused": max(0, len(held_out) - most_held_out)}
    return SplitSamples(train, [sample for _, sample in held_out[:most_held_out]], counts)
