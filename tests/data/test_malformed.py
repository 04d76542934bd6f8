"""Whatever bytes a file holds, the right rows come out of it or a DataError; skipping and stopping agree on which lines are bad."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data.build import REMEDY, build_jsonl, unwatched
from harness.data.rows import MAX_PROBLEMS, BadRow, Row, open_rows
from harness.data.tokens import TokenFile
from harness.errors import DataError
from harness.spec import Data, Layout, parse
from tests.real_files import TOKENIZER

words = st.text(min_size=1, max_size=12)
turns = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]) | words, "content": words}), max_size=4)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
known = st.sampled_from(["messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text", "system"])
rows = (
    st.fixed_dictionaries({"prompt": words, "completion": words})
    | st.fixed_dictionaries({"messages": turns | values})
    | st.fixed_dictionaries({"conversations": st.lists(st.fixed_dictionaries({"from": words, "value": words})) | values})
    | st.fixed_dictionaries({"instruction": words, "output": words | values}, optional={"input": words | values})
    | st.fixed_dictionaries({"text": words})
    | st.dictionaries(known, values, max_size=3)
)
whole = st.one_of(rows, rows, values).map(lambda value: json.dumps(value).encode())
cut = st.tuples(whole, st.integers(0, 40)).map(lambda pair: pair[0][: pair[1]])
lines = st.one_of(whole, whole, whole, cut, st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b"")))
files = st.tuples(st.booleans(), st.lists(lines, max_size=8), st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
layouts = st.sampled_from(["auto", "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


def built(folder: Path, path: Path, tokenizer: Any, **changes: Any) -> tuple[TokenFile | None, str]:
    raw = {"name": "d", "source": "jsonl", "path": path.name, "sequence_length": 4096, "held_out_fraction": 0.0, **changes}
    try:
        made = build_jsonl(parse(Data, raw), [path], tokenizer, folder, unwatched)
    except DataError as error:
        return None, str(error)
    return TokenFile.open(made.path), "\n".join(made.problems)


def every_line(path: Path, layout: Layout) -> tuple[list[Row | BadRow], str | None]:
    try:
        return list(open_rows(path, layout=layout)), None
    except DataError as error:
        return [], str(error)


@settings(max_examples=250, deadline=None)
@given(files, layouts)
def test_rows_or_a_data_error_and_both_ways_agree(tokenizer: Any, file: tuple[bool, list[bytes], bytes], layout: Layout) -> None:
    bom, content, end = file
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "rows"
        path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + end.join(content))
        strict, stopped = built(folder, path, tokenizer, layout=layout)
        lenient, skipped = built(folder, path, tokenizer, layout=layout, on_bad_row="skip")
        read, unknown = every_line(path, layout)
        shown = f"{path}"
    if unknown is not None:
        assert (strict, lenient) == (None, None)
        assert stopped == skipped == unknown
        return
    good = [row for row in read if isinstance(row, Row)]
    bad = [f"{shown}:{row.line}: {row.problem}" for row in read if isinstance(row, BadRow)]
    assert all("expected" in problem and len(problem.splitlines()) == 1 for problem in bad)
    if bad:
        assert strict is None
        assert stopped.splitlines()[:MAX_PROBLEMS] == [*bad, REMEDY]
    if lenient is None:
        assert not good or f"\n{shown}:" not in skipped
        return
    counts = lenient.metadata["counts"]
    assert counts["rows"] == len(read)
    assert skipped.splitlines()[: len(bad)] == bad[:MAX_PROBLEMS]
    assert len(lenient.train) == counts["rows"] - counts["rows_bad"] - counts["samples_dropped"]
    if not skipped:
        assert strict is not None
        assert strict.sha256 == lenient.sha256
