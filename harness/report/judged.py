"""From stored results to ranked groups: every record joined with its parity verdict."""

from __future__ import annotations

from harness.comparable import Run
from harness.parity import anchors, verdict
from harness.rank import Entry, Group, latest, rank
from harness.store import Results


def judged(results: Results) -> tuple[Group, ...]:
    """Judge every record against the references of its workload, then rank. References are newest records, never superseded ones."""
    runs = [Run(stored.record, stored.score, stored.base_score) for stored in results.stored]
    current = set(map(id, latest(run.record for run in runs)))
    able = [run for run in runs if id(run.record) in current]
    groups = {(run.record.cell.workload.key, run.record.machine.key) for run in able}
    references = {group: anchors(able, *group) for group in groups}
    entries = []
    for stored, run in zip(results.stored, runs, strict=True):
        against = references[run.record.cell.workload.key, run.record.machine.key]
        entries.append(Entry(run.record, stored.path, stored.score, verdict(run, against)))
    return rank(entries)
