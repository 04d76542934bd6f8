"""A search keeps to its budget within one run, and that run to a limit."""

from __future__ import annotations

import pytest

from harness.tune.budget import Budget


@pytest.mark.parametrize(
    ("spent", "num_looked", "ran", "says"),
    [
        (0, 0, False, None),
        (700, 0, False, None),  # the weights took all of it: one run is made all the same
        (500, 3, False, None),  # nothing ran yet, so nothing tells how long the next takes
        (601, 3, False, "none of 3 runs gave a time"),
        (560, 3, True, None),
        (561, 3, True, "the next run would take about 40 s, and 39 s of the budget are left"),
    ],
)
def test_whether_a_run_is_begun(spent: float, num_looked: int, ran: bool, says: str | None) -> None:
    said = Budget(600).too_late(40, spent, num_looked=num_looked, ran=ran)
    assert said is None if says is None else says in str(said)
    assert Budget(None).too_late(40, spent, num_looked=num_looked, ran=ran) is None


def test_a_run_that_was_begun_is_stopped_soon_after_the_budget() -> None:
    assert Budget(600).allowed(40, 500, 1000) == 100 + 60
    assert Budget(600).allowed(400, 100, 1000) == 500 + 400
    assert Budget(600).allowed(40, 500, None) == 100 + 180
    assert Budget(6).allowed(40, 500, None) == 180


def test_a_look_that_takes_longer_than_the_best_of_whole_runs_has_lost() -> None:
    assert Budget(None).allowed(40, 10, None) is None
    assert Budget(None).allowed(40, 10, 200) == 300
    assert Budget(6000).allowed(40, 10, 200) == 300
    assert Budget(6000).allowed(40, 10, 20) == 60
