"""The same adapters on every rank: which batches of a step are this rank's, and the exchange of their losses and gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property

import numpy as np
from torch import Tensor, distributed

from engines.native.buckets import Extent, Row, SharedSizes, extent
from engines.native.ranks import expect_agreement, process_group
from engines.native.shape import LlamaShape
from engines.native.shares import IDLE, cost_of, fingerprint, split
from harness.data.tokens import IGNORE, Batch, StepTokens, chunks, pack
from harness.engine import Job, Probe

# What an idle rank computes to keep pace: nothing of it has a label. Two lengths, because attention over uneven documents takes any.
_PACE = Batch(np.zeros((1, 3), np.int64), np.full((1, 3), IGNORE, np.int64), ((1, 2),))


def ranks(job: Job) -> AbstractContextManager[int]:
    """The process group of ``job`` for the length of the block, and this rank's number; one process needs none."""
    return process_group(job.device, job.processes) if job.processes > 1 else nullcontext(0)


class Shares:
    """The batches of every step, packed rows of at most ``micro_batch`` samples. In one process they are in the order of the samples.

    ``shared``: uneven documents are filled up to sizes that rows share, and the filling is processed, too. ``in_step``: ranks meet in
    every batch, so each has as many, some of them without a label; replicas meet once a step, and none has to keep pace with the others.
    """

    def __init__(self, job: Job, shape: LlamaShape, rank: int, *, micro_batch: int, shared: bool, in_step: bool = False) -> None:
        self._job, self._rank, self._micro_batch, self._shared, self._in_step = job, rank, micro_batch, shared, in_step
        attention = {"num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads, "head_dim": shape.head_dim}
        self._cost = cost_of(attention, shape.num_layers * shape.layer_parameters + shape.vocab_size * shape.hidden_size)
        self._seen = hashlib.sha256()

    @cached_property
    def extent(self) -> Extent | None:
        """What the rows of all ranks need that are filled up; null where none are."""
        return extent(self.every()) if self._shared else None

    @cached_property
    def _fill(self) -> tuple[Callable[[Batch], Row], ...]:
        """How each rank fills up, which depends on its own rows."""
        return tuple(Row if self.extent is None else SharedSizes(self.extent).row for _ in range(self._job.processes))

    def of(self, index: int) -> tuple[tuple[Row, ...], StepTokens]:
        """This rank's rows of step ``index``, and the tokens of all ranks'. To be asked for in order: what a row is filled up to follows
        from those before.
        """
        ranks, tokens, said = self._split(index)
        self._seen.update(said)
        rows = [tuple(map(fill, batches)) for batches, fill in zip(ranks, self._fill, strict=True)]
        return rows[self._rank], replace(tokens, processed=sum(row.num_positions for each in rows for row in each))

    def every(self) -> Iterator[Batch]:
        """All batches of all steps and ranks: what plans of memory must fit, the same ones on every rank."""
        for index in range(self._job.workload.train.steps):
            yield from (batch for batches in self._split(index)[0] for batch in batches)

    def expect_agreement(self) -> None:
        """Raise RuntimeError when ranks trained on other samples than the others thought."""
        if self._job.processes > 1:
            expect_agreement(self._seen.digest(), "the samples of every step and who trains on them")

    def _split(self, index: int) -> tuple[tuple[tuple[Batch, ...], ...], StepTokens, bytes]:
        samples = self._job.tokens.step(self._job.workload.train, index)
        if self._job.processes == 1:
            batches = tuple(pack(group) for group in chunks(samples, self._micro_batch))
            return (batches,), StepTokens.of(batches), b""
        parts = split(samples, self._job.processes, self._cost, micro_batch=self._micro_batch, make_batch=pack)
        ranks = tuple(
            tuple(_PACE if one is IDLE else one for one in batches if self._in_step or one is not IDLE) for batches in parts.batches
        )
        return ranks, parts.tokens, fingerprint(parts)


def exchange(probe: Probe) -> Callable[[Tensor, Tensor], None]:
    """Sums a loss and the flat gradients behind it over all ranks, in place."""

    def sum_over_ranks(loss: Tensor, gradients: Tensor) -> None:
        with probe.waits():
            distributed.all_reduce(loss)
        with probe.exchanges():
            distributed.all_reduce(gradients)

    return sum_over_ranks
