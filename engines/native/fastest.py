"""Products of matrices in the fastest way that cuBLASLt offers, where one is faster than torch's; chosen at the first call, then kept.

A way is chosen where a product of its sizes, strides and alignments is first launched by hand: all ways make it in turns, on the tensors
of that call. What a graph's capture is the first to ask for stays torch's, so that a process never makes one product in two ways.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engines.native.cublaslt import MOST_ALIGNMENT, CublasLt, Multiplier
from engines.native.ops import Ops
from engines.native.products import Asked, Product, asked

LEAST_FLOPS = 1e9  # products below that wait for memory or for being launched
_MOST_WAYS = 8
_FINALISTS = 3
_ROUNDS = 7
_BLOCK_MILLISECONDS = 1.5  # of one way, before the next takes its turn
_MOST_CALLS = 200
_LEAST_GAIN = 0.005
_LEAST_ALIGNMENT = 16  # bytes
_ROUNDING = 2.0**-7  # of the largest value: two roundings to bf16 differ by less
_SAMPLE = 1024  # rows and columns that are looked at
MOST_SECONDS = 3.0  # of a run that go into choosing: uneven documents bring sizes without end
# What multiplies, of the ops table: inside these the host pays for every operation that a mode sees. A replayed step pays nothing.
_MULTIPLYING = (
    "norm", "linear", "fill", "input_gradient", "weight_gradients", "attention", "swiglu", "swiglu_backward", "cross_entropy",
)  # fmt: skip

Run = Callable[[], None]
InTurns = Callable[[Sequence[Run], int], list[float]]  # milliseconds a call of each, from so many calls in a row


@dataclass(frozen=True, slots=True)
class _Taken:
    """One of cuBLASLt's ways."""

    multiplier: Multiplier
    way: Any


