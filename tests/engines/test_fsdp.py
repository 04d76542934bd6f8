"""FSDP and replicas of one model: the same step whatever the ranks, the strategy and the micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

import engines.fsdp
from harness.engine import Job
from harness.errors import UnsupportedError
from tests.engines.conformance import EngineConformance
from tests.engines.ranks import Ranks, started

KNOBS: dict[str, Any] = {
    "micro_batch": 2, "layout": "padded", "strategy": "replicate", "offload": "none", "recompute": "none", "attention": "sdpa",
    "compute_dtype": "float32", "adapter_compute": "autocast", "compile": False,
}  # fmt: skip


class TestReplicated(EngineConformance):
    engine = engines.fsdp
    knobs = KNOBS


class TestSharded(EngineConformance):
    engine = engines.fsdp
    knobs: ClassVar = {**KNOBS, "strategy": "full_shard", "layout": "packed", "recompute": "full"}


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with started(engines.fsdp) as ranks:
        yield ranks


class OnTwoRanks(EngineConformance):
    """As one engine, whose jobs are trained by both."""

    @pytest.fixture(autouse=True)
    def _ranks(self, two: Ranks) -> None:
        type(self).engine = two  # type: ignore[misc, assignment]

    def test_refuses_more_processes_than_it_has(self, job: Job) -> None:
        from harness.spec import parse
        from tests.engines.tiny import RecordingProbe, with_train

        with pytest.raises(UnsupportedError, match="samples_per_step=1 leaves some of 2 processes without a sample"):
            self.run(with_train(job, "few", samples_per_step=1))


class TestReplicatedOnTwo(OnTwoRanks):
    knobs = KNOBS


class TestShardedOnTwo(OnTwoRanks):
    knobs: ClassVar = {**KNOBS, "strategy": "full_shard", "layout": "packed", "recompute": "full"}
