"""May two runs be compared at all: the same work, the same inputs, the same tokens in every step, finite numbers, all that tests need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from harness.record import Artifacts, Measurement, Record, Score, Steps
from harness.rounding import Rounding, Roundings
from harness.store import Results, Stored
from harness.updates import Alike, Updates, alike

UNSCORED = "its weights are not scored yet, or gone unscored: run the sweep again, or with rerun=all"


@dataclass(frozen=True, slots=True)
class Run:
    """A record with the held-out score of the weights it made and of the base it started from, where there are any.

    ``first``: the record of the same work ended after its first step, where that was run; ``updates``: the pairs that were compared;
    ``rounding``: how far rounding moves the loss of its first step, where that was measured.
    """

    record: Record
    score: Score | None = None
    base_score: Score | None = None
    first: Record | None = None
    updates: Updates = field(default_factory=dict)
    rounding: Rounding | None = None


@dataclass(frozen=True, slots=True)
class Light:
    """What is left where the full rule cannot be applied: stream, step-1 loss and curve. ``passed`` null: could not be checked, or is
    ``open``: was checked, and only a run in fp32 tells.
    """

    passed: bool | None
    detail: str
    open: bool = False

    @property
    def text(self) -> str:
        """How it ended, as a phrase; empty where it could not be checked."""
        return {True: "passed", False: "failed", None: "is open" if self.open else ""}[self.passed]


def runs(results: Results) -> tuple[Run, ...]:
    """Every stored record as a run, in the order of ``results``."""
    firsts = {_origin(stored.record): stored.record for stored in results.stored if _is_usable_first_step(stored.record)}

    def first(record: Record) -> Record | None:
        return firsts.get(_origin(record, first_step=True)) if firsts and not record.cell.workload.is_first_step else None

    def run(stored: Stored) -> Run:
        record = stored.record
        return Run(record, stored.score, stored.base_score, first(record), results.updates, _rounding(record, results.roundings))

    return tuple(map(run, results.stored))


def by_workload(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """``runs`` by the key of their workload, which takes a while to compute."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.record.cell.workload.key, []).append(run)
    return found


def final_updates(candidate: Run, reference: Run) -> Alike | str:
    """The updates of the whole runs beside each other, or why that is not known."""
    return _alike(candidate.record, reference.record, candidate.updates)


def first_updates(candidate: Run, reference: Run) -> Alike | str:
    """The updates of the first steps beside each other, or why that is not known."""
    for name, run in (("this run", candidate), ("the reference", reference)):
        if run.first is None:
            return f"the first step of {name} was not run alone, with this version of the engine (train.stop_after=1)"
    assert candidate.first is not None
    assert reference.first is not None
    return _alike(candidate.first, reference.first, candidate.updates)


def blocked(candidate: Run, reference: Run) -> tuple[list[str], Light]:
    """Why the two runs are not about the same thing; a changed stream is the candidate's doing, so it fails the light check too."""
    for name, run in (("", candidate), ("the reference: ", reference)):
        if why := unusable(run):
            return [name + why], Light(None, name + why)
    if candidate.record.cell.workload != reference.record.cell.workload:
        why = f"another workload: {candidate.record.cell.workload.label}, the reference is {reference.record.cell.workload.label}"
        return [why], Light(None, why)
    inputs = _inputs(measured(candidate).artifacts, measured(reference).artifacts)
    if inputs := inputs + [f"the reference: {problem}" for problem in not_finite(reference)]:
        return inputs, Light(None, inputs[0])
    stream = _stream(measured(candidate).steps, measured(reference).steps)
    return stream, Light(False if stream else None, stream[0] if stream else "")


def missing(candidate: Run, reference: Run) -> list[str]:
    """What the tests need and do not have: what cannot be computed is not comparable, never assumed."""
    data = candidate.record.data
    if candidate.score is None and data is not None and data.samples_held_out == 0:
        return ["there are no held-out rows to score it on"]
    scores = {
        f"this run ({UNSCORED})": candidate.score,
        "the reference": reference.score,
        "the base weights": reference.base_score,
    }
    if absent := [name for name, score in scores.items() if score is None]:
        return [f"no held-out score of {', '.join(absent)}"]
    a, b = scored(candidate.score), scored(reference.score)
    values = {
        "no gradient norm of step 1": measured(candidate).steps.grad_norms[0],
        "the reference has no gradient norm of step 1": measured(reference).steps.grad_norms[0],
        "no norm of the update": a.update_norm,
        "the reference has no norm of the update": b.update_norm,
    }
    absent = [problem for problem, value in values.items() if value is None]
    return absent + (["scored by another evaluator"] if a.evaluator != b.evaluator else [])


