"""Which cells still need running, in which order, why others cannot, and what it will take; answered before any process starts."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.config import Request
from harness.engine import Machine, load, requires, resumes
from harness.fingerprint import engine_fingerprint
from harness.interpreter import lack
from harness.machine import cap_refused, detect
from harness.record import TRAINED, Record, Status
from harness.spec import Cell, DType, Full, Lora, LoraFp8, Model, QLora, parse

Rerun = Literal["missing", "stale", "all"]
Weights = Callable[[Record], bool]
_OTHERS = "set save_every=null, or choose an engine that does (harness.tune with save_every=… searches those alone)"
RETRIED: frozenset[Status] = frozenset({"timeout", "no_progress", "crash", "contended", "unsteady"})  # accidents; the others are answers
BYTES: Mapping[DType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # of one value: its code, its share of an 8-bit scale and of that one's scale


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


@dataclass(frozen=True, slots=True)
class _Known:
    """What a plan looks up for every cell, read once a plan: an engine edited while a plan is made counts from the next one.

    ``latest``: by machine and cell. ``timed``: the latest that ended ok, by machine, engine, model and method.
    """

    latest: Mapping[tuple[str, str], Record]
    timed: Mapping[tuple[str, str, str, str], Record]
    machine: Callable[[Literal["cpu", "cuda"], int, int | None], tuple[Machine, str | None]]
    fingerprint: Callable[[str, str | None, tuple[str, ...]], str]
    weights: Weights | None


def plan(requests: Sequence[Request], records: Sequence[Record], rerun: Rerun, weights: Weights | None = None) -> list[Planned]:
    """Decide on every request, in the order they are to be run: blocks of one repeat, their order reversed in the next.

    ``weights``: where they are what is wanted, whether those of a record are still there. A cell without them runs again; one with them
    does not, only because its times are not to be trusted.
    """
    known = _Known(
        latest={(record.machine.key, record.cell.key): record for record in records},
        timed={_kind(record.machine, record.cell): record for record in records if _is_whole(record)},
        machine=functools.cache(_machine),
        fingerprint=functools.cache(engine_fingerprint),
        weights=weights,
    )
    return [_decide(request, known, rerun) for request in _interleaved(_distinct(requests))]


def _is_whole(record: Record) -> bool:
    """Whether its times are those of one run from start to end."""
    return record.status == "ok" and record.measurement is not None and not record.measurement.resumed_at


def _distinct(requests: Sequence[Request]) -> list[Request]:
    """Each cell once a machine, of which an emulated cap makes another."""
    return list({(*_place(request), request.cell.key): request for request in requests}.values())


def _place(request: Request) -> tuple[object, ...]:
    machine = request.machine
    return machine.device, machine.memory_cap_gib, machine.nodes.count


def _interleaved(requests: Sequence[Request]) -> list[Request]:
    """ABBA: every variant of a workload once, then once more in reverse, so that drift favours none of them."""
    blocks: dict[str, dict[int, list[Request]]] = defaultdict(lambda: defaultdict(list))
    for request in requests:
        blocks[request.cell.workload.key][request.cell.repeat].append(request)
    ordered = []
    for repeats in blocks.values():
        for place, repeat in enumerate(sorted(repeats)):
            block = repeats[repeat]
            ordered += block if place % 2 == 0 else block[::-1]
    return ordered


def _machine(device: Literal["cpu", "cuda"], count: int, memory_cap_gib: int | None) -> tuple[Machine, str | None]:
    """The machine for such a cell, or the host's CPU and why there is none."""
    try:
        return detect(device, count=count, memory_cap_gib=memory_cap_gib), None
    except LookupError as error:
        fewer = "set engine.processes to what is there, or " if count > 1 else ""
        return detect("cpu"), f"{error}; {fewer}choose machine=cpu or another machine"


