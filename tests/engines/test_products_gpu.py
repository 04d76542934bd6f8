"""Products in the fastest way on a GPU: each way near the truth, steps as with torch's products, launched or replayed, memory as predicted.

Llama-3.2-1B's shape cut to two layers. Where it does not matter what is fastest, a clock of ours prefers cuBLASLt's last way to torch's, so
that other ways than torch's are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import engines.fused
from engines.native.bench import model_shape, random_decoder, random_load, random_steps
from engines.native.cublaslt import CublasLt, Multiplier
from engines.native.decoder import Decoder
from engines.native.fastest import Fastest, Run, fastest_for, quickest, timed_in_turns
from engines.native.footprint import WORKSPACE_BYTES, MemoryModel
from engines.native.packed import Angles, Packed
from engines.native.products import Asked, Product
from engines.native.store import Training
from engines.native.weights import trained_weights
from harness.data.tokens import IGNORE, Batch
from harness.spec import parse
from tests.engines.oracle import judged
from tests.engines.test_fused_gpu import KNOBS
from tests.engines.tiny import RecordingProbe, make_job

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
GPU = torch.device("cuda")
NUM_LAYERS, DOCUMENTS, TOKENS, CHUNK = 2, 2, 1024, 2048
F32 = torch.float32
# As they occur (adapters' ranks behind rows, turned factors, room behind results) and odd ones.
PRODUCTS = [
    Product(2048, 3072, 2112, (2112, 1), (1, 2112), 3072),
    Product(2048, 3072, 2048, (2112, 1), (1, 2112), 3136),
    Product(2048, 2048, 3136, (3136, 1), (2112, 1), 2048),
    Product(2048, 48, 2048, (2112, 1), (1, 2048), 2112, 2.0),
    Product(2048, 64, 3072, (3136, 1), (2112, 1), 3136, 0.5),
    Product(1000, 520, 264, (264, 1), (520, 1), 528),
    Product(2040, 1032, 1024, (1, 2040), (1032, 1), 1032),
    Product(2040, 1032, 1024, (1, 2040), (1032, 1), 1032, 1.0, F32),
    Product(520, 264, 4096, (1, 528), (1, 4104), 264, 1.0, F32),
    Product(24, 40, 16384, (16384, 1), (1, 16384), 40),
]


def prefers_the_last(runs: Sequence[Run], calls: int) -> list[float]:
    """Instead of a clock."""
    for run in runs:
        run()
    return [float(len(runs) - place) for place in range(len(runs))]


def other_ways(least_flops: float = 1e6) -> Fastest:
    return Fastest(CublasLt(GPU), in_turns=prefers_the_last, least_flops=least_flops)


@pytest.fixture(autouse=True)
def _on_an_empty_gpu() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()


# One product.


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_every_way_is_as_near_the_truth_as_torch(product: Product) -> None:
    left, right, out = product.operands(GPU)
    product.run(left, right, out)
    plain, truth = out.clone(), product.alpha * (left.double() @ right.double())
    multiplier = Multiplier(product, CublasLt(GPU), 8)
    assert multiplier.ways
    for way in multiplier.ways:
        out.fill_(float("nan"))
        multiplier.run(way, left, right, out)
        judged(out, plain, truth, torch.bfloat16)


@pytest.mark.parametrize("begin", [8, 16, 64], ids=lambda begin: f"{2 * begin}_bytes")
def test_factors_and_results_may_begin_anywhere_between_sixteens_of_bytes(begin: int) -> None:
    """Ways are asked for that can read and write there."""
    left, right, out = (torch.randn(1024, 1024 + begin, device=GPU).bfloat16()[:, begin:] for _ in range(3))
    truth, plain = left.double() @ right.double(), left @ right
    fastest = other_ways()
    assert fastest.make(Asked(left, right, out)) is out, fastest.said()
    judged(out, plain, truth)


def test_what_begins_elsewhere_stays_torchs() -> None:
    left, right = (torch.randn(1024, 1025, device=GPU).bfloat16() for _ in range(2))
    assert other_ways().make(Asked(left[:, 1:], right[:, :1024].contiguous(), None)) is None


def test_a_replayed_product_is_a_launched_one_to_the_bit() -> None:
    """And what is new to a capture stays torch's."""
    fastest = other_ways()
    left, right = (torch.randn(1024, 1024, device=GPU).bfloat16() for _ in range(2))
    launched = fastest.make(Asked(left, right, None))
    assert launched is not None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = fastest.make(Asked(left, right, None))
        late = fastest.make(Asked(left[:512], right, None))
    assert replayed is not None
    assert late is None
    left.copy_(torch.randn(1024, 1024, device=GPU))
    graph.replay()
    again = fastest.make(Asked(left, right, None))
    assert again is not None
    assert torch.equal(replayed, again)
    assert not torch.equal(replayed, launched), "a replay reads what lies at its addresses"
    assert fastest.said() == "1 of 2 products in another way than torch's, 1 first asked for by a capture"


