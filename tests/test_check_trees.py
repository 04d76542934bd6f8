"""A check of two real trees: a planted slow-down, the order of the runs, the base's checkout and environment, what is measured again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.check.command import _judge_measured
from harness.check.judge import Measured
from harness.check.measure import Bench, Plan
from harness.check.settings import read_settings
from harness.check.trees import Tree, base_tree, dependencies_sha256
from harness.errors import ConfigError, StoreError
from harness.record import dumps
from harness.store import load
from tests import records
from tests.checks import clocked
from tests.planted import TREE, copy_tree, plant
from tests.sweeps import SMALL


def git(tree: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", "-C", str(tree), *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree as a repository of its own, with one commit."""
    tree = copy_tree(tmp_path_factory.mktemp("repository"))
    (tree / ".gitignore").write_text("__pycache__/\n")
    git(tree, "init", "--quiet", "--initial-branch=main")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "--message=first")
    return tree


def check(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness.check", "--config-dir", str(tree / "tests" / "fakes" / "conf"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_a_slow_down_of_5_percent_is_found(repository: Path, cache: Path, tmp_path: Path) -> None:
    """By the whole command: a checkout of the last commit against a tree whose engine sleeps 5 % of each step.

    Steps are long beside the milliseconds that a busy machine takes to wake a process.
    """
    source = repository / "tests" / "fakes" / "faulty.py"
    before, runs = source.read_text(), tmp_path / "runs"
    plant("slow", repository, "tests.fakes.faulty", "0.05")
    work = ("engine=faulty", "engine.knobs.step_seconds=0.25", *SMALL, "train.steps=8", "machine=cpu", f"cache={cache}", f"runs={runs}")
    try:
        done = check(repository, "--base", "main", "--pairs", "4", *work)
    finally:
        source.write_text(before)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "regressed" in done.stdout
    (root,) = [path for path in (runs / "check").iterdir() if path.name[0].isdigit()]
    order = sorted((one.record.provenance.started_utc, side) for side in ("base", "candidate") for one in load(root / side).stored)
    assert [side[0] for _, side in order] == list("bccbbccb")
    fingerprints = [{one.record.provenance.engine_fingerprint for one in load(root / side).stored} for side in ("base", "candidate")]
    assert fingerprints[0].isdisjoint(fingerprints[1]), "each tree runs its own code"
    assert {one.record.provenance.commit for one in load(root / "base").stored} == {git(repository, "rev-parse", "HEAD")}
    assert len(git(repository, "worktree", "list").splitlines()) == 1, "the checkout is gone"


def test_a_cell_that_the_base_does_not_know_is_nothing_measured(repository: Path, cache: Path, tmp_path: Path) -> None:
    new = copy_tree(tmp_path / "new")
    source = (new / "conf" / "model" / "tiny_llama.yaml").read_text()
    (new / "conf" / "model" / "newer.yaml").write_text(source.replace("name: tiny_llama", "name: newer"))
    done = check(new, "--base", str(repository), "--gates", "model=newer", "data=dense", f"cache={cache}", f"runs={tmp_path / 'runs'}")
    assert done.returncode == 6, done.stdout + done.stderr
    assert "model=newer: there is no such option" in done.stdout


STUB = """
import json, sys
from pathlib import Path
here = Path(__file__).resolve().parent.parent
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
with (here.parent / "order.txt").open("a") as file:
    file.write(f"{here.name} {given['repeat']}\\n")
count = len((here.parent / "order.txt").read_text().splitlines())
raw = json.loads((here / "record.json").read_text())
raw["cell"]["repeat"] = int(given["repeat"])
raw["provenance"]["started_utc"] = f"2026-11-23T10:{count:02d}:00+00:00"
bad = (here / "bad.txt")
left = int(bad.read_text()) if bad.exists() else 0
if left:
    bad.write_text(str(left - 1))
    raw.update(json.loads((here / "bad.json").read_text()))
out = Path(given["runs"]) / "machine" / "work" / "engine" / f"{count}.json"
out.parent.mkdir(parents=True, exist_ok=True)
out.write_text(json.dumps(raw))
"""


def stub(folder: Path, name: str, *, bad: int = 0, status: str = "unsteady", commit: str | None = None) -> Tree:
    """A tree whose command line only leaves a record; the first ``bad`` of them end with ``status``."""
    (folder / name / "harness").mkdir(parents=True)
    (folder / name / "harness" / "__main__.py").write_text(STUB)
    (folder / name / "record.json").write_text(dumps(records.record()))
    (folder / name / "bad.txt").write_text(str(bad))
    (folder / name / "bad.json").write_text(json.dumps({"status": status, "reason": "something else ran"}))
    return Tree(name, folder / name, sys.executable, commit)


def bench(folder: Path, base: Tree, candidate: Tree, pairs: int = 3) -> Bench:
    plan = Plan(cells=(("a cell", ()),), pairs=pairs, arguments=(), cache=folder / "cache", root=folder / "root")
    return Bench({"base": base, "candidate": candidate}, plan, os.open(folder, os.O_RDONLY))


def measured(of: Bench) -> Measured:
    return of.time(of.count())["a cell"]


def order(folder: Path) -> list[str]:
    return [line.split()[0][0] for line in (folder / "order.txt").read_text().splitlines()]


def test_runs_are_interleaved_and_a_spoilt_pair_is_measured_again(tmp_path: Path) -> None:
    found = measured(bench(tmp_path, stub(tmp_path, "base"), stub(tmp_path, "candidate", bad=2)))
    assert found.failed is None
    assert order(tmp_path) == list("bc" + "bc" + "bc" + "cb" + "bc")
    assert [run.record.cell.repeat for run in found.candidate] == [0, 1, 2]
    assert "older than counting" in " ".join(found.notes)


@pytest.mark.parametrize(("status", "runs"), [("unsteady", 3), ("crash", 1)])
def test_what_fails_stops_being_measured(tmp_path: Path, status: str, runs: int) -> None:
    found = measured(bench(tmp_path, stub(tmp_path, "base"), stub(tmp_path, "candidate", bad=9, status=status)))
    assert found.failed == f"the candidate ended {status} (pair 1): something else ran"
    assert order(tmp_path) == list("bc" * runs)


def test_a_gap_of_the_clock_is_measured_once_more(tmp_path: Path) -> None:
    """The candidate is slow and its clock low in the first three pairs; then it is as fast as the base."""
    cool, hot = (clocked(records.record(machine=records.GPU, rate=rate), mhz) for rate, mhz in ((1000.0, 1980), (900.0, 1780)))
    base, candidate = stub(tmp_path, "base"), stub(tmp_path, "candidate", bad=3)
    for tree in (base, candidate):
        (tree.path / "record.json").write_text(dumps(cool.record))
    (candidate.path / "bad.json").write_text(json.dumps({"measurement": json.loads(dumps(hot.record))["measurement"]}))
    (found,) = _judge_measured(bench(tmp_path, base, candidate), read_settings(), ())
    assert found.answer == "same"
    assert len(order(tmp_path)) == 12


def test_a_base_that_runs_other_code_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="instead of ffffffffffff"):
        measured(bench(tmp_path, stub(tmp_path, "base", commit="f" * 40), stub(tmp_path, "candidate")))


