"""Base folders: the same bits for everyone, whatever the source, and a clear word where there can be none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from harness.errors import ConfigError, HarnessError, StoreError, WeightsError
from harness.places import Sources
from harness.weights import fingerprint
from harness.weights.base_model import Base, prepare_base, tokenizing
from harness.weights.building import building
from harness.weights.sources import write_atomically
from harness.weights.tensors import read_tensors
from tests.real_files import ROOT, conf, model


def from_folder(folder: Path, cache: Path, **changes: Any) -> Base:
    settings = {"weights": f"dir:{folder}", "tokenizer": f"dir:{folder}", "config": None, **changes}
    return prepare_base(model(**settings), Sources(), cache)


def refused(folder: Path, cache: Path, **changes: Any) -> str:
    with pytest.raises(HarnessError) as caught:
        from_folder(folder, cache, **changes)
    return str(caught.value)


def test_random_weights_load_in_transformers_and_are_the_same_in_every_cache(tiny: Base, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = prepare_base(model(), Sources(), tmp_path)
    assert other.sha256 == tiny.sha256
    assert (other.path / "model.safetensors").read_bytes() == (tiny.path / "model.safetensors").read_bytes()
    loaded, report = AutoModelForCausalLM.from_pretrained(tiny.path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.float32
    layer = loaded.model.layers[0]
    assert layer.input_layernorm.weight.tolist() == [1.0] * 64
    assert float(layer.mlp.up_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert len(AutoTokenizer.from_pretrained(tiny.path)) == tiny.vocab_size == 4096
    assert tiny.description == "random, seed 0"


def test_what_changes_the_values_changes_the_base(tiny: Base, tmp_path: Path) -> None:
    config = conf("model", "tiny_llama")["config"]
    variants = [model(seed=1), model(dtype="bfloat16"), model(config={**config, "rms_norm_eps": 1e-6})]
    hashes = {prepare_base(variant, Sources(), tmp_path).sha256 for variant in variants}
    assert len(hashes | {tiny.sha256}) == 4
    assert prepare_base(model(name="other"), Sources(), tmp_path).sha256 == tiny.sha256


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama3_1b", 1_235_814_400),
        ("llama3_3b", 3_212_749_824),
        ("llama3_8b", 8_030_261_248),
        ("mistral_7b", 7_241_732_096),
        ("yi_6b", 6_061_035_520),
        ("qwen25_3b", 3_085_938_688),
        ("qwen3_4b", 4_022_468_096),
        ("falcon_7b", 6_921_720_704),
        ("mamba_1b4", 1_372_178_432),
    ],
)
def test_the_shapes_have_as_many_parameters_as_their_originals(name: str, parameters: int) -> None:
    from harness.weights.structure import read_config, structure

    config = read_config(model(name).config or {}, "model.config")
    assert name[:6] != "llama3" or config.rope_parameters["rope_type"] == "llama3"
    found = structure(config)
    assert sum(int(np.prod(shape)) for shape in found.shapes.values()) == parameters
    assert {kind for key, kind in found.kinds.items() if "norm" in key and key.endswith(".weight")} == {"ones"}
    assert set(found.kinds) == set(found.shapes)


def test_biases_are_zero() -> None:
    from harness.weights.structure import read_config, structure

    config = conf("model", "tiny_llama")["config"] | {"attention_bias": True}
    kinds = structure(read_config(config, "model.config")).kinds
    assert kinds["model.layers.0.self_attn.q_proj.bias"] == "zeros"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hiden_size": 3}, "model.config.hiden_size: unknown to the llama architecture; did you mean 'hidden_size'"),
        ({"model_type": "nonsense"}, "model.config: transformers refuses it"),
        ({"model_type": None}, "needs model_type"),
        ({"num_attention_heads": "four"}, "transformers (refuses it|cannot build)"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    config = conf("model", "tiny_llama")["config"] | change
    with pytest.raises((ConfigError, WeightsError), match=said):
        prepare_base(model(config=config), Sources(), tmp_path)
    assert not list((tmp_path / "base").glob("*"))


def test_a_folder_already_as_wanted_is_linked_not_copied(folder: Path, tiny: Base, cache: Path) -> None:
    base = from_folder(folder, cache)
    assert (base.path / "model.safetensors").is_symlink()
    assert base.sha256 == tiny.sha256
    (folder / "model.safetensors").unlink()
    assert "expected *.safetensors, found none" in refused(folder, cache)


def test_a_folder_is_converted_to_the_type_asked_for(folder: Path, tiny: Base, cache: Path) -> None:
    half = from_folder(folder, cache, dtype="bfloat16")
    assert half.description == "own, float32 stored as bfloat16"
    assert half.config["dtype"] == "bfloat16"
    stored = read_tensors(half.path)
    assert {tensor.code for tensor in stored.values()} == {"BF16"}
    for name, values in load_file(tiny.path / "model.safetensors").items():
        assert np.allclose(stored[name].values().reshape(values.shape), values, rtol=2**-8)


def test_pickled_weights_are_refused(folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    text = refused(folder, cache)
    assert "found pytorch_model.bin, but pickled weights can run code and are refused" in text
    assert "save_pretrained" in text


def test_incomplete_folders_are_refused(folder: Path, cache: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors of model.safetensors.index.json is missing" in refused(folder, cache)
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(folder, cache)


def test_quantised_folders_are_refused(folder: Path, cache: Path) -> None:
    save_file({"a": np.ones(4, np.int8)}, folder / "extra.safetensors")
    assert "quantised weights (I8)" in refused(folder, cache)
    (folder / "extra.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    assert "quantised weights (quantization_config in its config.json)" in refused(folder, cache)


def test_a_configuration_that_contradicts_the_weights_lists_the_keys(folder: Path, cache: Path) -> None:
    text = refused(folder, cache, config={"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 9})
    assert "model.config.num_hidden_layers: 3 asked, 2 in own" in text
    assert "model.config.vocab_size: 9 asked, 4096 in own" in text
    assert "hidden_size: 64" not in text


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    config = conf("model", "tiny_llama")["config"] | {"vocab_size": 4000}
    with pytest.raises(WeightsError, match=r"vocabulary smaller than tokenizer: the model has 4,000 entries, the tokenizer tiny has 4,096"):
        prepare_base(model(config=config), Sources(), tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer_config.json").write_text("{}")
    assert "bare: no tokenizer here that transformers can load" in refused(folder, cache, tokenizer=f"dir:{tmp_path / 'bare'}")
    with pytest.raises(WeightsError, match=r"model\.tokenizer: 'random' names no tokenizer"):
        prepare_base(model(tokenizer="random"), Sources(), cache)


def test_files_changed_since_planning_are_refused(folder: Path, cache: Path) -> None:
    assert "its files changed since the run was planned" in refused(folder, cache, fingerprint="0" * 64)
    planned = fingerprint(folder, cache)
    assert from_folder(folder, cache, fingerprint=planned).path.is_dir()
    with pytest.raises(WeightsError, match="is gone since the run was planned"):
        prepare_base(model(), Sources(tokenizer="/nowhere/tokenizer"), cache)


def test_the_hub_without_a_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> str:
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(WeightsError, match=r"'hub:org/model': the Hub cannot be reached and it is not in the local cache; .*dir:PATH"):
        prepare_base(model(weights="hub:org/model", config=None), Sources(), tmp_path)


def test_the_hub_gives_a_folder_like_any_other(folder: Path, tiny: Base, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def downloaded(repository: str, **options: Any) -> str:
        asked.update(repository=repository, **options)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloaded)
    base = prepare_base(model(weights="hub:org/model@v1", config=None), Sources(), cache)
    assert base.sha256 == tiny.sha256
    assert (asked["repository"], asked["revision"]) == ("org/model", "v1")
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in asked["allow_patterns"])


def test_what_tokenising_needs_is_that_of_the_base_and_brings_no_weights(
    folder: Path, tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def downloaded(_repository: str, **options: Any) -> str:
        assert "*.safetensors" not in options["allow_patterns"]
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloaded)
    named = ({"weights": f"dir:{folder}", "tokenizer": f"dir:{folder}", "config": None}, {"weights": "hub:org/model", "config": None})
    for changes in ({}, *named):
        with tokenizing(model(**changes), Sources(), tmp_path) as seen:
            assert (seen.vocab_size, seen.tokenizer_sha256) == (tiny.vocab_size, tiny.tokenizer_sha256)
            assert seen.path != tiny.path
        assert not seen.path.exists()
    assert not (tmp_path / "base").exists()


def test_whoever_comes_second_keeps_the_first_ones_folder(tmp_path: Path) -> None:
    target = tmp_path / "key"
    with building(target) as partial:
        (partial / "x").write_text("second")
        target.mkdir()
        (target / "x").write_text("first")
    assert (target / "x").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_build_leaves_nothing_and_a_killed_one_is_cleaned_up(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), building(tmp_path / "key"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    import platform

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".key.{platform.node()}.{dead.pid}.partial").mkdir()
    (tmp_path / f".key.{platform.node()}.{os.getppid()}.partial").mkdir()
    with building(tmp_path / "key"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".key.{platform.node()}.{os.getppid()}.partial", "key"]


def test_a_full_disk_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No space left"), building(tmp_path / "key"):
        raise OSError(28, "No space left on device")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        write_atomically(tmp_path / "file" / "x.json", "{}")


def test_concurrent_prepares_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONCURRENT, str(tmp_path)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(paths) == 1
    assert len(list((tmp_path / "base").iterdir())) == 1


CONCURRENT = """
import sys
from pathlib import Path
from harness.places import Sources
from harness.weights.base_model import prepare_base
from tests.real_files import model
print(prepare_base(model(), Sources(), Path(sys.argv[1])).path)
"""


def test_a_link_whose_target_went_away_is_made_again(folder: Path, cache: Path, tmp_path: Path) -> None:
    first = from_folder(folder, tmp_path / "cache")
    moved = folder.with_name("moved")
    folder.rename(moved)
    again = from_folder(moved, tmp_path / "cache")
    assert again.path == first.path
    assert (again.path / "model.safetensors").resolve() == moved / "model.safetensors"
