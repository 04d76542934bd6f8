"""A run's step on tensors without memory, while its weights are loading: which kernels it will launch, compiled meanwhile.

The same decoder, operations and optimizer run on the meta device, so that sizes, strides, alignments and constants are those of the step
to come; only attention that is not Triton's has a stand-in. Launches are noted (``compiling``) and compiled by threads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Self

import torch

from engines.native.attention import attention, attention_backward, by_own_kernels
from engines.native.buckets import Extent, Sizes, kind_of, own_sizes, shared_sizes
from engines.native.checkpoint import load_weights
from engines.native.compiling import Kernels, noted, stand_on, threads_for
from engines.native.decoder import Decoder
from engines.native.loader import Placement
from engines.native.lora import Adapter
from engines.native.ops import Attended, Heads, Ops
from engines.native.optimizer import LOSS_SCALE, NUM_SCALARS
from engines.native.optimizers import optimizer_for
from engines.native.packed import Angles, Packed
from engines.native.plan import KEEP_ALL, KEEP_INPUT, Plan
from engines.native.shape import LlamaShape
from engines.native.steps import Steps
from engines.native.weights import Linear
from engines.native.wide_input import widened
from harness.data.tokens import Batch
from harness.engine import Job

META = torch.device("meta")
_MOST_BATCHES = 4096  # that are looked at, and of their sizes as many as are rehearsed: what comes later is compiled when it comes
_MOST_SIZES = 16
# How long a thread that is busy in Python keeps others from it. Uploads ask for the interpreter many times a piece: beside three such
# threads 64 pieces of 4 MiB took 0.6 to 2.0 s with Python's 5 ms, 0.3 to 0.4 with a tenth of that, 0.15 alone (two cores, 2026-11-27).
_SWITCH_SECONDS = 0.0002


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What is rehearsed: how the weights of ``job`` will be placed and computed with, and the ``batches`` of its steps.

    ``extent``: what all of them need. ``recompute``, ``loss_chunk``: what is assumed of the plan before there is one.
    """

    job: Job
    shape: LlamaShape
    placement: Placement
    adapter: Adapter | None
    ops: Ops
    batches: Callable[[], Iterable[Batch]]
    extent: Callable[[], Extent]
    recompute: str
    loss_chunk: int


class Rehearsal:
    """Begins at once, beside its maker, who launches no kernel of Triton's before ``finish``; nothing more begins after the with block."""

    def __init__(self, piece: Piece) -> None:
        """A thread builds the decoder on the meta device and runs its step, others compile."""
        self._piece = piece
        device = torch.device(piece.job.device)
        device = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
        self._kernels = Kernels(device, threads_for(piece.job.processes))
        self._stage = ThreadPoolExecutor(1, "rehearsal", initializer=stand_on, initargs=(device,))
        plan = KEEP_INPUT if piece.recompute == "full" else KEEP_ALL
        self._assumed = (plan,) * piece.shape.num_layers, piece.loss_chunk
        self._begun = self._stage.submit(self._begin)
        self._usual_seconds = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)

    def finish(self, plans: tuple[Plan, ...], loss_chunk: int) -> int:
        """Return once everything is compiled that a step under ``plans`` launches: how many kernels.

        Raises what the rehearsal or Triton raised.
        """
        decoder, sizes = self._begun.result()
        if (plans, loss_chunk) != self._assumed:
            self._kernels.wait()  # nothing is compiled while launches are noted
            self._stage.submit(self._play, decoder, sizes, plans, loss_chunk).result()
        return self._kernels.wait()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """What has begun ends by itself."""
        sys.setswitchinterval(self._usual_seconds)
        self._stage.shutdown(wait=False, cancel_futures=True)
        self._kernels.close()

    def _begin(self) -> tuple[Decoder, list[Sizes]]:
        piece = self._piece
        decoder = without_memory(piece, *self._assumed)
        sizes = sizes_of(islice(piece.batches(), _MOST_BATCHES), piece.extent())[:_MOST_SIZES]
        self._play(decoder, sizes, *self._assumed)
        return decoder, sizes

    def _play(self, decoder: Decoder, sizes: list[Sizes], plans: tuple[Plan, ...], loss_chunk: int) -> None:
        """A step of the first size, and of the others what depends on it. What would wait on the host is kept: it comes back as it left."""
        kept = tuple(replace(plan, kept=plan.held, offloaded=frozenset()) for plan in plans)
        workload = self._piece.job.workload
        optimizer = optimizer_for(decoder.weights, workload, kernels=True)
        planned = replace(decoder, plans=kept, loss_chunk=loss_chunk)
        steps = Steps(planned, Angles.of(decoder.shape, 1, META), optimizer, workload.train.max_grad_norm)
        scalars = torch.empty(NUM_SCALARS, device=META)
        first, *others = (packed_as(each, decoder.shape.head_dim) for each in sizes)
        with noted() as launches:
            steps.compute([first], scalars)
            for each in others:
                _excerpt(planned).accumulate(each, scalars[LOSS_SCALE])
        self._kernels.compile(launches)


