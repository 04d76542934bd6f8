"""Why a model of transformers cannot be trained as a workload asks, for every engine that trains its code; light to import."""

from __future__ import annotations

import inspect
from typing import Any

from engines.native.fp8_reasons import not_taught
from harness.spec import Lora, Workload


def dropout_reasons(config: dict[str, Any]) -> list[str]:
    """A workload has no dropout, and masks drawn by each engine could not agree; a model that asks for it is refused."""
    names = [name for name, value in config.items() if name.endswith(("dropout", "pdrop")) and value]
    return [f"the model's {name} is {config[name]}, training here has no dropout; set it to 0" for name in names]


def class_reasons(architecture: Any, attention: str, ours: tuple[str, ...]) -> list[str]:
    """What the model's class does not take: a loss weighted by token, or an attention of ``ours``."""
    reasons = []
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(architecture.forward).parameters.values())
    if not takes_any:
        reasons.append(f"{architecture.__name__} takes no num_items_in_batch, so its loss cannot be weighted by token")
    if attention in ours and not architecture._supports_attention_backend:
        reasons.append(f"attention={attention}: {architecture.__name__} cannot be given another attention; set attention=sdpa")
    return reasons


def share_reasons(workload: Workload, processes: int) -> list[str]:
    """Every rank needs a sample of every step."""
    samples = workload.train.samples_per_step
    if samples >= processes:
        return []
    return [f"train.samples_per_step={samples} leaves some of {processes} processes without a sample; use at most {samples} of them"]


def attention_reasons(*, layout: str, attention: str, compute_dtype: str, device: str, config: dict[str, Any]) -> list[str]:
    """Of engines over several ranks, whose attention is sdpa, eager or varlen."""
    reasons = []
    if layout == "packed" and config and "num_attention_heads" not in config:
        reasons.append(f"layout=packed: '{config.get('model_type')}' has no attention to keep documents apart; set layout=padded")
    if attention == "varlen" and device == "cpu":
        reasons.append("attention=varlen needs a GPU; set attention=sdpa")
    if attention == "varlen" and compute_dtype == "float32":
        reasons.append("attention=varlen computes in 16 bits only; set compute_dtype=bfloat16 or attention=sdpa")
    return reasons


def dtype_reasons(engine: str, workload: Workload, *, compute_dtype: str, adapter_compute: str) -> list[str]:
    """Of engines over several ranks: what ``engine`` cannot train in, or beside, these types."""
    method = workload.method
    if refused := not_taught(workload, engine):
        return refused
    if method.dtype == "float16":
        return [f"method.dtype=float16 needs loss scaling, which {engine} does not do here; use float32 or bfloat16"]
    if compute_dtype == "float32" and method.dtype != "float32":
        return [f"compute_dtype=float32 cannot train {method.dtype} weights; set method.dtype=float32 or compute_dtype=bfloat16"]
    if adapter_compute == "direct" and (not isinstance(method, Lora) or compute_dtype == "float32"):
        return ["adapter_compute=direct is about float32 adapters beside bfloat16 products; set it to autocast"]
    return []
