"""A sweep that is killed outright, again and again, loses nothing, runs nothing twice and leaves no process behind."""

from __future__ import annotations

import random
import re
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from harness.events import EventReader, ending
from harness.store import INTERNAL, load
from tests.sweeps import Sweeps

KILLS = 50
CELLS = 36
EARLY = 15  # of the kills come at any time after the start, the others once the first cell has begun: that is where there is most to lose
LATEST_SECONDS = 0.5  # with everything imported a sweep prepares for 0.4 s, then runs three to four cells a second
KILLS_WHILE_SCORING = 5
LONGEST_SCORING_SECONDS = 8.0  # most of them go into importing torch, on two quiet cores
WITH_HELD_OUT_ROWS = ("data=python_docs", "data.sequence_length=64", "data.held_out_samples=8")


def test_killed_at_50_random_instants_nothing_is_lost_or_run_twice(cache: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    sweeps = Sweeps.of(
        cache, tmp_path / "runs", "engine.knobs.behaviour=escape", "engine.knobs.step_seconds=0.03", f"repeat=range({CELLS})"
    )
    warm = Sweeps.of(cache, tmp_path / "warm").start()
    warm.join()
    assert warm.exitcode == 0, "nothing is killed yet: it only makes the base model, which takes longer than we let a sweep live"
    killed = 0
    while killed < KILLS:
        answered, records, begun = _answered(sweeps), _records(sweeps.runs), sweeps.diary().begun
        process = sweeps.start()
        if killed >= EARLY:
            _until_it_runs_a_cell(sweeps)
        time.sleep(chance.uniform(0, LATEST_SECONDS))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done before the last kill: make CELLS larger"
        killed += 1
        assert sweeps.left_alive(within_seconds=5) == []
        assert records.items() <= _records(sweeps.runs).items(), "a record was changed or lost"
        again = set(sweeps.diary().begun - begun) & answered
        assert not again, f"{again} had finished, and began again after kill {killed}"
    last = sweeps.start()
    last.join()
    assert last.exitcode == 0, sweeps.printed()
    assert sweeps.left_alive(within_seconds=5) == []

    results = load(sweeps.runs)
    assert results.problems == ()
    found = sorted((stored.record.cell.repeat, stored.record.status) for stored in results.stored)
    assert found == [(repeat, "ok") for repeat in range(CELLS)]
    assert set(re.findall(r"ok\s+faulty, repeat (\d+)", sweeps.printed())) <= {str(repeat) for repeat in range(CELLS)}
    assert all(count >= 1 for count in sweeps.diary().ended.values())
    assert len(sweeps.diary().ended) == CELLS
    assert sum(sweeps.diary().begun.values()) > CELLS, "no kill met a running cell: the test is too weak"


def test_killed_while_it_scores_no_cell_runs_again_and_all_is_scored(cache: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    sweeps = Sweeps.of(cache, tmp_path / "runs", *WITH_HELD_OUT_ROWS, "repeat=range(2)")
    begun, records = None, {}
    for _ in range(KILLS_WHILE_SCORING):
        process = sweeps.start()
        _until_it_says("scoring", sweeps, process)
        if begun is None:
            begun, records = sweeps.diary().begun, _records(sweeps.runs)
        time.sleep(chance.uniform(0, LONGEST_SCORING_SECONDS))
        process.kill()
        process.join()
        assert sweeps.left_alive(within_seconds=5) == []
    last = sweeps.start()
    last.join()
    assert last.exitcode == 0, sweeps.printed()
    assert sweeps.left_alive(within_seconds=5) == []

    assert len(records) == 2
    assert (_records(sweeps.runs), sweeps.diary().begun) == (records, begun), "the kills came after the cells"
    results = load(sweeps.runs)
    assert results.problems == ()
    assert all(stored.score and stored.base_score for stored in results.stored)
    assert list((sweeps.runs / "adapters").iterdir()) == [], "scored, they are not kept"
    assert (sweeps.runs / "report.html").is_file()


def _until_it_runs_a_cell(sweeps: Sweeps) -> None:
    began = time.monotonic()
    before = sweeps.printed().count("[1/")
    while sweeps.printed().count("[1/") == before:
        assert time.monotonic() < began + 60, sweeps.printed()
        time.sleep(0.01)


def _until_it_says(word: str, sweeps: Sweeps, process: ForkServerProcess) -> None:
    """Or has ended: then there was nothing left to do."""
    path = sweeps.runs.with_name("printed.txt")
    before = path.read_text().count(word) if path.exists() else 0
    while process.is_alive() and (not path.exists() or sweeps.printed().count(word) == before):
        time.sleep(0.01)


def _answered(sweeps: Sweeps) -> set[str]:
    """The work folders of cells that have a record, or whose worker has said that it finished."""
    recorded = {f"{stored.record.machine.key}-{stored.record.cell.key}" for stored in load(sweeps.runs).stored}
    for log in sweeps.runs.glob("work/*/events.jsonl"):
        with EventReader(log) as reader:
            if ending(reader.new()):
                recorded.add(log.parent.name)
    return recorded


def _records(runs: Path) -> dict[Path, bytes]:
    folders = [folder for folder in runs.glob("*") if folder.is_dir() and folder.name not in INTERNAL]
    return {path: path.read_bytes() for folder in folders for path in folder.glob("*/*/[!.]*.json")}
