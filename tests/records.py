"""Synthetic records and scores, shaped like real ones, for tests of the judges and of the report."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from harness.engine import Machine
from harness.record import Artifacts, Measurement, Memory, Provenance, Record, Score, Startup, Steps
from harness.spec import Cell, EngineSpec, Workload, parse
from harness.store import Results, Stored

CPU = Machine(device="cpu", name="Test CPU", count=2, memory_gib=8)
GPU = Machine(device="cuda", name="Test GPU 80GB", count=1, memory_gib=80, power_limit_watts=700)
NUM_STEPS = 20
BASE_LOSS = 2.5  # of the base weights, held out
TRAINED_LOSS = 2.1
UPDATE_NORM = 1.25


def workload(*, model: str = "smollm2_135m", data: dict[str, Any] | None = None, **train: Any) -> Workload:
    return parse(
        Workload,
        {
            "model": {"name": model, "weights": "package:toy/weights.gguf", "tokenizer": "package:toy/weights.gguf", "dtype": "bfloat16"},
            "data": data
            or {"name": "python_docs", "source": "jsonl", "path": "docs.jsonl", "sequence_length": 512, "held_out_fraction": 0.1},
            "method": {"name": "lora", "rank": 16, "alpha": 32.0, "targets": ["q_proj", "v_proj"]},
            "train": {
                "steps": NUM_STEPS, "samples_per_step": 16, "learning_rate": 2e-4, "schedule": "cosine", "warmup_steps": 2,
                "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "max_grad_norm": 1.0, "seed": 0, **train,
            },
        },
    )  # fmt: skip


def engine(name: str = "hf", *, processes: int = 1, environment: dict[str, str] | None = None, **knobs: Any) -> EngineSpec:
    defaults = {"compute_dtype": "float32", "micro_batch": 4}
    return EngineSpec(name=name, module=f"engines.{name}", processes=processes, environment=environment or {}, knobs={**defaults, **knobs})


def losses(num_steps: int = NUM_STEPS) -> tuple[float, ...]:
    return tuple(TRAINED_LOSS + 0.9 * math.exp(-step / 8) + 0.05 * math.sin(3.0 * step) for step in range(num_steps))


def steps(rate: float = 1000.0, num_steps: int = NUM_STEPS, **changed: Any) -> Steps:
    """Steps at ``rate`` input tokens per second, the first one slower; ``changed`` replaces whole arrays."""
    tokens = tuple(3000 + 17 * (step % 5) for step in range(num_steps))
    arrays: dict[str, Any] = {
        "seconds": tuple(count / rate + (2.0 if step == 0 else 0.0) for step, count in enumerate(tokens)),
        "losses": losses(num_steps),
        "grad_norms": tuple(0.8 + 0.01 * step for step in range(num_steps)),
        "tokens_input": tokens,
        "tokens_loss": tuple(900 + 3 * (step % 7) for step in range(num_steps)),
        "tokens_processed": tokens,
        "stream_sha256": tuple(sha256(f"stream {step}") for step in range(num_steps)),
    }
    return Steps(**{**arrays, **changed})


def record(
    spec: EngineSpec | None = None,
    *,
    repeat: int = 0,
    work: Workload | None = None,
    machine: Machine = CPU,
    status: Any = "ok",
    reason: str | None = None,
    ran: Steps | None = None,
    rate: float = 1000.0,
    memory_gib: float = 1.5,
    started: str | None = None,
    host: str = "host-1",
    fingerprint: str = "f" * 12,
    artifacts: dict[str, Any] | None = None,
    **changed: Any,
) -> Record:
    """One record; ``ran`` replaces the steps, ``changed`` single arrays of them. Failures have no measurement unless ``ran`` is given."""
    spec = spec or engine()
    cell = Cell(workload=work or workload(), engine=spec, repeat=repeat)
    measurement = None
    if status == "ok" or ran is not None:
        measurement = Measurement(
            startup=Startup(process_seconds=0.2, setup_seconds=4.5),
            steps=ran or steps(rate, cell.workload.train.num_steps, **changed),
            memory=_memory(memory_gib, machine),
            artifacts=Artifacts(**{**made(cell), **(artifacts or {})}),
        )
    return Record(
        cell=cell, machine=machine, status=status, reason=reason, measurement=measurement,
        provenance=Provenance(
            started_utc=started or f"2026-11-23T10:{repeat:02d}:00+00:00", wall_seconds=60.0, commit="0123456789abcdef", dirty=False,
            engine_fingerprint=fingerprint, python="3.11.9", packages={"torch": "2.13.0", "transformers": "5.17.0"}, driver=None, host=host,
        ),
    )  # fmt: skip


def made(cell: Cell) -> dict[str, Any]:
    return {
        "tokens_sha256": sha256(f"tokens {cell.workload.key}"),
        "base_sha256": sha256("base"),
        "adapter_init_sha256": sha256("init"),
        "adapter_sha256": sha256(f"adapter {cell.key}"),
    }


def _memory(gib: float, machine: Machine) -> tuple[Memory, ...]:
    peak = round(gib * 2**30)
    on_gpu = machine.device == "cuda"
    return tuple(
        Memory(
            phase=phase, rank=0, peak_rss_bytes=2**30 if on_gpu else size, peak_allocated_bytes=size if on_gpu else None,
            peak_reserved_bytes=size if on_gpu else None, num_alloc_retries=0 if on_gpu else None,
        )
        for phase, size in (("setup", peak // 2), ("first_step", peak), ("steady", peak))
    )  # fmt: skip


def score(of: Record, *, held_out_loss: float = TRAINED_LOSS, update_norm: float | None = UPDATE_NORM, base: bool = False) -> Score:
    assert of.measurement is not None
    artifacts = of.measurement.artifacts
    return Score(
        adapter_sha256=None if base else artifacts.adapter_sha256,
        tokens_sha256=artifacts.tokens_sha256,
        base_sha256=artifacts.base_sha256,
        held_out_loss=BASE_LOSS if base else held_out_loss,
        held_out_tokens=5000,
        update_norm=0.0 if base else update_norm,
        evaluator="transformers fp32",
    )


def stored(of: Record, *, scored: bool = True, **changed: Any) -> Stored:
    path = f"{of.machine.key}/{of.cell.workload.label}/{of.cell.engine.name}-{of.cell.key}/{of.provenance.started_utc[:16]}.json"
    if not scored or of.measurement is None or of.measurement.artifacts.adapter_sha256 is None:
        return Stored(of, path, None, None)
    return Stored(of, path, score(of, **changed), score(of, base=True))


def results(entries: Sequence[Stored], problems: Sequence[str] = ()) -> Results:
    return Results(tuple(entries), tuple(problems))


def repeats(spec: EngineSpec, rates: Sequence[float], *, scored: bool = True, **changed: Any) -> list[Stored]:
    """One stored record a rate, repeats 0, 1, 2 …"""
    return [stored(record(spec, repeat=repeat, rate=rate, **changed), scored=scored) for repeat, rate in enumerate(rates)]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
