"""From stored results to ranked groups: every record joined with its parity verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from harness.comparable import Run, by_workload, runs
from harness.current import current as current_records
from harness.parity import Anchor, anchors, verdict
from harness.rank import Entry, Group, rank
from harness.store import Results
from harness.verdict import Verdict


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
    """To what cannot be judged (random weights), add what the same engine and knobs were found to be where every test was made.

    An engine that trains another function there does not win here.
    """
    full: dict[tuple[str, str, str], dict[str, Verdict]] = {}
    for run, one in zip(judged_runs, verdicts, strict=True):
        if one.kind == "different" or (one.kind == "same" and not one.untested):
            by_workload = full.setdefault(_engine(run), {})
            known = by_workload.setdefault(run.record.cell.workload.label, one)
            by_workload[run.record.cell.workload.label] = one if known.kind == "same" else known  # one repeat that differs is enough
    return [
        _beside(one, full.get(_engine(run), {})) if one.kind == "not comparable" and run.record.status == "ok" else one
        for run, one in zip(judged_runs, verdicts, strict=True)
    ]


def _beside(one: Verdict, elsewhere: dict[str, Verdict]) -> Verdict:
    same = one.can_win and bool(elsewhere) and all(other.kind == "same" for other in elsewhere.values())
    found = sorted(elsewhere.items())
    said = ", ".join(f"{other.anchor if same else other.label} on {label}" for label, other in found)
    return replace(one, elsewhere=said, same_elsewhere=same, can_win=one.can_win and (same or not elsewhere))


def _engine(run: Run) -> tuple[str, str, str]:
    return run.record.machine.key, run.record.cell.engine.key, run.record.provenance.engine_fingerprint
