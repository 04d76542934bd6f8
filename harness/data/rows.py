"""JSONL to conversations, line by line; a line that cannot be trained on comes out as what is wrong with it."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.data.layouts import EXAMPLE, EXPECTED, BadRowError, Message, Reader, detect, kind, names, pair_reader, reader
from harness.errors import DataError
from harness.spec import Fields, Layout

MAX_PROBLEMS = 20  # that are named at once
MAX_LINE_BYTES = 2**26  # a longer line is no row of text but a file without line ends: it is never read whole
_JQ_LIST = "jq -c '.[]' FILE > FILE.jsonl"
_SHOWN = 20  # characters of a broken line in a message


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


def open_rows(path: Path, *, layout: Layout = "auto", fields: Fields | None = None, number: int = 0, name: str | None = None) -> RowFile:
    """The rows of a JSONL file: by ``fields``, by ``layout``, or by that of the first row that has the keys of one.

    Blank lines, a byte-order mark and CRLF line ends are accepted. Raises DataError when no row tells the layout.
    """
    name = name or path.name
    if fields is not None:
        return RowFile(path, name, f"{fields.prompt}/{fields.completion}", pair_reader(fields), number)
    found = layout if layout != "auto" else _detect(path, name)
    return RowFile(path, name, found, reader(found), number)


def short_names(paths: Sequence[Path]) -> list[str]:
    """The names of files, each with as many of its folders as it takes to tell it from the others."""
    depths = range(1, 1 + max((len(path.parts) for path in paths), default=0))
    tails = [["/".join(path.parts[-depth:]) for depth in depths] for path in paths]
    seen = Counter(itertools.chain.from_iterable(set(tail) for tail in tails))
    return [next((name for name in tail if seen[name] == 1), path.name) for tail, path in zip(tails, paths, strict=True)]


def _detect(path: Path, name: str) -> Layout:
    problems: list[str] = []
    told = False
    for line, raw in _lines(path):
        try:
            row = _object(raw)
        except BadRowError as problem:
            problems.append(f"{name}:{line}: {problem}")
        else:
            layout = detect(row)
            if layout is not None:
                return layout
            if not told:
                problems.append(f"{name}:{line}: found the keys {names(row)}; expected a layout's ({EXPECTED}), or set {EXAMPLE}")
            told = True
        del problems[MAX_PROBLEMS:]
    raise DataError("\n".join(problems) or f"{name}: the file is empty; expected one JSON object a line")


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """The lines that are not blank, numbered; None for one that is too long to be read."""
    try:
        with path.open("rb") as file:
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
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check data.path") from error


def _object(raw: bytes | None) -> Mapping[str, Any]:
    if raw is None:
        raise BadRowError(f"longer than {MAX_LINE_BYTES // 2**20} MiB; expected one JSON object a line, each on a line of its own")
    try:
        text = raw.decode("utf-8").rstrip("\r\n")  # an end that is missing is then at the end of this line, not at the start of the next
        value = json.loads(text)
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
