"""Two processes that stay, and train together what a test hands them: the ranks of an engine, without a start of Python for every run."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

from harness.engine import Job
from harness.errors import DataError, UnsupportedError
from tests.engines.tiny import RecordingProbe

_LONGEST_SECONDS = 900.0  # compiled layers take a minute on two quiet cores, and more than 300 s where four others want each of them
_SECONDS_TO_FOLLOW = 5.0  # for the other ranks, when one has failed


class Ranks:
    """The engine ``module`` as conformance sees it, but that every job is trained by all ranks; ``module``'s own where it has a word."""

    def __init__(self, module: ModuleType, count: int, *, lasting_group: bool) -> None:
        self._module, self._count, self._lasting_group = module, count, lasting_group
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def train(self, job: Job, knobs: Any, probe: RecordingProbe) -> None:
        """Rank 0's report goes to ``probe``; every other rank must have said the same."""
        if not self._processes:
            self._start()
        port = _free_port()
        for pipe in self._pipes:
            pipe.send((self._module.__name__, replace(job, processes=len(self._pipes)), knobs, port))
        first, *others = self._answers()
        for other in others:
            assert (other.losses, other.grad_norms, other.tokens) == (first.losses, first.grad_norms, first.tokens)
        probe.__dict__.update(first.__dict__)

    def _answers(self) -> list[Any]:
        """Of every rank. Raises what a rank raised; the others may wait for it forever, so after some seconds all are begun anew."""
        answers: dict[Connection, Any] = {}
        until = time.monotonic() + _LONGEST_SECONDS
        while len(answers) < len(self._pipes):
            able = wait([pipe for pipe in self._pipes if pipe not in answers], timeout=max(0.0, until - time.monotonic()))
            for pipe in able:
                answers[pipe] = _received(pipe)  # type: ignore[index, arg-type]
            failed = [answer for answer in answers.values() if isinstance(answer, BaseException)]
            if failed:
                until = min(until, time.monotonic() + _SECONDS_TO_FOLLOW)
            if not able:
                self.stop()
                raise failed[0] if failed else AssertionError("a rank does not answer")
        if failed := [answer for answer in answers.values() if isinstance(answer, BaseException)]:
            raise failed[0]
        return [answers[pipe] for pipe in self._pipes]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(self._count)]
        self._pipes = [ours for ours, _ in pairs]
        self._processes = [
            context.Process(target=_serve, args=(theirs, rank, self._count, self._lasting_group), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process, (_, theirs) in zip(self._processes, pairs, strict=True):
            process.start()
            theirs.close()

    def stop(self) -> None:
        """End them; the next job begins new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


@contextmanager
def started(module: ModuleType, count: int = 2, *, lasting_group: bool = False) -> Iterator[Ranks]:
    """``count`` processes for the length of the block. ``lasting_group``: one process group for all jobs, for what remembers its groups."""
    ranks = Ranks(module, count, lasting_group=lasting_group)
    try:
        yield ranks
    finally:
        ranks.stop()


def _received(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return RuntimeError("a rank died")


def _serve(pipe: Connection, rank: int, count: int, lasting_group: bool) -> None:
    import importlib

    import torch

    from engines.native.ranks import process_group

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1")
    lasting = ExitStack()
    while True:
        module, job, knobs, port = pipe.recv()
        os.environ["MASTER_PORT"] = str(port)
        if lasting_group and not torch.distributed.is_initialized():
            lasting.enter_context(process_group(job.device, count))
        probe = RecordingProbe()
        try:
            importlib.import_module(module).train(job, knobs, probe)
            pipe.send(probe)
        except (DataError, UnsupportedError) as error:
            pipe.send(error)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, AssertionError, ImportError):
            pipe.send(RuntimeError(f"rank {rank}: {traceback.format_exc()}"))


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
