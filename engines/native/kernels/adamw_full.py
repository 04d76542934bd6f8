"""AdamW on flat weights and gradients of a full fine-tune in one launch, moments in float32 or in 8 bits; sums the squared gradients too.

float32: as engines.native.kernels.adamw, on masters, with a copy in the products' type. 8 bits: the weights themselves are bfloat16,
rounded at random; a program decodes the moments of some blocks, updates, and quantises them again. engines.native.eight_bit has the
code, the random numbers and the reference.

The values of a step (lr, c1, c2, clip factor, number of the step) are read from the device. Kept: nothing. Bytes moved for a value:
float32 4 of gradient, 24 of master and moments, 2 of the copy; 8 bits 4 of gradient, 4 of weight, 4 of moments, 1/16 of scales.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.native.eight_bit import LEAST, ROUNDS, SIGNED, UNSIGNED, EightBitState
from engines.native.store import BLOCK
from harness.spec import Train

_CHUNK = 1024  # values a program of the float32 kernel
_BLOCKS = 4  # a program of the 8-bit kernel: eight values a thread
_WARPS = 4


@triton.jit
def _adamw_float32(
    masters, values, gradients, first, second, scalars, squares, count, beta1, beta2, epsilon, weight_decay, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    place = program * CHUNK + tl.arange(0, CHUNK)
    inside = place < count
    learning_rate, c1, c2, clip = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 3)
    g = tl.load(gradients + place, mask=inside, other=0.0)
    tl.store(squares + program, tl.sum(g * g, axis=0))
    g *= clip
    m = tl.load(first + place, mask=inside, other=0.0)
    m += (g - m) * (1.0 - beta1)
    tl.store(first + place, m, mask=inside)
    v = tl.load(second + place, mask=inside, other=0.0) * beta2 + g * g * (1.0 - beta2)
    tl.store(second + place, v, mask=inside)
    p = tl.load(masters + place, mask=inside, other=0.0) * (1.0 - learning_rate * weight_decay)
    p -= learning_rate / c1 * m / (tl.sqrt(v) / tl.sqrt(c2) + epsilon)
    tl.store(masters + place, p, mask=inside)
    tl.store(values + place, p.to(values.dtype.element_ty), mask=inside)


@triton.jit
def _power(exponent):
    """2 to an int32 from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _decode(code, TOP: tl.constexpr):
    """The level of a number >= 0, float32."""
    wide = tl.maximum(code, 1).to(tl.float32)
    exponent = (wide.to(tl.int32, bitcast=True) >> 23) - 127
    share = _power(-exponent)
    level = _power(-3 * (TOP - exponent)) * (0.125 + 0.875 * (wide * share - 1.0 + share))
    return tl.where(code > 0, level, 0.0)


@triton.jit
def _encode(x, noise, TOP: tl.constexpr):
    """The number of a level near x in [0, 1]."""
    below = tl.maximum(126 - (x.to(tl.int32, bitcast=True) >> 23), 0)
    segment = tl.minimum((tl.minimum(below, 3 * TOP) * 11) >> 5, TOP)  # a third, exactly
    y = x * _power(3 * segment)
    count = _power(TOP - segment)
    steps = tl.where(segment == TOP, y, tl.maximum((y - 0.125) * 1.1428571428571428 * count, 0.0))
    code = (count - 1.0 + steps + noise).to(tl.int32)
    return tl.minimum(code, (2 << TOP) - 1)


@triton.jit
def _scaled(values, LOWEST: tl.constexpr):
    """(each value over the largest magnitude of its row, those magnitudes), not a number where one of the row is none."""
    broken = tl.max((values != values).to(tl.int32), axis=1) > 0
    largest = tl.max(tl.where(values == values, tl.abs(values), 0.0), axis=1)
    largest = tl.where(largest < LOWEST, 0.0, largest)
    scaled = values * tl.where(largest > 0.0, 1.0 / tl.where(largest > 0.0, largest, 1.0), 0.0)[:, None]
    # Rounding may take the largest itself beyond 1: it is cut off there, and only what is no number becomes 0.
    scaled = tl.where(scaled == scaled, tl.minimum(tl.maximum(scaled, -1.0), 1.0), 0.0)
    return scaled, tl.where(broken, float("nan"), largest)


