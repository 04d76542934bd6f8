"""``kernels=liger``: which functions are put in place, and on a CPU, by Triton's interpreter in float32, what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

import engines.hf
from harness.data.tokens import IGNORE, Sample, TokenFile
from harness.data.write import write_token_file
from harness.engine import Job
from harness.errors import UnsupportedError
from harness.spec import parse
from tests.engines.liger import MODULES, unpatched_afterwards
from tests.engines.test_hf import KNOBS, TREE
from tests.engines.tiny import LLAMA, LORA, VOCABULARY, RecordingProbe, make_job, make_workload, with_train

pytest.importorskip("liger_kernel", reason="needs the package liger-kernel: pip install --no-deps liger-kernel")
SHIPPED = sorted({yaml.safe_load(path.read_text())["config"]["model_type"] for path in (TREE / "conf" / "model").glob("*.yaml") if
                  yaml.safe_load(path.read_text())["config"]})  # fmt: skip


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    with unpatched_afterwards():
        yield


def liger(**changed: Any) -> engines.hf.Knobs:
    return parse(engines.hf.Knobs, {**KNOBS, "kernels": "liger", **changed})


def comes_from_liger(function: Any) -> bool:
    return str(getattr(function, "__func__", function).__module__).startswith("liger_kernel.")


@pytest.mark.parametrize("family", MODULES)
def test_everything_that_liger_has_is_put_in_place(tmp_path: Path, family: str) -> None:
    model = engines.hf._load(make_job(tmp_path, family), liger()).get_base_model()
    assert comes_from_liger(model.forward), "the loss from the last hidden states, without logits"
    assert comes_from_liger(MODULES[family].apply_rotary_pos_emb)
    kinds = {"RMSNorm": 0, "MLP": 0}
    for module in model.modules():
        kind = next((kind for kind in kinds if type(module).__name__.endswith(kind)), None)
        if kind is not None:
            kinds[kind] += 1
            assert comes_from_liger(module.forward), type(module).__name__
    assert kinds == {"RMSNorm": 9 if family == "qwen3" else 5, "MLP": 2}


def test_the_families_without_kernels_are_the_ones_that_the_plan_refuses() -> None:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    assert [family for family in SHIPPED if family not in MODEL_TYPE_TO_APPLY_LIGER_FN] == sorted(engines.hf._WITHOUT_LIGER)


def test_a_family_that_the_plan_does_not_know_is_refused_when_its_configuration_is_open() -> None:
    opened = transformers.AutoConfig.for_model("gpt_neox", hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=64)
    said = engines.hf._opened_reasons(opened, make_workload(LLAMA, LORA), liger())
    assert "kernels=liger: Liger has no kernels for model_type 'gpt_neox'; set kernels=none" in said


@pytest.fixture
def short(tmp_path: Path, request: pytest.FixtureRequest) -> Job:
    """One step of two documents of different lengths: the interpreter is slow."""
    job = make_job(tmp_path, request.param, samples_per_step=2, steps=2, warmup_steps=1)
    random = np.random.default_rng(2)
    samples = []
    for length, prompt in ((4, 1), (6, 4)):
        ids = random.integers(0, VOCABULARY, length).astype(np.int32)
        samples.append(Sample(ids, np.where(np.arange(length) < prompt, IGNORE, ids).astype(np.int32)))
    return replace(job, tokens=TokenFile.open(write_token_file(tmp_path / "short", samples, [], {})))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter lacks two things that Liger's norm uses: floats that are given as arguments have no ``to``; libdevice."""
    import liger_kernel.ops.rms_norm
    import triton.language as tl
    from triton.runtime import interpreter

    if torch.cuda.is_available():
        pytest.skip("Triton compiles here: test_hf_gpu.py runs the kernels themselves")
    plain = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return plain(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda x: tl.math.rsqrt(x))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore")  # Triton's interpreter and NumPy, about their own code
@pytest.mark.parametrize("short", ["llama", "qwen3"], indirect=True)
def test_the_same_loss_and_gradient_without_logits(short: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """In micro-batches of one document, so that a loss which is not weighted by the labels of the step is caught."""
    plain, found = RecordingProbe(), RecordingProbe()
    engines.hf.train(with_train(short, "plain"), parse(engines.hf.Knobs, {**KNOBS, "micro_batch": 2}), plain)

    def no_logits(*_: Any, **__: Any) -> Any:
        raise AssertionError("a loss from logits")

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", no_logits)
    engines.hf.train(short, liger(micro_batch=1), found)
    assert found.losses == pytest.approx(plain.losses, rel=2e-5)
    assert found.grad_norms == pytest.approx(plain.grad_norms, rel=1e-4)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("short", ["llama"], indirect=True)
def test_packed_documents_stay_apart(short: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, found = RecordingProbe(), RecordingProbe()
    engines.hf.train(with_train(short, "plain"), parse(engines.hf.Knobs, {**KNOBS, "micro_batch": 1}), plain)
    engines.hf.train(with_train(short, "packed"), liger(layout="packed"), found)
    assert found.losses == pytest.approx(plain.losses, rel=2e-5)
    assert found.grad_norms == pytest.approx(plain.grad_norms, rel=1e-4)
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(UnsupportedError, match="documents see each other"):
        engines.hf.train(short, liger(layout="packed"), RecordingProbe())
