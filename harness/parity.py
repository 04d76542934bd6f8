"""Did a run train the same thing as the reference? The verdict, its worst deviation, and where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.record import Artifacts, Measurement, Record, Score, Steps

Kind = Literal["reference", "same", "different", "not comparable"]

# Floors of the allowances: what harmless changes (another kernel, another split) were seen to need, on SmolLM2 with GSM8K.
LOSS_FLOOR = 0.05  # divided by the square root of the step's labels
GRAD_NORM_FLOOR = 0.03  # |ln ratio|
UPDATE_NORM_FLOOR = 0.003  # |ln ratio|: a learning rate that is 1 % off gives 0.01
HELD_OUT_FLOOR = 0.001
SPREAD = 2.0  # an allowance is at least this many times the largest deviation among harmless variants of the anchor
POWER = 10.0  # the held-out gain of the reference must be this many allowances, or equality proves nothing
LIGHT_RELATIVE = 0.002  # of the loss: the light check's allowance beside the loss floor, wide enough for bf16 on long steps

ANCHORS = (("fp32", "float32"), ("bf16", "bfloat16"))  # the truth first; each a compute_dtype of the reference engine
REFERENCE_ENGINE = "hf"
REFERENCE_KNOBS = {"kernels": "none", "compile": False}  # with other kernels the engine is a candidate, not the yardstick


@dataclass(frozen=True, slots=True)
class Run:
    """A record with the held-out score of the weights it made and of the base it started from, where there are any."""

    record: Record
    score: Score | None = None
    base_score: Score | None = None


@dataclass(frozen=True, slots=True)
class Light:
    """What is left where the full rule cannot be applied: stream, step-1 loss and curve. ``passed`` null: could not be checked."""

    passed: bool | None
    detail: str


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


@dataclass(frozen=True, slots=True)
class Anchor:
    """A run to be judged against; ``variants`` are harmless variants of it, which widen the allowances."""

    name: str
    run: Run
    variants: tuple[Run, ...] = ()


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

    Among equals a scored run is preferred, then the lowest repeat, then the newest.
    """
    found = []
    able = [run for run in runs if run.record.cell.workload.key == workload_key and not _unusable(run) and not _not_finite(run)]
    newest_first = sorted(able, key=lambda run: run.record.provenance.started_utc, reverse=True)
    for name, dtype in ANCHORS:
        mine = [run for run in newest_first if _computes_in(run.record, dtype)]
        mine.sort(key=lambda run: (run.record.machine.key != machine_key, run.score is None, run.record.cell.repeat))
        if mine:
            found.append(Anchor(name, mine[0]))
    return tuple(found)


def verdict(candidate: Run, against: Sequence[Anchor]) -> Verdict:
    """The best verdict over the anchors: a candidate must meet every test against one of them, for the whole run."""
    for anchor in against:
        if candidate.record == anchor.run.record:
            return Verdict("reference", anchor.name, "", (), Light(True, "this is the reference"), True)
    unusable = _unusable(candidate)
    if not unusable and (broken := _not_finite(candidate)):
        return Verdict("different", None, broken[0], tuple(broken), Light(False, broken[0]), False)
    if unusable or not against:
        why = unusable or "there is no reference: run engine=hf on this workload"
        return Verdict("not comparable", None, why, (why,), Light(None, why), not unusable)
    verdicts = [judge(candidate, anchor.run, anchor.variants, anchor.name) for anchor in against]
    order: tuple[Kind, ...] = ("same", "different", "not comparable")
    return min(verdicts, key=lambda one: order.index(one.kind))


def judge(candidate: Run, reference: Run, variants: Sequence[Run] = (), anchor: str = "reference") -> Verdict:
    """Judge ``candidate`` against one ``reference``; ``variants`` are harmless variants of the reference."""
    blocked, light = _blocked(candidate, reference)
    if blocked:
        return Verdict("not comparable", anchor, blocked[0], tuple(blocked), light, light.passed is not False)
    if broken := _not_finite(candidate):
        return Verdict("different", anchor, broken[0], tuple(broken), Light(False, broken[0]), False)
    light = _light(candidate, reference)
    if missing := _missing(candidate, reference):
        return Verdict("not comparable", anchor, missing[0], tuple(missing), light, light.passed is not False)
    return _tested(candidate, reference, variants, anchor, light)


