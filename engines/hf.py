"""The yardstick: transformers and PEFT in a plain training loop; at ``compute_dtype=float32`` the truth others are judged by."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engines.native.fp8_reasons import fp8_reasons
from engines.native.hf_nf4 import bitsandbytes_reasons, load_model, optimizer_reasons
from engines.native.hf_reasons import class_reasons, dropout_reasons
from engines.native.lora_variants import variant_reasons
from engines.native.recompute import Recompute, checkpoint_layers, compiled_reasons, fraction, recompute_name
from harness.data.tokens import Batch, StepTokens, chunks
from harness.engine import Job, Machine, Probe
from harness.errors import UnsupportedError
from harness.spec import Lora, LoraFp8, Positive, Spec, Workload

if TYPE_CHECKING:
    from torch import Tensor


loss_norm = "token_global"
resumes = True
_FLASH = {"flash_attention_2": ("flash_attn", "flash-attn"), "flash_attention_3": ("flash_attn_interface", "flash-attn-3")}
_OURS = ("cudnn", "varlen")  # not transformers' own: engines/native/hf_attention.py
_WITHOUT_LIGER = ("falcon", "mamba")  # of the families in conf/model


class Knobs(Spec):
    """How transformers does it; conf/engine/hf.yaml says what each knob means and holds the values."""

    micro_batch: Positive
    layout: Literal["padded", "packed"]
    recompute: Recompute
    attention: Literal["sdpa", "eager", "cudnn", "varlen", "flash_attention_2", "flash_attention_3"]
    compute_dtype: Literal["float32", "bfloat16"]
    adapter_compute: Literal["autocast", "direct", "float32"]
    kernels: Literal["none", "liger"]
    compile: bool
    optimizer: Literal["adamw", "adamw_8bit"]


def variant(knobs: Knobs) -> str:
    """What differs from transformers and PEFT as they come; ``best``: everything that makes them fast, in either layout."""
    fast = knobs.kernels == "liger" and knobs.compile and knobs.adapter_compute == "direct"
    if fast and (knobs.layout, knobs.attention) in (("packed", "varlen"), ("padded", "cudnn")):
        names = ["best"] if knobs.layout == "packed" else ["best", "padded"]
    else:
        said = (knobs.kernels, knobs.layout, knobs.attention, f"adapters-{knobs.adapter_compute}", "compile" if knobs.compile else "none")
        names = [name for name in said if name not in ("none", "padded", "sdpa", "adapters-autocast")]
    states = ["adamw8bit"] if knobs.optimizer == "adamw_8bit" else []
    again = [recompute_name(knobs.recompute)] if knobs.recompute != "none" else []
    return "+".join([*names, *again, *states]) or "default"


def unsupported(workload: Workload, knobs: Knobs, machine: Machine) -> str | None:
    """Every reason why this cannot run here, or None."""
    config = workload.model.config or {}
    reasons = [*_dtype_reasons(workload, knobs), *_liger_reasons(knobs, machine, config), *dropout_reasons(config)]
    reasons += fp8_reasons(workload, config) + compiled_reasons(knobs.recompute, knobs.compile)
    if knobs.recompute == "selective" and (knobs.kernels == "liger" or knobs.attention in _FLASH):
        reasons.append("recompute=selective keeps what torch's own operations make; set kernels=none and attention=sdpa, cudnn or varlen")
    reasons += variant_reasons(workload, rank_stabilised=True, ratio=True)
    reasons += optimizer_reasons(knobs.optimizer, machine.device)
    reasons += bitsandbytes_reasons(workload, knobs.compute_dtype, config, machine.device) + _attention_reasons(workload, knobs, machine)
    return "; ".join(reasons) or None


def recomputed_fraction(workload: Workload, knobs: Knobs) -> float | None:
    """Of the layers' forward pass, what the backward pass does again."""
    return fraction(knobs.recompute, workload, knobs.attention)


