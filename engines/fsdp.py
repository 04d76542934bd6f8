"""Several processes: models of transformers and PEFT, whole on every rank or sharded by FSDP2; any architecture made of equal layers."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engines.native.hf_reasons import class_reasons, dropout_reasons
from engines.native.lora_variants import variant_reasons
from harness.data.tokens import Batch, pack, pad
from harness.engine import Job, Machine, Probe
from harness.errors import UnsupportedError
from harness.spec import Lora, Positive, QLora, Spec, Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

loss_norm = "token_global"


class Knobs(Spec):
    """How ranks share the work; conf/engine/fsdp.yaml says what each knob means and holds the values."""

    micro_batch: Positive
    layout: Literal["padded", "packed"]
    strategy: Literal["replicate", "shard_grad", "full_shard"]
    offload: Literal["none", "cpu"]
    recompute: Literal["none", "full"]
    attention: Literal["sdpa", "eager", "varlen"]
    compute_dtype: Literal["float32", "bfloat16"]
    adapter_compute: Literal["autocast", "direct"]
    compile: bool


def variant(knobs: Knobs) -> str:
    """The strategy, and what differs from transformers and PEFT as they come: ``replicate``, ``full_shard+offload+ckpt``."""
    names = [
        knobs.strategy,
        "offload" if knobs.offload == "cpu" else "",
        knobs.layout if knobs.layout == "packed" else "",
        knobs.attention if knobs.attention != "sdpa" else "",
        "adapters-direct" if knobs.adapter_compute == "direct" else "",
        "compile" if knobs.compile else "",
        "ckpt" if knobs.recompute == "full" else "",
    ]
    return "+".join(name for name in names if name)


def unsupported(workload: Workload, knobs: Knobs, machine: Machine) -> str | None:
    """Every reason why this cannot run here, or None."""
    config = workload.model.config or {}
    reasons = [*_dtype_reasons(workload, knobs), *dropout_reasons(config), *_attention_reasons(knobs, machine, config)]
    reasons += variant_reasons(workload, rank_stabilised=True, ratio=False)
    if knobs.offload == "cpu" and knobs.strategy == "replicate":
        reasons.append("offload=cpu moves shards, strategy=replicate has none; set strategy=full_shard or offload=none")
    if knobs.compile and knobs.strategy != "replicate":
        reasons.append(
            f"compile=true has not been tried on sharded layers (strategy={knobs.strategy}); set compile=false or strategy=replicate"
        )
    if machine.device == "cuda":
        reasons += _share_reasons(workload, machine.count)
    return "; ".join(reasons) or None


def recomputed_fraction(workload: Workload, knobs: Knobs) -> float:
    """Of the layers' forward pass, what the backward pass does again: gradient checkpointing repeats whole layers."""
    return 1.0 if knobs.recompute == "full" else 0.0


def train(job: Job, knobs: Knobs, probe: Probe) -> None:
    """Train this rank's share of every step with AdamW on every trained tensor, and let rank 0 save into ``job.out``."""
    from engines.native.ranks import process_group

    if reasons := _share_reasons(job.workload, job.processes):
        raise UnsupportedError("; ".join(reasons))
    with process_group(job.device, job.processes) as rank:
        _train(job, knobs, probe, rank)


def _train(job: Job, knobs: Knobs, probe: Probe, rank: int) -> None:
    import torch
    from torch import distributed

    from engines.native.hf_model import exact_float32
    from engines.native.plain_loop import adamw
    from engines.native.ranks import expect_agreement
    from engines.native.sharding import Bucket, update
    from engines.native.shares import cost_of, fingerprint, split

    schedule = job.workload.train
    torch.manual_seed(schedule.seed)
    exact_float32()
    model, cost = _model(job, knobs, cost_of)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = adamw(parameters, schedule, parameters[0].device.type)
    bucket = Bucket(parameters) if knobs.strategy == "replicate" else None
    make_batch = pack if knobs.layout == "packed" else pad
    seen = hashlib.sha256()
    probe.ready()
    for index in range(schedule.num_steps):
        step = split(job.tokens.step(schedule, index), job.processes, cost, micro_batch=knobs.micro_batch, make_batch=make_batch)
        seen.update(fingerprint(step))
        loss = _accumulate(model, step.batches[rank], step.tokens.loss, knobs, job)
        distributed.all_reduce(loss)
        if bucket is not None:
            bucket.reduce()
        grad_norm = update(optimizer, parameters, schedule, index)
        if bucket is not None:
            bucket.empty()
        else:
            optimizer.zero_grad(set_to_none=True)
        probe.step(loss=loss, grad_norm=grad_norm, tokens=step.tokens)
    expect_agreement(seen.digest(), "the samples of every step and who trains on them")
    _save(model, job, rank)


def _share_reasons(workload: Workload, processes: int) -> list[str]:
    samples = workload.train.samples_per_step
    if samples >= processes:
        return []
    return [f"train.samples_per_step={samples} leaves some of {processes} processes without a sample; use at most {samples} of them"]


def _dtype_reasons(workload: Workload, knobs: Knobs) -> list[str]:
    method = workload.method
    if isinstance(method, QLora):
        return ["fsdp shards no NF4 weights yet; use method=lora, or engine=hf"]
    if method.dtype == "float16":
        return ["method.dtype=float16 needs loss scaling, which fsdp does not do; use float32 or bfloat16"]
    if knobs.compute_dtype == "float32" and method.dtype != "float32":
        return [f"compute_dtype=float32 cannot train {method.dtype} weights; set method.dtype=float32 or compute_dtype=bfloat16"]
    if knobs.adapter_compute == "direct" and (method.name != "lora" or knobs.compute_dtype == "float32"):
        return ["adapter_compute=direct is about float32 adapters beside bfloat16 products; set it to autocast"]
    return []


