"""What methods side by side mean for who has to choose one, in sentences as sure as the figures are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from harness.deviations import HELD_OUT_FLOOR
from harness.rank import Group, Variant, compare_variants
from harness.record import Memory
from harness.report.columns import memory_bytes
from harness.report.families import Distance, Family, Member, best_by_memory
from harness.report.numbers import gib, number, percent, plain_rate, rate, times
from harness.report.sentence import Sentences, was_unsteady, went_on
from harness.report.sure import ratio, reach, says_nothing
from harness.stats import CONFIDENCE, SAME, Comparison

SITTINGS = 0.03  # drift of conf/check.yaml: rates of two sittings that differ by less cannot be told apart
LEAST_SEEDS = 3  # of harness.converge
_Held = tuple[Member, Variant, int]


def advice(family: Family) -> Sentences:
    """What a person with some card should know of ``family``: the fastest for its memory, what each method costs, how sure that is."""
    others = [member for member in family.members if member is not family.reference]
    costs = [
        *(_cost(member, family.reference) for member in others if member.able),
        *(f"{member.name}: {nothing(member.group)}." for member in others if not member.able),
        *_barred(family),
    ]
    paragraphs = [costs, _learning(family, others), [*_unlike(family, others), *_leanest(family), _hosts(family)]]
    return Sentences(_headline(family), tuple(" ".join(sentences) for sentences in paragraphs if sentences))


def words(name: str) -> str:
    """``learning rate`` of ``learning_rate``."""
    return name.replace("_", " ")


def nothing(group: Group) -> str:
    """Why a method has no rate."""
    if any(one.runs for one in group.variants):
        return "nothing that can win"
    if went_on(group):
        return "no rate: what ran to its end had gone on from a checkpoint"
    if was_unsteady(group):
        return "no rate: what ran to its end never kept a pace"
    kinds = dict.fromkeys(entry.record.status for one in group.variants for entry in one.failures)
    return f"nothing ran to the end ({', '.join(kinds)})"


def compare_rates(member: Member, reference: Member) -> Comparison | None:
    """The fastest of a method against the reference's; null where one of the two has no rate."""
    if member is reference or member.first is None or reference.first is None:
        return None
    return compare_variants(member.first, reference.first)


def rate_ratio(member: Member, reference: Member) -> float:
    """The rate as a multiple of the reference's: of paired repeats where they say something, else of the medians. Both need a rate."""
    assert member.first is not None
    assert reference.first is not None
    return ratio(member.first, reference.first, compare_variants(member.first, reference.first))


def signed(value: float) -> str:
    """A difference of losses."""
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def _headline(family: Family) -> str:
    """Which method has the best rate from how much memory on."""
    measured = [member for member in family.members if member.able]
    best = best_by_memory(family)
    if len(measured) == 1:
        return f"{measured[0].name} alone has a rate here: {rate(_rate(measured[0].first))}."
    if not best:
        return f"{measured[0].name} is the fastest: {rate(_rate(measured[0].first))}."
    stretches = [list(found) for _, found in groupby(best, key=lambda one: one[0].name)]
    parts = [_stretch(found, before) for found, before in zip(stretches, [None, *stretches], strict=False)]
    if len(parts) == 1:
        return f"{parts[0]}: no other method measured here is as fast in as little memory."
    return f"The fastest, by the peak memory that it needs: {'; '.join(parts)}."


def _stretch(found: Sequence[_Held], before: Sequence[_Held] | None) -> str:
    """``lora from 17.20 GiB (14,908 tokens/s)``, up to where another method is faster; ``before``: what is the fastest in less."""
    (member, low, size), (_, high, most) = found[0], found[-1]
    said = [rate(low.tokens_per_second), *([] if low is high else [f"up to {plain_rate(high.tokens_per_second)} in {gib(most)}"])]
    if before:
        slower = before[-1][1]
        factor = (high.tokens_per_second or 0.0) / (slower.tokens_per_second or math.inf)
        said += filter(None, [_doubt(factor, compare_variants(high, slower))])
    return f"{member.name} from {gib(size)} GiB ({', '.join(said)})"


