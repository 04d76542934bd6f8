"""Hugging Face checkpoints to decoder weights and back (safetensors only, one file or many)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engines.native.fp8 import Fp8Weight
from engines.native.fp8_reasons import Mode
from engines.native.lora import Adapter
from engines.native.nf4 import REFERENCE, Filling, SharedBuffers, Turn, moved
from engines.native.shape import LlamaShape
from engines.native.store import Section, Store, Training
from engines.native.uploading import Uploads
from engines.native.weights import WHOLE, Arena, Block, DecoderWeights, LayerWeights, Linear, LowRank, Part, Weight, named_weights
from harness.errors import UnsupportedError, WeightsError
from harness.nf4 import PARTS, STATE, Quantised, from_tensors

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_NAMES = 5  # in an error message


@dataclass(frozen=True, slots=True)
class Placement:
    """Where weights go: read by the products in ``compute_dtype``, masters of what is trained in ``train_dtype``.

    ``rank_multiple``: the ranks of a linear group are padded with zeros to whole multiples of it. cuBLAS likes 64 on a GPU
    (Llama-3.2-1B shape, 16,384 tokens, H100: 46.0 + 45.4 ms of products a step against 48.2 + 47.6 unpadded).
    ``filling``: how weights in NF4 and the adapters beside them come into the buffer that the products read. ``fp8``: linear layers in
    e4m3, for which products. ``training``: how everything is trained, where there are no adapters.
    """

    device: torch.device
    compute_dtype: torch.dtype
    train_dtype: torch.dtype
    rank_multiple: int = 1
    filling: Filling = REFERENCE
    fp8: Mode | None = None
    training: Training = field(default_factory=Training)


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
        loader = _Loader(tensors, placement, adapter, uploads)
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


class _Loader:
    """Reads tensors by name into groups, and remembers which names were read."""

    def __init__(self, tensors: Mapping[str, Any], placement: Placement, adapter: Adapter | None, uploads: Uploads) -> None:
        self._tensors, self._uploads = tensors, uploads
        self._placement = placement
        self._adapter = adapter
        self.arena = Arena(0 if adapter is None else adapter.num_elements, placement.train_dtype, placement.device)
        types = placement.compute_dtype, placement.train_dtype, placement.device
        self.store = Store(self._num_trained(), *types, placement.training) if adapter is None else None
        self.shared = SharedBuffers()
        self.read_names: set[str] = set()

    def weight(self, name: str, size: tuple[int, ...]) -> Weight:
        return self._group([(name, WHOLE)], size)

    def linear(self, layer: int, parts: tuple[tuple[str, int], ...], num_inputs: int, has_bias: bool) -> Linear:
        ends = list(accumulate(rows for _, rows in parts))
        spans = tuple(Part(name, slice(end - rows, end)) for (name, rows), end in zip(parts, ends, strict=True))
        prefix = f"model.layers.{layer}"
        adapted = [] if self._adapter is None else self._adapter.blocks(prefix, spans)
        names = [f"{prefix}.{part.name}.weight" for part in spans]
        if any(f"{name}{STATE}" in self._tensors for name in names):
            return self._packed(prefix, spans, num_inputs, has_bias, adapted)
        if self._placement.fp8 is not None:
            return self._fp8(prefix, spans, num_inputs, has_bias, adapted, self._placement.fp8)
        wide, view = self._wide(ends[-1], num_inputs, len(adapted))
        weight = self._group([(name, part.rows) for name, part in zip(names, spans, strict=True)], (ends[-1], num_inputs), view)
        lora = self._low_rank(adapted, *_thin(wide, ends[-1], num_inputs)) if wide is not None else None
        return Linear(weight.value if wide is None else wide, weight, self._bias(prefix, spans) if has_bias else None, spans, lora)

    def _bias(self, prefix: str, spans: tuple[Part, ...]) -> Weight:
        return self._group([(f"{prefix}.{part.name}.bias", part.rows) for part in spans], (spans[-1].rows.stop,))

    def _packed(
        self, prefix: str, spans: tuple[Part, ...], num_inputs: int, has_bias: bool, adapted: list[tuple[Part, Tensor, Tensor]]
    ) -> Linear:
        """A group whose weights stay in NF4."""
        if self._adapter is None:
            raise UnsupportedError("the base is stored in NF4, whose weights cannot be trained; use a method with adapters")
        place, outputs, room = self._placement, spans[-1].rows.stop, self._room(len(adapted))
        kind = "+".join(f"{part.name}{'*' if any(part is each for each, _, _ in adapted) else ''}" for part in spans)
        shared = self.shared.get(kind, outputs + room, num_inputs + room, place.compute_dtype, place.device)
        view = shared.buffer[:outputs, :num_inputs]
        packed = [(self._quantised(f"{prefix}.{part.name}.weight", part.rows, num_inputs), view[part.rows]) for part in spans]
        turn = Turn(shared, packed, place.filling)
        lora = self._low_rank(adapted, *_thin(shared.buffer, outputs, num_inputs), turn) if adapted else None
        return Linear(shared.buffer, Weight(view), self._bias(prefix, spans) if has_bias else None, spans, lora, turn)

    def _fp8(
        self, prefix: str, spans: tuple[Part, ...], num_inputs: int, has_bias: bool, adapted: list[tuple[Part, Tensor, Tensor]], mode: Mode
    ) -> Linear:
        """A group whose weights are rounded to e4m3 from what the base stores."""
        if self._adapter is None:
            raise UnsupportedError("weights in fp8 cannot be trained; use a method with adapters")
        place, size = self._placement, (spans[-1].rows.stop, num_inputs)
        stored = torch.empty(size, dtype=torch.float32, device=place.device)
        self._group([(f"{prefix}.{part.name}.weight", part.rows) for part in spans], size, stored)
        kind = "+".join(part.name for part in spans)
        fp8 = Fp8Weight.of(stored, mode, kind, self.shared, self._room(len(adapted)), place.compute_dtype)
        codes = fp8.forward.plain[: size[0]]
        lora = self._low_rank(adapted, fp8.up, fp8.down) if adapted else None
        return Linear(codes, Weight(codes), self._bias(prefix, spans) if has_bias else None, spans, lora, fp8=fp8)

    def _quantised(self, name: str, rows: slice, num_inputs: int) -> Quantised:
        if f"{name}{STATE}" not in self._tensors:
            raise UnsupportedError(f"{name} is not in NF4, others of its group are; quantise all linear layers but the head")
        weight = from_tensors(name, lambda wanted: self._tensors[wanted].get_tensor(wanted))
        if weight.shape != (rows.stop - rows.start, num_inputs):
            expected = [rows.stop - rows.start, num_inputs]
            raise WeightsError(f"{name}: has shape {list(weight.shape)}, config.json says {expected}; get the weights again")
        self.read_names.update(f"{name}{part}" for part in ("", *PARTS, STATE))
        return moved(weight, self._uploads.placed)

    def begin(self, section: Section) -> None:
        """What is read from now on is trained as one section."""
        if self.store is not None:
            self.store.begin(section)

    def _num_trained(self) -> int:
        """At most: the tensors of a group are one weight."""
        return sum(Store.room(math.prod(file.get_slice(name).get_shape())) for name, file in self._tensors.items())

    def _wide(self, num_outputs: int, num_inputs: int, num_adapted: int) -> tuple[Tensor | None, Tensor | None]:
        """The buffer of an adapted group and the place of its weight in it; nothing where nothing is adapted."""
        if self._adapter is None or not num_adapted:
            return None, None
        place, room = self._placement, self._room(num_adapted)
        wide = torch.zeros(num_outputs + room, num_inputs + room, dtype=place.compute_dtype, device=place.device)
        return wide, wide[:num_outputs, :num_inputs]

    def _room(self, num_adapted: int) -> int:
        """P."""
        assert self._adapter is not None
        multiple = self._placement.rank_multiple
        return -(-num_adapted * self._adapter.rank // multiple) * multiple

    def _low_rank(self, adapted: list[tuple[Part, Tensor, Tensor]], up_NP: Tensor, down_PK: Tensor, turn: Turn | None = None) -> LowRank:
        """The adapters of a group where its products read them; where that is shared, with copies of their own."""
        assert self._adapter is not None
        rank = self._adapter.rank
        blocks = []
        down = self._master(torch.cat([down for _, down, _ in adapted]))
        stacked = self._master(torch.cat([up for _, _, up in adapted]))
        num_rows = 0
        for index, (part, _, up) in enumerate(adapted):
            columns = slice(index * rank, (index + 1) * rank)
            value = up_NP[part.rows, columns]
            value = value if turn is None else turn.apart(value)
            master = Arena.part(stacked, slice(num_rows, num_rows := num_rows + len(up)))
            blocks.append(Block(part.name, part.rows, columns, Weight(value, master)))
        down_value = down_PK[: len(down)]
        down_value = down_value if turn is None else turn.apart(down_value)
        arrived = torch.zeros(-(-max(len(up_NP), down_PK.shape[1]) // 16), dtype=torch.int32, device=up_NP.device)
        lora = LowRank(Weight(down_value, down), stacked, tuple(blocks), self._adapter.scale, arrived)
        for weight in (lora.down, *(block.up for block in blocks)):
            weight.publish()
        return lora

    def _master(self, values: Tensor) -> Tensor:
        return self.arena.take(*values.shape).copy_(values)

    def _group(self, rows_by_name: Sequence[tuple[str, slice]], size: tuple[int, ...], view: Tensor | None = None) -> Weight:
        """Read tensors into the rows of one weight: into ``view`` where it is given, else into a tensor of its own."""
        for name, _ in rows_by_name:
            if name not in self._tensors:
                raise WeightsError(f"{name}: not in the checkpoint, though its config.json asks for it; get the weights again")
        weight = self._new(size) if view is None else Weight(view)
        for name, rows in rows_by_name:
            target = (weight.value if weight.master is None else weight.master)[rows]
            tensor = self._tensors[name].get_tensor(name)
            if tensor.shape != target.shape:
                raise WeightsError(f"{name}: has shape {list(tensor.shape)}, config.json says {list(target.shape)}; get the weights again")
            self._uploads.copy(target, tensor)
            self.read_names.add(name)
        weight.publish()
        return weight

    def _new(self, size: tuple[int, ...]) -> Weight:
        if self.store is not None:
            return Weight(*self.store.take(*size))
        return Weight(torch.empty(size, dtype=self._placement.compute_dtype, device=self._placement.device))


def _thin(wide: Tensor, num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor]:
    """The places of B [N, P] and of A [P, K] in a buffer."""
    return wide[:num_outputs, num_inputs:], wide[num_outputs:, :num_inputs]


def _layer(loader: _Loader, shape: LlamaShape, index: int) -> LayerWeights:
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
