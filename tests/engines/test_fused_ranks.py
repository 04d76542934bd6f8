"""Fused on two ranks: the same step as on one, whatever the micro-batch and the method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import engines.fused
from engines.native import reference
from engines.native.buckets import Row
from engines.native.checkpoint import read_config
from engines.native.decoder import Decoder
from engines.native.full import full_optimizer
from engines.native.optimizer import step_scalars
from engines.native.packed import Angles
from engines.native.plan import KEEP_ALL
from engines.native.shape import read_shape
from engines.native.steps import Steps
from engines.native.store import Store, Training
from harness.data.tokens import IGNORE, Sample, TokenFile, pack
from harness.data.write import write_token_file
from harness.engine import Checkpoints, Job
from harness.spec import parse
from tests.engines.conformance import SAME
from tests.engines.ranks import Ranks, started
from tests.engines.test_fsdp import OnTwoRanks, trained
from tests.engines.test_full import loaded
from tests.engines.test_fused import KNOBS
from tests.engines.tiny import FULL, GPU, LLAMA, LONGEST, LORA, QLORA, VOCABULARY, make_job, make_workload, with_train


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


@pytest.mark.parametrize(
    ("processes", "method", "knobs", "limit"),
    [
        (1, LORA, {}, 0.5),
        (2, LORA, {}, 0.5),
        (2, FULL, {}, 0.5),
        (1, FULL, {"compute_dtype": "bfloat16"}, 0.5),
        (1, FULL, {"compute_dtype": "bfloat16", "optimizer_state": "int8"}, 0.5),
        (1, FULL, {"micro_batch": 5}, None),
    ],
    ids=["lora", "lora-ranks", "full-ranks", "full-masters", "full-int8", "full-in-backward"],
)
def test_the_rest_of_a_run_is_that_of_the_whole(
    two: Ranks, tmp_path: Path, processes: int, method: dict[str, Any], knobs: dict[str, Any], limit: float | None
) -> None:
    """To the bit, and the weights that are saved."""
    engine: Any = two if processes == 2 else engines.fused
    job = make_job(tmp_path, "tied" if method is FULL else "llama", method, steps=6, max_grad_norm=limit)
    places, settings = Checkpoints(folder=tmp_path / "checkpoints", every=2), {**KNOBS, **knobs}
    whole = trained(engine, settings, replace(job, checkpoints=places))
    assert sorted(path.name for path in places.folder.iterdir()) == ["step-00000002", "step-00000004"]
    rest = trained(engine, settings, replace(with_train(job, "rest"), checkpoints=replace(places, made=4)))
    assert (rest.losses, rest.grad_norms, rest.tokens) == (whole.losses[4:], whole.grad_norms[4:], whole.tokens[4:])
    saved, expected = (load_file(next(folder.glob("*.safetensors"))) for folder in (tmp_path / "rest", job.out))
    assert set(saved) == set(expected)
    assert all(torch.equal(saved[name], value) for name, value in expected.items())


def test_every_gpu_needs_a_sample() -> None:
    knobs = parse(engines.fused.Knobs, KNOBS)
    said = engines.fused.unsupported(make_workload(LLAMA, LORA), knobs, GPU.model_copy(update={"count": 8}))
    assert said is not None
    assert "samples_per_step=5 leaves some of 8 processes without a sample" in said


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two NVIDIA GPUs here")
def test_replayed_steps_meet_launched_ones(two: Ranks, tmp_path: Path) -> None:
    """Documents of two lengths, one a micro-batch: a step that is new to one rank meets one that the other replays."""
    random = np.random.default_rng(1)
    ids = [random.integers(0, VOCABULARY, size=length).astype(np.int32) for length in random.choice([16, 24], size=12)]
    tokens = TokenFile.open(
        write_token_file(
            tmp_path / "two_lengths", [Sample(one, np.where(np.arange(len(one)), one, IGNORE).astype(np.int32)) for one in ids], [], {}
        )
    )
    job: Job = replace(make_job(tmp_path, steps=12, samples_per_step=4), device="cuda", tokens=tokens)
    knobs = {**KNOBS, "operations": "fused", "compute_dtype": "bfloat16", "micro_batch": 1}
    launched = trained(two, knobs, job)
    replayed = trained(two, {**knobs, "replay": True}, replace(with_train(job, "replayed"), tokens=tokens))
    assert replayed.losses == pytest.approx(launched.losses, rel=2e-3)
    assert replayed.tokens == launched.tokens


def test_ranks_sum_the_gradients_that_lie_there(tmp_path: Path) -> None:
    """A replayed backward pass fills the buffer without a word to Python, whose last news is that an update has used it."""
    job = make_job(tmp_path, "llama", FULL)
    weights, shape, schedule = loaded(job, Training("fp32")), read_shape(read_config(job.base), LONGEST), job.workload.train
    assert isinstance(weights.arena, Store)
    native = Decoder(shape=shape, weights=weights, ops=reference.REFERENCE, plans=(KEEP_ALL,) * shape.num_layers, loss_chunk=7)
    angles = Angles.of(shape, LONGEST, torch.device("cpu"))
    summed: list[torch.Tensor] = []
    optimizer = full_optimizer(weights.arena, schedule, kernels=False)
    steps = Steps(native, angles, optimizer, 1.0, lambda loss, gradients: summed.append(gradients.clone()))
    samples = job.tokens.step(schedule, 0)
    (micro,), scalars = steps.place([Row(pack(samples))], step_scalars(schedule, 0, 10))
    steps.accumulate(micro, scalars)
    filled = weights.arena.gradients.clone()
    assert filled.any()
    steps.update(scalars)
    weights.arena._buffers[0].copy_(filled)  # as a replay of backward would
    weights.arena.expect(empty=False)
    steps.meet()
    assert summed[0].equal(filled)
