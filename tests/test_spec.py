"""Specs are closed, strict and hashed by content; every mistake is reported at once."""

from __future__ import annotations

import math
from typing import Any

import pytest

from harness.errors import ConfigError
from harness.spec import Data, Spec, Train, Workload, content_key, parse
from tests import workloads


def raw() -> dict[str, Any]:
    return workloads.workload().model_dump(mode="json")


def test_all_mistakes_are_reported_at_once_with_their_keys_and_the_nearest_known_ones() -> None:
    mistaken = raw()
    mistaken["method"]["rnak"] = 3
    mistaken["data"]["sequence_lenght"] = 2
    mistaken["train"]["steps"] = "many"
    del mistaken["train"]["seed"]
    with pytest.raises(ConfigError) as caught:
        parse(Workload, mistaken)
    lines = str(caught.value).splitlines()
    assert "data.sequence_lenght: unknown key; did you mean 'sequence_length'?" in lines
    assert "method.rnak: unknown key; did you mean 'rank'?" in lines
    assert 'train.steps: got "many"; input should be a valid integer' in lines
    assert "train.seed: required, but not set" in lines
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("section", "change", "says"),
    [
        ("model", {"config": None}, "weights=random needs model.config"),
        ("data", {"source": "jsonl"}, "needs data.path"),
        ("data", {"num_samples": None}, "needs data.num_samples"),
        ("train", {"warmup_steps": 4}, "must be less than steps (4); set train.warmup_steps to at most 3, or train for longer"),
        ("train", {"learning_rate": 0}, "greater than 0"),
        ("train", {"steps": True}, "valid integer"),
        ("method", {"name": "loar"}, "'lora', 'qlora', 'lora_fp8', 'full'"),
        ("model", {"name": "../escape"}, "pattern"),
    ],
)
def test_contradictions_are_refused(section: str, change: dict[str, Any], says: str) -> None:
    mistaken = raw()
    mistaken[section] |= change
    with pytest.raises(ConfigError, match=section) as caught:
        parse(Workload, mistaken)
    assert says in str(caught.value)


def test_the_key_follows_the_content_and_nothing_else() -> None:
    assert workloads.workload().key == workloads.workload().key
    assert workloads.workload().key != workloads.workload(seed=1).key
    shuffled = {name: raw()[name] for name in reversed(list(raw()))}
    assert parse(Workload, shuffled).key == workloads.workload().key


def test_the_key_of_a_cell_stays_what_it_was() -> None:
    """Evidence is stored under these keys. Never edit the expected value: give a new field a default that means what was always done."""
    assert workloads.workload().key == "f0677a35073c"
    said = raw()
    said["data"] |= {"layout": "auto", "supervise": "answers", "on_bad_row": "error", "system_prompt": None}
    assert parse(Workload, said).key == workloads.workload().key
    assert parse(Workload, raw() | {"data": said["data"] | {"supervise": "everything"}}).key != workloads.workload().key


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layout": "alpca"}, "'alpaca'"),
        ({"layout": "alpaca", "fields": {"prompt": "q", "completion": "a"}}, "set one to null or auto"),
        ({"layout": "text", "system_prompt": "Be brief."}, "data.system_prompt has no place in plain text"),
        ({"system_prompt": " "}, "should match pattern"),
        ({"supervise": "last"}, "'last_answer'"),
        ({"path": {"a": 1}}, "expected a file, a folder, a glob, or a list of these with weights"),
        ({"path": ["a", {"path": "b", "weight": -1}]}, "path.1.weight: got -1"),
    ],
)
def test_values_of_data_that_do_not_agree_are_refused(change: dict[str, Any], says: str) -> None:
    given = {"name": "mine", "source": "jsonl", "sequence_length": 8, "path": "a", **change}
    with pytest.raises(ConfigError) as caught:
        parse(Data, given, at="data")
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_is_never_zero_and_peaks_after_the_warm_up(schedule: str) -> None:
    train = workloads.workload(steps=10, warmup_steps=4, schedule=schedule).train
    rates = [train.learning_rate_at(step) for step in range(10)]
    assert all(rate > 0 for rate in rates)
    assert rates[:4] == pytest.approx([0.00025, 0.0005, 0.00075, 0.001])
    assert rates[4] == pytest.approx(train.learning_rate)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_the_cosine_is_the_cosine() -> None:
    train: Train = workloads.workload(steps=10, warmup_steps=2, schedule="cosine").train
    assert train.learning_rate_at(6) == pytest.approx(0.5 * train.learning_rate)
    assert train.learning_rate_at(9) == pytest.approx(0.5 * train.learning_rate * (1 + math.cos(math.pi * 7 / 8)))


def test_a_run_may_stop_early_on_the_schedule_of_all_its_steps() -> None:
    whole = workloads.workload(steps=10, warmup_steps=4)
    first = whole.first_step
    assert (whole.train.num_steps, first.train.num_steps, first.is_first_step, whole.is_first_step) == (10, 1, True, False)
    assert first.train.learning_rate_at(0) == whole.train.learning_rate_at(0)
    assert first.key != whole.key
    assert workloads.workload(steps=10, warmup_steps=4, stop_after=None).key == whole.key, "records made before the field keep their key"
    assert not workloads.workload(steps=1, warmup_steps=0, stop_after=1).is_first_step, "it is the whole run"
    with pytest.raises(ConfigError, match=r"train: stop_after \(11\) must be at most steps \(10\)"):
        workloads.workload(steps=10, warmup_steps=4, stop_after=11)


def test_a_key_is_kept_by_what_it_names_and_lost_by_a_copy_with_changes() -> None:
    cell = workloads.request(workloads.workload()).cell
    engine, machine = cell.engine, workloads.MACHINE
    kept = [one.key for one in (cell, cell.workload, engine, machine)]
    changed = (
        cell.model_copy(update={"repeat": 1}),
        cell.workload.model_copy(update={"train": cell.workload.train.model_copy(update={"seed": 9})}),
        engine.model_copy(update={"knobs": {}}),
        machine.model_copy(update={"count": 3}),
    )
    for before, after, key in zip((cell, cell.workload, engine, machine), changed, kept, strict=True):
        assert after.key != key == before.key
        fresh = type(after).model_validate_json(after.model_dump_json())
        assert (after.key, after, hash_or_none(after)) == (fresh.key, fresh, hash_or_none(fresh))
        assert "key" not in after.model_dump()
        assert before.model_copy() == before
    assert content_key(cell) == cell.key, "derived from what is there, not kept from elsewhere"


def hash_or_none(spec: Spec) -> int | None:
    """Specs that hold dictionaries have no hash."""
    try:
        return hash(spec)
    except TypeError:
        return None
