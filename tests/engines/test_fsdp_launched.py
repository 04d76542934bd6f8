"""fsdp on two ranks of a CPU as the harness launches it: one record, and a rank that dies ends the cell with its number and how it died."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import engines.fsdp
from harness.compose import compose_one, plain
from harness.config import Limits, MachineConfig, Request
from harness.data.tokens import StepTokens
from harness.engine import Job, Machine
from harness.events import Event
from harness.interpreter import lack
from harness.launch import run_cell
from harness.places import Prepared, Sources
from harness.record import Record
from harness.spec import Cell, EngineSpec, parse
from harness.watch import OnEvent
from tests.engines.test_fsdp import KNOBS
from tests.engines.tiny import FULL, LORA, RecordingProbe, make_job, plain_training, with_train

TWO = Machine(device="cpu", name="Test CPU", count=2, memory_gib=8)
LONG = 20_000  # steps that nobody waits for


def test_two_ranks_leave_one_record_of_the_plain_loop(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    record = run(job, tmp_path / "runs", strategy="full_shard")
    assert (record.status, record.reason, record.loss_norm) == ("ok", None, "token_global")
    assert record.measurement is not None
    steps = record.measurement.steps
    assert steps.losses == pytest.approx([loss for loss, _, _ in plain_training(job)], rel=2e-5)
    assert steps.stream_sha256 == tuple(StepTokens.expected(job.tokens.step(job.workload.train, index)).sha256 for index in range(4))


def test_a_rank_that_is_killed_ends_the_cell_at_once_and_is_named(tmp_path: Path) -> None:
    killed: list[float] = []

    def kill_rank_1(event: Event) -> None:
        if event["event"] == "step" and not killed:
            (worker,) = [process for process in workers(tmp_path) if process.environ().get("RANK") == "1"]
            worker.send_signal(signal.SIGKILL)
            killed.append(time.monotonic())

    record = run(make_job(tmp_path, steps=LONG), tmp_path / "runs", on_event=kill_rank_1, strategy="full_shard")
    assert time.monotonic() - killed[0] < 20
    assert record.status == "crash"
    assert record.reason is not None
    assert record.reason.startswith("rank 1 ended with SIGKILL and without a word")
    assert workers(tmp_path) == []


@pytest.mark.parametrize(
    ("engine", "method", "knobs"),
    [
        ("fsdp", LORA, {"strategy": "full_shard"}),
        ("deepspeed", LORA, {"stage": 2}),
        ("fused", LORA, {"base": "sharded"}),
        ("fused", FULL, {}),
    ],
    ids=["fsdp", "deepspeed", "fused-sharded", "fused-full"],
)
def test_a_killed_run_goes_on_from_its_last_checkpoint_with_the_same_losses(
    tmp_path: Path, engine: str, method: dict[str, Any], knobs: dict[str, Any]
) -> None:
    """The record has the steps of both processes, says where the second began, and has no rate."""
    if engine == "deepspeed" and lack(None, ["deepspeed"]):
        pytest.skip("deepspeed is not installed: pip install deepspeed")
    job = make_job(tmp_path, method=method, steps=100)
    seen: list[bool] = []

    def kill_rank_1(event: Event) -> None:
        seen.append(event["event"] == "step")
        if seen[-1] and sum(seen) == 25:
            (worker,) = [process for process in workers(tmp_path) if process.environ().get("RANK") == "1"]
            worker.send_signal(signal.SIGKILL)

    cut = run(job, tmp_path / "runs", on_event=kill_rank_1, save_every=10, engine=engine, **knobs)
    rest = run(job, tmp_path / "runs", save_every=10, engine=engine, **knobs)
    assert (cut.status, rest.status, rest.reason) == ("crash", "ok", None)
    assert cut.measurement is not None
    assert rest.measurement is not None
    for one in cut.measurement.ranks if engine == "fused" else ():
        assert one.exchanging_seconds is not None
        assert all(0 < spent < seconds for spent, seconds in zip(one.exchanging_seconds, one.seconds, strict=True))
    before, after = cut.measurement.steps, rest.measurement.steps
    (began,) = rest.measurement.resumed_at
    assert 20 <= began <= len(before.losses) < 100
    assert began % 10 == 0
    assert (after.losses[:began], after.seconds[:began]) == (before.losses[:began], before.seconds[:began])
    whole = RecordingProbe()
    engines.fsdp.train(with_train(job, "whole"), parse(engines.fsdp.Knobs, KNOBS), whole)
    assert after.losses == pytest.approx(whole.losses, rel=2e-5)
    assert after.losses[began:] != pytest.approx(whole.losses[: 100 - began], rel=2e-5), "steps could be told apart"
    assert after.stream_sha256 == tuple(one.sha256 for one in whole.tokens)
    assert not list((tmp_path / "runs" / "checkpoints").iterdir()), "what is finished needs no checkpoint"


def workers(folder: Path) -> list[psutil.Process]:
    """The workers of a cell below ``folder``, without what launches them."""
    every = [(process, " ".join(process.info["cmdline"] or [])) for process in psutil.process_iter(["cmdline"])]
    return [process for process, said in every if "harness.worker" in said and "torch.distributed.run" not in said and str(folder) in said]


def run(
    job: Job,
    root: Path,
    *,
    on_event: OnEvent = lambda event: None,
    save_every: int | None = None,
    engine: str = "fsdp",
    **changed: str | int,
) -> Record:
    """The record of ``job`` on two ranks."""
    option = plain(compose_one([f"engine={engine}", "machine=cpu"]))["engine"]
    knobs = {**option["knobs"], "micro_batch": 1, **changed}
    spec = EngineSpec(name=engine, module=option["module"], processes=2, environment={}, knobs=knobs)
    request = Request(
        cell=Cell(workload=job.workload, engine=spec, repeat=0),
        sources=Sources(),
        machine=MachineConfig(device="cpu", compute_dtype="float32", operations="reference", replay=False, memory_cap_gib=None),
        limits=Limits(wall_seconds=300.0, no_progress_seconds=120.0),
        python=None,
        packages=("torch",),
        save_every=save_every,
    )
    (tokens,) = (job.out.parent / "tokens").glob("*.safetensors")
    made = Prepared(
        tokens=str(tokens),
        base=str(job.base),
        adapter_init=str(job.adapter_init) if job.adapter_init else None,
        base_sha256="b" * 64,
        adapter_init_sha256="a" * 64 if job.adapter_init else None,
    )
    return run_cell(request, TWO, made, root, on_event)
