"""Who is fastest on one workload and one machine, by how much and how sure: variants, repeats, ties, the outcome."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from harness.current import latest, outgrown
from harness.engine import Machine
from harness.labels import labels
from harness.record import Record, Score, cause, dumps
from harness.spec import EngineSpec, Workload
from harness.stats import Comparison, compare, median, tokens_per_second
from harness.verdict import Verdict

_Block = tuple[int, str]  # a repeat, and the host that it ran on


@dataclass(frozen=True)
class Entry:
    """One record, where it is stored (relative to its root), its score and its verdict."""

    record: Record
    path: str
    score: Score | None
    verdict: Verdict

    @functools.cached_property
    def tokens_per_second(self) -> float | None:
        """The rate of a run with status ok; None when it failed, went on from a checkpoint, or nothing was timed."""
        measurement = self.record.measurement
        return tokens_per_second(measurement.steps) if self.record.status == "ok" and measurement and not measurement.resumed_at else None


@dataclass(frozen=True, slots=True)
class Variant:
    """One engine with one set of knobs, on one workload and machine, over its repeats.

    ``runs``: the repeats with status ok, ``failures``: the others, both by repeat number. ``num_superseded``: older records of the
    same cells, and of the engine before it had all its knobs; not counted. ``rank``: 1 is best, ties share it, null when nothing ran.
    ``comparison``: with the first of its rank.
    """

    label: str
    engine: EngineSpec
    runs: tuple[Entry, ...]
    failures: tuple[Entry, ...]
    num_superseded: int
    rank: int | None = None
    comparison: Comparison | None = None

    @property
    def rates(self) -> tuple[float, ...]:
        """Tokens per second of every repeat."""
        return tuple(rate for run in self.runs if (rate := run.tokens_per_second) is not None)

    @property
    def tokens_per_second(self) -> float | None:
        """The median repeat."""
        return median(self.rates) if self.rates else None

    @property
    def status(self) -> str:
        """``ok`` when at least one repeat is, otherwise the status of the first failure."""
        return "ok" if self.runs else self.failures[0].record.status

    @property
    def reason(self) -> str | None:
        """Every failure with its repeat number, status and reason; null when there was none."""
        return "; ".join(failure_text(entry.record) for entry in self.failures) or None

    @property
    def verdict(self) -> Verdict | None:
        """The worst verdict over the repeats. A reference whose other repeats agree with it, or say nothing, stays the reference."""
        verdicts = [run.verdict for run in self.runs]
        kinds = {verdict.kind for verdict in verdicts}
        if "reference" in kinds and "different" not in kinds:
            return next(verdict for verdict in verdicts if verdict.kind == "reference")
        order = ("different", "not comparable", "same", "reference")
        return min(verdicts, key=lambda verdict: (verdict.can_win, order.index(verdict.kind)), default=None)

    @property
    def can_win(self) -> bool:
        """Whether every repeat trained what the reference trained, as far as could be checked."""
        return all(run.verdict.can_win for run in self.runs)

    @property
    def peak_allocated_bytes(self) -> int | None:
        """The largest over repeats, ranks and phases; null on a CPU."""
        return self._peak("peak_allocated_bytes")

    @property
    def peak_rss_bytes(self) -> int | None:
        """Host memory, the largest over repeats, ranks and phases."""
        return self._peak("peak_rss_bytes")

    @property
    def held_out_loss(self) -> float | None:
        """The median over the scored repeats."""
        losses = [run.score.held_out_loss for run in self.runs if run.score]
        return median(losses) if losses else None

    def _peak(self, field: str) -> int | None:
        measurements = [run.record.measurement for run in self.runs if run.record.measurement]
        values = [getattr(memory, field) for measurement in measurements for memory in measurement.memory]
        return max((value for value in values if value is not None), default=None)


@dataclass(frozen=True, slots=True)
class Outcome:
    """``first``: the variants that share rank 1. ``next``: the runner-up, tied or behind, with ``lead`` = the first against it.

    ``barred``: variants measured faster than the winner which cannot win because they did not train the same.
    """

    first: tuple[Variant, ...]
    next: Variant | None
    lead: Comparison | None
    barred: tuple[Variant, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Everything measured for one workload on one machine; ``variants`` in the order of the ranking, failures last."""

    machine: Machine
    workload: Workload
    variants: tuple[Variant, ...]
    outcome: Outcome

    @property
    def is_made_to_judge(self) -> bool:
        """Whether first steps were run alone, too: that is done for verdicts, on work too short to time."""
        return any(run.verdict.of_first_step for variant in self.variants for run in variant.runs)


def rank(entries: Iterable[Entry]) -> tuple[Group, ...]:
    """Group ``entries`` by machine and workload and rank each group. Groups are sorted by machine, model, method and data."""
    grouped: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        grouped.setdefault((entry.record.machine.key, entry.record.cell.workload.key), []).append(entry)
    groups = [_group(members) for members in grouped.values()]
    return tuple(sorted(groups, key=lambda group: (group.machine.key, group.workload.label)))


def failure_text(record: Record) -> str:
    """``repeat 2: oom: CUDA out of memory``."""
    return f"repeat {record.cell.repeat}: {record.status}: {cause(record)}"


