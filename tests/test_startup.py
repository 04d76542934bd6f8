"""Import time is told without asking the engine: what sleeps inside an import counts, what sleeps outside does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys, time
sys.path[:0] = {paths!r}
from harness.startup import ImportClock
clock = ImportClock()
time.sleep(0.4)
{load}
time.sleep(0.4)
print(clock.stop(), clock.stop())
"""


def imported(folder: Path, load: str) -> float:
    (folder / "slow_outside.py").write_text("import slow_inside\n")
    (folder / "slow_inside.py").write_text("import time\ntime.sleep(0.3)\nsum(range(10**7))\n")
    script = SCRIPT.format(paths=[str(TREE), str(folder)], load=load)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    once, again = map(float, done.stdout.split())
    assert once == again
    return once


def test_only_imports_count_however_they_are_made(tmp_path: Path) -> None:
    assert imported(tmp_path, "pass") < 0.15
    assert 0.3 <= imported(tmp_path, "import slow_outside") < 2.5
    assert imported(tmp_path, "import importlib; importlib.import_module('slow_outside')") >= 0.3
