"""Did a run train the same thing as the reference? The verdict, its worst deviation, where, and what that looks like."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import JsonValue

from harness.calibration import NUM_VARIANTS, Calibration, calibrate
from harness.comparable import Light, Run, blocked, measured, missing, not_finite, scored, unusable
from harness.deviations import HELD_OUT, HELD_OUT_FLOOR, TESTS, deviations, loss_floor, weights_deviations
from harness.record import Record, Score
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

ANCHORS = (("fp32", "float32"), ("bf16", "bfloat16"))  # the truth first; each a compute_dtype of the reference engine
REFERENCE_ENGINE = "hf"
# Transformers and PEFT as they come; with anything else the engine is a candidate, not the yardstick. A knob that is absent is as here:
# records are older than some of them.
REFERENCE_KNOBS: Mapping[str, tuple[JsonValue, ...]] = {
    "kernels": ("none",),
    "compile": (False,),
    "layout": ("padded",),
    "attention": ("sdpa", "eager", "flash_attention_2"),
    "adapter_compute": ("autocast",),
    "optimizer": ("adamw",),
}
# The base product and the adapter's in one sum, in plain torch: harmless around the truth, which bf16 hf is not (docs/method.md).
AUGMENTED_KNOBS = {"operations": "reference", "compute_dtype": "bfloat16"}


@dataclass(frozen=True)
class Anchor:
    """A run to be judged against; ``variants`` are harmless variants of it, which widen the allowances.

    ``rounding``: around the fp32 truth, the variants that matter to a candidate which computes in bf16. ``truth``: of a run that rounds,
    the same in fp32, where that was run.
    """

    name: str
    run: Run
    variants: tuple[Run, ...] = ()
    rounding: tuple[Run, ...] = ()
    truth: Run | None = None

    @functools.cached_property
    def plain(self) -> Calibration:
        """From ``variants``; found once, however many runs are judged against this one."""
        return calibrate(self.run, self.variants, self.truth)

    @functools.cached_property
    def rounded(self) -> Calibration:
        """From ``rounding``."""
        return calibrate(self.run, self.rounding)

    def calibration(self, candidate: Run) -> Calibration:
        """What ``candidate`` is allowed."""
        return self.rounded if _in_fp32(self.run) and not _in_fp32(candidate) else self.plain


def anchors(runs: Iterable[Run], workload_key: str, machine_key: str) -> tuple[Anchor, ...]:
    """The fp32 truth and the bf16 anchor of a workload: runs of engine ``hf``, those of the same machine first.

    Among equals a scored run is preferred, then one whose first step was run alone, then the knobs with most repeats, then the run
    that most others have been compared with, the lowest repeat, the newest.
    """
    found = []
    able = [run for run in runs if run.record.cell.workload.key == workload_key and not unusable(run) and not not_finite(run)]
    newest_first = sorted(able, key=lambda run: run.record.provenance.started_utc, reverse=True)
    compared = Counter(sha for pair in (able[0].updates if able else {}).values() for sha in pair.trained_sha256)
    for name, dtype in ANCHORS:
        mine = [run for run in newest_first if _computes_in(run.record, dtype)]
        repeats = Counter(_knobs(run) for run in mine)  # what was repeated most is what people run; the rest are its variants

        def order(run: Run, repeats: Counter[str] = repeats) -> tuple[bool, bool, bool, int, int, int]:
            record, weights = run.record, measured(run).artifacts.adapter_sha256
            known = compared[weights] if weights else 0
            return (
                record.machine.key != machine_key,
                run.score is None,
                run.first is None,
                -repeats[_knobs(run)],
                -known,
                record.cell.repeat,
            )

        mine.sort(key=order)
        if mine:
            found.append(_anchor(name, mine[0], newest_first))
    return tuple(found)


def anchor_at(run: Run, runs: Sequence[Run]) -> Anchor:
    """``run`` as the reference, with what is known among ``runs`` of its harmless variants: none, unless it is a yardstick."""
    name = next((name for name, dtype in ANCHORS if _computes_in(run.record, dtype)), "this reference")
    here = [one for one in runs if one.record.cell.workload == run.record.cell.workload and not unusable(one) and not not_finite(one)]
    return _anchor(name, run, here) if is_yardstick(run.record) else Anchor(name, run)


def _anchor(name: str, run: Run, runs: Sequence[Run]) -> Anchor:
    alike = [one for one in runs if _computes_in(one.record, _dtype(run))]
    augmented = [one for one in runs if _is_augmented(one.record)] if _in_fp32(run) else []
    exact = (one for one in runs if not _in_fp32(run) and _computes_in(one.record, "float32") and not blocked(one, run)[0])
    return Anchor(name, run, _variants(run, alike), _variants(run, augmented), next(exact, None))


def is_yardstick(record: Record) -> bool:
    """Whether other runs are compared with this one: the reference engine, as it is, in a type that has an anchor."""
    return any(_computes_in(record, dtype) for _, dtype in ANCHORS)


def _variants(anchor: Run, runs: Sequence[Run]) -> tuple[Run, ...]:
    """Of every other choice of knobs (attention, split, recompute) one run that can be compared with ``anchor``."""
    found: dict[str, Run] = {}
    for run in runs:
        comparable = not blocked(run, anchor)[0] and not missing(run, anchor)
        if _knobs(run) != _knobs(anchor) and comparable:
            found.setdefault(_knobs(run), run)
    return tuple(found.values())


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
    truth = [anchor for anchor in against if _in_fp32(candidate) and _in_fp32(anchor.run)]
    verdicts = [judge_against(candidate, anchor) for anchor in truth or against]
    order: tuple[Kind, ...] = ("same", "not comparable", "different")  # an open question with one anchor leaves the whole open
    alike = {anchor.name for anchor in against if _dtype(anchor.run) == _dtype(candidate)}
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
    in_fp32 = _in_fp32(candidate) and _in_fp32(reference)
    # Nothing harmless makes an infinite deviation (an update or a gradient of zero); another is judged once harmless ones are known.
    proven = [test for test in failed if in_fp32 or calibration.known[test.name] >= NUM_VARIANTS or math.isinf(test.excess)]
    if failed and not proven:
        why = _uncalibrated(min(calibration.known[test.name] for test in failed), around_truth=_in_fp32(reference))
        return replace(found, kind="not comparable", reasons=(why, *found.reasons), can_win=light.passed is not False)
    return found


def _uncalibrated(known: int, *, around_truth: bool) -> str:
    how = "engine=fused engine.knobs.operations=reference in bfloat16" if around_truth else "engine=hf with other attention,"
    what = f"outside the floor, but how far harmless variants stray is known from {known} of {NUM_VARIANTS}"
    return f"{what}: run {how} with other micro_batch and recompute" if around_truth else f"{what}: run {how} micro_batch and recompute"


def _light(candidate: Run, reference: Run) -> Light:
    a, b = measured(candidate).steps, measured(reference).steps
    floors = max(LIGHT_FLOORS.get(_dtype(run), LIGHT_FLOORS["bfloat16"]) for run in (candidate, reference))
    allowed = [max(floors * loss_floor(labels), LIGHT_RELATIVE * abs(loss)) for labels, loss in zip(b.tokens_loss, b.losses, strict=True)]
    off = [(x - y) / most for x, y, most in zip(a.losses, b.losses, allowed, strict=True)]
    far = 0 if abs(off[0]) > 1 else max(range(len(off)), key=lambda step: abs(off[step]))
    text = f"same stream; loss of step {far + 1} off by {abs(off[far]) * allowed[far]:.3g}, allowed {allowed[far]:.3g}"
    if abs(off[far]) <= 1:
        return Light(True, text)
    if far and not _in_fp32(reference) and max(off) <= 1 and min(off) >= -LIGHT_BELOW:
        return Light(None, f"{text}; lower than a reference that rounds: engine=hf engine.knobs.compute_dtype=float32 decides", open=True)
    return Light(False, text)


def _knobs(run: Run) -> str:
    return run.record.cell.engine.model_dump_json()


def _in_fp32(run: Run) -> bool:
    """Rounding is no excuse in fp32: there the floors are wide enough for any harmless variant."""
    return _dtype(run) == "float32"


def _dtype(run: Run) -> str:
    """What the run computes in; an engine that does not say is taken to round."""
    return str(run.record.cell.engine.knobs.get("compute_dtype", "bfloat16"))


def _computes_in(record: Record, dtype: str) -> bool:
    knobs = record.cell.engine.knobs
    plain = all(knobs.get(name, values[0]) in values for name, values in REFERENCE_KNOBS.items())
    return record.cell.engine.name == REFERENCE_ENGINE and knobs.get("compute_dtype") == dtype and plain


def _is_augmented(record: Record) -> bool:
    knobs = record.cell.engine.knobs
    exact = knobs.get("optimizer_state", "fp32") == "fp32"  # absent in older records
    return exact and all(knobs.get(name) == value for name, value in AUGMENTED_KNOBS.items())
