"""Unsloth, the installed package in its own environment, driven through its own API in a plain training loop."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from engines.native.fp8_reasons import not_taught
from engines.native.hf_nf4 import decoder_reasons
from engines.native.lora_variants import variant_reasons
from harness.data.tokens import Batch, Sample, StepTokens, chunks, pack, pad
from harness.engine import Job, Machine, Probe
from harness.errors import UnsupportedError
from harness.spec import Lora, Positive, Spec, Workload

if TYPE_CHECKING:
    from torch import Tensor


loss_norm = "token_global"
requires = ("unsloth", "unsloth_zoo", "bitsandbytes")  # without the last, Unsloth does not load 16-bit weights either
TRIED = ("llama", "mistral", "qwen2", "qwen3")  # each compared with a plain loop in tests/engines/test_unsloth.py


class Knobs(Spec):
    """What an Unsloth user turns; conf/engine/unsloth.yaml says what each knob means and holds the values."""

    micro_batch: Positive
    recompute: Literal["unsloth", "full", "none"]
    checkpoint_skip_layers: Positive | Literal["auto"] | None
    layout: Literal["packed", "padded"]
    order: Literal["given", "by_length"]
    pad_to_multiple_of: Positive | None
    block_compile: Literal["auto", "off", "forced"]
    cuda_graphs: bool
    compute_dtype: Literal["float32", "bfloat16"]


def variant(knobs: Knobs) -> str:
    """Named by what differs from what Unsloth's own trainer does by default on a GPU that it has not measured: offloaded
    checkpoints, batches without padding. ``nockpt+graphs`` is on padded batches: Unsloth compiles no others.
    """
    names = [{"unsloth": "default", "full": "ckpt", "none": "nockpt"}[knobs.recompute]]
    if knobs.checkpoint_skip_layers is not None:
        names.append(f"skip-{knobs.checkpoint_skip_layers}")
    if knobs.cuda_graphs:
        names.append("graphs")
    elif knobs.layout == "padded":
        names.append("padded")
    if knobs.order == "by_length":
        names.append("grouped")
    if knobs.pad_to_multiple_of is not None:
        names.append(f"to-{knobs.pad_to_multiple_of}")
    if knobs.block_compile != "auto":
        names.append({"off": "eager", "forced": "legacy"}[knobs.block_compile])
    return "+".join(names)


def unsupported(workload: Workload, knobs: Knobs, machine: Machine) -> str | None:
    """Every reason why this cannot run here, or None."""
    config = workload.model.config
    reasons = [*_knob_reasons(workload, knobs, machine), *(_model_reasons(config, workload) if config else [])]
    reasons += decoder_reasons(workload, knobs.compute_dtype, config or {}, machine.device)
    reasons += not_taught(workload, "Unsloth as it is driven here")
    reasons += variant_reasons(workload, rank_stabilised=False, ratio=False)
    return "; ".join([*reasons, *_dtype_reasons(workload, knobs)]) or None


def recomputed_fraction(workload: Workload, knobs: Knobs) -> float | None:
    """Of the layers' forward pass, what the backward pass does again; how many layers ``auto`` keeps shows only when it runs."""
    if knobs.recompute == "none":
        return 0.0
    if knobs.checkpoint_skip_layers is None:
        return 1.0
    layers = (workload.model.config or {}).get("num_hidden_layers")
    if not isinstance(layers, int) or not isinstance(knobs.checkpoint_skip_layers, int):
        return None
    return max(0.0, 1.0 - knobs.checkpoint_skip_layers / layers)


def train(job: Job, knobs: Knobs, probe: Probe) -> None:
    """Train with AdamW on every trained tensor, and save into ``job.out``. Unsloth patches this process for good."""
    if job.processes != 1:
        raise UnsupportedError(f"engine.processes is {job.processes}; unsloth trains in one process here, use engine.processes=1")
    _check_open_base(job, knobs)
    from engines.unsloth.model import load, save, switches

    schedule = job.workload.train
    os.environ.update(switches(job, knobs))  # Unsloth reads them when it is imported
    model = load(job, knobs)
    from engines.native import plain_loop

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = plain_loop.adamw(parameters, schedule, job.device)
    probe.ready()
    for index in range(schedule.num_steps):
        batches = _batches(job.tokens.step(schedule, index), knobs)
        tokens = StepTokens.of(batches)
        loss = _accumulate(model, batches, tokens.loss, knobs, job.device)
        grad_norm = plain_loop.update(optimizer, parameters, schedule, index)
        probe.step(loss=loss, grad_norm=grad_norm, tokens=tokens)
    save(model, job)


