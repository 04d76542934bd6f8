"""Several processes through DeepSpeed: ZeRO-1, 2 or 3 around any model of transformers and PEFT, optimizer and weights in host memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

from engines.native.hf_reasons import attention_reasons, dropout_reasons, dtype_reasons, share_reasons
from engines.native.lora_variants import variant_reasons
from engines.native.recompute import Recompute, fraction, recompute_name
from harness.engine import Job, Machine, Probe
from harness.errors import UnsupportedError
from harness.spec import Lora, Positive, Spec, Workload

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

loss_norm = "token_global"
resumes = True
requires = ("deepspeed",)


class Knobs(Spec):
    """How ranks share the work; conf/engine/deepspeed.yaml says what each knob means and holds the values."""

    micro_batch: Positive
    layout: Literal["padded", "packed"]
    stage: Literal[1, 2, 3]
    offload_optimizer: Literal["none", "cpu"]
    offload_parameters: Literal["none", "cpu"]
    recompute: Recompute
    attention: Literal["sdpa", "eager", "varlen"]
    compute_dtype: Literal["float32", "bfloat16"]
    adapter_compute: Literal["autocast", "direct"]


def variant(knobs: Knobs) -> str:
    """The stage, and what differs from how it comes: ``zero2``, ``zero3+offload-all+ckpt``."""
    offloads = {("cpu", "none"): "offload-optimizer", ("none", "cpu"): "offload-parameters", ("cpu", "cpu"): "offload-all"}
    names = [
        f"zero{knobs.stage}",
        offloads.get((knobs.offload_optimizer, knobs.offload_parameters), ""),
        knobs.layout if knobs.layout == "packed" else "",
        knobs.attention if knobs.attention != "sdpa" else "",
        "adapters-direct" if knobs.adapter_compute == "direct" else "",
        recompute_name(knobs.recompute),
    ]
    return "+".join(name for name in names if name)


def unsupported(workload: Workload, knobs: Knobs, machine: Machine) -> str | None:
    """Every reason why this cannot run here, or None."""
    config = workload.model.config or {}
    reasons = dtype_reasons("deepspeed", workload, compute_dtype=knobs.compute_dtype, adapter_compute=knobs.adapter_compute)
    reasons += variant_reasons(workload, rank_stabilised=True, ratio=True)
    reasons += dropout_reasons(config)
    reasons += attention_reasons(
        layout=knobs.layout, attention=knobs.attention, compute_dtype=knobs.compute_dtype, device=machine.device, config=config
    )
    if workload.method.name == "full" and workload.method.dtype == "bfloat16":
        reasons.append("method.dtype=bfloat16: DeepSpeed keeps float32 masters of all weights; set method.dtype=float32")
    if knobs.offload_parameters == "cpu" and knobs.stage != 3:
        reasons.append(f"offload_parameters=cpu moves shards of weights, stage={knobs.stage} has none; set stage=3")
    if machine.device == "cuda":
        reasons += share_reasons(workload, machine.count)
    return "; ".join(reasons) or None


def recomputed_fraction(workload: Workload, knobs: Knobs) -> float | None:
    """Of the layers' forward pass, what the backward pass does again."""
    return fraction(knobs.recompute, workload, knobs.attention)


def train(job: Job, knobs: Knobs, probe: Probe) -> None:
    """Train this rank's share of every step with AdamW on every trained tensor, and let rank 0 save into ``job.out``."""
    import torch

    from engines.native import rank_loop
    from engines.native.hf_model import exact_float32
    from engines.native.ranks import process_group

    if reasons := share_reasons(job.workload, job.processes):
        raise UnsupportedError("; ".join(reasons))
    with process_group(job.device, job.processes):
        torch.manual_seed(job.workload.train.seed)
        exact_float32()
        model, cost = rank_loop.loaded(job, knobs)
        trained = _Trained(model, job, knobs)
        if knobs.layout == "packed":
            rank_loop.expect_documents_apart(model, knobs, job.device)
        rank_loop.train_steps(trained, cost, job, knobs, probe)
        rank_loop.save(model, job, trained.gathered)


def _config(job: Job, knobs: Knobs, num_trained: int) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is told, where ``num_trained`` values are trained. Batches, accumulation and the schedule are ours;
    what it has to say about them is filler.

    Beside adapters, types are as stored and products are bf16 by autocast; the modules listed for it are those whose gradients DeepSpeed
    would reduce in bf16: none. All weights are trained as bf16 copies of float32 masters.
    """
    rounded, adapted = knobs.compute_dtype == "bfloat16", isinstance(job.workload.method, Lora)
    clips = not _clipped_here(job, knobs)
    zero: dict[str, Any] = {
        "stage": knobs.stage,
        "compute_grad_norm": clips,
        # Adapters are small: their gradients are reduced from where autograd left them; else each is copied into a buffer, and out again.
        "contiguous_gradients": not (adapted and _on_device(knobs)),
        "reduce_bucket_size": min(num_trained, 500_000_000),  # DeepSpeed's own, but of such a buffer: not 2 GB for a few megabytes
    }
    for where, to in (("offload_optimizer", knobs.offload_optimizer), ("offload_param", knobs.offload_parameters)):
        if to == "cpu":
            zero[where] = {"device": "cpu", "pin_memory": job.device == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": (job.workload.train.max_grad_norm or 0.0) if clips else 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": rounded and not adapted, "check_grad_overflow": clips},  # looking waits for the device, as clipping does
        "timers": {"throughput": {"enabled": False}},  # waits for the device before every forward pass and after every step
        "torch_autocast": {"enabled": rounded and adapted, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,  # torch's AdamW, which every engine has: its own would be compiled at the first start
        "zero_force_ds_cpu_optimizer": False,
    }


def _on_device(knobs: Knobs) -> bool:
    """Whether the optimizer finds a rank's part of the gradients on its device, all of a group as one tensor."""
    return knobs.stage < 3 and knobs.offload_optimizer == "none"


