"""The shared initial adapter: PEFT reads it, it changes nothing at first, and it is the same for everyone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from harness.errors import ConfigError
from harness.places import Sources
from harness.weights import adapter_sha256
from harness.weights.adapter import Adapter, adaptable, prepare_adapter, target_modules
from harness.weights.base_model import Base, prepare_base
from harness.weights.random_init import kaiming_uniform
from harness.weights.tensors import read_tensors
from tests.real_files import conf, model, workload


@pytest.fixture(scope="module")
def tiny(cache: Path) -> Base:
    return prepare_base(model(), Sources(), cache)


def made(base: Base, cache: Path, **changes: object) -> Adapter:
    found = prepare_adapter(workload(**changes), base, cache)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_peft_loads_it_and_the_model_is_unchanged(tiny: Base, cache: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = made(tiny, cache)
    base = AutoModelForCausalLM.from_pretrained(tiny.path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = base(ids).logits
        loaded = PeftModel.from_pretrained(base, str(adapter.path), is_trainable=True)
        assert torch.equal(loaded(ids).logits, before)
    stored = {name: tensor.values().reshape(tensor.shape) for name, tensor in read_tensors(adapter.path).items()}
    own = {name.replace(".default.", "."): value for name, value in loaded.named_parameters() if "lora_" in name}
    assert own.keys() == stored.keys()
    assert len(own) == 2 * 7 * 2
    for name, value in own.items():
        assert np.array_equal(value.detach().numpy(), stored[name])
        assert value.requires_grad


def test_a_is_kaiming_uniform_and_b_is_zero(tiny: Base, cache: Path) -> None:
    stored = read_tensors(made(tiny, cache, method=conf("method", "lora", rank=64)).path)
    for name, tensor in stored.items():
        values, (_, columns) = tensor.values(), tensor.shape
        if ".lora_B." in name:
            assert not values.any()
        else:
            bound = 1 / math.sqrt(columns)
            assert float(np.abs(values).max()) <= bound
            assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_it_depends_on_seed_and_name_only(tiny: Base, cache: Path, tmp_path: Path) -> None:
    first = made(tiny, cache)
    assert made(tiny, tmp_path).sha256 == first.sha256 == adapter_sha256(first.path)
    assert made(tiny, cache, seed=1).sha256 != first.sha256
    drawn = kaiming_uniform("a", 0, (4, 8))
    assert drawn.tolist() == kaiming_uniform("a", 0, (4, 8)).tolist()
    assert drawn.tolist() != kaiming_uniform("b", 0, (4, 8)).tolist()


def test_its_configuration_names_the_model_and_no_path(tiny: Base, cache: Path) -> None:
    adapter = made(tiny, cache, method=conf("method", "lora", rank=4, alpha=10, targets=["q_proj", "mlp.down_proj"], dtype="bfloat16"))
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 10, "tiny_llama")
    assert set(config["target_modules"]) == {"q_proj", "mlp.down_proj"}
    assert {tensor.code for tensor in read_tensors(adapter.path).values()} == {"BF16"}
    assert str(cache) not in (adapter.path / "adapter_config.json").read_text()


def test_full_fine_tuning_has_none(tiny: Base, cache: Path) -> None:
    assert prepare_adapter(workload(method=conf("method", "full")), tiny, cache) is None


def test_unknown_targets_are_all_named_with_the_nearest(tiny: Base, cache: Path) -> None:
    method = conf("method", "lora", targets=["q_prj", "v_proj", "experts"])
    with pytest.raises(ConfigError) as caught:
        made(tiny, cache, method=method)
    lines = str(caught.value).splitlines()
    assert lines[0] == "method.targets: no linear layer is called 'q_prj'; did you mean 'q_proj'?"
    assert lines[1].startswith("method.targets: no linear layer is called 'experts'; known: down_proj, gate_proj")


def test_targets_match_whole_parts_of_names() -> None:
    linears = ["model.0.q_proj", "model.0.mlp.down_proj", "model.0.other.down_proj", "lm_head"]
    assert target_modules(["mlp.down_proj", "lm_head"], linears) == ["model.0.mlp.down_proj", "lm_head"]
    with pytest.raises(ConfigError, match="'proj'"):
        target_modules(["proj"], linears)


def test_what_peft_would_refuse_is_refused_first_and_suggested_to_nobody() -> None:
    linears = {"backbone.0.mixer.in_proj": (8, 4), "backbone.0.mixer.out_proj": (4, 8)}
    with pytest.raises(ConfigError, match="PEFT adapts no out_proj of a mamba model; leave it out"):
        adaptable(["in_proj", "mixer.out_proj"], linears, "mamba")
    assert list(adaptable(["in_proj"], linears, "mamba")) == ["backbone.0.mixer.in_proj"]
    assert adaptable(["out_proj"], linears, "jamba") == linears
    with pytest.raises(ConfigError, match="no linear layer is called 'o_proj'; did you mean 'in_proj'"):
        target_modules(["o_proj"], adaptable(["o_proj"], linears, "mamba"))


@pytest.mark.parametrize("target", ["in_proj", "out_proj"])
def test_it_is_what_peft_refuses(target: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mamba", vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=2, time_step_rank=2)
    model, lora = AutoModelForCausalLM.from_config(config), LoraConfig(r=1, target_modules=[target], task_type="CAUSAL_LM")
    if target == "in_proj":
        assert get_peft_model(model, lora)
    else:
        with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
            get_peft_model(model, lora)
