"""An engine that trains nothing and ends in every way a real one might."""

import atexit
import os
import resource
import signal
import subprocess
import sys
import threading
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
    "linger",
    "abort_late",
    "address_space",
    "escape",
    "wrong_event",
    "endless_line",
    "shout",
    "delete_log",
    "cut_log",
    "full_disk",
    "full_log",
    "one_rank",
    "apart",
]


class Knobs(Spec):
    behaviour: Behaviour
    at_step: int
    step_seconds: float
    shift: float


def unsupported(workload: Workload, knobs: Knobs, machine: Machine) -> str | None:
    return "this fake cannot do that" if knobs.behaviour == "unsupported" else None


def train(job: Job, knobs: Knobs, probe: Probe) -> None:
    _diary(job, "begin")
    probe.ready()
    steps = job.workload.train.num_steps - (1 if knobs.behaviour == "few_steps" else 0)
    for index in range(steps):
        if index == knobs.at_step:
            _misbehave(knobs.behaviour, job)
        time.sleep(knobs.step_seconds)
        loss = float("nan") if knobs.behaviour == "nan" else 5.0 / (index + 1)
        probe.step(loss=loss, grad_norm=1.0, tokens=StepTokens.expected(job.tokens.step(job.workload.train, index)))
    if knobs.behaviour != "no_adapter" and os.environ.get("RANK", "0") == "0":
        _save(job, knobs.shift)
    _diary(job, "end")


def _diary(job: Job, what: str, more: object = "") -> None:
    """A witness that is no part of the harness: one line of at most a few bytes is appended whole or not at all."""
    with (job.out.parent.parent / "diary.txt").open("a") as file:
        file.write(f"{what} {job.out.parent.name} {more}\n")


def _misbehave(behaviour: Behaviour, job: Job) -> None:
    if behaviour == "raise":
        raise RuntimeError("<b>broken</b> on purpose")
    if behaviour == "refuse":
        raise UnsupportedError("its weights turned out to be of the wrong kind")
    if behaviour == "exit":
        os._exit(7)
    if behaviour in ("segfault", "kill"):
        os.kill(os.getpid(), signal.SIGSEGV if behaviour == "segfault" else signal.SIGKILL)
    if behaviour == "hang":
        time.sleep(3600)
    if behaviour == "apart":
        _wait_for_the_other() if os.environ["RANK"] == "0" else _stray()
    if behaviour in ("linger", "abort_late"):
        _leave_badly(behaviour)
    if behaviour in ("host_oom", "address_space", "oom", "one_rank"):
        _run_out_of_memory(behaviour)
    if behaviour in ("fork", "escape"):
        _leave_a_child(behaviour, job)
    _harm_the_disk(behaviour, job)


def _leave_badly(behaviour: Behaviour) -> None:
    if behaviour == "linger":
        os._exit = lambda code: time.sleep(3600)
    else:
        atexit.register(os.abort)


def _wait_for_the_other() -> None:
    threading.Event().wait(3600)


def _stray() -> None:
    time.sleep(3600)


def _harm_the_disk(behaviour: Behaviour, job: Job) -> None:
    log = job.out.parent / "events.jsonl"
    if behaviour == "garbage":
        with log.open("ab") as file:
            file.write(b"\x00\xff not json\n")
    if behaviour == "wrong_event":
        with log.open("ab") as file:
            file.write(b'{"event": "step", "seconds": "quick"}\n')
    if behaviour == "endless_line":
        with log.open("ab") as file:
            file.write(b"x" * 2**23)
    if behaviour == "shout":
        sys.stdout.write("y" * 2**26 + "the last word\n")
        raise RuntimeError("hoarse")
    if behaviour == "delete_log":
        log.unlink()
    if behaviour == "cut_log":
        time.sleep(1)  # what is cut must have been read
        os.truncate(log, 10)
        time.sleep(1)
    if behaviour == "full_disk":
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"no space for this")
    if behaviour == "full_log":
        (descriptor,) = (int(link.name) for link in Path("/proc/self/fd").iterdir() if link.exists() and link.resolve() == log.resolve())
        os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)


def _leave_a_child(behaviour: Behaviour, job: Job) -> None:
    """``fork``: a plain child, and we hang. ``escape``: one that has left the session and its parent, and we go on."""
    if behaviour == "fork":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        _diary(job, "child", child.pid)
        time.sleep(3600)
    between = os.fork()
    if between == 0:
        os.setsid()
        if os.fork() == 0:
            _diary(job, "child", os.getpid())
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3600)
        os._exit(0)
    os.waitpid(between, 0)


def _run_out_of_memory(behaviour: Behaviour) -> None:
    if behaviour == "host_oom":
        raise MemoryError("no more")
    if behaviour == "address_space":
        resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
        np.ones(2**33)
    if behaviour == "one_rank" and os.environ["RANK"] == "0":
        time.sleep(3600)
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _save(job: Job, shift: float) -> None:
    assert job.adapter_init is not None
    tensors = load_file(job.adapter_init / "adapter_model.safetensors")
    save_file({name: np.asarray(value + 0.01 + shift) for name, value in tensors.items()}, job.out / "adapter_model.safetensors")
    (job.out / "adapter_config.json").write_text((job.adapter_init / "adapter_config.json").read_text())
