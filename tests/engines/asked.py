"""DeepSpeed as an engine that says how often a step asks the device for something, and the same count of any other engine."""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engines.deepspeed
from engines.deepspeed import Knobs as Knobs
from harness.engine import Job
from tests.engines.tiny import RecordingProbe

_NAMES = {torch.ops.aten._local_scalar_dense.default: "asked", torch.ops.aten.copy_.default: "copied"}


class Counts(TorchDispatchMode):
    """``asked``: values read by the host and waits for the device, before each of which a GPU works off its queue; ``copied``: tensors.

    ``largest``: values in the largest tensor that was made without any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[_NAMES.get(function, "others")] += 1
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.empty.memory_format:
            self.largest = max(self.largest, result.numel())
        return result

    def synchronize(self, *_: Any) -> None:
        """In the place of an accelerator's."""
        self.calls["asked"] += 1


class CountingProbe(RecordingProbe):
    """Leaves alone what it is told, and notes what ``counts`` has come to."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts, self.so_far = counts, [Counter[str]()]

    def step(self, **_: Any) -> None:
        self.so_far.append(self.counts.calls.copy())


def in_last_step(engine: ModuleType, job: Job, knobs: Any, counts: Counts) -> Counter[str]:
    """What ``engine`` does in the last step of ``job``."""
    probe = CountingProbe(counts)
    with counts:
        engine.train(job, knobs, probe)
    return probe.so_far[-1] - probe.so_far[-2]


def train(job: Job, knobs: Any, probe: Any) -> None:
    """What a rank calls; ``probe.asked`` and ``probe.largest`` are what came of it."""
    engines.deepspeed._deepspeed(job.device)
    from deepspeed.accelerator import get_accelerator

    counts = Counts()
    with patch.object(type(get_accelerator()), "synchronize", counts.synchronize):
        probe.asked = in_last_step(engines.deepspeed, job, knobs, counts)
    probe.largest = counts.largest
