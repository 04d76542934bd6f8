"""Optimizer moments in 8 bits a value, and weights rounded to bfloat16 at random: the code, the random numbers, the rule, in plain torch.

The code (dynamic, after Dettmers et al. 2022, arXiv 2110.02861, with powers of 8 for their powers of 10, so that it needs no table): a
value over the largest of its block of 256 lies in (8^-(s+1), 8^-s] for s = 0 .. K; there are 2^(K-s) evenly spaced levels in each such
segment, both of 0 and 1 are levels. A level's number is 2^(K-s) - 1 + j, j = 1 .. 2^(K-s) from below; K = 6 leaves a bit for the sign.

Of the second moment its root is stored, which halves its range in powers: r = sqrt(v). It is rounded at random, else changes of 0.1 %
(1 - beta2) would be lost in steps of 0.7 % or more, and never to zero, by which the update would be divided. The first moment, which
changes by 10 %, is rounded to the nearest level.

A weight's bfloat16 is its float32 with 16 bits cut off, after 16 random bits were added to these: right on average. Random bits are
Philox4x32-7 (Salmon et al. 2011) of (place of the value, step) under the seed: the same whatever the launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engines.native.optimizer import CLIP, FIRST_CORRECTION, LEARNING_RATE, SECOND_CORRECTION, STEP
from engines.native.store import BLOCK
from harness.spec import Train

SIGNED, UNSIGNED = 6, 7  # K
LEAST = 1e-38  # a block whose largest value is smaller counts as zeros
ROUNDS = 7
_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_QUIET_NAN = 0x7FC0


def encode(x: Tensor, top: int, noise: Tensor | float = 0.5) -> Tensor:
    """The number of a level near ``x`` in [0, 1], int32; ``noise`` in [0, 1): one half rounds to the nearest, random noise at random."""
    wide = x.double()
    limits = 1.0 / _power_of_two(3 * torch.arange(1, top + 1, device=x.device))
    segment = (wide.unsqueeze(-1) <= limits).sum(-1)
    count = _power_of_two(top - segment)
    y = wide * _power_of_two(3 * segment)
    steps = torch.where(segment == top, y, (y - 0.125) * (8 / 7) * count).clamp_min(0)
    return (count - 1 + torch.floor(steps + noise)).clamp_max(2.0 ** (top + 1) - 1).to(torch.int32)


def decode(code: Tensor, top: int) -> Tensor:
    """The level of each number, float64."""
    wide = code.double()
    exponent = torch.frexp(code.clamp_min(1).float()).exponent.long() - 1
    count = _power_of_two(exponent)
    level = (0.125 + 0.875 * (wide - count + 1) / count) / _power_of_two(3 * (top - exponent))
    return torch.where(code == 0, 0.0, level)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 to whole numbers >= 0, exactly: a GPU's exp2 and log2 may be a rounding off, which another level begins with."""
    return (torch.ones_like(exponent, dtype=torch.int64) << exponent).double()


