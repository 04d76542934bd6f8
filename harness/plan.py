"""Which cells still need running, in which order, why others cannot, and what it will take; answered before any process starts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.config import Request
from harness.engine import Machine, load
from harness.fingerprint import engine_fingerprint
from harness.machine import detect
from harness.record import Record, Status
from harness.spec import DType, Full, Lora, parse

Rerun = Literal["missing", "stale", "all"]
RETRIED: frozenset[Status] = frozenset({"timeout", "no_progress", "crash", "contended", "unsteady"})  # accidents; the others are answers
BYTES: Mapping[DType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Planned:
    """A cell, the machine it is for, and what to do with it: ``run``, ``done`` (recorded) or ``unsupported`` (with the reason).

    ``seconds`` is a prediction from earlier records of this engine, model and method here, None without one.
    """

    request: Request
    machine: Machine
    action: Literal["run", "done", "unsupported"]
    reason: str | None
    seconds: float | None


def plan(requests: Sequence[Request], records: Sequence[Record], rerun: Rerun) -> list[Planned]:
    """Decide on every request, in the order they are to be run: blocks of one repeat, their order reversed in the next."""
    latest = {(record.machine.key, record.cell.key): record for record in records}
    return [_decide(request, records, latest, rerun) for request in _interleaved(_distinct(requests))]


def _distinct(requests: Sequence[Request]) -> list[Request]:
    return list({(request.machine.device, request.cell.key): request for request in requests}.values())


def _interleaved(requests: Sequence[Request]) -> list[Request]:
    """ABBA: every variant of a workload once, then once more in reverse, so that drift favours none of them."""
    blocks: dict[tuple[str, int], list[Request]] = defaultdict(list)
    order: dict[str, None] = {}
    for request in requests:
        workload = request.cell.workload.key
        order[workload] = None
        blocks[workload, request.cell.repeat].append(request)
    ordered = []
    for workload in order:
        for place, repeat in enumerate(sorted(repeat for key, repeat in blocks if key == workload)):
            block = blocks[workload, repeat]
            ordered += block if place % 2 == 0 else block[::-1]
    return ordered


def _decide(request: Request, records: Sequence[Record], latest: Mapping[tuple[str, str], Record], rerun: Rerun) -> Planned:
    cell = request.cell
    try:
        machine = detect(request.machine.device, count=cell.engine.processes, memory_cap_gib=request.machine.memory_cap_gib)
    except LookupError as error:
        here = detect("cpu")
        return Planned(request, here, "unsupported", f"{error}; choose machine=cpu or another machine", None)
    engine = load(cell.engine)
    knobs = parse(engine.Knobs, cell.engine.knobs, at="engine.knobs")
    if reason := engine.unsupported(cell.workload, knobs, machine):
        return Planned(request, machine, "unsupported", reason, None)
    known = latest.get((machine.key, cell.key))
    seconds = _predicted_seconds(request, machine, records)
    if known is not None and not _needs_rerun(known, request, rerun):
        return Planned(request, machine, "done", known.status if known.status != "ok" else None, seconds)
    return Planned(request, machine, "run", None, seconds)


def _needs_rerun(known: Record, request: Request, rerun: Rerun) -> bool:
    if rerun == "all" or known.status in RETRIED:
        return True
    current = engine_fingerprint(request.cell.engine.module, request.python, request.packages)
    return rerun == "stale" and known.provenance.engine_fingerprint != current


def _predicted_seconds(request: Request, machine: Machine, records: Sequence[Record]) -> float | None:
    """Start-up and seconds a step of the latest comparable record, scaled to this many steps."""
    cell = request.cell
    for record in reversed(records):
        other = record.cell
        same = (
            record.machine.key == machine.key
            and other.engine.name == cell.engine.name
            and other.workload.model.name == cell.workload.model.name
            and other.workload.method.name == cell.workload.method.name
        )
        if same and record.status == "ok" and record.measurement:
            steps = record.measurement.steps
            processed = sum(steps.seconds) / max(1, sum(steps.tokens_input))
            samples = len(steps.seconds) * other.workload.train.samples_per_step
            tokens = sum(steps.tokens_input) / max(1, samples) * cell.workload.train.samples_per_step * cell.workload.train.steps
            return record.provenance.wall_seconds - sum(steps.seconds) + processed * tokens
    return None


def num_parameters(config: Mapping[str, object]) -> int | None:
    """Parameters of a Llama-family ``config`` (embedding, layers, head); None when the architecture is another."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    values = [config.get(name) for name in names]
    if not all(isinstance(value, int) for value in values):
        return None
    hidden, inner, layers, heads, vocabulary = (int(str(value)) for value in values)
    head = int(str(config.get("head_dim") or hidden // heads))
    groups = int(str(config.get("num_key_value_heads") or heads))
    layer = hidden * head * (2 * heads + 2 * groups) + 3 * hidden * inner + 2 * hidden
    tied = bool(config.get("tie_word_embeddings", False))
    return layers * layer + hidden + vocabulary * hidden * (1 if tied else 2)


def weights_bytes(request: Request) -> int | None:
    """Bytes of the stored base weights; None when the architecture is not known before loading."""
    model = request.cell.workload.model
    count = num_parameters(model.config) if model.config else None
    return None if count is None else count * BYTES[model.dtype]


def least_memory_bytes(request: Request) -> int | None:
    """What training holds at the very least: the weights, and for full fine-tuning fp32 gradients and two AdamW moments besides."""
    stored = weights_bytes(request)
    method = request.cell.workload.method
    if stored is None or isinstance(method, Lora):
        return stored
    assert isinstance(method, Full)
    return stored // BYTES[request.cell.workload.model.dtype] * 4 * BYTES[method.dtype]
