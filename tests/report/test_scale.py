"""Axes for whatever was measured: round numbers beside them, apart, inside, true; one value, zeros, huge, tiny, and what is no number."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as some

from harness.report.scale import LARGEST, Scale, has_place, scale, texts, ticks

ANY = some.floats(allow_nan=True, allow_infinity=True)


def said(values: list[float], most: int = 5, *, log: bool = False, zero: bool = False, whole: bool = False) -> list[str]:
    axis = scale(values, log=log, zero=zero)
    return list(texts(ticks(axis, most, whole=whole), log=log))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 10.0], ["0.0", "2.5", "5.0", "7.5", "10.0"]),
        ([16_855.0, 39_292.0], ["20,000", "25,000", "30,000", "35,000", "40,000"]),
        ([12.15, 12.19], ["12.15", "12.16", "12.17", "12.18", "12.19"]),
        ([-3.0, 3.0], ["−2", "0", "2"]),
        ([1e15, 5e15], ["1e15", "2e15", "3e15", "4e15", "5e15"]),
        ([1e-9, 4e-9], ["1e−9", "2e−9", "3e−9", "4e−9"]),
        ([0.0012, 0.0014], ["0.00120", "0.00125", "0.00130", "0.00135", "0.00140"]),
    ],
)
def test_round_numbers_in_as_few_digits_as_needed(values: list[float], expected: list[str]) -> None:
    assert said(values) == expected


def test_an_axis_from_zero_begins_there() -> None:
    assert scale([200.0, 400.0], zero=True) == Scale(0.0, 420.0)
    assert scale([-4.0, -2.0], zero=True).high == 0.0
    assert said([200.0, 400.0], zero=True) == ["0", "100", "200", "300", "400"]


def test_one_value_stands_in_the_middle() -> None:
    for value in (3.0, -3.0, 0.0, 1e250, -1e-250, 5e-324):
        axis = scale([value, value])
        assert axis.place(value) == pytest.approx(0.5)
        assert len(ticks(axis, 5)) >= 2
    assert scale([1e9, 1e9 + 1e-6]).place(1e9) == pytest.approx(0.5), "a difference that nobody could read"
    assert scale([0.0], zero=True) == Scale(0.0, 1.0)
    assert scale([8.0], log=True).place(8.0) == pytest.approx(0.5)


def test_nothing_to_show_still_makes_an_axis() -> None:
    for values in ([], [math.nan], [math.inf, -math.inf], [sys.float_info.max]):
        assert said(values) == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    assert said([0.0, -1.0], log=True) == ["1", "2", "5", "10"]


def test_what_is_no_number_has_no_place() -> None:
    axis = scale([1.0, 2.0])
    assert [axis.place(value) for value in (math.nan, math.inf, -math.inf)] == [None] * 3
    logarithmic = scale([1.0, 2.0], log=True)
    assert [logarithmic.place(value) for value in (0.0, -1.0, 5e-324)] == [None] * 3
    assert scale([1.0, math.nan, 2.0, math.inf]) == axis, "nor a say in the axis"


def test_whole_numbers_only() -> None:
    assert said([1.0, 2.0], whole=True) == ["1", "2"]
    assert said([1.0, 12.0], whole=True) == ["5", "10"]
    assert said([1.0, 1.0], whole=True) == ["1"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1000.0], ["1", "10", "100", "1,000"]),
        ([3.0, 30.0], ["5", "10", "20"]),
        ([20.0, 90.0], ["20", "50"]),
        ([100.0, 130.0], ["100", "110", "120", "130"]),
        ([1e-12, 1e12], ["1e−12", "0.000001", "1", "1,000,000", "1e12"]),
    ],
)
def test_a_logarithmic_axis(values: list[float], expected: list[str]) -> None:
    axis = scale(values, log=True)
    assert list(texts(ticks(axis, 5), log=True)) == expected
    middle = math.sqrt(values[0]) * math.sqrt(values[1])
    assert axis.place(middle) == pytest.approx(0.5)


@given(some.lists(ANY, max_size=8), some.booleans(), some.booleans(), some.booleans(), some.integers(3, 8))
@example([1e-300], True, False, False, 5)
@example([1e300], False, False, False, 8)
@example([1e300], True, False, False, 8)
@example([6.022e16, 5.99e16], True, False, False, 7)
def test_any_values_at_all(values: list[float], log: bool, zero: bool, whole: bool, most: int) -> None:
    axis = scale(values, log=log, zero=zero and not log)
    for value in values:
        place = axis.place(value)
        assert (place is not None) == has_place(value, log=log)
        assert place is None or -1e-9 <= place <= 1 + 1e-9
    at = ticks(axis, most, whole=whole and not log)
    assert list(at) == sorted(set(at))
    assert len(at) <= most + 2
    for value in at:
        place = axis.place(value)
        assert place is not None
        assert -1e-9 <= place <= 1 + 1e-9
    names = texts(at, log=log)
    assert len(set(names)) == len(at)
    assert all(len(name) <= 24 for name in names)
    told = [float(name.replace(",", "").replace("−", "-")) for name in names]
    assert told == pytest.approx(list(at), rel=1e-3, abs=0)
    assert axis.high - axis.low <= 2.2 * LARGEST
