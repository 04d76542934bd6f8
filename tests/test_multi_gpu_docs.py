"""What docs/multi-gpu.md tells people to type can run where they have the GPUs for it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from harness.__main__ import _parser
from harness.config import requests
from harness.engine import Machine
from harness.plan import plan
from tests import records

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "multi-gpu.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:bash|text)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
PEERS = ("axolotl", "deepspeed")  # whose packages need not be here


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 8
    assert all(line.startswith("python -m harness ") for line in COMMANDS)


@pytest.mark.parametrize("line", COMMANDS)
def test_none_of_its_cells_is_impossible(line: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def many(device: str, *, count: int = 1, memory_cap_gib: int | None = None) -> Machine:
        return records.GPU.model_copy(update={"count": count}) if device == "cuda" else records.CPU

    monkeypatch.setattr("harness.plan.detect", many)
    options = _parser().parse_intermixed_args(shlex.split(line)[3:])
    machine = [] if "machine=cpu" in options.overrides else ["machine=cuda"]
    settings, asked = requests([*machine, *options.overrides, f"cache={cache}"], multirun=options.multirun)
    planned = plan(asked, [], settings.rerun)
    assert planned
    for cell in planned:
        absent = (
            cell.request.cell.engine.name in PEERS and cell.reason is not None and cell.reason.endswith(("make peers", "install deepspeed"))
        )
        assert cell.action == "run" or absent, cell.reason