def _knob_reasons(workload: Workload, knobs: Knobs, machine: Machine) -> list[str]:
    reasons = []
    compiles = knobs.cuda_graphs or knobs.block_compile != "auto"
    if compiles and machine.device == "cpu":
        reasons.append("Unsloth compiles blocks on a GPU only; use cuda_graphs=false and block_compile=auto")
    elif compiles and knobs.layout == "packed":
        reasons.append("Unsloth compiles no packed batches; use layout=padded, or cuda_graphs=false and block_compile=auto")
    if knobs.cuda_graphs and knobs.block_compile == "off":
        reasons.append("cuda_graphs=true captures compiled blocks; use block_compile=auto")
    if knobs.pad_to_multiple_of is not None and knobs.layout == "packed":
        reasons.append("pad_to_multiple_of is of layout=padded; with layout=packed use null")
    if knobs.checkpoint_skip_layers is not None and knobs.recompute == "none":
        reasons.append("checkpoint_skip_layers says which layers recompute=unsloth|full leaves out; with recompute=none use null")
    if knobs.checkpoint_skip_layers is not None and machine.device == "cpu":
        reasons.append("checkpoint_skip_layers is for a GPU; use null")
    if knobs.layout == "packed" and not isinstance(workload.method, Lora):
        reasons.append(
            "method=full runs transformers' layers, whose documents Unsloth keeps apart in its own trainer only; use layout=padded"
        )
    return reasons


def _dtype_reasons(workload: Workload, knobs: Knobs) -> list[str]:
    method = workload.method
    if method.dtype == "float32":
        return []
    if isinstance(method, Lora):
        return [f"Unsloth keeps adapters in float32, method.dtype is {method.dtype}; use method.dtype=float32"]
    if method.dtype == knobs.compute_dtype:
        return []
    types = f"method.dtype={method.dtype}, compute_dtype={knobs.compute_dtype}"
    return [f"Unsloth trains all weights in float32 or in the type that it computes in: {types}; use method.dtype=float32"]


def _model_reasons(config: dict[str, Any], workload: Workload) -> list[str]:
    """A workload has no dropout and the rotary embedding of its config: Unsloth stretches it for longer samples than that allows."""
    names = [name for name, value in config.items() if name.endswith(("dropout", "pdrop")) and value]
    reasons = [f"the model's {name} is {config[name]}, training here has no dropout; set it to 0" for name in names]
    kind = config.get("model_type")
    if kind not in TRIED:
        reasons.append(f"model_type={kind} is not one that this adapter has been compared with hf on ({', '.join(TRIED)}); use engine=hf")
    length, most = workload.data.sequence_length, config.get("max_position_embeddings")
    if isinstance(most, int) and length > most:
        reasons.append(
            f"samples of {length} tokens make Unsloth rescale the positions of a model made for {most}; shorten data.sequence_length"
        )
    return reasons


def _check_open_base(job: Job, knobs: Knobs) -> None:
    """What only the open weights reveal."""
    config: dict[str, Any] = json.loads((job.base / "config.json").read_text(encoding="utf-8"))
    reasons = _model_reasons(config, job.workload) + decoder_reasons(job.workload, knobs.compute_dtype, config, job.device)
    if reasons:
        raise UnsupportedError("; ".join(reasons))


def _batches(samples: Sequence[Sample], knobs: Knobs) -> list[Batch]:
    """The micro-batches of a step."""
    groups = chunks(sorted(samples, key=len) if knobs.order == "by_length" else samples, knobs.micro_batch)
    if knobs.layout == "packed":
        return [pack(group) for group in groups]
    return [pad(group, multiple_of=knobs.pad_to_multiple_of or 1) for group in groups]


def _accumulate(model: Any, batches: Sequence[Batch], num_labels: int, knobs: Knobs, device: str) -> Tensor:
    """Add the step's gradients, micro-batch by micro-batch; returns the loss, a mean over the step's supervised tokens.

    Padded batches have no mask: Unsloth itself drops it in training, padding stands on the right.
    """
    import torch

    from engines.native.plain_loop import to_device

    total = torch.zeros((), device=device)
    for batch in batches:
        documents = _documents(batch, device) if knobs.layout == "packed" else {}
        with torch.autocast(device, dtype=torch.bfloat16, enabled=knobs.compute_dtype == "bfloat16"):
            output = model(
                input_ids=to_device(batch.input_ids, device),
                labels=to_device(batch.labels, device),
                num_items_in_batch=num_labels,
                use_cache=False,
                **documents,
            )
        output.loss.backward()
        total += output.loss.detach()
    return total


def _documents(batch: Batch, device: str) -> dict[str, Tensor]:
    """Where the documents of a packed row begin and end. The lengths stay on the host: from there Unsloth needs no synchronisation."""
    import torch

    from engines.native.plain_loop import to_device

    lengths = [length for row in batch.lengths for length in row]
    return {"position_ids": to_device(batch.position_ids, device), "packed_seq_lengths": torch.tensor(lengths, dtype=torch.int32)}
