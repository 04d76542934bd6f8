"""Merged weights say what base and adapter said together, for every architecture, and nothing is left where they do not."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from harness import merge as door
from harness import store
from harness.merge import logits, main
from harness.nf4 import load_decoded
from harness.spec import parse
from harness.weights.base_model import Base
from harness.weights.nf4_base import prepare_nf4
from harness.weights.tensors import adapter_sha256
from tests import records
from tests.engines.tiny import FAMILIES, LORA, QLORA, RecordingProbe, make_job
from tests.real_files import ROOT, conf, workload

FALCON = {
    "model_type": "falcon", "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True,
    "new_decoder_architecture": False, "alibi": False, "bias": False,
}  # fmt: skip
MAMBA = {"model_type": "mamba", "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    **{family: (FAMILIES[family], LINEARS) for family in ("llama", "tied", "mistral", "qwen2", "qwen3")},
    "falcon": (FALCON, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "mamba": (MAMBA, ["in_proj", "x_proj"]),
}


def make(folder: Path, config: dict[str, Any], targets: list[str], **options: Any) -> tuple[Path, Path]:
    """A base of random weights and an adapter on it whose B is not zero."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    model.save_pretrained(folder / "base")
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM", **options))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.peft_config["default"].base_model_name_or_path = "of_a_test"
    wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "base", folder / "adapter"


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", MODELS)
def test_merged_weights_are_base_and_adapter(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = make(tmp_path, *MODELS[family])
    assert main([str(adapter), str(tmp_path / "out"), "--base", str(base)]) == 0
    apart = logits(PeftModel.from_pretrained(loaded(base), str(adapter)).eval())
    together = logits(loaded(tmp_path / "out"))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert (apart - logits(loaded(base))).abs().max() > 100 * (together - apart).abs().max(), "the adapter changes nothing to speak of"
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(load_file(base / "model.safetensors"))
    said = capsys.readouterr().out
    assert "summed (float32): largest difference" in said
    assert "nothing is known of the base that it was trained on" in said
    assert "done: " in said


KNOBS: dict[str, dict[str, Any]] = {
    "fused": yaml.safe_load((ROOT / "conf" / "engine" / "fused.yaml").read_text())["knobs"],
    "hf": yaml.safe_load((ROOT / "conf" / "engine" / "hf.yaml").read_text())["knobs"],
}


@pytest.mark.parametrize("engine", KNOBS)
@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
def test_what_engines_write_loads_in_peft_and_merges(tmp_path: Path, engine: str, method: dict[str, Any]) -> None:
    job = make_job(tmp_path, method=method)
    module: Any = importlib.import_module(f"engines.{engine}")
    own = {"compute_dtype": "float32"} | ({"operations": "reference", "replay": False} if engine == "fused" else {})
    module.train(job, parse(module.Knobs, {**KNOBS[engine], **own}), RecordingProbe())
    assert main([str(job.out), str(tmp_path / "merged"), "--base", str(job.base)]) == 0
    plain = load_decoded(job.base, torch.float32) if method is QLORA else loaded(job.base)
    apart = logits(PeftModel.from_pretrained(plain, str(job.out)).eval())
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), apart, rtol=1e-4, atol=1e-5)


