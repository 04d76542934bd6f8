"""How long a step takes under its plans: a model that ranks plans, not a promise.

Legend: T tokens, H hidden, I intermediate, N columns of query, key and value, Q of the queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engines.native.footprint import MemoryModel
from engines.native.plan import Name, Plan

# What an H100 does a second: products, passes over memory, copies to the host and back (docs/engine.md).
_FLOPS, _BYTES = 680e12, 2.8e12
_OUTWARD, INWARD = 51e9, 54e9
# 8-bit products beside their time in bf16 (H100, in whole steps of 8B; alone 1.8 to 2.0), and rounding their input first, read and written.
_FP8_SPEED, _FP8_PASSES = 1.6, 1.5
_CHAIN: tuple[Name, ...] = ("heads", "attended", "middle")  # each is made from the one before
_ATTENTION_BACKWARD = 4.0  # times the forward pass (cuDNN, 0.26 and 0.98 ms at 4 x 2,048)
# Guesses that stand for launches, tails of short products and joining: not measured.
_PIECE_SECONDS, _CHUNK_SECONDS = 5e-5, 2e-4


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """One layer under one plan: computing the halves of its forward and of its backward pass, with what they make again, and copying
    what leaves for the host (``away``), what has to be back ``early`` and what later (``late``)."""

    attention: float
    mlp: float
    mlp_backward: float
    attention_backward: float
    away: float
    early: float
    late: float


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds of the parts of a step whose bytes ``memory`` knows."""

    memory: MemoryModel

    def of(self, name: Name) -> float:
        """Making one tensor of one layer, the first time or again."""
        shape, load = self.memory.shape, self.memory.load
        hidden, inner, queries = shape.hidden_size, shape.intermediate_size, shape.query_size
        heads = queries + 2 * shape.key_size
        flops = {
            "heads": 2 * hidden * heads,
            "attended": 2 * load.longest * shape.query_size,
            "middle": 2 * hidden * shape.query_size,
            "gate_up": 4 * hidden * inner,
        }
        passes = {"heads": 3 * hidden + 3 * heads, "attended": 3 * shape.query_size, "middle": hidden, "gate_up": 3 * hidden + 2 * inner}
        if name == "attended":
            return self._work(flops[name], passes[name])
        return self._products(flops.get(name, 0), passes.get(name, 0), queries if name == "middle" else hidden if name in flops else 0)

    def layer(self, plan: Plan) -> LayerSeconds:
        """A layer under ``plan``."""
        shape, memory, held = self.memory.shape, self.memory, plan.held
        hidden, inner, queries = shape.hidden_size, shape.intermediate_size, shape.query_size
        heads = queries + 2 * shape.key_size
        missing = [name for name in _CHAIN if name not in held]
        # Made again from the right: the first held tensor ends it, and what stands before that waits for the second half.
        at_once = [] if "middle" in held else [name for name in missing if name != "heads" or "attended" not in held]
        again = self._sum(at_once)
        again_later = self._sum(missing) - again
        if "gate_up" not in held:
            again += self.of("gate_up")
        pieces = (plan.pieces - 1) * _PIECE_SECONDS
        early = memory.total(plan.early)
        return LayerSeconds(
            self._sum(_CHAIN),
            self.of("gate_up") + self._products(2 * hidden * inner, 3 * inner + 2 * hidden, inner) + ("gate_up" not in held) * pieces,
            self._gradients(6 * hidden * inner, 10 * inner + 8 * hidden, hidden + 2 * inner) + again + pieces,
            self._gradients(2 * hidden * (queries + heads), 6 * (hidden + heads), hidden + heads)
            + _ATTENTION_BACKWARD * self.of("attended")
            + again_later,
            memory.total(plan.offloaded) / _OUTWARD,
            early / INWARD,
            (memory.total(plan.offloaded) - early) / INWARD,
        )

    def step(self, layers: Sequence[LayerSeconds], loss_chunk: int) -> float:
        """Forward, loss and backward, waiting for copies where ``LayerPass`` does; a copy that is over in time costs nothing."""
        now = bus = 0.0
        for layer in layers:
            now = max(now + layer.attention, bus)  # what the layer before sent away has left
            bus = now + layer.away
            now += layer.mlp
        now = max(now, bus) + self._loss(loss_chunk)
        bus = arrived = now + layers[-1].early
        for index in range(len(layers) - 1, -1, -1):
            layer = layers[index]
            now = max(now, arrived)
            bus = late = max(bus, now) + layer.late
            now = max(now + layer.mlp_backward, late)
            bus = arrived = max(bus, now) + (layers[index - 1].early if index else 0.0)
            now += layer.attention_backward
        return now

    def _sum(self, names: Iterable[Name]) -> float:
        return sum(self.of(name) for name in names)

    def _products(self, flops: float, columns: float, inputs: float) -> float:
        """Of the forward pass, ``inputs`` the columns that are rounded where that is done in 8 bits."""
        if self.memory.fp8 is None:
            return self._work(flops, columns)
        return self._work(flops / _FP8_SPEED, columns + _FP8_PASSES * inputs)

    def _gradients(self, flops: float, columns: float, inputs: float) -> float:
        """The same of the gradients of inputs."""
        return self._products(flops, columns, inputs) if self.memory.fp8 == "forward_and_input_gradients" else self._work(flops, columns)

    def _work(self, flops: float, columns: float) -> float:
        memory = self.memory
        return memory.load.num_tokens * (flops / _FLOPS + columns * memory.element_bytes / _BYTES)

    def _loss(self, chunk: int) -> float:
        rows, shape = self.memory.load.num_rows, self.memory.shape
        return rows * 4 * shape.hidden_size * shape.vocab_size / _FLOPS + -(-rows // chunk) * _CHUNK_SECONDS
