"""The light check, where nothing else can be tested: what it lets pass, what it fails, what only a run in fp32 tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.anchors import Anchor, anchors
from harness.comparable import Run, runs
from harness.data.counts import DataCounts
from harness.deviations import loss_floor
from harness.parity import LIGHT_FLOORS, judge, verdict
from harness.store import load
from tests import records

LOSSES = records.losses()
RESULTS = Path(__file__).resolve().parents[1] / "results"


def run(name: str, *, lower: float = 0.0, since: int = 4, dtype: str = "bfloat16") -> Run:
    """Losses ``lower`` by so many allowances from one step on (counted from 0), without a score."""
    record = records.record(records.engine(name, compute_dtype=dtype), losses=LOSSES)
    assert record.measurement is not None
    labels = record.measurement.steps.tokens_loss
    off = (lower * LIGHT_FLOORS["bfloat16"] * loss_floor(count) * (step >= since) for step, count in enumerate(labels))
    return Run(records.record(records.engine(name, compute_dtype=dtype), losses=tuple(x - y for x, y in zip(LOSSES, off, strict=True))))


@pytest.mark.parametrize(
    ("lower", "since", "passed", "text"),
    [
        (0.9, 0, True, "passed"),
        (2.0, 4, None, "is open"),
        (-2.0, 4, False, "failed"),
        (3.1, 4, False, "failed"),
        (2.0, 0, False, "failed"),
    ],
    ids=["near", "lower once it learns", "higher", "much lower", "lower before any update"],
)
def test_a_curve_below_a_reference_that_rounds_is_open(lower: float, since: int, passed: bool | None, text: str) -> None:
    found = judge(run("fused", lower=lower, since=since), run("hf"))
    assert (found.kind, found.light.passed, found.light.text) == ("not comparable", passed, text)
    assert found.can_win is (passed is not False)
    assert ("compute_dtype=float32 decides" in found.light.detail) is (passed is None)


def test_fp32_as_the_reference_leaves_nothing_open() -> None:
    assert judge(run("fused", lower=2.0), run("hf", dtype="float32")).light.passed is False


@pytest.mark.parametrize(("of_truth", "passed"), [(1.6, True), (0.0, False)], ids=["followed", "left"])
def test_what_is_open_beside_bf16_the_truth_decides(of_truth: float, passed: bool) -> None:
    truth = Anchor("fp32", run("hf", lower=of_truth, dtype="float32"))
    found = verdict(run("fused", lower=2.0), [truth, Anchor("bf16", run("hf"))])
    assert (found.light.passed, found.can_win) == (passed, passed)


def test_bf16_hf_loses_of_what_a_young_adapter_adds_and_one_sum_does_not() -> None:
    """Eight layers of random weights, 16 samples seen three times: records of the figures in decision 0024."""
    cut = [one for one in runs(load(RESULTS)) if one.record.cell.workload.model.name == "cut"]
    cut = [one for one in cut if one.record.cell.workload.train.learning_rate == 2e-4]
    truth, rounded = anchors(cut, cut[0].record.cell.workload.key, cut[0].record.machine.key)
    fused = next(
        one for one in cut if one.record.cell.engine.name == "fused" and one.record.cell.engine.knobs["compute_dtype"] == "bfloat16"
    )
    again = slice(4, 8)  # the steps of the second pass
    off = [max(abs(x - y) for x, y in zip(losses(one)[again], losses(truth.run)[again], strict=True)) for one in (rounded.run, fused)]
    assert off[0] > 0.018
    assert off[1] < 0.001


def losses(one: Run) -> tuple[float, ...]:
    assert one.record.measurement is not None
    return one.record.measurement.steps.losses


def test_data_without_held_out_rows_is_the_reason_and_named_alone() -> None:
    none = dict.fromkeys((name for name in DataCounts.model_fields if name != "files"), 0)
    counts = DataCounts(**{**none, "samples_train": 64}, files=())
    bare = Run(run("fused").record.model_copy(update={"data": counts}))
    assert judge(bare, run("hf")).detail == "there are no held-out rows to score it on"
