"""What a workload's memory is made of, from the shape of its model alone: where every search begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.data.tokens import TokenFile, chunks
from harness.engine import Machine
from harness.errors import ConfigError
from harness.plan import BYTES, NF4_BYTES, linear_parameters, num_parameters
from harness.spec import Full, QLora, Workload
from harness.tune.memory_model import Scale
from harness.tune.space import Facts

_LOGIT_BYTES = 16.0  # of one logit in a loss that holds all: half precision, float32, its softmax and its gradient (H100, transformers)
_GUESS = 34 * 2.0  # bytes of a position and a column of the hidden state (Korthikanti et al. 2022), where layers are of another kind
_CONTEXT_GIB = 1.0  # of a GPU without a cap: what is not the allocator's


def scale_of(config: Mapping[str, Any], workload: Workload) -> Scale:
    """From a transformers ``config``. Raises ConfigError where it lacks the sizes of a decoder."""
    hidden, layers, vocabulary = (config.get(name) for name in ("hidden_size", "num_hidden_layers", "vocab_size"))
    if not (isinstance(hidden, int) and isinstance(layers, int) and isinstance(vocabulary, int)):
        raise ConfigError("model.config: hidden_size, num_hidden_layers and vocab_size are needed to predict memory")
    inner = config.get("intermediate_size")
    width = 2.0 * (10 * hidden + 4 * inner) if isinstance(inner, int) else _GUESS * hidden
    return Scale(_weights(config, workload), layers * width, vocabulary * _LOGIT_BYTES)


def _weights(config: Mapping[str, Any], workload: Workload) -> float:
    """Bytes that are there all the time: the base, and of full fine-tuning gradients and two moments; 0 where nobody counts them."""
    count, stored, method = num_parameters(config), BYTES[workload.model.dtype], workload.method
    if count is None:
        return 0.0
    if isinstance(method, Full):
        return 4.0 * count * BYTES[method.dtype]
    quantised = int(config["num_hidden_layers"]) * linear_parameters(config) if isinstance(method, QLora) else 0
    return count * stored - quantised * (stored - NF4_BYTES)


def dense_facts(workload: Workload, micro_batch: int) -> Facts:
    """Where all samples have one length there is nothing to lay out."""
    samples, length = workload.train.samples_per_step, workload.data.sequence_length
    return Facts(positions=samples * length, num_passes=-(-samples // micro_batch), largest=min(micro_batch, samples) * length)


def token_facts(workload: Workload, tokens: TokenFile, micro_batch: int, layout: str) -> Facts:
    """From the lengths of every sample of the whole run; ``layout`` padded: each micro-batch to its longest."""
    train = workload.train
    num_steps, positions, passes, largest = train.steps, 0, 0, 0
    for step in range(num_steps):
        for group in chunks(tokens.step(train, step), micro_batch):
            lengths = [len(sample) for sample in group]
            size = sum(lengths) if layout == "packed" else len(lengths) * max(lengths)
            positions, passes, largest = positions + size, passes + 1, max(largest, size)
    return Facts(positions=positions / num_steps, num_passes=passes / num_steps, largest=largest)


def capacity_bytes(machine: Machine) -> float | None:
    """What an allocator may hold on one accelerator; None on a CPU, whose memory is not ours alone."""
    if machine.device == "cpu":
        return None
    return (machine.memory_cap_gib or machine.memory_gib - _CONTEXT_GIB) * 2**30