def not_finite(run: Run) -> list[str]:
    """Losses, gradient norms and scores that are no numbers, each with its first step."""
    steps, problems = measured(run).steps, []
    for name, values in (("loss", steps.losses), ("gradient norm", steps.grad_norms)):
        bad = [step for step, value in enumerate(values) if value is not None and not math.isfinite(value)]
        if bad:
            problems.append(f"{name} is {values[bad[0]]} at step {bad[0] + 1}")
    if run.score and not math.isfinite(run.score.held_out_loss):
        problems.append(f"held-out loss is {run.score.held_out_loss}")
    return problems


def unusable(run: Run) -> str | None:
    """Why there is nothing to judge, or None."""
    if run.record.status != "ok":
        return f"status {run.record.status}"
    return None if run.record.measurement and run.record.measurement.steps.losses else "no step was measured"


def in_fp32(run: Run) -> bool:
    """Whether rounding is no excuse: in fp32 the floors are wide enough for any harmless variant."""
    return dtype_of(run) == "float32"


def dtype_of(run: Run) -> str:
    """What the run computes in; an engine that does not say is taken to round."""
    return str(run.record.cell.engine.knobs.get("compute_dtype", "bfloat16"))


def measured(run: Run) -> Measurement:
    """The measurement of a run that is usable."""
    if run.record.measurement is None:
        raise ValueError("a run without a measurement cannot be judged")
    return run.record.measurement


def scored(score: Score | None) -> Score:
    """The score of a run that misses nothing."""
    if score is None:
        raise ValueError("a run without a score cannot be tested")
    return score


def _alike(candidate: Record, reference: Record, updates: Updates) -> Alike | str:
    assert candidate.measurement is not None
    assert reference.measurement is not None
    mine, theirs = candidate.measurement.artifacts, reference.measurement.artifacts
    start = mine.adapter_init_sha256 or mine.base_sha256
    if mine.adapter_sha256 is None or theirs.adapter_sha256 is None:
        return "no weights were left"
    known = alike(updates, start, mine.adapter_sha256, theirs.adapter_sha256)
    return known or "the weights were not compared before they were deleted: run both in one sweep, or with keep=adapters"


def _rounding(record: Record, known: Roundings) -> Rounding | None:
    if not known or record.measurement is None or not record.measurement.steps.stream_sha256:
        return None
    return known.get((record.measurement.artifacts.base_sha256, record.measurement.steps.stream_sha256[0]))


def _is_usable_first_step(record: Record) -> bool:
    return record.cell.workload.is_first_step and unusable(Run(record)) is None


def _origin(record: Record, *, first_step: bool = False) -> tuple[str, str, str, str]:
    """What a run and that of its first step have in common: the same code of the same engine did the same work on the same machine."""
    workload = record.cell.workload.first_step if first_step else record.cell.workload
    return record.machine.key, workload.key, record.cell.engine.key, record.provenance.engine_fingerprint


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
        problems.append(f"the token stream differs from step {step + 1} ({_stream_suspicion(a, b)}): {tokens}")
    return problems


def _stream_suspicion(a: Steps, b: Steps) -> str:
    """What a changed stream looks like. An answer stands at the end of its row, so truncation costs more labels than tokens."""
    tokens, labels = (
        1 - sum(mine) / max(1, sum(theirs)) for mine, theirs in ((a.tokens_input, b.tokens_input), (a.tokens_loss, b.tokens_loss))
    )
    if a.tokens_input == b.tokens_input and labels:
        return "prompt mask dropped?" if labels < 0 else "labels left out?"
    short = [mine < theirs for mine, theirs in zip(a.tokens_input, b.tokens_input, strict=True)]
    if all(short) and labels < 1.5 * tokens:
        return "a micro-batch skipped?"
    if any(short) and all(mine <= theirs for mine, theirs in zip(a.tokens_input, b.tokens_input, strict=True)):
        return "truncated rows?"
    return "shuffled: the same tokens in another order?" if not tokens and not labels else "shuffled, or other data?"


def _first_difference(a: Sequence[object], b: Sequence[object]) -> int | None:
    return next((step for step, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
