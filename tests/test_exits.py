"""Ctrl-C and a reader that has gone end a command without a traceback."""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

import harness.config
from harness import store
from tests import records
from tests.real_files import ROOT

DOORS = ("merge", "count", "limit", "report.__main__", "fit", "compare", "converge", "promote", "doctor.__main__")


def interrupt(*_: object, **__: object) -> NoReturn:
    raise KeyboardInterrupt


@pytest.mark.parametrize("door", DOORS)
def test_ctrl_c_is_answered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], door: str) -> None:
    for parse in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, parse, interrupt)
    for read in ("requests", "single"):
        monkeypatch.setattr(harness.config, read, interrupt)
    monkeypatch.setattr(sys, "argv", [door, "model=tiny_llama"])
    monkeypatch.delitem(sys.modules, f"harness.{door}", raising=False)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        runpy.run_module(f"harness.{door}", run_name="__main__")
    assert ended.value.args == (130,)
    assert capsys.readouterr().err == "\nstopped\n"


def test_a_reader_that_has_gone_is_no_error(tmp_path: Path) -> None:
    store.save(records.record(), tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "harness.report", str(tmp_path), "--format", "text"]
    ended = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")