def _decide(request: Request, known: _Known, rerun: Rerun) -> Planned:
    cell, nodes = request.cell, request.machine.nodes.count
    machine, absent = known.machine(request.machine.device, -(-cell.engine.processes // nodes), request.machine.memory_cap_gib)
    if nodes > 1:
        machine = machine.model_copy(update={"nodes": nodes, "count": machine.count * nodes})
    if refused := absent or cap_refused(machine) or _nodes_reason(request, rerun):
        return Planned(request, machine, "unsupported", refused, None)
    engine = load(cell.engine)
    knobs = parse(engine.Knobs, cell.engine.knobs, at="engine.knobs")
    if reason := engine.unsupported(cell.workload, knobs, machine):
        return Planned(request, machine, "unsupported", reason, None)
    if request.save_every is not None and not resumes(engine):
        return Planned(request, machine, "unsupported", f"{cell.engine.name} writes no checkpoints; {_OTHERS}", None)
    if missing := lack(request.python, requires(engine)):
        return Planned(request, machine, "unsupported", str(missing), None)
    record = known.latest.get((machine.key, cell.key))
    seconds = _predicted_seconds(cell, known.timed.get(_kind(machine, cell)))
    if record is not None and not _needs_rerun(record, request, known, rerun):
        return Planned(request, machine, "done", record.status if record.status != "ok" else None, seconds)
    return Planned(request, machine, "run", None, seconds)


def _nodes_reason(request: Request, rerun: Rerun) -> str | None:
    """Why these hosts cannot run ``request`` together."""
    nodes, processes = request.machine.nodes.count, request.cell.engine.processes
    if nodes == 1:
        return None
    if processes % nodes:
        return f"engine.processes={processes} cannot be shared evenly by {nodes} nodes; use a multiple of {nodes}"
    if rerun != "all":
        return f"{nodes} nodes must run the same cells, whatever each has recorded; set rerun=all"
    return "save_every needs one folder that all nodes see, which has not been tried; set save_every=null" if request.save_every else None


def _needs_rerun(record: Record, request: Request, known: _Known, rerun: Rerun) -> bool:
    refused = record.status == "unsupported" and record.provenance.wall_seconds == 0  # by a plan, for a reason that no longer holds
    if rerun == "all" or refused or _lacks(record, known.weights):
        return True
    if rerun == "missing":
        return False
    return record.provenance.engine_fingerprint != known.fingerprint(request.cell.engine.module, request.python, request.packages)


def _lacks(record: Record, weights: Weights | None) -> bool:
    """Whether ``record`` is not the answer that is wanted: times to be trusted, or weights that are still there."""
    if weights is not None and record.status in TRAINED:
        return not weights(record)
    return record.status in RETRIED


def _kind(machine: Machine, cell: Cell) -> tuple[str, str, str, str]:
    """Cells whose times predict each other."""
    return machine.key, cell.engine.name, cell.workload.model.name, cell.workload.method.name


def _predicted_seconds(cell: Cell, record: Record | None) -> float | None:
    """Start-up and seconds a token of ``record``, scaled to the steps of ``cell``."""
    if record is None or record.measurement is None:
        return None
    steps = record.measurement.steps
    processed = sum(steps.seconds) / max(1, sum(steps.tokens_input))
    samples = len(steps.seconds) * record.cell.workload.train.samples_per_step
    tokens = sum(steps.tokens_input) / max(1, samples) * cell.workload.train.samples_per_step * cell.workload.train.num_steps
    return record.provenance.wall_seconds - sum(steps.seconds) + processed * tokens


def num_parameters(config: Mapping[str, object]) -> int | None:
    """Parameters of a Llama-family ``config`` (embedding, layers, head); None when the architecture is another."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    values = [config.get(name) for name in names]
    if not all(isinstance(value, int) for value in values):
        return None
    hidden, _, layers, _, vocabulary = (int(str(value)) for value in values)
    tied = bool(config.get("tie_word_embeddings", False))
    return layers * (linear_parameters(config) + 2 * hidden) + hidden + vocabulary * hidden * (1 if tied else 2)


def linear_parameters(config: Mapping[str, object]) -> int:
    """Of the linear modules of one layer, where ``num_parameters`` knows them."""
    hidden, inner, heads = (int(str(config[name])) for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head = int(str(config.get("head_dim") or hidden // heads))
    groups = int(str(config.get("num_key_value_heads") or heads))
    return hidden * head * (2 * heads + 2 * groups) + 3 * hidden * inner


def weights_bytes(request: Request) -> int | None:
    """Bytes of the stored base weights, for ``qlora`` before and after; None when the architecture is not known before loading."""
    whole, quantised = _stored_bytes(request.cell.workload.model), least_memory_bytes(request)
    if whole is None or quantised is None or not isinstance(request.cell.workload.method, QLora):
        return whole
    return whole + quantised


def least_memory_bytes(request: Request) -> int | None:
    """What training holds at the very least: the weights, and for full fine-tuning fp32 gradients and two AdamW moments besides."""
    model, method = request.cell.workload.model, request.cell.workload.method
    stored = _stored_bytes(model)
    if stored is not None and isinstance(method, QLora | LoraFp8):
        assert model.config is not None
        quantised = int(str(model.config["num_hidden_layers"])) * linear_parameters(model.config)
        return stored - int(quantised * (BYTES[model.dtype] - (NF4_BYTES if isinstance(method, QLora) else 1)))
    if stored is None or isinstance(method, Lora):
        return stored
    assert isinstance(method, Full)
    return stored // BYTES[model.dtype] * 4 * BYTES[method.dtype]


def _stored_bytes(model: Model) -> int | None:
    count = num_parameters(model.config) if model.config else None
    return None if count is None else count * BYTES[model.dtype]
