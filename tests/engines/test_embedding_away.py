"""An embedding that waits on the host: when the planner sends it there, what that is said to cost, and that it changes no loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import engines.fused
from engines.native import budget
from engines.native.bench import model_shape
from engines.native.footprint import Load, MemoryModel
from engines.native.forecast import forecast
from engines.native.plan import KEEP_ALL, SLAB_BYTES, described
from engines.native.planner import Choice, choose, least
from engines.native.store import Training
from harness.errors import UnsupportedError
from harness.spec import Lora, QLora, parse
from tests.engines.allocations import meta_decoder
from tests.engines.test_fused import KNOBS
from tests.engines.test_planner import GIB, model_of
from tests.engines.tiny import LORA, RecordingProbe, make_job, with_train

EMBEDDING = 128256 * 4096 * 2
PINNED = 2**30  # the next power of two
HOST = 64.0 * GIB


def movable(documents: int = 4) -> MemoryModel:
    return replace(model_of("llama3_8b", documents, 2048), movable=EMBEDDING)


def test_it_stays_where_everything_is_kept() -> None:
    choice = choose(movable(), 45 * GIB, HOST)
    assert choice.plans == (KEEP_ALL,) * 32
    assert not choice.embedding_away


@pytest.mark.parametrize("gib", [17.7, 20, 24])
def test_what_it_leaves_free_is_worth_more_than_the_reading(gib: float) -> None:
    model = movable()
    here, away = choose(replace(model, movable=0), gib * GIB, HOST), choose(model, gib * GIB, HOST)
    assert away.embedding_away
    assert away.seconds < 0.995 * here.seconds
    assert away.peak_bytes == model.moved().peak(away.plans, away.loss_chunk) <= gib * GIB
    assert 0 <= away.host_bytes - PINNED - sum(model.total(plan.offloaded) for plan in away.plans) < SLAB_BYTES
    again = choose(model.moved(), gib * GIB, HOST - PINNED)
    assert away.seconds == pytest.approx(again.seconds + 8192 * 4096 * 2 / 54e9)


def test_it_stays_where_the_host_has_no_room_or_it_costs_more() -> None:
    model = movable()
    assert not choose(model, 24 * GIB, 0).embedding_away
    assert not choose(model, 24 * GIB, PINNED - 1).embedding_away
    assert not choose(model, 32 * GIB, HOST).embedding_away, "what would be kept instead costs hardly anything to fetch"


def test_a_budget_below_what_is_loaded_does_not_fit() -> None:
    """The embedding is on the GPU while the weights load."""
    model = movable(1)
    tight = least(model, HOST)
    assert tight.embedding_away
    assert choose(model, 1.021 * tight.peak_bytes, HOST).embedding_away
    said = f"needs at least {1.02 * 1.1 * tight.peak_bytes / GIB:.1f} GiB"
    for budget_bytes in (1.021 * tight.peak_bytes, 0.5 * tight.peak_bytes):
        with pytest.raises(UnsupportedError, match=said):
            choose(replace(model, loaded=int(1.1 * tight.peak_bytes)), budget_bytes, HOST)
    assert least(replace(model, loaded=int(1.1 * tight.peak_bytes)), HOST).peak_bytes == int(1.1 * tight.peak_bytes)


def test_a_head_or_what_is_trained_cannot_go() -> None:
    load = Load(8192, 2048, 8188, 2048)

    def found(name: str, training: Training | None = None) -> MemoryModel:
        shape = model_shape(name, 2)
        return MemoryModel.of(shape, meta_decoder(shape, training=training).weights, load, may_move=True)

    assert found("llama3_8b").movable == EMBEDDING
    assert found("llama3_8b").loaded < found("llama3_8b").static
    assert found("llama3_1b").movable == 0, "its head is its embedding"
    assert found("llama3_8b", Training("fp32")).movable == 0


def test_8b_on_nf4_fits_below_6_6_gib() -> None:
    """Predicted from shapes alone, one document of 2,048 tokens."""
    shape, method = model_shape("llama3_8b", None), parse(QLora, {**LORA, "name": "qlora", "rank": 16, "alpha": 16.0})
    load = Load(2048, 2048, 2047, 2048)
    told = forecast(shape, method, load, recompute="fit", budget_bytes=6.6 * GIB, host_bytes=HOST)
    assert told.peak_bytes < 6.6 * GIB
    assert forecast(shape, method, load, recompute="fit", budget_bytes=6.6 * GIB, host_bytes=0.0).peak_bytes > 6.6 * GIB
    lora = parse(Lora, {**LORA, "rank": 16, "alpha": 16.0})
    assert forecast(shape, lora, load, recompute="fit", budget_bytes=6.6 * GIB, host_bytes=HOST).peak_bytes > 6.6 * GIB


def test_it_changes_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path)

    def trained(name: str, **knobs: object) -> RecordingProbe:
        probe = RecordingProbe()
        engines.fused.train(with_train(job, name), parse(engines.fused.Knobs, {**KNOBS, **knobs}), probe)
        return probe

    def away(memory: MemoryModel, *_: object, **__: object) -> Choice:
        plans = (KEEP_ALL,) * memory.shape.num_layers
        return Choice(plans, 64, memory.moved().peak(plans), PINNED, 1.0, embedding_away=True)

    kept = trained("kept")
    monkeypatch.setattr(budget, "choice_within", away)
    moved = trained("moved", recompute="fit", memory_gib=1.0)
    assert moved.losses == kept.losses
    assert moved.grad_norms == pytest.approx(kept.grad_norms, rel=1e-6)
    assert moved.chosen["plan"] == f"{described((KEEP_ALL,))}; embedding on the host"
    assert moved.chosen["pinned_bytes"] == PINNED
