"""The benchmark of the harness's own costs works, in sizes that mean nothing; what misses its target fails; a page says it all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from scripts import bench_harness
from scripts.bench_figures import Figure, Sizes

TREE = Path(__file__).resolve().parent.parent
FAST = Figure("`a | b`: added", 0.3, 0.35, "s", "a clock")
SLOW = Figure("slow", 0.4, 0.35, "s", "the same clock")
SHARE = Figure("share", 81.2, 80, "%", "two clocks", at_least=True)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures = [FAST, SHARE]

    def measure(sizes: Sizes, folder: Path) -> Iterable[Figure]:
        """Nothing."""
        return figures

    monkeypatch.setattr(bench_harness, "MEASURES", {"fake": measure})
    return figures


def test_a_target_is_a_ceiling_or_a_floor() -> None:
    assert [figure.passed for figure in (FAST, SLOW, SHARE)] == [True, False, True]
    assert bench_harness.line(SLOW) == "FAILED    0.40 s (at most 0.35 s)  slow"
    assert bench_harness.line(SHARE) == "pass        81 % (at least 80 %)  share"


def test_the_page_holds_figures_targets_verdicts_and_how(measured: list[Figure], tmp_path: Path) -> None:
    measured.append(SLOW)
    path = tmp_path / "figures.md"
    assert bench_harness.main(["--write", str(path)]) == 1, "a figure that misses its target is a failure, and it is written"
    page = path.read_text(encoding="utf-8")
    assert "| slow | 0.40 s | at most 0.35 s | **failed** |" in page
    assert "| share | 81 % | at least 80 % | pass |" in page
    assert "- share: two clocks." in page
    assert "load average at the start" in page
    assert ("without cached bytecode" in page) is sys.dont_write_bytecode
    measured.remove(SLOW)
    assert bench_harness.main(["--write", str(path)]) == 0


@pytest.mark.parametrize("arguments", [["--write", "x.md", "--small"], ["--write", "x.md", "--only", "fake"], ["--only", "nothing"]])
def test_small_or_partial_figures_are_never_written(measured: list[Figure], arguments: list[str], tmp_path: Path) -> None:
    assert bench_harness.main(arguments) == 2
    assert not Path("x.md").exists()


@pytest.mark.parametrize("name", list(bench_harness.MEASURES))
def test_every_measure_works(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    code = bench_harness.main(["--small", "--only", name])
    said, errors = capfd.readouterr()
    lines = [line for line in said.splitlines() if line.startswith(("pass ", "FAILED "))]
    assert lines, errors
    assert code == (1 if any(line.startswith("FAILED") for line in lines) else 0)
    if name == "imports":
        assert [line.split("(")[0].split() for line in lines] == [["pass", "0"]] * 3, "nothing heavy is loaded before a worker is"


def test_fingerprinting_an_engine_loads_nothing_of_it() -> None:
    code = "import sys; from harness.fingerprint import engine_fingerprint; engine_fingerprint('engines.fused', None, ())"
    done = subprocess.run([sys.executable, "-c", f"{code}; print(*sys.modules)"], cwd=TREE, capture_output=True, text=True, check=True)
    assert not {"torch", "engines.fused", "engines.native"} & set(done.stdout.split())


def test_the_committed_page_is_the_commands() -> None:
    text = (TREE / "docs" / "figures.md").read_text(encoding="utf-8")
    assert text.startswith(bench_harness.INTRODUCTION)
    assert "make figures" in text
    assert "\nfigures:" in (TREE / "Makefile").read_text(encoding="utf-8")
