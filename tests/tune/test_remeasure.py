"""The best cells of a grid are found, composed anew as the same cells, and what is measured again is the truth about them."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import Request
from harness.errors import ConfigError
from harness.record import Record
from harness.tune.asked import Ask
from harness.tune.grid import Grid, grids
from harness.tune.pack import main as pack
from harness.tune.pack import read, records_of, write
from harness.tune.remeasure import again, best_of, main

PLACE = sorted((Path(__file__).resolve().parents[2] / "results" / "grids").glob("*.jsonl.gz"))[0]


@pytest.fixture(scope="module")
def grid() -> Grid:
    (found,) = grids(records_of(PLACE)[0])
    return found


def slower(of: Record, request: Request, factor: float) -> Record:
    """As if the cell of ``request`` had been measured on that machine, every step so many times as long."""
    assert of.measurement is not None
    steps = of.measurement.steps.model_copy(update={"seconds": tuple(factor * value for value in of.measurement.steps.seconds)})
    started = of.provenance.model_copy(update={"started_utc": f"{of.provenance.started_utc} {request.cell.key}"})
    measured = of.measurement.model_copy(update={"steps": steps})
    return of.model_copy(update={"cell": request.cell, "measurement": measured, "provenance": started})


def test_the_best_of_a_short_and_of_a_long_run(grid: Grid) -> None:
    for steps in (500, 5000):
        totals = {one: total for one in grid.space.candidates if (total := grid.total_seconds(one, steps)) is not None}
        best = best_of(grid, 3, [steps])
        assert len(best) == 3
        assert max(totals[one] for one in best) == sorted(totals.values())[2]
        assert set(best) <= set(best_of(grid, 3))


def test_what_is_measured_again_is_the_truth_and_what_was_told_first_stays(grid: Grid, cache: Path, tmp_path: Path) -> None:
    _, cells = again([grid], 2, 3, [f"cache={cache}"])
    best = best_of(grid, 2)
    assert len(cells) == 3 * len(best)
    by_knobs = {(one.engine, str(sorted(one.values.items()))): one for one in best}
    more = []
    for request in cells:
        spec = request.cell.engine
        mine = next(one for one in best if spec.name == one.engine and all(spec.knobs[knob] == value for knob, value in one.values.items()))
        more.append(slower(grid.records[mine][0], request, {1: 1.1, 2: 1.2, 3: 1.5}[request.cell.repeat]))
    write(tmp_path / "more.jsonl.gz", more)
    assert pack([str(tmp_path / "all.jsonl.gz"), str(PLACE), str(tmp_path / "more.jsonl.gz"), str(PLACE)]) == 0
    every = read(tmp_path / "all.jsonl.gz")
    assert len(every) == len(read(PLACE)) + len(more), "a record counts once"
    (whole,) = grids(every)
    assert set(whole.space.candidates) == set(grid.space.candidates), "the same cells, but for the number of the repeat"
    for one in grid.space.candidates:
        first, then = grid.measure(Ask(candidate=one, steps=6)), whole.measure(Ask(candidate=one, steps=6))
        assert then == first
        step = first.step_seconds
        before, after = grid.total_seconds(one, 10**9), whole.total_seconds(one, 10**9)
        if step is not None and before is not None and after is not None:
            expected = 1.2 if (one.engine, str(sorted(one.values.items()))) in by_knobs else 1.0
            assert after / before == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=tiny_llama"], "model=tiny_llama: not taken here"),
        (["--best", "0"], "at least 1"),
        (["engine.knobs.micro_batch=1", "plan=only"], "engine.knobs.micro_batch=1: not taken here"),
    ],
)
def test_other_cells_are_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(PLACE), *words]) == 2
    assert says in capsys.readouterr().err


def test_lanes_part_the_cells(grid: Grid, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = {one.cell.key for one in again([grid], 2, 2, [f"cache={cache}"])[1]}
    parts = [{one.cell.key for one in again([grid], 2, 2, [f"cache={cache}", f"lane={number}/2"])[1]} for number in range(2)]
    assert parts[0] | parts[1] == whole
    assert not parts[0] & parts[1]
    assert main([str(tmp_path)]) == 6
    with pytest.raises(ConfigError, match="the last 1/2"):
        again([grid], 1, 1, [f"cache={cache}", "lane=2/2"])
