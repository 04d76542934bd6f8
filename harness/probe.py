"""The stopwatch inside the worker: time, loss, tokens and memory of every step, without ever synchronising the device."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.compiles import CompileCounter
from harness.data.tokens import StepTokens
from harness.engine import Chosen
from harness.events import EventLog
from harness.memory import MemoryPeaks, Phase, reserved_bytes, status_bytes
from harness.startup import ImportClock

if TYPE_CHECKING:
    from torch import Tensor


class StepProbe:
    """What an engine reports to. On a CPU the clock is read at every step; on a GPU an event is recorded and read once it has passed.

    ``imports`` has been running since the worker began; ``data_seconds``: what the worker took to open the data.
    """

    def __init__(
        self, log: EventLog, imports: ImportClock, *, device: Literal["cpu", "cuda"], num_steps: int, began: float, data_seconds: float
    ) -> None:
        self._log = log
        self._imports = imports
        self._device = device
        self._clock = _CudaClock(num_steps) if device == "cuda" else _HostClock()
        self._memory = MemoryPeaks(device)
        self._compiles = CompileCounter()
        self._began = began
        self._data_seconds = data_seconds
        self.num_steps = 0

    def ready(self, chosen: Mapping[str, Chosen] | None = None) -> None:
        """Set-up is over; the next thing is step 1. ``chosen``: what the engine decided by itself."""
        imports = self._imports.stop()
        self._clock.start(self._compiles.count)
        at = time.monotonic()
        self._close("setup", at)
        fields = {"setup_seconds": at - self._began, "import_seconds": imports, "data_seconds": self._data_seconds, "at": at}
        gpus = _uuids() if self._device == "cuda" else []
        self._log.write("ready", {**fields, "gpus": gpus, "chosen": dict(chosen) if chosen else None})

    def decided(self, chosen: Mapping[str, Chosen]) -> None:
        """What the engine has decided by itself since ``ready``."""
        self._log.write("decided", {"chosen": dict(chosen)})

    def step(self, *, loss: Tensor | float, grad_norm: Tensor | float | None, tokens: StepTokens) -> None:
        """One optimizer step has been issued; ``loss`` is its token-weighted mean, ``grad_norm`` the norm before clipping."""
        self._clock.mark(loss, grad_norm, tokens, self._compiles.count)
        self.num_steps += 1
        self._drain(wait=False)
        if self.num_steps == 1:
            self._close("first_step", time.monotonic())

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """Around what a rank does where it waits for the slowest."""
        self._clock.tick("waiting")
        yield
        self._clock.tick("waiting")

    @contextlib.contextmanager
    def exchanges(self) -> Iterator[None]:
        """Around what else ranks exchange while this one computes nothing."""
        self._clock.tick("exchanging")
        yield
        self._clock.tick("exchanging")

    def finish(self) -> None:
        """Training is over: wait for the device and write what is left."""
        self._drain(wait=True)
        if self.num_steps > 1:
            self._close("steady", time.monotonic())

    def _close(self, phase: Phase, at: float) -> None:
        self._log.write("memory", {"memory": self._memory.close(phase), "at": at})

    def _drain(self, *, wait: bool) -> None:
        for step in self._clock.passed(wait=wait):
            self._log.write(
                "step",
                {
                    "seconds": step.seconds,
                    "losses": step.loss,
                    "grad_norms": step.grad_norm,
                    "tokens_input": step.tokens.input,
                    "tokens_loss": step.tokens.loss,
                    "tokens_processed": step.tokens.processed,
                    "stream_sha256": step.tokens.sha256,
                    "host_seconds": step.host_seconds,
                    "reserved_bytes": step.reserved_bytes,
                    "compiles": step.compiles,
                    "waiting_seconds": step.waiting_seconds,
                    "exchanging_seconds": step.exchanging_seconds,
                    "rss_bytes": status_bytes("VmRSS"),
                },
            )


_With = Literal["waiting", "exchanging"]


@dataclass(frozen=True, slots=True)
class _Passed:
    seconds: float
    loss: float
    grad_norm: float | None
    tokens: StepTokens
    compiles: int
    host_seconds: float | None = None
    reserved_bytes: int | None = None
    waiting_seconds: float | None = None
    exchanging_seconds: float | None = None


class _HostClock:
    """A CPU's work is done when the call returns."""

    def __init__(self) -> None:
        self._last = 0.0
        self._compiles = 0
        self._passed: list[_Passed] = []
        self._ticks: dict[_With, list[float]] = {"waiting": [], "exchanging": []}

    def tick(self, what: _With) -> None:
        """What a rank does with others begins, and the next time ends."""
        self._ticks[what].append(time.perf_counter())

    def start(self, compiles: int) -> None:
        self._compiles = compiles
        self._last = time.perf_counter()

    def mark(self, loss: Tensor | float, grad_norm: Tensor | float | None, tokens: StepTokens, compiles: int) -> None:
        norm = None if grad_norm is None else float(grad_norm)
        value = float(loss)
        now = time.perf_counter()
        waited, exchanged = (sum(ticks[1::2]) - sum(ticks[::2]) if ticks else None for ticks in self._ticks.values())
        passed = _Passed(
            now - self._last, value, norm, tokens, compiles - self._compiles, waiting_seconds=waited, exchanging_seconds=exchanged
        )
        self._passed.append(passed)
        self._last, self._compiles = now, compiles
        for ticks in self._ticks.values():
            ticks.clear()

    def passed(self, *, wait: bool) -> list[_Passed]:
        done, self._passed = self._passed, []
        return done


