"""Unsloth's own package: conformance on its CPU backend, which shares our adapter but not its GPU kernels, and what its adapter refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import engines.unsloth
import engines.unsloth.model
from harness.data.tokens import StepTokens
from harness.engine import Job, Machine
from harness.errors import UnsupportedError
from harness.spec import parse
from tests.engines.conformance import EngineConformance, two_documents
from tests.engines.peers import knobs, peer
from tests.engines.tiny import (
    CPU,
    FULL,
    GPU,
    LLAMA,
    LORA,
    VOCABULARY,
    RecordingProbe,
    make_job,
    make_samples,
    make_workload,
    plain_training,
    with_train,
)

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # as launch sets for every worker
UNSLOTH, MARKS = peer("unsloth", **OFFLINE)
KNOBS: dict[str, Any] = {**knobs("unsloth/nockpt+padded"), "micro_batch": 2}
GPU_KNOBS: dict[str, Any] = {**knobs("unsloth"), "compute_dtype": "bfloat16"}


class TestUnsloth(EngineConformance):
    pytestmark = MARKS
    engine = UNSLOTH  # type: ignore[assignment]
    knobs = KNOBS

    @pytest.mark.parametrize(
        "knob",
        [
            {"recompute": "full"}, {"recompute": "unsloth"}, {"layout": "packed"}, {"order": "by_length", "pad_to_multiple_of": 8},
            {"layout": "packed", "order": "by_length"},
        ],
        ids=str,
    )  # fmt: skip
    def test_a_knob_changes_no_loss(self, job: Job, knob: dict[str, Any]) -> None:
        usual, other = self.run(with_train(job, "usual")), self.run(job, **knob)
        assert other.losses == pytest.approx(usual.losses, rel=2e-5)
        assert other.grad_norms == pytest.approx(usual.grad_norms, rel=1e-4)
        assert [tokens.sha256 for tokens in other.tokens] == [tokens.sha256 for tokens in usual.tokens]

    def test_full_in_bfloat16_stays_near(self, tmp_path: Path) -> None:
        exact = make_job(tmp_path / "exact", method=FULL)
        rounded = make_job(tmp_path / "rounded", method={**FULL, "dtype": "bfloat16"})
        told = self.run(exact), self.run(rounded, compute_dtype="bfloat16")
        assert told[0].losses != told[1].losses
        assert told[1].losses[0] == pytest.approx(told[0].losses[0], rel=2e-3)
        assert told[1].losses == pytest.approx(told[0].losses, rel=3e-2)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
    @pytest.mark.parametrize("layout", ["padded", "packed"])
    def test_a_gpu_computes_what_a_cpu_does(self, tmp_path: Path, layout: str) -> None:  # type: ignore[override]
        """In a process of its own: Unsloth decides what it is when it is imported. Beside a float32 base its LoRA kernels stand aside."""
        job, (there, _) = make_job(tmp_path), peer("unsloth", **OFFLINE)
        on_cpu, on_gpu, rounded = self.run(with_train(job, "cpu")), RecordingProbe(), RecordingProbe()
        for name, dtype, probe in (("exact", "float32", on_gpu), ("rounded", "bfloat16", rounded)):
            own = replace(with_train(job, name), device="cuda")
            there.train(own, parse(engines.unsloth.Knobs, {**KNOBS, "layout": layout, "compute_dtype": dtype}), probe)
        assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=2e-5)
        assert on_gpu.grad_norms == pytest.approx(on_cpu.grad_norms, rel=1e-3)
        assert rounded.losses == pytest.approx(on_cpu.losses, rel=2e-2)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
    def test_a_gpu_trains_all_weights_as_a_cpu_does(self, tmp_path: Path) -> None:
        exact, there = make_job(tmp_path / "exact", method=FULL), peer("unsloth", **OFFLINE)[0]
        in_half = make_job(tmp_path / "half", method={**FULL, "dtype": "bfloat16"})
        on_cpu, masters, half = self.run(with_train(exact, "cpu")), RecordingProbe(), RecordingProbe()
        for job, probe in ((exact, masters), (in_half, half)):
            there.train(replace(job, device="cuda"), parse(engines.unsloth.Knobs, {**KNOBS, "compute_dtype": "bfloat16"}), probe)
            assert probe.losses == pytest.approx(on_cpu.losses, rel=3e-2)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
    def test_replayed_graphs_on_batches_of_few_widths_change_no_loss(self, tmp_path: Path) -> None:
        job, probes = make_job(tmp_path, steps=8), (RecordingProbe(), RecordingProbe())
        graphs = {"cuda_graphs": True, "order": "by_length", "pad_to_multiple_of": 8}
        for name, changed, probe in zip(("usual", "graphs"), ({"layout": "packed"}, graphs), probes, strict=True):
            there, _ = peer("unsloth", **OFFLINE)
            own = replace(with_train(job, name), device="cuda")
            there.train(own, parse(engines.unsloth.Knobs, {**KNOBS, "compute_dtype": "bfloat16", **changed}), probe)
        assert probes[1].losses == pytest.approx(probes[0].losses, rel=5e-3)
        assert probes[1].grad_norms == pytest.approx(probes[0].grad_norms, rel=5e-2)

    def test_packed_documents_do_not_see_each_other(self, job: Job) -> None:
        told = [
            self.run(with_train(two_documents(job, seed), f"packed {seed}", steps=2, warmup_steps=1), micro_batch=2, layout="packed")
            for seed in (1, 2)
        ]
        assert told[0].tokens[0].sha256 != told[1].tokens[0].sha256
        assert told[1].losses == pytest.approx(told[0].losses, rel=2e-6)
        assert told[1].grad_norms == pytest.approx(told[0].grad_norms, rel=2e-5)

    @pytest.mark.parametrize("family", ["llama3_rope", "tied", "mistral", "qwen2", "qwen3"])
    def test_families_follow_a_plain_loop(self, family: str, tmp_path: Path) -> None:
        job = make_job(tmp_path, family)
        probe, plain = self.run(job, layout="packed"), list(plain_training(job))
        assert probe.losses == pytest.approx([loss for loss, _, _ in plain], rel=2e-5)
        assert probe.grad_norms == pytest.approx([norm for _, norm, _ in plain], rel=1e-4)

    def test_what_only_the_open_weights_reveal(self, job: Job) -> None:
        raw = job.workload.model_dump(mode="json")
        longer = parse(type(job.workload), {**raw, "data": {**raw["data"], "sequence_length": 65}})
        with pytest.raises(UnsupportedError, match="65 tokens make Unsloth rescale the positions of a model made for 64"):
            self.run(replace(job, workload=longer))


@pytest.mark.parametrize("named", [None, 0, 1])
def test_the_tokenizer_it_is_given_needs_no_repair(named: int | None, tmp_path: Path) -> None:
    """Unsloth changes the embedding when the padding token is missing, is the end token, or is the one that the model's config names."""
    job = make_job(tmp_path)
    folder = engines.unsloth.model.folder(job, {"pad_token_id": named})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id not in (None, named, tokenizer.eos_token_id)
    assert len(tokenizer) <= VOCABULARY
    assert (folder / "model.safetensors").samefile(job.base / "model.safetensors")


