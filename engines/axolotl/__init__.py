"""Axolotl 0.20, the installed package: its own YAML through its CLI's train function, our probe as one of its plugins."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, Literal

from engines.native.fp8_reasons import not_taught
from engines.native.hf_nf4 import decoder_reasons
from engines.native.lora_variants import variant_reasons
from harness.engine import Job, LossNorm, Machine, Probe
from harness.errors import UnsupportedError
from harness.spec import Lora, Positive, QLora, Spec, Workload

requires = ("axolotl", "transformers", "peft", "accelerate", "datasets", "trl", "bitsandbytes", "liger-kernel")

LoraKernel = Literal["mlp", "qkv", "o"]
LigerKernel = Literal["rope", "rms_norm", "glu_activation", "fused_linear_cross_entropy"]
_LORA_KERNELS: tuple[LoraKernel, ...] = ("mlp", "qkv", "o")
_LIGER: tuple[LigerKernel, ...] = ("rope", "rms_norm", "glu_activation", "fused_linear_cross_entropy")


class Knobs(Spec):
    """How Axolotl does it; conf/engine/axolotl.yaml says what each knob means and holds the values."""

    micro_batch: Positive
    recompute: Literal["none", "full"]
    layout: Literal["padded", "packed"]
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]
    compute_dtype: Literal["float32", "bfloat16"]
    lora_kernels: tuple[LoraKernel, ...] | None
    liger: tuple[LigerKernel, ...]
    distributed: Literal["none", "ddp", "fsdp2", "zero1", "zero2", "zero3"]


def loss_norm(processes: int) -> LossNorm:
    """0.20 weights by token within a rank (0.19 and older averaged micro-batch means), and averages the ranks' means."""
    return "token_global" if processes == 1 else "rank_token_mean"


def variant(knobs: Knobs) -> str:
    """For example ``default`` (nothing said of its kernels), ``kernels+liger``, ``kernels+liger+ckpt``, ``plain`` (none of them)."""
    parts = ["default" if knobs.lora_kernels is None else _some("kernels", knobs.lora_kernels, _LORA_KERNELS) or "plain"]
    parts += [_some("liger", knobs.liger, _LIGER)]
    parts += ["ckpt" if knobs.recompute == "full" else "", "packed" if knobs.layout == "packed" else ""]
    parts += [knobs.attention if knobs.attention != "sdpa" else "", knobs.distributed if knobs.distributed != "none" else ""]
    return "+".join(part for part in parts if part)


def _some(name: str, chosen: tuple[str, ...], known: tuple[str, ...]) -> str:
    if not chosen:
        return ""
    return name if set(chosen) == set(known) else "-".join([name, *(one for one in known if one in chosen)])


def unsupported(workload: Workload, knobs: Knobs, machine: Machine) -> str | None:
    """Every reason why this cannot run here, or None."""
    reasons = [
        *_method_reasons(workload, knobs),
        *_batch_reasons(workload, knobs, machine),
        *_kernel_reasons(workload, knobs, machine),
        *_model_reasons(workload.model.config or {}, knobs),
        *decoder_reasons(workload, knobs.compute_dtype, workload.model.config or {}, machine.device),
        *variant_reasons(workload, rank_stabilised=False, ratio=False),
    ]
    return "; ".join(reasons) or None


def recomputed_fraction(workload: Workload, knobs: Knobs) -> float:
    """Of the layers' forward pass, what the backward pass does again: gradient checkpointing repeats whole layers."""
    return 1.0 if knobs.recompute == "full" else 0.0


def train(job: Job, knobs: Knobs, probe: Probe) -> None:
    """Write Axolotl's YAML and data, let it train, and save into ``job.out`` what it saved."""
    _import_without_wandb()
    _check_here(job, knobs)
    from engines.axolotl.output import keep
    from engines.axolotl.plugin import RUN, Run
    from engines.axolotl.settings import settings, write_settings

    with tempfile.TemporaryDirectory(prefix="axolotl-", dir=job.out.parent) as name:
        scratch = Path(name)
        values = settings(job, knobs, scratch)
        token = RUN.set(Run(job, probe))
        try:
            _run(write_settings(scratch, values), values, job, cache=scratch / "cache")
        finally:
            RUN.reset(token)
        if int(os.environ.get("RANK", "0")) == 0:  # of those that torchrun starts, the one that saves
            keep(scratch / "out", job)


def _run(path: Path, values: dict[str, Any], job: Job, *, cache: Path) -> None:
    """What ``axolotl train`` does with a YAML file, which holds ``values``; ``cache`` is for the rows as datasets reads them."""
    if job.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # read when it is imported; without it two ranks on a CPU are two runs
    import datasets
    from accelerate.state import AcceleratorState
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train

    from engines.axolotl.settings import not_taken

    datasets.config.HF_DATASETS_CACHE = cache
    AcceleratorState._reset_state()  # its precision, of a run before this one in the same process
    cfg = load_cfg(str(path))
    if refused := not_taken(values, cfg):
        raise UnsupportedError(f"axolotl does not do as it is told here: {'; '.join(refused)}")
    if job.device == "cpu":
        cfg.device_map = {"": "cpu"}  # with more than one rank it has taken their numbers for those of GPUs
    do_train(cfg, TrainerCliArgs())


