"""Axolotl's own package: conformance on a CPU, which shares our adapter but none of its GPU kernels, and what its adapter refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import engines.axolotl
from engines.axolotl.settings import not_taken
from harness.compose import CONF
from harness.engine import Job, Machine, loss_norm
from harness.errors import UnsupportedError
from harness.spec import parse
from tests.engines.conformance import SAME, EngineConformance, two_documents
from tests.engines.peers import knobs, peer
from tests.engines.tiny import CPU, FULL, GPU, LLAMA, LORA, RecordingProbe, make_job, make_workload, plain_training, with_train

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # as launch sets for every worker
AXOLOTL, MARKS = peer("axolotl", **OFFLINE, CUDA_VISIBLE_DEVICES="")  # it takes the GPU where it sees one
KNOBS: dict[str, Any] = {**knobs("axolotl"), "micro_batch": 1}
KERNELS = {"lora_kernels": ["mlp", "qkv", "o"], "liger": ["rope", "rms_norm", "glu_activation", "fused_linear_cross_entropy"]}
VARIANTS = sorted(path.stem for path in (CONF / "engine" / "axolotl").glob("*.yaml"))


class TestAxolotl(EngineConformance):
    pytestmark = MARKS
    engine = AXOLOTL  # type: ignore[assignment]
    knobs = KNOBS

    @pytest.mark.parametrize("layout", ["padded", "packed"])
    def test_the_micro_batch_changes_no_loss(self, job: Job, layout: str) -> None:  # type: ignore[override]
        whole = self.run(with_train(job, "whole"), micro_batch=5, layout=layout)
        split = self.run(job, layout=layout)
        assert split.losses[0] == pytest.approx(whole.losses[0], rel=SAME)
        assert split.losses == pytest.approx(whole.losses, rel=2e-5)
        assert split.grad_norms == pytest.approx(whole.grad_norms, rel=1e-4)

    @pytest.mark.parametrize("knob", [{"recompute": "full"}, {"layout": "packed", "micro_batch": 5}, {"attention": "eager"}], ids=str)
    def test_a_knob_changes_no_loss(self, job: Job, knob: dict[str, Any]) -> None:
        usual, other = self.run(with_train(job, "usual")), self.run(job, **knob)
        assert other.losses == pytest.approx(usual.losses, rel=2e-5)
        assert other.grad_norms == pytest.approx(usual.grad_norms, rel=1e-4)
        assert [one.sha256 for one in other.tokens] == [one.sha256 for one in usual.tokens]

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
    @pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
    def test_a_gpu_computes_what_a_cpu_does(self, tmp_path: Path, method: dict[str, Any]) -> None:
        """In a process of its own, which sees the GPU; with its kernels where there is an adapter."""
        job, (there, _), kernels = make_job(tmp_path, "llama", method), peer("axolotl", **OFFLINE), KERNELS if method is LORA else {}
        on_cpu, on_gpu, rounded = self.run(with_train(job, "cpu")), RecordingProbe(), RecordingProbe()
        plain = {**KNOBS, "lora_kernels": []}
        there.train(replace(with_train(job, "exact"), device="cuda"), parse(engines.axolotl.Knobs, plain), on_gpu)
        chosen = {**plain, **kernels, "compute_dtype": "bfloat16"}
        there.train(replace(with_train(job, "rounded"), device="cuda"), parse(engines.axolotl.Knobs, chosen), rounded)
        assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=2e-5)
        assert on_gpu.grad_norms == pytest.approx(on_cpu.grad_norms, rel=1e-3)
        assert rounded.losses == pytest.approx(on_cpu.losses, rel=3e-2)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_packed_documents_do_not_see_each_other(self, job: Job, attention: str) -> None:
        told = [
            self.run(
                with_train(two_documents(job, seed), f"packed {seed}", steps=2, warmup_steps=1),
                micro_batch=2,
                layout="packed",
                attention=attention,
            )
            for seed in (1, 2)
        ]
        assert told[0].tokens[0].sha256 != told[1].tokens[0].sha256
        assert told[0].tokens[0].processed == told[0].tokens[0].input
        assert told[1].losses == pytest.approx(told[0].losses, rel=SAME)
        assert told[1].grad_norms == pytest.approx(told[0].grad_norms, rel=2e-5)

    @pytest.mark.parametrize(("schedule", "warmup"), [("constant", 0), ("linear", 1), ("cosine", 2)])
    def test_takes_the_rates_of_the_workload(self, job: Job, schedule: str, warmup: int) -> None:
        """Its own warm-up of one step would be two."""
        told = with_train(job, "told", schedule=schedule, warmup_steps=warmup, learning_rate=2e-2)
        assert self.run(told).losses == pytest.approx([loss for loss, _, _ in plain_training(told)], rel=2e-5)

    @pytest.mark.parametrize("family", ["llama3_rope", "tied", "mistral", "qwen2", "qwen3"])
    def test_families_follow_a_plain_loop(self, family: str, tmp_path: Path) -> None:
        job = make_job(tmp_path, family)
        probe, plain = self.run(job, layout="packed", micro_batch=5), list(plain_training(job))
        assert probe.losses == pytest.approx([loss for loss, _, _ in plain], rel=2e-5)
        assert probe.grad_norms == pytest.approx([norm for _, norm, _ in plain], rel=1e-4)

    def test_full_in_bfloat16_stays_near(self, tmp_path: Path) -> None:
        exact = make_job(tmp_path / "exact", method=FULL)
        rounded = make_job(tmp_path / "rounded", method={**FULL, "dtype": "bfloat16"})
        told = self.run(exact), self.run(rounded, compute_dtype="bfloat16")
        assert told[0].losses != told[1].losses
        assert told[1].losses[0] == pytest.approx(told[0].losses[0], rel=2e-3)
        assert told[1].losses == pytest.approx(told[0].losses, rel=3e-2)

    def test_micro_batches_that_do_not_fill_a_step_are_refused(self, job: Job) -> None:
        with pytest.raises(UnsupportedError, match="does not divide"):
            self.run(job, micro_batch=2)


def test_a_model_with_dropout_is_refused_when_the_weights_are_open(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    config = job.base / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.1'))
    with pytest.raises(UnsupportedError, match=r"attention_dropout is 0\.1"):
        engines.axolotl._check_here(job, read())


def read(option: str = "axolotl", **changed: Any) -> engines.axolotl.Knobs:
    return parse(engines.axolotl.Knobs, {**knobs(option), "micro_batch": 1, **changed})


def test_every_knob_but_the_micro_batch_and_the_type_has_a_name() -> None:
    """So that verdicts and tables keep variants apart."""
    others = {
        "recompute": ["full"], "layout": ["packed"], "attention": ["eager", "flash_attention_2", "flex_attention"],
        "lora_kernels": [[], ["mlp"], ["qkv", "o"], ["mlp", "qkv", "o"]], "liger": [["rope"], ["rms_norm", "rope"]],
        "distributed": ["ddp", "fsdp2", "zero2"],
    }  # fmt: skip
    changed: list[dict[str, Any]] = [{}, *({key: value} for key, values in others.items() for value in values)]
    names = [engines.axolotl.variant(read(**one)) for one in changed]
    assert len(set(names)) == len(changed)
    assert names[0] == "default"
    assert {"default+ckpt", "plain", "kernels-mlp", "kernels", "default+liger-rope-rms_norm"} < set(names)


def test_the_order_of_kernels_changes_no_name() -> None:
    assert engines.axolotl.variant(read(lora_kernels=["o", "mlp", "qkv"])) == "kernels"


def test_a_setting_that_it_ignores_or_changes_is_told() -> None:
    told = {"bf16": True, "lora_typo": 3, "lora_o_kernel": True, "datasets": [1], "seed": 0, "adapter": None}
    config = {"bf16": True, "lora_o_kernel": False, "seed": 0}
    assert not_taken(told, config) == ["lora_typo=3 became None", "lora_o_kernel=True became False"]


def test_says_what_its_loss_is_a_mean_of_on_several_ranks() -> None:
    assert loss_norm(engines.axolotl, 1) == "token_global"
    assert loss_norm(engines.axolotl, 2) == "rank_token_mean"


@pytest.mark.parametrize(
    ("changed", "machine", "reason"),
    [
        ({"lora_kernels": ["mlp"]}, CPU, "lora_kernels=['mlp'] is Triton code"),
        ({"liger": ["rope"]}, CPU, "liger=['rope'] is Triton code"),
        ({"attention": "flex_attention"}, CPU, "needs a GPU"),
        ({"compute_dtype": "float32", "attention": "flash_attention_2"}, GPU, "16 bits"),
        ({"micro_batch": 3}, GPU, "samples_per_step=5 is no multiple of micro_batch=3"),
        ({}, GPU.model_copy(update={"count": 5}), "distributed=none is for one process"),
    ],
)
def test_impossible_knobs_are_refused(changed: dict[str, Any], machine: Machine, reason: str) -> None:
    said = engines.axolotl.unsupported(make_workload(LLAMA, LORA), read(**changed), machine)
    assert said is not None
    assert reason in said


@pytest.mark.parametrize(
    ("config", "method", "changed", "reason"),
    [
        ({**LLAMA, "attention_dropout": 0.1}, LORA, {}, "attention_dropout is 0.1"),
        ({**LLAMA, "model_type": "falcon"}, LORA, {"distributed": "fsdp2"}, "refuses FSDP for Falcon"),
        (LLAMA, {**LORA, "dtype": "bfloat16"}, {}, "set method.dtype=float32"),
        (LLAMA, FULL, {"compute_dtype": "bfloat16"}, "trains all weights in the type it computes in"),
        (LLAMA, {**LORA, "alpha": 1.5}, {}, "a whole number"),
        (LLAMA, FULL, {"lora_kernels": ["o"]}, "lora_kernels are for method=lora"),
    ],
)
def test_impossible_workloads_are_refused(config: dict[str, Any], method: dict[str, Any], changed: dict[str, Any], reason: str) -> None:
    said = engines.axolotl.unsupported(make_workload(config, method), read(**changed), GPU)
    assert said is not None
    assert reason in said


def test_what_is_possible_is_not_refused() -> None:
    for option in ("axolotl", *(f"axolotl/{variant}" for variant in VARIANTS)):
        assert engines.axolotl.unsupported(make_workload(LLAMA, LORA), read(option, compute_dtype="bfloat16"), GPU) is None
    assert engines.axolotl.unsupported(make_workload(LLAMA, FULL), read(compute_dtype="float32"), CPU) is None


@pytest.mark.parametrize(("recompute", "fraction"), [("none", 0.0), ("full", 1.0)])
def test_what_is_recomputed(recompute: str, fraction: float) -> None:
    assert engines.axolotl.recomputed_fraction(make_workload(LLAMA, LORA), read(recompute=recompute)) == fraction
