"""The stopwatch inside the worker: time, loss, tokens and memory of every step, without ever synchronising the device."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.data.tokens import StepTokens
from harness.events import EventLog

if TYPE_CHECKING:
    from torch import Tensor

Phase = Literal["setup", "first_step", "steady"]


class StepProbe:
    """What an engine reports to. On a CPU the clock is read at every step; on a GPU an event is recorded and read once it has passed."""

    def __init__(self, log: EventLog, *, device: Literal["cpu", "cuda"], num_steps: int) -> None:
        self._log = log
        self._clock = _CudaClock(num_steps) if device == "cuda" else _HostClock()
        self._memory = _MemoryPeaks(device)
        self._started = time.perf_counter()
        self.num_steps = 0

    def ready(self) -> None:
        """Set-up is over; the next thing is step 1."""
        self._clock.start()
        self._log.write("memory", {"memory": self._memory.close("setup")})
        self._log.write("ready", {"setup_seconds": time.perf_counter() - self._started})

    def step(self, *, loss: Tensor | float, grad_norm: Tensor | float | None, tokens: StepTokens) -> None:
        """One optimizer step has been issued; ``loss`` is its token-weighted mean, ``grad_norm`` the norm before clipping."""
        self._clock.mark(loss, grad_norm, tokens)
        self.num_steps += 1
        self._drain(wait=False)
        if self.num_steps == 1:
            self._log.write("memory", {"memory": self._memory.close("first_step")})

    def finish(self) -> None:
        """Training is over: wait for the device and write what is left."""
        self._drain(wait=True)
        if self.num_steps > 1:
            self._log.write("memory", {"memory": self._memory.close("steady")})

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
                    "rss_bytes": _status_bytes("VmRSS"),
                },
            )


@dataclass(frozen=True, slots=True)
class _Passed:
    seconds: float
    loss: float
    grad_norm: float | None
    tokens: StepTokens


class _HostClock:
    """A CPU's work is done when the call returns."""

    def __init__(self) -> None:
        self._last = 0.0
        self._passed: list[_Passed] = []

    def start(self) -> None:
        self._last = time.perf_counter()

    def mark(self, loss: Tensor | float, grad_norm: Tensor | float | None, tokens: StepTokens) -> None:
        norm = None if grad_norm is None else float(grad_norm)
        value = float(loss)
        now = time.perf_counter()
        self._passed.append(_Passed(now - self._last, value, norm, tokens))
        self._last = now

    def passed(self, *, wait: bool) -> list[_Passed]:
        done, self._passed = self._passed, []
        return done


class _CudaClock:
    """One CUDA event a step; loss and norm travel to pinned memory behind it, so reading a passed event costs no synchronisation."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._pending: deque[tuple[int, Any, bool, StepTokens]] = deque()
        self._count = 0

    def start(self) -> None:
        import torch

        self._values = torch.full((self._num_steps, 2), float("nan"), dtype=torch.float32, pin_memory=True)
        torch.cuda.synchronize()
        self._last: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._last.record()

    def mark(self, loss: Tensor | float, grad_norm: Tensor | float | None, tokens: StepTokens) -> None:
        import torch

        for column, value in enumerate((loss, grad_norm)):
            if value is not None:
                source = torch.as_tensor(value).detach().to(torch.float32).reshape(())
                self._values[self._count, column].copy_(source, non_blocking=True)
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._pending.append((self._count, event, grad_norm is not None, tokens))
        self._count += 1

    def passed(self, *, wait: bool) -> list[_Passed]:
        done = []
        while self._pending and (wait or self._pending[0][1].query()):
            index, event, has_norm, tokens = self._pending.popleft()
            event.synchronize()
            loss, norm = self._values[index].tolist()
            done.append(_Passed(self._last.elapsed_time(event) / 1000, loss, norm if has_norm else None, tokens))
            self._last = event
        return done


class _MemoryPeaks:
    """Peak memory of the phase that is closed; closing one starts the next."""

    def __init__(self, device: Literal["cpu", "cuda"]) -> None:
        self._device = device
        self._per_phase = _reset_resident_peak()

    def close(self, phase: Phase) -> dict[str, Any]:
        peaks: dict[str, Any] = {
            "phase": phase,
            "rank": 0,
            # Where the kernel does not let us reset the high-water mark, later phases would repeat the first one's: say nothing.
            "peak_rss_bytes": _status_bytes("VmHWM") if self._per_phase or phase == "setup" else None,
            "peak_allocated_bytes": None,
            "peak_reserved_bytes": None,
            "num_alloc_retries": None,
        }
        torch = sys.modules.get("torch")
        if self._device == "cuda" and torch is not None:
            stats = torch.cuda.memory_stats()
            peaks["peak_allocated_bytes"] = stats.get("allocated_bytes.all.peak", 0)
            peaks["peak_reserved_bytes"] = stats.get("reserved_bytes.all.peak", 0)
            peaks["num_alloc_retries"] = stats.get("num_alloc_retries", 0)
            torch.cuda.reset_peak_memory_stats()
        _reset_resident_peak()
        return peaks


def _reset_resident_peak() -> bool:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _status_bytes(field: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None
