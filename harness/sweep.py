"""Run the cells of a sweep one after the other, keep every record, score what was trained, and report."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from rich.console import Console

from harness import nodes, preparing, report
from harness.adapters import adapter_folder, keep_for_good
from harness.config import Request, Settings
from harness.errors import HarnessError, StoreError
from harness.foreseen import show
from harness.launch import recovered, run_cell, unsupported
from harness.places import Prepared
from harness.plan import Planned, plan
from harness.progress import SweepProgress, label, sweep_progress
from harness.ranks import crowded
from harness.record import Record
from harness.scoring import Trained, drop, is_unjudged, judge_weights, kept, needed_later
from harness.store import check_writable, load, recorded, save, writing
from harness.turns import alone, gpu_of, turn


class Exit(IntEnum):
    """Exit codes of a sweep."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    CELLS_FAILED = 5
    NOTHING_RAN = 6
    INTERRUPTED = 130


def run(settings: Settings, requests: Sequence[Request], console: Console) -> Exit:
    """Run what needs running; the result tells scripts whether every cell has an answer.

    Raises KeyboardInterrupt on SIGINT and SIGTERM, StoreError when results cannot be written: either way every cell that ended is
    recorded, or will be when the same requests run again.
    """
    if nodes.node(requests) > 0 and settings.plan == "run":
        with _terminated_is_interrupted(console):
            well = nodes.take_part(settings, requests, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
        return Exit.OK if well else Exit.CELLS_FAILED
    root = Path(settings.runs).expanduser().resolve()
    earlier = [stored.record for stored in load(root).stored]
    planned = plan(requests, earlier, settings.rerun, _weights(root, settings))
    if settings.plan == "only":
        show(planned, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
        return Exit.OK
    check_writable(root)
    with _terminated_is_interrupted(console):
        sweep = Sweep(root, settings, console, planned, earlier)
        prepared = _prepare(sweep)
        records = _run_cells(sweep, prepared)
        scored = _score(sweep, prepared)
        return _finish(sweep, records, scored)


def _weights(root: Path, settings: Settings) -> Callable[[Record], bool] | None:
    """Whether weights are there, where they are to be kept."""
    return None if settings.keep == "none" else lambda record: kept(root, record) is not None


@dataclass(frozen=True, slots=True)
class Sweep:
    """What the stages of a sweep share. ``earlier``: the records found at its start, oldest first."""

    root: Path
    settings: Settings
    console: Console
    planned: Sequence[Planned]
    earlier: Sequence[Record]

    def say(self, line: str) -> None:
        """Print a line as it is."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @property
    def gpu(self) -> str | None:
        """The one GPU that this sweep measures on, beside which others may measure on theirs; None: the whole machine."""
        return gpu_of(os.environ, cuda=all(cell.machine.device == "cuda" for cell in self.planned))

    def turn(self) -> AbstractContextManager[int]:
        """This sweep's turn on the store, for anything but a cell."""
        share = None if self.gpu is None else "preparing"
        return turn(self.root, lambda: self.say("waiting: another sweep is measuring here"), share)

    @contextmanager
    def last(self) -> Iterator[bool]:
        """Whether no other sweep is at work beside this one, on GPUs of its own; nobody begins within the block."""
        if self.gpu is None:
            with self.turn():
                yield True
        else:
            with alone(self.root) as nobody_else:
                yield nobody_else


@contextmanager
def _terminated_is_interrupted(console: Console) -> Iterator[None]:
    """A polite kill stops a sweep as Ctrl-C does; either may have caught a door that had hidden the cursor for its progress bar."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        console.show_cursor()


def _prepare(sweep: Sweep) -> dict[str, Prepared]:
    """Make tokens, base and adapter of every workload before anything is measured: bad data ends a sweep at its start."""
    prepared: dict[str, Prepared] = {}
    problems: dict[str, None] = {}
    unscored = {record.cell.workload.key for record in sweep.earlier if is_unjudged(sweep.root, record)}
    tried: set[str] = set()
    for cell in sweep.planned:
        workload = cell.request.cell.workload
        if workload.key in tried or (cell.action != "run" and workload.key not in unscored):
            continue
        tried.add(workload.key)
        sweep.say(f"preparing {workload.label}")
        try:
            prepared[workload.key] = prepare_workload(cell, sweep)
        except StoreError:
            raise
        except HarnessError as error:
            problems[str(error)] = None
    if problems:
        raise HarnessError("\n".join(problems))
    return prepared


def prepare_workload(cell: Planned, sweep: Sweep) -> Prepared:
    """Find, or make, what the workload of ``cell`` needs. Raises HarnessError with what cannot be had."""
    with sweep.turn() as held:
        folder = sweep.root / "work" / "prepare"
        return preparing.prepared(cell.request, sweep.settings.cache, folder, held=held, say=sweep.say)


def _run_cells(sweep: Sweep, prepared: dict[str, Prepared]) -> list[Record]:
    impossible = [cell for cell in sweep.planned if cell.action == "unsupported"]
    known = {(record.machine.key, record.cell.key) for record in sweep.earlier if record.status == "unsupported"}
    for cell in impossible:
        if (cell.machine.key, cell.request.cell.key) not in known:
            save(unsupported(cell.request, cell.machine, str(cell.reason)), sweep.root)
            sweep.say(f"  {'unsupported':<12} {label(cell)}: {cell.reason}")
    waiting = [cell for cell in sweep.planned if cell.action == "run"]
    if not waiting:
        return []
    asked = ((cell.machine.device, cell.request.cell.engine.processes // cell.machine.nodes) for cell in waiting)
    for said in dict.fromkeys(said for one in asked for said in crowded(*one)):
        sweep.say(said)
    sitting = secrets.token_hex(4)
    records: list[Record] = []
    with sweep_progress(sweep.console, waiting) as progress:
        for cell in waiting:
            progress.begin(cell)
            try:
                records.append(run_one(cell, prepared[cell.request.cell.workload.key], sweep, progress, sitting))
            except KeyboardInterrupt:
                progress.discard(cell)
                raise
    return records


def run_one(cell: Planned, place: Prepared, sweep: Sweep, progress: SweepProgress, sitting: str) -> Record:
    """Look at the store again before running: another sweep may have recorded the cell since the plan, or left it to be recorded."""
    root, request, machine = sweep.root, cell.request, cell.machine
    with turn(root, lambda: progress.event({"event": "waiting"}), sweep.gpu) as held:
        known = recorded(root, machine, request.cell)
        left = recovered(request, machine, root, known)
        if left is not None:
            save(left, root)
            known = [*known, left]
        if plan([request], known, sweep.settings.rerun, _weights(root, sweep.settings))[0].action == "done":
            progress.end(known[-1], "recovered from a stopped sweep" if left else "recorded by another sweep meanwhile")
            return known[-1]
        record = run_cell(request, machine, place, root, progress.event, held=held, earlier=known, sweep=sitting)
        try:
            save(record, root)
        except StoreError as error:
            raise StoreError(f"{error}\n{label(cell)} has ended; its record is made by the same command, from {root / 'work'}") from error
    progress.end(record)
    return record


def _score(sweep: Sweep, prepared: dict[str, Prepared]) -> bool:
    """Judge the weights that are still there, of every workload of this sweep, whoever trained them; then drop those that are not to be
    kept, unless others are at work beside this sweep: their weights are to be compared with these, so the last one does it.

    Returns whether all have a score. Weights that cannot be scored are named, kept, and tried again by the next sweep.
    """
    if sweep.settings.score == "later":
        if prepared:
            sweep.say("score=later: what was trained is scored by the next sweep of the same work without it")
        return True
    known = [stored.record for stored in load(sweep.root).stored] if prepared else []
    cells = {cell.request.cell.workload.key: cell for cell in sweep.planned}
    failed: set[str | None] = set()
    all_trained = [
        Trained(
            root=sweep.root,
            workload=cells[key].request.cell.workload,
            prepared=place,
            records=[record for record in known if record.cell.workload.key == key],
            device=cells[key].machine.device,
        )
        for key, place in prepared.items()
    ]
    all_trained = [trained for trained in all_trained if trained.kept]
    for trained in all_trained:
        with sweep.turn() as held:  # another sweep may have scored and dropped them while we waited
            failed |= judge_weights(trained, held, sweep.say)
    if all_trained and sweep.settings.keep == "none":
        with sweep.last() as last:
            if last:
                keep = needed_later(load(sweep.root)) | {sha for sha in failed if sha}
                for trained in all_trained:
                    drop(trained, keep)
    return not failed


def _finish(sweep: Sweep, records: Sequence[Record], scored: bool) -> Exit:
    planned, root = sweep.planned, sweep.root
    keys = {(cell.machine.key, cell.request.cell.key) for cell in planned}
    latest: dict[tuple[str, str], Record] = {}
    for record in [*sweep.earlier, *records]:
        key = (record.machine.key, record.cell.key)
        if key in keys:
            latest[key] = record
    results = load(root)
    if results.stored:
        groups = report.judged(results)
        with writing(root):
            path = report.write(results, root, groups)
        keys_here = {cell.request.cell.workload.key for cell in planned}
        sweep.say(report.table(results, [group for group in groups if group.workload.key in keys_here]))
        sweep.say(f"report: {path}")
    left = _left(sweep, list(latest.values()))
    answered = [key for key, record in latest.items() if record.status == "ok" or key in left]
    if not answered:
        sweep.say("nothing was measured: no cell ended ok")
        return Exit.NOTHING_RAN
    failed = [key for key, record in latest.items() if record.status != "unsupported" and key not in answered]
    return Exit.CELLS_FAILED if failed or not scored else Exit.OK


def _left(sweep: Sweep, records: Sequence[Record]) -> set[tuple[str, str]]:
    """Where weights are kept they are the answer, even with times that are not to be trusted: say where each lies."""
    if sweep.settings.keep == "none":
        return set()
    left = {(record.machine.key, record.cell.key): (record, sha) for record in records if (sha := kept(sweep.root, record))}
    for record, sha in left.values():
        keep_for_good(sweep.root, sha)
        what = "weights" if record.cell.workload.method.name == "full" else "adapter"
        steps, folder = record.cell.workload.train.num_steps, adapter_folder(sweep.root, sha)
        place = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        sweep.say(f"{what} of {record.cell.engine.title}, repeat {record.cell.repeat}, {steps:,} steps: {place}")
    return set(left)
