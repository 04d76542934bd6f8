"""Every command in the README is parsed and composed; those that can run here in seconds are run with smoke overrides."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness.__main__ import _parser
from harness.config import requests

TREE = Path(__file__).resolve().parent.parent
README = (TREE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
HARNESS = [line for line in LINES if line.startswith("python -m harness ")]


def test_the_readme_shows_commands_of_each_kind() -> None:
    assert {"make demo", "make test"} <= set(LINES)
    assert len(HARNESS) >= 4
    assert "python -m harness.report" in LINES


@pytest.mark.parametrize("line", HARNESS)
def test_every_harness_command_composes(line: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    monkeypatch.chdir(tmp_path)
    options = _parser().parse_intermixed_args(shlex.split(line)[3:])
    _, found = requests([*options.overrides, f"cache={cache}"], multirun=options.multirun)
    assert found


@pytest.mark.parametrize("target", re.findall(r"`(make [a-z-]+)", README))
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target.split()[1]}:", (TREE / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)", README))
def test_every_link_leads_somewhere(link: str) -> None:
    assert (TREE / link).exists()


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["--cfg", "job", "engine=fused", "method=full"], ["--version"]])
def test_what_runs_nothing_runs(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "harness", *arguments], cwd=TREE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
