"""What several processes bring: tokens/s of each, efficiency against one, and which rank the others wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.engine import Machine
from harness.rank import Group, Variant
from harness.record import Measurement, RankSteps, Record
from harness.report.measured import Details
from harness.report.numbers import finite, gib, number, plain_rate
from harness.spec import Workload
from harness.stats import median
from harness.steady import steady


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank of the first repeat: its median ``step_seconds``, those of them that it did not wait (null: not known), the share of the
    steps that it waited and that it exchanged while it computed nothing, and its peak of memory over phases, the allocator's on a GPU,
    resident on a CPU.
    """

    rank: int
    step_seconds: float
    busy_seconds: float | None
    waiting_share: float | None
    exchanging_share: float | None
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Scaling:
    """Of a variant on ``processes``. ``efficiency``: its rate a process over that of ``against``, the same engine and knobs in one process;
    null where nobody measured that. ``against`` names the record; ``work``: that it did the same steps, or
    steps of one process' share of the samples.
    """

    processes: int
    tokens_per_second_per_process: float | None
    efficiency: float | None
    against: str | None
    work: str
    ranks: tuple[Rank, ...]


def scaling(variant: Variant, group: Group, groups: Sequence[Group]) -> Scaling | None:
    """None for a variant in one process. ``groups``: everything measured, among it perhaps the one process to compare with."""
    processes = variant.engine.processes
    if processes == 1:
        return None
    rate = variant.tokens_per_second
    each = rate / processes if rate else None
    one, work = _one_process(variant, group, groups)
    efficiency = each / one.tokens_per_second if each and one and one.tokens_per_second else None
    return Scaling(processes, each, efficiency, one.runs[0].path if one else None, work, _ranks(variant))


def plain(of: Scaling | None) -> dict[str, Any]:
    """For programs; null where there is one process."""
    ranks = [
        {
            "rank": one.rank,
            "step_seconds": finite(one.step_seconds),
            "busy_seconds": finite(one.busy_seconds),
            "waiting_share": finite(one.waiting_share),
            "exchanging_share": finite(one.exchanging_share),
            "peak_gib": None if one.peak_bytes is None else one.peak_bytes / 2**30,
        }
        for one in (of.ranks if of else ())
    ]
    return {
        "tokens_per_second_per_process": finite(of.tokens_per_second_per_process) if of else None,
        "scaling_efficiency": finite(of.efficiency) if of else None,
        "scaling_against": f"{of.work} in one process: {of.against}" if of and of.against else None,
        "ranks": ranks,
    }


def details(group: Group, groups: Sequence[Group]) -> Details | None:
    """The table of ``group``; None when none of its variants ran in several processes."""
    found = [(variant.label, one) for variant in group.variants if variant.runs and (one := scaling(variant, group, groups)) is not None]
    columns = {title.format(_unit(group)): [tell(one) for _, one in found] for title, tell in _COLUMNS.items()}
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    rows = tuple(tuple(cells) for cells in zip([label for label, _ in found], *shown.values(), strict=True))
    return Details(("variant", *shown), rows) if rows else None


def lines(group: Group, groups: Sequence[Group]) -> list[str]:
    """For a terminal: a line a variant in several processes."""
    told = []
    for variant in group.variants:
        one = scaling(variant, group, groups) if variant.runs else None
        if one is not None:
            said = [f"{plain_rate(one.tokens_per_second_per_process)} tokens/s a {_unit(group)}", _efficiency(one), _slowest(one)]
            told.append(f"  {variant.label}: {'; '.join(text for text in said if text)}")
    return told


def _unit(group: Group) -> str:
    return "GPU" if group.machine.device == "cuda" else "process"


