"""Peaks foretold from shapes alone, against records of real runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engines.native.bench import RANK, random_weights
from engines.native.divided import Division
from engines.native.footprint import WORKSPACES, Load, MemoryModel
from engines.native.forecast import forecast
from engines.native.loader import Placement
from engines.native.plan import KEEP_ALL
from engines.native.shape import read_shape
from harness.config import single
from harness.engine import footprint, load
from harness.record import Record
from harness.spec import Lora, QLora, parse
from harness.store import load as load_results
from tests.engines.test_qlora import WHOLE_BLOCKS
from tests.engines.tiny import LORA

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
    processes = cell.engine.processes
    samples = min(int(cell.engine.knobs["micro_batch"]), -(-cell.workload.train.samples_per_step // processes))
    tokens = samples * cell.workload.data.sequence_length
    config = cell.workload.model.config
    assert config is not None
    knobs = {**single(["engine=fused", "machine=cuda"]).engine.knobs, **cell.engine.knobs}  # it may be older than a knob
    told = footprint(load(cell.engine), cell.workload, config, knobs, capacity, tokens, cell.workload.data.sequence_length, processes)
    assert told is not None
    assert record.measurement is not None
    measured = max(memory.peak_allocated_bytes or 0 for memory in record.measurement.memory)
    assert told.peak_bytes == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_divided_base_is_counted_as_it_is_loaded(method: str, parts: int) -> None:
    """On the host, with a GPU's padding of ranks; the model's rest is that of any run."""
    shape = read_shape(WHOLE_BLOCKS, 64)
    division = Division(0, parts) if parts > 1 else None
    place = Placement(torch.device("cpu"), torch.bfloat16, torch.float32, 64, division=division)
    load = Load(256, 64, 256, 64)
    weights = random_weights(shape, place, nf4=method == "qlora")
    lora = parse(Lora if method == "lora" else QLora, {**LORA, "name": method, "rank": RANK, "alpha": 32.0})
    found = forecast(shape, lora, load, recompute="none", budget_bytes=1e9, host_bytes=0, parts=parts)
    assert found.peak_bytes - WORKSPACES == pytest.approx(MemoryModel.of(shape, weights, load).peak((KEEP_ALL,) * 2), rel=0.02)


def test_there_are_runs_to_compare_with() -> None:
    assert {record.cell.workload.model.name for record in runs()} >= {"llama3_1b", "llama3_8b"}


def test_no_torch_is_needed() -> None:
    code = "import sys\nsys.modules['torch'] = None\nimport engines.native.forecast"
    done = subprocess.run([sys.executable, "-c", code], cwd=TREE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
