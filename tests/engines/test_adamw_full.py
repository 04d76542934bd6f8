"""AdamW on flat weights: 8-bit moments, weights rounded at random, both kernels against float64 and their plain reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engines.native import eight_bit
from engines.native.eight_bit import SIGNED, UNSIGNED, PlainEightBit, decode, encode, random_words, round_at_random
from engines.native.full import PlainFloat32
from engines.native.kernels.adamw_full import EightBitKernel, Float32Kernel
from engines.native.optimizer import CLIP, step_scalars
from engines.native.store import BLOCK
from harness.spec import Train
from tests.engines.oracle import DEVICE, INTERPRETED, random

pytestmark = INTERPRETED
SCHEDULE = Train(
    steps=100, samples_per_step=1, learning_rate=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.1, beta1=0.9, beta2=0.99,
    epsilon=1e-6, max_grad_norm=1.0, seed=77,
)  # fmt: skip
EIGHT_BIT = [PlainEightBit, EightBitKernel]


def scalars(index: int, clip: float = 1.0, schedule: Train = SCHEDULE) -> Tensor:
    values = torch.tensor(step_scalars(schedule, index, 7), device=DEVICE)
    values[CLIP] = clip
    return values


def whole(count: int) -> slice:
    return slice(0, count)


# The code.


@pytest.mark.parametrize("top", [SIGNED, UNSIGNED])
def test_levels_are_their_own_codes_and_rise_from_zero_to_one(top: int) -> None:
    codes = torch.arange(2 ** (top + 1))
    levels = decode(codes, top)
    assert (levels[0], levels[-1]) == (0, 1)
    assert (levels.diff() > 0).all()
    assert encode(levels, top).equal(codes.int())
    assert encode(levels.float().double(), top, 0.999).equal(codes.int()) or top == UNSIGNED  # rounded up, a level stays


@pytest.mark.parametrize("top", [SIGNED, UNSIGNED])
def test_the_nearest_level_is_found_and_noise_is_right_on_average(top: int) -> None:
    x = torch.cat([torch.rand(500).double(), 8.0 ** (-8 * torch.rand(500).double())])
    levels = decode(torch.arange(2 ** (top + 1)), top)
    nearest = (x.unsqueeze(1) - levels).abs().amin(1)
    torch.testing.assert_close((decode(encode(x, top), top) - x).abs(), nearest, rtol=1e-9, atol=1e-15)
    noise = (torch.arange(4096).double() + 0.5) / 4096
    mean = decode(encode(x.unsqueeze(1).expand(-1, 4096), top, noise), top).mean(1)
    gap = levels.diff()[torch.searchsorted(levels, x, right=True).clamp_max(len(levels) - 1) - 1]
    assert ((mean - x).abs() <= gap / 2048).all()


def test_random_numbers_are_philox() -> None:
    """Known answers of Random123 (kat_vectors): counters and key zero, ten and seven rounds."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert [int(word) for word in random_words(zero, 0, 0, 10)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(word) for word in random_words(zero, 0, 0, 7)] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def test_rounding_at_random_is_right_on_average_and_keeps_what_is_exact() -> None:
    bits = torch.arange(2**16)
    for value in (1.0 + 2**-10, -3.14159, 1e-30, 65504.7):
        x = torch.full((2**16,), value, dtype=torch.float32)
        assert float(round_at_random(x, bits).double().mean()) == pytest.approx(float(x[0]), rel=2e-7)
    exact = torch.tensor([1.5, -0.0, 0.0, float("inf"), -float("inf")]).repeat_interleave(2**16)
    assert round_at_random(exact, bits.repeat(5)).float().equal(exact)
    broken = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)  # mantissas that would carry or vanish
    assert round_at_random(broken, torch.full((3,), 0xFFFF)).isnan().all()


# The rules.


class Truth:
    """AdamW in float64."""

    def __init__(self, start: Tensor) -> None:
        self.parameter = start.detach().cpu().double().clone().requires_grad_()
        betas = (SCHEDULE.beta1, SCHEDULE.beta2)
        self.optimizer = torch.optim.AdamW(
            [self.parameter], lr=SCHEDULE.learning_rate, betas=betas, eps=SCHEDULE.epsilon, weight_decay=SCHEDULE.weight_decay
        )

    def step(self, gradient: Tensor) -> None:
        self.parameter.grad = gradient.cpu().double()
        self.optimizer.step()


@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize("rule", [PlainFloat32, Float32Kernel])
def test_float32_is_adamw(rule: type, blocks: int) -> None:
    start = random(blocks * BLOCK)
    masters, values, truth = start.clone(), start.half(), Truth(start)
    optimizer = rule(masters, values, SCHEDULE)
    for index in range(4):
        gradient = random(len(start))
        squares = optimizer.update(whole(len(start)), gradient, scalars(index, 0.25))
        truth.step(0.25 * gradient)
        torch.testing.assert_close(squares.double(), gradient.double().square().sum(), rtol=1e-5, atol=0)
        torch.testing.assert_close(masters.cpu().double(), truth.parameter.detach(), rtol=2e-5, atol=1e-6)
        assert values.equal(masters.half())


