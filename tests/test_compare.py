"""A real sweep with first steps, what is kept of it for later runs, and the door that compares two runs or two adapters."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from harness.__main__ import main as harness
from harness.comparable import Run, measured, runs
from harness.compare import main as compare
from harness.store import Stored, load
from harness.weights import adapter_sha256

WORK = (
    "model=tiny_llama", "machine=cpu", "data.sequence_length=48", "data.held_out_samples=16", "train.steps=6", "train.learning_rate=5e-3",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    root: Path
    cache: Path

    def sweep(self, *overrides: str) -> int:
        return harness(["-m", *WORK, f"runs={self.root}", f"cache={self.cache}", *overrides])

    def stored(self, engine: str, *, first_step: bool = False, **knobs: int) -> Stored:
        (found,) = [
            one for one in load(self.root).stored
            if one.record.cell.engine.name == engine
            and one.record.cell.workload.is_first_step == first_step
            and knobs.items() <= one.record.cell.engine.knobs.items()
        ]  # fmt: skip
        return found

    def record(self, engine: str, **knobs: int) -> str:
        return str(self.root / self.stored(engine, **knobs).path)

    def adapter(self, engine: str, *, first_step: bool = False, **knobs: int) -> Path:
        stored = self.stored(engine, first_step=first_step, **knobs)
        (run,) = (run for run in runs(load(self.root)) if run.record == stored.record)
        return self.root / "adapters" / str(measured(run).artifacts.adapter_sha256)[:16]


@pytest.fixture(scope="module")
def swept(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """hf and fused with their first steps; then, in a sweep of its own, fused with another split: its reference was kept."""
    made = Measured(tmp_path_factory.mktemp("compare") / "runs", cache)
    assert made.sweep("engine=hf,fused", "train.stop_after=1,null") == 0
    assert made.sweep("engine=fused", "engine.knobs.micro_batch=1", "train.stop_after=1,null") == 0
    return made


def test_every_test_is_made_also_of_a_run_that_came_later(swept: Measured, capsys: pytest.CaptureFixture[str]) -> None:
    for split in (4, 1):
        assert compare([swept.record("hf"), swept.record("fused", micro_batch=split), "--strict"]) == 0
        said = capsys.readouterr().out
        assert said.startswith("verdict: same: fp32\n")
        assert "direction of the first update" in said
        assert "worst: " in said


def test_what_was_not_tested_is_named_and_strict_refuses_it(swept: Measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forgotten = Measured(tmp_path / "runs", swept.cache)
    shutil.copytree(swept.root, forgotten.root, ignore=shutil.ignore_patterns("updates"))
    arguments = [forgotten.record("hf"), forgotten.record("fused", micro_batch=4)]
    assert compare(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("verdict: same: fp32 (6 of 9 tests)")
    assert "direction of the final update    not tested: the weights were not compared before they were deleted" in said
    assert compare([*arguments, "--strict"]) == 4
    assert compare([*arguments, "--strict", "--root", str(swept.root)]) == 0, "known in another folder of results"


def test_only_what_later_runs_are_compared_with_is_kept(swept: Measured) -> None:
    assert {path.name for path in (swept.root / "adapters").iterdir()} == {
        swept.adapter("hf", first_step=one).name for one in (True, False)
    }
    assert "1 steps" not in (swept.root / "report.md").read_text(), "a first step is no row of the report"


def test_another_training_is_different_in_text_json_and_exit_code(swept: Measured, capsys: pytest.CaptureFixture[str]) -> None:
    record = Path(swept.record("fused", micro_batch=4))
    raw = json.loads(record.read_text())
    raw["measurement"]["steps"]["losses"][3] += 0.5
    changed = record.with_name(record.name.replace("Z-", "Z-changed"))
    changed.write_text(json.dumps(raw))
    try:
        assert compare([swept.record("hf"), str(changed), "--json"]) == 7
        told = json.loads(capsys.readouterr().out)
        assert told["verdict"] == "different"
        (failed, *_) = [test for test in told["tests"] if not test["passed"]]
        assert (failed["name"], failed["where"]) == ("largest loss deviation", "step 4")
        assert failed["deviation"] == pytest.approx(0.5, rel=1e-3)
        assert compare([swept.record("hf"), str(changed)]) == 7
        assert "different" in capsys.readouterr().out
    finally:
        changed.unlink()


def test_two_adapters_are_compared_by_the_work_they_were_trained_for(
    swept: Measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = swept.adapter("hf"), tmp_path / "longer"
    shutil.copytree(one, other)
    began = measured(Run(swept.stored("hf").record)).artifacts.adapter_init_sha256  # other tests leave adapters in this cache too
    (start,) = (folder for folder in (swept.cache / "adapter").glob("tiny_llama-*") if adapter_sha256(folder) == began)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (start, one))
    save_file({name: before[name] + np.float32(1.01) * (after[name] - before[name]) for name in after}, other / "adapter_model.safetensors")
    work = [*WORK, f"runs={tmp_path / 'runs'}", f"cache={swept.cache}"]
    assert compare([str(one), str(other), *work]) == 7
    said = capsys.readouterr().out
    assert "final update norm: 1.0100 x the reference's" in said
    assert "cosine 1.00000" in said
    assert compare([str(one), str(one), *work]) == 0
    assert "same: these weights (3 of 9 tests)" in capsys.readouterr().out


def test_runs_of_other_work_are_not_comparable(swept: Measured, capsys: pytest.CaptureFixture[str]) -> None:
    first = swept.root / swept.stored("hf", first_step=True).path
    assert compare([swept.record("hf"), str(first)]) == 4
    assert "because: another workload" in capsys.readouterr().out


def test_what_the_light_check_saw_is_said_where_the_full_rule_has_no_answer(
    swept: Measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unscored = Measured(tmp_path / "runs", swept.cache)
    shutil.copytree(swept.root, unscored.root, ignore=shutil.ignore_patterns("scores"))
    arguments = [unscored.record("hf"), unscored.record("fused", micro_batch=4)]
    assert compare(arguments) == 4
    said = capsys.readouterr().out
    assert "because: no held-out score of" in said
    assert "the light check passed: same stream; loss of step " in said
    assert compare([*arguments, "--json"]) == 4
    light = json.loads(capsys.readouterr().out)["light"]
    assert (light["passed"], light["open"], light["detail"][:12]) == (True, False, "same stream;")


@pytest.mark.parametrize("given", [[], ["one"]])
def test_what_may_be_left_out_is_not_asked_for(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare(given)
    said = capsys.readouterr().err
    assert "the following arguments are required: " in said
    assert "candidate" in said
    assert "overrides" not in said.splitlines()[-1]


def test_mistakes_are_exit_code_2_and_said(swept: Measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, broken = swept.record("hf"), tmp_path / "a" / "b" / "c" / "d" / "broken.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    adapter = str(swept.adapter("hf"))
    for arguments, says in (
        ([good, str(tmp_path / "absent")], "expected a record"),
        ([good, str(tmp_path)], "neither records nor a PEFT adapter here"),
        ([good, adapter], "a record and an adapter cannot be compared"),
        ([good, good, "model=tiny_llama"], "a record says so itself"),
        ([good, good, "--root", str(tmp_path / "absent")], "absent: no results in it; expected a folder of MACHINE/WORKLOAD"),
        ([good, good, "--root", str(Path(good).parent)], "no results in it"),
        ([good, str(broken)], "broken.json: not a record (truncated or edited)"),
        ([adapter, adapter, "model=tiny"], "there is no such option"),
    ):
        assert compare(arguments) == 2
        assert says in capsys.readouterr().err
