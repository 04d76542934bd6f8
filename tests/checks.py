"""Runs of two trees as a check would have measured them, made from synthetic records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.check.judge import Measured
from harness.comparable import Run
from harness.gates import Counted, Counts
from harness.record import GpuSamples, Record
from harness.store import save
from tests import records

NOISE = (1.0, 1.004, 0.997, 1.002, 0.999, 1.003, 0.998, 1.001)
MIB = 2**20


def started(pair: int, side: int) -> str:
    """Base first and candidate first in turn."""
    return f"2026-11-23T10:{pair:02d}:{30 * (side ^ (pair % 2)):02d}+00:00"


def side_of(side: int, slower: float = 1.0, num_runs: int = 8, **changed: Any) -> list[Record]:
    rates = [1000.0 / slower * NOISE[(pair + 3 * side) % 8] for pair in range(num_runs)]
    return [records.record(repeat=pair, rate=rate, started=started(pair, side), **changed) for pair, rate in enumerate(rates)]


def cell(slower: float = 1.0, name: str = "fused", *, counted: tuple[Counted, Counted] | None = None, **changed: Any) -> Measured:
    base, candidate = side_of(0, **changed), side_of(1, slower, **changed)
    return Measured(name, tuple(map(Run, base)), tuple(map(Run, candidate)), counted=counted)


def counted(peak: int = 100 * MIB, live: Sequence[int] = (50 * MIB,) * 3, operations: int = 1000, **changed: Any) -> Counted:
    counts = Counts(
        device="cpu", setup_peak_bytes=20 * MIB, peak_bytes=(peak,) * 3, live_bytes=tuple(live),
        num_operations=(operations + 4, operations, operations), num_kernels=None, num_launches=None,
    )  # fmt: skip
    return Counted(record=records.record(work=records.workload(stop_after=3), ran=records.steps(num_steps=3, **changed)), counts=counts)


def stored(root: Path, of: Sequence[Record]) -> Path:
    for one in of:
        save(one, root)
    return root


def clocked(of: Record, mhz: int) -> Run:
    """The run, as on a GPU whose clock was at ``mhz`` all the time."""
    assert of.measurement is not None
    at = tuple(float(second) for second in range(1, 60))
    gpu = GpuSamples(rank=0, gpu="0", seconds=at, sm_clock_mhz=(mhz,) * 59, event_reasons=(0,) * 59, energy_joules=(None,) * 59)
    return Run(of.model_copy(update={"measurement": of.measurement.model_copy(update={"gpus": (gpu,)})}))
