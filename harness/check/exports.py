"""The outcome of a check for other programs: JUnit XML, and github-action-benchmark's custom JSON."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from harness.check.outcome import CellOutcome, Exit, Outcome
from harness.check.show import MEANING, details
from harness.stats import median


def junit(outcome: Outcome, code: Exit, *, strict: bool) -> str:
    """One test case a cell, and one for the whole: an empty suite would count as passed."""
    suite = ElementTree.Element("testsuite", name="harness.check")
    whole = ElementTree.SubElement(suite, "testcase", classname="harness.check", name=outcome.title)
    if code is not Exit.FINE:
        ElementTree.SubElement(whole, "failure", message=f"{MEANING[code]} (exit code {int(code)})")
    for cell in outcome.cells:
        _test_case(suite, cell, strict=strict)
    for kind, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(kind, str(len(list(suite.iter(tag)))))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def benchmark_json(outcome: Outcome) -> str:
    """``customSmallerIsBetter``: seconds a step of the candidate, and every count; what was not measured is left out."""
    entries = []
    for cell in outcome.cells:
        if cell.timing is not None:
            timing = cell.timing
            half = (max(timing.candidate) - min(timing.candidate)) / 2
            extra = f"base {median(timing.base):.6g} s, {timing.answer}, {timing.judged.interval.n} pairs"
            entries.append(
                {"name": f"{cell.name}: step", "unit": "s", "value": median(timing.candidate), "range": f"± {half:.3g}", "extra": extra}
            )
        entries += [
            {"name": f"{cell.name}: {gate.name}", "unit": gate.unit or "count", "value": gate.candidate, "extra": f"base {gate.base}"}
            for gate in cell.gates
        ]
    return json.dumps(entries, indent=1, allow_nan=False) + "\n"


def _test_case(suite: ElementTree.Element, cell: CellOutcome, *, strict: bool) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname="harness.check", name=_printable(cell.name))
    message = _printable("; ".join(details(cell)))
    if cell.answer in ("failed", "not measured"):
        ElementTree.SubElement(case, "error", message=message or "nothing was measured")
    elif cell.answer in ("regressed", "different") or (strict and cell.answer == "inconclusive"):
        ElementTree.SubElement(case, "failure", message=message or cell.answer)
    elif cell.answer == "inconclusive":
        ElementTree.SubElement(case, "skipped", message=message or "inconclusive")
    if cell.timing is not None:
        ElementTree.SubElement(case, "system-out").text = f"change {cell.timing.judged.interval.ratio - 1:+.4f}, {cell.timing.answer}"


def _printable(text: str) -> str:
    """XML has no control characters, and programs that failed may have printed some."""
    return "".join(char if char.isprintable() else " " for char in text)