class Fastest:
    """Makes products as they are asked of torch, on one stream at a time: they share a workspace."""

    def __init__(
        self,
        lt: CublasLt,
        *,
        in_turns: InTurns | None = None,
        capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing,
        least_flops: float = LEAST_FLOPS,
    ) -> None:
        """Nothing is chosen yet. ``in_turns``: what takes the time; ``capturing``: whether launches are being captured;
        ``least_flops``: smaller products stay torch's."""
        self._lt, self._in_turns, self._capturing, self._least_flops = lt, in_turns or timed_in_turns, capturing, least_flops
        self._choices: dict[tuple[Product, tuple[int, int, int]], _Taken | None] = {}
        self._left: Counter[str] = Counter()
        self._spent = 0.0
        self._mode = _Mode(self)

    def through(self, ops: Ops) -> Ops:
        """``ops``, their products made here."""
        return replace(ops, **{name: self._watched(getattr(ops, name)) for name in _MULTIPLYING})

    def make(self, asked: Asked) -> Tensor | None:
        """The product, or None where it stays torch's.

        Raises ArithmeticError where the chosen way makes something else than torch, HarnessError where cuBLASLt fails.
        """
        product = Product.of(asked)
        if product is None or product.flops < self._least_flops:
            return None
        alignments = _alignment(asked.left), _alignment(asked.right), MOST_ALIGNMENT if asked.out is None else _alignment(asked.out)
        if min(alignments) < _LEAST_ALIGNMENT:
            return None
        key = product, alignments
        if key not in self._choices:
            self._choices[key] = self._choice(asked, *key)
        taken = self._choices[key]
        if taken is None:
            return None
        into = _out(asked, product)
        taken.multiplier.run(taken.way, asked.left, asked.right, into)
        return into

    def said(self) -> str:
        """How many products are made in another way than torch's."""
        taken = sum(choice is not None for choice in self._choices.values())
        left = "".join(f", {count} {why}" for why, count in self._left.items())
        return f"{taken} of {len(self._choices)} products in another way than torch's{left}"

    def _choice(self, asked: Asked, product: Product, alignments: tuple[int, int, int]) -> _Taken | None:
        if self._capturing():
            self._left["first asked for by a capture"] += 1
            return None
        if self._spent > MOST_SECONDS:
            self._left[f"first asked for after {MOST_SECONDS:g} s of choosing"] += 1
            return None
        begun = time.perf_counter()
        try:
            return self._chosen(asked, product, alignments)
        finally:
            self._spent += time.perf_counter() - begun

    def _chosen(self, asked: Asked, product: Product, alignments: tuple[int, int, int]) -> _Taken | None:
        multiplier = Multiplier(product, self._lt, _MOST_WAYS, alignments)
        operands = asked.left, asked.right, _out(asked, product)
        runs: list[Run] = [partial(product.run, *operands), *(partial(multiplier.run, way, *operands) for way in multiplier.ways)]
        place = quickest(runs, self._in_turns)
        if place == 0:
            return None
        if not _comparable(product, runs[0], runs[place], operands[2]):
            self._left["of values that are not finite, so not compared"] += 1
            return None
        return _Taken(multiplier, multiplier.ways[place - 1])

    def _watched(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            with self._mode:
                return operation(*arguments)

        return watched


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what torch is asked for by this thread, after autograd and views have been settled."""

    def __init__(self, fastest: Fastest) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fastest = fastest

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        what = asked(func, args, kwargs or {})
        made = None if what is None else self._fastest.make(what)
        return func(*args, **(kwargs or {})) if made is None else made


def fastest_for(products: str, device: torch.device) -> Fastest | None:
    """None where ``products`` are torch's. Raises UnsupportedError where there is no cuBLASLt."""
    return Fastest(CublasLt(device)) if products == "fastest" else None


def quickest(runs: Sequence[Run], in_turns: InTurns) -> int:
    """The place of the fastest of ``runs``; 0, torch's, unless another takes less by more than half a percent."""
    if len(runs) == 1:
        return 0
    in_turns(runs, 1)  # libraries load a kernel at its first launch
    calls = max(1, min(_MOST_CALLS, math.ceil(_BLOCK_MILLISECONDS / max(min(in_turns(runs, 1)), 1e-6))))
    heat = in_turns(runs, calls)
    finalists = [0, *sorted(range(1, len(runs)), key=heat.__getitem__)[:_FINALISTS]]
    rounds = [in_turns([runs[place] for place in finalists], calls) for _ in range(_ROUNDS)]
    of_torch, *others = (statistics.median(times) for times in zip(*rounds, strict=True))
    return finalists[1 + others.index(min(others))] if min(others) < (1 - _LEAST_GAIN) * of_torch else 0


def timed_in_turns(runs: Sequence[Run], calls: int) -> list[float]:
    """Milliseconds a call of each, by events of the device, which does not pause in between."""
    marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]  # type: ignore[no-untyped-call]
    runs[0]()  # while it computes, the host gets ahead
    marks[0].record()
    for run, mark in zip(runs, marks[1:], strict=True):
        for _ in range(calls):
            run()
        mark.record()
    marks[-1].synchronize()
    return [before.elapsed_time(after) / calls for before, after in pairwise(marks)]


def _comparable(product: Product, right: Run, taken: Run, out: Tensor) -> bool:
    """False where the result of ``right`` is not finite. Raises ArithmeticError where ``taken`` makes another one."""
    right()
    truth = _sampled(out)
    largest = float(truth.abs().max())
    if not math.isfinite(largest):
        return False
    out.fill_(math.nan)  # what is not written shows
    taken()
    off = float((_sampled(out) - truth).abs().max())
    if not off <= _ROUNDING * largest:
        raise ArithmeticError(
            f"{product}: cuBLASLt makes another result than torch, off by {off:.3g} of values up to {largest:.3g}; set products=torch"
        )
    return True


def _sampled(out: Tensor) -> Tensor:
    """Rows and columns from all over ``out``, the last ones too, in float32; odd steps, so that every place of a tile has its turn."""
    rows, columns = (-(-size // _SAMPLE) | 1 for size in out.shape)
    return out[(out.shape[0] - 1) % rows :: rows, (out.shape[1] - 1) % columns :: columns].float()


def _alignment(tensor: Tensor) -> int:
    address = tensor.data_ptr()
    return min(MOST_ALIGNMENT, address & -address)


def _out(asked: Asked, product: Product) -> Tensor:
    return asked.left.new_empty(product.rows, product.columns) if asked.out is None else asked.out
