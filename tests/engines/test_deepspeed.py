"""DeepSpeed's ZeRO stages: the same step as the yardstick, whatever the ranks, the stage and the micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

import engines.deepspeed
import engines.hf
from harness.compose import compose_all, plain
from harness.engine import Job
from harness.errors import UnsupportedError
from harness.interpreter import lack
from harness.spec import parse
from tests.engines import asked
from tests.engines.conformance import SAME, EngineConformance, QLoraConformance
from tests.engines.ranks import Ranks, started
from tests.engines.test_fsdp import FALCON, FALCON_TARGETS, HF, MAMBA, OnTwoRanks, described, trained
from tests.engines.tiny import CPU, FAMILIES, FULL, GPU, LLAMA, LORA, QLORA, make_job, make_workload, with_train

TREE = Path(__file__).resolve().parents[2]
KNOBS: dict[str, Any] = {
    "micro_batch": 2, "layout": "padded", "stage": 2, "offload_optimizer": "none", "offload_parameters": "none", "recompute": "none",
    "attention": "sdpa", "compute_dtype": "float32", "adapter_compute": "autocast",
}  # fmt: skip
ALL: dict[str, Any] = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
pytestmark = pytest.mark.skipif(lack(None, ["deepspeed"]) is not None, reason="deepspeed is not installed: pip install deepspeed")


@pytest.fixture(scope="module")
def one() -> Iterator[Ranks]:
    with started(engines.deepspeed, 1, lasting_group=True) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with started(engines.deepspeed, lasting_group=True) as ranks:
        yield ranks


class OnItsGpus(EngineConformance):
    """A process of DeepSpeed's has one kind of device: the ranks that train on GPUs are others."""

    count = 1

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
    @pytest.mark.parametrize("method", [LORA, QLORA, FULL], ids=["lora", "qlora", "full"])
    def test_a_gpu_computes_what_a_cpu_does(self, tmp_path: Path, method: dict[str, Any]) -> None:
        if torch.cuda.device_count() < self.count:
            pytest.skip(f"fewer than {self.count} NVIDIA GPUs here")
        job = make_job(tmp_path, "llama", method)
        on_cpu = trained(engines.hf, HF, with_train(job, "cpu"))
        with started(engines.deepspeed, self.count, lasting_group=True) as ranks:
            for knobs, rel in (({}, 2e-5), ({"stage": 3}, 2e-5), ({"compute_dtype": "bfloat16"}, 2e-2), ({"stage": 3, **ALL}, 2e-5)):
                on_gpu = trained(ranks, {**KNOBS, **knobs}, replace(with_train(job, f"gpu {knobs}"), device="cuda"))
                assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=rel), knobs


class TestOnOne(OnItsGpus):
    knobs: ClassVar = {**KNOBS, "stage": 1}

    @pytest.fixture(autouse=True)
    def _rank(self, one: Ranks) -> None:
        type(self).engine = one  # type: ignore[misc, assignment]

    def test_refuses_more_processes_than_it_has(self, job: Job) -> None:
        with pytest.raises(UnsupportedError, match=r"engine.processes is 2, but 1 rank\(s\) were started"):
            trained(engines.deepspeed, KNOBS, replace(job, processes=2))


class TestOnTwo(OnItsGpus, OnTwoRanks):
    count = 2
    knobs = KNOBS


class TestPackedBaseOnTwo(QLoraConformance, OnTwoRanks):
    knobs = KNOBS
    test_a_gpu_computes_what_a_cpu_does = None  # type: ignore[assignment]

    @pytest.fixture(autouse=True)
    def _ranks(self, two: Ranks) -> None:
        type(self).engine = two  # type: ignore[misc, assignment]


