"""The cells of two folders of records, each read whole or not at all, matched by the work that was done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from harness.check.judge import Measured
from harness.comparable import Run, runs
from harness.current import latest
from harness.errors import ConfigError, RecordError, StoreError
from harness.gates import Counted, counted_part, loads_counted
from harness.labels import labels
from harness.record import Record
from harness.spec import EngineSpec, Workload, content_key
from harness.store import load

Key = tuple[str, str, str, str]  # machine, work, engine, engine and knobs
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Side:
    """What a folder holds: timed runs, and counted ones, by cell."""

    timed: dict[Key, list[Run]]
    counted: dict[Key, Counted]

    def count_of(self, timed: Key) -> Counted | None:
        """The counted run of a timed cell."""
        return self.counted.get(_key_when_counted(self.timed[timed][0].record))

    def counted_alone(self, timed: Iterable[Key]) -> dict[Key, Counted]:
        """Counted runs that belong to none of these ``timed`` cells."""
        known = {_key_when_counted(self.timed[key][0].record) for key in timed}
        return {key: one for key, one in self.counted.items() if key not in known}


def stored_cells(base: Path, candidate: Path) -> tuple[tuple[Measured, ...], tuple[str, ...]]:
    """Every cell that both folders have timed or counted, and a note for every other.

    Raises StoreError for a folder that is not there or holds none, RecordError for any file that cannot be trusted (half of the
    evidence is none), ConfigError when the two are not of one machine.
    """
    theirs, mine = _read(base), _read(candidate)
    _expect_one_machine(base, [*theirs.timed, *theirs.counted], f"{candidate} has", {key[0] for key in (*mine.timed, *mine.counted)})
    pairs = _matched(theirs.timed, mine.timed)
    counts = _matched(theirs.counted_alone(one for one, _ in pairs), mine.counted_alone(one for _, one in pairs))
    records = [mine.timed[key][0].record for _, key in pairs] + [mine.counted[key].record for _, key in counts]
    names = cell_names(records)
    cells = [_timed_cell(name, theirs, mine, *pair) for name, pair in zip(names, pairs, strict=False)]
    for name, (first, second) in zip(names[len(pairs) :], counts, strict=True):
        cells.append(Measured(name, counted=(theirs.counted[first], mine.counted[second])))
    notes = [
        *_alone("base", theirs, [one for one, _ in pairs], [one for one, _ in counts]),
        *_alone("candidate", mine, [one for _, one in pairs], [one for _, one in counts]),
    ]
    return tuple(cells), tuple(notes)


def expect_records_of(machines: set[str], base: Path) -> None:
    """Raises what ``stored_cells`` would, as far as it can be told before anything is measured on these ``machines``; StoreError
    where there are counts alone, too: they are no times to measure against.
    """
    found = _read(base)
    if not found.timed:
        raise StoreError(f"{base}: counts alone, no timed record; compare them with other counts (--candidate), or name timed records")
    _expect_one_machine(base, found.timed, "this one is", machines)


def _timed_cell(name: str, theirs: _Side, mine: _Side, first: Key, second: Key) -> Measured:
    sides, paired = _side_by_side(theirs.timed[first], mine.timed[second])
    one, other = theirs.count_of(first), mine.count_of(second)
    return Measured(name, *sides, paired=paired, counted=(one, other) if one is not None and other is not None else None)


def _expect_one_machine(base: Path, stored: Iterable[Key], other: str, machines: set[str]) -> None:
    theirs = {key[0] for key in stored}
    if not theirs & machines:
        raise ConfigError(
            f"records of another machine: {base} has {', '.join(sorted(theirs))}; {other} {', '.join(sorted(machines))}; "
            "times can be compared on one machine only"
        )


def cell_names(records: Sequence[Record]) -> tuple[str, ...]:
    """A stable name for each: the engine with the knobs that differ, and the work."""
    return named([(record.cell.engine, record.cell.workload) for record in records])


def named(cells: Sequence[tuple[EngineSpec, Workload]]) -> tuple[str, ...]:
    """As :func:`cell_names`."""
    found = []
    for engine, workload in cells:
        alike = [one for one, other in cells if other.key == workload.key]
        found.append(f"{dict(zip(map(content_key, alike), labels(alike), strict=True))[content_key(engine)]}, {workload.label}")
    return tuple(found)


def _read(root: Path) -> _Side:
    """The newest record of every repeat, and the counts beside them."""
    if not root.is_dir():
        raise StoreError(f"{root}: there is no such folder; name one that a sweep or a check wrote to")
    results = load(root)
    if results.problems:
        raise RecordError("\n".join(results.problems))
    counted = _counted(root)
    if not results.stored and not counted:
        raise StoreError(f"{root}: no record here; name the folder that holds the machines' folders, for example runs")
    for stored in results.stored:
        _check_place(stored.record, stored.path)
    newest = set(map(id, latest(stored.record for stored in results.stored)))
    groups: dict[Key, list[Run]] = {}
    for run in runs(results):
        if id(run.record) in newest:
            groups.setdefault(_key(run.record), []).append(run)
    return _Side(groups, counted)


def _check_place(record: Record, path: str) -> None:
    """A record lies where its content says; one whose cell or machine was edited does not."""
    cell = record.cell
    expected = f"{record.machine.key}/{cell.workload.label}/{cell.engine.name}-{cell.key}"
    if str(Path(path).parent) != expected:
        raise RecordError(f"{path}: edited or moved: its content belongs to {expected}; restore it from git or delete it")


def _key(record: Record) -> Key:
    engine = record.cell.engine
    return record.machine.key, content_key(record.cell.workload), engine.name, content_key(engine)


def _key_when_counted(record: Record) -> Key:
    """Of the counted run that belongs to a timed one."""
    engine = record.cell.engine
    return record.machine.key, content_key(counted_part(record.cell.workload)), engine.name, content_key(engine)


def _counted(root: Path) -> dict[Key, Counted]:
    found = [loads_counted(path.read_text(encoding="utf-8"), str(path)) for path in sorted((root / "counts").glob("*.json"))]
    return {_key(one.record): one for one in found}


def _matched(theirs: Mapping[Key, T], mine: Mapping[Key, T]) -> list[tuple[Key, Key]]:
    """The same work by the same engine and knobs; what is left by engine, where each side has one: a default may have changed."""
    exact = [(key, key) for key in mine if key in theirs]
    left = [[key for key in side if all(key not in pair for pair in exact)] for side in (theirs, mine)]
    more = []
    for key in left[1]:
        others = [other for other in left[0] if other[:3] == key[:3]]
        if len(others) == 1 and sum(other[:3] == key[:3] for other in left[1]) == 1:
            more.append((others[0], key))
    return exact + more


def _side_by_side(base: Sequence[Run], candidate: Sequence[Run]) -> tuple[tuple[tuple[Run, ...], tuple[Run, ...]], bool]:
    """In the order of their starts, and whether every two in a row were one of each on one host."""
    began = sorted([*((run, 0) for run in base), *((run, 1) for run in candidate)], key=lambda one: one[0].record.provenance.started_utc)
    sides = tuple(run for run, side in began if side == 0), tuple(run for run, side in began if side == 1)
    couples = list(zip(began[::2], began[1::2], strict=False))
    mixed = all(one[1] != other[1] and one[0].record.provenance.host == other[0].record.provenance.host for one, other in couples)
    return sides, mixed and len(base) == len(candidate)


def _alone(side: str, found: _Side, timed: Sequence[Key], counted: Sequence[Key]) -> list[str]:
    """Timed cells that were not compared, and counted ones that belong to no timed cell; ``timed``, ``counted``: those that were."""
    left = [runs[0].record for key, runs in found.timed.items() if key not in timed]
    left += [one.record for key, one in found.counted_alone(found.timed).items() if key not in counted]
    return [f"only in the {side}: {name} on {record.machine.key}" for name, record in zip(cell_names(left), left, strict=True)]
