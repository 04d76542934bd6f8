"""A toy tuned for real on this machine, interrupted and resumed, and trained with what was found."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from harness import __main__ as harness_main
from harness.config import requests
from harness.machine import detect
from harness.store import load
from harness.tune import __main__ as tune
from harness.tune.show import plain_seconds
from harness.tune.untried import kind_of
from harness.tuned import path_of, read, save
from tests.report.test_tuning import found

FAKES = Path(__file__).resolve().parents[1] / "fakes" / "conf"
TOY = (
    "model=tiny_llama", "data=dense", "data.sequence_length=32", "data.num_samples=8", "train.steps=6", "train.samples_per_step=4",
    "train.warmup_steps=1", "machine=cpu",
)  # fmt: skip


def test_a_real_engine_is_tuned_within_the_budget_and_one_run(cache: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    words = [*TOY, f"runs={tmp_path}", f"cache={cache}", "engines=fused", "budget_minutes=0.3"]
    assert tune.main(words) == 0
    records = [stored.record for stored in load(tmp_path).stored]
    longest = max(record.provenance.wall_seconds for record in records)
    assert time.monotonic() - began < 18 + longest + 30  # preparing and judging are not a run
    assert all(record.status == "ok" for record in records)
    (path,) = (tmp_path / "tuned").rglob("*.yaml")
    found = read(path)
    assert found.engine == "fused"
    assert found.predicted
    assert "left" in found.stopped


def test_a_search_resumes_and_its_answer_is_trained_with(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"hydra.searchpath=[file://{FAKES}]", *TOY, f"runs={tmp_path}", f"cache={cache}"]
    assert harness_main.main([*words, "engine=best"]) == 2
    said = capsys.readouterr().err
    assert "engine=best: nothing is tuned for tiny_llama-lora-dense" in said
    assert "run: python -m harness.tune model=tiny_llama" in said

    assert tune.main([*words, "engines=trivial", "budget_minutes=0.01"]) == 0  # no time for more than one run
    out = capsys.readouterr().out
    assert "of the budget are left" in out
    assert "begins with what the engines' YAML expects" in out
    assert len(load(tmp_path).stored) == 1
    (path,) = (tmp_path / "tuned").rglob("*.yaml")
    assert len(read(path).trials) == 1
    assert "no record teaches anything of this" in str(read(path).experience)
    assert {one.why for one in read(path).predicted} == {"the time was over"}

    assert tune.main([*words, "engines=trivial"]) == 0
    out = capsys.readouterr().out
    found = read(path)
    assert found.engine == "trivial"
    assert len(found.trials) == len(load(tmp_path).stored) > 1  # the first answer was a record already
    assert found.total_seconds == min(trial.total_seconds for trial in found.trials if trial.total_seconds is not None)
    assert "best: engine=trivial engine.knobs.micro_batch=" in out
    assert "ruled out of" in out
    assert out.count("answered by the record of ") == 1, "it says which looks were there before"
    assert " 0 s" not in out, "runs of seconds have digits enough to tell them apart"
    assert not list((tmp_path / "adapters").glob("*")), "looks leave no weights"

    assert harness_main.main([*words, "engine=best", "train.seed=1"]) == 0  # another seed is the same kind of work
    trained = [stored.record for stored in load(tmp_path).stored if stored.record.cell.workload.train.seed == 1]
    assert trained[0].cell.engine.knobs["micro_batch"] == found.knobs["micro_batch"]
    assert len(list((tmp_path / "adapters").glob("*/adapter_model.safetensors"))) == 1, "a person who trains wants the adapter"

    assert harness_main.main([*words, "engine=best", "engine.knobs.micro_batch=1"]) == 2
    assert "engine=best brings its own engine and knobs" in capsys.readouterr().err
    assert harness_main.main([*words, "engine=best", "train.samples_per_step=2", "plan=only"]) == 2
    assert "nothing is tuned" in capsys.readouterr().err


def test_seconds_have_digits_enough() -> None:
    assert [plain_seconds(value) for value in (1234.4, 100, 2.0516, 2.064, 0.012, 1e-5)] == [
        "1,234 s", "100 s", "2.05 s", "2.06 s", "0.012 s", "less than 0.01 s",
    ]  # fmt: skip


def test_somebody_trains_for_use(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows, two epochs: the adapter is what counts, be the times as they may, and a cell whose adapter is gone is trained again."""
    words = [f"hydra.searchpath=[file://{FAKES}]", *(word for word in TOY if "steps" not in word), f"runs={tmp_path}", f"cache={cache}"]
    words += ["train.epochs=2", "train.samples_per_step=3", "train.warmup_steps=1"]
    assert tune.main([*words, "engines=trivial", "budget_minutes=0.01"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("harness.launch.doubted", lambda *_: ("unsteady", "somebody else was busy"))
    for sitting, number in enumerate((1, 1, 2)):
        assert harness_main.main([*words, "engine=best", "train.seed=1"]) == 0
        out = capsys.readouterr().out
        assert "engine=best: trivial micro_batch=" in out
        assert "train.epochs=2: 6 steps of 3 samples" in out
        (adapter,) = (tmp_path / "adapters").glob("*")
        assert f"adapter of trivial, repeat 0, 6 steps: {adapter}" in out
        trained = [stored.record for stored in load(tmp_path).stored if stored.record.cell.workload.train.seed == 1]
        assert [record.status for record in trained] == ["unsteady"] * number
        if sitting == 1:
            shutil.rmtree(adapter)


def test_the_best_runs_in_as_many_processes_as_were_found(cache: Path, tmp_path: Path) -> None:
    words = [*TOY, f"runs={tmp_path}", f"cache={cache}"]
    workload = requests([*words, "engine=fused"], multirun=False)[1][0].cell.workload
    tuned = found().model_copy(update={"processes": 2, "knobs": {"micro_batch": 1, "recompute": "fit"}})
    save(tuned, path_of(tmp_path, detect("cpu"), workload))
    said: list[str] = []
    (asked,) = requests([*words, "engine=best", "train.seed=1"], multirun=False, say=said.append)[1]
    assert asked.cell.engine.processes == 2
    assert asked.cell.engine.knobs["micro_batch"] == 1
    assert said[0].startswith("engine=best: fused processes=2 micro_batch=1 recompute=fit")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["engine=hf"], "engine=hf: tune decides this itself; engines=hf,fused names engines"),
        (["budget_minutes=soon"], "budget_minutes=soon: expected a number above 0"),
        (["memory_gib=2.5"], "memory_gib=2.5: expected whole GiB, as memory_gib=16"),
        (["memory_gib=4", *TOY], "memory_gib caps the allocator of a GPU"),
        (["engines=nobody", *TOY], "there is no such option"),
        (["engines=unsloth", *TOY], "unsloth cannot start"),
        (["engines=unsloth", "save_every=2", *TOY], "it writes no checkpoints, and save_every=2 asks for them"),
        (["train.epochs=1", *TOY], "train.epochs=1 and train.steps=6: both say how long to train"),
    ],
)
def test_mistakes_are_answered(words: list[str], says: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([*words, f"cache={cache}"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("may not fit: 30.1 GiB predicted, up to 34.0", "may not fit"),
        ("needs at least as much memory as hf micro_batch=4, which ran out", "needs as much as one that ran out"),
        ("oom: it ran out", "oom"),
        ("timeout: stopped", "timeout"),
        ("not comparable: loss of step 1 off by 7", "trains something else"),
        ("different: ran out of allowance", "trains something else"),
    ],
)
def test_kinds_of_reasons(reason: str, kind: str) -> None:
    assert kind_of(reason) == kind
