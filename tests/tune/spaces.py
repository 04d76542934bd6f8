"""Spaces and made-up machines for tests of the search: the engines' own YAML on a workload of 16 samples of 2,048 tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.tune.asked import Told
from harness.tune.grid import searched
from harness.tune.search import Rules, Search, search
from harness.tune.space import Facts, Scale, Space, enumerate_space
from harness.tune.synthetic import SyntheticMachine

GIB = 2**30
SAMPLES, LENGTH = 16, 2048
SCALE = Scale(
    weights=2.3 * GIB,
    layers=16 * 2.0 * (10 * 2048 + 4 * 8192),
    logits=128256 * 16.0,
    working=2.0 * (10 * 2048 + 5 * 8192),
    trained=0.17 * GIB,
)  # the shape of Llama-3.2-1B
FIXED = {"adapter_compute", "processes"}


def facts(engine: str, values: Mapping[str, Any]) -> Facts | None:
    """As dense samples make them; combinations that the engines refuse are left out."""
    size, packed = int(values["micro_batch"]), values.get("layout", "packed") == "packed"
    refused = (packed and (values.get("cuda_graphs") or values.get("attention") == "cudnn")) or (
        not packed and values.get("attention") == "varlen"
    )
    if size > SAMPLES or refused:
        return None
    return Facts(positions=SAMPLES * LENGTH, num_passes=SAMPLES / size, largest=size * LENGTH)


def space(engines: Sequence[str] = ("hf", "fused", "unsloth")) -> Space:
    expected = {engine: {knob: said for knob, said in searched(engine).items() if knob not in FIXED} for engine in engines}
    return enumerate_space(expected, facts)


def machine(of: Space, seed: int, gib: float = 24) -> SyntheticMachine:
    return SyntheticMachine(of, SCALE, gib * GIB, seed)


def tuned(on: SyntheticMachine, *, most_runs: int | None = 8, planned_steps: int = 1000) -> tuple[Search, list[Told]]:
    policy = Search(on.space, SCALE, on.capacity_bytes, Rules(planned_steps=planned_steps, most_runs=most_runs))
    return policy, search(policy, on.measure)
