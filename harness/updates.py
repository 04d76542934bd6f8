"""How alike two updates are: exact facts about a pair of trained weights, named by their content like scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from harness.spec import Spec

UPDATES_SCHEMA: Literal[1] = 1


class UpdatePair(Spec):
    """The updates of two sets of trained weights, from one start: their L2 norms and the cosine between them, all in fp64.

    ``start_sha256``: the initial adapter, or the base where every weight is trained. ``trained_sha256`` is sorted, ``norms`` in its
    order. ``cosine`` is null where an update is zero: it has no direction.
    """

    schema_version: Literal[1] = UPDATES_SCHEMA
    start_sha256: str
    trained_sha256: tuple[str, str]
    norms: tuple[float, float]
    cosine: float | None


@dataclass(frozen=True, slots=True)
class Alike:
    """A candidate's update beside the reference's: ``norm_ratio`` is the candidate's norm over the reference's."""

    norm_ratio: float
    cosine: float


PairKey = tuple[str, str, str]  # start, and both sets of weights, sorted
Updates = Mapping[PairKey, UpdatePair]


def pair_key(start: str, one: str, other: str) -> PairKey:
    """The key of a pair, whichever is named first."""
    return start, min(one, other), max(one, other)


def alike(updates: Updates, start: str, candidate: str, reference: str) -> Alike | None:
    """What is known of the two updates; None when they were never compared. The same weights need no comparison."""
    if candidate == reference:
        return Alike(1.0, 1.0)
    pair = updates.get(pair_key(start, candidate, reference))
    if pair is None:
        return None
    mine, theirs = pair.norms if pair.trained_sha256[0] == candidate else reversed(pair.norms)
    return Alike(mine / theirs if theirs else math.inf, 0.0 if pair.cosine is None else pair.cosine)
