"""On a real GPU: two meters of memory agree, two counts of operations agree, and every column that means something is filled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import engines.hf
from harness.config import Limits, MachineConfig, Request
from harness.derived import Derived, derive
from harness.floor import Floor
from harness.gemm import gemm_peak_flops
from harness.launch import run_cell
from harness.limit import measure
from harness.machine import detect
from harness.places import Prepared, Sources
from harness.record import Record
from harness.spec import Cell, EngineSpec, parse
from tests.engines.tiny import LLAMA, LORA, RecordingProbe
from tests.test_flops import HF, deep_job, expected_flops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
GIB = 2**30
WIDE = {
    **LLAMA,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
PEAKS = ("peak_allocated_bytes", "peak_active_bytes", "peak_reserved_bytes", "peak_device_bytes")


def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, steps: int, cap: int | None = None, stranger: bool = False
) -> tuple[Request, Prepared, Record]:
    """One cell of hf through launch: a worker of its own, NVML beside it."""
    job = deep_job(folder, monkeypatch, LORA, WIDE)
    work = job.workload.model_copy(update={"train": job.workload.train.model_copy(update={"steps": steps})})
    knobs = {**HF, "compute_dtype": "bfloat16", "attention": "sdpa", "micro_batch": 5}
    request = Request(
        cell=Cell(workload=work, engine=EngineSpec(name="hf", module="engines.hf", processes=1, environment={}, knobs=knobs), repeat=0),
        sources=Sources(),
        machine=MachineConfig(device="cuda", compute_dtype="bfloat16", operations="reference", replay=False, memory_cap_gib=cap),
        limits=Limits(wall_seconds=300.0, no_progress_seconds=120.0), python=None, packages=("torch",),
    )  # fmt: skip
    prepared = Prepared(
        tokens=str(folder / "even" / f"{job.tokens.sha256}.safetensors"), base=str(job.base), adapter_init=str(job.adapter_init),
        base_sha256="b" * 64, adapter_init_sha256="a" * 64,
    )  # fmt: skip
    if torch.cuda.is_initialized() and not stranger:  # an earlier test of this process holds the GPU
        monkeypatch.setattr("harness.monitor.Monitor._holder", lambda self: None)
        monkeypatch.setattr("harness.monitor.Monitor._look_for_strangers", lambda self, pid: None)
    record = run_cell(request, detect("cuda", memory_cap_gib=cap), prepared, folder / "runs", lambda event: None)
    return request, prepared, record


def derived(of: Record) -> Derived:
    found = derive(of)
    assert found is not None
    return found


def test_every_meter_is_read_and_the_allocator_agrees_with_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request, prepared, record = run(tmp_path, monkeypatch, steps=150)
    assert record.status in ("ok", "unsteady"), record.reason
    assert record.measurement is not None
    for memory in record.measurement.memory[::2]:  # the first step may end between two samples
        sizes = [getattr(memory, name) for name in PEAKS]
        assert None not in sizes
        assert sizes == sorted(sizes), "allocated <= active <= reserved <= device"
        assert memory.num_alloc_retries == 0
    steady = record.measurement.memory[-1]
    assert steady.peak_device_bytes is not None
    assert steady.peak_reserved_bytes is not None
    context = steady.peak_device_bytes - steady.peak_reserved_bytes
    assert 0.1 * GIB < context < 2 * GIB, "beyond what the allocator holds there is the CUDA context and its libraries"
    found = derived(record)
    assert found.judged
    for name in ("mfu_of_gemm", "flops_per_second", "sm_clock_mhz", "throttled_by", "host_bound_fraction", "hfu", "mfu"):
        assert getattr(found, name) is not None or record.machine.name not in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"), name
    floor = measure(prepared, request, record.machine)
    assert isinstance(floor, Floor)
    assert floor.tokens_per_second is not None
    assert found.tokens_per_second is not None
    assert 0 < found.tokens_per_second / floor.tokens_per_second < 1, "no engine passes the floor"


def test_operations_are_within_two_percent_of_the_profilers_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve layers; attention as plain products, so that its backward pass is twice its forward pass."""
    job = deep_job(tmp_path, monkeypatch, LORA, WIDE)
    with FlopCounterMode(display=False) as counter:
        engines.hf.train(replace(job, device="cuda"), parse(engines.hf.Knobs, {**HF, "compute_dtype": "bfloat16"}), RecordingProbe())
    assert counter.get_total_flops() == pytest.approx(expected_flops(job, WIDE), rel=0.02)


def test_a_cap_makes_a_big_card_run_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, record = run(tmp_path, monkeypatch, steps=2, cap=1)
    assert record.status == "oom"
    assert record.machine.key.endswith("cap1gib")
    assert "emulated" in " ".join(record.notes)


def test_a_measured_product_is_below_the_data_sheet() -> None:
    found = gemm_peak_flops()
    assert found is not None
    name = detect("cuda").name
    if name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        assert 500e12 < found < 989.4e12


def test_another_process_on_the_gpu_makes_a_cell_contended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.monitor._LEAVE_SECONDS", 2.0)
    held = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    _, _, record = run(tmp_path, monkeypatch, steps=2, stranger=True)
    assert record.status == "contended", record.reason
    assert held.numel() == 2 * GIB
