"""NF4 with double quantisation (Dettmers et al. 2023) in the bytes and names of a bitsandbytes 4-bit checkpoint.

A weight, flat, goes in blocks of 64 values: each value is the nearest of 16 levels times its block's largest magnitude, two values a
byte, the first in the upper half. Those magnitudes, less their mean (``offset``), are in turn the nearest of 256 levels times the
largest of a block of 256 of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from harness.errors import WeightsError

BLOCK = 64
NESTED_BLOCK = 256
STATE = ".quant_state.bitsandbytes__nf4"  # behind a weight's name: JSON as bytes
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
# The levels of the paper's appendix E, as float32.
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_EXPONENTS = 7
_LEAST = 1e-38  # a block of zeros is divided by it


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight of ``shape`` that was stored as ``dtype``: its ``packed`` codes, each block's 8-bit ``absmax``, their blocks'
    ``nested_absmax``, and the levels that both point into (``code`` [16], ``levels`` [256]).
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: float
    code: Tensor
    levels: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype


def dynamic_levels() -> Tensor:
    """The 256 signed levels of Dettmers et al. 2022 (arXiv 2110.02861): seven decades, each with twice the levels of the one below."""
    levels = [torch.tensor([0.0, 1.0])]
    for exponent in range(_EXPONENTS):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        means = 10 ** (exponent + 1 - _EXPONENTS) * ((edges[:-1] + edges[1:]) / 2.0)
        levels += [means, -means]
    return torch.cat(levels).sort().values


def quantise(weight: Tensor) -> Quantised:
    """``weight`` in NF4. The same bytes on every machine: the mean of the magnitudes is taken in float64."""
    code, levels = torch.tensor(CODE, device=weight.device), dynamic_levels().to(weight.device)
    indices, absmax = _nearest(weight.detach().float().flatten(), code, BLOCK)
    pairs = pad(indices, (0, len(indices) % 2)).view(-1, 2)
    offset = absmax.double().mean().float()
    nested, nested_absmax = _nearest(absmax - offset, levels, NESTED_BLOCK)
    return Quantised(
        (pairs[:, 0] << 4) | pairs[:, 1], nested, nested_absmax, float(offset), code, levels, tuple(weight.shape), weight.dtype
    )


def scales(weight: Quantised) -> Tensor:
    """Each block's largest magnitude as it is decoded, float32: a product, then a sum, each rounded."""
    large = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(weight.absmax)]
    return weight.levels[weight.absmax.int()] * large + weight.offset


def decode(weight: Quantised) -> Tensor:
    """The values in the type that the weight was stored in: products in float32, rounded once. Bit by bit what bitsandbytes decodes."""
    count = math.prod(weight.shape)
    indices = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).flatten()[:count]
    values = weight.code[indices.int()]
    return values.mul_(scales(weight).repeat_interleave(BLOCK)[:count]).to(weight.dtype).view(weight.shape)


def to_tensors(name: str, weight: Quantised) -> dict[str, Tensor]:
    """The tensors of a checkpoint that hold ``weight``, called ``name``."""
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": weight.offset,
    }
    parts = weight.absmax, weight.code, weight.nested_absmax, weight.levels
    return {
        name: weight.packed.unsqueeze(1),
        **{f"{name}{part}": tensor.clone() for part, tensor in zip(PARTS, parts, strict=True)},
        f"{name}{STATE}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def from_tensors(name: str, get: Callable[[str], Tensor]) -> Quantised:
    """The weight called ``name`` of a checkpoint, by ``get``ting its tensors. Raises WeightsError for other blocks than these."""
    try:
        state: dict[str, Any] = json.loads(bytes(get(f"{name}{STATE}").tolist()))
        kind = state["quant_type"], state["blocksize"], state.get("nested_blocksize")
        if kind != ("nf4", BLOCK, NESTED_BLOCK):
            asked = f"expected NF4 in blocks of {BLOCK} with scales in blocks of {NESTED_BLOCK} (double quantisation)"
            raise WeightsError(f"{name}: quantised as {kind[0]} in blocks of {kind[1]}, scales in blocks of {kind[2]}; {asked}")
        absmax, code, nested_absmax, levels = (get(f"{name}{part}") for part in PARTS)
        shape, dtype = tuple(state["shape"]), getattr(torch, state["dtype"])
        packed = get(name).view(torch.uint8).flatten()
        read = Quantised(packed, absmax, nested_absmax, float(state["nested_offset"]), code, levels, shape, dtype)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{name}: not a readable 4-bit weight ({error!r}); make the checkpoint again") from error
    _check(name, read)
    return read


def is_nf4(folder: Path) -> bool:
    """Whether the checkpoint in ``folder`` says that it is quantised by bitsandbytes."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return (config.get("quantization_config") or {}).get("quant_method") == "bitsandbytes"


def load_decoded(folder: Path, dtype: Any, **options: Any) -> Any:
    """The model of an NF4 checkpoint with its decoded values in plain linear modules of ``dtype``; bitsandbytes is not needed."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    del config.quantization_config
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return architecture.from_pretrained(None, config=config, state_dict=decoded_tensors(folder), dtype=dtype, **options)


def decoded_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an NF4 checkpoint by its name, quantised ones decoded."""
    tensors = dict(stored_tensors(folder))
    names = [name.removesuffix(STATE) for name in tensors if name.endswith(STATE)]
    for name in names:
        tensors[name] = decode(from_tensors(name, tensors.__getitem__))
        for part in (*PARTS, STATE):
            del tensors[f"{name}{part}"]
    return tensors


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint as it is stored, one at a time."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield name, opened.get_tensor(name)


def _check(name: str, weight: Quantised) -> None:
    count = math.prod(weight.shape)
    blocks = -(-count // BLOCK)
    sizes = {
        "packed bytes": (len(weight.packed), -(-count // 2)),
        "absmax": (len(weight.absmax), blocks),
        "nested_absmax": (len(weight.nested_absmax), -(-blocks // NESTED_BLOCK)),
        "levels": (len(weight.levels), 256),
    }
    wrong = [f"{found} {what}, expected {expected}" for what, (found, expected) in sizes.items() if found != expected]
    if wrong:
        raise WeightsError(f"{name} {list(weight.shape)}: {'; '.join(wrong)}; make the checkpoint again")


def _nearest(values: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(index of the level nearest to each value over its block's largest magnitude, those magnitudes); a tie goes to the lower level."""
    blocks = pad(values, (0, -len(values) % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp_min(_LEAST)).unsqueeze(1)).clamp_(-1, 1)
    middles = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8).flatten()[: len(values)], absmax
