"""Sweeps that are stopped, meet each other, or cannot write: nothing is lost, nothing runs twice, and the message says what to do."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from harness.adapters import adapter_folder
from harness.config import Settings
from harness.errors import HarnessError, StoreError
from harness.launch import run_cell
from harness.places import PrepareRequest, ScoreRequest
from harness.record import Record, Score, dumps
from harness.store import load, save
from harness.sweep import Exit, run
from harness.turns import turn
from tests import workloads
from tests.sweeps import FAKES, TREE, Sweeps, overrides
from tests.workloads import Made

Door = Callable[..., None]


def settings(runs: Path, **more: Any) -> Settings:
    return Settings(
        **{
            "plan": "run",
            "rerun": "stale",
            "keep": "none",
            "score": "now",
            "runs": str(runs),
            "cache": str(runs.with_name(f"{runs.name}-cache")),
            "lane": None,
            **more,
        }
    )


def doors(made: Made, *, unloadable: frozenset[str] = frozenset(), interrupted: list[str] | None = None) -> Door:
    """Prepare and score without torch. Scoring fails at the ``unloadable`` adapters, and is interrupted as often as the list is long."""

    def run_door(module: str, job: PrepareRequest | ScoreRequest, *_: object, **__: object) -> None:
        if isinstance(job, PrepareRequest):
            Path(job.out).parent.mkdir(parents=True, exist_ok=True)
            Path(job.out).write_text(made.prepared.model_dump_json())
            return
        for item in job.items:
            if item.adapter_sha256 in unloadable:
                raise HarnessError("not an adapter that can be loaded")
            Path(item.out).parent.mkdir(parents=True, exist_ok=True)
            Path(item.out).write_text(dumps(_score(made, item.adapter_sha256)))
            if interrupted:
                raise KeyboardInterrupt(interrupted.pop())

    return run_door


def through(monkeypatch: pytest.MonkeyPatch, door: Door) -> None:
    """Preparing and scoring go through ``door``."""
    monkeypatch.setattr("harness.preparing.run_door", door)
    monkeypatch.setattr("harness.scoring.run_door", door)


def _score(made: Made, adapter: str | None) -> Score:
    return Score(
        adapter_sha256=adapter, tokens_sha256=Path(made.prepared.tokens).stem, base_sha256=made.prepared.base_sha256, held_out_loss=2.0,
        held_out_tokens=10, update_norm=None, evaluator="a test",
    )  # fmt: skip


def sweep(made: Made, runs: Path, *, cells: int = 2, **more: Any) -> tuple[Exit, str]:
    """Run so many repeats, every other one ending in other weights; returns the exit code and what was printed."""
    said = io.StringIO()
    requests = [workloads.request(made.workload, repeat=repeat, shift=0.01 * (repeat % 2)) for repeat in range(cells)]
    return run(settings(runs, **more), requests, Console(file=said, width=300)), said.getvalue()


def test_two_sweeps_at_once_share_the_cells(cache: Path, tmp_path: Path) -> None:
    sweeps = Sweeps.of(cache, tmp_path / "runs", "engine.knobs.step_seconds=0.05", "repeat=range(8)")
    both = [sweeps.start(), sweeps.start()]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0], sweeps.printed()
    assert sorted(stored.record.cell.repeat for stored in load(sweeps.runs).stored) == list(range(8))
    assert sum(sweeps.diary().begun.values()) == 8
    assert "recorded by another sweep meanwhile" in sweeps.printed()
    assert "waiting: another sweep is measuring here" in sweeps.printed()


def test_two_sweeps_that_are_to_run_all_again_both_do(cache: Path, tmp_path: Path) -> None:
    sweeps = Sweeps.of(cache, tmp_path / "runs", "repeat=range(2)", "rerun=all")
    both = [sweeps.start(), sweeps.start()]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0], sweeps.printed()
    assert sorted(stored.record.cell.repeat for stored in load(sweeps.runs).stored) == [0, 0, 1, 1]


def test_adapters_left_by_a_stopped_sweep_are_scored_by_the_next(monkeypatch: pytest.MonkeyPatch, prepared: Made, tmp_path: Path) -> None:
    through(monkeypatch, doors(prepared, interrupted=["while it scored"]))
    with pytest.raises(KeyboardInterrupt):
        sweep(prepared, tmp_path)
    assert len(list((tmp_path / "adapters").iterdir())) == 2
    assert all(stored.score is None for stored in load(tmp_path).stored)
    code, _ = sweep(prepared, tmp_path)
    assert code == Exit.OK
    assert all(stored.score and stored.base_score for stored in load(tmp_path).stored)
    assert list((tmp_path / "adapters").iterdir()) == [], "scored, they are not kept"
    assert len(load(tmp_path).stored) == 2, "and no cell ran again"


def test_what_is_to_be_scored_later_stays_until_then(monkeypatch: pytest.MonkeyPatch, prepared: Made, tmp_path: Path) -> None:
    """One scorer for three sweeps: it is started by the last one, which has nothing to train."""
    doors_taken: list[str] = []
    through(monkeypatch, lambda *given, **more: (doors_taken.append(given[0]), doors(prepared)(*given, **more))[0])
    for cells in (1, 2):
        code, said = sweep(prepared, tmp_path, cells=cells, score="later")
        assert (code, "score=later: what was trained is scored by the next sweep" in said) == (Exit.OK, True)
    assert "harness.score" not in doors_taken
    assert len(list((tmp_path / "adapters").iterdir())) == 2
    code, _ = sweep(prepared, tmp_path)
    assert (code, doors_taken.count("harness.score")) == (Exit.OK, 1)
    assert all(stored.score for stored in load(tmp_path).stored)
    assert list((tmp_path / "adapters").iterdir()) == []


def test_beside_a_sweep_on_another_gpu_weights_stay_until_the_last_has_judged_all(
    monkeypatch: pytest.MonkeyPatch, prepared: Made, tmp_path: Path
) -> None:
    through(monkeypatch, doors(prepared))
    monkeypatch.setattr("harness.sweep.gpu_of", lambda *_, **__: "gpu-0")
    with turn(tmp_path, pytest.fail, "gpu-1"):
        code, _ = sweep(prepared, tmp_path, cells=1)
    assert code == Exit.OK
    assert len(list((tmp_path / "adapters").iterdir())) == 1, "the other sweep's are to be compared with it"
    monkeypatch.setattr("harness.sweep.gpu_of", lambda *_, **__: "gpu-1")
    code, _ = sweep(prepared, tmp_path)
    assert code == Exit.OK
    assert len(load(tmp_path).stored) == 2
    assert all(stored.score for stored in load(tmp_path).stored)
    assert list((tmp_path / "adapters").iterdir()) == []


def test_weights_that_another_sweep_left_meanwhile_are_judged_too(monkeypatch: pytest.MonkeyPatch, prepared: Made, tmp_path: Path) -> None:
    door, left = doors(prepared), [tmp_path / "other"]
    through(monkeypatch, door)
    sweep(prepared, tmp_path / "other", keep="adapters")

    def run_and_find_more(*given: Any, **named: Any) -> Record:
        record = run_cell(*given, **named)
        while left:
            shutil.copytree(left.pop(), tmp_path / "mine", dirs_exist_ok=True, ignore=shutil.ignore_patterns("work", "scores", "report*"))
        return record

    monkeypatch.setattr("harness.sweep.run_cell", run_and_find_more)
    sweep(prepared, tmp_path / "mine", cells=1, keep="adapters")
    assert len({_adapter(stored.record) for stored in load(tmp_path / "mine").stored}) == 2
    assert all(stored.score for stored in load(tmp_path / "mine").stored)


def test_an_adapter_that_cannot_be_scored_is_named_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, prepared: Made, tmp_path: Path
) -> None:
    through(monkeypatch, doors(prepared))
    sweep(prepared, tmp_path / "twin", keep="adapters")
    bad = sorted({_adapter(stored.record) for stored in load(tmp_path / "twin").stored})[0]
    through(monkeypatch, doors(prepared, unloadable=frozenset([bad])))
    code, said = sweep(prepared, tmp_path / "runs")
    assert code == Exit.CELLS_FAILED
    assert f"not scored   {bad[:16]}: not an adapter that can be loaded" in said
    results = load(tmp_path / "runs")
    assert {_adapter(stored.record): stored.score is None for stored in results.stored} == {bad: True, _other(results.stored, bad): False}
    assert adapter_folder(tmp_path / "runs", bad).exists(), "kept, so that it can be looked at and tried again"


def _adapter(record: Record) -> str:
    assert record.measurement is not None
    assert record.measurement.artifacts.adapter_sha256 is not None
    return record.measurement.artifacts.adapter_sha256


def _other(stored: Any, bad: str) -> str:
    return next(found for entry in stored if (found := _adapter(entry.record)) != bad)


def test_a_record_that_could_not_be_saved_is_made_by_the_same_command(
    monkeypatch: pytest.MonkeyPatch, prepared: Made, tmp_path: Path
) -> None:
    through(monkeypatch, doors(prepared))
    room = ["for one record"]

    def save_while_there_is_room(record: Record, root: Path) -> Path:
        if not room:
            raise StoreError("no space left")
        room.pop()
        return save(record, root)

    with monkeypatch.context() as full:
        full.setattr("harness.sweep.save", save_while_there_is_room)
        with pytest.raises(StoreError, match="its record is made by the same command"):
            sweep(prepared, tmp_path, cells=3)
    assert len(load(tmp_path).stored) == 1
    code, said = sweep(prepared, tmp_path, cells=3)
    assert code == Exit.OK
    assert "recovered from a stopped sweep" in said
    diary = (tmp_path / "work" / "diary.txt").read_text()
    assert (len(load(tmp_path).stored), diary.count("begin")) == (3, 3), "one record and one run each"
    notes = [" ".join(stored.record.notes) for stored in load(tmp_path).stored]
    assert sum("recovered" in note for note in notes) == 1


def test_what_a_worker_left_without_its_weights_is_not_recovered(monkeypatch: pytest.MonkeyPatch, prepared: Made, tmp_path: Path) -> None:
    through(monkeypatch, doors(prepared))
    sweep(prepared, tmp_path, cells=1, keep="adapters")
    (stored,) = load(tmp_path).stored
    (tmp_path / stored.path).unlink()
    shutil.rmtree(tmp_path / "adapters")
    code, said = sweep(prepared, tmp_path, cells=1)
    assert code == Exit.OK
    assert "recovered" not in said
    assert (tmp_path / "work" / "diary.txt").read_text().count("begin") == 2


def test_a_results_folder_that_is_a_file_is_said_before_anything_runs(prepared: Made, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(StoreError, match=r"cannot write \(Not a directory\).*choose another folder with runs="):
        sweep(prepared, tmp_path / "runs")


def test_files_that_cannot_be_read_are_named_and_stop_no_sweep(monkeypatch: pytest.MonkeyPatch, prepared: Made, tmp_path: Path) -> None:
    through(monkeypatch, doors(prepared))
    sweep(prepared, tmp_path, cells=1)
    (stored,) = load(tmp_path).stored
    folder = (tmp_path / stored.path).parent
    torn = {
        "torn": b'{"schema_version": 1, "ce',
        "binary": b"\xff\x00\xfe",
        "empty": b"",
        "deep": b"[" * 200_000,
        "newer": b'{"schema_version": 99}',
    }
    for name, content in torn.items():
        (folder / f"{name}.json").write_bytes(content)
    (tmp_path / "scores" / "a").mkdir()
    (tmp_path / "scores" / "a" / "half.json").write_bytes(b'{"held_out')
    code, said = sweep(prepared, tmp_path, cells=2)
    assert code == Exit.OK
    assert [name for name in [*torn, "half"] if f"{name}.json" not in said] == []
    assert len(load(tmp_path).stored) == 2


@pytest.fixture
def own_mounts() -> list[str]:
    """The command that runs another where it may mount what it likes, and nobody else sees it."""
    command = ["unshare", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not have mounts of its own (unshare --map-root-user --mount)")
    return command


def test_a_disk_that_is_full_or_read_only_loses_nothing(own_mounts: list[str], cache: Path, tmp_path: Path) -> None:
    """A real file system of 240 KiB under a real command, which then gets the room it asked for."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    sweep_cells = [sys.executable, "-m", "harness", "-m", "--config-dir", str(FAKES), *overrides(cache, disk / "runs", "repeat=range(8)")]
    script = """
        set -u; disk=$1; kept=$2; shift 2
        mount -t tmpfs -o size=240k tmpfs "$disk"
        "$@"; echo "full: exit code $?"
        mount -o remount,size=50m,ro "$disk"
        "$@"; echo "read-only: exit code $?"
        mount -o remount,rw "$disk"
        "$@"; echo "with room: exit code $?"
        cp -r "$disk/runs" "$kept"
    """
    done = subprocess.run(
        [*own_mounts, "sh", "-c", script, "sh", str(disk), str(kept), *sweep_cells], cwd=TREE, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    for line in (
        "full: exit code 2",
        "the trained weights will take about",
        "read-only: exit code 2",
        "(Read-only file system)",
        "with room: exit code 0",
    ):
        assert line in said, said
    results = load(kept)
    assert results.problems == ()
    assert sorted(stored.record.cell.repeat for stored in results.stored if stored.record.status == "ok") == list(range(8))
