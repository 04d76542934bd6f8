"""What a sweep prints where its output is no terminal: a line a cell, with the rate that the tables have."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from harness.plan import Planned
from harness.progress import sweep_progress
from harness.record import Record
from tests import records, workloads

ENGINE = records.engine("hf")


def last_line(record: Record, num_steps: int) -> str:
    """At the end of a cell that reported ``num_steps`` steps, the first of them a minute longer."""
    out = io.StringIO()
    console = Console(file=out, width=200)
    cell = Planned(workloads.request(workloads.workload()), workloads.MACHINE, "run", None, None)
    with sweep_progress(console, [cell]) as progress:
        progress.begin(cell)
        for index in range(num_steps):
            progress.event({"event": "step", "tokens_input": 3000, "seconds": 3.0 + 60 * (index == 0), "losses": 2.0})
        progress.end(record)
    return out.getvalue().splitlines()[-1]


@pytest.mark.parametrize(
    ("record", "num_steps", "says"),
    [
        (records.record(ENGINE, rate=1234.0), 20, " 1,234 tokens/s, 60.0 s"),
        (records.record(ENGINE, status="crash", reason="RuntimeError: lost"), 3, " 3 steps, 60.0 s: RuntimeError: lost"),
        (records.record(ENGINE, status="crash", reason="RuntimeError: lost"), 1, " 1 step, 60.0 s"),
        (records.record(ENGINE, status="crash", reason="RuntimeError: lost"), 0, " no step, 60.0 s"),
    ],
    ids=["steady", "three", "one", "none"],
)
def test_a_cell_ends_with_the_rate_of_its_steady_steps(record: Record, num_steps: int, says: str) -> None:
    assert says in last_line(record, num_steps)
