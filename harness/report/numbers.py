"""Numbers as people read them, each with its unit."""

from __future__ import annotations

import math

GIB = 2**30


def rate(tokens_per_second: float | None) -> str:
    """``1,234 tokens/s``."""
    return "not measured" if tokens_per_second is None else f"{plain_rate(tokens_per_second)} tokens/s"


def plain_rate(tokens_per_second: float | None) -> str:
    """Tokens per second without the unit, one decimal below a thousand."""
    if tokens_per_second is None:
        return ""
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 1000 else f"{tokens_per_second:.1f}"


def times(ratio: float) -> str:
    """``1.43 times``, with three decimals close to 1."""
    return f"{ratio:.3f} times" if 0.9 < ratio < 1.1 else f"{ratio:.2f} times"


def percent(fraction: float) -> str:
    """``98 %``, with a space that does not break."""
    return f"{100 * fraction:g}\u00a0%"


def gib(size: int | None) -> str:
    """Bytes as GiB, two decimals, no unit."""
    return "" if size is None else f"{size / GIB:.2f}"


def number(value: float | None, digits: int = 4) -> str:
    """A plain decimal number, nothing for null, the word for NaN and infinity."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def finite(value: float | None) -> float | None:
    """Null for what strict JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None
