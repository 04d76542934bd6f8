"""The ops table of the decoder layer: what it is made of, whoever computes it.

Legend: T tokens, H hidden, N output and K input columns of a linear group, P its padded ranks, C query heads, G key-value
heads, D head dimension, L supervised rows, V vocabulary. Backward operations add weight gradients to their buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engines.native.packed import Packed
from engines.native.weights import Linear, Weight


@dataclass(frozen=True, slots=True)
class Input:
    """What a linear group reads: ``wide`` [T, K + P] is [x | s x A^T]; ``low`` [T, P] its right part, or a copy that outlives it.

    Without adapters ``wide`` is x alone, and ``low`` None. ``scales`` [T]: ``wide`` holds codes of 8 bits (``engines.native.fp8``) already.
    """

    wide: Tensor
    low: Tensor | None
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Normed:
    """A normed input, the sum [T, H] it was made from, and the reciprocal root mean squares [T] of that sum's rows."""

    input: Input
    x: Tensor
    inverse: Tensor


@dataclass(frozen=True, slots=True)
class NormSource:
    """The input of a linear group as what it is made of: x [T, H], its reciprocal root mean squares [T], the norm's weight."""

    x: Tensor
    inverse: Tensor
    weight: Weight


@dataclass(frozen=True, slots=True)
class Heads:
    """Rotated queries [T, C, D], keys and values [T, G, D]; may be views of one buffer. Also the shape of their gradients."""

    queries: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMSNorms over the D values of every query and of every key, between projection and rotation."""

    query: Weight
    key: Weight
    epsilon: float


@dataclass(frozen=True, slots=True)
class Attended:
    """Attention's output as the next group's input, and what its own backward wants kept."""

    input: Input
    statistics: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """The operations a decoder layer is made of; every table computes the same functions.

    ``embed(embedding, tokens)``: the rows [T, H] of ``tokens``; the embedding may lie in pinned memory of the host.
    ``norm(x, delta, weight, epsilon, linear)``: RMSNorm of x + delta (delta may be None) as the input of ``linear``.
    ``norm_backward(d_normed, x, inverse, weight, residual, padded_rank)``: gradient by x plus ``residual``, [T, H + P]: the
    next group's ``fill`` writes the right part.
    ``plain_norm``, ``plain_norm_backward``: RMSNorm of rows without a linear behind it (the final norm).
    ``linear(input, linear, room)``: the adapted output [T, N], with ``room`` spare columns behind each row in memory.
    ``fill(dy, linear)``: s dy B into the right part of dy [T, N + P].
    ``input_gradient(dy, linear)``: dx [T, K] from the filled dy.
    ``weight_gradients(dy, source, linear)``: adds those that need the group's input, from the filled dy: dW, db, dA.
    ``up_gradients(dy, low, linear)``: adds those of every B.
    ``rotate(projected, norms, packed)``: queries and keys rotated; in place where there are no ``norms``, else normed and apart.
    ``rotate_back(gradients, projected, norms, packed, padded_rank)``: the gradients of Heads turned back, and through the norms where
    there are any (``projected`` is what forward was given), side by side [T, N + P].
    ``attention(heads, packed, linear)``: attention's output as the input of ``linear``; ``attention_backward(dy, heads,
    attended, packed)`` the gradients of Heads from dy [T, C, D].
    ``swiglu(gate_up, linear)``: silu(gate) * up as the input of ``linear``.
    ``swiglu_backward(d_h, gate_up, dy, low, down, group)``: the gradient of gate_up [T, N + P], P of its ``group``; may overwrite d_h
    and gate_up. Adds on the way what needs h or that gradient: ``weight_gradients`` of ``down`` from its filled ``dy``, and
    ``up_gradients`` of ``group`` with its ``low``.
    ``cross_entropy(hidden, head, targets, scale, chunk)``: losses [L] in float32 and the gradient by ``hidden`` times the scalar
    tensor ``scale``.
    """

    embed: Callable[[Tensor, Tensor], Tensor]
    norm: Callable[[Tensor, Tensor | None, Weight, float, Linear], Normed]
    norm_backward: Callable[[Tensor, Tensor, Tensor, Weight, Tensor | None, int], Tensor]
    plain_norm: Callable[[Tensor, Weight, float], Tensor]
    plain_norm_backward: Callable[[Tensor, Tensor, Weight, float], Tensor]
    linear: Callable[[Input, Linear, int], Tensor]
    fill: Callable[[Tensor, Linear], None]
    input_gradient: Callable[[Tensor, Linear], Tensor]
    weight_gradients: Callable[[Tensor, Tensor | NormSource, Linear], None]
    up_gradients: Callable[[Tensor, Tensor | None, Linear], None]
    rotate: Callable[[Heads, HeadNorms | None, Packed], Heads]
    rotate_back: Callable[[Heads, Heads | None, HeadNorms | None, Packed, int], Tensor]
    attention: Callable[[Heads, Packed, Linear], Attended]
    attention_backward: Callable[[Tensor, Heads, Attended, Packed], Heads]
    swiglu: Callable[[Tensor, Linear], Input]
    swiglu_backward: Callable[[Tensor, Tensor, Tensor, Tensor | None, Linear, Linear], Tensor]
    cross_entropy: Callable[[Tensor, Weight, Tensor, Tensor, int], tuple[Tensor, Tensor]]
