"""What needs no statistics: bytes, operations, kernels, launches and compilations of two trees beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.check.settings import Tolerances
from harness.gates import Counted, Counts
from harness.record import Record

Change = Literal["more", "less", "same"]
GATES = {
    "memory": "peak memory of a step",
    "setup-memory": "peak memory before the first step",
    "growth": "memory kept by the last step",
    "operations": "operations dispatched in a step",
    "kernels": "kernels run in a step",
    "launches": "launches in a step",
    "compilations": "graphs and kernels compiled",
}


@dataclass(frozen=True, slots=True)
class Gate:
    """One count of both trees, ``name`` one of GATES. ``change``: of the candidate against the base, ``same`` within the tolerance."""

    name: str
    base: int
    candidate: int
    change: Change

    @property
    def unit(self) -> str:
        """``bytes``, or nothing."""
        return "bytes" if self.name in ("memory", "setup-memory", "growth") else ""

    @property
    def share(self) -> str:
        """The change in percent, nothing where there is none or no percentage of it."""
        return f"{100 * (self.candidate / self.base - 1):+.2f} %" if self.base and self.candidate != self.base else ""

    @property
    def text(self) -> str:
        """``peak memory of a step: 12,681,780 → 14,778,932 bytes (+16.54 %)``."""
        words = [f"{GATES[self.name]}: {self.base:,} → {self.candidate:,}", self.unit, f"({self.share})" if self.share else ""]
        return " ".join(filter(None, words))


def gates(base: Counted, candidate: Counted, allowed: Tolerances) -> tuple[Gate, ...]:
    """Every count that both have. A run that was timed and not counted has few: what its record says."""
    mine, theirs = _facts(candidate), _facts(base)
    tolerance = {**allowed.model_dump(), "setup-memory": allowed.memory}
    return tuple(
        Gate(name, theirs[name], value, _change(theirs[name], value, tolerance.get(name, 0.0)))
        for name, value in mine.items()
        if name in theirs
    )


def missing(base: Counted, candidate: Counted) -> tuple[str, ...]:
    """What only one of them could count, and what they say about that: it was not compared."""
    sides = {"base": _facts(base), "candidate": _facts(candidate)}
    names = [name for name in GATES if (name in sides["base"]) != (name in sides["candidate"])]
    notes = [f"not compared, counted by the {side} alone: {name}" for name in names for side in sides if name in sides[side]]
    said = {side: one.counts.notes if one.counts else () for side, one in zip(sides, (base, candidate), strict=True)}
    return (*notes, *(f"the {side}: {note}" for side, each in said.items() for note in each))


def _facts(counted: Counted) -> dict[str, int]:
    """Every count that is known, in the order of GATES."""
    compiles = counted.record.measurement.steps.compiles if counted.record.measurement else None
    known = {
        **(_of_record(counted.record) if counted.counts is None else _of_counts(counted.counts)),
        "compilations": None if compiles is None else sum(compiles),
    }
    return {name: value for name, value in known.items() if value is not None}


def _of_counts(counts: Counts) -> dict[str, int | None]:
    """Of operations and launches the last step counts: the first ones may compile, tune and capture."""
    return {
        "memory": max(_settled(counts)),
        "setup-memory": counts.setup_peak_bytes,
        "growth": _growth(counts),
        "operations": _last(counts.num_operations),
        "kernels": _last(counts.num_kernels),
        "launches": _last(counts.num_launches),
    }


def _of_record(record: Record) -> dict[str, int | None]:
    """The allocator's peaks of a GPU are exact; resident memory of a process is not."""
    memory = record.measurement.memory if record.measurement else ()
    peaks = {phase: [one.peak_allocated_bytes for one in memory if one.phase == phase] for phase in ("steady", "setup")}
    most = {phase: max((peak for peak in found if peak is not None), default=None) for phase, found in peaks.items()}
    return {"memory": most["steady"], "setup-memory": most["setup"]}


def _settled(counts: Counts) -> tuple[int, ...]:
    """On a GPU the first step tries kernels out, which takes memory that no later step needs."""
    return counts.peak_bytes[1:] if counts.device == "cuda" and len(counts.peak_bytes) > 1 else counts.peak_bytes


def _growth(counts: Counts) -> int | None:
    """What is still there after a step and was not before it; of the first step nothing can be said, it makes gradients and moments."""
    return max(0, counts.live_bytes[-1] - counts.live_bytes[-2]) if len(counts.live_bytes) > 2 else None


def _last(values: tuple[int, ...] | None) -> int | None:
    return values[-1] if values else None


def _change(base: int, candidate: int, tolerance: float) -> Change:
    if candidate > base * (1 + tolerance):
        return "more"
    return "less" if candidate < base else "same"