def _clipped_here(job: Job, knobs: Knobs) -> bool:
    """Whether ``_Clipping`` does it, not DeepSpeed: where one call of the optimizer's step sees all of a rank's gradients.

    DeepSpeed insists on clipping bf16 copies of all weights in stage 1 itself: it has another optimizer for them.
    """
    method = job.workload.method
    if isinstance(method, Lora):
        return _on_device(knobs) and method.b_learning_rate_ratio == 1
    return _on_device(knobs) and not (knobs.stage == 1 and knobs.compute_dtype == "bfloat16")


class _Clipping:
    """Takes the norm of all ranks' gradients before ``optimizer`` steps with its rank's, and clips by it.

    DeepSpeed's own takes it tensor by tensor and then asks what it is: a GPU then has no work until the next forward pass has begun.
    """

    def __init__(self, optimizer: Any, max_norm: float | None) -> None:
        self._max_norm = max_norm
        self._norms: list[Tensor] = []
        optimizer.register_step_pre_hook(self._clip)

    def norm(self) -> Tensor:
        """Before clipping, of the one step that was made since the last call. Raises RuntimeError when it was not one."""
        norms, self._norms = self._norms, []
        if len(norms) != 1:
            raise RuntimeError(f"DeepSpeed made {len(norms)} optimizer steps where one was due: gradients were not clipped as a whole")
        return norms[0]

    def _clip(self, optimizer: Any, *_: Any) -> None:
        from torch import distributed
        from torch.nn import utils

        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        squared = utils.get_total_norm([parameter.grad for parameter in parameters]).square()
        distributed.all_reduce(squared)
        self._norms.append(squared.sqrt())
        if self._max_norm is not None:
            utils.clip_grads_with_norm_(parameters, self._max_norm, self._norms[-1])


class _Trained:
    """``rank_loop.Trained`` by DeepSpeed."""

    def __init__(self, model: Any, job: Job, knobs: Knobs) -> None:
        from engines.native.plain_loop import adamw, groups

        deepspeed = _deepspeed(job.device)
        self._schedule, self._processes = job.workload.train, job.processes
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        config = _config(job, knobs, sum(parameter.numel() for parameter in parameters))
        exact = _rounded(model, parameters, job) if config["bf16"]["enabled"] else {}
        if knobs.stage == 3:  # each weight goes to the device as a shard; without this the whole model would go there first
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
            for module in model.modules():  # but buffers stay where they are
                module._buffers.update({name: value.to(job.device) for name, value in module._buffers.items() if value is not None})
        optimizer = adamw(groups(model, job.workload.method), self._schedule, job.device)
        self._clipping = _Clipping(optimizer, self._schedule.max_grad_norm) if _clipped_here(job, knobs) else None
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        self._model, self._get = model, deepspeed.utils.safe_get_full_fp32_param
        for parameter, value in exact.items():
            deepspeed.utils.safe_set_full_fp32_param(parameter, value.to(job.device))

    def accumulate(self, given: dict[str, Any], *, last: bool) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        loss: Tensor = self._engine(**given).loss
        self._engine.backward(loss * self._processes, scale_wrt_gas=False)  # it divides gradients by the number of ranks
        return loss.detach()

    def update(self, index: int) -> Tensor | float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self._schedule.learning_rate_at(index) * group.get("ratio", 1.0)
        self._engine.step()
        norm: Tensor | float = self._clipping.norm() if self._clipping else self._engine.get_global_grad_norm()
        return norm

    def save_state(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag="state", save_latest=False, exclude_frozen_parameters=True)

    def load_state(self, folder: Path) -> None:
        self._engine.load_checkpoint(str(folder), tag="state", load_module_strict=False)

    def gathered(self) -> dict[str, Tensor]:
        """What was trained, whole, on the host of rank 0, from its float32 masters. All ranks must call this."""
        from torch import distributed

        keep = distributed.get_rank() == 0
        found = {}
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                whole = self._get(parameter)
                if keep:
                    found[name] = whole.detach().to("cpu").contiguous()
        return found


def _rounded(model: Any, parameters: list[Any], job: Job) -> dict[Any, Tensor]:
    """Round ``model`` to bfloat16, as DeepSpeed does, and return what that loses: its float32 masters would be made of rounded values."""
    import torch

    exact = {} if job.workload.model.dtype == "bfloat16" else {parameter: parameter.detach().clone() for parameter in parameters}
    model.to(torch.bfloat16)
    return exact


def _deepspeed(device: str) -> Any:
    """The package, told which device to use: by itself it takes a GPU where there is one."""
    os.environ["DS_ACCELERATOR"] = device
    os.environ.setdefault("LOCAL_RANK", "0")  # torchrun's, which one process goes without; DeepSpeed insists
    import deepspeed
    import deepspeed.ops

    if device == "cpu":  # its reduction in shared memory is compiled for a minute at the first start; gloo does the same
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
