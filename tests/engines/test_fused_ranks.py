"""Fused on two ranks: the same step as on one, whatever the micro-batch and the method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import engines.fused
from harness.engine import Job
from harness.spec import parse
from tests.engines.conformance import SAME
from tests.engines.ranks import Ranks, started
from tests.engines.test_fsdp import OnTwoRanks, trained
from tests.engines.test_fused import KNOBS
from tests.engines.tiny import FULL, GPU, LLAMA, LORA, QLORA, make_job, make_workload, with_train


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with started(engines.fused) as ranks:
        yield ranks


class TestOnTwo(OnTwoRanks):
    knobs = KNOBS


@pytest.mark.parametrize(("method", "micro_batch"), [(LORA, 2), (QLORA, 1), (FULL, 16)], ids=["lora", "qlora", "full"])
def test_two_ranks_make_the_steps_of_one(two: Ranks, tmp_path: Path, method: dict[str, Any], micro_batch: int) -> None:
    """Losses, norms before clipping, the tokens of all ranks, and what is saved."""
    job = make_job(tmp_path, "llama", method, epsilon=1e-3)  # else AdamW makes whole steps of rounding where a gradient is almost zero
    usual, ours = trained(engines.fused, KNOBS, job), trained(two, {**KNOBS, "micro_batch": micro_batch}, with_train(job, "ours"))
    assert ours.losses == pytest.approx(usual.losses, rel=SAME)
    assert ours.grad_norms == pytest.approx(usual.grad_norms, rel=2e-5)
    assert ours.tokens == usual.tokens
    saved, expected = (load_file(next(folder.glob("*.safetensors"))) for folder in (tmp_path / "ours", job.out))
    assert set(saved) == set(expected)
    for name, value in saved.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-6)


def test_every_gpu_needs_a_sample() -> None:
    knobs = parse(engines.fused.Knobs, KNOBS)
    said = engines.fused.unsupported(make_workload(LLAMA, LORA), knobs, GPU.model_copy(update={"count": 8}))
    assert said is not None
    assert "samples_per_step=5 leaves some of 8 processes without a sample" in said


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two NVIDIA GPUs here")
def test_replayed_steps_meet_launched_ones(two: Ranks, tmp_path: Path) -> None:
    """Uneven documents: what is new to one rank is captured, launched or replayed by the other; bf16 kernels, ten steps."""
    job: Job = replace(make_job(tmp_path, steps=10), device="cuda")
    knobs = {**KNOBS, "operations": "fused", "compute_dtype": "bfloat16", "micro_batch": 1}
    launched = trained(two, knobs, job)
    replayed = trained(two, {**knobs, "replay": True}, with_train(job, "replayed"))
    assert replayed.losses == pytest.approx(launched.losses, rel=2e-2)
