"""Medians, the rate of a run, paired intervals, and the answer to "is it faster?"."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harness.record import Steps
from harness.steady import steady

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


def tokens_per_second(steps: Steps) -> float | None:
    """Input tokens (prompt included, padding not) per second of wall time over the steady steps; None when nothing was timed."""
    if len(steps.seconds) != len(steps.tokens_input):
        return None
    window = steady(steps).steps
    seconds = sum(steps.seconds[i] for i in window)
    tokens = sum(steps.tokens_input[i] for i in window)
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


def unpaired_log_ratio(a: Sequence[float], b: Sequence[float], margin: float = 0.0, confidence: float = CONFIDENCE) -> Interval:
    """Welch's t interval of mean ln a - mean ln b, as a ratio, made wider by ``margin`` on both sides; ``n`` is the smaller count.

    For runs of two sittings: what the machine drifted between them is part of the difference, and ``margin`` is the most of it.
    Raises ValueError as :func:`paired_log_ratio` does.
    """
    means, variances = _moments(a, b)
    mean, least = means[0] - means[1], min(len(a), len(b))
    if least < 2:
        return Interval(_exp(mean), 0.0, math.inf, least)
    half = _quantile(_welch_degrees(a, b, variances), 0.5 + confidence / 2) * math.sqrt(sum(variances)) + math.log1p(margin)
    return Interval(_exp(mean), _exp(mean - half), _exp(mean + half), least)


def paired_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided probability of so large a mean of ln(a_i / b_i) were it 0 (Student's t test); 1 for a single pair."""
    paired_log_ratio(a, b)  # refuses what is no pair
    logs = [math.log(x) - math.log(y) for x, y in zip(a, b, strict=True)]
    if len(logs) < 2:
        return 1.0
    return _two_sided(statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs)), len(logs) - 1)


def unpaired_p_value(a: Sequence[float], b: Sequence[float], margin: float = 0.0) -> float:
    """As :func:`paired_p_value` for two samples (Welch's t test), were the ratio anywhere inside ``margin``."""
    means, variances = _moments(a, b)
    if min(len(a), len(b)) < 2:
        return 1.0
    beyond = max(0.0, abs(means[0] - means[1]) - math.log1p(margin))
    return _two_sided(beyond, math.sqrt(sum(variances)), _welch_degrees(a, b, variances))


def holm(p_values: Sequence[float], alpha: float = 1 - CONFIDENCE) -> tuple[bool, ...]:
    """Which hypotheses are rejected so that the chance of any false one among them stays below ``alpha`` (Holm 1979)."""
    rejected = [False] * len(p_values)
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > alpha / (len(p_values) - place):
            break
        rejected[index] = True
    return tuple(rejected)


def _moments(a: Sequence[float], b: Sequence[float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Means of the logarithms, and variances of these means (0 where there is one value)."""
    if not a or not b:
        raise ValueError(f"values are needed on both sides: got {len(a)} and {len(b)}")
    if not all(math.isfinite(value) and value > 0 for value in (*a, *b)):
        raise ValueError("values must be positive and finite to be compared as ratios")
    logs = [[math.log(value) for value in side] for side in (a, b)]
    first, second = (statistics.variance(side) / len(side) if len(side) > 1 else 0.0 for side in logs)
    return (statistics.fmean(logs[0]), statistics.fmean(logs[1])), (first, second)


def _welch_degrees(a: Sequence[float], b: Sequence[float], variances: tuple[float, float]) -> float:
    parts = [variance**2 / (len(side) - 1) for variance, side in zip(variances, (a, b), strict=True)]
    return sum(variances) ** 2 / sum(parts) if sum(parts) > 0 else float(len(a) + len(b) - 2)


def _two_sided(mean: float, error: float, degrees_of_freedom: float) -> float:
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    from scipy.special import stdtr

    return 2 * float(stdtr(degrees_of_freedom, -abs(mean) / error))


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


def _quantile(degrees_of_freedom: float, probability: float) -> float:
    from scipy.special import stdtrit  # takes 0.15 s to import, and a single run needs no interval

    return float(stdtrit(degrees_of_freedom, probability))


def _exp(x: float) -> float:
    """e^x, infinite where a float ends: two wildly different pairs must not stop a report."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
