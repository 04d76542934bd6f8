"""``method=qlora``: every engine that trains it makes the losses of LoRA on the decoded base, from the same packed bytes."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import engines.fused
import engines.hf
from engines.native.bench import random_weights
from engines.native.footprint import stored_bytes
from engines.native.loader import Placement
from engines.native.plan import KEEP_ALL, KEEP_INPUT, Plan
from engines.native.shape import read_shape
from engines.native.turns import Turn
from harness.engine import Job
from harness.errors import UnsupportedError
from harness.spec import parse
from tests.engines.test_fused import KNOBS as FUSED
from tests.engines.test_fused import decoder, packed
from tests.engines.test_hf import KNOBS as HF
from tests.engines.tiny import CPU, FAMILIES, FULL, GPU, LLAMA, LONGEST, QLORA, RecordingProbe, decoded, make_job, make_workload, with_train

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
BF16 = {**HF, "compute_dtype": "bfloat16"}


WHOLE_BLOCKS = {**LLAMA, "hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Rows of 32 and 72 values: blocks cross them."""
    return make_job(tmp_path, method=QLORA)


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setitem(FAMILIES, "whole_blocks", WHOLE_BLOCKS)
    return make_job(tmp_path, "whole_blocks", QLORA)


def run(engine: ModuleType, job: Job, knobs: dict[str, Any]) -> RecordingProbe:
    probe = RecordingProbe()
    engine.train(job, parse(engine.Knobs, knobs), probe)
    return probe


def test_the_truth_is_lora_on_the_decoded_base(job: Job) -> None:
    """hf in float32, without bitsandbytes."""
    found, right = run(engines.hf, with_train(job, "packed"), HF), run(engines.hf, decoded(job), HF)
    assert (found.losses, found.grad_norms) == (right.losses, right.grad_norms)