def _rate(variant: Variant | None) -> float | None:
    return variant.tokens_per_second if variant else None


def _cost(member: Member, reference: Member) -> str:
    """``qlora needs 7.80 GiB for 0.83 times lora's rate (…)``."""
    factor, compared = rate_ratio(member, reference), compare_rates(member, reference)
    size, other = (gib(memory_bytes(one.first, one.group)) if one.first else "" for one in (member, reference))
    needs = f"{member.name} at its fastest needs {size} GiB ({reference.name} {other}) and" if size and other else member.name
    return f"{needs} has {times(factor)} {reference.name}'s rate{_how_sure(factor, compared)}."


def _how_sure(factor: float, compared: Comparison | None) -> str:
    said = ""
    if compared and compared.interval and compared.interval.n > 1:
        said = f" ({'' if says_nothing(compared) else f'{percent(CONFIDENCE)} interval '}{reach(compared)})"
    doubt = _doubt(factor, compared)
    return f"{said}, {doubt}" if doubt else said


def _doubt(factor: float, compared: Comparison | None) -> str:
    """Why two rates are not to be told apart: chance, or, of runs that are not paired, two sittings; nothing where they are."""
    if compared and compared.interval and compared.interval.n > 1:
        return {"same": f"the same within ±{percent(SAME)}", "inconclusive": "too close to call"}.get(compared.answer, "")
    return "too close to call" if abs(math.log(factor)) <= math.log1p(SITTINGS) else ""


def _learning(family: Family, others: Sequence[Member]) -> list[str]:
    """What held-out losses say; methods train other functions, so parity cannot."""
    known = [(member, member.distance) for member in others if member.distance]
    said = [_learnt(member, distance, family.reference) for member, distance in known]
    if known and len(family.losses) > 1:
        spread = max(family.losses.values()) - min(family.losses.values())
        said.append(f"{family.reference.name}'s own spans {spread:.4f} over the seeds {', '.join(map(str, family.losses))}.")
    if few := [f"{member.name} ({len(distance.by_seed)})" for member, distance in known if len(distance.by_seed) < LEAST_SEEDS]:
        said.append(f"Too few seeds to tell a difference from chance: {', '.join(few)}.")
    missing = [member.name for member in others if member.able and not member.distance]
    if missing:
        said.append(f"Not shown is how well {', '.join(missing)} learns: no held-out losses that compare with {family.reference.name}'s.")
    return said


def _learnt(member: Member, distance: Distance, reference: Member) -> str:
    values, mean = list(distance.by_seed.values()), distance.mean
    way, whose = "above" if mean > 0 else "below", f"{reference.name}'s"
    if member.first and member.first.engine.name != distance.against.engine.name:
        whose += f" (of {distance.against.engine.name}, not {member.first.engine.name}: engines differ, too)"
    several = len(values) > 1
    if max(map(abs, values)) <= HELD_OUT_FLOOR:
        seeds = f" in each of {len(values)} seeds" if several else ""
        return f"The held-out loss of {member.name} is within {HELD_OUT_FLOOR:g} of {whose}{seeds}."
    if not several:
        return f"The held-out loss of {member.name} is {abs(mean):.4f} {way} {whose}."
    reach = f"{signed(min(values))} to {signed(max(values))} over {len(values)} seeds"
    if min(values) < 0 < max(values):
        return f"The held-out loss of {member.name} is {abs(mean):.4f} {way} {whose} on average, but {reach}: no difference shown."
    return f"The held-out loss of {member.name} is {abs(mean):.4f} {way} {whose} on average ({reach})."


