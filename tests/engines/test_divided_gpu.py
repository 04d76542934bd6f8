"""A divided base on GPUs: buffers that are filled on a stream of their own hold what products read, on one card and over NCCL on two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import engines.fused
from engines.native.checkpoint import load_weights, read_config
from engines.native.decoder import Decoder
from engines.native.loader import Placement
from engines.native.lora import read_adapter
from engines.native.packed import Angles
from engines.native.plan import KEEP_ALL, KEEP_INPUT, Plan
from engines.native.shape import read_shape
from harness.data.tokens import pack
from harness.engine import Job
from tests.engines.ranks import Ranks, started
from tests.engines.test_divided import Everyone
from tests.engines.test_fsdp import trained
from tests.engines.test_fused_gpu import KNOBS
from tests.engines.tiny import LONGEST, LORA, QLORA, make_job, with_train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
SLOW_CYCLES = 2_000_000  # about a millisecond: longer than the products of a tiny model


class Slowly(Everyone):
    """What reads too early finds the weights of another layer, and what fills too early destroys what is still read."""

    def gather(self, part: Tensor, whole: Tensor) -> None:
        torch.cuda._sleep(SLOW_CYCLES)  # type: ignore[no-untyped-call]
        super().gather(part, whole)


def whole_decoder(job: Job, place: Placement, plan: Plan) -> Decoder:
    from engines.native.fused_ops import FUSED

    assert job.adapter_init is not None
    shape = read_shape(read_config(job.base), LONGEST)
    weights = load_weights(job.base, shape, place, read_adapter(job.adapter_init))
    return Decoder(shape=shape, weights=weights, ops=FUSED, plans=(plan,) * shape.num_layers, loss_chunk=5)


@pytest.mark.parametrize("plan", [KEEP_ALL, KEEP_INPUT, Plan(KEEP_ALL.kept - {"gate_up"}, pieces=3)], ids=["all", "input", "pieces"])
@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
def test_what_is_gathered_ahead_is_there_in_time(tmp_path: Path, method: dict[str, Any], plan: Plan) -> None:
    """Losses to the bit, in passes that know the order and one that does not; gradients but for the sums of attention."""
    from engines.native.fused_ops import FILLING, FUSED

    job = make_job(tmp_path, method=method)
    place = Placement(torch.device("cuda"), torch.bfloat16, torch.float32, 64, FILLING)
    whole, (*_, last) = whole_decoder(job, place, plan), Slowly(2, place, FUSED).load(job, plan)
    angles, one = Angles.of(whole.shape, 128, place.device), torch.ones((), device=place.device)
    for step in range(4):
        row = angles.pack(pack(job.tokens.step(job.workload.train, step)))
        assert last.accumulate(row, one).equal(whole.accumulate(row, one))
        torch.testing.assert_close(last.weights.arena.gradients, whole.weights.arena.gradients, rtol=2e-2, atol=2e-3)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with started(engines.fused) as ranks:
        yield ranks


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two NVIDIA GPUs here")
@pytest.mark.parametrize("knobs", [{}, {"recompute": "full"}], ids=["all", "recomputed"])
@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
def test_two_gpus_make_the_losses_of_replicas(two: Ranks, tmp_path: Path, method: dict[str, Any], knobs: dict[str, Any]) -> None:
    """Five uneven samples, one a micro-batch: one rank keeps pace without a label."""
    job = replace(make_job(tmp_path, method=method, steps=8), device="cuda")
    settings = {**KNOBS, "replay": False, "micro_batch": 1, **knobs}
    replicas = trained(two, settings, job)
    sharded = trained(two, {**settings, "base": "sharded"}, with_train(job, "sharded"))
    assert sharded.losses == pytest.approx(replicas.losses, rel=2e-3)
    assert sharded.grad_norms == pytest.approx(replicas.grad_norms, rel=2e-2)
