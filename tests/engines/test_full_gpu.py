"""A full fine-tune by the kernels on a GPU: products in float32, updates inside backward launched and replayed, memory as predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.native.bench import model_shape, random_decoder, random_load, random_steps
from engines.native.decoder import Decoder
from engines.native.footprint import MemoryModel
from engines.native.gradient import Gradient
from engines.native.store import OptimizerState, Training
from harness.engine import Job
from tests.engines.test_fused_gpu import even, run  # noqa: F401 - a fixture
from tests.engines.tiny import FULL, make_job, with_train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
NUM_LAYERS, DOCUMENTS, TOKENS, CHUNK = 4, 2, 2048, 2048
STATES: tuple[OptimizerState, ...] = ("fp32", "int8")


@pytest.fixture(autouse=True)
def _on_an_empty_gpu() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def test_products_are_summed_in_float32() -> None:
    left, right = (torch.randn(512, columns, device="cuda").bfloat16() for columns in (96, 160))
    gradient, right_one = Gradient(), left.double().t() @ right.double()
    gradient.place(torch.full((96, 160), float("nan"), device="cuda"))
    for count in (1, 2, 3):
        gradient.add_product(left, right)
        torch.testing.assert_close(gradient.buffer.double(), count * right_one, rtol=1e-4, atol=1e-3)


@pytest.fixture
def job(tmp_path: Path, even: Job) -> Job:  # noqa: F811
    """Every sample as long as the others, so that every step is captured; all of a step in one micro-batch."""
    (tmp_path / "full").mkdir()
    return replace(make_job(tmp_path / "full", method=FULL, steps=8, samples_per_step=4), tokens=even.tokens)


@pytest.mark.parametrize("state", STATES)
def test_updates_inside_backward_are_those_after_it(tmp_path: Path, job: Job, state: OptimizerState) -> None:
    """The same kernels on the same gradients; the embedding's are summed in no fixed order, so losses agree to rounding."""
    inside = with_train(job, "inside", max_grad_norm=None)
    knobs: dict[str, Any] = {"optimizer_state": state}
    launched, replayed = run(inside, "launched", replay=False, **knobs), run(inside, "replayed", **knobs)
    after = run(with_train(job, "after", max_grad_norm=1e9), "held", **knobs)
    assert replayed.losses == pytest.approx(launched.losses, rel=2e-3)
    assert replayed.losses == pytest.approx(after.losses, rel=2e-3)
    assert replayed.grad_norms == pytest.approx(after.grad_norms, rel=2e-2)
    assert after.losses[0] - after.losses[-1] > 0.01


@pytest.mark.parametrize("held", [False, True], ids=["inside", "held"])
@pytest.mark.parametrize("state", STATES)
def test_memory_is_as_predicted_and_it_learns(state: OptimizerState, held: bool) -> None:
    decoder: Decoder = random_decoder(model_shape("llama3_1b", NUM_LAYERS), CHUNK, training=Training(state, in_backward=not held))
    model = MemoryModel.of(decoder.shape, decoder.weights, random_load(DOCUMENTS, TOKENS, CHUNK))
    step = random_steps(decoder, DOCUMENTS, TOKENS, replay=True)
    torch.cuda.reset_peak_memory_stats()
    losses = [float(step(index)) for index in range(6)]
    peak = torch.cuda.max_memory_allocated()
    assert peak == pytest.approx(model.peak(decoder.plans, decoder.loss_chunk), rel=0.03)
    assert losses[-1] < losses[0] - 0.02
    assert all(value == value for value in losses)
