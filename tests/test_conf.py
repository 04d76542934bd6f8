"""Every YAML composes into a valid request, and every mistake on the command line is named with the nearest right thing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.compose import CONF, compose_all, compose_one, plain, searchpath
from harness.config import Request, Settings, requests
from harness.errors import ConfigError

GROUPS = {
    folder.name: sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    for folder in CONF.iterdir()
    if folder.is_dir()
}
OPTIONS = [f"{group}={option}" for group, options in GROUPS.items() if group != "sweep" for option in options]
FAKES = f"hydra.searchpath=[file://{Path(__file__).resolve().parent / 'fakes' / 'conf'}]"


def ask(cache: Path, *overrides: str, multirun: bool = False) -> tuple[Settings, list[Request]]:
    return requests([*overrides, f"cache={cache}"], multirun=multirun)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_into_a_valid_cell(option: str, cache: Path, tmp_path: Path) -> None:
    extra: list[str] = []
    if option == "data=jsonl":
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        extra = [f"data.path={tmp_path / 'rows.jsonl'}"]
    if option == "model=local":
        (tmp_path / "config.json").write_text("{}")
        extra = [f"model.weights=dir:{tmp_path}"]
    _, (request,) = ask(cache, option, *extra)
    group, _, name = option.partition("=")
    chosen = {
        "engine": request.cell.engine.title if "/" in name else request.cell.engine.name,  # a variant's file is called what its knobs are
        "model": request.cell.workload.model.name,
        "data": request.cell.workload.data.name,
        "method": request.cell.workload.method.name,
    }
    if group in chosen:
        assert chosen[group] == name


@pytest.mark.parametrize("sweep", GROUPS["sweep"])
def test_every_sweep_composes(sweep: str, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    own = "override /data: jsonl" in (CONF / "sweep" / f"{sweep}.yaml").read_text()
    _, found = ask(cache, f"+sweep={sweep}", *([f"data.path={tmp_path / 'rows.jsonl'}"] if own else []))
    assert len(found) > 1
    assert len({request.cell.key for request in found}) == len(found)


def test_the_demo_is_two_engines_three_times_and_the_command_line_goes_first(cache: Path) -> None:
    _, found = ask(cache, "+sweep=demo")
    assert sorted((request.cell.engine.name, request.cell.repeat) for request in found) == [
        ("fused", 0), ("fused", 1), ("fused", 2), ("hf", 0), ("hf", 1), ("hf", 2),
    ]  # fmt: skip
    _, fewer = ask(cache, "+sweep=demo", "repeat=0")
    assert [request.cell.repeat for request in fewer] == [0, 0]


def test_groups_and_values_multiply(cache: Path) -> None:
    _, found = ask(cache, "engine=hf,fused", "train.steps=5,6", "engine.knobs.micro_batch=1,2", multirun=True)
    cells = {(r.cell.engine.name, r.cell.workload.train.steps, r.cell.engine.knobs["micro_batch"]) for r in found}
    assert cells == {(engine, steps, batch) for engine in ("hf", "fused") for steps in (5, 6) for batch in (1, 2)}


def test_a_sweep_composes_once_for_each_choice_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness import compose

    calls: list[Sequence[str]] = []
    original = compose._compose
    monkeypatch.setattr(compose, "_compose", lambda overrides: calls.append(overrides) or original(overrides))
    points = compose_all(["engine=hf,fused", "repeat=range(50)"], multirun=True)
    assert len(points) == 100
    assert len(calls) == 3


def test_lanes_part_a_sweep_and_none_has_one_setting_to_itself(cache: Path) -> None:
    _, whole = ask(cache, "+sweep=grid_hf")
    lanes = [ask(cache, "+sweep=grid_hf", f"lane={number}/8")[1] for number in range(8)]
    assert sorted(request.cell.key for lane in lanes for request in lane) == sorted(request.cell.key for request in whole)
    assert all(len({request.cell.engine.knobs["micro_batch"] for request in lane}) > 1 for lane in lanes)
    with pytest.raises(ConfigError, match="of 8 lanes the first is 0/8 and the last 7/8"):
        ask(cache, "+sweep=grid_hf", "lane=8/8")


def test_the_parts_of_the_grid_are_one_workload(cache: Path) -> None:
    parts = [ask(cache, f"+sweep={name}")[1] for name in ("grid_hf", "grid_hf_packed", "grid_fused", "grid_unsloth")]
    assert len({request.cell.workload.key for part in parts for request in part}) == 1
    assert sum(map(len, parts)) <= 120


def test_own_options_from_a_folder(cache: Path) -> None:
    _, (request,) = ask(cache, FAKES, "engine=faulty", "engine.knobs.behaviour=raise")
    assert request.cell.engine.module == "tests.fakes.faulty"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["engine=hff"], ["engine=hff: there is no such option; did you mean 'hf'?"]),
        (["train.stepz=3"], ["train.stepz: unknown key; did you mean 'train.steps'?"]),
        (["engine=fusd", "modle=x", "train.step=3"], ["did you mean 'fused'", "did you mean 'model'", "did you mean 'train.steps'"]),
        (["train.steps=0", "method.rank=no", "repeat=-1"], ["train.steps: got 0", 'method.rank: got "no"', "repeat: got -1"]),
        (["engine.knobs.micro_batch=0"], ["engine.knobs.micro_batch"]),
        (["+engine.knobs.micro_bach=2", "+train.sed=1"], ["micro_bach: unknown key; did you mean 'micro_batch'?", "train.sed"]),
        (["engine=fused", "engine.knobs.layout=padded"], ["engine.knobs.layout: unknown key; known: base, compile_ahead, compute_dtype,"]),
        (["data=jsonl"], ["data.path: required, but not given; add data.path="]),
        (["data=jsonl", "data.path=absent.jsonl"], ["there is no file 'absent.jsonl'"]),
        (["repeat=1,2"], ["repeat=1,2: several values make a sweep; add -m"]),
        (["repeat=range(0)"], ["repeat=range(0): these are no values"]),
        (["model=local"], ["model.weights: required, but not given; add model.weights="]),
        (["train.seed=99999999999999999999", "train.learning_rate=inf"], ["train.seed: got 9999", "train.learning_rate: got Infinity"]),
        (["nonsense"], ["nonsense: not an override"]),
        (["model.weights=meta-llama/Llama"], ["model.weights", "hub:"]),
        (["plan=maybe"], ["plan: got \"maybe\""]),
        (["runs="], ["runs: got \"\"; string should have at least 1 character"]),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_the_nearest_right_thing(overrides: list[str], says: list[str], cache: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ask(cache, *overrides)
    for line in says:
        assert line in str(caught.value)


def test_where_one_value_is_asked_for_several_are_refused() -> None:
    with pytest.raises(ConfigError, match="engine=hf,fused: several values, and one is asked for"):
        compose_one(["engine=hf,fused"])


@pytest.mark.parametrize("given", ["engine=hf,fused", "+sweep=demo"])
def test_a_command_without_sweeps_does_not_name_the_flag_that_makes_them(given: str) -> None:
    with pytest.raises(ConfigError, match="several values, and one is asked for") as caught:
        requests([given], multirun=None)
    assert "-m" not in str(caught.value)
    assert compose_all(["+sweep=demo", "engine=hf", "repeat=0"], multirun=None)


@pytest.mark.parametrize("given", ["engine=best,hf", "engine=hf,best", "engine=choice(hf, best)"])
def test_the_best_is_none_of_several(cache: Path, given: str) -> None:
    with pytest.raises(ConfigError, match=r"^engine=.*: engine=best cannot be one of several values; run it by itself") as caught:
        ask(cache, given, multirun=True)
    assert "no such option" not in str(caught.value)


def test_a_folder_of_own_options_has_to_be_there(tmp_path: Path) -> None:
    assert searchpath(tmp_path) == f"hydra.searchpath=[file://{tmp_path}]"
    with pytest.raises(ConfigError, match=r"--config-dir .*absent: there is no such folder"):
        searchpath(tmp_path / "absent")


def test_mistakes_of_a_sweep_are_each_reported_once(cache: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ask(cache, "repeat=range(4)", "train.steps=0,5", "method.rank=0", multirun=True)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(set(lines)) == 2


def test_a_key_swept_but_unknown_is_named(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'train\.steps'"):
        ask(cache, "train.stepz=1,2", multirun=True)


def test_the_content_decides_not_the_place(cache: Path, tmp_path: Path) -> None:
    keys = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        _, (request,) = ask(cache, "data=jsonl", f"data.path={tmp_path / folder / 'rows.jsonl'}")
        keys.append(request.cell.key)
        assert str(tmp_path) not in request.cell.model_dump_json()
        assert request.sources.data == (str(tmp_path / folder / "rows.jsonl"),)
    (tmp_path / "b" / "rows.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    _, (changed,) = ask(cache, "data=jsonl", f"data.path={tmp_path / 'b' / 'rows.jsonl'}")
    assert keys[0] == keys[1] != changed.cell.key


def test_the_printed_configuration_has_no_hydra_in_it() -> None:
    config = plain(compose_one([]))
    assert "hydra" not in config
    assert config["engine"]["name"] == "hf"


def test_a_value_may_be_valid_only_under_a_choice_that_is_swept(cache: Path) -> None:
    _, found = ask(cache, "model=tiny_llama,llama3_1b", "model.config.num_hidden_layers=3", multirun=True)
    assert [(request.cell.workload.model.config or {})["num_hidden_layers"] for request in found] == [3, 3]
    with pytest.raises(ConfigError, match=r"model\.config\.num_hidden_layers: unknown key; model\.config has no keys here"):
        ask(cache, "model=smollm2_135m", "model.config.num_hidden_layers=3")