@dataclass(frozen=True, slots=True)
class _Issued:
    """A step whose event has been recorded and may not have passed yet; ``row`` of the pinned values is its own."""

    row: int
    event: Any
    has_norm: bool
    tokens: StepTokens
    compiles: int
    host_seconds: float
    reserved_bytes: int
    waits: tuple[Any, ...]
    exchanges: tuple[Any, ...]


class _CudaClock:
    """One CUDA event a step; loss and norm travel to pinned memory behind it, so reading a passed event costs no synchronisation."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._pending: deque[_Issued] = deque()
        self._count = 0
        self._ticks: dict[_With, list[Any]] = {"waiting": [], "exchanging": []}

    def tick(self, what: _With) -> None:
        """As of the host's clock, on the stream that computes."""
        self._ticks[what].append(_recorded())

    def start(self, compiles: int) -> None:
        import torch

        self._values = torch.full((self._num_steps, 2), float("nan"), dtype=torch.float32, pin_memory=True)
        self._compiles = compiles
        torch.cuda.synchronize()
        self._last: Any = _recorded()
        self._host = time.perf_counter()

    def mark(self, loss: Tensor | float, grad_norm: Tensor | float | None, tokens: StepTokens, compiles: int) -> None:
        import torch

        for column, value in enumerate((loss, grad_norm)):
            if value is not None:
                source = torch.as_tensor(value).detach().to(torch.float32).reshape(())
                self._values[self._count, column].copy_(source, non_blocking=True)
        event = _recorded()
        now = time.perf_counter()
        ticks = (tuple(self._ticks["waiting"]), tuple(self._ticks["exchanging"]))
        step = _Issued(
            self._count, event, grad_norm is not None, tokens, compiles - self._compiles, now - self._host, reserved_bytes(), *ticks
        )
        self._pending.append(step)
        for each in self._ticks.values():
            each.clear()
        self._host, self._compiles = now, compiles
        self._count += 1

    def passed(self, *, wait: bool) -> list[_Passed]:
        done = []
        while self._pending and (wait or self._pending[0].event.query()):
            step = self._pending.popleft()
            step.event.synchronize()
            loss, norm = self._values[step.row].tolist()
            seconds = self._last.elapsed_time(step.event) / 1000
            grad_norm, shared = norm if step.has_norm else None, (_between(step.waits), _between(step.exchanges))
            done.append(_Passed(seconds, loss, grad_norm, step.tokens, step.compiles, step.host_seconds, step.reserved_bytes, *shared))
            self._last = step.event
        return done


def _recorded() -> Any:
    """A timing event on the current stream, recorded now."""
    import torch

    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _between(ticks: tuple[Any, ...]) -> float | None:
    """Seconds between the first and the second event, the third and the fourth, …; all have passed."""
    pairs = zip(ticks[::2], ticks[1::2], strict=True)
    return sum(began.elapsed_time(ended) for began, ended in pairs) / 1000 if ticks else None


def _uuids() -> list[str]:
    """Of the GPUs that this process sees, as NVML writes them without its prefix; none where torch is too old to tell."""
    import torch

    found = [getattr(torch.cuda.get_device_properties(index), "uuid", None) for index in range(torch.cuda.device_count())]
    return [str(uuid) for uuid in found if uuid is not None]