def random_words(group: Tensor, step: int, seed: int, rounds: int = ROUNDS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits (in int64) for each ``group`` of four values."""
    c0, c1 = group & _WORD, group >> 32
    c2, c3 = torch.full_like(group, step), torch.zeros_like(group)
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(rounds):
        # A product of two 32-bit words wraps around in int64, but its 64 bits are right.
        one, other = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((other >> 32) & _WORD) ^ c1 ^ key0, ((one >> 32) & _WORD) ^ c3 ^ key1
        c1, c3 = other & _WORD, one & _WORD
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def random_bits(start: int, count: int, step: int, seed: int, device: torch.device) -> Tensor:
    """32 random bits for each of the values ``start`` to ``start + count``, both multiples of four, in int64."""
    groups = torch.arange(start // 4, (start + count) // 4, dtype=torch.int64, device=device)
    return torch.stack(random_words(groups, step, seed), dim=1).flatten()


def round_at_random(x: Tensor, bits: Tensor) -> Tensor:
    """float32 ``x`` in bfloat16: the nearer neighbour more often, by the low 16 of ``bits``. Not a number stays none."""
    summed = (x.view(torch.int32).to(torch.int64) & _WORD) + (bits & 0xFFFF)
    kept = torch.where(x.isnan(), _QUIET_NAN, summed >> 16)
    return kept.to(torch.int32).to(torch.int16).view(torch.bfloat16)


class EightBitState:
    """Both moments of ``num_elements`` values, a whole number of blocks: ``first`` signed, ``second`` the root; and the blocks' scales."""

    def __init__(self, num_elements: int, device: torch.device) -> None:
        """Zero."""
        if num_elements % BLOCK:
            raise ValueError(f"{num_elements} values are no whole number of blocks of {BLOCK}")
        self.first = torch.zeros(num_elements, dtype=torch.int8, device=device)
        self.second = torch.zeros(num_elements, dtype=torch.uint8, device=device)
        self.first_scale = torch.zeros(num_elements // BLOCK, dtype=torch.float32, device=device)
        self.second_scale = torch.zeros_like(self.first_scale)

    @property
    def kept(self) -> dict[str, Tensor]:
        """All of it, by name."""
        return {name: getattr(self, name) for name in ("first", "second", "first_scale", "second_scale")}

    def moments(self, span: slice) -> tuple[Tensor, Tensor]:
        """The first moment and the root of the second of some blocks, float32."""
        blocks = slice(span.start // BLOCK, span.stop // BLOCK)
        codes, roots = self.first[span].view(-1, BLOCK), self.second[span].view(-1, BLOCK)
        first = decode(codes.int().abs(), SIGNED) * codes.sign() * self.first_scale[blocks].unsqueeze(1)
        second = decode(roots.int(), UNSIGNED) * self.second_scale[blocks].unsqueeze(1)
        return first.float().flatten(), second.float().flatten()

    def store(self, span: slice, first: Tensor, root: Tensor, noise: Tensor) -> None:
        """Quantise; ``noise`` in [0, 1) for each root."""
        blocks = slice(span.start // BLOCK, span.stop // BLOCK)
        (scaled, scale), (roots, root_scale) = _scaled(first), _scaled(root)
        magnitudes = encode(scaled.abs(), SIGNED)
        self.first[span] = (magnitudes * scaled.sign()).to(torch.int8).flatten()
        codes = encode(roots, UNSIGNED, noise.view(-1, BLOCK))
        self.second[span] = torch.where((roots > 0) & (codes == 0), 1, codes).to(torch.uint8).flatten()
        self.first_scale[blocks], self.second_scale[blocks] = scale, root_scale


def _scaled(values: Tensor) -> tuple[Tensor, Tensor]:
    """(each value over the largest magnitude of its block, those magnitudes); where one is no number, the magnitude is none either."""
    blocks = values.view(-1, BLOCK)
    largest = blocks.abs().amax(1)  # of torch: not a number if one of them is none
    largest = torch.where(largest < LEAST, 0.0, largest)
    scaled = blocks / torch.where(largest == 0, 1.0, largest).unsqueeze(1)
    return torch.where(scaled.isnan() | (largest == 0).unsqueeze(1), 0.0, scaled.clamp(-1, 1)), largest


class PlainEightBit:
    """AdamW on flat bfloat16 weights with 8-bit moments, in plain torch on any device."""

    def __init__(self, weights: Tensor, schedule: Train) -> None:
        """Moments zero; random numbers from ``schedule.seed``."""
        self._weights, self._schedule = weights, schedule
        self.state = EightBitState(len(weights), weights.device)

    @property
    def kept(self) -> dict[str, Tensor]:
        """Both moments and their scales."""
        return self.state.kept

    def update(self, span: slice, gradients: Tensor, scalars: Tensor) -> Tensor:
        """Update ``span`` of the weights; returns the sum of the squared gradients before clipping."""
        schedule, weights, values = self._schedule, self._weights[span], scalars.tolist()
        first, root = self.state.moments(span)
        g = gradients * values[CLIP]
        first.lerp_(g, 1 - schedule.beta1)
        root = (root.square_().mul_(schedule.beta2) + (1 - schedule.beta2) * g.square()).sqrt_()
        bits = random_bits(span.start, len(weights), int(values[STEP]), schedule.seed, weights.device)
        p = weights.float() * (1 - values[LEARNING_RATE] * schedule.weight_decay)
        p -= values[LEARNING_RATE] / values[FIRST_CORRECTION] * first / (root / values[SECOND_CORRECTION] ** 0.5 + schedule.epsilon)
        weights.copy_(round_at_random(p, bits))
        self.state.store(span, first, root, (bits >> 16) / 2.0**16)
        return gradients.square().sum()
