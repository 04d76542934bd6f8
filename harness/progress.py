"""What a person sees while a sweep runs: which cell, how far, tokens/s, loss, memory, and what is next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from harness.cores import BUSY
from harness.derived import derive
from harness.events import Event
from harness.plan import Planned
from harness.record import Record, cause

_GIB = 2**30
_RECENT = 10  # steps whose rate is shown while more are made: the first one compiles, and would stay in a mean


class SweepProgress:
    """A bar for the sweep and one for the cell that runs; plain lines where the output is no terminal."""

    def __init__(self, console: Console, progress: Progress, cells: Sequence[Planned]) -> None:
        self._console = console
        self._progress = progress
        self._cells = cells
        self._done = 0
        self._sweep = progress.add_task("sweep", total=len(cells), detail="")
        self._cell: TaskID | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)  # tokens and seconds of a step
        self._steps = 0

    def begin(self, cell: Planned) -> None:
        """A cell is about to start."""
        following = self._cells[self._done + 1] if self._done + 1 < len(self._cells) else None
        self._progress.update(self._sweep, detail=f"next: {label(following)}" if following else "the last one")
        steps = cell.request.cell.workload.train.num_steps
        self._cell = self._progress.add_task(label(cell), total=steps, detail="starting")
        self._steps = 0
        self._recent.clear()
        if not self._console.is_terminal:
            self._console.print(f"[{self._done + 1}/{len(self._cells)}] {label(cell)} …", markup=False)

    def event(self, event: Event) -> None:
        """Something the worker reported."""
        if self._cell is None or event["event"] not in ("waiting", "ready", "step"):
            return
        if event["event"] == "waiting":
            self._progress.update(self._cell, detail="waiting: another sweep is measuring here")
            if not self._console.is_terminal:
                self._console.print("  waiting: another sweep is measuring here", markup=False)
            return
        if event["event"] == "ready":
            self._progress.update(self._cell, detail=f"ready after {event['setup_seconds']:.1f} s")
            return
        self._steps += 1
        self._recent.append((event["tokens_input"], event["seconds"]))
        tokens, seconds = map(sum, zip(*self._recent, strict=True))
        memory = event.get("rss_bytes")
        parts = [f"{tokens / seconds:,.0f} tokens/s" if seconds else "", f"loss {event['losses']:.4f}"]
        parts += [f"RSS {memory / _GIB:.2f} GiB"] if memory else []
        self._progress.update(self._cell, advance=1, detail=", ".join(filter(None, parts)))

    def discard(self, cell: Planned) -> None:
        """The cell was interrupted: it gets no record, because nothing is known of it but that somebody wanted to stop."""
        steps = f"{self._steps} of {cell.request.cell.workload.train.num_steps} steps"
        then = "it will run again" if cell.request.save_every is None else "it goes on from its last checkpoint"
        self._say(f"  {'discarded':<12} {label(cell)}: interrupted after {steps}; {then}")

    def end(self, record: Record, how: str | None = None) -> None:
        """The cell has its record; ``how``, when it is not from running it here and now."""
        self._done += 1
        if self._cell is not None:
            self._progress.remove_task(self._cell)
            self._cell = None
        self._progress.update(self._sweep, advance=1)
        name = f"{record.cell.engine.title}, repeat {record.cell.repeat}"
        reason = f": {cause(record)}" if record.reason else ""
        self._say(f"  {record.status:<12} {name:<24} {how or _rate(record, self._steps)}, {record.provenance.wall_seconds:.1f} s{reason}")
        for note in record.notes:
            if how is None and note.startswith(BUSY):
                self._say(f"  {'':<12} {note}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _rate(record: Record, num_steps: int) -> str:
    """That of the steady steps, as every table has it; of a run that has none, how far it came."""
    derived = derive(record)
    if derived is not None and derived.tokens_per_second is not None:
        return f"{derived.tokens_per_second:,.0f} tokens/s"
    return f"{num_steps} step{'' if num_steps == 1 else 's'}" if num_steps else "no step"


def label(cell: Planned) -> str:
    """A cell in a few words."""
    workload = cell.request.cell.workload
    return f"{cell.request.cell.engine.title} {workload.model.name} {workload.method.name} {workload.data.name} #{cell.request.cell.repeat}"


@contextmanager
def sweep_progress(console: Console, cells: Sequence[Planned]) -> Iterator[SweepProgress]:
    """Show the bars while the block runs."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield SweepProgress(console, progress, cells)
