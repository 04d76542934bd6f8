"""A checkpoint that bitsandbytes has quantised, as the source of a base: its bytes for qlora, its values for all else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.errors import WeightsError
from harness.nf4 import STATE, decoded_tensors
from harness.places import Sources
from harness.spec import Model, parse
from harness.weights import base_model
from harness.weights.base_model import Base, prepare_base
from harness.weights.given_nf4 import GIVEN
from harness.weights.nf4_base import prepare_nf4
from tests.real_files import conf

PROJECTION = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """In the layout of transformers and bitsandbytes, with scales that quantising its values again would not give."""
    plain = prepare_base(parse(Model, conf("model", "tiny_llama")), Sources(), tmp_path / "first")
    folder = tmp_path / "own"
    shutil.copytree(prepare_nf4(plain, "float32", tmp_path / "first").path, folder)
    (folder / "manifest.json").unlink()
    change(folder, lambda tensors: {**tensors, f"{PROJECTION}.absmax": tensors[f"{PROJECTION}.absmax"].clamp(max=200)})
    return folder


def change(folder: Path, how: Any) -> None:
    save_file(how(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def prepared(source: Path, cache: Path, **changes: Any) -> Base:
    fields = {"name": "own", "weights": f"dir:{source}", "tokenizer": f"dir:{source}", "dtype": "float32", "config": None, **changes}
    return prepare_base(parse(Model, conf("model", "tiny_llama", **fields)), Sources(), cache)


def test_its_bytes_are_the_base_of_qlora_and_its_values_a_plain_one(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.weights.tensors.CHUNK", 2**14)  # the least that whole blocks of scales fill: weights go in parts
    plain = prepared(source, tmp_path / "cache")
    assert plain.description == "own, NF4 of bitsandbytes, decoded to float32"
    assert "quantization_config" not in plain.config
    values, right = load_file(plain.path / "model.safetensors"), decoded_tensors(source)
    assert set(values) == set(right)
    assert all(values[name].equal(right[name]) for name in right)
    packed = prepare_nf4(plain, "float32", tmp_path / "cache")
    assert packed.description == "own, NF4 of bitsandbytes, decoded to float32; linear layers in NF4 as given"
    made, given = load_file(packed.path / "model.safetensors"), load_file(source / "model.safetensors")
    assert set(made) == set(given)
    assert all(made[name].equal(given[name]) for name in given)
    assert packed == prepare_nf4(prepared(source, tmp_path / "cache"), "float32", tmp_path / "cache")


def test_another_source_of_the_same_values_has_a_base_of_its_own(source: Path, tmp_path: Path) -> None:
    packed = prepare_nf4(prepared(source, tmp_path / "cache"), "float32", tmp_path / "cache")
    (tmp_path / "plain").mkdir()
    save_file(decoded_tensors(source), tmp_path / "plain" / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, tmp_path / "plain" / name)
    config = {key: value for key, value in json.loads((source / "config.json").read_text()).items() if key != "quantization_config"}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    decoded = prepared(tmp_path / "plain", tmp_path / "cache")
    assert decoded.sha256 == prepared(source, tmp_path / "cache").sha256
    assert prepare_nf4(decoded, "float32", tmp_path / "cache").sha256 != packed.sha256


def test_what_qlora_does_not_mean_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"was float32 before it was quantised; set model\.dtype=float32 \(it is bfloat16\)"):
        prepared(source, tmp_path / "cache", dtype="bfloat16")
    plain = decoded_tensors(source)[PROJECTION]
    change(source, lambda tensors: {**{key: value for key, value in tensors.items() if not key.startswith(PROJECTION)}, PROJECTION: plain})
    with pytest.raises(
        WeightsError, match=rf"own: {PROJECTION} is not in NF4; expected every linear layer .* take the weights that were not"
    ):
        prepared(source, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "base").glob("*"))


def test_other_blocks_are_refused(source: Path, tmp_path: Path) -> None:
    def blocks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = json.loads(bytes(tensors[f"{PROJECTION}{STATE}"].tolist()))
        text = json.dumps({**state, "nested_blocksize": None}).encode()
        return {**tensors, f"{PROJECTION}{STATE}": torch.tensor(list(text), dtype=torch.uint8)}

    change(source, blocks)
    with pytest.raises(WeightsError, match="double quantisation"):
        prepared(source, tmp_path / "cache")


def test_a_source_that_is_gone_is_told(source: Path, tmp_path: Path) -> None:
    base = prepared(source, tmp_path / "cache")
    assert (base.path / GIVEN / "model.safetensors").is_symlink()
    assert base_model.read_base(base.path) == base
    shutil.rmtree(source)
    with pytest.raises(WeightsError, match="own"):
        prepared(source, tmp_path / "cache")


def test_what_bitsandbytes_quantised_is_such_a_source(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = prepare_base(parse(Model, conf("model", "tiny_llama")), Sources(), tmp_path / "first")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(plain.path, dtype=torch.float32, quantization_config=how, device_map={"": "cpu"})
    model.save_pretrained(tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(plain.path / name, tmp_path / "theirs" / name)
    packed = prepare_nf4(prepared(tmp_path / "theirs", tmp_path / "cache"), "float32", tmp_path / "cache")
    ours, theirs = load_file(packed.path / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(ours[name].flatten().equal(theirs[name].flatten()) for name in ours if not name.endswith(STATE))
