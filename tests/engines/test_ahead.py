"""Every kernel compiles for every kind of GPU without one, spills nothing and fits its shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TREE = Path(__file__).parents[2]
KERNELS = TREE / "engines" / "native" / "kernels"
TOO_LITTLE = (
    "from engines.native import ahead; ahead.TARGETS = {'sm_90': (ahead.TARGETS['sm_90'][0], 50000)}; raise SystemExit(ahead.main([]))"
)


def python(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one defines kernels for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(TREE)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def test_every_kernel_for_every_target(tmp_path: Path) -> None:
    done = python(tmp_path, "-m", "engines.native.ahead")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert all(line[-1] == "ok" for line in lines)
    assert {line[0] for line in lines} == {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}
    files = {path.stem for path in KERNELS.glob("*.py")} - {"__init__", "launching"}
    for file in files:
        source = (KERNELS / f"{file}.py").read_text()
        launched = {line.split("[")[0].strip() for line in source.splitlines() if line.strip().startswith("_") and "[(" in line}
        compiled = (TREE / "engines" / "native" / "ahead.py").read_text()
        assert launched, file
        assert all(f"{file}.{kernel}," in compiled for kernel in launched), (file, launched)


def test_a_kernel_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    done = python(tmp_path, "-c", TOO_LITTLE)
    assert done.returncode == 1
    assert "outer" in done.stdout
    assert "needs 53248 bytes of shared memory, there are 50000" in done.stdout
