"""Peaks foretold from shapes alone, against records of real runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.config import single
from harness.engine import footprint, load
from harness.record import Record
from harness.store import load as load_results

TREE = Path(__file__).resolve().parents[2]
RESULTS = TREE / "results"


def runs() -> list[Record]:
    found = [stored.record for stored in load_results(RESULTS).stored]
    return [
        record
        for record in found
        if record.status == "ok"
        and record.machine.device == "cuda"
        and record.cell.engine.name == "fused"
        and record.cell.engine.knobs.get("operations") == "fused"
        and record.cell.workload.data.source == "dense"
        and record.cell.workload.method.name in ("lora", "qlora")  # what the forecast knows
    ]


@pytest.mark.parametrize("record", runs(), ids=lambda record: f"{record.cell.workload.model.name}-{record.provenance.started_utc[:16]}")
def test_the_peak_is_known_before_anything_is_loaded(record: Record) -> None:
    cell, capacity = record.cell, (record.machine.memory_cap_gib or record.machine.memory_gib) * 2**30
    tokens = int(cell.engine.knobs["micro_batch"]) * cell.workload.data.sequence_length
    config = cell.workload.model.config
    assert config is not None
    knobs = {**single(["engine=fused", "machine=cuda"]).engine.knobs, **cell.engine.knobs}  # it may be older than a knob
    told = footprint(load(cell.engine), cell.workload, config, knobs, capacity, tokens, cell.workload.data.sequence_length)
    assert told is not None
    assert record.measurement is not None
    measured = max(memory.peak_allocated_bytes or 0 for memory in record.measurement.memory)
    assert told.peak_bytes == pytest.approx(measured, rel=0.02)


def test_there_are_runs_to_compare_with() -> None:
    assert {record.cell.workload.model.name for record in runs()} >= {"llama3_1b", "llama3_8b"}


def test_no_torch_is_needed() -> None:
    code = "import sys\nsys.modules['torch'] = None\nimport engines.native.forecast"
    done = subprocess.run([sys.executable, "-c", code], cwd=TREE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
