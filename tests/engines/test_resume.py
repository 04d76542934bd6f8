"""Training that is cut short goes on from its last checkpoint: the same losses to the bit, the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import engines.deepspeed
import engines.fsdp
import engines.hf
from engines.native import states
from harness.engine import Checkpoints
from harness.errors import UnsupportedError
from harness.interpreter import lack
from harness.spec import parse
from tests.engines import test_deepspeed, test_fsdp
from tests.engines.ranks import Ranks, started
from tests.engines.test_fsdp import trained
from tests.engines.test_hf import KNOBS as HF
from tests.engines.tiny import FULL, LORA, QLORA, RecordingProbe, make_job, with_train

without_deepspeed = pytest.mark.skipif(lack(None, ["deepspeed"]) is not None, reason="deepspeed is not installed: pip install deepspeed")
KNOBS: dict[ModuleType, dict[str, Any]] = {engines.fsdp: test_fsdp.KNOBS, engines.deepspeed: test_deepspeed.KNOBS}


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[ModuleType, Ranks]]:
    with started(engines.fsdp, lasting_group=True) as fsdp, started(engines.deepspeed, lasting_group=True) as deepspeed:
        yield {engines.fsdp: fsdp, engines.deepspeed: deepspeed}


@pytest.mark.parametrize(
    ("engine", "method", "knobs"),
    [
        (engines.fsdp, LORA, {"strategy": "replicate"}),
        (engines.fsdp, QLORA, {"strategy": "full_shard", "layout": "packed"}),
        (engines.fsdp, FULL, {"strategy": "shard_grad"}),
        (engines.fsdp, FULL, {"strategy": "full_shard", "offload": "cpu"}),
        pytest.param(engines.deepspeed, LORA, {"stage": 2}, marks=without_deepspeed),
        pytest.param(engines.deepspeed, QLORA, {"stage": 3}, marks=without_deepspeed),
        pytest.param(engines.deepspeed, FULL, {"stage": 3}, marks=without_deepspeed),
        pytest.param(engines.deepspeed, FULL, {"stage": 2, "compute_dtype": "bfloat16"}, marks=without_deepspeed),
        pytest.param(engines.deepspeed, FULL, {"stage": 1, "offload_optimizer": "cpu"}, marks=without_deepspeed),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value.get("name", "+".join(map(str, value.values())))),
)
def test_the_rest_of_a_run_is_that_of_the_whole(
    ranks: dict[ModuleType, Ranks], tmp_path: Path, engine: ModuleType, method: dict[str, Any], knobs: dict[str, Any]
) -> None:
    """Of six steps the state is saved after two and four; the second run has it after four, and makes the last two."""
    job = make_job(tmp_path, "tied" if method is FULL else "llama", method, steps=6)
    places = Checkpoints(folder=tmp_path / "checkpoints", every=2)
    settings = {**KNOBS[engine], **knobs}
    whole = trained(ranks[engine], settings, replace(job, checkpoints=places))
    assert sorted(path.name for path in places.folder.iterdir()) == ["step-00000002", "step-00000004"]
    rest = trained(ranks[engine], settings, replace(with_train(job, "rest"), checkpoints=replace(places, made=4)))
    assert rest.losses == whole.losses[4:]
    assert rest.grad_norms == whole.grad_norms[4:]
    assert rest.tokens == whole.tokens[4:]
    saved, expected = (load_file(next(folder.glob("*.safetensors"))) for folder in (tmp_path / "rest", job.out))
    assert set(saved) == set(expected)
    assert all(torch.equal(saved[name], value) for name, value in expected.items())


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_hf_goes_on_in_one_process_too(tmp_path: Path, method: dict[str, Any]) -> None:
    job = make_job(tmp_path, "tied" if method is FULL else "llama", method, steps=6)
    places = Checkpoints(folder=tmp_path / "checkpoints", every=2)
    whole, rest, knobs = RecordingProbe(), RecordingProbe(), parse(engines.hf.Knobs, HF)
    engines.hf.train(replace(job, checkpoints=places), knobs, whole)
    assert sorted(path.name for path in places.folder.iterdir()) == ["step-00000002", "step-00000004"]
    engines.hf.train(replace(with_train(job, "rest"), checkpoints=replace(places, made=4)), knobs, rest)
    assert rest.losses == whole.losses[4:]
    assert rest.grad_norms == whole.grad_norms[4:]
    saved, expected = (load_file(next(folder.glob("*.safetensors"))) for folder in (tmp_path / "rest", job.out))
    assert set(saved) == set(expected)
    assert all(torch.equal(saved[name], value) for name, value in expected.items())
    with pytest.raises(UnsupportedError, match="only the state of optimizer=adamw is saved"):
        states.Plain(torch.nn.Linear(2, 2), torch.optim.SGD(torch.nn.Linear(2, 2).parameters()))


def test_only_the_last_two_states_are_kept(ranks: dict[ModuleType, Ranks], tmp_path: Path) -> None:
    places = Checkpoints(folder=tmp_path / "checkpoints", every=1)
    trained(ranks[engines.fsdp], test_fsdp.KNOBS, replace(make_job(tmp_path, steps=5), checkpoints=places))
    assert sorted(path.name for path in places.folder.iterdir()) == ["step-00000003", "step-00000004"]
