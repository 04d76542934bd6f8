"""Graphs without a GPU: the operations of a piece are noted, and made again on the same tensors, as a replayed CUDA graph would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils._python_dispatch import TorchDispatchMode

from engines.native.steps import Outcome

Operation = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class Recording:
    """Captures as ``ReplayedSteps`` asks for it. ``sizes``: how many operations each captured piece has; ``replays``: of each.

    A capture computes here, so the replay that follows it at once has nothing left to do.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.replays: list[int] = []

    def __call__(self, piece: Callable[[], Outcome | None]) -> tuple[Callable[[], None], Outcome | None]:
        noting = _Noting()
        with noting:
            outcome = piece()
        index = len(self.sizes)
        self.sizes.append(len(noting.operations))
        self.replays.append(0)

        def replay() -> None:
            self.replays[index] += 1
            if self.replays[index] > 1:
                for operation in noting.operations:
                    _made_again(*operation)

        return replay, outcome


class _Noting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result


@torch.no_grad()
def _made_again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    again = func(*args, **kwargs)
    for place, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
        if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
            place.copy_(value)
