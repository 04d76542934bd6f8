"""What the templates show of a group: every value already text, so that the HTML and the Markdown say the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harness.engine import LossNorm
from harness.floor import Floors
from harness.rank import Entry, Group, Variant, compare_variants, failure_text
from harness.record import Record, traceback_of
from harness.report import processes
from harness.report.columns import memory_bytes, memory_name, place
from harness.report.front import told
from harness.report.measured import Details, details
from harness.report.numbers import gib, number, plain_rate
from harness.report.reproduce import Options, command, newer_knobs
from harness.report.sentence import Sentences, sentence_since, sentences
from harness.report.sure import ratio, reach
from harness.report.titles import facts, identifier, title
from harness.stats import median

if TYPE_CHECKING:
    from harness.report.plots import Look, Plot

LOSS_NORMS: dict[LossNorm | None, str] = {
    "token_global": "all labels of the step",
    "rank_token_mean": "each rank's labels, then over ranks",
    "micro_mean": "each micro-batch's labels, then over micro-batches",
    None: "",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the ranking."""

    rank: str
    label: str
    look: Look | None
    rate: str
    repeats: str
    against_first: str
    interval: str
    memory: str
    startup_seconds: str
    held_out_loss: str
    parity: str
    parity_kind: str
    parity_detail: str
    light: str
    flag: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A cell that did not end ok."""

    label: str
    text: str
    traceback: str | None


@dataclass(frozen=True, slots=True)
class Source:
    """How to make a variant again, and what it was made with."""

    label: str
    command: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Section:
    """One group."""

    id: str
    title: str
    machine: str
    facts: tuple[str, ...]
    sentences: Sentences
    memory_name: str
    rows: tuple[Row, ...]
    behind: Details | None
    processes: Details | None
    failures: tuple[Failure, ...]
    plots: tuple[Plot, ...]
    sources: tuple[Source, ...]


def section(
    group: Group,
    groups: Sequence[Group],
    known: Options,
    floors: Floors,
    drawn: Sequence[Plot] = (),
    look: Mapping[str, Look] | None = None,
    outdated: str = "",
) -> Section:
    """The view of ``group`` among ``groups``; ``known`` are the options of conf/, ``floors`` what was measured of this machine's limits,
    ``outdated`` where its engines were measured after they had changed.
    """
    return Section(
        id=identifier(group),
        title=title(group),
        machine=group.machine.key,
        facts=(*facts(group), f"workload {group.workload.key}"),
        sentences=_sentences(group, outdated),
        memory_name=memory_name(group),
        rows=tuple(_row(variant, group, (look or {}).get(variant.label)) for variant in group.variants if variant.runs),
        behind=details(group, floors),
        processes=processes.details(group, groups),
        failures=tuple(_failure(variant, entry) for variant in group.variants for entry in variant.failures),
        plots=tuple(drawn),
        sources=tuple(_source(variant, group, known) for variant in group.variants),
    )


def _sentences(group: Group, outdated: str) -> Sentences:
    """The answer, whether it is an old one, and what to choose where memory is short."""
    said, short = sentences(group), told(group)
    return replace(said, details=(*filter(None, (sentence_since(outdated),)), *said.details, *(() if short is None else (short,))))


def _failure(variant: Variant, entry: Entry) -> Failure:
    return Failure(variant.label, failure_text(entry.record), traceback_of(entry.record))


def _row(variant: Variant, group: Group, look: Look | None) -> Row:
    verdict = variant.verdict
    ratio, interval = _against_first(variant, group)
    light = f"light check: {verdict.light.detail}" if verdict and verdict.kind == "not comparable" and verdict.light.text else ""
    return Row(
        rank=place(variant, group),
        label=variant.label,
        look=look,
        rate=plain_rate(variant.tokens_per_second),
        repeats=", ".join(map(plain_rate, variant.rates)),
        against_first=ratio,
        interval=interval,
        memory=gib(memory_bytes(variant, group)),
        startup_seconds=number(_startup_seconds(variant), 1),
        held_out_loss=number(variant.held_out_loss),
        parity=verdict.label if verdict else "",
        parity_kind=verdict.look if verdict else "",
        parity_detail=verdict.detail if verdict else "",
        light=light,
        flag="" if variant.can_win else "cannot win",
    )


def _against_first(variant: Variant, group: Group) -> tuple[str, str]:
    """The rate as a multiple of the first of the ranking, and the interval of that."""
    first = group.variants[0]
    if variant is first:
        return "1", ""
    compared = compare_variants(variant, first)
    return f"{ratio(variant, first, compared):.3f}" if compared.interval else "", reach(compared)


def _startup_seconds(variant: Variant) -> float | None:
    """Median over the repeats of everything before the second step: process, set-up, and the first step with its compilation."""
    seconds = []
    for run in variant.runs:
        if run.record.measurement:
            startup = run.record.measurement.startup
            seconds.append(startup.process_seconds + (startup.setup_seconds or 0.0) + run.record.measurement.steps.seconds[0])
    return median(seconds) if seconds else None


def _source(variant: Variant, group: Group, known: Options) -> Source:
    entries = (*variant.runs, *variant.failures)
    records = [entry.record for entry in entries]
    repeats = sorted({record.cell.repeat for record in records})
    packages = {f"{name} {version}" for record in records for name, version in record.provenance.packages.items()}
    said = [
        ("commit", _joined(records, lambda record: record.provenance.commit + (" with local changes" if record.provenance.dirty else ""))),
        ("Python", _joined(records, lambda record: record.provenance.python)),
        ("packages", ", ".join(sorted(packages))),
        ("driver", _joined(records, lambda record: record.provenance.driver or "")),
        ("environment", " ".join(f"{key}={value}" for key, value in variant.engine.environment.items())),
        ("loss is a mean of", _joined(records, lambda record: LOSS_NORMS[record.loss_norm])),
        ("host", _joined(records, lambda record: record.provenance.host)),
        ("measured", _joined(records, lambda record: record.provenance.started_utc)),
        ("records", ", ".join(entry.path for entry in entries)),
        ("older records of the same cells", str(variant.num_superseded or "")),
        ("knobs since then", _newer(newer_knobs(variant.engine, known))),
        ("notes", "; ".join(dict.fromkeys(note for record in records for note in record.notes))),
    ]
    shown = tuple((name, text) for name, text in said if text)
    return Source(variant.label, command(records[0].cell, group.machine, repeats, known), shown)


def _newer(knobs: Sequence[str]) -> str:
    """What the engine has got since it left the records."""
    return (
        f"engine.knobs: {', '.join(knobs)}; the command gives them their defaults (check the commit out for the code of then)"
        if knobs
        else ""
    )


def _joined(records: Sequence[Record], fact: Callable[[Record], str]) -> str:
    return ", ".join(dict.fromkeys(text for record in records if (text := fact(record))))
