"""From which step on a run is steady: past compilation, allocator growth and warm-up, and no longer changing its pace."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from harness.record import Steps

WINDOW = 10  # steps that are compared with the rest
LEAST_STEPS = 4 * WINDOW  # of a run that can be judged: a window, and a rest of two more
TOLERANCE = 0.01
MOST_TOLERANCE = 0.05  # with more noise than this a window of ten says nothing
_CHANCE = 3.0  # standard errors
_OF_A_MEDIAN = 1.2533  # the standard error of a median over that of a mean, for normal noise
_OF_A_MAD = 1.4826  # a standard deviation over the median absolute deviation, for normal noise


@dataclass(frozen=True, slots=True)
class Steady:
    """The 0-based ``steps`` that count for the rate. ``judged``: whether the run was long enough to tell; ``problem``: why it never
    became steady, null when it did or cannot be judged.
    """

    steps: range
    judged: bool
    problem: str | None = None


def steady(steps: Steps) -> Steady:
    """The steady window of a run.

    It begins at the smallest k with |median(k .. k + 10) / median(rest) - 1| below 1 %, no compilation in it and the allocator's reserve
    flat. Where steps differ in size, a line through (positions processed, seconds) is taken out first, and the reserve may grow. Where
    single steps are noisy, 1 % becomes three standard errors of the window's median, at most 5 %. A run of fewer than 40 steps is not
    judged: its first tenth is left out, and what comes before the last compilation, as long as half of the steps remain.
    """
    num_steps = len(steps.seconds)
    settled = _settled(steps)
    if num_steps < LEAST_STEPS or not all(math.isfinite(seconds) and seconds > 0 for seconds in steps.seconds):
        first = math.ceil(num_steps / 10) if num_steps > 1 else 0
        return Steady(range(max(first, settled) if 2 * settled <= num_steps else first, num_steps), judged=False)
    pace = _pace(steps)
    latest = num_steps - 3 * WINDOW
    for first in range(max(1, settled), latest + 1):
        window, rest = pace[first : first + WINDOW], pace[first + WINDOW :]
        if abs(statistics.median(window) / statistics.median(rest) - 1) < _tolerance(rest):
            return Steady(range(first, num_steps), judged=True)
    whole = range(math.ceil(num_steps / 10), num_steps)
    if settled > latest:
        return Steady(whole, True, f"step {settled} of {num_steps} still compiled something or made the allocator grow")
    last, before = pace[-2 * WINDOW :], pace[latest : latest + WINDOW]
    change = statistics.median(last) / statistics.median(before) - 1
    return Steady(whole, True, f"the pace of its {num_steps} steps kept changing, by {100 * change:+.1f} % over the last {3 * WINDOW}")


def _settled(steps: Steps) -> int:
    """The first step after every compilation and, where steps are of one size, after every change of the allocator's reserve.

    Where they differ, the reserve grows whenever a step is larger than all before it: such steps are part of the work.
    """
    settled = max((index + 1 for index, count in enumerate(steps.compiles or ()) if count), default=0)
    reserved = steps.reserved_bytes or ()
    if not reserved or len(set(steps.tokens_processed)) > 1:
        return settled
    changed = (index for index in range(1, len(reserved)) if reserved[index] != reserved[index - 1])
    return max(settled, max(changed, default=0) + 1)


def _tolerance(rest: Sequence[float]) -> float:
    middle = statistics.median(rest)
    deviation = _OF_A_MAD * statistics.median(abs(value - middle) for value in rest) / middle
    return min(MOST_TOLERANCE, max(TOLERANCE, _CHANCE * _OF_A_MEDIAN * deviation / math.sqrt(WINDOW)))


def _pace(steps: Steps) -> list[float]:
    """Seconds of each step over what its size lets expect, by a straight line through the second half; equal sizes: seconds as they are."""
    sizes, half = steps.tokens_processed, len(steps.seconds) // 2
    if len(set(sizes)) == 1:
        return list(steps.seconds)
    known_sizes, known_seconds = sizes[half:], steps.seconds[half:]
    if len(set(known_sizes)) == 1:
        return list(steps.seconds)
    slope, least = statistics.linear_regression(known_sizes, known_seconds)
    if slope <= 0 or least + slope * min(sizes) <= 0:  # sizes do not explain the time, or too well to be true
        return list(steps.seconds)
    return [seconds / (least + slope * size) for seconds, size in zip(steps.seconds, sizes, strict=True)]