def _tested(candidate: Run, reference: Run, variants: Sequence[Run], anchor: str, light: Light) -> Verdict:
    allowed = _allowances(reference, variants)
    tests = _tests(candidate, reference)
    worst = max(tests, key=lambda test: test.excess / allowed[test.name])
    failed = tuple(test.text(allowed[test.name]) for test in tests if test.excess > allowed[test.name])
    gain = _score(reference.base_score).held_out_loss - _score(reference.score).held_out_loss
    needed = POWER * HELD_OUT_FLOOR * allowed["held-out loss"]
    text = worst.text(allowed[worst.name])
    if not gain >= needed:
        why = f"no power: training lowered the reference's held-out loss by {gain:.4f}, a verdict needs {needed:.4f}; train for longer"
        return Verdict("not comparable", anchor, text, (why, *failed), light, not failed)
    return Verdict("different" if failed else "same", anchor, text, failed, light, not failed)


def _allowances(reference: Run, variants: Sequence[Run]) -> dict[str, float]:
    """Per test, in floors: at least 1, and twice the largest deviation among the harmless variants."""
    allowed = {test.name: 1.0 for test in _tests(reference, reference)}
    for variant in variants:
        problems = _blocked(variant, reference)[0] or _not_finite(variant) or _missing(variant, reference)
        if problems:
            raise ValueError(f"not a variant of the reference: {problems[0]}")
        for test in _tests(variant, reference):
            allowed[test.name] = max(allowed[test.name], SPREAD * test.excess)
    return allowed


def _tests(candidate: Run, reference: Run) -> list[Deviation]:
    a, b = _measured(candidate).steps, _measured(reference).steps
    floors = [_loss_floor(labels) for labels in b.tokens_loss]
    gaps = [abs(x - y) for x, y in zip(a.losses, b.losses, strict=True)]
    off = [gap / floor for gap, floor in zip(gaps, floors, strict=True)]
    far = max(range(len(off)), key=off.__getitem__)
    mine, theirs = _score(candidate.score), _score(reference.score)
    grad_norm, update_norm = _ln_ratio(a.grad_norms[0], b.grad_norms[0]), _ln_ratio(mine.update_norm, theirs.update_norm)
    return [
        Deviation("loss of step 1", off[0], floors[0]),
        Deviation("largest loss deviation", off[far], floors[far], f" (step {far + 1})"),
        Deviation("RMS of the loss deviations", _rms(gaps) / _rms(floors), _rms(floors)),
        Deviation("gradient norm of step 1 (ln ratio)", grad_norm / GRAD_NORM_FLOOR, GRAD_NORM_FLOOR),
        Deviation("final update norm (ln ratio)", update_norm / UPDATE_NORM_FLOOR, UPDATE_NORM_FLOOR),
        Deviation("held-out loss", abs(mine.held_out_loss - theirs.held_out_loss) / HELD_OUT_FLOOR, HELD_OUT_FLOOR),
    ]


def _blocked(candidate: Run, reference: Run) -> tuple[list[str], Light]:
    """Why the two runs are not about the same thing; a changed stream is the candidate's doing, so it fails the light check too."""
    for name, run in (("", candidate), ("the reference: ", reference)):
        if why := _unusable(run):
            return [name + why], Light(None, name + why)
    if candidate.record.cell.workload.key != reference.record.cell.workload.key:
        why = f"another workload: {candidate.record.cell.workload.label}, the reference is {reference.record.cell.workload.label}"
        return [why], Light(None, why)
    inputs = _inputs(_measured(candidate).artifacts, _measured(reference).artifacts)
    if inputs := inputs + [f"the reference: {problem}" for problem in _not_finite(reference)]:
        return inputs, Light(None, inputs[0])
    stream = _stream(_measured(candidate).steps, _measured(reference).steps)
    return stream, Light(False if stream else None, stream[0] if stream else "")


def _inputs(a: Artifacts, b: Artifacts) -> list[str]:
    pairs = (
        ("token file", a.tokens_sha256, b.tokens_sha256),
        ("base weights", a.base_sha256, b.base_sha256),
        ("initial adapter", a.adapter_init_sha256, b.adapter_init_sha256),
    )
    return [f"another {name}: {str(x)[:12]}, the reference has {str(y)[:12]}" for name, x, y in pairs if x != y]


