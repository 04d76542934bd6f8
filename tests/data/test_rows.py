"""Rows: every accepted layout, and every way a line can be wrong, with its number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.data.rows import Message, Row, open_rows
from harness.errors import DataError
from harness.spec import Fields

GOOD = {"prompt": "Why?", "completion": "Because."}
CHAT = {
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
}


def write(folder: Path, *lines: object, end: str = "\n", bom: bool = False) -> Path:
    path = folder / "rows.jsonl"
    text = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode() for line in lines]
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + end.encode().join(text))
    return path


def problems(path: Path, fields: Fields | None = None) -> str:
    with pytest.raises(DataError) as caught:
        list(open_rows(path, fields))
    return str(caught.value)


def test_prompt_and_completion_are_detected(tmp_path: Path) -> None:
    rows = open_rows(write(tmp_path, GOOD, {**GOOD, "prompt": "How?"}), None)
    assert rows.layout == "prompt/completion"
    assert [row.line for row in rows] == [1, 2]
    assert next(iter(rows)).messages == (Message("user", "Why?"), Message("assistant", "Because."))


def test_messages_are_detected(tmp_path: Path) -> None:
    rows = open_rows(write(tmp_path, CHAT), None)
    assert rows.layout == "messages"
    assert [message.role for message in next(iter(rows)).messages] == ["system", "user", "assistant"]


def test_any_two_fields_can_be_mapped(tmp_path: Path) -> None:
    rows = open_rows(write(tmp_path, {"q": "1+1?", "a": "2", "id": 7}), Fields(prompt="q", completion="a"))
    assert rows.layout == "q/a"
    assert next(iter(rows)).messages[1].content == "2"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("bom", [False, True])
def test_byte_order_mark_crlf_and_blank_lines_are_tolerated(tmp_path: Path, end: str, bom: bool) -> None:
    rows = list(open_rows(write(tmp_path, GOOD, GOOD, "", end=end, bom=bom), None))
    assert len(rows) == 2
    assert rows[1].line == (3 if end == "\n\n" else 2)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "x", ', "broken JSON at column"),
        ("[1, 2]", "found a list; expected a JSON object"),
        ("3", "found a number; expected a JSON object"),
        ("null", "found null; expected a JSON object"),
        ({"prompt": "x"}, "no field 'completion' (found prompt)"),
        ({}, "no field 'prompt' (found no field at all)"),
        ({"prompt": "x", "completion": 72}, "'completion' is a number; expected text"),
        ({"prompt": "x", "completion": None}, "'completion' is null; expected text"),
        ({"prompt": "x", "completion": ["a"]}, "'completion' is a list; expected text"),
        ({"prompt": "x", "completion": " \n"}, "'completion' is empty; expected text"),
        (b'{"prompt": "\xff", "completion": "x"}', "not UTF-8 (byte 0xff at column 13)"),
        (r'{"prompt": "\ud800", "completion": "x"}', "half a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, said: str) -> None:
    text = problems(write(tmp_path, GOOD, line, GOOD))
    assert text.startswith("rows.jsonl:2: ")
    assert said in text


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "'messages' is text; expected a list"),
        ([], "'messages' is an empty list"),
        (["hi"], "messages[0] is text; expected an object"),
        ([{"role": "tool", "content": "x"}], 'messages[0].role is "tool"; expected one of system, user, assistant'),
        ([{"content": "x"}], "messages[0].role is null"),
        ([{"role": "user"}], "no field 'messages[0].content' (found role)"),
        ([{"role": "user", "content": None}], "'messages[0].content' is null; expected text"),
        ([{"role": "user", "content": "x"}], "the last message is the user's"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "x"}], "messages[1] is a system message"),
    ],
)
def test_a_bad_conversation_is_named(tmp_path: Path, messages: object, said: str) -> None:
    assert said in problems(write(tmp_path, CHAT, {"messages": messages}))


def test_a_row_without_messages_among_conversations_is_named(tmp_path: Path) -> None:
    assert "rows.jsonl:2: no field 'messages' (found completion, prompt)" in problems(write(tmp_path, CHAT, GOOD))


def test_all_problems_come_at_once_up_to_twenty(tmp_path: Path) -> None:
    assert [line.partition(": ")[0] for line in problems(write(tmp_path, "x", GOOD, "y")).splitlines()] == ["rows.jsonl:1", "rows.jsonl:3"]
    lines = problems(write(tmp_path, *["x"] * 50)).splitlines()
    assert len(lines) == 21
    assert lines[19].startswith("rows.jsonl:20: ")
    assert "first 20 problems" in lines[20]


def test_unknown_keys_ask_for_a_mapping(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: found the keys answer, question; .*data.fields="):
        open_rows(write(tmp_path, {"question": "x", "answer": "y"}), None)


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert "rows.jsonl: the file is empty" in problems(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl: cannot be read \(No such file"):
        open_rows(tmp_path / "rows.jsonl", None)


@given(st.text(min_size=1), st.text(min_size=1), st.integers(), st.integers())
def test_the_digest_is_of_the_content_alone(prompt: str, completion: str, first: int, second: int) -> None:
    messages = (Message("user", prompt), Message("assistant", completion))
    assert Row(first, messages).digest() == Row(second, messages).digest()
    assert Row(first, messages).digest() != Row(first, (*messages, messages[0])).digest()
    moved = (Message("user", prompt + completion[0]), Message("assistant", completion[1:]))
    assert Row(first, messages).digest() != Row(first, moved).digest()
