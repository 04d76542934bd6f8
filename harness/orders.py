"""One function with its sums in other orders: a Llama whose hidden and inner dimensions, which nobody can tell apart, are permuted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.data.tokens import IGNORE, Sample

NUM_ORDERS = 8
UNCHANGED = 2e-5  # relative: in fp32 another order of sums was seen to move a first loss by 4e-7 (SmolLM2-135M, docs/decisions/0029)
_READ = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
_WRITTEN = ("o_proj", "down_proj")
_OF_A_HEAD = ("q_norm", "k_norm")


def first_losses(model: Any, samples: Sequence[Sample]) -> tuple[float, tuple[float, ...]]:
    """(The mean loss of ``model``, which is in fp32, over the supervised tokens of ``samples``; the same in bf16 in NUM_ORDERS orders.)

    No orders where the model is another function after its dimensions were permuted. Leaves ``model`` permuted and in bf16.
    """
    generator = torch.Generator().manual_seed(0)
    exact = mean_loss(model, samples)
    reorder(model, generator)
    if not abs(mean_loss(model, samples) - exact) <= UNCHANGED * abs(exact):
        return exact, ()
    for weight in model.parameters():  # not the buffers: rotary frequencies stay in fp32
        weight.data = weight.data.to(torch.bfloat16)
    rounded = []
    for _ in range(NUM_ORDERS):
        rounded.append(mean_loss(model, samples))
        reorder(model, generator)
    return exact, tuple(rounded)


def mean_loss(model: Any, samples: Sequence[Sample]) -> float:
    """The mean over all supervised tokens of ``samples``, one document after the other; logits in fp32."""
    total, count = 0.0, 0
    for sample in samples:
        ids, targets = (torch.from_numpy(each.astype("int64")).to(model.device) for each in (sample.input_ids, sample.labels))
        with torch.inference_mode():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            losses = functional.cross_entropy(logits, targets[1:], reduction="none")
        total += float(losses.double().sum())
        count += int((targets[1:] != IGNORE).sum())
    return total / count


def reorder(model: Any, generator: torch.Generator) -> None:
    """Permute the hidden dimensions of ``model`` and the inner ones of each of its layers, in place. What is named or sized otherwise than
    a Llama's stays as it is, which changes the function.
    """
    hidden_size, inner_size = (int(getattr(model.config, name, 0) or 0) for name in ("hidden_size", "intermediate_size"))
    hidden, inner = torch.randperm(hidden_size, generator=generator), dict[str, Tensor]()
    for name, weight in model.named_parameters():  # a tied head is its embedding, and named once
        layer = name.partition(".layers.")[2].partition(".")[0]
        if layer and layer not in inner:
            inner[layer] = torch.randperm(inner_size, generator=generator)
        weight.data = _permuted(name, weight.data, hidden, inner.get(layer))


def _permuted(name: str, weight: Tensor, hidden: Tensor, inner: Tensor | None) -> Tensor:
    module = name.split(".")[-2]
    if module in ("gate_proj", "up_proj") and inner is not None:
        weight = _along(weight, 0, inner)
    if module == "down_proj" and inner is not None:
        weight = _along(weight, 1, inner)
    if module in _READ:
        return _along(weight, 1, hidden)
    is_norm = "norm" in module and module not in _OF_A_HEAD
    return _along(weight, 0, hidden) if is_norm or module in _WRITTEN else weight


def _along(weight: Tensor, dim: int, order: Tensor) -> Tensor:
    """``weight`` with that dimension in another order; as it is where it has none of this size (a bias of what is permuted otherwise)."""
    fits = dim < weight.dim() and weight.shape[dim] == len(order)
    return weight.index_select(dim, order.to(weight.device)) if fits else weight
