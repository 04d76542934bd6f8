"""Filling up changes no loss and no gradient, and brings steps of different lengths to few sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import engines.native.buckets
from engines.native.buckets import (
    Policy,
    SharedSizes,
    Sizes,
    are_short,
    extent,
    filled,
    filling,
    kind_of,
    own_sizes,
    rounded_up,
    shared_sizes,
)
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


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=64))
def test_sizes_fit_and_are_not_much_larger(lengths: list[int]) -> None:
    batch = batch_of(lengths)
    sizes = shared_sizes(batch)
    tokens, labelled = sum(lengths), int((batch.labels != IGNORE).sum())
    assert tokens < sizes.num_tokens <= max(tokens + 1 + tokens / 8, tokens + 64)
    assert labelled <= sizes.num_rows <= max(labelled + labelled / 8, labelled + 64)
    assert (sizes.longest is None) == are_short(lengths)
    assert sizes.longest is None or max(lengths) <= sizes.longest
    full = filled(batch, sizes)
    assert sum(full.lengths[0]) == full.input_ids.size == full.labels.size == sizes.num_tokens
    assert len(full.lengths[0]) <= sizes.num_documents
    assert (full.labels[0, tokens:] == IGNORE).all()
    assert full.input_ids[0, :tokens].tolist() == batch.input_ids[0].tolist()


def test_there_are_few_sizes() -> None:
    assert len({rounded_up(count) for count in range(8193, 16385)}) == 16
    assert [rounded_up(count) for count in (1, 64, 65, 16384)] == [64, 64, 128, 16384]
    assert [rounded_up(16385, Policy(steps_an_octave=steps)) for steps in (8, 16, 32, 1024)] == [18432, 17408, 16896, 16448]


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


LENGTHS = st.one_of(st.integers(1, 300), st.integers(1, 3000))
ROWS = st.lists(st.lists(LENGTHS, min_size=1, max_size=6), min_size=1, max_size=40)


@given(ROWS)
def test_every_row_fits_into_what_it_is_filled_up_to(rows: list[list[int]]) -> None:
    batches = [batch_of(lengths) for lengths in rows]
    found = extent(batches, shared=True)
    sizes = SharedSizes(found)
    for batch in batches:
        row = sizes.row(batch)
        if row.sizes is None:
            assert kind_of(batch) in found.alike
            assert row.num_positions == sum(batch.lengths[0])
            continue
        full = filled(batch, row.sizes)
        assert row.num_positions == full.input_ids.size == row.sizes.num_tokens
        assert len(full.lengths[0]) <= row.sizes.num_documents
        assert are_short(batch.lengths[0]) if row.sizes.longest is None else max(full.lengths[0]) <= row.sizes.longest
        assert (batch.labels != IGNORE).sum() <= row.sizes.num_rows
        assert found.largest is not None
        assert row.sizes.num_tokens <= found.largest.num_tokens


def test_sizes_of_its_own_are_for_what_has_cost_enough_filling(monkeypatch: pytest.MonkeyPatch) -> None:
    small, middle, large = batch_of([100, 60]), batch_of([300, 310]), batch_of([700, 710, 90])
    found = extent([small, middle, large], shared=True)
    assert found.largest == Sizes(1536, 3 + 12, None, rounded_up(1000))
    sizes = SharedSizes(found, Policy(worth_a_capture=2000))
    own = [shared_sizes(batch) for batch in (small, middle, large)]
    cost = [each.num_tokens + each.num_rows // 4 for each in (*own, found.largest)]
    assert 2 * (cost[3] - cost[1]) > 2000 > cost[3] - cost[1], "the second one tips the scales"
    asked = [sizes.row(batch).sizes for batch in (middle, small, middle, middle, small)]
    assert asked == [found.largest, found.largest, own[1], own[1], own[0]]
    less = batch_of([280, 250])
    asked = [sizes.row(batch).sizes for batch in (less, large, large)]
    assert asked == [own[1], found.largest, found.largest], "the cheapest that it fits into"
    monkeypatch.setattr(engines.native.buckets, "MOST_SIZES", 1)
    few = SharedSizes(found, Policy(worth_a_capture=2000))
    assert {few.row(middle).sizes for _ in range(9)} == {found.largest}


def test_documents_are_short_where_most_tokens_stand_in_short_ones() -> None:
    """Attention asks for the longest of others alone: a row is made for the longest of its run, or for the next power of two."""
    few_long, long, short = [3000, *[100] * 80], [3000, *[100] * 9], [700, 300]
    assert [are_short(lengths) for lengths in (few_long, long, short, [1024], [1025])] == [True, False, True, True, False]
    assert [own_sizes(batch_of(lengths)).longest for lengths in (few_long, long, short, [300, 300])] == [None, 3000, None, 300]
    assert [shared_sizes(batch_of(lengths)).longest for lengths in (few_long, long, short, [300, 300])] == [None, 4096, None, None]
    assert (found := extent([batch_of(few_long), batch_of(short)], shared=True).largest) is not None
    assert found.longest is None
    assert (found := extent([batch_of([4097, *[100] * 200]), batch_of(long)], shared=True).largest) is not None
    assert found.longest == 8192, "short ones have to fit into it too"


def test_rows_that_are_all_alike_need_no_filling() -> None:
    """The commonest kinds of them: lengths without end are filled up like others."""
    batches = [batch_of([24, 24]), *(batch_of([length]) for length in (9, 9, 8, 8, 7, 7, 6, 5))]
    found = extent(batches[:3], shared=True)
    assert found.largest is None
    assert [SharedSizes(found).row(batch).sizes for batch in batches[:3]] == [None] * 3
    assert (many := extent([*batches, batches[0]], shared=True)).largest is not None
    assert many.alike == {kind_of(batch) for batch in (batches[0], batches[1], batches[3], batches[5])}


def test_filling_alone_has_documents_of_two_lengths() -> None:
    sizes = Sizes(1024, 9, 128, 64)
    batch = filling(sizes)
    assert (batch.input_ids.size, len(batch.lengths[0])) == (1024, 9)
    assert kind_of(batch) is None
    assert (batch.labels == IGNORE).all()
