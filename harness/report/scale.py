"""Where values lie along an axis, linear or logarithmic, and which round numbers stand beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

LARGEST, SMALLEST = 1e300, 1e-300  # beyond them sums overflow, or steps between ticks vanish
_NARROW = 1e-6  # of the largest value: a range below this is one value, and needs no labels of ten digits
_MARGIN = 0.05  # of the range, left free at each end
_NICE, _NICE_WHOLE = (1.0, 2.0, 2.5, 5.0, 10.0), (1.0, 2.0, 5.0, 10.0)
_IN_A_DECADE = ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,))
_DECIMALS, _DIGITS = 6, 15


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis from ``low`` to ``high``; on a logarithmic one these are exponents of ten."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float | None:
        """Where between 0 (low) and 1 (high); None for what has no place here."""
        if not has_place(value, log=self.log):
            return None
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)


def has_place(value: float, *, log: bool) -> bool:
    """Not so NaN, infinity and what is beyond ``LARGEST``; on a logarithmic axis neither zero and less."""
    return abs(value) <= LARGEST and (not log or value >= SMALLEST)


def scale(values: Iterable[float], *, log: bool = False, zero: bool = False) -> Scale:
    """The axis that shows all ``values`` that have a place, whatever they are; ``zero``: also 0, at its end where none lies beyond."""
    known = [value for value in values if has_place(value, log=log)]
    if log:
        return _log_scale([math.log10(value) for value in known])
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    largest = max(abs(low), abs(high))
    if largest < SMALLEST:
        return Scale(0.0, 1.0) if zero else Scale(-1.0, 1.0)
    if high - low <= _NARROW * largest:
        low, high = low - _MARGIN * largest, high + _MARGIN * largest
    margin = _MARGIN * (high - low)
    return Scale(low - margin if not zero or low < 0 else 0.0, high + margin if not zero or high > 0 else 0.0)


def ticks(of: Scale, most: int, *, whole: bool = False) -> tuple[float, ...]:
    """Round numbers on the axis that have a place there, at most about ``most`` of them, in order; ``whole``: only whole ones."""
    found = _logarithmic(of, most) if of.log else _multiples(of.low, of.high, most, whole=whole)
    return tuple(value for value in found if has_place(value, log=of.log))


def _logarithmic(of: Scale, most: int) -> tuple[float, ...]:
    for parts in _IN_A_DECADE:
        found = [part * 10.0**exponent for exponent in range(math.floor(of.low), math.floor(of.high) + 1) for part in parts]
        inside = tuple(value for value in found if of.low <= math.log10(value) <= of.high)
        if len(inside) < 2:  # too little of a decade: its round numbers are those of a linear axis
            return _multiples(10.0**of.low, 10.0**of.high, most, whole=False)
        if len(inside) <= most:
            return inside
    every = math.ceil(len(inside) / most)
    return tuple(10.0**exponent for exponent in range(math.ceil(of.low), math.floor(of.high) + 1) if exponent % every == 0)


def texts(values: Sequence[float], *, log: bool = False) -> tuple[str, ...]:
    """``values`` in as few digits as tell them apart and are true; all of a linear axis in the same number of decimals."""
    if log:
        beside = [math.inf, *(b - a for a, b in pairwise(values)), math.inf]
        steps = [min(before, after, abs(value)) for value, before, after in zip(values, beside, beside[1:], strict=False)]
        return tuple(text for value, step in zip(values, steps, strict=True) for text in _texts([value], step))
    step = min((b - a for a, b in pairwise(values)), default=max(map(abs, values), default=1.0) or 1.0)
    return tuple(_texts(values, step))


def _log_scale(exponents: Sequence[float]) -> Scale:
    low, high = (min(exponents), max(exponents)) if exponents else (0.0, 1.0)
    margin = _MARGIN * (high - low) if high - low > _NARROW else 0.3  # half and twice the value
    return Scale(max(low - margin, -307.0), min(high + margin, 307.0), log=True)


def _multiples(low: float, high: float, most: int, *, whole: bool) -> tuple[float, ...]:
    least = (high - low) / most
    exponent = math.floor(math.log10(least))
    step = next(part * 10.0**exponent for part in (_NICE_WHOLE if whole else _NICE) if part * 10.0**exponent >= least * (1 - 1e-9))
    if whole:
        step = max(step, 1.0)
    return tuple(number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1))


def _texts(values: Sequence[float], step: float) -> list[str]:
    largest = max(map(abs, values), default=0.0)
    if largest < 1e9:
        for decimals in range(_DECIMALS + 1):
            if all(abs(round(value, decimals) - value) <= step / 1000 for value in values):
                return [_minus(f"{value + 0.0:,.{decimals}f}") for value in values]
    for decimals in range(_DIGITS + 1):
        written = [f"{value:.{decimals}e}" for value in values]
        if all(abs(float(text) - value) <= step / 1000 for text, value in zip(written, values, strict=True)):
            break
    return [_minus(f"{mantissa}e{int(exponent)}") for mantissa, exponent in (text.split("e") for text in written)]


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
