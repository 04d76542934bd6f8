"""Every shape of conf/model/, shrunk to two small layers: hf trains them all, fused every Llama-family one, and says why not the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.record import Record
from harness.store import load
from tests.test_sweep import TREE

FOLDER = TREE / "conf" / "model"
SHAPES = [path.stem for path in sorted(FOLDER.glob("*.yaml")) if yaml.safe_load(path.read_text(encoding="utf-8"))["weights"] == "random"]
OTHERS = {  # what fused does not know, with what their small copies want said besides
    "falcon_7b": ("model.config.num_attention_heads=4", "method.targets=[query_key_value,dense,dense_h_to_4h,dense_4h_to_h]"),
    "mamba_1b4": ("model.config.time_step_rank=4", "method.targets=[in_proj,x_proj,dt_proj]"),
}
LLAMA_FAMILY = [name for name in SHAPES if name not in OTHERS]
SMALL = (
    "machine=cpu", "model.tokenizer=package:harness/data/tokenizers/tiny", "model.dtype=float32", "model.config.vocab_size=4096",
    "model.config.hidden_size=64", "model.config.num_hidden_layers=2", "train.steps=3", "train.samples_per_step=3",
    "data.sequence_length=64", "data.held_out_fraction=0.0",
)  # fmt: skip
FEW_HEADS = ("model.config.num_attention_heads=4", "model.config.num_key_value_heads=2", "model.config.intermediate_size=128")


def sweep(cache: Path, runs: Path, *overrides: str) -> dict[tuple[str, str], Record]:
    command = [sys.executable, "-m", "harness", "-m", "engine=hf,fused", *SMALL, *overrides, f"cache={cache}", f"runs={runs}"]
    done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return {(record.cell.workload.model.name, record.cell.engine.name): record for record in (entry.record for entry in load(runs).stored)}


def test_both_engines_train_every_llama_family_model_alike(cache: Path, tmp_path: Path) -> None:
    records = sweep(cache, tmp_path / "runs", f"model={','.join(LLAMA_FAMILY)}", *FEW_HEADS)
    for model in LLAMA_FAMILY:
        hf, fused = (records[model, engine].measurement for engine in ("hf", "fused"))
        assert hf is not None
        assert fused is not None
        assert fused.steps.losses == pytest.approx(hf.steps.losses, rel=2e-6)
        assert fused.steps.stream_sha256 == hf.steps.stream_sha256


@pytest.mark.parametrize(("model", "overrides"), OTHERS.items())
def test_other_architectures_are_for_hf(cache: Path, tmp_path: Path, model: str, overrides: tuple[str, ...]) -> None:
    records = sweep(cache, tmp_path / "runs", f"model={model}", *overrides)
    assert records[model, "hf"].status == "ok"
    assert records[model, "fused"].status == "unsupported"
    assert f"model_type '{model.partition('_')[0]}'" in str(records[model, "fused"].reason)
