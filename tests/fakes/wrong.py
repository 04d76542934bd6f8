"""An engine that trains for real and makes one known mistake, or none: what parity must catch, and what it must let pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.nn import functional
from transformers import AutoModelForCausalLM

from harness.data.tokens import IGNORE, Batch, Sample, StepTokens, chunks, pack, pad
from harness.engine import Job, Machine, Probe
from harness.spec import Positive, Spec, Train, Workload

Fault = Literal[
    "none",
    "truncate",
    "shuffle",
    "micro_mean",
    "no_schedule",
    "rate_1_percent",
    "no_scale",
    "leak",
    "skip_micro_batch",
    "train_nothing",
    "no_mask",
    "zero_loss",
]

SHORT = 50  # what ``truncate`` leaves of a row


class Knobs(Spec):
    """``sums``: the dtype in which gradients are accumulated."""

    fault: Fault = "none"
    micro_batch: Positive = 2
    attention: Literal["sdpa", "eager"] = "sdpa"
    sums: Literal["float32", "float64"] = "float32"
    compute_dtype: Literal["float32"] = "float32"


def unsupported(workload: Workload, knobs: Knobs, machine: Machine) -> str | None:
    return None


def train(job: Job, knobs: Knobs, probe: Probe) -> None:
    schedule, fault = job.workload.train, knobs.fault
    base = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32, attn_implementation=knobs.attention)
    model: Any = PeftModel.from_pretrained(base, str(job.adapter_init), is_trainable=True)
    if fault == "no_scale":
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scaling = dict.fromkeys(module.scaling, 1.0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = (schedule.beta1, schedule.beta2)
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=betas, eps=schedule.epsilon, weight_decay=schedule.weight_decay)
    probe.ready()
    for index in range(schedule.num_steps):
        batches = _batches(job, index, knobs)
        loss = _accumulate(model, parameters, batches, knobs)
        norm = torch.nn.utils.clip_grad_norm_(parameters, schedule.max_grad_norm or math.inf)
        optimizer.param_groups[0]["lr"] = _rate(schedule, index, fault)
        if fault != "train_nothing":
            optimizer.step()
        probe.step(loss=0.0 if fault == "zero_loss" else loss, grad_norm=norm, tokens=StepTokens.of(batches))
    model.save_pretrained(str(job.out), save_embedding_layers=False)


def _rate(schedule: Train, index: int, fault: Fault) -> float:
    if fault == "no_schedule":
        return schedule.learning_rate
    return schedule.learning_rate_at(index) * (1.01 if fault == "rate_1_percent" else 1.0)


def _batches(job: Job, index: int, knobs: Knobs) -> list[Batch]:
    schedule, fault = job.workload.train, knobs.fault
    if fault == "shuffle":
        schedule = schedule.model_copy(update={"seed": schedule.seed + 1})
    samples = list(job.tokens.step(schedule, index))
    if fault == "truncate":
        samples = [Sample(one.input_ids[:SHORT], one.labels[:SHORT]) for one in samples]
    if fault == "no_mask":
        samples = [Sample(one.input_ids, one.input_ids) for one in samples]
    groups = list(chunks(samples, knobs.micro_batch))
    if fault == "skip_micro_batch":
        groups = groups[:-1]
    return [(pack if fault == "leak" else pad)(group) for group in groups]


def _accumulate(model: Any, parameters: Sequence[torch.nn.Parameter], batches: Sequence[Batch], knobs: Knobs) -> float:
    """Gradients of the mean over the step's labels (``micro_mean``: of the mean of the batches' means); returns that mean."""
    counts = [int((batch.labels[:, 1:] != IGNORE).sum()) if knobs.fault != "leak" else _labels(batch) for batch in batches]
    sums = [torch.zeros_like(parameter, dtype=getattr(torch, knobs.sums)) for parameter in parameters]
    total = 0.0
    for batch, count in zip(batches, counts, strict=True):
        share = 1 / (max(count, 1) * len(batches)) if knobs.fault == "micro_mean" else 1 / sum(counts)
        loss = _loss_sum(model, batch) * share
        for gradient, held in zip(torch.autograd.grad(loss, parameters), sums, strict=True):
            held += gradient
        total += float(loss.detach())
    for parameter, held in zip(parameters, sums, strict=True):
        parameter.grad = held.to(parameter.dtype)
    return total


def _loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels).clone()
    for row, lengths in enumerate(batch.lengths):  # the first label of a document is none of its neighbour's business
        for start in [sum(lengths[:place]) for place in range(len(lengths))]:
            labels[row, start] = IGNORE
    hidden = model.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    logits = model.base_model.model.lm_head(hidden[wanted != IGNORE])
    return functional.cross_entropy(logits, wanted[wanted != IGNORE], reduction="sum")


def _labels(batch: Batch) -> int:
    return sum(int((labels[1:] != IGNORE).sum()) for _, labels in batch.documents())
