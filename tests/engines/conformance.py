"""What every engine must do, on a tiny model: subclass EngineConformance, set ``engine`` and ``knobs``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from harness.data.tokens import IGNORE, Split, StepTokens
from harness.engine import Job, loss_norm
from harness.errors import DataError, UnsupportedError
from harness.spec import parse
from tests.engines.tiny import (
    CPU,
    FULL,
    LORA,
    QLORA,
    VOCABULARY,
    RecordingProbe,
    decoded,
    make_job,
    make_workload,
    plain_loss,
    plain_model,
    plain_training,
    with_train,
)

SAME = 2e-6  # relative: float32 rounding in another order


class EngineConformance:
    """The contract of harness.engine, kept by training in this process on a CPU in float32."""

    engine: ClassVar[ModuleType]
    knobs: ClassVar[dict[str, Any]]

    def run(self, job: Job, **knobs: Any) -> RecordingProbe:
        probe = RecordingProbe()
        self.engine.train(job, parse(self.engine.Knobs, {**self.knobs, **knobs}), probe)
        return probe

    @pytest.fixture
    def job(self, tmp_path: Path) -> Job:
        return make_job(tmp_path)

    def test_reports_every_step_once_with_the_tokens_of_the_file(self, job: Job) -> None:
        probe = self.run(job)
        expected = [StepTokens.expected(job.tokens.step(job.workload.train, index)) for index in range(job.workload.train.steps)]
        seen = [(tokens.input, tokens.loss, tokens.sha256) for tokens in probe.tokens]
        assert seen == [(tokens.input, tokens.loss, tokens.sha256) for tokens in expected]
        assert all(tokens.processed >= tokens.input for tokens in probe.tokens)

    def test_step_1_is_the_loss_of_the_initial_weights(self, job: Job) -> None:
        with torch.no_grad():
            expected = float(plain_loss(plain_model(job), job.tokens.step(job.workload.train, 0)))
        assert self.run(job).losses[0] == pytest.approx(expected, rel=SAME)

    def test_follows_a_plain_loop_to_the_saved_adapter(self, job: Job) -> None:
        """Losses, norms before clipping, and an update that only the right schedule, decay and clipping make."""
        probe = self.run(job)
        plain = list(plain_training(job))
        assert probe.losses == pytest.approx([loss for loss, _, _ in plain], rel=2e-5)
        assert probe.grad_norms == pytest.approx([norm for _, norm, _ in plain], rel=1e-4)
        assert job.workload.train.max_grad_norm < min(norm for _, norm, _ in plain), "clipping is not active: the test is too weak"
        assert job.adapter_init is not None
        before, after = (load_file(folder / "adapter_model.safetensors") for folder in (job.adapter_init, job.out))
        expected = {name.replace(".default", ""): value for name, value in plain[-1][2].named_parameters() if value.requires_grad}
        assert set(after) == set(before) == set(expected)
        for name, value in after.items():
            update, right = value - before[name], expected[name].detach() - before[name]
            assert torch.linalg.vector_norm(update - right) < 2e-3 * torch.linalg.vector_norm(right), name

    @pytest.mark.parametrize("micro_batch", [1, 2, 5])
    def test_the_micro_batch_changes_no_loss(self, job: Job, micro_batch: int) -> None:
        whole = self.run(with_train(job, "whole"), micro_batch=16)
        split = self.run(job, micro_batch=micro_batch)
        assert split.losses[0] == pytest.approx(whole.losses[0], rel=SAME)
        assert split.losses == pytest.approx(whole.losses, rel=2e-5)
        assert split.grad_norms == pytest.approx(whole.grad_norms, rel=1e-4)

    def test_says_what_its_loss_is_a_mean_of(self) -> None:
        """That it is so is what the tests of the micro-batch show."""
        assert loss_norm(self.engine) == "token_global"

    def test_the_same_seed_gives_the_same_bits(self, job: Job) -> None:
        first, second = self.run(with_train(job, "first")), self.run(job)
        assert first.losses == second.losses
        assert first.grad_norms == second.grad_norms

    def test_no_clipping_when_the_norm_is_null(self, job: Job) -> None:
        free = with_train(job, "free", max_grad_norm=None)
        probe = self.run(free)
        assert probe.grad_norms == pytest.approx([norm for _, norm, _ in plain_training(free)], rel=1e-4)

    def test_the_saved_adapter_loads_and_names_no_path(self, job: Job, tmp_path: Path) -> None:
        self.run(job)
        assert json.loads((job.out / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(job.base), str(job.out))
        with torch.no_grad():
            trained, initial = (float(plain_loss(each, job.tokens.step(job.workload.train, 0))) for each in (model, plain_model(job)))
        assert abs(trained - initial) > 1e-3
        texts = [path.read_text() for path in job.out.iterdir() if path.suffix in (".json", ".md")]
        assert not [text for text in texts if str(tmp_path) in text]

    def test_full_trains_every_weight_and_saves_a_checkpoint(self, tmp_path: Path) -> None:
        job = make_job(tmp_path, "tied", FULL, max_grad_norm=2.0)
        probe = self.run(job)
        plain = list(plain_training(job))
        assert probe.losses == pytest.approx([loss for loss, _, _ in plain], rel=2e-5)
        assert probe.grad_norms == pytest.approx([norm for _, norm, _ in plain], rel=1e-4)
        saved, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (job.out, job.base))
        initial, expected = dict(base.named_parameters()), dict(plain[-1][2].named_parameters())
        for name, value in saved.named_parameters():
            update, right = value - initial[name], expected[name] - initial[name]
            assert torch.linalg.vector_norm(update - right) < 2e-3 * torch.linalg.vector_norm(right), name

    def test_full_saves_the_stored_dtype(self, tmp_path: Path) -> None:
        job = make_job(tmp_path, "llama", FULL, steps=1, warmup_steps=0)
        raw = job.workload.model_dump(mode="json")
        raw["model"]["dtype"] = "bfloat16"
        self.run(replace(job, workload=parse(type(job.workload), raw)))
        assert {tensor.dtype for tensor in load_file(job.out / "model.safetensors").values()} == {torch.bfloat16}
        assert AutoModelForCausalLM.from_pretrained(job.out, dtype="auto").dtype == torch.bfloat16

    def test_bfloat16_stays_near(self, job: Job) -> None:
        exact, rounded = self.run(with_train(job, "exact")), self.run(job, compute_dtype="bfloat16")
        assert exact.losses != rounded.losses
        assert rounded.losses == pytest.approx(exact.losses, rel=2e-2)
        assert {tensor.dtype for tensor in load_file(job.out / "adapter_model.safetensors").values()} == {torch.float32}

    def test_a_document_does_not_see_its_neighbour_in_a_batch(self, job: Job) -> None:
        """One supervised document beside one that is not: whatever the other says, loss and gradient stay, however they are laid out."""
        told = [
            self.run(with_train(two_documents(job, seed), f"neighbour {seed}", steps=2, warmup_steps=1), micro_batch=2) for seed in (1, 2)
        ]
        assert told[0].tokens[0].sha256 != told[1].tokens[0].sha256
        assert told[1].losses == pytest.approx(told[0].losses, rel=SAME)
        assert told[1].grad_norms == pytest.approx(told[0].grad_norms, rel=2e-5)

    def test_stops_where_it_is_told_on_the_schedule_of_all_steps(self, job: Job) -> None:
        whole, first = self.run(with_train(job, "whole")), self.run(with_train(job, "first", stop_after=1))
        assert first.losses == whole.losses[:1]
        assert job.adapter_init is not None
        before, after = (load_file(path / "adapter_model.safetensors") for path in (job.adapter_init, job.out.parent / "first"))
        train = job.workload.train
        moved = max(
            float((after[name] - before[name] * (1 - train.learning_rate_at(0) * train.weight_decay)).abs().max()) for name in before
        )
        assert moved == pytest.approx(train.learning_rate_at(0), rel=1e-3), "AdamW's first update is the rate, wherever there is a gradient"

    def test_a_step_without_a_label_is_an_error_not_a_nan(self, job: Job) -> None:
        split = Split(np.arange(4, dtype=np.int32), np.full(4, IGNORE, np.int32), np.array([0, 4], np.int64))
        with pytest.raises(DataError, match="supervised"):
            self.run(replace(job, tokens=replace(job.tokens, train=split)))

    def test_refuses_more_processes_than_it_has(self, job: Job) -> None:
        with pytest.raises(UnsupportedError, match="processes"):
            self.run(replace(job, processes=2))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
    @pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
    def test_a_gpu_computes_what_a_cpu_does(self, tmp_path: Path, method: dict[str, Any]) -> None:
        job = make_job(tmp_path, "llama", method)
        on_cpu, on_gpu = self.run(with_train(job, "cpu")), self.run(replace(job, device="cuda"))
        assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=2e-5)
        assert on_gpu.grad_norms == pytest.approx(on_cpu.grad_norms, rel=1e-3)
        rounded = self.run(replace(with_train(job, "rounded"), device="cuda"), compute_dtype="bfloat16")
        assert rounded.losses == pytest.approx(on_cpu.losses, rel=2e-2)

    def test_says_what_it_cannot_do_and_nothing_else(self, job: Job) -> None:
        knobs = parse(self.engine.Knobs, self.knobs)
        assert self.engine.unsupported(job.workload, knobs, CPU) is None
        half = make_workload(job.workload.model.config or {}, {**LORA, "dtype": "float16"})
        assert "float16" in self.engine.unsupported(half, knobs, CPU)
        rounded = make_workload(job.workload.model.config or {}, {**LORA, "dtype": "bfloat16"})
        assert "bfloat16" in self.engine.unsupported(rounded, knobs, CPU)


class QLoraConformance(EngineConformance):
    """The same on a base in NF4: tests see LoRA on its decoded values, and the engine trains ``method=qlora`` on the packed ones."""

    test_full_trains_every_weight_and_saves_a_checkpoint = None  # type: ignore[assignment]
    test_full_saves_the_stored_dtype = None  # type: ignore[assignment]

    @pytest.fixture
    def job(self, tmp_path: Path) -> Job:
        packed = make_job(tmp_path, method=QLORA)
        return replace(decoded(packed), out=packed.out)

    def run(self, job: Job, **knobs: Any) -> RecordingProbe:
        (base,) = (job.out.parent / "nf4").iterdir()
        raw = job.workload.model_dump(mode="json")
        return super().run(
            replace(job, base=base, workload=parse(type(job.workload), {**raw, "method": {**raw["method"], "name": "qlora"}})), **knobs
        )

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
    def test_a_gpu_computes_what_a_cpu_does(self, job: Job) -> None:  # type: ignore[override]
        on_cpu, on_gpu = self.run(with_train(job, "cpu")), self.run(replace(job, device="cuda"))
        assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=2e-5)
        rounded = self.run(replace(with_train(job, "rounded"), device="cuda"), compute_dtype="bfloat16")
        assert rounded.losses == pytest.approx(on_cpu.losses, rel=2e-2)


def two_documents(job: Job, seed: int) -> Job:
    """Every step: the same supervised document of 11 tokens, and one of 7 without labels, drawn with ``seed``."""
    right, other = np.random.default_rng(0).integers(0, VOCABULARY, 11), np.random.default_rng(seed).integers(0, VOCABULARY, 7)
    ids = np.concatenate([other, right]).astype(np.int32)
    labels = np.concatenate([np.full(8, IGNORE), right[1:]]).astype(np.int32)
    raw = job.workload.model_dump(mode="json")
    workload = parse(type(job.workload), {**raw, "train": {**raw["train"], "samples_per_step": 2}})
    return replace(job, workload=workload, tokens=replace(job.tokens, train=Split(ids, labels, np.array([0, 7, 18], np.int64))))
