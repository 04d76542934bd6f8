"""Records are written at once or not at all, found by content, and never silently skipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.errors import RecordError, StoreError
from harness.launch import unsupported
from harness.record import SCHEMA, Measurement, Record, Score, dumps, loads
from harness.store import commit_of, load, save, save_score
from tests import workloads

GOLDEN = Path(__file__).parent / "golden" / "record-2.json"


def record(repeat: int = 0) -> Record:
    return unsupported(workloads.request(workloads.workload(), repeat=repeat), workloads.MACHINE, "because")


def measured() -> Record:
    return loads(GOLDEN.read_text(encoding="utf-8"), "golden")


def score(adapter_sha256: str | None) -> Score:
    assert measured().measurement is not None
    made = measured().measurement.artifacts  # type: ignore[union-attr]
    return Score(
        adapter_sha256=adapter_sha256, tokens_sha256=made.tokens_sha256, base_sha256=made.base_sha256, held_out_loss=2.0,
        held_out_tokens=10, update_norm=None, evaluator="a test",
    )  # fmt: skip


def test_the_golden_record_of_this_schema_reads_and_writes_unchanged() -> None:
    text = GOLDEN.read_text(encoding="utf-8")
    assert dumps(loads(text, "golden")) == text
    assert isinstance(loads(text, "golden").measurement, Measurement)


def test_what_is_saved_is_found(tmp_path: Path) -> None:
    path = save(record(), tmp_path)
    results = load(tmp_path)
    assert results.problems == ()
    assert [stored.record for stored in results.stored] == [record().model_copy(update={"provenance": results.stored[0].record.provenance})]
    assert tmp_path / results.stored[0].path == path
    assert path.parent.parent.name == workloads.workload().label
    assert path.parent.parent.parent.name == workloads.MACHINE.key


def test_scores_are_joined_by_content(tmp_path: Path) -> None:
    save(measured(), tmp_path)
    assert load(tmp_path).stored[0].score is None
    assert measured().measurement is not None
    adapter = measured().measurement.artifacts.adapter_sha256  # type: ignore[union-attr]
    save_score(score(None), tmp_path)
    save_score(score(adapter), tmp_path)
    save_score(score("f" * 64), tmp_path)
    (stored,) = load(tmp_path).stored
    assert stored.score == score(adapter)
    assert stored.base_score == score(None)


def test_an_unreadable_file_is_a_problem_not_a_gap(tmp_path: Path) -> None:
    path = save(record(), tmp_path)
    save(record(repeat=1), tmp_path)
    path.write_text(path.read_text()[:100])
    results = load(tmp_path)
    assert len(results.stored) == 1
    (problem,) = results.problems
    assert path.name in problem
    assert "not a record" in problem


def test_partial_files_and_work_folders_hold_no_records(tmp_path: Path) -> None:
    path = save(record(), tmp_path)
    (path.parent / f".{path.name}.123.partial").write_text("half")
    inside = tmp_path / "work" / "a" / "b"
    inside.mkdir(parents=True)
    (inside / "c.json").write_text("no record")
    assert len(load(tmp_path).stored) == 1
    assert load(tmp_path).problems == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema_version": SCHEMA + 1}, "update engine-room"),
        ({"schema_version": "x"}, "schema"),
        ({"status": "fine"}, "status"),
        ({"extra": 1}, "extra"),
    ],
)
def test_edited_and_newer_records_are_refused_with_a_reason(change: dict[str, object], says: str) -> None:
    raw = json.loads(dumps(record())) | change
    with pytest.raises(RecordError, match=says):
        loads(json.dumps(raw), "somewhere.json")


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    with pytest.raises(StoreError, match="cannot write"):
        save(record(), blocker)


def test_a_tree_without_git_is_told_by_its_stamp(tmp_path: Path) -> None:
    assert commit_of(tmp_path) == ("unknown", True)
    (tmp_path / ".commit").write_text("0123abcd\n")
    assert commit_of(tmp_path) == ("0123abcd", False)
