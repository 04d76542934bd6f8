"""Operations counted from shapes: against the architectures themselves, and against what torch counts while a model really trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch.utils.flop_counter import FlopCounterMode

import engines.hf
from harness.data.tokens import Sample, TokenFile
from harness.data.write import write_token_file
from harness.engine import Job
from harness.errors import UnsupportedError
from harness.flops import linears, squared_lengths, step_flops, work
from harness.spec import parse
from harness.weights.structure import read_config, structure
from tests.engines.tiny import FAMILIES, LLAMA, LONGEST, LORA, VOCABULARY, RecordingProbe, make_job, make_workload

MODELS = sorted((Path(__file__).parents[1] / "conf" / "model").glob("*.yaml"))
HF = {
    "micro_batch": 4, "layout": "padded", "recompute": "none", "attention": "eager", "compute_dtype": "float32",
    "adapter_compute": "autocast", "kernels": "none", "compile": False, "optimizer": "adamw",
}  # fmt: skip
SHAPE = {**LLAMA, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 12, "max_position_embeddings": 64}


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_linears_are_those_of_the_architecture(path: Path) -> None:
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))["config"]
    if not isinstance(raw, dict) or raw["model_type"] == "mamba":
        return
    built = read_config(raw, path.stem)
    found = structure(built).linears
    expected = {name: size for name, size in found.items() if "layers.0." in name or ".h.0." in name}
    assert {name.rpartition(".")[2]: size for name, size in expected.items()} == linears({**built.to_dict(), **raw}, 2048)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "mamba", "hidden_size": 8}, "model_type 'mamba'"),
        ({"model_type": "llama", "hidden_size": 8}, "num_hidden_layers, num_attention_heads, vocab_size"),
        ({**LLAMA, "model_type": "mistral", "sliding_window": 16}, r"sliding window \(16\) shorter than the documents \(24\)"),
        ({**LLAMA, "model_type": "falcon", "new_decoder_architecture": True}, "multi_query"),
    ],
)
def test_what_has_no_formula_says_why(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        linears(config, 24)


def test_an_adapter_on_an_unknown_module_has_no_formula(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    other = make_workload(LLAMA, {**LORA, "targets": ("lm_head",)})
    with pytest.raises(UnsupportedError, match="adapters on lm_head"):
        work(LLAMA, other, job.tokens, None)


def test_squared_lengths_are_those_of_the_samples_of_each_step(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    train = job.workload.train
    expected = tuple(sum(len(sample) ** 2 for sample in job.tokens.step(train, step)) for step in range(train.num_steps))
    assert squared_lengths(job.tokens, train) == expected
    assert len(set(expected)) > 1


def deep_job(folder: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], shape: dict[str, Any]) -> Job:
    """One step of five documents of equal length through a model of ``shape``."""
    monkeypatch.setitem(FAMILIES, "deep", shape)
    job = make_job(folder, "deep", method, steps=1, warmup_steps=0)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, size=(5, LONGEST)).astype(np.int32)
    return replace(job, tokens=TokenFile.open(write_token_file(folder / "even", [Sample(row, row) for row in ids], [], {})))


def expected_flops(job: Job, shape: dict[str, Any]) -> float:
    """Of its one step; transformers computes the logits of every position, so every position counts as a label."""
    tokens = sum(len(sample) for sample in job.tokens.step(job.workload.train, 0))
    return step_flops(work(shape, job.workload, job.tokens, None), 0, tokens, tokens, lora=job.workload.method.name == "lora")


@pytest.mark.parametrize("method", [LORA, {"name": "full"}], ids=["lora", "full"])
def test_within_two_percent_of_what_torch_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]) -> None:
    """Twelve layers, because the first one's gradient of the input is needed by nobody; attention as plain products, so that its
    backward pass is twice its forward pass; documents of one length, because padding is work for torch and none for us.
    """
    job = deep_job(tmp_path, monkeypatch, method, SHAPE)
    with FlopCounterMode(display=False) as counter:
        engines.hf.train(job, parse(engines.hf.Knobs, HF), RecordingProbe())
    assert counter.get_total_flops() == pytest.approx(expected_flops(job, SHAPE), rel=0.02)
