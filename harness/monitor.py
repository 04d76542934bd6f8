"""What NVML says of the GPUs of a cell: sampled by the process that launched it, so that the worker is not disturbed."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from harness.errors import UnsupportedError
from harness.events import Event
from harness.machine import nvml
from harness.record import GpuSamples, Measurement

BUSY_BYTES = 2**30  # an idle H100 reports half of it in use, the driver's own
_MOST_SAMPLES = 256  # then every two become one
_KEPT = 64  # memory samples that a phase's end, heard of a little later, may still claim
_LEAVE_SECONDS = 15.0  # a process that was just killed holds its memory a little longer


@dataclass(slots=True)
class _Series:
    """Samples of one GPU since ``ready``: (at, clock, reasons, energy); the reasons are of the whole interval before."""

    points: list[tuple[float, int | None, int | None, float | None]] = field(default_factory=list)
    every: int = 1
    count: int = 0
    reasons: int | None = None

    def add(self, at: float, clock: int | None, reasons: int | None, energy: float | None) -> None:
        """Keep the sample, or only its reasons until the next that is kept."""
        if reasons is not None:
            self.reasons = reasons | (self.reasons or 0)
        self.count += 1
        if self.count % self.every:
            return
        self.points.append((at, clock, self.reasons, energy))
        self.reasons = None
        if len(self.points) >= _MOST_SAMPLES:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(b[0], b[1], None if b[2] is None else b[2] | (a[2] or 0), b[3]) for a, b in pairs]
            self.every *= 2


@dataclass(slots=True)
class _Gpu:
    """One GPU of the cell. ``before``: its memory in use before the launch, null where it does not say. ``pending``: memory samples of
    the phase that is going on, those too old to be claimed as ``peak``.
    """

    handle: Any
    uuid: str
    before: int | None = None
    series: _Series = field(default_factory=_Series)
    pending: deque[tuple[float, int]] = field(default_factory=deque)
    peak: int | None = None
    peaks: dict[str, int | None] = field(default_factory=dict)

    def add_memory(self, at: float, used: int | None) -> None:
        """A sample of the memory in use; a GPU that has stopped answering gives none."""
        if used is None or self.before is None:
            return
        self.pending.append((at, max(0, used - self.before)))
        if len(self.pending) > _KEPT:
            self.peak = max(self.peak or 0, self.pending.popleft()[1])

    def close(self, phase: str, at: float) -> None:
        """The phase ended at ``at``: its peak is the largest sample until then; none, none."""
        while self.pending and self.pending[0][0] <= at:
            self.peak = max(self.peak or 0, self.pending.popleft()[1])
        self.peaks[phase], self.peak = self.peak, None


class Monitor:
    """Watches the GPUs of one cell from before its launch to its end."""

    def __init__(self, library: Any, handles: list[Any]) -> None:
        self._library = library
        self._gpus = [_Gpu(handle, str(library.nvmlDeviceGetUUID(handle))) for handle in handles]
        self._ours: set[int] = set()
        self._found: set[int] = set()
        self._known_strangers: set[int] | None = None
        self._ready_at: float | None = None
        self._seen: set[str] = set()
        self.stranger: str | None = None

    def busy(self) -> str | None:
        """Who holds one of the GPUs, once they have had time to leave; None when nobody does, and their memory is then the zero point."""
        deadline = time.monotonic() + _LEAVE_SECONDS
        while (found := self._holder()) and time.monotonic() < deadline:
            time.sleep(0.5)
        for gpu in self._gpus:
            gpu.before = self._used(gpu)
        return found

    def hear(self, event: Event) -> None:
        """What the worker said: when it was ready, and when a phase ended."""
        if event["event"] == "memory" and event.get("at") is not None:
            for gpu in self._gpus:
                gpu.close(event["memory"]["phase"], event["at"])
        if event["event"] == "ready":
            self._ready_at = event.get("at")
            self._seen = set(event.get("gpus", ()))
            self._known_strangers = None

    def sample(self, pid: int) -> None:
        """Look once; ``pid`` is the process above all of the worker's."""
        now = time.monotonic()
        for gpu in self._gpus:
            gpu.add_memory(now, self._used(gpu))
            if self._ready_at is not None:
                gpu.series.add(now, *self._clocks(gpu))
        self._look_for_strangers(pid)

    def add_to(self, measurement: Measurement) -> Measurement:
        """``measurement`` with the device's peaks and the samples. Nothing is added when the worker used other GPUs than were watched."""
        if self._ready_at is None or not self._watched_the_right_ones():
            return measurement
        memory = tuple(
            one.model_copy(update={"peak_device_bytes": self._gpus[one.rank].peaks.get(one.phase)}) if one.rank < len(self._gpus) else one
            for one in measurement.memory
        )
        gpus = tuple(self._samples(rank, gpu, self._ready_at) for rank, gpu in enumerate(self._gpus))
        return measurement.model_copy(update={"memory": memory, "gpus": gpus})

    def _watched_the_right_ones(self) -> bool:
        return not self._seen or all(gpu.uuid.removeprefix("GPU-") in self._seen for gpu in self._gpus)

    def _samples(self, rank: int, gpu: _Gpu, ready_at: float) -> GpuSamples:
        points = gpu.series.points
        return GpuSamples(
            rank=rank,
            gpu=hashlib.sha256(gpu.uuid.encode()).hexdigest()[:12],
            seconds=tuple(round(point[0] - ready_at, 3) for point in points),
            sm_clock_mhz=tuple(point[1] for point in points),
            event_reasons=tuple(point[2] for point in points),
            energy_joules=tuple(point[3] for point in points),
        )

    def _holder(self) -> str | None:
        for number, gpu in enumerate(self._gpus):
            processes, used = self._processes(gpu), self._used(gpu)
            if processes or (used or 0) > BUSY_BYTES:
                who = ", ".join(f"process {pid}" for pid in sorted(processes)) or "a process that the driver does not name"
                return f"{who} holds {(used or 0) / 2**30:.1f} GiB of GPU {number}"
        return None

    def _look_for_strangers(self, pid: int) -> None:
        """A compute process below none of ours. Where the driver counts processes in another namespace, one that came after ready."""
        if self.stranger is not None:
            return
        found = set().union(*(self._processes(gpu) for gpu in self._gpus))
        if found - self._ours and found != self._found:  # walking the processes takes milliseconds: not for what was seen before
            with contextlib.suppress(psutil.NoSuchProcess):
                self._ours |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
        self._found, others = found, found - self._ours
        if found & self._ours:
            self._name(others)
        elif self._ready_at is not None:
            if self._known_strangers is None:
                self._known_strangers = others
            self._name(others - self._known_strangers)

    def _name(self, strangers: set[int]) -> None:
        if strangers:
            self.stranger = f"process {', '.join(map(str, sorted(strangers)))} used the GPU while this cell was measured"

    def _used(self, gpu: _Gpu) -> int | None:
        info = self._asked(lambda: self._library.nvmlDeviceGetMemoryInfo(gpu.handle))
        return None if info is None else int(info.used)

    def _processes(self, gpu: _Gpu) -> set[int]:
        return {int(one.pid) for one in self._asked(lambda: self._library.nvmlDeviceGetComputeRunningProcesses(gpu.handle)) or ()}

    def _clocks(self, gpu: _Gpu) -> tuple[int | None, int | None, float | None]:
        library = self._library
        clock = self._asked(lambda: library.nvmlDeviceGetClockInfo(gpu.handle, library.NVML_CLOCK_SM))
        reasons = self._asked(lambda: library.nvmlDeviceGetCurrentClocksThrottleReasons(gpu.handle))
        millijoules = self._asked(lambda: library.nvmlDeviceGetTotalEnergyConsumption(gpu.handle))
        return clock, reasons, None if millijoules is None else millijoules / 1000

    def _asked(self, question: Callable[[], Any]) -> Any:
        """The answer, None where this GPU or its driver has none."""
        try:
            return question()
        except self._library.NVMLError:
            return None


