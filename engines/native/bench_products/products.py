"""The products of a step: noted as torch is asked for them, with sizes and strides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engines.native.products import Product, asked


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
        what = asked(func, args, kwargs)
        if what is not None:
            product = Product.of(replace(what, out=result))
            if product is None:
                self.others[f"{func} of {what.left.dtype}"] += 1
            else:
                self.found[product] += 1
        elif func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten._scaled_mm):
            self.others[str(func)] += 1
        return result
