"""Which rows are trained on, how often, and which are held out: decided by each row's content alone."""

from __future__ import annotations

import hashlib
import heapq
import math

from harness.data.tokens import Sample


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Whether a row with this sha-256 is held out: its first 8 bytes, as a number in [0, 1), lie below ``fraction``."""
    return int.from_bytes(digest[:8]) < fraction * 2**64


def times(digest: bytes, weight: float) -> int:
    """How often a training row with this sha-256 comes in an epoch: floor(weight), and once more for the share of rows that is left.

    The share is chosen by another hash of the digest, so that it has nothing to do with what is held out.
    """
    whole = math.floor(weight)
    if whole == weight:
        return whole
    return whole + is_held_out(hashlib.sha256(b"again" + digest).digest(), weight - whole)


class HeldOut:
    """The samples with the lowest digests among those added, ``most`` of them; equal digests in the order of the rows."""

    def __init__(self, most: int) -> None:
        self.num_unused = 0
        self._most = most
        self._heap: list[tuple[int, int, Sample]] = []  # the highest digest on top, of equal ones the latest

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, digest: bytes, sample: Sample) -> None:
        """Keep ``sample``, in a copy of its own, or count one that is not used."""
        number = len(self._heap) + self.num_unused
        copied = Sample(sample.input_ids.copy(), sample.labels.copy())
        heapq.heappush(self._heap, (-int.from_bytes(digest), -number, copied))
        if len(self._heap) > self._most:
            heapq.heappop(self._heap)
            self.num_unused += 1

    def samples(self) -> list[Sample]:
        """What was kept, in the order of the digests."""
        return [sample for _, _, sample in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]
