"""8-bit products on a GPU: near float64, adapters inside, and whole runs near the truth, replayed and in both modes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engines.fused
from engines.native import fp8_ops
from engines.native.fp8 import Fp8Weight, Mode
from engines.native.nf4 import SharedBuffers
from engines.native.ops import Input
from engines.native.weights import Linear, Part, Weight
from harness.engine import Job
from harness.spec import parse
from tests.engines.test_fp8 import LORA_FP8, MODES
from tests.engines.test_fused_gpu import EXACT, KNOBS
from tests.engines.tiny import FAMILIES, LLAMA, RecordingProbe, make_job, with_train


def _has_e4m3() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _has_e4m3(), reason="no NVIDIA GPU with 8-bit floating-point products here")]
WHOLE = {**LLAMA, "hidden_size": 64, "intermediate_size": 96}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tokens", "outputs", "inputs", "room"), [(37, 192, 576, 16), (300, 1536, 576, 32), (128, 576, 1536, 48)])
def test_a_group_is_near_its_definition(tokens: int, outputs: int, inputs: int, room: int, mode: Mode) -> None:
    torch.manual_seed(1)
    weight, x, dy = torch.randn(outputs, inputs), torch.randn(tokens, inputs + room), torch.randn(tokens, outputs + room)
    weight, x, dy = (each.cuda() for each in (0.05 * weight, x, dy))
    fp8 = Fp8Weight.of(weight, mode, "group", SharedBuffers(), room, torch.bfloat16)
    fp8.shared.forget()
    fp8.up.normal_(std=0.01)
    fp8.down.normal_(std=0.01)
    linear = Linear(fp8.forward.plain[:outputs], Weight(fp8.forward.plain[:outputs]), None, (Part("group", slice(0, outputs)),), fp8=fp8)
    x, dy = x.bfloat16(), dy.bfloat16()
    y = fp8_ops.linear(Input(x, None), linear, room)
    dx = fp8_ops.input_gradient(dy, linear)
    right = torch.cat([weight, fp8.up], dim=1).double(), torch.cat([weight, fp8.down]).double()
    for found, truth, most in ((y, x.double() @ right[0].t(), 0.05), (dx, dy.double() @ right[1], 0.05)):
        assert (found.double() - truth).norm() < most * truth.norm()
    assert y.shape == (tokens, outputs)
    assert not y.as_strided((tokens, outputs + room), y.stride())[:, outputs:].any()
    x[:, :inputs] = 0
    dy[:, :outputs] = 0
    for found, truth in (
        (fp8_ops.linear(Input(x, None), linear, 0), x.double() @ right[0].t()),
        (fp8_ops.input_gradient(dy, linear), dy.double() @ right[1]),
    ):
        assert (found.double() - truth).norm() < 0.01 * truth.norm()  # the adapter alone


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setitem(FAMILIES, "whole_sixteens", WHOLE)
    return make_job(tmp_path, "whole_sixteens", LORA_FP8, steps=6)


def run(job: Job, name: str, **knobs: Any) -> RecordingProbe:
    probe = RecordingProbe()
    engines.fused.train(replace(with_train(job, name), device="cuda"), parse(engines.fused.Knobs, {**KNOBS, **knobs}), probe)
    return probe


@pytest.mark.parametrize("mode", MODES)
def test_training_follows_the_truth(job: Job, mode: Mode) -> None:
    truth, fused = run(job, "truth", **EXACT, fp8="forward"), run(job, "fused", fp8=mode)
    assert np.abs(np.array(fused.losses) - np.array(truth.losses)).max() < 0.05
    assert fused.grad_norms == pytest.approx(truth.grad_norms, rel=0.1)
    launched, again = run(job, "launched", fp8=mode, replay=False), run(job, "again", fp8=mode, recompute="full")
    assert launched.losses == pytest.approx(fused.losses, rel=1e-2)
    assert again.losses == pytest.approx(fused.losses, rel=1e-2)