ON_TWO = [
    *((family, method, {"stage": stage}) for family, method in (("qwen3", LORA), ("tied", FULL)) for stage in (1, 2, 3)),
    ("llama", LORA, {"stage": 1, "layout": "packed", "micro_batch": 1}),
    ("llama", {**LORA, "b_learning_rate_ratio": 8.0}, {"stage": 2}),
    ("llama", {**LORA, "b_learning_rate_ratio": 8.0}, {"stage": 2, "offload_optimizer": "cpu"}),
    ("llama", LORA, {"stage": 3, "layout": "packed", "offload_parameters": "cpu", "recompute": "selective"}),
    ("tied", FULL, {"stage": 3, "recompute": "full", **ALL}),
    ("falcon", {**LORA, "targets": FALCON_TARGETS}, {"stage": 2, "recompute": 2}),
    *(("qwen3", QLORA, {"stage": stage}) for stage in (1, 2, 3)),
    ("llama_biases", QLORA, {"stage": 3, "layout": "packed", "recompute": "full", **ALL}),
    ("falcon", {**QLORA, "targets": FALCON_TARGETS}, {"stage": 2, "recompute": "selective"}),
    # Not MAMBA_TARGETS: transformers reads the weight of dt_proj past its adapter, which DeepSpeed's AdamW decays and torch's leaves alone.
    ("mamba", {**QLORA, "targets": ("in_proj", "x_proj")}, {"stage": 2, "recompute": "full"}),
]

# ZeRO-3 leaves parameters of less than 100,000 values whole on every rank; the bytes of this one's MLP are 135,504 float32 values each.
WIDE = {**LLAMA, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1}
ON_TWO.append(("wide", {**QLORA, "targets": ("q_proj", "down_proj")}, {"stage": 3, "recompute": "selective"}))


def agree(folder: Path, ours: Any, usual: Any) -> None:
    """Losses of all steps, norms before clipping, the stream, and what is saved, name by name."""
    assert ours.losses == pytest.approx(usual.losses, rel=SAME)
    assert ours.grad_norms == pytest.approx(usual.grad_norms, rel=2e-5)
    assert [one.sha256 for one in ours.tokens] == [one.sha256 for one in usual.tokens]
    saved, expected = (load_file(next((folder / name).glob("*.safetensors"))) for name in ("ours", "out"))
    assert {name: value.shape for name, value in saved.items()} == {name: value.shape for name, value in expected.items()}
    for name, value in saved.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert {path.name for path in (folder / "ours").iterdir()} == {path.name for path in (folder / "out").iterdir()}
    for path in (folder / "out").glob("*.json"):
        assert described(folder / "ours" / path.name) == described(path)


@pytest.mark.parametrize(
    ("family", "method", "knobs"), ON_TWO, ids=[f"{family}-{method['name']}-{i}" for i, (family, method, _) in enumerate(ON_TWO)]
)
def test_two_ranks_make_the_steps_of_the_yardstick(
    two: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, method: dict[str, Any], knobs: dict[str, Any]
) -> None:
    for name, config in (("falcon", FALCON), ("mamba", MAMBA), ("wide", WIDE)):
        monkeypatch.setitem(FAMILIES, name, config)
    job = make_job(tmp_path, family, method, epsilon=1e-3)  # else AdamW makes whole steps of rounding where a gradient is almost zero
    usual = trained(engines.hf, HF, job)
    agree(tmp_path, trained(two, {**KNOBS, **knobs}, with_train(job, "ours")), usual)


@pytest.mark.parametrize("stage", [2, 3])
def test_one_rank_makes_them_too(one: Ranks, tmp_path: Path, stage: int) -> None:
    job = make_job(tmp_path, epsilon=1e-3)
    usual = trained(engines.hf, HF, job)
    agree(tmp_path, trained(one, {**KNOBS, "stage": stage}, with_train(job, "ours")), usual)