@pytest.mark.parametrize("blocks", [1, 5, 9])
def test_the_kernel_does_what_the_reference_does(blocks: int) -> None:
    """Bit by bit, but where float32 and float64 fall on two sides of a boundary."""
    count = blocks * BLOCK
    start = random(count).bfloat16()
    weights, plain = start.clone(), start.clone()
    kernel, reference = EightBitKernel(weights, SCHEDULE), PlainEightBit(plain, SCHEDULE)
    for index in range(3):
        gradient = random(count) * 10.0 ** torch.randint(-6, 2, (count,), device=DEVICE)
        gradient[:: blocks + 1] = 0
        found = [rule.update(whole(count), gradient, scalars(index, 0.5)) for rule in (kernel, reference)]
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)
        for name in ("first", "second"):
            codes = [getattr(rule.state, name).int() for rule in (kernel, reference)]
            assert (codes[0] - codes[1]).abs().max() <= 1
            assert (codes[0] != codes[1]).sum() <= 0.01 * count + 1
            scales = [getattr(rule.state, f"{name}_scale") for rule in (kernel, reference)]
            torch.testing.assert_close(*scales, rtol=1e-5, atol=0)
        assert (weights != plain).sum() <= 0.01 * count + 1
        torch.testing.assert_close(weights.float(), plain.float(), rtol=2**-7, atol=1e-4)
        kernel.state.first.copy_(reference.state.first)  # each step is compared by itself
        kernel.state.second.copy_(reference.state.second)
        kernel.state.first_scale.copy_(reference.state.first_scale)
        kernel.state.second_scale.copy_(reference.state.second_scale)
        weights.copy_(plain)


@pytest.mark.parametrize("rule", EIGHT_BIT)
def test_eight_bits_stay_near_the_truth(rule: type) -> None:
    """Over a dozen steps of noisy gradients whose sizes differ by rows, the mean update is AdamW's."""
    count = 8 * BLOCK
    start = (0.02 * random(count)).bfloat16()
    weights, truth = start.clone(), Truth(start)
    optimizer, size = rule(weights, SCHEDULE), 10.0 ** -torch.arange(8, device=DEVICE).repeat_interleave(BLOCK)
    direction = random(count).sign()
    for index in range(12):
        gradient = (direction + random(count)) * size
        optimizer.update(whole(count), gradient, scalars(index))
        truth.step(gradient)
    moved, right = weights.cpu().double() - start.cpu().double(), truth.parameter.detach() - start.cpu().double()
    assert float(moved @ right / (moved.norm() * right.norm())) > 0.999
    assert float(moved @ right / (right @ right)) == pytest.approx(1, abs=5e-3)
    first, root = optimizer.state.moments(whole(count))
    state = next(iter(truth.optimizer.state.values()))
    for found, exact in ((first, state["exp_avg"]), (root, state["exp_avg_sq"].sqrt())):
        off = (found.cpu().double() - exact).view(8, BLOCK).norm(dim=1) / exact.view(8, BLOCK).norm(dim=1)
        assert (off < 0.03).all(), off


@pytest.mark.parametrize("rule", EIGHT_BIT)
def test_updates_far_below_a_rounding_step_arrive_on_average(rule: type) -> None:
    """Rounded to the nearest, no weight would ever move."""
    count = 64 * BLOCK
    weights = torch.ones(count, device=DEVICE).bfloat16()
    small = SCHEDULE.model_copy(update={"learning_rate": 2.0**-12, "weight_decay": 0.0})
    optimizer = rule(weights, small)
    optimizer.update(whole(count), torch.ones(count, device=DEVICE), scalars(0, schedule=small))
    moved = 1 - weights.double()
    assert set(moved.unique().tolist()) == {0.0, 2.0**-8}
    sigma = 2.0**-8 * (2.0**-4 * (1 - 2.0**-4) / count) ** 0.5
    assert abs(float(moved.mean()) - 2.0**-12) < 4 * sigma


@pytest.mark.parametrize("rule", EIGHT_BIT)
def test_a_slow_second_moment_does_not_get_stuck(rule: type) -> None:
    """With beta2 = 0.999 it changes by less than a tenth of a level: the mean over values falls as it should, beside one that stays."""
    slow = SCHEDULE.model_copy(update={"beta2": 0.999})
    optimizer = rule(torch.zeros(4 * BLOCK, device=DEVICE).bfloat16(), slow)
    gradient = torch.full((4 * BLOCK,), 0.3, device=DEVICE)
    gradient[::BLOCK] = 1.0
    optimizer.update(whole(len(gradient)), gradient, scalars(0, schedule=slow))
    before = optimizer.state.moments(whole(len(gradient)))[1].double().square()
    steady = before.sqrt().float() * (before.sqrt() > 0.025) / 0.001**0.5
    steps = 40
    for index in range(steps):
        optimizer.update(whole(len(gradient)), (gradient == 1.0) * steady * 0.001**0.5, scalars(index + 1, schedule=slow))
    after = optimizer.state.moments(whole(len(gradient)))[1].double().square()
    rest = gradient != 1.0
    assert float(after[rest].mean() / before[rest].mean()) == pytest.approx(0.999**steps, abs=0.004)