def test_the_base_was_changed_by_nf4(job: Job, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = make_job(tmp_path / "plain")
    assert run(engines.hf, job, HF).losses[0] != pytest.approx(run(engines.hf, plain, HF).losses[0], rel=1e-4)


@needs_bitsandbytes
@pytest.mark.parametrize("knobs", [{}, {"adapter_compute": "direct"}, {"layout": "packed", "attention": "eager"}], ids=str)
def test_bitsandbytes_in_bfloat16_is_lora_on_the_decoded_base(whole: Job, knobs: dict[str, Any]) -> None:
    found, right = run(engines.hf, with_train(whole, "packed"), {**BF16, **knobs}), run(engines.hf, decoded(whole), {**BF16, **knobs})
    assert found.losses == pytest.approx(right.losses, rel=1e-3)
    assert found.grad_norms == pytest.approx(right.grad_norms, rel=2e-2)


@needs_bitsandbytes
def test_bitsandbytes_keeps_the_linear_layers_packed(whole: Job) -> None:
    from bitsandbytes.nn import Linear4bit

    model = engines.hf._load(whole, parse(engines.hf.Knobs, BF16))
    packed = [module for module in model.modules() if isinstance(module, Linear4bit) and not hasattr(module, "base_layer")]
    assert len(packed) == 7 * LLAMA["num_hidden_layers"]  # type: ignore[operator]
    assert all(module.weight.dtype == torch.uint8 and module.compute_dtype == torch.bfloat16 for module in packed)


def test_hf_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    work, knobs = make_workload(LLAMA, QLORA), parse(engines.hf.Knobs, BF16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    assert "no whole blocks of 64: hidden_size=32, intermediate_size=72" in (engines.hf.unsupported(work, knobs, CPU) or "")
    assert engines.hf.unsupported(work, knobs, GPU) is None
    assert engines.hf.unsupported(make_workload(WHOLE_BLOCKS, QLORA), knobs, CPU) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs the package bitsandbytes" in (engines.hf.unsupported(work, knobs, CPU) or "")
    assert engines.hf.unsupported(work, parse(engines.hf.Knobs, HF), CPU) is None
    state_space = make_workload({"model_type": "mamba"}, QLORA)
    assert "reads weights past bitsandbytes' modules" in (engines.hf.unsupported(state_space, knobs, CPU) or "")


SUBSET = {**QLORA, "targets": ("v_proj", "down_proj", "q_proj")}


@pytest.mark.parametrize("method", [QLORA, SUBSET], ids=["qlora", "subset"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_makes_the_bits_of_lora_on_the_decoded_base(tmp_path: Path, family: str, method: dict[str, Any]) -> None:
    job = make_job(tmp_path, family, method)
    found, right = run(engines.fused, with_train(job, "packed"), FUSED), run(engines.fused, decoded(job), FUSED)
    assert (found.losses, found.grad_norms) == (right.losses, right.grad_norms)
    saved = [load_file(job.out.parent / name / "adapter_model.safetensors") for name in ("packed", "of_decoded")]
    assert all(value.equal(saved[1][name]) for name, value in saved[0].items())


@pytest.mark.parametrize("knobs", [{"recompute": "full"}, {"micro_batch": 1}, {"recompute": "fit", "memory_gib": 0.001}], ids=str)
def test_fused_decodes_again_what_was_overwritten(job: Job, knobs: dict[str, Any]) -> None:
    usual, other = run(engines.fused, with_train(job, "usual"), FUSED), run(engines.fused, job, {**FUSED, **knobs})
    assert other.losses == pytest.approx(usual.losses, rel=2e-6)


def test_fused_follows_the_truth(job: Job) -> None:
    found, right = run(engines.fused, with_train(job, "fused"), FUSED), run(engines.hf, job, HF)
    assert found.losses == pytest.approx(right.losses, rel=2e-5)
    assert found.grad_norms == pytest.approx(right.grad_norms, rel=1e-4)


@pytest.mark.parametrize("plan", [KEEP_ALL, KEEP_INPUT, Plan(KEEP_ALL.kept - {"gate_up"}, pieces=2)], ids=["all", "input", "pieces"])
def test_a_weight_is_decoded_at_most_twice_a_pass(job: Job, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    native = decoder(job, plan)
    decodes: Counter[int] = Counter()
    taken = Turn.take

    def take(turn: Turn) -> None:
        decodes[id(turn)] += turn.shared.holder is not turn
        taken(turn)

    monkeypatch.setattr(Turn, "take", take)
    native.accumulate(packed(native, job.tokens.step(job.workload.train, 0)), torch.tensor(1.0))
    turns = [group.turn for layer in native.weights.layers for group in layer.groups]
    counts = [decodes[id(turn)] for turn in turns]
    # The last layer's are still there when backward begins, and the lowest input needs no gradient.
    assert counts == [1 if "heads" in plan.kept else 2, 2, 2, 2, 1, 1, 1, 1]
    assert len({turn.shared.buffer.data_ptr() for turn in turns if turn is not None}) == 4


def test_the_next_turn_is_filled_beside_this_one(job: Job) -> None:
    """Filled only when somebody waits for it, which is as late as it may be: whoever read without waiting would read another group's."""
    started: list[bool] = []

    def late(work: Callable[[], None]) -> Callable[[], None]:
        started.append(False)
        index = len(started) - 1

        def wait() -> None:
            work()
            started[index] = True

        return wait

    plain, ahead = decoder(job, KEEP_ALL), decoder(job, KEEP_ALL)
    ahead.weights.shared._order.start = late
    for index, plans in enumerate((KEEP_ALL, KEEP_ALL, KEEP_INPUT, KEEP_INPUT)):  # another plan has another order
        one, other = (replace(native, plans=(plans,) * native.shape.num_layers) for native in (plain, ahead))
        batch = job.tokens.step(job.workload.train, index)
        losses = [native.accumulate(packed(native, batch), torch.tensor(1.0)) for native in (one, other)]
        assert losses[0].equal(losses[1])
        assert one.weights.arena.gradients.equal(other.weights.arena.gradients)
        if index == 1:
            # Forward 7 of 8 groups; backward the lower layer's 3 that are needed again. In the first pass nobody knew the order.
            assert started == [True] * 10
    assert len(started) > 20
    assert all(started)


def test_what_stays_is_packed_and_counted(job: Job, tmp_path: Path) -> None:
    """0.516 bytes a value, one buffer for each of four groups, and a copy of the adapters beside masters and gradients."""
    native = decoder(job, KEEP_ALL)
    layers, shape = native.weights.layers, native.shape
    hidden, inner, heads = shape.hidden_size, shape.intermediate_size, shape.query_size + 2 * shape.key_size
    values = [hidden * shape.query_size, *2 * [hidden * shape.key_size], shape.query_size * hidden, *3 * [hidden * inner]]
    blocks = [-(-count // 64) for count in values]
    packed_bytes = sum(values) // 2 + sum(blocks) + 4 * sum(-(-count // 256) for count in blocks) + 7 * 4 * (16 + 256)
    sizes = ((heads, hidden, 16), (hidden, shape.query_size, 8), (2 * inner, hidden, 8), (hidden, inner, 8))  # ranks padded to eights
    buffers = sum(4 * (rows + rank) * (columns + rank) for rows, columns, rank in sizes)
    adapters = native.weights.arena.masters.nbytes
    rest = 4 * (2 * shape.vocab_size * hidden + (1 + 2 * len(layers)) * hidden)
    assert stored_bytes(native.weights) == len(layers) * packed_bytes + buffers + 3 * adapters + rest


def test_fused_loads_what_transformers_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that bitsandbytes quantised and transformers wrote."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.setitem(FAMILIES, "whole_blocks", WHOLE_BLOCKS)
    job = make_job(tmp_path, "whole_blocks", QLORA)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, quantization_config=how, device_map={"": "cpu"})
    model.save_pretrained(tmp_path / "theirs")
    theirs = replace(with_train(job, "of_theirs"), base=tmp_path / "theirs")
    found, right = run(engines.fused, theirs, FUSED), run(engines.hf, replace(with_train(job, "truth"), base=tmp_path / "theirs"), HF)
    assert found.losses == pytest.approx(right.losses, rel=2e-5)
    assert found.losses == pytest.approx(run(engines.fused, job, FUSED).losses, rel=1e-3)


def test_all_weights_of_such_a_base_cannot_be_trained(job: Job) -> None:
    full = replace(job, workload=make_workload(LLAMA, FULL), adapter_init=None)
    with pytest.raises(UnsupportedError, match="stored in NF4, whose weights cannot be trained"):
        run(engines.fused, full, FUSED)


def test_a_group_half_in_nf4_is_refused(job: Job) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors, plain = load_file(job.base / "model.safetensors"), load_file(job.out.parent / "base" / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if not key.startswith(name)}
    save_file({**kept, name: plain[name]}, job.base / "model.safetensors")
    with pytest.raises(UnsupportedError, match=f"{name} is not in NF4, others of its group are"):
        run(engines.fused, job, FUSED)


def test_the_bench_makes_such_a_decoder() -> None:
    placement = Placement(torch.device("cpu"), torch.float32, torch.float32, 8)
    weights = random_weights(read_shape(WHOLE_BLOCKS, LONGEST), placement, nf4=True)
    assert all(group.turn is not None for layer in weights.layers for group in layer.groups)
    group = weights.layers[0].down
    assert 0.015 < float(group.wide[:64, :128].std()) < 0.025
