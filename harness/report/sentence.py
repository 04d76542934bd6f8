"""The outcome of a ranking in plain sentences: who, by how much, how sure, and whether it trained the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from harness.rank import Group, Outcome, Variant, compare_variants
from harness.record import Status
from harness.report.numbers import percent, rate, times
from harness.report.sure import ratio, reach, says_nothing
from harness.report.titles import counted
from harness.stats import CONFIDENCE, SAME, Comparison
from harness.verdict import Verdict

MOST_NAMES = 3  # more than this in one sentence nobody reads; the table has them all


@dataclass(frozen=True, slots=True)
class Sentences:
    """``headline``: the answer. ``details``: how sure, parity, and what was faster but cannot win."""

    headline: str
    details: tuple[str, ...]

    @property
    def text(self) -> str:
        """All of it as one paragraph."""
        return " ".join([self.headline, *self.details])


def sentences(group: Group) -> Sentences:
    """What a person who reads one paragraph should know of ``group``."""
    outcome = group.outcome
    if group.is_made_to_judge:
        return _judging(group)
    if not outcome.first:
        return _no_winner(group)
    winner = outcome.first[0]
    details = [*_how_sure(outcome), *_parity(outcome.first[:MOST_NAMES])]
    details += [f"{one.label} was faster ({rate(one.tokens_per_second)}) but cannot win: {_verdict(one)}." for one in outcome.barred]
    if len(outcome.first) > 1:
        return _of_one_engine(group, details) or Sentences(_shared(outcome), tuple(details))
    if outcome.next is None:
        alone = not any(variant.runs for variant in group.variants if variant is not winner)
        only = "the only variant that ran" if alone else "the only variant that ran and can win"
        return Sentences(f"{winner.label} is {only}: {rate(winner.tokens_per_second)}.", tuple(details))
    assert outcome.lead is not None
    assert outcome.lead.interval is not None
    by = f"{times(outcome.lead.interval.ratio)} the rate of {outcome.next.label}"
    return Sentences(f"{winner.label} is the fastest: {rate(winner.tokens_per_second)}, {by}.", tuple(details))


def _of_one_engine(group: Group, details: list[str]) -> Sentences | None:
    """Where variants of one engine share the first place and lead the best of another: the engine is the answer, its knobs are open."""
    first = group.outcome.first
    winner = first[0]
    others = [one for one in group.variants if one.runs and one.can_win and one.engine.name != winner.engine.name]
    if not others or any(one.engine.name != winner.engine.name for one in first):
        return None
    compared = compare_variants(winner, others[0])
    if compared.answer != "faster" or compared.interval is None:
        return None
    by = f"{times(compared.interval.ratio)} the rate of {others[0].label}"
    headline = f"{winner.engine.name} is the fastest engine: {winner.label} measured {rate(winner.tokens_per_second)}, {by}."
    return Sentences(headline, (f"{_interval(compared, 'that rate')}. Which of its settings is the best is open.", *details))


def _shared(outcome: Outcome) -> str:
    """Who shares the first place; where that is for want of repeats, what the one pair of runs of the two fastest showed."""
    names = _listed([one.label for one in outcome.first])
    interval = outcome.lead.interval if outcome.lead else None
    if outcome.next is None or interval is None or interval.n > 1:
        return f"No clear winner: {names} share the first place."
    first = outcome.first[0]
    by = f"{times(interval.ratio)} the rate of {outcome.next.label}"
    return f"No verdict yet: {first.label} measured {rate(first.tokens_per_second)}, {by}, once."


def went_on(group: Group) -> bool:
    """Whether something ran to its end and nothing has a rate: what goes on from a checkpoint is not timed."""
    return _without_a_rate(group, "ok")


def was_unsteady(group: Group) -> bool:
    """Whether something ran to its end, none of it at a pace, and so nothing has a rate."""
    return _without_a_rate(group, "unsteady")


def _without_a_rate(group: Group, status: Status) -> bool:
    failures = (entry.record.status for variant in group.variants for entry in variant.failures)
    return not any(variant.runs for variant in group.variants) and status in failures


def sentence_since(outdated: str) -> str:
    """A sentence that says where the same was measured again (``glance.Line.outdated``); nothing where it was not."""
    return f"{outdated[0].upper()}{outdated[1:]}." if outdated else ""


def _no_winner(group: Group) -> Sentences:
    ran = [variant for variant in group.variants if variant.runs]
    if went_on(group):
        return Sentences("No rate was measured: what ran to its end had gone on from a checkpoint.", ())
    if was_unsteady(group):
        return Sentences("No rate was measured: what ran to its end never kept a pace; take more steps (train.steps).", ())
    if not ran:
        count = len(group.variants)
        tried = "the only variant did not run" if count == 1 else f"of {count} variants none ran"
        return Sentences(f"Nothing was measured: {tried} to the end.", ())
    details = tuple(f"{one.label} ({rate(one.tokens_per_second)}): {_verdict(one)}." for one in ran)
    return Sentences("No winner: no variant that ran trained the same as the reference.", details)


def verdicts_of(group: Group) -> tuple[list[tuple[Variant, Verdict]], Counter[str]]:
    """Each variant that was judged, without references, and how many are ``same`` (or so elsewhere), ``different``, ``not comparable``."""
    known = [(one, one.verdict) for one in group.variants if one.runs and one.verdict and one.verdict.kind != "reference"]
    return known, Counter("same" if verdict.look == "same" else verdict.kind for _, verdict in known)


def _judging(group: Group) -> Sentences:
    """What was found of work that was made to judge: how many train the same, and the first that is known of the others."""
    known, kinds = verdicts_of(group)
    told = {"same": "train the same as the reference", "different": "train something else", "not comparable": "are open"}
    found = [f"{kinds[kind]} {words}" for kind, words in told.items() if kinds[kind]]
    headline = f"Of {counted(len(known), 'setting')} {_listed(found) if len(found) > 1 else ''.join(found) or 'none is judged'}."
    others = [f"{one.label}: {verdict.label}: {verdict.detail.split('; ')[0]}." for one, verdict in known if verdict.look != "same"]
    return Sentences(headline, (*others, "This work was made to judge what is trained: its rates are of few and short steps."))


def _how_sure(outcome: Outcome) -> list[str]:
    if outcome.next is None or outcome.lead is None:
        return ["There is nothing to compare it with."]
    if len(outcome.first) == 1:
        return [f"{_interval(outcome.lead)}."]
    first, second = outcome.first[0].label, outcome.next.label
    interval = outcome.lead.interval
    if interval is None:
        return [f"{first} and {second} have no repeat measured on the same host, so their rates cannot be compared."]
    if interval.n == 1:
        names = _listed([one.label for one in outcome.first])
        more = "run at least 3, better 8 (-m 'repeat=range(8)')"
        return [f"One paired repeat says nothing about chance, so {names} share the first place: {more}."]
    measured = f"{first} measured {times(ratio(outcome.first[0], outcome.next, outcome.lead))} the rate of {second}"
    if says_nothing(outcome.lead):
        return [f"{measured} by their medians, from {reach(outcome.lead)}."]
    if outcome.lead.answer == "same":
        return [f"{measured}: the same within ±{percent(SAME)}. {_interval(outcome.lead)}."]
    return [f"{measured}, too close to call. {_interval(outcome.lead)}; more repeats narrow it."]


def _interval(comparison: Comparison, of: str = "the runner-up's rate") -> str:
    interval = comparison.interval
    assert interval is not None
    ends = f"{interval.low:.3f} to {interval.high:.3f} times"
    return f"{percent(CONFIDENCE)} confidence interval: {ends} {of}, from {interval.n} paired repeats"


def _parity(first: tuple[Variant, ...]) -> list[str]:
    said = []
    for variant in first:
        verdict = variant.verdict
        if verdict is None or verdict.kind == "reference":
            said.append(f"{variant.label} is the reference for parity.")
        elif verdict.kind == "same":
            said.append(f"Parity of {variant.label}: {verdict.label} ({verdict.detail}).")
        else:
            proven = (
                f"{variant.label} trains the same where that can be judged: {verdict.same_on}. Not here"
                if verdict.same_on
                else f"That {variant.label} trains the same is not proven"
            )
            light = f" The light check {verdict.light.text}: {verdict.light.detail}." if verdict.light.text else ""
            said.append(f"{proven}: {verdict.detail}.{light}")
    return said


def _verdict(variant: Variant) -> str:
    verdict = variant.verdict
    return f"{verdict.label}: {verdict.detail}" if verdict else "no verdict"


def _listed(names: list[str]) -> str:
    if len(names) > MOST_NAMES:
        return f"{', '.join(names[: MOST_NAMES - 1])} and {len(names) - MOST_NAMES + 1} more"
    return f"{', '.join(names[:-1])} and {names[-1]}"
