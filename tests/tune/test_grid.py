"""A grid of records answers like a machine, and a search on it is judged by all that the grid knows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.config import Request, requests
from harness.engine import Machine
from harness.errors import ConfigError
from harness.record import Memory, Record
from harness.store import save
from harness.tune.asked import Ask
from harness.tune.baselines import has_optuna
from harness.tune.grid import Grid, grids
from harness.tune.observed import result_of
from harness.tune.replay import main
from tests import records
from tests.tune.spaces import GIB, machine

CAPPED = Machine(device="cuda", name="Synthetic GPU", count=1, memory_gib=80, memory_cap_gib=24)
PARTS = ("grid_hf", "grid_hf_packed", "grid_fused", "grid_unsloth")


def record(request: Request, seconds: Sequence[float], startup: float, peak: float | None) -> Record:
    """As the grid's sweeps would leave it; ``peak`` None: it ran out of memory."""
    count, tokens = len(seconds), request.cell.workload.train.samples_per_step * request.cell.workload.data.sequence_length
    ran = records.steps(num_steps=count, seconds=tuple(seconds), tokens_processed=(tokens,) * count) if peak else None
    made = records.record(request.cell.engine, work=request.cell.workload, machine=CAPPED, status="ok" if peak else "oom", ran=ran)
    measured = made.measurement
    if measured is not None and peak is not None:
        size = int(peak)
        memory = (
            Memory(phase="steady", rank=0, peak_rss_bytes=GIB, peak_allocated_bytes=size, peak_reserved_bytes=size, num_alloc_retries=0),
        )
        measured = measured.model_copy(update={"memory": memory})
    wall = made.provenance.model_copy(update={"wall_seconds": startup + sum(seconds)})
    return made.model_copy(update={"measurement": measured, "provenance": wall})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic grid: the cells of the real sweeps, the answers of a made-up machine."""
    root, cache = tmp_path_factory.mktemp("grid"), tmp_path_factory.mktemp("cache")
    cells = [cell for part in PARTS for cell in requests([f"+sweep={part}", "machine=cpu", f"cache={cache}"], multirun=False)[1]]
    cells = [cell for cell in cells if not (cell.cell.engine.knobs.get("cuda_graphs") and cell.cell.engine.knobs["layout"] == "packed")]
    (grid,) = grids([record(cell, [0.5] * 10, 20, GIB) for cell in cells])
    made_up = machine(grid.space, seed=5)
    for one in grid.space.candidates:
        cell = next(cell for cell in cells if cell.cell.key == grid.records[one][0].cell.key)
        answer = made_up.measure(Ask(candidate=one, steps=10))
        seconds = [] if answer.step_seconds is None else [answer.step_seconds] * 10
        save(record(cell, seconds, answer.startup_seconds or answer.cost_seconds, answer.peak_bytes), root)
    return root


def test_the_search_on_a_grid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--seeds", "2", "--json"]) in (0, 3)
    answers = json.loads(capsys.readouterr().out)
    ours = [answer for answer in answers if answer["policy"] == "tune"]
    assert len(ours) >= 4
    for answer in ours:
        (judged,) = answer["judged"]
        assert judged["num_runs"] <= 8
        assert judged["num_late_ooms"] == 0
        assert answer["memory"]["num_false_fits"] == 0
    chance = [one["regret"] for answer in answers if answer["policy"] == "random" for one in answer["judged"]]
    regrets = [answer["judged"][0]["regret"] for answer in ours]
    assert sum(regrets) / len(regrets) < sum(chance) / len(chance)
    assert sorted(regrets)[len(regrets) // 2] <= 0.03


def test_what_cannot_be_compared_is_said_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(folder), "--seeds", "1", "--runs", "3"])
    out = capsys.readouterr().out
    assert "largest micro-batch that fits" in out
    assert ("Optuna TPE: not compared, optuna is not installed here" in out) is not has_optuna()


def test_a_folder_without_a_grid_is_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 6
    assert "no records of a grid" in capsys.readouterr().err


def test_uneven_samples_cannot_be_replayed() -> None:
    some = [records.record(records.engine(micro_batch=size)) for size in (1, 2)]
    with pytest.raises(ConfigError, match="data=dense"):
        grids(some)


def test_a_prefix_costs_less_and_says_the_same(folder: Path) -> None:
    from harness.store import load

    (grid,) = grids([stored.record for stored in load(folder).stored])
    one = next(one for one in grid.space.candidates if grid.records[one][0].status == "ok")
    short, long = grid.measure(Ask(candidate=one, steps=6)), grid.measure(Ask(candidate=one, steps=10))
    assert short.step_seconds == pytest.approx(long.step_seconds)
    assert short.cost_seconds == pytest.approx(long.cost_seconds - 4 * (long.step_seconds or 0))
    assert isinstance(grid, Grid)
    assert grid.total_seconds(one, 100) == pytest.approx((long.startup_seconds or 0) + 100 * (long.step_seconds or 0))


def test_start_up_holds_what_the_first_steps_take_longer() -> None:
    steps = records.steps(num_steps=6, seconds=(5.0, 3.0, 1.0, 1.0, 1.0, 1.0), compiles=(9, 1, 0, 0, 0, 0))
    made = records.record(ran=steps, work=records.workload(steps=6))
    told = result_of(made.model_copy(update={"provenance": made.provenance.model_copy(update={"wall_seconds": 32.0})}))
    assert told.step_seconds == 1.0
    assert told.startup_seconds == pytest.approx(32 - 12 + 4 + 2)
    uneven = result_of(made, positions=(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0, 4.0))
    assert uneven.step_seconds == pytest.approx(1.0 * (6 + 8) / 8)
