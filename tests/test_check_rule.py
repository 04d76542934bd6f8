"""The rule of a check: its answers, its statistics against scipy, its simulation against itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from harness import stats
from harness.check import simulate
from harness.check.rule import Sample, judge
from harness.check.settings import read_settings

EVEN = (1.0, 1.01, 0.99, 1.0, 1.005, 0.995, 1.0, 1.0)


def sample(ratio: float, noise: float = 0.002, *, pairs: int = 8, paired: bool = True) -> Sample:
    """Candidate over base is ``ratio``, give or take ``noise``."""
    base = tuple(EVEN[place % 8] for place in range(pairs))
    return Sample(base, tuple(value * ratio * (1 + noise * (-1) ** place) for place, value in enumerate(base)), paired)


@pytest.mark.parametrize(
    ("ratio", "noise", "answer"),
    [
        (1.05, 0.002, "regressed"),
        (0.95, 0.002, "improved"),
        (1.0, 0.002, "same"),
        (1.008, 0.0005, "same"),  # sure, but of no interest
        (1.03, 0.2, "inconclusive"),
        (1.0, 0.2, "inconclusive"),
    ],
)
def test_the_four_answers(ratio: float, noise: float, answer: str) -> None:
    (judged,) = judge([sample(ratio, noise)], drift=0.03)
    assert judged.answer == answer


def test_one_pair_is_no_answer() -> None:
    (judged,) = judge([sample(1.5, pairs=1)], drift=0.03)
    assert (judged.answer, judged.p_value, judged.interval.n) == ("inconclusive", 1.0, 1)


def test_many_cells_need_more_certainty_than_one() -> None:
    """This gap is below 2 % likely by chance, and among ten cells one such is likely."""
    doubtful = sample(1.03, 0.021)
    (alone,) = judge([doubtful], drift=0.0)
    assert (alone.answer, 0.002 < alone.p_value < 0.02) == ("regressed", True)
    others = [sample(1.0, 0.002 + 0.0001 * place) for place in range(9)]
    assert judge([doubtful, *others], drift=0.0)[0].answer == "inconclusive"


def test_runs_of_two_sittings_must_differ_by_more_than_drift() -> None:
    cases = [sample(1.03), sample(1.03, paired=False), sample(1.08, paired=False)]
    answers = [judge([one], drift=0.03)[0].answer for one in cases]
    assert answers == ["regressed", "inconclusive", "regressed"]


def test_a_drift_between_sittings_is_not_taken_for_a_change() -> None:
    """Identical code, 1 % noise, everything 2.9 % slower in the second sitting."""
    generator = np.random.default_rng(1)
    runs = np.exp(generator.normal(0, 0.01, (500, 2, 8))) * np.array([1.0, 1.029])[:, None]
    judged = [judge([Sample(tuple(base), tuple(candidate), paired=False)], drift=0.03)[0].answer for base, candidate in runs]
    assert sum(answer in ("regressed", "improved") for answer in judged) <= 0.02 * 500


@pytest.mark.parametrize("sizes", [(8, 8), (3, 12), (2, 2)])
def test_two_samples_agree_with_scipy(sizes: tuple[int, int]) -> None:
    generator = np.random.default_rng(sum(sizes))
    a, b = generator.uniform(90, 110, sizes[0]), generator.uniform(80, 120, sizes[1])
    welch = scipy_stats.ttest_ind(np.log(a), np.log(b), equal_var=False)
    expected = welch.confidence_interval(0.98)
    interval = stats.unpaired_log_ratio(list(a), list(b))
    assert (interval.low, interval.high) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    assert stats.unpaired_p_value(list(a), list(b)) == pytest.approx(welch.pvalue)
    wider = stats.unpaired_log_ratio(list(a), list(b), margin=0.03)
    assert (wider.low, wider.high) == pytest.approx((interval.low / 1.03, interval.high * 1.03))


@pytest.mark.parametrize("n", [2, 5, 12])
def test_the_paired_probability_agrees_with_scipy(n: int) -> None:
    generator = np.random.default_rng(n)
    a, b = generator.uniform(90, 110, n), generator.uniform(80, 120, n)
    assert stats.paired_p_value(list(a), list(b)) == pytest.approx(scipy_stats.ttest_rel(np.log(a), np.log(b)).pvalue)


@pytest.mark.parametrize(("a", "b"), [([], [1.0]), ([1.0], []), ([0.0, 1.0], [1.0, 1.0]), ([1.0, math.nan], [1.0, 1.0])])
def test_what_is_no_sample_is_refused(a: list[float], b: list[float]) -> None:
    for function in (stats.unpaired_log_ratio, stats.unpaired_p_value):
        with pytest.raises(ValueError, match=r"needed|positive"):
            function(a, b)


def test_identical_values_leave_no_doubt() -> None:
    assert stats.paired_p_value([1.0, 2.0], [1.0, 2.0]) == 1.0
    assert stats.paired_p_value([2.0, 4.0], [1.0, 2.0]) == 0.0


def test_holm_steps_down_and_stops() -> None:
    assert stats.holm([0.001, 0.5, 0.006, 0.011], alpha=0.02) == (True, False, True, False)
    assert stats.holm([0.019], alpha=0.02) == (True,)
    assert stats.holm([0.019, 0.012], alpha=0.02) == (False, False)
    assert stats.holm([]) == ()


def test_the_simulation_applies_the_rule_itself() -> None:
    """Noise of every size, so that each answer comes often."""
    generator = np.random.default_rng(0)
    shape = (300, 4, 6)
    logs = generator.normal(0, 1, shape) * generator.choice([0.003, 0.01, 0.03], (300, 4, 1)) + generator.normal(0, 0.03, (300, 4, 1))
    decided = simulate.decide(logs)
    words = {"regressed": 1, "improved": -1, "same": 0, "inconclusive": 0}
    for cells, expected in zip(logs, decided, strict=True):
        samples = [Sample((1.0,) * 6, tuple(np.exp(cell)), paired=True) for cell in cells]
        assert [words[one.answer] for one in judge(samples, drift=0.03)] == list(expected)
    assert min(np.mean(decided == value) for value in (-1, 0, 1)) > 0.1


def test_what_the_documentation_claims_holds(capsys: pytest.CaptureFixture[str]) -> None:
    from harness.check.__main__ import main

    assert main(["--self-test"]) == 0
    assert "FAILS" not in capsys.readouterr().out


def test_a_rule_without_holm_would_fail_its_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "_holm", lambda p_values: p_values <= 0.02)
    text, holds = simulate.self_test()
    assert not holds
    assert "FAILS  1.0% noise, 10 cells" in text


def test_more_cells_and_more_noise_need_more_pairs() -> None:
    assert simulate.LEAST_PAIRS < simulate.pairs_needed(1) <= 8 < simulate.pairs_needed(10) <= 12
    assert simulate.pairs_needed(1, simulate.QUIET) == simulate.LEAST_PAIRS < simulate.pairs_needed(10, simulate.QUIET)


def test_the_pairs_of_a_check_follow_from_the_noise_of_the_device() -> None:
    noise = read_settings().run_noise
    assert simulate.pairs_needed(1, noise.of("cuda")) < simulate.pairs_needed(1, noise.of("cpu"))
