"""The floating-point operations of a training step, counted from shapes and document lengths, and what devices could do at best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from harness.data.tokens import TokenFile, epoch_order
from harness.errors import UnsupportedError
from harness.record import Work
from harness.spec import Lora, Train, Workload

_TERA = 10**12
# Dense bfloat16 with fp32 accumulation, by the exact name that NVML gives, from NVIDIA's data sheets (with sparsity they say twice as
# much). A name that is not here has no peak: cards of one family differ by more than what is measured.
PEAK_FLOPS: Mapping[str, float] = {
    "NVIDIA A100-SXM4-40GB": 312 * _TERA,
    "NVIDIA A100-SXM4-80GB": 312 * _TERA,
    "NVIDIA A100-PCIE-40GB": 312 * _TERA,
    "NVIDIA A100 80GB PCIe": 312 * _TERA,
    "NVIDIA A10": 125 * _TERA,
    "NVIDIA L4": 121 * _TERA,
    "NVIDIA L40S": 362 * _TERA,
    "NVIDIA H100 80GB HBM3": 989.4 * _TERA,
    "NVIDIA H100 PCIe": 756 * _TERA,
    "NVIDIA H200": 989.4 * _TERA,
    "NVIDIA B200": 2250 * _TERA,
    "NVIDIA GeForce RTX 3090": 71 * _TERA,
    "NVIDIA GeForce RTX 4090": 165.2 * _TERA,
    "NVIDIA GeForce RTX 5090": 209.5 * _TERA,
}
_LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")

Linears = dict[str, tuple[int, int]]


def work(config: Mapping[str, Any], workload: Workload, tokens: TokenFile, recomputed_fraction: float | None) -> Work:
    """The terms that the operations of ``workload`` are counted from; ``config`` is the base's config.json.

    Raises UnsupportedError that says why this model's operations are not known.
    """
    layer = linears(config, workload.data.sequence_length)
    num_layers = int(config["num_hidden_layers"])
    return Work(
        convention="palm",
        layer_parameters=num_layers * sum(rows * columns for rows, columns in layer.values()),
        head_parameters=int(config["vocab_size"]) * int(config["hidden_size"]),
        adapter_parameters=num_layers * _adapter_parameters(layer, workload),
        attention_size=num_layers * int(config["num_attention_heads"]) * head_size(config),
        squared_lengths=squared_lengths(tokens, workload.train),
        recomputed_fraction=recomputed_fraction,
    )


def linears(config: Mapping[str, Any], longest: int) -> Linears:
    """[out, in] of the linear modules of one layer, by module name. Raises UnsupportedError where attention or layers are others.

    ``longest``: tokens of the longest document; attention over a shorter window is not counted here.
    """
    kind = config.get("model_type")
    known = {**dict.fromkeys(_LLAMA_FAMILY, _llama), "falcon": _falcon}
    if kind not in known:
        raise UnsupportedError(f"no formula for the operations of model_type '{kind}' (there is one for {', '.join(known)})")
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [key for key in needed if not isinstance(config.get(key), int)]
    if missing:
        raise UnsupportedError(f"config.json of the base says nothing of {', '.join(missing)}")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and window < longest:
        raise UnsupportedError(f"no formula for attention in a sliding window ({window}) shorter than the documents ({longest})")
    return known[kind](config)


def squared_lengths(tokens: TokenFile, train: Train) -> tuple[int, ...]:
    """The sum over a step's documents of their squared lengths, for every step; only lengths are read."""
    lengths = np.diff(tokens.train.offsets)
    size, per_step = len(lengths), train.samples_per_step
    found = []
    for step in range(train.num_steps):
        places = (divmod(number, size) for number in range(step * per_step, (step + 1) * per_step))
        found.append(sum(int(lengths[epoch_order(train.seed, epoch, size)[place]]) ** 2 for epoch, place in places))
    return tuple(found)


def head_size(config: Mapping[str, Any]) -> int:
    """Columns of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def step_flops(of: Work, step: int, tokens: int, labels: int, *, lora: bool, causal: bool = False) -> float:
    """Operations that step ``step`` needs, whatever is recomputed.

    A product with N parameters takes 2 N forward, 2 N for the gradient of its input and, where it is trained, 2 N for that of its
    weight. The head counts by labels. Attention takes 4 x size x squared length forward and twice that backward; ``causal`` halves it.
    """
    passes = 4 if lora else 6
    products = tokens * (passes * of.layer_parameters + 6 * of.adapter_parameters) + labels * passes * of.head_parameters
    return products + 12 * of.attention_size * of.squared_lengths[step] * (0.5 if causal else 1.0)


def recomputed_flops(of: Work, step: int, tokens: int) -> float | None:
    """Operations of step ``step`` that were done again in the backward pass, by what the engine says; null when it does not."""
    if of.recomputed_fraction is None:
        return None
    forward = 2 * tokens * (of.layer_parameters + of.adapter_parameters) + 4 * of.attention_size * of.squared_lengths[step]
    return of.recomputed_fraction * forward


def _adapter_parameters(layer: Linears, workload: Workload) -> int:
    method = workload.method
    if not isinstance(method, Lora):
        return 0
    unknown = sorted(set(method.targets) - set(layer))
    if unknown:
        raise UnsupportedError(f"no formula for the operations of adapters on {', '.join(unknown)}")
    return sum(method.rank * sum(layer[name]) for name in method.targets)


def _llama(config: Mapping[str, Any]) -> Linears:
    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], head_size(config)
    keys = int(config.get("num_key_value_heads") or heads) * size
    inner = config.get("intermediate_size")
    if not isinstance(inner, int):
        raise UnsupportedError("config.json of the base says nothing of intermediate_size")
    return {
        "q_proj": (heads * size, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, heads * size),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def _falcon(config: Mapping[str, Any]) -> Linears:
    if config.get("new_decoder_architecture") or not config.get("multi_query", True):
        raise UnsupportedError("a formula for falcon's operations exists for its first layers only (multi_query, 7B)")
    hidden = config["hidden_size"]
    inner = int(config.get("ffn_hidden_size") or 4 * hidden)
    return {
        "query_key_value": (hidden + 2 * head_size(config), hidden),
        "dense": (hidden, hidden),
        "dense_h_to_4h": (inner, hidden),
        "dense_4h_to_h": (hidden, inner),
    }