def _one_process(variant: Variant, group: Group, groups: Sequence[Group]) -> tuple[Variant | None, str]:
    """The same engine in one process on such a machine: on the same workload, or else on one with a process' share of the samples."""
    spec = variant.engine
    alone = spec.model_copy(update={"processes": 1})
    work = group.workload
    share = _share_of(work, spec.processes)
    for wanted, how in ((work, "the same steps"), (share, "a share of the samples")):
        for other in groups:
            if wanted is None or not _same_but_count(other.machine, group.machine) or other.workload.key != wanted.key:
                continue
            for candidate in other.variants:
                if candidate.engine == alone and candidate.tokens_per_second:
                    return candidate, how
    return None, ""


def _share_of(work: Workload, processes: int) -> Workload | None:
    """``work`` with one process' share of a step's samples; None where they cannot be divided."""
    samples, rest = divmod(work.train.samples_per_step, processes)
    return None if rest else work.model_copy(update={"train": work.train.model_copy(update={"samples_per_step": samples})})


def _same_but_count(one: Machine, other: Machine) -> bool:
    return one.model_copy(update={"count": 1, "nodes": 1}) == other.model_copy(update={"count": 1, "nodes": 1})


def _ranks(variant: Variant) -> tuple[Rank, ...]:
    if not variant.runs:
        return ()
    record = variant.runs[0].record
    assert record.measurement is not None
    measured, window = record.measurement, steady(record.measurement.steps).steps
    return tuple(_rank(one, measured, window, record) for one in measured.ranks if len(one.seconds) >= window.stop)


def _rank(of: RankSteps, measured: Measurement, window: range, record: Record) -> Rank:
    name = "peak_allocated_bytes" if record.machine.device == "cuda" else "peak_rss_bytes"
    sizes = [size for one in measured.memory if one.rank == of.rank and (size := getattr(one, name)) is not None]
    waiting = of.waiting_seconds
    busy = None if waiting is None else _median(of.seconds[i] - waiting[i] for i in window)
    shares = _share(waiting, of.seconds, window), _share(of.exchanging_seconds, of.seconds, window)
    return Rank(of.rank, _median(of.seconds[i] for i in window), busy, *shares, max(sizes, default=None))


def _share(spent: Sequence[float] | None, seconds: Sequence[float], window: range) -> float | None:
    return None if spent is None else sum(spent[i] for i in window) / sum(seconds[i] for i in window)


def _median(values: Iterable[float]) -> float:
    return median(list(values))


def _efficiency(of: Scaling) -> str:
    return "" if of.efficiency is None else f"{100 * of.efficiency:.1f}\u00a0% of {of.work} in one process"


def _slowest(of: Scaling) -> str:
    """Who the others wait for, and by how much; where nobody waits in one place, ranks differ in their steps or not at all."""
    busy = {one.rank: one.busy_seconds if one.busy_seconds is not None else one.step_seconds for one in of.ranks}
    if not busy:
        return ""
    slowest, fastest = max(busy, key=busy.__getitem__), min(busy, key=busy.__getitem__)
    return f"rank {slowest} is busy {number(busy[slowest], 3)} s a step, rank {fastest} {number(busy[fastest], 3)} s"


def _by_rank(say: Callable[[Rank], str]) -> Callable[[Scaling], str]:
    """What ``say`` says of each rank; nothing where it does not know."""
    return lambda of: ", ".join(f"{one.rank}:\u00a0{said}" for one in of.ranks if (said := say(one)))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}\u00a0%"


_COLUMNS: Mapping[str, Callable[[Scaling], str]] = {
    "processes": lambda of: str(of.processes),
    "tokens/s a {}": lambda of: plain_rate(of.tokens_per_second_per_process),
    "scaling efficiency": _efficiency,
    "slowest and fastest rank": _slowest,
    "of a step in exchanges by rank": _by_rank(lambda one: _percent(one.exchanging_share)),
    "waiting for the slowest": _by_rank(lambda one: _percent(one.waiting_share)),
    "peak GiB by rank": _by_rank(lambda one: gib(one.peak_bytes)),
}
