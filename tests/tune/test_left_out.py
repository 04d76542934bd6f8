"""Every measured workload as if it were new: the records of the others say what to look at first."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.tune.left_out import main

RESULTS = Path(__file__).resolve().parents[2] / "results"


def test_the_first_look_is_right_where_a_search_that_knows_nothing_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    """Of nine, with the records of 2026-11-27: seven, and none without experience."""
    assert main([str(RESULTS)]) == 0
    out = capsys.readouterr().out
    print(out)
    (line,) = [line for line in out.splitlines() if "as good as the best" in line]
    right, of = (int(word) for word in line.split(" in ")[1].split(";")[0].split(" of "))
    blind = int(line.split(" in ")[-1])
    assert of >= 9
    assert right >= 0.7 * of
    assert blind < right
    rows = [line.split() for line in out.splitlines() if line.startswith("nvidia")]
    assert len(rows) == of
    assert all(float(row[7]) < 40 for row in rows), "no first look is far off"
    (steps,) = [line for line in out.splitlines() if line.startswith("steps of")]
    assert float(steps.split("; ")[1].split()[0]) < 1.5, "predictions are about as far off as they say"


def test_nothing_to_compare_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 6
    assert "no work with 3 measured settings" in capsys.readouterr().err
