"""Records of every schema are read, upgraded to this one, and keep the keys under which they were stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.errors import RecordError
from harness.record import SCHEMA, cause, dumps, loads, traceback_of
from tests import records

GOLDEN = Path(__file__).parent / "golden"
RESULTS = Path(__file__).resolve().parent.parent / "results"


def raw(version: int) -> dict[str, Any]:
    return dict(json.loads((GOLDEN / f"record-{version}.json").read_text(encoding="utf-8")))


def test_every_schema_has_a_golden_file() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == [f"record-{version}.json" for version in range(1, SCHEMA + 1)]
    assert [raw(version)["schema_version"] for version in range(1, SCHEMA + 1)] == list(range(1, SCHEMA + 1))


@pytest.mark.parametrize(("mask_prompt", "supervise"), [(True, "answers"), (False, "everything")])
def test_schema_1_had_a_mask_and_no_counts(mask_prompt: bool, supervise: str) -> None:
    old = raw(1)
    old["cell"]["workload"]["data"]["mask_prompt"] = mask_prompt
    record = loads(json.dumps(old), "old")
    assert record.cell.workload.data.supervise == supervise
    assert record.data is None
    assert record.schema_version == SCHEMA
    if mask_prompt:
        assert record.cell == loads(json.dumps(raw(2)), "new").cell
    again = loads(dumps(record), "again")
    assert again == record


@pytest.mark.parametrize("damage", [{"cell": None}, {"cell": {"workload": {"data": None}}}, {"cell": {"workload": {"data": {"mask": 1}}}}])
def test_a_damaged_record_of_schema_1_is_named_not_a_crash(damage: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match=r"somewhere.json: not a valid record"):
        loads(json.dumps(raw(1) | damage), "somewhere.json")


@pytest.mark.parametrize(
    "path", sorted(path for path in RESULTS.glob("*/*/*/*.json") if path.parts[-4] != "scores"), ids=lambda path: path.stem
)
def test_evidence_lies_where_its_content_says(path: Path) -> None:
    record = loads(path.read_text(encoding="utf-8"), path.name)
    where = (record.machine.key, record.cell.workload.label, f"{record.cell.engine.name}-{record.cell.key}")
    assert path.parts[-4:-1] == where, "a key changed: a default changed, or a field was added whose default is not what was always done"


def test_the_cause_of_a_failure_is_one_line() -> None:
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: batch of 3\n'
    assert cause(records.record(status="crash", reason=trace)) == "ValueError: batch of 3"
    assert cause(records.record(status="crash", reason=f"rank 1: {trace}")) == "rank 1: ValueError: batch of 3"
    assert traceback_of(records.record(status="crash", reason=trace)) == trace
    assert cause(records.record(status="oom", reason="needs\n  more")) == "needs more"
    assert traceback_of(records.record(status="oom", reason="needs more")) is None
    assert cause(records.record(status="timeout", reason=None)) == "no reason was recorded"
