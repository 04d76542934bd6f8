"""``method=qlora`` in the peers' own packages: the losses of hf on the decoded values of the same packed bytes, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import engines.axolotl
import engines.hf
import engines.unsloth
from harness.engine import Job, Machine
from harness.errors import UnsupportedError
from harness.spec import Workload, parse
from harness.weights.base_model import Base
from harness.weights.nf4_base import prepare_nf4
from tests.engines.peers import knobs, peer
from tests.engines.test_axolotl import AXOLOTL, KERNELS
from tests.engines.test_axolotl import MARKS as AXOLOTL_MARKS
from tests.engines.test_hf import KNOBS as HF
from tests.engines.test_qlora import BF16, WHOLE_BLOCKS, run
from tests.engines.test_unsloth import MARKS as UNSLOTH_MARKS
from tests.engines.test_unsloth import OFFLINE, UNSLOTH
from tests.engines.tiny import CPU, FAMILIES, GPU, LLAMA, QLORA, make_job, make_workload, with_train

OF_UNSLOTH: dict[str, Any] = {**knobs("unsloth/nockpt+padded"), "micro_batch": 2}
OF_AXOLOTL: dict[str, Any] = {**knobs("axolotl"), "micro_batch": 1}
ENGINES = [(engines.unsloth, OF_UNSLOTH), (engines.axolotl, OF_AXOLOTL)]
WAYS = [
    pytest.param(UNSLOTH, OF_UNSLOTH, id="unsloth padded", marks=UNSLOTH_MARKS),
    pytest.param(UNSLOTH, {**OF_UNSLOTH, "layout": "packed", "recompute": "unsloth"}, id="unsloth packed ckpt", marks=UNSLOTH_MARKS),
    pytest.param(AXOLOTL, OF_AXOLOTL, id="axolotl padded", marks=AXOLOTL_MARKS),
    pytest.param(
        AXOLOTL, {**OF_AXOLOTL, "layout": "packed", "micro_batch": 5, "recompute": "full"}, id="axolotl packed ckpt", marks=AXOLOTL_MARKS
    ),
]
EACH = [WAYS[0], WAYS[2]]


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Rows of whole blocks, which bitsandbytes decodes on a CPU, too."""
    monkeypatch.setitem(FAMILIES, "whole_blocks", WHOLE_BLOCKS)
    return make_job(tmp_path, "whole_blocks", QLORA)


@pytest.fixture
def rounded(whole: Job) -> Job:
    """The same, whose values are stored as bfloat16: what real bases are."""
    base, raw = whole.out.parent / "base", whole.workload.model_dump(mode="json")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    made = prepare_nf4(Base(base, "c" * 64, "tiny", config, "t" * 64), "bfloat16", whole.out.parent)
    return replace(whole, workload=parse(Workload, {**raw, "model": {**raw["model"], "dtype": "bfloat16"}}), base=made.path)


@pytest.mark.parametrize(("engine", "chosen"), WAYS)
def test_makes_the_steps_of_hf_on_the_same_bytes(whole: Job, engine: ModuleType, chosen: dict[str, Any]) -> None:
    truth, found = run(engines.hf, with_train(whole, "truth"), HF), run(engine, whole, chosen)
    assert found.losses == pytest.approx(truth.losses, rel=2e-5)
    assert found.grad_norms == pytest.approx(truth.grad_norms, rel=1e-4)
    assert [tokens.sha256 for tokens in found.tokens] == [tokens.sha256 for tokens in truth.tokens]
    assert whole.adapter_init is not None
    folders = (whole.adapter_init, whole.out.parent / "truth", whole.out)
    initial, right, left = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert set(left) == set(right)
    for name, value in right.items():
        update, expected = left[name] - initial[name], value - initial[name]
        assert torch.linalg.vector_norm(update - expected) < 2e-3 * torch.linalg.vector_norm(expected), name
    assert str(whole.out.parent) not in (whole.out / "adapter_config.json").read_text()


@pytest.mark.parametrize(("engine", "chosen"), EACH)
def test_bfloat16_stays_near(rounded: Job, engine: ModuleType, chosen: dict[str, Any]) -> None:
    truth, found = run(engines.hf, with_train(rounded, "truth"), HF), run(engine, rounded, {**chosen, "compute_dtype": "bfloat16"})
    assert found.losses != truth.losses
    assert found.losses == pytest.approx(truth.losses, rel=2e-3)


