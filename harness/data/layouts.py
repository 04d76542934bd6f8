"""The layouts of a row: which keys hold its turns, and every way in which they can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import closest
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
_PROBLEMS = 5  # of one row that are named: a long conversation can have hundreds


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: ``role`` is system, user or assistant; a plain text is a single message of the role ``TEXT``."""

    role: str
    content: str


class BadRowError(Exception):
    """All that is wrong with a row: of each problem what was found, and what was expected."""

    def __init__(self, *problems: str) -> None:
        more = [f"and {len(problems) - _PROBLEMS} more problems"] if len(problems) > _PROBLEMS else []
        super().__init__("; ".join([*problems[:_PROBLEMS], *more]))


Reader = Callable[[Mapping[str, Any]], tuple[Message, ...]]
_Read = Callable[[Mapping[str, Any], list[str]], tuple[Message, ...]]  # adds to the list what is wrong


def reader(layout: Layout) -> Reader:
    """What turns an object of this layout into its messages, or raises BadRowError."""
    return _checked(_READERS[layout])


def pair_reader(fields: Fields) -> Reader:
    """The reader of rows whose prompt and completion stand under these two keys."""
    return _checked(_pair(fields.prompt, fields.completion))


def detect(row: Mapping[str, Any]) -> Layout | None:
    """The layout whose keys ``row`` has; None when it has those of none."""
    return next((layout for layout, keys in KEYS.items() if keys <= row.keys()), None)


def absent(field: str, row: Mapping[str, Any], where: str = "") -> str:
    """That ``row`` has no ``field``, what it has, and which of these may be meant. ``where``: what the row is a part of."""
    near = closest(field, (key for key in row if key.isprintable() and len(key) <= _WIDTH))
    return f"no field '{where}{field}' (found {names(row)}{f'; did you mean {near!r}?' if near else ''})"


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


def _checked(read: _Read) -> Reader:
    def checked(row: Mapping[str, Any]) -> tuple[Message, ...]:
        problems: list[str] = []
        messages = read(row, problems)
        if problems:
            raise BadRowError(*problems)
        return messages

    return checked


def _pair(prompt: str, completion: str) -> _Read:
    def read(row: Mapping[str, Any], problems: list[str]) -> tuple[Message, ...]:
        return Message("user", _text(row, prompt, problems)), Message("assistant", _text(row, completion, problems))

    return read


def _read_messages(row: Mapping[str, Any], problems: list[str]) -> tuple[Message, ...]:
    return _turns(row, _Turns("messages", "role", "content", {role: role for role in ROLES}), problems)


def _read_sharegpt(row: Mapping[str, Any], problems: list[str]) -> tuple[Message, ...]:
    turns = _turns(row, _Turns("conversations", "from", "value", SPEAKERS), problems)
    system = _optional(row, "system", problems)
    if system and turns and turns[0].role == "system":
        problems.append("a field 'system' and a first turn from system; expected one of them")
    return (Message("system", system), *turns) if system else turns


def _read_alpaca(row: Mapping[str, Any], problems: list[str]) -> tuple[Message, ...]:
    instruction, given = _text(row, "instruction", problems), _optional(row, "input", problems)
    output, system = _text(row, "output", problems), _optional(row, "system", problems)
    prompt = f"{instruction}\n\n{given}" if given else instruction
    turns = (Message("user", prompt), Message("assistant", output))
    return (Message("system", system), *turns) if system else turns


def _read_text(row: Mapping[str, Any], problems: list[str]) -> tuple[Message, ...]:
    return (Message(TEXT, _text(row, "text", problems)),)


KEYS: Mapping[Layout, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "sharegpt": frozenset({"conversations"}),
    "alpaca": frozenset({"instruction", "output"}),
    "prompt_completion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
}
_READERS: Mapping[Layout, _Read] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": _pair("prompt", "completion"),
    "text": _read_text,
}
EXPECTED = "; ".join(f"{layout}: {', '.join(sorted(keys))}" for layout, keys in KEYS.items())


@dataclass(frozen=True, slots=True)
class _Turns:
    """Under which names the turns of a conversation stand: the list, who says what, and the role of every speaker."""

    key: str
    who: str
    what: str
    roles: Mapping[str, str]


def _turns(row: Mapping[str, Any], named: _Turns, problems: list[str]) -> tuple[Message, ...]:
    key, objects = named.key, f"{{{named.who}, {named.what}}} objects"
    turns = row.get(key)
    if key not in row:
        problems.append(f"{absent(key, row)}; expected the same fields in every row of a file")
    elif not isinstance(turns, list) or not turns:
        problems.append(f"'{key}' is {kind(turns)}; expected a list of {objects}")
    else:
        before = len(problems)
        messages = tuple(_turn(f"{key}[{index}]", turn, named, problems) for index, turn in enumerate(turns))
        if len(problems) == before:
            _check_order(messages, turns, named, problems)
        return messages
    return ()


def _turn(where: str, turn: Any, named: _Turns, problems: list[str]) -> Message:
    if not isinstance(turn, dict):
        problems.append(f"{where} is {kind(turn)}; expected an object with {named.who} and {named.what}")
        return Message("", "")
    role = turn.get(named.who)
    if not isinstance(role, str) or role not in named.roles:
        problems.append(f"{where}.{named.who} is {_brief(role)}; expected one of {', '.join(named.roles)}")
        role = None
    return Message(named.roles.get(role or "", ""), _text(turn, named.what, problems, where=f"{where}."))


def _check_order(messages: Sequence[Message], turns: Sequence[Mapping[str, Any]], named: _Turns, problems: list[str]) -> None:
    late = next((index for index, message in enumerate(messages) if message.role == "system" and index > 0), None)
    if late is not None:
        problems.append(f"{named.key}[{late}] is a system message; expected system only as the first message")
    if messages[-1].role != "assistant":
        problems.append(f"the last message is the {turns[-1][named.who]}'s; expected the assistant's answer: drop the unanswered turns")


def _optional(row: Mapping[str, Any], field: str, problems: list[str]) -> str | None:
    """The text of ``field``; None where it is missing, null or blank."""
    value = row.get(field)
    blank = value is None or (isinstance(value, str) and not value.strip())
    return None if blank else _text(row, field, problems)


def _text(row: Mapping[str, Any], field: str, problems: list[str], where: str = "") -> str:
    """The text of ``field``; an empty one, and why, where it cannot be trained on."""
    value = row.get(field)
    if isinstance(value, str) and value.strip() and not _is_torn(value):
        return value
    if field not in row:
        problems.append(f"{absent(field, row, where)}; expected one that holds text")
    elif not isinstance(value, str):
        problems.append(f"'{where}{field}' is {kind(value)}; expected text")
    elif not value.strip():
        problems.append(f"'{where}{field}' is empty; expected text")
    else:
        problems.append(f"'{where}{field}' holds half a surrogate pair (\\ud800 to \\udfff), which is no text; expected valid Unicode")
    return ""


def _is_torn(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}…"
