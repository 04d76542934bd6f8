"""One line for each kind of work: what is fastest, by how much before the next engine, and how sure that is; the first thing that a reader
sees. Other sweeps of the same work stand below it, workloads that were made to judge last.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from harness.rank import Group, Variant, compare_variants
from harness.record import Provenance
from harness.report.columns import memory_bytes
from harness.report.numbers import gib, plain_rate, times
from harness.report.sentence import verdicts_of, was_unsteady, went_on
from harness.report.sure import ratio, reach, says_nothing
from harness.report.titles import counted, data_name, facts, identifier, steps, title
from harness.stats import Comparison
from harness.tuned import name_of
from harness.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Line:
    """A workload on a machine. ``first``: the fastest that can win; ``beside``: who shares its place; ``next``: the best of another engine;
    ``beyond``: what else is known of its parity; ``outdated``: where the fastest was measured on the same kind of work after its engine
    had changed; ``again``: what tells it from other sweeps of that work; ``verdicts``: how many of each, where it was made to judge.
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
    again: str
    verdicts: str


@dataclass(frozen=True, slots=True)
class Work:
    """A kind of work: the sweep whose fastest is fastest of all, as far as engines still are what they were, and the others."""

    first: Line
    also: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured on one machine: ``works`` by model, method, data and shape, and the workloads that were made to judge."""

    name: str
    works: tuple[Work, ...]
    judging: tuple[Line, ...]

    @property
    def lines(self) -> tuple[Line, ...]:
        """All of them, from the top."""
        return (*(line for work in self.works for line in (work.first, *work.also)), *self.judging)


def glance(groups: Sequence[Group]) -> tuple[Machine, ...]:
    """``groups`` (which are sorted by machine) at a glance."""
    return tuple(_machine(name, list(found)) for name, found in groupby(groups, key=lambda group: group.machine.key))


def _machine(name: str, groups: Sequence[Group]) -> Machine:
    kinds = defaultdict(list)
    for group in sorted(groups, key=_order):
        kinds[name_of(group.workload)].append(group)
    timed = {kind: [group for group in alike if not group.is_made_to_judge] for kind, alike in kinds.items()}
    return Machine(
        name,
        works=tuple(_work(mine, kinds[kind]) for kind, mine in timed.items() if mine),
        judging=tuple(_line(group, _outdated(group, alike)) for alike in kinds.values() for group in alike if group.is_made_to_judge),
    )


def _order(group: Group) -> tuple[str, str, str, int, int, int]:
    work = group.workload
    return work.model.name, work.method.name, data_name(work.data), work.data.sequence_length, work.train.samples_per_step, work.train.seed


def _work(timed: Sequence[Group], alike: Sequence[Group]) -> Work:
    """``alike``: all sweeps of this kind of work, of which ``timed`` are to be shown."""
    since = {id(group): _outdated(group, alike) for group in timed}

    def order(group: Group) -> tuple[bool, float]:
        first = _winner(group)
        return bool(since[id(group)]), -(first.tokens_per_second or 0.0) if first else 0.0

    first, *also = (_line(group, since[id(group)]) for group in sorted(timed, key=order))
    return Work(first, tuple(also))


def _outdated(group: Group, alike: Sequence[Group]) -> str:
    """Where the fastest was measured again with another source of its engine; where nothing can win, anything of it."""
    mine, first = _newest(group), _winner(group)
    if first:
        mine = {first.engine.title: mine[first.engine.title]}
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
    first = _winner(group)
    rival = next((one for one in _able(group) if first and one.engine.name != first.engine.name), None)
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
        beyond="; ".join(filter(None, (_counting_workloads(beyond), _light(verdict)))),
        day=_day(group),
        outdated=outdated,
        again=f"{steps(group.workload.train)}, seed {group.workload.train.seed}",
        verdicts=_verdicts(group) if group.is_made_to_judge else "",
    )


def _able(group: Group) -> list[Variant]:
    return [variant for variant in group.variants if variant.runs and variant.can_win]


def _winner(group: Group) -> Variant | None:
    return next(iter(_able(group)), None)


def _verdicts(group: Group) -> str:
    """``5 settings: 4 same, 1 different; 1 reference: hf``; what failed is in the section."""
    known, kinds = verdicts_of(group)
    told = [f"{kinds[kind]} {kind}" for kind in ("same", "different", "not comparable") if kinds[kind]]
    references = [one.label for one in group.variants if one.runs and one.verdict and one.verdict.kind == "reference"]
    beside = f"; {counted(len(references), 'reference')}: {', '.join(references)}" if references else ""
    return f"{counted(len(known), 'setting')}: {', '.join(told) or 'none judged'}{beside}"


def _parted(label: str) -> tuple[str, str]:
    """The verdict, and what stands behind it: how many of its tests could be done, or which other workload it was made on."""
    found = re.fullmatch(r"(.*?)(?: \((.*)\)|; (.*))?", label)
    assert found is not None
    return found[1], found[2] or found[3] or ""


def _counting_workloads(beyond: str) -> str:
    """``fp32 on 2 other workloads, NVIDIA H200``: the section has their names."""

    def told(found: re.Match[str]) -> str:
        others = found[1].count(" and -")
        return f"on {others + 1} other workloads" if others else "on another workload"

    return re.sub(r"on \S+-[0-9a-f]{8}((?: and -[0-9a-f]{8})*)", told, beyond)


def _light(verdict: Verdict | None) -> str:
    """What the light check said of a workload that the full rule could not judge."""
    ended = verdict.light.text if verdict and verdict.kind == "not comparable" else ""
    return f"light check {ended}" if ended else ""


def _nobody(group: Group) -> str:
    if went_on(group):
        return "no rate: went on from a checkpoint"
    if was_unsteady(group):
        return "no rate: not steady"
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
