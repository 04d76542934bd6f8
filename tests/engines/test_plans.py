"""What is kept, offloaded or made again changes no bit of a gradient; how many rows at a time only its rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.native.decoder import Decoder
from engines.native.host import Host
from engines.native.plan import KEEP_ALL, KEEP_INPUT, MOVABLE, Name, Names, Plan
from harness.engine import Job
from tests.engines.test_fused import decoder, gradients, packed
from tests.engines.tiny import FULL, LORA, make_job

INPUT: Names = frozenset(("input",))
HEADS: Names = frozenset(("input", "heads", "attended"))
PLANS = {
    "input": KEEP_INPUT,
    "some": Plan(INPUT | {"attended", "gate_up"}),
    "others": Plan(INPUT | {"heads", "middle"}),
    "away": Plan(KEEP_ALL.kept - MOVABLE, MOVABLE),
    "input_away": Plan(frozenset(), INPUT),
    "attention_away": Plan(frozenset(("inverse", "low_down")), HEADS),
    "heads_away": Plan(INPUT | {"attended", "low_gate_up"}, frozenset(("heads", "qkv"))),
    "middle_away": Plan(frozenset(("gate_up", "attended")), INPUT | {"middle"}),
    "gate_up_away": Plan(HEADS, frozenset(("gate_up",))),
}


def _results(job: Job, plans: Sequence[Plan], passes: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor], Decoder]:
    native = replace(decoder(job, KEEP_ALL), plans=tuple(plans), host=Host(slab_bytes=4096))  # so that tensors lie across slabs
    for index in range(passes):
        losses = native.accumulate(packed(native, job.tokens.step(job.workload.train, index)), torch.tensor(0.125))
    return losses, gradients(native), native


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_plan_changes_no_bit_of_a_gradient(tmp_path: Path, family: str, method: dict[str, Any], plan: Plan) -> None:
    job = make_job(tmp_path, family, method)
    losses, kept, _ = _results(job, [KEEP_ALL, KEEP_ALL])
    for plans in ([plan, plan], [plan, KEEP_ALL], [KEEP_ALL, plan]):
        other_losses, planned, native = _results(job, plans)
        assert torch.equal(losses, other_losses)
        assert all(torch.equal(kept[name], planned[name]) for name in kept)
        assert (native.host.num_bytes > 0) == bool(plan.offloaded)


def test_passes_of_other_shapes_share_the_host(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    plans = [PLANS["away"], PLANS["attention_away"]]
    losses, kept, _ = _results(job, [KEEP_ALL, KEEP_ALL], passes=3)
    other_losses, planned, native = _results(job, plans, passes=3)
    assert torch.equal(losses, other_losses)
    assert all(torch.equal(kept[name], planned[name]) for name in kept)
    *_, once = _results(job, plans)
    assert native.host.num_bytes < 2 * once.host.num_bytes


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["input", "all", "others", "attention_away", "gate_up_away"])
def test_pieces_change_gradients_by_rounding_only(tmp_path: Path, method: dict[str, Any], name: str) -> None:
    job, plan = make_job(tmp_path, method=method), {**PLANS, "all": KEEP_ALL}[name]
    losses, whole, _ = _results(job, [KEEP_ALL, KEEP_ALL])
    for pieces in (2, 3, 1000):
        other_losses, summed, _ = _results(job, [replace(plan, pieces=pieces)] * 2)
        assert torch.allclose(losses, other_losses, rtol=2e-6)
        for tensor, expected in whole.items():
            assert torch.linalg.vector_norm(summed[tensor] - expected) < 2e-6 * torch.linalg.vector_norm(expected), tensor


@pytest.mark.parametrize(
    ("kept", "offloaded", "pieces"),
    [((), (), 1), (("input",), ("input",), 1), (("input",), ("low_down",), 1), (("input",), (), 0)],
    ids=["no_input", "twice", "immovable", "no_piece"],
)
def test_what_is_no_plan_is_refused(kept: tuple[Name, ...], offloaded: tuple[Name, ...], pieces: int) -> None:
    with pytest.raises(ValueError, match="is no plan"):
        Plan(frozenset(kept), frozenset(offloaded), pieces)
