"""Did a run train the same thing as the reference? The verdict, its worst deviation, and where."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from harness.comparable import Light, Run, blocked, measured, missing, not_finite, scored, unusable
from harness.record import Record

Kind = Literal["reference", "same", "different", "not comparable"]

# Floors of the allowances: what harmless changes (another kernel, another split) were seen to need, on SmolLM2 with GSM8K.
LOSS_FLOOR = 0.05  # divided by the square root of the step's labels
GRAD_NORM_FLOOR = 0.03  # |ln ratio|
UPDATE_NORM_FLOOR = 0.003  # |ln ratio|: a learning rate that is 1 % off gives 0.01
HELD_OUT_FLOOR = 0.001
SPREAD = 2.0  # an allowance is at least this many times the largest deviation among harmless variants of the anchor
NUM_VARIANTS = 3  # fewer say nothing about how far harmless variants stray
POWER = 10.0  # the held-out gain of the reference must be this many allowances, or equality proves nothing
LIGHT_RELATIVE = 0.002  # of the loss: the light check's allowance beside the loss floor, wide enough for bf16 on long steps
# In loss floors: three harmless variants of hf in bf16 strayed up to 2.4 (SmolLM2-135M, H100, docs/log.md 2026-11-23); twice that.
LIGHT_FLOORS = {"float32": 1.0, "bfloat16": 5.0}

ANCHORS = (("fp32", "float32"), ("bf16", "bfloat16"))  # the truth first; each a compute_dtype of the reference engine
REFERENCE_ENGINE = "hf"
REFERENCE_KNOBS = {"kernels": "none", "compile": False}  # with other kernels the engine is a candidate, not the yardstick


@dataclass(frozen=True, slots=True)
class Verdict:
    """``worst``: the test with the largest excess, its value and allowance. ``reasons``: everything against ``same``."""

    kind: Kind
    anchor: str | None
    worst: str
    reasons: tuple[str, ...]
    light: Light
    can_win: bool

    @property
    def label(self) -> str:
        """``same: fp32``, ``different``, ``not comparable``, ``reference: bf16``."""
        return f"{self.kind}: {self.anchor}" if self.anchor and self.kind in ("same", "reference") else self.kind

    @property
    def detail(self) -> str:
        """One sentence for people: the reasons, or the worst deviation that was still allowed."""
        return "; ".join(self.reasons) or self.worst


@dataclass(frozen=True)
class Anchor:
    """A run to be judged against; ``variants`` are harmless variants of it, which widen the allowances."""

    name: str
    run: Run
    variants: tuple[Run, ...] = ()

    @functools.cached_property
    def allowed(self) -> Mapping[str, float]:
        """Allowances by test, in floors; found once, however many runs are judged against this one."""
        return _allowances(self.run, self.variants if len(self.variants) >= NUM_VARIANTS else ())


@dataclass(frozen=True, slots=True)
class Deviation:
    """One deviation. ``excess`` is in floors: 1 is the floor of the allowance; ``text`` gives it in its own unit."""

    name: str
    excess: float
    unit: float
    where: str = ""

    def text(self, allowed: float) -> str:
        """For example ``held-out loss: off by 0.0123, allowed 0.001``."""
        return f"{self.name}{self.where}: off by {self.excess * self.unit:.3g}, allowed {allowed * self.unit:.3g}"


def anchors(runs: Iterable[Run], workload_key: str, machine_key: str) -> tuple[Anchor, ...]:
    """The fp32 truth and the bf16 anchor of a workload: runs of engine ``hf``, those of the same machine first.

    Among equals a scored run is preferred, then the knobs with most repeats, then the lowest repeat, then the newest.
    """
    found = []
    able = [run for run in runs if run.record.cell.workload.key == workload_key and not unusable(run) and not not_finite(run)]
    newest_first = sorted(able, key=lambda run: run.record.provenance.started_utc, reverse=True)
    for name, dtype in ANCHORS:
        mine = [run for run in newest_first if _computes_in(run.record, dtype)]
        repeats = Counter(_knobs(run) for run in mine)  # what was repeated most is what people run; the rest are its variants
        mine.sort(key=lambda run: (run.record.machine.key != machine_key, run.score is None, -repeats[_knobs(run)], run.record.cell.repeat))
        if mine:
            found.append(Anchor(name, mine[0], _variants(mine)))
    return tuple(found)


def _variants(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Of every other choice of knobs (attention, split, recompute) one run that can be compared with the first."""
    anchor = runs[0]
    found: dict[str, Run] = {}
    for run in runs[1:]:
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
    verdicts = [_judge(candidate, anchor) for anchor in truth or against]
    order: tuple[Kind, ...] = ("same", "not comparable", "different")  # an open question with one anchor leaves the whole open
    alike = {anchor.name for anchor in against if _dtype(anchor.run) == _dtype(candidate)}
    best = min(verdicts, key=lambda one: (order.index(one.kind), one.kind != "same" and one.anchor not in alike))
    light = next((one.light for one in verdicts if one.anchor in alike), best.light)
    if best.kind != "not comparable" or best.anchor in alike:
        return best
    # The curve of a run that rounds is checked against the anchor that rounds, not against the truth.
    return replace(best, light=light, can_win=light.passed is not False)


