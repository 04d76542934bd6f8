"""``python -m harness.tune.remeasure GRID``: the best cells of a grid, measured again: the best of noisy figures flatters itself."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.config import Request, Settings, in_lane, requests
from harness.errors import ConfigError, HarnessError
from harness.report.reproduce import command, options
from harness.tune.grid import Grid, grids
from harness.tune.pack import records_of
from harness.tune.replay import PLANNED_STEPS
from harness.tune.space import Candidate

BEST, REPEATS = 10, 5
USAGE = """python -m harness.tune.remeasure PLACE [--best 10] [--repeats 5] [OVERRIDE ...]

  python -m harness.tune.remeasure results/grids/h200-llama3_1b-lora-24gib-part.jsonl.gz plan=only
  python -m harness.tune.remeasure GRID.jsonl.gz runs=runs/again0 lane=0/2     half of the cells, on one of two GPUs
  python -m harness.tune.pack NEW.jsonl.gz GRID.jsonl.gz runs/again0 runs/again1

PLACE: a grid as harness.tune.replay reads it. Its best cells for a short and for a long run are measured again, as repeats 1, 2, …, all of
them once before any of them twice, the order reversed in every second round. The replay then takes the medians of these repeats for the
truth about them, and the first measurement, which chose them, for what a search is told. Overrides are of where and whether to run
(runs=, cache=, lane=, plan=, rerun=, limits.…). Exit codes are those of a sweep; 6: there is no grid."""
_TAKEN = ("runs=", "cache=", "lane=", "plan=", "rerun=", "limits.", "hydra.searchpath=")


def main(arguments: Sequence[str] | None = None) -> int:
    """Choose, then run them as a sweep."""
    parser = argparse.ArgumentParser(prog="python -m harness.tune.remeasure", usage=USAGE)
    parser.add_argument("place", type=Path)
    parser.add_argument("--best", type=int, default=BEST)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("overrides", nargs="*")
    chosen = parser.parse_intermixed_args(arguments)
    try:
        found = grids(records_of(chosen.place)[0])
        if not found:
            print(f"error: {chosen.place}: no records of a grid", file=sys.stderr)
            return 6
        settings, cells = again(found, chosen.best, chosen.repeats, chosen.overrides)
        return _run(settings, cells)
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped. Every finished cell is recorded: the same command goes on where this one ended.", file=sys.stderr)
        return 130


def again(found: Sequence[Grid], best: int, repeats: int, overrides: Sequence[str]) -> tuple[Settings, list[Request]]:
    """The best cells of every grid as repeats 1 to ``repeats``. Raises ConfigError for overrides that would make other cells of them."""
    wrong = [line for line in overrides if not line.lstrip("+").startswith(_TAKEN)]
    if wrong or best < 1 or repeats < 1:
        expected = "the cells are those of the grid; only " + " ".join(_TAKEN) + " may be said, and --best and --repeats are at least 1"
        raise ConfigError("\n".join([f"{line}: not taken here" for line in wrong] + [expected]))
    known, cells = options(), []
    settings: Settings | None = None
    for grid in found:
        for one in best_of(grid, best):
            record = grid.records[one][0]
            words = shlex.split(command(record.cell, record.machine, range(1, repeats + 1), known))
            own = [word for word in words[words.index("harness") + 1 :] if word != "-m"]
            settings, made = requests([*own, *(line for line in overrides if not line.startswith("lane="))], multirun=True)
            cells += made
    assert settings is not None  # there is a grid, and it has a best cell
    lane = next((line.removeprefix("lane=") for line in overrides if line.startswith("lane=")), None)
    return settings, in_lane(cells, lane)


def best_of(grid: Grid, count: int, planned_steps: Sequence[int] = PLANNED_STEPS) -> list[Candidate]:
    """The ``count`` fastest cells for each of the planned runs, each once. Raises ConfigError where none ran."""
    chosen: dict[Candidate, None] = {}
    for steps in sorted(planned_steps, reverse=True):
        totals = {one: total for one in grid.space.candidates if (total := grid.total_seconds(one, steps)) is not None}
        chosen.update(dict.fromkeys(sorted(totals, key=lambda one: totals[one])[:count]))
    if not chosen:
        raise ConfigError(f"{grid.workload.label}: no cell of this grid ran to its end")
    return list(chosen)


def _run(settings: Settings, cells: Sequence[Request]) -> int:
    from rich.console import Console

    from harness.sweep import run

    return int(run(settings, cells, Console()))


if __name__ == "__main__":
    sys.exit(main())
