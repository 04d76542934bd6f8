"""One line a workload: what is fastest, by how much before the next engine, and how sure that is; the first thing that a reader sees."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from harness.rank import Group, Variant, Verdict, compare_variants
from harness.record import Provenance
from harness.report.columns import memory_bytes
from harness.report.numbers import gib, plain_rate, times
from harness.report.sentence import went_on
from harness.report.sure import ratio, reach, says_nothing
from harness.spec import Data, Train
from harness.stats import Comparison
from harness.tuned import name_of

MOST_LETTERS = 40  # of a file's name in a title


@dataclass(frozen=True, slots=True)
class Line:
    """A workload on a machine. ``first``: the fastest that can win; ``beside``: who shares its place; ``next``: the best of another engine;
    ``beyond``: what else is known of its parity; ``outdated``: where its engines were measured on the same kind of work after they had
    changed.
    """

    id: str
    title: str
    facts: str
    first: str
    beside: str
    rate: str
    lead: str
    next: str
    sure: str
    memory: str
    parity: str
    parity_kind: str
    beyond: str
    day: str
    outdated: str


@dataclass(frozen=True, slots=True)
class Machine:
    """The lines of one machine, those that are outdated last."""

    name: str
    lines: tuple[Line, ...]


def glance(groups: Sequence[Group]) -> tuple[Machine, ...]:
    """``groups`` (which are sorted by machine) at a glance."""
    return tuple(Machine(name, _lines(list(found))) for name, found in groupby(groups, key=lambda group: group.machine.key))


def identifier(group: Group) -> str:
    """Where the section of ``group`` is on the page."""
    return f"{group.workload.key}-{group.machine.key}"


def title(group: Group) -> str:
    """``llama3_8b · lora · dense · 4 × 2,048``: samples a step by their greatest length in tokens."""
    work = group.workload
    return f"{work.model.name} · {work.method.name} · {data_name(work.data)} · {shape(group)}"


def data_name(data: Data) -> str:
    """``gsm8k``, and ``jsonl train.jsonl`` where the name of its files says something else than its own."""
    names = [re.split(r"[/\\:]", entry.path)[-1] for entry in data.files]
    if all(name.partition(".")[0] == data.name for name in names):
        return data.name
    shown = [name if len(name) <= MOST_LETTERS else f"{name[:MOST_LETTERS]}…" for name in names]
    return f"{data.name} {shown[0]}{'' if len(shown) == 1 else f' and {len(shown) - 1} more'}"


def steps(train: Train) -> str:
    """``60 steps``, ``8 of 60 steps`` of a run that is ended before the schedule is."""
    whole = _counted(train.steps, "step")
    return whole if train.num_steps == train.steps else f"{train.num_steps:,} of {whole}"


def shape(group: Group) -> str:
    """``4 × 2,048``: samples a step by their greatest length."""
    return f"{group.workload.train.samples_per_step}\u00a0×\u00a0{group.workload.data.sequence_length:,}"


def facts(group: Group) -> tuple[str, ...]:
    """What else a workload is, in words, and what the figures of its title are."""
    work = group.workload
    length = f"{'' if work.data.source == 'dense' else 'at most '}{work.data.sequence_length:,} tokens"
    return (
        f"{_counted(work.train.samples_per_step, 'sample')} a step of {length}",
        steps(work.train),
        f"seed {work.train.seed}",
        *([f"data sha-256 {work.data.sha256[:8]}"] if work.data.sha256 and data_name(work.data) != work.data.name else []),
    )


def _counted(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def _lines(groups: Sequence[Group]) -> tuple[Line, ...]:
    alike = defaultdict(list)
    for group in groups:
        alike[name_of(group.workload)].append(group)
    made = [_line(group, _outdated(group, alike[name_of(group.workload)])) for group in groups]
    return tuple(sorted(made, key=lambda line: bool(line.outdated)))


def _outdated(group: Group, alike: Sequence[Group]) -> str:
    mine = _newest(group)
    later = [other for other in alike if any(one.runs for one in other.variants) and _has_changed(mine, _newest(other))]
    if not later:
        return ""
    last = max(later, key=_day)
    return f"since then engines have changed: see {_day(last)}, {steps(last.workload.train)}"


def _newest(group: Group) -> dict[str, Provenance]:
    """Of every engine, as its users call its settings, that has a rate here, where its newest record is from; of those that failed, where
    nothing has a rate.
    """
    ran = [run.record for variant in group.variants for run in variant.runs]
    records = ran or [failure.record for variant in group.variants for failure in variant.failures]
    return {one.cell.engine.title: one.provenance for one in sorted(records, key=lambda one: one.provenance.started_utc)}


def _has_changed(before: Mapping[str, Provenance], after: Mapping[str, Provenance]) -> bool:
    """Whether one of the engines of ``before`` is there ``after`` with another source."""
    pairs = [(before[name], after[name]) for name in before.keys() & after.keys()]
    return any(new.started_utc > old.started_utc and new.engine_fingerprint != old.engine_fingerprint for old, new in pairs)


def _day(group: Group) -> str:
    """When it was measured last."""
    return max((entry.record.provenance.started_utc[:10] for one in group.variants for entry in (*one.runs, *one.failures)), default="")


def _line(group: Group, outdated: str) -> Line:
    able = [variant for variant in group.variants if variant.runs and variant.can_win]
    first = able[0] if able else None
    rival = next((one for one in able if first and one.engine.name != first.engine.name), None)
    lead, sure = _lead(first, rival, group)
    verdict = first.verdict if first else None
    parity, beyond = _parted(verdict.label if verdict else "")
    return Line(
        id=identifier(group),
        title=title(group),
        facts=", ".join(facts(group)),
        first=first.label if first else _nobody(group),
        beside=_beside(group),
        rate=plain_rate(first.tokens_per_second) if first else "",
        lead=lead,
        next=rival.label if rival else "",
        sure=sure,
        memory=gib(memory_bytes(first, group)) if first else "",
        parity=parity,
        parity_kind=verdict.look if verdict else "",
        beyond="; ".join(filter(None, (beyond, _light(verdict)))),
        day=_day(group),
        outdated=outdated,
    )


def _parted(label: str) -> tuple[str, str]:
    """The verdict, and what stands behind it: how many of its tests could be done, or which other workload it was made on."""
    found = re.fullmatch(r"(.*?)(?: \((.*)\)|; (.*))?", label)
    assert found is not None
    return found[1], found[2] or found[3] or ""


def _light(verdict: Verdict | None) -> str:
    """What the light check said of a workload that the full rule could not judge."""
    ended = verdict.light.text if verdict and verdict.kind == "not comparable" else ""
    return f"light check {ended}" if ended else ""


def _nobody(group: Group) -> str:
    if went_on(group):
        return "no rate: went on from a checkpoint"
    return "nothing that can win" if any(variant.runs for variant in group.variants) else "nothing ran to the end"


def _beside(group: Group) -> str:
    """Who else has the first place, by number: the section has the names."""
    others = len(group.outcome.first) - 1
    return "" if others < 1 else f"shares the first place with {others} other{'s' if others > 1 else ''}"


def _lead(first: Variant | None, rival: Variant | None, group: Group) -> tuple[str, str]:
    if first is None:
        return "", ""
    if rival is None:
        barred = any(one.runs and not one.can_win and one.engine.name != first.engine.name for one in group.variants)
        return "", "no other engine that can win" if barred else "no other engine to compare with"
    compared = compare_variants(first, rival)
    if compared.interval is None:
        return "", "no repeat on the same host"
    return times(ratio(first, rival, compared)), _sure(compared)


def _sure(compared: Comparison) -> str:
    interval = compared.interval
    assert interval is not None
    if interval.n == 1:
        return "one pair of runs: no verdict"
    if says_nothing(compared):
        return reach(compared)
    told = {"faster": "", "same": "the same; ", "slower": "slower; "}.get(compared.answer, "too close to call; ")
    return f"{told}{reach(compared)}"
