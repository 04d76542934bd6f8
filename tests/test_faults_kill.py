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
CELLS = 24  # at first; a sweep that is done before its kill is given MORE
MORE = 12
EARLY = 15  # of the kills come at any time after the start, with everything imported
LAUNCHED = 15  # come at any time after the first cell was launched
RECORDED = 10  # just after a cell was recorded; the others while an engine is at work: that is where there is most to lose
LATEST_SECONDS = 0.5  # after the start or the launch: on a quiet machine three to four cells a second run, and all is prepared
LATEST_IN_ENGINE_SECONDS = 0.2  # an engine takes at least 0.12 s
INTERRUPTED = 5  # engines at least that a kill must meet at work, however slow the machine: more kills are made until it is so
KILLS_WHILE_SCORING = 5
LONGEST_SCORING_SECONDS = 8.0  # most of them go into importing torch, on two quiet cores
WITH_HELD_OUT_ROWS = ("data=python_docs", "data.sequence_length=64", "data.held_out_samples=8")


def test_killed_at_50_random_instants_nothing_is_lost_or_run_twice(cache: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    warm = Sweeps.of(cache, tmp_path / "warm").start()
    warm.join()
    assert warm.exitcode == 0, "nothing is killed yet: it only makes the base model, which takes longer than we let a sweep live"
    killed, cells = 0, CELLS
    sweeps = _sweeps(cache, tmp_path / "runs", cells)
    recorded = 0
    while killed < KILLS or _interrupted(sweeps) < INTERRUPTED:
        assert killed < 3 * KILLS, "hardly a kill meets a running engine: the test is too weak"
        answered, records, begun = _answered(sweeps), _records(sweeps.runs), sweeps.diary().begun
        process = sweeps.start()
        _wait_for_the_instant(killed, sweeps, process, chance)
        process.kill()
        process.join()
        if process.exitcode == 0:
            cells += MORE
            sweeps = _sweeps(cache, sweeps.runs, cells)
            continue
        assert process.exitcode == -signal.SIGKILL, sweeps.printed()
        killed += 1
        assert sweeps.left_alive(within_seconds=5) == []
        assert records.items() <= _records(sweeps.runs).items(), "a record was changed or lost"
        again = set(sweeps.diary().begun - begun) & answered
        assert not again, f"{again} had finished, and began again after kill {killed}"
        recorded = len(records)
    assert recorded >= RECORDED, "hardly a kill had a record to harm: the test is too weak"
    last = sweeps.start()
    last.join()
    assert last.exitcode == 0, sweeps.printed()
    assert sweeps.left_alive(within_seconds=5) == []

    results = load(sweeps.runs)
    assert results.problems == ()
    found = sorted((stored.record.cell.repeat, stored.record.status) for stored in results.stored)
    assert found == [(repeat, "ok") for repeat in range(cells)]
    assert set(re.findall(r"ok\s+faulty, repeat (\d+)", sweeps.printed())) <= {str(repeat) for repeat in range(cells)}
    assert all(count >= 1 for count in sweeps.diary().ended.values())
    assert len(sweeps.diary().ended) == cells


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


def _sweeps(cache: Path, runs: Path, cells: int) -> Sweeps:
    return Sweeps.of(cache, runs, "engine.knobs.behaviour=escape", "engine.knobs.step_seconds=0.03", f"repeat=range({cells})")


def _wait_for_the_instant(killed: int, sweeps: Sweeps, process: ForkServerProcess, chance: random.Random) -> None:
    if killed < EARLY:
        time.sleep(chance.uniform(0, LATEST_SECONDS))
    elif killed < EARLY + LAUNCHED:
        _until_it_says("[1/", sweeps, process)
        time.sleep(chance.uniform(0, LATEST_SECONDS))
    elif killed < EARLY + LAUNCHED + RECORDED:
        _until_it_says("faulty, repeat", sweeps, process)
        time.sleep(chance.uniform(0, LATEST_IN_ENGINE_SECONDS))
    else:
        _until_an_engine_begins(sweeps, process)
        time.sleep(chance.uniform(0, LATEST_IN_ENGINE_SECONDS))


def _until_an_engine_begins(sweeps: Sweeps, process: ForkServerProcess) -> None:
    before = sweeps.diary().begun.total()
    while process.is_alive() and sweeps.diary().begun.total() == before:
        time.sleep(0.01)


def _until_it_says(word: str, sweeps: Sweeps, process: ForkServerProcess) -> None:
    """Or has ended: then there was nothing left to do."""
    path = sweeps.runs.with_name("printed.txt")
    before = path.read_text().count(word) if path.exists() else 0
    while process.is_alive() and (not path.exists() or sweeps.printed().count(word) == before):
        time.sleep(0.01)


def _interrupted(sweeps: Sweeps) -> int:
    """How many engines began and were killed before they had said how they ended."""
    return sweeps.diary().begun.total() - len(_answered(sweeps))


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