def test_every_knob_but_the_micro_batch_and_the_type_has_a_name() -> None:
    """So that verdicts and tables keep variants apart."""
    usual = {**GPU_KNOBS, "layout": "padded"}
    others = {
        "recompute": ["full", "none"], "checkpoint_skip_layers": ["auto", 3], "layout": ["packed"], "block_compile": ["off", "forced"],
        "cuda_graphs": [True], "order": ["by_length"], "pad_to_multiple_of": [64, 128],
    }  # fmt: skip
    changed = [usual, *({**usual, key: value} for key, values in others.items() for value in values)]
    names = [engines.unsloth.variant(parse(engines.unsloth.Knobs, one)) for one in changed]
    assert len(set(names)) == len(changed)
    assert names[:3] == ["default+padded", "ckpt+padded", "nockpt+padded"]


@pytest.mark.parametrize(
    ("changed", "machine", "reason"),
    [
        ({"cuda_graphs": True, "layout": "padded"}, CPU, "on a GPU only"),
        ({"block_compile": "off", "layout": "padded"}, CPU, "on a GPU only"),
        ({"checkpoint_skip_layers": "auto"}, CPU, "is for a GPU"),
        ({"pad_to_multiple_of": 64}, GPU, "is of layout=padded"),
        ({"cuda_graphs": True}, GPU, "compiles no packed batches"),
        ({"block_compile": "forced"}, GPU, "compiles no packed batches"),
        ({"cuda_graphs": True, "layout": "padded", "block_compile": "off"}, GPU, "captures compiled blocks"),
        ({"checkpoint_skip_layers": 2, "recompute": "none"}, GPU, "with recompute=none use null"),
    ],
)
def test_impossible_knobs_are_refused(changed: dict[str, Any], machine: Machine, reason: str) -> None:
    said = engines.unsloth.unsupported(make_workload(LLAMA, LORA), parse(engines.unsloth.Knobs, {**GPU_KNOBS, **changed}), machine)
    assert said is not None
    assert reason in said


