"""Why a model of transformers cannot be trained as a workload asks, for every engine that trains its code; light to import."""

from __future__ import annotations

import inspect
from typing import Any


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
