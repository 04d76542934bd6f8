"""Offloading on a GPU: the same losses and gradients as with everything kept, launched and replayed, within the budget.

Llama-3.2-1B's shape cut to a few layers: tensors large enough that copies are still under way when a mistake would read or free them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from engines.native.bench import model_shape, random_decoder, random_load, random_steps
from engines.native.budget import with_embedding_on_host
from engines.native.decoder import Decoder
from engines.native.footprint import MemoryModel
from engines.native.host import Host
from engines.native.packed import Angles, Packed
from engines.native.plan import KEEP_ALL, MOVABLE, Names, Plan
from engines.native.planner import choose
from engines.native.reference import REFERENCE
from engines.native.weights import trained_weights
from harness.data.tokens import IGNORE, Batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
NUM_LAYERS, DOCUMENTS, TOKENS, CHUNK = 4, 2, 2048, 2048
GIB = 2**30
SMALL: Names = KEEP_ALL.kept - MOVABLE
ATTENTION: Names = frozenset(("input", "heads", "attended"))
PLANS = {
    "all_away": (Plan(SMALL, MOVABLE),) * NUM_LAYERS,
    "attention_away": (Plan(SMALL, ATTENTION),) * NUM_LAYERS,
    "input_away": (Plan(SMALL, frozenset(("input",))),) * NUM_LAYERS,
    "lower_half_away": (Plan(SMALL | {"gate_up"}, MOVABLE - {"gate_up"}),) * 2 + (KEEP_ALL,) * 2,
    "by_turns": (KEEP_ALL, Plan(SMALL | {"middle"}, ATTENTION)) * 2,
}


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    torch.manual_seed(0)
    yield random_decoder(model_shape("llama3_1b", NUM_LAYERS), CHUNK)
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _as_loaded(decoder: Decoder) -> Iterator[None]:
    """Every test trains the adapters that the module began with, on a GPU that holds nothing else of ours."""
    arena = decoder.weights.arena
    masters = arena.masters.cpu()
    yield
    arena.masters.copy_(masters)
    arena.gradients.zero_()
    for weight in trained_weights(decoder.weights):
        weight.publish()
    torch.cuda.empty_cache()


def row_of(decoder: Decoder, tokens: int) -> Packed:
    ids = np.random.default_rng(1).integers(0, decoder.shape.vocab_size, size=(1, DOCUMENTS * tokens))
    labels = ids.copy()
    labels[0, ::tokens] = IGNORE
    return Angles.of(decoder.shape, tokens, torch.device("cuda")).pack(Batch(ids, labels, ((tokens,) * DOCUMENTS,)))


def passes(decoder: Decoder, plans: Sequence[Plan], tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and gradients of three passes, one after the other without a pause, each in the host memory of the one before."""
    native = replace(decoder, plans=tuple(plans), host=Host())
    row, scale = row_of(decoder, tokens), torch.tensor(1e-4, device="cuda")
    gradients = decoder.weights.arena.gradients
    gradients.zero_()
    losses = torch.stack([native.accumulate(row, scale) for _ in range(3)])
    assert (native.host.num_bytes > 0) == any(plan.offloaded for plan in plans)
    return losses, gradients.clone()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


@pytest.mark.parametrize("plans", PLANS.values(), ids=PLANS)
def test_losses_and_gradients_are_those_of_everything_kept(decoder: Decoder, plans: tuple[Plan, ...]) -> None:
    """Losses to the bit; gradients as near as those of two runs that keep everything: attention sums dq in no fixed order."""
    everything = (KEEP_ALL,) * NUM_LAYERS
    losses, expected = passes(decoder, everything)
    _, once_more = passes(decoder, everything)
    other_losses, found = passes(decoder, plans)
    assert float(torch.linalg.vector_norm(expected)) > 0
    assert torch.equal(other_losses, losses)
    assert distance(found, expected) <= 3 * distance(once_more, expected) + 1e-3