def test_a_tree_that_leaves_no_record_fails_the_cell_with_what_it_said(tmp_path: Path) -> None:
    broken = stub(tmp_path, "candidate")
    (broken.path / "harness" / "__main__.py").write_text("raise SystemExit('the reason')")
    found = measured(bench(tmp_path, stub(tmp_path, "base"), broken))
    assert found.failed == "the candidate left no record (exit code 1): the reason"


def test_the_base_is_a_revision_or_a_folder(repository: Path, tmp_path: Path) -> None:
    with base_tree("main", repository, tmp_path, "auto") as tree:
        assert (tree.commit, tree.python) == (git(repository, "rev-parse", "main"), sys.executable)
        assert (tree.path / "harness" / "__main__.py").is_file()
    assert not tree.path.exists()
    with base_tree(str(repository), TREE, tmp_path, "share") as tree:
        assert (tree.path, tree.commit) == (repository, None)
    assert repository.exists()


def test_a_checkout_that_a_killed_check_left_is_replaced(repository: Path, tmp_path: Path) -> None:
    left = tmp_path / "trees" / git(repository, "rev-parse", "--short=12", "main")
    git(repository, "worktree", "add", "--detach", str(left), "main")
    (left / "harness" / "__main__.py").write_text("edited")
    with base_tree("main", repository, tmp_path, "auto") as tree:
        assert (tree.path / "harness" / "__main__.py").read_text() != "edited"


def test_without_git_a_folder_is_still_a_base(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with base_tree(str(repository), TREE, tmp_path, "share") as tree:
        assert tree.path == repository
    with pytest.raises(ConfigError, match="git knows no repository"), base_tree("main", repository, tmp_path, "share"):
        pass


def test_a_folder_is_no_revision_of_a_repository_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="git knows no repository"), base_tree("HEAD", tmp_path, tmp_path, "auto"):
        pass


def test_only_other_dependencies_ask_for_another_environment(tmp_path: Path) -> None:
    """A Makefile that builds nothing stands for one that takes minutes."""
    here, other = copy_tree(tmp_path / "here"), copy_tree(tmp_path / "other")
    project = (other / "pyproject.toml").read_text()
    (other / "pyproject.toml").write_text(project.replace("line-length = 140", "line-length = 99"))
    assert dependencies_sha256(here) == dependencies_sha256(other)
    (other / "pyproject.toml").write_text(project.replace('"numpy>=2.0"', '"numpy>=2.1"'))
    (other / "Makefile").write_text("$(VENV)/.installed:\n\tmkdir -p $(VENV)/bin && echo $(PYTHON) > $@\n")
    with base_tree(str(other), here, tmp_path / "work", "share") as tree:
        assert (tree.python, "other dependencies" in tree.notes[0]) == (sys.executable, True)
    with base_tree(str(other), here, tmp_path / "work", "auto") as tree:
        assert Path(tree.python).parent.parent.parent == tmp_path / "work" / "environments"
        assert (Path(tree.python).parent.parent / ".installed").read_text().strip() == sys.executable
    (other / "Makefile").write_text("$(VENV)/.installed:\n\techo no wheel for you && false\n")
    with pytest.raises(ConfigError, match="no wheel for you"), base_tree(str(other), here, tmp_path / "elsewhere", "auto"):
        pass
