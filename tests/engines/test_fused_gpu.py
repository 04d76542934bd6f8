"""The fused operations inside whole training runs on a GPU: every family near the truth, replay and plan without influence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engines.fused
from engines.native import buckets
from harness.data.tokens import IGNORE, Sample, TokenFile
from harness.data.write import write_token_file
from harness.engine import Job
from harness.spec import parse
from tests.engines.tiny import FAMILIES, FULL, LORA, QLORA, VOCABULARY, RecordingProbe, decoded, make_job, with_train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
KNOBS: dict[str, Any] = {
    "micro_batch": 4, "recompute": "fit", "memory_gib": None, "offload": True,
    "compute_dtype": "bfloat16", "operations": "fused", "replay": True, "loss_chunk": 7, "fp8": "forward", "optimizer_state": "fp32",
    "base": "replicated",
    "compile_ahead": True,
}  # fmt: skip
EXACT = {"compute_dtype": "float32", "operations": "reference", "replay": False}
SUBSET = {**LORA, "targets": ("v_proj", "down_proj")}


def run(job: Job, name: str, **knobs: Any) -> RecordingProbe:
    probe = RecordingProbe()
    out = replace(with_train(job, name), device="cuda")
    engines.fused.train(out, parse(engines.fused.Knobs, {**KNOBS, **knobs}), probe)
    return probe


def distance(found: RecordingProbe, truth: RecordingProbe) -> float:
    return float(np.sqrt(np.mean((np.array(found.losses) - np.array(truth.losses)) ** 2)))


@pytest.mark.parametrize("method", [LORA, SUBSET, QLORA, FULL], ids=["lora", "lora_subset", "qlora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_documents_of_every_family(tmp_path: Path, family: str, method: dict[str, Any]) -> None:
    """No further from float32 than twice the reference operations in bfloat16 are.

    Attention's output has other strides with adapters on o_proj, without, and where all weights are trained: one process with all of them
    shows that cuDNN's plans are not used for others than their own (engines.native.attention).
    """
    job = make_job(tmp_path, family, method, steps=6)
    truth, plain = run(job, "truth", **EXACT), run(job, "plain", operations="reference", replay=False)
    fused = run(job, "fused")
    assert distance(fused, truth) <= 2 * distance(plain, truth) + 1e-3
    assert fused.grad_norms == pytest.approx(truth.grad_norms, rel=5e-2)
    assert min(norm for norm in truth.grad_norms if norm is not None) > 0.1, "hardly anything is learnt: the comparison is too weak"


@pytest.mark.parametrize("family", ["llama", "tied"])
def test_long_uneven_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """What short ones are to other kernels: FlashAttention 2 and our own agree."""
    job = make_job(tmp_path, family, LORA, steps=6)
    short = run(job, "short")
    monkeypatch.setattr(buckets, "SHORT", 0)
    long = run(job, "long")
    assert long.losses == pytest.approx(short.losses, rel=2e-3)
    assert long.grad_norms == pytest.approx(short.grad_norms, rel=2e-2)
    assert long.losses != short.losses, "the same kernels ran"


@pytest.fixture
def even(tmp_path: Path) -> Job:
    """Every sample has 16 tokens, so that every step has the same shape and is captured."""
    random = np.random.default_rng(1)
    samples = []
    for _ in range(12):
        ids = random.integers(0, VOCABULARY, size=16).astype(np.int32)
        labels = ids.copy()
        labels[:3] = IGNORE
        samples.append(Sample(ids, labels))
    job = make_job(tmp_path, steps=8, samples_per_step=4)
    return replace(job, tokens=TokenFile.open(write_token_file(tmp_path / "even", samples, [], {})))


def test_a_replayed_step_reads_its_own_tokens_and_schedule(even: Job) -> None:
    launched, replayed, truth = run(even, "launched", replay=False), run(even, "replayed"), run(even, "truth", **EXACT)
    assert len(set(truth.losses)) == len(truth.losses)
    assert replayed.losses == pytest.approx(launched.losses, rel=2e-3)
    assert replayed.losses == pytest.approx(truth.losses, rel=5e-3)
    assert replayed.tokens == launched.tokens


@pytest.mark.parametrize("method", [LORA, QLORA, FULL], ids=["lora", "qlora", "full"])
def test_uneven_micro_batches_are_replayed_one_by_one(tmp_path: Path, method: dict[str, Any]) -> None:
    """Hardly a step repeats, their micro-batches do: two documents each, of lengths that fill up to few sizes."""
    job = make_job(tmp_path, method=method, steps=12, samples_per_step=6)
    launched, replayed = run(job, "launched", replay=False, micro_batch=2), run(job, "replayed", micro_batch=2)
    assert replayed.losses == pytest.approx(launched.losses, rel=2e-3)
    assert replayed.grad_norms == pytest.approx(launched.grad_norms, rel=2e-2)
    assert len(set(launched.losses)) == len(launched.losses)


def test_a_replayed_step_decodes_its_base_and_reads_its_own_adapters(tmp_path: Path, even: Job) -> None:
    """The same kernels on the same values as LoRA on the decoded base."""
    (tmp_path / "qlora").mkdir()
    packed = replace(make_job(tmp_path / "qlora", method=QLORA, steps=8, samples_per_step=4), tokens=even.tokens)
    plain = decoded(packed)
    launched, replayed, right = run(packed, "launched", replay=False), run(packed, "replayed"), run(plain, "plain")
    assert len(set(right.losses)) == len(right.losses)
    assert launched.losses == pytest.approx(right.losses, rel=2e-3)
    assert replayed.losses == pytest.approx(right.losses, rel=2e-3)
    assert replayed.grad_norms == pytest.approx(right.grad_norms, rel=2e-2)


def test_accumulation_and_recomputation_change_little(even: Job) -> None:
    whole, split, again = run(even, "whole"), run(even, "split", micro_batch=2), run(even, "again", recompute="full")
    assert split.losses == pytest.approx(whole.losses, rel=2e-3)
    assert again.losses == pytest.approx(whole.losses, rel=2e-3)
