"""Every command in the README is parsed and composed; those that can run here in seconds are run with smoke overrides."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness.__main__ import _parser
from harness.config import requests
from harness.errors import ConfigError
from harness.launch import unsupported
from harness.store import save
from tests import workloads

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
    overrides = [*options.overrides, f"cache={cache}", f"runs={tmp_path / 'runs'}"]
    if "engine=best" in overrides:  # what it stands for is another machine's answer, and without one it says how to find it
        with pytest.raises(ConfigError, match=r"nothing is tuned for .* run: python -m harness.tune model="):
            requests(overrides, multirun=options.multirun)
    _, found = requests([_tuned(word) for word in overrides], multirun=options.multirun, count=lambda *_: 1000)
    assert found


def _tuned(word: str) -> str:
    """As if tune had found ``fused``."""
    return "engine=fused" if word == "engine=best" else word


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


SMOKE = ("train.steps=3", "train.warmup_steps=1", "train.samples_per_step=2", "data.sequence_length=64", "machine=cpu")
RUNNABLE = [line for line in HARNESS if "--cfg" not in line]


@pytest.mark.parametrize("line", RUNNABLE)
def test_every_command_that_runs_does_run(line: str, cache: Path, tmp_path: Path) -> None:
    """The same command on the tiny model, a few short steps, one repeat."""
    rows = [f'{{"question": "What is {i} + 1?", "answer": "{i + 1}"}}\n' for i in range(40)]
    (tmp_path / "my.jsonl").write_text("".join(rows))
    small = re.sub(r"model=[\w,]+", "model=tiny_llama", line.replace("range(3)", "range(1)").replace("python -m", f"{sys.executable} -m"))
    given = {word.partition("=")[0] for word in shlex.split(small)}
    given |= {"train.steps"} if "train.epochs" in given else set()
    own = [word for word in SMOKE if word.partition("=")[0] not in given]
    own += [] if "model" in given else ["model=tiny_llama"]
    own += ["repeat=0"] if "+sweep" in given else []
    own += ["data.num_samples=16"] if {"data=dense", "train.epochs=3"} <= set(shlex.split(small)) else []  # 24 steps, not 384
    command = [*map(_tuned, shlex.split(small)), *own, f"cache={cache}", f"runs={tmp_path / 'runs'}"]
    environment = {**os.environ, "PYTHONPATH": str(TREE)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("cells to run" if "plan=only" in line else "report: ") in done.stdout


def test_the_report_commands_run(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    save(unsupported(workloads.request(workloads.workload()), workloads.MACHINE, "because"), runs)
    for line in (line for line in LINES if line.startswith("python -m harness.report")):
        command = shlex.split(line.replace("python -m", f"{sys.executable} -m"))
        environment = {**os.environ, "PYTHONPATH": str(TREE)}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 6, "nothing was measured, and the report says so"
        assert "because" in done.stdout or (runs / "report.html").exists()
