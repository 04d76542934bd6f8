"""The token file of a whole data source: the split, the counts, dense data, and the shipped sample."""

from __future__ import annotations

import collections
import hashlib
import json
import re
import runpy
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.data.build import build_dense, build_jsonl, one_by_one
from harness.data.dense import dense_samples
from harness.data.rows import Message, Row
from harness.data.split import SplitSamples, is_held_out, split_samples
from harness.data.tokenise import Tokenised
from harness.data.tokens import IGNORE, Sample, TokenFile
from harness.errors import DataError
from harness.spec import Data
from tests.real_files import ROOT, SAMPLE, TOKENIZER


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


def item(text: str, *, labels: int = 1, truncated: int = 0) -> Tokenised:
    ids = np.frombuffer(f"{text:8}".encode(), dtype=np.uint8).astype(np.int32)
    targets = np.full_like(ids, IGNORE)
    targets[len(ids) - labels :] = 1
    return Tokenised(Row(1, (Message("user", text), Message("assistant", "x"))), Sample(ids, targets), truncated)


def texts(samples: list[Sample]) -> list[str]:
    return ["".join(chr(token) for token in sample.input_ids).rstrip() for sample in samples]


@given(st.lists(st.integers(0, 40).map(str)), st.floats(0, 0.99), st.integers(1, 5))
def test_duplicates_land_on_one_side_and_nothing_is_lost(numbers: list[str], fraction: float, most: int) -> None:
    split = split_samples([item(number) for number in numbers], fraction=fraction, most_held_out=most)
    train, held_out = texts(split.train), texts(split.held_out)
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) + split.counts["held_out_unused"] == len(numbers) == split.counts["rows"]
    assert len(held_out) <= most
    assert train == [number for number in numbers if number in set(train)]
    hashes = [item(text).row.digest() for text in held_out]
    assert hashes == sorted(hashes)
    whole = collections.Counter(numbers)
    assert all(train.count(text) == whole[text] for text in set(train))


def test_the_side_of_a_row_does_not_depend_on_the_others() -> None:
    def held(numbers: range) -> set[str]:
        return set(texts(split_samples([item(str(n)) for n in numbers], fraction=0.3, most_held_out=1000).held_out))

    assert held(range(200)) == held(range(400)) & {str(n) for n in range(200)}
    assert 80 < len(held(range(400))) < 160


@pytest.mark.parametrize(("digest", "fraction", "held"), [(bytes(32), 0.0, False), (bytes(32), 0.001, True), (b"\xff" * 32, 0.999, False)])
def test_the_fraction_is_a_bound_on_the_hash(digest: bytes, fraction: float, held: bool) -> None:
    assert is_held_out(digest, fraction) is held


def test_samples_without_a_label_are_dropped_and_counted() -> None:
    split: SplitSamples = split_samples(
        [item("a"), item("b", labels=0, truncated=3), item("c", truncated=2)], fraction=0.0, most_held_out=1
    )
    assert texts(split.train) == ["a", "c"]
    expected = {
        "rows": 3,
        "samples_truncated": 2,
        "tokens_truncated": 5,
        "samples_dropped": 1,
        "train": 2,
        "held_out": 0,
        "held_out_unused": 0,
    }
    assert split.counts == expected


def data(**changes: Any) -> Data:
    return Data(**{"name": "d", "source": "jsonl", "sequence_length": 64, "path": "x", "held_out_fraction": 0.1, **changes})


def test_a_jsonl_file_becomes_a_token_file_with_its_counts(tmp_path: Path, tokenizer: Any) -> None:
    made = TokenFile.open(build_jsonl(data(sequence_length=40, held_out_samples=16), SAMPLE, tokenizer, tmp_path, one_by_one))
    facts = made.metadata
    assert facts["layout"] == "prompt/completion"
    assert facts["chat_template"] is True
    rows = len(SAMPLE.read_text().splitlines())
    assert facts["train"] + facts["held_out"] + facts["held_out_unused"] + facts["samples_dropped"] == facts["rows"] == rows
    assert (len(made.train), len(made.held_out)) == (facts["train"], 16)
    assert facts["longest"] == 40
    assert facts["samples_truncated"] > 0
    assert facts["tokens_input"] == sum(len(sample) for sample in made.train)
    assert facts["tokens_loss"] == sum(sample.num_labels for sample in made.train)
    assert min(sample.num_labels for sample in made.train) > 0


