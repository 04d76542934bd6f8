"""Filling up changes no loss and no gradient, and brings steps of different lengths to few sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.native.buckets import filled, rounded_up, shared_sizes
from engines.native.packed import Angles
from engines.native.plan import KEEP_ALL
from harness.data.tokens import IGNORE, Batch, pack
from tests.engines.test_fused import decoder, gradients
from tests.engines.tiny import make_job

LONGEST = 128  # the fillings' documents


def batch_of(lengths: list[int]) -> Batch:
    ids = np.arange(sum(lengths), dtype=np.int64)[None]
    labels = ids.copy()
    labels[0, :: max(2, len(lengths))] = IGNORE
    return Batch(ids, labels, (tuple(lengths),))


@given(st.lists(st.integers(1, 700), min_size=1, max_size=64))
def test_sizes_fit_and_are_not_much_larger(lengths: list[int]) -> None:
    batch = batch_of(lengths)
    sizes = shared_sizes(batch)
    tokens, labelled = sum(lengths), int((batch.labels != IGNORE).sum())
    assert tokens < sizes.num_tokens <= max(tokens + 1 + tokens / 8, tokens + 64)
    assert labelled <= sizes.num_rows <= max(labelled + labelled / 8, labelled + 64)
    assert max(lengths) <= sizes.longest
    full = filled(batch, sizes)
    assert sum(full.lengths[0]) == full.input_ids.size == full.labels.size == sizes.num_tokens
    assert len(full.lengths[0]) <= sizes.num_documents
    assert (full.labels[0, tokens:] == IGNORE).all()
    assert full.input_ids[0, :tokens].tolist() == batch.input_ids[0].tolist()


def test_there_are_few_sizes() -> None:
    assert len({rounded_up(count) for count in range(8193, 16385)}) == 16
    assert [rounded_up(count) for count in (1, 64, 65, 16384)] == [64, 64, 128, 16384]


def test_filling_changes_no_loss_and_no_gradient(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    batch = pack(job.tokens.step(job.workload.train, 0))
    found = []
    for sizes in (None, shared_sizes(batch)):
        native = decoder(job, KEEP_ALL)
        row = Angles.of(native.shape, LONGEST, torch.device("cpu")).pack(batch, sizes)
        losses = native.accumulate(row, torch.tensor(0.1))
        found.append((losses, gradients(native), row))
    (losses, expected, plain), (more, given_gradients, row) = found
    assert len(row.tokens) > len(plain.tokens)
    assert len(row.rows) == len(row.targets) > len(plain.rows)
    torch.testing.assert_close(more[: len(losses)], losses)
    assert not more[len(losses) :].any()
    for name, gradient in expected.items():
        torch.testing.assert_close(given_gradients[name], gradient, rtol=1e-5, atol=1e-7)


def test_rows_of_like_sizes_share_a_key() -> None:
    shape_free = Angles(torch.ones(800, 4), torch.zeros(800, 4))
    first, second = (shape_free.pack(batch, shared_sizes(batch)) for batch in (batch_of([300, 500]), batch_of([310, 505])))
    assert first.key == second.key
    assert first.lengths != second.lengths
    assert shape_free.pack(batch_of([300, 300])).key != shape_free.pack(batch_of([200, 400])).key
    assert len(first.cumulative) == len(second.cumulative)
    assert int(first.cumulative[-1]) == len(first.tokens)


@pytest.mark.parametrize("count", [1, 5])
def test_the_last_row_of_filling_predicts_nothing_that_counts(count: int) -> None:
    batch = batch_of([count + 1])
    row = Angles(torch.ones(800, 4), torch.zeros(800, 4)).pack(batch, shared_sizes(batch))
    assert int(row.rows[-1]) == len(row.tokens) - 1
    assert int(row.targets[-1]) == IGNORE
