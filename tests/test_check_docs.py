"""What docs/check.md and the ready workflows say is what the command does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.check.__main__ import _parser
from harness.check.facts import GATES
from harness.check.outcome import Exit
from harness.check.settings import CheckSettings, read_settings
from harness.check.simulate import self_test
from harness.config import requests
from harness.errors import ConfigError
from harness.machine import has_cuda

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "check.md").read_text(encoding="utf-8")
WORKFLOWS = sorted((DOCS / "workflows").glob("*.yml"))
BLOCK = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)[0]
COMMANDS = [line.split("  #")[0].strip() for line in BLOCK.splitlines()]


def commands(path: Path) -> list[str]:
    steps: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]["check"]["steps"]
    return [step["run"] for step in steps if "harness.check" in step.get("run", "")]


def test_the_error_rates_in_the_documentation_are_those_of_the_simulation() -> None:
    assert self_test()[0] in PAGE


def test_every_exit_code_and_every_count_is_documented() -> None:
    for code in Exit:
        assert f"\n| {int(code)} | " in PAGE
    assert [name for name in GATES if f"`{name}`" not in PAGE] == []


@pytest.mark.parametrize("line", [*COMMANDS, *(line for path in WORKFLOWS for line in commands(path))])
def test_every_documented_command_is_understood_and_its_work_composes(line: str, cache: Path) -> None:
    words = shlex.split(line)
    options = _parser().parse_intermixed_args(words[words.index("harness.check") + 1 :])
    if options.overrides:
        assert requests([*options.overrides, f"cache={cache}"], multirun=True)[1]


def test_there_is_a_workflow_for_either_kind_of_runner() -> None:
    assert [len(commands(path)) for path in WORKFLOWS] == [1, 1]
    assert "--gates" in commands(DOCS / "workflows" / "check-cpu.yml")[0]


def test_the_configured_work_is_two_engines_and_quick_to_run(cache: Path) -> None:
    machine = [] if has_cuda() else ["machine=cpu"]
    _, found = requests([*read_settings().workload, *machine, f"cache={cache}"], multirun=True)
    assert sorted(one.cell.engine.name for one in found) == ["fused", "hf"]
    assert {one.cell.workload.model.name for one in found} == {"tiny_llama"}


@pytest.mark.parametrize(
    ("text", "says"),
    [("pairs: 0", "workload"), ("nonsense: [", "cannot be read"), (None, "cannot be read")],
)
def test_settings_that_are_wrong_or_absent_are_named(text: str | None, says: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "check.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_settings(tmp_path / "check.yaml")


def test_every_setting_is_explained_where_it_stands() -> None:
    lines = (DOCS.parent / "conf" / "check.yaml").read_text().splitlines()
    for name in CheckSettings.model_fields:
        (line,) = [line for line in lines if line.startswith(f"{name}:")]
        assert "#" in line
