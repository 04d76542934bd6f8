"""A variant is a name for knobs: chosen by it, derived from them, and what people see of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.compose import compose_one, plain
from harness.config import requests
from harness.errors import ConfigError
from harness.labels import labels
from harness.plan import plan
from harness.progress import label
from harness.spec import EngineSpec
from tests import records


def ask(cache: Path, *overrides: str, multirun: bool = False) -> list[EngineSpec]:
    return [one.cell.engine for one in requests([*overrides, f"cache={cache}"], multirun=multirun)[1]]


def test_a_variant_is_the_engine_with_other_knobs(cache: Path) -> None:
    usual, named, by_hand = (
        ask(cache, "engine=unsloth"),
        ask(cache, "engine=unsloth/nockpt"),
        ask(cache, "engine=unsloth", "engine.knobs.recompute=none"),
    )
    assert named == by_hand != usual
    assert (usual[0].title, named[0].title) == ("unsloth/default", "unsloth/nockpt")
    assert named[0].name == usual[0].name == "unsloth"


def test_the_name_follows_the_knobs_whatever_was_asked_for(cache: Path) -> None:
    (engine,) = ask(cache, "engine=unsloth/nockpt", "engine.knobs.layout=padded", "engine.knobs.cuda_graphs=true")
    assert engine.title == "unsloth/nockpt+graphs"


def test_variants_are_swept_like_engines(cache: Path) -> None:
    found = ask(cache, "engine=hf,unsloth,unsloth/nockpt+graphs", "engine.knobs.micro_batch=1,2", multirun=True)
    assert [engine.title for engine in found] == [*["hf/default"] * 2, *["unsloth/default"] * 2, *["unsloth/nockpt+graphs"] * 2]


def test_a_misspelt_variant_is_named_with_the_nearest(cache: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'unsloth/nockpt'"):
        ask(cache, "engine=unsloth/nockp")


def test_a_mistake_beside_a_variant_is_the_only_one_named(cache: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ask(cache, "engine=unsloth/nockpt", "train.stepz=3")
    assert str(caught.value) == "train.stepz: unknown key; did you mean 'train.steps'?"


def test_a_key_that_waits_for_its_value_is_not_called_unknown(cache: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ask(cache, "data=jsonl", "data.path=mine.jsonl", "train.epoch=3")
    assert str(caught.value) == "train.epoch: unknown key; did you mean 'train.epochs'?"


def test_an_engine_without_names_keeps_the_keys_of_its_cells() -> None:
    """A field that is new and empty changes no key: what is recorded stays recorded."""
    assert "variant" not in records.record(records.engine("hf")).cell.model_dump(exclude_defaults=True)["engine"]


def test_tables_and_plans_show_the_variant_and_what_differs_beyond_it() -> None:
    def engine(variant: str | None, **knobs: Any) -> EngineSpec:
        return records.engine("hf" if variant is None else "unsloth", **knobs).model_copy(update={"variant": variant})

    shown = labels(
        [
            engine(None),
            engine("default", micro_batch=1),
            engine("default", micro_batch=2),
            engine("nockpt", micro_batch=1, recompute="none"),
        ]
    )
    assert shown == ("hf", "unsloth/default micro_batch=1", "unsloth/default micro_batch=2", "unsloth/nockpt")


def test_a_plan_names_it(cache: Path) -> None:
    _, found = requests(["engine=unsloth/nockpt", "machine=cpu", "model=tiny_llama", f"cache={cache}"], multirun=False)
    assert label(plan(found, [], "stale")[0]).startswith("unsloth/nockpt tiny_llama lora")


def test_its_yaml_says_what_it_changes_and_nothing_else() -> None:
    usual, named = (plain(compose_one([f"engine={option}", "machine=cpu"]))["engine"] for option in ("unsloth", "unsloth/nockpt+padded"))
    assert {**usual, "knobs": {**usual["knobs"], "recompute": "none", "layout": "padded"}} == named
