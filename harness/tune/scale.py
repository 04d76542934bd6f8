"""What a workload's memory is made of, from the shape of its model alone: where every search begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.data.tokens import TokenFile, epoch_order
from harness.engine import Engine, Machine, footprint
from harness.errors import ConfigError, UnsupportedError
from harness.flops import linears
from harness.plan import BYTES, NF4_BYTES, num_parameters
from harness.spec import Full, Lora, QLora, Workload
from harness.tune.space import Facts, Scale

_LOGIT_BYTES = 16.0  # of one logit in a loss that holds all: half precision, float32, its softmax and its gradient (H100, transformers)
_GUESS = 34 * 2.0  # bytes of a position and a column of the hidden state (Korthikanti et al. 2022), where layers are of another kind
CONTEXT_GIB = 1.0  # of a GPU without a cap: what is not the allocator's


def scale_of(config: Mapping[str, Any], workload: Workload, stored_bytes: int | None = None) -> Scale:
    """From a transformers ``config``; ``stored_bytes``: of the base's files, for an architecture whose weights nobody counts. Raises
    ConfigError where it lacks the sizes of a decoder.
    """
    hidden, layers, vocabulary = (config.get(name) for name in ("hidden_size", "num_hidden_layers", "vocab_size"))
    if not (isinstance(hidden, int) and isinstance(layers, int) and isinstance(vocabulary, int)):
        raise ConfigError("model.config: hidden_size, num_hidden_layers and vocab_size are needed to predict memory")
    inner = config.get("intermediate_size")
    width = 2.0 * (10 * hidden + 4 * inner) if isinstance(inner, int) else _GUESS * hidden
    working = width + 2.0 * (inner if isinstance(inner, int) else 4 * hidden)  # the layer made again, and a gradient as wide as its MLP
    return Scale(_weights(config, workload, stored_bytes), layers * width, vocabulary * _LOGIT_BYTES, working, _trained(config, workload))


def sized(model: Mapping[str, Any], workload: Workload) -> Scale:
    """The scale of a workload, with the operations of a position: what times of several workloads have in common."""
    scale = scale_of(model, workload)
    try:
        layer = linears(model, workload.data.sequence_length)
    except UnsupportedError as error:
        raise ConfigError(f"model.config: {error}") from error
    passes = 4 if isinstance(workload.method, Lora) else 6
    weights = int(model["num_hidden_layers"]) * sum(out * width for out, width in layer.values())
    heads = int(model["num_attention_heads"]) * int(model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"])
    attention = 12 * int(model["num_hidden_layers"]) * heads * workload.data.sequence_length / 2
    flops = passes * (weights + int(model["vocab_size"]) * int(model["hidden_size"])) + attention
    return replace(scale, flops=flops, num_layers=int(model["num_hidden_layers"]))


def _trained(config: Mapping[str, Any], workload: Workload) -> float:
    """Bytes of adapters, of their gradients and their two moments; 0 where the layers are of an unknown form."""
    method = workload.method
    if isinstance(method, Full):
        return 0.0  # counted with the weights
    try:
        shapes = linears(config, 1)  # whatever the window of its attention
    except UnsupportedError:
        return 0.0  # layers of another kind: left to what the measured cells say of the constant
    width = sum(sum(shapes[name]) for name in method.targets if name in shapes)
    return 4.0 * BYTES[method.dtype] * int(config["num_hidden_layers"]) * method.rank * width


def _weights(config: Mapping[str, Any], workload: Workload, stored_bytes: int | None) -> float:
    """Bytes that are there all the time: the base, and of full fine-tuning gradients and two moments; 0 where nobody counts them."""
    stored, method, linear = BYTES[workload.model.dtype], workload.method, _linear_parameters(config)
    count = num_parameters(config)
    if count is None and linear is not None:  # norms and biases are next to nothing
        count = linear + config["vocab_size"] * config["hidden_size"] * (1 if config.get("tie_word_embeddings") else 2)
    if count is None:
        count = (stored_bytes or 0) // stored
    if isinstance(method, Full):
        return 4.0 * count * BYTES[method.dtype]
    quantised = (linear or 0) if isinstance(method, QLora) else 0
    return count * stored - quantised * (stored - NF4_BYTES)


def _linear_parameters(config: Mapping[str, Any]) -> int | None:
    """Of all layers' linear modules; None where the layers are of an unknown form."""
    try:
        return int(config["num_hidden_layers"]) * sum(rows * columns for rows, columns in linears(config, 1).values())
    except UnsupportedError:
        return None


def dense_facts(workload: Workload, micro_batch: int) -> Facts:
    """Where all samples have one length there is nothing to lay out."""
    samples, length = workload.train.samples_per_step, workload.data.sequence_length
    return Facts(positions=samples * length, num_passes=-(-samples // micro_batch), largest=min(micro_batch, samples) * length)


def token_facts(workload: Workload, tokens: TokenFile, micro_batch: int, layout: str) -> tuple[Facts, tuple[float, ...]]:
    """From the length of every sample of the whole planned run, and the positions of each of its steps. ``layout`` padded: each micro-batch
    to its longest sample; packed: without padding.
    """
    lengths = _lengths(workload, tokens)
    passes = [lengths[:, start : start + micro_batch] for start in range(0, lengths.shape[1], micro_batch)]
    sizes = [group.sum(1) if layout == "packed" else group.shape[1] * group.max(1) for group in passes]
    steps = np.sum(sizes, axis=0)
    largest = max(int(size.max()) for size in sizes)
    return Facts(positions=float(steps.mean()), num_passes=len(passes), largest=largest), tuple(float(size) for size in steps)


def _lengths(workload: Workload, tokens: TokenFile) -> npt.NDArray[np.int64]:
    """Tokens of every sample that the planned run consumes [steps, samples]."""
    train, size = workload.train, len(tokens.train)
    sizes, wanted = np.diff(tokens.train.offsets), workload.train.steps * train.samples_per_step
    epochs = [sizes[epoch_order(train.seed, epoch, size)] for epoch in range(-(-wanted // size))]
    return np.concatenate(epochs)[:wanted].reshape(train.steps, train.samples_per_step)


def with_footprint(
    facts: Facts,
    engine: Engine[Any],
    workload: Workload,
    config: Mapping[str, Any],
    knobs: Mapping[str, Any],
    capacity: float | None,
    processes: int = 1,
    forecast: str | None = None,
) -> Facts:
    """``facts`` with what an engine that plans its own memory expects of itself, in each of so many processes. ``forecast``: as its YAML
    has it.
    """
    longest = min(workload.data.sequence_length, int(facts.largest))
    own = footprint(engine, workload, config, knobs, capacity, int(facts.largest), longest, processes, forecast)
    return facts if own is None else replace(facts, own_bytes=float(own.peak_bytes), own_seconds=own.seconds / own.unhurried)


def capacity_bytes(machine: Machine) -> float | None:
    """What an allocator may hold on one accelerator; None on a CPU, whose memory is not ours alone."""
    if machine.device == "cpu":
        return None
    return (machine.memory_cap_gib or machine.memory_gib - CONTEXT_GIB) * 2**30
