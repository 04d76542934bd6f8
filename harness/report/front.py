"""Speed against memory: the variants that no other beats in both, which is what to choose from when memory is short."""

from __future__ import annotations

from harness.rank import Group, Variant, compare_variants
from harness.report.columns import memory_bytes
from harness.report.numbers import GIB, rate, times
from harness.report.sure import ratio, reach

MORE = 1.05  # so much more memory is as much


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
    """The front in a sentence; None where it has one member, which needs no choice, and where nothing is to be chosen."""
    best = front(group)
    if len(best) < 2 or group.is_made_to_judge:
        return None
    members = (f"{one.label} {rate(one.tokens_per_second)} in {_gib(one, group)}" for one in best)
    short = f"Where memory is short: {', '.join(members)}; every other variant is slower than one of these that needs no more."
    against = [said for one in best[:-1] if (said := _against(one, group))]
    return f"{short} In no more memory than another engine: {'; '.join(against)}." if against else short


def _against(lean: Variant, group: Group) -> str | None:
    """By how much it leads the fastest of another engine in as much memory or a little more; None where nobody is near."""
    size = memory_bytes(lean, group) or 0
    others = [one for one in group.variants if one.engine.name != lean.engine.name and one.runs and one.can_win]
    slower = [one for one in others if (one.tokens_per_second or 0.0) < (lean.tokens_per_second or 0.0)]
    near = [one for one in slower if size <= (memory_bytes(one, group) or 0) <= MORE * size]
    if not near:
        return None
    rival = max(near, key=lambda one: one.tokens_per_second or 0.0)
    compared = compare_variants(lean, rival)
    return f"{lean.label} has {times(ratio(lean, rival, compared))} the rate of {rival.label} ({_gib(rival, group)}; {reach(compared)})"


def _gib(variant: Variant, group: Group) -> str:
    return f"{(memory_bytes(variant, group) or 0) / GIB:.2f} GiB"


def stairs(group: Group) -> list[tuple[float, float]]:
    """The front as a line: (tokens/s, GiB) along the best speed of every budget."""
    points = [(one.tokens_per_second or 0.0, (memory_bytes(one, group) or 0) / GIB) for one in front(group)]
    line: list[tuple[float, float]] = []
    for speed, size in points:
        if line:
            line.append((line[-1][0], size))
        line.append((speed, size))
    return line
