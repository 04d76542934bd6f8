"""rsLoRA and LoRA+ in every engine that trains them, against a plain loop; what no engine trains is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import engines.axolotl
import engines.deepspeed
import engines.fsdp
import engines.fused
import engines.hf
import engines.unsloth
from engines.native.kernels.adamw import FlatAdamW
from engines.native.lora import read_adapter
from engines.native.optimizer import AdamW, step_scalars
from engines.native.weights import Arena, Weight
from harness.compose import compose_all, plain
from harness.engine import Job
from harness.spec import parse
from harness.weights.adapter import _write_config
from tests.engines.oracle import DEVICE, INTERPRETED, random
from tests.engines.test_fused import KNOBS as FUSED
from tests.engines.test_hf import KNOBS as HF
from tests.engines.tiny import CPU, GPU, LLAMA, LORA, RecordingProbe, make_job, make_workload, plain_loss, plain_model

ENGINES: list[tuple[ModuleType, dict[str, Any]]] = [(engines.hf, HF), (engines.fused, FUSED)]
STABILISED = {**LORA, "rank_stabilised": True}
PLUS = {**LORA, "b_learning_rate_ratio": 8.0}


def reference(job: Job, ratio: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A plain loop with two groups, and what it leaves."""
    model, train = plain_model(job), job.workload.train
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [{"params": [parameter for name, parameter in named if ("lora_B" in name) is of_b]} for of_b in (False, True)]
    optimizer = torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.epsilon, weight_decay=train.weight_decay)
    losses = []
    for index in range(train.steps):
        loss = plain_loss(model, job.tokens.step(train, index))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in named], train.max_grad_norm or 1.0)
        for group, times in zip(optimizer.param_groups, (1.0, ratio), strict=True):
            group["lr"] = train.learning_rate_at(index) * times
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {name.replace(".default", ""): parameter.detach() for name, parameter in named}


def stabilised(job: Job) -> None:
    assert job.adapter_init is not None
    path = job.adapter_init / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": True}))


@pytest.mark.parametrize(("engine", "knobs"), ENGINES, ids=["hf", "fused"])
@pytest.mark.parametrize("method", [STABILISED, PLUS], ids=["stabilised", "plus"])
def test_it_trains_what_a_plain_loop_does(tmp_path: Path, engine: ModuleType, knobs: dict[str, Any], method: dict[str, Any]) -> None:
    job, probe = make_job(tmp_path, method=method), RecordingProbe()
    if method is STABILISED:
        stabilised(job)
    usual, _ = reference(make_job_like(job, tmp_path), 1.0)
    losses, weights = reference(job, 8.0 if method is PLUS else 1.0)
    assert losses != pytest.approx(usual, rel=1e-4), "the variant changes nothing to speak of"
    engine.train(job, parse(engine.Knobs, knobs), probe)
    assert probe.losses == pytest.approx(losses, rel=1e-5)
    left = load_file(job.out / "adapter_model.safetensors")
    assert set(left) == set(weights)
    for name, right in weights.items():
        torch.testing.assert_close(left[name], right, rtol=1e-3, atol=2e-5)
    assert json.loads((job.out / "adapter_config.json").read_text())["use_rslora"] is (method is STABILISED)


def make_job_like(job: Job, folder: Path) -> Job:
    """The same without the variant."""
    (folder / "usual").mkdir()
    return make_job(folder / "usual", method=LORA)


def test_the_initial_adapter_says_how_it_is_scaled(tmp_path: Path) -> None:
    for method, scale in ((LORA, 10 / 4), (STABILISED, 10 / 2)):
        parsed: Any = make_workload(LLAMA, method).method
        assert parsed.scale == scale
        model: Any = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in LORA["targets"]})  # type: ignore[union-attr]
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
        _write_config(tmp_path, parsed, "tiny")
        assert read_adapter(tmp_path).scale == scale


@INTERPRETED
def test_the_kernel_gives_b_a_learning_rate_of_its_own() -> None:
    schedule = make_workload(LLAMA, LORA).train
    sizes, made = [(4, 40), (24, 4), (3, 700)], []
    for _ in range(2):
        arena = Arena(sum(rows * columns for rows, columns in sizes), torch.float32, DEVICE)
        made.append((arena, [Weight(random(*size, room=8), arena.take(*size)) for size in sizes]))
    (plain_arena, plain_weights), (arena, weights) = made
    arena.masters.normal_()
    plain_arena.masters.copy_(arena.masters)
    rates = torch.cat([torch.full((rows * columns,), rate) for (rows, columns), rate in zip(sizes, (1.0, 5.0, 1.0), strict=True)]).to(
        DEVICE
    )
    betas = schedule.beta1, schedule.beta2
    values = [weight.value for weight in weights]
    both = (
        AdamW(plain_arena, plain_weights, schedule, rates),
        FlatAdamW(arena.masters, values, betas, schedule.epsilon, schedule.weight_decay, 5.0, [False, True, False]),
    )
    for index in range(3):
        gradient = torch.randn_like(arena.masters)
        for each, optimizer in zip((plain_arena, arena), both, strict=True):
            each.gradients.copy_(gradient)
            optimizer.step(torch.tensor(step_scalars(schedule, index, 1), device=DEVICE))
        torch.testing.assert_close(arena.masters, plain_arena.masters, rtol=1e-5, atol=1e-6)


def said(engine: ModuleType, name: str, method: dict[str, Any]) -> str:
    knobs = plain(compose_all([f"engine={name}", "machine=cpu"], multirun=False)[0][1])["engine"]["knobs"]
    machine = GPU if name == "unsloth" else CPU
    return engine.unsupported(make_workload(LLAMA, method), parse(engine.Knobs, knobs), machine) or ""


ALL = {
    "hf": engines.hf,
    "fused": engines.fused,
    "fsdp": engines.fsdp,
    "deepspeed": engines.deepspeed,
    "unsloth": engines.unsloth,
    "axolotl": engines.axolotl,
}


@pytest.mark.parametrize("name", ALL)
def test_what_an_engine_does_not_train_it_says(name: str) -> None:
    for key, value in (("dropout", 0.1), ("dora", True)):
        assert f"method.{key}" in said(ALL[name], name, {**LORA, key: value})
    does = name not in ("unsloth", "axolotl")
    for key, method in (("rank_stabilised", STABILISED), ("b_learning_rate_ratio", PLUS)):
        assert (f"method.{key}" not in said(ALL[name], name, method)) is does