def test_the_clock_tells_one_product_from_two() -> None:
    left, right = (torch.randn(4096, 4096, device=GPU).bfloat16() for _ in range(2))
    out = torch.empty_like(left)

    def one() -> None:
        torch.mm(left, right, out=out)

    def two() -> None:
        one()
        one()

    timed_in_turns([one, two], 3)
    first, second = timed_in_turns([one, two], 10)
    assert 1.6 * first < second < 2.4 * first
    assert quickest([two, one], timed_in_turns) == 1
    assert quickest([one, two], timed_in_turns) == 0


# Whole steps.


def decoder_of(kind: Literal["lora", "qlora", "full", "lora_fp8"]) -> Decoder:
    training = Training("fp32", in_backward=False) if kind == "full" else None
    return random_decoder(
        model_shape("llama3_1b", NUM_LAYERS), CHUNK, nf4=kind == "qlora", fp8="forward" if kind == "lora_fp8" else None, training=training
    )


def row_of(decoder: Decoder) -> Packed:
    ids = np.random.default_rng(1).integers(0, decoder.shape.vocab_size, size=(1, DOCUMENTS * TOKENS))
    labels = ids.copy()
    labels[0, ::TOKENS] = IGNORE
    return Angles.of(decoder.shape, TOKENS, GPU).pack(Batch(ids, labels, ((TOKENS,) * DOCUMENTS,)))


