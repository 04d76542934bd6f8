"""The rows of a packed row that a layer's second half computes: all, or those alone at which its output is read.

Legend: T tokens, R of them that are read, H columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from engines.native.ops import Input
from engines.native.packed import Packed

_WORTH = 0.75  # of the tokens at most: choosing and spreading rows copies them


@dataclass(frozen=True, slots=True)
class ReadRows:
    """``chosen``: [R], rising, of ``num_tokens``; None for all."""

    num_tokens: int
    chosen: Tensor | None = None

    @classmethod
    def supervised(cls, packed: Packed) -> ReadRows:
        """Those of ``packed`` that predict a supervised token, where they are clearly fewer than all: the top layer is read there alone."""
        few = len(packed.rows) <= _WORTH * len(packed.tokens)
        return cls(len(packed.tokens), packed.rows if few else None)

    def then(self, rows: Tensor) -> ReadRows:
        """The same choice of ``rows``, once this one has been made: what it chose is what is read."""
        return ReadRows(self.num_tokens, rows) if self.chosen is None else ReadRows(len(self))

    def __len__(self) -> int:
        """R."""
        return self.num_tokens if self.chosen is None else len(self.chosen)

    def of(self, x_TH: Tensor) -> Tensor:
        """[R, H]; itself where all are read."""
        return x_TH if self.chosen is None else x_TH[self.chosen]

    def of_input(self, input: Input) -> Input:
        """The same of what a linear group reads."""
        return input if self.chosen is None else rows_of(input, self.chosen)

    def spread(self, dy_RH: Tensor, room: int = 0) -> Tensor:
        """[T, H + ``room``]: a gradient by all rows, zero where nothing is read and in the room; itself where all are read and there is
        none. A row that is there twice must have the gradient zero.
        """
        if self.chosen is None:
            return F.pad(dy_RH, (0, room)) if room else dy_RH
        columns = dy_RH.shape[1]
        spread_TW = dy_RH.new_zeros(self.num_tokens, columns + room)
        spread_TW[:, :columns].index_copy_(0, self.chosen, dy_RH)
        return spread_TW


def rows_of(input: Input, rows: slice | Tensor) -> Input:
    """Some rows of ``input``."""
    return Input(input.wide[rows], some(input.low, rows), some(input.scales, rows))


def some(x: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    """Some rows of what may not be there."""
    return None if x is None else x[rows]