def without_memory(piece: Piece, plans: tuple[Plan, ...], loss_chunk: int) -> Decoder:
    """The decoder of ``piece`` on the meta device."""
    division = piece.placement.division and replace(piece.placement.division, gather=_nothing_arrives)
    placement = replace(piece.placement, device=META, division=division)
    weights = load_weights(piece.job.base, piece.shape, placement, piece.adapter)
    ops = replace(piece.ops, attention=_attention, attention_backward=_attention_backward)
    return Decoder(shape=piece.shape, weights=weights, ops=ops, plans=plans, loss_chunk=loss_chunk)


def sizes_of(batches: Iterable[Batch], of_all: Extent) -> list[Sizes]:
    """Those of ``batches`` (packed rows) that kernels can tell apart: one for each number of tokens, of short and of other documents, the
    largest that rows are filled up to before those in the order of the batches.
    """
    largest = of_all.largest
    found: dict[tuple[int, bool], Sizes] = {(largest.num_tokens, largest.longest is None): largest} if largest else {}
    for batch in batches:
        sizes = (shared_sizes if largest and kind_of(batch) not in of_all.alike else own_sizes)(batch)
        found.setdefault((sizes.num_tokens, sizes.longest is None), sizes)
    return list(found.values())


def _excerpt(decoder: Decoder) -> Decoder:
    """Two layers, one of each plan, and the top one, which may compute fewer rows: what they launch for a number of tokens, all do."""
    kinds = {plan: index for index, plan in reversed(list(enumerate(decoder.plans)))}
    top = len(decoder.plans) - 1
    chosen = sorted({0, min(1, top), *kinds.values(), top})
    layers = tuple(decoder.weights.layers[index] for index in chosen)
    return replace(decoder, weights=replace(decoder.weights, layers=layers), plans=tuple(decoder.plans[index] for index in chosen))


def packed_as(sizes: Sizes, head_dim: int) -> Packed:
    """A row of these ``sizes`` on the meta device."""
    tokens, rows = (torch.empty(count, dtype=torch.int64, device=META) for count in (sizes.num_tokens, sizes.num_rows))
    angles = torch.empty(sizes.num_tokens, head_dim // 2, device=META)
    starts, bounds = (torch.empty(count, dtype=torch.int32, device=META) for count in (sizes.num_documents + 1, sizes.num_tokens))
    longest = sizes.longest or sizes.num_tokens
    even = sizes.longest is not None and longest * sizes.num_documents == sizes.num_tokens
    lengths = (longest,) * sizes.num_documents if even else (longest, 0)
    return Packed(tokens, angles, angles, lengths, starts, bounds, bounds, sizes.longest, rows, torch.empty_like(rows))


def _nothing_arrives(part: torch.Tensor, whole: torch.Tensor) -> None:
    """Instead of a gather: the other ranks rehearse for themselves."""


def _attention(heads: Heads, packed: Packed, linear: Linear) -> Attended:
    """As attention leaves its output: the heads of a token side by side, adjacent; by the kernels of ours themselves where they take it."""
    if by_own_kernels(heads, packed):
        return attention(heads, packed, linear)
    tokens, num_heads, head_dim = heads.queries.shape
    return Attended(widened(heads.queries.new_empty(tokens, num_heads * head_dim), linear), ())


def _attention_backward(dy: torch.Tensor, heads: Heads, attended: Attended, packed: Packed) -> Heads:
    """Gradients that are contiguous each."""
    if by_own_kernels(heads, packed):
        return attention_backward(dy, heads, attended, packed)
    return Heads(*(each.new_empty(each.shape) for each in (heads.queries, heads.keys, heads.values)))
