"""A product of matrices as torch is asked for it: sizes, strides and types, with which cuBLASLt can be asked for the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

_ATEN = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Asked:
    """``out = alpha * left @ right``; ``out``: None where torch is to make a new one."""

    left: Tensor
    right: Tensor
    out: Tensor | None
    alpha: float = 1.0


def asked(func: object, arguments: Sequence[Any], named: Mapping[str, Any]) -> Asked | None:
    """What an operation of torch's, as its dispatcher passes it on, is asked for; None where that is no plain product of two matrices."""
    if func is _ATEN.mm.default:
        return Asked(arguments[0], arguments[1], None)
    if func in (_ATEN.mm.out, _ATEN.mm.dtype_out):
        return Asked(arguments[0], arguments[1], named["out"])
    if func is _ATEN.addmm.out and named.get("beta", 1) == 0:
        return Asked(arguments[1], arguments[2], named["out"], float(named.get("alpha", 1)))
    return None


@dataclass(frozen=True, slots=True)
class Product:
    """``out[M, N] = alpha * left[M, K] @ right[K, N]`` of bf16; ``*_strides``: of the two, in elements, one of each is 1.

    Columns of ``out`` (bf16, or float32) are adjacent, ``out_stride`` elements lie between its rows.
    """

    rows: int
    columns: int
    depth: int
    left_strides: tuple[int, int]
    right_strides: tuple[int, int]
    out_stride: int
    alpha: float = 1.0
    out_dtype: torch.dtype = torch.bfloat16

    @classmethod
    def of(cls, asked: Asked) -> Self | None:
        """None where factors are not in bf16, or rows or columns overlap or are not adjacent."""
        left, right, out = asked.left, asked.right, asked.out
        (rows, depth), columns = left.shape, right.shape[1]
        out_strides, out_dtype = ((columns, 1), left.dtype) if out is None else ((out.stride(0), out.stride(1)), out.dtype)
        if {left.dtype, right.dtype} != {torch.bfloat16} or out_dtype not in (torch.bfloat16, torch.float32):
            return None
        strides = (left.stride(0), left.stride(1)), (right.stride(0), right.stride(1))
        if not (_is_plain((rows, depth), strides[0]) and _is_plain((depth, columns), strides[1])):
            return None
        if out_strides[1] != 1 or out_strides[0] < columns or (out_dtype != torch.bfloat16 and asked.alpha != 1.0):
            return None
        return cls(rows, columns, depth, *strides, out_strides[0], asked.alpha, out_dtype)

    @property
    def flops(self) -> int:
        """Of one product."""
        return 2 * self.rows * self.columns * self.depth

    def operands(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Left, right and out with these sizes and strides, the factors filled at random."""
        left = _laid_out((self.rows, self.depth), self.left_strides, torch.bfloat16, device).normal_(std=0.1)
        right = _laid_out((self.depth, self.columns), self.right_strides, torch.bfloat16, device).normal_(std=0.1)
        return left, right, _laid_out((self.rows, self.columns), (self.out_stride, 1), self.out_dtype, device)

    def run(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """As the engine asks torch for it."""
        if self.out_dtype != left.dtype:
            _ATEN.mm.dtype_out(left, right, self.out_dtype, out=out)
        elif self.alpha == 1.0:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(out, left, right, beta=0, alpha=self.alpha, out=out)

    def __str__(self) -> str:
        """``8192 × 6144 of 4160``, with what is turned."""
        turned = [name for name, strides in (("left", self.left_strides), ("right", self.right_strides)) if is_turned(strides)]
        into = "" if self.out_dtype == torch.bfloat16 else ", into float32"
        return f"{self.rows} × {self.columns} of {self.depth}" + (f", {' and '.join(turned)} turned" if turned else "") + into


def is_turned(strides: tuple[int, int]) -> bool:
    """Whether it is the elements of a column that are adjacent, not those of a row."""
    return strides[1] != 1


def _is_plain(shape: tuple[int, int], strides: tuple[int, int]) -> bool:
    if is_turned(strides):
        return strides[0] == 1 and strides[1] >= shape[0]
    return strides[0] >= shape[1]


def _laid_out(shape: tuple[int, int], strides: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    room = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    return torch.zeros(room, dtype=dtype, device=device).as_strided(shape, strides)
