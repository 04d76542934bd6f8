"""Where the rate of a cell changed over its stored records: change points by Apache Otava, to be read and never to gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.labels import labels
from harness.record import Record
from harness.stats import EFFECT, tokens_per_second
from harness.store import Results

LEAST_RECORDS = 6  # of one cell: fewer have no history
INSTALL = "pip install --no-deps -r requirements/no-deps.txt"
_WINDOW = 50  # records that are looked at together
_P_VALUE = 0.001


@dataclass(frozen=True, slots=True)
class ChangePoint:
    """``change``: of the mean rate, from before to after. ``first``: the first record of the new level."""

    cell: str
    change: float
    first: Record
    last_before: Record

    @property
    def text(self) -> str:
        """``hf, tiny-lora-dense-1a2b on cpu: +8.1 % from 2026-11-24T…, between commits 0123abcd and 4567ef01``."""
        before, after = self.last_before.provenance, self.first.provenance
        commits = (
            f"between commits {before.commit[:8]} and {after.commit[:8]}"
            if before.commit != after.commit
            else f"at commit {after.commit[:8]}"
        )
        return f"{self.cell}: {100 * self.change:+.1f} % tokens/s from {after.started_utc[:16]}, {commits}"


@dataclass(frozen=True, slots=True)
class History:
    """``num_cells`` have records enough. ``missing``: what to install first, null when nothing is missing."""

    num_cells: int
    changes: tuple[ChangePoint, ...]
    missing: str | None = None

    @property
    def lines(self) -> tuple[str, ...]:
        """What the report says; nothing where no cell has a history."""
        if not self.num_cells:
            return ()
        if self.missing is not None:
            return (
                f"{self.num_cells} cells have {LEAST_RECORDS} records or more. Finding change points needs apache-otava: {self.missing}",
            )
        return tuple(change.text for change in self.changes) or (f"No change point in the {self.num_cells} cells with a history.",)


def history(results: Results) -> History:
    """Change points of every cell with enough records that ended ok, repeats and superseded records included."""
    series = [found for found in _series(results) if len(found) >= LEAST_RECORDS]
    if not series:
        return History(0, ())
    try:
        from otava.analysis import compute_change_points
    except ModuleNotFoundError:
        return History(len(series), (), INSTALL)
    changes = []
    for records in series:
        rates = [tokens_per_second(record.measurement.steps) or 0.0 for record in records if record.measurement]
        points, _ = compute_change_points(rates, window_len=_WINDOW, max_pvalue=_P_VALUE, min_magnitude=EFFECT)
        places = [0, *(int(point.index) for point in points), len(records)]
        for before, place, after in zip(places, places[1:], places[2:], strict=False):
            change = _mean(rates[place:after]) / _mean(rates[before:place]) - 1
            changes.append(ChangePoint(_name(records[0]), change, records[place], records[place - 1]))
    return History(len(series), tuple(changes))


def _series(results: Results) -> list[list[Record]]:
    """The records of each machine, work, engine and knobs, oldest first."""
    found: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in sorted((stored.record for stored in results.stored), key=lambda record: record.provenance.started_utc):
        if (
            record.status == "ok"
            and record.measurement
            and not record.measurement.resumed_at
            and tokens_per_second(record.measurement.steps) is not None
        ):
            key = (record.machine.key, record.cell.workload.key, record.cell.engine.key)
            found.setdefault(key, {}).setdefault(record.provenance.started_utc, record)  # a promoted record lies in two folders
    return [list(each.values()) for each in found.values()]


def _name(record: Record) -> str:
    return f"{labels([record.cell.engine])[0]} {record.cell.engine.key[:4]}, {record.cell.workload.label} on {record.machine.key}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
