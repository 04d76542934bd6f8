"""The outcome of a check as a table for a terminal and as Markdown for a job's summary."""

from __future__ import annotations

from harness.check.outcome import CellOutcome, Exit, Outcome
from harness.stats import median

TIMES = ("s/step base", "s/step here", "change", "98 % interval", "pairs")
MEANING = {
    Exit.FINE: "no regression was found",
    Exit.REGRESSION: "slower or hungrier than the base",
    Exit.INCONCLUSIVE: "an open question, and --strict",
    Exit.CELLS_FAILED: "some cells could not be compared",
    Exit.NOTHING_MEASURED: "nothing was measured",
    Exit.PARITY: "not the same work as the base",
}


def text(outcome: Outcome, code: Exit) -> str:
    """Title, one line a cell, what lies behind it, the exit code in words."""
    rows = _table(outcome)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [outcome.title, ""]
    for row, cell in zip(rows, (None, *outcome.cells), strict=True):
        lines.append("  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip())
        lines += [f"    {detail}" for detail in (details(cell) if cell else ())]
    return "\n".join([*lines, "", *outcome.notes, _last_word(outcome, code)])


def markdown(outcome: Outcome, code: Exit) -> str:
    """The same, as GitHub shows it."""
    lines = [f"## {'✅' if code is Exit.FINE else '❌'} {_escaped(outcome.title)}", "", _last_word(outcome, code), ""]
    head, *rows = _table(outcome)
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(map(_escaped, row))} |" for row in rows)]
    for cell in outcome.cells:
        if found := details(cell):
            lines += ["", f"**{_escaped(cell.name)}**", "", *(f"- {_escaped(detail)}" for detail in found)]
    return "\n".join([*lines, *(["", *(f"- {_escaped(note)}" for note in outcome.notes)] if outcome.notes else [])]) + "\n"


def details(cell: CellOutcome) -> tuple[str, ...]:
    """What is behind the answer, the worst first, each in one line."""
    found = []
    if cell.failed is not None:
        found.append(f"failed: {cell.failed}")
    if cell.different is not None:
        found.append(f"not the same work: {cell.different}")
    found += [f"more: {gate.text}" for gate in cell.risen]
    found += [f"less: {gate.text}" for gate in cell.gates if gate.change == "less"]
    same = [gate.name for gate in cell.gates if gate.change == "same"]
    found += [f"as before: {', '.join(same)}"] if same else []
    return tuple(" ".join(line.split()) for line in (*found, *cell.notes))


def _last_word(outcome: Outcome, code: Exit) -> str:
    """The exit code in words; what stayed open is said even where it is no failure."""
    num_open = sum(cell.answer == "inconclusive" for cell in outcome.cells)
    still = f"; {num_open} of {len(outcome.cells)} inconclusive" if num_open else ""
    return f"{MEANING[code]}{still} (exit code {int(code)})"


def _table(outcome: Outcome) -> list[tuple[str, ...]]:
    """Columns of times only where something was timed."""
    timed = any(cell.timing is not None for cell in outcome.cells)
    head = ("answer", "cell", "peak memory", *(TIMES if timed else ()))
    return [head, *((cell.answer, cell.name, _memory(cell), *(_times(cell) if timed else ())) for cell in outcome.cells)]


def _memory(cell: CellOutcome) -> str:
    gate = next((gate for gate in cell.gates if gate.name == "memory"), None)
    return f"{gate.candidate / 2**20:,.1f} MiB {gate.share}".strip() if gate else ""


def _times(cell: CellOutcome) -> tuple[str, ...]:
    if cell.timing is None:
        return ("",) * len(TIMES)
    interval = cell.timing.judged.interval
    return (
        f"{median(cell.timing.base):.4g}",
        f"{median(cell.timing.candidate):.4g}",
        _percent(interval.ratio),
        f"{_percent(interval.low)} to {_percent(interval.high)}" if interval.n > 1 else "one pair",
        str(interval.n),
    )


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %" if ratio < 10 else f"{ratio:.3g} x"


def _escaped(value: str) -> str:
    """Neither a table cell nor a line ends early, and nothing becomes HTML or a link."""
    line = " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{char}" if char in "|`*_[]\\" else char for char in line)
