"""The parameters and linear layers that a transformers configuration describes, found without allocating any weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import ConfigError, WeightsError, nearest
from harness.weights.random_init import Kind

# Keys of older transformers configurations that 5.x converts; anything else that the architecture does not know is a typing error.
LEGACY = frozenset({"rope_theta", "rope_scaling", "torch_dtype", "auto_map", "unk_token_id", "_attn_implementation_autoset"})


@dataclass(frozen=True, slots=True)
class Structure:
    """``shapes`` and initial ``kinds`` of the parameters, tied ones once; [out, in] of every ``linears`` module."""

    shapes: dict[str, tuple[int, ...]]
    kinds: dict[str, Kind]
    linears: dict[str, tuple[int, int]]
    initializer_range: float
    architecture: str


def read_config(raw: Mapping[str, Any], source: str) -> Any:
    """A transformers configuration of ``raw``, with unknown keys refused. ``source`` names it in errors."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    values = dict(raw)
    kind = values.pop("model_type", None)
    if not isinstance(kind, str):
        raise ConfigError(f"{source}: needs model_type, the name of the architecture in transformers, for example llama")
    try:
        known = set(AutoConfig.for_model(kind).to_dict())
        unknown = sorted(set(values) - known - LEGACY)
        if unknown:
            raise ConfigError("\n".join(f"{source}.{key}: unknown to the {kind} architecture; {nearest(key, known)}" for key in unknown))
        return AutoConfig.for_model(kind, **values)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ConfigError(f"{source}: transformers refuses it: {error}") from error


def folder_config(folder: Path) -> Any:
    """The transformers configuration of ``folder``/config.json. Raises WeightsError for an architecture transformers does not have."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise WeightsError(f"config.json of the base: transformers refuses it: {error}") from error


def structure(config: Any) -> Structure:
    """What a causal language model of the transformers configuration ``config`` consists of."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise WeightsError(f"transformers cannot build a causal language model of this configuration: {error}") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    kinds: dict[str, Kind] = {}
    for name in shapes:
        module, _, leaf = name.rpartition(".")
        kinds[name] = _kind(leaf, type(modules[module]).__name__, len(shapes[name]))
    linears = {name: (m.out_features, m.in_features) for name, m in modules.items() if isinstance(m, torch.nn.Linear)}
    spread = float(getattr(config, "initializer_range", None) or 0.02)
    return Structure(shapes, kinds, linears, spread, type(model).__name__)


def _kind(leaf: str, module: str, dimensions: int) -> Kind:
    if leaf.endswith("bias"):
        return "zeros"
    return "ones" if "norm" in module.lower() or dimensions == 1 else "normal"
