"""The memory model against what an H100 needed, and plans that stay within their budget at the least recomputation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engines.fused
from engines.native.bench import model_shape
from engines.native.budget import choice_within, plans_for
from engines.native.durations import Durations
from engines.native.footprint import Load, MemoryModel, Ranks
from engines.native.fp8_reasons import Mode
from engines.native.host import Host, usable_bytes
from engines.native.plan import KEEP_ALL, KEEP_INPUT, MOVABLE, Names, Plan
from engines.native.planner import Choice, choose
from engines.native.shape import LlamaShape
from engines.native.store import OptimizerState, Store, Training
from harness.errors import UnsupportedError
from harness.spec import parse
from tests.engines.allocations import meta_decoder, transient_bytes
from tests.engines.test_fused import KNOBS
from tests.engines.tiny import RecordingProbe, make_job, with_train

GIB = 2**30
PADDED, RANK = 64, 16
# docs/log.md, 2026-11-24 (32,768 tokens: 2026-11-27): allocated at most in a step with everything kept, LoRA r 16 on all linears, logits of
# 2,048 rows at once.
MEASURED = [
    ("llama3_8b", 4, 2048, 39.91),
    ("llama3_8b", 1, 2048, 22.27),
    ("llama3_1b", 4, 2048, 9.60),
    ("llama3_1b", 1, 2048, 4.72),
    ("llama3_8b", 1, 32768, 110.1),
]


def static_bytes(shape: LlamaShape) -> int:
    """Weights in bf16 and adapters with their optimizer, from the shape alone."""
    hidden, inner, heads = shape.hidden_size, shape.intermediate_size, shape.query_size + 2 * shape.key_size
    groups = ((heads, hidden, 3), (hidden, shape.query_size, 1), (2 * inner, hidden, 2), (hidden, inner, 1))
    layer = sum((rows + PADDED) * (columns + PADDED) for rows, columns, _ in groups)
    adapters = sum(RANK * (parts * columns + rows) for rows, columns, parts in groups)
    tables = shape.vocab_size * hidden * (1 if shape.tied_head else 2)
    return 2 * (shape.num_layers * layer + tables) + 16 * shape.num_layers * adapters


def model_of(name: str, documents: int, tokens: int) -> MemoryModel:
    shape = model_shape(name, None)
    load = Load(documents * tokens, tokens, documents * (tokens - 1), 2048)
    return MemoryModel(shape, Ranks(PADDED, PADDED, PADDED, PADDED), load, static_bytes(shape), 2)


@pytest.mark.parametrize(("name", "documents", "tokens", "gib"), MEASURED)
def test_predicts_what_was_measured(name: str, documents: int, tokens: int, gib: float) -> None:
    model = model_of(name, documents, tokens)
    assert model.peak((KEEP_ALL,) * model.shape.num_layers) / GIB == pytest.approx(gib, rel=0.02)


SMALL: Names = KEEP_ALL.kept - MOVABLE
PLANS = {
    "all": KEEP_ALL,
    "input": KEEP_INPUT,
    "in_pieces": Plan(KEEP_ALL.kept - {"gate_up"}, pieces=4),
    "kept_in_pieces": Plan(KEEP_ALL.kept, pieces=2),
    "again": Plan(SMALL | {"input", "middle"}, pieces=2),
    "attention_away": Plan(SMALL, frozenset(("input", "heads", "attended"))),
    "attention_away_in_pieces": Plan(SMALL, frozenset(("input", "heads", "attended")), pieces=8),
    "input_away": Plan(SMALL, frozenset(("input",)), pieces=4),
    "all_away": Plan(SMALL, MOVABLE),
}


@pytest.mark.parametrize("fp8", get_args(Mode))
@pytest.mark.parametrize("name", ["all", "input", "in_pieces", "again", "all_away"])
def test_predicts_the_live_bytes_of_8_bit_operations(monkeypatch: pytest.MonkeyPatch, name: str, fp8: Mode) -> None:
    monkeypatch.setattr(Host, "_copy", lambda *_, **__: None)
    shape, plan, load = model_shape("llama3_8b", 3), PLANS[name], Load(8192, 2048, 8188, 256)
    decoder = meta_decoder(shape, fp8)
    ranks = Ranks(*(group.padded_rank for group in decoder.weights.layers[0].groups))
    assert ranks == Ranks(48, 16, 32, 16)
    model = MemoryModel(shape, ranks, load, 0, 2, fp8)
    assert model.peak([plan] * 3) == pytest.approx(transient_bytes(decoder, load, [plan] * 3), rel=0.01)


@pytest.mark.parametrize("chunk", [2048, 256])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_predicts_the_live_bytes_of_the_fused_operations(monkeypatch: pytest.MonkeyPatch, plan: Plan, chunk: int) -> None:
    """What is alive is counted, allocation by allocation, without the kernels."""
    monkeypatch.setattr(Host, "_copy", lambda *_, **__: None)
    shape = model_shape("llama3_8b", 5)
    load = Load(8192, 2048, 8188, chunk)
    model, decoder = MemoryModel(shape, Ranks(PADDED, PADDED, PADDED, PADDED), load, 0, 2), meta_decoder(shape)
    for plans in ([plan] * 5, [plan, plan, KEEP_ALL, plan, KEEP_INPUT]):
        assert model.peak(plans) == pytest.approx(transient_bytes(decoder, load, plans), rel=0.01)


@pytest.mark.parametrize("state", ["fp32", "int8"])
@pytest.mark.parametrize("plan", [KEEP_ALL, KEEP_INPUT, PLANS["again"]], ids=["all", "input", "again"])
def test_predicts_the_live_bytes_of_a_full_fine_tune(plan: Plan, state: OptimizerState) -> None:
    """All buffers of weights and gradients are there before; what is made besides has no thin parts."""
    shape = model_shape("llama3_8b", 5)
    load, decoder = Load(8192, 2048, 8188, 2048), meta_decoder(shape, training=Training(state, in_backward=True))
    model = replace(MemoryModel.of(shape, decoder.weights, load), static=0)
    assert model.ranks == Ranks(0, 0, 0, 0)
    assert model.peak([plan] * 5) == pytest.approx(transient_bytes(decoder, load, [plan] * 5), rel=0.01)


FULL_BYTES = {("fp32", True): 14, ("fp32", False): 18, ("int8", True): 4, ("int8", False): 8}  # a trained value, scales and scratch apart


@pytest.mark.parametrize(("state", "in_backward"), FULL_BYTES)
def test_an_8b_full_fine_tune_fits_one_80_gb_card_with_8_bit_moments_only(state: OptimizerState, in_backward: bool) -> None:
    shape = model_shape("llama3_8b", None)
    weights = meta_decoder(shape, training=Training(state, in_backward=in_backward)).weights
    assert isinstance(weights.arena, Store)
    model = MemoryModel.of(shape, weights, Load(8192, 2048, 8188, 2048))
    values = len(weights.arena.values)
    assert values == pytest.approx(8.03e9, rel=1e-3)
    scratch = 4 * (128256 * 4096 + 218.2e6) if in_backward else 0
    assert model.static == pytest.approx(FULL_BYTES[state, in_backward] * values + scratch, rel=0.02)
    if state == "fp32":
        with pytest.raises(UnsupportedError, match="needs at least"):
            choose(model, 75 * GIB, 0)
        return
    choice = choose(model, 75 * GIB, 64 * GIB)
    assert in_backward == (choice.plans == (KEEP_ALL,) * 32)


@pytest.mark.parametrize("host", [0, 64 * GIB], ids=["again", "offload"])
def test_a_document_of_32768_tokens_has_a_plan_on_an_80_gb_card(host: float) -> None:
    model = model_of("llama3_8b", 1, 32768)
    choice = choose(model, 76 * GIB, host)
    assert 70 * GIB < choice.peak_bytes < 76 * GIB
    assert {plan.pieces for plan in choice.plans} == {1}
    assert seconds_of(model, choice) < (1.02 if host else 1.08) * seconds_of(model, replace(choice, plans=(KEEP_ALL,) * 32))


def seconds_of(model: MemoryModel, choice: Choice) -> float:
    durations = Durations(model)
    return durations.step([durations.layer(plan) for plan in choice.plans], choice.loss_chunk)


@settings(deadline=None, max_examples=12)
@given(st.floats(16.0, 45.0), st.sampled_from([0.0, 3 * GIB, 64 * GIB]))
def test_stays_within_the_budgets(gib: float, host: float) -> None:
    model = model_of("llama3_8b", 4, 2048)
    try:
        choice = choose(model, gib * GIB, host)
    except UnsupportedError:
        assert gib < (19 if host == 0 else 18)
        return
    assert model.peak(choice.plans, choice.loss_chunk) == choice.peak_bytes <= gib * GIB
    assert sum(model.total(plan.offloaded) for plan in choice.plans) <= choice.host_bytes <= host
    assert choice.seconds == seconds_of(model, choice)
    assert all("gate_up" not in plan.offloaded for plan in choice.plans)


@pytest.mark.parametrize("host", [0.0, 64.0 * GIB], ids=["again", "offload"])
def test_a_smaller_budget_never_costs_less(host: float) -> None:
    model = model_of("llama3_8b", 4, 2048)
    choices = [choose(model, gib * GIB, host) for gib in (45, 38, 32, 26, 22)]
    assert choices[0].plans == (KEEP_ALL,) * 32
    costs = [choice.seconds for choice in choices]
    assert costs == sorted(costs)
    assert costs[-1] > costs[0]


def test_offloading_is_faster_and_needs_less() -> None:
    model = model_of("llama3_8b", 4, 2048)
    for gib in (36, 24, 20):
        again, away = choose(model, gib * GIB, 0), choose(model, gib * GIB, 64 * GIB)
        assert away.seconds < 0.97 * again.seconds
        assert again.host_bytes == 0 < away.host_bytes
    with pytest.raises(UnsupportedError):
        choose(model, 17.7 * GIB, 0)
    assert choose(model, 17.7 * GIB, 64 * GIB).peak_bytes < 17.7 * GIB


def test_rows_of_logits_and_pieces_shrink_only_when_they_are_the_peak() -> None:
    model = model_of("llama3_1b", 4, 2048)
    wide, tight = choose(model, 12 * GIB, 64 * GIB), choose(model, 3.05 * GIB, 64 * GIB)
    assert wide.loss_chunk == 2048 > tight.loss_chunk
    assert {plan.pieces for plan in wide.plans} == {1} != {plan.pieces for plan in tight.plans}


# docs/log.md, 2026-11-24, a memory planner: tokens/s at 4 x 2,048; the layers that made gate and up, heads, attention, the middle again.
TIMED = [
    ("llama3_8b", 17316, (0, 0, 0, 0)), ("llama3_8b", 15001, (15, 0, 32, 32)), ("llama3_8b", 13329, (32, 27, 32, 32)),
    ("llama3_1b", 88780, (0, 0, 0, 0)), ("llama3_1b", 75335, (15, 0, 0, 16)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rate", "again"), TIMED)
def test_seconds_are_near_what_was_measured(name: str, rate: float, again: tuple[int, ...]) -> None:
    durations = Durations(model_of(name, 4, 2048))
    units: tuple[Names, ...] = tuple(map(frozenset, (("gate_up",), ("heads", "qkv"), ("attended",), ("middle",))))
    plans = [
        Plan(KEEP_ALL.kept - frozenset().union(*(unit for unit, layers in zip(units, again, strict=True) if index < layers)))
        for index in range(durations.memory.shape.num_layers)
    ]
    assert durations.step([durations.layer(plan) for plan in plans], 2048) == pytest.approx(8192 / rate, rel=0.06)


# docs/engine.md, an H100, everything kept.
@pytest.mark.parametrize(
    ("name", "mode", "milliseconds"),
    [
        ("llama3_8b", "forward", 422.3),
        ("llama3_8b", "forward_and_input_gradients", 363.8),
        ("llama3_1b", "forward_and_input_gradients", 80.9),
    ],
)
def test_seconds_in_8_bits_are_near_what_was_measured(name: str, mode: Mode, milliseconds: float) -> None:
    durations = Durations(replace(model_of(name, 4, 2048), fp8=mode))
    layers = [durations.layer(KEEP_ALL)] * durations.memory.shape.num_layers
    assert durations.step(layers, 2048) == pytest.approx(milliseconds / 1000, rel=0.06)


def test_a_copy_costs_what_the_computation_does_not_hide() -> None:
    durations = Durations(model_of("llama3_8b", 4, 2048))
    away, kept = durations.layer(PLANS["attention_away"]), durations.layer(Plan(SMALL | {"input", "heads", "attended"}))
    hidden = durations.step([kept] * 8, 2048)
    assert durations.step([away] * 4 + [kept] * 4, 2048) == pytest.approx(hidden, rel=3e-3)
    slow = replace(away, away=away.attention + away.mlp + 1.0)
    assert durations.step([slow] * 4 + [kept] * 4, 2048) == pytest.approx(hidden + 4, rel=1e-2)
    late = replace(away, early=away.attention_backward + 1.0)
    assert durations.step([late] * 4 + [kept] * 4, 2048) == pytest.approx(hidden + 4, rel=1e-2)


def test_nothing_that_fits_is_said_with_what_would() -> None:
    with pytest.raises(
        UnsupportedError, match=r"needs at least 1\d\.\d GiB .* nothing on the host, and 10\.0 GiB are there; use a smaller"
    ):
        choose(model_of("llama3_8b", 4, 2048), 10 * GIB, 0)
    with pytest.raises(UnsupportedError, match=r"needs at least 16\.\d GiB .* and \d\.\d GiB more on the host, and 10\.0 GiB are there"):
        choose(model_of("llama3_8b", 4, 2048), 10 * GIB, 64 * GIB)


def test_a_host_with_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama3_8b", 4, 2048)
    monkeypatch.setattr("engines.native.budget.usable_bytes", lambda: 3.0 * GIB)
    with pytest.warns(RuntimeWarning, match=r"\d\.\d GiB would be offloaded, but only 3\.0 GiB"):
        choice = choice_within(model, 24 * GIB, offload=True, processes=1)
    assert 0 < choice.host_bytes <= 3 * GIB
    assert choice_within(model, 24 * GIB, offload=False, processes=1).host_bytes == 0


def test_the_host_has_memory() -> None:
    assert 2**20 < usable_bytes() < 2**50


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_budget_changes_no_loss(tmp_path: Path, family: str) -> None:
    job = make_job(tmp_path, family)

    def trained(name: str, **knobs: Any) -> RecordingProbe:
        probe = RecordingProbe()
        engines.fused.train(with_train(job, name), parse(engines.fused.Knobs, {**KNOBS, **knobs}), probe)
        return probe

    with pytest.raises(UnsupportedError, match="needs at least") as refused:
        trained("none", recompute="fit", memory_gib=1e-6)
    assert str(refused.value).count("GiB") == 2
    everything = trained("all")
    assert everything.chosen == {"plan": "all kept"}
    low, high = 1e-5, 1.0
    for _ in range(20):  # the smallest budget that fits
        middle = (low * high) ** 0.5
        try:
            plans_for(replace(job, device="cpu"), *_loaded(job, middle))
            high = middle
        except UnsupportedError:
            low = middle
    tight = trained("tight", recompute="fit", memory_gib=high)
    assert tight.losses == pytest.approx(everything.losses, rel=2e-6)
    assert str(tight.chosen["plan"]).startswith("again ")
    assert 0.9 * high * 2**30 < float(tight.chosen["predicted_peak_bytes"]) <= high * 2**30


def _loaded(job: Any, memory_gib: float) -> tuple[Any, ...]:
    knobs = parse(engines.fused.Knobs, {**KNOBS, "recompute": "fit", "memory_gib": memory_gib})
    _, _, native, shares, _ = engines.fused._load(job, parse(engines.fused.Knobs, KNOBS), 0)
    return knobs, native.shape, native.weights, shares


def test_a_budget_needs_the_plan_that_reads_it() -> None:
    from tests.engines.tiny import CPU, LLAMA, LORA, make_workload

    knobs = parse(engines.fused.Knobs, {**KNOBS, "memory_gib": 4.0})
    assert "memory_gib=4 is a budget for recompute=fit" in str(engines.fused.unsupported(make_workload(LLAMA, LORA), knobs, CPU))
