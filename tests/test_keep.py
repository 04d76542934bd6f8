"""Weights that somebody asked for stay, whoever ends in the same ones later."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness.store import load
from harness.sweep import Exit
from tests.test_faults import doors, sweep, through
from tests.workloads import Made


def adapters(root: Path) -> list[str]:
    return sorted(folder.name for folder in (root / "adapters").iterdir())


def test_a_measurement_that_ends_in_the_same_weights_does_not_delete_them(
    monkeypatch: pytest.MonkeyPatch, prepared: Made, tmp_path: Path
) -> None:
    through(monkeypatch, doors(prepared))
    sweep(prepared, tmp_path, cells=1, keep="adapters")
    (kept,) = adapters(tmp_path)
    code, _ = sweep(prepared, tmp_path, rerun="all")
    assert code == Exit.OK
    assert len(load(tmp_path).stored) == 3, "the kept one's cell again, and another"
    assert adapters(tmp_path) == [kept], "what nobody asked for is gone"


def test_weights_that_their_owner_deleted_are_not_kept_when_they_are_made_again(
    monkeypatch: pytest.MonkeyPatch, prepared: Made, tmp_path: Path
) -> None:
    through(monkeypatch, doors(prepared))
    sweep(prepared, tmp_path, cells=1, keep="adapters")
    shutil.rmtree(tmp_path / "adapters")
    sweep(prepared, tmp_path, cells=1, rerun="all")
    assert adapters(tmp_path) == []