def _attention_reasons(knobs: Knobs, machine: Machine, config: dict[str, Any]) -> list[str]:
    reasons = []
    if knobs.layout == "packed" and config and "num_attention_heads" not in config:
        reasons.append(f"layout=packed: '{config.get('model_type')}' has no attention to keep documents apart; set layout=padded")
    if knobs.attention == "varlen" and machine.device == "cpu":
        reasons.append("attention=varlen needs a GPU; set attention=sdpa")
    if knobs.attention == "varlen" and knobs.compute_dtype == "float32":
        reasons.append("attention=varlen computes in 16 bits only; set compute_dtype=bfloat16 or attention=sdpa")
    return reasons


def _model(job: Job, knobs: Knobs, cost_of: Any) -> tuple[Any, Any]:
    """The model ready to train, and what samples of it cost; made on the host, from where shards or the whole go to the device."""
    from engines.native.hf_model import compile_layers
    from engines.native.sharding import blocks_of, shard

    model = _loaded(job, knobs)
    cost = cost_of(model.config.to_dict(), sum(parameter.numel() for parameter in model.parameters()))
    if knobs.recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    model.train()
    if knobs.strategy == "replicate":
        model.to(job.device)
    else:
        blocks_of(model)  # refused before anything is compiled
    if knobs.compile:
        compile_layers(model, with_loss=True, shapes_vary=len(np.unique(np.diff(job.tokens.train.offsets))) > 1)
    if knobs.strategy != "replicate":
        shard(model, job.device, reshard=knobs.strategy == "full_shard", compute=_gathered_as(job, knobs), offload=knobs.offload == "cpu")
    if knobs.layout == "packed":
        _expect_documents_apart(model, knobs, job.device)
    return model, cost


def _gathered_as(job: Job, knobs: Knobs) -> Any:
    """The type that shards are gathered in: float32 masters of all weights as bfloat16; beside adapters each as stored, for autocast."""
    import torch

    return torch.bfloat16 if knobs.compute_dtype == "bfloat16" and not isinstance(job.workload.method, Lora) else None


def _loaded(job: Job, knobs: Knobs) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from engines.native.hf_attention import VARLEN, register
    from engines.native.hf_model import with_adapter

    method = job.workload.method
    register()
    config = AutoConfig.from_pretrained(job.base, local_files_only=True, trust_remote_code=False)
    reasons = dropout_reasons(config.to_dict()) + class_reasons(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], knobs.attention, (VARLEN,))
    if reasons:
        raise UnsupportedError("; ".join(reasons))
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.base,
        dtype=getattr(torch, knobs.compute_dtype if isinstance(method, Lora) else method.dtype),
        attn_implementation=knobs.attention if hasattr(config, "num_attention_heads") else None,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    model.name_or_path = model.config.name_or_path = job.workload.model.name  # what model cards are made of: no path of this machine
    if isinstance(method, Lora):
        assert job.adapter_init is not None
        model = with_adapter(model, job.adapter_init, getattr(torch, method.dtype), cast_inputs=knobs.adapter_compute != "direct")
    return model


def _expect_documents_apart(model: Any, knobs: Knobs, device: str) -> None:
    """Refuse a model that lets packed documents see each other. All ranks look at once."""
    from engines.native.hf_batches import leak
    from engines.native.sharding import give_back

    with _autocast(knobs, device):
        off = leak(model, device, bounds=knobs.attention == "varlen")
    give_back(model)
    if off != 0:  # nan too
        said = f"in {model.config.model_type} with attention={knobs.attention} documents see each other (logits {off:.3g} off)"
        raise UnsupportedError(f"layout=packed: {said}; use padded")


def _autocast(knobs: Knobs, device: str) -> Any:
    import torch

    return torch.autocast(device, dtype=torch.bfloat16, enabled=knobs.compute_dtype == "bfloat16")


def _accumulate(model: Any, batches: Sequence[Batch], num_labels: int, knobs: Knobs, job: Job) -> Tensor:
    """Add this rank's gradients, micro-batch by micro-batch; returns its part of the loss, whose divisor is the labels of all ranks."""
    import torch

    from engines.native.hf_batches import inputs
    from engines.native.plain_loop import to_device

    total = torch.zeros((), device=job.device)
    divisor = to_device(np.array(num_labels), job.device)
    for number, batch in enumerate(batches, start=1):
        if knobs.strategy != "replicate" and isinstance(job.workload.method, Lora):
            # Adapters are small: reduced once a step. All weights are not: only their shards' gradients are kept.
            model.set_requires_gradient_sync(number == len(batches))
        given = inputs(batch, job.device, packed=knobs.layout == "packed", bounds=knobs.attention == "varlen")
        with _autocast(knobs, job.device):
            output = model(**given, labels=to_device(batch.labels, job.device), num_items_in_batch=divisor, use_cache=False)
        output.loss.backward()
        total += output.loss.detach()
    return total


def _save(model: Any, job: Job, rank: int) -> None:
    """Every rank helps to gather; rank 0 writes."""
    import torch

    from engines.native.sharding import gathered

    adapted = isinstance(job.workload.method, Lora)
    if not adapted:
        model.to(getattr(torch, job.workload.model.dtype))
    weights = gathered(model, trained_only=adapted)
    if rank != 0:
        return
    if not adapted:
        model.save_pretrained(job.out, state_dict=weights)
        return
    for config in model.peft_config.values():
        config.base_model_name_or_path = job.workload.model.name
    model.save_pretrained(str(job.out), state_dict=weights, save_embedding_layers=False)
