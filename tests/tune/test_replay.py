"""The proof: on every committed grid the search is near the best in eight runs, and does not run out of memory where it knew better."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.tune.grid import grids
from harness.tune.pack import main as pack
from harness.tune.pack import read, records_of
from harness.tune.replay import MOST_REGRET, MOST_RUNS, replay
from tests.records import engine, record, workload

GRIDS = sorted((Path(__file__).resolve().parents[2] / "results" / "grids").glob("*.jsonl.gz"))
WHOLE = 100  # candidates; eight runs are a tenth of the time of a whole grid only


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.name)
def test_near_the_best_of_a_real_grid(path: Path) -> None:
    (grid,) = grids(read(path))
    answers = replay(grid, seeds=20)
    ours = [answer for answer in answers if answer.policy == "tune"]
    assert ours
    for answer in ours:
        (found,) = answer.judged
        assert found.regret <= MOST_REGRET, answer
        assert found.num_runs <= MOST_RUNS
        assert found.num_late_ooms == 0
        assert answer.memory is not None
        assert answer.memory.num_false_fits == 0
        if answer.question.num_candidates >= WHOLE:
            assert found.grid_share <= 0.10
    for policy in ("random", "largest micro-batch that fits"):
        theirs = [one.regret for answer in answers if answer.policy == policy for one in answer.judged]
        mine = [one.regret for answer in ours for one in answer.judged]
        assert sum(mine) / len(mine) < sum(theirs) / len(theirs)


def test_there_is_a_grid() -> None:
    assert GRIDS


def test_what_is_packed_is_read_again_and_the_same_bytes(tmp_path: Path) -> None:
    from harness.store import load, save

    for size in (1, 2):
        save(record(engine(micro_batch=size), work=workload()), tmp_path / "runs")
    first, second = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"
    assert pack([str(first), str(tmp_path / "runs")]) == pack([str(second), str(tmp_path / "runs")]) == 0
    assert first.read_bytes() == second.read_bytes()
    assert records_of(first)[0] == [stored.record for stored in load(tmp_path / "runs").stored]
    assert pack([str(first), str(tmp_path / "nothing")]) == 6
    assert pack(["wrong"]) == 2
