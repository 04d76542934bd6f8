"""Workloads of one machine that differ in their method, and what each method reached there: rates, memory, held-out losses."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.rank import Group, Variant
from harness.report.columns import memory_bytes
from harness.report.front import front
from harness.spec import Full, Train, content_key
from harness.tuned import name_of

OUT_OF_MEMORY = ("oom", "oom_host")


@dataclass(frozen=True, slots=True)
class Distance:
    """Held-out loss less that of the variant ``against`` of the reference, by seed."""

    by_seed: Mapping[int, float]
    against: Variant

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return sum(self.by_seed.values()) / len(self.by_seed)


@dataclass(frozen=True, slots=True)
class Member:
    """A method: the workload that is shown of it, and its variants that can win there, the fastest first.

    ``others``: workloads that differ from it in nothing that changes memory or speed. ``differs``: fields of its training that are not the
    reference's, with both values. ``distance``: null where nothing was scored, or where the training differs in more than its learning
    rate, which is a method's own.
    """

    name: str
    group: Group
    able: tuple[Variant, ...]
    differs: tuple[tuple[str, str, str], ...] = ()
    distance: Distance | None = None
    others: tuple[Group, ...] = ()

    @property
    def first(self) -> Variant | None:
        """The fastest, by its median."""
        return self.able[0] if self.able else None

    @property
    def leanest(self) -> Variant | None:
        """What needs the least memory, the faster one of equals."""
        held = [(memory_bytes(one, group), -_rate(one), one) for group in (self.group, *self.others) for one in front(group)[:1]]
        return min(held, key=lambda found: found[:2])[2] if held else None


@dataclass(frozen=True, slots=True)
class Family:
    """``members``: the fastest method first, those without a rate last. ``losses``: held-out losses of the reference's fastest, by seed."""

    members: tuple[Member, ...]
    reference: Member
    losses: Mapping[int, float]


def families(groups: Sequence[Group]) -> tuple[Family, ...]:
    """Those with an answer, a rate or that memory did not suffice, of two methods or more; in the order of ``groups``.

    Work that was made to judge is left out: its rates say nothing.
    """
    alike = defaultdict(list)
    for group in groups:
        if group.is_made_to_judge:
            continue
        same = group.workload.model_copy(update={"method": Full(name="full")})
        alike[group.machine.key, name_of(same)].append(group)
    return tuple(found for together in alike.values() if (found := _family(together)))


def best_by_memory(family: Family) -> tuple[tuple[Member, Variant, int], ...]:
    """What is faster than all that needs no more memory, whatever the method; the leanest first. Medians decide."""
    held = [
        (size, member, one)
        for member in family.members
        for group in (member.group, *member.others)
        for one in front(group)
        if (size := memory_bytes(one, group))
    ]
    best: list[tuple[Member, Variant, int]] = []
    for size, member, one in sorted(held, key=lambda found: (found[0], -_rate(found[2]), found[1].name)):
        if not best or _rate(one) > _rate(best[-1][1]):
            best.append((member, one, size))
    return tuple(best)


def differing(theirs: Train, ours: Train) -> tuple[tuple[str, str, str], ...]:
    """Names of fields that differ, with the value of ``theirs`` and of ``ours``."""
    pairs = {name: (getattr(theirs, name), getattr(ours, name)) for name in Train.model_fields}
    return tuple((name, f"{left}", f"{right}") for name, (left, right) in pairs.items() if left != right)


def _family(groups: Sequence[Group]) -> Family | None:
    by_method: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        by_method[content_key(group.workload.method)].append(group)
    if len({group.workload.method.name for group in groups if _has_answer(group)}) < 2:
        return None
    shown_by = _choice(groups)
    chosen = [min(mine, key=shown_by) for mine in by_method.values()]
    others = [tuple(one for one in mine if one is not shown) for mine, shown in zip(by_method.values(), chosen, strict=True)]
    members = [Member(name, group, _able(group), others=more) for name, group, more in zip(_names(chosen), chosen, others, strict=True)]
    members.sort(key=lambda member: (not member.able, -_rate(member.first), member.name))
    if not members[0].able:
        return None
    reference = _reference(members)
    losses = {seed: _loss(reference.first, group) for seed, group in sorted(_seeds(reference.group, groups).items())}
    seen = tuple(member if member is reference else _seen_from(reference, member, groups) for member in members)
    return Family(seen, reference, {seed: loss for seed, loss in losses.items() if loss is not None})


def _choice(groups: Sequence[Group]) -> Callable[[Group], Any]:
    """By what one of a method's workloads is chosen, the least first: where losses are compared, how far it is from what most methods
    share; else the rate of its fastest, as what they differ in changes no speed.
    """
    setting = _setting(groups)
    scored = {group.workload.method.name for group in groups if group.workload.train == setting and _is_scored(group)}
    if len(scored) > 1:
        return lambda group: _apart(group, setting)
    return lambda group: (not _able(group), -_rate(next(iter(_able(group)), None)), _apart(group, setting))


