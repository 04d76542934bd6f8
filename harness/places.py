"""Where things lie on this machine: what prepare is given and what it leaves. Absolute paths live here, never in a record."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from harness.data.counts import DataCounts
from harness.engine import Machine
from harness.record import Provenance
from harness.spec import Cell, Positive, Spec, Workload


class Nodes(Spec):
    """Hosts that run a cell together, the same command on each: how many, which of them this is (the record is made on the one with
    rank 0), and ``endpoint``, a host and free port of that one which all can reach.
    """

    count: Positive = 1
    rank: Annotated[int, Field(ge=0)] = 0
    endpoint: Annotated[str, Field(pattern=r"^[^\s:/]+:[1-9]\d*$")] | None = None

    @model_validator(mode="after")
    def _its_values_agree(self) -> Nodes:
        if self.rank >= self.count:
            raise ValueError(f"rank={self.rank} is not one of {self.count} nodes: they are numbered from 0")
        if self.count > 1 and self.endpoint is None:
            raise ValueError(f"count={self.count} needs an endpoint: HOST:PORT of the node with rank 0, the same on all nodes")
        return self


class Sources(Spec):
    """Absolute paths of the sources a workload names by content; null where the source is not a file here.

    ``data``: the files of ``workload.data.files``, in their order.
    """

    data: tuple[str, ...] = ()
    weights: str | None = None
    tokenizer: str | None = None


class Prepared(Spec):
    """What prepare made in the cache (absolute paths), and its content hashes.

    ``data`` counts what became of the rows; ``notes`` are facts worth a line in the record.
    """

    tokens: str
    base: str
    adapter_init: str | None
    base_sha256: str
    adapter_init_sha256: str | None
    data: DataCounts | None = None
    notes: tuple[str, ...] = ()


class PrepareRequest(Spec):
    """``python -m harness.prepare REQUEST.json``: make everything ``workload`` needs under ``cache``, write a Prepared to ``out``.

    ``only_count``: tokenise, and write the DataCounts.
    """

    workload: Workload
    sources: Sources
    cache: str
    out: str
    only_count: bool = False


class ScoreItem(Spec):
    """One set of weights to score; ``adapter`` null scores the base itself. ``out``: the Score file to write."""

    adapter: str | None
    adapter_sha256: str | None
    out: str


class PairItem(Spec):
    """Two sets of trained weights whose updates are to be compared. ``out``: the UpdatePair file to write."""

    trained: tuple[str, str]
    trained_sha256: tuple[str, str]
    out: str


class RoundingItem(Spec):
    """How far rounding moves the first loss of the workload. ``out``: the Rounding file to write."""

    out: str


class ScoreRequest(Spec):
    """``python -m harness.score REQUEST.json``: held-out loss of each item on the same base and held-out rows, each of ``pairs``, then
    ``rounding``.
    """

    workload: Workload
    prepared: Prepared
    items: tuple[ScoreItem, ...]
    device: str
    pairs: tuple[PairItem, ...] = ()
    rounding: RoundingItem | None = None


class Saving(Spec):
    """Where a cell's state is saved every so many steps, how many steps are ``made`` already (0: it starts), and with which steps (0-based)
    new processes took over.
    """

    folder: str
    every: int
    made: int
    resumed_at: tuple[int, ...]


class WorkerJob(Spec):
    """``python -m harness.worker JOB.json``: train ``cell``, leave weights in ``out`` and the event log at ``events``.

    ``launched_monotonic`` is launch's clock, shared by all processes of a host. ``provenance`` is as it was at the launch: with it the
    record can still be made when launch did not live to do so. ``counts``: count what each step costs, and write the Counts there; such a
    run is not timed.
    """

    cell: Cell
    machine: Machine
    prepared: Prepared
    provenance: Provenance
    out: str
    events: str
    launched_monotonic: float
    counts: str | None = None
    saving: Saving | None = None
