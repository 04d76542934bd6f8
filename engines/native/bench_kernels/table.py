"""What was measured, as lines for a terminal and as a page in Markdown."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from engines.native.bench_kernels import liger
from engines.native.bench_kernels.timing import Limits

_TREE = Path(__file__).resolve().parents[3]
_PACKAGES = ("torch", "triton")
COLUMNS = ("ours", "reference", "torch.compile", "Liger")
_HEAD = ("kernel", "size", *(f"{name}, ms" for name in COLUMNS), "MB", "GFLOP", "floor, ms", "of the floor")
INTRODUCTION = """# The kernels beside their alternatives

Written by `python -m engines.native.bench_kernels --write docs/kernels.md`. Timings are of one GPU on one day; run it to have yours.
"""
HOW = """- Every figure is the median of 5 to 40 single calls, between CUDA events. Before each call its inputs are put back where a call
  overwrites them, the caches are filled with other data, and the GPU idles for about 0.3 ms, so that launching counts only where the host
  takes longer than that.
- reference: the same operation of `engines.native.reference`, the arithmetic that tests judge the kernels by (AdamW:
  `engines.native.optimizer`); for attention `scaled_dot_product_attention` with the back end that torch picks, document by document where
  they are uneven.
- torch.compile: of that reference, static shapes, default mode. Not for attention, which is one call already.
- Liger: its functions for the same operation, without autograd. Its swiglu_backward does not make h again, its rotate_back lays nothing
  side by side, and its cross_entropy checks the targets on the host and waits for them.
- MB and GFLOP: what any implementation must read, write and compute: every tensor once, where it is overwritten twice; not partial sums.
- floor: the slower of MB at a copy's and GFLOP at a product's speed, both measured in the same run. At few tokens a kernel may beat it:
  what it writes can stay in the cache.
- adamw: rows of the bf16 copies of B lie 128 bytes apart, nearer than in the model."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A row of the table. ``milliseconds``: by column, None where there is nothing to measure; ``problems``: why a figure is missing."""

    name: str
    size: str
    milliseconds: dict[str, float | None]
    num_bytes: int = 0
    flops: int = 0
    floor: float = 0.0
    problems: tuple[str, ...] = ()

    @property
    def cells(self) -> tuple[str, ...]:
        """Everything as text."""
        ours = self.milliseconds.get("ours")
        times = [_time(self.milliseconds.get(column)) for column in COLUMNS]
        share = f"{100 * self.floor / ours:.0f} %" if ours else "–"
        flops = f"{self.flops / 1e9:,.0f}" if self.flops else "–"
        return (self.name, self.size, *times, f"{self.num_bytes / 1e6:,.0f}", flops, _time(self.floor or None), share)


@dataclass(frozen=True, slots=True)
class Section:
    """All rows of one model."""

    model: str
    rows: tuple[Measured, ...]


def line(row: Measured) -> str:
    """One row for a terminal, and its problems below."""
    name, size, *rest = row.cells
    first = f"{name:<26} {size:<46} " + " ".join(f"{cell:>9}" for cell in rest)
    return "\n".join((first, *(f"    failed: {problem}" for problem in row.problems)))


def head() -> str:
    """Over the lines of a terminal."""
    short = ("ours", "reference", "compile", "Liger", "MB", "GFLOP", "floor", "of it")
    return f"{'kernel, ms':<26} {'size':<46} " + " ".join(f"{name:>9}" for name in short)


def page(sections: Sequence[Section], limits: Limits, device: str) -> str:
    """Markdown: the GPU, versions and commit, a table for each model, what failed, and how it was measured."""
    parts = [INTRODUCTION, *facts(limits, device)]
    for section in sections:
        parts += ["", f"## {section.model}", "", _row(_HEAD), "|---|---|" + "---:|" * (len(_HEAD) - 2)]
        parts += [_row(row.cells) for row in section.rows]
        failed = [f"- **failed**, {row.name} {row.size}: {problem}" for row in section.rows for problem in row.problems]
        parts += ["", *failed] if failed else []
    return "\n".join([*parts, "", "## How it was measured", "", HOW, ""])


def facts(limits: Limits, device: str) -> list[str]:
    """Of the machine and the moment."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    return [
        f"- measured: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {_commit()}",
        f"- device: {device}",
        f"- limits: a copy moves {limits.bandwidth / 1e12:.2f} TB/s, a bf16 product of 8,192³ makes {limits.peak / 1e12:.0f} TFLOP/s",
        f"- versions: Python {platform.python_version()}, {versions}, liger-kernel {liger.version() or 'not installed'}",
    ]


def _commit() -> str:
    """Of this tree; a file ``.commit`` speaks where git does not answer."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        stamp = _TREE / ".commit"
        return stamp.read_text(encoding="utf-8").strip()[:8] if stamp.is_file() else "unknown"
    return commit[:8] + (" with local changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_TREE), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _time(milliseconds: float | None) -> str:
    return "–" if milliseconds is None else f"{milliseconds:.3f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
