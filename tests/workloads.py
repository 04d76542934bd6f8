"""Workloads, requests and prepared artifacts for tests that need no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from harness.config import Limits, MachineConfig, Request
from harness.data import Sample
from harness.data.write import write_token_file
from harness.engine import Machine
from harness.places import Prepared, Sources
from harness.spec import Cell, EngineSpec, Workload, parse

MACHINE = Machine(device="cpu", name="Test CPU", count=2, memory_gib=8)


@dataclass(frozen=True)
class Made:
    workload: Workload
    prepared: Prepared


def workload(**train: Any) -> Workload:
    return parse(
        Workload,
        {
            "model": {
                "name": "toy", "weights": "random", "tokenizer": "package:harness/data/tokenizers/tiny", "dtype": "float32",
                "config": {"model_type": "llama", "vocab_size": 64},
            },
            "data": {"name": "toy", "source": "dense", "sequence_length": 8, "num_samples": 6},
            "method": {"name": "lora", "rank": 2, "alpha": 4.0, "targets": ["q_proj"]},
            "train": {
                "steps": 4, "samples_per_step": 2, "learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 1, "weight_decay": 0.0,
                "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "max_grad_norm": 1.0, "seed": 0, **train,
            },
        },
    )  # fmt: skip


def samples(count: int, seed: int = 0) -> list[Sample]:
    generator = np.random.default_rng(seed)
    made = []
    for length in generator.integers(3, 9, size=count):
        ids = generator.integers(0, 64, size=length).astype(np.int32)
        labels = ids.copy()
        labels[: length // 2] = -100
        made.append(Sample(ids, labels))
    return made


def make(folder: Path) -> Made:
    tokens = write_token_file(folder / "tokens", samples(6), samples(2, seed=1), {"made": "by a test"})
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file({"base_model.model.q_proj.lora_A.weight": np.ones((2, 8), np.float32)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    base = folder / "base"
    base.mkdir()
    return Made(
        workload(),
        Prepared(tokens=str(tokens), base=str(base), adapter_init=str(adapter), base_sha256="b" * 64, adapter_init_sha256="a" * 64),
    )


def request(
    work: Workload, *, engine: str = "faulty", repeat: int = 0, limits: Limits | None = None, processes: int = 1, **knobs: Any
) -> Request:
    return Request(
        cell=Cell(
            workload=work,
            engine=EngineSpec(
                name=engine,
                module=f"tests.fakes.{engine}",
                processes=processes,
                environment={},
                knobs={"behaviour": "ok", "at_step": 1, "step_seconds": 0.0, "shift": 0.0, **knobs},
            ),
            repeat=repeat,
        ),
        sources=Sources(),
        machine=MachineConfig(device="cpu", compute_dtype="float32", operations="reference", replay=False, memory_cap_gib=None),
        limits=limits or Limits(wall_seconds=60.0, no_progress_seconds=30.0),
        python=None,
        packages=("numpy",),
    )
