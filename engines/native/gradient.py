"""One weight's gradient while it is summed up: the first addend of a step overwrites what the buffer held."""

from __future__ import annotations

import torch
from torch import Tensor


class Gradient:
    """A buffer of a weight's size, perhaps shared with weights whose turn comes before or after; nothing has to zero it."""

    def __init__(self) -> None:
        """Without a buffer yet: how many there are to share is known once all weights are."""
        self._buffer: Tensor | None = None
        self._is_empty = True

    def place(self, buffer: Tensor) -> None:
        """Sum into ``buffer``."""
        self._buffer = buffer

    @property
    def buffer(self) -> Tensor:
        """The sum so far."""
        assert self._buffer is not None, "the weights are still being loaded"
        return self._buffer

    def settled(self) -> Tensor:
        """The sum, zero where nothing was added."""
        if self._is_empty:
            self.buffer.zero_()
            self._is_empty = False
        return self.buffer

    def expect(self, *, empty: bool) -> None:
        """``empty``: the sum has been used, what comes next begins a new one; otherwise it is added to what lies there."""
        self._is_empty = empty

    def add(self, gradient: Tensor) -> None:
        """Add a tensor of the buffer's size."""
        if self._is_empty:
            self.buffer.copy_(gradient)
            self._is_empty = False
        else:
            self.buffer.add_(gradient)

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add left[T, M]^T right[T, N]."""
        if self._is_empty:
            _product_(self.buffer, left, right)
            self._is_empty = False
        else:
            add_product_(self.buffer, left, right)


def add_product_(gradient: Tensor, left: Tensor, right: Tensor) -> None:
    """gradient[M, N] += left[T, M]^T right[T, N], in one pass where the dtypes allow."""
    if gradient.dtype == left.dtype:
        gradient.addmm_(left.t(), right)
    elif left.is_cuda and gradient.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(gradient, left.t(), right, torch.float32, out=gradient)
    else:
        gradient.add_(left.t() @ right)


def _product_(into: Tensor, left: Tensor, right: Tensor) -> None:
    if into.dtype == left.dtype:
        torch.mm(left.t(), right, out=into)
    elif left.is_cuda and into.dtype == torch.float32:
        torch.ops.aten.mm.dtype_out(left.t(), right, torch.float32, out=into)  # not rounded on the way
    else:
        into.copy_(left.t() @ right)