@pytest.mark.parametrize("name", ["all_away", "attention_away"])
def test_reference_operations_agree_to_the_bit(decoder: Decoder, name: str) -> None:
    plain = replace(decoder, ops=REFERENCE)
    losses, expected = passes(plain, (KEEP_ALL,) * NUM_LAYERS, tokens=512)
    other_losses, found = passes(plain, PLANS[name], tokens=512)
    assert torch.equal(other_losses, losses)
    assert distance(found, expected) < 1e-6


@pytest.mark.parametrize("pieces", [2, 3])
def test_pieces_change_gradients_by_rounding_only(decoder: Decoder, pieces: int) -> None:
    losses, expected = passes(decoder, (KEEP_ALL,) * NUM_LAYERS)
    other_losses, found = passes(decoder, [replace(plan, pieces=pieces) for plan in PLANS["attention_away"]])
    assert torch.allclose(other_losses, losses, rtol=0, atol=0.2)
    assert float((other_losses - losses).abs().mean()) < 0.02
    assert distance(found, expected) < 0.05


def losses_of(step: Callable[[int], torch.Tensor], count: int) -> list[float]:
    """All steps are launched before the first loss is read."""
    return torch.stack([step(index) for index in range(count)]).tolist()


@pytest.mark.parametrize("name", ["all_away", "attention_away", "by_turns"])
def test_launched_and_replayed_steps_learn_as_with_everything_kept(decoder: Decoder, name: str) -> None:
    masters = decoder.weights.arena.masters.clone()
    found = []
    for plans, replay in (((KEEP_ALL,) * NUM_LAYERS, False), (PLANS[name], False), (PLANS[name], True)):
        decoder.weights.arena.masters.copy_(masters)
        for weight in trained_weights(decoder.weights):
            weight.publish()
        native = replace(decoder, plans=plans, host=Host())
        found.append(losses_of(random_steps(native, DOCUMENTS, TOKENS, replay=replay), 6))
    kept, launched, replayed = found
    assert kept[0] - kept[-1] > 1e-3, "hardly anything is learnt: the comparison is too weak"
    assert launched == pytest.approx(kept, rel=1e-3)
    assert replayed == pytest.approx(kept, rel=1e-3)


@pytest.mark.parametrize("replay", [False, True], ids=["launched", "replayed"])
def test_an_embedding_on_the_host_changes_no_loss(decoder: Decoder, replay: bool) -> None:
    """Read over the bus by the kernel, also out of a captured graph. Here the head keeps what both were."""
    masters = decoder.weights.arena.masters.clone()
    found = []
    for weights in (decoder.weights, with_embedding_on_host(decoder.weights)):
        decoder.weights.arena.masters.copy_(masters)
        for weight in trained_weights(decoder.weights):
            weight.publish()
        found.append(losses_of(random_steps(replace(decoder, weights=weights), DOCUMENTS, TOKENS, replay=replay), 5))
    assert weights.embedding.value.is_pinned()
    assert found[1][0] == found[0][0]
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("replay", [False, True], ids=["launched", "replayed"])
@pytest.mark.parametrize("share", [0.6, 0.25, 0.05])
def test_a_step_stays_within_its_budget(decoder: Decoder, share: float, replay: bool) -> None:
    """Between the least that can be (0) and everything kept (1); predicted within 5 %."""
    memory = MemoryModel.of(decoder.shape, decoder.weights, random_load(DOCUMENTS, TOKENS, CHUNK))
    most = memory.peak((KEEP_ALL,) * NUM_LAYERS)
    least = min(memory.peak((Plan(SMALL, ATTENTION, pieces=pieces),) * NUM_LAYERS, 512) for pieces in (1, 4))
    budget = 1.03 * (least + share * (most - least))
    choice = choose(memory, budget, 64 * GIB)
    assert choice.host_bytes > 0
    native = replace(decoder, plans=choice.plans, loss_chunk=choice.loss_chunk, host=Host())
    step = random_steps(native, DOCUMENTS, TOKENS, replay=replay)
    torch.cuda.reset_peak_memory_stats()
    assert np.isfinite(losses_of(step, 4)).all()
    peak = torch.cuda.max_memory_allocated()
    assert peak <= budget
    assert peak == pytest.approx(choice.peak_bytes, rel=0.05)
