"""``python -m harness.tune.left_out results``: every workload of stored records foretold by all the others, as if it were new."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.compose import CONF
from harness.config import Config, single
from harness.record import Record
from harness.tune.asked import Result
from harness.tune.experience import NOTHING, Experience
from harness.tune.learnt import learnt, work_of
from harness.tune.lessons import Searching, experience, usable
from harness.tune.pack import records_of
from harness.tune.scale import capacity_bytes, sized
from harness.tune.search import Rules, Search
from harness.tune.space import Candidate, Space

PLANNED_STEPS = 500
LEAST = 3  # settings: of fewer nothing can be said about which is best
_NEAR = 0.01  # as good as the best
USAGE = """python -m harness.tune.left_out PLACE ... [--elsewhere]

PLACE: a folder of records, or a file of harness.tune.pack. For every machine and kind of work with at least three measured settings: what
a search over these, which knows the records of all other work on that kind of GPU (--elsewhere: those of other kinds alone), looks at
first, how much longer that takes than the best of them, and at which look it has the best; beside a search that knows nothing. Then how far
off its first predictions are. Exit code 0, or 6 when there is nothing to compare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foretold:
    """One workload. ``regret``: of the first look over the best, with experience and without; ``looks``: until the best, or one as good, is
    seen. ``off``: logarithms of measured over predicted step times, ``deviations``: how far they were said to be; then the seconds by
    which start-ups took longer, and the logarithms of peaks.
    """

    machine: str
    work: str
    best: Candidate
    first: Candidate
    num: int
    regret: tuple[float, float]
    looks: tuple[int, int]
    off: tuple[float, ...]
    deviations: tuple[float, ...]
    startups: tuple[float, ...]
    peaks: tuple[float, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m harness.tune.left_out", usage=USAGE)
    parser.add_argument("places", type=Path, nargs="+")
    parser.add_argument("--elsewhere", action="store_true")
    options = parser.parse_args(arguments)
    records = [record for place in options.places for record in records_of(place)[0]]
    found = left_out(records, elsewhere=options.elsewhere)
    if not found:
        print(f"no work with {LEAST} measured settings, and other work beside it", file=sys.stderr)
        return 6
    print("\n".join([*_table(found), "", *_errors(found)]))
    return 0


def left_out(records: Sequence[Record], *, elsewhere: bool = False) -> list[Foretold]:
    """Of every machine and kind of work with enough settings, and something to learn from."""
    names = sorted({record.machine.name for record in records if record.machine.device == "cuda"})
    engines = sorted({record.cell.engine.name for record in records})
    configs = {name: single([f"engine={name}", "machine=cuda"]) for name in engines if (CONF / "engine" / f"{name}.yaml").is_file()}
    found = []
    for name in names:
        known = usable([record for record in records if record.machine.name == name])
        groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for record in known.records if known else ():
            groups[record.machine.key, work_of(record.cell.workload)].append(record)
        for (_, work), group in groups.items():
            others = [
                one for one in records if (one.machine.name != name if elsewhere else one.machine.name == name) and _work(one) != work
            ]
            if (one := _foretold(configs, group, others)) is not None:
                found.append(one)
    return found


def _work(record: Record) -> str:
    return work_of(record.cell.workload)


def _foretold(configs: Mapping[str, Config], group: Sequence[Record], others: Sequence[Record]) -> Foretold | None:
    cells = {replace(one.candidate, work="", setting=""): one.result for one in learnt(configs, group)}
    if len(cells) < LEAST:
        return None
    workload, machine = group[-1].cell.workload, group[-1].machine
    model = workload.model.config or {}
    mine = {one.engine for one in cells}
    space = Space(tuple(cells), {name: config.engine.searched_knobs for name, config in configs.items() if name in mine})
    search = Searching(workload=workload, machine=machine, model=model, space=space, scale=sized(model, workload))
    known = experience(configs, others, search, lambda _: ())
    if not known.lessons:
        return None
    knowing, ignorant = (_policy(search, of) for of in (known, NOTHING))
    totals = {one: _total(result) for one, result in cells.items()}
    (first, looks), (blind, blind_looks) = _looked(knowing, cells), _looked(ignorant, cells)
    best = min(totals, key=lambda one: totals[one])
    forecasts = knowing.view([]).forecasts
    return Foretold(
        machine=machine.key,
        work=_work(group[-1]),
        best=best,
        first=first,
        num=len(cells),
        regret=(totals[first] / totals[best] - 1, totals[blind] / totals[best] - 1),
        looks=(looks, blind_looks),
        off=tuple(math.log((result.step_seconds or 0.0) / forecasts[one].step.middle) for one, result in cells.items()),
        deviations=tuple(forecasts[one].step.deviation for one in cells),
        startups=tuple((result.startup_seconds or 0.0) - forecasts[one].startup_seconds for one, result in cells.items()),
        peaks=tuple(math.log(result.peak_bytes / forecasts[one].memory.middle) for one, result in cells.items() if result.peak_bytes),
    )


def _policy(of: Searching, known: Experience) -> Search:
    return Search(of.space, of.scale, capacity_bytes(of.machine), Rules(planned_steps=PLANNED_STEPS, rungs=(8,)), known)


def _total(result: Result) -> float:
    return (result.startup_seconds or 0.0) + PLANNED_STEPS * (result.step_seconds or 0.0)


def _looked(policy: Search, cells: Mapping[Candidate, Result]) -> tuple[Candidate, int]:
    """The first look, and the number of that at which one as good as the best was seen; one more than there are if it never was."""
    least = min(map(_total, cells.values()))
    told, view = [], policy.view([])
    while view.next is not None:
        told.append((view.next, cells[view.next.candidate]))
        if _total(told[-1][1]) <= (1 + _NEAR) * least:
            return told[0][0].candidate, len(told)
        view = policy.view(told)
    return (told[0][0].candidate if told else max(cells, key=lambda one: _total(cells[one]))), len(cells) + 1


def _table(found: Sequence[Foretold]) -> list[str]:
    rows = [f"{'machine and work':<66} {'settings':>8}  {'first look %':>12} {'at look':>7}  {'knowing nothing':>15}  best; first look"]
    for one in found:
        where = f"{one.machine} {one.work}"
        looks = [f"{look}" if look <= one.num else "never" for look in one.looks]
        names = one.best.title if one.best == one.first else f"{one.best.title}; {one.first.title}"
        ours, theirs = (f"{100 * regret:.1f}" for regret in one.regret)
        rows.append(f"{where:<66} {one.num:>8}  {ours:>12} {looks[0]:>7}  {theirs:>7} {looks[1]:>7}  {names}")
    right = [sum(one.regret[which] <= _NEAR for one in found) for which in range(2)]
    return [
        *rows,
        f"the first look is as good as the best (within {_NEAR:.0%}) in {right[0]} of {len(found)}; knowing nothing in {right[1]}",
    ]


def _errors(found: Sequence[Foretold]) -> list[str]:
    off = [value for one in found for value in one.off]
    common = [statistics.fmean(one.off) for one in found]
    ratios = [value - statistics.fmean(one.off) for one in found for value in one.off]
    scaled = [value / sure for one in found for value, sure in zip(one.off, one.deviations, strict=True)]
    startups = [value for one in found for value in one.startups]
    peaks = [value for one in found for value in one.peaks]
    return [
        f"steps of {len(off)} settings, root mean squares of logarithms: {_rms(common):.3f} of a workload's pace, {_rms(ratios):.3f} among "
        f"the settings of one; {_rms(scaled):.2f} times as far off as was said",
        f"start-ups: {_rms(startups):.0f} s; peaks: {_rms(peaks):.3f}",
    ]


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(value**2 for value in values)) if values else math.nan


if __name__ == "__main__":
    sys.exit(main())
