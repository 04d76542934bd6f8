"""How transformers gets a base: as it is stored, in NF4 through bitsandbytes, or decoded where the result has to be exact."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.spec import QLora, Workload

_BLOCK = 64  # harness.nf4, which imports torch


def bitsandbytes_reasons(workload: Workload, compute_dtype: str, config: Mapping[str, Any], device: str) -> list[str]:
    """Why a base in NF4 cannot be trained here; in float32 its decoded values are, without bitsandbytes."""
    if not isinstance(workload.method, QLora) or compute_dtype == "float32":
        return []
    if config and "num_attention_heads" not in config:
        return [f"method=qlora: '{config.get('model_type')}' reads weights past bitsandbytes' modules; set compute_dtype=float32"]
    if importlib.util.find_spec("bitsandbytes") is None:
        return ["method=qlora in bfloat16 needs the package bitsandbytes: pip install bitsandbytes; compute_dtype=float32 does without"]
    return [f"{reason}, or compute_dtype=float32" for reason in decoder_reasons(workload, compute_dtype, config, device)]


def decoder_reasons(workload: Workload, compute_dtype: str, config: Mapping[str, Any], device: str) -> list[str]:
    """Why bitsandbytes would make other values of a base in NF4 than decision 0011 says."""
    if not isinstance(workload.method, QLora):
        return []
    reasons, stored = [], workload.model.dtype
    if stored not in ("float32", compute_dtype):
        why = (
            f"bitsandbytes decodes NF4 into the type that it computes in, here {compute_dtype}, past the {stored} that values are stored as"
        )
        reasons.append(f"{why}; use compute_dtype={stored}")
    broken = [f"{name}={config[name]}" for name in ("hidden_size", "intermediate_size") if config.get(name, 0) % _BLOCK]
    if broken and device == "cpu":
        why = f"on a CPU bitsandbytes (0.50.2) decodes rows wrongly that are no whole blocks of {_BLOCK}"
        reasons.append(f"{why}: {', '.join(broken)}; use a GPU")
    return reasons


def computing_in(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The ``config`` of a base, whose bitsandbytes modules, if it is in NF4, compute in ``dtype``."""
    quantised = config.get("quantization_config")
    return {**config, "quantization_config": {**quantised, "bnb_4bit_compute_dtype": dtype}} if quantised else config


def optimizer_reasons(optimizer: str, device: str) -> list[str]:
    """Why the optimizer's moments cannot be in 8 bits here."""
    if optimizer == "adamw":
        return []
    if device == "cpu":
        return [f"optimizer={optimizer} is bitsandbytes' code for GPUs; use optimizer=adamw"]
    if importlib.util.find_spec("bitsandbytes") is None:
        return [f"optimizer={optimizer} needs the package bitsandbytes: pip install bitsandbytes; optimizer=adamw does without"]
    return []


def load_model(folder: Path, config: Any, dtype: str, attention: str, device: str) -> Any:
    """The model in ``folder``, computing in ``dtype``; one in NF4 through bitsandbytes, or decoded where it is to be exact: in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from harness.nf4 import load_decoded

    attends = hasattr(config, "num_attention_heads")  # a state-space model has none to choose
    implementation = attention if attends else None
    quantised = getattr(config, "quantization_config", None)
    if quantised and dtype == "float32":
        return load_decoded(folder, torch.float32, attn_implementation=implementation)
    options: dict[str, Any] = {}
    if quantised:
        quantised["bnb_4bit_compute_dtype"] = dtype
        options = {"config": config, "device_map": {"": device}}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation=implementation,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        **options,
    )
