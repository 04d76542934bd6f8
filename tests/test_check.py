"""What a check says of runs and counts: answers, exit codes, outputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from harness.check.exports import benchmark_json, junit
from harness.check.judge import Measured, outcomes
from harness.check.outcome import Exit, Outcome
from harness.check.settings import read_settings
from harness.check.show import markdown, text
from harness.comparable import Run
from tests import records
from tests.checks import MIB, cell, clocked, counted, side_of

SETTINGS = read_settings()


def outcome(*cells: Measured, allow: Sequence[str] = ()) -> Outcome:
    return Outcome("this against that", outcomes(cells, SETTINGS, allow))


def exit_of(*cells: Measured, strict: bool = False, allow: Sequence[str] = ()) -> int:
    return int(outcome(*cells, allow=allow).exit(strict=strict))


@pytest.mark.parametrize(
    ("cells", "code"),
    [
        ([cell(1.0)], 0),
        ([cell(0.9)], 0),
        ([cell(1.05)], 3),
        ([cell(1.0, "a"), cell(1.05, "b")], 3),
        ([cell(num_runs=2)], 6),
        ([cell(num_runs=2, counted=(counted(), counted()))], 6),
        ([cell(num_runs=3)], 0),
        ([cell(status="crash", ran=records.steps(), reason="boom")], 6),
        ([cell(1.0, "a"), Measured("b", failed="it broke")], 5),
        ([cell(1.05, "a"), Measured("b", failed="it broke")], 3),
        ([Measured("a")], 6),
        ([], 6),
        ([Measured("a", counted=(counted(), counted()))], 0),
    ],
)
def test_the_exit_code_of_what_was_measured(cells: list[Measured], code: int) -> None:
    assert exit_of(*cells) == code


def open_question(name: str = "fused") -> Measured:
    """Three pairs and 10 % noise."""
    runs = [side[:3] for side in (side_of(0), [*side_of(1, 1.1)[:1], *side_of(1)[1:2], *side_of(1, 0.95)[2:]])]
    return Measured(name, *(tuple(map(Run, side)) for side in runs))


def test_an_open_question_fails_only_a_strict_check() -> None:
    assert (exit_of(open_question()), exit_of(open_question(), strict=True)) == (0, 4)
    assert "1 of 2 inconclusive (exit code 0)" in text(outcome(cell(), open_question("b")), Exit.FINE)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"losses": tuple(loss + 0.02 for loss in records.losses())}, "loss of step"),
        ({"losses": (float("nan"), *records.losses()[1:])}, "loss is nan at step 1"),
        ({"tokens_loss": (17,) * 20}, "supervised tokens differ"),
        ({"stream_sha256": tuple(records.sha256(str(step)) for step in range(20))}, "token stream differs"),
        ({"work": records.workload(learning_rate=1e-3)}, "another workload"),
    ],
)
def test_other_work_is_exit_7_however_fast_it_is(changed: dict[str, Any], says: str) -> None:
    good, other = side_of(0), side_of(1, 0.5, **changed)
    both = Measured("fused", tuple(map(Run, good)), tuple(map(Run, other)))
    assert exit_of(both) == 7
    assert says in text(outcome(both), Exit.PARITY)


def test_a_counted_run_can_be_other_work_too() -> None:
    assert exit_of(Measured("a", counted=(counted(), counted(losses=(9.0, 9.0, 9.0))))) == 7


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        ({"peak": 102 * MIB}, 3, "peak memory of a step: 104,857,600 → 106,954,752 bytes (+2.00 %)"),
        ({"peak": 100 * MIB + 1000}, 0, "as before: memory"),
        ({"peak": 90 * MIB}, 0, "less: peak memory"),
        ({"live": (50 * MIB, 52 * MIB, 54 * MIB)}, 3, "memory kept by the last step: 0 → 2,097,152 bytes"),
        ({"operations": 1001}, 3, "operations dispatched in a step: 1,000 → 1,001 (+0.10 %)"),
        ({"operations": 900}, 0, "less: operations"),
        ({"compiles": (1, 0, 0)}, 3, "graphs and kernels compiled: 0 → 1"),
    ],
)
def test_counts_need_no_statistics(more: dict[str, Any], code: int, says: str) -> None:
    base = counted(compiles=(0, 0, 0))
    one = Measured("fused", counted=(base, counted(**{"compiles": (0, 0, 0), **more})))
    assert exit_of(one) == code
    assert says in text(outcome(one), Exit(code))


def test_a_rise_can_be_allowed_and_is_still_shown() -> None:
    one = Measured("fused", counted=(counted(), counted(operations=1001)))
    assert exit_of(one, allow=["operations"]) == 0
    assert "1,000 → 1,001 (+0.10 %), allowed" in text(outcome(one, allow=["operations"]), Exit.FINE)
    assert exit_of(one, allow=["memory"]) == 3


def test_a_count_that_only_one_tree_could_make_is_said_to_be_missing() -> None:
    one = outcome(Measured("fused", counted=(counted(), counted(compiles=(0, 0, 0)))))
    assert "not compared, counted by the candidate alone: compilations" in text(one, Exit.FINE)


def test_a_faster_tree_that_is_hungrier_is_a_regression() -> None:
    assert exit_of(cell(0.8, counted=(counted(), counted(peak=110 * MIB)))) == 3


def test_a_gpu_record_that_was_never_counted_still_has_its_allocated_bytes() -> None:
    base, candidate = side_of(0, machine=records.GPU), side_of(1, machine=records.GPU, memory_gib=1.6)
    assert exit_of(Measured("fused", tuple(map(Run, base)), tuple(map(Run, candidate)))) == 3


def test_a_gap_that_only_the_clock_explains_is_thermal() -> None:
    sides = side_of(0, machine=records.GPU), side_of(1, 1.1, machine=records.GPU)
    cool = Measured("fused", *(tuple(clocked(one, 1980) for one in side) for side in sides))
    hot = replace(cool, candidate=tuple(clocked(one, 1800) for one in sides[1]))
    (slow,), (thermal,) = outcome(cool).cells, outcome(hot).cells
    assert (slow.answer, thermal.answer) == ("regressed", "inconclusive")
    assert thermal.timing is not None
    assert thermal.timing.thermal
    assert "not in clock cycles" in " ".join(thermal.notes)


def test_every_output_says_the_same() -> None:
    bad = replace(cell(1.05, "b|<b>"), counted=(counted(), counted(peak=110 * MIB)))
    found = outcome(cell(1.0, "a"), bad, Measured("c", failed="boom \x1b[31m"), open_question("d"))
    code = found.exit(strict=False)
    table = text(found, code)
    assert [line.split()[0] for line in table.splitlines() if line[:1].isalpha()][2:6] == ["same", "regressed", "failed", "inconclusive"]
    page = markdown(found, code)
    assert "b\\|&lt;b>" in page
    assert "(exit code 3)" in page
    suite = ElementTree.fromstring(junit(found, code, strict=False).encode())
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "5", "failures": "2", "errors": "1", "skipped": "1",
    }  # fmt: skip
    entries = {entry["name"]: entry for entry in json.loads(benchmark_json(found))}
    assert entries["b|<b>: memory"] == {"name": "b|<b>: memory", "unit": "bytes", "value": 110 * MIB, "extra": f"base {100 * MIB}"}
    assert entries["a: step"]["unit"] == "s"
    assert entries["a: step"]["value"] == pytest.approx(3.034, rel=0.01)
    assert not [name for name in entries if name.startswith("c")]


def test_an_empty_check_is_no_passing_test_suite() -> None:
    suite = ElementTree.fromstring(junit(outcome(), Exit.NOTHING_MEASURED, strict=False).encode())
    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")
