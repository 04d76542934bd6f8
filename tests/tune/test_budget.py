"""A search keeps to its budget within one run, and that run to a limit."""

from __future__ import annotations

import pytest

from harness.config import requests
from harness.fingerprint import engine_fingerprint
from harness.record import Record
from harness.tune.budget import Budget, stopped_after, would_stop_again
from tests.records import record


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


def test_what_was_stopped_is_not_run_again_for_as_long() -> None:
    (asked,) = requests(["engine=fused", "model=tiny_llama", "data=dense"], multirun=False)[1]
    code = engine_fingerprint(asked.cell.engine.module, asked.python, asked.packages)
    stopped = record(asked.cell.engine, status="timeout")

    def after(seconds: float, **changed: object) -> Record:
        values = {"wall_seconds": seconds, "engine_fingerprint": code, **changed}
        return stopped.model_copy(update={"provenance": stopped.provenance.model_copy(update=values)})

    limited = stopped_after(asked, 100)
    assert limited.limits.wall_seconds == 100
    assert stopped_after(asked, 10**6).limits == asked.limits
    assert would_stop_again(limited, after(100))
    assert would_stop_again(limited, after(90))
    assert not would_stop_again(limited, after(40))
    assert not would_stop_again(limited, after(100, engine_fingerprint="older"))
    assert not would_stop_again(limited, after(100).model_copy(update={"status": "crash"}))
