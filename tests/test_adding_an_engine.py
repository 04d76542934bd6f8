"""Adding an engine takes one file and one YAML: the guide's own example, run through the whole harness."""

from __future__ import annotations

from pathlib import Path

from harness.store import load
from tests.test_sweep import harness

TREE = Path(__file__).resolve().parent.parent


def test_the_guide_shows_the_files_that_are_tested() -> None:
    guide = (TREE / "docs" / "adding-an-engine.md").read_text(encoding="utf-8")
    assert (TREE / "tests" / "fakes" / "trivial.py").read_text(encoding="utf-8") in guide
    yaml = (TREE / "tests" / "fakes" / "conf" / "engine" / "trivial.yaml").read_text(encoding="utf-8")
    assert yaml.replace("tests.fakes.trivial", "engines.trivial") in guide


def test_it_runs_and_is_refused_where_it_says_so(cache: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    done = harness(cache, runs, "engine=trivial", "-m", "method=lora,full")
    assert done.returncode == 0, done.stdout + done.stderr
    by_method = {stored.record.cell.workload.method.name: stored.record for stored in load(runs).stored}
    assert by_method["lora"].status == "ok"
    assert (by_method["full"].status, by_method["full"].reason) == ("unsupported", "trivial has no method=full; use method=lora")