def _group(entries: Sequence[Entry]) -> Group:
    variants = _ranked(_variants(entries))
    first = entries[0].record
    return Group(first.machine, first.cell.workload, variants, _outcome(variants))


def _variants(entries: Sequence[Entry]) -> list[Variant]:
    older = outgrown([entry.record for entry in entries])
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        key = entry.record.cell.engine.key
        found.setdefault(older.get(key, key), []).append(entry)
    engines = {entry.record.cell.engine.key: entry.record.cell.engine for entry in entries}
    names = labels([engines[key] for key in found])
    codes = {record.cell.key: record.provenance.engine_fingerprint for record in latest(entry.record for entry in entries)}
    placed = [(_block(entry.record), key, entry) for key in found for entry in found[key]]
    ran = {(block, engines[key].name, key) for block, key, entry in placed if _ran(entry, codes[entry.record.cell.key])}
    names_beside = Counter(block for block, _ in {(block, name) for block, name, _ in ran})
    beside = {block: (names_beside[block], count) for block, count in Counter(block for block, _, _ in ran).items()}
    return [_variant(name, engines[key], found[key], beside) for name, key in zip(names, found, strict=True)]


def _variant(label: str, engine: EngineSpec, entries: Sequence[Entry], beside: Mapping[_Block, tuple[int, int]]) -> Variant:
    """``entries``: of ``engine``, and of what it was before it had all its knobs. ``beside``: engines and variants that ran in a block."""
    cells: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.record.cell.engine.key == engine.key:
            cells.setdefault(entry.record.cell.key, []).append(entry)
    counted = sorted((_counts(cell, beside) for cell in cells.values()), key=lambda entry: entry.record.cell.repeat)
    runs = tuple(entry for entry in counted if entry.tokens_per_second is not None)
    failures = tuple(entry for entry in counted if entry.tokens_per_second is None)
    return Variant(label, engine, runs, failures, _num_distinct(entries) - len(counted))


def _counts(cell: Sequence[Entry], beside: Mapping[_Block, tuple[int, int]]) -> Entry:
    """Of the runs of one cell the newest; where the same code ran it in several blocks, the one beside which most engines ran, then most
    variants, of those whose code has not been run anew since: a run alone says less than a block that it would tear apart.
    """
    newest = max(cell, key=lambda entry: entry.record.provenance.started_utc)
    code = newest.record.provenance.engine_fingerprint
    alike = [entry for entry in cell if _ran(entry, code)]
    if newest not in alike:
        return newest
    return max(alike, key=lambda entry: (beside[_block(entry.record)], entry.record.provenance.started_utc))


def _ran(entry: Entry, code: str) -> bool:
    """Whether it has a rate, and is of the code with this fingerprint."""
    return entry.tokens_per_second is not None and entry.record.provenance.engine_fingerprint == code


def _num_distinct(entries: Sequence[Entry]) -> int:
    """A record that was promoted lies in two roots and is one record; only those of the same cell and moment can be equal."""
    moments = {(entry.record.cell.key, entry.record.provenance.started_utc) for entry in entries}
    if len(moments) == len(entries):
        return len(entries)
    return len({dumps(entry.record) for entry in entries})


def _ranked(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    def order(variant: Variant) -> tuple[bool, bool, float, str]:
        rate = variant.tokens_per_second
        return rate is None, not variant.can_win, -(rate or 0.0), variant.label

    ranked: list[Variant] = []
    leader: Variant | None = None
    for place, variant in enumerate(sorted(variants, key=order), start=1):
        if not variant.runs:
            ranked.append(variant)
            continue
        comparison = compare_variants(variant, leader) if leader and leader.can_win == variant.can_win else None
        if leader is None or leader.rank is None or comparison is None or comparison.answer == "slower":
            leader = variant = replace(variant, rank=place, comparison=comparison)
        else:
            variant = replace(variant, rank=leader.rank, comparison=comparison)
        ranked.append(variant)
    return tuple(ranked)


def compare_variants(a: Variant, b: Variant) -> Comparison:
    """Is ``a`` faster than ``b``? Runs are paired by repeat number, on one host: a repeat is a block measured in one sitting."""
    theirs = {_block(run.record): run.tokens_per_second for run in b.runs}
    pairs = [(run.tokens_per_second, theirs[block]) for run in a.runs if (block := _block(run.record)) in theirs]
    rates = [(x, y) for x, y in pairs if x is not None and y is not None]
    return compare([x for x, _ in rates], [y for _, y in rates])


def _outcome(variants: Sequence[Variant]) -> Outcome:
    able = [variant for variant in variants if variant.runs and variant.can_win]
    first = tuple(variant for variant in able if variant.rank == 1)
    behind = tuple(variant for variant in able if variant.rank != 1)
    best = max((variant.tokens_per_second or 0.0 for variant in first), default=0.0)
    barred = tuple(v for v in variants if v.runs and not v.can_win and (v.tokens_per_second or 0.0) > best)
    rival = next(iter(first[1:] or behind), None)
    return Outcome(first, rival, compare_variants(first[0], rival) if first and rival else None, barred)


def _block(record: Record) -> _Block:
    return record.cell.repeat, record.provenance.host
