"""Every kernel, forward and gradients, against the reference operations in float64: odd shapes, strided rows, masked edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engines.native import reference
from engines.native.kernels.adamw import FlatAdamW
from engines.native.kernels.cross_entropy import cross_entropy_
from engines.native.kernels.embedding import embed
from engines.native.kernels.nf4 import decode_nf4
from engines.native.kernels.outer import add_outer_
from engines.native.kernels.parts import copy_parts
from engines.native.kernels.rms_norm import rms_norm, rms_norm_backward
from engines.native.kernels.swiglu import swiglu, swiglu_backward_
from engines.native.kernels.swiglu_gradients import swiglu_gradients_
from engines.native.nf4 import placed
from engines.native.optimizer import AdamW, clip_, step_scalars
from engines.native.weights import Arena, Linear, Weight
from harness.data.tokens import IGNORE
from harness.nf4 import decode, quantise
from harness.spec import Train
from tests.engines.oracle import DEVICE, EPSILON, INTERPRETED, judged, random

pytestmark = INTERPRETED
ROWS = [1, 5, 130]


def double(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def plain_linear(columns: int) -> Linear:
    weight = Weight(torch.zeros(1, columns, device=DEVICE))
    return Linear(weight.value, weight, None, ())


@pytest.mark.parametrize("columns", [7, 2048, 2100])
def test_embed(columns: int, dtype: torch.dtype) -> None:
    """Out of the memory of the GPU, and out of the host's: rows as they are, also those that come twice."""
    embedding, tokens = random(11, columns, dtype=dtype, room=5), torch.tensor([10, 0, 3, 3], device=DEVICE)
    assert embed(embedding, tokens).equal(reference.embed(embedding, tokens))
    on_host = embedding.cpu()
    found = embed(on_host.pin_memory() if DEVICE.type == "cuda" else on_host, tokens)
    assert found.device == tokens.device
    assert found.equal(reference.embed(embedding, tokens))
    with pytest.raises(ValueError, match="columns adjacent"):
        embed(embedding.t(), tokens)


@pytest.mark.parametrize("columns", [7, 64, 100])
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(rows: int, columns: int, dtype: torch.dtype) -> None:
    x, dy, residual = (random(rows, columns, dtype=dtype, room=room) for room in (0, 3, 9))
    w = (1 + 0.1 * random(columns)).to(dtype)
    y, inverse, _ = rms_norm(x, w, EPSILON, 5)
    assert (y[:, columns:] == 0).all()
    truth = reference.norm(x.double(), None, Weight(w.double()), EPSILON, plain_linear(columns))
    plain = reference.norm(x, None, Weight(w), EPSILON, plain_linear(columns))
    judged(y[:, :columns], plain.input.wide, truth.input.wide)
    torch.testing.assert_close(inverse.double(), truth.inverse, rtol=1e-6, atol=0)
    after, _, summed = rms_norm(x, w, EPSILON, 0, residual)
    assert summed.equal(x + residual)
    assert after.equal(rms_norm(summed, w, EPSILON, 0)[0])
    for residue in (residual, None):
        dx = rms_norm_backward(dy, x, w, inverse, residue, 8)
        assert (dx[:, columns:] == 0).all()
        wide = None if residue is None else residue.double()
        expected = reference.norm_backward(dy.double(), x.double(), truth.inverse, Weight(w.double()), wide, 0)
        usual = reference.norm_backward(dy, x, plain.inverse, Weight(w), residue, 0)
        judged(dx[:, :columns], usual, expected)


@pytest.mark.parametrize("columns", [3, 1024, 1500])
@pytest.mark.parametrize("rows", [1, 6])
def test_swiglu(rows: int, columns: int, dtype: torch.dtype) -> None:
    gate_up, dh = random(rows, 2 * columns, dtype=dtype, room=8), random(rows, columns, dtype=dtype)
    gate_up[0, 0], dh[0, 0] = 40.0, 1.0  # sigma is 1 there
    truth = reference.swiglu(gate_up.double(), plain_linear(columns)).wide
    plain = reference.swiglu(gate_up, plain_linear(columns)).wide
    h = swiglu(gate_up, 6)
    judged(h[:, :columns], plain, truth)
    assert (h[:, columns:] == 0).all()
    nothing, plain_group = random(rows, 1), plain_linear(columns)
    expected = reference.swiglu_backward(dh.double(), gate_up.double(), nothing, None, plain_group, plain_group)
    usual = reference.swiglu_backward(dh, gate_up, nothing, None, plain_group, plain_group)
    again, gradient = swiglu_backward_(dh, gate_up, 8)
    assert again.data_ptr() == dh.data_ptr()
    assert gradient.data_ptr() == gate_up.data_ptr()
    assert again.equal(h[:, :columns])
    judged(gradient[:, : 2 * columns], usual, expected)
    assert (gradient[:, 2 * columns :] == 0).all()


