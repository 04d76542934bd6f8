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
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join([str(TREE), *sys.path])}
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
        compiled = (TREE / "engines" / "native" / "specimens.py").read_text()
        assert launched, file
        assert all(f"{file}.{kernel}," in compiled for kernel in launched), (file, launched)


# Converted to e4m3 and back: what an H200 ran before ptxas was understood.
THERE_AND_BACK = """
import triton, triton.language as tl
from engines.native import ahead

@triton.jit
def kernel(thin, codes, scales, M, row_stride):
    rows = tl.arange(0, 64)
    ranks = tl.arange(0, 16)[None, :]
    inside = (rows < M)[:, None] & (ranks < 16)
    places = rows[:, None] * row_stride + ranks
    scale = tl.load(scales + rows, mask=rows < M, other=1.0)[:, None]
    value = tl.load(thin + places, mask=inside, other=0.0).to(tl.float32) / scale
    high = tl.minimum(tl.maximum(value, -448.0), 448.0).to(tl.float8e4nv)
    exact = high.to(tl.float32)
    tl.store(codes + places, high, mask=inside)
    tl.store(codes + 1024 + places, ((value - exact) * 16.0).to(tl.float8e4nv), mask=inside)
    tl.store(codes + 2048 + places, (exact / 16.0).to(tl.float8e4nv), mask=inside)

made = ahead.Specimen("kernel", kernel, {"thin": "h", "codes": "e", "scales": "f"}, {}, 4)
print(ahead.compile_for(made, "sm_90").problem)
"""


def test_what_ptxas_gets_wrong_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "there_and_back.py").write_text(THERE_AND_BACK)
    done = python(tmp_path, str(tmp_path / "there_and_back.py"))
    assert "unpacks e4m3 from R1" in done.stdout, done.stdout + done.stderr


def test_a_kernel_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    done = python(tmp_path, "-c", TOO_LITTLE)
    assert done.returncode == 1
    assert "outer" in done.stdout
    assert "needs 53248 bytes of shared memory, there are 50000" in done.stdout
