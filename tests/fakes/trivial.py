"""The smallest engine there can be: it reports every step and returns the initial adapter untrained."""

import shutil

from harness.data import StepTokens, chunks, pad
from harness.engine import Job, Machine, Probe
from harness.spec import Spec, Workload

loss_norm = "token_global"  # what the loss of a step is a mean of: all its labels


class Knobs(Spec):
    """How, never what."""

    micro_batch: int


def unsupported(workload: Workload, knobs: Knobs, machine: Machine) -> str | None:
    """Why this cannot run, or None."""
    return None if workload.method.name == "lora" else f"trivial has no method={workload.method.name}; use method=lora"


def train(job: Job, knobs: Knobs, probe: Probe) -> None:
    """Consume every step's samples, leave an adapter in ``job.out``."""
    train = job.workload.train
    probe.ready()
    for step in range(train.num_steps):
        batches = [pad(samples) for samples in chunks(job.tokens.step(train, step), knobs.micro_batch)]
        # … forward and backward over every batch, weighting tokens over the whole step; then update with train.learning_rate_at(step) …
        probe.step(loss=1.0, grad_norm=None, tokens=StepTokens.of(batches))
    assert job.adapter_init is not None
    shutil.copytree(job.adapter_init, job.out, dirs_exist_ok=True)
