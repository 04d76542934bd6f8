"""The allocations of the fused operations without their kernels: meta tensors of the same sizes, and the most bytes alive at one time.

Legend: T tokens, H hidden, N output and K input columns of a linear group, P its padded ranks, W = N + P, L supervised rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engines.native.bench import RANK, adapter_sizes, tensor_sizes
from engines.native.checkpoint import build_weights
from engines.native.decoder import Decoder
from engines.native.footprint import Load
from engines.native.fp8 import RANK_MULTIPLE
from engines.native.fp8_reasons import Mode
from engines.native.fused_ops import FUSED
from engines.native.loader import Placement
from engines.native.lora import Adapter
from engines.native.ops import Attended, HeadNorms, Heads, Input, Normed, NormSource
from engines.native.packed import Packed
from engines.native.plan import Plan
from engines.native.random_files import RandomFile
from engines.native.shape import LlamaShape
from engines.native.store import Training
from engines.native.weights import Linear, Weight

META = torch.device("meta")


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were, beside those that were there before."""

    def __init__(self, device: torch.device = META) -> None:
        super().__init__()
        self.now = self.most = 0
        self._device = device
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device == self._device:
                storage = leaf.untyped_storage()
                if id(storage) not in self._known and id(storage) not in before:
                    self._known.add(id(storage))
                    self._change(storage.nbytes())
                    weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        return result

    def _gone(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._change(-num_bytes)

    def _change(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.most = max(self.most, self.now)


def with_low(wide_TW: Tensor, linear: Linear) -> Input:
    return Input(wide_TW, wide_TW[:, linear.num_inputs :].clone())


def norm(x_TH: Tensor, delta_TH: Tensor | None, weight: Weight, epsilon: float, linear: Linear) -> Normed:
    wide_TW = x_TH.new_empty(len(x_TH), x_TH.shape[1] + linear.padded_rank)
    sum_TH = x_TH if delta_TH is None else torch.empty_like(x_TH)
    return Normed(with_low(wide_TW, linear), sum_TH, x_TH.new_empty(len(x_TH), dtype=torch.float32))


def norm_backward(dy_TH: Tensor, x_TH: Tensor, inverse_T: Tensor, weight: Weight, residual_TH: Tensor | None, padded_rank: int) -> Tensor:
    return x_TH.new_empty(len(x_TH), x_TH.shape[1] + padded_rank)


def attention(heads: Heads, packed: Packed, linear: Linear) -> Attended:
    """cuDNN's output, copied into the wide input, and the logarithms of sums."""
    tokens, num_heads, head_dim = heads.queries.shape
    output_TK = heads.queries.new_empty(tokens, num_heads * head_dim)
    wide_TW = output_TK.new_empty(tokens, linear.num_inputs + linear.padded_rank)
    return Attended(Input(wide_TW, wide_TW[:, linear.num_inputs :]), (output_TK.new_empty(num_heads, tokens, dtype=torch.float32),))


def attention_backward(dy_TCD: Tensor, heads: Heads, attended: Attended, packed: Packed) -> Heads:
    """dq is summed in float32 before it is rounded."""
    into = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (heads.queries, heads.keys, heads.values)]
    into[0].new_empty(into[0].shape, dtype=torch.float32)
    return Heads(*into)


def rotate(projected: Heads, norms: HeadNorms | None, packed: Packed) -> Heads:
    if norms is None:
        return projected
    return Heads(torch.empty_like(projected.queries), torch.empty_like(projected.keys), projected.values)


def rotate_back(gradients: Heads, projected: Heads | None, norms: HeadNorms | None, packed: Packed, padded_rank: int) -> Tensor:
    columns = sum(each[0].numel() for each in (gradients.queries, gradients.keys, gradients.values))
    return gradients.queries.new_empty(len(gradients.queries), columns + padded_rank)


def swiglu(gate_up_TN: Tensor, linear: Linear) -> Input:
    return with_low(gate_up_TN.new_empty(len(gate_up_TN), linear.num_inputs + linear.padded_rank), linear)


def swiglu_backward(d_h_TK: Tensor, gate_up_TN: Tensor, dy_TW: Tensor, low_TP: Tensor | None, down: Linear, group: Linear) -> Tensor:
    return gate_up_TN.as_strided((len(gate_up_TN), gate_up_TN.shape[1] + group.padded_rank), gate_up_TN.stride())


def cross_entropy(hidden_LH: Tensor, head: Weight, targets_L: Tensor, scale: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    d_hidden_LH = torch.empty_like(hidden_LH)
    hidden_LH.new_empty(min(chunk, len(hidden_LH)), len(head.value))
    return hidden_LH.new_empty(len(hidden_LH), dtype=torch.float32), d_hidden_LH


ALLOCATIONS = replace(
    FUSED,
    embed=lambda embedding, tokens: embedding.new_empty(len(tokens), embedding.shape[1]),
    norm=norm,
    norm_backward=norm_backward,
    plain_norm=lambda x, weight, epsilon: torch.empty_like(x),
    plain_norm_backward=lambda dy, x, weight, epsilon: torch.empty_like(x),
    fill=lambda dy, linear: None,
    weight_gradients=lambda dy, source, linear: None,
    up_gradients=lambda dy, low, linear: None,
    rotate=rotate,
    rotate_back=rotate_back,
    attention=attention,
    attention_backward=attention_backward,
    swiglu=swiglu,
    swiglu_backward=swiglu_backward,
    cross_entropy=cross_entropy,
)


def fp8_norm(x_TH: Tensor, delta_TH: Tensor | None, weight: Weight, epsilon: float, linear: Linear) -> Normed:
    """The unrounded norm lives until x A^T is made."""
    y_TH = torch.empty_like(x_TH)
    sum_TH = x_TH if delta_TH is None else torch.empty_like(x_TH)
    return Normed(fp8_input(y_TH, linear), sum_TH, x_TH.new_empty(len(x_TH), dtype=torch.float32))


def fp8_swiglu(gate_up_TN: Tensor, linear: Linear) -> Input:
    return fp8_input(gate_up_TN.new_empty(len(gate_up_TN), linear.num_inputs), linear)


def fp8_input(x_TK: Tensor, linear: Linear) -> Input:
    codes = torch.empty(len(x_TK), linear.num_inputs + 3 * linear.padded_rank, dtype=torch.uint8, device=META)
    scales = torch.empty(len(x_TK), dtype=torch.float32, device=META)
    return Input(codes, x_TK.new_empty(len(x_TK), linear.padded_rank), scales)


def fp8_linear(input: Input, linear: Linear, room: int) -> Tensor:
    """The codes of the input, and the product's result."""
    codes = _codes(input.wide, linear.num_inputs) if input.scales is None else None
    made = torch.empty(len(input.wide), linear.num_outputs + room, dtype=torch.bfloat16, device=META)[:, : linear.num_outputs]
    del codes
    return made


def fp8_input_gradient(dy_TW: Tensor, linear: Linear) -> Tensor:
    assert linear.fp8 is not None
    codes = _codes(dy_TW, linear.num_outputs) if linear.fp8.turned is not None else None
    made = dy_TW.new_empty(len(dy_TW), linear.num_inputs)
    del codes
    return made


def _codes(wide_TW: Tensor, num_columns: int) -> Tensor:
    return torch.empty(len(wide_TW), num_columns + 3 * (wide_TW.shape[1] - num_columns), dtype=torch.uint8, device=META)


FP8_ALLOCATIONS = replace(ALLOCATIONS, norm=fp8_norm, swiglu=fp8_swiglu, linear=fp8_linear, input_gradient=fp8_input_gradient)


def _plain_norm(x_TH: Tensor, delta_TH: Tensor | None, weight: Weight, epsilon: float, linear: Linear) -> Normed:
    made = norm(x_TH, delta_TH, weight, epsilon, linear)
    return Normed(Input(made.input.wide, None), made.x, made.inverse)


def _plain_attention(heads: Heads, packed: Packed, linear: Linear) -> Attended:
    """The output is the next group's input as it is."""
    tokens, num_heads, head_dim = heads.queries.shape
    output_TK = heads.queries.new_empty(tokens, num_heads * head_dim)
    return Attended(Input(output_TK, None), (output_TK.new_empty(num_heads, tokens, dtype=torch.float32),))


def _plain_swiglu(gate_up_TN: Tensor, linear: Linear) -> Input:
    return Input(gate_up_TN.new_empty(len(gate_up_TN), linear.num_inputs), None)


def _full_weight_gradients(dy_TW: Tensor, source: Tensor | NormSource, linear: Linear) -> None:
    """A normed input is made again."""
    if isinstance(source, NormSource):
        torch.empty_like(source.x)


def meta_decoder(shape: LlamaShape, fp8: Mode | None = None, training: Training | None = None) -> Decoder:
    """A decoder of bf16 weights with LoRA on all linears, or ``training`` all, as the bench makes it, that takes no memory."""
    sizes = dict(tensor_sizes(shape))
    if training is not None:
        place = Placement(META, torch.bfloat16, torch.float32, training=training)
        everything = build_weights(dict.fromkeys(sizes, RandomFile(sizes, "meta")), shape, place, None)
        ops = replace(
            ALLOCATIONS, weight_gradients=_full_weight_gradients, norm=_plain_norm, attention=_plain_attention, swiglu=_plain_swiglu
        )
        return Decoder(shape=shape, weights=everything, ops=ops, plans=(), loss_chunk=1)
    adapters = {name: torch.empty(size, device=META) for name, size in adapter_sizes(sizes).items()}
    placement = Placement(META, torch.bfloat16, torch.float32, RANK_MULTIPLE if fp8 else 64, fp8=fp8)
    weights = build_weights(dict.fromkeys(sizes, RandomFile(sizes, "meta")), shape, placement, Adapter({}, adapters, RANK, 2.0))
    return Decoder(shape=shape, weights=weights, ops=FP8_ALLOCATIONS if fp8 else ALLOCATIONS, plans=(), loss_chunk=1)


def transient_bytes(decoder: Decoder, load: Load, plans: Sequence[Plan]) -> int:
    """The most that a pass of ``plans`` allocates at one time, beside weights, optimizer and the packed row."""
    tokens, half = load.num_tokens, decoder.shape.head_dim // 2
    documents = tokens // load.longest
    ids = torch.empty(tokens, dtype=torch.int64, device=META)
    rows = torch.empty(load.num_rows, dtype=torch.int64, device=META)
    cosine, starts = torch.empty(tokens, half, device=META), torch.empty(documents + 1, dtype=torch.int32, device=META)
    bounds = torch.empty(tokens, dtype=torch.int32, device=META)
    row = Packed(ids, cosine, cosine, (load.longest,) * documents, starts, bounds, bounds, load.longest, rows, rows)
    scale = torch.empty((), device=META)
    with LiveBytes() as live:
        replace(decoder, plans=tuple(plans), loss_chunk=load.loss_chunk).accumulate(row, scale)
    return live.most
