"""How sure the ratio of two rates is: the same words on the terminal, in the overview, in tables and in sentences."""

from __future__ import annotations

import math

from harness.rank import Variant
from harness.stats import Comparison

LEAST_PAIRS = 3  # two say something only when they agree closely


def ratio(a: Variant, b: Variant, compared: Comparison) -> float:
    """The rate of ``a`` as a multiple of ``b``'s, both of which have one: of their pairs, or of the medians, by which they are ranked,
    where there is no pair or the pairs say nothing.
    """
    if compared.interval and not says_nothing(compared):
        return compared.interval.ratio
    return (a.tokens_per_second or 0.0) / (b.tokens_per_second or math.inf)


def says_nothing(compared: Comparison) -> bool:
    """Whether two pairs leave everything open: their interval is then so wide that its figures, and the ratio in it, mislead."""
    return compared.interval is not None and 1 < compared.interval.n < LEAST_PAIRS and compared.answer == "inconclusive"


def reach(compared: Comparison) -> str:
    """``0.972 to 1.031, 3 pairs``, or in words why there is no such interval."""
    interval = compared.interval
    if interval is None:
        return "no repeat on the same host"
    if interval.n == 1:
        return "one pair"
    if says_nothing(compared):
        return f"two paired repeats that differ too much to say anything: run at least {LEAST_PAIRS}"
    return f"{interval.low:.3f} to {interval.high:.3f}, {interval.n} pairs"