@pytest.mark.parametrize("rule", EIGHT_BIT)
def test_nothing_comes_of_nothing_and_not_a_number_of_itself(rule: type) -> None:
    count = 3 * BLOCK
    start = random(count).bfloat16()
    weights = start.clone()
    still = SCHEDULE.model_copy(update={"weight_decay": 0.0})
    optimizer, gradient = rule(weights, still), torch.zeros(count, device=DEVICE)
    optimizer.update(whole(count), gradient, scalars(0, schedule=still))
    assert weights.equal(start)
    assert not optimizer.state.first.any()
    assert not optimizer.state.second.any()
    gradient[BLOCK + 3] = float("nan")
    assert optimizer.update(whole(count), gradient, scalars(1, schedule=still)).isnan()
    assert weights.isnan().nonzero().flatten().tolist() == [BLOCK + 3]
    optimizer.update(whole(count), torch.zeros(count, device=DEVICE), scalars(2, schedule=still))
    assert weights.isnan().view(3, BLOCK).all(1).tolist() == [False, True, False], "its block has no scale any more, others have theirs"


@pytest.mark.parametrize("rule", EIGHT_BIT)
def test_the_largest_of_a_block_is_kept_as_it_is(rule: type) -> None:
    """Over itself it may come out as a little more than 1: it must not be lost for that."""
    count = 64 * BLOCK
    optimizer, gradient = rule(torch.zeros(count, device=DEVICE).bfloat16(), SCHEDULE), random(count)
    optimizer.update(whole(count), gradient, scalars(0))
    place = gradient.view(64, BLOCK).abs().argmax(1)
    assert (optimizer.state.first.view(64, BLOCK)[range(64), place].abs() == 127).all()
    assert (optimizer.state.second.view(64, BLOCK)[range(64), place] >= 254).all()
    first, root = optimizer.state.moments(whole(count))
    torch.testing.assert_close(first.view(64, BLOCK)[range(64), place], 0.1 * gradient.view(64, BLOCK)[range(64), place])
    assert root.isfinite().all()


@pytest.mark.parametrize("rule", EIGHT_BIT)
def test_a_large_neighbour_leaves_no_update_divided_by_zero(rule: type) -> None:
    weights = torch.zeros(BLOCK, device=DEVICE).bfloat16()
    optimizer, gradient = rule(weights, SCHEDULE), torch.full((BLOCK,), 1e-9, device=DEVICE)
    gradient[0] = 100.0
    optimizer.update(whole(BLOCK), gradient, scalars(0))
    assert (optimizer.state.second > 0).all()
    optimizer.update(whole(BLOCK), torch.zeros(BLOCK, device=DEVICE), scalars(1))
    assert weights.float().abs().max() < 3 * SCHEDULE.learning_rate


@pytest.mark.parametrize("rule", EIGHT_BIT)
def test_random_numbers_follow_seed_step_and_place_not_the_launch(rule: type) -> None:
    count, gradient = 11 * BLOCK, random(11 * BLOCK)
    start = random(count).bfloat16()

    def after(spans: list[slice], *, seed: int = 77, step: int = 3) -> list[Tensor]:
        weights = start.clone()
        optimizer = rule(weights, SCHEDULE.model_copy(update={"seed": seed}))
        for span in spans:
            optimizer.update(span, gradient[span], scalars(step))
        return [weights, optimizer.state.first, optimizer.state.second, optimizer.state.first_scale]

    once = after([whole(count)])
    parts = [slice(6 * BLOCK, count), slice(0, BLOCK), slice(BLOCK, 6 * BLOCK)]
    assert all(a.equal(b) for a, b in zip(once, after(parts), strict=True))
    assert not once[0].equal(after([whole(count)], seed=78)[0])
    corrected = scalars(3)[1:3]
    assert not once[0].equal(after([whole(count)], step=4)[0])
    assert corrected.all()


def test_what_does_not_fit_is_refused() -> None:
    weights = torch.zeros(2 * BLOCK, device=DEVICE)
    with pytest.raises(ValueError, match="expected bfloat16"):
        EightBitKernel(weights, SCHEDULE)
    with pytest.raises(ValueError, match="apart from the values"):
        Float32Kernel(weights, weights, SCHEDULE)
    optimizer = EightBitKernel(weights.bfloat16(), SCHEDULE)
    with pytest.raises(ValueError, match="no whole number of blocks"):
        optimizer.update(slice(0, 100), torch.zeros(100, device=DEVICE), scalars(0))
    with pytest.raises(ValueError, match="expected float32"):
        optimizer.update(slice(0, BLOCK), torch.zeros(BLOCK, device=DEVICE).half(), scalars(0))
    with pytest.raises(ValueError, match="no whole number of blocks"):
        eight_bit.EightBitState(100, DEVICE)
