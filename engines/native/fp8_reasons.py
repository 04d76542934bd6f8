"""Why linear layers cannot compute in e4m3, for every engine that is asked to; light to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from engines.native.shape import LlamaShape, read_shape
from harness.errors import UnsupportedError
from harness.spec import LoraFp8, Workload

Mode = Literal["forward", "forward_and_input_gradients"]

_COLUMNS = 16  # 8-bit products take whole sixteens of columns
_LEAST_CAPABILITY = (8, 9)


def fp8_reasons(workload: Workload, config: Mapping[str, Any]) -> list[str]:
    """Why the emulation in plain torch cannot stand for this model."""
    if isinstance(workload.method, LoraFp8) and config and "num_attention_heads" not in config:
        return [f"method=lora_fp8: '{config.get('model_type')}' reads weights past its linear modules; use method=lora"]
    return []


def not_taught(workload: Workload, name: str) -> list[str]:
    """The refusal of an engine that trains adapters on other bases only."""
    if isinstance(workload.method, LoraFp8):
        return [f"{name} does not train method=lora_fp8, whose linear layers compute in e4m3; use engine=fused or engine=hf"]
    return []


def size_reasons(workload: Workload) -> list[str]:
    """Why 8-bit products cannot take the model, where its shape is known; it must be one of the native decoder's."""
    config = workload.model.config
    return _odd_sizes(read_shape(config, workload.data.sequence_length)) if config is not None else []


def check_device(shape: LlamaShape) -> None:
    """Raise UnsupportedError for what only the GPU and the model's own configuration reveal."""
    import torch

    if reasons := device_reasons(torch.cuda.get_device_name(), torch.cuda.get_device_capability()) + _odd_sizes(shape):
        raise UnsupportedError("; ".join(reasons))


def _odd_sizes(shape: LlamaShape) -> list[str]:
    sizes = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "columns of queries": shape.query_size,
        "columns of keys": shape.key_size,
    }
    odd = [f"{name}={size}" for name, size in sizes.items() if size % _COLUMNS]
    return [f"8-bit products take whole multiples of {_COLUMNS}, the model has {', '.join(odd)}; use operations=reference"] if odd else []


def device_reasons(name: str, capability: tuple[int, int]) -> list[str]:
    """Why a GPU cannot."""
    if capability >= _LEAST_CAPABILITY:
        return []
    have = ".".join(map(str, capability))
    return [f"{name} has no 8-bit floating-point products (compute capability {have}; they begin at 8.9); use method=lora or qlora"]