def _is_scored(group: Group) -> bool:
    return any(one.held_out_loss is not None for one in _able(group))


def _has_answer(group: Group) -> bool:
    return any(one.runs or any(entry.record.status in OUT_OF_MEMORY for entry in one.failures) for one in group.variants)


def _able(group: Group) -> tuple[Variant, ...]:
    return tuple(variant for variant in group.variants if variant.runs and variant.can_win)


def _setting(groups: Sequence[Group]) -> Train:
    """The training that most methods have a rate for; then that of most scores, then the newest day's, then the lowest seed."""
    by_train: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        by_train[content_key(group.workload.train)].append(group)

    def order(alike: Sequence[Group]) -> tuple[int, int, str, int, str]:
        scored = sum(map(_is_scored, alike))
        newest = max(_newest(group) for group in alike)
        return sum(bool(_able(group)) for group in alike), scored, newest[:10], -alike[0].workload.train.seed, newest

    return max(by_train.values(), key=order)[0].workload.train


def _apart(group: Group, setting: Train) -> tuple[bool, int, int]:
    """How far from what is wanted: something with a rate, trained as ``setting``, the newest before all others."""
    age = -int("".join(char for char in _newest(group)[:19] if char.isdigit()) or 0)
    return not _able(group), len(differing(group.workload.train, setting)), age


def _newest(group: Group) -> str:
    return max((entry.record.provenance.started_utc for one in group.variants for entry in (*one.runs, *one.failures)), default="")


def _names(groups: Sequence[Group]) -> list[str]:
    """``qlora``, ``lora rank=64``: methods, with the settings in which those of one name differ."""
    methods = [group.workload.method for group in groups]
    named = []
    for method in methods:
        namesakes = [other.model_dump() for other in methods if other.name == method.name]
        mine = method.model_dump()
        told = [f"{key}={value}" for key, value in mine.items() if any(other[key] != value for other in namesakes)]
        named.append(" ".join([method.name, *told]))
    return named


def _reference(members: Sequence[Member]) -> Member:
    """LoRA, of several the one whose adapters most others have; without a rate of it the fastest method."""
    plain = [member for member in members if member.able and member.group.workload.method.name == "lora"]
    return max(plain, key=lambda one: sum(_adapters(one) == _adapters(other) for other in members), default=members[0])


def _adapters(member: Member) -> object:
    return {**member.group.workload.method.model_dump(), "name": None}


def _seen_from(reference: Member, member: Member, groups: Sequence[Group]) -> Member:
    differs = differing(member.group.workload.train, reference.group.workload.train)
    comparable = {name for name, _, _ in differs} <= {"learning_rate"}
    distance = _distance(reference, member, groups) if comparable else None
    return Member(member.name, member.group, member.able, differs, distance, member.others)


def _distance(reference: Member, member: Member, groups: Sequence[Group]) -> Distance | None:
    against = _like(member.first, reference)
    if against is None:
        return None
    theirs = _seeds(reference.group, groups)
    found = {}
    for seed, group in sorted(_seeds(member.group, groups).items()):
        mine, other = _loss(member.first, group), _loss(against, theirs[seed]) if seed in theirs else None
        if mine is not None and other is not None:
            found[seed] = mine - other
    return Distance(found, against) if found else None


def _like(variant: Variant | None, reference: Member) -> Variant | None:
    """The scored variant of the reference that is most like ``variant``: engines round differently, and methods are compared here."""
    scored = [one for one in reference.able if one.held_out_loss is not None]
    if variant is None or not scored:
        return None
    for alike in ("key", "title", "name"):
        wanted = getattr(variant.engine, alike)
        if found := next((one for one in scored if getattr(one.engine, alike) == wanted), None):
            return found
    return scored[0]


def _seeds(group: Group, groups: Sequence[Group]) -> dict[int, Group]:
    """By seed, the workloads that are ``group``'s but for it."""
    wanted = group.workload.key_without_seed
    return {other.workload.train.seed: other for other in groups if other.workload.key_without_seed == wanted}


def _loss(variant: Variant | None, group: Group) -> float | None:
    """The held-out loss of the same engine and knobs in ``group``; null unless it is a number and may be compared."""
    for one in group.variants:
        if variant is not None and one.engine.key == variant.engine.key and one.can_win and one.held_out_loss is not None:
            return one.held_out_loss if math.isfinite(one.held_out_loss) else None
    return None


def _rate(variant: Variant | None) -> float:
    return (variant.tokens_per_second or 0.0) if variant else 0.0
