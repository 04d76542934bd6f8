"""Is the candidate slower than the base? Runs paired by sitting, an interval and an effect, Holm over the cells of one check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harness.stats import EFFECT, SAME, Interval, holm, paired_log_ratio, paired_p_value, unpaired_log_ratio, unpaired_p_value

Answer = Literal["regressed", "improved", "same", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One value a run, in seconds or cycles a step. ``paired``: the n-th of both were measured side by side."""

    base: tuple[float, ...]
    candidate: tuple[float, ...]
    paired: bool


@dataclass(frozen=True, slots=True)
class Judged:
    """``interval`` is of candidate over base: above 1 is slower. ``p_value``: of so large a gap between equals."""

    answer: Answer
    interval: Interval
    p_value: float


def judge(samples: Sequence[Sample], drift: float) -> tuple[Judged, ...]:
    """One answer a cell. The chance that any of them is called regressed or improved although nothing changed stays below 2 %.

    Runs that were not measured side by side must differ by more than ``drift`` beyond chance. Raises ValueError for a sample
    without a run on either side, or with values that are no times.
    """
    p_values = [_p_value(sample, drift) for sample in samples]
    intervals = [_interval(sample, drift) for sample in samples]
    sure = holm(p_values)
    return tuple(Judged(_answer(i, s), i, p) for i, s, p in zip(intervals, sure, p_values, strict=True))


def _p_value(sample: Sample, drift: float) -> float:
    if sample.paired:
        return paired_p_value(sample.candidate, sample.base)
    return unpaired_p_value(sample.candidate, sample.base, drift)


def _interval(sample: Sample, drift: float) -> Interval:
    if sample.paired:
        return paired_log_ratio(sample.candidate, sample.base)
    return unpaired_log_ratio(sample.candidate, sample.base, drift)


def _answer(interval: Interval, sure: bool) -> Answer:
    if interval.n < 2:
        return "inconclusive"
    if sure and interval.ratio > 1 + EFFECT:
        return "regressed"
    if sure and interval.ratio < 1 / (1 + EFFECT):
        return "improved"
    if interval.low > 1 / (1 + SAME) and interval.high < 1 + SAME:
        return "same"
    return "inconclusive"
