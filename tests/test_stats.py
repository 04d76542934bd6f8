"""Rates and paired intervals: against scipy.stats, by hand, and by a seeded simulation of the error rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from harness import stats
from tests import records


def test_no_step_no_rate() -> None:
    assert stats.tokens_per_second(records.steps(num_steps=0)) is None


def test_the_rate_is_input_tokens_over_wall_time_of_the_steady_steps() -> None:
    steps = records.steps(num_steps=3, seconds=(100.0, 2.0, 3.0), tokens_input=(7, 10, 40), tokens_processed=(900, 900, 900))
    assert stats.tokens_per_second(steps) == 10.0


@pytest.mark.parametrize("seconds", [(1.0, 0.0), (1.0, math.nan), (1.0, math.inf), (1.0, -1.0), (1.0,)])
def test_times_that_make_no_sense_give_no_rate(seconds: tuple[float, ...]) -> None:
    assert stats.tokens_per_second(records.steps(num_steps=2, seconds=seconds)) is None


def test_median() -> None:
    assert stats.median([3.0, 1.0, 2.0]) == 2.0
    assert stats.median([4.0, 1.0]) == 2.5
    with pytest.raises(ValueError, match="median"):
        stats.median([])


@pytest.mark.parametrize("n", [2, 3, 5, 12])
@pytest.mark.parametrize("confidence", [0.9, 0.98])
def test_the_interval_agrees_with_scipy(n: int, confidence: float) -> None:
    generator = np.random.default_rng(n)
    a, b = generator.uniform(90, 110, n), generator.uniform(80, 120, n)
    expected = scipy_stats.ttest_rel(np.log(a), np.log(b)).confidence_interval(confidence)
    interval = stats.paired_log_ratio(list(a), list(b), confidence)
    assert (interval.low, interval.high) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    assert interval.ratio == pytest.approx(math.exp(np.mean(np.log(a / b))))
    assert interval.n == n


def test_identical_pairs_give_an_interval_of_no_width() -> None:
    interval = stats.paired_log_ratio([2.0, 4.0], [1.0, 2.0])
    assert (interval.ratio, interval.low, interval.high) == pytest.approx((2.0, 2.0, 2.0))


def test_one_pair_says_nothing_about_chance() -> None:
    assert stats.paired_log_ratio([3.0], [1.0]) == stats.Interval(pytest.approx(3.0), 0.0, math.inf, 1)
    assert stats.compare([3.0], [1.0]).answer == "inconclusive"


def test_wildly_different_pairs_do_not_overflow() -> None:
    assert stats.paired_log_ratio([1e300, 1e-300], [1e-300, 1e300]).high == math.inf


def test_nothing_to_compare_is_inconclusive() -> None:
    assert stats.compare([], []) == stats.Comparison("inconclusive", None)


@pytest.mark.parametrize(
    ("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0]), ([math.nan], [1.0]), ([math.inf], [1.0])]
)
def test_what_is_no_pair_of_rates_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=r"pairs|positive"):
        stats.paired_log_ratio(a, b)


@pytest.mark.parametrize(
    ("ratios", "answer"),
    [
        ((1.05, 1.06, 1.055), "faster"),
        ((0.95, 0.94, 0.945), "slower"),
        ((1.015, 1.0151, 1.0149), "faster"),  # sure and above 1 %, though inside 2 %
        ((1.005, 1.0051, 1.0049), "same"),  # sure, but of no interest
        ((0.999, 1.001, 1.0), "same"),
        ((1.2, 0.9, 1.1), "inconclusive"),
        ((1.03, 1.0, 1.06), "inconclusive"),
        ((1.5,), "inconclusive"),
    ],
)
def test_the_four_answers(ratios: tuple[float, ...], answer: str) -> None:
    b = [100.0 + place for place in range(len(ratios))]
    a = [value * ratio for value, ratio in zip(b, ratios, strict=True)]
    assert stats.compare(a, b).answer == answer


def test_comparing_is_antisymmetric() -> None:
    a, b = [110.0, 112.0, 111.0], [100.0, 101.0, 99.0]
    there, back = stats.compare(a, b), stats.compare(b, a)
    assert (there.answer, back.answer) == ("faster", "slower")
    assert there.interval is not None
    assert back.interval is not None
    assert there.interval.low == pytest.approx(1 / back.interval.high)


def _answers(effect: float, pairs: int, trials: int = 2000) -> dict[str, float]:
    """1 % run noise, 3 % drift over the sitting; each pair is measured side by side."""
    generator = np.random.default_rng(0)
    drift = np.linspace(0, 0.03, 2 * pairs).reshape(pairs, 2)
    counts: dict[str, float] = {}
    for _ in range(trials):
        noise = generator.normal(0, 0.01, (pairs, 2))
        order = np.where(np.arange(pairs)[:, None] % 2 == 0, drift, drift[:, ::-1])  # ABBA
        rates = 100 * np.exp(noise - order)
        answer = stats.compare(list(rates[:, 0] * (1 + effect)), list(rates[:, 1])).answer
        counts[answer] = counts.get(answer, 0) + 1 / trials
    return counts


def test_identical_code_is_seldom_called_different() -> None:
    for pairs in (3, 5, 8):
        answers = _answers(0.0, pairs)
        assert answers.get("faster", 0) + answers.get("slower", 0) < 0.025, pairs


def test_eight_pairs_find_three_percent() -> None:
    answers = _answers(0.03, 8)
    assert answers["faster"] > 0.97
    assert answers.get("slower", 0) == 0