def test_all_weights_are_trained_in_bfloat16_too() -> None:
    padded = parse(engines.unsloth.Knobs, {**GPU_KNOBS, "layout": "padded"})
    for dtype in ("float32", "bfloat16"):
        assert engines.unsloth.unsupported(make_workload(LLAMA, {**FULL, "dtype": dtype}), padded, GPU) is None


def test_batches_of_like_length_pad_less_and_hold_the_same_samples() -> None:
    samples = make_samples(12)
    chosen = {order: parse(engines.unsloth.Knobs, {**KNOBS, "micro_batch": 4, "order": order}) for order in ("given", "by_length")}
    given, grouped = (engines.unsloth._batches(samples, knobs_) for knobs_ in chosen.values())
    assert sum(batch.input_ids.size for batch in grouped) < sum(batch.input_ids.size for batch in given)
    assert StepTokens.of(grouped).sha256 == StepTokens.of(given).sha256 == StepTokens.expected(samples).sha256
    wide = engines.unsloth._batches(samples, chosen["given"].model_copy(update={"pad_to_multiple_of": 16}))
    assert {batch.input_ids.shape[1] % 16 for batch in wide} == {0}


def test_what_is_possible_is_not_refused() -> None:
    work = make_workload(LLAMA, LORA)
    for changed in ({}, {"layout": "padded", "cuda_graphs": True}, {"checkpoint_skip_layers": "auto"}, {"recompute": "none"}):
        assert engines.unsloth.unsupported(work, parse(engines.unsloth.Knobs, {**GPU_KNOBS, **changed}), GPU) is None


@pytest.mark.parametrize(
    ("config", "method", "reason"),
    [
        ({**LLAMA, "model_type": "mamba"}, LORA, "model_type=mamba"),
        ({**LLAMA, "attention_dropout": 0.1}, LORA, "attention_dropout is 0.1"),
        ({**LLAMA, "max_position_embeddings": 16}, LORA, "rescale the positions"),
        (LLAMA, FULL, "use layout=padded"),
        (LLAMA, {**LORA, "dtype": "bfloat16"}, "use method.dtype=float32"),
        (LLAMA, {**FULL, "dtype": "float16"}, "method.dtype=float16, compute_dtype=bfloat16; use method.dtype=float32"),
    ],
)
def test_impossible_workloads_are_refused(config: dict[str, Any], method: dict[str, Any], reason: str) -> None:
    said = engines.unsloth.unsupported(make_workload(config, method), parse(engines.unsloth.Knobs, GPU_KNOBS), GPU)
    assert said is not None
    assert reason in said


@pytest.mark.parametrize(
    ("changed", "fraction"),
    [({}, 1.0), ({"recompute": "none"}, 0.0), ({"checkpoint_skip_layers": "auto"}, None), ({"checkpoint_skip_layers": 1}, 0.5)],
)
def test_what_is_recomputed(changed: dict[str, Any], fraction: float | None) -> None:
    knobs_ = parse(engines.unsloth.Knobs, {**GPU_KNOBS, **changed})
    assert engines.unsloth.recomputed_fraction(make_workload(LLAMA, LORA), knobs_) == fraction
