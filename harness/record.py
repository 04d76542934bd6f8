"""The record: what one cell did on one machine, its integer schema, and the upgrades of older files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from harness.data.counts import DataCounts
from harness.engine import LossNorm, Machine
from harness.errors import ConfigError, RecordError
from harness.spec import Cell, Spec, parse

SCHEMA: Literal[2] = 2
SCORE_SCHEMA: Literal[1] = 1

Status = Literal["ok", "oom", "oom_host", "timeout", "no_progress", "crash", "unsupported", "unsteady", "contended"]
_OF_RANK = re.compile(r"rank \d+: ")
TRAINED: frozenset[Status] = frozenset({"ok", "unsteady", "contended"})  # may have trained to the end; of the others nothing is left


class Steps(Spec):
    """Raw values, one per optimizer step. Seconds are end to end, from the end of the step before (the first: from ready).

    On a GPU ``seconds`` are the device's (CUDA events) and ``host_seconds`` the host's, from issuing one step to issuing the next: where
    the host is not ahead, the device waited for it. ``reserved_bytes``: what the allocator held when the step had been issued.
    ``compiles``: graphs and kernels compiled during the step. Null: no meaning on this device, or not recorded then.
    """

    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    grad_norms: tuple[float | None, ...]
    tokens_input: tuple[int, ...]
    tokens_loss: tuple[int, ...]
    tokens_processed: tuple[int, ...]
    stream_sha256: tuple[str, ...]
    host_seconds: tuple[float, ...] | None = None
    reserved_bytes: tuple[int, ...] | None = None
    compiles: tuple[int, ...] | None = None


class RankSteps(Spec):
    """Of one rank of several, by its own clock: seconds of every step, and of these what it spent in the exchange of losses that follows
    the backward pass, where it waits for the slowest. The rank that waits least is that one. ``exchanging_seconds``: what else it spent in
    exchanges, of gradients and weights, while it computed nothing. Null where the engine does not say.
    """

    rank: int
    seconds: tuple[float, ...]
    waiting_seconds: tuple[float, ...] | None
    exchanging_seconds: tuple[float, ...] | None = None


class Startup(Spec):
    """Where the time before the first step went, in seconds.

    ``process_seconds``: from launch to the worker's first line. ``setup_seconds``: from there to ``ready``, null when the engine never
    got ready; of it ``data_seconds`` opened the data, ``import_seconds`` went into imports, and the rest built the model. The first
    step, with its compilation and autotuning, is the first of ``Steps.seconds``.
    """

    process_seconds: float
    setup_seconds: float | None
    data_seconds: float | None = None
    import_seconds: float | None = None


class Memory(Spec):
    """Peak bytes of one rank in one phase; what has no meaning on this device is null.

    ``allocated``, ``active`` and ``reserved`` are the allocator's. ``device``: of the whole GPU, by NVML, minus the value before the
    launch; null also where the phase ended between two samples. ``num_alloc_retries``: in this phase.
    """

    phase: Literal["setup", "first_step", "steady"]
    rank: int
    peak_rss_bytes: int | None
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    num_alloc_retries: int | None
    peak_active_bytes: int | None = None
    peak_device_bytes: int | None = None


class GpuSamples(Spec):
    """What NVML said of one rank's GPU while it trained: a sample at the end of each interval, at most a few hundred.

    ``gpu``: a short hash of its UUID. ``seconds``: since ``ready``. ``event_reasons``: every reason seen in the interval why the clocks
    were not higher (NVML's bits). ``energy_joules``: the counter since the driver was loaded. Null: this GPU does not say.
    """

    rank: int
    gpu: str
    seconds: tuple[float, ...]
    sm_clock_mhz: tuple[int | None, ...]
    event_reasons: tuple[int | None, ...]
    energy_joules: tuple[float | None, ...]


class Work(Spec):
    """What the floating-point operations of a step are counted from; ``harness.flops`` has the formulas.

    ``convention``: ``palm`` counts attention without the causal mask (Chowdhery et al. 2022, appendix B). ``layer_parameters``: of the
    linear modules of all layers, ``head_parameters``: of the output head, ``adapter_parameters``: of adapters. ``attention_size``:
    layers x heads x size of a head. ``squared_lengths``: sum of squared document lengths, per step. ``recomputed_fraction``: of the
    layers' forward pass, done again in the backward pass; null when the engine does not tell.
    """

    convention: Literal["palm"]
    layer_parameters: int
    head_parameters: int
    adapter_parameters: int
    attention_size: int
    squared_lengths: tuple[int, ...]
    recomputed_fraction: float | None


class Price(Spec):
    """What an hour of the machine cost, and the ``date`` (YYYY-MM-DD) of that price."""

    dollars_per_hour: Annotated[float, Field(gt=0)]
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]


class Artifacts(Spec):
    """Content hashes of what went in and what came out."""

    tokens_sha256: str
    base_sha256: str
    adapter_init_sha256: str | None
    adapter_sha256: str | None


class Measurement(Spec):
    """What the probe saw. A cell that failed midway keeps the steps it made.

    ``work`` is null where ``work_unknown`` says why, and in a cell that did not end. ``gemm_peak_flops``: operations per second of a
    large bfloat16 product in this very process, after the last step; null on a CPU and where there was no room for it. ``ranks``: of a
    cell in several processes; its ``steps`` are rank 0's. ``chosen``: what the engine decided by itself, in its own words; null where it
    says nothing. ``resumed_at``: the steps (0-based) with which a new process went on from a checkpoint; what is not of steps is the last
    process', and such a run has no rate.
    """

    startup: Startup
    steps: Steps
    memory: tuple[Memory, ...]
    artifacts: Artifacts
    gpus: tuple[GpuSamples, ...] = ()
    ranks: tuple[RankSteps, ...] = ()
    resumed_at: tuple[int, ...] = ()
    work: Work | None = None
    work_unknown: str | None = None
    gemm_peak_flops: float | None = None
    chosen: dict[str, str | int | float] | None = None


class Provenance(Spec):
    """Where and from what the record came: covariates, never part of a key. ``sweep``: shared by the cells of one sitting.

    ``price``: as the configuration gave it, null when it gave none.
    """

    started_utc: str
    wall_seconds: float
    commit: str
    dirty: bool
    engine_fingerprint: str
    python: str
    packages: dict[str, str]
    driver: str | None
    host: str
    sweep: str | None = None
    price: Price | None = None


class Record(Spec):
    """What one cell did on one machine. Immutable: later knowledge (scores, verdicts) is stored elsewhere or derived.

    ``data``: what became of the rows; null in a record of schema 1, and of a cell that never had its data prepared.
    ``loss_norm``: what the engine says that a step's loss is a mean of; null when it does not say.
    """

    schema_version: Literal[2] = SCHEMA
    cell: Cell
    machine: Machine
    status: Status
    reason: str | None = None
    provenance: Provenance
    measurement: Measurement | None = None
    data: DataCounts | None = None
    loss_norm: LossNorm | None = None
    notes: tuple[str, ...] = Field(default=())


class Score(Spec):
    """Held-out loss of one set of weights: a fact about content, whoever trained it. Evaluated in fp32 by the neutral evaluator.

    ``update_norm`` is the L2 norm of trained minus initial weights (of the adapter, where one is trained), null for the base itself.
    """

    schema_version: Literal[1] = SCORE_SCHEMA
    adapter_sha256: str | None
    tokens_sha256: str
    base_sha256: str
    held_out_loss: float
    held_out_tokens: int
    update_norm: float | None
    evaluator: str


def cause(record: Record) -> str:
    """Why a run has no rate, in one line."""
    if record.reason and record.reason.strip():
        return in_a_line(record.reason)
    return _untimed(record) if record.status == "ok" else "no reason was recorded"


def in_a_line(reason: str) -> str:
    """``reason``, of a traceback its last line, which names the error, and of several ranks the one that raised it."""
    lines = [line.strip() for line in reason.strip().splitlines()]
    if not is_traceback(reason):
        return " ".join(lines)
    of_rank = _OF_RANK.match(reason)
    return f"{of_rank[0] if of_rank else ''}{lines[-1]}"


def traceback_of(record: Record) -> str | None:
    """The reason, where it is a traceback."""
    return record.reason if record.reason and is_traceback(record.reason) else None


def is_traceback(reason: str) -> bool:
    """Whether ``reason`` has one; its last line then names the error."""
    return "Traceback (most recent call last)" in reason


def _untimed(record: Record) -> str:
    at = record.measurement.resumed_at if record.measurement else ()
    return f"it went on from a checkpoint after step {', '.join(map(str, at))}, so no rate is its own" if at else "nothing was timed"


def dumps(spec: Record | Score) -> str:
    """The record as JSON text, keys sorted."""
    return json.dumps(spec.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=True) + "\n"


def loads(text: str, source: str) -> Record:
    """Read a record, upgrading older schemas. Raises RecordError naming ``source`` and what to do."""
    try:
        raw = json.loads(text)
        version = raw["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise RecordError(f"{source}: not a record (truncated or edited): {error}; delete it or restore it from git") from error
    if version not in range(1, SCHEMA + 1):
        raise RecordError(f"{source}: schema {version!r} is not among 1 to {SCHEMA}; update engine-room to read it")
    for step in range(version, SCHEMA):
        raw = UPGRADES[step](raw)
    try:
        return parse(Record, raw)
    except ConfigError as error:
        raise RecordError(f"{source}: not a valid record; restore it from git or delete it:\n{error}") from error


def loads_score(text: str, source: str) -> Score:
    """Read a score. Raises RecordError naming ``source``."""
    try:
        return parse(Score, json.loads(text))
    except (ValueError, ConfigError) as error:
        raise RecordError(f"{source}: not a valid score; delete it, and have the sweep make it again with rerun=all: {error}") from error


def _from_1(raw: dict[str, Any]) -> dict[str, Any]:
    """``data.mask_prompt`` became ``data.supervise``; the counts of the data were words in the notes."""
    try:
        workload = raw["cell"]["workload"]
        data = dict(workload["data"])
        data["supervise"] = "answers" if data.pop("mask_prompt") else "everything"
        return {**raw, "schema_version": 2, "cell": {**raw["cell"], "workload": {**workload, "data": data}}}
    except (KeyError, TypeError):
        return {**raw, "schema_version": 2}  # not what schema 1 wrote: reading it as schema 2 says what is wrong


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}
