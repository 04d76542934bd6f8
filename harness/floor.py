"""The least time that this machine needs for a step of a workload: its large products and its attention, nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from harness.data.tokens import TokenFile
from harness.flops import Linears, head_size, linears, squared_lengths
from harness.spec import DType, Lora, Spec, Workload

FLOOR_SCHEMA: Literal[1] = 1
# Modules that read the same input are one product at best.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Floor(Spec):
    """What was measured, in seconds a step, and how many tokens the mean step has.

    ``forward``: the linear modules of all layers and the head; ``backward``: the gradients of their inputs, and of their weights where
    these are trained; ``attention``: both, by the fastest implementation at hand, which ``attention_by`` names. Null: it could not be
    measured here, and then there is no floor. ``machine`` and ``workload``: their keys.
    """

    schema_version: Literal[1] = FLOOR_SCHEMA
    machine: str
    workload: str
    compute_dtype: DType
    tokens_per_step: float
    forward_seconds: float | None
    backward_seconds: float | None
    attention_seconds: float | None
    attention_by: str | None
    measured_utc: str
    torch: str

    @property
    def step_seconds(self) -> float | None:
        """The floor of a mean step; null when a part of it is not known."""
        parts = (self.forward_seconds, self.backward_seconds, self.attention_seconds)
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    @property
    def tokens_per_second(self) -> float | None:
        """The rate that no engine can pass here."""
        seconds = self.step_seconds
        return self.tokens_per_step / seconds if seconds else None


FloorKey = tuple[str, str]  # machine, workload
Floors = Mapping[FloorKey, Floor]


class Product(Spec):
    """``count`` products of ``rows`` inputs with a weight of [``out``, ``width``] a step. ``trained``: its gradient is needed too."""

    rows: float
    out: int
    width: int
    count: int
    trained: bool


class Attention(Spec):
    """``count`` layers of causal attention over ``documents`` of one ``length``, which have the tokens and squares of the mean step."""

    documents: float
    length: int
    heads: int
    key_heads: int
    size: int
    count: int


def shapes(config: Mapping[str, Any], workload: Workload, tokens: TokenFile) -> tuple[tuple[Product, ...], Attention, float]:
    """The products and the attention of the mean step, and its tokens. Raises UnsupportedError where the layers are not known."""
    layer = linears(config, workload.data.sequence_length)
    steps = workload.train.num_steps
    samples = [sample for step in range(steps) for sample in tokens.step(workload.train, step)]
    num_tokens, labels = sum(map(len, samples)) / steps, sum(sample.num_labels for sample in samples) / steps
    trained = not isinstance(workload.method, Lora)
    count, hidden = int(config["num_hidden_layers"]), int(config["hidden_size"])
    products = [Product(rows=num_tokens, out=out, width=width, count=count, trained=trained) for out, width in _grouped(layer)]
    head = Product(rows=labels, out=int(config["vocab_size"]), width=hidden, count=1, trained=trained)
    length = max(1, math.ceil(sum(squared_lengths(tokens, workload.train)) / steps / num_tokens))
    heads = int(config["num_attention_heads"])
    key_heads = 1 if config.get("model_type") == "falcon" else int(config.get("num_key_value_heads") or heads)
    attention = Attention(
        documents=num_tokens / length, length=length, heads=heads, key_heads=key_heads, size=head_size(config), count=count
    )
    return (*products, head), attention, num_tokens


def _grouped(layer: Linears) -> list[tuple[int, int]]:
    """[out, in] of the products of one layer, those that read the same input as one."""
    left = dict(layer)
    grouped = []
    for names in _TOGETHER:
        group = [left.pop(name) for name in names if name in left]
        if group:
            grouped.append((sum(out for out, _ in group), group[0][1]))
    return [*grouped, *left.values()]
