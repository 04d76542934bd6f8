"""Axolotl's own package on two ranks of a CPU (gloo), launched as the harness launches any cell of several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.adapters import adapter_folder
from harness.compose import compose_one, plain
from harness.config import Limits, MachineConfig, Request
from harness.data.tokens import Sample, StepTokens
from harness.engine import Job, Machine
from harness.interpreter import located
from harness.launch import run_cell
from harness.places import Prepared, Sources
from harness.record import Record
from harness.spec import Cell, EngineSpec
from tests.engines.peers import peer
from tests.engines.test_qlora import WHOLE_BLOCKS
from tests.engines.tiny import FAMILIES, QLORA, decoded, make_job, plain_loss, plain_training

_, pytestmark = peer("axolotl")
TWO = Machine(device="cpu", name="Test CPU", count=2, memory_gib=8)


@pytest.mark.parametrize(("layout", "distributed"), [("padded", "ddp"), ("packed", "ddp")])
def test_two_ranks_train_on_the_mean_of_their_means(tmp_path: Path, layout: str, distributed: str) -> None:
    """Every sample once, on either rank; the loss is what 0.20 makes of it, which is not the mean over all tokens."""
    job = make_job(tmp_path, samples_per_step=4)
    record = run(job, tmp_path / "runs", layout=layout, distributed=distributed)
    assert (record.status, record.reason, record.loss_norm) == ("ok", None, "rank_token_mean")
    assert record.measurement is not None
    steps, expected = record.measurement.steps, [StepTokens.expected(job.tokens.step(job.workload.train, index)) for index in range(4)]
    assert steps.stream_sha256 == tuple(one.sha256 for one in expected)
    assert steps.tokens_loss == tuple(one.loss for one in expected)
    told = list(plain_training(job, mean_of_rank_means))
    assert steps.losses == pytest.approx([loss for loss, _, _ in told], rel=2e-5)
    assert steps.grad_norms == pytest.approx([norm for _, norm, _ in told], rel=1e-4)
    assert steps.losses != pytest.approx([loss for loss, _, _ in plain_training(job)], rel=1e-3)
    sha = record.measurement.artifacts.adapter_sha256
    assert sha is not None
    saved = load_file(adapter_folder(tmp_path / "runs", sha) / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): value.detach() for name, value in told[-1][2].named_parameters() if value.requires_grad}
    assert set(saved) == set(trained)
    assert all(torch.allclose(saved[name], value, rtol=1e-4, atol=1e-5) for name, value in trained.items())


def test_two_ranks_train_qlora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed base whole on either."""
    monkeypatch.setitem(FAMILIES, "whole_blocks", WHOLE_BLOCKS)
    job = make_job(tmp_path, "whole_blocks", QLORA, samples_per_step=4)
    record = run(job, tmp_path / "runs", distributed="ddp")
    assert (record.status, record.reason) == ("ok", None)
    assert record.measurement is not None
    told = list(plain_training(decoded(job), mean_of_rank_means))
    assert record.measurement.steps.losses == pytest.approx([loss for loss, _, _ in told], rel=2e-5)
    assert record.measurement.steps.grad_norms == pytest.approx([norm for _, norm, _ in told], rel=1e-4)


def test_more_processes_need_a_way_to_share_the_work(tmp_path: Path) -> None:
    record = run(make_job(tmp_path, samples_per_step=4), tmp_path / "runs", distributed="none")
    assert record.status == "unsupported"
    assert record.reason is not None
    assert "distributed=none with 2 processes" in record.reason


def mean_of_rank_means(model: Any, samples: tuple[Sample, ...]) -> torch.Tensor:
    """Micro-batches of one sample go to the ranks in turn."""
    return (plain_loss(model, samples[0::2]) + plain_loss(model, samples[1::2])) / 2


def run(job: Job, root: Path, **changed: str) -> Record:
    """The record of ``job`` on two ranks."""
    option = plain(compose_one(["engine=axolotl", "machine=cpu"]))["engine"]
    engine = EngineSpec(
        name="axolotl",
        module=option["module"],
        processes=2,
        environment=option["environment"],
        knobs={**option["knobs"], "micro_batch": 1, **changed},
    )
    request = Request(
        cell=Cell(workload=job.workload, engine=engine, repeat=0),
        sources=Sources(),
        machine=MachineConfig(device="cpu", compute_dtype="float32", operations="reference", replay=False, memory_cap_gib=None),
        limits=Limits(wall_seconds=550.0, no_progress_seconds=550.0),
        python=located(option["python"]),
        packages=("axolotl",),
    )
    (tokens,) = (job.out.parent / "tokens").glob("*.safetensors")
    made = Prepared(
        tokens=str(tokens), base=str(job.base), adapter_init=str(job.adapter_init), base_sha256="b" * 64, adapter_init_sha256="a" * 64
    )
    return run_cell(request, TWO, made, root, lambda event: None)
