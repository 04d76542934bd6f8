"""Times on an NVIDIA GPU: the median of single calls out of a cold cache, and the two limits that floors are made of."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from engines.native.bench_kernels.setting import Call

_FLUSHED_BYTES = 2**28  # several times any L2 cache
_HEAD_START = 500_000  # cycles that the GPU idles before a call, about 0.3 ms, so that launching it takes no part of its time
_SECONDS = 0.15  # for one figure
_REPEATS = (5, 40)
_COPIED_BYTES, _SIDE = 2**30, 8192


@dataclass(frozen=True, slots=True)
class Limits:
    """What this GPU does in the same run: bytes a second of a large copy, and operations a second of a square bf16 product."""

    bandwidth: float
    peak: float

    def floor(self, num_bytes: int, flops: int) -> float:
        """The least milliseconds: the slower of moving and computing."""
        return 1000 * max(num_bytes / self.bandwidth, flops / self.peak)


class Clock:
    """Measures calls. Before each one the caches are filled with other data, by reading, so that nothing is left to be written back."""

    def __init__(self) -> None:
        """Takes 256 MiB."""
        self._other = torch.zeros(_FLUSHED_BYTES // 4, dtype=torch.float32, device="cuda")

    def milliseconds(self, call: Call) -> float:
        """The median over as many repeats as fit into a fixed time, after two that do not count."""
        for _ in range(2):
            self._one(call)
        torch.cuda.synchronize()
        estimate = self._elapsed([self._one(call)])[0]
        least, most = _REPEATS
        repeats = max(least, min(most, int(1000 * _SECONDS / max(estimate, 1e-3))))
        return statistics.median(self._elapsed([self._one(call) for _ in range(repeats)]))

    def _one(self, call: Call) -> tuple[Any, Any]:
        if call.reset is not None:
            call.reset()
        self._other.amax()
        torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]
        before: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        after: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        before.record()
        call.run()
        after.record()
        return before, after

    def _elapsed(self, pairs: list[tuple[Any, Any]]) -> list[float]:
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairs]

    def limits(self) -> Limits:
        """A copy of 1 GiB, which reads and writes, and a product of 8,192 x 8,192 matrices."""
        source, target = (torch.zeros(_COPIED_BYTES // 4, device="cuda") for _ in range(2))
        copy = self.milliseconds(Call(lambda: target.copy_(source)))
        left, right = (torch.randn(_SIDE, _SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        product = self.milliseconds(Call(lambda: left @ right))
        return Limits(2 * _COPIED_BYTES / copy * 1000, 2 * _SIDE**3 / product * 1000)
