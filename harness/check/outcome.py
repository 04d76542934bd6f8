"""What a check found: cell by cell, and the exit code of the whole."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from harness.check.facts import Gate
from harness.check.rule import Judged


class Exit(IntEnum):
    """Exit codes of a check. Where several apply: not the same work, nothing measured, a regression, a failure, an open question."""

    FINE = 0
    INTERNAL = 1
    USAGE = 2
    REGRESSION = 3
    INCONCLUSIVE = 4
    CELLS_FAILED = 5
    NOTHING_MEASURED = 6
    PARITY = 7
    INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Timing:
    """Median steady step of each run in seconds, and what follows. ``thermal``: the gap is the clock's, not the code's."""

    base: tuple[float, ...]
    candidate: tuple[float, ...]
    judged: Judged
    thermal: bool = False

    @property
    def answer(self) -> str:
        """One of the four answers; a gap that only the clock explains is none."""
        return "inconclusive" if self.thermal else self.judged.answer


@dataclass(frozen=True, slots=True)
class CellOutcome:
    """One cell of both trees. ``failed``: why there is nothing to compare; ``different``: why it is not the same work.

    ``timing`` null and ``gates`` empty: not measured. ``allowed``: gates that may rise. ``notes``: what a reader should know.
    """

    name: str
    failed: str | None = None
    different: str | None = None
    timing: Timing | None = None
    gates: tuple[Gate, ...] = ()
    allowed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def risen(self) -> tuple[Gate, ...]:
        """Gates that make this a regression."""
        return tuple(gate for gate in self.gates if gate.change == "more" and gate.name not in self.allowed)

    @property
    def is_measured(self) -> bool:
        """Whether anything was compared."""
        return self.failed is None and (self.timing is not None or bool(self.gates))

    @property
    def answer(self) -> str:
        """In a word: ``failed``, ``different``, one of the four answers, or ``not measured``."""
        if self.failed is not None:
            return "failed"
        if self.different is not None:
            return "different"
        if not self.is_measured:
            return "not measured"
        if self.risen:
            return "regressed"
        if self.timing is not None:
            return self.timing.answer
        return "improved" if any(gate.change == "less" for gate in self.gates) else "same"


@dataclass(frozen=True, slots=True)
class Outcome:
    """``title``: what was compared with what. ``notes`` hold for all cells."""

    title: str
    cells: tuple[CellOutcome, ...]
    notes: tuple[str, ...] = ()

    def exit(self, *, strict: bool) -> Exit:
        """The exit code; ``strict`` makes an open question a failure."""
        answers = {cell.answer for cell in self.cells}
        if "different" in answers:
            return Exit.PARITY
        if not any(cell.is_measured for cell in self.cells):
            return Exit.NOTHING_MEASURED
        if "regressed" in answers:
            return Exit.REGRESSION
        if answers & {"failed", "not measured"}:
            return Exit.CELLS_FAILED
        return Exit.INCONCLUSIVE if strict and "inconclusive" in answers else Exit.FINE
