"""The record: what one cell did on one machine, its integer schema, and the upgrades of older files."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from harness.data.counts import DataCounts
from harness.engine import Machine
from harness.errors import ConfigError, RecordError
from harness.spec import Cell, Spec, parse

SCHEMA: Literal[2] = 2
SCORE_SCHEMA: Literal[1] = 1

Status = Literal["ok", "oom", "oom_host", "timeout", "no_progress", "crash", "unsupported", "unsteady", "contended"]


class Steps(Spec):
    """Raw values, one per optimizer step. Seconds are end to end, from the end of the step before (the first: from ready)."""

    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    grad_norms: tuple[float | None, ...]
    tokens_input: tuple[int, ...]
    tokens_loss: tuple[int, ...]
    tokens_processed: tuple[int, ...]
    stream_sha256: tuple[str, ...]


class Startup(Spec):
    """Where the time before the first step went, in seconds.

    ``process_seconds``: from launch to the worker's first line. ``setup_seconds``: from there to ``ready`` (imports, model load),
    null when the engine never got ready.
    """

    process_seconds: float
    setup_seconds: float | None


class Memory(Spec):
    """Peak bytes of one rank in one phase; what has no meaning on this device is null."""

    phase: Literal["setup", "first_step", "steady"]
    rank: int
    peak_rss_bytes: int | None
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    num_alloc_retries: int | None


class Artifacts(Spec):
    """Content hashes of what went in and what came out."""

    tokens_sha256: str
    base_sha256: str
    adapter_init_sha256: str | None
    adapter_sha256: str | None


class Measurement(Spec):
    """What the probe saw. A cell that failed midway keeps the steps it made."""

    startup: Startup
    steps: Steps
    memory: tuple[Memory, ...]
    artifacts: Artifacts


class Provenance(Spec):
    """Where and from what the record came: covariates, never part of a key. ``sweep``: shared by the cells of one sitting."""

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


class Record(Spec):
    """What one cell did on one machine. Immutable: later knowledge (scores, verdicts) is stored elsewhere or derived.

    ``data``: what became of the rows; null in a record of schema 1, and of a cell that never had its data prepared.
    """

    schema_version: Literal[2] = SCHEMA
    cell: Cell
    machine: Machine
    status: Status
    reason: str | None = None
    provenance: Provenance
    measurement: Measurement | None = None
    data: DataCounts | None = None
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
        raise RecordError(f"{source}: not a valid score; delete it and run the sweep again: {error}") from error


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
