"""The layouts of a row: which keys hold its turns, and every way in which they can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.spec import Fields, Layout

ROLES = ("system", "user", "assistant")
TEXT = "text"  # the role of a plain text, which nobody says
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
}
EXAMPLE = "data.fields='{prompt: question, completion: answer}'"
_SHOWN = 10  # names in a message
_WIDTH = 60  # characters of a value in a message


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: ``role`` is system, user or assistant; a plain text is a single message of the role ``TEXT``."""

    role: str
    content: str


class BadRowError(Exception):
    """What is wrong with a row: what was found, and what was expected."""


Reader = Callable[[Mapping[str, Any]], tuple[Message, ...]]


def reader(layout: Layout) -> Reader:
    """What turns an object of this layout into its messages, or raises BadRowError."""
    return _READERS[layout]


def pair_reader(fields: Fields) -> Reader:
    """The reader of rows whose prompt and completion stand under these two keys."""

    def read(row: Mapping[str, Any]) -> tuple[Message, ...]:
        return Message("user", _text(row, fields.prompt)), Message("assistant", _text(row, fields.completion))

    return read


def detect(row: Mapping[str, Any]) -> Layout | None:
    """The layout whose keys ``row`` has; None when it has those of none."""
    return next((layout for layout, keys in _KEYS.items() if keys <= row.keys()), None)


def names(keys: Iterable[str]) -> str:
    """Keys for people, whatever strange characters they hold, and not too many of them."""
    found = sorted(keys)
    shown = [key if key.isidentifier() and key.isascii() and len(key) <= _WIDTH else _brief(key) for key in found[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "") if found else "no field at all"


def kind(value: Any) -> str:
    """What a JSON value is, in a word or two."""
    if value is None:
        return "null"
    if value == []:
        return "an empty list"
    kinds: dict[type, str] = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds[type(value)]


def _read_messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    return _turns(row, "messages", "role", "content", {role: role for role in ROLES}, "a list of {role, content} objects")


def _read_sharegpt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    turns = _turns(row, "conversations", "from", "value", SPEAKERS, "a list of {from, value} objects")
    system = _optional(row, "system")
    if system and turns[0].role == "system":
        raise BadRowError("a field 'system' and a first turn from system; expected one of them")
    return (Message("system", system), *turns) if system else turns


def _read_alpaca(row: Mapping[str, Any]) -> tuple[Message, ...]:
    instruction, given, output = _text(row, "instruction"), _optional(row, "input"), _text(row, "output")
    system = _optional(row, "system")
    prompt = f"{instruction}\n\n{given}" if given else instruction
    turns = (Message("user", prompt), Message("assistant", output))
    return (Message("system", system), *turns) if system else turns


def _read_text(row: Mapping[str, Any]) -> tuple[Message, ...]:
    return (Message(TEXT, _text(row, "text")),)


_KEYS: Mapping[Layout, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "sharegpt": frozenset({"conversations"}),
    "alpaca": frozenset({"instruction", "output"}),
    "prompt_completion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
}
_READERS: Mapping[Layout, Reader] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": pair_reader(Fields(prompt="prompt", completion="completion")),
    "text": _read_text,
}
EXPECTED = "; ".join(f"{layout}: {', '.join(sorted(keys))}" for layout, keys in _KEYS.items())


def _turns(row: Mapping[str, Any], key: str, who: str, what: str, roles: Mapping[str, str], expected: str) -> tuple[Message, ...]:
    if key not in row:
        raise BadRowError(f"no field '{key}' (found {names(row)}); every row of a file needs the same fields")
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"'{key}' is {kind(turns)}; expected {expected}")
    messages = tuple(_turn(f"{key}[{index}]", turn, who, what, roles) for index, turn in enumerate(turns))
    _check_order(messages, turns, key, who)
    return messages


def _turn(where: str, turn: Any, who: str, what: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise BadRowError(f"{where} is {kind(turn)}; expected an object with {who} and {what}")
    role = turn.get(who)
    if not isinstance(role, str) or role not in roles:
        raise BadRowError(f"{where}.{who} is {_brief(role)}; expected one of {', '.join(roles)}")
    return Message(roles[role], _text(turn, what, where=f"{where}."))


def _check_order(messages: Sequence[Message], turns: Sequence[Mapping[str, Any]], key: str, who: str) -> None:
    late = next((index for index, message in enumerate(messages) if message.role == "system" and index > 0), None)
    if late is not None:
        raise BadRowError(f"{key}[{late}] is a system message; expected system only as the first message")
    if messages[-1].role != "assistant":
        raise BadRowError(f"the last message is the {turns[-1][who]}'s; expected the assistant's answer: drop the unanswered turns")


def _optional(row: Mapping[str, Any], field: str) -> str | None:
    """The text of ``field``; None where it is missing, null or blank."""
    value = row.get(field)
    blank = value is None or (isinstance(value, str) and not value.strip())
    return None if blank else _text(row, field)


def _text(row: Mapping[str, Any], field: str, where: str = "") -> str:
    if field not in row:
        raise BadRowError(f"no field '{where}{field}' (found {names(row)})")
    value = row[field]
    if not isinstance(value, str):
        raise BadRowError(f"'{where}{field}' is {kind(value)}; expected text")
    if not value.strip():
        raise BadRowError(f"'{where}{field}' is empty; expected text")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRowError(f"'{where}{field}' holds half a surrogate pair (\\ud800 to \\udfff), which is no text; expected valid Unicode")
    return value


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}…"