def train(job: Job, knobs: Knobs, probe: Probe) -> None:
    """Train with AdamW on every trained tensor (norms and biases decay too), and save into ``job.out``."""
    import torch

    from engines.native import plain_loop, states
    from engines.native.hf_batches import make_batch, row_multiple
    from engines.native.hf_model import exact_float32

    if job.processes != 1:
        raise UnsupportedError(f"engine.processes is {job.processes}; hf trains in one process, use engine.processes=1")
    schedule = job.workload.train
    torch.manual_seed(schedule.seed)
    exact_float32()
    model = _load(job, knobs)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    make = plain_loop.adamw if knobs.optimizer == "adamw" else plain_loop.adamw_8bit
    optimizer = make(plain_loop.groups(model, job.workload.method), schedule, job.device)
    state = states.Plain(model, optimizer) if job.checkpoints else None
    begin = states.restored(state, job.checkpoints) if state else 0
    multiple = row_multiple(job.tokens, knobs.attention, compiled=knobs.compile)
    made = partial(make_batch, packed=knobs.layout == "packed", multiple_of=multiple)
    probe.ready()
    for index in range(begin, schedule.num_steps):
        batches = [made(samples) for samples in chunks(job.tokens.step(schedule, index), knobs.micro_batch)]
        tokens = StepTokens.of(batches)
        loss = _accumulate(model, batches, tokens.loss, knobs, job.device)
        grad_norm = plain_loop.update(optimizer, parameters, schedule, index)
        probe.step(loss=loss, grad_norm=grad_norm, tokens=tokens)
        if state:
            states.step_made(state, job.checkpoints, index + 1, schedule.num_steps)
    _save(model, job)


def _dtype_reasons(workload: Workload, knobs: Knobs) -> list[str]:
    method = workload.method
    if method.dtype == "float16":
        return ["method.dtype=float16 needs loss scaling, which hf does not do; use float32 or bfloat16"]
    if knobs.compute_dtype == "float32" and method.dtype != "float32":
        return [f"compute_dtype=float32 cannot train {method.dtype} weights; set method.dtype=float32 or compute_dtype=bfloat16"]
    return _adapter_reasons(workload, knobs)


def _adapter_reasons(workload: Workload, knobs: Knobs) -> list[str]:
    if knobs.adapter_compute == "autocast":
        return []
    if not isinstance(workload.method, Lora):
        return [f"adapter_compute={knobs.adapter_compute} is about adapters, method={workload.method.name} has none; set it to autocast"]
    if knobs.compute_dtype == "float32":
        return [f"adapter_compute={knobs.adapter_compute} is about bfloat16; beside compute_dtype=float32 leave it at autocast"]
    return []


def _liger_reasons(knobs: Knobs, machine: Machine, config: dict[str, Any]) -> list[str]:
    if knobs.kernels != "liger":
        return []
    if machine.device == "cpu":
        return ["kernels=liger is Triton code and needs a GPU; set kernels=none"]
    if config.get("model_type") in _WITHOUT_LIGER:
        return [_no_liger(config["model_type"])]
    if importlib.util.find_spec("liger_kernel") is None:
        return ["kernels=liger needs the package liger-kernel: pip install liger-kernel"]
    return []


def _no_liger(family: str) -> str:
    return f"kernels=liger: Liger has no kernels for model_type '{family}'; set kernels=none"


def _attention_reasons(workload: Workload, knobs: Knobs, machine: Machine) -> list[str]:
    reasons, name, config = [], f"attention={knobs.attention}", workload.model.config or {}
    if knobs.layout == "packed" and config and "num_attention_heads" not in config:
        reasons.append(f"layout=packed: '{config.get('model_type')}' has no attention to keep documents apart; set layout=padded")
    if knobs.attention in ("sdpa", "eager"):
        return reasons
    if machine.device == "cpu":
        reasons.append(f"{name} needs a GPU; set attention=sdpa")
    elif knobs.attention in _FLASH and importlib.util.find_spec(_FLASH[knobs.attention][0]) is None:
        package = _FLASH[knobs.attention][1]
        reasons.append(f"{name} needs the package {package}: pip install {package} --no-build-isolation, or set attention=varlen")
    if knobs.compute_dtype == "float32":
        reasons.append(f"{name} computes in 16 bits only; set compute_dtype=bfloat16 or attention=sdpa")
    if knobs.attention == "cudnn":
        reasons += _cudnn_reasons(workload, knobs, config)
    return reasons


def _cudnn_reasons(workload: Workload, knobs: Knobs, config: dict[str, Any]) -> list[str]:
    """cuDNN is given no mask, so what needs one would leak in silence."""
    reasons, longest = [], workload.data.sequence_length
    if knobs.layout == "packed":
        reasons.append("attention=cudnn would let packed documents see each other; set layout=padded or attention=varlen")
    window = config.get("sliding_window")
    if window is not None and config.get("use_sliding_window", True) and longest > window:
        reasons.append(f"attention=cudnn knows no sliding window, the model's is {window} and samples have up to {longest} tokens")
    return reasons


