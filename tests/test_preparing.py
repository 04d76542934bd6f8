"""What is in the cache is found by the sweep itself, after every check that prepare makes; all else is made in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness import prepare as door
from harness.errors import DataError, HarnessError, WeightsError
from harness.places import Prepared, PrepareRequest, Sources
from harness.preparing import prepared
from harness.weights import fingerprint
from tests import workloads
from tests.real_files import ROOT, conf, model, request, workload
from tests.test_prepare import BAN, written

DENSE = conf("data", "dense", num_samples=3, sequence_length=16)


@pytest.fixture
def asked(tmp_path: Path) -> PrepareRequest:
    """Nothing of it is made yet."""
    return request(workload(data=DENSE), tmp_path / "cache", tmp_path / "out.json")


def test_found_is_what_was_made_and_nothing_heavy_is_loaded_to_find_it(asked: PrepareRequest, tmp_path: Path) -> None:
    assert door.find(asked) is None
    made = door.prepare(asked)
    assert door.find(asked) == made
    code = f"{BAN}; from harness.prepare import find, read_request; print(find(read_request(sys.argv[1])).model_dump_json())"
    path = written(tmp_path, asked)
    found = subprocess.run([sys.executable, "-c", f"import pathlib; {code.replace('sys.argv[1]', 'pathlib.Path(sys.argv[1])')}", path],
                           cwd=ROOT, capture_output=True, text=True, check=True)  # fmt: skip
    assert json.loads(found.stdout) == json.loads(made.model_dump_json())


@pytest.mark.parametrize("part", ["tokens", "base", "adapter_init"])
def test_where_a_part_is_gone_all_is_left_to_prepare(asked: PrepareRequest, part: str) -> None:
    made = door.prepare(asked)
    place = Path(getattr(made, part))
    place.rename(place.with_name("away"))
    assert door.find(asked) is None
    assert door.prepare(asked) == made
    assert door.find(asked) == made


@pytest.mark.parametrize("damage", ["{", "{}", "[]"])
def test_damaged_entries_are_not_found_or_are_said(asked: PrepareRequest, damage: str) -> None:
    made = door.prepare(asked)
    (entry,) = (Path(asked.cache) / "tokens" / "index").iterdir()
    entry.write_text(damage)
    assert door.find(asked) is None
    assert door.prepare(asked) == made
    adapter = Path(str(made.adapter_init)) / "manifest.json"
    whole = adapter.read_text()
    adapter.write_text(damage)
    with pytest.raises(WeightsError, match="its manifest cannot be read; delete the folder"):
        door.find(asked)
    adapter.write_text(whole)
    (Path(made.base) / "manifest.json").write_text(damage)
    assert door.find(asked) is None


def test_full_fine_tuning_needs_no_adapter(tmp_path: Path) -> None:
    asked = request(workload(data=DENSE, method=conf("method", "full")), tmp_path / "cache", tmp_path / "out.json")
    made = door.prepare(asked)
    assert made.adapter_init is None
    assert door.find(asked) == made


def test_a_file_that_changed_since_the_plan_is_refused_by_both(tmp_path: Path) -> None:
    cache, mine = tmp_path / "cache", tmp_path / "mine.jsonl"
    mine.write_text('{"text": "one"}\n{"text": "two"}\n')
    data = conf("data", "jsonl", path="mine.jsonl", sha256=fingerprint(mine, cache), held_out_fraction=0.0)
    asked = request(workload(data=data), cache, tmp_path / "out.json", data=(str(mine),))
    assert door.find(asked) is None
    assert door.prepare(asked) == door.find(asked)
    mine.write_text('{"text": "three"}\n')
    for look in (door.find, door.prepare):
        with pytest.raises(DataError, match=r"mine.jsonl: the file changed since the run was planned"):
            look(asked)
    mine.unlink()
    with pytest.raises(DataError, match="there is no file"):
        door.find(asked)


def test_a_tokenizer_that_changed_since_the_plan_is_refused_by_both(asked: PrepareRequest) -> None:
    door.prepare(asked)
    other = asked.workload.model.model_copy(update={"tokenizer_fingerprint": "f" * 64})
    changed = asked.model_copy(update={"workload": asked.workload.model_copy(update={"model": other})})
    for look in (door.find, door.prepare):
        with pytest.raises(WeightsError, match="its files changed since the run was planned"):
            look(changed)


def test_the_hub_is_asked_by_prepare_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.weights.base_model.snapshot", lambda *_, **__: pytest.fail("asked the Hub"))
    for change in ({"weights": "hub:a/b", "config": None}, {"tokenizer": "hub:a/b"}):
        work = workload(data=DENSE).model_copy(update={"model": model("tiny_llama", **change)})
        assert door.find(request(work, tmp_path, tmp_path / "out.json")) is None


def test_only_what_must_be_made_starts_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = workloads.request(workload(data=DENSE))
    cache, folder = tmp_path / "cache", tmp_path / "work"
    started: list[str] = []

    def run_door(module: str, job: PrepareRequest, *_: Any, network: bool, **__: Any) -> None:
        assert network
        started.append(module)
        Path(job.out).parent.mkdir(parents=True, exist_ok=True)
        Path(job.out).write_text(door.prepare(job).model_dump_json())

    monkeypatch.setattr("harness.preparing.run_door", run_door)
    said: list[str] = []

    def once() -> Prepared:
        return prepared(cell, str(cache), folder, held=None, say=said.append)

    first = once()
    assert (started, said) == (["harness.prepare"], []), "prepare speaks for itself"
    assert once() == first
    assert (started, said) == (["harness.prepare"], [first.notes[-1]])
    assert said[0].startswith("data (dense): 3 rows")
    few = workloads.request(workload(data={**DENSE, "held_out_fraction": 0.01, "held_out_samples": 2}))
    asked = prepared(few, str(cache), folder, held=None, say=said.append)
    del said[:]
    assert prepared(few, str(cache), folder, held=None, say=said.append) == asked
    assert said == list(asked.notes[-2:])
    assert said[1].startswith("held out: 0, where data.held_out_samples allows 2")
    broken = cell.model_copy(update={"sources": Sources(tokenizer="/nowhere")})
    with pytest.raises(HarnessError, match="/nowhere is gone since the run was planned"):
        prepared(broken, str(cache), folder, held=None, say=said.append)
    assert len(started) == 2
