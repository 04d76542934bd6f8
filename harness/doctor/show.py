"""Findings and cache entries for people, as plain tables, and for programs, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from harness.doctor.caches import Entry
from harness.doctor.finding import Finding, State
from harness.doctor.hardware import GIB

STYLES: dict[State, str] = {"ok": "green", "note": "cyan", "problem": "bold red"}


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """A table, each remedy below what it remedies, and the verdict in a sentence."""
    table = Table("", "", "", Column(overflow="fold"), box=None, padding=(0, 1, 0, 0), show_header=False)
    area = ""
    for finding in findings:
        text = Text(finding.found)
        if finding.remedy:
            text.append(f"\n→ {finding.remedy}", style="dim" if finding.state == "note" else "")
        table.add_row("" if finding.area == area else finding.area, finding.name, Text(finding.state, STYLES[finding.state]), text)
        area = finding.area
    console.print(table)
    console.print(f"\n{verdict(findings)}", markup=False, highlight=False)


def verdict(findings: Sequence[Finding]) -> str:
    """Whether the demo can run here, and if not, why not."""
    blocking = [f"{finding.area}, {finding.name}" for finding in findings if finding.blocks]
    if blocking:
        return f"The demo cannot run here; in the way: {'; '.join(blocking)}. What to do stands beside the arrows."
    problems = sum(finding.state == "problem" for finding in findings)
    rest = f" {problems} problem(s) stand in the way of other things." if problems else ""
    return f"The demo can run here.{rest}"


def findings_json(findings: Sequence[Finding]) -> str:
    """All findings and the verdict."""
    able = not any(finding.blocks for finding in findings)
    return json.dumps({"demo_can_run": able, "findings": [asdict(finding) for finding in findings]}, indent=1)


def print_entries(entries: Sequence[Entry], console: Console) -> None:
    """A line an entry, and their sum."""
    name, what = Column("name", max_width=24, no_wrap=True), Column("what", overflow="fold")
    table = Table("kind", name, "GiB", Column("last used", no_wrap=True), what, box=None, padding=(0, 2, 0, 0))
    for entry in entries:
        table.add_row(entry.kind, Text(entry.name), f"{entry.num_bytes / GIB:.3f}", entry.age, Text(entry.about))
    if entries:
        console.print(table)
    console.print(f"{len(entries)} entries, {sum(entry.num_bytes for entry in entries) / GIB:.3f} GiB", markup=False, highlight=False)


def entries_json(entries: Sequence[Entry]) -> str:
    """All entries."""
    return json.dumps([{**asdict(entry), "path": str(entry.path)} for entry in entries], indent=1)
