"""Peak memory of the worker's phases: the allocator's on a GPU, resident memory of the process everywhere."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, Literal

from harness.ranks import rank

Phase = Literal["setup", "first_step", "steady"]


class MemoryPeaks:
    """Peak memory of the phase that is closed; closing one starts the next."""

    def __init__(self, device: Literal["cpu", "cuda"]) -> None:
        self._device = device
        self._per_phase = _reset_resident_peak()
        self._num_retries = 0

    def close(self, phase: Phase) -> dict[str, Any]:
        """The fields of the record's ``Memory`` for ``phase``, but for what only the launching process can see."""
        peaks: dict[str, Any] = {
            "phase": phase,
            "rank": rank(),
            # Where the kernel does not let us reset the high-water mark, later phases would repeat the first one's: say nothing.
            "peak_rss_bytes": status_bytes("VmHWM") if self._per_phase or phase == "setup" else None,
            "peak_allocated_bytes": None,
            "peak_active_bytes": None,
            "peak_reserved_bytes": None,
            "num_alloc_retries": None,
        }
        torch = sys.modules.get("torch")
        if self._device == "cuda" and torch is not None:
            stats = torch.cuda.memory_stats()
            for kind in ("allocated", "active", "reserved"):
                peaks[f"peak_{kind}_bytes"] = stats.get(f"{kind}_bytes.all.peak", 0)
            retries = stats.get("num_alloc_retries", 0)  # since the start: resetting the peaks leaves it as it is
            peaks["num_alloc_retries"], self._num_retries = retries - self._num_retries, retries
            torch.cuda.reset_peak_memory_stats()
        _reset_resident_peak()
        return peaks


def reserved_bytes() -> int:
    """What torch's CUDA allocator holds now; nothing is waited for, nothing flattened: it is asked at every step."""
    import torch

    stats = torch.cuda.memory_stats_as_nested_dict()
    return int(stats["reserved_bytes"]["all"]["current"]) if stats else 0


def status_bytes(field: str) -> int | None:
    """A line of this process's /proc status, in bytes; None where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


def _reset_resident_peak() -> bool:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False
