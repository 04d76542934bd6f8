"""Build the shipped sample of questions and answers from the docstrings of the running interpreter's standard library.

Run with the interpreter named in harness/data/samples/python_docs.README.md to get the same bytes:
    python scripts/build_python_docs_sample.py
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import json
import platform
import pydoc
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).resolve().parent.parent / "harness" / "data" / "samples"
# Documented, importable everywhere, without effects at import.
MODULES = """
abc argparse array ast base64 bisect builtins bz2 calendar cmath codecs collections collections.abc colorsys concurrent.futures
configparser contextlib copy csv dataclasses datetime decimal difflib dis email.message email.utils enum fileinput fnmatch fractions
functools gc getpass gettext glob gzip hashlib heapq hmac html http.client http.cookies http.server importlib importlib.metadata
importlib.resources inspect io ipaddress itertools json keyword linecache locale logging logging.handlers lzma mailbox math mimetypes
multiprocessing.pool netrc numbers operator optparse os os.path pathlib pickle pkgutil platform plistlib pprint profile pstats queue
quopri random re reprlib sched secrets selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl statistics string
stringprep struct subprocess sys sysconfig tarfile tempfile textwrap threading time timeit tokenize trace traceback types typing
unicodedata unittest unittest.mock urllib.parse urllib.request urllib.robotparser uuid warnings wave weakref webbrowser
xml.dom.minidom xml.etree.ElementTree xmlrpc.client zipfile zlib zoneinfo asyncio graphlib cmd code compileall curses.ascii ftplib
imaplib poplib tomllib bdb pdb doctest symtable tabnanny filecmp stat errno select mmap copyreg atexit
""".split()  # noqa: SIM905 - a list this long is read as words
SHORTEST, LONGEST = 40, 420  # characters of an answer: whole sentences, yet short enough to see many samples on a CPU
ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


def main() -> None:
    """Write python_docs.jsonl, its README and the licence text."""
    rows = list(_deduplicated(_rows()))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    SAMPLES.mkdir(parents=True, exist_ok=True)
    (SAMPLES / "python_docs.jsonl").write_text(text, encoding="utf-8")
    (SAMPLES / "python_docs.README.md").write_text(_readme(len(rows)), encoding="utf-8")
    (SAMPLES / "LICENSE.python_docs").write_text(_licence(), encoding="utf-8")
    print(f"{len(rows)} rows, {len(text.encode()):,} bytes")


def _rows() -> Iterator[dict[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a few of the modules announce their end
        for name in MODULES:
            module = builtins if name == "builtins" else importlib.import_module(name)
            yield from _answered(f"What is the Python module {name} for?", module)
            for label, value in _members(module, name):
                yield from _answered(_question(label, value), value)


def _members(module: Any, name: str) -> Iterator[tuple[str, Any]]:
    prefix = "" if name == "builtins" else f"{name}."
    for key in sorted(vars(module)):
        value = vars(module)[key]
        if key.startswith("_") or inspect.ismodule(value) or not callable(value) or not _belongs(value, module, key):
            continue
        yield f"{prefix}{key}", value
        if inspect.isclass(value):
            for method in sorted(vars(value)):
                found = inspect.getattr_static(value, method)
                if not method.startswith("_") and (inspect.isroutine(found) or inspect.isdatadescriptor(found)):
                    yield f"{prefix}{key}.{method}", found


def _belongs(value: Any, module: Any, key: str) -> bool:
    exported = getattr(module, "__all__", None)
    return key in exported if exported is not None else getattr(value, "__module__", None) in (module.__name__, f"_{module.__name__}")


def _question(label: str, value: Any) -> str:
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if inspect.isclass(value):
        kind = "exception" if issubclass(value, BaseException) else "class"
        return f"What is the {kind} {label} in Python?"
    if inspect.isdatadescriptor(value) and not inspect.isroutine(value):
        return f"What is {label} in Python?"
    return f"What does {label}{_signature(value)} do in Python?"


def _signature(value: Any) -> str:
    """The parameters by name, without defaults and annotations; () where the interpreter does not know them."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (AttributeError, TypeError, ValueError):  # AttributeError: inspect of Python 3.13 on select.epoll
        return "()"
    names = [str(parameter).partition("=")[0].partition(":")[0] for parameter in parameters if parameter.name not in ("self", "cls")]
    return f"({', '.join(names)})" if len(names) <= 6 else "(...)"


def _answered(question: str, value: Any) -> Iterator[dict[str, str]]:
    answer = _answer(value)
    if answer is not None:
        yield {"prompt": question, "completion": answer}


def _answer(value: Any) -> str | None:
    """The first paragraphs of the docstring that fit, each on one line; None when it is not plain prose."""
    own = getattr(value, "__doc__", None)
    documentation = inspect.cleandoc(own if isinstance(own, str) else "")
    kept: list[str] = []
    for paragraph in documentation.split("\n\n"):
        line = " ".join(paragraph.split())
        if not kept and _is_signature(line):
            continue
        if not _is_prose(line) or sum(map(len, kept)) + len(line) > LONGEST:
            break
        kept.append(line)
    text = "\n".join(kept)
    inherited = isinstance(value, type) and documentation == inspect.cleandoc(pydoc.getdoc(object))
    if not SHORTEST <= len(text) <= LONGEST or ADDRESS.search(text) or inherited or not text.isascii():
        return None
    return text


def _is_signature(line: str) -> bool:
    return re.fullmatch(r"[\w.]+\(.*\)( ?-> ?.+)?", line) is not None


def _is_prose(line: str) -> bool:
    """Sentences, rather than a table, code or a list of parameters."""
    if not line or not line[0].isupper() or line[-1] not in ".!" or ">>>" in line or "::" in line or "--" in line:
        return False
    letters = sum(character.isalpha() or character == " " for character in line)
    return len(line.split()) >= 5 and letters / len(line) > 0.85


def _deduplicated(rows: Iterator[dict[str, str]]) -> Iterator[dict[str, str]]:
    """The first row of every question and of every answer."""
    seen: set[str] = set()
    for row in rows:
        if not seen & set(row.values()):
            seen |= set(row.values())
            yield row


def _licence() -> str:
    """The text that came with the interpreter, found where ``license()`` finds it."""
    candidates = [
        Path(folder) / name for folder in (Path(inspect.__file__).parent, Path(sys.base_prefix)) for name in ("LICENSE.txt", "LICENSE")
    ]
    return next(path for path in candidates if path.is_file()).read_text(encoding="utf-8")


def _readme(rows: int) -> str:
    return f"""# python_docs.jsonl

{rows:,} questions about Python's standard library (`prompt`), answered by the first paragraphs of its docstrings (`completion`).

- Source: the docstrings of CPython {platform.python_version()} on Linux.
- Copyright 2001 and later Python Software Foundation; all rights reserved.
- Licence: PSF-2.0, text in `LICENSE.python_docs`. The questions are generated from the names of modules, classes and functions.
- Changes: signatures, examples and tables left out; each paragraph put on one line; answers of {SHORTEST} to {LONGEST} characters;
  duplicates dropped.
- Made by `python scripts/build_python_docs_sample.py`; the same interpreter makes the same bytes.
"""


if __name__ == "__main__":
    main()
