"""``method=lora_fp8``: one function for hf and fused, its gradient straight through the rounding, and what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import engines.axolotl
import engines.fsdp
import engines.fused
import engines.hf
import engines.unsloth
from engines.native import fp8_reference
from engines.native.bench import random_weights
from engines.native.checkpoint import load_weights, read_config
from engines.native.decoder import Decoder
from engines.native.footprint import stored_bytes
from engines.native.fp8 import Fp8Weight, check_not_outgrown, outgrown
from engines.native.fp8_reasons import Mode, device_reasons
from engines.native.fp8_reference import REFERENCE_FP8
from engines.native.loader import Placement
from engines.native.lora import read_adapter
from engines.native.ops import Input
from engines.native.plan import KEEP_ALL
from engines.native.shape import read_shape
from engines.native.turns import SharedBuffers
from engines.native.weights import Linear, Part, Weight
from harness import score
from harness.engine import Job
from harness.errors import UnsupportedError
from harness.fp8 import ACTIVATION_MOST, LARGEST, WEIGHT_MOST, decode_rows, emulate, quantise_rows, rounded
from harness.places import Prepared, ScoreRequest
from harness.spec import parse
from harness.weights.base_model import Base, as_fp8
from tests.engines.test_fused import KNOBS as FUSED
from tests.engines.test_fused import gradients, packed
from tests.engines.test_hf import KNOBS as HF
from tests.engines.tiny import CPU, FAMILIES, FULL, GPU, LLAMA, LONGEST, LORA, RecordingProbe, make_job, make_workload, with_train

LORA_FP8 = {**LORA, "name": "lora_fp8"}
BOTH = {**FUSED, "fp8": "forward_and_input_gradients"}
MODES: list[Mode] = ["forward", "forward_and_input_gradients"]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path, method=LORA_FP8)


def run(engine: ModuleType, job: Job, knobs: dict[str, Any]) -> RecordingProbe:
    probe = RecordingProbe()
    engine.train(job, parse(engine.Knobs, knobs), probe)
    return probe


def test_rows_are_rounded_to_a_sixteenth_of_a_value() -> None:
    values = torch.randn(5, 300)
    values[2] = 0
    codes, scales = quantise_rows(values, ACTIVATION_MOST)
    back = decode_rows(codes, scales)
    assert codes.float().abs().amax(1).tolist() == [ACTIVATION_MOST, ACTIVATION_MOST, 0, ACTIVATION_MOST, ACTIVATION_MOST]
    assert back[2].equal(values[2])
    least = scales.unsqueeze(1) * 2.0**-10  # below the smallest normal code steps are of one size
    assert ((back - values).abs() <= torch.maximum(values.abs() / 16, least)).all()
    assert 0.015 < float((back - values).norm() / values.norm()) < 0.035
    again, _ = quantise_rows(back, ACTIVATION_MOST)
    assert decode_rows(again, scales).equal(back)


def test_the_gradient_passes_straight_through() -> None:
    values = torch.randn(3, 8, requires_grad=True)
    weights = torch.randn(3, 8)
    (rounded(values) * weights).sum().backward()
    assert values.grad is not None
    assert values.grad.equal(weights)


def group(mode: Mode, dtype: torch.dtype) -> tuple[Linear, Tensor]:
    weight = 0.2 * torch.randn(6, 10)
    fp8 = Fp8Weight.of(weight, mode, "group", SharedBuffers(), 0, dtype)
    codes = fp8.forward.plain
    return Linear(codes, Weight(codes), None, (Part("group", slice(0, 6)),), fp8=fp8), weight


@pytest.mark.parametrize("mode", MODES)
def test_a_group_is_its_definition_and_its_gradient_that_of_autograd(mode: Mode) -> None:
    linear, weight = group(mode, torch.float32)
    x, dy = torch.randn(4, 10, requires_grad=True), torch.randn(4, 6)
    y = rounded(x) @ decode_rows(*quantise_rows(weight, WEIGHT_MOST)).t()
    y.backward(dy)
    assert x.grad is not None
    torch.testing.assert_close(fp8_reference.linear(Input(x.detach(), None), linear, 0), y.detach())
    found = fp8_reference.input_gradient(dy, linear)
    if mode == "forward":
        torch.testing.assert_close(found, x.grad)
        return
    rough = decode_rows(*quantise_rows(dy, fp8_reference.GRADIENT_MOST))
    torch.testing.assert_close(found, rough @ decode_rows(*quantise_rows(weight.t(), WEIGHT_MOST)).t())
    assert 0.001 < (found - x.grad).norm() / x.grad.norm() < 0.1


def test_fused_follows_the_truth(job: Job) -> None:
    """Where float32 rounds otherwise a value may fall to the next code, so losses agree less closely than those of other methods."""
    found, right = run(engines.fused, with_train(job, "fused"), FUSED), run(engines.hf, job, HF)
    assert found.losses == pytest.approx(right.losses, rel=2e-3)
    assert found.grad_norms == pytest.approx(right.grad_norms, rel=5e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_but_for_such_roundings_they_are_the_same(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the inputs of both left as they are."""
    job = make_job(tmp_path, family, LORA_FP8, steps=2, warmup_steps=1)
    monkeypatch.setattr("harness.fp8.rounded", lambda values: values)
    monkeypatch.setattr(fp8_reference, "rounded", lambda values: values)
    found, right = run(engines.fused, with_train(job, "fused"), FUSED), run(engines.hf, job, HF)
    assert found.losses == pytest.approx(right.losses, rel=2e-5)
    assert found.grad_norms == pytest.approx(right.grad_norms, rel=1e-4)


