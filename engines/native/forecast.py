"""What a step of the house engine will need and how long it takes beside one that keeps everything, from shapes alone (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engines.native.durations import Durations
from engines.native.footprint import WORKSPACES, Load, MemoryModel, Ranks
from engines.native.plan import KEEP_ALL, KEEP_INPUT, USABLE, Plan, PlanningKnobs
from engines.native.planner import SLACK, Choice, choose, least
from engines.native.shape import LlamaShape, read_shape
from harness.engine import Footprint
from harness.errors import UnsupportedError
from harness.spec import Lora, LoraFp8, QLora, Workload

_ELEMENT = 2  # bytes of bfloat16
_NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # bytes of a value: its code, its share of an 8-bit scale and of that one's scale
_TRAINED, _MOMENTS = 16, 8  # bytes of a float32 master, its gradient and two moments; of the moments alone
_MULTIPLE = 64  # of padded ranks on a GPU
_PARTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def footprint(
    workload: Workload,
    config: Mapping[str, Any],
    knobs: PlanningKnobs,
    capacity_bytes: float | None,
    tokens: int,
    longest: int,
    processes: int = 1,
) -> Footprint | None:
    """What the planner expects of a pass on a GPU, every token supervised; None on a CPU, for all weights trained and for an 8-bit base.
    Ranks that gather a base are taken to hide that behind their products.
    """
    method = workload.method
    if knobs.operations != "fused" or capacity_bytes is None or not isinstance(method, Lora) or isinstance(method, LoraFp8):
        return None
    budget = knobs.memory_gib * 2**30 if knobs.memory_gib else USABLE * capacity_bytes
    load = Load(tokens, longest, tokens, knobs.loss_chunk)
    shape, host = read_shape(config, workload.data.sequence_length), math.inf if knobs.offload else 0.0
    parts = processes if knobs.base == "sharded" else 1
    return forecast(shape, method, load, recompute=knobs.recompute, budget_bytes=budget, host_bytes=host, parts=parts)


def forecast(
    shape: LlamaShape, method: Lora, load: Load, *, recompute: str, budget_bytes: float, host_bytes: float, parts: int = 1
) -> Footprint:
    """Of passes over ``load`` with adapters as ``method`` says, by one of as many ranks as the base has ``parts``. Where nothing fits into
    the budget: the least that would be needed.
    """
    movable = 0 if shape.tied_head else shape.vocab_size * shape.hidden_size * _ELEMENT
    static, loaded = _static(shape, method, load, parts)
    memory = MemoryModel(shape, _ranks(method), load, static, _ELEMENT, movable=movable, loaded=loaded)
    durations = Durations(memory)
    whole = durations.step([durations.layer(KEEP_ALL)] * shape.num_layers, load.loss_chunk)
    if recompute != "fit" or SLACK * memory.peak((KEEP_ALL,) * shape.num_layers) <= budget_bytes:
        plans: tuple[Plan, ...] = (KEEP_INPUT if recompute == "full" else KEEP_ALL,) * shape.num_layers
        seconds = durations.step([durations.layer(plan) for plan in plans], load.loss_chunk)
        return Footprint(memory.peak(plans), seconds, whole)
    try:
        found: Choice = choose(memory, budget_bytes, host_bytes)
    except UnsupportedError:
        found = least(memory, host_bytes)
    return Footprint(found.peak_bytes, found.seconds, whole)


def _groups(shape: LlamaShape) -> list[tuple[tuple[str, ...], tuple[int, ...], int]]:
    """Of a layer: the linears that read the same input, their output columns, and the input's."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    outputs = ((shape.query_size, shape.key_size, shape.key_size), (hidden,), (inner, inner), (hidden,))
    return list(zip(_PARTS, outputs, (hidden, shape.query_size, hidden, inner), strict=True))


def _padded(names: tuple[str, ...], method: Lora) -> int:
    count = sum(name in method.targets for name in names)
    return -(-count * method.rank // _MULTIPLE) * _MULTIPLE


def _ranks(method: Lora) -> Ranks:
    return Ranks(*(_padded(names, method) for names in _PARTS))


def _static(shape: LlamaShape, method: Lora, load: Load, parts: int) -> tuple[int, int]:
    """What is there all the time: weights, adapters and what trains them, angles, the packed row, workspaces. And of it what is there
    before the first step: all but moments, angles, the row and workspaces.
    """
    hidden, layers = shape.hidden_size, shape.num_layers
    ends = shape.vocab_size * hidden * (1 if shape.tied_head else 2)
    norms = (2 * layers + 1) * hidden + (2 * layers * shape.head_dim if shape.qk_norm else 0)
    base = trained = shared = 0.0
    for names, outputs, inputs in _groups(shape):
        room, columns = _padded(names, method), sum(outputs)
        adapted = sum(method.rank * (inputs + out) for name, out in zip(names, outputs, strict=True) if name in method.targets)
        trained += adapted
        part, buffers = _base(isinstance(method, QLora), columns, inputs, room, parts)
        base += part + (adapted * _ELEMENT if buffers else 0)  # beside a buffer that is shared A and B have copies of their own
        shared += buffers
    angles = 4 * shape.head_dim * (load.longest + load.num_tokens)
    loaded = (ends + norms) * _ELEMENT + layers * (base + trained * (_TRAINED - _MOMENTS)) + shared
    return int(loaded + layers * trained * _MOMENTS + angles + 32 * load.num_tokens + WORKSPACES), int(loaded)


def _base(in_nf4: bool, columns: int, inputs: int, room: int, parts: int) -> tuple[float, float]:
    """Bytes of a group that a rank keeps in every layer, and of the buffers that the groups of all layers share."""
    wide = (columns + room) * (inputs + room) * _ELEMENT
    if in_nf4:
        packed = columns * inputs * _NF4
        return packed / parts, wide + (packed if parts > 1 else 0)
    if parts == 1:
        return wide, 0
    rows = -(-columns // parts)
    return rows * (inputs + room) * _ELEMENT, max(columns + room, parts * rows) * (inputs + room) * _ELEMENT
