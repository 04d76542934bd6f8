"""The verdict: every way of not training the same is caught and named, harmless noise passes, and what cannot be known is not assumed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from harness.anchors import Anchor, anchors
from harness.deviations import TESTS
from harness.parity import Run, Verdict, judge, verdict
from harness.record import Score
from harness.updates import UpdatePair, pair_key
from tests import records

HELD_OUT, UPDATE = records.TRAINED_LOSS, records.UPDATE_NORM


def run(
    name: str = "hf",
    *,
    scored: bool = True,
    held_out_loss: float = HELD_OUT,
    update_norm: float | None = UPDATE,
    first: bool = True,
    cosine: float | None = 1.0,
    first_norm: float = 0.5,
    first_cosine: float = 1.0,
    **changed: Any,
) -> Run:
    """A run with all that parity can know of it; ``cosine`` None: its final update was compared with no other."""
    record = records.record(records.engine(name), **changed)
    if not scored:
        return Run(record)
    mine = records.score(record, held_out_loss=held_out_loss, update_norm=update_norm)
    whole, alone = (records.made(records.record(records.engine(name), work=work).cell) for work in (WORK, WORK.first_step))
    pairs = [*([pair(whole, 1.0, cosine)] if cosine is not None else []), pair(alone, first_norm / 0.5, first_cosine)]
    of_first = records.record(records.engine(name), work=WORK.first_step) if first else None
    updates = {pair_key(one.start_sha256, *one.trained_sha256): one for one in pairs}
    return Run(record, mine, records.score(record, base=True), of_first, updates)


def pair(made: dict[str, Any], ratio: float, cosine: float | None) -> UpdatePair:
    """With the same of engine hf, whose update has the norm 1."""
    work = WORK if made["tokens_sha256"] == records.made(records.record(work=WORK).cell)["tokens_sha256"] else WORK.first_step
    reference = records.made(records.record(records.engine("hf"), work=work).cell)["adapter_sha256"]
    both = sorted([(made["adapter_sha256"], ratio), (reference, 1.0)])
    return UpdatePair(
        start_sha256=made["adapter_init_sha256"], trained_sha256=(both[0][0], both[1][0]), norms=(both[0][1], both[1][1]), cosine=cosine
    )


def noisy(values: tuple[float, ...], size: float, seed: int = 0) -> tuple[float, ...]:
    return tuple(np.array(values) + np.random.default_rng(seed).normal(0, size, len(values)))


def candidate(**changed: Any) -> Verdict:
    return judge(run("fused", **changed), run(), anchor="fp32")


WORK = records.workload()
LOSSES = records.losses()
STEPS = records.steps()
SHUFFLED = (STEPS.stream_sha256[1], STEPS.stream_sha256[0], *STEPS.stream_sha256[2:])
TRUNCATED = {
    "tokens_input": (*STEPS.tokens_input[:4], STEPS.tokens_input[4] - 100, *STEPS.tokens_input[5:]),
    "tokens_loss": (*STEPS.tokens_loss[:4], STEPS.tokens_loss[4] - 40, *STEPS.tokens_loss[5:]),
    "stream_sha256": (*STEPS.stream_sha256[:4], records.sha256("shorter"), *STEPS.stream_sha256[5:]),
}


def test_the_same_run_is_the_same() -> None:
    found = candidate()
    assert (found.kind, found.label, found.reasons, found.can_win) == ("same", "same: fp32", (), True)
    assert "allowed" in found.worst
    assert [test.name for test, _ in found.tests] == list(TESTS)
    assert found.light.passed is True


def test_harmless_float_noise_passes() -> None:
    changed = {"losses": noisy(LOSSES, 3e-4), "grad_norms": noisy(tuple(float(x or 0) for x in STEPS.grad_norms), 2e-3)}
    found = candidate(**changed, held_out_loss=HELD_OUT + 2e-4, update_norm=UPDATE * 1.001)
    assert found.kind == "same", found.reasons


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        pytest.param({"losses": tuple(x + 0.01 for x in LOSSES)}, "loss of step 1", id="another function from the start"),
        pytest.param({"losses": tuple(x - 0.01 for x in LOSSES)}, "loss of step 1", id="a lower loss is not parity either"),
        pytest.param({"losses": (*LOSSES[:12], *(0.0,) * 8)}, "largest loss deviation (step", id="loss 0.0"),
        pytest.param({"losses": tuple(x + 0.0015 * (-1) ** i for i, x in enumerate(LOSSES))}, None, id="within the floor"),
        pytest.param({"grad_norms": (0.8 * 1.05, *STEPS.grad_norms[1:])}, "gradient norm of step 1", id="gradient scaled by 5 %"),
        pytest.param({"grad_norms": (0.0, *STEPS.grad_norms[1:])}, "gradient norm of step 1", id="no gradient"),
        pytest.param({"update_norm": UPDATE * 1.01}, "final update norm", id="learning rate 1 % too high"),
        pytest.param({"update_norm": UPDATE * 0.99}, "final update norm", id="learning rate 1 % too low"),
        pytest.param({"update_norm": 0.0, "held_out_loss": records.BASE_LOSS}, "final update norm", id="trained nothing"),
        pytest.param({"first_norm": 0.505}, "update norm of step 1: 1.0100 x", id="first update 1 % too long"),
        pytest.param({"first_norm": 0.0}, "update norm of step 1: 0.0000 x", id="no first update"),
        pytest.param({"first_cosine": 0.997}, "direction of the first update: cosine 0.99700", id="first update astray"),
        pytest.param({"cosine": 0.997}, "direction of the final update: cosine 0.99700", id="final update astray"),
        pytest.param({"held_out_loss": HELD_OUT + 0.002}, "held-out loss", id="worse weights"),
        pytest.param({"held_out_loss": HELD_OUT - 0.002}, "held-out loss", id="better weights"),
        pytest.param({"losses": (*LOSSES[:7], math.nan, *LOSSES[8:])}, "loss is nan at step 8", id="a NaN loss"),
        pytest.param({"losses": (*LOSSES[:7], math.inf, *LOSSES[8:])}, "loss is inf at step 8", id="an infinite loss"),
        pytest.param(
            {"grad_norms": (*STEPS.grad_norms[:2], math.nan, *STEPS.grad_norms[3:])}, "gradient norm is nan at step 3", id="NaN gradient"
        ),
        pytest.param({"held_out_loss": math.nan}, "held-out loss is nan", id="weights that score NaN"),
    ],
)
def test_another_training_is_different_and_the_test_is_named(changed: dict[str, Any], named: str | None) -> None:
    found = candidate(**changed)
    if named is None:
        assert found.kind == "same"
        return
    assert found.kind == "different"
    assert any(named in reason for reason in found.reasons), found.reasons
    assert found.label == "different"
    assert not found.can_win


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        pytest.param(TRUNCATED, "supervised tokens differ from step 5: 871, the reference has 912", id="truncated"),
        pytest.param(TRUNCATED, "token stream differs from step 5 (truncated rows?)", id="truncated stream"),
        pytest.param({"stream_sha256": SHUFFLED}, "token stream differs from step 1 (shuffled: the same tokens", id="shuffled"),
        pytest.param(
            {"tokens_loss": STEPS.tokens_input},
            "supervised tokens differ from step 1: 3000, the reference has 900",
            id="prompt mask dropped",
        ),
        pytest.param({"ran": records.steps(num_steps=19)}, "another number of steps: 19, the reference has 20", id="a step skipped"),
        pytest.param({"losses": LOSSES[:-1]}, "another number of steps: 19 and 20", id="ragged arrays"),
    ],
)
def test_changed_data_is_not_comparable_and_cannot_win(changed: dict[str, Any], named: str) -> None:
    if changed is TRUNCATED:
        named = named.replace("871, the reference has 912", f"{TRUNCATED['tokens_loss'][4]}, the reference has {STEPS.tokens_loss[4]}")
    found = candidate(**changed)
    assert found.kind == "not comparable"
    assert any(named in reason for reason in found.reasons), found.reasons
    assert found.light.passed is False
    assert not found.can_win


@pytest.mark.parametrize(
    ("artifact", "named"),
    [("tokens_sha256", "another token file"), ("base_sha256", "another base weights"), ("adapter_init_sha256", "another initial adapter")],
)
def test_other_inputs_are_not_comparable_but_no_fault_of_the_engine(artifact: str, named: str) -> None:
    found = candidate(artifacts={artifact: records.sha256("other")})
    assert (found.kind, found.light.passed, found.can_win) == ("not comparable", None, True)
    assert found.detail.startswith(named)


def test_another_workload_is_not_comparable() -> None:
    found = candidate(work=records.workload(seed=7))
    assert found.kind == "not comparable"
    assert "another workload" in found.detail


@pytest.mark.parametrize("status", ["oom", "crash", "unsteady"])
def test_a_run_that_failed_is_not_comparable(status: str) -> None:
    found = candidate(status=status, ran=STEPS)
    assert (found.kind, found.worst) == ("not comparable", f"status {status}")
    assert verdict(run("fused", status=status, ran=STEPS), [Anchor("fp32", run())]).can_win is False


def test_a_broken_reference_judges_nobody() -> None:
    for reference in (run(status="crash", ran=STEPS), run(losses=(math.nan, *LOSSES[1:])), run(held_out_loss=math.nan)):
        found = judge(run("fused"), reference)
        assert found.kind == "not comparable"
        assert "the reference" in found.detail


@pytest.mark.parametrize(
    ("of_candidate", "of_reference", "named"),
    [
        ({"scored": False}, {}, "no held-out score of this run"),
        ({}, {"scored": False}, "no held-out score of the reference, the base weights"),
        ({"grad_norms": (None,) * 20}, {}, "no gradient norm of step 1"),
        ({}, {"grad_norms": (None,) * 20}, "the reference has no gradient norm of step 1"),
        ({"update_norm": None}, {}, "no norm of the update"),
        ({}, {"update_norm": None}, "the reference has no norm of the update"),
    ],
)
def test_what_is_missing_is_never_assumed(of_candidate: dict[str, Any], of_reference: dict[str, Any], named: str) -> None:
    found = judge(run("fused", **of_candidate), run(**of_reference))
    assert found.kind == "not comparable"
    assert named in found.detail
    assert found.light.passed is True
    assert found.can_win


def test_scores_of_two_evaluators_are_not_compared() -> None:
    one = run("fused")
    assert one.score is not None
    other = Score(**{**one.score.model_dump(), "evaluator": "another"})
    assert "scored by another evaluator" in judge(Run(one.record, other, one.base_score), run()).detail


@pytest.mark.parametrize(
    ("losses", "passed", "step"),
    [
        (tuple(x + 0.003 for x in LOSSES), True, ""),
        (tuple(x + 0.02 for x in LOSSES), False, "loss of step 1 "),
        ((*LOSSES[:-1], 0.0), False, "loss of step 20 "),
    ],
)
def test_the_light_check_speaks_where_there_are_no_scores(losses: tuple[float, ...], passed: bool, step: str) -> None:
    found = candidate(losses=losses, scored=False)
    assert (found.kind, found.light.passed, found.can_win) == ("not comparable", passed, passed)
    assert step in found.light.detail


def test_without_power_nothing_is_called_the_same() -> None:
    reference = run(held_out_loss=records.BASE_LOSS - 0.009)
    found = judge(run("fused", held_out_loss=records.BASE_LOSS - 0.009), reference)
    assert found.kind == "not comparable"
    assert found.reasons == (
        "no power: training lowered the reference's held-out loss by 0.0090, a verdict needs 0.0100; train for longer",
    )
    assert found.can_win
    broken = judge(run("fused", held_out_loss=records.BASE_LOSS - 0.009, update_norm=0.0), reference)
    assert broken.kind == "not comparable"
    assert "final update norm" in broken.detail
    assert not broken.can_win
    assert not verdict(run("fused", held_out_loss=records.BASE_LOSS - 0.009, update_norm=0.0), [Anchor("fp32", reference)]).can_win


def test_variants_of_the_reference_widen_the_allowance_to_twice_their_deviation() -> None:
    variants = [run(update_norm=UPDATE * factor) for factor in (1.004, 0.998, 1.001)]
    assert judge(run("fused", update_norm=UPDATE * 1.0075), run(), variants).kind == "same"
    assert judge(run("fused", update_norm=UPDATE * 1.009), run(), variants).kind == "different"
    assert judge(run("fused", update_norm=UPDATE * 1.0075), run()).kind == "different"


def test_wider_allowances_ask_for_more_power() -> None:
    variants = [run(held_out_loss=HELD_OUT + off) for off in (0.01, 0.02, 0.03)]
    assert "no power" in judge(run("fused"), run(), variants).detail


def test_what_is_no_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="not a variant of the reference: status crash"):
        judge(run("fused"), run(), [run(), run(), run(status="crash", ran=STEPS)])


def hf(dtype: str, *, scored: bool = True, **changed: Any) -> Run:
    knobs = changed.pop("knobs", {})
    record = records.record(records.engine("hf", compute_dtype=dtype, **knobs), **changed)
    return Run(record, records.score(record), records.score(record, base=True)) if scored else Run(record)


def test_the_truth_is_hf_in_fp32_of_the_same_machine_then_scored_then_the_lowest_repeat() -> None:
    work = records.workload().key
    here, there = records.CPU, records.GPU
    runs = [
        hf("float32", machine=there, repeat=0), hf("float32", machine=here, repeat=0, scored=False), hf("float32", machine=here, repeat=2),
        hf("float32", machine=here, repeat=1), hf("bfloat16", machine=there), run("fused"), hf("float32", work=records.workload(seed=9)),
        hf("float32", machine=here, repeat=0, status="crash", ran=STEPS), hf("float32", knobs={"kernels": "liger"}),
        hf("float32", losses=(math.nan, *LOSSES[1:])),
    ]  # fmt: skip
    truth, anchor = anchors(runs, work, here.key)
    assert (truth.name, truth.run) == ("fp32", runs[3])
    assert (anchor.name, anchor.run) == ("bf16", runs[4])
    assert anchors([run("fused")], work, here.key) == ()


def test_a_candidate_needs_one_anchor_for_all_tests() -> None:
    shifted = tuple(x + 0.004 for x in LOSSES)
    others = tuple(hf("bfloat16", losses=noisy(shifted, 1e-4, seed), knobs={"micro_batch": 10 + seed}) for seed in range(3))
    near = tuple(hf("float32", losses=noisy(LOSSES, 1e-5, seed), knobs={"micro_batch": 10 + seed}) for seed in range(3))
    truth = Anchor("fp32", hf("float32"), near, near)
    anchor = Anchor("bf16", hf("bfloat16", losses=tuple(x + 0.004 for x in LOSSES)), others)
    assert verdict(hf("bfloat16"), [truth, anchor]).label.startswith("same: fp32")
    assert verdict(hf("bfloat16", losses=tuple(x + 0.0041 for x in LOSSES)), [truth, anchor]).label.startswith("same: bf16")
    mixed = tuple(x + (0.004 if i % 2 else 0.0) for i, x in enumerate(LOSSES))
    assert verdict(hf("bfloat16", losses=mixed), [truth, anchor]).label == "different"
    assert verdict(truth.run, [truth, anchor]).label == "reference: fp32"
    assert verdict(anchor.run, [truth, anchor]).label == "reference: bf16"


def test_without_a_reference_nothing_is_proven_but_a_nan_cannot_win() -> None:
    found = verdict(run("fused"), [])
    assert (found.kind, found.can_win, found.light.passed) == ("not comparable", True, None)
    assert "run engine=hf" in found.detail
    assert verdict(run("fused", losses=(math.nan, *LOSSES[1:])), []).label == "different"


def test_what_could_not_be_tested_is_said_and_why() -> None:
    partly = judge(run("fused", first=False), run(), anchor="fp32")
    assert (partly.kind, partly.label) == ("same", "same: fp32 (7 of 9 tests)")
    assert "not tested: update norm of step 1, direction of the first update (the first step of this run was not run alone" in partly.detail
    unmatched = judge(run("fused", cosine=None), run(), anchor="fp32")
    assert unmatched.label == "same: fp32 (8 of 9 tests)"
    assert "not tested: direction of the final update (the weights were not compared before they were deleted" in unmatched.detail
