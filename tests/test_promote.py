"""Evidence is copied byte for byte, only from committed trees, and never overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import StoreError
from harness.promote import main, promote
from harness.record import Record, loads
from harness.store import load, save, save_pair, save_score
from harness.updates import UpdatePair
from tests.test_store import GOLDEN, score


def golden(*, dirty: bool = False) -> Record:
    record = loads(GOLDEN.read_text(encoding="utf-8"), "golden")
    return record.model_copy(update={"provenance": record.provenance.model_copy(update={"dirty": dirty})})


def test_a_record_travels_with_its_scores(tmp_path: Path) -> None:
    runs, results = tmp_path / "runs", tmp_path / "results"
    record = golden()
    path = save(record, runs)
    assert record.measurement is not None
    for adapter in (None, record.measurement.artifacts.adapter_sha256):
        save_score(score(adapter), runs)
    sha = str(record.measurement.artifacts.adapter_sha256)
    known, foreign = (
        UpdatePair(start_sha256="0" * 64, trained_sha256=both, norms=(1.0, 1.0), cosine=1.0) for both in ((sha, sha), (sha, "f"))
    )
    save_pair(known, runs)
    save_pair(foreign, runs)
    promoted, refused = promote(runs, results)
    assert list(load(results).updates.values()) == [known], "of promoted weights only"
    assert ([file.read_bytes() for file in promoted], refused) == ([path.read_bytes()], [])
    (stored,) = load(results).stored
    assert (stored.record, stored.score is not None, stored.base_score is not None) == (record, True, True)
    save_pair(known.model_copy(update={"cosine": 1.0 - 1e-12}), runs)
    assert promote(runs, results)[0] == promoted, "promoting again changes nothing"
    assert list(load(results).updates.values()) == [known]


def test_a_dirty_tree_is_no_evidence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(golden(dirty=True), tmp_path / "runs")
    assert main([str(tmp_path / "runs"), "--to", str(tmp_path / "results")]) == 6
    assert "uncommitted changes" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_evidence_is_never_overwritten(tmp_path: Path) -> None:
    path = save(golden(), tmp_path / "runs")
    promote(tmp_path / "runs", tmp_path / "results")
    path.write_text(path.read_text().replace("because", "other").replace('"repeat": 0', '"repeat": 3'))
    with pytest.raises(StoreError, match="never overwritten"):
        promote(tmp_path / "runs", tmp_path / "results")


def test_a_missing_folder_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err