def one_pass(decoder: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of a pass, and its gradients."""
    arena = decoder.weights.arena
    arena.gradients.zero_()
    losses = decoder.accumulate(row_of(decoder), torch.tensor(1e-4, device=GPU))
    found = losses.clone(), arena.gradients.clone()
    arena.gradients.zero_()
    return found


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found.double() - expected.double()) / torch.linalg.vector_norm(expected.double()))


@pytest.mark.parametrize("kind", ["lora", "qlora", "lora_fp8"])
def test_losses_and_gradients_are_those_of_torchs_products(kind: Literal["lora", "qlora", "lora_fp8"]) -> None:
    """Within the rounding that pieces of rows make of the same products (``test_offload_gpu``): sums are ordered otherwise."""
    torchs = decoder_of(kind)
    fastest = other_ways(1e8)
    ours = replace(torchs, ops=fastest.through(torchs.ops))
    losses, expected = one_pass(torchs)
    found_losses, found = one_pass(ours)
    again, _ = one_pass(ours)
    taken = int(fastest.said().split()[0])
    assert taken >= (8 if kind != "lora_fp8" else 4), fastest.said()
    assert torch.equal(found_losses, again), "the first pass chose, the second used what was chosen"
    coarser = 4 if kind == "lora_fp8" else 1  # a rounding of bf16 may become one of e4m3
    assert float((found_losses - losses).abs().mean()) < coarser * 0.02
    assert float(torch.linalg.vector_norm(expected)) > 0
    assert distance(found, expected) < coarser * 0.05


def test_a_captured_pass_has_the_losses_of_a_launched_one_to_the_bit() -> None:
    """Gradients only nearly: attention sums dq in no fixed order, whoever makes the products."""
    plain = decoder_of("lora")
    fastest = other_ways(1e8)
    decoder = replace(plain, ops=fastest.through(plain.ops))
    row, scale, gradients = row_of(decoder), torch.tensor(1e-4, device=GPU), decoder.weights.arena.gradients
    one_pass(decoder)
    losses, expected = one_pass(decoder)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = decoder.accumulate(row, scale)
    for _ in range(2):
        gradients.zero_()
        graph.replay()
        assert torch.equal(replayed, losses)
        assert distance(gradients, expected) < 5e-3
    assert "capture" not in fastest.said(), fastest.said()


def losses_of(decoder: Decoder) -> list[float]:
    """The first is launched, the second captured, all others replayed."""
    step = random_steps(decoder, DOCUMENTS, TOKENS, replay=True)
    return torch.stack([step(index) for index in range(6)]).tolist()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_replayed_steps_learn_as_with_torchs_products(kind: Literal["lora", "full"]) -> None:
    """Of a full fine-tune gradients are products into float32."""
    decoder, fastest = decoder_of(kind), other_ways(1e8)
    masters = decoder.weights.arena.masters.clone()
    torchs = losses_of(decoder)
    decoder.weights.arena.masters.copy_(masters)
    for weight in trained_weights(decoder.weights):
        weight.publish()
    ours = losses_of(replace(decoder, ops=fastest.through(decoder.ops)))
    assert int(fastest.said().split()[0]) >= 8, fastest.said()
    assert "capture" not in fastest.said()
    assert torchs[0] - torchs[-1] > 1e-3, "hardly anything is learnt: the comparison is too weak"
    assert ours == pytest.approx(torchs, rel=2e-3)


def test_memory_is_as_predicted_and_times_are_taken_in_the_first_step_only() -> None:
    seen = []

    def counted(runs: Sequence[Run], calls: int) -> list[float]:
        seen.append(len(runs))
        return timed_in_turns(runs, calls)

    decoder = decoder_of("lora")
    before = torch.cuda.memory_allocated()
    fastest = Fastest(CublasLt(GPU), in_turns=counted)
    assert torch.cuda.memory_allocated() - before == WORKSPACE_BYTES
    decoder = replace(decoder, ops=fastest.through(decoder.ops))
    model = MemoryModel.of(decoder.shape, decoder.weights, random_load(DOCUMENTS, TOKENS, CHUNK), "fastest")
    step = random_steps(decoder, DOCUMENTS, TOKENS, replay=True)
    torch.cuda.reset_peak_memory_stats()
    losses = [float(step(0))]
    timed = len(seen)
    losses += [float(step(index)) for index in range(1, 5)]
    assert timed > 0
    assert len(seen) == timed
    assert all(np.isfinite(losses))
    assert torch.cuda.max_memory_allocated() == pytest.approx(model.peak(decoder.plans, decoder.loss_chunk), rel=0.05)


def test_the_engine_trains_and_records_what_was_chosen(tmp_path: Path) -> None:
    """The products of a tiny model are all too small: the record says so."""
    found: dict[str, Any] = {}
    for products in ("torch", "fastest"):
        (tmp_path / products).mkdir()
        job = replace(make_job(tmp_path / products), device="cuda")
        found[products] = RecordingProbe()
        engines.fused.train(job, parse(engines.fused.Knobs, {**KNOBS, "products": products}), found[products])
    assert found["fastest"].chosen["products"] == "0 of 0 products in another way than torch's"
    assert "products" not in found["torch"].chosen
    assert found["fastest"].losses == pytest.approx(found["torch"].losses, rel=1e-2)


def test_nothing_is_made_for_torchs_products() -> None:
    assert fastest_for("torch", GPU) is None
    assert isinstance(fastest_for("fastest", GPU), Fastest)
