"""JSONL to conversations, line by line; what cannot be trained on is refused by line number, up to twenty problems at once."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import DataError
from harness.spec import Fields

MAX_PROBLEMS = 20
ROLES = ("system", "user", "assistant")
PROMPT_COMPLETION = Fields(prompt="prompt", completion="completion")
Reader = Callable[[Mapping[str, Any]], "tuple[Message, ...]"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation: ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation that ends with an assistant's turn, and the line of the file it stands on (from 1)."""

    line: int
    messages: tuple[Message, ...]

    def digest(self) -> bytes:
        """Hash of the content alone: duplicates have the same, wherever they stand and whatever else their objects hold."""
        turns = [[message.role, message.content] for message in self.messages]
        return hashlib.sha256(json.dumps(turns, separators=(",", ":")).encode()).digest()


class _BadRowError(Exception):
    """What is wrong with a row: what was found, and what was expected."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of ``path``, read anew by every iteration; ``layout`` says which keys they are read from."""

    path: Path
    layout: str
    read: Reader

    def __iter__(self) -> Iterator[Row]:
        problems: list[str] = []
        empty = True
        for line, raw in _lines(self.path):
            empty = False
            try:
                messages = self.read(_object(raw))
            except _BadRowError as problem:
                problems.append(f"{self.path.name}:{line}: {problem}")
                if len(problems) == MAX_PROBLEMS:
                    break
                continue
            if not problems:  # nothing will come of this file: only look for more problems
                yield Row(line, messages)
        if empty:
            raise DataError(f"{self.path.name}: the file is empty; expected one JSON object a line")
        if problems:
            more = f"\n(the first {MAX_PROBLEMS} problems; there may be more)" if len(problems) == MAX_PROBLEMS else ""
            raise DataError("\n".join(problems) + more)


def open_rows(path: Path, fields: Fields | None) -> Rows:
    """The rows of a JSONL file: ``fields`` as given, or the layout of its first row. Raises DataError when neither fits.

    Blank lines, a byte-order mark and CRLF line ends are accepted.
    """
    if fields is not None:
        return Rows(path, f"{fields.prompt}/{fields.completion}", _pair_reader(fields))
    for line, raw in _lines(path):
        try:
            first = _object(raw)
        except _BadRowError:
            continue  # reported when the rows are read; a later row can still tell the layout
        if "messages" in first:
            return Rows(path, "messages", _read_messages)
        if {"prompt", "completion"} <= first.keys():
            return Rows(path, "prompt/completion", _pair_reader(PROMPT_COMPLETION))
        raise DataError(
            f"{path.name}:{line}: found the keys {', '.join(sorted(first)) or '(none)'}; expected messages, or prompt and completion; "
            "for other keys set data.fields, for example data.fields='{prompt: question, completion: answer}'"
        )
    return Rows(path, "unknown", _read_messages)  # no readable row at all: iterating says why


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if content.strip():
                    yield number, content
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check data.path") from error


def _object(raw: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadRowError(f"not UTF-8 (byte {raw[error.start]:#04x} at column {error.start + 1}); expected UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise _BadRowError(f"broken JSON at column {error.colno} ({error.msg}); expected one JSON object a line") from error
    except RecursionError as error:
        raise _BadRowError("JSON nested too deeply; expected one flat object a line") from error
    if not isinstance(value, dict):
        raise _BadRowError(f"found {_kind(value)}; expected a JSON object")
    return value


def _pair_reader(fields: Fields) -> Reader:
    def read(row: Mapping[str, Any]) -> tuple[Message, ...]:
        return Message("user", _text(row, fields.prompt)), Message("assistant", _text(row, fields.completion))

    return read


def _read_messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    turns = row.get("messages", None)
    if "messages" not in row:
        raise _BadRowError(f"no field 'messages' (found {', '.join(sorted(row)) or 'no field at all'}); every row needs the same fields")
    if not isinstance(turns, list) or not turns:
        raise _BadRowError(f"'messages' is {_kind(turns)}; expected a list of {{role, content}} objects")
    messages = tuple(_message(index, turn) for index, turn in enumerate(turns))
    if messages[-1].role != "assistant":
        raise _BadRowError(f"the last message is the {messages[-1].role}'s; expected the assistant's answer: drop the unanswered turns")
    return messages


def _message(index: int, turn: Any) -> Message:
    where = f"messages[{index}]"
    if not isinstance(turn, dict):
        raise _BadRowError(f"{where} is {_kind(turn)}; expected an object with role and content")
    role = turn.get("role")
    if role not in ROLES:
        raise _BadRowError(f"{where}.role is {json.dumps(role)}; expected one of {', '.join(ROLES)}")
    if role == "system" and index > 0:
        raise _BadRowError(f"{where} is a system message; expected system only as the first message")
    return Message(role, _text(turn, "content", where=f"{where}."))


def _text(row: Mapping[str, Any], field: str, where: str = "") -> str:
    if field not in row:
        raise _BadRowError(f"no field '{where}{field}' (found {', '.join(sorted(row)) or 'no field at all'})")
    value = row[field]
    if not isinstance(value, str):
        raise _BadRowError(f"'{where}{field}' is {_kind(value)}; expected text")
    if not value.strip():
        raise _BadRowError(f"'{where}{field}' is empty; expected text")
    if not value.isascii() and any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise _BadRowError(f"'{where}{field}' holds half a surrogate pair (\\ud800 to \\udfff), which is no text; expected valid Unicode")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "an empty list" if value == [] else names[type(value)]
