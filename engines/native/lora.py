"""LoRA adapters in PEFT's format: read into groups of linears, written back in the same layout."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.native.weights import DecoderWeights, Part, named_adapters
from harness.errors import UnsupportedError, WeightsError

_PREFIX = "base_model.model."
_CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"
# Options of PEFT that change the function; only these values are implemented.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_dropout": (0, 0.0),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "lora_bias": (False,),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT adapter as read: its configuration, and its tensors as they are stored."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    rank: int
    scale: float

    @property
    def num_elements(self) -> int:
        """Values of all tensors together: how large an arena they need."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def blocks(self, prefix: str, parts: tuple[Part, ...]) -> list[tuple[Part, Tensor, Tensor]]:
        """(part, A, B) of every adapted linear among ``parts`` of the layer called ``prefix``."""
        found = []
        for part in parts:
            name = f"{_PREFIX}{prefix}.{part.name}"
            if f"{name}.lora_A.weight" in self.tensors:
                found.append((part, *self._pair(name, part.rows.stop - part.rows.start)))
        return found

    def check_nothing_is_left(self, weights: DecoderWeights) -> None:
        """Raises UnsupportedError when the adapter holds tensors that no linear of ``weights`` took."""
        left = sorted(set(self.tensors) - {f"{_PREFIX}{name}" for name, _, _ in named_adapters(weights)})
        if left:
            raise UnsupportedError(f"the adapter holds {len(left)} tensors that no linear of the decoder takes: {left[0]}")

    def _pair(self, name: str, num_outputs: int) -> tuple[Tensor, Tensor]:
        keys = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        if keys[1] not in self.tensors:
            raise WeightsError(f"{keys[1]}: not in the initial adapter, though lora_A is; make the adapter again")
        down, up = (self.tensors[key] for key in keys)
        if len(down) != self.rank or up.shape != (num_outputs, self.rank):
            raise WeightsError(f"{name}: A {list(down.shape)} and B {list(up.shape)} do not fit rank {self.rank} of {num_outputs} outputs")
        return down, up


def read_adapter(folder: Path) -> Adapter:
    """Read the adapter in ``folder``. Raises UnsupportedError for PEFT options other than plain LoRA."""
    try:
        config: dict[str, Any] = json.loads((folder / _CONFIG).read_text())
        tensors = load_file(folder / _TENSORS)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder.name}: not a readable PEFT adapter ({error}); make the initial adapter again") from error
    odd = [f"{key}={config[key]!r}" for key, plain in _PLAIN.items() if key in config and config[key] not in plain]
    if config.get("peft_type") != "LORA" or odd:
        raise UnsupportedError(f"the adapter is not plain LoRA: {', '.join(odd) or config.get('peft_type')}")
    over = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    return Adapter(config, tensors, config["r"], config["lora_alpha"] / over)


def save_adapter(weights: DecoderWeights, config: dict[str, Any], model_name: str, out: Path) -> None:
    """Write the trained adapters with ``config``, the configuration they came with, the base called ``model_name``."""
    tensors = {}
    for name, weight, rows in named_adapters(weights):
        if weight.master is not None:
            tensors[f"{_PREFIX}{name}"] = weight.master.detach()[rows].contiguous().cpu()
    save_file(tensors, out / _TENSORS, metadata={"format": "pt"})
    written = {**config, "base_model_name_or_path": model_name, "inference_mode": True}
    (out / _CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
