"""The ranks of a cell as torch.distributed knows them: made from what torchrun set, ended when training ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Literal

from harness.errors import UnsupportedError


@contextlib.contextmanager
def process_group(device: Literal["cpu", "cuda"], processes: int) -> Iterator[int]:
    """A process group over ``processes`` ranks for the length of the block (gloo, and on GPUs NCCL beside it); gives this rank's number.

    One that is already there is used, and left. After an error on GPUs it is left to the end of the process: NCCL would wait for ranks
    that do not come.
    Raises UnsupportedError when there are not as many ranks, or GPUs for them, or no NCCL.
    """
    import torch
    from torch import distributed

    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != processes:
        raise UnsupportedError(f"engine.processes is {processes}, but {started} rank(s) were started; let the harness start them")
    if device == "cuda":
        _expect_gpus(processes)
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if distributed.is_initialized():
        yield distributed.get_rank()
        return
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if processes == 1:  # nobody to meet: no port, no address
        distributed.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    else:
        distributed.init_process_group(backend)
    done = False
    try:
        yield distributed.get_rank()
        done = True
    finally:
        if done or device == "cpu":
            distributed.destroy_process_group()


def expect_agreement(said: bytes, what: str) -> None:
    """Raise RuntimeError when the ranks do not all say the same of ``what``. All ranks must call this."""
    from torch import distributed

    every: list[bytes] = [b""] * distributed.get_world_size()
    distributed.all_gather_object(every, said)
    if others := [rank for rank, other in enumerate(every) if other != every[0]]:
        raise RuntimeError(f"ranks {others} do not agree with rank 0 on {what}: their figures would not be those of one run")


def least(value: float) -> float:
    """The least of what the ranks say. All ranks must call this; one process need not have a group."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        return value
    said = torch.tensor(value, dtype=torch.float64)  # on the host: over gloo, also beside NCCL
    distributed.all_reduce(said, distributed.ReduceOp.MIN)
    return float(said)


def _expect_gpus(processes: int) -> None:
    """Of this host: torchrun says how many of the ranks are here."""
    import torch
    from torch import distributed

    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(processes)))
    if here > torch.cuda.device_count():
        raise UnsupportedError(f"{here} processes on a host with {torch.cuda.device_count()} GPU(s); set engine.processes to their number")
    if not distributed.is_nccl_available():
        raise UnsupportedError("this torch was built without NCCL, over which GPUs exchange gradients; install one with it")
