"""The memory of training every weight, foretold from shapes alone: as measured (docs/full-fine-tuning.md), and as it is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.native.bench import tensor_sizes
from engines.native.checkpoint import build_weights
from engines.native.footprint import WORKSPACES, Load, MemoryModel
from engines.native.loader import Placement
from engines.native.plan import KEEP_ALL
from engines.native.random_files import RandomFile
from engines.native.shape import read_shape
from engines.native.store import OptimizerState, Training
from harness.config import Config, request, single
from harness.engine import Footprint, footprint, load, tellers
from harness.errors import ConfigError
from tests.engines.tiny import FAMILIES, FULL, make_workload

TREE = Path(__file__).resolve().parents[2]
GIB = 2**30
MEASURED = [
    ("llama3_1b", "fp32", 24.2),
    ("llama3_1b", "int8", 12.8),
    ("llama3_8b", "int8", 56.7),
]  # 4 x 2,048 on an H100
HELD = [("llama3_1b", "fp32", 27.6), ("llama3_1b", "int8", 16.1), ("llama3_8b", "int8", 83.8), ("llama3_8b", "fp32", 158.3)]


def configured(model: str, *words: str) -> Config:
    return single(["engine=fused", "machine=cuda", f"model={model}", "method=full", "data=dense", *words])


def told(config: Config, capacity_gib: float | None = 1000.0, processes: int = 1) -> Footprint | None:
    cell = request(config).cell
    capacity = None if capacity_gib is None else capacity_gib * GIB
    shape, length = config.model.config, config.data.sequence_length
    assert shape is not None
    tokens = length * min(int(str(config.engine.knobs["micro_batch"])), config.train.samples_per_step)
    knobs, forecast = cell.engine.knobs, config.engine.forecast
    return footprint(load(cell.engine), cell.workload, shape, knobs, capacity, tokens, length, processes, forecast)


def peak(config: Config, capacity_gib: float = 1000.0, processes: int = 1) -> float:
    found = told(config, capacity_gib, processes)
    assert found is not None
    return found.peak_bytes / GIB


@pytest.mark.parametrize(("model", "state", "gib"), MEASURED)
def test_what_was_measured_is_foretold(model: str, state: str, gib: float) -> None:
    config = configured(model, f"engine.knobs.optimizer_state={state}", "train.max_grad_norm=null")
    assert peak(config) == pytest.approx(gib, abs=0.06)


@pytest.mark.parametrize(("model", "state", "gib"), HELD)
def test_gradients_that_are_held_count(model: str, state: str, gib: float) -> None:
    """Where the norm is limited, where a step has several micro-batches, and on several ranks."""
    knob, free = f"engine.knobs.optimizer_state={state}", "train.max_grad_norm=null"
    assert peak(configured(model, knob)) == pytest.approx(gib, abs=0.1)
    assert peak(configured(model, knob, free, "train.samples_per_step=8")) == pytest.approx(gib, abs=0.1)
    assert peak(configured(model, knob, free), processes=2) == pytest.approx(gib, abs=0.1)


def test_within_less_memory_it_offloads_or_makes_again() -> None:
    config = configured("llama3_8b", "engine.knobs.optimizer_state=int8", "engine.knobs.memory_gib=75")
    found = told(config, 79)
    assert found is not None
    assert found.peak_bytes / GIB == pytest.approx(73.5, abs=0.06)
    assert found.seconds > found.unhurried
    assert 60 < peak(config, 79) < 75
    assert peak(configured("llama3_8b", "engine.knobs.optimizer_state=int8"), 40) > 40, "the least, where nothing fits"


@pytest.mark.parametrize("family", ["llama", "tied", "qwen2", "qwen3", "llama_biases"])
@pytest.mark.parametrize("state", ["fp32", "int8"])
@pytest.mark.parametrize("inside", [True, False])
def test_everything_is_counted_as_it_is_loaded(family: str, state: OptimizerState, inside: bool) -> None:
    """On the host, in bfloat16. The buffers are made for every tensor on its own, of which some are one weight: they may be larger."""
    config: dict[str, Any] = FAMILIES[family]
    shape, length = read_shape(config, 64), 64
    sizes = dict(tensor_sizes(shape))
    place = Placement(torch.device("cpu"), torch.bfloat16, torch.float32, training=Training(state, inside))
    memory = MemoryModel.of(
        shape, build_weights(dict.fromkeys(sizes, RandomFile(sizes, "cpu")), shape, place, None), Load(256, 64, 256, 64)
    )
    knobs = configured("llama3_1b").engine.knobs | {"optimizer_state": state, "loss_chunk": 64, "recompute": "none", "micro_batch": 4}
    limit = None if inside else 1.0
    workload = make_workload(config, FULL, samples_per_step=4, max_grad_norm=limit)
    workload = workload.model_copy(update={"data": workload.data.model_copy(update={"sequence_length": length})})
    spec = request(configured("llama3_1b")).cell.engine
    found = footprint(load(spec), workload, config, knobs, 1e12, 256, 64, 1, "engines.native.full_forecast")
    assert found is not None
    assert found.peak_bytes - WORKSPACES == pytest.approx(memory.peak((KEEP_ALL,) * shape.num_layers), rel=0.01)


def test_it_says_nothing_of_what_it_does_not_know() -> None:
    assert told(configured("llama3_1b"), None) is None, "a CPU"
    assert told(configured("llama3_1b", "engine.knobs.operations=reference")) is None
    assert told(configured("llama3_1b", "method=lora_fp8")) is None


def test_a_forecast_that_is_none_is_refused() -> None:
    for name in ("engines.native.nobody", "engines.native.plan"):
        with pytest.raises(ConfigError, match="expected a module with a function footprint"):
            tellers(object(), name)


def test_no_torch_is_needed() -> None:
    code = "import sys\nsys.modules['torch'] = None\nimport engines.native.full_forecast"
    done = subprocess.run([sys.executable, "-c", code], cwd=TREE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
