"""Which Python runs an engine: found where the YAML says, and named with what to do when it is not there."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import interpreter as module
from harness.errors import ConfigError
from harness.interpreter import ABSENT, TREE, environment, interpreter, lack, located
from harness.launch import run_cell, unsupported
from harness.machine import detect
from harness.plan import plan
from tests import workloads
from tests.workloads import Made

HERE = detect("cpu")


def test_versions_of_absent_packages_are_left_out() -> None:
    for python in (None, sys.executable):
        version, packages = interpreter(python, ("numpy", "no-such-package"))
        assert version.startswith("3.")
        assert set(packages) == {"numpy"}


def test_an_interpreter_that_does_not_run_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"engine\.python"):
        interpreter(shutil.which("false"), ())


def test_where_an_interpreter_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert located(None) is None
    assert located(".venv-x/bin/python") == str(TREE / ".venv-x" / "bin" / "python")
    assert located("/opt/bin/python") == "/opt/bin/python"
    assert located("~/bin/python") == str(Path.home() / "bin" / "python")
    assert located("sh") == shutil.which("sh")
    assert located("no-such-python") == "no-such-python"


def test_ours_has_all_it_needs_and_says_how_to_get_the_rest() -> None:
    assert lack(None, ("numpy",)) is None
    assert str(lack(None, ("numpy", "no-such-package"))).endswith("; pip install numpy no-such-package")


def test_a_missing_environment_of_this_tree_is_built_by_make_peers() -> None:
    assert str(lack(located(".venv-x/bin/python"), ("x",))) == "there is no .venv-x/bin/python; run: make peers"


def test_another_missing_environment_is_the_users_to_build(tmp_path: Path) -> None:
    said = str(lack(str(tmp_path / "python"), ("x", "y")))
    assert said == f"there is no {tmp_path}/python; build that environment with x, y, or correct engine.python"


def test_an_environment_half_built_is_named_by_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an interrupted ``make peers``: the interpreter is there, its packages are not."""
    python = tmp_path / ".venv-x" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setattr(module, "TREE", tmp_path)
    assert str(lack(str(python), ("no-such-package",))) == "no-such-package is not installed in .venv-x/bin/python; run: make peers"


def test_our_pythonpath_is_not_for_another_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert environment(None)["PYTHONPATH"] == os.pathsep.join([str(TREE), "/mine"])
    assert environment("/opt/bin/python")["PYTHONPATH"] == str(TREE)


def test_an_engine_without_its_environment_is_unsupported_and_runs_once_it_is_there(prepared: Made, tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    request = workloads.request(prepared.workload).model_copy(update={"python": str(python)})
    (cell,) = plan([request], [], "missing")
    assert (cell.action, cell.reason) == ("unsupported", f"there is no {python}; build that environment, or correct engine.python")
    refused = unsupported(request, cell.machine, str(cell.reason))
    assert (refused.status, refused.provenance.python, refused.provenance.packages) == ("unsupported", ABSENT, {})
    interpreter.cache_clear()
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (cell,) = plan([request], [refused], "missing")
    assert cell.action == "run"
    assert run_cell(request, HERE, prepared.prepared, tmp_path / "runs", lambda event: None).status == "ok"


def test_an_engine_is_refused_for_a_package_that_it_cannot_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(*needs: str) -> SimpleNamespace:
        from tests.fakes import faulty

        return SimpleNamespace(Knobs=faulty.Knobs, unsupported=faulty.unsupported, requires=needs)

    request = workloads.request(workloads.workload())
    for needs, action in ((("numpy",), "run"), (("no-such-package",), "unsupported")):
        monkeypatch.setattr("harness.plan.load", lambda spec, needs=needs: engine(*needs))
        assert plan([request], [], "stale")[0].action == action