def _unlike(family: Family, others: Sequence[Member]) -> list[str]:
    """How trainings differ, and whose engine changed between the two."""
    said = []
    for member in others:
        if member.differs:
            pairs = ", ".join(f"{words(name)} {mine} instead of {ours}" for name, mine, ours in member.differs)
            said.append(f"{member.name} was trained with {pairs}: that changes losses, not rates.")
    return [
        *said,
        *(f"{engine} was changed between the runs of {family.reference.name} and {name}." for engine, name in _changed(family, others)),
    ]


def _changed(family: Family, others: Sequence[Member]) -> list[tuple[str, str]]:
    """Engines whose source is another one in every run that is compared, each with the method."""
    first = family.reference.first
    return [(first.engine.name, member.name) for member in others if first and _has_changed(member.first, first)]


def _has_changed(one: Variant | None, other: Variant) -> bool:
    return one is not None and one.engine.name == other.engine.name and _sources(one).isdisjoint(_sources(other))


def _sources(variant: Variant) -> set[str]:
    return {run.record.provenance.engine_fingerprint for run in variant.runs}


def _barred(family: Family) -> list[str]:
    """What was faster, and trained something else than the reference of its own method."""
    return [_cannot_win(member, one) for member in family.members for one in member.group.outcome.barred]


def _cannot_win(member: Member, one: Variant) -> str:
    verdict = one.verdict.label if one.verdict else "no verdict"
    loss = "" if one.held_out_loss is None else f"; its held-out loss is {number(one.held_out_loss)}"
    return f"{member.name}: {one.label} was faster ({rate(one.tokens_per_second)}) but cannot win: {verdict}{loss}."


def _leanest(family: Family) -> list[str]:
    """Whose least memory is only what its fastest needs, while others were also measured with less."""
    held = [(member, member.leanest is member.first) for member in family.members if member.leanest]
    alone = [member.name for member, is_first in held if is_first]
    said = [_card(family)] if held and family.reference.group.machine.device == "cuda" else []
    if alone and len(alone) < len(held):
        said.insert(0, f"Nothing leaner than the fastest was measured, so less memory may do: {', '.join(alone)}.")
    return said


def _card(family: Family) -> str:
    """How much more of a card than what is allocated the fastest of all methods took: what the allocator keeps, and the CUDA context."""
    also = "A card also holds what the allocator keeps in reserve, and the CUDA context"
    firsts = [member.first for member in family.members if member.first]
    more = [_more_than_allocated(run.record.measurement.memory) for one in firsts for run in one.runs if run.record.measurement]
    known = [size for size in more if size is not None]
    if not known:
        return f"{also}."
    ends = dict.fromkeys((gib(min(known)), gib(max(known))))
    return f"{also}: {' to '.join(ends)} GiB more in these runs."


def _more_than_allocated(memory: Sequence[Memory]) -> int | None:
    """Of the rank that took most of its card; null where that was not measured."""
    taken = [(one.peak_device_bytes, one.rank) for one in memory if one.peak_device_bytes is not None]
    if not taken:
        return None
    most, rank = max(taken)
    return most - max(one.peak_allocated_bytes or 0 for one in memory if one.rank == rank)


def _hosts(family: Family) -> str:
    """Whether rates were measured side by side, and how many runs stand behind them."""
    firsts = [(member.name, member.first) for member in family.members if member.first]
    single = [name for name, first in firsts if len(first.runs) == 1]
    hosts = [{run.record.provenance.host for run in first.runs} for _, first in firsts]
    days = sorted(run.record.provenance.started_utc for _, first in firsts for run in first.runs)
    where = "on one host" if set.intersection(*hosts) else "on different hosts"
    when = " to ".join(dict.fromkeys(day[:16].replace("T", " ") for day in (days[0], days[-1])))
    said = f"Measured {where}, {when} UTC; rates of different sittings compare only within about {percent(SITTINGS)}."
    return f"{said} One run each, which says nothing about chance: {', '.join(single)}." if single else said
