"""JSONL to conversations, line by line; a line that cannot be trained on comes out as what is wrong with it."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from harness.data.layouts import EXAMPLE, EXPECTED, KEYS, BadRowError, Message, Reader, absent, detect, kind, names, pair_reader, reader
from harness.errors import DataError
from harness.spec import Fields, Layout

MAX_PROBLEMS = 20  # that are named at once
MAX_LINE_BYTES = 2**26  # a longer line is no row of text but a file without line ends: it is never read whole
_JQ_LIST = "jq -c '.[]' FILE > FILE.jsonl"
_SHOWN = 20  # characters of a broken line in a message
_WHITE = " \t\r\n"  # JSON's
T = TypeVar("T")
Look = Callable[[Mapping[str, Any]], tuple[T | None, str]]  # what it finds in a row, and in words what the row lacks


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation that ends with an assistant's turn (or a plain text), and the line of the file it stands on (from 1).

    ``file`` is the file's place among those that are read together.
    """

    line: int
    messages: tuple[Message, ...]
    file: int = 0

    def digest(self) -> bytes:
        """Hash of the content alone: duplicates have the same, wherever they stand and whatever else their objects hold."""
        turns = [[message.role, message.content] for message in self.messages]
        return hashlib.sha256(json.dumps(turns, separators=(",", ":")).encode()).digest()


@dataclass(frozen=True, slots=True)
class BadRow:
    """A line that holds no row, and why: what was found, and what was expected."""

    line: int
    problem: str
    file: int = 0


@dataclass(frozen=True, slots=True)
class RowFile:
    """The rows of ``path``, read anew by every iteration; ``layout`` says which keys they are read from, ``name`` is for people."""

    path: Path
    name: str
    layout: str
    read: Reader
    number: int = 0

    def __iter__(self) -> Iterator[Row | BadRow]:
        for line, raw in _lines(self.path):
            try:
                yield Row(line, self.read(_object(raw)), self.number)
            except BadRowError as problem:
                yield BadRow(line, str(problem), self.number)


def open_rows(path: Path, *, layout: Layout = "auto", fields: Fields | None = None, number: int = 0) -> RowFile:
    """The rows of a JSONL file: by ``fields``, by ``layout``, or by that of the first row that has the keys of one.

    Blank lines, a byte-order mark and CRLF line ends are accepted. Raises DataError when no row tells the layout or has its keys.
    """
    name = shown(path)
    if encoding := _foreign(path):
        raise DataError(f"{name}: {encoding} text; expected UTF-8: iconv -f {encoding} -t UTF-8 FILE > FILE.utf8.jsonl")
    if fields is not None:
        found = f"{fields.prompt}/{fields.completion}"
        _find(path, name, _having((fields.prompt, fields.completion), found, "check data.fields"))
        return RowFile(path, name, found, pair_reader(fields), number)
    look = _detected if layout == "auto" else _having(sorted(KEYS[layout]), layout, f"data.layout={layout} is not its own, auto finds it")
    told: Layout = _find(path, name, look)
    return RowFile(path, name, told, reader(told), number)


