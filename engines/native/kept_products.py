"""Checkpointing that keeps the results of products and attention, and computes all else of a layer again for backward.

torch's ``create_selective_checkpoint_contexts`` does the same, but what it keeps is the tensor that the layer goes on with. Falcon divides
its scores in place, and torch does not notice: matmul hands them on as an ``_unsafe_view``, which counts versions of its own. Gradients
were 0.2 % off without a word (torch 2.13, 2026-11-27). Here a result is copied before somebody writes into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Attention, whose inner dimension is the length of documents, and products of packed weights.
_KEPT = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_flash_attention_forward",
    "engine_room::nf4_linear",
)
_LEFT = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}  # which argument is the left factor
_THIN = 8  # a product is thin whose result has more than so many times the columns that it sums over


def contexts() -> tuple[Keeping, Replaying]:
    """The ``context_fn`` of ``torch.utils.checkpoint.checkpoint``: around a layer's forward pass, and around its second one."""
    results: list[tuple[Any, Any]] = []
    return Keeping(results), Replaying(results)


def is_kept(operation: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether a result takes long to make for its bytes. Thin products do not, no more than an activation function: that of an adapter's
    B, which is as large as what it is added to, and the scores of eager attention, which grow with the square of the length.
    """
    name = operation.name().partition(".")[0]
    if name not in _LEFT:
        return name in _KEPT
    left, right = arguments[_LEFT[name] :][:2]
    return bool(_THIN * left.shape[-1] >= right.shape[-1])


class Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Appends every kept result to ``results``, with its operation."""

    def __init__(self, results: list[tuple[Any, Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results = results
        self._places: dict[int, int] = {}  # by address, so long as nobody else writes there

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """The operation's own result."""
        for tensor in _written(function, args):
            self._copy(tensor)
        made = function(*args, **(kwargs or {}))
        if is_kept(function, args):
            for tensor in _tensors(made):
                self._places[tensor.untyped_storage().data_ptr()] = len(self._results)
            self._results.append((function, tree_map(_detached, made)))
        return made

    def _copy(self, tensor: Tensor) -> None:
        place = self._places.pop(tensor.untyped_storage().data_ptr(), None)
        if place is not None:
            function, made = self._results[place]
            self._results[place] = function, tree_map(_cloned, made)


class Replaying(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives each kept result once, in the order in which they were made, instead of making it again."""

    def __init__(self, results: list[tuple[Any, Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results = results
        self._next = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """What was kept, or the operation's result. Raises RuntimeError where the layer does something else than the first time."""
        if not is_kept(function, args):
            return function(*args, **(kwargs or {}))
        operation, made = self._results[self._next] if self._next < len(self._results) else (None, None)
        if operation is not function:
            raise RuntimeError(f"recompute=selective: {function} comes where the first pass had {operation}; set recompute=full or none")
        self._results[self._next] = (None, None)
        self._next += 1
        return made


def _written(operation: Any, arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    """Those of the arguments that an operation changes."""
    if operation._schema.is_mutable:
        for described, given in zip(operation._schema.arguments, arguments, strict=False):
            if described.alias_info is not None and described.alias_info.is_write:
                yield from _tensors(given)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _each(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf


_detached, _cloned = _each(torch.Tensor.detach), _each(torch.Tensor.clone)
