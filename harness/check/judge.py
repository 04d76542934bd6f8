"""From the runs of two trees to the outcome of each cell: failures, parity, counts, times, clocks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.anchors import anchor_at
from harness.check.facts import gates, missing
from harness.check.outcome import CellOutcome, Timing
from harness.check.rule import Judged, Sample, judge
from harness.check.settings import CheckSettings, Tolerances
from harness.comparable import Run
from harness.derived import derive
from harness.gates import Counted
from harness.parity import judge_against
from harness.record import Record
from harness.stats import EFFECT
from harness.steady import steady

LEAST_RUNS = 3  # of each tree: the interval of two pairs is so wide that they can never tell


@dataclass(frozen=True, slots=True)
class Measured:
    """All that is known of one cell. ``base`` and ``candidate``: timed runs, the n-th of both side by side when ``paired``.

    ``counted``: a counted run of each tree, null where that was not done. ``failed``: why measuring stopped. ``notes``: for readers.
    """

    name: str
    base: tuple[Run, ...] = ()
    candidate: tuple[Run, ...] = ()
    paired: bool = True
    counted: tuple[Counted, Counted] | None = None
    failed: str | None = None
    notes: tuple[str, ...] = ()


def outcomes(cells: Sequence[Measured], settings: CheckSettings, allowed: Sequence[str] = ()) -> tuple[CellOutcome, ...]:
    """Judge every cell; times are judged together, because the more cells there are the likelier is a chance finding."""
    found = [_untimed(cell, settings.tolerances, allowed) for cell in cells]
    able = [i for i, cell in enumerate(cells) if not (found[i].failed or found[i].different) and cell.base and cell.candidate]
    samples = [_seconds(cells[i]) for i in able]
    for i, sample, judged in zip(able, samples, judge(samples, settings.drift), strict=True):
        thermal = _is_thermal(cells[i], judged)
        notes = [*found[i].notes, *_timing_notes(cells[i], thermal)]
        found[i] = replace(found[i], timing=Timing(sample.base, sample.candidate, judged, thermal), notes=tuple(notes))
    return tuple(found)


def _untimed(cell: Measured, tolerances: Tolerances, allowed: Sequence[str]) -> CellOutcome:
    """Everything but the times."""
    if failed := cell.failed or _failure(cell):
        return CellOutcome(cell.name, failed=failed, notes=cell.notes)
    both = _counted(cell)
    seen = gates(*both, tolerances) if both else ()
    rose = [f"{gate.text}, allowed" for gate in seen if gate.change == "more" and gate.name in allowed]
    notes = (*cell.notes, *rose, *(missing(*both) if both else ()))
    return CellOutcome(cell.name, different=_difference(cell), gates=seen, allowed=tuple(allowed), notes=notes)


def _counted(cell: Measured) -> tuple[Counted, Counted] | None:
    """The counted runs; without them, what the records of the first timed runs say."""
    if cell.counted is not None:
        return cell.counted
    if not (cell.base and cell.candidate):
        return None
    return Counted(record=cell.base[0].record, counts=None), Counted(record=cell.candidate[0].record, counts=None)


def _failure(cell: Measured) -> str | None:
    sides = {"base": [run.record for run in cell.base], "candidate": [run.record for run in cell.candidate]}
    if cell.counted is not None:
        for side, counted in zip(sides, cell.counted, strict=True):
            sides[side].append(counted.record)
    for side, records in sides.items():
        for record in records:
            if record.status != "ok":
                return f"the {side} ended {record.status} (repeat {record.cell.repeat}): {record.reason}"
            if _step_seconds(record, 0) is None:
                return f"the {side} timed no step (repeat {record.cell.repeat}): its record is empty or was edited"
    if (cell.base or cell.candidate) and min(len(cell.base), len(cell.candidate)) < LEAST_RUNS:
        return f"too few repeats: {len(cell.base)} of the base, {len(cell.candidate)} of the candidate; at least {LEAST_RUNS} say something"
    return None


def _difference(cell: Measured) -> str | None:
    """Why the candidate did not do the same work as the base, by the rule of parity; without scores by its light check."""
    pairs = [(run, cell.base[0]) for run in cell.candidate] if cell.base else []
    if cell.counted is not None:
        pairs.insert(0, (Run(cell.counted[1].record), Run(cell.counted[0].record)))
    for candidate, base in pairs:
        verdict = judge_against(candidate, anchor_at(base, ()))
        if verdict.kind == "different" or verdict.light.passed is not True:
            return verdict.light.detail if verdict.light.text and not verdict.light.passed else verdict.detail
    return None


def _seconds(cell: Measured) -> Sample:
    """The median steady step of each run. All runs count from the same step on: steps differ in size."""
    runs = [run.record for run in (*cell.base, *cell.candidate)]
    first = max(steady(record.measurement.steps).steps.start for record in runs if record.measurement)
    values = [_step_seconds(record, first) for record in runs]
    known = [value for value in values if value is not None]
    assert len(known) == len(values)
    return Sample(tuple(known[: len(cell.base)]), tuple(known[len(cell.base) :]), cell.paired)


def _step_seconds(record: Record, first: int) -> float | None:
    seconds = record.measurement.steps.seconds[first:] if record.measurement else ()
    middle = statistics.median(seconds) if seconds else 0.0
    return middle if 0 < middle < float("inf") else None


def _is_thermal(cell: Measured, judged: Judged) -> bool:
    """A gap in seconds that is not a gap in clock cycles: the GPU was slower, not the code. Unknown clocks excuse nothing."""
    if judged.answer not in ("regressed", "improved"):
        return False
    clocks = [[_clock(run.record) for run in side] for side in (cell.base, cell.candidate)]
    if any(clock is None for side in clocks for clock in side):
        return False
    sample = _seconds(cell)
    cycles = [
        tuple(s * (c or 0.0) for s, c in zip(side, mhz, strict=True))
        for side, mhz in zip((sample.base, sample.candidate), clocks, strict=True)
    ]
    (in_cycles,) = judge([Sample(cycles[0], cycles[1], cell.paired)], 0.0)
    gap = in_cycles.interval.ratio
    same_direction = (gap > 1) == (judged.interval.ratio > 1)
    return not same_direction or max(gap, 1 / gap) <= 1 + EFFECT


def _clock(record: Record) -> float | None:
    known = derive(record)
    return known.sm_clock_mhz if known else None


def _timing_notes(cell: Measured, thermal: bool) -> list[str]:
    notes = []
    if thermal:
        notes.append("thermal: the gap is in seconds, not in clock cycles; let the GPU settle and check again")
    if not cell.paired:
        notes.append("not measured side by side: the gap must exceed the drift between two sittings")
    return notes
