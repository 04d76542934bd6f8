"""The fast paths of hf on a GPU: every attention, layout and kernel near the truth, compiled or not, and nothing that stops the host."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import engines.hf
from harness.engine import Job
from harness.spec import parse
from tests.engines.conformance import two_documents
from tests.engines.liger import MODULES, unpatched_afterwards
from tests.engines.test_hf import KNOBS
from tests.engines.test_kinds_of_call import uneven
from tests.engines.tiny import FULL, GPU, LORA, RecordingProbe, make_job, with_train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
    pytest.mark.filterwarnings("ignore"),  # of compilers, on whatever versions the GPU's machine has
]
ROUNDED = {**KNOBS, "micro_batch": 4, "compute_dtype": "bfloat16"}
LIGER = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="pip install --no-deps liger-kernel")
FLASH = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="pip install flash-attn")
BEST = {"layout": "packed", "attention": "varlen", "adapter_compute": "direct", "kernels": "liger", "compile": True}
BEST_PADDED = {**BEST, "layout": "padded", "attention": "cudnn"}
KNOBS_OF: dict[str, dict[str, Any]] = {
    "cudnn": {"attention": "cudnn"},
    "varlen padded": {"attention": "varlen"},
    "varlen packed": {"attention": "varlen", "layout": "packed"},
    "varlen packed ckpt": {"attention": "varlen", "layout": "packed", "recompute": "full"},
    "sdpa packed": {"layout": "packed"},
    "direct": {"adapter_compute": "direct"},
    "float32 adapters": {"adapter_compute": "float32"},
}
ALSO = {
    "flash padded": ({"attention": "flash_attention_2"}, FLASH),
    "flash packed": ({"attention": "flash_attention_2", "layout": "packed"}, FLASH),
    "liger": ({"kernels": "liger"}, LIGER),
    "liger ckpt": ({"kernels": "liger", "recompute": "full"}, LIGER),
    "liger varlen packed": ({"kernels": "liger", "attention": "varlen", "layout": "packed"}, LIGER),
}
COMPILED = {
    "compile": ({"compile": True}, ()),
    "compile varlen packed": ({"compile": True, "attention": "varlen", "layout": "packed"}, ()),
    "compile cudnn ckpt": ({"compile": True, "attention": "cudnn", "recompute": "full"}, ()),
    "best": (BEST, LIGER),
    "best+padded": (BEST_PADDED, LIGER),
    "best ckpt": ({**BEST, "recompute": "full"}, LIGER),
}
EVERYTHING = [
    *(pytest.param(knobs, id=name) for name, knobs in KNOBS_OF.items()),
    *(pytest.param(knobs, id=name, marks=marks) for name, (knobs, marks) in {**ALSO, **COMPILED}.items()),
]


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    with unpatched_afterwards():
        torch._dynamo.reset()
        yield


def run(job: Job, name: str, **knobs: Any) -> RecordingProbe:
    probe = RecordingProbe()
    job = replace(with_train(job, name), device="cuda")
    chosen = parse(engines.hf.Knobs, {**ROUNDED, **knobs})
    assert engines.hf.unsupported(job.workload, chosen, GPU) is None
    engines.hf.train(job, chosen, probe)
    return probe


@pytest.mark.parametrize("knobs", EVERYTHING)
def test_no_further_from_the_truth_than_plain_bfloat16_may_be(tmp_path: Path, knobs: dict[str, Any]) -> None:
    job = make_job(tmp_path, steps=6)
    truth = run(job, "truth", compute_dtype="float32")
    found = run(job, "found", **knobs)
    assert found.losses == pytest.approx(truth.losses, rel=2e-2)
    assert found.grad_norms == pytest.approx(truth.grad_norms, rel=5e-2)
    assert [tokens.sha256 for tokens in found.tokens] == [tokens.sha256 for tokens in truth.tokens]


@pytest.mark.parametrize("knobs", [{"attention": "cudnn"}, {"attention": "varlen", "layout": "packed"}], ids=str)
@pytest.mark.parametrize("family", ["llama3_rope", "mistral", "qwen2", "qwen3"])
def test_every_family_with_either_attention(tmp_path: Path, family: str, knobs: dict[str, Any]) -> None:
    job = make_job(tmp_path, family, steps=3)
    assert run(job, "found", **knobs).losses == pytest.approx(run(job, "truth", compute_dtype="float32").losses, rel=2e-2)


@LIGER
@pytest.mark.parametrize("family", MODULES)
def test_every_family_with_liger(tmp_path: Path, family: str) -> None:
    job = make_job(tmp_path, family, steps=3)
    truth, found = run(job, "truth", compute_dtype="float32"), run(job, "found", compute_dtype="float32", kernels="liger")
    assert found.losses == pytest.approx(truth.losses, rel=1e-4)
    assert found.grad_norms == pytest.approx(truth.grad_norms, rel=1e-3)


@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param({"attention": "cudnn"}, id="cudnn"),
        pytest.param({"attention": "varlen", "layout": "packed"}, id="varlen"),
        pytest.param({"kernels": "liger"}, id="liger", marks=LIGER),
    ],
)
def test_full_fine_tuning(tmp_path: Path, knobs: dict[str, Any]) -> None:
    job = make_job(tmp_path, "llama", FULL, steps=3, max_grad_norm=2.0)
    truth, found = run(job, "truth", compute_dtype="float32"), run(job, "found", **knobs)
    assert found.losses == pytest.approx(truth.losses, rel=2e-2)
    assert found.grad_norms == pytest.approx(truth.grad_norms, rel=5e-2)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="pip install bitsandbytes")
def test_moments_in_8_bits_follow_those_in_32(tmp_path: Path) -> None:
    """In float32, so that nothing else rounds; embedding and head have more than 4,096 values, below which it keeps 32 bits."""
    job = make_job(tmp_path, method=FULL, steps=12, learning_rate=1e-3)
    exact = {"compute_dtype": "float32"}
    plain, eight = run(job, "plain", **exact), run(job, "eight", **exact, optimizer="adamw_8bit")
    assert eight.losses[0] == plain.losses[0]
    assert eight.losses[-1] != plain.losses[-1]
    assert eight.losses == pytest.approx(plain.losses, abs=0.02)


@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param({"attention": "sdpa"}, id="sdpa"),
        pytest.param({"attention": "eager"}, id="eager"),
        pytest.param({"attention": "varlen"}, id="varlen"),
        pytest.param({"attention": "varlen", "compile": True}, id="varlen compile"),
        pytest.param({"attention": "sdpa", "compile": True}, id="sdpa compile"),
        pytest.param({"attention": "flash_attention_2"}, id="flash", marks=FLASH),
        pytest.param(BEST, id="best", marks=LIGER),
    ],
)
def test_a_packed_document_does_not_see_its_neighbour(tmp_path: Path, knobs: dict[str, Any]) -> None:
    """The same document beside two others: exactly the same loss and gradient norm, up to the order of sums."""
    job = make_job(tmp_path)
    told = []
    for seed in (1, 2):
        changed = with_train(two_documents(job, seed), f"neighbour {seed}", steps=2, warmup_steps=1)
        told.append(run(changed, f"run {seed}", **{**knobs, "layout": "packed", "micro_batch": 2}))
    assert told[0].tokens[0].sha256 != told[1].tokens[0].sha256
    assert told[1].losses == pytest.approx(told[0].losses, rel=1e-4)
    assert told[1].grad_norms == pytest.approx(told[0].grad_norms, rel=2e-3)


@pytest.mark.parametrize(
    ("knobs", "left", "graphs"),
    [
        pytest.param({}, 0, 2, id="padded"),
        pytest.param({}, 1, 4, id="padded, one left"),
        pytest.param({"layout": "packed"}, 1, 3, id="packed, one left"),
        pytest.param({"attention": "cudnn"}, 0, 2, id="cudnn"),
        pytest.param({"attention": "varlen", "layout": "packed"}, 1, 2, id="varlen, one left"),
        pytest.param(BEST, 0, 1, id="best", marks=LIGER),
    ],
)
def test_uneven_documents_are_compiled_for_no_more_kinds_of_call_than_on_a_cpu(
    tmp_path: Path, knobs: dict[str, Any], left: int, graphs: int
) -> None:
    """Layers, and the loss where it is not Liger's; Inductor may guard on more than ``test_kinds_of_call.py`` does in its place."""
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    run(uneven(tmp_path, left, LORA), "found", **{**knobs, "compile": True})
    assert counted["unique_graphs"] - before == graphs


