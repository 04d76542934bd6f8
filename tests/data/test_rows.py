"""Lines to rows: what is tolerated, and every way a line can be wrong, with its number."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.data import rows as reading
from harness.data.layouts import Message
from harness.data.rows import BadRow, Row, open_rows, shown
from harness.errors import DataError
from harness.spec import Fields, Layout

GOOD = {"prompt": "Why?", "completion": "Because."}
CHAT = {
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
}


def write(folder: Path, *lines: object, end: str = "\n", bom: bool = False) -> Path:
    path = folder / "rows.jsonl"
    text = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode() for line in lines]
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + end.encode().join(text))
    return path


def bad(path: Path) -> list[BadRow]:
    return [row for row in open_rows(path) if isinstance(row, BadRow)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("bom", [False, True])
def test_byte_order_mark_crlf_and_blank_lines_are_tolerated(tmp_path: Path, end: str, bom: bool) -> None:
    rows = list(open_rows(write(tmp_path, GOOD, GOOD, "", end=end, bom=bom)))
    assert [type(row) for row in rows] == [Row, Row]
    assert rows[1].line == (3 if end == "\n\n" else 2)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "x", ', "broken JSON at column 17: found the end of the line (Expecting property name"),
        ('{"prompt": "é", completion: "y"}', "broken JSON at column 17: found 'completion: \"y\"}' (Expecting property name"),
        ("prompt,completion and so on,\u2028", "broken JSON at column 1: found 'prompt,completion an…' (Expecting value)"),
        ("[1, 2]", "found a list; expected a JSON object a line: jq -c '.[]' FILE > FILE.jsonl"),
        ("[", "found the start of a list that goes on below; expected one JSON object a line: jq -c '.[]' FILE > FILE.jsonl"),
        (" {", "found the start of an object that goes on below; expected all of it on one line"),
        ("3", "found a number; expected a JSON object"),
        ("null", "found null; expected a JSON object"),
        ({"prompt": "x"}, "no field 'completion' (found prompt)"),
        ({}, "no field 'prompt' (found no field at all)"),
        ({"prompt": "x", "completion": 72}, "'completion' is a number; expected text"),
        ({"prompt": "x", "completion": None}, "'completion' is null; expected text"),
        ({"prompt": "x", "completion": ["a"]}, "'completion' is a list; expected text"),
        ({"prompt": "x", "completion": " \n"}, "'completion' is empty; expected text"),
        ({"prompt": 1, "completion": []}, "'prompt' is a number; expected text; 'completion' is an empty list; expected text"),
        ({"prompt": ""}, "'prompt' is empty; expected text; no field 'completion' (found prompt); expected one that holds text"),
        (b'{"prompt": "\xff", "completion": "x"}', "not UTF-8 (byte 0xff at column 13)"),
        (r'{"prompt": "\ud800", "completion": "x"}', "half a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": ' + "1" * 5000 + ', "completion": "x"}', "broken JSON (Exceeds the limit"),
        (
            {"pr\nompt\ud800": "x" * 99, **{f"k{n}": 1 for n in range(20)}},
            "(found k0, k1, k10, k11, k12, k13, k14, k15, k16, k17 and 11 more)",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, said: str) -> None:
    (problem,) = bad(write(tmp_path, GOOD, line, GOOD))
    assert problem.line == 2
    assert said in problem.problem
    assert len(problem.problem.splitlines()) == 1
    assert len(problem.problem) < 300


def test_a_file_is_named_from_where_people_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [shown(tmp_path / "a" / "b.jsonl"), shown(tmp_path.parent / "c.jsonl")] == ["a/b.jsonl", f"{tmp_path.parent}/c.jsonl"]


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "x", "completion": "a", "completion": "b"}',
        '{"prompt": "x", "completion": "a", "completion": "a"}',
        '{"prompt": "x", "completion": "a", "note": [{"completion": 1, "completion" : 2}]}',
        r'{"prompt": "x", "completion": "a", "compl\u0065tion": "b"}',
    ],
)
def test_a_key_that_comes_twice_is_named_and_the_row_not_trained_on(tmp_path: Path, line: str) -> None:
    (problem,) = bad(write(tmp_path, GOOD, line, GOOD))
    assert problem == BadRow(2, "an object has several values of the key completion; expected each key once: delete all but one")


def test_the_same_key_in_two_objects_of_a_row_is_no_mistake(tmp_path: Path) -> None:
    assert bad(write(tmp_path, CHAT, CHAT)) == []


@pytest.mark.parametrize(
    ("encoding", "begins", "said"),
    [
        ("utf-16-le", "\ufeff", "UTF-16 text"), ("utf-16-be", "\ufeff", "UTF-16 text"), ("utf-32-le", "\ufeff", "UTF-32 text"),
        ("utf-16-le", "", "UTF-16LE text"), ("utf-16-be", "", "UTF-16BE text"), ("utf-32-be", "", "UTF-32BE text"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("asked", [{}, {"layout": "prompt_completion"}, {"fields": Fields(prompt="prompt", completion="completion")}])
def test_a_file_in_another_encoding_is_one_problem_with_its_remedy(
    tmp_path: Path, encoding: str, begins: str, said: str, asked: dict[str, Any]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes((begins + (json.dumps(GOOD) + "\n") * 30).encode(encoding))
    with pytest.raises(DataError) as caught:
        open_rows(path, **asked)
    name = said.split()[0]
    assert str(caught.value) == f"{path}: {said}; expected UTF-8: iconv -f {name} -t UTF-8 FILE > FILE.utf8.jsonl"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"fields": Fields(prompt="questoin", completion="answer")},
            "no field 'questoin' (found answer, question; did you mean 'question'?); expected in one row at least, "
            "and no row has all that it takes: check data.fields",
        ),
        (
            {"layout": "alpaca"},
            "no field 'instruction' (found answer, question); no field 'output' (found answer, question); expected in one row at least, "
            "and no row has all that it takes: data.layout=alpaca is not its own, auto finds it",
        ),
    ],
)
def test_a_key_that_no_row_has_is_told_once_with_the_nearest(tmp_path: Path, asked: dict[str, Any], said: str) -> None:
    path = write(tmp_path, "broken", *[{"question": "x", "answer": "y"}] * 30)
    with pytest.raises(DataError) as caught:
        open_rows(path, **asked)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}:1: broken JSON")
    assert second == f"{path}:2: {said}"


def test_a_key_that_some_row_has_is_missed_in_the_others(tmp_path: Path) -> None:
    layout: Layout = "prompt_completion"
    rows = list(open_rows(write(tmp_path, {"promt": "x", "completion": "y"}, GOOD), layout=layout))
    assert isinstance(rows[0], BadRow)
    assert rows[0].problem == "no field 'prompt' (found completion, promt; did you mean 'promt'?); expected one that holds text"
    assert isinstance(rows[1], Row)


def test_a_line_that_is_too_long_is_never_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 2**20)
    path = write(tmp_path, GOOD, {"prompt": "x" * (40 * 2**20), "completion": "y"}, GOOD)
    tracemalloc.start()
    try:
        rows = list(open_rows(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [row.line for row in rows] == [1, 2, 3]
    assert isinstance(rows[1], BadRow)
    assert rows[1].problem.startswith("longer than 1 MiB; expected one JSON object a line")
    assert peak < 8 * 2**20


def test_the_layout_is_that_of_the_first_row_that_has_one(tmp_path: Path) -> None:
    path = write(tmp_path, "broken", {"id": 3}, CHAT, GOOD)
    assert open_rows(path).layout == "messages"
    assert [row.line for row in bad(path)] == [1, 2, 4]


def test_without_any_layout_the_keys_are_named_once_beside_what_cannot_be_read(tmp_path: Path) -> None:
    rows = [{"question": "x", "answer": "y"}] * 30
    with pytest.raises(DataError) as caught:
        open_rows(write(tmp_path, "broken", *rows))
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path}/rows.jsonl:1: broken JSON")
    assert second.startswith(f"{tmp_path}/rows.jsonl:2: found the keys answer, question; expected")
    assert "data.fields=" in second


def test_problems_that_hide_the_layout_are_named_up_to_twenty(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_rows(write(tmp_path, *["x"] * 50))
    assert len(str(caught.value).splitlines()) == 20


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows.jsonl: the file is empty"):
        open_rows(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl: cannot be read \(No such file"):
        open_rows(tmp_path / "rows.jsonl")


@given(st.text(min_size=1), st.text(min_size=1), st.integers(), st.integers())
def test_the_digest_is_of_the_content_alone(prompt: str, completion: str, first: int, second: int) -> None:
    messages = (Message("user", prompt), Message("assistant", completion))
    assert Row(first, messages).digest() == Row(second, messages).digest()
    assert Row(first, messages).digest() != Row(first, (*messages, messages[0])).digest()
    moved = (Message("user", prompt + completion[0]), Message("assistant", completion[1:]))
    assert Row(first, messages).digest() != Row(first, moved).digest()
