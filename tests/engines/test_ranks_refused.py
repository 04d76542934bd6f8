"""Ranks that GPUs or torch cannot give are refused before a process group is made."""

from __future__ import annotations

import re

import pytest
import torch
from torch import distributed

from engines.native.ranks import process_group
from harness.errors import UnsupportedError


@pytest.mark.parametrize(
    ("gpus", "nccl", "here", "reason"),
    [
        (1, True, None, "2 processes on a host with 1 GPU(s); set engine.processes to their number"),
        (1, True, "1", None),  # the other rank is on another host
        (2, False, None, "this torch was built without NCCL, over which GPUs exchange gradients; install one with it"),
    ],
    ids=["more than GPUs", "one on each of two hosts", "no NCCL"],
)
def test_what_this_host_cannot_give_is_named(
    monkeypatch: pytest.MonkeyPatch, gpus: int, nccl: bool, here: str | None, reason: str | None
) -> None:
    class Reached(Exception):
        pass

    def reached(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here) if here else monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(distributed, "init_process_group", reached)
    refused = pytest.raises(UnsupportedError, match=re.escape(reason)) if reason else pytest.raises(Reached)
    with refused, process_group("cuda", 2):
        pass
