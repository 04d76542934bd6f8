"""The ranking as plain text for a terminal, and as rows for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.floor import Floors
from harness.rank import Group, Variant
from harness.report import processes
from harness.report.columns import memory_bytes, memory_name, place
from harness.report.glance import glance
from harness.report.judged import judged
from harness.report.measured import limit, measured, plain
from harness.report.numbers import finite, gib, plain_rate
from harness.report.sentence import sentence_since, sentences
from harness.report.titles import data_name, identifier, steps
from harness.store import Results


def table(results: Results, groups: Sequence[Group] | None = None) -> str:
    """The ranking of every group, ties shown as ties, failures with their reasons; printable characters only.

    ``groups``: all or some of ``judged(results)``, from whoever has judged them already.
    """
    shown = judged(results) if groups is None else groups
    outdated = {line.id: line.outdated for machine in glance(shown) for line in machine.lines}
    parts = [_group(group, shown, results.floors, outdated[identifier(group)]) for group in shown]
    if results.problems:
        parts.append("\n".join(["Files that could not be read:", *(f"  {_one_line(problem)}" for problem in results.problems)]))
    return "\n\n".join(parts)


def rows(results: Results) -> list[dict[str, Any]]:
    """One row a variant, in the order of the ranking; strict JSON (no NaN)."""
    groups = judged(results)
    return [_row(group, groups, variant, results.floors) for group in groups for variant in group.variants]


def _group(group: Group, groups: Sequence[Group], floors: Floors, outdated: str) -> str:
    work = group.workload
    shape = f"{work.train.samples_per_step} × {work.data.sequence_length:,}, {steps(work.train)}, seed {work.train.seed}"
    title = f"{work.model.name}, {work.method.name}, {data_name(work.data)}, {shape}, on {group.machine.key}"
    head: tuple[str, ...] = ("rank", "variant", "tokens/s", "repeats", memory_name(group), "parity")
    ran = [variant for variant in group.variants if variant.runs]
    body = [_cells(variant, group) for variant in ran]
    limits = [limit(measured(variant, group, floors)) for variant in ran]
    if any(limits):
        head, body = (*head[:3], "of limit", *head[3:]), [(*cells[:3], one, *cells[3:]) for cells, one in zip(body, limits, strict=True)]
    ranking = _columns([head, *body]) if ran else []
    said = " ".join(filter(None, (sentences(group).text, sentence_since(outdated))))
    lines = [_one_line(title), *ranking, *map(_kept_in, processes.lines(group, groups)), *_failures(group), _one_line(said)]
    return "\n".join(lines)


def _cells(variant: Variant, group: Group) -> tuple[str, ...]:
    verdict = variant.verdict
    return (
        place(variant, group),
        _one_line(variant.label),
        plain_rate(variant.tokens_per_second),
        str(len(variant.runs)),
        gib(memory_bytes(variant, group)),
        f"{verdict.label if verdict else ''}{'' if variant.can_win else ' (cannot win)'}",
    )


def _failures(group: Group) -> list[str]:
    return [f"  {_one_line(variant.label)}: {_one_line(variant.reason)}" for variant in group.variants if variant.reason]


def _columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned text, right-aligned figures (from the third column to the last but one)."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    numeric = range(2, len(lines[0]) - 1)
    aligned = [[cell.rjust(widths[i]) if i in numeric else cell.ljust(widths[i]) for i, cell in enumerate(line)] for line in lines]
    return [f"  {'  '.join(line)}".rstrip() for line in aligned]


def _row(group: Group, groups: Sequence[Group], variant: Variant, floors: Floors) -> dict[str, Any]:
    verdict, work = variant.verdict, group.workload
    return {
        "machine": group.machine.key,
        "workload": work.key,
        "model": work.model.name,
        "method": work.method.name,
        "data": work.data.name,
        "sequence_length": work.data.sequence_length,
        "samples_per_step": work.train.samples_per_step,
        "engine": variant.engine.name,
        "label": variant.label,
        "knobs": variant.engine.knobs,
        "processes": variant.engine.processes,
        "environment": variant.engine.environment,
        "status": variant.status,
        "reason": variant.reason,
        "rank": variant.rank,
        "tokens_per_second": finite(variant.tokens_per_second),
        "repeats": list(variant.rates),
        **plain(measured(variant, group, floors)),
        **processes.plain(processes.scaling(variant, group, groups)),
        "held_out_loss": finite(variant.held_out_loss),
        "parity": verdict.label if verdict else None,
        "parity_detail": verdict.detail if verdict else None,
        "can_win": variant.can_win if variant.runs else False,
        "records": [entry.path for entry in (*variant.runs, *variant.failures)],
        "superseded": variant.num_superseded,
    }


def _kept_in(line: str) -> str:
    return f"  {_one_line(line)}"


def _one_line(text: str | None) -> str:
    """Records hold what programs said: no line breaks and no escape sequences reach the terminal."""
    return " ".join("".join(char if char.isprintable() else " " for char in text or "").split())
