"""The yardstick: transformers and PEFT in a plain training loop; at ``compute_dtype=float32`` the truth others are judged by."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from harness.data.tokens import Batch, StepTokens, chunks, pad
from harness.engine import Job, Machine, Probe
from harness.errors import UnsupportedError
from harness.spec import Lora, Positive, Spec, Train, Workload

if TYPE_CHECKING:
    from torch import Tensor


loss_norm = "token_global"


class Knobs(Spec):
    """How transformers does it; conf/engine/hf.yaml says what each knob means and holds the values."""

    micro_batch: Positive
    recompute: Literal["none", "full"]
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    compute_dtype: Literal["float32", "bfloat16"]
    kernels: Literal["none", "liger"]
    compile: bool


def unsupported(workload: Workload, knobs: Knobs, machine: Machine) -> str | None:
    """Every reason why this cannot run here, or None."""
    reasons = [*_dtype_reasons(workload, knobs), *_kernel_reasons(knobs, machine), *_dropout_reasons(workload.model.config or {})]
    return "; ".join(reasons) or None


def recomputed_fraction(workload: Workload, knobs: Knobs) -> float:
    """Of the layers' forward pass, what the backward pass does again: gradient checkpointing repeats whole layers."""
    return 1.0 if knobs.recompute == "full" else 0.0


def train(job: Job, knobs: Knobs, probe: Probe) -> None:
    """Train with AdamW on every trained tensor (norms and biases decay too), and save into ``job.out``."""
    import torch

    if job.processes != 1:
        raise UnsupportedError(f"engine.processes is {job.processes}; hf trains in one process, use engine.processes=1")
    schedule = job.workload.train
    torch.manual_seed(schedule.seed)
    _exact_float32()
    model = _load(job, knobs)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _adamw(parameters, schedule, job.device)
    forward = torch.compile(model) if knobs.compile else model
    probe.ready()
    for index in range(schedule.num_steps):
        batches = [pad(samples) for samples in chunks(job.tokens.step(schedule, index), knobs.micro_batch)]
        tokens = StepTokens.of(batches)
        loss = _accumulate(forward, batches, tokens.loss, knobs, job.device)
        grad_norm = _clip(parameters, schedule.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate_at(index)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        probe.step(loss=loss, grad_norm=grad_norm, tokens=tokens)
    _save(model, job)


def _dtype_reasons(workload: Workload, knobs: Knobs) -> list[str]:
    method = workload.method
    if method.dtype == "float16":
        return ["method.dtype=float16 needs loss scaling, which hf does not do; use float32 or bfloat16"]
    if knobs.compute_dtype == "float32" and method.dtype != "float32":
        return [f"compute_dtype=float32 cannot train {method.dtype} weights; set method.dtype=float32 or compute_dtype=bfloat16"]
    return []


def _kernel_reasons(knobs: Knobs, machine: Machine) -> list[str]:
    reasons = []
    if knobs.kernels == "liger" and machine.device == "cpu":
        reasons.append("kernels=liger is Triton code and needs a GPU; set kernels=none")
    elif knobs.kernels == "liger" and importlib.util.find_spec("liger_kernel") is None:
        reasons.append("kernels=liger needs the package liger-kernel: pip install liger-kernel")
    if knobs.attention != "flash_attention_2":
        return reasons
    if machine.device == "cpu":
        reasons.append("attention=flash_attention_2 needs a GPU; set attention=sdpa")
    elif importlib.util.find_spec("flash_attn") is None:
        reasons.append("attention=flash_attention_2 needs the package flash-attn: pip install flash-attn --no-build-isolation")
    if knobs.compute_dtype == "float32":
        reasons.append("attention=flash_attention_2 computes in 16 bits only; set compute_dtype=bfloat16 or attention=sdpa")
    return reasons


def _dropout_reasons(config: dict[str, Any]) -> list[str]:
    """A workload has no dropout, and masks drawn by each engine could not agree; a model that asks for it is refused."""
    names = [name for name, value in config.items() if name.endswith(("dropout", "pdrop")) and value]
    return [f"the model's {name} is {config[name]}, training here has no dropout; set it to 0" for name in names]


def _exact_float32() -> None:
    """TF32 would round float32 products to 10 bits: not the truth others are judged by."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _load(job: Job, knobs: Knobs) -> Any:
    """The model, ready to train. ``Any``: PEFT's and transformers' own types do not survive their wrappers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    method = job.workload.method
    attends = hasattr(AutoConfig.from_pretrained(job.base, local_files_only=True, trust_remote_code=False), "num_attention_heads")
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.base,
        dtype=getattr(torch, knobs.compute_dtype if isinstance(method, Lora) else method.dtype),
        attn_implementation=knobs.attention if attends else None,  # a state-space model has none to choose
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    reasons = _dropout_reasons(model.config.to_dict())
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(type(model).forward).parameters.values())
    if not takes_any:
        reasons.append(f"{type(model).__name__} takes no num_items_in_batch, so its loss cannot be weighted by token")
    if reasons:
        raise UnsupportedError("; ".join(reasons))
    # What PEFT's model card is made of: no path of this machine.
    model.name_or_path = model.config.name_or_path = job.workload.model.name
    if isinstance(method, Lora):
        model = _with_adapter(model, job, method)
    if knobs.recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if knobs.kernels == "liger":
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, None)
    model.config.use_cache = False
    model.to(job.device)
    model.train()
    return model


def _with_adapter(model: Any, job: Job, method: Lora) -> Any:
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, str(job.adapter_init), is_trainable=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, method.dtype))
    return model


def _accumulate(model: Any, batches: Sequence[Batch], num_labels: int, knobs: Knobs, device: str) -> Tensor:
    """Add the step's gradients, micro-batch by micro-batch; returns the loss, a mean over the step's supervised tokens.

    No attention mask is given: padding stands on the right, where causal attention never looks, and has no labels.
    """
    import torch

    total = torch.zeros((), device=device)
    for batch in batches:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=knobs.compute_dtype == "bfloat16"):
            output = model(
                input_ids=_to_device(batch.input_ids, device),
                labels=_to_device(batch.labels, device),
                num_items_in_batch=num_labels,
                use_cache=False,
            )
        output.loss.backward()
        total += output.loss.detach()
    return total


def _to_device(array: Any, device: str) -> Tensor:
    import torch

    tensor = torch.from_numpy(array)
    # Pinned, so that the copy does not stop the host until the GPU has caught up.
    return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor


def _clip(parameters: list[Any], max_norm: float | None) -> Tensor:
    """The global gradient norm before clipping."""
    import torch

    if max_norm is not None:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def _save(model: Any, job: Job) -> None:
    import torch

    if not isinstance(job.workload.method, Lora):
        model.to(getattr(torch, job.workload.model.dtype)).save_pretrained(job.out)
        return
    for config in model.peft_config.values():
        config.base_model_name_or_path = job.workload.model.name
    # The embedding is never trained here; "auto" would look for its original size on the hub.
    model.save_pretrained(str(job.out), save_embedding_layers=False)


def _adamw(parameters: list[Any], schedule: Train, device: str) -> Any:
    """AdamW as ``schedule`` says, one group (norms and biases decay too); on a GPU torch's fused implementation."""
    import torch

    return torch.optim.AdamW(
        parameters,
        lr=schedule.learning_rate,
        betas=(schedule.beta1, schedule.beta2),
        eps=schedule.epsilon,
        weight_decay=schedule.weight_decay,
        fused=device == "cuda",
    )
