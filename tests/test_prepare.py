"""The door prepare: everything made once, found the second time without torch, and every failure a message."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from harness import prepare as door
from harness.data.counts import DataCounts
from harness.data.tokens import TokenFile
from harness.errors import ConfigError, DataError, StoreError
from harness.places import Prepared, PrepareRequest
from harness.spec import parse
from harness.weights import adapter_sha256, fingerprint
from harness.weights.base_model import Base
from tests.real_files import ROOT, SAMPLE, conf, model, request, workload

BAN = "import sys; sys.modules.update(torch=None, transformers=None, peft=None, tokenizers=None, rich=None)"


def read(path: Path) -> Prepared:
    return parse(Prepared, json.loads(path.read_text()))


def written(folder: Path, asked: PrepareRequest) -> str:
    path = folder / "request.json"
    path.write_text(asked.model_dump_json())
    return str(path)


def test_everything_is_made_and_then_found_without_torch(tmp_path: Path, cache: Path) -> None:
    asked = written(tmp_path, request(workload(), cache, tmp_path / "prepared.json"))
    assert door.main([asked]) == 0
    made = read(tmp_path / "prepared.json")
    tokens = TokenFile.open(Path(made.tokens))
    assert len(tokens.held_out) == 64
    assert made.data is not None
    assert made.data.rows == len(SAMPLE.read_text().splitlines())
    assert (made.data.samples_train, made.data.samples_held_out) == (len(tokens.train), 64)
    assert made.adapter_init_sha256 == adapter_sha256(Path(made.adapter_init or ""))
    assert made.notes[0] == "base weights: random, seed 0"
    assert made.notes[1] == "tokenizer: package:harness/data/tokenizers/tiny, not the weights' own"
    assert made.notes[2].startswith("data (prompt_completion, found by itself): 2,724 rows, ")
    assert (Path(made.base) / "tokenizer.json").is_file()
    (tmp_path / "prepared.json").unlink()
    code = f"{BAN}; from harness.prepare import main; sys.exit(main(['{asked}']))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr, found.stdout) == (0, "", f"{made.notes[2]}\n")
    assert read(tmp_path / "prepared.json") == made


def test_the_same_workload_makes_the_same_bytes_in_another_cache(tmp_path: Path, cache: Path) -> None:
    first = door.prepare(request(workload(), cache, tmp_path / "x"))
    second = door.prepare(request(workload(), tmp_path / "other", tmp_path / "x"))
    assert (second.base_sha256, second.adapter_init_sha256) == (first.base_sha256, first.adapter_init_sha256)
    assert Path(second.tokens).read_bytes() == Path(first.tokens).read_bytes()


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"name": "other"}, True),
        ({"sequence_length": 64}, False),
        ({"supervise": "everything"}, False),
        ({"system_prompt": "Be brief."}, False),
        ({"path": [{"path": "package:harness/data/samples/python_docs.jsonl", "weight": 2.0}]}, False),
        ({"held_out_fraction": 0.5}, False),
    ],
)
def test_tokens_are_made_again_only_for_what_matters(tmp_path: Path, cache: Path, changes: dict[str, Any], same: bool) -> None:
    first = door.prepare(request(workload(), cache, tmp_path / "x"))
    second = door.prepare(request(workload(data=conf("data", "python_docs", **changes)), cache, tmp_path / "x"))
    assert (second.tokens == first.tokens) is same


def test_the_place_of_a_file_comes_from_the_sources(tmp_path: Path, cache: Path) -> None:
    copied = tmp_path / "mine.jsonl"
    copied.write_bytes(SAMPLE.read_bytes())
    data = conf(
        "data",
        "jsonl",
        path="mine.jsonl",
        sha256=fingerprint(copied, cache),
        sequence_length=512,
        held_out_fraction=0.1,
        held_out_samples=64,
    )
    made = door.prepare(request(workload(data=data), cache, tmp_path / "x", data=(str(copied),)))
    assert made.tokens == door.prepare(request(workload(), cache, tmp_path / "x")).tokens
    copied.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"mine.jsonl: the file changed since the run was planned"):
        door.prepare(request(workload(data=data), cache, tmp_path / "x", data=(str(copied),)))


def test_dense_data_and_full_fine_tuning_need_neither_file_nor_adapter(tmp_path: Path, cache: Path) -> None:
    data = conf("data", "dense", num_samples=3, sequence_length=16)
    made = door.prepare(request(workload(data=data, method=conf("method", "full")), cache, tmp_path / "x"))
    assert (made.adapter_init, made.adapter_init_sha256) == (None, None)
    tokens = TokenFile.open(Path(made.tokens))
    assert [len(sample) for sample in tokens.train] == [16, 16, 16]
    assert len(tokens.held_out) == 0


def test_damaged_entries_of_the_cache_are_made_again(tmp_path: Path, cache: Path) -> None:
    asked = request(workload(data=conf("data", "dense", num_samples=2, sequence_length=9)), cache, tmp_path / "x")
    first = Path(door.prepare(asked).tokens)
    first.unlink()
    assert Path(door.prepare(asked).tokens).is_file()
    for entry in (cache / "tokens" / "index").iterdir():
        if json.loads(entry.read_text())["sha256"] == first.stem:
            entry.write_text("{")
    assert door.prepare(asked).tokens == str(first)


def test_failures_are_messages_with_exit_code_2(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x", "completion": ""}\n')
    data = conf("data", "jsonl", path=str(bad))
    assert door.main([written(tmp_path, request(workload(data=data), cache, tmp_path / "out.json"))]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"{bad}:1: 'completion' is empty; expected text\nmend these rows, or set data.on_bad_row=skip")
    assert not (tmp_path / "out.json").exists()
    data = conf("data", "jsonl", path="/nowhere.jsonl")
    assert door.main([written(tmp_path, request(workload(data=data), cache, tmp_path / "out.json"))]) == 2
    assert "data.path: there is no file '/nowhere.jsonl'" in capsys.readouterr().err
    assert door.main([]) == 2
    assert "usage: python -m harness.prepare REQUEST.json" in capsys.readouterr().err


def test_what_is_skipped_is_said_and_counted(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"text": "one"}\n{"text": 2}\n{"txt": "three"}\n{"text": "four"}\n')
    data = conf("data", "jsonl", path=str(mine), on_bad_row="skip", held_out_fraction=0.0)
    made = door.prepare(request(workload(data=data), cache, tmp_path / "x"))
    assert made.data is not None
    assert (made.data.rows, made.data.rows_bad, made.data.samples_train, made.data.layouts) == (4, 2, 2, "text")
    said = capsys.readouterr().out
    assert "mine.jsonl:2: 'text' is a number; expected text" in said
    assert "mine.jsonl:3: no field 'text' (found txt; did you mean 'txt'?)" in said
    assert "data (text, found by itself): 4 rows, 2 rows bad, 2 samples train" in said


@pytest.mark.parametrize(
    ("num_rows", "same", "begins"),
    [
        (120, False, "held out: 7, where data.held_out_samples allows 500: data.held_out_fraction=0.05 of 120 rows, "),
        (
            90,
            True,
            "held out: 0, where data.held_out_samples allows 500, so that nothing that is trained on this data can be ",
        ),
    ],
)
def test_few_held_out_are_said_and_recorded(
    num_rows: int, same: bool, begins: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"text": "one" if same else f"row {number}"}) + "\n" for number in range(num_rows)))

    def prepared(**changes: Any) -> Prepared:
        data = conf("data", "jsonl", path=str(mine), **changes)
        made = door.prepare(request(workload(data=data), cache, tmp_path / "x"))
        assert [note for note in made.notes if note.startswith(("data", "held out"))] == capsys.readouterr().out.splitlines()
        return made

    assert prepared(held_out_samples=500).notes[-1].startswith(begins)
    for enough in ({"held_out_samples": 7}, {"held_out_fraction": 0.0}):
        if not same or "held_out_fraction" in enough:
            assert prepared(**enough).notes[-1].startswith("data (text, found by itself)")


def test_a_tokenizer_that_does_not_fit_is_refused_before_a_weight_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("harness.weights.base_model.write_model", lambda *_: pytest.fail("weights were drawn"))
    config = {**(model("mistral_7b").config or {}), "vocab_size": 4000}
    work = workload().model_copy(update={"model": model("mistral_7b").model_copy(update={"config": config})})
    assert door.main([written(tmp_path, request(work, tmp_path / "cache", tmp_path / "out.json"))]) == 2
    assert "the model has 4,000 entries, the tokenizer tiny has 4,096; choose a model.tokenizer that fits" in capsys.readouterr().err


def test_rows_that_cannot_be_used_are_told_before_a_weight_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.weights.base_model.write_model", lambda *_: pytest.fail("weights were drawn"))
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"text": "one"}\n{"text": 2}\n')
    work = workload(data=conf("data", "jsonl", path=str(mine)))
    with pytest.raises(DataError, match=r"mine.jsonl:2: 'text' is a number"):
        door.prepare(request(work, tmp_path / "cache", tmp_path / "out.json"))


def test_rows_are_counted_without_weights_and_their_tokens_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(workload(), tmp_path / "cache", tmp_path / "out.json").model_copy(update={"only_count": True})
    with monkeypatch.context() as patch:
        patch.setattr("harness.weights.base_model.write_model", lambda *_: pytest.fail("weights were drawn"))
        assert door.main([written(tmp_path, asked)]) == 0
    counts = parse(DataCounts, json.loads((tmp_path / "out.json").read_text()))
    assert door.find_count(asked) is None, "the tokenizer of a base that is not there has to be looked at again"
    with monkeypatch.context() as patch:
        patch.setattr(door, "_build", lambda *_: pytest.fail("tokenised twice"))
        made = door.prepare(asked)
    assert made.data == counts == door.find_count(asked)


@pytest.mark.parametrize("name", ["llama3_1b", "mistral_7b", "falcon_7b", "mamba_1b4", "smollm2_135m"])
def test_the_record_says_which_tokenizer_stands_in_for_the_shapes_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = model(name)
    base = Base(tmp_path, "b" * 64, "as the test says", {"vocab_size": 5000}, "c" * 64)
    monkeypatch.setattr(door, "tokenizing", lambda *_: nullcontext(base))
    monkeypatch.setattr(door, "prepare_base", lambda *_: base)
    monkeypatch.setattr(door, "prepare_adapter", lambda *_: None)
    work = workload(data=conf("data", "dense", num_samples=2, sequence_length=9)).model_copy(update={"model": spec})
    made = door.prepare(request(work, tmp_path, tmp_path / "x"))
    own = spec.weights == spec.tokenizer
    assert own is (name == "smollm2_135m")
    assert (f"tokenizer: {spec.tokenizer}, not the weights' own" in made.notes) is not own


def test_a_full_disk_is_a_message(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("harness.data.write.TokenFileWriter.finish", full)
    with pytest.raises(StoreError, match=r"cannot write the token file \(No space left on device\); free space there"):
        door.prepare(request(workload(data=conf("data", "dense", num_samples=5, sequence_length=31)), cache, tmp_path / "x"))


@pytest.mark.parametrize("content", [None, "{", '{"cache": 3}'])
def test_an_unreadable_request_is_a_message(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "request.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError):
        door.read_request(path)


def test_tokenising_shows_progress_on_a_terminal(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setitem(os.environ, "TERM", "xterm")
    door.prepare(request(workload(data=conf("data", "python_docs", sequence_length=100)), cache, tmp_path / "x"))
    assert "tokenising" in screen.getvalue()
