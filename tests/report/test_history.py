"""The history of a cell over its records: a change of level is found and dated, noise is not, and nothing breaks without the library."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import pytest

from harness import report
from harness.report.history import INSTALL, LEAST_RECORDS, history
from harness.report.page import html
from harness.store import Results
from tests import records


def over_time(rates: Sequence[float], commits: Sequence[str] = ()) -> Results:
    """One cell, run again every day."""
    found = []
    for day, rate in enumerate(rates):
        one = records.record(rate=rate, started=f"2026-10-{day + 1:02d}T08:00:00+00:00")
        commit = commits[day] if commits else "0123456789abcdef"
        found.append(records.stored(one.model_copy(update={"provenance": one.provenance.model_copy(update={"commit": commit})})))
    return records.results(found)


def noisy(levels: Sequence[float]) -> list[float]:
    return list(np.random.default_rng(0).normal(levels, 5.0))


def test_a_change_of_level_is_found_and_dated() -> None:
    commits = ["a" * 40] * 10 + ["b" * 40] * 10
    (found,) = history(over_time(noisy([1000.0] * 10 + [1080.0] * 10), commits)).changes
    assert found.change == pytest.approx(0.08, abs=0.01)
    assert "tokens/s from 2026-10-11T08:00, between commits aaaaaaaa and bbbbbbbb" in found.text


def test_noise_is_no_change_and_the_report_says_that_it_looked() -> None:
    results = over_time(noisy([1000.0] * 20))
    assert history(results).lines == ("No change point in the 1 cells with a history.",)
    assert "No change point" in report.markdown(results)


def test_a_promoted_record_counts_once_and_few_records_have_no_history() -> None:
    few = over_time([1000.0] * (LEAST_RECORDS - 1))
    twice = records.results([*few.stored, *few.stored])
    assert history(twice).num_cells == 0
    assert "History" not in report.markdown(twice)
    assert history(over_time([1000.0] * LEAST_RECORDS)).num_cells == 1


def test_without_the_library_the_report_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "otava.analysis", None)
    results = over_time(noisy([1000.0] * 10 + [1080.0] * 10))
    assert INSTALL in history(results).lines[0]
    assert INSTALL in html(results)


def test_a_change_is_shown_in_both_reports() -> None:
    results = over_time(noisy([1000.0] * 10 + [900.0] * 10))
    for page in (report.markdown(results), html(results)):
        assert "History" in page
        assert "% tokens/s from 2026-10-11T08:00" in page
