"""The command beside every row makes the same cell again: composed by Hydra, compared value by value."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.compose import compose_all, plain
from harness.config import requests
from harness.engine import Machine, variant
from harness.engine import load as load_engine
from harness.errors import ConfigError
from harness.report.reproduce import GROUPS, command, hydra_value, newer_knobs, options
from harness.spec import Cell, Data, EngineSpec, Fields, parse
from harness.store import load
from tests import records

KNOWN = options()


def words(text: str) -> list[str]:
    python, dash_m, harness, *rest = shlex.split(text)
    assert (python, dash_m, harness) == ("python", "-m", "harness")
    return rest


def composed(cell: Cell, machine: Machine = records.CPU) -> dict[str, Any]:
    ((_, config),) = compose_all(words(command(cell, machine, [cell.repeat], KNOWN)), multirun=False)
    return plain(config)


def of_options(**chosen: str) -> Cell:
    """A cell made of options of conf/ as they are, interpolations resolved."""
    own = ["model.weights=dir:mine"] if chosen.get("model") == "local" else []
    ((_, config),) = compose_all([f"{group}={name}" for group, name in chosen.items()] + [*own, "machine=cpu"], multirun=False)
    raw = plain(config)
    assert raw["train"].pop("epochs") is None
    engine = {key: raw["engine"][key] for key in EngineSpec.model_fields if key != "variant"}
    engine["variant"] = variant(load_engine(parse(EngineSpec, engine)), engine["knobs"])
    if raw["data"].get("path") is None and raw["data"]["source"] == "jsonl":
        raw["data"]["path"] = "my.jsonl"
    return parse(Cell, {"workload": {key: raw[key] for key in ("model", "data", "method", "train")}, "engine": engine, "repeat": 0})


def assert_same(cell: Cell, machine: Machine = records.CPU) -> None:
    raw = composed(cell, machine)
    assert raw["repeat"] == cell.repeat
    for group in GROUPS:
        spec = cell.engine if group == "engine" else getattr(cell.workload, group)
        again = parse(type(spec), {key: raw[group][key] for key in type(spec).model_fields if key in raw[group]})
        wanted = spec.model_dump(exclude={"fingerprint", "sha256", "variant"})
        assert again.model_dump(exclude={"fingerprint", "sha256", "variant"}) == wanted
    assert raw["machine"]["device"] == machine.device
    assert raw["machine"]["memory_cap_gib"] == machine.memory_cap_gib


def changed(cell: Cell, group: str, **update: Any) -> Cell:
    workload = cell.workload.model_copy(update={group: getattr(cell.workload, group).model_copy(update=update)})
    return cell.model_copy(update={"workload": workload})


@pytest.mark.parametrize("engine", sorted(KNOWN["engine"]))
def test_a_cell_of_plain_options_needs_few_words(engine: str) -> None:
    rest = {"model": "smollm2_135m", "data": "python_docs", "method": "lora", "train": "short"}
    cell, base = of_options(engine=engine, **rest), engine.partition("/")[0]
    text = command(cell, records.CPU, [0], KNOWN)
    is_base = cell == of_options(engine=base, **rest)  # a variant that is what its engine does by itself needs no name
    assert text.startswith(f"python -m harness engine={base if is_base else engine} ")
    for choice in ("model=smollm2_135m", "method=lora", "data=python_docs", "train=short", "machine=cpu", "repeat=0"):
        assert choice in words(text)
    assert len([word for word in words(text) if word.startswith("engine.")]) <= 3  # what follows the machine
    assert len([word for word in words(text) if "." in word]) <= len(cell.engine.knobs)
    assert_same(cell)


@pytest.mark.parametrize("model", sorted(KNOWN["model"]))
@pytest.mark.parametrize("method", sorted(KNOWN["method"]))
def test_every_model_and_method_comes_back(model: str, method: str) -> None:
    assert_same(of_options(engine="hf", model=model, data="dense", method=method, train="default"))


def test_values_that_differ_are_overridden() -> None:
    cell = of_options(engine="hf", model="tiny_llama", data="python_docs", method="lora", train="short")
    cell = changed(cell, "train", steps=77, learning_rate=3.5e-5, max_grad_norm=None, schedule="linear")
    cell = changed(cell, "data", supervise="everything", fields=Fields(prompt="a question", completion="it's"), held_out_samples=5)
    cell = changed(cell, "method", targets=("q_proj",), alpha=7.0)
    cell = changed(cell, "model", config={**(cell.workload.model.config or {}), "hidden_size": 128, "extra": {"a": [1, "b c"]}})
    knobs = {**cell.engine.knobs, "micro_batch": 16}
    engine = cell.engine.model_copy(update={"knobs": knobs, "processes": 2, "environment": {"OMP_NUM_THREADS": "2", "EMPTY": ""}})
    cell = cell.model_copy(update={"engine": engine, "repeat": 4})
    assert_same(cell, Machine(**{**records.CPU.model_dump(), "memory_cap_gib": 4}))


def test_a_dropped_key_is_deleted_and_real_weights_replace_a_config() -> None:
    cell = of_options(engine="hf", model="tiny_llama", data="python_docs", method="lora", train="short")
    config = {key: value for key, value in (cell.workload.model.config or {}).items() if key != "pad_token_id"}
    assert_same(changed(cell, "model", config=config))
    assert_same(changed(cell, "model", config=None, weights="dir:Llama", tokenizer="dir:Llama"))


def without(cell: Cell, *knobs: str) -> Cell:
    """``cell`` as an older engine recorded it, before it had ``knobs``."""
    kept = {name: value for name, value in cell.engine.knobs.items() if name not in knobs}
    return cell.model_copy(update={"engine": cell.engine.model_copy(update={"knobs": kept})})


def test_a_record_older_than_some_knobs_gives_a_command_that_composes_today() -> None:
    """Every knob has a value in conf/, so one cannot be deleted: it stays as it is, which leaves an engine as it was."""
    cell = of_options(engine="fused", model="tiny_llama", data="dense", method="lora", train="short")
    old = without(cell, "base", "compile_ahead", "replay")
    assert newer_knobs(old.engine, KNOWN) == ("replay", "base", "compile_ahead")
    assert newer_knobs(cell.engine, KNOWN) == ()
    again = composed(old)["engine"]
    assert again["knobs"] == cell.engine.knobs
    assert not any(word.startswith("~") for word in words(command(old, records.CPU, [0], KNOWN)))


def test_no_variant_is_named_that_gives_such_a_knob_another_value() -> None:
    """``fused/sharded`` is nearer to ``replay: false`` than ``fused`` is, but it would shard a base that was not."""
    cell = of_options(engine="fused", model="tiny_llama", data="dense", method="lora", train="short")
    old = without(cell, "base")
    assert old.engine.knobs["replay"] is False
    said = words(command(old, records.CPU, [0], KNOWN))
    assert "engine=fused" in said
    assert "engine.knobs.replay=false" in said
    named = without(of_options(engine="fused/within-17.7"), "base")
    assert "engine=fused/within-17.7" in words(command(named, records.CPU, [0], KNOWN)), "a variant that leaves it alone is"


def test_the_command_beside_every_committed_record_composes_today() -> None:
    """One record of each engine and each set of knobs that it had in its time."""
    results = load(Path(__file__).resolve().parents[2] / "results")
    by_knobs = {(one.record.cell.engine.name, frozenset(one.record.cell.engine.knobs)): one.record for one in results.stored}
    assert len({name for name, _ in by_knobs}) >= 6
    for record in by_knobs.values():
        spec = record.cell.engine
        again = composed(record.cell, record.machine)["engine"]
        parse(load_engine(spec).Knobs, again["knobs"], at=f"engine.knobs of {spec.title}")
        assert spec.knobs.items() <= again["knobs"].items()


def test_an_engine_that_conf_does_not_know_is_named_all_the_same() -> None:
    cell = Cell(workload=records.workload(), engine=records.engine("peer"), repeat=1)
    said = words(command(cell, records.GPU, [1], KNOWN))
    assert {"engine=peer", "++engine.knobs={compute_dtype:float32,micro_batch:4}", "machine=cuda", "repeat=1"} <= set(said)


def test_without_conf_every_value_is_said() -> None:
    cell = of_options(engine="hf", model="smollm2_135m", data="python_docs", method="lora", train="short")
    said = words(command(cell, records.CPU, [0], {}))
    assert {"++train.steps=12", "++method.rank=16", "engine=hf"} <= set(said)
    assert not any(word.startswith("train=") for word in said)


def test_hashes_of_what_conf_names_are_not_overridden_and_a_local_file_keeps_the_options_folder() -> None:
    cell = of_options(engine="hf", model="smollm2_135m", data="python_docs", method="lora", train="short")
    cell = changed(changed(cell, "data", sha256="0" * 64), "model", fingerprint="1" * 64)
    assert "sha256" not in command(cell, records.CPU, [0], KNOWN)
    assert "fingerprint" not in command(cell, records.CPU, [0], KNOWN)
    local = {**KNOWN, "data": {"python_docs": {**KNOWN["data"]["python_docs"], "path": "folder/docs.jsonl"}}}
    assert "data.path" not in command(changed(cell, "data", path="docs.jsonl"), records.CPU, [0], local)


def test_a_file_that_lay_elsewhere_is_told_by_its_content_and_makes_the_same_cell(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "a", "completion": "b"}\n')
    asked = ["engine=hf", "model=tiny_llama", "data=jsonl", "data.path=mine.jsonl", "train=short", "machine=cpu", f"cache={cache}"]
    _, (request,) = requests(asked, multirun=False)
    sha = hashlib.sha256(mine.read_bytes()).hexdigest()
    said = words(command(request.cell, records.CPU, [0], KNOWN))
    assert f"data.path=[{{path:mine.jsonl,sha256:{sha}}}]" in said
    _, (again,) = requests([*said, f"cache={cache}"], multirun=False)
    assert again.cell == request.cell
    mine.write_text('{"prompt": "a", "completion": "c"}\n')
    with pytest.raises(ConfigError, match=f"'mine.jsonl' is not the file that was asked for: its sha-256 is .*, not {sha}"):
        requests([*said, f"cache={cache}"], multirun=False)


@given(st.text("0123456789abcdef", min_size=64, max_size=64))
def test_a_hash_stays_a_text(sha: str) -> None:
    read = OverridesParser.create().parse_override(f"a.b={hydra_value([{'sha256': sha}])}").value()
    assert read == [{"sha256": sha}]


@pytest.mark.parametrize("sha", ["0" * 64, "1" * 62 + "e5", "1e5" + "a" * 61])
def test_a_hash_that_looks_like_a_number_stays_a_text(sha: str) -> None:
    assert OverridesParser.create().parse_override(f"a={hydra_value(sha)}").value() == sha


def test_the_row_of_a_committed_record_names_the_file_that_its_page_tells_how_to_get() -> None:
    root = Path(__file__).resolve().parents[2]
    stored = [json.loads(path.read_text()) for path in sorted((root / "results").glob("nvidia-*/*gsm8k*/*/*.json"))]
    (file,) = {(raw["cell"]["workload"]["data"]["path"], raw["cell"]["workload"]["data"]["sha256"]) for raw in stored}
    for page in ("docs/peers.md", "conf/sweep/peers_gsm8k.yaml"):
        text = (root / page).read_text(encoding="utf-8")
        assert all(word in text for word in (*file, "github.com/openai/grade-school-math")), page


def test_your_own_file_is_named() -> None:
    data = Data(**{**of_options(engine="hf", data="python_docs").workload.data.model_dump(), "name": "jsonl", "path": "my file.jsonl"})
    cell = of_options(engine="hf")
    cell = cell.model_copy(update={"workload": cell.workload.model_copy(update={"data": data})})
    assert "data.path='my file.jsonl'" in words(command(cell, records.CPU, [0], KNOWN))
    assert_same(cell)


def test_several_repeats_are_a_sweep() -> None:
    cell = of_options(engine="hf")
    said = words(command(cell, records.CPU, [0, 1, 2], KNOWN))
    assert said[0] == "-m"
    assert said[-1] == "repeat=0,1,2"
    assert len(compose_all(said[1:], multirun=True)) == 3


def test_the_shell_sees_nothing_of_a_hostile_value() -> None:
    evil = "$(touch hacked); `id` 'x' \"y\" \\ & | > ~ # !"
    cell = of_options(engine="hf")
    cell = cell.model_copy(update={"engine": cell.engine.model_copy(update={"environment": {"EVIL": evil}})})
    assert composed(cell)["engine"]["environment"] == {"EVIL": evil}


@pytest.mark.parametrize(
    "value", ["${oc.env:HOME}", "a ${x} b", "null", "TRUE", "1e5", "0x10", "", " ", "a,b", "{a:1}", "[1]", "dir:/x y", "it's", "\\'", "a\\"]
)
def test_strings_stay_the_strings_they_are(value: str) -> None:
    cell = changed(of_options(engine="hf"), "data", path=value or "x")
    assert composed(cell)["data"]["path"] == (value or "x")


leaf = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n$", exclude_categories=("Cs",)))
)
keys = st.from_regex(r"[a-z_]{1,5}", fullmatch=True)


@settings(max_examples=200, deadline=None)
@given(st.recursive(leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=5))
def test_hydra_reads_back_what_was_written(value: Any) -> None:
    read = OverridesParser.create().parse_override(f"a.b={hydra_value(value)}").value()
    assert read == value
    assert type(read) is type(value)


def test_data_and_a_model_under_names_of_their_own_are_the_options_that_are_filled_in() -> None:
    data = {"name": "mine", "source": "jsonl", "path": "mine.jsonl", "sequence_length": 512, "held_out_fraction": 0.1}
    cell = Cell(workload=records.workload(model="ours", data=data), engine=records.engine("hf"), repeat=0)
    said = words(command(cell, records.GPU, [0], KNOWN))
    assert {"data=jsonl", "data.name=mine", "data.path=mine.jsonl", "model=local", "model.name=ours"} <= set(said)
    again = composed(cell, records.GPU)
    assert (again["data"]["name"], again["model"]["name"]) == ("mine", "ours")