@triton.jit
def _random_bits(blocks, step, seed, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """32 bits for each value of each of ``blocks``; four neighbours share one draw."""
    QUARTER: tl.constexpr = BLOCK // 4
    group = blocks[:, None] * QUARTER + tl.arange(0, QUARTER)[None, :]
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, (group >> 32).to(tl.uint32), zero + step.to(tl.uint32), zero, ROUNDS)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _adamw_eight_bit(
    weights, gradients, first, second, first_scale, second_scale, scalars, squares, seed, first_block, num_blocks,
    beta1, beta2, epsilon, weight_decay,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr, SIGNED: tl.constexpr, UNSIGNED: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    own = program * BLOCKS + tl.arange(0, BLOCKS)
    there = own < num_blocks
    blocks = own + first_block
    inside = there[:, None] & (tl.arange(0, BLOCK) >= 0)[None, :]
    place = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    learning_rate, c1, c2, clip = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 3)
    g = tl.load(gradients + own[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], mask=inside, other=0.0)
    tl.store(squares + program, tl.sum(tl.sum(g * g, axis=1), axis=0))
    g *= clip
    code = tl.load(first + place, mask=inside, other=0).to(tl.int32)
    level = _decode(tl.abs(code), SIGNED)
    m = tl.where(code < 0, -level, level) * tl.load(first_scale + blocks, mask=there, other=0.0)[:, None]
    m += (g - m) * (1.0 - beta1)
    r = _decode(tl.load(second + place, mask=inside, other=0).to(tl.int32), UNSIGNED)
    r *= tl.load(second_scale + blocks, mask=there, other=0.0)[:, None]
    r = tl.sqrt(r * r * beta2 + g * g * (1.0 - beta2))
    p = (tl.load(weights + place, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    p = p * (1.0 - learning_rate * weight_decay) - (learning_rate / c1) * m / (r * (1.0 / tl.sqrt(c2)) + epsilon)
    bits = _random_bits(blocks, tl.load(scalars + 5), seed, BLOCKS, BLOCK, ROUNDS).to(tl.int32, bitcast=True)
    rounded = (p.to(tl.int32, bitcast=True) + (bits & 0xFFFF)) >> 16
    tl.store(weights + place, tl.where(p != p, 0x7FC0, rounded).to(tl.int16), mask=inside)
    scaled, scale = _scaled(m, LOWEST)
    magnitude = _encode(tl.abs(scaled), 0.5, SIGNED)
    tl.store(first + place, tl.where(scaled < 0.0, -magnitude, magnitude).to(tl.int8), mask=inside)
    tl.store(first_scale + blocks, scale, mask=there)
    scaled, scale = _scaled(r, LOWEST)
    noise = ((bits >> 16) & 0xFFFF).to(tl.float32) * (1.0 / 65536.0)
    magnitude = _encode(scaled, noise, UNSIGNED)
    tl.store(second + place, tl.where((scaled > 0.0) & (magnitude == 0), 1, magnitude).to(tl.uint8), mask=inside)
    tl.store(second_scale + blocks, scale, mask=there)


class Float32Kernel:
    """AdamW on flat float32 masters, ``values`` the products' copies of them."""

    def __init__(self, masters: Tensor, values: Tensor, schedule: Train) -> None:
        """Moments zero. Raises ValueError for masters of another type, or that are the values themselves."""
        if masters.dtype != torch.float32 or masters is values or masters.shape != values.shape:
            raise ValueError(f"masters are {masters.dtype} {list(masters.shape)}; expected float32, as many and apart from the values")
        self._masters, self._values, self._schedule = masters, values, schedule
        self._first, self._second = torch.zeros_like(masters), torch.zeros_like(masters)

    @property
    def kept(self) -> dict[str, Tensor]:
        """Both moments."""
        return {"first": self._first, "second": self._second}

    def update(self, span: slice, gradients: Tensor, scalars: Tensor) -> Tensor:
        """Update ``span`` of the masters from ``gradients`` [its length]; returns the sum of their squares before clipping."""
        schedule, count = self._schedule, _count(span, gradients)
        programs = triton.cdiv(count, _CHUNK)
        squares = torch.empty(programs, dtype=torch.float32, device=gradients.device)
        _adamw_float32[(programs,)](
            self._masters[span], self._values[span], gradients, self._first[span], self._second[span], scalars, squares, count,
            schedule.beta1, schedule.beta2, schedule.epsilon, schedule.weight_decay, CHUNK=_CHUNK, num_warps=_WARPS,
        )  # fmt: skip
        return squares.sum()


class EightBitKernel:
    """AdamW on flat bfloat16 weights with 8-bit moments; random numbers from ``schedule.seed``."""

    def __init__(self, weights: Tensor, schedule: Train) -> None:
        """Moments zero. Raises ValueError for weights of another type."""
        if weights.dtype != torch.bfloat16:
            raise ValueError(f"weights are {weights.dtype}; expected bfloat16")
        self._weights, self._schedule = weights.view(torch.int16), schedule
        self.state = EightBitState(len(weights), weights.device)

    @property
    def kept(self) -> dict[str, Tensor]:
        """Both moments and their scales."""
        return self.state.kept

    def update(self, span: slice, gradients: Tensor, scalars: Tensor) -> Tensor:
        """As ``Float32Kernel.update``, of a whole number of blocks."""
        schedule, state, blocks = self._schedule, self.state, _count(span, gradients) // BLOCK
        programs = triton.cdiv(blocks, _BLOCKS)
        squares = torch.empty(programs, dtype=torch.float32, device=gradients.device)
        _adamw_eight_bit[(programs,)](
            self._weights, gradients, state.first, state.second, state.first_scale, state.second_scale, scalars, squares,
            schedule.seed, span.start // BLOCK, blocks, schedule.beta1, schedule.beta2, schedule.epsilon, schedule.weight_decay,
            BLOCKS=_BLOCKS, BLOCK=BLOCK, ROUNDS=ROUNDS, SIGNED=SIGNED, UNSIGNED=UNSIGNED, LOWEST=LEAST, num_warps=_WARPS,
        )  # fmt: skip
        return squares.sum()


def _count(span: slice, gradients: Tensor) -> int:
    count: int = span.stop - span.start
    if gradients.shape != (count,) or gradients.dtype != torch.float32 or not gradients.is_contiguous():
        raise ValueError(f"gradients are {gradients.dtype} {list(gradients.shape)}; expected float32 [{count}], adjacent")
    if span.start % BLOCK or count % BLOCK:
        raise ValueError(f"the span from {span.start} to {span.stop} is no whole number of blocks of {BLOCK}")
    return count
