"""FSDP and replicas of one model: the same step whatever the ranks, the strategy and the micro-batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import engines.fsdp
import engines.hf
from engines.native.sharding import blocks_of
from harness.compose import compose_all, plain
from harness.engine import Job
from harness.errors import UnsupportedError
from harness.spec import parse
from tests.engines.conformance import SAME, EngineConformance, QLoraConformance
from tests.engines.ranks import Ranks, started
from tests.engines.tiny import CPU, FAMILIES, FULL, GPU, LLAMA, LORA, QLORA, VOCABULARY, RecordingProbe, make_job, make_workload, with_train

TREE = Path(__file__).resolve().parents[2]
KNOBS: dict[str, Any] = {
    "micro_batch": 2, "layout": "padded", "strategy": "replicate", "shard_ranks": None, "offload": "none", "recompute": "none",
    "attention": "sdpa",
    "compute_dtype": "float32", "adapter_compute": "autocast", "compile": False,
}  # fmt: skip


class TestReplicated(EngineConformance):
    engine = engines.fsdp
    knobs = KNOBS


class TestSharded(EngineConformance):
    engine = engines.fsdp
    knobs: ClassVar = {**KNOBS, "strategy": "full_shard", "layout": "packed", "recompute": "full"}


class TestPackedBase(QLoraConformance):
    engine = engines.fsdp
    knobs: ClassVar = {**KNOBS, "layout": "packed"}


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with started(engines.fsdp) as ranks:
        yield ranks


class OnTwoRanks(EngineConformance):
    """As one engine, whose jobs are trained by both."""

    @pytest.fixture(autouse=True)
    def _ranks(self, two: Ranks) -> None:
        type(self).engine = two  # type: ignore[misc, assignment]

    def test_refuses_more_processes_than_it_has(self, job: Job) -> None:
        with pytest.raises(UnsupportedError, match="samples_per_step=1 leaves some of 2 processes without a sample"):
            self.run(with_train(job, "few", samples_per_step=1))

    @pytest.mark.multi_gpu
    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two NVIDIA GPUs here")
    @pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
    def test_a_gpu_computes_what_a_cpu_does(self, tmp_path: Path, method: dict[str, Any]) -> None:
        super().test_a_gpu_computes_what_a_cpu_does(tmp_path, method)


class TestReplicatedOnTwo(OnTwoRanks):
    knobs = KNOBS


class TestShardedOnTwo(OnTwoRanks):
    knobs: ClassVar = {**KNOBS, "strategy": "full_shard", "layout": "packed", "recompute": "full"}


class TestPackedBaseShardedOnTwo(QLoraConformance, OnTwoRanks):
    knobs: ClassVar = {**KNOBS, "strategy": "full_shard", "recompute": "full"}

    @pytest.mark.multi_gpu
    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two NVIDIA GPUs here")
    def test_a_gpu_computes_what_a_cpu_does(self, job: Job) -> None:  # type: ignore[override]
        super().test_a_gpu_computes_what_a_cpu_does(job)


HF: dict[str, Any] = {
    "micro_batch": 2, "layout": "padded", "recompute": "none", "attention": "sdpa", "compute_dtype": "float32",
    "adapter_compute": "autocast", "kernels": "none", "compile": False, "optimizer": "adamw",
}  # fmt: skip
FALCON = {"model_type": "falcon", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MAMBA = {"model_type": "mamba", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
JAMBA = {
    **LLAMA, "model_type": "jamba", "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4,
}  # fmt: skip
FALCON_TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
MAMBA_TARGETS = ("in_proj", "x_proj", "dt_proj")  # PEFT cannot adapt out_proj and conv1d
ON_TWO = [
    *(("qwen3", LORA, {"strategy": strategy}) for strategy in ("replicate", "shard_grad", "full_shard")),
    *(("tied", FULL, {"strategy": strategy}) for strategy in ("replicate", "shard_grad", "full_shard")),
    ("llama", LORA, {"strategy": "shard_grad", "layout": "packed", "micro_batch": 1, "recompute": "selective"}),
    ("llama", LORA, {"strategy": "full_shard", "compile": True}),
    ("llama", {**LORA, "b_learning_rate_ratio": 8.0}, {"strategy": "full_shard", "offload": "cpu"}),
    ("tied", FULL, {"strategy": "full_shard", "offload": "cpu", "recompute": "full"}),
    *(("falcon", {**LORA, "targets": FALCON_TARGETS}, {"strategy": strategy}) for strategy in ("replicate", "full_shard")),
    ("falcon", {**LORA, "targets": FALCON_TARGETS}, {"strategy": "shard_grad", "recompute": "full"}),
    ("mamba", FULL, {"strategy": "full_shard", "recompute": "selective"}),
    ("mamba", {**LORA, "targets": MAMBA_TARGETS}, {"strategy": "full_shard", "recompute": "full"}),
    *(("qwen3", QLORA, {"strategy": strategy}) for strategy in ("replicate", "shard_grad", "full_shard")),
    ("llama_biases", QLORA, {"strategy": "full_shard", "offload": "cpu", "recompute": "selective"}),
    ("falcon", {**QLORA, "targets": FALCON_TARGETS}, {"strategy": "full_shard", "recompute": 2}),
    ("mamba", {**QLORA, "targets": MAMBA_TARGETS}, {"strategy": "full_shard", "recompute": "full"}),
]


def trained(engine: Any, knobs: dict[str, Any], job: Job) -> RecordingProbe:
    probe = RecordingProbe()
    engine.train(job, parse(engine.Knobs, knobs), probe)
    return probe


def described(path: Path) -> dict[str, Any]:
    """What a JSON file says; PEFT writes sets as lists in any order."""
    said = json.loads(path.read_text(encoding="utf-8"))
    return {key: sorted(value) if key == "target_modules" else value for key, value in said.items()}


@pytest.mark.parametrize(
    ("family", "method", "knobs"), ON_TWO, ids=[f"{family}-{method['name']}-{i}" for i, (family, method, _) in enumerate(ON_TWO)]
)
def test_two_ranks_make_the_steps_of_the_yardstick(
    two: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, method: dict[str, Any], knobs: dict[str, Any]
) -> None:
    """Losses of all steps, norms before clipping, the stream, and what is saved, name by name."""
    for name, config in (("falcon", FALCON), ("mamba", MAMBA)):
        monkeypatch.setitem(FAMILIES, name, config)
    job = make_job(tmp_path, family, method, epsilon=1e-3)  # else AdamW makes whole steps of rounding where a gradient is almost zero
    usual, ours = trained(engines.hf, HF, job), trained(two, {**KNOBS, **knobs}, with_train(job, "ours"))
    assert ours.losses == pytest.approx(usual.losses, rel=SAME)
    assert ours.grad_norms == pytest.approx(usual.grad_norms, rel=2e-5)
    assert [one.sha256 for one in ours.tokens] == [one.sha256 for one in usual.tokens]
    saved, expected = (load_file(next(folder.glob("*.safetensors"))) for folder in (tmp_path / "ours", job.out))
    assert {name: value.shape for name, value in saved.items()} == {name: value.shape for name, value in expected.items()}
    for name, value in saved.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {path.name for path in job.out.iterdir()}
    for path in job.out.glob("*.json"):
        assert described(tmp_path / "ours" / path.name) == described(path)


def test_shards_in_copies(tmp_path: Path) -> None:
    """Two groups of two ranks: weights sharded within, gradients summed over all."""
    hybrid = {**KNOBS, "strategy": "hybrid", "shard_ranks": 2}
    (tmp_path / "full").mkdir()
    with started(engines.fsdp, 4) as four:
        for job in (make_job(tmp_path, method=QLORA, epsilon=1e-3), make_job(tmp_path / "full", "tied", FULL, epsilon=1e-3)):
            usual, ours = trained(engines.hf, HF, job), trained(four, hybrid, with_train(job, "ours"))
            assert ours.losses == pytest.approx(usual.losses, rel=SAME)
            assert ours.grad_norms == pytest.approx(usual.grad_norms, rel=2e-5)
            saved, expected = (load_file(next(folder.glob("*.safetensors"))) for folder in (job.out.parent / "ours", job.out))
            for name, value in saved.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-6)
        with pytest.raises(UnsupportedError, match="shard_ranks=3 does not divide 4 processes"):
            trained(four, {**hybrid, "shard_ranks": 3}, job)


def test_both_ranks_refuse_packed_documents_that_see_each_other(two: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "falcon", FALCON)
    job = make_job(tmp_path, "falcon", {**LORA, "targets": FALCON_TARGETS})
    with pytest.raises(UnsupportedError, match="in falcon with attention=sdpa documents see each other"):
        trained(two, {**KNOBS, "strategy": "full_shard", "layout": "packed"}, job)


@pytest.mark.parametrize("samples", [2, 3, 7])
def test_any_number_of_samples_is_shared(two: Ranks, tmp_path: Path, samples: int) -> None:
    """A rank may have fewer than the other, and fewer micro-batches: it waits, and adds nothing."""
    job = make_job(tmp_path, samples_per_step=samples)
    whole = trained(engines.fsdp, {**KNOBS, "micro_batch": 16}, with_train(job, "whole"))
    split = trained(two, {**KNOBS, "strategy": "full_shard", "micro_batch": 1}, job)
    assert split.losses[0] == pytest.approx(whole.losses[0], rel=SAME)
    assert split.losses == pytest.approx(whole.losses, rel=2e-5)
    assert [one.sha256 for one in split.tokens] == [one.sha256 for one in whole.tokens]


def test_ranks_that_were_not_started_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"engine.processes is 2, but 1 rank\(s\) were started"):
        trained(engines.fsdp, KNOBS, replace(make_job(tmp_path), processes=2))


def test_the_layers_are_the_largest_list_of_one_class() -> None:
    layers, few = (nn.ModuleList([nn.Linear(size, size) for _ in range(2)]) for size in (8, 2))
    mixed = nn.ModuleList([nn.Linear(99, 99), nn.LayerNorm(99)])
    assert blocks_of(nn.ModuleDict({"few": few, "layers": layers, "mixed": mixed})) is layers
    with pytest.raises(UnsupportedError, match="no list of layers of one class to shard; set strategy=replicate"):
        blocks_of(mixed)


def test_a_model_of_unlike_layers_is_refused_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jamba's are of two classes; whole on every rank it trains."""
    monkeypatch.setitem(FAMILIES, "jamba", JAMBA)
    job = make_job(tmp_path, "jamba", {**LORA, "targets": ("q_proj", "v_proj")}, steps=3)
    with pytest.raises(UnsupportedError, match="JambaForCausalLM has no list of layers of one class to shard; set strategy=replicate"):
        trained(engines.fsdp, {**KNOBS, "strategy": "full_shard"}, job)
    assert len(trained(engines.fsdp, KNOBS, with_train(job, "whole")).losses) == 3


