"""Which method: those measured on the same work side by side, and what follows for who has a card, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.rank import Group, Variant
from harness.report.advice import advice, compare_rates, nothing, rate_ratio, signed, words
from harness.report.columns import memory_bytes, memory_name
from harness.report.families import Family, Member, families
from harness.report.numbers import gib, number, plain_rate, rate
from harness.report.sentence import Sentences
from harness.report.sure import reach
from harness.report.titles import data_name, identifier, shape, steps


@dataclass(frozen=True, slots=True)
class Row:
    """A method. ``id``: of the section of its workload. ``distance_note``: the seeds, and whose loss it was compared with."""

    id: str
    name: str
    differs: str
    first: str
    rate: str
    ratio: str
    interval: str
    memory: str
    held_out_loss: str
    distance: str
    distance_note: str
    least: str
    least_note: str


@dataclass(frozen=True, slots=True)
class Table:
    """A family. ``reference``: the name of the method that the others are compared with."""

    id: str
    title: str
    machine: str
    facts: str
    sentences: Sentences
    reference: str
    memory_name: str
    rows: tuple[Row, ...]


def methods(groups: Sequence[Group], outdated: Mapping[str, str]) -> tuple[Table, ...]:
    """One table for each set of workloads on one machine that differ in their method.

    ``outdated``: of ``glance``, by id of a group; what was measured again since is left out.
    """
    return tuple(map(_table, families([group for group in groups if not outdated.get(identifier(group))])))


def side_by_side(tables: Sequence[Table]) -> dict[str, Table]:
    """The table of a workload, by the id of its section."""
    return {row.id: table for table in tables for row in table.rows}


def _table(family: Family) -> Table:
    group = family.reference.group
    work = group.workload
    return Table(
        id=f"methods-{identifier(group)}",
        title=f"{work.model.name} · {data_name(work.data)} · {shape(group)}",
        machine=group.machine.key,
        facts=f"{steps(work.train)}, seed {work.train.seed}",
        sentences=advice(family),
        reference=family.reference.name,
        memory_name=memory_name(group),
        rows=tuple(_row(member, family) for member in family.members),
    )


def _row(member: Member, family: Family) -> Row:
    group, first, least = member.group, member.first, member.leanest
    ratio, interval = _against(member, family.reference)
    return Row(
        id=identifier(group),
        name=member.name,
        differs=", ".join(f"{words(name)} {mine}" for name, mine, _ in member.differs),
        first=first.label if first else nothing(group),
        rate=plain_rate(first.tokens_per_second) if first else "",
        ratio=ratio,
        interval=interval,
        memory=gib(memory_bytes(first, group)) if first else "",
        held_out_loss=number(first.held_out_loss) if first else "",
        distance=signed(member.distance.mean) if member.distance else "",
        distance_note=_distance_note(member),
        least=gib(memory_bytes(least, group)) if least else "",
        least_note=_least_note(least, member),
    )


def _against(member: Member, reference: Member) -> tuple[str, str]:
    """The rate as a multiple of the reference's, and how sure that is."""
    compared = compare_rates(member, reference)
    if compared is None:
        return ("1", "") if member is reference else ("", "")
    return f"{rate_ratio(member, reference):.3f}", reach(compared)


def _distance_note(member: Member) -> str:
    distance = member.distance
    if distance is None:
        return ""
    values = distance.by_seed.values()
    each = [f"{signed(min(values))} to {signed(max(values))}, {len(values)} seeds"] if len(values) > 1 else []
    other = [] if member.first and distance.against.engine.key == member.first.engine.key else [f"from {distance.against.label}"]
    return ", ".join([*each, *other])


def _least_note(least: Variant | None, member: Member) -> str:
    if least is None:
        return ""
    return "the fastest" if least is member.first else f"{least.label}, {rate(least.tokens_per_second)}"
