"""Hugging Face checkpoints to decoder weights and back (safetensors only, one file or many)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engines.native.loader import Loader, Placement
from engines.native.lora import Adapter
from engines.native.shape import LlamaShape
from engines.native.uploading import Uploads
from engines.native.weights import DecoderWeights, LayerWeights, Weight, named_weights
from harness.errors import UnsupportedError, WeightsError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_NAMES = 5  # in an error message


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder. Raises WeightsError when there is none."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder.name}: no readable config.json ({error}); expected a Hugging Face model folder") from error
    return config


def load_weights(folder: Path, shape: LlamaShape, placement: Placement, adapter: Adapter | None) -> DecoderWeights:
    """Read the weights of ``shape``: frozen with ``adapter`` beside them, or all trained without one.

    Raises when a tensor is missing, misshapen or unknown.
    """
    with _tensors(folder) as tensors:
        return build_weights(tensors, shape, placement, adapter)


def build_weights(tensors: Mapping[str, Any], shape: LlamaShape, placement: Placement, adapter: Adapter | None) -> DecoderWeights:
    """As ``load_weights``, from open files by tensor name: each has ``get_tensor(name)`` and ``get_slice(name)`` as safetensors has."""
    with Uploads(placement.device, shared=placement.device.type == "cuda") as uploads:
        loader = Loader(tensors, placement, adapter, uploads)
        loader.begin("embedding")
        embedding = loader.weight("model.embed_tokens.weight", (shape.vocab_size, shape.hidden_size))
        layers = tuple(_layer(loader, shape, index) for index in range(shape.num_layers))
        loader.begin("head")
        head = embedding if shape.tied_head else loader.weight("lm_head.weight", (shape.vocab_size, shape.hidden_size))
        norm = loader.weight("model.norm.weight", (shape.hidden_size,))
    _check_nothing_is_left(tensors, loader.read_names, embedding if shape.tied_head else None)
    if loader.store is not None:
        loader.store.finish()
    return DecoderWeights(embedding, layers, norm, head, loader.store or loader.arena, loader.shared)


def save_weights(weights: DecoderWeights, config: dict[str, Any], dtype_name: str, out: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, the tensors in the dtype called ``dtype_name``."""
    dtype = getattr(torch, dtype_name)
    tensors = {name: _master(weight)[rows].to(dtype).contiguous().cpu() for name, weight, rows in named_weights(weights)}
    save_file(tensors, out / _SINGLE, metadata={"format": "pt"})
    plain = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype", "_name_or_path")}
    (out / "config.json").write_text(json.dumps({**plain, "dtype": dtype_name}, indent=2, sort_keys=True) + "\n")


def _master(weight: Weight) -> Tensor:
    return weight.value if weight.master is None else weight.master.detach()


def _layer(loader: Loader, shape: LlamaShape, index: int) -> LayerWeights:
    hidden, wide = shape.hidden_size, shape.intermediate_size
    queries, keys, prefix = shape.query_size, shape.key_size, f"model.layers.{index}"
    loader.begin(index)

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


def _check_nothing_is_left(tensors: Mapping[str, Any], read: set[str], tied_to: Weight | None) -> None:
    """A tensor that nobody read is a part of the model that this decoder does not have."""
    left = {name for name in tensors if name not in read and not name.endswith("rotary_emb.inv_freq")}
    if tied_to is not None and "lm_head.weight" in left:
        head = tensors["lm_head.weight"].get_tensor("lm_head.weight").to(tied_to.value.device)
        if not head.is_meta and not torch.equal(head.to(tied_to.value.dtype), tied_to.value):
            raise UnsupportedError("config.json ties the head to the embedding, but the checkpoint holds another head")
        left.remove("lm_head.weight")
    if left:
        names = ", ".join(sorted(left)[:_MAX_NAMES])
        raise UnsupportedError(f"the checkpoint holds {len(left)} tensors the native decoder does not know: {names}")