def _method_reasons(workload: Workload, knobs: Knobs) -> list[str]:
    method = workload.method
    if refused := not_taught(workload, "axolotl as it is driven here"):
        return refused
    if method.dtype == "float16":
        return ["method.dtype=float16 needs loss scaling, whose skipped steps no other engine makes; use float32 or bfloat16"]
    if not isinstance(method, Lora):
        told = f"method.dtype={method.dtype}, compute_dtype={knobs.compute_dtype}"
        return [] if method.dtype == knobs.compute_dtype else [f"axolotl trains all weights in the type it computes in: {told}"]
    if isinstance(method, QLora) and knobs.distributed in ("fsdp2", "zero3"):
        return [f"distributed={knobs.distributed} would shard the bytes of a base in NF4, which are not stored for that; use ddp"]
    reasons = [] if method.dtype == "float32" else [f"axolotl keeps adapters in float32, not {method.dtype}; set method.dtype=float32"]
    return reasons if method.alpha.is_integer() else [*reasons, f"axolotl's lora_alpha is a whole number, method.alpha is {method.alpha}"]


def _batch_reasons(workload: Workload, knobs: Knobs, machine: Machine) -> list[str]:
    reasons = []
    ranks = 1 if machine.device == "cpu" else machine.count
    if workload.train.samples_per_step % (knobs.micro_batch * ranks):
        reasons.append(
            f"axolotl's micro-batches are all of one size: train.samples_per_step={workload.train.samples_per_step} "
            f"is no multiple of micro_batch={knobs.micro_batch} on {ranks} process(es)"
        )
    if ranks > 1 and knobs.distributed == "none":
        reasons.append(f"distributed=none is for one process, this is {ranks}; set distributed=ddp, fsdp2, zero1, zero2 or zero3")
    return reasons


def _kernel_reasons(workload: Workload, knobs: Knobs, machine: Machine) -> list[str]:
    reasons = []
    if knobs.lora_kernels and not isinstance(workload.method, Lora):
        reasons.append("lora_kernels are for method=lora; set lora_kernels=[]")
    if machine.device == "cpu":
        triton = {"lora_kernels": knobs.lora_kernels, "liger": knobs.liger}
        reasons += [f"{name}={list(value)} is Triton code and needs a GPU; set {name}=[]" for name, value in triton.items() if value]
        if knobs.attention.startswith("fl"):
            reasons.append(f"attention={knobs.attention} needs a GPU; set attention=sdpa")
    if knobs.attention == "flash_attention_2" and knobs.compute_dtype == "float32":
        reasons.append("attention=flash_attention_2 computes in 16 bits only; set compute_dtype=bfloat16 or attention=sdpa")
    return reasons


def _model_reasons(config: dict[str, Any], knobs: Knobs) -> list[str]:
    names = [name for name, value in config.items() if name.endswith(("dropout", "pdrop")) and value]
    reasons = [f"the model's {name} is {config[name]}, training here has no dropout; set it to 0" for name in names]
    if knobs.distributed == "fsdp2" and config.get("model_type") == "falcon":
        reasons.append("axolotl refuses FSDP for Falcon; set distributed=ddp")
    return reasons


def _check_here(job: Job, knobs: Knobs) -> None:
    """What only the running process and the open weights can tell."""
    import torch

    config = json.loads((job.base / "config.json").read_text(encoding="utf-8"))
    if reasons := _model_reasons(config, knobs) + decoder_reasons(job.workload, knobs.compute_dtype, config, job.device):
        raise UnsupportedError("; ".join(reasons))
    if job.processes > 1 and knobs.distributed == "none":
        raise UnsupportedError(f"distributed=none with {job.processes} processes; set distributed=ddp, fsdp2, zero1, zero2 or zero3")
    if job.processes == 1 and knobs.distributed != "none":
        raise UnsupportedError(f"distributed={knobs.distributed} in one process; set distributed=none or engine.processes=…")
    if job.workload.train.samples_per_step % (knobs.micro_batch * job.processes):
        raise UnsupportedError(f"micro_batch={knobs.micro_batch} on {job.processes} process(es) does not divide a step's samples")
    if job.device == "cpu" and torch.cuda.is_available():
        raise UnsupportedError("axolotl takes the GPU where it sees one; to train on the CPU hide it: CUDA_VISIBLE_DEVICES=''")
    if knobs.distributed.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise UnsupportedError("distributed=zero… needs the package deepspeed in axolotl's environment")
    if knobs.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UnsupportedError("attention=flash_attention_2 needs the package flash-attn in axolotl's environment")


def _import_without_wandb() -> None:
    """Axolotl imports wandb whether or not it is used; its place is taken by an empty module where it is not installed."""
    if importlib.util.find_spec("wandb") is None:
        empty = types.ModuleType("wandb")
        empty.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        sys.modules["wandb"] = empty
