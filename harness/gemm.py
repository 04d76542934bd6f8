"""The fastest large matrix product that this GPU does right now: what a peak from a data sheet is worth on this machine."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

_SIZE = 8192  # three matrices of 128 MiB; 1.1e12 operations, 1.4 ms on an H100
_REPEATS = 20


def gemm_peak_flops() -> float | None:
    """Operations per second of a bfloat16 product of 8192-sized square matrices, median of 20 after 5; a few tens of milliseconds.

    None where there is no room for the matrices, and on GPUs older than bfloat16 (compute capability 8.0).
    """
    import torch

    if torch.cuda.get_device_capability() < (8, 0):
        return None
    torch.cuda.empty_cache()  # the engine has returned: what it held is ours to use
    try:
        a, b = (torch.randn(_SIZE, _SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        for _ in range(5):
            torch.mm(a, b, out=out)
        marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(_REPEATS + 1)]  # type: ignore[no-untyped-call]
        marks[0].record()
        for mark in marks[1:]:
            torch.mm(a, b, out=out)
            mark.record()
        marks[-1].synchronize()
    except torch.OutOfMemoryError:
        return None
    milliseconds = statistics.median(before.elapsed_time(after) for before, after in itertools.pairwise(marks))
    return float(2 * _SIZE**3 / (milliseconds / 1000))