def judge(candidate: Run, reference: Run, variants: Sequence[Run] = (), anchor: str = "reference") -> Verdict:
    """Judge ``candidate`` against one ``reference``; ``variants`` are harmless variants of the reference."""
    return _judge(candidate, Anchor(anchor, reference, tuple(variants)))


def _judge(candidate: Run, anchor: Anchor) -> Verdict:
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
    reference, variants, allowed = anchor.run, anchor.variants, anchor.allowed
    tests = _tests(candidate, reference)
    worst = max(tests, key=lambda test: test.excess / allowed[test.name])
    failed = tuple(test.text(allowed[test.name]) for test in tests if test.excess > allowed[test.name])
    gain = scored(reference.base_score).held_out_loss - scored(reference.score).held_out_loss
    needed = POWER * HELD_OUT_FLOOR * allowed["held-out loss"]
    text = worst.text(allowed[worst.name])
    if not gain >= needed:
        why = f"no power: training lowered the reference's held-out loss by {gain:.4f}, a verdict needs {needed:.4f}; train for longer"
        return Verdict("not comparable", anchor.name, text, (why, *failed), light, not failed)
    if failed and len(variants) < NUM_VARIANTS and not (_in_fp32(candidate) and _in_fp32(reference)):
        why = (
            f"outside the floor, but how far harmless variants stray is known from {len(variants)} of {NUM_VARIANTS}: "
            f"run engine=hf with other attention, micro_batch and recompute"
        )
        return Verdict("not comparable", anchor.name, text, (why, *failed), light, light.passed is not False)
    return Verdict("different" if failed else "same", anchor.name, text, failed, light, not failed)


def _allowances(reference: Run, variants: Sequence[Run]) -> dict[str, float]:
    """Per test, in floors: at least 1, and twice the largest deviation among the harmless variants."""
    allowed = {test.name: 1.0 for test in _tests(reference, reference)}
    for variant in variants:
        problems = blocked(variant, reference)[0] or not_finite(variant) or missing(variant, reference)
        if problems:
            raise ValueError(f"not a variant of the reference: {problems[0]}")
        for test in _tests(variant, reference):
            allowed[test.name] = max(allowed[test.name], SPREAD * test.excess)
    return allowed


def _tests(candidate: Run, reference: Run) -> list[Deviation]:
    a, b = measured(candidate).steps, measured(reference).steps
    floors = [_loss_floor(labels) for labels in b.tokens_loss]
    gaps = [abs(x - y) for x, y in zip(a.losses, b.losses, strict=True)]
    off = [gap / floor for gap, floor in zip(gaps, floors, strict=True)]
    far = max(range(len(off)), key=off.__getitem__)
    mine, theirs = scored(candidate.score), scored(reference.score)
    grad_norm, update_norm = _ln_ratio(a.grad_norms[0], b.grad_norms[0]), _ln_ratio(mine.update_norm, theirs.update_norm)
    return [
        Deviation("loss of step 1", off[0], floors[0]),
        Deviation("largest loss deviation", off[far], floors[far], f" (step {far + 1})"),
        Deviation("RMS of the loss deviations", _rms(gaps) / _rms(floors), _rms(floors)),
        Deviation("gradient norm of step 1 (ln ratio)", grad_norm / GRAD_NORM_FLOOR, GRAD_NORM_FLOOR),
        Deviation("final update norm (ln ratio)", update_norm / UPDATE_NORM_FLOOR, UPDATE_NORM_FLOOR),
        Deviation("held-out loss", abs(mine.held_out_loss - theirs.held_out_loss) / HELD_OUT_FLOOR, HELD_OUT_FLOOR),
    ]


def _light(candidate: Run, reference: Run) -> Light:
    a, b = measured(candidate).steps, measured(reference).steps
    floors = max(LIGHT_FLOORS.get(_dtype(run), LIGHT_FLOORS["bfloat16"]) for run in (candidate, reference))
    allowed = [max(floors * _loss_floor(labels), LIGHT_RELATIVE * abs(loss)) for labels, loss in zip(b.tokens_loss, b.losses, strict=True)]
    off = [abs(x - y) / most for x, y, most in zip(a.losses, b.losses, allowed, strict=True)]
    far = 0 if off[0] > 1 else max(range(len(off)), key=off.__getitem__)
    text = f"loss of step {far + 1} off by {off[far] * allowed[far]:.3g}, allowed {allowed[far]:.3g}"
    return Light(off[far] <= 1, f"same stream; {text}")


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
    plain = all(knobs.get(name, value) == value for name, value in {**REFERENCE_KNOBS, "compute_dtype": dtype}.items())
    return record.cell.engine.name == REFERENCE_ENGINE and "compute_dtype" in knobs and plain


def _loss_floor(labels: int) -> float:
    return LOSS_FLOOR / math.sqrt(max(labels, 1))


def _ln_ratio(a: float | None, b: float | None) -> float:
    if a == b:
        return 0.0
    if not a or not b or a < 0 or b < 0:
        return math.inf
    return abs(math.log(a / b))


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
