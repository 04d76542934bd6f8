"""What engines over several ranks do alike: load the model, train a rank's share of each step, report whole steps, save."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, distributed

from engines.native import states
from engines.native.hf_attention import VARLEN, register
from engines.native.hf_batches import inputs, leak, make_batch
from engines.native.hf_model import with_adapter
from engines.native.hf_reasons import class_reasons, dropout_reasons
from engines.native.nf4_linear import Packed, load_packed, pack_linears
from engines.native.plain_loop import to_device
from engines.native.ranks import expect_agreement
from engines.native.recompute import Recompute, checkpoint_layers
from engines.native.shares import Cost, cost_of, fingerprint, split
from harness.data.tokens import Batch
from harness.engine import Job, Probe
from harness.errors import UnsupportedError
from harness.nf4 import is_nf4
from harness.spec import Lora


class Shared(Protocol):
    """The knobs that engines over several ranks have in common."""

    @property
    def micro_batch(self) -> int:
        """Samples per forward pass, at most."""

    @property
    def layout(self) -> str:
        """``padded`` or ``packed``."""

    @property
    def attention(self) -> str:
        """As transformers or ``hf_attention`` call it."""

    @property
    def compute_dtype(self) -> str:
        """The type of products."""

    @property
    def adapter_compute(self) -> str:
        """Whether PEFT casts the inputs of adapters up."""

    @property
    def recompute(self) -> Recompute:
        """What of the layers is computed again for backward."""


class Trained(states.State, Protocol):
    """A model spread over all ranks, with its optimizer. All ranks call the same methods in the same order."""

    def accumulate(self, given: dict[str, Any], *, last: bool) -> Tensor:
        """Add the gradients of a micro-batch to the step's; returns its loss. ``last``: of this rank and step."""

    def update(self, index: int) -> Tensor | float:
        """Exchange what is left to exchange, clip, make optimizer step ``index`` (0-based); returns the global norm before clipping."""


def loaded(job: Job, knobs: Shared) -> tuple[Any, Cost]:
    """The whole model on the host, its adapter beside it, ready to be spread; and what samples of it cost.

    Raises UnsupportedError for what only the model's own configuration and class reveal.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    method = job.workload.method
    register()
    config = AutoConfig.from_pretrained(job.base, local_files_only=True, trust_remote_code=False)
    reasons = dropout_reasons(config.to_dict()) + class_reasons(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], knobs.attention, (VARLEN,))
    if reasons:
        raise UnsupportedError("; ".join(reasons))
    dtype = getattr(torch, knobs.compute_dtype if isinstance(method, Lora) else method.dtype)
    attention = knobs.attention if hasattr(config, "num_attention_heads") else None
    model, packed = _base(job, config, dtype, attention)
    model.name_or_path = model.config.name_or_path = job.workload.model.name  # what model cards are made of: no path of this machine
    if isinstance(method, Lora):
        assert job.adapter_init is not None
        model = with_adapter(model, job.adapter_init, getattr(torch, method.dtype), cast_inputs=knobs.adapter_compute != "direct")
    cost = cost_of(model.config.to_dict(), sum(parameter.numel() for parameter in model.parameters()))  # not of packed bytes
    pack_linears(model, packed, dtype)
    checkpoint_layers(model, knobs.recompute)
    model.config.use_cache = False
    model.train()
    return model, cost


def _base(job: Job, config: Any, dtype: torch.dtype, attention: str | None) -> tuple[Any, dict[Any, Packed]]:
    """The model without adapters, and what of it is to be packed."""
    from transformers import AutoModelForCausalLM

    if not is_nf4(job.base):
        options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
        return AutoModelForCausalLM.from_pretrained(job.base, dtype=dtype, attn_implementation=attention, **options), {}
    if not isinstance(job.workload.method, Lora):
        raise UnsupportedError("the base is stored in NF4, whose weights cannot be trained; use a method with adapters")
    return load_packed(job.base, config, dtype, attn_implementation=attention)


def autocast(knobs: Shared, device: str) -> AbstractContextManager[Any]:
    """bf16 products whatever the stored types, where the knobs say so."""
    return torch.autocast(device, dtype=torch.bfloat16) if knobs.compute_dtype == "bfloat16" else nullcontext()


def expect_documents_apart(model: Any, knobs: Shared, device: str) -> None:
    """Refuse a model that lets packed documents see each other. All ranks look at once, with no code compiled for what is called once."""
    with autocast(knobs, device), torch.compiler.set_stance("force_eager"):
        off = leak(model, device, bounds=knobs.attention == "varlen")
    if off != 0:  # nan too
        said = f"in {model.config.model_type} with attention={knobs.attention} documents see each other (logits {off:.3g} off)"
        raise UnsupportedError(f"layout=packed: {said}; use padded")


def train_steps(trained: Trained, cost: Cost, job: Job, knobs: Shared, probe: Probe, *, multiple_of: int = 1) -> None:
    """Train on this rank's share of every step, and report the whole step; go on from a checkpoint, and save more, where the job says so.
    Rows have a ``multiple_of`` positions. Raises RuntimeError when ranks trained on other samples than the others thought.
    """
    schedule, rank = job.workload.train, distributed.get_rank()
    made = partial(make_batch, packed=knobs.layout == "packed", multiple_of=multiple_of)
    seen = hashlib.sha256()
    probe.ready()
    for index in range(states.restored(trained, job.checkpoints), schedule.num_steps):
        step = split(job.tokens.step(schedule, index), job.processes, cost, micro_batch=knobs.micro_batch, make_batch=made)
        seen.update(fingerprint(step))
        loss = torch.zeros((), device=job.device)
        divisor = to_device(np.array(step.tokens.loss), job.device)  # the labels of all ranks: their losses and gradients are summed
        for number, batch in enumerate(step.batches[rank], start=1):
            given = _given(batch, divisor, knobs, job.device)
            loss += trained.accumulate(given, last=number == len(step.batches[rank]))
        with probe.waits():
            distributed.all_reduce(loss)
        probe.step(loss=loss, grad_norm=trained.update(index), tokens=step.tokens)
        states.step_made(trained, job.checkpoints, index + 1, schedule.num_steps)
    expect_agreement(seen.digest(), "the samples of every step and who trains on them")


def _given(batch: Batch, divisor: Tensor, knobs: Shared, device: str) -> dict[str, Any]:
    given = inputs(batch, device, packed=knobs.layout == "packed", bounds=knobs.attention == "varlen")
    return given | {"labels": to_device(batch.labels, device), "num_items_in_batch": divisor, "use_cache": False}


def save(model: Any, job: Job, gathered: Callable[[], dict[str, Tensor]]) -> None:
    """Leave what was trained in ``job.out``, from the whole weights that ``gathered`` returns on rank 0: a PEFT adapter, or a checkpoint in
    the stored type of the base. All ranks must call this.
    """
    adapted, stored = isinstance(job.workload.method, Lora), getattr(torch, job.workload.model.dtype)
    if not adapted:
        model.to(stored)
    weights = gathered()
    if distributed.get_rank() != 0:
        return
    if not adapted:
        model.save_pretrained(job.out, state_dict={name: value.to(stored) for name, value in weights.items()})
        return
    for config in model.peft_config.values():
        config.base_model_name_or_path = job.workload.model.name
    model.save_pretrained(str(job.out), state_dict=weights, save_embedding_layers=False)
