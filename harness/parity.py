"""Did a run train the same thing as the reference? The verdict, its worst deviation, where, and what that looks like."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from harness.anchors import Anchor
from harness.calibration import NUM_VARIANTS
from harness.comparable import Light, Run, blocked, dtype_of, in_fp32, measured, missing, not_finite, scored, unusable
from harness.deviations import FIRST_LOSS, HELD_OUT, HELD_OUT_FLOOR, TESTS, deviations, loss_floor, weights_deviations
from harness.record import Score
from harness.suspicion import suspicion
from harness.updates import Alike
from harness.verdict import Kind, Verdict

POWER = 10.0  # the held-out gain of the reference must be this many allowances, or equality proves nothing
LIGHT_RELATIVE = 0.002  # of the loss: the light check's allowance beside the loss floor, wide enough for bf16 on long steps
# In loss floors: three harmless variants of hf in bf16 strayed up to 2.4 (SmolLM2-135M, H100, docs/log.md 2026-11-23); twice that.
LIGHT_FLOORS = {"float32": 1.0, "bfloat16": 5.0}
# In allowances: so much lower than a reference that rounds may be nearer to the truth than it is; an fp32 run tells. The most seen: 2.0, of
# compiled layers at 8B; a rate twice as high: up to 3.0 in the second pass over the samples, 9.4 in the third (docs/decisions/0024).
LIGHT_BELOW = 3.0


def verdict(candidate: Run, against: Sequence[Anchor]) -> Verdict:
    """The best verdict over the anchors: a candidate must meet every test against one of them, for the whole run.

    What computes in fp32 is judged by the fp32 truth alone, where there is one: it has no rounding to excuse it.
    """
    for anchor in against:
        if candidate.record == anchor.run.record:
            return Verdict("reference", anchor.name, "", (), Light(True, "this is the reference"), True)
    useless = unusable(candidate)
    if not useless and (broken := not_finite(candidate)):
        return Verdict("different", None, broken[0], tuple(broken), Light(False, broken[0]), False)
    if useless or not against:
        why = useless or "there is no reference: run engine=hf on this workload"
        return Verdict("not comparable", None, why, (why,), Light(None, why), not useless)
    truth = [anchor for anchor in against if in_fp32(candidate) and in_fp32(anchor.run)]
    verdicts = [judge_against(candidate, anchor) for anchor in truth or against]
    order: tuple[Kind, ...] = ("same", "not comparable", "different")  # an open question with one anchor leaves the whole open
    alike = {anchor.name for anchor in against if dtype_of(anchor.run) == dtype_of(candidate)}
    best = min(verdicts, key=lambda one: (order.index(one.kind), one.kind != "same" and one.anchor not in alike))
    if best.kind != "not comparable":
        return best
    usual = _usual(verdicts, alike, best)
    return best if usual is best else replace(best, light=usual.light, can_win=usual.light.passed is not False)


def _usual(verdicts: Sequence[Verdict], alike: Collection[str | None], best: Verdict) -> Verdict:
    """Whose light check counts. The curve of a run that rounds is checked against the anchor that rounds; where it strays from that, it may
    follow the truth's, and where that leaves it open, the truth's decides.
    """
    usual = next((one for one in verdicts if one.anchor in alike), best)
    if usual.light.open:
        return next((one for one in verdicts if one.light.passed is not None), usual)
    if usual.light.passed is False:
        return next((one for one in verdicts if one.light.passed and one.can_win), usual)
    return usual


def judge(candidate: Run, reference: Run, variants: Sequence[Run] = (), anchor: str = "reference") -> Verdict:
    """Judge ``candidate`` against one ``reference``; ``variants`` are harmless variants of the reference."""
    return judge_against(candidate, Anchor(anchor, reference, tuple(variants), tuple(variants)))


def judge_weights(candidate: Score, reference: Score, base: Score, final: Alike) -> Verdict:
    """Judge weights of which nothing else is known: of the tests, those of the update and of the held-out loss, at their floors."""
    tests = weights_deviations(candidate, reference, final)
    worst = max(tests, key=lambda test: test.excess)
    failed = tuple(test.text(1.0) for test in tests if test.excess > 1.0)
    made = {test.name for test in tests}
    found = Verdict(
        kind="different" if failed else "same",
        anchor="these weights",
        worst=worst.text(1.0),
        reasons=failed,
        light=Light(None, "no run, only its weights"),
        can_win=not failed,
        tests=tuple((test, 1.0) for test in tests),
        untested={name: "only the weights are known" for name in TESTS if name not in made},
    )
    return _with_power(found, base.held_out_loss - reference.held_out_loss, 1.0)


def _with_power(found: Verdict, gain: float, allowed: float) -> Verdict:
    """No verdict where so little was learnt that anything would look the same; ``allowed``: of the held-out loss, in floors."""
    needed = POWER * HELD_OUT_FLOOR * allowed
    if gain >= needed:
        return found
    why = f"no power: training lowered the reference's held-out loss by {gain:.4f}, a verdict needs {needed:.4f}; train for longer"
    return replace(found, kind="not comparable", reasons=(why, *found.reasons))


def judge_against(candidate: Run, anchor: Anchor) -> Verdict:
    """Judge ``candidate`` against one anchor."""
    obstacles, light = blocked(candidate, anchor.run)
    if obstacles:
        return Verdict("not comparable", anchor.name, obstacles[0], tuple(obstacles), light, light.passed is not False)
    if broken := not_finite(candidate):
        return Verdict("different", anchor.name, broken[0], tuple(broken), Light(False, broken[0]), False)
    light = _light(candidate, anchor.run)
    if absent := missing(candidate, anchor.run):
        return Verdict("not comparable", anchor.name, absent[0], tuple(absent), light, light.passed is not False)
    return _tested(candidate, anchor, light)


def _tested(candidate: Run, anchor: Anchor, light: Light) -> Verdict:
    reference, calibration = anchor.run, anchor.calibration(candidate)
    allowed = calibration.allowed
    tests, untested = deviations(candidate, reference)
    worst = max(tests, key=lambda test: test.excess / allowed[test.name])
    failed = [test for test in tests if test.excess > allowed[test.name]]
    by_name = {test.name: test for test in tests}
    found = Verdict(
        kind="different" if failed else "same",
        anchor=anchor.name,
        worst=worst.text(allowed[worst.name]),
        reasons=tuple(test.text(allowed[test.name]) for test in failed),
        light=light,
        can_win=not failed,
        tests=tuple((test, allowed[test.name]) for test in tests),
        untested=untested,
        hint=suspicion(candidate, reference, by_name, frozenset(test.name for test in failed)) if failed else "",
    )
    gain = scored(reference.base_score).held_out_loss - scored(reference.score).held_out_loss
    found = _with_power(found, gain, allowed[HELD_OUT])
    if found.kind == "not comparable":
        return found
    are_exact = in_fp32(candidate) and in_fp32(reference)
    # Nothing harmless makes an infinite deviation (an update or a gradient of zero); another is judged once harmless ones are known.
    proven = [test for test in failed if are_exact or calibration.known[test.name] >= NUM_VARIANTS or math.isinf(test.excess)]
    if failed and not proven:
        least = min(failed, key=lambda test: (calibration.known[test.name], test.name == FIRST_LOSS))
        why = _uncalibrated(calibration.known[least.name], _how(least.name, around_truth=in_fp32(reference)))
        return replace(found, kind="not comparable", reasons=(why, *found.reasons), can_win=light.passed is not False)
    return found


def _how(test: str, *, around_truth: bool) -> str:
    """How harmless variants are had that say something about ``test``."""
    if around_truth and test != FIRST_LOSS:
        return "engine=fused engine.knobs.operations=reference in bfloat16 with other micro_batch and recompute"
    return "engine=hf in bfloat16 with other attention, micro_batch and recompute"


def _uncalibrated(known: int, how: str) -> str:
    return f"outside the floor, but how far harmless variants stray is known from {known} of {NUM_VARIANTS}: run {how}"


def _light(candidate: Run, reference: Run) -> Light:
    a, b = measured(candidate).steps, measured(reference).steps
    floors = max(LIGHT_FLOORS.get(dtype_of(run), LIGHT_FLOORS["bfloat16"]) for run in (candidate, reference))
    allowed = [max(floors * loss_floor(labels), LIGHT_RELATIVE * abs(loss)) for labels, loss in zip(b.tokens_loss, b.losses, strict=True)]
    off = [(x - y) / most for x, y, most in zip(a.losses, b.losses, allowed, strict=True)]
    far = 0 if abs(off[0]) > 1 else max(range(len(off)), key=lambda step: abs(off[step]))
    text = f"same stream; loss of step {far + 1} off by {abs(off[far]) * allowed[far]:.3g}, allowed {allowed[far]:.3g}"
    if abs(off[far]) <= 1:
        return Light(True, text)
    if far and not in_fp32(reference) and max(off) <= 1 and min(off) >= -LIGHT_BELOW:
        return Light(None, f"{text}; lower than a reference that rounds: engine=hf engine.knobs.compute_dtype=float32 decides", open=True)
    return Light(False, text)