def test_swiglu_needs_the_room_it_is_asked_for() -> None:
    with pytest.raises(ValueError, match="rows of 8 elements in memory"):
        swiglu_backward_(random(2, 4), random(2, 8), 1)


@pytest.mark.parametrize(("tokens", "columns", "ranks"), [(1, 3, 2), (90, 130, 16), (300, 64, 5)])
def test_swiglu_with_thin_gradients(tokens: int, columns: int, ranks: int, dtype: torch.dtype) -> None:
    gate_up, dh = random(tokens, 2 * columns, dtype=dtype, room=8), random(tokens, columns, dtype=dtype)
    thin, low = random(tokens, ranks, dtype=dtype, room=3), random(tokens, 2 * ranks, dtype=dtype, room=1)
    arrived = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    before = random(ranks, columns), random(2 * columns, ranks)
    d_input, d_outputs = (each.clone() for each in before)
    h = reference.swiglu(gate_up, plain_linear(columns)).wide
    plain_group, nothing = plain_linear(columns), random(tokens, 1)
    wide = gate_up.double(), dh.double()
    right_h = reference.swiglu(wide[0], plain_linear(columns)).wide
    right = reference.swiglu_backward(wide[1], wide[0], nothing, None, plain_group, plain_group)
    usual = reference.swiglu_backward(dh, gate_up, nothing, None, plain_group, plain_group)
    expected_h = h.clone()
    gradient = swiglu_gradients_(dh, gate_up, 8, thin, low, d_input, d_outputs, arrived)
    assert gradient.data_ptr() == gate_up.data_ptr()
    assert not arrived.any()
    judged(gradient[:, : 2 * columns], usual, right)
    assert (gradient[:, 2 * columns :] == 0).all()
    judged(d_input, before[0] + (thin.t() @ expected_h).float(), before[0].double() + thin.double().t() @ right_h, dtype)
    for place, block in enumerate((slice(0, columns), slice(columns, 2 * columns))):
        mine = low[:, place * ranks : (place + 1) * ranks]
        truth = before[1][block].double() + right[:, block].t() @ mine.double()
        judged(d_outputs[block], before[1][block] + (usual[:, block].t() @ mine).float(), truth, dtype)


def test_swiglu_with_thin_gradients_refuses_what_does_not_fit() -> None:
    arrived = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    arguments = random(2, 4), random(2, 8), 0, random(2, 3), random(2, 6), random(3, 4), random(8, 3)
    with pytest.raises(ValueError, match=r"low is \[2, 5\]"):
        swiglu_gradients_(*arguments[:4], random(2, 5), *arguments[5:], arrived)
    with pytest.raises(ValueError, match="rows of 8 elements in memory"):
        swiglu_gradients_(*arguments[:2], 1, *arguments[3:], arrived)
    with pytest.raises(ValueError, match="0 counters"):
        swiglu_gradients_(*arguments, arrived[:0])


@pytest.mark.parametrize("vocabulary", [5, 8192, 9001])
def test_cross_entropy(vocabulary: int, dtype: torch.dtype) -> None:
    logits = 3 * random(4, vocabulary, dtype=dtype, room=3)
    targets = torch.tensor([0, vocabulary - 1, 1, 2], device=DEVICE)
    logits[1], scale = -1e4, torch.tensor(0.25, device=DEVICE)
    p = logits.double().softmax(1)
    expected = 0.25 * p.scatter_add(1, targets[:, None], -torch.ones_like(p))
    losses = torch.empty(4, device=DEVICE)
    right = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    cross_entropy_(logits, targets, losses, scale)
    torch.testing.assert_close(losses.double(), right, rtol=1e-6, atol=1e-6)
    judged(logits, expected.to(dtype), expected)
    ignored = random(1, vocabulary, dtype=dtype)
    cross_entropy_(ignored, torch.tensor([IGNORE], device=DEVICE), losses[:1], scale)
    assert losses[0] == 0
    assert not ignored.any()


