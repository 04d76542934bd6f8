"""A full fine-tune: the store and its sections, updates inside backward, 8-bit moments in whole runs, and the kernels it adds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import engines.fused
from engines.native import full_ops, fused_ops, reference
from engines.native.checkpoint import load_weights, read_config
from engines.native.decoder import Decoder
from engines.native.footprint import stored_bytes
from engines.native.full import full_optimizer
from engines.native.gradient import Gradient
from engines.native.kernels.norm_weight import normed_again
from engines.native.kernels.rms_norm import rms_norm
from engines.native.loader import Placement
from engines.native.ops import NormSource
from engines.native.packed import Angles
from engines.native.plan import KEEP_ALL, KEEP_INPUT, Plan
from engines.native.shape import read_shape
from engines.native.store import BLOCK, OptimizerState, Store, Training
from engines.native.weights import DecoderWeights, Linear, Weight, named_weights
from harness.data.tokens import pack
from harness.engine import Job
from harness.spec import parse
from tests.engines.oracle import DEVICE, EPSILON, INTERPRETED, judged, random
from tests.engines.test_fused import KNOBS
from tests.engines.tiny import CPU, FULL, GPU, LLAMA, LONGEST, LORA, RecordingProbe, make_job, make_workload, with_train

INT8 = {"optimizer_state": "int8", "compute_dtype": "bfloat16"}


def run(job: Job, name: str, knobs: dict[str, Any], **train: Any) -> tuple[RecordingProbe, dict[str, Tensor]]:
    """What it reported, and the weights it left."""
    probe, own = RecordingProbe(), with_train(job, name, **train)
    engines.fused.train(own, parse(engines.fused.Knobs, {**KNOBS, **knobs}), probe)
    return probe, load_file(own.out / "model.safetensors")


def loaded(job: Job, training: Training, dtype: torch.dtype = torch.float32) -> DecoderWeights:
    shape = read_shape(read_config(job.base), LONGEST)
    return load_weights(job.base, shape, Placement(torch.device("cpu"), dtype, torch.float32, training=training), None)


@pytest.mark.parametrize("family", ["llama", "tied", "qwen2", "qwen3"])
def test_inside_backward_nothing_changes(tmp_path: Path, family: str) -> None:
    """Bit by bit, with a limit of the norm that is never reached on the other side."""
    job = make_job(tmp_path, family, FULL)
    inside, mine = run(job, "inside", {"micro_batch": 5}, max_grad_norm=None)
    after, other = run(job, "after", {"micro_batch": 5}, max_grad_norm=1e9)
    assert inside.losses == after.losses
    assert inside.grad_norms == pytest.approx(after.grad_norms, rel=1e-5)
    assert all(value.equal(other[name]) for name, value in mine.items())
    start = load_file(job.base / "model.safetensors")
    assert all(not value.equal(start[name]) for name, value in mine.items())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_inside_backward_in_eight_bits_too(tmp_path: Path, recompute: str) -> None:
    job = make_job(tmp_path, "tied", FULL)
    knobs = {**INT8, "micro_batch": 5, "recompute": recompute}
    inside, mine = run(job, "inside", knobs, max_grad_norm=None)
    after, other = run(job, "after", knobs, max_grad_norm=1e9)
    assert inside.losses == after.losses
    assert all(value.equal(other[name]) for name, value in mine.items())


def test_eight_bits_follow_float32(tmp_path: Path) -> None:
    """No further from float32 than bfloat16 with float32 masters is, give or take; the same again with the same seed."""
    job = make_job(tmp_path, "llama", FULL, steps=12, learning_rate=1e-3)
    truth, _ = run(job, "truth", {})
    plain, _ = run(job, "plain", {"compute_dtype": "bfloat16"})
    eight, mine = run(job, "eight", INT8)
    again, same = run(job, "again", INT8)
    learnt = truth.losses[0] - truth.losses[-1]
    assert learnt > 0.05
    off = [max(abs(a - b) for a, b in zip(each.losses, truth.losses, strict=True)) for each in (plain, eight)]
    assert off[1] < 0.02 + 2 * off[0]
    assert again.losses == eight.losses
    assert all(value.equal(same[name]) for name, value in mine.items())
    weight = "model.layers.0.mlp.up_proj.weight"
    assert mine[weight].equal(mine[weight].bfloat16().float()), "there are no masters"


@pytest.mark.parametrize("state", ["fp32", "int8"])
@pytest.mark.parametrize("family", ["llama", "tied"])
def test_a_store_holds_gradients_of_a_layer_at_a_time(tmp_path: Path, family: str, state: OptimizerState) -> None:
    job = make_job(tmp_path, family, FULL)
    held, passing = (loaded(job, Training(state, inside), torch.bfloat16) for inside in (False, True))
    assert isinstance(held.arena, Store)
    assert isinstance(passing.arena, Store)
    assert list(held.arena.sections) == ["embedding", 0, 1, "head"]
    count = len(held.arena.values)
    assert sum(weight.value[rows].numel() for _, weight, rows in named_weights(held)) <= count < 1.2 * count
    assert count % BLOCK == 0
    each = 2 if state == "int8" else 6
    assert stored_bytes(held) == (each + 4) * count
    sizes = {name: part.stop - part.start for name, part in held.arena.sections.items()}
    buffers = sizes[0] + (sizes["embedding"] + sizes["head"] if family == "tied" else max(sizes["embedding"], sizes["head"]))
    assert stored_bytes(passing) == each * count + 4 * buffers
    assert held.arena.state_bytes == (8 * count if state == "fp32" else 2 * count + 8 * count // BLOCK)


def test_a_weight_without_a_gradient_is_not_given_its_neighbours(tmp_path: Path) -> None:
    """The buffer of a layer's gradients holds another layer's from before."""
    weights = loaded(make_job(tmp_path, "llama", FULL), Training("fp32", in_backward=True))
    store = weights.arena
    assert isinstance(store, Store)
    schedule = make_workload(LLAMA, FULL, weight_decay=0.0).train
    optimizer: Any = full_optimizer(store, schedule, kernels=False)
    scalars = torch.tensor([1e-2, 0.1, 0.05, 1.0, 1.0, 0.0])
    first, second = (layer.gate_up.weight for layer in weights.layers)
    before = second.value.clone()
    first.add_gradient(torch.ones_like(first.value))
    optimizer.ready(0, scalars)
    optimizer.ready(1, scalars)
    assert second.value.equal(before)
    assert optimizer.norm() == pytest.approx(math.sqrt(first.value.numel()))


def test_a_gradient_begins_anew_once_it_was_used() -> None:
    gradient, left, right = Gradient(), random(5, 3), random(5, 4)
    gradient.place(torch.full((3, 4), float("nan"), device=DEVICE))
    gradient.add_product(left, right)
    gradient.add_product(left, right)
    torch.testing.assert_close(gradient.buffer, 2 * left.t() @ right)
    gradient.expect(empty=True)
    gradient.add(torch.ones(3, 4, device=DEVICE))
    assert (gradient.settled() == 1).all()
    gradient.expect(empty=True)
    assert (gradient.settled() == 0).all()


REASONS = [
    (LORA, {"optimizer_state": "int8", "compute_dtype": "bfloat16"}, "optimizer_state=int8 is for method=full"),
    (FULL, {"optimizer_state": "int8"}, "needs compute_dtype=bfloat16"),
    ({**FULL, "dtype": "bfloat16"}, INT8, "method.dtype=float32"),
    ({**FULL, "dtype": "bfloat16"}, {"operations": "fused", "compute_dtype": "bfloat16"}, "trains float32 masters"),
]


@pytest.mark.parametrize(("method", "knobs", "reason"), REASONS)
def test_what_it_cannot_do_is_said(method: dict[str, Any], knobs: dict[str, Any], reason: str) -> None:
    said = engines.fused.unsupported(make_workload(LLAMA, method), parse(engines.fused.Knobs, {**KNOBS, **knobs}), GPU)
    assert said is not None
    assert reason in said


def test_a_gpu_trains_everything_with_the_fused_operations() -> None:
    knobs = {**KNOBS, "operations": "fused", "compute_dtype": "bfloat16", "replay": True}
    for state in ("fp32", "int8"):
        assert (
            engines.fused.unsupported(make_workload(LLAMA, FULL), parse(engines.fused.Knobs, {**knobs, "optimizer_state": state}), GPU)
            is None
        )
    assert engines.fused.unsupported(make_workload(LLAMA, FULL), parse(engines.fused.Knobs, knobs), CPU) is not None


# The operations, in the interpreter or on a GPU.


def trained(value: Tensor) -> Weight:
    gradient = Gradient()
    gradient.place(torch.zeros(value.shape, dtype=torch.float64 if value.dtype == torch.float64 else torch.float32, device=value.device))
    return Weight(value, value, gradient)


@INTERPRETED
@pytest.mark.parametrize("columns", [7, 64, 130])
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_a_norms_weight_and_its_output_again(rows: int, columns: int, dtype: torch.dtype) -> None:
    x, dy = random(rows, columns, dtype=dtype, room=3), random(rows, columns, dtype=dtype, room=9)
    w = (1 + 0.1 * random(columns)).to(dtype)
    y, inverse, _ = rms_norm(x, w, EPSILON, 0)
    torch.testing.assert_close(normed_again(x, w, inverse), y, rtol=3e-7 if dtype == torch.float32 else 0, atol=0)
    mine, plain, truth = trained(w), trained(w), trained(w.double())
    for backward, each, wide in (
        (full_ops.norm_backward, mine, (dy, x, inverse)), (reference.norm_backward, plain, (dy, x, inverse)),
        (reference.norm_backward, truth, (dy.double(), x.double(), inverse.double())),
    ):  # fmt: skip
        dx = backward(*wide, each, None, 0)
    assert dx.shape == x.shape
    assert mine.gradient is not None
    assert plain.gradient is not None
    assert truth.gradient is not None
    judged(mine.gradient[None], plain.gradient[None], truth.gradient[None])
    before = mine.gradient.clone()
    full_ops.plain_norm_backward(dy, x, mine, EPSILON)
    torch.testing.assert_close(mine.gradient, 2 * before, rtol=1e-4, atol=1e-5)


@INTERPRETED
def test_the_gradients_of_a_group_behind_a_norm(dtype: torch.dtype) -> None:
    x, dy, w = random(21, 12, dtype=dtype), random(21, 10, dtype=dtype), (1 + 0.1 * random(12)).to(dtype)
    _, inverse, _ = rms_norm(x, w, EPSILON, 0)

    def gradients(operation: Any, kind: torch.dtype) -> list[Tensor]:
        weight, bias = trained(torch.zeros(10, 12, device=DEVICE, dtype=kind)), trained(torch.zeros(10, device=DEVICE, dtype=kind))
        group = Linear(weight.value, weight, bias, ())
        wide = inverse.double() if kind == torch.float64 else inverse
        operation(dy.to(kind), NormSource(x.to(kind), wide, Weight(w.to(kind))), group)
        operation(dy.to(kind), NormSource(x.to(kind), wide, Weight(w.to(kind))), group)
        assert weight.gradient is not None
        assert bias.gradient is not None
        return [weight.gradient, bias.gradient[None]]

    found, plain = gradients(full_ops.weight_gradients, dtype), gradients(reference.weight_gradients, dtype)
    for mine, usual, right in zip(found, plain, gradients(reference.weight_gradients, torch.float64), strict=True):
        judged(mine, usual, right, dtype)


@INTERPRETED
def test_cross_entropy_and_its_head(dtype: torch.dtype) -> None:
    hidden, head = random(9, 16, dtype=dtype), (0.3 * random(40, 16)).to(dtype)
    targets = torch.randint(40, (9,), device=DEVICE)
    targets[4] = -100
    scale = torch.tensor(0.125, device=DEVICE)

    def made(operation: Any, kind: torch.dtype) -> list[Tensor]:
        weight = trained(head.to(kind))
        losses, d_hidden = operation(hidden.to(kind), weight, targets, scale.to(kind) if kind == torch.float64 else scale, 4)
        assert weight.gradient is not None
        return [losses[:, None], d_hidden, weight.gradient]

    truth = made(reference.cross_entropy, torch.float64)
    for mine, usual, right in zip(made(fused_ops.cross_entropy, dtype), made(reference.cross_entropy, dtype), truth, strict=True):
        keep = right.norm(dim=1) > 0
        judged(mine[keep], usual[keep], right[keep], dtype)
        assert not mine[~keep].any()


@INTERPRETED
def test_swiglu_leaves_the_gradient_of_what_reads_it(dtype: torch.dtype) -> None:
    gate_up, d_h, dy = random(21, 24, dtype=dtype), random(21, 12, dtype=dtype), random(21, 10, dtype=dtype)

    def made(operation: Any, kind: torch.dtype) -> list[Tensor]:
        weight = trained(torch.zeros(10, 12, device=DEVICE, dtype=kind))
        down, group = Linear(weight.value, weight, None, ()), Linear(torch.zeros(24, 8), Weight(torch.zeros(24, 8)), None, ())
        gradient = operation(d_h.to(kind, copy=True), gate_up.to(kind, copy=True), dy.to(kind), None, down, group)
        assert weight.gradient is not None
        return [gradient, weight.gradient]

    truth = made(reference.swiglu_backward, torch.float64)
    for mine, usual, right in zip(made(full_ops.swiglu_backward, dtype), made(reference.swiglu_backward, dtype), truth, strict=True):
        judged(mine, usual, right, dtype)


def test_the_table_differs_from_the_adapters_where_weights_are_trained() -> None:
    changed = {"norm_backward", "plain_norm_backward", "rotate_back", "weight_gradients", "swiglu_backward"}
    table, other = full_ops.FUSED_FULL, fused_ops.FUSED
    assert {name for name in type(table).__slots__ if getattr(table, name) is not getattr(other, name)} == changed


@INTERPRETED
@pytest.mark.parametrize(
    ("family", "plan"), [("llama_biases", KEEP_ALL), ("qwen3", KEEP_INPUT), ("qwen2", Plan(KEEP_ALL.kept - {"gate_up"}, pieces=3))]
)
def test_a_whole_pass_of_the_kernels_makes_the_gradients_of_the_reference(tmp_path: Path, family: str, plan: Plan) -> None:
    """In float32, attention by the reference: cuDNN and FlashAttention are for a GPU's bfloat16 only."""
    job = make_job(tmp_path, family, FULL)
    ops = replace(full_ops.FUSED_FULL, attention=reference.attention, attention_backward=reference.attention_backward)
    found = {}
    for name, table in (("kernels", ops), ("reference", reference.REFERENCE)):
        shape = read_shape(read_config(job.base), LONGEST)
        weights = load_weights(job.base, shape, Placement(DEVICE, torch.float32, torch.float32), None)
        native = Decoder(shape=shape, weights=weights, ops=table, plans=(plan,) * shape.num_layers, loss_chunk=5)
        samples = job.tokens.step(job.workload.train, 0)[:2]
        row = Angles.of(shape, LONGEST, DEVICE).pack(pack(samples))
        ready: list[Any] = []
        losses = native.accumulate(row, torch.tensor(0.1, device=DEVICE), ready.append)
        assert ready == ["head", 1, 0, "embedding"]
        gradients = {key: weight.gradient[rows] for key, weight, rows in named_weights(weights) if weight.gradient is not None}
        found[name] = {**gradients, "losses": losses}
    assert len(found["kernels"]) > 12
    for key, right in found["reference"].items():
        assert torch.linalg.vector_norm(right) > 1e-6, key
        assert torch.linalg.vector_norm(found["kernels"][key] - right) < 3e-5 * torch.linalg.vector_norm(right), key
