"""docs/data.md tells the truth: its rows are read and tokenised, its commands are composed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import AutoTokenizer

from harness.config import requests
from harness.data.build import build_jsonl, unwatched
from harness.data.counts import DataCounts
from harness.data.tokens import IGNORE, TokenFile
from harness.spec import Data, Layout, Supervise, parse
from tests.real_files import ROOT, TOKENIZER

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"\*\*(\w+)\*\* —.*?```jsonl\n(.*?)```\n```supervised\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"^python -m harness (.*)$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


def test_every_layout_choice_and_count_is_on_the_page() -> None:
    assert [layout for layout, _, _ in EXAMPLES] == [layout for layout in get_args(Layout) if layout != "auto"]
    for name in [*get_args(Supervise), *DataCounts.model_fields.keys() - {"files"}]:
        assert f"`{name}`" in PAGE


@pytest.mark.parametrize(("layout", "rows", "supervised"), EXAMPLES, ids=[layout for layout, _, _ in EXAMPLES])
def test_an_example_is_read_and_supervised_as_it_says(layout: str, rows: str, supervised: str, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "example.jsonl").write_text(rows)
    data = parse(Data, {"name": "d", "source": "jsonl", "path": "example.jsonl", "sequence_length": 512})
    made = TokenFile.open(build_jsonl(data, [tmp_path / "example.jsonl"], tokenizer, tmp_path, unwatched).path)
    assert [file["layout"] for file in made.metadata["counts"]["files"]] == [layout]
    (sample,) = made.train
    first = tokenizer.decode(sample.input_ids[:1]) if layout == "text" else ""
    assert (first + tokenizer.decode(sample.labels[sample.labels != IGNORE])).rstrip("\n") == supervised.rstrip("\n")


def test_an_input_follows_the_instruction_after_an_empty_line(tmp_path: Path, tokenizer: Any) -> None:
    (rows,) = (rows for layout, rows, _ in EXAMPLES if layout == "alpaca")
    row = json.loads(rows)
    (tmp_path / "a").write_text(rows)
    data = parse(Data, {"name": "d", "source": "jsonl", "path": "a", "sequence_length": 512})
    (sample,) = TokenFile.open(build_jsonl(data, [tmp_path / "a"], tokenizer, tmp_path, unwatched).path).train
    assert f"<|im_start|>user\n{row['instruction']}\n\n{row['input']}<|im_end|>" in tokenizer.decode(sample.input_ids)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_the_files_it_says(command: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("chats/a.jsonl", "more/b.jsonl", "more/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    monkeypatch.chdir(tmp_path)
    _, (found,) = requests([*shlex.split(command), f"cache={cache}"], multirun=False)
    assert found.sources.data
    assert all(Path(path).is_file() for path in found.sources.data)


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 3
