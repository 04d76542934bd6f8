"""The products of a step: noted as torch is asked for them, with sizes and strides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True, slots=True)
class Product:
    """``out[M, N] = alpha * left[M, K] @ right[K, N]`` in bf16; ``*_strides``: of the two, in elements, one of each is 1.

    Columns of ``out`` are adjacent, ``out_stride`` elements lie between its rows.
    """

    rows: int
    columns: int
    depth: int
    left_strides: tuple[int, int]
    right_strides: tuple[int, int]
    out_stride: int
    alpha: float = 1.0

    @property
    def flops(self) -> int:
        """Of one product."""
        return 2 * self.rows * self.columns * self.depth

    def operands(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Left, right and out with these sizes and strides, the factors filled at random."""
        left = _laid_out((self.rows, self.depth), self.left_strides, device).normal_(std=0.1)
        right = _laid_out((self.depth, self.columns), self.right_strides, device).normal_(std=0.1)
        return left, right, _laid_out((self.rows, self.columns), (self.out_stride, 1), device)

    def run(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """As the engine asks torch for it."""
        if self.alpha == 1.0:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(out, left, right, beta=0, alpha=self.alpha, out=out)

    def __str__(self) -> str:
        """``8192 × 6144 of 4160``, with what is turned."""
        turned = [name for name, strides in (("left", self.left_strides), ("right", self.right_strides)) if strides[0] == 1 != strides[1]]
        return f"{self.rows} × {self.columns} of {self.depth}" + (f", {' and '.join(turned)} turned" if turned else "")


def products(step: Callable[[], object]) -> tuple[Counter[Product], Counter[str]]:
    """How often ``step`` asks for every product in bf16, and what else it asks for: products with a bias, a sum or another type."""
    noting = _Noting()
    with noting:
        step()
    return noting.found, noting.others


class _Noting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[Product] = Counter()
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self._note(func, args[0], args[1], result, 1.0)
        elif func is torch.ops.aten.addmm.out and kwargs.get("beta", 1) == 0:
            self._note(func, args[1], args[2], result, float(kwargs.get("alpha", 1)))
        elif func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten._scaled_mm):
            self.others[str(func)] += 1
        return result

    def _note(self, func: Any, left: Tensor, right: Tensor, out: Tensor, alpha: float) -> None:
        plain = out.stride(1) == 1 and 1 in left.stride() and 1 in right.stride()
        if not plain or {left.dtype, right.dtype, out.dtype} != {torch.bfloat16}:
            self.others[f"{func} of {left.dtype}"] += 1
            return
        (rows, depth), columns = left.shape, right.shape[1]
        strides = (left.stride(0), left.stride(1)), (right.stride(0), right.stride(1))
        self.found[Product(rows, columns, depth, *strides, out.stride(0), alpha)] += 1


def _laid_out(shape: tuple[int, int], strides: tuple[int, int], device: torch.device) -> Tensor:
    room = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    return torch.zeros(room, dtype=torch.bfloat16, device=device).as_strided(shape, strides)
