"""The yardstick engine: conformance, and that its knobs change no loss."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import engines.hf
from harness.engine import Job
from harness.errors import UnsupportedError
from harness.spec import parse
from tests.engines.conformance import EngineConformance
from tests.engines.tiny import CPU, GPU, LLAMA, LORA, RecordingProbe, make_job, make_workload, with_train

KNOBS: dict[str, Any] = {
    "micro_batch": 2, "layout": "padded", "recompute": "none", "attention": "sdpa", "compute_dtype": "float32",
    "adapter_compute": "autocast", "kernels": "none", "compile": False,
}  # fmt: skip


class TestHf(EngineConformance):
    engine = engines.hf
    knobs = KNOBS

    @pytest.mark.parametrize("knob", [{"recompute": "full"}, {"attention": "eager"}], ids=str)
    def test_a_knob_changes_no_loss(self, job: Job, knob: dict[str, Any]) -> None:
        usual, other = self.run(with_train(job, "usual")), self.run(job, **knob)
        assert other.losses == pytest.approx(usual.losses, rel=2e-5)
        assert other.grad_norms == pytest.approx(usual.grad_norms, rel=1e-4)

    def test_adapters_stay_exact_beside_a_bfloat16_base(self, job: Job) -> None:
        """A step so small that only the masters' own values are left: they must not have passed through bfloat16."""
        from safetensors.torch import load_file

        assert job.adapter_init is not None
        self.run(with_train(job, "tiny_step", learning_rate=1e-12, weight_decay=0.0), compute_dtype="bfloat16")
        before, after = (load_file(path / "adapter_model.safetensors") for path in (job.adapter_init, job.out.parent / "tiny_step"))
        assert all(torch.allclose(before[name], after[name], rtol=1e-6, atol=1e-9) for name in before)

    def test_refuses_a_model_with_dropout_when_the_weights_are_open(self, job: Job) -> None:
        config = job.base / "config.json"
        config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.1'))
        with pytest.raises(UnsupportedError, match=r"attention_dropout is 0\.1"):
            self.run(job)


@pytest.mark.parametrize(
    ("knobs", "machine", "reason"),
    [
        ({"kernels": "liger"}, CPU, "needs a GPU"),
        ({"attention": "flash_attention_2", "compute_dtype": "bfloat16"}, CPU, "needs a GPU"),
        ({"attention": "flash_attention_2"}, GPU, "16 bits"),
    ],
)
def test_impossible_knobs_are_refused_before_a_process_starts(knobs: dict[str, Any], machine: Any, reason: str) -> None:
    said = engines.hf.unsupported(make_workload(LLAMA, LORA), parse(engines.hf.Knobs, {**KNOBS, **knobs}), machine)
    assert said is not None
    assert reason in said


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    knobs = parse(engines.hf.Knobs, {**KNOBS, "kernels": "liger", "attention": "flash_attention_2", "compute_dtype": "bfloat16"})
    said = engines.hf.unsupported(make_workload(LLAMA, LORA), knobs, GPU)
    assert said is not None
    assert "pip install liger-kernel" in said
    assert "pip install flash-attn" in said


def test_dropout_in_the_config_is_refused() -> None:
    said = engines.hf.unsupported(make_workload({**LLAMA, "attention_dropout": 0.1}, LORA), parse(engines.hf.Knobs, KNOBS), CPU)
    assert said is not None
    assert "attention_dropout is 0.1" in said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler, when it is imported
def test_compile_changes_no_loss(tmp_path: Path) -> None:
    job = make_job(tmp_path, steps=1, warmup_steps=0)
    plain, compiled = RecordingProbe(), RecordingProbe()
    engines.hf.train(with_train(job, "plain"), parse(engines.hf.Knobs, {**KNOBS, "micro_batch": 5}), plain)
    engines.hf.train(job, parse(engines.hf.Knobs, {**KNOBS, "micro_batch": 5, "compile": True}), compiled)
    assert compiled.losses == pytest.approx(plain.losses, rel=2e-6)
    assert compiled.grad_norms == pytest.approx(plain.grad_norms, rel=1e-4)
