"""The committed sweep for parity is a workload that a verdict can be drawn from."""

from __future__ import annotations

from pathlib import Path

from harness import prepare
from harness.config import requests
from harness.data.tokens import TokenFile
from harness.places import PrepareRequest
from harness.spec import Lora


def test_the_parity_sweep_is_what_a_verdict_needs(cache: Path) -> None:
    """Real weights, masked prompts, uneven micro-batches, alpha not rank, warm-up, clipping, 20 steps of 16, two seeds, first steps."""
    _, found = requests(["+sweep=parity", "machine=cpu", f"cache={cache}"], multirun=False)
    works = {request.cell.workload.key: request for request in found}
    assert sorted((r.cell.workload.train.seed, r.cell.workload.is_first_step) for r in works.values()) == [
        (0, False), (0, True), (1, False), (1, True),
    ]  # fmt: skip
    assert {request.cell.engine.name for request in found} == {"hf", "fused"}
    request = next(request for request in works.values() if not request.cell.workload.is_first_step)
    work, schedule = request.cell.workload, request.cell.workload.train
    assert work.model.weights != "random"
    assert isinstance(work.method, Lora)
    assert work.method.alpha != work.method.rank
    assert work.first_step.key in works
    assert (schedule.steps, schedule.samples_per_step) >= (20, 16)
    assert schedule.warmup_steps >= 2
    assert schedule.max_grad_norm is not None
    made = prepare.prepare(PrepareRequest(workload=work, sources=request.sources, cache=str(cache), out="unused"))
    tokens = TokenFile.open(Path(made.tokens))
    assert len(tokens.held_out) >= 32
    uneven = 0
    for index in range(schedule.steps):
        samples = tokens.step(schedule, index)
        assert all(sample.num_labels < len(sample) - 1 for sample in samples), "a prompt is not masked"
        counts = [sum(sample.num_labels for sample in samples[start : start + 4]) for start in range(0, len(samples), 4)]
        uneven += max(counts) >= 1.5 * min(counts)
    assert uneven >= 0.75 * schedule.steps, f"the micro-batches of only {uneven} steps differ by 1.5 times in labels"