def _stream(a: Steps, b: Steps) -> list[str]:
    arrays = ("seconds", "losses", "grad_norms", "tokens_input", "tokens_loss", "stream_sha256")
    counts = {len(getattr(a, name)) for name in arrays}
    if counts | {len(getattr(b, name)) for name in arrays} != {len(b.losses)}:
        return [f"another number of steps: {' and '.join(map(str, sorted(counts)))}, the reference has {len(b.losses)}"]
    problems = []
    if (step := _first_difference(a.tokens_loss, b.tokens_loss)) is not None:
        problems.append(f"supervised tokens differ from step {step + 1}: {a.tokens_loss[step]}, the reference has {b.tokens_loss[step]}")
    if (step := _first_difference(a.stream_sha256, b.stream_sha256)) is not None:
        tokens = f"{a.tokens_input[step]} input tokens, the reference has {b.tokens_input[step]}"
        problems.append(f"the token stream differs from step {step + 1} (truncated, shuffled or changed data): {tokens}")
    return problems


def _not_finite(run: Run) -> list[str]:
    steps, problems = _measured(run).steps, []
    for name, values in (("loss", steps.losses), ("gradient norm", steps.grad_norms)):
        bad = [step for step, value in enumerate(values) if value is not None and not math.isfinite(value)]
        if bad:
            problems.append(f"{name} is {values[bad[0]]} at step {bad[0] + 1}")
    if run.score and not math.isfinite(run.score.held_out_loss):
        problems.append(f"held-out loss is {run.score.held_out_loss}")
    return problems


def _missing(candidate: Run, reference: Run) -> list[str]:
    """What the tests need and do not have: what cannot be computed is not comparable, never assumed."""
    scores = {
        "this run (random data has none)": candidate.score,
        "the reference": reference.score,
        "the base weights": reference.base_score,
    }
    if absent := [name for name, score in scores.items() if score is None]:
        return [f"no held-out score of {', '.join(absent)}"]
    a, b = _score(candidate.score), _score(reference.score)
    values = {
        "no gradient norm of step 1": _measured(candidate).steps.grad_norms[0],
        "the reference has no gradient norm of step 1": _measured(reference).steps.grad_norms[0],
        "no norm of the update (full weights are judged by held-out loss)": a.update_norm,
        "the reference has no norm of the update": b.update_norm,
    }
    absent = [problem for problem, value in values.items() if value is None]
    return absent + (["scored by another evaluator"] if a.evaluator != b.evaluator else [])


def _light(candidate: Run, reference: Run) -> Light:
    a, b = _measured(candidate).steps, _measured(reference).steps
    allowed = [max(_loss_floor(labels), LIGHT_RELATIVE * abs(loss)) for labels, loss in zip(b.tokens_loss, b.losses, strict=True)]
    off = [abs(x - y) / most for x, y, most in zip(a.losses, b.losses, allowed, strict=True)]
    far = 0 if off[0] > 1 else max(range(len(off)), key=off.__getitem__)
    text = f"loss of step {far + 1} off by {off[far] * allowed[far]:.3g}, allowed {allowed[far]:.3g}"
    return Light(off[far] <= 1, f"same stream; {text}")


def _computes_in(record: Record, dtype: str) -> bool:
    knobs = record.cell.engine.knobs
    plain = all(knobs.get(name, value) == value for name, value in {**REFERENCE_KNOBS, "compute_dtype": dtype}.items())
    return record.cell.engine.name == REFERENCE_ENGINE and "compute_dtype" in knobs and plain


def _unusable(run: Run) -> str | None:
    if run.record.status != "ok":
        return f"status {run.record.status}"
    return None if run.record.measurement and run.record.measurement.steps.losses else "no step was measured"


def _measured(run: Run) -> Measurement:
    if run.record.measurement is None:
        raise ValueError("a run without a measurement cannot be judged")
    return run.record.measurement


def _score(score: Score | None) -> Score:
    if score is None:
        raise ValueError("a run without a score cannot be tested")
    return score


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


def _first_difference(a: Sequence[object], b: Sequence[object]) -> int | None:
    return next((step for step, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
