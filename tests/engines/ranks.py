"""Two processes that stay, and train together what a test hands them: the ranks of an engine, without a start of Python for every run."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

from harness.engine import Job
from harness.errors import DataError, UnsupportedError
from tests.engines.tiny import RecordingProbe

_LONGEST_SECONDS = 120.0


class Ranks:
    """The engine ``module`` as conformance sees it, but that every job is trained by all ranks; ``module``'s own where it has a word."""

    def __init__(self, module: ModuleType, pipes: list[Connection]) -> None:
        self._module = module
        self._pipes = pipes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def train(self, job: Job, knobs: Any, probe: RecordingProbe) -> None:
        """Rank 0's report goes to ``probe``; every other rank must have said the same."""
        port = _free_port()
        for pipe in self._pipes:
            pipe.send((self._module.__name__, replace(job, processes=len(self._pipes)), knobs, port))
        answers = [self._answer(pipe) for pipe in self._pipes]
        failed = [answer for answer in answers if isinstance(answer, BaseException)]
        if failed:
            raise failed[0]
        first, *others = answers
        for other in others:
            assert (other.losses, other.grad_norms, other.tokens) == (first.losses, first.grad_norms, first.tokens)
        probe.__dict__.update(first.__dict__)

    @staticmethod
    def _answer(pipe: Connection) -> Any:
        assert pipe.poll(_LONGEST_SECONDS), "a rank does not answer"
        return pipe.recv()


@contextmanager
def started(module: ModuleType, count: int = 2, *, lasting_group: bool = False) -> Iterator[Ranks]:
    """``count`` processes for the length of the block. ``lasting_group``: one process group for all jobs, for what remembers its groups."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(count)]
    processes = [
        context.Process(target=_serve, args=(theirs, rank, count, lasting_group), daemon=True) for rank, (_, theirs) in enumerate(pairs)
    ]
    for process in processes:
        process.start()
    try:
        yield Ranks(module, [ours for ours, _ in pairs])
    finally:
        for process in processes:
            process.kill()
            process.join()


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
