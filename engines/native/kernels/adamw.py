"""AdamW on a flat buffer in one launch: clip, update, zero the gradient, and write the products' copy where it belongs.

p <- p (1 - lr wd); m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; p <- p - lr (m / c1) / (sqrt(v / c2) + epsilon), with
c1 = 1 - b1^t, c2 = 1 - b2^t (Loshchilov and Hutter 2019). The reference is torch.optim.AdamW.

The values of a step (lr, c1, c2, clip factor) are read from the device, so that a captured graph can be replayed with others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 1024  # values a program; no chunk crosses from one weight into the next
_FIELDS = 6  # of a row of the plan


@triton.jit
def _adamw(
    master, gradient, first, second, anchor, plan, scalars, beta1, beta2, epsilon, weight_decay, ratio,
    CHUNK: tl.constexpr, FIELDS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = plan + tl.program_id(0) * FIELDS
    start, count, target, columns, stride = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    learning_rate, c1, c2, clip = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 3)
    learning_rate = tl.where(tl.load(row + 5) > 0, learning_rate * ratio, learning_rate)
    if ALIGNED:
        start, count = tl.multiple_of(start, 4), tl.multiple_of(count, 4)
    steps = tl.arange(0, CHUNK)
    inside = steps < count
    place = start + steps
    g = tl.load(gradient + place, mask=inside, other=0.0) * clip
    tl.store(gradient + place, tl.zeros((CHUNK,), gradient.dtype.element_ty), mask=inside)
    m = tl.load(first + place, mask=inside, other=0.0)
    m += (g - m) * (1.0 - beta1)
    tl.store(first + place, m, mask=inside)
    v = tl.load(second + place, mask=inside, other=0.0) * beta2 + g * g * (1.0 - beta2)
    tl.store(second + place, v, mask=inside)
    p = tl.load(master + place, mask=inside, other=0.0) * (1.0 - learning_rate * weight_decay)
    p -= learning_rate / c1 * m / (tl.sqrt(v) / tl.sqrt(c2) + epsilon)
    tl.store(master + place, p, mask=inside)
    offset = target + (steps // columns) * stride + steps % columns
    tl.store(anchor + offset, p.to(anchor.dtype.element_ty), mask=inside)


class FlatAdamW:
    """AdamW over flat float32 masters; ``values`` are the products' copies, views of any row stride, in the order of the masters."""

    def __init__(
        self, masters: Tensor, values: Sequence[Tensor], betas: tuple[float, float], epsilon: float, weight_decay: float,
        ratio: float = 1.0, apart: Sequence[bool] | None = None,
    ) -> None:  # fmt: skip
        """``masters.grad`` holds the gradients; the learning rate of the values that are ``apart`` is ``ratio`` times the others'.

        Raises ValueError when ``values`` do not fill ``masters``.
        """
        self._masters = masters
        self._first, self._second = torch.zeros_like(masters), torch.zeros_like(masters)
        self._betas, self._epsilon, self._weight_decay = betas, epsilon, weight_decay
        if masters.dtype != torch.float32 or sum(value.numel() for value in values) != masters.numel():
            raise ValueError("masters must be float32, and the values as many as the masters")
        self._anchor = values[0]
        self._ratio = ratio
        plan = torch.tensor(_chunks(values, apart or [False] * len(values)), dtype=torch.int64)
        self._aligned = bool((plan[:, :2] % 4 == 0).all())  # then four values are loaded at once
        self._plan = plan.to(masters.device)

    @property
    def kept(self) -> dict[str, Tensor]:
        """Both moments."""
        return {"first": self._first, "second": self._second}

    def step(self, scalars: Tensor) -> None:
        """Update from ``scalars`` on the device, float32: learning rate, c1, c2, clip factor; gradients are zero afterwards."""
        _adamw[(len(self._plan),)](
            self._masters, self._masters.grad, self._first, self._second, self._anchor, self._plan, scalars,
            *self._betas, self._epsilon, self._weight_decay, self._ratio, CHUNK=_CHUNK, FIELDS=_FIELDS, ALIGNED=self._aligned,
            num_warps=4,
        )  # fmt: skip


def _chunks(values: Sequence[Tensor], apart: Sequence[bool]) -> list[tuple[int, int, int, int, int, int]]:
    """(start among the masters, count, target, columns, row stride, apart): whole rows, or part of one row that is longer than a chunk.

    ``target`` counts elements from the first value's address: every value is reached from one pointer.
    """
    chunks, start, size = [], 0, values[0].element_size()
    for value, other in zip(values, apart, strict=True):
        columns, stride = value.shape[-1], value.stride(0)
        target = (value.data_ptr() - values[0].data_ptr()) // size
        rows_each = max(1, _CHUNK // columns)
        for row in range(0, value.shape[0], rows_each):
            for column in range(0, columns, _CHUNK if columns > _CHUNK else columns):
                count = min(_CHUNK, columns - column) if columns > _CHUNK else min(rows_each, value.shape[0] - row) * columns
                chunks.append((start + row * columns + column, count, target + row * stride + column, columns, stride, int(other)))
        start += value.numel()
    return chunks
