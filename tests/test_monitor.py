"""NVML as the launching process sees it: a busy GPU is refused, phases get their peaks, strangers are noticed, samples stay few."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import monitor
from harness.endings import TREE, doubted
from harness.errors import UnsupportedError
from harness.launch import run_cell
from harness.monitor import Monitor, monitoring
from harness.record import Measurement, dumps, loads
from tests import records, workloads
from tests.fakes_nvml import NVMLError, nvml
from tests.workloads import Made

GIB = 2**30
BEFORE = GIB // 2  # what the driver itself holds


class Gpu:
    """The fake library, and what its one GPU is doing now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 1) -> None:
        self.now = 100.0
        self.used = BEFORE
        self.pids: list[int] = []
        self.reasons = 0
        self.library = nvml(count)
        self.library.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(used=self.used)
        self.library.nvmlDeviceGetComputeRunningProcesses = lambda handle: [SimpleNamespace(pid=pid) for pid in self.pids]
        self.library.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: self.reasons
        self.library.nvmlDeviceGetTotalEnergyConsumption = lambda handle: int(self.now * 700_000)
        monkeypatch.setitem(sys.modules, "pynvml", self.library)
        monkeypatch.setattr(monitor.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(monitor.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def watch(self, of: Monitor, seconds: float, pid: int = 1) -> None:
        until = self.now + seconds - 1e-9
        while self.now < until:
            self.now = round(self.now + 0.1, 3)
            of.sample(pid)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


@pytest.fixture
def watching(gpu: Gpu) -> Iterator[Monitor]:
    with monitoring({}, 1) as found:
        assert found.busy() is None
        yield found


def ready(at: float, *gpus: str) -> dict[str, Any]:
    return {"event": "ready", "setup_seconds": 1.0, "at": at, "gpus": list(gpus)}


def closed(phase: str, at: float) -> dict[str, Any]:
    return {"event": "memory", "memory": {"phase": phase}, "at": at}


def measured() -> Measurement:
    found = records.record(machine=records.GPU).measurement
    assert found is not None
    return found


def test_each_phase_has_the_peak_of_its_own_samples_above_what_was_there_before(gpu: Gpu, watching: Monitor) -> None:
    gpu.used = BEFORE + 10 * GIB
    gpu.watch(watching, 1.0)
    end_of_setup = gpu.now
    gpu.used = BEFORE + 30 * GIB
    gpu.watch(watching, 0.2)  # the event is read a little after the phase ended
    watching.hear(closed("setup", end_of_setup))
    watching.hear(ready(end_of_setup, "0"))
    watching.hear(closed("first_step", gpu.now))
    gpu.used = BEFORE + 20 * GIB
    gpu.watch(watching, 60.0)
    watching.hear(closed("steady", gpu.now))
    gpu.used = BEFORE + 50 * GIB
    gpu.watch(watching, 1.0)
    peaks = {one.phase: one.peak_device_bytes for one in watching.add_to(measured()).memory}
    assert peaks == {"setup": 10 * GIB, "first_step": 30 * GIB, "steady": 20 * GIB}, "what came after the last step is no phase"


def test_a_phase_between_two_samples_has_no_device_peak(gpu: Gpu, watching: Monitor) -> None:
    gpu.watch(watching, 1.0)
    watching.hear(closed("setup", gpu.now))
    watching.hear(ready(gpu.now))
    watching.hear(closed("first_step", gpu.now + 0.01))
    peaks = {one.phase: one.peak_device_bytes for one in watching.add_to(measured()).memory}
    assert peaks == {"setup": 0, "first_step": None, "steady": None}


def test_samples_stay_few_and_no_throttle_is_lost(gpu: Gpu, watching: Monitor) -> None:
    watching.hear(ready(gpu.now))
    began = gpu.now
    gpu.watch(watching, 300.0)
    gpu.reasons = 64
    gpu.watch(watching, 0.1)
    gpu.reasons = 0
    gpu.watch(watching, 300.0)
    (found,) = watching.add_to(measured()).gpus
    assert 128 <= len(found.seconds) < 256
    assert found.seconds[-1] == pytest.approx(gpu.now - began, abs=4)
    hot = [at for at, bits in zip(found.seconds, found.event_reasons, strict=True) if bits == 64]
    assert len(hot) == 1
    assert hot[0] == pytest.approx(300, abs=4)
    first, last = found.energy_joules[0], found.energy_joules[-1]
    assert first is not None
    assert last is not None
    assert (last - first) / (found.seconds[-1] - found.seconds[0]) == pytest.approx(700, rel=1e-3)


def test_a_card_that_does_not_say_has_nulls(gpu: Gpu, watching: Monitor) -> None:
    def no(*_: Any) -> None:
        raise NVMLError("not supported")

    gpu.library.nvmlDeviceGetTotalEnergyConsumption = gpu.library.nvmlDeviceGetClockInfo = no
    watching.hear(ready(gpu.now))
    gpu.watch(watching, 0.1)
    (found,) = watching.add_to(measured()).gpus
    assert (found.sm_clock_mhz, found.energy_joules, found.event_reasons) == ((None,), (None,), (0,))


def test_a_card_that_falls_off_the_bus_ends_its_samples_not_the_sweep(gpu: Gpu, watching: Monitor) -> None:
    def lost(*_: Any) -> None:
        raise NVMLError("GPU is lost")

    watching.hear(ready(gpu.now))
    gpu.used = BEFORE + GIB
    gpu.watch(watching, 0.5)
    gpu.library.nvmlDeviceGetMemoryInfo = gpu.library.nvmlDeviceGetComputeRunningProcesses = lost
    gpu.watch(watching, 0.5)
    watching.hear(closed("steady", gpu.now))
    assert watching.add_to(measured()).memory[-1].peak_device_bytes == GIB


def test_nothing_is_said_of_a_gpu_that_the_worker_did_not_use(gpu: Gpu, watching: Monitor) -> None:
    watching.hear(ready(gpu.now, "another"))
    gpu.watch(watching, 1.0)
    before = measured()
    assert watching.add_to(before) == before


def test_a_process_that_leaves_in_time_is_waited_for(gpu: Gpu) -> None:
    gpu.pids = [4242]
    with monitoring({}, 1) as found:
        gpu.library.nvmlDeviceGetComputeRunningProcesses = lambda handle: [SimpleNamespace(pid=4242)] if gpu.now < 105 else []
        assert found.busy() is None
    assert gpu.now == 105


@pytest.mark.parametrize(
    ("pids", "used", "says"), [([4242], BEFORE, "process 4242"), ([], 3 * GIB, "a process that the driver does not name")]
)
def test_a_busy_gpu_is_refused_and_nothing_is_started(
    gpu: Gpu, prepared: Made, tmp_path: Any, pids: list[int], used: int, says: str
) -> None:
    gpu.pids, gpu.used = pids, used
    record = run_cell(workloads.request(prepared.workload), records.GPU, prepared.prepared, tmp_path, lambda event: None)
    assert record.status == "contended"
    assert record.reason is not None
    assert record.reason.startswith(f"{says} holds {used / GIB:.1f} GiB of GPU 0")
    assert record.measurement is None
    assert not (tmp_path / "work" / "diary.txt").exists(), "the engine ran"


def test_a_stranger_during_the_run_makes_it_contended(gpu: Gpu, watching: Monitor) -> None:
    gpu.pids = [os.getpid()]
    parent = os.getppid()
    gpu.watch(watching, 0.2, parent)
    watching.hear(ready(gpu.now))
    gpu.watch(watching, 0.2, parent)
    assert watching.stranger is None
    gpu.pids = [os.getpid(), 1]
    gpu.watch(watching, 0.1, parent)
    gpu.pids = [os.getpid()]
    gpu.watch(watching, 0.1, parent)
    assert watching.stranger is not None
    assert doubted("ok", None, measured(), watching.stranger)[0] == "contended"
    assert doubted("crash", "it broke", measured(), watching.stranger) == ("crash", "it broke")


def test_where_processes_are_counted_in_another_namespace_only_a_late_comer_is_a_stranger(gpu: Gpu, watching: Monitor) -> None:
    gpu.pids = [2**22 + 1]  # ours, by a number that means nothing here
    gpu.watch(watching, 0.2)
    watching.hear(ready(gpu.now))
    gpu.watch(watching, 0.2)
    assert watching.stranger is None
    gpu.pids = [2**22 + 1, 2**22 + 7]
    gpu.watch(watching, 0.1)
    assert watching.stranger == f"process {2**22 + 7} used the GPU while this cell was measured"


def test_the_gpus_are_those_that_cuda_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, count=8)
    asked: list[Any] = []
    library = sys.modules["pynvml"]
    monkeypatch.setattr(library, "nvmlDeviceGetUUID", lambda handle: asked.append(handle) or f"GPU-{handle}")
    for variable in ({}, {"CUDA_VISIBLE_DEVICES": "3,1"}, {"CUDA_VISIBLE_DEVICES": "GPU-aa,GPU-bb"}):
        with monitoring(variable, 2):
            pass
    assert asked == [0, 1, 3, 1, "aa", "bb"]
    with pytest.raises(UnsupportedError, match="wants 2 GPU"), monitoring({"CUDA_VISIBLE_DEVICES": "3"}, 2):
        pass


def test_a_whole_cell_on_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, prepared: Made, tmp_path: Any) -> None:
    """A worker of its own with a torch that only counts, and the library beside it: every column of a GPU is filled."""
    library = nvml(1)
    looks = iter(range(10**6))
    library.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(used=BEFORE if next(looks) < 2 else BEFORE + 5 * GIB)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    request = workloads.request(prepared.workload, step_seconds=0.3)
    fakes = str(Path(__file__).parent / "fakes" / "gpu")
    spec = request.cell.engine.model_copy(update={"environment": {"PYTHONPATH": os.pathsep.join([fakes, str(TREE)])}})
    request = request.model_copy(update={"cell": request.cell.model_copy(update={"engine": spec})})
    machine = records.GPU.model_copy(update={"memory_cap_gib": 24})
    record = run_cell(request, machine, prepared.prepared, tmp_path, lambda event: None)
    assert record.status == "ok", record.reason
    measurement = record.measurement
    assert measurement is not None
    steady = measurement.memory[-1]
    sizes = (steady.peak_allocated_bytes, steady.peak_active_bytes, steady.peak_reserved_bytes, steady.peak_device_bytes)
    assert sizes == (2 * GIB, 3 * GIB, 4 * GIB, 5 * GIB)
    assert measurement.steps.host_seconds == pytest.approx(measurement.steps.seconds, abs=0.05)
    assert measurement.steps.reserved_bytes == (4 * GIB,) * 4
    assert measurement.gemm_peak_flops == pytest.approx(2 * 8192**3 / 0.001, rel=0.5)
    (samples,) = measurement.gpus
    assert set(samples.sm_clock_mhz) == {1980}
    assert len(samples.seconds) >= 8, "ten a second for 1.2 seconds"
    assert "memory of 24 GiB was emulated" in " ".join(record.notes)
    assert loads(dumps(record), "round trip") == record