def shown(path: Path) -> str:
    """``path`` as it is named to people: from the folder they are in, where it lies below that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _foreign(path: Path) -> str | None:
    """The encoding of a file that begins as UTF-16 or UTF-32 does, by its byte-order mark or by the zeros beside ASCII; None for others."""
    with _opened(path) as file:
        start = file.read(4)
    marks = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
    zeros = {"x0x0": "UTF-16LE", "0x0x": "UTF-16BE", "x000": "UTF-32LE", "000x": "UTF-32BE"}
    marked = next((encoding for mark, encoding in marks.items() if start.startswith(mark)), None)
    return marked or zeros.get("".join("x" if byte else "0" for byte in start))


def _detected(row: Mapping[str, Any]) -> tuple[Layout | None, str]:
    return detect(row), f"found the keys {names(row)}; expected a layout's ({EXPECTED}), or set {EXAMPLE}"


def _having(keys: Sequence[str], found: T, remedy: str) -> Look[T]:
    """Finds ``found`` in a row with all of ``keys``: where none has, whoever named the keys is mistaken, and not the rows."""

    def look(row: Mapping[str, Any]) -> tuple[T | None, str]:
        lacks = "; ".join(absent(key, row) for key in keys if key not in row)
        return None if lacks else found, f"{lacks}; expected in one row at least, and no row has all that it takes: {remedy}"

    return look


def _find(path: Path, name: str, look: Look[T]) -> T:
    """What ``look`` finds in the first row where it finds anything; of the others the first is told, with what it lacks.

    Raises DataError where no row has it, with what cannot be read beside it.
    """
    problems: list[str] = []
    told = False
    for line, raw in _lines(path):
        try:
            row = _object(raw)
        except BadRowError as problem:
            problems.append(f"{name}:{line}: {problem}")
        else:
            found, lacks = look(row)
            if found is not None:
                return found
            if not told:
                problems.append(f"{name}:{line}: {lacks}")
            told = True
        del problems[MAX_PROBLEMS:]
    raise DataError("\n".join(problems) or f"{name}: the file is empty; expected one JSON object a line")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check data.path") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """The lines that are not blank, numbered; None for one that is too long to be read."""
    with _opened(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(2**20)
                yield number, None
                continue
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not content.isspace() and content:
                yield number, content


def _object(raw: bytes | None) -> Mapping[str, Any]:
    if raw is None:
        raise BadRowError(f"longer than {MAX_LINE_BYTES // 2**20} MiB; expected one JSON object a line, each on a line of its own")
    try:
        text = raw.decode("utf-8").rstrip("\r\n")  # an end that is missing is then at the end of this line, not at the start of the next
        value, end = _DECODER.raw_decode(text, len(text) - len(text.lstrip(_WHITE)))
        if rest := text[end:].lstrip(_WHITE):
            raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
    except UnicodeDecodeError as error:
        raise BadRowError(f"not UTF-8 (byte {raw[error.start]:#04x} at column {error.start + 1}); expected UTF-8 text") from error
    except json.JSONDecodeError as error:
        _refuse_a_document(text)
        found = _shown(text, error.pos)
        raise BadRowError(f"broken JSON at column {error.pos + 1}: found {found} ({error.msg}); expected one JSON object a line") from error
    except RecursionError as error:
        raise BadRowError("JSON nested too deeply; expected one flat object a line") from error
    except ValueError as error:  # a number of thousands of digits
        raise BadRowError(f"broken JSON ({error}); expected one JSON object a line") from error
    if not isinstance(value, dict):
        more = f" a line: {_JQ_LIST}" if isinstance(value, list) else ""
        raise BadRowError(f"found {kind(value)}; expected a JSON object{more}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys all differ: of a key that comes twice, readers of JSON take either value, or both."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = names(key for key, count in counts.items() if count > 1)
        raise BadRowError(f"an object has several values of the key {twice}; expected each key once: delete all but one")
    return found


# Made once: json.loads makes one for every row that is to be read with a hook, which takes longer than reading it.
_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _refuse_a_document(text: str) -> None:
    """Alpaca and ShareGPT are published as one list over several lines: say how it becomes lines."""
    opened = text.strip()
    if opened in ("[", "[{"):
        raise BadRowError(f"found the start of a list that goes on below; expected one JSON object a line: {_JQ_LIST}")
    if opened == "{":
        raise BadRowError("found the start of an object that goes on below; expected all of it on one line")


def _shown(text: str, place: int) -> str:
    """What stands at ``place``, for people."""
    rest = text[place : place + _SHOWN + 1]
    return repr(rest if len(rest) <= _SHOWN else f"{rest[:_SHOWN]}…") if rest else "the end of the line"
