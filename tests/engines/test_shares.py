"""How a step's samples are shared among ranks: all of them once, evenly, and the same wherever it is asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.native.shares import IDLE, cost_of, fingerprint, shares, split
from harness.data.tokens import StepTokens, pack, pad
from tests.engines.tiny import LLAMA, make_samples


@settings(deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40), st.integers(1, 8))
def test_every_sample_goes_to_one_rank_and_counts_differ_by_little(lengths: list[int], ranks: int) -> None:
    parts = shares([float(length) for length in lengths], ranks)
    assert len(parts) == ranks
    assert sorted(place for part in parts for place in part) == list(range(len(lengths)))
    assert max(len(part) for part in parts) == -(-len(lengths) // ranks)
    assert min(len(part) for part in parts) >= min(1, len(lengths) // ranks)
    for part in parts:
        assert [lengths[place] for place in part] == sorted((lengths[place] for place in part), reverse=True)


def test_costs_are_evener_than_by_turns() -> None:
    lengths = np.random.default_rng(1).lognormal(6, 1, 64).astype(int).tolist()
    cost = cost_of({**LLAMA, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32}, 1_000_000_000)
    costs = [cost(length) for length in lengths]

    def longest(parts: Any) -> float:
        return max(sum(costs[place] for place in part) for part in parts) / (sum(costs) / 4)

    assert longest(shares(costs, 4)) < 1.02 < 1.1 < longest([range(rank, 64, 4) for rank in range(4)])


def test_attention_costs_the_square_and_a_model_without_it_does_not() -> None:
    config = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 16}
    assert cost_of(config, 1000)(10) == 10 * 1000 + 10 * 10 * 2 * 4 * 16
    assert cost_of({"num_hidden_layers": 2, "hidden_size": 32}, 1000)(10) == 10 * 1000


@pytest.mark.parametrize("make_batch", [pad, pack])
@pytest.mark.parametrize(("count", "ranks", "micro_batch"), [(5, 2, 1), (5, 2, 2), (7, 3, 2), (2, 2, 4), (9, 4, 1), (6, 1, 4)])
def test_ranks_make_equally_many_batches_of_all_documents(make_batch: Any, count: int, ranks: int, micro_batch: int) -> None:
    samples = make_samples(count)
    made = split(samples, ranks, float, micro_batch=micro_batch, make_batch=make_batch)
    most = -(-count // ranks)
    assert [len(batches) for batches in made.batches] == [-(-most // micro_batch)] * ranks
    assert all(len(list(batch.documents())) <= micro_batch for batches in made.batches for batch in batches)
    expected = StepTokens.expected(samples)
    assert (made.tokens.input, made.tokens.loss, made.tokens.sha256) == (expected.input, expected.loss, expected.sha256)
    assert made.tokens.processed == sum(batch.input_ids.size for batches in made.batches for batch in batches)


def test_a_rank_without_a_sample_for_a_batch_idles_first() -> None:
    made = split(make_samples(3), 2, float, micro_batch=1, make_batch=pad)
    (idling,) = [batches for batches in made.batches if any(batch is IDLE for batch in batches)]
    assert idling[0] is IDLE
    assert idling[1] is not IDLE
    assert not (IDLE.labels >= 0).any()


def test_another_sharing_has_another_fingerprint() -> None:
    samples = make_samples(6)
    first, again, others, shared = (
        split(given, ranks, float, micro_batch=2, make_batch=pad)
        for given, ranks in ((samples, 2), (samples, 2), (make_samples(7)[1:], 2), (samples, 3))
    )
    assert fingerprint(first) == fingerprint(again)
    assert len({fingerprint(one) for one in (first, others, shared)}) == 3
