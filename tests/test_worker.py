"""What the worker does before and after the engine: a smaller GPU is emulated, and what the engine recomputes is asked."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import engines.hf
from harness import worker
from harness.errors import UnsupportedError
from tests import records, workloads

GIB = 2**30


def capped(monkeypatch: pytest.MonkeyPatch, cap: int | None) -> list[tuple[float, int]]:
    """The fractions that torch is told, on two GPUs of 80 GiB."""
    told: list[tuple[float, int]] = []
    cuda = SimpleNamespace(
        device_count=lambda: 2,
        get_device_properties=lambda index: SimpleNamespace(total_memory=80 * GIB),
        set_per_process_memory_fraction=lambda fraction, index: told.append((fraction, index)),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    worker._cap_memory(records.GPU.model_copy(update={"memory_cap_gib": cap}))
    return told


def test_the_allocator_is_capped_on_every_gpu_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert capped(monkeypatch, 24) == [(0.3, 0), (0.3, 1)]
    assert capped(monkeypatch, None) == []
    with pytest.raises(UnsupportedError, match=r"memory_cap_gib=96 is more than GPU 0 has \(80.0 GiB\)"):
        capped(monkeypatch, 96)


def test_an_engine_may_tell_what_it_recomputes() -> None:
    work = workloads.workload()
    knobs = {
        "micro_batch": 4, "layout": "padded", "attention": "sdpa", "compute_dtype": "float32", "adapter_compute": "autocast",
        "kernels": "none", "compile": False, "optimizer": "adamw",
    }  # fmt: skip
    told = [engines.hf.recomputed_fraction(work, engines.hf.Knobs(**knobs, recompute=plan)) for plan in ("none", "full")]
    assert told == [0.0, 1.0]
    assert worker._recomputed_fraction(SimpleNamespace(recomputed_fraction=lambda workload, knobs: knobs), work, 0.5) == 0.5
    assert worker._recomputed_fraction(SimpleNamespace(), work, None) is None
