"""The answer to "did it train the same thing?": what it is, against what, why, and what was not tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from harness.comparable import Light
from harness.deviations import FIRST_NORM, TESTS, Deviation

Kind = Literal["reference", "same", "different", "not comparable"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """``worst``: the test with the largest excess, its value and allowance. ``reasons``: everything against ``same``.

    ``tests``: every test that was made, with its allowance in floors; ``untested``: the others, and why; ``hint``: what a failure
    looks like. ``elsewhere``: what the same engine and knobs were found to be on workloads that can be judged, and
    ``same_elsewhere`` whether they are the same on all of those.
    """

    kind: Kind
    anchor: str | None
    worst: str
    reasons: tuple[str, ...]
    light: Light
    can_win: bool
    tests: tuple[tuple[Deviation, float], ...] = ()
    untested: Mapping[str, str] | None = None
    hint: str = ""
    elsewhere: str = ""
    same_elsewhere: bool = False

    @property
    def label(self) -> str:
        """``same: fp32``, ``same: fp32 (7 of 9 tests)``, ``different``, ``not comparable``, ``reference: bf16``; where a workload cannot be
        judged, ``same elsewhere (fp32 on another)``.
        """
        if self.same_elsewhere:
            return f"same elsewhere ({self.elsewhere})"
        some = f" ({len(self.tests)} of {len(TESTS)} tests)" if self.kind == "same" and self.untested else ""
        label = f"{self.kind}: {self.anchor}{some}" if self.anchor and self.kind in ("same", "reference") else self.kind
        return f"{label}; {self.elsewhere}" if self.elsewhere else label

    @property
    def look(self) -> str:
        """What it is shown as: its kind in one word, with what was found elsewhere where nothing could be judged here."""
        return "same" if self.same_elsewhere else self.kind.replace(" ", "-")

    @property
    def of_first_step(self) -> bool:
        """Whether the first update was judged too, of a run of the first step alone."""
        return any(test.name == FIRST_NORM for test, _ in self.tests)

    @property
    def same_on(self) -> str:
        """Where else it was found the same, and by which anchor: ``fp32 on another``; empty where not, or judged here."""
        return self.elsewhere if self.same_elsewhere else ""

    @property
    def detail(self) -> str:
        """One sentence for people: the reasons, or the worst deviation that was still allowed; what it looks like; what was not tested."""
        parts = [*(self.reasons or [self.worst])]
        if self.hint:
            parts.append(f"likely: {self.hint}")
        if self.untested and self.kind == "same":
            whys: dict[str, list[str]] = {}
            for name, why in self.untested.items():
                whys.setdefault(why, []).append(name)
            parts += [f"not tested: {', '.join(names)} ({why})" for why, names in whys.items()]
        return "; ".join(part for part in parts if part)
