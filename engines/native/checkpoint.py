"""Hugging Face checkpoints to decoder weights and back (safetensors only, one file or many)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engines.native.lora import Adapter
from engines.native.shape import LlamaShape
from engines.native.weights import WHOLE, DecoderWeights, LayerWeights, Linear, Part, Weight, named_weights, trained
from harness.errors import UnsupportedError, WeightsError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_NAMES = 5  # in an error message


@dataclass(frozen=True, slots=True)
class Placement:
    """Where weights go: frozen in ``compute_dtype``, or, where ``train_dtype`` is given, masters of that type beside it."""

    device: torch.device
    compute_dtype: torch.dtype
    train_dtype: torch.dtype | None


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder. Raises WeightsError when there is none."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder.name}: no readable config.json ({error}); expected a Hugging Face model folder") from error
    return config


def load_weights(folder: Path, shape: LlamaShape, placement: Placement, adapter: Adapter | None) -> DecoderWeights:
    """Read the weights of ``shape``, with ``adapter`` beside them. Raises when a tensor is missing, misshapen or unknown."""
    with _tensors(folder) as tensors:
        loader = _Loader(tensors, placement, adapter)
        embedding = loader.weight("model.embed_tokens.weight", (shape.vocab_size, shape.hidden_size))
        layers = tuple(_layer(loader, shape, index) for index in range(shape.num_layers))
        norm = loader.weight("model.norm.weight", (shape.hidden_size,))
        head = embedding if shape.tied_head else loader.weight("lm_head.weight", (shape.vocab_size, shape.hidden_size))
        _check_nothing_is_left(tensors, loader.read_names, embedding if shape.tied_head else None)
    return DecoderWeights(embedding, layers, norm, head)


def save_weights(weights: DecoderWeights, config: dict[str, Any], dtype_name: str, out: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, the tensors in the dtype called ``dtype_name``."""
    dtype = getattr(torch, dtype_name)
    tensors = {name: _master(weight)[rows].to(dtype).contiguous().cpu() for name, weight, rows in named_weights(weights)}
    save_file(tensors, out / _SINGLE, metadata={"format": "pt"})
    plain = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype", "_name_or_path")}
    (out / "config.json").write_text(json.dumps({**plain, "dtype": dtype_name}, indent=2, sort_keys=True) + "\n")


def _master(weight: Weight) -> Tensor:
    return weight.value if weight.master is None else weight.master.detach()


class _Loader:
    """Reads tensors by name into groups, and remembers which names were read."""

    def __init__(self, tensors: dict[str, Any], placement: Placement, adapter: Adapter | None) -> None:
        self._tensors = tensors
        self._placement = placement
        self._adapter = adapter
        self.read_names: set[str] = set()

    def weight(self, name: str, size: tuple[int, ...]) -> Weight:
        return self._group([(name, WHOLE)], size)

    def linear(self, layer: int, parts: tuple[tuple[str, int], ...], num_inputs: int, has_bias: bool) -> Linear:
        ends = list(accumulate(rows for _, rows in parts))
        placed = tuple(Part(name, slice(end - rows, end)) for (name, rows), end in zip(parts, ends, strict=True))
        prefix = f"model.layers.{layer}"
        weight = self._group([(f"{prefix}.{part.name}.weight", part.rows) for part in placed], (ends[-1], num_inputs))
        bias = self._group([(f"{prefix}.{part.name}.bias", part.rows) for part in placed], (ends[-1],)) if has_bias else None
        lora = None if self._adapter is None else self._adapter.group(prefix, placed, self._placement.compute_dtype)
        return Linear(weight, bias, placed, lora)

    def _group(self, rows_by_name: Iterable[tuple[str, slice]], size: tuple[int, ...]) -> Weight:
        place = self._placement
        whole = torch.empty(size, dtype=place.train_dtype or place.compute_dtype, device=place.device)
        for name, rows in rows_by_name:
            target = whole[rows]
            if name not in self._tensors:
                raise WeightsError(f"{name}: not in the checkpoint, though its config.json asks for it; get the weights again")
            tensor = self._tensors[name].get_tensor(name)
            if tensor.shape != target.shape:
                raise WeightsError(f"{name}: has shape {list(tensor.shape)}, config.json says {list(target.shape)}; get the weights again")
            target.copy_(tensor)
            self.read_names.add(name)
        return trained(whole, place.compute_dtype) if place.train_dtype is not None else Weight(whole)


def _layer(loader: _Loader, shape: LlamaShape, index: int) -> LayerWeights:
    hidden, wide = shape.hidden_size, shape.intermediate_size
    queries, keys, prefix = shape.query_size, shape.key_size, f"model.layers.{index}"

    def head_norm(name: str) -> Weight | None:
        return loader.weight(f"{prefix}.self_attn.{name}.weight", (shape.head_dim,)) if shape.qk_norm else None

    qkv = (("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys))
    return LayerWeights(
        input_norm=loader.weight(f"{prefix}.input_layernorm.weight", (hidden,)),
        qkv=loader.linear(index, qkv, hidden, shape.qkv_bias),
        query_norm=head_norm("q_norm"),
        key_norm=head_norm("k_norm"),
        output=loader.linear(index, (("self_attn.o_proj", hidden),), queries, shape.output_bias),
        mlp_norm=loader.weight(f"{prefix}.post_attention_layernorm.weight", (hidden,)),
        gate_up=loader.linear(index, (("mlp.gate_proj", wide), ("mlp.up_proj", wide)), hidden, shape.mlp_bias),
        down=loader.linear(index, (("mlp.down_proj", hidden),), wide, shape.mlp_bias),
    )


@contextmanager
def _tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Tensor name to the open safetensors file that holds it."""
    index = folder / _INDEX
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [_SINGLE]
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        for file in files:
            if not (folder / file).is_file():
                raise WeightsError(f"{folder.name}/{file}: missing; expected a Hugging Face model folder with safetensors weights")
            handle = stack.enter_context(safe_open(folder / file, framework="pt"))
            found.update(dict.fromkeys(handle.keys(), handle))
        yield found


def _check_nothing_is_left(tensors: dict[str, Any], read: set[str], tied_to: Weight | None) -> None:
    """A tensor that nobody read is a part of the model that this decoder does not have."""
    left = {name for name in tensors if name not in read and not name.endswith("rotary_emb.inv_freq")}
    if tied_to is not None and "lm_head.weight" in left:
        head = tensors["lm_head.weight"].get_tensor("lm_head.weight").to(tied_to.value.device)
        if not torch.equal(head.to(tied_to.value.dtype), tied_to.value):
            raise UnsupportedError("config.json ties the head to the embedding, but the checkpoint holds another head")
        left.remove("lm_head.weight")
    if left:
        names = ", ".join(sorted(left)[:_MAX_NAMES])
        raise UnsupportedError(f"the checkpoint holds {len(left)} tensors the native decoder does not know: {names}")
