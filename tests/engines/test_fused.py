"""The fused engine: conformance, and every gradient of every family against transformers and autograd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import engines.fused
from engines.native.checkpoint import load_weights, read_config
from engines.native.decoder import Decoder
from engines.native.loader import Placement
from engines.native.lora import read_adapter
from engines.native.packed import Angles, Packed
from engines.native.plan import KEEP_ALL, Plan
from engines.native.reference import REFERENCE
from engines.native.shape import read_shape
from engines.native.weights import named_adapters, named_weights
from harness.data.tokens import IGNORE, Sample, pack
from harness.engine import Job
from harness.errors import UnsupportedError, WeightsError
from harness.spec import parse
from tests.engines.conformance import EngineConformance
from tests.engines.tiny import (
    CPU,
    FAMILIES,
    FULL,
    LLAMA,
    LONGEST,
    LORA,
    RecordingProbe,
    make_job,
    make_samples,
    make_workload,
    plain_loss,
    plain_model,
    plain_training,
    with_train,
)

KNOBS: dict[str, Any] = {
    "micro_batch": 2, "recompute": "none", "memory_gib": None, "offload": True,
    "compute_dtype": "float32", "operations": "reference", "replay": False, "loss_chunk": 7, "fp8": "forward", "optimizer_state": "fp32",
    "base": "replicated",
    "compile_ahead": True,
}  # fmt: skip
DEVICE = torch.device("cpu")
PLACE = Placement(DEVICE, torch.float32, torch.float32, rank_multiple=8)  # ranks of 4 and of 12 are padded, as on a GPU


class TestFused(EngineConformance):
    engine = engines.fused
    knobs = KNOBS

    @pytest.mark.parametrize("knob", [{"recompute": "full"}, {"loss_chunk": 1000}], ids=str)
    def test_a_knob_changes_no_loss(self, job: Job, knob: dict[str, Any]) -> None:
        usual, other = self.run(with_train(job, "usual")), self.run(job, **knob)
        assert other.losses == pytest.approx(usual.losses, rel=2e-6)

    def test_works_on_no_padding(self, job: Job) -> None:
        assert all(tokens.processed == tokens.input for tokens in self.run(job).tokens)

    @pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_six_steps_of_transformers(self, tmp_path: Path, family: str, method: dict[str, Any]) -> None:
        job = make_job(tmp_path, family, method, steps=6, learning_rate=1e-4, epsilon=1e-3)
        plain = [loss for loss, _, _ in plain_training(job)]
        assert self.run(job).losses == pytest.approx(plain, rel=2e-6)
        assert plain[0] - plain[-1] > 1e-5 or method is LORA  # something was learnt

    def test_reads_a_sharded_checkpoint(self, job: Job) -> None:
        whole = self.run(with_train(job, "whole"))
        tensors = load_file(job.base / "model.safetensors")
        (job.base / "model.safetensors").unlink()
        files = {name: f"part-{len(name) % 2}.safetensors" for name in tensors}
        for file in set(files.values()):
            save_file({name: tensors[name] for name in tensors if files[name] == file}, job.base / file)
        (job.base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        assert self.run(job).losses == whole.losses


def decoder(job: Job, plan: Plan) -> Decoder:
    shape = read_shape(read_config(job.base), LONGEST)
    adapter = None if job.adapter_init is None else read_adapter(job.adapter_init)
    weights = load_weights(job.base, shape, PLACE, adapter)
    return Decoder(shape=shape, weights=weights, ops=REFERENCE, plans=(plan,) * shape.num_layers, loss_chunk=5)


def packed(native: Decoder, samples: tuple[Sample, ...]) -> Packed:
    return Angles.of(native.shape, LONGEST, DEVICE).pack(pack(samples))


def gradients(native: Decoder) -> dict[str, torch.Tensor]:
    adapters = ((f"base_model.model.{name}", weight, rows) for name, weight, rows in named_adapters(native.weights))
    named = [*adapters, *named_weights(native.weights)]
    return {name: weight.gradient[rows] for name, weight, rows in named if weight.gradient is not None}


def expect_gradients_of(model: Any, native: Decoder) -> dict[str, torch.Tensor]:
    """Those of ``model`` by autograd, which ``native`` has too."""
    expected = {name.replace(".default", ""): value.grad for name, value in model.named_parameters() if value.requires_grad}
    found = gradients(native)
    assert set(found) == set(expected)
    for name, right in expected.items():
        assert torch.linalg.vector_norm(found[name] - right) < 1e-5 * torch.linalg.vector_norm(right), name
    return expected


SUBSET = {**LORA, "targets": ("v_proj", "down_proj", "q_proj")}


@pytest.mark.parametrize("method", [LORA, SUBSET, FULL], ids=["lora", "lora_subset", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_is_that_of_autograd(tmp_path: Path, family: str, method: dict[str, Any]) -> None:
    job = make_job(tmp_path, family, method)
    samples = job.tokens.step(job.workload.train, 0)
    num_labels = sum(sample.num_labels for sample in samples)
    model = plain_model(job)
    loss = plain_loss(model, samples)
    loss.backward()
    native = decoder(job, KEEP_ALL)
    losses = native.accumulate(packed(native, samples), torch.tensor(1.0 / num_labels))
    assert len(losses) == num_labels
    assert float(losses.sum()) / num_labels == pytest.approx(float(loss.detach()), rel=2e-6)
    expected = expect_gradients_of(model, native)
    assert all(torch.linalg.vector_norm(right) > 1e-6 for right in expected.values()), "no gradient to compare"


def test_documents_of_a_packed_row_do_not_see_each_other(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    native = decoder(job, KEEP_ALL)
    first, other, second = _three()
    with_first = native.accumulate(packed(native, (first, second)), 1.0)
    with_other = native.accumulate(packed(native, (other, second)), 1.0)
    assert torch.equal(with_first[first.num_labels :], with_other[other.num_labels :])
    assert not torch.equal(with_first[: first.num_labels], with_other[: first.num_labels])


def _three() -> tuple[Sample, Sample, Sample]:
    """Two samples of equal length and labels, other tokens, and a third."""
    long = [sample for sample in make_samples(12) if len(sample) > 8]
    first, second = long[:2]
    ids = (first.input_ids + 1) % 512
    return first, Sample(ids, np.where(first.labels == IGNORE, IGNORE, ids).astype(np.int32)), second


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"model_type": "mistral", "sliding_window": LONGEST - 1}, "sliding window"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "lacks low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_a_model_it_does_not_have_is_refused_with_the_reason(config: dict[str, Any], reason: str) -> None:
    workload = make_workload({**LLAMA, **config}, LORA)
    said = engines.fused.unsupported(workload, parse(engines.fused.Knobs, KNOBS), CPU)
    assert said is not None
    assert reason in said


def test_adapters_on_other_layers_are_refused() -> None:
    workload = make_workload(LLAMA, {**LORA, "targets": ["q_proj", "lm_head"]})
    said = engines.fused.unsupported(workload, parse(engines.fused.Knobs, KNOBS), CPU)
    assert said is not None
    assert "lm_head" in said


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_config_leaves_out_is_what_transformers_assumes(family: str) -> None:
    whole = json.loads(AutoConfig.for_model(family).to_json_string(use_diff=False))
    assert read_shape({"model_type": family}, 64) == read_shape(whole, 64)


def test_old_and_new_rope_keys_mean_the_same() -> None:
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    assert read_shape(old, 64) == read_shape(new, 64)


def _run(job: Job) -> None:
    engines.fused.train(job, parse(engines.fused.Knobs, KNOBS), RecordingProbe())


def test_a_tensor_it_does_not_know_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    path = job.base / "model.safetensors"
    save_file({**load_file(path), "model.layers.0.self_attn.sinks": torch.zeros(4)}, path)
    with pytest.raises(UnsupportedError, match="sinks"):
        _run(job)


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path, "tied")
    path = job.base / "model.safetensors"
    tensors = load_file(path)
    same = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": same}, path)
    _run(with_train(job, "same", steps=1, warmup_steps=0))
    save_file({**tensors, "lm_head.weight": same + 1}, path)
    with pytest.raises(UnsupportedError, match="another head"):
        _run(job)


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    path = job.base / "model.safetensors"
    tensors = load_file(path)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"model\.norm\.weight"):
        _run(job)
    save_file({**tensors, "model.norm.weight": norm[:3].clone()}, path)
    with pytest.raises(WeightsError, match=r"\[3\]"):
        _run(job)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"lora_dropout": 0.1}, {"rank_pattern": {"q_proj": 2}}], ids=str)
def test_other_than_plain_lora_is_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    job = make_job(tmp_path)
    assert job.adapter_init is not None
    path = job.adapter_init / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **option}))
    with pytest.raises(UnsupportedError, match=next(iter(option))):
        _run(job)


def test_adapters_of_unknown_modules_are_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert job.adapter_init is not None
    path = job.adapter_init / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}, path)
    with pytest.raises(UnsupportedError, match="lm_head"):
        _run(job)