def test_it_is_scored_as_it_is_trained(job: Job, tmp_path: Path) -> None:
    """The neutral evaluator rounds as well, and a score of it is none of the same weights in bf16."""
    place = Prepared(tokens="", base=str(job.base), adapter_init=None, base_sha256="b" * 64, adapter_init_sha256=None, notes=())
    request = ScoreRequest(workload=job.workload, prepared=place, items=(), device="cpu")
    plain = request.model_copy(update={"workload": make_workload(LLAMA, LORA)})
    ids = torch.arange(20)[None]
    found, bare = (score._base(each)(input_ids=ids).logits for each in (request, plain))
    mine = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32)
    emulate(mine)
    assert found.equal(mine(input_ids=ids).logits)
    assert 0.001 < (found - bare).norm() / bare.norm() < 0.2
    base = Base(job.base, "b" * 64, "tiny", {}, "t" * 64)
    assert as_fp8(base).path == base.path
    assert as_fp8(base).sha256 != base.sha256


def test_the_function_is_another_than_that_of_lora(job: Job, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    plain = make_job(tmp_path / "lora")
    plain = replace(plain, base=job.base, adapter_init=job.adapter_init)
    found, other = run(engines.hf, job, HF).losses, run(engines.hf, plain, HF).losses
    assert all(abs(a - b) > 1e-4 for a, b in zip(found, other, strict=True))
    assert found == pytest.approx(other, rel=0.05)


def decoder(job: Job, mode: Mode) -> Decoder:
    shape = read_shape(read_config(job.base), LONGEST)
    assert job.adapter_init is not None
    placement = Placement(torch.device("cpu"), torch.float32, torch.float32, fp8=mode)
    weights = load_weights(job.base, shape, placement, read_adapter(job.adapter_init))
    return Decoder(shape=shape, weights=weights, ops=REFERENCE_FP8, plans=(KEEP_ALL,) * shape.num_layers, loss_chunk=7)


def test_gradients_in_eight_bits_are_near_those_in_full(job: Job) -> None:
    made = []
    for mode in MODES:
        native = decoder(job, mode)
        losses = native.accumulate(packed(native, job.tokens.step(job.workload.train, 0)), torch.tensor(1.0))
        made.append((losses, gradients(native)))
    assert made[0][0].equal(made[1][0])
    for name, right in made[0][1].items():
        found = made[1][1][name]
        cosine = torch.nn.functional.cosine_similarity(found.flatten(), right.flatten(), dim=0)
        assert 0.98 < cosine <= 1.00001, name
    assert any(not found.equal(made[0][1][name]) for name, found in made[1][1].items())


@pytest.mark.parametrize("knobs", [{"recompute": "full"}, {"recompute": "fit", "memory_gib": 0.0012}], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_plan_changes_nothing(job: Job, knobs: dict[str, Any], mode: Mode) -> None:
    usual, other = (
        run(engines.fused, with_train(job, "usual"), {**FUSED, "fp8": mode}),
        run(engines.fused, job, {**FUSED, "fp8": mode, **knobs}),
    )
    assert other.losses == pytest.approx(usual.losses, rel=1e-4)


def test_what_stays(job: Job) -> None:
    """A byte a value and a scale a row, once or twice; one buffer for each of four groups where gradients are not in 8 bits."""
    once, twice = (decoder(job, mode) for mode in MODES)
    shape, rank = once.shape, LORA["rank"]
    heads, hidden, inner = shape.query_size + 2 * shape.key_size, shape.hidden_size, shape.intermediate_size
    groups = ((heads, hidden, 3), (hidden, shape.query_size, 1), (2 * inner, hidden, 2), (hidden, inner, 1))
    layers = shape.num_layers
    assert isinstance(rank, int)
    forward = layers * sum((rows + parts * rank) * (columns + 3 * parts * rank + 4) for rows, columns, parts in groups)
    turned = layers * sum(columns * (rows + 3 * parts * rank + 4) for rows, columns, parts in groups)
    thin = layers * sum(4 * parts * rank * (rows + columns) for rows, columns, parts in groups)
    buffers = sum(4 * (rows + parts * rank) * columns for rows, columns, parts in groups)
    rest = 4 * (2 * shape.vocab_size * hidden + (1 + 2 * layers) * hidden) + 2 * once.weights.arena.masters.nbytes
    assert stored_bytes(once.weights) == forward + thin + buffers + rest
    assert stored_bytes(twice.weights) == forward + turned + thin + rest


def test_adapters_are_saved_and_move(job: Job) -> None:
    run(engines.fused, job, BOTH)
    assert job.adapter_init is not None
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (job.adapter_init, job.out))
    assert before.keys() == after.keys()
    assert all(not after[name].equal(value) for name, value in before.items())


def test_an_adapter_beyond_its_room_is_an_error(job: Job) -> None:
    native = decoder(job, "forward_and_input_gradients")
    fp8 = native.weights.layers[1].down.fp8
    assert fp8 is not None
    assert outgrown(fp8) > 0
    for layer in native.weights.layers:
        for each in layer.groups:
            assert each.fp8 is not None
            each.fp8.up.fill_(1e-3)
            each.fp8.down.fill_(1e-3)
    check_not_outgrown(native.weights.layers)
    fp8.up[3, 0] = 1.25 * LARGEST * fp8.forward.scales[3]
    with pytest.raises(UnsupportedError, match=r"layer 1, mlp.down_proj: adapter weights are 1.25 times what 8-bit products hold"):
        check_not_outgrown(native.weights.layers)


def others() -> Iterator[Any]:
    from harness.compose import compose_all, plain

    for engine in (engines.unsloth, engines.axolotl, engines.fsdp):
        composed = compose_all([f"engine={engine.__name__.rpartition('.')[2]}"], multirun=False)[0][1]
        yield engine, parse(engine.Knobs, plain(composed)["engine"]["knobs"])


def test_who_does_not_train_it_says_so() -> None:
    workload = make_workload(LLAMA, LORA_FP8)
    for engine, knobs in others():
        assert "does not train method=lora_fp8" in (engine.unsupported(workload, knobs, CPU) or ""), engine
    state_space = make_workload({"model_type": "mamba"}, LORA_FP8)
    assert "reads weights past its linear modules" in (engines.hf.unsupported(state_space, parse(engines.hf.Knobs, HF), CPU) or "")
    fused = parse(engines.fused.Knobs, {**FUSED, "operations": "fused", "compute_dtype": "bfloat16"})
    said = engines.fused.unsupported(workload, fused, GPU)
    assert said == "8-bit products take whole multiples of 16, the model has intermediate_size=72; use operations=reference"
    assert engines.fused.unsupported(make_workload({**LLAMA, "intermediate_size": 96}, LORA_FP8), fused, GPU) is None
    assert "compute capability 8.6; they begin at 8.9" in device_reasons("RTX 3090", (8, 6))[0]
    assert device_reasons("RTX 4090", (8, 9)) == device_reasons("H100", (9, 0)) == []


def test_all_weights_cannot_be_trained_in_it(job: Job) -> None:
    shape = read_shape(read_config(job.base), LONGEST)
    placement = Placement(torch.device("cpu"), torch.float32, torch.float32, fp8="forward")
    with pytest.raises(UnsupportedError, match="weights in fp8 cannot be trained"):
        load_weights(job.base, shape, placement, None)
    assert make_workload(LLAMA, FULL).method.name == "full"


def test_the_bench_makes_such_a_decoder() -> None:
    placement = Placement(torch.device("cpu"), torch.float32, torch.float32, 8, fp8="forward")
    weights = random_weights(read_shape({**LLAMA, "hidden_size": 64}, LONGEST), placement)
    assert all(each.fp8 is not None for layer in weights.layers for each in layer.groups)