def _load(job: Job, knobs: Knobs) -> Any:
    """The model, ready to train. ``Any``: PEFT's and transformers' own types do not survive their wrappers."""
    import torch
    from transformers import AutoConfig

    from engines.native.hf_attention import register
    from engines.native.hf_batches import lengths_vary
    from engines.native.hf_model import compile_layers, in_fp8, with_adapter

    method = job.workload.method
    register()
    config = AutoConfig.from_pretrained(job.base, local_files_only=True, trust_remote_code=False)
    quantised = bitsandbytes_reasons(job.workload, knobs.compute_dtype, config.to_dict(), job.device)
    _refuse(quantised + _opened_reasons(config, job.workload, knobs) + fp8_reasons(job.workload, config.to_dict()))
    eight = isinstance(method, LoraFp8)  # rounded from what the base stores, whatever is computed in
    dtype = "float32" if eight else knobs.compute_dtype if isinstance(method, Lora) else method.dtype
    model = load_model(job.base, config, dtype, knobs.attention, job.device)
    if eight:
        in_fp8(model, getattr(torch, knobs.compute_dtype))
    # What PEFT's model card is made of: no path of this machine.
    model.name_or_path = model.config.name_or_path = job.workload.model.name
    if isinstance(method, Lora):
        assert job.adapter_init is not None
        model = with_adapter(model, job.adapter_init, getattr(torch, method.dtype), cast_inputs=knobs.adapter_compute != "direct")
    checkpoint_layers(model, knobs.recompute)
    if knobs.kernels == "liger":
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, None)
    model.config.use_cache = False
    model.to(job.device)
    model.train()
    if knobs.layout == "packed":
        _expect_documents_apart(model, knobs, job.device)
    if knobs.compile:
        compile_layers(model, with_loss=knobs.kernels == "none", shapes_vary=lengths_vary(job.tokens))
    return model


def _opened_reasons(config: Any, workload: Workload, knobs: Knobs) -> list[str]:
    """What only the model's own configuration and class reveal."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    values = config.to_dict()
    reasons = dropout_reasons(values)
    reasons += class_reasons(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], knobs.attention, _OURS)
    if knobs.attention == "cudnn":
        reasons += _cudnn_reasons(workload, knobs, values)
    if knobs.kernels == "liger":
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        reasons += [] if config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN else [_no_liger(config.model_type)]
    return reasons


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise UnsupportedError("; ".join(reasons))


def _expect_documents_apart(model: Any, knobs: Knobs, device: str) -> None:
    """Refuse a model that lets packed documents see each other."""
    from engines.native.hf_batches import leak

    with _autocast(knobs, device):
        off = leak(model, device, bounds=_needs_bounds(knobs))
    if off != 0:  # nan too
        family = model.config.model_type
        _refuse(
            [f"layout=packed: in {family} with attention={knobs.attention} documents see each other (logits {off:.3g} off); use padded"]
        )


def _autocast(knobs: Knobs, device: str) -> Any:
    """bf16 products whatever the stored types; without it PEFT's own casts make fp32 adapters compute in fp32."""
    import torch

    return torch.autocast(device, dtype=torch.bfloat16, enabled=knobs.compute_dtype == "bfloat16" and knobs.adapter_compute != "float32")


def _accumulate(model: Any, batches: Sequence[Batch], num_labels: int, knobs: Knobs, device: str) -> Tensor:
    """Add the step's gradients, micro-batch by micro-batch; returns the loss, a mean over the step's supervised tokens."""
    import torch

    from engines.native.hf_batches import inputs
    from engines.native.plain_loop import to_device

    total = torch.zeros((), device=device)
    divisor = to_device(np.array(num_labels), device)  # a tensor: compiled code would be made anew for every number
    for batch in batches:
        given = inputs(batch, device, packed=knobs.layout == "packed", bounds=_needs_bounds(knobs))
        with _autocast(knobs, device):
            output = model(**given, labels=to_device(batch.labels, device), num_items_in_batch=divisor, use_cache=False)
        output.loss.backward()
        total += output.loss.detach()
    return total


def _needs_bounds(knobs: Knobs) -> bool:
    return knobs.attention == "varlen" or (knobs.layout == "packed" and knobs.attention in _FLASH)


def _save(model: Any, job: Job) -> None:
    import torch

    if not isinstance(job.workload.method, Lora):
        model.to(getattr(torch, job.workload.model.dtype)).save_pretrained(job.out)
        return
    for config in model.peft_config.values():
        config.base_model_name_or_path = job.workload.model.name
    # The embedding is never trained here; "auto" would look for its original size on the hub.
    model.save_pretrained(str(job.out), save_embedding_layers=False)
