"""The token file of a whole data source: the split, the counts, dense data, and the shipped sample."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import runpy
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data.build import REMEDY, Built, build_dense, build_jsonl, unwatched
from harness.data.counts import DataCounts
from harness.data.dense import dense_samples
from harness.data.split import HeldOut, is_held_out, times
from harness.data.tokens import Sample, Split, TokenFile
from harness.errors import DataError
from harness.spec import Data, parse
from tests.real_files import ROOT, SAMPLE, TOKENIZER

quick = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


def data(**changes: Any) -> Data:
    return parse(Data, {"name": "d", "source": "jsonl", "sequence_length": 64, "path": "x", "held_out_fraction": 0.1, **changes})


def write(path: Path, numbers: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps({"prompt": str(number), "completion": "x"}) + "\n" for number in numbers))
    return path


def build(folder: Path, tokenizer: Any, paths: dict[Path, float], **changes: Any) -> Built:
    entries = [{"path": path.name, "weight": weight} for path, weight in paths.items()]
    return build_jsonl(data(path=entries, **changes), list(paths), tokenizer, folder, unwatched)


def texts(tokenizer: Any, split: Split | list[Sample]) -> list[str]:
    """The prompts of samples, in their order."""
    return [tokenizer.decode(sample.input_ids).split("<|im_end|>")[0].rpartition("\n")[2] for sample in split]


@pytest.mark.parametrize(("digest", "fraction", "held"), [(bytes(32), 0.0, False), (bytes(32), 0.001, True), (b"\xff" * 32, 0.999, False)])
def test_the_fraction_is_a_bound_on_the_hash(digest: bytes, fraction: float, held: bool) -> None:
    assert is_held_out(digest, fraction) is held


@quick
@given(st.lists(st.integers(0, 40)), st.lists(st.integers(0, 40), max_size=9), st.floats(0, 0.99), st.integers(1, 5), st.floats(0.05, 3.3))
def test_every_row_is_in_one_place_and_duplicates_on_one_side(
    tokenizer: Any, first: list[int], second: list[int], fraction: float, most: int, weight: float
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = {write(folder / "a", [-1, *first]): 1.0, write(folder / "b", [-2, *second]): weight}
        try:
            built = build(folder, tokenizer, paths, held_out_fraction=fraction, held_out_samples=most, layout="prompt_completion")
        except DataError as error:
            assert "no sample is left to train on" in str(error)  # noqa: PT017  # all were drawn to the other side
            return
        made = TokenFile.open(built.path)
        train, held_out = texts(tokenizer, made.train), texts(tokenizer, made.held_out)
    counts = DataCounts(**{**made.metadata["counts"], "files": ()})
    assert not set(train) & set(held_out)
    assert len(held_out) == counts.samples_held_out <= most
    assert len(train) == counts.samples_train
    rows = [*map(str, [-1, *first]), *map(str, [-2, *second])]
    placed = counts.samples_held_out + counts.samples_unused + counts.samples_left_out + counts.samples_train - counts.samples_repeated
    assert counts.rows == len(rows) == placed
    once = train[: made.metadata["counts"]["files"][0]["samples_train"]]
    assert once == [row for row in rows[: len(first) + 1] if row in set(once)]
    for row in set(train):
        assert train.count(row) - once.count(row) in {
            rows[len(first) + 1 :].count(row) * n for n in (math.floor(weight), math.ceil(weight))
        }


def test_the_side_of_a_row_does_not_depend_on_the_others(tmp_path: Path, tokenizer: Any) -> None:
    def held(count: int) -> set[str]:
        paths = {write(tmp_path / "a", range(count)): 1.0}
        return set(
            texts(tokenizer, TokenFile.open(build(tmp_path, tokenizer, paths, held_out_fraction=0.3, held_out_samples=999).path).held_out)
        )

    assert held(200) == held(400) & {str(n) for n in range(200)}
    assert 80 < len(held(400)) < 160


def test_a_broken_weight_takes_its_share_of_the_rows_always_the_same(tmp_path: Path, tokenizer: Any) -> None:
    def trained(count: int, weight: float) -> Counter[str]:
        paths = {write(tmp_path / "a", range(count)): weight}
        return Counter(texts(tokenizer, TokenFile.open(build(tmp_path, tokenizer, paths, held_out_fraction=0.0).path).train))

    quarter, more = trained(400, 0.25), trained(400, 2.25)
    assert 70 < quarter.total() < 130
    assert more == {str(n): 2 + quarter[str(n)] for n in range(400)}
    assert trained(200, 0.25) == {row: 1 for row in quarter if int(row) < 200}
    held_out = {n for n in range(10**4) if is_held_out(hashlib.sha256(str(n).encode()).digest(), 0.5)}
    again = {n for n in range(10**4) if times(hashlib.sha256(str(n).encode()).digest(), 0.5)}
    assert 2300 < len(held_out & again) < 2700, "the two choices have nothing to do with each other"


def test_a_row_held_out_is_trained_on_from_no_file(tmp_path: Path, tokenizer: Any) -> None:
    paths = {write(tmp_path / "a", range(100)): 1.0, write(tmp_path / "b", range(50, 150)): 3.0}
    made = TokenFile.open(build(tmp_path, tokenizer, paths, held_out_fraction=0.3, held_out_samples=99).path)
    train, held_out = texts(tokenizer, made.train), Counter(texts(tokenizer, made.held_out))
    assert not set(train) & set(held_out)
    assert {number for number, count in held_out.items() if count == 2} <= {str(n) for n in range(50, 100)}
    assert max(held_out.values()) == 2, "held-out rows are not repeated by weights"
    assert max(Counter(train).values()) == 4


def test_the_lowest_digests_are_kept_in_their_order() -> None:
    kept = HeldOut(3)
    for place, digest in enumerate([b"\x09", b"\x03", b"\x05", b"\x03", b"\x07"]):
        kept.add(digest * 32, Sample(np.array([place], np.int32), np.array([place], np.int32)))
    assert [sample.input_ids[0] for sample in kept.samples()] == [1, 3, 2]
    assert (len(kept), kept.num_unused) == (3, 2)


def test_a_jsonl_file_becomes_a_token_file_with_its_counts(tmp_path: Path, tokenizer: Any) -> None:
    made = TokenFile.open(build(tmp_path, tokenizer, {SAMPLE: 1.0}, sequence_length=40, held_out_samples=16).path)
    counts = made.metadata["counts"]
    assert [file["layout"] for file in counts["files"]] == ["prompt_completion"]
    assert made.metadata["chat_template"] is True
    rows = len(SAMPLE.read_text().splitlines())
    assert (
        counts["samples_train"] + counts["samples_held_out"] + counts["samples_unused"] + counts["samples_dropped"]
        == counts["rows"]
        == rows
    )
    assert (len(made.train), len(made.held_out)) == (counts["samples_train"], 16)
    assert made.metadata["longest"] == 40
    assert counts["samples_truncated"] > 0
    assert counts["tokens_truncated"] > counts["samples_truncated"]
    assert counts["tokens_input"] == sum(len(sample) for sample in made.train)
    assert counts["tokens_loss"] == sum(sample.num_labels for sample in made.train)
    assert min(sample.num_labels for sample in made.train) > 0


def test_the_same_rows_make_the_same_file_wherever_they_lie(tmp_path: Path, tokenizer: Any) -> None:
    copied = tmp_path / "other name.jsonl"
    copied.write_bytes(SAMPLE.read_bytes())
    first = build(tmp_path / "a", tokenizer, {SAMPLE: 1.0}).path
    assert build(tmp_path / "b", tokenizer, {copied: 1.0}, name="e").path.name == first.name


def test_files_of_several_layouts_are_read_together(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat").write_text('{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "x"}]}\n')
    (tmp_path / "talk").write_text('{"conversations": [{"from": "human", "value": "2"}, {"from": "gpt", "value": "x"}]}\n')
    paths = {tmp_path / "chat": 1.0, tmp_path / "talk": 2.0, write(tmp_path / "pair", "3"): 1.0}
    made = TokenFile.open(build(tmp_path, tokenizer, paths, held_out_fraction=0.0).path)
    assert texts(tokenizer, made.train) == ["1", "2", "2", "3"]
    assert [file["layout"] for file in made.metadata["counts"]["files"]] == ["messages", "sharegpt", "prompt_completion"]
    with pytest.raises(DataError, match=r"^talk:1: no field 'messages' \(found conversations\).*\npair:1: no field 'messages'"):
        build(tmp_path, tokenizer, paths, layout="messages")


GOOD, BAD, UNMARKABLE = ({"prompt": a, "completion": b} for a, b in (("1", "b"), ("1", ""), ("ret", "urn")))


def test_all_problems_of_all_files_come_at_once_up_to_twenty(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, rows in (("a", [GOOD, BAD]), ("b", [BAD, GOOD] * 30)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        build(tmp_path, tokenizer, {tmp_path / "a": 1.0, tmp_path / "b": 1.0})
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in lines[:3]] == ["a:2", "b:1", "b:3"]
    assert lines[20:] == ["(the first 20 problems; there are more)", REMEDY]


def test_files_of_one_name_are_told_apart(tmp_path: Path, tokenizer: Any) -> None:
    paths = [tmp_path / folder / "train.jsonl" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps(BAD) + "\n")
    with pytest.raises(DataError) as caught:
        build(tmp_path, tokenizer, dict.fromkeys(paths, 1.0))
    told = [line.partition(": ")[0] for line in str(caught.value).splitlines()[:2]]
    assert told == [f"{tmp_path}/a/train.jsonl:1", f"{tmp_path}/b/train.jsonl:1"]


def test_skipped_rows_are_counted_and_the_first_reasons_kept(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # 'return' is one token
    for name, rows in (("a", [GOOD, BAD, UNMARKABLE, GOOD]), ("b", [GOOD])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {tmp_path / "a": 1.0, tmp_path / "b": 1.0}
    built = build(tmp_path, bare, paths, on_bad_row="skip", held_out_fraction=0.0)
    made = TokenFile.open(built.path)
    assert len(made.train) == 3
    assert [(file["rows"], file["rows_bad"]) for file in made.metadata["counts"]["files"]] == [(4, 2), (1, 0)]
    assert [problem[:20] for problem in built.problems] == ["a:2: 'completion' is", "a:3: the end of the "]
    with pytest.raises(DataError, match=r"^a:2: 'completion' is empty; expected text\nmend these rows, or set data.on_bad_row=skip"):
        build(tmp_path, bare, paths, on_bad_row="error")
    (tmp_path / "a").write_text(json.dumps(UNMARKABLE) + "\n")
    with pytest.raises(DataError, match=r"^a:1: the end of the prompt"):
        build(tmp_path, bare, paths, on_bad_row="error")
    with pytest.raises(DataError, match=r"^a: none of its 1 rows can be used; the first: a:1: the end of the prompt"):
        build(tmp_path, bare, paths, on_bad_row="skip")


@pytest.mark.parametrize("layout", ["auto", "text"])
def test_an_empty_file_among_others_is_named(tmp_path: Path, tokenizer: Any, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "a").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"^empty: the file is empty; expected one JSON object a line$"):
        build(tmp_path, tokenizer, {tmp_path / "a": 1.0, tmp_path / "empty": 1.0}, layout=layout, on_bad_row="skip")


def test_nothing_left_to_train_on_is_an_error_with_the_counts(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"python_docs.jsonl: no sample is left to train on \(2,724 rows.*2,724 samples dropped"):
        build(tmp_path, tokenizer, {SAMPLE: 1.0}, sequence_length=4)


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
    made = TokenFile.open(build_dense(spec, 64, tmp_path).path)
    counts = made.metadata["counts"]
    assert len(made.held_out) == counts["samples_held_out"] == 5
    assert 10 < len(made.train) == counts["samples_train"] < 50
    assert counts["samples_train"] + counts["samples_held_out"] + counts["samples_unused"] == 60
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