def test_a_step_asks_the_device_for_no_more_than_the_yardsticks(tmp_path: Path) -> None:
    """On a GPU all that follows is late: by itself DeepSpeed waits four times a step, and once more for every further micro-batch.

    In stage 3 it insists on that for the norm. Its buffer for gradients, by itself of 500 million values, is as large as they are.
    """
    cases = ((LORA, 1, "float32", 0, 1), (LORA, 2, "float32", 0, 3), (LORA, 3, "float32", 1, None), (FULL, 2, "bfloat16", 0, None))
    with started(asked, 1, lasting_group=True) as ranks:
        for method, stage, dtype, more, copies in cases:
            folder = tmp_path / f"{method['name']} {stage}"
            folder.mkdir()
            job = make_job(folder, method=method)  # of three micro-batches
            usual = asked.in_last_step(engines.hf, job, parse(engines.hf.Knobs, {**HF, "compute_dtype": dtype}), asked.Counts())
            said: Any = trained(ranks, {**KNOBS, "stage": stage, "compute_dtype": dtype}, with_train(job, "ours"))
            num_trained = len(load_file(next((job.adapter_init or job.base).glob("*.safetensors"))))
            # AdamW on a CPU asks for the number of the step, of each tensor; DeepSpeed's is one flat tensor.
            assert said.asked["asked"] == usual["asked"] - (num_trained - 1) + more
            assert copies is None or said.asked["copied"] <= copies * num_trained + 1
            assert said.largest < 1_000_000


def test_a_gradient_that_is_not_clipped_as_a_whole_is_told() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(RuntimeError, match="DeepSpeed made 0 optimizer steps where one was due"):
        engines.deepspeed._Clipping(optimizer, 1.0).norm()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_masters_start_from_the_exact_weights(two: Ranks, tmp_path: Path, stage: int) -> None:
    """Weights that bf16 cannot hold, one step of almost no rate: what is saved is nearer to them than rounding is."""
    job = make_job(tmp_path, "llama", FULL, steps=1, warmup_steps=0, learning_rate=1e-9, weight_decay=0.0)
    trained(two, {**KNOBS, "stage": stage, "compute_dtype": "bfloat16"}, job)
    saved, before = (load_file(folder / "model.safetensors") for folder in (job.out, job.base))
    for name, value in before.items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-7)
        assert (value.to(torch.bfloat16).float() - value).abs().max() > 1e-5


@pytest.mark.parametrize("option", sorted(path.stem for path in (TREE / "conf" / "engine" / "deepspeed").glob("*.yaml")))
def test_a_variant_is_called_what_its_file_is(option: str) -> None:
    raw = plain(compose_all([f"engine=deepspeed/{option}", "machine=cuda"], multirun=False)[0][1])
    knobs = parse(engines.deepspeed.Knobs, raw["engine"]["knobs"])
    assert engines.deepspeed.variant(knobs) == option
    assert engines.deepspeed.unsupported(make_workload(LLAMA, LORA), knobs, GPU) is None


def test_other_knobs_have_names_of_their_own() -> None:
    changed: list[dict[str, Any]] = [
        {"stage": 1, "layout": "packed", "attention": "varlen"}, {"adapter_compute": "direct"}, {"stage": 3, "offload_parameters": "cpu"},
        {"recompute": "selective"},
    ]  # fmt: skip
    assert [engines.deepspeed.variant(parse(engines.deepspeed.Knobs, {**KNOBS, **one})) for one in changed] == [
        "zero1+packed+varlen", "zero2+adapters-direct", "zero3+offload-parameters", "zero2+ckpt-selective",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("knobs", "method", "machine", "reason"),
    [
        ({"offload_parameters": "cpu"}, LORA, CPU, "offload_parameters=cpu moves shards of weights, stage=2 has none"),
        ({"attention": "varlen"}, LORA, CPU, "attention=varlen needs a GPU"),
        ({"adapter_compute": "direct"}, LORA, CPU, "adapter_compute=direct is about float32 adapters beside bfloat16 products"),
        ({"compute_dtype": "bfloat16"}, {**FULL, "dtype": "bfloat16"}, CPU, "DeepSpeed keeps float32 masters of all weights"),
        ({}, LORA, GPU.model_copy(update={"count": 8}), "samples_per_step=5 leaves some of 8 processes without a sample"),
    ],
)
def test_impossible_knobs_are_refused_before_a_process_starts(
    knobs: dict[str, Any], method: dict[str, Any], machine: Any, reason: str
) -> None:
    said = engines.deepspeed.unsupported(make_workload(LLAMA, method), parse(engines.deepspeed.Knobs, {**KNOBS, **knobs}), machine)
    assert said is not None
    assert reason in said