@pytest.mark.parametrize("option", sorted(path.stem for path in (TREE / "conf" / "engine" / "fsdp").glob("*.yaml")))
def test_a_variant_is_called_what_its_file_is(option: str) -> None:
    raw = plain(compose_all([f"engine=fsdp/{option}", "machine=cuda"], multirun=False)[0][1])
    knobs = parse(engines.fsdp.Knobs, raw["engine"]["knobs"])
    assert engines.fsdp.variant(knobs) == option
    assert engines.fsdp.unsupported(make_workload(LLAMA, LORA), knobs, GPU) is None


def test_other_knobs_have_names_of_their_own() -> None:
    changed: list[dict[str, Any]] = [
        {}, {"strategy": "shard_grad"}, {"strategy": "full_shard", "offload": "cpu"}, {"layout": "packed", "attention": "varlen"},
        {"adapter_compute": "direct"}, {"recompute": "full", "compile": True}, {"strategy": "hybrid", "shard_ranks": 8},
        {"recompute": "selective"}, {"recompute": 2},
    ]  # fmt: skip
    assert [engines.fsdp.variant(parse(engines.fsdp.Knobs, {**KNOBS, **one})) for one in changed] == [
        "replicate", "shard_grad", "full_shard+offload", "replicate+packed+varlen", "replicate+adapters-direct", "replicate+compile+ckpt",
        "hybrid-8", "replicate+ckpt-selective", "replicate+ckpt-every-2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("knobs", "config", "machine", "reason"),
    [
        ({"offload": "cpu"}, LLAMA, CPU, "offload=cpu moves shards, strategy=replicate has none"),
        ({"compile": True, "recompute": "selective"}, LLAMA, CPU, "recompute=selective: a compiled layer chooses by itself"),
        ({"strategy": "hybrid"}, LLAMA, CPU, "strategy=hybrid needs shard_ranks"),
        ({"shard_ranks": 2}, LLAMA, CPU, "no other strategy has it"),
        ({"strategy": "hybrid", "shard_ranks": 3}, LLAMA, GPU.model_copy(update={"count": 4}), "does not divide 4 processes into groups"),
        ({"attention": "varlen"}, LLAMA, CPU, "attention=varlen needs a GPU"),
        ({"attention": "varlen"}, LLAMA, GPU, "attention=varlen computes in 16 bits only"),
        ({"layout": "packed"}, MAMBA, CPU, "'mamba' has no attention to keep documents apart"),
        ({"adapter_compute": "direct"}, LLAMA, CPU, "adapter_compute=direct is about float32 adapters beside bfloat16 products"),
        ({}, {**LLAMA, "attention_dropout": 0.1}, CPU, "attention_dropout is 0.1"),
        ({}, LLAMA, GPU.model_copy(update={"count": 8}), "samples_per_step=5 leaves some of 8 processes without a sample"),
    ],
)
def test_impossible_knobs_are_refused_before_a_process_starts(
    knobs: dict[str, Any], config: dict[str, Any], machine: Any, reason: str
) -> None:
    said = engines.fsdp.unsupported(make_workload(config, LORA), parse(engines.fsdp.Knobs, {**KNOBS, **knobs}), machine)
    assert said is not None
    assert reason in said


def test_a_base_in_nf4_trains_in_every_strategy() -> None:
    work = make_workload(LLAMA, QLORA)
    for changed in ({}, {"strategy": "full_shard", "offload": "cpu"}, {"strategy": "hybrid", "shard_ranks": 2}, {"strategy": "shard_grad"}):
        assert engines.fsdp.unsupported(work, parse(engines.fsdp.Knobs, {**KNOBS, **changed}), CPU) is None
    direct = parse(engines.fsdp.Knobs, {**KNOBS, "compute_dtype": "bfloat16", "adapter_compute": "direct"})
    assert engines.fsdp.unsupported(work, direct, GPU) is None