def test_rank_stabilised_scale_is_heeded(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, *MODELS["llama"], use_rslora=True)
    assert main([str(adapter), str(tmp_path / "out"), "--base", str(base)]) == 0
    pair = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    up, down = (pair[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA")
    weights = [load_file(folder / "model.safetensors")[f"{name}.weight"] for folder in (base, tmp_path / "out")]
    torch.testing.assert_close(weights[1] - weights[0], 12 / 4**0.5 * up @ down, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_smaller_type_has_a_larger_allowance(tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = make(tmp_path, *MODELS["llama"])
    assert main([str(adapter), str(tmp_path / "out"), "--base", str(base), "--dtype", dtype]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    assert {str(tensor.dtype) for tensor in tensors} == {f"torch.{dtype}"}
    assert f"read back ({dtype}): largest difference" in capsys.readouterr().out


def test_large_models_go_into_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = make(tmp_path, *MODELS["llama"])
    monkeypatch.setattr(door, "SHARD", "50KB")
    assert main([str(adapter), str(tmp_path / "out"), "--base", str(base)]) == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"]) == set(load_file(base / "model.safetensors"))


def test_the_adapter_names_its_base_and_the_tokenizer_comes_along(cache: Path, tmp_path: Path, tiny: Base) -> None:
    made = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32)
    wrapped = get_peft_model(made, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False))
    wrapped.peft_config["default"].base_model_name_or_path = "tiny_llama"
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert main([str(tmp_path / "adapter"), str(tmp_path / "out"), f"cache={cache}"]) == 0
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (tiny.path, tmp_path / "out")]
    assert len({str(each.encode("def f(): return 1")) for each in tokenizers}) == 1


def test_the_record_beside_an_adapter_says_the_method_and_the_base(
    cache: Path, tmp_path: Path, tiny: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32),
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    wrapped.peft_config["default"].base_model_name_or_path = "tiny_llama"
    wrapped.save_pretrained(tmp_path / "made", save_embedding_layers=False)
    sha = adapter_sha256(tmp_path / "made")
    (tmp_path / "adapters").mkdir()
    adapter = (tmp_path / "made").rename(tmp_path / "adapters" / sha[:16])
    packed = prepare_nf4(tiny, "float32", cache)
    ran = records.record(work=workload(method=conf("method", "qlora")), artifacts={"adapter_sha256": sha, "base_sha256": packed.sha256})
    store.save(ran, tmp_path)
    assert main([str(adapter), str(tmp_path / "out"), f"cache={cache}"]) == 0
    assert "base: tiny_llama: random, seed 0; linear layers in NF4" in capsys.readouterr().out
    merged, right = load_file(tmp_path / "out" / "model.safetensors"), load_decoded(packed.path, torch.float32).state_dict()
    assert merged["model.layers.0.mlp.up_proj.weight"].equal(right["model.layers.0.mlp.up_proj.weight"])
    assert main([str(adapter), str(tmp_path / "other"), "method=lora", f"cache={cache}"]) == 2
    said = capsys.readouterr().err
    assert "was trained on another base (model.name=tiny_llama, model.weights=random, model.dtype=float32, method=qlora)" in said
    assert not (tmp_path / "other").exists()


def beside_its_record(root: Path, made: Path, base_sha256: str, method: str) -> Path:
    """The adapter ``made`` where a run leaves it, and the record of that run."""
    sha = adapter_sha256(made)
    (root / "adapters").mkdir()
    of_run = {"adapter_sha256": sha, "base_sha256": base_sha256}
    store.save(records.record(work=workload(method=conf("method", method)), artifacts=of_run), root)
    return made.rename(root / "adapters" / sha[:16])


def test_a_base_with_the_adapter_in_it_is_not_merged_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, made = make(tmp_path, *MODELS["llama"])
    prepared = Base(base, "", "tiny", json.loads((base / "config.json").read_text()), "t" * 64)
    adapter = beside_its_record(tmp_path, made, prepared.content_sha256(adapter_sha256(base)), "lora")
    assert main([str(adapter), str(tmp_path / "once"), "--base", str(base)]) == 0
    assert "nothing is known" not in capsys.readouterr().out
    assert main([str(adapter), str(tmp_path / "twice"), "--base", str(tmp_path / "once")]) == 2
    said = capsys.readouterr().err
    assert f"than what was found here ({tmp_path / 'once'}); leave --base out, or" in said
    assert f"give it as model=tiny_llama model.weights=dir:{tmp_path / 'once'}" in said
    assert not (tmp_path / "twice").exists()


def test_a_folder_in_nf4_is_known_as_the_base_of_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, made = make(tmp_path, *MODELS["llama"])
    packed = prepare_nf4(Base(base, "b" * 64, "tiny", json.loads((base / "config.json").read_text()), "t" * 64), "float32", tmp_path)
    adapter = beside_its_record(tmp_path, made, packed.sha256, "qlora")
    assert main([str(adapter), str(tmp_path / "plain"), "--base", str(base)]) == 2
    assert "method=qlora" in capsys.readouterr().err
    assert main([str(adapter), str(tmp_path / "out"), "--base", str(packed.path)]) == 0


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """safetensors raises an error of its own, which is no OSError."""
    base, adapter = make(tmp_path, *MODELS["llama"])
    code = f"from harness.merge import main; raise SystemExit(main([{str(adapter)!r}, {str(tmp_path / 'out')!r}, '--base', {str(base)!r}]))"
    limited = f'ulimit -f 60; exec {sys.executable} -c "$0"'
    ended = subprocess.run(["bash", "-c", limited, code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "error: cannot write" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_base_in_nf4_is_merged_decoded(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, *MODELS["llama"])
    config = json.loads((base / "config.json").read_text())
    packed = prepare_nf4(Base(base, "b" * 64, "tiny", config, "t" * 64), "float32", tmp_path).path
    assert main([str(adapter), str(tmp_path / "out"), "--base", str(packed)]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    of_plain, of_packed = (logits(loaded(folder)) for folder in (base, tmp_path / "out"))
    assert (of_plain - of_packed).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
def test_an_adapter_that_cannot_be_merged_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tied head has no weights of its own: merged into the embedding, the adapter would change that too."""
    config = {**FAMILIES["tied"], "hidden_size": 40, "intermediate_size": 60}
    base, adapter = make(tmp_path, config, ["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    head = {f"base_model.model.lm_head.lora_{part}.weight": torch.randn(size) for part, size in (("A", (4, 40)), ("B", (512, 4)))}
    save_file({**tensors, **head}, adapter / "adapter_model.safetensors")
    written = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**written, "target_modules": ["q_proj", "lm_head"]}))
    assert main([str(adapter), str(tmp_path / "out"), "--base", str(base)]) == 7
    assert "is not written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*partial"))


def broken(folder: Path, what: str) -> list[str]:
    """The command line of a mistake."""
    base, adapter = make(folder, *MODELS["llama"])
    config, tensors = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    given = [str(adapter), str(folder / "out"), "--base", str(base)]
    if what == "no adapter":
        return [str(base), *given[1:]]
    if what == "not lora":
        config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "IA3"}))
    if what == "torn":
        tensors.write_bytes(tensors.read_bytes()[:200])
    if what == "another model":
        save_file({name.replace("up_proj", "w1"): value for name, value in load_file(tensors).items()}, tensors)
    if what == "out exists":
        (folder / "out").mkdir()
    if what == "unknown base":
        return given[:2]
    if what == "base without weights":
        (base / "model.safetensors").unlink()
    more = {"both": ["model=tiny_llama"], "no GPU": ["--device", "cuda"]}
    return [*given, *more.get(what, [])]


MISTAKES = {
    "no adapter": "adapter_config.json: missing",
    "not lora": "peft_type is 'IA3'; only LORA",
    "torn": "not a readable safetensors file",
    "another model": "its tensors are not those its adapter_config.json describes",
    "out exists": "exists already",
    "unknown base": "its base is 'of_a_test', which is no model of conf/model",
    "base without weights": "--base is a Hugging Face model folder",
    "both": "leave one of them out",
    "no GPU": "--device cuda: torch can use no GPU here",
}


@pytest.mark.parametrize("what", MISTAKES)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_mistake_is_named(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(broken(tmp_path, what)) == 2
    assert MISTAKES[what] in capsys.readouterr().err
    assert what == "out exists" or not (tmp_path / "out").exists()