class _NoSync(RecordingProbe):
    """From the second step on, whatever makes the host wait for the GPU is an error; what is reported is kept as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def step(self, *, loss: Any, grad_norm: Any, tokens: Any) -> None:
        self.kept.append((loss, grad_norm))
        if len(self.kept) == 1:
            torch.cuda.set_sync_debug_mode("error")


@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param({"attention": "cudnn"}, id="cudnn"),
        pytest.param({"attention": "cudnn", "recompute": "full"}, id="cudnn ckpt"),
        pytest.param({"attention": "varlen", "layout": "packed"}, id="varlen packed"),
        pytest.param({"attention": "varlen"}, id="varlen padded"),
        pytest.param({"attention": "varlen", "layout": "packed", "adapter_compute": "direct"}, id="direct"),
    ],
)
def test_steps_never_wait_for_the_gpu(tmp_path: Path, knobs: dict[str, Any]) -> None:
    """``sdpa`` waits once a micro-batch (transformers asks whether rows are packed), and so does Liger (it counts the labels)."""
    job = replace(make_job(tmp_path, steps=4), device="cuda")
    probe = _NoSync()
    plain = engines.hf._save
    try:
        engines.hf._save = lambda model, job: torch.cuda.set_sync_debug_mode("default")  # saving may wait
        engines.hf.train(job, parse(engines.hf.Knobs, {**ROUNDED, **knobs}), probe)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        engines.hf._save = plain
    assert len(probe.kept) == 4


@LIGER
def test_liger_holds_no_logits(tmp_path: Path) -> None:
    """A vocabulary so large that the logits of a batch outweigh everything else."""
    peaks = {}
    config = {"vocab_size": 65536}
    for kernels in ("none", "liger"):
        job = make_job(tmp_path / kernels, "llama", LORA, steps=2, warmup_steps=1, samples_per_step=8)
        job = enlarged(job, config)
        torch.cuda.reset_peak_memory_stats()
        run(job, "large", kernels=kernels, micro_batch=8)
        peaks[kernels] = torch.cuda.max_memory_allocated()
    assert peaks["liger"] < peaks["none"] / 2, peaks


def enlarged(job: Job, changed: dict[str, Any]) -> Job:
    """``job`` on a base with another configuration and new random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(job.base)
    for name, value in changed.items():
        setattr(config, name, value)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(job.base)
    return job
