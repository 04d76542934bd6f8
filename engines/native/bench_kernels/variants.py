"""Other ways to cut the work of some kernels, and other products, timed beside what the engine does now.

Legend: T tokens, K input and N output columns of a linear group, R its ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engines.native import fused_ops, tiles
from engines.native.bench_kernels.setting import Call, Setting, restore
from engines.native.kernels import attention, cross_entropy, nf4, outer, swiglu_gradients
from engines.native.kernels.attention import attend
from engines.native.kernels.attention_backward import attend_backward
from engines.native.kernels.cross_entropy import Sweep, cross_entropy_
from engines.native.kernels.launching import Tile
from engines.native.kernels.nf4 import Cut, decode_nf4
from engines.native.kernels.outer import add_outer_
from engines.native.kernels.swiglu_gradients import swiglu_gradients_
from engines.native.nf4 import placed
from engines.native.weights import Linear, LowRank, Weight
from harness.nf4 import quantise

_COMPILERS = 8  # threads that launch variants for the first time: Triton compiles outside of the interpreter's lock


@dataclass(frozen=True, slots=True)
class Variant:
    """One way; ``is_current`` marks the engine's. ``cut``: how a kernel's work is cut, where that is what differs."""

    label: str
    call: Call
    is_current: bool
    cut: Tile | Sweep | Cut | attention.Cut | None = None


def compared(name: str, setting: Setting, milliseconds: Callable[[Call], float], failures: tuple[type[Exception], ...]) -> Iterator[str]:
    """A line for each variant, the fastest first, then those that failed."""
    chosen = VARIANTS[name](setting)
    launch_all(chosen)
    timed: list[tuple[float, Variant]] = []
    failed = []
    for variant in chosen:
        try:
            timed.append((milliseconds(variant.call), variant))
        except failures as error:
            failed.append(f"  {variant.label}: failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    yield name
    for time, variant in sorted(timed, key=lambda pair: pair[0]):
        yield f"  {time:8.4f} ms  {variant.label}{'  <- now' if variant.is_current else ''}"
    yield from failed


def launch_all(chosen: Sequence[Variant]) -> None:
    """Launch each once, several at a time; what one raises it raises again when it is timed."""
    chosen[0].call.run()
    with ThreadPoolExecutor(_COMPILERS) as pool:
        wait([pool.submit(variant.call.run) for variant in chosen[1:]])


def _swiglu_gradients(s: Setting) -> list[Variant]:
    columns, group, ranks = s.shape.intermediate_size, s.layer.gate_up, _lora(s.layer.down).up.shape[1]
    room = group.padded_rank
    gate_up, dh = s.random(s.tokens, 2 * columns, room=room), s.random(s.tokens, columns)
    thin, low = s.random(s.tokens, ranks), s.random(s.tokens, room)
    d_input, d_outputs = (torch.zeros(size, device=s.device) for size in ((ranks, columns), (2 * columns, ranks)))
    arrived, put_back = _lora(s.layer.down).arrived, restore(gate_up)
    now = tiles.chosen("swiglu_gradients", s.device, s.tokens * columns, swiglu_gradients.TILE)

    def variant(tile: Tile) -> Variant:
        def run() -> object:
            return swiglu_gradients_(dh, gate_up, room, thin, low, d_input, d_outputs, arrived, tile)

        return Variant(_label(tile), Call(run, put_back), tile == now, tile)

    return [variant(Tile(*sizes)) for sizes in itertools.product((16, 32, 64), (4, 8), (1, 2, 3, 4))]


def _outer_down(s: Setting) -> list[Variant]:
    group, hidden = s.layer.gate_up, s.shape.hidden_size
    ranks = len(_lora(group).down.value)
    x, thin = s.random(s.tokens, hidden), s.random(s.tokens, ranks, room=group.num_outputs)
    norm = torch.rand(s.tokens, device=s.device) + 0.5, s.layer.mlp_norm.value
    gradient = torch.zeros(ranks, hidden, device=s.device).t()
    now = tiles.chosen("outer_normed", s.device, s.tokens * hidden, outer.TILE)
    return _outer(now, lambda tile: add_outer_(gradient, x, thin, _lora(group).arrived, norm, tile=tile))


def _outer_up(s: Setting) -> list[Variant]:
    group = s.layer.qkv
    lora = _lora(group)
    x, thin = s.random(s.tokens, group.num_outputs, room=group.padded_rank), s.random(s.tokens, group.padded_rank)
    gradient = torch.zeros(group.num_outputs, lora.up.shape[1], device=s.device)
    starts = [block.output.start for block in lora.blocks[1:]]
    now = tiles.chosen("outer", s.device, s.tokens * group.num_outputs, outer.TILE)
    return _outer(now, lambda tile: add_outer_(gradient, x, thin, lora.arrived, starts=starts, tile=tile))


def _outer(now: Tile, run: Callable[[Tile], object]) -> list[Variant]:
    def variant(tile: Tile) -> Variant:
        return Variant(_label(tile), Call(lambda: run(tile)), tile == now, tile)

    return [variant(Tile(tokens, 4, stages)) for tokens, stages in itertools.product((64, 128, 256), (2, 3, 4))]


def _cross_entropy(s: Setting) -> list[Variant]:
    rows, vocabulary = min(s.tokens, 2048), s.shape.vocab_size
    logits, losses = s.random(rows, vocabulary), torch.empty(rows, dtype=torch.float32, device=s.device)
    targets = torch.randint(vocabulary, (rows,), device=s.device)
    scale, put_back = torch.full((), 1 / rows, device=s.device), restore(logits)
    now = tiles.chosen("cross_entropy", s.device, rows * vocabulary, cross_entropy.SWEEP)

    def variant(sweep: Sweep) -> Variant:
        label = f"block {sweep.block}, {sweep.warps} warps{', hints to the cache' if sweep.first else ''}"
        return Variant(label, Call(lambda: cross_entropy_(logits, targets, losses, scale, sweep), put_back), sweep == now, sweep)

    plain = [Sweep(*sizes) for sizes in itertools.product((4096, 8192, 16384), (8, 16, 32))]
    return [variant(each) for sweep in plain for each in (sweep, replace(sweep, first="evict_last", second="evict_first"))]


def _decode_nf4(s: Setting) -> list[Variant]:
    group = s.layer.down
    weight = placed(quantise(torch.randn(group.num_outputs, group.num_inputs).to(s.dtype)), s.device)
    into = s.random(group.num_outputs, group.num_inputs, room=group.padded_rank)
    now = tiles.chosen("decode_nf4", s.device, group.num_outputs * group.num_inputs, nf4.CUT)

    def variant(cut: Cut) -> Variant:
        return Variant(f"{cut.parts} parts, {cut.warps} warps", Call(lambda: decode_nf4(weight, into, cut)), cut == now, cut)

    return [variant(Cut(*sizes)) for sizes in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8))]


def _fill(s: Setting, group: Linear) -> list[Variant]:
    dy = s.random(s.tokens, group.num_outputs + group.padded_rank)
    lora, inputs, outputs = _lora(group), group.num_inputs, group.num_outputs

    def apart() -> None:
        for block in lora.blocks:
            into = dy[:, outputs + block.rank.start : outputs + block.rank.stop]
            torch.addmm(into, dy[:, block.output], block.up.value, beta=0, alpha=lora.scale, out=into)

    def without_padding() -> None:
        ranks = len(lora.down.value)
        up, into = group.wide[:outputs, inputs : inputs + ranks], dy[:, outputs : outputs + ranks]
        torch.addmm(into, dy[:, :outputs], up, beta=0, alpha=lora.scale, out=into)

    return [
        Variant("one product", Call(lambda: fused_ops.fill(dy, group)), True),
        Variant("one product without the padding", Call(without_padding), False),
        Variant("a product a block", Call(apart), False),
    ]


def _head(s: Setting) -> list[Variant]:
    hidden, vocabulary = s.shape.hidden_size, s.shape.vocab_size
    x, targets = s.random(s.tokens, hidden), torch.randint(vocabulary, (s.tokens,), device=s.device)
    head: Weight = Weight(_scaled(s.random(vocabulary, hidden)))
    scale = torch.full((), 1 / s.tokens, device=s.device)

    def variant(chunk: int) -> Variant:
        return Variant(f"chunk {chunk}", Call(lambda: fused_ops.cross_entropy(x, head, targets, scale, chunk)), chunk == 2048)

    return [variant(chunk) for chunk in (1024, 2048, 4096, 8192)]


def _attention(kernel: str) -> Callable[[Setting], list[Variant]]:
    """Of one of the three kernels of short documents; the other of a backward pass keeps its own cut, and its time counts in both."""

    def make(s: Setting) -> list[Variant]:
        heads, packed, dy = s.heads(), s.packed(s.short), s.random(s.tokens, s.shape.num_heads, s.shape.head_dim)
        given, y = (heads.queries, heads.keys, heads.values), s.random(s.tokens, s.shape.num_heads, s.shape.head_dim)
        sums, bounds = attend(*given, packed.begins, y), (packed.begins, packed.ends)
        name = attention._name(kernel, s.shape.head_dim)
        now = tiles.chosen(name, s.device, s.tokens * s.shape.query_size, attention.CUTS[name])

        def run(cut: attention.Cut) -> object:
            if kernel == "attend":
                return attend(*given, packed.begins, y, cut)
            cuts = (cut, None) if kernel == "attend_backward_queries" else (None, cut)
            return attend_backward(dy, *given, y, sums, *bounds, *cuts)

        def variant(cut: attention.Cut) -> Variant:
            label = f"{cut.queries} queries, {cut.keys} keys, {cut.warps} warps, {cut.stages} stages{', apart' if cut.apart else ''}"
            return Variant(label, Call(lambda: run(cut)), cut == now, cut)

        return [variant(cut) for cut in attention.CANDIDATES[name]]

    return make


VARIANTS: Mapping[str, Callable[[Setting], list[Variant]]] = {
    "swiglu_gradients": _swiglu_gradients,
    "outer_dA": _outer_down,
    "outer_dB": _outer_up,
    "cross_entropy": _cross_entropy,
    "decode_nf4": _decode_nf4,
    **{kernel: _attention(kernel) for kernel in ("attend", "attend_backward_queries", "attend_backward_keys")},
    "fill_qkv": lambda s: _fill(s, s.layer.qkv),
    "fill_gate_up": lambda s: _fill(s, s.layer.gate_up),
    "head": _head,
}


def _lora(group: Linear) -> LowRank:
    assert group.lora is not None
    return group.lora


def _scaled(weight: Tensor) -> Tensor:
    return weight.mul_(0.02)


def _label(tile: Tile) -> str:
    return f"{tile.tokens} tokens, {tile.warps} warps, {tile.stages} stages"
