"""A loss of 0.0 in Axolotl's log is a NaN that transformers has filtered: our plugin reports the NaN, and no verdict lets it pass."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

import engines.hf
from harness.anchors import Anchor
from harness.comparable import Run
from harness.parity import judge_against, verdict
from harness.spec import parse
from tests import records
from tests.engines.peers import knobs, peer
from tests.engines.test_hf import KNOBS as HF
from tests.engines.tiny import RecordingProbe, make_job, with_train

THERE, MARKS = peer(
    "axolotl", "tests.fakes.axolotl_logging", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", PYTHONUNBUFFERED="1"
)
pytestmark = MARKS
LOST: dict[str, Any] = {"learning_rate": 1e30, "max_grad_norm": None, "warmup_steps": 0, "schedule": "constant"}  # overflows at once


def run_of(engine: str, losses: list[float], grad_norms: list[float | None]) -> Run:
    ran = records.steps(num_steps=4, losses=tuple(losses), grad_norms=tuple(grad_norms))
    return Run(records.record(records.engine(engine), ran=ran))


def test_a_lost_run_reads_as_a_perfect_one_in_its_log_and_as_lost_in_ours(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job, probe = make_job(tmp_path), RecordingProbe()
    THERE.train(with_train(job, "lost", **LOST), parse(THERE.Knobs, {**knobs("axolotl"), "micro_batch": 5}), probe)
    said = capfd.readouterr()
    logged = [float(value) for value in re.findall(r"\{'loss': '?([^',]+)", said.out + said.err)]
    assert logged[0] == pytest.approx(probe.losses[0], rel=1e-3)
    assert logged[1:] == [0.0, 0.0, 0.0]
    assert math.isfinite(probe.losses[0])
    assert all(math.isnan(loss) for loss in probe.losses[1:])

    truth = RecordingProbe()
    engines.hf.train(with_train(job, "truth"), parse(engines.hf.Knobs, HF), truth)
    anchor, lost = Anchor("fp32", run_of("hf", truth.losses, truth.grad_norms)), run_of("axolotl", probe.losses, probe.grad_norms)
    for found in (verdict(lost, ()), judge_against(lost, anchor)):
        assert (found.kind, found.can_win) == ("different", False)
        assert found.reasons[0] == "loss is nan at step 2"
    # An engine that reported its log instead: no held-out score here, so it is for the light check to see.
    told = judge_against(run_of("axolotl", logged, truth.grad_norms), anchor)
    assert (told.light.passed, told.can_win) == (False, False)
