"""What a plan prints says what it knows, and what it has not looked at."""

from __future__ import annotations

import pytest

from harness.config import Request
from harness.foreseen import show
from harness.plan import plan
from harness.spec import Data
from tests import workloads

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def shown(*requests: Request) -> list[str]:
    said: list[str] = []
    show(plan(requests, [], "stale"), said.append)
    return said


def test_sizes_that_are_not_known_are_not_predicted() -> None:
    *_, last = shown(workloads.request(workloads.workload()))
    assert last == "toy: disk and memory are not known before its weights are loaded"
    work = workloads.workload()
    known = work.model_copy(update={"model": work.model.model_copy(update={"config": LLAMA})})
    *_, last = shown(workloads.request(known))
    assert last == "toy: weights on disk 0.00 GiB, memory at least 0.00 GiB (predicted)"


@pytest.mark.parametrize("behaviour", ["ok", "unsupported"])
def test_rows_that_a_run_would_check_are_named(behaviour: str) -> None:
    data = Data(name="mine", source="jsonl", sequence_length=8, path="mine.jsonl")
    work = workloads.workload().model_copy(update={"data": data})
    said = shown(*(workloads.request(work, repeat=repeat, behaviour=behaviour) for repeat in range(2)))
    named = "mine: plan=only does not read its rows (train.epochs does, to count them); a run checks them all before it trains"
    assert said.count(named) == (behaviour == "ok")
    assert not any("does not read" in line for line in shown(workloads.request(workloads.workload()))), "dense data has no rows"
