"""Write report.html (one file, no script, nothing fetched) and report.md."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from harness.errors import StoreError
from harness.rank import Group
from harness.report.glance import glance
from harness.report.history import history
from harness.report.judged import judged
from harness.report.methods import methods, side_by_side
from harness.report.plots import looks, plots
from harness.report.reproduce import options
from harness.report.titles import identifier
from harness.report.tuning import tuning
from harness.report.view import section
from harness.store import Results


def write(results: Results, out: Path, groups: tuple[Group, ...] | None = None) -> Path:
    """Write report.html and report.md into ``out``; returns the path of report.html. Raises StoreError when that cannot be done.

    ``groups``: of ``judged(results)``, from whoever has judged them already.
    """
    content = _content(results, groups)
    _save(out / "report.md", _markdown(content))
    return _save(out / "report.html", _html(content))


def html(results: Results) -> str:
    """The page as text."""
    return _html(_content(results))


def markdown(results: Results) -> str:
    """The report without plots, for places that show Markdown; everything from records is escaped."""
    return _markdown(_content(results))


def save_one(results: Results, out: Path, name: str) -> Path:
    """Write only ``report.html`` or only ``report.md``."""
    return _save(out / name, html(results) if name.endswith(".html") else markdown(results))


def _content(results: Results, groups: tuple[Group, ...] | None = None) -> dict[str, Any]:
    """What both templates show."""
    groups, known = _latest_machine_first(judged(results) if groups is None else groups), options()
    look, at_a_glance = looks(groups), glance(groups)
    outdated = {line.id: line.outdated for machine in at_a_glance for line in machine.lines}  # in the order of the page
    groups = tuple(sorted(groups, key=lambda group: list(outdated).index(identifier(group))))
    records = [stored.record for stored in results.stored]
    tables = methods(groups, outdated)
    return {
        "sections": [
            section(group, groups, known, results.floors, plots(group, look), look, outdated[identifier(group)]) for group in groups
        ],
        "glance": at_a_glance if len(groups) > 1 else (),
        "methods": tables,
        "side_by_side": side_by_side(tables),
        "problems": results.problems,
        "history": history(results).lines,
        "tunings": [tuning(found) for found in results.tuned],
        "num_records": len(records),
        "num_machines": len({record.machine.key for record in records}),
        "newest": _minute(max((record.provenance.started_utc for record in records), default="none")),
    }


def _latest_machine_first(groups: Sequence[Group]) -> tuple[Group, ...]:
    """``groups``, whose machines stand together, with the machine that was measured last before the others."""
    last: dict[str, str] = {}
    for group in groups:
        for variant in group.variants:
            for entry in (*variant.runs, *variant.failures):
                last[group.machine.key] = max(last.get(group.machine.key, ""), entry.record.provenance.started_utc)
    return tuple(sorted(groups, key=lambda group: last[group.machine.key], reverse=True))


def _minute(started_utc: str) -> str:
    """``2026-11-27 11:25 UTC`` of a record's time stamp."""
    return re.sub(r"^(\d{4}-\d{2}-\d{2})T(\d{2}:\d{2}):\S*\+00:00$", r"\1 \2 UTC", started_utc)


def _html(content: dict[str, Any]) -> str:
    environment = _environment(autoescape=True)
    environment.filters["breakable"] = _breakable
    assert environment.loader is not None
    style, _, _ = environment.loader.get_source(environment, "style.css")
    return environment.get_template("report.html.j2").render(content, style=Markup(style))  # beside the plots all that is not escaped


def _markdown(content: dict[str, Any]) -> str:
    environment = _environment(autoescape=False, finalize=_escaped)
    environment.filters["code"] = _code
    return environment.get_template("report.md.j2").render(content)


def _environment(*, autoescape: bool, finalize: Callable[[Any], Any] | None = None) -> Environment:
    return Environment(
        loader=PackageLoader("harness.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=finalize,
    )


def _breakable(name: str) -> Markup:
    """The name of a variant, with the places where a narrow column may break it."""
    return Markup(re.sub(r"([/+=_])", r"\1<wbr>", str(escape(name))))


def _escaped(value: Any) -> Any:
    """Text that Markdown shows as it is: no table cell ends early, no link, image, emphasis or HTML begins."""
    if isinstance(value, Markup):
        return value
    line = " ".join(str(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|~#$!])", r"\\\1", line).replace("://", ":\\//").replace("@", "\\@")


def _code(text: str) -> Markup:
    """A fenced block whose fence is longer than any run of backticks in ``text``."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}sh\n{text}\n{fence}")  # not HTML: fenced


def _save(path: Path, text: str) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot write the report ({error.strerror}); choose another folder with --out") from error
    return path
