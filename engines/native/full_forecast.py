"""What a step of the house engine will need where every weight is trained, from shapes alone (no torch): beside forecast.py, whose source
is part of what the engine's records depend on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain
from typing import Any, Protocol

from engines.native.durations import Durations
from engines.native.footprint import WORKSPACES, Load, MemoryModel, Ranks
from engines.native.plan import KEEP_ALL, KEEP_INPUT, USABLE, Plan, PlanningKnobs
from engines.native.planner import SLACK, choose, least
from engines.native.shape import LlamaShape, read_shape
from harness.engine import Footprint
from harness.errors import UnsupportedError
from harness.spec import Full, Workload

_ELEMENT, _FLOAT = 2, 4  # bytes of bfloat16, which products read; of a master, of a gradient and of a moment
_BLOCK = 256  # values of a store that a weight takes whole numbers of, and that share the scale of an 8-bit moment


class FullKnobs(PlanningKnobs, Protocol):
    """Of an engine that plans, and that trains everything."""

    @property
    def micro_batch(self) -> int:
        """Samples of a pass."""

    @property
    def optimizer_state(self) -> str:
        """fp32: masters and moments in float32; int8: 8-bit moments beside the weights alone."""


def footprint(
    workload: Workload,
    config: Mapping[str, Any],
    knobs: FullKnobs,
    capacity_bytes: float | None,
    tokens: int,
    longest: int,
    processes: int = 1,
) -> Footprint | None:
    """What the planner expects of a pass on a GPU, every token supervised; None on a CPU and for other methods. Where nothing fits into the
    budget: the least that would be needed.
    """
    if knobs.operations != "fused" or capacity_bytes is None or not isinstance(workload.method, Full):
        return None
    shape, train = read_shape(config, workload.data.sequence_length), workload.train
    load = Load(tokens, longest, tokens, knobs.loss_chunk)
    in_backward = train.max_grad_norm is None and processes == 1 and train.samples_per_step <= knobs.micro_batch
    stored, moments = _stored(shape, knobs.optimizer_state, in_backward=in_backward)
    static = stored + moments + 4 * shape.head_dim * (load.longest + load.num_tokens) + 32 * load.num_tokens + WORKSPACES
    memory = MemoryModel(shape, Ranks(0, 0, 0, 0), load, static, _ELEMENT, loaded=stored)
    budget = knobs.memory_gib * 2**30 if knobs.memory_gib else USABLE * capacity_bytes
    peak, seconds, whole = _planned(memory, knobs.recompute, budget, math.inf if knobs.offload else 0.0)
    gradients = _gradient_seconds(memory)
    return Footprint(peak, seconds + gradients, whole + gradients)


def _planned(memory: MemoryModel, recompute: str, budget: float, host: float) -> tuple[int, float, float]:
    """Peak and seconds of what will be kept, and seconds if everything were; the gradients of weights left out."""
    count, chunk, durations = memory.shape.num_layers, memory.load.loss_chunk, Durations(memory)
    whole = durations.step([durations.layer(KEEP_ALL)] * count, chunk)
    plans: tuple[Plan, ...] = (KEEP_INPUT if recompute == "full" else KEEP_ALL,) * count
    if recompute != "fit" or SLACK * memory.peak(plans) <= budget:
        return memory.peak(plans), durations.step([durations.layer(plan) for plan in plans], chunk), whole
    try:
        found = choose(memory, budget, host)
    except UnsupportedError:
        found = least(memory, host)
    return found.peak_bytes, found.seconds, whole


def _gradient_seconds(memory: MemoryModel) -> float:
    """The products that make the gradients of the weights, at the pace of gate and up."""
    shape = memory.shape
    weights = shape.num_layers * shape.layer_parameters + shape.vocab_size * shape.hidden_size
    return Durations(memory).of("gate_up") * weights / (2 * shape.hidden_size * shape.intermediate_size)


def _stored(shape: LlamaShape, state: str, *, in_backward: bool) -> tuple[int, int]:
    """Bytes of weights, masters and gradients; and of both moments."""
    embedding, layer, head = (sum(-(-size // _BLOCK) * _BLOCK for size in section) for section in _sections(shape))
    count = embedding + shape.num_layers * layer + head
    # Held inside backward are one layer's, and those of the ends: one after the other, where the head is not the embedding.
    held = layer + (embedding + head if shape.tied_head else max(embedding, head)) if in_backward else count
    masters, moments = (0, 2 * (count + _FLOAT * count // _BLOCK)) if state == "int8" else (_FLOAT * count, 2 * _FLOAT * count)
    return _ELEMENT * count + masters + _FLOAT * held, moments


def _sections(shape: LlamaShape) -> tuple[list[int], list[int], list[int]]:
    """Values of every weight of the embedding, of a layer, and of the head with the last norm; linears that read the same are one."""
    hidden, inner, queries, keys = shape.hidden_size, shape.intermediate_size, shape.query_size, shape.key_size
    linears = (
        (queries + 2 * keys, hidden, shape.qkv_bias),
        (hidden, queries, shape.output_bias),
        (2 * inner, hidden, shape.mlp_bias),
        (hidden, inner, shape.mlp_bias),
    )
    weights = chain.from_iterable((out * width, out) if bias else (out * width,) for out, width, bias in linears)
    norms = [hidden, hidden, *([shape.head_dim] * 2 if shape.qk_norm else [])]
    ends = shape.vocab_size * hidden
    return [ends], [*norms, *weights], [hidden, *([] if shape.tied_head else [ends])]