@pytest.mark.parametrize(("tokens", "columns", "ranks"), [(1, 3, 2), (300, 70, 16), (140, 130, 48)])
@pytest.mark.parametrize("normed", [False, True])
def test_outer(tokens: int, columns: int, ranks: int, normed: bool, dtype: torch.dtype) -> None:
    x, thin = random(tokens, columns, dtype=dtype, room=2), random(tokens, ranks, dtype=dtype, room=5)
    inverse, w = torch.rand(tokens, device=DEVICE) + 0.5, (1 + 0.1 * random(columns)).to(dtype)
    before = random(ranks, columns)
    gradient = before.clone().t()
    arrived = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    add_outer_(gradient, x, thin, arrived, (inverse, w) if normed else None)
    assert not arrived.any()
    truth, scaled = x.double(), x
    if normed:
        truth = truth * inverse.double()[:, None] * w.double()
        scaled = (x.float() * inverse[:, None]).to(dtype) * w
    right = before.double().t() + truth.t() @ thin.double()
    judged(gradient, before.t() + (scaled.t() @ thin).float(), right, dtype)


def test_outer_of_three_blocks(dtype: torch.dtype) -> None:
    x, thin = random(300, 200, dtype=dtype), random(300, 3 * 4 + 2, dtype=dtype)
    gradient, arrived = torch.zeros(200, 4, device=DEVICE), torch.zeros(4, dtype=torch.int32, device=DEVICE)
    add_outer_(gradient, x, thin, arrived, starts=(64, 128))
    blocks = [(x[:, columns], thin[:, ranks]) for columns, ranks in ((slice(0, 64), slice(0, 4)), (slice(64, 128), slice(4, 8)))]
    blocks.append((x[:, 128:], thin[:, 8:12]))
    truth = torch.cat([wide.double().t() @ low.double() for wide, low in blocks])
    judged(gradient, torch.cat([(wide.t() @ low).float() for wide, low in blocks]), truth, dtype)
    again = torch.zeros_like(gradient)
    add_outer_(again, x, thin, arrived, starts=(64, 128))
    assert again.equal(gradient)


