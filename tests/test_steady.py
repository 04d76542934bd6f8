"""From where a run counts: after warm-up, compilation and allocator growth; where it never settles, that is said."""

from __future__ import annotations

import random
from typing import Any

import pytest

from harness.endings import doubted
from harness.record import Steps
from harness.steady import steady
from tests import records


def run(seconds: list[float], **changed: Any) -> Steps:
    sizes = changed.pop("tokens_processed", (1000,) * len(seconds))
    return records.steps(num_steps=len(seconds), seconds=tuple(seconds), tokens_processed=tuple(sizes), **changed)


def noisy(num_steps: int, noise: float, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(1.0, noise) for _ in range(num_steps)]


@pytest.mark.parametrize(("num_steps", "first"), [(0, 0), (1, 0), (2, 1), (3, 1), (10, 1), (11, 2), (12, 2), (20, 2), (39, 4)])
def test_of_a_short_run_the_first_tenth_is_left_out_and_nothing_is_claimed(num_steps: int, first: int) -> None:
    found = steady(run([1.0] * num_steps))
    assert (found.steps, found.judged, found.problem) == (range(first, num_steps), False, None)


def test_a_short_run_also_leaves_out_what_compiled_as_long_as_half_of_it_remains() -> None:
    assert steady(run([1.0] * 12, compiles=(9, 0, 1, 1, *[0] * 8))).steps == range(4, 12)
    assert steady(run([1.0] * 12, compiles=(*[0] * 8, 1, 0, 0, 0))).steps == range(2, 12)


def test_a_long_run_counts_from_the_first_window_that_is_like_the_rest() -> None:
    found = steady(run([3.0] * 12 + [1.0] * 48))
    assert found.judged
    assert found.problem is None
    assert found.steps == range(8, 60), "the median of ten forgives four slow steps, not five"


def test_nothing_before_the_last_compilation_or_the_last_change_of_the_reserve_counts() -> None:
    flat = [1.0] * 60
    assert steady(run(flat)).steps == range(1, 60)
    assert steady(run(flat, compiles=(5, *[0] * 14, 2, *[0] * 44))).steps == range(16, 60)
    assert steady(run(flat, reserved_bytes=(*[100] * 20, *[200] * 40))).steps == range(21, 60)
    assert steady(run(flat, reserved_bytes=(*[200] * 20, *[100] * 40))).steps == range(21, 60), "given back, and taken again later"


def test_where_steps_differ_in_size_the_reserve_grows_with_the_largest_and_that_unsettles_nothing() -> None:
    sizes = [1000 + 100 * (step % 7) for step in range(60)]
    sizes[50] = 5000
    found = steady(run([size / 1000 for size in sizes], tokens_processed=sizes, reserved_bytes=(*[100] * 50, *[200] * 10)))
    assert (found.steps, found.problem) == (range(1, 60), None)


def test_a_run_that_compiles_until_its_end_is_unsteady() -> None:
    found = steady(run([1.0] * 60, compiles=(*[0] * 55, 1, *[0] * 4)))
    assert found.problem is not None
    assert "step 56 of 60 still compiled" in found.problem


def test_a_pace_that_keeps_changing_is_unsteady_and_the_record_says_so() -> None:
    slower = [1.0 + 0.01 * step for step in range(60)]
    found = steady(run(slower))
    assert found.problem is not None
    assert "kept changing, by +1" in found.problem
    measured = records.record(ran=run(slower)).measurement
    assert doubted("ok", None, measured, None)[0] == "unsteady"
    assert doubted("oom", "too big", measured, None) == ("oom", "too big"), "what failed has its own reason"


@pytest.mark.parametrize("noise", [0.003, 0.02, 0.05])
def test_noise_alone_is_not_a_change_of_pace(noise: float) -> None:
    assert all(steady(run(noisy(100, noise, seed))).problem is None for seed in range(50))


def test_a_slow_drift_is_not_excused_by_noise() -> None:
    drifting = [value + 0.004 * step for step, value in enumerate(noisy(100, 0.003))]
    assert steady(run(drifting)).problem is not None


def test_steps_of_other_sizes_are_not_a_change_of_pace() -> None:
    """Sizes that grow over the run by half: seconds do too, and the line through both takes it out."""
    sizes = [1000 + 5 * step for step in range(100)]
    seconds = [0.2 + size / 1000 for size in sizes]
    assert steady(run(seconds, tokens_processed=sizes)).problem is None
    assert steady(run(seconds)).problem is not None, "the same seconds for equal sizes are a change of pace"
