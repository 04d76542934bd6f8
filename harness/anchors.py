"""What runs are judged against: the fp32 truth and bf16 ``hf`` of a workload, each with its harmless variants."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import JsonValue

from harness.calibration import Calibration, calibrate
from harness.comparable import Run, blocked, dtype_of, in_fp32, measured, missing, not_finite, unusable
from harness.record import Record

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

    ``rounding``: around the fp32 truth, the variants that matter to a candidate which computes in bf16. ``at_first``: runs of the reference
    engine that round where ``run`` is exact, or the other way round: variants of its first loss.
    """

    name: str
    run: Run
    variants: tuple[Run, ...] = ()
    rounding: tuple[Run, ...] = ()
    at_first: tuple[Run, ...] = ()

    @functools.cached_property
    def plain(self) -> Calibration:
        """From ``variants``; found once, however many runs are judged against this one."""
        return calibrate(self.run, self.variants) if in_fp32(self.run) else calibrate(self.run, self.variants, self.at_first, self._rounded)

    @functools.cached_property
    def rounded(self) -> Calibration:
        """From ``rounding``."""
        return calibrate(self.run, self.rounding, self.at_first, self._rounded)

    def _without(self, knobs: str) -> Anchor:
        """This anchor without variants of the choice ``knobs``; itself where there are none."""
        if not any(_knobs(run) == knobs for run in (*self.variants, *self.rounding, *self.at_first)):
            return self
        variants, rounding, at_first = (
            tuple(run for run in runs if _knobs(run) != knobs) for runs in (self.variants, self.rounding, self.at_first)
        )
        return replace(self, variants=variants, rounding=rounding, at_first=at_first)

    @property
    def _rounded(self) -> tuple[float, ...]:
        return self.run.rounding.rounded if self.run.rounding else ()

    def calibration(self, candidate: Run) -> Calibration:
        """What ``candidate`` is allowed; one that is a variant itself says nothing about how far it may stray."""
        others = self._without(_knobs(candidate))
        if others is not self:
            return others.calibration(candidate)
        return self.rounded if in_fp32(self.run) and not in_fp32(candidate) else self.plain


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
    here.sort(key=lambda one: one.record.provenance.started_utc, reverse=True)  # of every choice the newest, as anchors() takes it
    return _anchor(name, run, here) if is_yardstick(run.record) else Anchor(name, run)


def _anchor(name: str, run: Run, runs: Sequence[Run]) -> Anchor:
    alike = [one for one in runs if _computes_in(one.record, dtype_of(run))]
    augmented = [one for one in runs if _is_augmented(one.record)] if in_fp32(run) else []
    return Anchor(name, run, _variants(run, alike), _variants(run, augmented), _at_first(run, runs))


def is_yardstick(record: Record) -> bool:
    """Whether other runs are compared with this one: the reference engine, as it is, in a type that has an anchor."""
    return any(_computes_in(record, dtype) for _, dtype in ANCHORS)


def _variants(anchor: Run, runs: Sequence[Run]) -> tuple[Run, ...]:
    """Of every other choice of knobs (attention, split, recompute) one run that can be compared with ``anchor``."""
    others = (run for run in runs if _knobs(run) != _knobs(anchor))
    return _one_of_each(run for run in others if not blocked(run, anchor)[0] and not missing(run, anchor))


def _at_first(anchor: Run, runs: Sequence[Run]) -> tuple[Run, ...]:
    """Of every choice of knobs one run of the reference engine in the other type."""
    others = (run for run in runs if is_yardstick(run.record) and in_fp32(run) != in_fp32(anchor))
    return _one_of_each(run for run in others if not blocked(run, anchor)[0])


def _one_of_each(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The first of every choice of knobs."""
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(_knobs(run), run)
    return tuple(found.values())


def _knobs(run: Run) -> str:
    return run.record.cell.engine.model_dump_json()


def _computes_in(record: Record, dtype: str) -> bool:
    knobs = record.cell.engine.knobs
    plain = all(knobs.get(name, values[0]) in values for name, values in REFERENCE_KNOBS.items())
    return record.cell.engine.name == REFERENCE_ENGINE and knobs.get("compute_dtype") == dtype and plain


def _is_augmented(record: Record) -> bool:
    knobs = record.cell.engine.knobs
    exact = knobs.get("optimizer_state", "fp32") == "fp32"  # absent in older records
    return exact and all(knobs.get(name) == value for name, value in AUGMENTED_KNOBS.items())
