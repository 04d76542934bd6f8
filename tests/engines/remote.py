"""An engine that trains in its own interpreter, seen from a test as the module that it is.

``python -m tests.engines.remote MODULE`` is the other end. The reference stays here, unpatched. One child process serves all tests of a
run: importing a peer takes half a minute.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Mapping
from typing import IO, Any

from harness import errors
from harness.engine import Chosen, Engine, Job, Probe
from harness.spec import parse

Call = tuple[str, dict[str, Any]]


class Remote:
    """What ``module`` is, but for ``train``, which happens in ``python``; what it reports is replayed to the probe when it has ended."""

    def __init__(self, module: str, python: str, environment: dict[str, str]) -> None:
        self._module: Any = importlib.import_module(module)
        self._command = [python, "-m", "tests.engines.remote", module]
        self._environment = environment

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    @functools.cached_property
    def _process(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(self._command, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(_end, process)
        return process

    def train(self, job: Job, knobs: Any, probe: Probe) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((job, knobs.model_dump(mode="json")), self._process.stdin)
        self._process.stdin.flush()
        calls, error = pickle.load(self._process.stdout)
        for name, given in calls:
            getattr(probe, name)(**given)
        if error is not None:
            kind, said = error
            raise getattr(errors, kind, RuntimeError)(said)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


class _Told:
    """A probe that only remembers, in plain numbers."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def ready(self, chosen: Mapping[str, Chosen] | None = None) -> None:
        self.calls.append(("ready", {"chosen": chosen}))

    def step(self, *, loss: Any, grad_norm: Any, tokens: Any) -> None:
        norm = None if grad_norm is None else float(grad_norm)
        self.calls.append(("step", {"loss": float(loss), "grad_norm": norm, "tokens": tokens}))


def _serve(engine: Engine[Any], requests: IO[bytes], replies: IO[bytes]) -> None:
    while True:
        try:
            job, knobs = pickle.load(requests)
        except EOFError:
            return
        told, error = _Told(), None
        try:
            engine.train(job, parse(engine.Knobs, knobs), told)
        except Exception as raised:  # noqa: BLE001  # told to the test, where it is raised again
            known = isinstance(raised, errors.HarnessError)
            error = (type(raised).__name__, str(raised) if known else traceback.format_exc())
        pickle.dump((told.calls, error), replies)
        replies.flush()


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a peer prints is no reply
    _serve(importlib.import_module(sys.argv[1]), sys.stdin.buffer, own)
