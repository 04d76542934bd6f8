"""``python -m harness.report``: formats, folders, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.report.__main__ import main
from harness.store import Stored, save, save_score
from tests.records import engine, record, repeats, stored


def put(root: Path, entries: list[Stored]) -> None:
    for one in entries:
        save(one.record, root)
        for score in (one.score, one.base_score):
            if score:
                save_score(score, root)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def measured(here: Path) -> Path:
    put(here / "runs", [*repeats(engine("hf"), [100.0, 101.0, 99.0]), *repeats(engine("fused"), [200.0, 201.0, 199.0])])
    return here


def test_by_default_both_files_are_written_and_the_table_is_printed(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "fused is the fastest" in out
    assert out.endswith("report: runs/report.html\n")
    assert "same: fp32" in (measured / "runs" / "report.html").read_text(encoding="utf-8")
    assert (measured / "runs" / "report.md").is_file()
    assert main([]) == 0, "its own files are no records"


@pytest.mark.parametrize(("name", "other"), [("html", "md"), ("md", "html")])
def test_one_file_when_asked(measured: Path, capsys: pytest.CaptureFixture[str], name: str, other: str) -> None:
    assert main(["runs", "--format", name, "--out", "elsewhere"]) == 0
    assert (measured / "elsewhere" / f"report.{name}").is_file()
    assert not (measured / "elsewhere" / f"report.{other}").exists()
    assert capsys.readouterr().out == f"report: elsewhere/report.{name}\n"


def test_json_is_nothing_but_rows(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["label"], row["rank"], row["parity"]) for row in rows] == [
        ("fused", 1, "same: fp32 (6 of 9 tests)"),
        ("hf", 2, "reference: fp32"),
    ]
    assert all((measured / "runs" / path).is_file() for row in rows for path in row["records"])
    assert not (measured / "runs" / "report.html").exists()


def test_text_writes_nothing(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--format", "text"]) == 0
    assert "fused is the fastest" in capsys.readouterr().out
    assert not (measured / "runs" / "report.html").exists()


def test_results_and_runs_are_read_together_and_a_promoted_record_counts_once(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(measured / "results", repeats(engine("hf"), [100.0, 101.0, 99.0]))
    assert main(["--format", "json"]) == 0
    hf = json.loads(capsys.readouterr().out)[1]
    assert (len(hf["repeats"]), hf["superseded"]) == (3, 0)


@pytest.mark.parametrize("format_", ["all", "json", "text"])
def test_nothing_measured_is_never_success(here: Path, capsys: pytest.CaptureFixture[str], format_: str) -> None:
    assert main(["--format", format_]) == 6
    assert "nothing measured: no records (searched: nowhere: there is no folder results or runs here)" in capsys.readouterr().err
    (here / "runs").mkdir()
    assert main(["--format", format_]) == 6
    assert "(searched: runs); measure something with: python -m harness" in capsys.readouterr().err
    assert list((here / "runs").iterdir()) == []


def test_only_failures_are_reported_and_still_exit_6(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(here / "runs", [stored(record(status="oom", reason="too big"))])
    assert main([]) == 6
    streams = capsys.readouterr()
    assert "oom: too big" in streams.out
    assert "1 records, none of a run that ended ok" in streams.err
    assert (here / "runs" / "report.html").is_file()


def test_unreadable_records_are_named_on_the_page_and_on_stderr(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = next((measured / "runs").glob("*/*/*/*.json"))
    broken.write_text("{")
    assert main([]) == 0
    assert f"left out: runs/{broken.relative_to(measured / 'runs')}: not a record" in capsys.readouterr().err
    assert "Files that could not be read" in (measured / "runs" / "report.html").read_text(encoding="utf-8")


def test_a_missing_folder_is_a_usage_error(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "nowhere", "--out", "runs"]) == 2
    assert "error: no such folder: nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--format", "pdf"])
    assert stopped.value.code == 2
