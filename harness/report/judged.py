"""From stored results to ranked groups: every record joined with its parity verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from harness.anchors import Anchor, anchors
from harness.comparable import Run, by_workload, runs
from harness.current import current as current_records
from harness.machine import arithmetic
from harness.parity import verdict
from harness.rank import Entry, Group, rank
from harness.store import Results
from harness.verdict import Verdict

_Code = tuple[str, str, str, str]  # what computes alike: what of the machine decides bits, the engine's key, its fingerprint, the method
_Found = dict[tuple[str, str], Verdict]  # by a workload's label and the card's name


def judged(results: Results) -> tuple[Group, ...]:
    """Judge every record against the references of its workload, then rank. References are newest records, never superseded ones.

    Runs of a first step alone are facts for the verdicts, not rows.
    """
    found = [(run, stored) for run, stored in zip(runs(results), results.stored, strict=True) if not run.record.cell.workload.is_first_step]
    current = set(map(id, current_records(run.record for run, _ in found)))
    against: dict[int, tuple[Anchor, ...]] = {}
    for key, mine in by_workload(run for run, _ in found).items():
        candidates = [run for run in mine if id(run.record) in current]
        references = {machine: anchors(candidates, key, machine) for machine in {run.record.machine.key for run in candidates}}
        against |= {id(run): references[run.record.machine.key] for run in mine}
    verdicts = [verdict(run, against[id(run)]) for run, _ in found]
    verdicts = _with_elsewhere([run for run, _ in found], verdicts)
    return rank(Entry(run.record, stored.path, run.score, one) for (run, stored), one in zip(found, verdicts, strict=True))


def _with_elsewhere(judged_runs: Sequence[Run], verdicts: Sequence[Verdict]) -> list[Verdict]:
    """To what cannot be judged (random weights), add what the same engine and knobs were found to be, training by the same method, where
    every test was made, on this card or on another that computes the same.

    An engine that trains another function there does not win here.
    """
    full: dict[_Code, _Found] = {}
    for run, one in zip(judged_runs, verdicts, strict=True):
        if one.kind == "different" or (one.kind == "same" and not one.untested):
            found = full.setdefault(_code(run), {})
            place = run.record.cell.workload.label, run.record.machine.name
            known = found.setdefault(place, one)
            found[place] = one if known.kind == "same" else known  # one repeat that differs is enough
    return [
        _beside(one, full.get(_code(run), {}), run.record.machine.name)
        if one.kind == "not comparable" and run.record.status == "ok"
        else one
        for run, one in zip(judged_runs, verdicts, strict=True)
    ]


def _beside(one: Verdict, found: _Found, card: str) -> Verdict:
    """``one``, made on ``card``, with what was found; what another card says again is left out."""
    elsewhere = {
        (label, where): other
        for (label, where), other in sorted(found.items())
        if where == card or (label, card) not in found or found[label, card].kind != other.kind
    }
    same = one.can_win and bool(elsewhere) and all(other.kind == "same" for other in elsewhere.values())
    found_alike: dict[tuple[str, str, str], list[str]] = {}
    for (label, where), other in elsewhere.items():
        stem, _, key = label.rpartition("-")
        what = str(other.anchor if same else other.label)
        found_alike.setdefault((what, stem, "" if where == card else f", {where}"), []).append(key)
    said = ", ".join(f"{what} on {stem}-{' and -'.join(keys)}{where}" for (what, stem, where), keys in found_alike.items())
    return replace(one, elsewhere=said, same_elsewhere=same, can_win=one.can_win and (same or not elsewhere))


def _code(run: Run) -> _Code:
    cell = run.record.cell
    return arithmetic(run.record.machine), cell.engine.key, run.record.provenance.engine_fingerprint, cell.workload.method.name