def test_the_same_rows_make_the_same_file_wherever_they_lie(tmp_path: Path, tokenizer: Any) -> None:
    copied = tmp_path / "other name.jsonl"
    copied.write_bytes(SAMPLE.read_bytes())
    first = build_jsonl(data(), SAMPLE, tokenizer, tmp_path / "a", one_by_one)
    assert build_jsonl(data(name="e", path="y"), copied, tokenizer, tmp_path / "b", one_by_one).name == first.name


def test_nothing_left_to_train_on_is_an_error_with_the_counts(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"python_docs.jsonl: no sample is left to train on, of [\d]+ rows \(.*samples dropped"):
        build_jsonl(data(sequence_length=4), SAMPLE, tokenizer, tmp_path, one_by_one)


def test_dense_samples_are_exact_seeded_and_below_the_vocabulary() -> None:
    train, held_out = dense_samples(20, 33, 100, 0.0)
    assert (len(train), held_out) == (20, [])
    tokens = np.concatenate([sample.input_ids for sample in train])
    assert tokens.min() >= 0
    assert tokens.max() == 99
    assert {len(sample) for sample in train} == {33}
    assert {sample.num_labels for sample in train} == {32}
    assert len({sample.input_ids.tobytes() for sample in train}) == 20
    assert hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest() == "40b117e8a8f33c7bcf050c59cfe7e5e97d1bdaea475e7d14bb21fb980518542e"


def test_more_dense_samples_begin_with_the_fewer() -> None:
    fewer, more = dense_samples(3, 8, 50, 0.0)[0], dense_samples(5, 8, 50, 0.0)[0]
    assert [sample.input_ids.tolist() for sample in fewer] == [sample.input_ids.tolist() for sample in more[:3]]


def test_a_dense_token_file_may_hold_rows_out(tmp_path: Path) -> None:
    spec = data(source="dense", path=None, num_samples=60, held_out_fraction=0.5, held_out_samples=5)
    made = TokenFile.open(build_dense(spec, 64, tmp_path))
    assert len(made.held_out) == made.metadata["held_out"] == 5
    assert 10 < len(made.train) == made.metadata["train"] < 50
    assert made.metadata["loss_fraction"] == pytest.approx(63 / 64, abs=1e-4)


def test_dense_samples_of_one_token_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"raise data.num_samples, or data.sequence_length to at least 2"):
        build_dense(data(source="dense", path=None, num_samples=4, sequence_length=1), 64, tmp_path)


def test_the_shipped_sample_is_short_distinct_and_clean(tokenizer: Any) -> None:
    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    assert len(rows) >= 1000
    assert all(row.keys() == {"prompt", "completion"} for row in rows)
    for field in ("prompt", "completion"):
        assert len({row[field] for row in rows}) == len(rows)
    assert statistics.median(len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in rows) < 80
    assert not any(re.search(r"0x[0-9a-f]{6}|/(home|root|usr)/", row["completion"]) for row in rows)
    assert "PSF-2.0" in SAMPLE.with_name("python_docs.README.md").read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in SAMPLE.with_name("LICENSE.python_docs").read_text()


def test_the_sample_script_still_makes_rows_like_the_shipped_ones() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "build_python_docs_sample.py"))
    made = {row["prompt"]: row["completion"] for row in script["_deduplicated"](script["_rows"]())}
    shipped = {row["prompt"]: row["completion"] for row in map(json.loads, SAMPLE.read_text().splitlines())}
    assert sum(made.get(prompt) == completion for prompt, completion in shipped.items()) > 0.7 * len(shipped)


def test_the_tokenizer_script_makes_the_shipped_tokenizer(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "train_tiny_tokenizer.py"))
    script["main"].__globals__["FOLDER"] = tmp_path
    script["main"]()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((TOKENIZER / name).read_text())


def test_the_tiny_tokenizer_is_fit_for_peers(tokenizer: Any) -> None:
    assert len(tokenizer) == 4096
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert max(tokenizer.all_special_ids) < 4096
