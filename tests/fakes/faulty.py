"""An engine that trains nothing and ends in every way a real one might."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import load_file, save_file

from harness.data import StepTokens
from harness.engine import Job, Machine, Probe
from harness.errors import UnsupportedError
from harness.spec import Spec, Workload

Behaviour = Literal[
    "ok",
    "raise",
    "exit",
    "segfault",
    "kill",
    "hang",
    "host_oom",
    "oom",
    "garbage",
    "fork",
    "few_steps",
    "no_adapter",
    "refuse",
    "unsupported",
    "nan",
]


class Knobs(Spec):
    behaviour: Behaviour
    at_step: int
    step_seconds: float


def unsupported(workload: Workload, knobs: Knobs, machine: Machine) -> str | None:
    return "this fake cannot do that" if knobs.behaviour == "unsupported" else None


def train(job: Job, knobs: Knobs, probe: Probe) -> None:
    probe.ready()
    steps = job.workload.train.steps - (1 if knobs.behaviour == "few_steps" else 0)
    for index in range(steps):
        if index == knobs.at_step:
            _misbehave(knobs.behaviour, job)
        time.sleep(knobs.step_seconds)
        loss = float("nan") if knobs.behaviour == "nan" else 5.0 / (index + 1)
        probe.step(loss=loss, grad_norm=1.0, tokens=StepTokens.expected(job.tokens.step(job.workload.train, index)))
    if knobs.behaviour != "no_adapter":
        _save(job)


def _misbehave(behaviour: Behaviour, job: Job) -> None:
    if behaviour == "raise":
        raise RuntimeError("<b>broken</b> on purpose")
    if behaviour == "refuse":
        raise UnsupportedError("its weights turned out to be of the wrong kind")
    if behaviour == "exit":
        os._exit(7)
    if behaviour == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if behaviour == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "hang":
        time.sleep(3600)
    if behaviour in ("host_oom", "oom"):
        _run_out_of_memory(behaviour)
    if behaviour == "garbage":
        with (job.out.parent / "events.jsonl").open("ab") as file:
            file.write(b"\x00\xff not json\n")
    if behaviour == "fork":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        (Path(job.out).parent / "child.pid").write_text(str(child.pid))
        time.sleep(3600)


def _run_out_of_memory(behaviour: Behaviour) -> None:
    if behaviour == "host_oom":
        raise MemoryError("no more")
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _save(job: Job) -> None:
    assert job.adapter_init is not None
    tensors = load_file(job.adapter_init / "adapter_model.safetensors")
    save_file({name: np.asarray(value + 0.01) for name, value in tensors.items()}, job.out / "adapter_model.safetensors")
    (job.out / "adapter_config.json").write_text((job.adapter_init / "adapter_config.json").read_text())
