"""Speed against memory: the variants that no other beats in both, which is what to choose from when memory is short."""

from __future__ import annotations

from harness.rank import Group, Variant
from harness.report.columns import memory_bytes
from harness.report.numbers import GIB, rate


def front(group: Group) -> tuple[Variant, ...]:
    """Of the variants that can win, those than which nobody is both faster and leaner (Pareto); the leanest first.

    Medians decide, however close they are.
    """
    measured = [(size, one) for one in group.variants if one.runs and one.can_win and (size := memory_bytes(one, group)) is not None]
    best: list[Variant] = []
    for _, variant in sorted(measured, key=lambda pair: (pair[0], -(pair[1].tokens_per_second or 0.0), pair[1].label)):
        if not best or (variant.tokens_per_second or 0.0) > (best[-1].tokens_per_second or 0.0):
            best.append(variant)
    return tuple(best)


def told(group: Group) -> str | None:
    """The front in a sentence; None where it has one member, which needs no choice."""
    best = front(group)
    if len(best) < 2:
        return None
    members = (f"{one.label} {rate(one.tokens_per_second)} in {(memory_bytes(one, group) or 0) / GIB:.2f} GiB" for one in best)
    return f"Where memory is short: {', '.join(members)}; every other variant is slower than one of these that needs no more."


def stairs(group: Group) -> list[tuple[float, float]]:
    """The front as a line: (tokens/s, GiB) along the best speed of every budget."""
    points = [(one.tokens_per_second or 0.0, (memory_bytes(one, group) or 0) / GIB) for one in front(group)]
    line: list[tuple[float, float]] = []
    for speed, size in points:
        if line:
            line.append((line[-1][0], size))
        line.append((speed, size))
    return line
