"""Counting what a step costs, on real engines with a tiny model: exact, repeatable, and it finds a leak on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import engines.fused
import engines.hf
from harness.check.facts import gates
from harness.check.settings import read_settings
from harness.engine import Chosen, Job
from harness.errors import RecordError
from harness.gates import Counted, Counts, counting, loads_counted
from harness.spec import parse
from tests import records
from tests.engines.tiny import RecordingProbe, make_job, with_train

MIB = 2**20
NUM_LAYERS = 2  # of the tiny model
CONF = Path(__file__).resolve().parent.parent / "conf" / "engine"
OWN = {"micro_batch": 2, "compute_dtype": "float32", "operations": "reference", "replay": False}


@dataclass
class Faulty:
    """What an engine that does something extra in every step would report through."""

    probe: Any
    extra: Callable[[list[torch.Tensor]], None]
    kept: list[torch.Tensor] = field(default_factory=list)

    def ready(self, chosen: Mapping[str, Chosen] | None = None) -> None:
        self.probe.ready(chosen)

    def step(self, **reported: Any) -> None:
        self.extra(self.kept)
        self.probe.step(**reported)


def nothing(kept: list[torch.Tensor]) -> None:
    """As it should be."""


def leak(kept: list[torch.Tensor]) -> None:
    kept += [torch.zeros(MIB, dtype=torch.uint8) for _ in range(NUM_LAYERS)]


def spike(kept: list[torch.Tensor]) -> None:
    torch.zeros(MIB, dtype=torch.uint8)


def cycle(kept: list[torch.Tensor]) -> None:
    """Garbage that only the collector frees: no leak."""
    ring: list[Any] = [torch.zeros(MIB, dtype=torch.uint8)]
    ring.append(ring)


def knobs(engine: ModuleType) -> dict[str, Any]:
    raw = yaml.safe_load((CONF / f"{engine.__name__.rpartition('.')[2]}.yaml").read_text())["knobs"]
    return {**raw, **{name: value for name, value in OWN.items() if name in raw}}


def count(engine: ModuleType, job: Job, out: Path, extra: Callable[[list[torch.Tensor]], None] = nothing) -> Counted:
    with counting(str(out), "cpu", RecordingProbe()) as probe:
        engine.train(job, parse(engine.Knobs, knobs(engine)), Faulty(probe, extra))
    return Counted(record=records.record(), counts=parse(Counts, json.loads(out.read_text())))


def changes(base: Counted, candidate: Counted) -> dict[str, int]:
    return {gate.name: gate.candidate - gate.base for gate in gates(base, candidate, read_settings().tolerances) if gate.change != "same"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Products this small take far longer when two threads meet over them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[engines.fused, engines.hf], ids=["explicit backward", "autograd"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Job, Counted]:
    job = make_job(tmp_path_factory.mktemp("job"), steps=3)
    return request.param, job, count(request.param, job, job.out.parent / "plain.json")


def again(plain: tuple[ModuleType, Job, Counted], name: str, extra: Callable[[list[torch.Tensor]], None]) -> dict[str, int]:
    engine, job, base = plain
    return changes(base, count(engine, with_train(job, name), job.out.parent / f"{name}.json", extra))


def test_the_same_run_costs_the_same_to_the_byte(plain: tuple[ModuleType, Job, Counted]) -> None:
    engine, job, base = plain
    assert count(engine, with_train(job, "twin"), job.out.parent / "twin.json").counts == base.counts


def test_a_leak_of_a_mib_a_layer_is_found_on_a_cpu(plain: tuple[ModuleType, Job, Counted]) -> None:
    found = again(plain, "leak", leak)
    assert found["growth"] == NUM_LAYERS * MIB
    assert found["memory"] > 2 * NUM_LAYERS * MIB
    assert found["operations"] > 0


def test_a_spike_that_is_gone_at_the_end_of_the_step_is_seen_in_the_peak(plain: tuple[ModuleType, Job, Counted]) -> None:
    found = again(plain, "spike", spike)
    assert found["memory"] > 0
    assert "growth" not in found


def test_garbage_in_a_cycle_is_no_growth(plain: tuple[ModuleType, Job, Counted]) -> None:
    assert "growth" not in again(plain, "cycle", cycle)


def test_recomputing_takes_less_memory_and_more_operations(plain: tuple[ModuleType, Job, Counted]) -> None:
    engine, job, base = plain
    out = job.out.parent / "recomputed.json"
    with counting(str(out), "cpu", RecordingProbe()) as probe:
        engine.train(with_train(job, "recomputed"), parse(engine.Knobs, {**knobs(engine), "recompute": "full"}), probe)
    found = changes(base, Counted(record=records.record(), counts=parse(Counts, json.loads(out.read_text()))))
    assert found["memory"] < 0 < found["operations"]


def test_bytes_are_those_of_the_storages_that_are_alive(tmp_path: Path) -> None:
    """Views share a storage, a resized one counts its new size, what came from outside counts from its first use."""
    outside, kept = torch.ones(1000, dtype=torch.uint8), []
    with counting(str(tmp_path / "counts.json"), "cpu", RecordingProbe()) as probe:
        probe.ready()
        for _ in range(3):
            fresh = torch.zeros(500, dtype=torch.uint8)
            kept = [outside.view(10, 100), fresh[:10], fresh.resize_(700)]
            probe.step(loss=0.0, grad_norm=None, tokens=None)  # type: ignore[arg-type]
    counts = parse(Counts, json.loads((tmp_path / "counts.json").read_text()))
    assert len(kept) == 3
    assert counts.live_bytes == (1700, 1700, 1700)
    assert counts.peak_bytes == (1700, 2400, 2400)
    assert (counts.setup_peak_bytes, counts.num_kernels) == (0, None)


def test_what_was_edited_or_cut_is_no_counted_run() -> None:
    text = Counted(record=records.record(), counts=None).model_dump_json()
    assert loads_counted(text, "here").counts is None
    for bad in (
        text[:-40],
        text.replace('"schema_version":1', '"schema_version":9', 1),
        "[]",
        text.replace('"counts":null', '"counts":{}'),
    ):
        with pytest.raises(RecordError, match="here"):
            loads_counted(bad, "here")


class FakeGpu:
    """An allocator that hands out 100 bytes more in every step, and a profiler that sees what it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, events: list[tuple[str, str]]) -> None:
        self.steps, self.events_ = 0, events
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_stats", self.stats)
        monkeypatch.setattr(torch.profiler, "profile", lambda activities: self)

    def stats(self) -> dict[str, int]:
        self.steps += 1
        return {"allocated_bytes.all.peak": 1000 * self.steps, "allocated_bytes.all.current": 100 * self.steps}

    def __enter__(self) -> FakeGpu:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to stop."""

    def events(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(device_type=SimpleNamespace(name=device), name=name) for device, name in self.events_]


KERNELS = [
    ("CUDA", "gemm"),
    ("CUDA", "gemm"),
    ("CUDA", "Memcpy HtoD"),
    ("CPU", "cudaGraphLaunch"),
    ("CPU", "cuLaunchKernelEx"),
    ("CPU", "aten::mm"),
]


def test_what_is_decided_is_passed_on(tmp_path: Path) -> None:
    inner = RecordingProbe()
    with counting(str(tmp_path / "counts.json"), "cpu", inner) as probe:
        probe.ready({"plan": "all kept"})
        probe.decided({"products": "1 of 2"})
    assert inner.chosen == {"plan": "all kept", "products": "1 of 2"}


def count_on(device_events: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, out: Path) -> Counts:
    FakeGpu(monkeypatch, device_events)
    with counting(str(out), "cuda", RecordingProbe()) as probe:
        probe.ready()
        for _ in range(3):
            probe.step(loss=0.0, grad_norm=None, tokens=None)  # type: ignore[arg-type]
    return parse(Counts, json.loads(out.read_text()))


def test_on_a_gpu_the_allocator_and_the_profiler_are_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counts = count_on(KERNELS, monkeypatch, tmp_path / "counts.json")
    assert (counts.setup_peak_bytes, counts.peak_bytes, counts.live_bytes) == (1000, (2000, 3000, 4000), (200, 300, 400))
    assert (counts.num_kernels, counts.num_launches, counts.num_operations) == ((2, 2, 2), (2, 2, 2), None)
    assert [gate.name for gate in gates(*[Counted(record=records.record(), counts=counts)] * 2, read_settings().tolerances)] == [
        "memory", "setup-memory", "growth", "kernels", "launches",
    ]  # fmt: skip


def test_a_profiler_that_sees_nothing_is_no_count_of_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counts = count_on([], monkeypatch, tmp_path / "counts.json")
    assert (counts.num_kernels, counts.num_launches) == (None, None)
    assert "CUPTI" in counts.notes[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_on_a_gpu_kernels_launches_and_allocated_bytes_are_counted(tmp_path: Path) -> None:
    kept = []
    with counting(str(tmp_path / "counts.json"), "cuda", RecordingProbe()) as probe:
        x = torch.ones(256, 256, device="cuda")
        probe.ready()
        for _ in range(3):
            kept.append(x * 2 + 1)
            probe.step(loss=0.0, grad_norm=None, tokens=None)  # type: ignore[arg-type]
    counts = parse(Counts, json.loads((tmp_path / "counts.json").read_text()))
    assert counts.num_kernels == counts.num_launches == (2, 2, 2)
    assert [after - before for before, after in zip(counts.live_bytes, counts.live_bytes[1:], strict=False)] == [256 * 256 * 4] * 2
    assert counts.peak_bytes[2] - counts.live_bytes[1] == 2 * 256 * 256 * 4
    assert counts.num_operations is None
