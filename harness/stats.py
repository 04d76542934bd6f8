"""Medians, the rate of a run, paired intervals, and the answer to "is it faster?"."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harness.record import Steps

CONFIDENCE = 0.98  # with 8 pairs, 1 % run noise and 3 % drift: 0.5 % false alarms (tests/test_stats.py simulates it)
EFFECT = 0.01  # a smaller difference is of no interest, however sure
SAME = 0.02  # an interval inside this is "same"; inside EFFECT real A/A pairs would seldom earn it

Answer = Literal["faster", "slower", "same", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Interval:
    """The geometric mean ``ratio`` of ``n`` pairs and its confidence interval; 0 to infinity when one pair says nothing."""

    ratio: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """The answer and the interval behind it, null when there is not one pair."""

    answer: Answer
    interval: Interval | None


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two middle ones. Raises ValueError when there are none."""
    return float(statistics.median(values))


def steady_steps(num_steps: int) -> range:
    """The 0-based steps that count for the rate.

    The first 10 % are left out, rounded up: always the first step (compilation, autotuning, allocator growth), and more of a
    longer run. Of a single step nothing can be left out.
    """
    warm_up = math.ceil(num_steps / 10) if num_steps > 1 else 0
    return range(warm_up, num_steps)


def tokens_per_second(steps: Steps) -> float | None:
    """Input tokens (prompt included, padding not) per second of wall time over the steady steps; None when nothing was timed."""
    if len(steps.seconds) != len(steps.tokens_input):
        return None
    steady = steady_steps(len(steps.seconds))
    seconds = sum(steps.seconds[i] for i in steady)
    tokens = sum(steps.tokens_input[i] for i in steady)
    if not (math.isfinite(seconds) and seconds > 0 and tokens > 0):
        return None
    return tokens / seconds


def paired_log_ratio(a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's t interval of the mean of ln(a_i / b_i), as a ratio. The unit is the run: pooling steps gives false alarms.

    Raises ValueError when the lengths differ, when there is no pair, or when a value is not positive and finite.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"pairs are needed: got {len(a)} and {len(b)} values")
    if not all(math.isfinite(value) and value > 0 for value in (*a, *b)):
        raise ValueError("rates must be positive and finite to be compared as ratios")
    logs = [math.log(x) - math.log(y) for x, y in zip(a, b, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) == 1:
        return Interval(_exp(mean), 0.0, math.inf, 1)
    half = _quantile(len(logs) - 1, 0.5 + confidence / 2) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Interval(_exp(mean), _exp(mean - half), _exp(mean + half), len(logs))


def compare(a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE) -> Comparison:
    """Is ``a`` faster than ``b``? Values are rates, paired by position.

    ``faster`` and ``slower`` need an interval that excludes 1 and a difference above 1 %; ``same`` an interval inside ±2 %.
    Everything else is ``inconclusive``, a single pair always.
    """
    if not a:
        return Comparison("inconclusive", None)
    interval = paired_log_ratio(a, b, confidence)
    return Comparison(_answer(interval), interval)


def _answer(interval: Interval) -> Answer:
    if interval.n < 2:
        return "inconclusive"
    if interval.low > 1 and interval.ratio > 1 + EFFECT:
        return "faster"
    if interval.high < 1 and interval.ratio < 1 / (1 + EFFECT):
        return "slower"
    if interval.low > 1 / (1 + SAME) and interval.high < 1 + SAME:
        return "same"
    return "inconclusive"


def _quantile(degrees_of_freedom: int, probability: float) -> float:
    from scipy.special import stdtrit  # takes 0.15 s to import, and a single run needs no interval

    return float(stdtrit(degrees_of_freedom, probability))


def _exp(x: float) -> float:
    """e^x, infinite where a float ends: two wildly different pairs must not stop a report."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
