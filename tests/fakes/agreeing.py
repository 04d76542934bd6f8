"""Reports what ranks agree on that say different things, and trains nothing."""

from __future__ import annotations

from engines.native.ranks import least, process_group
from harness.data.tokens import StepTokens
from harness.engine import Job, Probe


def train(job: Job, knobs: object, probe: Probe) -> None:
    """The loss of the only step is the least of what the ranks say, each its number and a half."""
    with process_group(job.device, job.processes) as rank:
        probe.ready()
        samples = job.tokens.step(job.workload.train, 0)
        tokens = StepTokens.expected(samples)
        probe.step(loss=least(rank + 0.5), grad_norm=None, tokens=tokens)