def test_adamw_is_that_of_torch_and_the_copies_follow() -> None:
    schedule = Train(
        steps=5, samples_per_step=1, learning_rate=0.1, schedule="linear", warmup_steps=0, weight_decay=0.1, beta1=0.9, beta2=0.99,
        epsilon=1e-6, max_grad_norm=2.0, seed=0,
    )  # fmt: skip
    sizes = [(3, 1500), (70, 33), (5, 7)]
    arenas = [Arena(sum(rows * columns for rows, columns in sizes), torch.float32, DEVICE) for _ in range(2)]
    weights = [[Weight(random(*size, room=11), arena.take(*size)) for size in sizes] for arena in arenas]
    arenas[0].masters.normal_()
    arenas[1].masters.copy_(arenas[0].masters)
    parameter = arenas[0].masters.clone().requires_grad_()
    torch_adamw = torch.optim.AdamW([parameter], betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    plain = AdamW(arenas[0], weights[0], schedule)
    fused = FlatAdamW(arenas[1].masters, [weight.value for weight in weights[1]], (0.9, 0.99), 1e-6, 0.1)
    for index in range(schedule.steps):
        gradient = torch.randn_like(arenas[0].gradients)
        parameter.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([parameter], 2.0)
        torch_adamw.param_groups[0]["lr"] = schedule.learning_rate_at(index)
        torch_adamw.step()
        for arena, optimizer in zip(arenas, (plain, fused), strict=True):
            arena.gradients.copy_(gradient)
            scalars = torch.tensor(step_scalars(schedule, index, 7), device=DEVICE)
            torch.testing.assert_close(clip_(arena.gradients, schedule.max_grad_norm, scalars), norm)
            optimizer.step(scalars)
            torch.testing.assert_close(arena.masters, parameter.detach(), rtol=1e-5, atol=1e-6)
            assert not arena.gradients.any()
    for each in weights:
        assert all(weight.value.equal(weight.master) for weight in each if weight.master is not None)


def test_a_tensor_that_does_not_fit_is_refused() -> None:
    x, thin = random(4, 6), random(4, 2)
    arrived = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for wrong, gradient, starts, counters in (
        (r"thin is \[4, 2\]", random(6, 3), (), arrived),
        (r"gradient is \[5, 2\]; expected \[6, ranks\]", random(5, 2), (), arrived),
        ("multiples of 64", random(6, 1), (3,), arrived),
        ("0 counters", random(6, 2), (), arrived[:0]),
    ):
        with pytest.raises(ValueError, match=wrong):
            add_outer_(gradient, x, thin, counters, starts=starts)
    with pytest.raises(ValueError, match="columns adjacent"):
        rms_norm(random(6, 4).t(), random(6), EPSILON, 0)
    with pytest.raises(ValueError, match="as many as the masters"):
        FlatAdamW(torch.zeros(3), [random(2, 2)], (0.9, 0.99), 1e-6, 0.1)


@pytest.mark.parametrize("size", [(5, 64), (130, 192), (3, 70), (64, 72), (300, 64)], ids=str)
def test_nf4_is_decoded_bit_by_bit(size: tuple[int, int], dtype: torch.dtype) -> None:
    weight = placed(quantise(0.02 * torch.randn(size).to(dtype)), DEVICE)
    rows, columns = size
    buffer = torch.full((rows + 1, columns + 9), 7.0, dtype=dtype, device=DEVICE)
    decode_nf4(weight, buffer[:rows, :columns])
    assert buffer[:rows, :columns].equal(decode(weight))
    assert (buffer[rows:] == 7).all()
    assert (buffer[:, columns:] == 7).all()
    with pytest.raises(ValueError, match="out"):
        decode_nf4(weight, buffer[:, :columns])


def test_nf4_is_decoded_where_its_bytes_lie_at_an_odd_address() -> None:
    weight = placed(quantise(0.02 * torch.randn(5, 64)), DEVICE)
    moved = replace(weight, packed=torch.cat([torch.zeros(1, dtype=torch.uint8, device=DEVICE), weight.packed.flatten()])[1:])
    found = torch.empty(5, 64, device=DEVICE)
    decode_nf4(moved, found)
    assert moved.packed.data_ptr() % 4
    assert found.equal(decode(weight))


@pytest.mark.parametrize("wide", [torch.float16, torch.float32], ids=str)
def test_nf4_is_decoded_by_way_of_the_type_that_it_was_stored_in(wide: torch.dtype) -> None:
    weight = placed(quantise(0.02 * torch.randn(64, 128).half()), DEVICE)
    found = torch.empty(64, 128, dtype=wide, device=DEVICE)
    decode_nf4(weight, found)
    assert found.equal(decode(weight).to(wide))


@pytest.mark.parametrize("sizes", [[(3, 40)], [(12, 70), (50, 4), (9, 4), (301, 4)], [(1, 2000), (1100, 3)]], ids=str)
def test_parts_come_to_their_places_and_nothing_else_changes(sizes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    values = [random(*size, dtype=dtype) for size in sizes]
    buffer = torch.full((sum(rows for rows, _ in sizes) + 2, max(columns for _, columns in sizes) + 5), 7.0, dtype=dtype, device=DEVICE)
    found, right, row = buffer.clone(), buffer.clone(), 1
    places = []
    for value in values:
        rows = slice(row, row := row + len(value))
        places.append(found[rows, 2 : 2 + value.shape[1]])
        right[rows, 2 : 2 + value.shape[1]] = value
    copy_parts(values, places)
    assert found.equal(right)


def test_parts_that_do_not_fit_their_places_are_refused() -> None:
    buffer, value = torch.zeros(8, 8, device=DEVICE), torch.ones(2, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"place 0 is \[2, 3\]"):
        copy_parts([value], [buffer[:2, :3]])
    with pytest.raises(ValueError, match=r"matrix 0 .* expected contiguous"):
        copy_parts([value.t()], [buffer[:4, :2]])
    with pytest.raises(ValueError, match="1 matrices for 2 places"):
        copy_parts([value], [buffer[:2, :4], buffer[2:4, :4]])
