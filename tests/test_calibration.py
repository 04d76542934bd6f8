"""In bf16 the allowance comes from harmless variants of the reference; without them a deviation is an open question."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from harness.anchors import Anchor, anchor_at, anchors, is_yardstick
from harness.comparable import Run
from harness.parity import judge, judge_against, verdict
from tests import records

LOSSES = records.losses()
HARMLESS: tuple[dict[str, Any], ...] = ({"attention": "eager"}, {"micro_batch": 1}, {"recompute": "full"})


def run(name: str = "hf", *, off: float = 0.0, dtype: str = "bfloat16", update_norm: float = records.UPDATE_NORM, **knobs: Any) -> Run:
    record = records.record(records.engine(name, compute_dtype=dtype, **knobs), losses=tuple(loss + off for loss in LOSSES))
    return Run(record, records.score(record, update_norm=update_norm), records.score(record, base=True))


VARIANTS = [run(off=0.002, attention="eager"), run(off=0.004, micro_batch=1), run(off=-0.003, recompute="full")]


def test_a_deviation_above_the_floor_is_open_until_three_variants_are_known() -> None:
    open_question = judge(run("fused", off=0.007), run(), VARIANTS[:2])
    assert open_question.kind == "not comparable"
    assert "known from 2 of 3" in open_question.reasons[0]
    assert "loss of step 1" in open_question.detail
    assert judge(run("fused", off=0.007), run(), VARIANTS).kind == "same", "twice the largest, 0.008, is allowed"
    assert judge(run("fused", off=0.009), run(), VARIANTS).kind == "different"


def test_within_the_floor_needs_no_variants() -> None:
    assert judge(run("fused", off=0.001), run()).kind == "same"


def test_fp32_has_no_rounding_to_excuse_it() -> None:
    assert judge(run("fused", off=0.007, dtype="float32"), run(dtype="float32")).kind == "different"


def test_an_fp32_run_is_judged_by_the_truth_alone() -> None:
    truth, rounded = Anchor("fp32", run(dtype="float32")), Anchor("bf16", run(off=0.007))
    assert verdict(run("fused", off=0.007, dtype="float32"), [truth, rounded]).kind == "different"
    assert verdict(run("fused", off=0.007), [truth, rounded]).label.startswith("same: bf16")


@pytest.mark.parametrize(
    ("off", "passed"), [(0.3, True), (0.004, True), (0.15, False)], ids=["like bf16", "like the truth", "like neither"]
)
def test_an_open_question_needs_the_curve_of_one_anchor(off: float, passed: bool) -> None:
    found = verdict(run("fused", off=off, update_norm=9.0), [Anchor("fp32", run(dtype="float32")), Anchor("bf16", run(off=0.3))])
    assert (found.kind, found.light.passed, found.can_win) == ("not comparable", passed, passed)


PLAIN = {"kernels": "none", "compile": False, "layout": "padded", "attention": "eager", "adapter_compute": "autocast"}
CANDIDATES: tuple[dict[str, Any], ...] = (
    {"kernels": "liger"}, {"compile": True}, {"layout": "packed"}, {"attention": "cudnn"}, {"attention": "varlen"},
    {"adapter_compute": "direct"}, {"adapter_compute": "float32"}, {"optimizer": "adamw_8bit"},
)  # fmt: skip


@pytest.mark.parametrize("knobs", CANDIDATES, ids=str)
def test_hf_with_anything_added_is_a_candidate_and_no_yardstick(knobs: dict[str, Any]) -> None:
    assert is_yardstick(run(**PLAIN).record)
    assert is_yardstick(run(kernels="none", compile=False, attention="sdpa").record), "recorded before the other knobs were there"
    assert not is_yardstick(run(**{**PLAIN, **knobs}).record)


def test_variants_are_found_among_the_reference_runs() -> None:
    superfluous = [*(run(off=0.05, **knobs) for knobs in CANDIDATES), run(off=0.05, dtype="float32"), run("fused", off=0.05)]
    group = [run(), *VARIANTS, *superfluous]
    work, machine = group[0].record.cell.workload.key, group[0].record.machine.key
    bf16 = next(anchor for anchor in anchors(group, work, machine) if anchor.name == "bf16")
    knobs = [one.record.cell.engine.knobs for one in (bf16.run, *bf16.variants)]
    assert len(knobs) == 4
    assert all(one["compute_dtype"] == "bfloat16" and one.get("kernels", "none") == "none" for one in knobs)


def test_an_open_question_keeps_the_light_check_of_the_anchor_that_rounds_alike() -> None:
    truth = Anchor("fp32", run(off=0.3, dtype="float32"))
    rounded = Anchor("bf16", run(), tuple(VARIANTS))
    found = verdict(run("fused", off=0.009), [truth, rounded])
    assert (found.kind, found.light.passed, found.can_win) == ("not comparable", False, False)
    close = verdict(run("fused", off=0.0081), [truth, rounded])
    assert (close.kind, close.light.passed, close.can_win) == ("not comparable", True, True)


def test_candidates_that_round_are_allowed_what_the_augmented_reference_strays_from_the_truth() -> None:
    around = [
        run("fused", off=off, operations="reference", micro_batch=micro_batch) for off, micro_batch in ((0.004, 1), (0.003, 2), (0.002, 8))
    ]
    exact, eight = run(dtype="float32"), run("fused", off=0.05, operations="reference", optimizer_state="int8")
    (truth,) = anchors([exact, *around, eight], exact.record.cell.workload.key, records.CPU.key)
    assert [variant.record for variant in truth.rounding] == [variant.record for variant in around]
    fast = run("fused", off=0.007, operations="fused")
    assert verdict(fast, [truth]).label.startswith("same: fp32"), "twice 0.004 is allowed"
    (few,) = anchors([exact, *around[:2]], exact.record.cell.workload.key, records.CPU.key)
    assert "known from 2 of 3: run engine=fused engine.knobs.operations=reference" in verdict(fast, [few]).detail
    assert verdict(run(off=0.007, dtype="float32", attention="eager"), [truth]).kind == "different", (
        "what computes in fp32 has no rounding to excuse it"
    )


@pytest.mark.parametrize(("first", "kind"), [(-0.009, "same"), (0.009, "same"), (0.011, "different")])
def test_before_any_update_the_truth_is_a_variant_of_what_rounds(first: float, kind: str) -> None:
    """The variants agree to 0.001 in the first loss, the truth is 0.005 away; all of them stray by 0.01 later."""
    exact = bent(0.005, 0.3, dtype="float32")
    around = [bent(off, 0.01, **changed) for off, changed in zip((0.0, 0.0005, 0.001), HARMLESS, strict=True)]
    group = [run(), *around, exact]
    anchor = next(one for one in anchors(group, exact.record.cell.workload.key, records.CPU.key) if one.name == "bf16")
    assert anchor.at_first == (exact,)
    assert judge_against(bent(first, 0.01, "fused"), anchor).kind == kind
    without = judge_against(bent(first, 0.01, "fused"), replace(anchor, at_first=()))
    assert without.kind == "different"
    assert "loss of step 1" in without.detail


SPLITS: tuple[dict[str, Any], ...] = tuple({"operations": "reference", "micro_batch": size} for size in (1, 2, 8))


@pytest.mark.parametrize(("first", "later", "kind"), [(0.009, 0.01, "same"), (0.011, 0.01, "different"), (0.009, 0.03, "different")])
def test_before_any_update_what_rounds_is_a_variant_of_the_truth(first: float, later: float, kind: str) -> None:
    """Later it is none: there bf16 ``hf`` trails."""
    exact, rounded = (
        bent(0.0, 0.0, dtype="float32"),
        [bent(off, 0.3, **knobs) for off, knobs in zip((0.004, -0.005), HARMLESS, strict=False)],
    )
    around = [bent(0.003, 0.005 + 0.001 * index, "fused", **knobs) for index, knobs in enumerate(SPLITS)]
    (truth, *_) = anchors([exact, *rounded, *around], exact.record.cell.workload.key, records.CPU.key)
    assert truth.at_first == tuple(rounded)
    assert judge_against(bent(first, later, "fused"), truth).kind == kind


def test_variants_whose_first_loss_agrees_to_the_bit_prove_nothing_by_it() -> None:
    around = [bent(0.003, 0.005 + 0.001 * index, "fused", **knobs) for index, knobs in enumerate(SPLITS)]
    truth = Anchor("fp32", bent(0.0, 0.0, dtype="float32"), rounding=tuple(around))
    assert judge_against(bent(0.0059, 0.006, "fused"), truth).kind == "same", "twice what one rounding was seen to do is allowed"
    found = judge_against(bent(0.007, 0.006, "fused"), truth)
    assert (found.kind, "known from 1 of 3: run engine=hf in bfloat16 with other attention" in found.detail) == ("not comparable", True)
    assert judge_against(bent(0.003, 0.02, "fused"), truth).kind == "different", "later losses differ among them"


def bent(first: float, later: float, name: str = "hf", *, dtype: str = "bfloat16", **knobs: Any) -> Run:
    """A run whose loss is off by ``first`` in step 1 and by ``later`` after that."""
    record = records.record(
        records.engine(name, compute_dtype=dtype, **knobs), losses=(LOSSES[0] + first, *(loss + later for loss in LOSSES[1:]))
    )
    return Run(record, records.score(record), records.score(record, base=True))


def test_a_variant_says_nothing_about_how_far_it_may_stray_itself() -> None:
    """Else it is allowed twice what it strays, however far that is."""
    far = run(off=0.05, attention="eager", micro_batch=2)
    others = [run(off=0.002, micro_batch=size) for size in (8, 16, 32)]
    anchor = Anchor("bf16", run(), (far, *others))
    assert judge_against(far, anchor).kind == "different"
    assert judge_against(run("fused", off=0.05), anchor).kind == "same", "another engine may stray as far as any of them"
    assert judge_against(far, Anchor("bf16", run(), (far, *others[:2]))).kind == "not comparable", "two others are too few"


def test_the_variants_of_a_named_reference_are_the_newest_of_their_choice() -> None:
    """``harness.compare`` and the report allow the same."""

    def on(day: int, off: float, **knobs: Any) -> Run:
        one = run(off=off, **knobs)
        dated = one.record.provenance.model_copy(update={"started_utc": f"2026-11-{day}T10:00:00+00:00"})
        return replace(one, record=one.record.model_copy(update={"provenance": dated}))

    known = [on(20, 0.0), on(19, 0.0), on(18, 0.0)]  # what was repeated most is the reference
    known += [on(21, 0.009, micro_batch=8), on(25, 0.002, micro_batch=8), on(22, 0.001, micro_batch=16), on(22, 0.001, micro_batch=32)]
    (anchor,) = anchors(known, known[0].record.cell.workload.key, known[0].record.machine.key)
    named = anchor_at(known[0], known)
    assert anchor.run == named.run == known[0]
    assert named.plain == anchor.plain
    assert named.variants[0] is known[4]