@pytest.mark.parametrize(("engine", "chosen"), EACH)
def test_what_only_the_open_weights_reveal(tmp_path: Path, engine: ModuleType, chosen: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"no whole blocks of 64: hidden_size=32, intermediate_size=72"):
        run(engine, make_job(tmp_path, method=QLORA), chosen)


def stored_as(dtype: str) -> Workload:
    raw = make_workload(WHOLE_BLOCKS, QLORA).model_dump(mode="json")
    return parse(Workload, {**raw, "model": {**raw["model"], "dtype": dtype}})


@pytest.mark.parametrize(("engine", "chosen"), ENGINES, ids=["unsloth", "axolotl"])
def test_it_is_refused_where_it_would_be_another_function(engine: ModuleType, chosen: dict[str, Any]) -> None:
    exact, rounded = (parse(engine.Knobs, {**chosen, "compute_dtype": dtype}) for dtype in ("float32", "bfloat16"))
    assert "no whole blocks of 64" in (engine.unsupported(make_workload(LLAMA, QLORA), exact, CPU) or "")
    assert engine.unsupported(make_workload(LLAMA, QLORA), exact, GPU) is None
    assert engine.unsupported(make_workload(WHOLE_BLOCKS, QLORA), exact, CPU) is None
    assert "use compute_dtype=bfloat16" in (engine.unsupported(stored_as("bfloat16"), exact, GPU) or "")
    assert engine.unsupported(stored_as("bfloat16"), rounded, GPU) is None


@pytest.mark.parametrize("distributed", ["fsdp2", "zero3"])
def test_axolotl_does_not_shard_packed_bytes(distributed: str) -> None:
    two = Machine(device="cuda", name="Test GPU", count=2, memory_gib=80)
    work = make_workload(WHOLE_BLOCKS, QLORA, samples_per_step=4)
    said = [
        engines.axolotl.unsupported(work, parse(engines.axolotl.Knobs, {**OF_AXOLOTL, "distributed": name}), two)
        for name in (distributed, "ddp")
    ]
    assert f"distributed={distributed} would shard" in (said[0] or "")
    assert said[1] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.filterwarnings("ignore")  # of compilers, on whatever versions the GPU's machine has
@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        pytest.param("unsloth", {**OF_UNSLOTH, "layout": "packed"}, id="unsloth packed", marks=UNSLOTH_MARKS),
        pytest.param("unsloth", {**OF_UNSLOTH, "layout": "packed", "recompute": "unsloth"}, id="unsloth default", marks=UNSLOTH_MARKS),
        pytest.param("unsloth", OF_UNSLOTH, id="unsloth padded", marks=UNSLOTH_MARKS),
        pytest.param("axolotl", {**OF_AXOLOTL, "lora_kernels": []}, id="axolotl plain", marks=AXOLOTL_MARKS),
        pytest.param("axolotl", {**OF_AXOLOTL, **KERNELS}, id="axolotl kernels+liger", marks=AXOLOTL_MARKS),
        pytest.param("axolotl", {**OF_AXOLOTL, **KERNELS, "layout": "packed", "micro_batch": 5}, id="axolotl packed", marks=AXOLOTL_MARKS),
    ],
)
def test_on_a_gpu_no_further_from_the_truth_than_bfloat16(rounded: Job, name: str, chosen: dict[str, Any]) -> None:
    """Each in a process of its own: a peer decides what it is when it is imported. ``hf`` goes through bitsandbytes itself."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    there, _ = peer(name, **OFFLINE, HF_DATASETS_OFFLINE="1")
    truth = run(engines.hf, with_train(rounded, "truth"), HF)
    anchor = run(engines.hf, replace(with_train(rounded, "anchor"), device="cuda"), BF16)
    found = run(there, replace(rounded, device="cuda"), {**chosen, "compute_dtype": "bfloat16"})  # type: ignore[arg-type]
    assert found.losses == pytest.approx(truth.losses, rel=2e-2)
    assert found.losses == pytest.approx(anchor.losses, rel=5e-3)
    assert found.grad_norms == pytest.approx(anchor.grad_norms, rel=5e-2)
