"""Tiny random models, adapters and token files in the real formats, and a plain training loop to compare engines with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from harness.data.tokens import IGNORE, Sample, StepTokens, TokenFile
from harness.data.write import write_token_file
from harness.engine import Chosen, Job, Machine
from harness.nf4 import load_decoded
from harness.spec import Workload, parse
from harness.weights.base_model import Base
from harness.weights.nf4_base import prepare_nf4

VOCABULARY = 512
LONGEST = 24
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CPU = Machine(device="cpu", name="Test CPU", count=1, memory_gib=8)
GPU = Machine(device="cuda", name="Test GPU", count=1, memory_gib=80)
LORA = {"name": "lora", "rank": 4, "alpha": 10.0, "targets": TARGETS}
QLORA = {**LORA, "name": "qlora"}
FULL = {"name": "full"}
LLAMA = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama3_rope": {**LLAMA, "rope_parameters": LLAMA3_ROPE},
    "linear_rope": {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    "llama_biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "mistral": {**LLAMA, "model_type": "mistral", "head_dim": 16, "sliding_window": LONGEST},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True},
}


@dataclass
class RecordingProbe:
    """Remembers what an engine reports, in the order it came."""

    is_ready: bool = False
    chosen: dict[str, Chosen] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float | None] = field(default_factory=list)
    tokens: list[StepTokens] = field(default_factory=list)

    def ready(self, chosen: Mapping[str, Chosen] | None = None) -> None:
        self.chosen = dict(chosen or {})
        assert not self.is_ready, "ready() came twice"
        self.is_ready = True

    def decided(self, chosen: Mapping[str, Chosen]) -> None:
        assert self.is_ready, "decided() came before ready()"
        self.chosen.update(chosen)

    def waits(self) -> AbstractContextManager[None]:
        return nullcontext()

    def exchanges(self) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self, *, loss: torch.Tensor | float, grad_norm: torch.Tensor | float | None, tokens: StepTokens) -> None:
        assert self.is_ready, "step() came before ready()"
        self.losses.append(float(loss))
        self.grad_norms.append(None if grad_norm is None else float(grad_norm))
        self.tokens.append(tokens)


def make_workload(config: dict[str, Any], method: dict[str, Any], **train: Any) -> Workload:
    schedule = {
        "steps": 4, "samples_per_step": 5, "learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1,
        "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-6, "max_grad_norm": 0.5, "seed": 3, **train,
    }  # fmt: skip
    model = {"name": "tiny", "weights": "random", "tokenizer": "none", "dtype": "float32", "config": config}
    data = {"name": "tiny", "source": "jsonl", "path": "tiny.jsonl", "sequence_length": LONGEST}
    return parse(Workload, {"model": model, "data": data, "method": method, "train": schedule})


def make_job(folder: Path, family: str = "llama", method: dict[str, Any] = LORA, **train: Any) -> Job:
    """A job on a tiny model whose norms, biases and adapters are far from one and zero, yet whose attention is not saturated."""
    workload = make_workload(FAMILIES[family], method, **train)
    model = _randomised(AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES[family]), dtype=torch.float32))
    model.save_pretrained(folder / "base")
    adapter = None
    if method["name"] != "full":
        adapter = folder / "adapter"
        lora = LoraConfig(r=method["rank"], lora_alpha=method["alpha"], target_modules=list(method["targets"]), task_type="CAUSAL_LM")
        _randomised(get_peft_model(model, lora), only="lora_").save_pretrained(adapter)
    tokens = TokenFile.open(write_token_file(folder / "tokens", make_samples(12), [], {}))
    (folder / "out").mkdir()
    base = _in_nf4(folder, workload.model.dtype) if method["name"] == "qlora" else folder / "base"
    return Job(workload=workload, tokens=tokens, base=base, adapter_init=adapter, out=folder / "out", device="cpu")


def _in_nf4(folder: Path, dtype: str) -> Path:
    config = json.loads((folder / "base" / "config.json").read_text())
    return prepare_nf4(Base(folder / "base", "b" * 64, "tiny", config, "t" * 64), dtype, folder).path


def decoded(job: Job) -> Job:
    """The job of method lora whose base are the decoded values of ``job``'s."""
    folder = job.out.parent / "decoded"
    load_decoded(job.base, torch.float32).save_pretrained(folder)
    raw = job.workload.model_dump(mode="json")
    out = job.out.parent / "of_decoded"
    out.mkdir()
    return replace(job, workload=parse(Workload, {**raw, "method": {**raw["method"], "name": "lora"}}), base=folder, out=out)


def with_train(job: Job, out: str, **train: Any) -> Job:
    """``job`` with another schedule and an empty output folder called ``out``."""
    raw = job.workload.model_dump(mode="json")
    folder = job.out.parent / out
    folder.mkdir()
    return replace(job, workload=parse(Workload, {**raw, "train": {**raw["train"], **train}}), out=folder)


def make_samples(count: int) -> list[Sample]:
    """Samples of 2 to LONGEST tokens; the prompt, up to three quarters of them, is not supervised."""
    random = np.random.default_rng(7)
    samples = []
    for length in random.integers(2, LONGEST + 1, size=count):
        ids = random.integers(0, VOCABULARY, size=length).astype(np.int32)
        labels = ids.copy()
        labels[: random.integers(1, 1 + max(1, 3 * length // 4))] = IGNORE
        samples.append(Sample(ids, labels))
    return samples


def plain_model(job: Job) -> Any:
    """The job's model as transformers and PEFT load it, trained tensors requiring gradients."""
    model: Any = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32)
    return model if job.adapter_init is None else PeftModel.from_pretrained(model, str(job.adapter_init), is_trainable=True)


def plain_loss(model: Any, samples: tuple[Sample, ...]) -> torch.Tensor:
    """Token-weighted mean over ``samples``, one forward pass each, from the logits."""
    total, count = torch.zeros(()), 0
    for sample in samples:
        ids, labels = (torch.tensor(np.asarray(values), dtype=torch.int64) for values in (sample.input_ids, sample.labels))
        logits = model(input_ids=ids[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum")
        count += sample.num_labels
    return total / count


def plain_training(job: Job, loss_of: Callable[[Any, tuple[Sample, ...]], torch.Tensor] = plain_loss) -> Iterator[tuple[float, float, Any]]:
    """(loss, gradient norm before clipping, model after the update) of every step of a plain loop."""
    train, model = job.workload.train, plain_model(job)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = (train.beta1, train.beta2)
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=betas, eps=train.epsilon, weight_decay=train.weight_decay)
    for index in range(train.steps):
        optimizer.zero_grad()
        loss = loss_of(model, job.tokens.step(train, index))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm or math.inf)
        optimizer.param_groups[0]["lr"] = train.learning_rate_at(index)
        optimizer.step()
        yield float(loss.detach()), float(norm), model


def _randomised(model: Any, only: str = "") -> Any:
    random = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if only in name:
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.data = centre + 0.12 * torch.randn(parameter.shape, generator=random)
    model.tie_weights()
    return model