@contextlib.contextmanager
def monitoring(environment: Mapping[str, str], count: int) -> Iterator[Monitor]:
    """A monitor of the ``count`` GPUs that a process with this ``environment`` sees first. Raises UnsupportedError when there are none."""
    with nvml() as library:
        if library is None:
            raise UnsupportedError("NVML does not answer any more: is the driver loaded?")
        yield Monitor(library, _handles(library, environment.get("CUDA_VISIBLE_DEVICES"), count))


def _handles(library: Any, visible: str | None, count: int) -> list[Any]:
    """As CUDA reads its variable: numbers in PCI order, or names of GPUs and of their slices."""
    names = [str(index) for index in range(library.nvmlDeviceGetCount())] if visible is None else visible.split(",")
    if len(names) < count or "" in names[:count]:
        raise UnsupportedError(f"the cell wants {count} GPU(s) and CUDA_VISIBLE_DEVICES={visible!r} shows {len([n for n in names if n])}")
    try:
        return [_handle(library, name.strip()) for name in names[:count]]
    except library.NVMLError as error:
        raise UnsupportedError(f"CUDA_VISIBLE_DEVICES={visible!r} names a GPU that NVML does not know: {error}") from error


def _handle(library: Any, name: str) -> Any:
    return library.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else library.nvmlDeviceGetHandleByUUID(name)
