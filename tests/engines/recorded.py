"""Graphs without a GPU: the operations of a piece are noted, and made again on the same tensors, as a replayed CUDA graph would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engines.native.ops import Attended, Heads
from engines.native.packed import Packed
from engines.native.reference import as_input
from engines.native.replay import Piece, Replay
from engines.native.steps import Outcome
from engines.native.weights import Linear

Operation = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class Recording:
    """Captures as ``ReplayedSteps`` asks for it. ``sizes``: how many operations each captured piece has; ``replays``: of each;
    ``after_launches``: as each was asked for.

    A capture computes here, so the replay that follows it at once has nothing left to do.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.replays: list[int] = []
        self.after_launches: list[bool] = []

    def __call__(self, piece: Piece, *, after_launches: bool) -> tuple[Replay, Outcome | None]:
        noting = _Noting()
        with noting:
            outcome = piece()
        index = len(self.sizes)
        self.sizes.append(len(noting.operations))
        self.replays.append(0)
        self.after_launches.append(after_launches)

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


def attention(heads: Heads, packed: Packed, linear: Linear) -> Attended:
    """The reference reads on the host how long documents are; this on the device, as a replay has to."""
    return Attended(as_input(_attended(heads.queries, heads.keys, heads.values, packed).flatten(1), linear), ())


def attention_backward(dy_TCD: Tensor, heads: Heads, attended: Attended, packed: Packed) -> Heads:
    """By autograd."""
    with torch.enable_grad():
        given = [each.detach().requires_grad_() for each in (heads.queries, heads.keys, heads.values)]
        found = torch.autograd.grad(_attended(given[0], given[1], given[2], packed), given, dy_TCD)
    return Heads(*(each.contiguous() for each in found))


def _attended(queries: Tensor, keys: Tensor, values: Tensor, packed: Packed) -> Tensor:
    places = torch.arange(len(queries))
    document = torch.bucketize(places, packed.cumulative, right=True)
    seen = (document[:, None] == document) & (places[:, None] >= places)
    keys, values = (each.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1) for each in (keys, values))
    scores = torch.einsum("tcd,scd->cts", queries, keys) * queries.shape[2] ** -0.5
    return torch.einsum("cts,scd->tcd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values)
